//! What every net and nft backend does, and what only a real kernel shows.

use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::time::Duration;

use mesh_overlay::Guard;
use mesh_overlay::address::carrier_mac;
use mesh_overlay::guard::{Carriers, Slot};
use mesh_overlay::link::{LinkChange, ObservedUnderlay};
use mesh_overlay::netlink::Watch;
use mesh_overlay::route::StrayRoute;
use mesh_overlay::vxlan::{Neighbour, VxlanChange, VxlanConfig};
use mesh_overlay::{Route, RouteChange, RouteKind};

use crate::cleartext::cleartext;
use crate::lab::{Lab, eventually, name, net, nets};
use crate::namespace::sh;

/// The index of a link; where there is none, one that no link has.
pub(crate) fn index(link: &str) -> u32 {
    nix::net::if_::if_nametoindex(link).unwrap_or(4_000)
}

pub(crate) fn guard(mesh: &[&str]) -> Guard {
    Guard {
        mesh: nets(mesh),
        local: nets(&["10.1.0.0/24"]),
        outside: BTreeSet::new(),
        interfaces: BTreeSet::from([name()]),
        pod_kinds: ["bridge", "veth"].map(str::to_owned).into(),
        underlay: BTreeSet::new(),
        carriers: None,
        cleartext: None,
    }
}

pub(crate) async fn a_guard_is_replaced_by_the_next(mut lab: Lab) {
    assert_eq!(lab.nft.observe().await.fingerprint, None);
    for mesh in [&["10.2.0.0/24"][..], &["10.2.0.0/24", "10.3.0.0/24", "10.4.1.0/24", "fd00::/8"], &[]] {
        let wanted = guard(mesh);
        lab.nft.apply(&wanted).await.unwrap();
        assert_eq!(lab.nft.observe().await.fingerprint, Some(wanted.fingerprint()));
        lab.restart();
        assert_eq!(lab.nft.observe().await.fingerprint, Some(wanted.fingerprint()), "{mesh:?}");
    }
    if lab.fake.is_none() {
        // Nothing of the guards before is left.
        assert_eq!(sh("nft list table inet sennit").matches("chain").count(), 6);
        // An agent died after the first of the two steps.
        let next = guard(&["10.9.0.0/24"]);
        std::fs::write("/run/next.nft", next.render(Slot::A) + &next.render(Slot::B)).unwrap();
        sh("nft delete table inet sennit && nft -f /run/next.nft");
        assert_eq!(lab.nft.observe().await.fingerprint, None);
        lab.nft.apply(&next).await.unwrap();
        assert_eq!(lab.nft.observe().await.fingerprint, Some(next.fingerprint()));
        assert_eq!(sh("nft list table inet sennit").matches("chain").count(), 6);
    }
    lab.nft.remove().await.unwrap();
    assert_eq!(lab.nft.observe().await.fingerprint, None);
    lab.nft.remove().await.unwrap();
}

pub(crate) async fn a_changed_guard_is_noticed(mut lab: Lab) {
    let mut wanted = guard(&["10.2.0.0/24", "fd00::/8"]);
    wanted.underlay = BTreeSet::from([index("up0")]);
    let tampers = [
        "for slot in a b; do nft insert rule inet sennit egress_$slot ip daddr 10.2.0.0/24 accept || true; done",
        "for slot in a b; do nft flush chain inet sennit egress_$slot || true; done",
        "for slot in a b; do nft insert rule inet sennit ingress_$slot accept || true; done",
        "nft delete table inet sennit && nft add table inet sennit",
        "nft add chain inet sennit other '{ type filter hook output priority 0; policy drop; }'",
    ];
    for tamper in tampers {
        for restarted in [false, true] {
            lab.nft.apply(&wanted).await.unwrap();
            assert!(lab.nft.observe().await.fingerprint.is_some());
            match &lab.fake {
                Some(host) => host.with(|host| host.guard_tampered = true),
                None => drop(sh(tamper)),
            }
            if restarted {
                lab.restart();
            }
            assert_eq!(lab.nft.observe().await.fingerprint, None, "{tamper}");
            // Looking twice does not make it right.
            assert_eq!(lab.nft.observe().await.fingerprint, None, "{tamper}");
        }
    }
    lab.nft.apply(&wanted).await.unwrap();
    assert_eq!(lab.nft.observe().await.fingerprint, Some(wanted.fingerprint()));
}

