//! Batches of datagrams through real sockets: trains, their limits, and what happens where the kernel refuses them.
#![allow(clippy::unwrap_used)]

mod lab;

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use lab::{Host, usable, wait_for};
use mesh_wg::features::Features;
use mesh_wg::peer::Endpoint;
use mesh_wg::sys::udp::{ReceiveBatch, SendBatch, SendReport, UdpPair};

const TOOLS: &[&str] = &["ip", "nsenter", "unshare"];
const A: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
const B: [&str; 2] = ["192.0.2.2", "2001:db8::2"];

fn hosts() -> (Host, Host) {
    let (a, b) = (Host::new(), Host::new());
    a.link(&b, "v0", 1, 2);
    (a, b)
}

fn bind(host: &Host, without: &str) -> UdpPair {
    let wanted = Features::without(without).unwrap();
    host.inside(|| UdpPair::bind(0, 0, wanted).unwrap())
}

fn endpoint(address: &str, pair: &UdpPair) -> Endpoint {
    Endpoint::from(SocketAddr::from((address.parse::<IpAddr>().unwrap(), pair.port())))
}

/// A datagram that tells its number, as far as it has room.
fn datagram(number: usize, length: usize) -> Vec<u8> {
    let mut bytes = vec![number as u8; length];
    for (target, byte) in bytes.iter_mut().zip((number as u32).to_be_bytes()) {
        *target = byte;
    }
    bytes
}

fn push(batch: &mut SendBatch, to: &Endpoint, bytes: &[u8]) {
    assert!(batch.has_room(bytes.len()));
    batch.space(bytes.len()).copy_from_slice(bytes);
    batch.push(to, bytes.len());
}

/// What arrived on both sockets of a pair.
#[derive(Default)]
struct Arrived {
    datagrams: [Vec<Vec<u8>>; 2],
    // Datagrams per train.
    trains: [Vec<usize>; 2],
    from: Vec<Endpoint>,
}

impl Arrived {
    fn wait(pair: &UdpPair, counts: [usize; 2]) -> Self {
        let (mut batch, mut arrived) = (ReceiveBatch::new(), Self::default());
        let what = format!("{counts:?} datagrams");
        wait_for(&what, || {
            for (family, fd) in [Some(pair.v4()), pair.v6()].into_iter().enumerate() {
                while let Some(Ok(_)) = fd.map(|fd| batch.receive(fd, ReceiveBatch::MAX)) {
                    for train in batch.trains() {
                        let before = arrived.datagrams[family].len();
                        if train.bytes.is_empty() {
                            arrived.datagrams[family].push(Vec::new());
                        }
                        arrived.datagrams[family].extend(train.datagrams().map(<[u8]>::to_vec));
                        arrived.trains[family].push(arrived.datagrams[family].len() - before);
                        if !arrived.from.contains(train.from) {
                            arrived.from.push(*train.from);
                        }
                    }
                }
            }
            arrived.datagrams[0].len() >= counts[0] && arrived.datagrams[1].len() >= counts[1]
        });
        arrived
    }
}

#[test]
fn trains_arrive_intact_and_in_order_whichever_features_there_are() {
    if !usable("trains_arrive_intact_and_in_order_whichever_features_there_are", TOOLS) {
        return;
    }
    let (a, b) = hosts();
    let lengths = [[1400; 45].as_slice(), &[7], &[0], &[100; 3], &[101, 100], &[0]].concat();
    let datagrams: Vec<_> = lengths.iter().enumerate().map(|(i, length)| datagram(i, *length)).collect();
    for (without_a, without_b) in [("", ""), ("udp-gso", ""), ("", "udp-gro"), ("udp-gso", "udp-gro")] {
        let (from, to) = (bind(&a, without_a), bind(&b, without_b));
        assert_eq!(from.features().udp_gso, without_a.is_empty());
        assert_eq!(to.features().udp_gro, without_b.is_empty());
        let mut batch = SendBatch::new();
        for family in [0, 1] {
            for bytes in &datagrams {
                push(&mut batch, &endpoint(B[family], &to), bytes);
            }
        }
        assert_eq!(batch.send(&from, Instant::now()), SendReport::default());
        let arrived = Arrived::wait(&to, [datagrams.len(); 2]);
        for family in [0, 1] {
            assert_eq!(arrived.datagrams[family], datagrams, "{without_a:?} {without_b:?}");
            let expected = match (without_a, without_b) {
                ("", "") => vec![46, 1, 3, 2, 1],
                _ => vec![1; datagrams.len()],
            };
            assert_eq!(arrived.trains[family], expected, "{without_a:?} {without_b:?}");
        }
        let expected = [0, 1]
            .map(|family| Endpoint { local: Some(B[family].parse().unwrap()), ..endpoint(A[family], &from) });
        assert_eq!(arrived.from, expected);
    }
}

