//! What travels in clear by an exemption: to whom, until when, and nobody else.

use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::time::{Duration, SystemTime};

use mesh_overlay::guard::{Cleartext, Exempt, Slot};
use mesh_overlay::vxlan::VxlanConfig;
use mesh_overlay::{Guard, Route, RouteChange, RouteKind};

use crate::lab::{Lab, eventually, net, nets};
use crate::namespace::sh;
use crate::net::{comes_in, guard, index, lan, way_out};

/// Exemptions of `count` peers that end apart, and of another that ends with the first; `remotes`: all with underlay addresses.
pub(crate) fn cleartext(count: usize, remotes: bool) -> Cleartext {
    let end = |n: usize| 4_000_000_000 + i64::try_from(n).unwrap();
    let exempt = |n: usize| Exempt {
        prefixes: nets(&[&format!("10.2.{n}.0/24"), &format!("10.3.{n}.0/24"), &format!("fd00:2:{n}::/64")]),
        remotes: if remotes {
            nets(&["192.0.2.4/32", "192.0.2.5/32", "2001:db8::4/128"])
        } else {
            BTreeSet::new()
        },
    };
    Cleartext {
        local: if count > 2 { nets(&["10.1.0.0/24", "fd00:1::/64"]) } else { nets(&["10.1.0.0/24"]) },
        interfaces: if count > 0 { ["sennitxc4".parse().unwrap()].into() } else { BTreeSet::new() },
        prefix: "fd54:1:2::/63".parse().unwrap(),
        port: 51820,
        vxlan_port: 4789,
        vni: 5183,
        underlay: if count == 1 { [4_000, 4_001].into() } else { BTreeSet::new() },
        exempt: (0..count).map(|n| (end(n), exempt(n))).collect(),
    }
}

pub(crate) async fn what_is_exempt_passes_until_its_end(mut lab: Lab) {
    sh("ip link add sennitxc4 type vxlan id 5183 dstport 4790 local 192.0.2.1 nolearning && \
        ip link set sennitxc4 address 02:00:00:00:00:01 up && ip addr add 10.1.0.1/32 dev sennitxc4 && \
        ip addr add fd54:1:2::1/64 dev sennitxc4 nodad && \
        ip neigh replace fd54:1:2::2 lladdr 02:00:00:00:00:02 dev sennitxc4 nud permanent && \
        ip route add 10.2.0.0/24 via inet6 fd54:1:2::2 dev sennitxc4 src 10.1.0.1");
    let with = |until: i64| Guard {
        cleartext: Some(Cleartext {
            exempt: [(until, Exempt { prefixes: nets(&["10.2.0.0/25"]), remotes: nets(&["192.0.2.2/32"]) })]
                .into(),
            ..cleartext(1, true)
        }),
        ..guard(&["10.2.0.0/24"])
    };
    let seconds =
        |at: SystemTime| i64::try_from(at.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()).unwrap();
    let end = seconds(SystemTime::now()) + 3;
    lab.nft.apply(&with(end)).await.unwrap();
    let socket = UdpSocket::bind("10.1.0.1:0").unwrap();
    // A packet that netfilter drops is an error to its sender.
    let passes = |to: &str| socket.send_to(b"clear", to).is_ok();
    assert!(passes("10.2.0.1:9"), "before its end");
    assert!(!passes("10.2.0.200:9"), "somebody who is not exempt");
    eventually("the end", async || {
        SystemTime::now() > SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(end).unwrap())
    })
    .await;
    let before = lab.nft.observe().await;
    assert!(!passes("10.2.0.1:9"), "after its end, and nobody has changed a rule");
    let after = lab.nft.observe().await;
    assert_eq!(
        (after.cleartext_drops, &after.fingerprint),
        (before.cleartext_drops + 1, &before.fingerprint)
    );
}