pub(crate) async fn a_mesh_route_goes_with_its_device_and_the_blackhole_stays(mut lab: Lab) {
    lab.pass().await;
    let all = lab.observe_net().await.routes.routes;
    assert_eq!(all, lab.plan().2.routes);
    if lab.fake.is_none() {
        for to in ["10.2.0.1", "fd00:2::1"] {
            assert!(sh(&format!("ip route get {to}")).contains("dev sennit0"));
        }
    }
    lab.wireguard.remove().await.unwrap();
    let left = lab.observe_net().await.routes;
    let holes: BTreeSet<Route> =
        all.into_iter().filter(|route| !matches!(route.kind, RouteKind::Mesh { .. })).collect();
    assert_eq!(left.routes, holes);
    assert!(left.rule_v4 && left.rule_v6);
    if lab.fake.is_none() {
        // A way out would be there.
        sh("ip link add up0 type veth peer name far0 && ip link set up0 up && ip link set far0 up && \
            ip route add default dev up0 && ip -6 route add default dev up0");
        for to in ["10.2.0.1", "fd00:2::1"] {
            let said = sh(&format!("ip route get {to} 2>&1 || true"));
            assert!(!said.contains("up0"), "{said}");
        }
        // Its own prefix is left to routes of table main that are no wider.
        let way = |to: &str| sh(&format!("ip route get {to} 2>&1 || true"));
        sh("ip route add 10.0.0.0/8 dev up0 && ip -6 route add fd00::/16 dev up0 && \
            ip rule add pref 6000 lookup 77 && ip route add 10.1.0.0/24 dev up0 table 77 && \
            ip route add 0.0.0.0/1 dev up0 && ip route add 128.0.0.0/1 dev up0");
        for to in ["10.1.0.9", "fd00:1::9"] {
            let said = way(to);
            assert!(!said.contains("up0"), "{said}");
        }
        sh("ip link add pods type bridge && ip link set pods up && ip route add 10.1.0.0/24 dev pods && \
            ip -6 route add fd00:1::9 dev pods");
        for to in ["10.1.0.9", "fd00:1::9"] {
            let said = way(to);
            assert!(said.contains("dev pods"), "{said}");
        }
    }
}

pub(crate) async fn a_route_of_another_mtu_replaces_the_one_before(mut lab: Lab) {
    lab.pass().await;
    for to in ["10.2.0.0/24", "fd00:2::/64"] {
        let other = Route::new(net(to), RouteKind::Mesh { mtu: 1300 });
        lab.route(RouteChange::Set(other)).await.unwrap();
        let found = lab.observe_net().await.routes.routes;
        let mesh: Vec<&Route> = found
            .iter()
            .filter(|route| route.to == net(to) && matches!(route.kind, RouteKind::Mesh { .. }))
            .collect();
        assert_eq!(mesh, [&other]);
        assert!(found.contains(&Route::new(net(to), RouteKind::Blackhole)));
    }
    assert_eq!(lab.pass().await, 2);
}

pub(crate) async fn stray_routes_of_ours_are_seen_and_removed(mut lab: Lab) {
    lab.pass().await;
    match &lab.fake {
        Some(host) => host.with(|host| {
            host.net.routes.strays.insert(StrayRoute { to: net("10.2.0.0/24"), metric: 5, kind: 1 });
        }),
        None => drop(sh(
            "ip link add up0 type veth peer name far0 && ip link set up0 up && ip link set far0 up && \
             ip route add 10.2.0.0/24 dev up0 table 5182 proto 82 metric 5 && \
             ip -6 route add fd00:2::/64 dev up0 table 5182 proto 82 metric 5 && \
             ip route add unreachable 10.9.0.0/24 table 5182 proto 82 metric 1000000 && \
             ip route add 10.8.0.0/24 dev up0 table 5182 proto static metric 5",
        )),
    }
    let strays = lab.observe_net().await.routes.strays;
    assert_eq!(strays.len(), if lab.fake.is_some() { 1 } else { 3 }, "{strays:?}");
    assert_eq!(lab.pass().await, strays.len());
    assert_eq!(lab.pass().await, 0);
    if lab.fake.is_none() {
        // Another protocol's route is not ours.
        assert!(sh("ip route show table 5182").contains("10.8.0.0/24"));
    }
}

