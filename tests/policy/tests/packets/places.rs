//! Who is where: tunnels, the node itself, strangers, sites.

use std::collections::BTreeMap;

use mesh_policy::Event;
use mesh_policy::model::{
    Action, Direction, ObjectId, Order, Peer, Policy, Reach, Rule, Sites, Subject, Tier,
};
use mesh_policy::networkpolicy::Read;
use mesh_policy::nft::{Foreign, Watch};
use mesh_policy::object::Pod;
use mesh_policy::world::Node;
use policy_tests::objects::{only, pod, policy, remote};
use policy_tests::rig::settings;
use policy_tests::{Link, Packet, Rig};
use serde_json::json;

use crate::{TCP, UDP, address, first, in_rig, with_settings};

const A: [&str; 2] = ["10.0.1.1", "fd00:1::1"];
const R: [&str; 2] = ["10.0.2.1", "fd00:2::1"];

/// The rig's node with its prefixes and its own address.
fn own() -> mesh_policy::compile::Settings {
    let nets = ["10.0.1.0/24", "fd00:1::/64"].map(|net| net.parse().expect("a prefix"));
    mesh_policy::compile::Settings { own: nets.into(), address: Some(address("fd00:ffff::1")), ..settings() }
}

#[test]
fn what_comes_out_of_a_tunnel_is_from_somebody_else_and_for_somebody_here() {
    with_settings(
        "what_comes_out_of_a_tunnel_is_from_somebody_else_and_for_somebody_here",
        own(),
        |mut rig| {
            for net in ["10.0.2.0/24", "fd00:2::/64"] {
                rig.through_tunnel(net)?;
            }
            rig.tell([Event::Pod(pod("a", "a", &A)), Event::Pod(remote("r", "r", &R))])?;
            for family in 0..2 {
                let outside = ["192.0.2.1", "2001:db8::1"][family];
                let (neighbour, strange) =
                    (["10.0.1.9", "fd00:1::9"][family], ["10.0.3.1", "fd00:3::1"][family]);
                for (source, destination, passes, what) in [
                    (R[family], A[family], true, "another node's pod"),
                    (strange, A[family], true, "somebody of the mesh that no Pod object knows"),
                    (A[family], neighbour, false, "a pod of this node, from outside"),
                    (neighbour, A[family], false, "an address of this node, from outside"),
                    (outside, A[family], false, "nobody of the mesh"),
                    (R[family], neighbour, false, "to a pod that is not known"),
                    (R[family], outside, false, "through this node to somewhere else"),
                    (R[family], strange, false, "through this node to another"),
                ] {
                    let packet = first(&mut rig, source, destination, UDP);
                    assert_eq!(
                        rig.passes(Link::Tunnel, &packet)?,
                        passes,
                        "{what}: {source} to {destination}"
                    );
                }
            }
            let counters = rig.enforcer.backend.counters()?;
            assert!(counters["spoofed"].0 >= 6 && counters["unknown"].0 >= 6, "{counters:?}");
            Ok(())
        },
    );
}

#[test]
fn what_conntrack_does_not_track_is_not_let_through() {
    with_settings("what_conntrack_does_not_track_is_not_let_through", own(), |mut rig| {
        rig.through_tunnel("fd00:2::/64")?;
        rig.tell([
            Event::Pod(pod("a", "a", &A)),
            Event::Pod(remote("r", "r", &R)),
            policy("none", json!({"policyTypes": ["Ingress", "Egress"]})),
        ])?;
        // Of its own accord it does not with these types of ICMPv6, whoever they are for.
        for icmp in [130, 131, 132, 133, 134, 135, 136, 137, 143, 128] {
            for (link, source, destination) in [
                (Link::Pods, A[1], "2001:db8::1"),
                (Link::Pods, A[1], R[1]),
                (Link::Tunnel, R[1], A[1]),
                (Link::Pods, "2001:db8::1", A[1]),
            ] {
                let packet = Packet { icmp: (icmp, 0), ..first(&mut rig, source, destination, 58) };
                assert!(!rig.passes(link, &packet)?, "type {icmp}, {source} to {destination}");
            }
        }
        // And because somebody said so.
        rig.run("nft", "add table inet elsewhere")?;
        rig.run("nft", "add chain inet elsewhere raw { type filter hook prerouting priority raw ; }")?;
        rig.run("nft", "add rule inet elsewhere raw udp dport 80 notrack")?;
        let packet = first(&mut rig, A[0], "192.0.2.1", UDP);
        assert!(!rig.passes(Link::Pods, &packet)?);
        Ok(())
    });
}

