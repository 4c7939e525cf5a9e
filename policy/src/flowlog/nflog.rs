//! Packets that rules log, from the kernel (include/uapi/linux/netfilter/nfnetlink_log.h).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

/// Message types: subsystem `NFNL_SUBSYS_ULOG` in the upper byte, `nfulnl_msg_types` in the lower.
const PACKET: u16 = 4 << 8;
const CONFIG: u16 = 4 << 8 | 1;
/// `NLMSG_ERROR`, which is also an acknowledgement.
const ERROR: u16 = 2;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const REQUEST_ACK: u16 = 0x01 | 0x04;
/// `ENOBUFS` as the kernel numbers it on all architectures that this runs on.
const ENOBUFS: i32 = 105;

/// `nfulnl_attr_type`.
mod attribute {
    pub(super) const INPUT: u16 = 4;
    pub(super) const OUTPUT: u16 = 5;
    pub(super) const PAYLOAD: u16 = 9;
    pub(super) const PREFIX: u16 = 10;
}

/// `nfulnl_attr_config`, and what goes into it.
mod config {
    pub(super) const COMMAND: u16 = 1;
    pub(super) const MODE: u16 = 2;
    pub(super) const TIMEOUT: u16 = 4;
    pub(super) const THRESHOLD: u16 = 5;
    /// `NFULNL_CFG_CMD_BIND`.
    pub(super) const BIND: u8 = 1;
    /// `NFULNL_COPY_PACKET`.
    pub(super) const COPY_PACKET: u8 = 2;
}

/// Length in bytes of `nlmsghdr`, of `nfgenmsg` behind it, and of `nlattr`.
const HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;
const ATTRIBUTE_HEADER: usize = 4;

/// Bytes of each packet: an IPv6 header, 32 bytes of extensions and all of a TCP header that says something.
const RANGE: u32 = 96;
/// Packets that the kernel gathers before it wakes us up.
const THRESHOLD: u32 = 16;
/// How long it waits for them, in 1/100 s.
const TIMEOUT: u32 = 10;
/// More bytes than the kernel puts into one datagram at that range: a page, at most 8 KiB, unless told otherwise.
const DATAGRAM: usize = 32_768;

/// A packet as a rule logged it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Logged<'a> {
    /// What the rule puts before it, without the NUL at its end.
    pub prefix: &'a [u8],
    /// Index of the interface it came in by, where the hook has one.
    pub input: Option<u32>,
    /// Index of the interface it goes out by, where the hook has one.
    pub output: Option<u32>,
    /// Its first bytes, from the IP header on.
    pub packet: &'a [u8],
}

/// Listens to one NFLOG group of the network namespace it was opened in, until it is dropped. Never blocks: poll it,
/// or give it to a reactor.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    buffer: Vec<u8>,
    overruns: u64,
}

impl Listener {
    /// Begins to listen. `receive_buffer` is what the kernel may hold for us, in bytes as it accounts them: with its own
    /// overhead, and at most `net.core.rmem_max`.
    ///
    /// # Errors
    /// What the kernel says: `EPERM` without `CAP_NET_ADMIN` in the namespace, or when another socket has the group.
    pub fn new(group: u16, receive_buffer: u32) -> io::Result<Self> {
        Self::with_range(group, receive_buffer, RANGE)
    }

