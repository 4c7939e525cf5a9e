//! A socket filter (classic BPF) that drops a share of handshake initiations before they are queued, so that a flood of
//! them costs neither a system call nor a wake-up. Data, answers and cookies are never touched. Of datagrams that arrive
//! joined the first is judged for all.
//!
//! Offsets count from the UDP header, where filters of UDP sockets begin (`udp_queue_rcv_one_skb`, net/ipv4/udp.c;
//! Documentation/networking/filter.rst).
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{
    BPF_ABS, BPF_ALU, BPF_B, BPF_JMP, BPF_K, BPF_LD, BPF_LDX, BPF_MEM, BPF_RET, BPF_ST, BPF_W, BPF_X,
};
use libc::{BPF_AND, BPF_JA, BPF_JEQ, BPF_JGE, BPF_MUL, BPF_XOR, sock_filter};

use crate::shed::{ALL, Class, MIX, Shedding, number};
use crate::sys::check;

const UDP_HEADER: u32 = 8;
const INITIATION: u32 = 1;
// The MAC under the cookie (WireGuard paper, section 5.4.2): the last 16 of 148 bytes.
const COOKIE_MAC: u32 = UDP_HEADER + 132;
const SOURCE_V4: u32 = libc::SKF_NET_OFF.cast_unsigned() + 12;
const SOURCE_V6: u32 = libc::SKF_NET_OFF.cast_unsigned() + 8;
const RANDOM: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_RANDOM).cast_unsigned();
const TAKE: u32 = u32::MAX;
const DROP: u32 = 0;
// Addresses at the end of a search that are compared one by one.
const LEAF: usize = 8;
/// The filter for the IPv4 or the IPv6 socket.
pub(super) fn program(shedding: &Shedding, v6: bool) -> Vec<sock_filter> {
    let mut code = Code::default();
    code.load(BPF_B, UDP_HEADER);
    code.if_equal(INITIATION, 1, 0);
    code.op(BPF_RET | BPF_K, TAKE);
    // Four words; the first that is not zero leads to the claims.
    for word in 0..4 {
        code.load(BPF_W, COOKIE_MAC + 4 * word);
        code.if_equal(0, 1, 0);
        code.jump(Label::Claiming);
    }
    if v6 {
        code.mixed_source();
    } else {
        code.load(BPF_W, SOURCE_V4);
    }
    let mut keys: Vec<u32> = shedding
        .familiar
        .iter()
        .filter(|address| address.is_ipv6() == v6)
        .map(|address| number(*address))
        .collect();
    keys.sort_unstable();
    keys.dedup();
    code.search(&keys);
    for (label, class) in [
        (Label::Stranger, Class::Stranger),
        (Label::Familiar, Class::Familiar),
        (Label::Claiming, Class::Claiming),
    ] {
        code.here(label);
        code.verdict(shedding.shares[class as usize]);
    }
    code.finish()
}

#[derive(Clone, Copy)]
enum Label {
    Stranger,
    Familiar,
    Claiming,
}

// Conditional jumps reach 255 instructions far, others any number; jumps to labels are filled in at the end.
#[derive(Default)]
struct Code {
    code: Vec<sock_filter>,
    open: Vec<(usize, Label)>,
    labels: [usize; 3],
}

impl Code {
    fn op(&mut self, code: u32, k: u32) {
        self.code.push(sock_filter { code: code as u16, jt: 0, jf: 0, k });
    }

    fn load(&mut self, size: u32, at: u32) {
        self.op(BPF_LD | size | BPF_ABS, at);
    }

    fn branch(&mut self, test: u32, k: u32, jt: usize, jf: usize) {
        self.code.push(sock_filter { code: (BPF_JMP | test | BPF_K) as u16, jt: jt as u8, jf: jf as u8, k });
    }

    fn if_equal(&mut self, k: u32, jt: usize, jf: usize) {
        self.branch(BPF_JEQ, k, jt, jf);
    }

    fn jump(&mut self, to: Label) {
        self.open.push((self.code.len(), to));
        self.op(BPF_JMP | BPF_JA, 0);
    }

    fn here(&mut self, label: Label) {
        self.labels[label as usize] = self.code.len();
    }