#[test]
fn more_than_a_message_can_carry_leaves_as_several() {
    if !usable("more_than_a_message_can_carry_leaves_as_several", TOOLS) {
        return;
    }
    let (a, b) = hosts();
    let (from, to, other) = (bind(&a, ""), bind(&b, ""), bind(&b, ""));
    let send = |datagrams: &[(usize, &UdpPair, usize)]| {
        let mut batch = SendBatch::new();
        for (i, (family, to, length)) in datagrams.iter().enumerate() {
            push(&mut batch, &endpoint(B[*family], to), &datagram(i, *length));
        }
        batch.send(&from, Instant::now())
    };
    let numbers = |arrived: &Arrived, family: usize| -> Vec<u32> {
        let number = |bytes: &Vec<u8>| u32::from_be_bytes(bytes[..4].try_into().unwrap());
        arrived.datagrams[family].iter().map(number).collect()
    };

    assert_eq!(send(&[(0, &to, 32); 65]), SendReport::default());
    assert_eq!(Arrived::wait(&to, [65, 0]).trains[0], [64, 1]);
    // 45 times 1,452 bytes are 65,340; with those headers IPv6 would take one more, IPv4 too.
    assert_eq!(send(&[(1, &to, 1452); 100]), SendReport::default());
    let arrived = Arrived::wait(&to, [0, 100]);
    assert_eq!(arrived.trains[1], [45, 45, 10]);
    assert_eq!(numbers(&arrived, 1), (0..100).collect::<Vec<_>>());

    // The endpoint and the family change in the middle of a batch.
    let mixed = [(0, &to), (0, &to), (1, &to), (0, &other), (0, &to), (1, &to), (1, &to), (0, &to)];
    assert_eq!(send(&mixed.map(|(family, to)| (family, to, 500))), SendReport::default());
    let arrived = Arrived::wait(&to, [4, 3]);
    assert_eq!((numbers(&arrived, 0), &arrived.trains[0]), (vec![0, 1, 4, 7], &vec![2, 1, 1]));
    assert_eq!((numbers(&arrived, 1), &arrived.trains[1]), (vec![2, 5, 6], &vec![1, 2]));
    assert_eq!(numbers(&Arrived::wait(&other, [1, 0]), 0), [3]);

    // No datagram is that long; the others leave all the same.
    let report = send(&[(0, &to, 10), (0, &to, 65_508), (0, &to, 65_507), (0, &to, 11)]);
    assert_eq!(report, SendReport { failed: 1, ..SendReport::default() });
    assert_eq!(numbers(&Arrived::wait(&to, [3, 0]), 0), [0, 2, 3]);
}

#[test]
fn a_path_with_a_small_mtu_gets_fragments_and_others_go_on_getting_trains() {
    if !usable("a_path_with_a_small_mtu_gets_fragments_and_others_go_on_getting_trains", TOOLS) {
        return;
    }
    let (a, b) = hosts();
    let other = ["192.0.2.3", "2001:db8::3"];
    b.run("ip addr add 192.0.2.3/24 dev v0");
    b.run("ip addr add 2001:db8::3/64 dev v0 nodad");
    a.run("ip route add 192.0.2.2/32 dev v0 mtu 1300");
    a.run("ip route add 2001:db8::2/128 dev v0 mtu 1300");
    for family in [0, 1] {
        let (from, to) = (bind(&a, ""), bind(&b, ""));
        let (mut batch, start) = (SendBatch::new(), Instant::now());
        let mut round = |length: usize, after: u64| {
            for i in 0..20 {
                push(&mut batch, &endpoint(B[family], &to), &datagram(i, length));
            }
            for i in 20..40 {
                push(&mut batch, &endpoint(other[family], &to), &datagram(i, length));
            }
            let report = batch.send(&from, start + Duration::from_secs(after));
            let mut counts = [0; 2];
            counts[family] = 40;
            let arrived = Arrived::wait(&to, counts);
            let mut datagrams = arrived.datagrams[family].clone();
            // Fragments may be put together later than what was sent after them.
            datagrams.sort();
            assert_eq!(datagrams, (0..40).map(|i| datagram(i, length)).collect::<Vec<_>>());
            let mut trains = arrived.trains[family].clone();
            trains.sort_unstable();
            (report, trains)
        };
        let refused = SendReport { gso_refused: true, ..SendReport::default() };
        let half = [vec![1; 20], vec![20]].concat();
        assert_eq!(round(1400, 0), (refused.clone(), half.clone()), "the kernel refuses");
        assert_eq!(round(1400, 59), (SendReport::default(), half.clone()), "it is not asked");
        assert_eq!(round(1000, 59), (SendReport::default(), vec![20, 20]), "these fit");
        assert_eq!(round(1400, 60), (refused, half), "it is asked again");
        assert!(from.features().udp_gso);
    }
}

