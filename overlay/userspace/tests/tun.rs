//! TUN devices with each level of offloads, between two hosts that they connect.
#![allow(clippy::unwrap_used)]

mod lab;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lab::{Host, usable, wait_for};
use mesh_wg::features::Features;
use mesh_wg::name::InterfaceName;
use mesh_wg::offload::virtio::VIRTIO_HEADER as HEADER;
use mesh_wg::peer::Endpoint;
use mesh_wg::sys::event::Poll;
use mesh_wg::sys::tun::{LinkWatch, Tun, TunError};
use mesh_wg::sys::udp::{ReceiveBatch, SendBatch, SendReport, UdpPair};

const TOOLS: &[&str] = &["ip", "nsenter", "unshare"];
const LEVELS: [&str; 3] = ["", "tun-uso", "tun-tso"];
const MTU: usize = 1420;
const PATIENCE: Duration = Duration::from_secs(20);
const TCP: u8 = 6;
const UDP: u8 = 17;

fn name() -> InterfaceName {
    "t0".parse().unwrap()
}

fn features(without: &str) -> Features {
    Features { udp_gso: false, udp_gro: false, ..Features::without(without).unwrap() }
}

fn open(host: &Host, without: &str) -> (Tun, LinkWatch) {
    let wanted = Features::without(without).unwrap();
    let mut opened = None;
    // A program that another test is just starting has our descriptors for a moment, those just closed among them.
    wait_for("the link", || {
        opened = host.inside(|| match Tun::open(&name(), wanted) {
            Err(TunError::Taken { source, .. }) if source.raw_os_error() == Some(libc::EBUSY) => None,
            tun => Some((tun.unwrap(), LinkWatch::new().unwrap())),
        });
        opened.is_some()
    });
    let (tun, link) = opened.unwrap();
    assert_eq!(tun.features(), features(without), "this takes Linux 6.2");
    (tun, link)
}

fn header(tun: &Tun) -> usize {
    if tun.features().tun_tso { HEADER } else { 0 }
}

fn up(host: &Host, n: u8) {
    host.run(&format!("ip addr add 10.9.0.{n}/24 dev t0"));
    host.run(&format!("ip addr add fd09::{n}/64 dev t0 nodad"));
    host.run("ip link set t0 up");
}

fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let sum: u32 = words.sum();
    (!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes()
}

/// An ICMP echo request from 10.9.0.2 to 10.9.0.1.
fn echo_request(payload: &[u8]) -> Vec<u8> {
    let length = (28 + payload.len()) as u8;
    let mut packet = vec![0x45, 0, 0, length, 0, 1, 0, 0, 64, 1, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1];
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum);
    let mut message = [[8, 0, 0, 0, 0, 7, 0, 1].as_slice(), payload].concat();
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum);
    packet.extend(message);
    packet
}

#[test]
fn each_level_opens_reads_writes_and_knows_its_link_from_anywhere() {
    if !usable("each_level_opens_reads_writes_and_knows_its_link_from_anywhere", TOOLS) {
        return;
    }
    let elsewhere = Host::new();
    let from_elsewhere = elsewhere.inside(|| LinkWatch::new().unwrap());
    for without in LEVELS {
        let host = Host::new();
        let (tun, link) = open(&host, without);
        assert!(tun.is_new());
        link.set_mtu(&tun, MTU as u16).unwrap();
        let seen = |watch: &LinkWatch| watch.link(&tun).map(|link| (link.mtu, link.up)).unwrap();
        assert_eq!((seen(&link), seen(&from_elsewhere)), ((Some(MTU), false), (None, false)), "{without}");
        up(&host, 1);
        assert_eq!((seen(&link), seen(&from_elsewhere)), ((Some(MTU), true), (None, true)), "{without}");

        let header = header(&tun);
        let request = [vec![0; header], echo_request(b"how are you")].concat();
        assert_eq!(tun.write(&request).unwrap(), request.len());
        let mut buffer = vec![0; 70_000];
        wait_for("the echo reply", || {
            let Ok(length) = tun.read(&mut buffer) else { return false };
            let packet = &buffer[header..length];
            packet[0] == 0x45 && packet[9] == 1 && packet[20] == 0 && packet[28..] == *b"how are you"
        });

        host.run("ip link set t0 down");
        assert_eq!((seen(&link).1, seen(&from_elsewhere).1), (false, false));
        drop(tun);
        wait_for("the end of the link", || !host.has_link("t0"));
    }
}