    fn mixed_source(&mut self) {
        for (i, mix) in MIX.into_iter().enumerate() {
            self.load(BPF_W, SOURCE_V6 + 4 * i as u32);
            self.op(BPF_ALU | BPF_MUL | BPF_K, mix);
            if i > 0 {
                self.op(BPF_LDX | BPF_W | BPF_MEM, 0);
                self.op(BPF_ALU | BPF_XOR | BPF_X, 0);
            }
            self.op(BPF_ST, 0);
        }
    }

    // Jumps to one of two labels by whether the accumulator is among these numbers, which are in order.
    fn search(&mut self, keys: &[u32]) {
        if keys.len() <= LEAF {
            for (i, key) in keys.iter().enumerate() {
                self.if_equal(*key, keys.len() - i, 0);
            }
            self.jump(Label::Stranger);
            self.jump(Label::Familiar);
            return;
        }
        let (low, high) = keys.split_at(keys.len() / 2);
        self.branch(BPF_JGE, high[0], 0, 1);
        let over = self.code.len();
        self.op(BPF_JMP | BPF_JA, 0);
        self.search(low);
        self.code[over].k = (self.code.len() - over - 1) as u32;
        self.search(high);
    }

    fn verdict(&mut self, share: u32) {
        if share < ALL {
            self.load(BPF_W, RANDOM);
            self.op(BPF_ALU | BPF_AND | BPF_K, ALL - 1);
            self.branch(BPF_JGE, share, 0, 1);
            self.op(BPF_RET | BPF_K, DROP);
        }
        self.op(BPF_RET | BPF_K, TAKE);
    }

    fn finish(mut self) -> Vec<sock_filter> {
        for (at, label) in self.open {
            self.code[at].k = (self.labels[label as usize] - at - 1) as u32;
        }
        self.code
    }
}

/// Puts a filter in the place of the one before.
pub(super) fn attach(fd: BorrowedFd<'_>, program: &[sock_filter]) -> io::Result<()> {
    let length = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let filter = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    let put = || set(fd, libc::SO_ATTACH_FILTER, (&raw const filter).cast(), size_of_val(&filter));
    match put() {
        // Until it is replaced the old one counts too, and `net.core.optmem_max` was small once.
        Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => detach(fd).and_then(|()| put()),
        result => result,
    }
}

/// Takes the filter away, if there is one.
pub(super) fn detach(fd: BorrowedFd<'_>) -> io::Result<()> {
    let unused: libc::c_int = 0;
    match set(fd, libc::SO_DETACH_FILTER, (&raw const unused).cast(), size_of_val(&unused)) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        result => result,
    }
}