pub(crate) async fn setting_a_rule_or_address_twice_is_no_error(mut lab: Lab) {
    lab.pass().await;
    for v6 in [false, true] {
        lab.route(RouteChange::AddRule { v6 }).await.unwrap();
    }
    let address = LinkChange::AddAddress(net("fd00:1::1/128"));
    lab.net.apply_link(&address).await.unwrap();
    let remove = LinkChange::RemoveAddress(net("10.1.0.1/32"));
    lab.net.apply_link(&remove).await.unwrap();
    lab.net.apply_link(&remove).await.unwrap();
    assert_eq!(lab.observe_net().await.link.unwrap().addresses, nets(&["fd00:1::1/128"]));
    let gone = Route::new(net("10.77.0.0/24"), RouteKind::Blackhole);
    lab.route(RouteChange::Remove(gone)).await.unwrap();
    if lab.fake.is_none() {
        for family in ["-4", "-6"] {
            assert_eq!(sh(&format!("ip {family} rule show priority 5182")).lines().count(), 1);
        }
    }
}

pub(crate) async fn removing_all_takes_our_routes_and_rules_alone(mut lab: Lab) {
    lab.pass().await;
    if lab.fake.is_none() {
        sh(
            "ip route add blackhole 10.66.0.0/24 table 5182 proto static && ip rule add priority 5182 table 77",
        );
    }
    let routing = lab.routing;
    lab.net.remove_all(&routing).await.unwrap();
    let found = lab.observe_net().await.routes;
    assert_eq!(found, Default::default());
    if lab.fake.is_none() {
        assert!(sh("ip route show table 5182").contains("10.66.0.0/24"));
        assert!(sh("ip rule show priority 5182").contains("lookup 77"));
    }
    lab.net.remove_all(&routing).await.unwrap();
}

/// Packets that left through `up0`.
fn sent() -> u64 {
    sent_by("up0")
}

fn sent_by(link: &str) -> u64 {
    let table = std::fs::read_to_string("/proc/self/net/dev").unwrap();
    let line = table.lines().find(|line| line.trim_start().starts_with(&format!("{link}:"))).unwrap();
    line.split_whitespace().nth(10).unwrap().parse().unwrap()
}

pub(crate) fn way_out() {
    sh("ip link add up0 type veth peer name far0 && echo 1 > /proc/sys/net/ipv6/conf/up0/disable_ipv6 && \
        ip addr add 192.0.2.1/24 dev up0 && ip link set up0 up && ip link set far0 up && \
        ip neigh add 192.0.2.254 lladdr 02:00:00:00:00:fe dev up0 nud permanent && \
        ip route add default via 192.0.2.254");
}

pub(crate) async fn no_packet_slips_out_while_the_guard_is_replaced(mut lab: Lab) {
    way_out();
    let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
    socket.send_to(b"out", "10.2.0.1:9").unwrap();
    assert_eq!(sent(), 1, "the way out works");
    lab.nft.apply(&guard(&["10.2.0.0/24"])).await.unwrap();
    let running = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let flag = running.clone();
    let flood = std::thread::spawn(move || {
        let mut count = 0_u64;
        while flag.load(std::sync::atomic::Ordering::Relaxed) {
            let _ = socket.send_to(b"leak", "10.2.0.1:9");
            count += 1;
        }
        count
    });
    for round in 0..100 {
        let other = format!("10.{}.0.0/24", 100 + round);
        lab.nft.apply(&guard(&["10.2.0.0/24", &other])).await.unwrap();
    }
    running.store(false, std::sync::atomic::Ordering::Relaxed);
    assert!(flood.join().unwrap() > 100);
    assert_eq!(sent(), 1);
    let before = lab.nft.observe().await;
    let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
    for _ in 0..3 {
        let _ = socket.send_to(b"leak", "10.2.0.1:9");
    }
    let after = lab.nft.observe().await;
    assert_eq!(after.egress_drops - before.egress_drops, 3);
    assert_eq!(after.fingerprint, before.fingerprint);
    assert_eq!(after.ingress_drops, 0);
}