#[test]
fn a_link_that_someone_has_is_taken_at_every_level() {
    if !usable("a_link_that_someone_has_is_taken_at_every_level", TOOLS) {
        return;
    }
    let host = Host::new();
    for first in LEVELS {
        let _tun = open(&host, first);
        for second in LEVELS {
            let wanted = Features::without(second).unwrap();
            let result = host.inside(|| Tun::open(&name(), wanted));
            assert!(matches!(result, Err(TunError::Taken { .. })), "{result:?}");
        }
    }
}

/// Two hosts whose TUN devices are connected to each other; what is read from one is written to the other as it is.
struct Tunnel {
    hosts: [Host; 2],
    tuns: [Tun; 2],
}

#[derive(Default)]
struct Seen {
    // The longest packet in bytes, by protocol and IP version.
    longest: HashMap<(u8, u8), usize>,
}

impl Tunnel {
    fn new(hosts: [Host; 2], without: &str) -> Self {
        let tuns = [0, 1].map(|i| {
            let (tun, link) = open(&hosts[i], without);
            link.set_mtu(&tun, MTU as u16).unwrap();
            up(&hosts[i], i as u8 + 1);
            tun
        });
        Self { hosts, tuns }
    }

    /// Does something while packets go to and fro, and tells what was seen of these.
    fn while_connected(&self, work: impl FnOnce()) -> Seen {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let carrier = scope.spawn(|| self.carry(&done));
            // Also when the work panics: the scope waits for the thread.
            let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            done.store(true, Ordering::Relaxed);
            let seen = carrier.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            worked.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            seen
        })
    }

    fn carry(&self, done: &AtomicBool) -> Seen {
        let (poll, mut buffer, mut seen) = (Poll::new().unwrap(), vec![0; 70_000], Seen::default());
        for (i, tun) in self.tuns.iter().enumerate() {
            poll.watch(tun.fd(), i as u64).unwrap();
        }
        while !done.load(Ordering::Relaxed) {
            poll.wait(Duration::from_millis(10), |from| {
                let (from, to) = (&self.tuns[from as usize], &self.tuns[1 - from as usize]);
                while let Ok(length) = from.read(&mut buffer) {
                    let packet = &buffer[header(from)..length];
                    let version = packet[0] >> 4;
                    let protocol = if version == 4 { packet[9] } else { packet[6] };
                    let longest = seen.longest.entry((protocol, version)).or_default();
                    *longest = packet.len().max(*longest);
                    assert_eq!(to.write(&buffer[..length]).unwrap(), length);
                }
            })
            .unwrap();
        }
        seen
    }

    fn transfer_by_tcp(&self, to: &str) {
        let address = SocketAddr::from((to.parse::<IpAddr>().unwrap(), 7));
        let listener = self.hosts[1].inside(|| TcpListener::bind(address).unwrap());
        listener.set_nonblocking(true).unwrap();
        let sent: Vec<u8> = (0..4_000_000u32).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect();
        std::thread::scope(|scope| {
            let receiver = scope.spawn(|| {
                let (mut accepted, mut received) = (None, Vec::new());
                wait_for("a connection", || {
                    accepted = listener.accept().ok();
                    accepted.is_some()
                });
                let mut stream = accepted.unwrap().0;
                stream.set_nonblocking(false).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                stream.read_to_end(&mut received).unwrap();
                received
            });
            let mut stream = self.hosts[0].inside(|| TcpStream::connect_timeout(&address, PATIENCE).unwrap());
            stream.set_write_timeout(Some(PATIENCE)).unwrap();
            stream.write_all(&sent).unwrap();
            drop(stream);
            assert!(receiver.join().unwrap() == sent, "the bytes changed on their way to {to}");
        });
    }

    fn send_by_udp(&self, to: &str) {
        let bind = |host: &Host| host.inside(|| UdpPair::bind(0, 0, Features::ALL).unwrap());
        let (a, b) = (bind(&self.hosts[0]), bind(&self.hosts[1]));
        let ip: IpAddr = to.parse().unwrap();
        let endpoint = Endpoint::from(SocketAddr::from((ip, b.port())));
        let mut batch = SendBatch::new();
        for i in 0..30 {
            batch.space(1000).fill(i);
            batch.push(&endpoint, 1000);
        }
        assert_eq!(batch.send(&a, Instant::now()), SendReport::default());
        let fd = if ip.is_ipv4() { b.v4() } else { b.v6().unwrap() };
        let (mut received, mut datagrams) = (ReceiveBatch::new(), Vec::new());
        wait_for("the datagrams", || {
            if received.receive(fd, ReceiveBatch::MAX).is_ok() {
                datagrams.extend(received.trains().flat_map(|train| train.datagrams()).map(<[u8]>::to_vec));
            }
            datagrams.len() >= 30
        });
        assert_eq!(datagrams, (0..30).map(|i| vec![i; 1000]).collect::<Vec<_>>());
    }

    fn expect(&self, without: &str) {
        let seen = self.while_connected(|| {
            for to in ["10.9.0.2", "fd09::2"] {
                self.transfer_by_tcp(to);
                self.send_by_udp(to);
            }
        });
        let wanted = features(without);
        for (protocol, offloaded) in [(TCP, wanted.tun_tso), (UDP, wanted.tun_uso)] {
            for version in [4, 6] {
                let longest = seen.longest[&(protocol, version)];
                assert_eq!(
                    longest > MTU,
                    offloaded,
                    "{longest} bytes of {protocol} over IPv{version}, {wanted}"
                );
            }
        }
    }
}