#[test]
fn a_client_of_a_node_port_gets_its_answer_from_another_nodes_pod() {
    with_settings("a_client_of_a_node_port_gets_its_answer_from_another_nodes_pod", own(), |mut rig| {
        rig.through_tunnel("10.0.2.0/24")?;
        rig.run("ip", "address add 10.0.1.254/32 dev sennit0")?;
        rig.run("nft", "add table ip services")?;
        rig.run("nft", "add chain ip services prerouting { type nat hook prerouting priority dstnat ; }")?;
        rig.run(
            "nft",
            "add rule ip services prerouting ip daddr 192.0.2.80 tcp dport 80 dnat to 10.0.2.1:8080",
        )?;
        rig.run("nft", "add chain ip services postrouting { type nat hook postrouting priority srcnat ; }")?;
        rig.run("nft", "add rule ip services postrouting oifname sennit0 masquerade")?;
        rig.tell([Event::Pod(remote("r", "r", &R))])?;
        let client = "198.51.100.7";
        let asked = first(&mut rig, client, "192.0.2.80", TCP);
        assert!(rig.passes(Link::Pods, &asked)?, "to the pod, as the node");
        let number = rig.number();
        let answer = Packet::first(address(R[0]), address("10.0.1.254"), TCP, asked.source_port, number);
        let answer = Packet { source_port: 8080, flags: policy_tests::packet::SYN_ACK, ..answer };
        assert!(rig.passes(Link::Tunnel, &answer)?, "and back to the client");
        // Nobody begins anything through this node for all that.
        let begun = first(&mut rig, R[0], client, TCP);
        assert!(!rig.passes(Link::Tunnel, &begun)?);
        Ok(())
    });
}

#[test]
fn a_pod_that_takes_anothers_address_is_found_out_by_its_interface() {
    let checking = mesh_policy::compile::Settings { check_sources: true, ..own() };
    with_settings("a_pod_that_takes_anothers_address_is_found_out_by_its_interface", checking, |mut rig| {
        // The one that has it is reached by another interface.
        rig.run("ip", "link add pod1 type veth peer name inside")?;
        rig.run("ip", "link set pod1 up")?;
        for family in 0..2 {
            let length = [32, 128][family];
            rig.run("ip", &format!("route add {}/{length} dev pod1", A[family]))?;
        }
        rig.tell([Event::Pod(pod("a", "a", &A)), Event::Pod(pod("b", "b", &["10.0.1.2", "fd00:1::2"]))])?;
        for (source, outside) in [(A[0], "192.0.2.1"), (A[1], "2001:db8::1")] {
            let packet = first(&mut rig, source, outside, UDP);
            assert!(!rig.passes(Link::Pods, &packet)?, "{source}");
        }
        let honest = first(&mut rig, "10.0.1.2", "192.0.2.1", UDP);
        assert!(rig.passes(Link::Pods, &honest)?);
        Ok(())
    });
}

#[test]
fn a_local_address_without_a_pod_speaks_only_where_strangers_may() {
    for strangers in [false, true] {
        let settings = mesh_policy::compile::Settings { strangers, ..own() };
        with_settings(
            "a_local_address_without_a_pod_speaks_only_where_strangers_may",
            settings,
            move |mut rig| {
                rig.through_tunnel("10.0.2.0/24")?;
                rig.tell([Event::Pod(remote("r", "r", &R)), policy("all", json!({}))])?;
                let out = first(&mut rig, A[0], R[0], UDP);
                assert_eq!(rig.passes(Link::Pods, &out)?, strangers);
                let out = first(&mut rig, A[0], "192.0.2.1", UDP);
                assert_eq!(rig.passes(Link::Pods, &out)?, strangers, "and to the world");
                let into = first(&mut rig, R[0], "10.0.1.7", UDP);
                assert_eq!(rig.passes(Link::Tunnel, &into)?, strangers);
                // From when its pod is known, its policy counts.
                rig.tell([Event::Pod(pod("a", "a", &["10.0.1.7"]))])?;
                let into = first(&mut rig, R[0], "10.0.1.7", UDP);
                assert!(!rig.passes(Link::Tunnel, &into)?);
                Ok(())
            },
        );
    }
}

