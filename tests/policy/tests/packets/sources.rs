//! Where a packet may come from: pods in namespaces of their own, behind links of their own and on a bridge, and what is beside them.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_policy::Event;
use mesh_policy::compile::{Resolvers, Settings};
use mesh_policy::flowlog::Listener;
use mesh_policy::nft::{Deed, Doer, Others, OthersReader};
use mesh_policy::{clusternetworkpolicy, dns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, socket,
};
use policy_tests::objects::{pod, policy};
use policy_tests::rig::settings;
use policy_tests::{Link, Packet, Rig};
use serde_json::json;

use crate::{UDP, address, first, with_settings};

const A: [&str; 2] = ["10.0.1.1", "fd00:1::1"];
const B: [&str; 2] = ["10.0.1.2", "fd00:1::2"];
/// Hosts beside the mesh, behind the default route.
const WORLD: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
/// Of nobody here.
const FOREIGN: [&str; 2] = ["198.18.7.7", "2001:db8:7::7"];
/// The node as its pods know it.
const NODE: [&str; 2] = ["10.0.1.254", "fd00:1::fe"];
const PATIENCE: Duration = Duration::from_secs(10);
const VXLAN: u16 = 4789;

fn checking() -> Settings {
    let nets = ["10.0.1.0/24", "fd00:1::/64"].map(|net| net.parse().expect("a prefix"));
    Settings {
        own: nets.into(),
        address: Some(address("fd00:ffff::1")),
        check_sources: true,
        outside: ["pods0".to_owned(), "side0".to_owned()].into(),
        vxlan: [VXLAN].into(),
        ..settings()
    }
}

type Job = Box<dyn FnOnce() -> anyhow::Result<()> + Send>;

/// A pod: a namespace of its own at the other end of a link.
struct Place {
    jobs: mpsc::Sender<(Job, mpsc::Sender<anyhow::Result<()>>)>,
}

fn ip(arguments: &str) -> anyhow::Result<()> {
    let output = Command::new("ip").args(arguments.split_whitespace()).output()?;
    ensure!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

impl Place {
    /// Makes the namespace, with `eth0` at the end of the link `name` of this one.
    fn new(name: &str) -> anyhow::Result<Self> {
        let (jobs, todo) = mpsc::channel::<(Job, mpsc::Sender<anyhow::Result<()>>)>();
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            let made = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET);
            let _ = tell.send(made.map(|()| nix::unistd::gettid()));
            for (job, done) in todo {
                let _ = done.send(job());
            }
        });
        let thread = told.recv()??;
        ip(&format!("link add {name} type veth peer name eth0 netns {thread}"))?;
        ip(&format!("link set {name} up"))?;
        let place = Self { jobs };
        place.run(|| {
            std::fs::write("/proc/sys/net/ipv6/conf/eth0/accept_dad", "0")?;
            ip("link set lo up")?;
            ip("link set eth0 up")
        })?;
        Ok(place)
    }

    fn run(&self, job: impl FnOnce() -> anyhow::Result<()> + Send + 'static) -> anyhow::Result<()> {
        let (done, answer) = mpsc::channel();
        self.jobs.send((Box::new(job), done)).ok().context("a pod is gone")?;
        answer.recv_timeout(PATIENCE * 3)?
    }

    /// Gives the pod addresses, and a default route to the node behind the link.
    fn settle(&self, addresses: [&str; 2], node: [&str; 2], lengths: [u8; 2]) -> anyhow::Result<()> {
        let addresses = addresses.map(str::to_owned);
        let node = node.map(str::to_owned);
        self.run(move || {
            for family in 0..2 {
                ip(&format!("address add {}/{} dev eth0 nodad", addresses[family], lengths[family]))
                    .or_else(|_| {
                        ip(&format!("address add {}/{} dev eth0", addresses[family], lengths[family]))
                    })?;
                let kind = ["-4", "-6"][family];
                ip(&format!("{kind} route add default via {} dev eth0 onlink", node[family]))?;
            }
            Ok(())
        })
    }

    /// Sends packets as they are, whatever they say of their source.
    fn send(&self, packets: Vec<Packet>) -> anyhow::Result<()> {
        let octets = packets.iter().map(|packet| (packet.destination, packet.octets())).collect();
        self.send_octets(octets)
    }

    fn send_octets(&self, packets: Vec<(IpAddr, Vec<u8>)>) -> anyhow::Result<()> {
        self.run(move || {
            for (to, octets) in packets {
                let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
                let raw = socket(family, SockType::Raw, SockFlag::empty(), SockProtocol::Raw)?;
                nix::sys::socket::setsockopt(&raw, nix::sys::socket::sockopt::Broadcast, &true)?;
                let to = SockaddrStorage::from(SocketAddr::new(to, 0));
                sendto(raw.as_raw_fd(), &octets, &to, MsgFlags::empty())?;
            }
            Ok(())
        })
    }
}