#[test]
fn super_packets_are_read_and_written_with_their_feature_and_never_without() {
    if !usable("super_packets_are_read_and_written_with_their_feature_and_never_without", TOOLS) {
        return;
    }
    for without in LEVELS {
        Tunnel::new([Host::new(), Host::new()], without).expect(without);
    }
}

#[test]
fn a_link_keeps_nothing_from_whoever_had_it_before() {
    let tools = [TOOLS, &["python3"]].concat();
    if !usable("a_link_keeps_nothing_from_whoever_had_it_before", &tools) {
        return;
    }
    // A persistent link with a header of 12 bytes in the other byte order, where that can be had, and all offloads.
    let script = "import fcntl, os, struct\n\
        TUNSETIFF, TUNSETPERSIST, TUNSETOFFLOAD = 0x400454ca, 0x400454cb, 0x400454d0\n\
        TUNSETVNETHDRSZ, TUNSETVNETLE, TUNSETVNETBE = 0x400454d8, 0x400454dc, 0x400454de\n\
        fd = os.open('/dev/net/tun', os.O_RDWR)\n\
        fcntl.ioctl(fd, TUNSETIFF, struct.pack('16sH22x', b't0', 0x0001 | 0x1000 | 0x4000))\n\
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack('i', 12))\n\
        try: fcntl.ioctl(fd, TUNSETVNETBE, struct.pack('i', 1))\n\
        except OSError: pass\n\
        fcntl.ioctl(fd, TUNSETOFFLOAD, 0x01 | 0x02 | 0x04 | 0x20 | 0x40)\n\
        fcntl.ioctl(fd, TUNSETPERSIST, 1)\n";
    for without in LEVELS {
        let hosts = [Host::new(), Host::new()];
        for host in &hosts {
            let script = host.file("before.py", script);
            host.run(&format!("python3 {script}"));
            assert!(host.has_link("t0"));
        }
        let tunnel = Tunnel::new(hosts, without);
        assert!(tunnel.tuns.iter().all(|tun| !tun.is_new()));
        tunnel.expect(without);
        let Tunnel { hosts, tuns } = tunnel;
        drop(tuns);
        assert!(hosts.iter().all(|host| host.has_link("t0")));
        // And from one level to the next.
        for again in LEVELS {
            let tuns = [0, 1].map(|i| open(&hosts[i], again).0);
            assert!(tuns.iter().all(|tun| tun.features() == features(again)));
        }
    }
}