#[test]
fn a_pod_and_its_own_node_always_reach_each_other() {
    with_settings("a_pod_and_its_own_node_always_reach_each_other", own(), |mut rig| {
        rig.run("ip", "address add 10.0.1.254/32 dev lo")?;
        rig.run("ip", "address add fd00:1::fe/128 dev lo")?;
        rig.tell([
            Event::Pod(pod("a", "a", &A)),
            policy("none", json!({"policyTypes": ["Ingress", "Egress"]})),
        ])?;
        // The pod asks, and the node's kernel answers.
        for (own, pod, protocol) in [("10.0.1.254", A[0], 1), ("fd00:1::fe", A[1], 58)] {
            let echo = first(&mut rig, pod, own, protocol);
            assert!(rig.send(Link::Pods, &[echo.octets()])?.contains(&echo.number), "no answer of {own}");
        }
        // The node asks the pod: what it sends comes out at the pods' link.
        let number = rig.number();
        let socket = std::net::UdpSocket::bind("10.0.1.254:0")?;
        socket.send_to(&number.to_be_bytes(), (A[0], 80))?;
        assert!(rig.send(Link::Pods, &[])?.contains(&number));
        let other = first(&mut rig, "10.0.2.1", A[0], UDP);
        assert!(!rig.passes(Link::Tunnel, &other)?, "another node is nobody special");
        Ok(())
    });
}

#[test]
fn traffic_that_has_nothing_to_do_with_the_mesh_is_left_alone() {
    in_rig("traffic_that_has_nothing_to_do_with_the_mesh_is_left_alone", |mut rig| {
        rig.tell([
            Event::Pod(pod("a", "a", &A)),
            policy("none", json!({"policyTypes": ["Ingress", "Egress"]})),
        ])?;
        for (source, destination) in [("192.0.2.1", "198.51.100.1"), ("2001:db8::1", "2001:db8:1::1")] {
            let syn = first(&mut rig, source, destination, TCP);
            // Even what is in the middle of a connection that this host never saw begin.
            let data = syn.again(policy_tests::packet::PSH_ACK, rig.number());
            assert_eq!(rig.pass(Link::Pods, &[data, syn])?, [true, true]);
        }
        Ok(())
    });
}

/// What the site `here` does with what begins in others: `friend` may, the others may not.
fn stance() -> Event {
    let rule = |name: &str, action, from| {
        let from = Some([Peer::Sites(from)].into());
        Rule::between(name.to_owned(), action, Direction::Ingress, from, None)
    };
    let rules = vec![
        rule("pairs[0]", Action::Allow, Sites::Named("friend".into())),
        rule("default", Action::Deny, Sites::Not("here".into())),
    ];
    Event::Policy(Read::from(Policy {
        tier: Tier::sites(),
        order: Order(0.0),
        id: ObjectId { kind: "Mesh", namespace: None, name: "m:here".to_owned() },
        subject: Subject::Sites(Sites::Named("here".into())),
        egress: None,
        ingress: Some(rules),
        reach: Reach::Ends,
        staged: false,
        replaces: None,
    }))
}

#[test]
fn sites_are_denied_unless_they_or_a_policy_allow_it() {
    with_settings("sites_are_denied_unless_they_or_a_policy_allow_it", own(), |mut rig| {
        let node = |site: &str, net: &str, own: &str| Node {
            site: Some(site.to_owned()),
            addresses: [address(own)].into(),
            prefixes: [net.parse().unwrap()].into(),
            ..Node::default()
        };
        let nodes: BTreeMap<String, Node> = [
            (
                policy_tests::rig::NODE.to_owned(),
                Node {
                    site: Some("here".into()),
                    addresses: [address("fd00:ffff::1")].into(),
                    prefixes: own().own,
                    ..Node::default()
                },
            ),
            ("f".to_owned(), node("friend", "10.0.2.0/24", "fd00:ffff::2")),
            ("s".to_owned(), node("stranger", "10.0.3.0/24", "fd00:ffff::3")),
            ("h".to_owned(), node("here", "10.0.4.0/24", "fd00:ffff::4")),
        ]
        .into();
        rig.enforcer.compiler.configure(own(), nodes);
        let there = Pod { node: Some("s".to_owned()), ..remote("s", "s", &["10.0.3.1"]) };
        rig.tell([Event::Pod(pod("a", "a", &A)), Event::Pod(there), stance()])?;
        let passes = |rig: &mut Rig| {
            let mut from = |source: &str| {
                let packet = first(rig, source, A[0], TCP);
                rig.passes(Link::Tunnel, &packet)
            };
            anyhow::Ok([from("10.0.2.1")?, from("10.0.3.1")?, from("10.0.4.1")?])
        };
        assert_eq!(passes(&mut rig)?, [true, false, true], "of unselected pods too");
        // A NetworkPolicy that allows it comes first; one that does not is not softened by the stance.
        rig.tell([policy("p", only("s", "a"))])?;
        assert_eq!(passes(&mut rig)?, [false, true, false]);
        rig.tell([policy_tests::objects::no_policy("p")])?;
        assert_eq!(passes(&mut rig)?, [true, false, true]);
        // The node itself is in a site as well: its kernel answers a friend's echo.
        rig.run("ip", "address add fd00:ffff::1/128 dev lo")?;
        for (from, answered) in [("fd00:ffff::2", true), ("fd00:ffff::3", false), ("fd00:ffff::4", true)] {
            let echo = first(&mut rig, from, "fd00:ffff::1", 58);
            assert_eq!(rig.send(Link::Tunnel, &[echo.octets()])?.contains(&echo.number), answered, "{from}");
        }
        // What the node itself begins, it may: a stranger's answer comes in.
        let number = rig.number();
        let socket = std::net::UdpSocket::bind("[fd00:ffff::1]:0")?;
        socket.set_read_timeout(Some(std::time::Duration::from_secs(5)))?;
        socket.send_to(&number.to_be_bytes(), ("fd00:ffff::3", 80))?;
        rig.send(Link::Pods, &[])?;
        let number = rig.number();
        let answer = Packet::first(
            address("fd00:ffff::3"),
            address("fd00:ffff::1"),
            UDP,
            socket.local_addr()?.port(),
            number,
        );
        rig.send(Link::Tunnel, &[Packet { source_port: 80, ..answer }.octets()])?;
        let mut buffer = [0; 64];
        assert!(socket.recv(&mut buffer).is_ok(), "the answer, although what begins there may not come in");
        Ok(())
    });
}