#[test]
fn a_device_without_checksum_offload_loses_nothing() {
    if !usable("a_device_without_checksum_offload_loses_nothing", &[TOOLS, &["ethtool"]].concat()) {
        return;
    }
    let (a, b) = hosts();
    a.run("ethtool -K v0 tx-checksum-ip-generic off");
    for family in [0, 1] {
        let (from, to) = (bind(&a, ""), bind(&b, ""));
        let mut batch = SendBatch::new();
        for refused_before in [false, true] {
            for i in 0..40 {
                push(&mut batch, &endpoint(B[family], &to), &datagram(i, 1400));
            }
            let report = batch.send(&from, Instant::now());
            assert_eq!((report.failed, report.lost_addresses), (0, Vec::new()));
            // Kernels before 6.11 refuse; once is enough.
            assert!(!(report.gso_refused && refused_before));
            assert!(!report.gso_refused || !from.features().udp_gso);
            let mut counts = [0; 2];
            counts[family] = 40;
            let arrived = Arrived::wait(&to, counts);
            assert_eq!(arrived.datagrams[family], (0..40).map(|i| datagram(i, 1400)).collect::<Vec<_>>());
        }
    }
}

#[test]
fn a_socket_that_is_full_does_not_stop_the_other_one() {
    if !usable("a_socket_that_is_full_does_not_stop_the_other_one", &[TOOLS, &["tc"]].concat()) {
        return;
    }
    for (full, without) in [(0, ""), (1, ""), (0, "udp-gso"), (1, "udp-gso")] {
        let (a, b) = hosts();
        let (from, to) = (bind(&a, without), bind(&b, ""));
        for family in [0, 1] {
            // Neighbours are found out before nothing gets through any more.
            let mut batch = SendBatch::new();
            push(&mut batch, &endpoint(B[family], &to), b"hello");
            assert_eq!(batch.send(&from, Instant::now()), SendReport::default());
        }
        Arrived::wait(&to, [1, 1]);
        a.run("tc qdisc add dev v0 root tbf rate 8kbit burst 1600 limit 100mb");
        let mut batch = SendBatch::new();
        let fill = |batch: &mut SendBatch, family: usize| {
            for i in 0..40 {
                push(batch, &endpoint(B[family], &to), &datagram(i, 1400));
            }
        };
        let mut batches = 0;
        loop {
            fill(&mut batch, full);
            let report = batch.send(&from, Instant::now());
            batches += 1;
            assert!(batches < 2000, "the queue has no end");
            if report.failed > 0 {
                break;
            }
        }
        for _ in 0..3 {
            fill(&mut batch, full);
            fill(&mut batch, 1 - full);
            fill(&mut batch, full);
            let report = batch.send(&from, Instant::now());
            // A little trickles out of the full one meanwhile, and makes room for a message.
            assert!((40..=80).contains(&report.failed), "{report:?}");
            assert!(!report.gso_refused && report.lost_addresses.is_empty());
        }
        a.run("tc qdisc change dev v0 root tbf rate 10gbit burst 4mb limit 100mb");
        let mut counts = [120; 2];
        counts[full] = 0;
        assert_eq!(Arrived::wait(&to, counts).datagrams[1 - full].len(), 120, "all of the other one");
    }
}

#[test]
fn a_train_by_an_address_that_has_gone_leaves_by_another() {
    if !usable("a_train_by_an_address_that_has_gone_leaves_by_another", TOOLS) {
        return;
    }
    let (a, b) = hosts();
    for (family, lost) in ["192.0.2.99", "2001:db8::99"].into_iter().enumerate() {
        for (path, gso_refused) in [("mtu 1500", false), ("mtu 1300", true)] {
            let (from, to) = (bind(&a, ""), bind(&b, ""));
            let prefix = ["32", "128"][family];
            a.run(&format!("ip route replace {}/{prefix} dev v0 {path}", B[family]));
            let lost: IpAddr = lost.parse().unwrap();
            let mut batch = SendBatch::new();
            for i in 0..10 {
                let to = Endpoint { local: Some(lost), ..endpoint(B[family], &to) };
                push(&mut batch, &to, &datagram(i, 1400));
            }
            let report = batch.send(&from, Instant::now());
            assert_eq!(report, SendReport { failed: 0, lost_addresses: vec![lost], gso_refused });
            let mut counts = [0; 2];
            counts[family] = 10;
            let arrived = Arrived::wait(&to, counts);
            assert_eq!(arrived.trains[family].len(), if gso_refused { 10 } else { 1 });
            assert_eq!(arrived.from[0].remote, endpoint(A[family], &from).remote);
        }
    }
}

#[test]
fn without_ipv6_only_what_needs_it_fails() {
    if !usable("without_ipv6_only_what_needs_it_fails", &[TOOLS, &["sysctl"]].concat()) {
        return;
    }
    let (a, b) = hosts();
    let to = bind(&b, "");
    a.run("sysctl -qw net.ipv6.conf.all.disable_ipv6=1");
    let from = bind(&a, "");
    let wanted = Features { udp_gso: true, udp_gro: true, ..Features::NONE };
    assert_eq!(from.features(), wanted);
    let mut batch = SendBatch::new();
    for (family, i) in [(0, 0), (1, 0), (1, 1), (0, 1)] {
        push(&mut batch, &endpoint(B[family], &to), &datagram(i, 300));
    }
    assert_eq!(batch.send(&from, Instant::now()).failed, 2);
    assert_eq!(Arrived::wait(&to, [2, 0]).datagrams[0], [datagram(0, 300), datagram(1, 300)]);
}