pub(crate) async fn a_guard_of_every_shape_is_known_again(mut lab: Lab) {
    let all = |texts: &[&[&str]]| texts.iter().map(|texts| nets(texts)).collect::<Vec<_>>();
    let outsides = all(&[&[], &["10.2.0.9/32"], &["10.2.0.8/32", "10.2.0.9/32", "fd00:2::9/128"]]);
    let locals = all(&[&[], &["10.1.0.0/24"], &["fd00:1::/64"], &["10.1.0.0/24", "fd00:1::/64"]]);
    let mut marks = BTreeSet::new();
    for outside in &outsides {
        for local in &locals {
            for underlay in [&[][..], &[4_000], &[4_000, 4_001]] {
                let carriers = (outside.len() % 2 == 0).then(|| Carriers {
                    interfaces: ["sennitx4", "sennitx6"][..=outside.len() / 2]
                        .iter()
                        .map(|n| n.parse().unwrap())
                        .collect(),
                    prefix: "fd53:1:2::/63".parse().unwrap(),
                    port: 51820,
                });
                let wanted = Guard {
                    carriers,
                    cleartext: (outside.len() % 2 == 0).then(|| cleartext(local.len(), !underlay.is_empty())),
                    outside: outside.clone(),
                    local: local.clone(),
                    underlay: underlay.iter().copied().collect(),
                    ..guard(&["10.2.0.0/24", "fd00:2::/64"])
                };
                lab.nft.apply(&wanted).await.unwrap();
                lab.restart();
                assert_eq!(lab.nft.observe().await.fingerprint, Some(wanted.fingerprint()), "{wanted:?}");
                marks.insert(wanted.fingerprint());
            }
        }
    }
    // Those without anything local are the same on every underlay.
    assert_eq!(marks.len(), 3 * (3 * 3 + 1));
    // Half of what is local is let out, under the same mark.
    let wanted = Guard { underlay: BTreeSet::from([4_000]), ..guard(&["10.2.0.0/24"]) };
    let text = wanted.render(Slot::A);
    for of_underlay in ["oif { 4000 } ip daddr", "iif { 4000 } ip saddr"] {
        assert!(text.contains(&format!("{of_underlay} {{ 10.1.0.0/24 }}")), "{text}");
    }
    let halved = text.replace("addr { 10.1.0.0/24 } counter", "addr { 10.1.0.0/25 } counter");
    for (text, mark) in [(&text, Some(wanted.fingerprint())), (&halved, None)] {
        std::fs::write("/run/guard.nft", text).unwrap();
        sh("nft delete table inet sennit && nft -f /run/guard.nft");
        lab.restart();
        assert_eq!(lab.nft.observe().await.fingerprint, mark, "{text}");
    }
    lab.nft.apply(&wanted).await.unwrap();
    // A second rule of a kind is none of ours.
    let rule = "egress_$slot oifname up0 ip daddr 10.1.0.0/25 counter name egress drop";
    sh(&format!("for slot in a b; do nft add rule inet sennit {rule} || true; done"));
    lab.restart();
    assert_eq!(lab.nft.observe().await.fingerprint, None);
}