#[test]
fn audit_denies_nothing_and_counts_what_it_would() {
    let settings = mesh_policy::compile::Settings { audit: true, ..own() };
    with_settings("audit_denies_nothing_and_counts_what_it_would", settings, |mut rig| {
        rig.tell([
            Event::Pod(pod("a", "a", &A)),
            policy("none", json!({"policyTypes": ["Ingress", "Egress"]})),
        ])?;
        let into = first(&mut rig, R[0], A[0], UDP);
        let out = first(&mut rig, A[0], R[0], UDP);
        let spoofed = first(&mut rig, "10.0.1.9", A[0], UDP);
        assert!(
            rig.passes(Link::Tunnel, &into)?
                && rig.passes(Link::Pods, &out)?
                && rig.passes(Link::Tunnel, &spoofed)?
        );
        let counters = rig.enforcer.backend.counters()?;
        assert!(
            counters["denied_ingress"].0 >= 1
                && counters["denied_egress"].0 >= 1
                && counters["spoofed"].0 >= 1
        );
        Ok(())
    });
}

#[test]
fn a_foreign_flush_changes_nothing_and_a_shared_table_is_mended() {
    in_rig("a_foreign_flush_changes_nothing_and_a_shared_table_is_mended", |mut rig| {
        rig.tell([Event::Pod(pod("a", "a", &A)), policy("none", json!({}))])?;
        let denied = |rig: &mut Rig| {
            let packet = first(rig, R[0], A[0], UDP);
            Ok::<_, anyhow::Error>(!rig.passes(Link::Tunnel, &packet)?)
        };
        rig.run("nft", "flush ruleset")?;
        assert!(denied(&mut rig)?);
        for command in [
            "delete table inet sennit-policy",
            "flush table inet sennit-policy",
            "flush set inet sennit-policy a_local4",
        ] {
            assert!(rig.run("nft", command).is_err(), "{command}");
        }
        assert!(denied(&mut rig)?);
        Ok(())
    });
    let shared = || Rig::with(settings(), BTreeMap::new(), mesh_policy::nft::Ownership::Shared);
    in_rig("a_foreign_flush_changes_nothing_and_a_shared_table_is_mended", move |rig| {
        drop(rig);
        std::thread::spawn(move || {
            let mut rig = shared()?;
            rig.tell([Event::Pod(pod("a", "a", &A)), policy("none", json!({}))])?;
            let mut watch = Watch::new()?;
            let port = rig.enforcer.backend.port_id();
            for command in
                ["flush ruleset", "delete table inet sennit-policy", "flush table inet sennit-policy"]
            {
                rig.run("nft", command)?;
                assert_eq!(watch.foreign(port)?, Foreign::Yes, "{command}");
                rig.enforcer.distrust();
                rig.settle()?;
                let packet = first(&mut rig, R[0], A[0], UDP);
                assert!(!rig.passes(Link::Tunnel, &packet)?, "after {command}");
                assert_eq!(watch.foreign(rig.enforcer.backend.port_id())?, Foreign::No, "our own");
            }
            anyhow::Ok(())
        })
        .join()
        .expect("no panic")
    });
}