/// Two pods behind links of their own, as Calico and many clouds have them: a route for each address.
fn routed(rig: &Rig) -> anyhow::Result<[Place; 2]> {
    let pods = [Place::new("cali1")?, Place::new("cali2")?];
    for (name, (place, addresses)) in ["cali1", "cali2"].iter().zip(pods.iter().zip([A, B])) {
        rig.run("ip", &format!("address add 169.254.1.1/32 dev {name} scope link"))?;
        rig.run("ip", &format!("-6 address add fe80::1/64 dev {name} nodad"))?;
        for family in 0..2 {
            let length = [32, 128][family];
            rig.run("ip", &format!("route add {}/{length} dev {name}", addresses[family]))?;
        }
        place.settle(addresses, ["169.254.1.1", "fe80::1"], [32, 128])?;
    }
    Ok(pods)
}

/// The same on a bridge, as kubenet and flannel have them.
fn bridged(rig: &Rig) -> anyhow::Result<[Place; 2]> {
    rig.run("ip", "link add cni0 type bridge")?;
    rig.run("ip", "link set cni0 up")?;
    for family in 0..2 {
        rig.run("ip", &format!("address add {}/{} dev cni0", NODE[family], [24, 64][family]))?;
    }
    let pods = [Place::new("veth1")?, Place::new("veth2")?];
    for (name, (place, addresses)) in ["veth1", "veth2"].iter().zip(pods.iter().zip([A, B])) {
        rig.run("ip", &format!("link set {name} master cni0"))?;
        place.settle(addresses, NODE, [24, 64])?;
    }
    Ok(pods)
}

fn spoofed(rig: &mut Rig) -> anyhow::Result<u64> {
    Ok(rig.enforcer.backend.counters()?["spoofed"].0)
}

/// Whether each packet that a pod sends comes out at the world's link. Those that do not are counted as forged.
fn reach(rig: &mut Rig, from: &Place, packets: &[Packet]) -> anyhow::Result<Vec<bool>> {
    let before = spoofed(rig)?;
    from.send(packets.to_vec())?;
    let numbers: BTreeSet<u32> = packets.iter().map(|packet| packet.number).collect();
    let mut arrived: BTreeSet<u32> = BTreeSet::new();
    let deadline = Instant::now() + PATIENCE;
    loop {
        arrived.extend(rig.send(Link::Pods, &[])?.intersection(&numbers));
        let dropped = usize::try_from(spoofed(rig)? - before)?;
        if arrived.len() + dropped >= numbers.len() {
            return Ok(packets.iter().map(|packet| arrived.contains(&packet.number)).collect());
        }
        ensure!(
            Instant::now() < deadline,
            "{} arrived, {dropped} were forged, of {}",
            arrived.len(),
            numbers.len()
        );
    }
}

fn in_both(
    name: &'static str,
    settings: fn() -> Settings,
    test: fn(&mut Rig, [Place; 2]) -> anyhow::Result<()>,
) {
    for places in [routed, bridged] {
        with_settings(name, settings(), move |mut rig| {
            // Beside the default route: its packets have another way back.
            rig.run("ip", "link add side0 type veth peer name side1")?;
            for name in ["side0", "side1"] {
                rig.run("ip", &format!("link set {name} up"))?;
            }
            let places = places(&rig)?;
            rig.tell([Event::Pod(pod("a", "a", &A)), Event::Pod(pod("b", "b", &B))])?;
            test(&mut rig, places)
        });
    }
}

#[test]
fn pods_speak_with_their_own_addresses_only() {
    in_both("pods_speak_with_their_own_addresses_only", checking, |rig, [a, _]| {
        for family in 0..2 {
            let remote = ["10.0.2.1", "fd00:2::1"][family];
            rig.through_tunnel(["10.0.2.0/24", "fd00:2::/64"][family])?;
            let mut from = |source: &str| first(rig, source, WORLD[family], UDP);
            let packets = [from(A[family]), from(FOREIGN[family]), from(remote)];
            assert_eq!(reach(rig, &a, &packets)?, [true, false, false], "family {family}");
        }
        Ok(())
    });
}