fn set(fd: BorrowedFd<'_>, name: libc::c_int, value: *const libc::c_void, length: usize) -> io::Result<()> {
    // SAFETY: both callers pass a value of the option's type, whose program outlives the call; the kernel only reads.
    check(unsafe {
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, value, length as libc::socklen_t)
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, SocketAddr, UdpSocket};
    use std::os::fd::AsFd;
    use std::time::Duration;

    use super::*;
    use crate::shed::MOST_FAMILIAR;

    // A socket with a filter, and what gets through it from an address.
    struct Filtered(UdpSocket);

    impl Filtered {
        fn new(at: &str, shares: [u32; 3], familiar: Vec<IpAddr>) -> Self {
            let socket = UdpSocket::bind((at, 0)).unwrap();
            let shedding = Shedding { shares, familiar };
            attach(socket.as_fd(), &program(&shedding, at.contains(':'))).unwrap();
            Self(socket)
        }

        fn passes(&self, from: &str, datagram: &[u8], times: usize) -> usize {
            let sender = UdpSocket::bind((from, 0)).unwrap();
            let to: SocketAddr = self.0.local_addr().unwrap();
            for _ in 0..times {
                sender.send_to(datagram, to).unwrap();
            }
            // Loopback delivers within the call that sends.
            self.0.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
            let mut buffer = [0; 2048];
            std::iter::from_fn(|| self.0.recv(&mut buffer).ok()).filter(|n| *n == datagram.len()).count()
        }
    }

    fn initiation(cookie_byte: Option<usize>) -> Vec<u8> {
        let mut message = vec![7; 148];
        message[..4].copy_from_slice(&[1, 0, 0, 0]);
        message[132..].fill(0);
        if let Some(at) = cookie_byte {
            message[132 + at] = 1;
        }
        message
    }

    #[test]
    fn strangers_are_dropped_and_peers_cookies_and_all_else_pass() {
        let peer = IpAddr::from([127, 0, 0, 2]);
        let filtered = Filtered::new("127.0.0.1", [0, ALL, ALL], vec![peer]);
        assert_eq!(filtered.passes("127.0.0.1", &initiation(None), 5), 0);
        assert_eq!(filtered.passes("127.0.0.3", &initiation(None), 5), 0);
        assert_eq!(filtered.passes("127.0.0.2", &initiation(None), 5), 5);
        for byte in 0..16 {
            assert_eq!(filtered.passes("127.0.0.1", &initiation(Some(byte)), 1), 1, "byte {byte}");
        }
        let mut data = initiation(None);
        data[0] = 4;
        assert_eq!(filtered.passes("127.0.0.1", &data, 5), 5);
        for other in [&data[..32], &[2; 92], &[3; 64], &[0; 1400], &[9]] {
            assert_eq!(filtered.passes("127.0.0.1", other, 3), 3, "{} bytes", other.len());
        }
        detach(filtered.0.as_fd()).unwrap();
        detach(filtered.0.as_fd()).unwrap();
        assert_eq!(filtered.passes("127.0.0.1", &initiation(None), 5), 5);
    }

    #[test]
    fn each_class_has_a_share_of_its_own() {
        let peer = IpAddr::from([127, 0, 0, 2]);
        let filtered = Filtered::new("127.0.0.1", [ALL, 0, ALL / 4], vec![peer]);
        assert_eq!(filtered.passes("127.0.0.1", &initiation(None), 5), 5);
        assert_eq!(filtered.passes("127.0.0.2", &initiation(None), 5), 0);
        let mut claims = 0;
        for _ in 0..40 {
            claims += filtered.passes("127.0.0.1", &initiation(Some(3)), 50);
        }
        // Of 2,000 a quarter; 120 is six times the standard deviation.
        assert!((380..=620).contains(&claims), "{claims}");
    }

    #[test]
    fn ipv6_peers_are_told_from_strangers() {
        if UdpSocket::bind("[::1]:0").is_err() {
            println!("SKIPPED ipv6_peers_are_told_from_strangers: no IPv6 on loopback");
            assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "under CI nothing is skipped");
            return;
        }
        let loopback: IpAddr = "::1".parse().unwrap();
        let other: IpAddr = "::2".parse().unwrap();
        let filtered = Filtered::new("::1", [0, ALL, ALL], vec![loopback]);
        assert_eq!(filtered.passes("::1", &initiation(None), 5), 5);
        let filtered = Filtered::new("::1", [0, ALL, ALL], vec![other]);
        assert_eq!(filtered.passes("::1", &initiation(None), 5), 0);
    }

    #[test]
    fn as_many_peers_as_may_be_fit_and_each_is_found() {
        let all = |i: u32| IpAddr::from((0x7f00_0100 + 3 * i).to_be_bytes());
        let filtered =
            Filtered::new("127.0.0.1", [0, ALL, ALL], (0..MOST_FAMILIAR as u32).map(all).collect());
        for i in (0..MOST_FAMILIAR as u32).step_by(13).chain([MOST_FAMILIAR as u32 - 1]) {
            let IpAddr::V4(peer) = all(i) else { unreachable!() };
            assert_eq!(filtered.passes(&peer.to_string(), &initiation(None), 1), 1, "{peer}");
            let neighbour = std::net::Ipv4Addr::from(u32::from(peer) + 1);
            assert_eq!(filtered.passes(&neighbour.to_string(), &initiation(None), 1), 0, "{neighbour}");
        }
        // The IPv6 socket's filter is longer by its mixing.
        let all = |i: u32| IpAddr::from(std::net::Ipv6Addr::from(0xfd00 << 112 | u128::from(i) << 17));
        Filtered::new("::1", [0; 3], (0..MOST_FAMILIAR as u32).map(all).collect());
    }
}
