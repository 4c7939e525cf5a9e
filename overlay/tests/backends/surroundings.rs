//! What else on a host decides where packets go, on real objects of the kernel.

use std::collections::BTreeSet;
use std::process::{Child, Command};

use ipnet::IpNet;
use mesh_overlay::netlink::Netlink;
use mesh_overlay::surroundings::Action;

use crate::lab::Lab;
use crate::namespace::sh;

fn own() -> BTreeSet<IpNet> {
    ["10.1.0.0/24", "fd00:1::/64"].map(|net| net.parse().unwrap()).into()
}

pub(crate) async fn interfaces_outside_are_told_from_those_of_pods(_lab: Lab) {
    sh("ip link add eth0 type veth peer name far0 && ip link add 9inner type veth peer name far1 && \
        ip link add cali1 type veth peer name pod1 && ip link add cni0 type bridge && \
        ip link add new0 type veth peer name pod2 && \
        for link in eth0 9inner cali1 cni0 new0 far0 far1 pod1 pod2; do ip link set $link up; done; \
        ip addr add 192.0.2.9/24 dev eth0 && ip route add default via 192.0.2.1 && \
        ip addr add 198.51.100.9/24 dev 9inner && ip route add 10.0.0.0/8 via 198.51.100.1 && \
        ip addr add 10.1.0.1/24 dev cni0 && ip addr add 169.254.1.1/32 dev cali1 && \
        ip route add 10.1.0.77/32 dev cali1");
    let mut net = Netlink::new().unwrap();
    let found = net.surroundings().await.unwrap();
    assert!(found.cut.is_empty(), "{:?}", found.cut);
    let outside = found.outside(&own());
    for name in ["eth0", "9inner"] {
        assert!(outside.contains(name), "{outside:?}");
    }
    for name in ["cali1", "cni0", "new0", "lo"] {
        assert!(!outside.contains(name), "{outside:?}");
    }
    // This node's prefix as a router on the inner network advertises it: by an address that ends by itself.
    sh("ip addr add fd00:1::9/64 dev 9inner valid_lft 600 preferred_lft 600 nodad");
    let found = net.surroundings().await.unwrap();
    assert!(found.outside(&own()).contains("9inner"), "{found:?}");
}

pub(crate) async fn rules_and_routes_of_others_are_read(_lab: Lab) {
    sh("ip link add eth0 type veth peer name far0 && ip link set eth0 up && ip link set far0 up && \
        ip addr add 192.0.2.9/24 dev eth0 && ip route add default via 192.0.2.1 dev eth0 table 51820 && \
        ip rule add not fwmark 51820 table 51820 pref 5181 && ip -6 rule add from fd00:1::/64 to fd00:2::/64 iif eth0 goto 32766 pref 7 && \
        ip rule add table main suppress_prefixlength 0 pref 6 && ip rule add uidrange 0-5 blackhole pref 5");
    let found = Netlink::new().unwrap().surroundings().await.unwrap();
    let rule = |priority| found.rules.iter().find(|rule| rule.priority == priority).unwrap();
    let vpn = rule(5181);
    assert_eq!((vpn.action, vpn.narrow, vpn.inverted), (Action::Table(51820), true, true));
    let jump = rule(7);
    assert!(jump.v6 && jump.action == Action::Goto(32766) && jump.iif.as_deref() == Some("eth0"), "{jump:?}");
    assert_eq!((jump.from, jump.to), ("fd00:1::/64".parse().ok(), "fd00:2::/64".parse().ok()));
    assert_eq!((rule(6).action, rule(6).suppress), (Action::Table(254), Some(0)));
    assert!(rule(5).narrow && rule(5).action == Action::Nowhere, "{:?}", rule(5));
    assert!(found.rules.iter().any(|rule| rule.priority == 32766 && rule.suppress.is_none() && !rule.narrow));
    let way = found.ways.iter().find(|way| way.table == 51820).unwrap();
    assert!(way.to.prefix_len() == 0 && way.hops[0].gateway == "192.0.2.1".parse().ok(), "{way:?}");
}

/// A network namespace that ends with this value.
struct Elsewhere(Child);

impl Drop for Elsewhere {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) async fn links_of_pods_beside_the_host_are_seen_and_counted(_lab: Lab) {
    sh("ip link add eth0 type veth peer name far0 && ip link set eth0 up && ip link set far0 up");
    let elsewhere = Elsewhere(Command::new("unshare").args(["--net", "sleep", "600"]).spawn().unwrap());
    let pid = elsewhere.0.id();
    let own = std::fs::read_link("/proc/self/ns/net").unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while std::fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|link| link == own) {
        assert!(std::time::Instant::now() < deadline, "no namespace");
        std::thread::yield_now();
    }
    let mut net = Netlink::new().unwrap();
    assert!(net.surroundings().await.unwrap().children.is_empty());
    // One of this host's own is a part of its stack.
    sh("ip link add own0 link eth0 type macvlan mode bridge");
    assert!(net.surroundings().await.unwrap().children.is_empty());
    sh(&format!(
        "ip link add mv0 link eth0 type macvlan mode bridge && ip link set mv0 netns {pid} && \
         nsenter -t {pid} -n sh -ec 'ip addr add 10.1.0.200/24 dev mv0; ip link set mv0 up; \
         ip neigh add 10.1.0.1 lladdr 02:00:00:00:00:01 dev mv0; ping -c 2 -i 0.2 -W 1 10.1.0.1 >/dev/null || true'"
    ));
    let found = net.surroundings().await.unwrap();
    let parent = found.links.iter().find(|link| link.name == "eth0").unwrap().index;
    let [child] = &found.children[..] else { panic!("{:?}", found.children) };
    assert_eq!((child.parent, child.kind.as_str()), (parent, "macvlan"));
    assert!(child.sent >= 2, "{child:?}");
    // A pod's veth is none.
    sh(&format!("ip link add veth7 type veth peer name eth7 netns {pid}"));
    assert_eq!(net.surroundings().await.unwrap().children.len(), 1);
}