#[test]
fn pods_behind_own_links_cannot_be_their_neighbours() {
    with_settings("pods_behind_own_links_cannot_be_their_neighbours", checking(), |mut rig| {
        let [a, b] = routed(&rig)?;
        rig.tell([Event::Pod(pod("a", "a", &A)), Event::Pod(pod("b", "b", &B))])?;
        for family in 0..2 {
            let mut from = |source: &str| first(&mut rig, source, WORLD[family], UDP);
            let packets = [from(A[family]), from(B[family])];
            assert_eq!(reach(&mut rig, &a, &packets)?, [true, false], "family {family}");
            assert_eq!(reach(&mut rig, &b, &packets)?, [false, true], "family {family}");
        }
        Ok(())
    });
}

#[test]
fn a_forged_source_passes_no_ip_block() {
    in_both("a_forged_source_passes_no_ip_block", checking, |rig, [a, b]| {
        let blocks = FOREIGN.map(|from| json!({"ipBlock": {"cidr": format!("{from}/{}", if from.contains(':') { 128 } else { 32 })}}));
        let ingress = json!([{"from": blocks}]);
        rig.tell([
            policy("egress", json!({"podSelector": {"matchLabels": {"app": "a"}}, "policyTypes": ["Egress"], "egress": []})),
            policy("ingress", json!({"podSelector": {"matchLabels": {"app": "b"}}, "ingress": ingress})),
        ])?;
        // What reaches the neighbour is heard by a socket of its own.
        let (tell, heard) = mpsc::channel();
        b.run(move || {
            let socket = std::net::UdpSocket::bind("[::]:80")?;
            std::thread::spawn(move || {
                let mut buffer = [0; 64];
                while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                    let _ = tell.send(from);
                }
            });
            Ok(())
        })?;
        for family in 0..2 {
            let packets = [WORLD[family], B[family]].map(|to| first(rig, FOREIGN[family], to, UDP));
            // On a bridge the neighbour is reached past the node.
            let packets = packets.into_iter().filter(|packet| {
                packet.destination == address(WORLD[family]) || rig.run("ip", "link show cni0").is_err()
            });
            let packets: Vec<Packet> = packets.collect();
            assert!(reach(rig, &a, &packets)?.iter().all(|arrived| !arrived), "family {family}");
        }
        assert!(heard.try_recv().is_err());
        Ok(())
    });
}