pub(crate) async fn a_vxlan_device_is_made_kept_changed_and_removed(mut lab: Lab) {
    let peer = |n: u8, remote: &str| {
        let address = std::net::Ipv6Addr::from((0xfd53_u128 << 112) + u128::from(n));
        (address, Neighbour { mac: carrier_mac(address), remote: remote.parse().unwrap() })
    };
    for outer_v6 in [false, true] {
        let remotes = if outer_v6 { ["2001:db8::2", "2001:db8::3"] } else { ["192.0.2.2", "192.0.2.3"] };
        let mut wanted = VxlanConfig {
            name: if outer_v6 { "sennitx6" } else { "sennitx4" }.parse().unwrap(),
            outer_v6,
            vni: 5182,
            port: 4789,
            mtu: 1430,
            mac: [2, 0, 0, 0, 0, 1],
            addresses: BTreeSet::from(["fd53::1/64".parse().unwrap()]),
            neighbours: [peer(2, remotes[0]), peer(3, remotes[1])].into(),
        };
        let mut passes = Vec::new();
        for step in 0..4 {
            match step {
                2 => {
                    wanted.neighbours.remove(&peer(2, remotes[0]).0);
                    wanted.neighbours.insert(peer(3, remotes[0]).0, peer(3, remotes[0]).1);
                    wanted.mtu = 1400;
                }
                3 => wanted.vni = 9,
                _ => {}
            }
            for _ in 0..2 {
                let found = lab.net.observe_vxlan(&wanted.name).await.unwrap();
                let changes = wanted.diff(found.as_ref(), true).unwrap();
                passes.push(changes.len());
                for change in changes {
                    lab.net.apply_vxlan(&wanted, &change).await.unwrap();
                }
            }
        }
        assert!(passes[0] >= 9 && passes[4] == 5 && passes[6] >= 7, "{passes:?}");
        assert_eq!([passes[1], passes[2], passes[3], passes[5], passes[7]], [0; 5], "{passes:?}");
        assert_eq!(lab.net.own_vxlan().await.unwrap(), [wanted.name]);
        lab.net.remove_vxlan(&wanted.name).await.unwrap();
        assert_eq!(lab.net.own_vxlan().await.unwrap(), []);
        assert_eq!(lab.net.observe_vxlan(&wanted.name).await.unwrap(), None);
        lab.net.remove_vxlan(&wanted.name).await.unwrap();
    }
}

pub(crate) async fn a_vxlan_device_of_somebody_else_is_left_alone_and_their_port_is_shared(mut lab: Lab) {
    sh("ip link add vxlan.calico type vxlan id 4096 dstport 4789 local 192.0.2.1 nolearning && \
        ip link add flannel.1 type vxlan id 1 dstport 8472 nolearning && \
        ip link add sennitx6 type vxlan id 5 dstport 4790");
    let wanted = |name: &str, vni| VxlanConfig {
        name: name.parse().unwrap(),
        outer_v6: false,
        vni,
        port: 4789,
        mtu: 1450,
        mac: [2, 0, 0, 0, 0, 1],
        addresses: BTreeSet::from(["fd53::1/64".parse().unwrap()]),
        neighbours: Default::default(),
    };
    lab.net.apply_vxlan(&wanted("sennitx4", 5182), &VxlanChange::Create).await.unwrap();
    let taken = lab.net.apply_vxlan(&wanted("sennitx5", 4096), &VxlanChange::Create).await.unwrap_err();
    assert!(taken.to_string().contains("set `vxlan.vni`"), "{taken}");
    let foreign = wanted("sennitx6", 5182);
    let found = lab.net.observe_vxlan(&foreign.name).await.unwrap();
    assert!(foreign.diff(found.as_ref(), true).is_err(), "{found:?}");
    lab.net.remove_vxlan(&foreign.name).await.unwrap();
    sh("ip link show sennitx6 && ip link show vxlan.calico && ip link show flannel.1");
}