    /// The same for rules that copy more of a packet: the kernel hands on the less of the two, in bytes.
    ///
    /// # Errors
    /// As [`Listener::new`].
    pub fn with_range(group: u16, receive_buffer: u32, range: u32) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.set_non_blocking(true)?;
        socket.set_rx_buf_sz(receive_buffer)?;
        let mut listener = Self { socket, buffer: Vec::with_capacity(DATAGRAM), overruns: 0 };
        listener.configure(&bind(group, range))?;
        Ok(listener)
    }

    /// How often the kernel had no room for more and threw packets away, since the beginning.
    pub fn overruns(&self) -> u64 {
        self.overruns
    }

    /// Takes all packets that wait, and returns when there are none. Under a flood that is late: rules should limit what
    /// they log.
    ///
    /// # Errors
    /// When the socket broke. An overrun is none: it is counted.
    pub fn receive(&mut self, mut each: impl FnMut(Logged<'_>)) -> io::Result<()> {
        while self.receive_some(usize::MAX, &mut each)? {}
        Ok(())
    }

    /// Takes packets that wait, of so many reads at most. Returns whether there may be more: whoever waits for the socket to become
    /// readable has to come back by himself then.
    ///
    /// # Errors
    /// As [`Listener::receive`].
    pub fn receive_some(&mut self, most: usize, mut each: impl FnMut(Logged<'_>)) -> io::Result<bool> {
        for _ in 0..most {
            match self.datagram() {
                Ok(()) => parse(&self.buffer, &mut each),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(ENOBUFS) => {
                    self.overruns = self.overruns.saturating_add(1);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn datagram(&mut self) -> io::Result<()> {
        self.buffer.clear();
        self.socket.recv(&mut self.buffer, 0).map(|_| ())
    }

    /// Sends a request and reads its acknowledgement, which the kernel writes within the call. Packets that come before
    /// it are not told.
    fn configure(&mut self, request: &[u8]) -> io::Result<()> {
        self.socket.send_to(request, &SocketAddr::new(0, 0), 0)?;
        loop {
            match self.datagram() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                received => received?,
            }
            if let Some(code) = messages(&self.buffer).find_map(|(kind, body)| acknowledged(kind, body)) {
                return if code == 0 {
                    Ok(())
                } else {
                    Err(io::Error::from_raw_os_error(code.saturating_neg()))
                };
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// Reads a datagram of an NFLOG group: every packet in it, in order. What is no packet, or is cut off, is passed over.
pub fn parse(datagram: &[u8], mut each: impl FnMut(Logged<'_>)) {
    for (kind, body) in messages(datagram) {
        if kind != PACKET {
            continue;
        }
        let mut logged = Logged::default();
        for (kind, value) in attributes(body.get(FAMILY_HEADER..).unwrap_or_default()) {
            match kind {
                attribute::INPUT => logged.input = big_endian(value),
                attribute::OUTPUT => logged.output = big_endian(value),
                attribute::PAYLOAD => logged.packet = value,
                attribute::PREFIX => logged.prefix = value.strip_suffix(&[0]).unwrap_or(value),
                _ => {}
            }
        }
        each(logged);
    }
}

/// Types and bodies of the netlink messages in a datagram.
fn messages(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32::from_ne_bytes(*rest.first_chunk()?)).ok()?;
        let kind = u16::from_ne_bytes(*rest.get(4..)?.first_chunk()?);
        let body = rest.get(HEADER..length)?;
        rest = rest.get(length.checked_next_multiple_of(4)?..).unwrap_or_default();
        Some((kind, body))
    })
}

/// Types and values of the attributes in a message.
fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        // The upper two bits are flags.
        let kind = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?) & 0x3fff;
        let value = rest.get(ATTRIBUTE_HEADER..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The negative error number of an answer, 0 for success. There is one request on the socket, hence one answer.
fn acknowledged(kind: u16, body: &[u8]) -> Option<i32> {
    (kind == ERROR).then(|| body.first_chunk().copied().map(i32::from_ne_bytes))?
}

fn big_endian(value: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(value.try_into().ok()?))
}

/// The request that makes a group ours. `NFULNL_CFG_CMD_PF_BIND` is left out: nftables needs no such binding.
fn bind(group: u16, range: u32) -> Vec<u8> {
    let mode = [&range.to_be_bytes()[..], &[config::COPY_PACKET, 0]].concat();
    let mut body = vec![0, 0];
    body.extend(group.to_be_bytes());
    push(&mut body, config::COMMAND, &[config::BIND]);
    push(&mut body, config::MODE, &mode);
    push(&mut body, config::TIMEOUT, &TIMEOUT.to_be_bytes());
    push(&mut body, config::THRESHOLD, &THRESHOLD.to_be_bytes());
    message(CONFIG, REQUEST_ACK, &body)
}

/// Adds an attribute. All of ours are short.
fn push(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(ATTRIBUTE_HEADER + value.len()).unwrap_or(u16::MAX);
    body.extend(length.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// A netlink message with sequence number 1 from port 0, which the kernel fills in.
fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend(1_u32.to_ne_bytes());
    message.extend(0_u32.to_ne_bytes());
    message.extend(body);
    message
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As the kernel writes it: with a header, a mark and other attributes that nobody asked for.
    fn packet(prefix: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut body = vec![2, 0, 0, 7];
        push(&mut body, 1, &[0x08, 0x00, 2, 0]);
        push(&mut body, attribute::PREFIX, prefix);
        push(&mut body, attribute::INPUT, &3_u32.to_be_bytes());
        push(&mut body, 3, &[0; 16]);
        push(&mut body, attribute::PAYLOAD, payload);
        let mut message = message(PACKET, 0, &body);
        message.resize(message.len().next_multiple_of(4), 0);
        message
    }

    /// Prefix, both interfaces, packet.
    type Parsed = (Vec<u8>, Option<u32>, Option<u32>, Vec<u8>);

    fn parsed(datagram: &[u8]) -> Vec<Parsed> {
        let mut found = Vec::new();
        parse(datagram, |it| found.push((it.prefix.to_vec(), it.input, it.output, it.packet.to_vec())));
        found
    }

    #[test]
    fn all_packets_of_a_datagram_are_told_in_order() {
        let done = message(3, 2, &[0; 4]);
        let datagram = [packet(b"one\0", b"abcde"), packet(b"two", b""), done, packet(b"\0", b"z")].concat();
        let expected = [(&b"one"[..], &b"abcde"[..]), (b"two", b""), (b"", b"z")];
        let expected = expected.map(|(prefix, packet)| (prefix.to_vec(), Some(3), None, packet.to_vec()));
        assert_eq!(parsed(&datagram), expected);
    }

    #[test]
    fn messages_of_other_kinds_are_passed_over() {
        assert_eq!(parsed(&message(PACKET | 1, 0, &[0; 4])), []);
        assert_eq!(parsed(&message(ERROR, 0, &[0; 20])), []);
    }

    #[test]
    fn what_is_cut_off_is_not_told() {
        let whole = packet(b"one\0", b"abcd");
        assert_eq!(parsed(&[&whole[..], &whole[..whole.len() - 1]].concat()).len(), 1);
        assert_eq!(parsed(&whole[..HEADER - 1]), []);
        // A message or an attribute that is shorter than its own header would never end.
        assert_eq!(parsed(&[0; 64]), []);
        assert_eq!(parsed(&message(PACKET, 0, &[0; 64])), [(vec![], None, None, vec![])]);
    }

    #[test]
    fn an_index_of_another_width_is_none() {
        let mut body = vec![0; 4];
        push(&mut body, attribute::INPUT, &[1, 2]);
        push(&mut body, attribute::OUTPUT, &[0, 0, 1, 2]);
        assert_eq!(parsed(&message(PACKET, 0, &body)), [(vec![], None, Some(258), vec![])]);
    }

    #[test]
    fn the_answer_to_a_request_has_its_error() {
        assert_eq!(acknowledged(ERROR, &(-1_i32).to_ne_bytes()), Some(-1));
        assert_eq!(acknowledged(ERROR, &[0; 20]), Some(0));
        assert_eq!(acknowledged(ERROR, &[0; 3]), None);
        assert_eq!(acknowledged(PACKET, &[0; 20]), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            parsed(&bytes);
        }

        #[test]
        fn a_datagram_with_any_damage_is_parsed(
            prefix in prop::collection::vec(any::<u8>(), 0..70),
            payload in prop::collection::vec(any::<u8>(), 0..96),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
            end: prop::sample::Index,
        ) {
            let mut datagram = [packet(&prefix, &payload), packet(b"second\0", &payload)].concat();
            prop_assert_eq!(parsed(&datagram).len(), 2);
            for (at, byte) in damage {
                let at = at.index(datagram.len());
                datagram[at] = byte;
            }
            let end = end.index(datagram.len() + 1);
            // None is shorter than its header.
            prop_assert!(parsed(&datagram[..end]).len() <= datagram.len() / HEADER);
        }
    }
}