#[test]
fn a_forged_answer_teaches_no_name() {
    const GROUP: u16 = 5183;
    const SERVER: &str = "203.0.113.53";
    let with = || Settings {
        resolvers: Some(Resolvers {
            group: GROUP,
            pods: [].into(),
            nets: ["203.0.113.53/32".parse().expect("a net")].into(),
        }),
        ..checking()
    };
    in_both("a_forged_answer_teaches_no_name", with, |rig, [a, _]| {
        let mut listener = Listener::with_range(GROUP, 1 << 20, dns::RANGE)?;
        let rules = json!([{"name": "web", "action": "Accept", "to": [{"domainNames": ["*.example.com"]}]}]);
        rig.tell([Event::Policy(clusternetworkpolicy::read(&json!({
            "metadata": {"name": "names"},
            "spec": {"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}, "egress": rules},
        })))])?;
        let question = Packet { destination_port: 53, ..first(rig, A[0], SERVER, UDP) };
        assert_eq!(reach(rig, &a, &[question])?, [true]);
        let forged = question.answer(rig.number());
        // On a bridge the node is asked to pass it on to where it came from.
        let before = spoofed(rig)?;
        a.run(|| {
            // Its own address is somebody else's for a moment, so that the packet leaves the pod.
            ip("route del local 10.0.1.1 table local")?;
            ip("route add 10.0.1.1/32 via 169.254.1.1 dev eth0 onlink").or_else(|_| Ok(()))
        })?;
        if rig.run("ip", "link show cni0").is_ok() {
            a.run(|| ip("route replace 10.0.1.1/32 via 10.0.1.254 dev eth0 onlink"))?;
        }
        a.send(vec![forged])?;
        let deadline = Instant::now() + PATIENCE;
        while spoofed(rig)? == before {
            ensure!(Instant::now() < deadline, "the forged answer is not counted");
        }
        let mut copies = 0;
        listener.receive(|_| copies += 1)?;
        assert_eq!(copies, 0, "nothing is learnt from it");
        Ok(())
    });
}

#[test]
fn honest_traffic_of_each_kind_goes_on() {
    in_both("honest_traffic_of_each_kind_goes_on", checking, |rig, [a, b]| {
        let bridge = rig.run("ip", "link show cni0").is_ok();
        let before = spoofed(rig)?;
        if !bridge {
            for family in 0..2 {
                rig.run("ip", &format!("address add {}/{} dev lo", NODE[family], [32, 128][family]))?;
            }
        }
        // Pod and node, pod and neighbour, with whatever neighbours have to be discovered for it, both ways.
        b.run(|| {
            let socket = std::net::UdpSocket::bind("[::]:4000")?;
            std::thread::spawn(move || {
                let mut buffer = [0; 64];
                while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(&buffer[..length], from);
                }
            });
            Ok(())
        })?;
        let node = std::net::UdpSocket::bind("[::]:4000")?;
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((length, from)) = node.recv_from(&mut buffer) {
                let _ = node.send_to(&buffer[..length], from);
            }
        });
        for to in B.into_iter().chain(NODE) {
            let to = SocketAddr::new(address(to), 4000);
            a.run(move || {
                let socket = std::net::UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
                socket.set_read_timeout(Some(Duration::from_millis(200)))?;
                // A link that has just come up may lose the first.
                let deadline = Instant::now() + PATIENCE;
                loop {
                    socket.send_to(b"echo", to)?;
                    if socket.recv(&mut [0; 16]).is_ok() {
                        break;
                    }
                    ensure!(Instant::now() < deadline, "no echo of {to}");
                }
                Ok(())
            })?;
        }
        // Who has no address yet asks all on the link for one (RFC 2131).
        let asked = std::net::UdpSocket::bind("0.0.0.0:67")?;
        asked.set_read_timeout(Some(PATIENCE))?;
        let newcomer = Place::new("newcomer")?;
        if bridge {
            rig.run("ip", "link set newcomer master cni0")?;
        }
        newcomer.run(|| {
            let client = std::net::UdpSocket::bind("0.0.0.0:68")?;
            client.set_broadcast(true)?;
            nix::sys::socket::setsockopt(&client, nix::sys::socket::sockopt::BindToDevice, &"eth0".into())?;
            client.send_to(b"discover", "255.255.255.255:67")?;
            Ok(())
        })?;
        let (_, from) = asked.recv_from(&mut [0; 64]).context("nobody asks for an address")?;
        assert!(from.ip().is_unspecified(), "{from}");
        // Whether another has the address (RFC 4862), and who listens to whom (RFC 3810), from nobody and from the link.
        let solicitation = Packet { icmp: (135, 0), ..first(rig, "::", "ff02::1:ff00:1", 58) };
        let report = Packet { icmp: (143, 0), ..first(rig, "fe80::77", "ff02::16", 58) };
        let unmade = Packet { icmp: (143, 0), ..first(rig, "::", "ff02::16", 58) };
        a.send(vec![solicitation, report, unmade])?;
        // Another way back than it came: outside nobody minds.
        let fence = first(rig, A[0], WORLD[0], UDP);
        assert_eq!(reach(rig, &a, &[fence])?, [true]);
        assert_eq!(spoofed(rig)?, before, "nothing of this is forged");
        Ok(())
    });
}

#[test]
fn addresses_of_the_link_need_no_route() {
    with_settings("addresses_of_the_link_need_no_route", checking(), |mut rig| {
        let [a, _] = routed(&rig)?;
        rig.tell([Event::Pod(pod("a", "a", &A))])?;
        rig.run("ip", "-6 route flush fe80::/64 dev cali1")?;
        let echo = first(&mut rig, "fe80::77", "ff02::1", 58);
        a.send(vec![echo])?;
        let fence = first(&mut rig, A[0], WORLD[0], UDP);
        assert_eq!(reach(&mut rig, &a, &[fence])?, [true]);
        assert_eq!(spoofed(&mut rig)?, 0);
        Ok(())
    });
}

#[test]
fn pods_addresses_do_not_come_from_outside() {
    // Whether or not pods' own interfaces are checked, and whatever routes lead there.
    for check_sources in [false, true] {
        let settings = Settings { check_sources, ..checking() };
        with_settings("pods_addresses_do_not_come_from_outside", settings, |mut rig| {
            // A pod that is gone: the default route leads to its address.
            let gone = ["10.0.1.77", "fd00:1::77"];
            rig.tell([Event::Pod(pod("gone", "gone", &gone))])?;
            for family in 0..2 {
                let before = spoofed(&mut rig)?;
                let mut from = |source: &str| first(&mut rig, source, WORLD[family], UDP);
                // One of them is known, the other is not.
                let packets = [from(gone[family]), from(A[family]), from(FOREIGN[family])];
                assert_eq!(rig.pass(Link::Pods, &packets)?, [false, false, true], "family {family}");
                assert_eq!(spoofed(&mut rig)? - before, 2);
            }
            Ok(())
        });
    }
}