/// `up0` leads to the host `lan`, which has the default route's gateway and the address `theirs`.
pub(crate) fn lan(theirs: &str) {
    sh(&format!(
        "ip netns add lan && ip link set far0 netns lan && ip -n lan link set far0 up && \
         ip -n lan addr add {theirs}/32 dev far0 && \
         ip -n lan route add 192.0.2.1 dev far0 src {theirs} && \
         ip -n lan neigh add 192.0.2.1 lladdr $(ip -br link show up0 | awk '{{print $3}}') dev far0 && \
         for at in all default up0; do echo 0 > /proc/sys/net/ipv4/conf/$at/rp_filter; done"
    ));
}

/// Whether what `lan` sends to this host from that address comes in. What is expected not to is given until another
/// packet after it has come.
pub(crate) fn comes_in(from: &str) -> bool {
    let socket = UdpSocket::bind("192.0.2.1:4000").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    for (source, text) in [(from, "it"), ("192.0.2.254", "end")] {
        sh(&format!(
            "ip -n lan addr replace {source}/32 dev far0 && \
             ip -n lan route replace 192.0.2.1 dev far0 src {source} && \
             ip netns exec lan bash -c 'echo -n {text} > /dev/udp/192.0.2.1/4000'"
        ));
    }
    let mut buffer = [0; 16];
    let (length, _) = socket.recv_from(&mut buffer).unwrap();
    &buffer[..length] == b"it"
}

pub(crate) async fn a_packet_to_a_pod_that_is_gone_does_not_leave_in_clear(mut lab: Lab) {
    way_out();
    // What comes out of this is what a tunnel has decrypted.
    sh("ip netns add mesh && \
        ip link add sennit0 address 02:00:00:00:00:01 type veth peer name peer0 netns mesh && \
        echo 1 > /proc/sys/net/ipv6/conf/sennit0/disable_ipv6 && ip link set sennit0 up && \
        ip -n mesh link set peer0 up && ip -n mesh addr add 10.2.0.5/32 dev peer0 && \
        ip -n mesh route add default dev peer0 && \
        ip -n mesh neigh add 10.1.0.9 lladdr 02:00:00:00:00:01 dev peer0 nud permanent && \
        for at in all default sennit0; do echo 0 > /proc/sys/net/ipv4/conf/$at/rp_filter; done && \
        echo 1 > /proc/sys/net/ipv4/ip_forward");
    let arrive = || sh("ip netns exec mesh bash -c 'echo it > /dev/udp/10.1.0.9/9'");
    let mut wanted = guard(&["10.2.0.0/24"]);
    lab.nft.apply(&wanted).await.unwrap();
    arrive();
    eventually("the default route would take it", async || sent() == 1).await;
    wanted.underlay = BTreeSet::from([index("up0")]);
    lab.nft.apply(&wanted).await.unwrap();
    arrive();
    eventually("the guard holds it", async || lab.nft.observe().await.egress_drops == 1).await;
    assert_eq!(sent(), 1);
    lab.restart();
    assert_eq!(lab.nft.observe().await.fingerprint, Some(wanted.fingerprint()));
}

/// An interface of another kind than pods have is shut, observed or not; a rename opens nothing.
pub(crate) async fn own_prefixes_pass_no_new_interface(mut lab: Lab) {
    way_out();
    lan("192.0.2.254");
    let mut wanted = guard(&["10.2.0.0/24"]);
    wanted.underlay = BTreeSet::from([index("up0")]);
    lab.nft.apply(&wanted).await.unwrap();
    sh("ip link add corp0 link up0 type macvlan mode bridge && ip addr add 198.51.100.7/24 dev corp0 && \
        ip link set corp0 up && ip route add 10.1.0.0/24 dev corp0 && \
        ip neigh add 10.1.0.9 lladdr 02:00:00:00:00:fd dev corp0 nud permanent");
    let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
    let left = || {
        let before = sent();
        let _ = socket.send_to(b"out", ("10.1.0.9", 9));
        sent() - before
    };
    assert_eq!(left(), 0, "by a macvlan that came later");
    sh("ip link del corp0 && ip route add 10.1.0.0/24 via 192.0.2.254");
    assert_eq!(left(), 0, "by the underlay");
    sh("ip link set up0 down && ip link set up0 name 4g-wan@ && ip link set 4g-wan@ up && \
        ip route replace default via 192.0.2.254 dev 4g-wan@ && \
        ip neigh replace 192.0.2.254 lladdr 02:00:00:00:00:fe dev 4g-wan@ nud permanent && \
        ip route replace 10.1.0.0/24 via 192.0.2.254");
    let before = sent_by("4g-wan@");
    let drops = lab.nft.observe().await.egress_drops;
    let _ = socket.send_to(b"out", ("10.1.0.9", 9));
    assert_eq!(lab.nft.observe().await.egress_drops, drops + 1);
    assert_eq!(sent_by("4g-wan@"), before, "by the underlay under another name");
}