pub(crate) async fn vxlan_in_clear_comes_in_from_those_that_are_exempt_only(mut lab: Lab) {
    way_out();
    lan("192.0.2.2");
    // Nobody has a device for it here: the guard counts it all the same.
    let wanted = Guard { cleartext: Some(cleartext(0, false)), ..guard(&["10.2.0.0/24"]) };
    let exempt = Guard {
        cleartext: Some(Cleartext {
            exempt: [(
                4_000_000_000,
                Exempt { prefixes: nets(&["10.2.0.0/24"]), remotes: nets(&["192.0.2.2/32"]) },
            )]
            .into(),
            underlay: [index("up0")].into(),
            ..cleartext(1, true)
        }),
        ..wanted.clone()
    };
    // By another interface than the underlay's, as from a pod.
    let mut elsewhere = exempt.clone();
    elsewhere.cleartext.as_mut().unwrap().underlay = [4_000].into();
    sh("ip -n lan link add clear type vxlan id 5183 dstport 4789 remote 192.0.2.1 local 192.0.2.2 && \
        ip -n lan link set clear up && ip -n lan addr add 10.2.0.1/24 dev clear && \
        ip -n lan neigh add 10.2.0.9 lladdr 02:00:00:00:00:09 dev clear");
    for (guard, dropped) in [(&wanted, true), (&exempt, false), (&elsewhere, true), (&wanted, true)] {
        lab.nft.apply(guard).await.unwrap();
        let before = lab.nft.observe().await.cleartext_drops;
        // The other end speaks on its own as well, so at least these.
        sh("for n in 1 2 3; do ip netns exec lan bash -c 'echo clear > /dev/udp/10.2.0.9/9'; done");
        // What came after has arrived, so that these have too.
        assert!(comes_in("192.0.2.2"));
        let drops = lab.nft.observe().await.cleartext_drops - before;
        assert_eq!(drops >= 3, dropped, "{drops}");
    }
}

/// A first fragment of 48 bytes of IPv6 and 8 of UDP, so that nobody can read the network identifier, and the rest.
const FRAGMENTS: &str = r#"
import socket, struct, sys
header = b"\x08\0\0\0" + (5183).to_bytes(3, "big") + b"\0"
inner = bytes.fromhex("020000000009" "020000000008" "0800") + b"clear" * 20
payload = header + inner
source, target = (socket.inet_pton(socket.AF_INET6, a) for a in ("fd99::2", "fd99::1"))
length = 8 + len(payload)
def add(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xffff: total = (total & 0xffff) + (total >> 16)
    return 0xffff - total
udp = struct.pack("!4H", 4789, 4789, length, 0)
check = add(source + target + struct.pack("!II", length, 17) + udp + payload)
udp = struct.pack("!4H", 4789, 4789, length, check)
raw = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)
options = lambda following: struct.pack("!BBBB4x", following, 0, 1, 4)
short = (17, udp, payload)
# Destination options that lead to others: no first fragment tells its protocol then.
hidden = (60, options(60), options(17) + udp + payload)
following, first, rest = hidden if sys.argv[1:] == ["hidden"] else short
for offset, more, part in ((0, 1, first), (8, 0, rest)):
    fragment = struct.pack("!BBHI", following, 0, offset | more, 4711) + part
    packet = struct.pack("!IHBB", 6 << 28, len(fragment), 44, 64) + source + target + fragment
    raw.sendto(packet, ("fd99::1", 0))
"#;