#[test]
fn hosts_outside_may_have_another_way_back() {
    with_settings("hosts_outside_may_have_another_way_back", checking(), |mut rig| {
        rig.run("ip", "link add side0 type veth peer name side1")?;
        rig.run("ip", "link set side0 up")?;
        for family in 0..2 {
            let net = ["198.18.7.0/24", "2001:db8:7::/48"][family];
            rig.run("ip", &format!("route add {net} dev side0"))?;
            let packet = first(&mut rig, FOREIGN[family], WORLD[family], UDP);
            // It came by the default route's interface, and its way back is another.
            assert!(rig.passes(Link::Pods, &packet)?, "family {family}");
        }
        Ok(())
    });
}

#[test]
fn pods_and_tunnels_speak_no_vxlan_to_the_node() {
    let settings = || Settings { check_sources: false, ..checking() };
    in_both("pods_and_tunnels_speak_no_vxlan_to_the_node", settings, |rig, [a, _]| {
        if rig.run("ip", "link show cni0").is_err() {
            rig.run("ip", &format!("address add {}/32 dev lo", NODE[0]))?;
        }
        rig.run("ip", "address add 198.51.100.9/32 dev lo")?;
        let node = std::net::UdpSocket::bind(("0.0.0.0", VXLAN))?;
        node.set_read_timeout(Some(PATIENCE))?;
        let before = spoofed(rig)?;
        let to = |source: &str, number| {
            Packet::first(address(source), address("198.51.100.9"), UDP, VXLAN, number)
        };
        let numbers = [rig.number(), rig.number(), rig.number()];
        // As the exempt site says of itself, and as a pod: by a pod's link neither is heard.
        a.send(vec![to("203.0.113.9", numbers[0]), to(A[0], numbers[1])])?;
        let deadline = Instant::now() + PATIENCE;
        while spoofed(rig)? - before < 2 {
            ensure!(Instant::now() < deadline, "{} of 2 are counted", spoofed(rig)? - before);
        }
        rig.send(Link::Tunnel, &[to("10.0.2.1", numbers[2]).octets()])?;
        assert_eq!(spoofed(rig)? - before, 3, "and what comes out of a tunnel is not either");
        let honest = to("203.0.113.9", rig.number());
        rig.send(Link::Pods, &[honest.octets()])?;
        let mut buffer = [0; 64];
        let (_, from) = node.recv_from(&mut buffer)?;
        assert_eq!(buffer[..4], honest.number.to_be_bytes(), "from {from}");
        Ok(())
    });
}

#[test]
fn tables_of_others_that_take_packets_away_are_read() {
    const NAME: &str = "tables_of_others_that_take_packets_away_are_read";
    with_settings(NAME, checking(), |rig| {
        let mut reader = OthersReader::open()?;
        assert_eq!(*reader.read()?, Others::default(), "ours is none of them");
        for command in [
            "add table inet theirs",
            "add chain inet theirs early { type filter hook prerouting priority raw ; }",
            "add rule inet theirs early udp dport 53 notrack",
            "add rule inet theirs early udp dport 54 notrack",
            "add chain inet theirs late { type filter hook prerouting priority filter ; }",
        ] {
            rig.run("nft", command)?;
        }
        let doer =
            |deed, table: &str, chain: &str| Doer { deed, table: table.to_owned(), chain: chain.to_owned() };
        let mut doers = vec![doer(Deed::NoTrack, "inet theirs", "early")];
        assert_eq!(reader.read()?.doers, doers);
        let netdev = "add table netdev quick\n\
                      add chain netdev quick in { type filter hook ingress device pods0 priority 0 ; }\n\
                      add rule netdev quick in fwd to sennit0";
        match netdev.lines().try_for_each(|line| rig.run("nft", line).map(drop)) {
            Ok(()) => {
                doers.push(doer(Deed::HandOn, "netdev quick", "in"));
                let mut found = reader.read()?.doers.clone();
                found.sort();
                doers.sort();
                assert_eq!(found, doers);
            }
            Err(error) => eprintln!("SKIPPED {NAME}, fwd: this kernel has no {error}"),
        }
        match rig
            .run("nft", "add flowtable inet theirs fast { hook ingress priority 0 ; devices = { pods0 } ; }")
        {
            Ok(_) => {
                let found = &reader.read()?.flowtables;
                assert_eq!((found.len(), found[0].devices.as_slice()), (1, &["pods0".to_owned()][..]));
            }
            Err(error) => eprintln!("SKIPPED {NAME}, flowtable: this kernel has no {error}"),
        }
        Ok(())
    });
}