pub(crate) async fn nobody_on_the_underlay_speaks_as_one_of_our_pods(mut lab: Lab) {
    way_out();
    lan("192.0.2.254");
    let mut wanted = guard(&["10.2.0.0/24"]);
    lab.nft.apply(&wanted).await.unwrap();
    assert!(comes_in("10.1.0.9"), "the way in works");
    assert!(!comes_in("10.2.0.9"));
    wanted.underlay = BTreeSet::from([index("up0")]);
    lab.nft.apply(&wanted).await.unwrap();
    assert!(!comes_in("10.1.0.9"));
    assert_eq!(lab.nft.observe().await.ingress_drops, 2);
}

pub(crate) async fn a_protected_address_inside_of_the_mesh_passes_in_clear(mut lab: Lab) {
    way_out();
    lan("192.0.2.254");
    let mut wanted = guard(&["10.2.0.0/24", "10.1.0.0/24"]);
    wanted.underlay = BTreeSet::from([index("up0")]);
    let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
    let left = |to: &str| {
        let before = sent();
        let _ = socket.send_to(b"out", (to, 9));
        sent() - before
    };
    lab.nft.apply(&wanted).await.unwrap();
    assert_eq!((left("10.2.0.9"), left("10.1.0.9")), (0, 0));
    assert!(!comes_in("10.2.0.9"));
    wanted.outside = nets(&["10.2.0.9/32", "10.1.0.9/32"]);
    lab.nft.apply(&wanted).await.unwrap();
    assert_eq!((left("10.2.0.9"), left("10.1.0.9")), (1, 1));
    assert!(comes_in("10.2.0.9"));
    assert_eq!((left("10.2.0.8"), left("10.1.0.8")), (0, 0));
    assert!(!comes_in("10.2.0.8"));
}

pub(crate) async fn a_missing_nft_names_its_package(_lab: Lab) {
    use mesh_overlay::backend::{BackendError, NftBackend as _};
    let mut nft = mesh_overlay::nft::Nft::with_program("/no/such/nft".into());
    assert!(matches!(nft.observe().await, Err(BackendError::MissingProgram { package: "nftables", .. })));
}

