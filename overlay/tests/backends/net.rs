//! What every net and nft backend does, and what only a real kernel shows.

use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::time::Duration;

use mesh_overlay::Guard;
use mesh_overlay::guard::Slot;
use mesh_overlay::link::LinkChange;
use mesh_overlay::netlink::Watch;
use mesh_overlay::route::StrayRoute;
use mesh_overlay::{Route, RouteChange, RouteKind};

use crate::lab::{Lab, eventually, name, net, nets};
use crate::namespace::sh;

fn guard(mesh: &[&str]) -> Guard {
    Guard { mesh: nets(mesh), local: nets(&["10.1.0.0/24"]), interfaces: BTreeSet::from([name()]) }
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
        assert_eq!(sh("nft list table inet sennit").matches("chain").count(), 2);
        // An agent died after the first of the two steps.
        let next = guard(&["10.9.0.0/24"]);
        std::fs::write("/run/next.nft", next.render(Slot::A) + &next.render(Slot::B)).unwrap();
        sh("nft delete table inet sennit && nft -f /run/next.nft");
        assert_eq!(lab.nft.observe().await.fingerprint, None);
        lab.nft.apply(&next).await.unwrap();
        assert_eq!(lab.nft.observe().await.fingerprint, Some(next.fingerprint()));
        assert_eq!(sh("nft list table inet sennit").matches("chain").count(), 2);
    }
    lab.nft.remove().await.unwrap();
    assert_eq!(lab.nft.observe().await.fingerprint, None);
    lab.nft.remove().await.unwrap();
}

pub(crate) async fn a_changed_guard_is_noticed(mut lab: Lab) {
    let wanted = guard(&["10.2.0.0/24", "fd00::/8"]);
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
        // Its own prefix is left to the other tables.
        for to in ["10.1.0.9", "fd00:1::9"] {
            assert!(sh(&format!("ip route get {to}")).contains("dev up0"));
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
    let table = std::fs::read_to_string("/proc/self/net/dev").unwrap();
    let line = table.lines().find(|line| line.trim_start().starts_with("up0:")).unwrap();
    line.split_whitespace().nth(10).unwrap().parse().unwrap()
}

fn way_out() {
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
        ip route add default dev up0 && ip -6 route add default dev up0");
    let found = lab.observe_net().await.underlay;
    let ip = |text: &str| text.parse::<std::net::IpAddr>().unwrap();
    let all = [ip("192.0.2.1"), ip("198.51.100.1"), ip("2001:db8::1")];
    assert_eq!(found.addresses, BTreeSet::from(all));
    assert_eq!(found.default_route_addresses, [ip("192.0.2.1"), ip("2001:db8::1")]);
    assert_eq!(found.mtu, Some(1450));
    sh("ip route replace default dev up0 mtu 1420; echo 1 > /proc/sys/net/ipv4/ip_forward");
    let found = lab.observe_net().await.underlay;
    assert_eq!((found.mtu, found.forwarding.0), (Some(1420), true));
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
    // More than its buffer holds.
    sh("for i in $(seq 1 4000); do echo route add blackhole 10.$((i / 250 + 10)).$((i % 250)).0/24; done \
        | ip -batch -");
    watch.changed().await.unwrap();
    sh("ip link del up0");
    tokio::time::timeout(Duration::from_secs(5), watch.changed()).await.unwrap().unwrap();
}