pub(crate) async fn vxlan_in_clear_does_not_come_in_in_pieces(mut lab: Lab) {
    way_out();
    lan("192.0.2.2");
    sh("echo 0 > /proc/sys/net/ipv6/conf/up0/disable_ipv6 && ip addr add fd99::1/64 dev up0 nodad && \
        ip -n lan addr add fd99::2/64 dev far0 nodad && \
        ip link add sennitxc6 type vxlan id 5183 dstport 4789 local fd99::1 nolearning && \
        ip link set sennitxc6 address 02:00:00:00:00:09 up");
    let received = || {
        let said = sh(
            "ip -s -j link show sennitxc6 | python3 -c 'import json,sys; print(json.load(sys.stdin)[0][\"stats64\"][\"rx\"][\"packets\"])'",
        );
        said.trim().parse::<u64>().unwrap()
    };
    let send = |kind: &str| {
        std::fs::write("/run/fragments.py", FRAGMENTS).unwrap();
        sh(&format!("ip netns exec lan python3 /run/fragments.py {kind}"));
        assert!(comes_in("192.0.2.2"));
    };
    for (n, kind) in [(1, "short"), (2, "hidden")] {
        send(kind);
        eventually("without a guard it arrives", async || received() == n).await;
    }
    let wanted = Guard { cleartext: Some(cleartext(0, false)), ..guard(&["10.2.0.0/24"]) };
    lab.nft.apply(&wanted).await.unwrap();
    let before = lab.nft.observe().await.cleartext_drops;
    for kind in ["short", "hidden"] {
        send(kind);
    }
    assert_eq!(received(), 2);
    let drops = lab.nft.observe().await.cleartext_drops;
    assert!(drops - before >= 2, "{before} {drops}");
    // What is honestly too large for one packet still comes in.
    let socket = UdpSocket::bind("[fd99::1]:4001").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    sh("ip netns exec lan bash -c 'head -c 3000 /dev/zero | tr \\\\0 x > /run/large' && \
        ip netns exec lan python3 -c 'import socket; socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).sendto(open(\"/run/large\", \"rb\").read(), (\"fd99::1\", 4001))'");
    assert_eq!(socket.recv(&mut [0; 4000]).unwrap(), 3000);
    assert_eq!(lab.nft.observe().await.cleartext_drops, drops);
}

pub(crate) async fn a_guard_of_before_the_outer_chain_is_replaced_step_by_step(mut lab: Lab) {
    let wanted = guard(&["10.2.0.0/24"]);
    let text: String = wanted
        .render(Slot::A)
        .lines()
        .filter(|line| !line.contains("outer_a"))
        .fold(String::new(), |all, line| all + line + "\n");
    std::fs::write("/run/before.nft", text).unwrap();
    sh("nft -f /run/before.nft");
    lab.nft.apply(&wanted).await.unwrap();
    let listed = sh("nft list table inet sennit");
    // In the other slot: it stood before the one of before went.
    assert!(listed.contains("outer_b") && !listed.contains("egress_a"), "{listed}");
}

pub(crate) async fn a_route_in_clear_is_set_known_again_and_removed(mut lab: Lab) {
    let wanted = VxlanConfig {
        name: "sennitxc4".parse().unwrap(),
        outer_v6: false,
        vni: 5183,
        port: 4789,
        mtu: 1450,
        mac: [2, 0, 0, 0, 0, 1],
        addresses: nets(&["fd54::1/64", "10.1.0.1/32", "fd00:1::1/128"]),
        neighbours: Default::default(),
    };
    for change in wanted.diff(None, true).unwrap() {
        lab.net.apply_vxlan(&wanted, &change).await.unwrap();
    }
    let route = |to: &str, mtu: u16| {
        let source = if to.contains(':') { "fd00:1::1" } else { "10.1.0.1" };
        let (via, source) = ("fd54::2".parse().unwrap(), Some(source.parse().unwrap()));
        Route::new(net(to), RouteKind::Cleartext { device: wanted.name, via, source, mtu })
    };
    for to in ["10.2.0.0/24", "fd00:2::/64"] {
        let hole = Route::new(net(to), RouteKind::Blackhole);
        for set in [hole, route(to, 1400), route(to, 1300)] {
            lab.route(RouteChange::Set(set)).await.unwrap();
        }
        let found = lab.observe_net().await.routes;
        assert!(found.routes.contains(&route(to, 1300)) && found.routes.contains(&hole), "{found:?}");
        assert!(!found.routes.contains(&route(to, 1400)) && found.strays.is_empty(), "{found:?}");
        lab.route(RouteChange::Remove(route(to, 1300))).await.unwrap();
        let found = lab.observe_net().await.routes;
        assert!(!found.routes.contains(&route(to, 1300)) && found.routes.contains(&hole), "{found:?}");
    }
    lab.net.remove_vxlan(&wanted.name).await.unwrap();
}