pub(crate) async fn the_underlay_is_what_the_default_routes_leave_through(mut lab: Lab) {
    lab.pass().await;
    sh("ip link add up0 mtu 1450 type veth peer name far0 && ip link set up0 up && ip link set far0 up && \
        ip link add up1 mtu 1400 type veth peer name far1 && ip link set up1 up && ip link set far1 up && \
        ip addr add 192.0.2.1/24 dev up0 && ip addr add 198.51.100.1/24 dev up1 && \
        ip addr add 169.254.1.1/16 dev up0 && ip addr add 2001:db8::1/64 dev up0 nodad && \
        ip addr add 2001:db8::2/64 dev up0 nodad preferred_lft 0 && \
        ip route add default dev up0 && ip -6 route add default dev up0 && \
        ip route add default dev sennit0 metric 99");
    let found = lab.observe_net().await.underlay;
    let away = |found: &ObservedUnderlay| {
        let away = found.away(&[net("10.1.0.0/24")]);
        away.iter().map(|index| found.links[index].name.clone()).collect::<Vec<_>>()
    };
    assert_eq!(away(&found), ["up0", "up1"]);
    let ip = |text: &str| text.parse::<std::net::IpAddr>().unwrap();
    let all = [ip("192.0.2.1"), ip("198.51.100.1"), ip("2001:db8::1")];
    assert_eq!(found.addresses, BTreeSet::from(all));
    assert_eq!(found.default_route_addresses, [ip("192.0.2.1"), ip("2001:db8::1")]);
    assert_eq!(found.mtu, Some(1450));
    sh("ip route replace default dev up0 mtu 1420; echo 1 > /proc/sys/net/ipv4/ip_forward");
    let found = lab.observe_net().await.underlay;
    assert_eq!((found.mtu, found.forwarding.0), (Some(1420), true));
    // Whatever they are called, and by halves.
    sh("ip link add 9up type bridge && ip link set 9up up && ip route add 0.0.0.0/1 dev 9up && \
        ip link add 'lan+@' type bridge && ip link set 'lan+@' up && \
        ip route add default metric 8 nexthop via 192.0.2.9 dev up0 nexthop dev 'lan+@'");
    let found = lab.observe_net().await.underlay;
    assert_eq!(away(&found), ["up0", "up1", "9up", "lan+@"]);
    let gateways = found.links.values().flat_map(|link| &link.gateways).collect::<Vec<_>>();
    assert_eq!(gateways, [&ip("192.0.2.9")]);
    // A link of pods leads to them, whatever else is there.
    sh("ip link add pods type bridge && ip link set pods up && ip addr add 10.1.0.1/24 dev pods");
    assert_eq!(away(&lab.observe_net().await.underlay), ["up0", "up1", "9up", "lan+@"]);
}

pub(crate) async fn a_host_without_ipv6_is_told_so(mut lab: Lab) {
    lab.start().await;
    sh("echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6");
    let address = LinkChange::AddAddress(net("fd00:1::1/128"));
    let refused = lab.net.apply_link(&address).await.unwrap_err().to_string();
    assert!(refused.contains("fd00:1::1/128") && refused.contains("IPv6 is disabled"), "{refused}");
    // IPv4 goes on.
    lab.net.apply_link(&LinkChange::AddAddress(net("10.1.0.1/32"))).await.unwrap();
    lab.route(RouteChange::Set(Route::new(net("10.2.0.0/24"), RouteKind::Mesh { mtu: 1300 }))).await.unwrap();
}

pub(crate) async fn a_watch_tells_of_changes_and_survives_too_many(_lab: Lab) {
    let mut watch = Watch::new().unwrap();
    let quiet = tokio::time::timeout(Duration::from_millis(300), watch.changed()).await;
    assert!(quiet.is_err(), "nothing has changed");
    for change in [
        "ip link add up0 type veth peer name far0",
        "ip addr add 192.0.2.1/24 dev up0",
        "ip link set up0 up",
        "ip route add blackhole 10.9.0.0/24",
        "ip -6 rule add table 77",
        "nft add table inet sennit",
        "nft add chain inet sennit extra",
        "nft flush ruleset",
    ] {
        sh(change);
        let told = tokio::time::timeout(Duration::from_secs(5), watch.changed()).await;
        told.unwrap_or_else(|_| panic!("not told of: {change}")).unwrap();
        // What follows of itself, like the addresses that the kernel gives to a new link.
        eventually("quiet", async || {
            tokio::time::timeout(Duration::from_millis(300), watch.changed()).await.is_err()
        })
        .await;
    }
    // Somebody else's rules are no concern of ours.
    sh("nft add table inet other && nft add chain inet other extra");
    let quiet = tokio::time::timeout(Duration::from_millis(300), watch.changed()).await;
    assert!(quiet.is_err(), "told of another's table");
    // More than its buffer holds.
    sh("for i in $(seq 1 4000); do echo route add blackhole 10.$((i / 250 + 10)).$((i % 250)).0/24; done \
        | ip -batch -");
    watch.changed().await.unwrap();
    sh("ip link del up0");
    tokio::time::timeout(Duration::from_secs(5), watch.changed()).await.unwrap().unwrap();
}
