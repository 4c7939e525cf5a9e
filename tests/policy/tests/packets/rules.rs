//! What rules mean, packet by packet.

use policy_tests::objects::{gone, namespace, no_policy, only, pod, policy, remote, with_port};
use policy_tests::{Link, Packet};
use serde_json::json;

use crate::{TCP, UDP, address, first, in_rig};

const A: [&str; 2] = ["10.0.1.1", "fd00:1::1"];
const B: [&str; 2] = ["10.0.1.2", "fd00:1::2"];
const C: [&str; 2] = ["10.0.1.3", "fd00:1::3"];

#[test]
fn a_named_port_is_what_each_pod_calls_so() {
    in_rig("a_named_port_is_what_each_pod_calls_so", |mut rig| {
        let web = |pod, port| with_port(pod, "web", port);
        rig.tell([
            mesh_policy::Event::Pod(pod("client", "client", &A)),
            mesh_policy::Event::Pod(web(pod("one", "server", &B), 8080)),
            mesh_policy::Event::Pod(web(pod("two", "server", &C), 9090)),
            policy("p", json!({"podSelector": {"matchLabels": {"app": "server"}}, "ingress": [{"ports": [{"port": "web"}]}]})),
        ])?;
        let mut asks = |protocol, server: &str, port| {
            let number = rig.number();
            let client = if server.contains(':') { A[1] } else { A[0] };
            let packet = Packet::first(address(client), address(server), protocol, port, number);
            let passed = rig.passes(Link::Pods, &packet)?;
            let number = rig.number();
            let back = rig.passes(Link::Pods, &packet.answer(number))?;
            anyhow::ensure!(!passed || back, "{packet:?}: the answer does not pass");
            Ok(passed)
        };
        for family in 0..2 {
            assert!(asks(TCP, B[family], 8080)? && asks(TCP, C[family], 9090)?);
            assert!(
                !asks(TCP, B[family], 9090)? && !asks(TCP, C[family], 8080)? && !asks(UDP, B[family], 8080)?
            );
        }
        // What a client may begin is looked up at the server, too.
        rig.tell([
            no_policy("p"),
            policy(
                "e",
                json!({
                    "podSelector": {"matchLabels": {"app": "client"}}, "policyTypes": ["Egress"],
                    "egress": [{"ports": [{"port": "web"}], "to": [{"podSelector": {}}]}],
                }),
            ),
        ])?;
        let mut asks = |server: &str, port| {
            let number = rig.number();
            rig.passes(Link::Pods, &Packet::first(address(A[0]), address(server), TCP, port, number))
        };
        assert!(asks(B[0], 8080)? && asks(C[0], 9090)?);
        assert!(!asks(B[0], 9090)? && !asks(C[0], 8080)? && !asks("192.0.2.1", 8080)?);
        // A pod changes its mind.
        rig.tell([mesh_policy::Event::Pod(web(pod("one", "server", &B), 9090))])?;
        let mut asks = |port| {
            let number = rig.number();
            rig.passes(Link::Pods, &Packet::first(address(A[0]), address(B[0]), TCP, port, number))
        };
        assert!(asks(9090)? && !asks(8080)?);
        Ok(())
    });
}

#[test]
fn rules_without_ports_let_icmp_pass_and_rules_with_ports_do_not() {
    in_rig("rules_without_ports_let_icmp_pass_and_rules_with_ports_do_not", |mut rig| {
        rig.tell([
            mesh_policy::Event::Pod(pod("a", "a", &A)),
            mesh_policy::Event::Pod(pod("b", "b", &B)),
            policy("p", only("a", "b")),
        ])?;
        for (family, protocol) in [(0, 1), (1, 58)] {
            let echo = first(&mut rig, A[family], B[family], protocol);
            assert!(rig.passes(Link::Pods, &echo)?);
            let number = rig.number();
            assert!(rig.passes(Link::Pods, &echo.answer(number))?, "the answer");
            let from_c = first(&mut rig, C[family], B[family], protocol);
            rig.tell([mesh_policy::Event::Pod(pod("c", "c", &C))])?;
            assert!(!rig.passes(Link::Pods, &from_c)?);
        }
        rig.tell([policy("p", json!({"podSelector": {"matchLabels": {"app": "b"}}, "ingress": [{"ports": [{"port": 80}, {"protocol": "UDP"}]}]}))])?;
        for (family, protocol) in [(0, 1), (1, 58)] {
            let echo = first(&mut rig, A[family], B[family], protocol);
            assert!(!rig.passes(Link::Pods, &echo)?);
            for protocol in [TCP, UDP] {
                let packet = first(&mut rig, A[family], B[family], protocol);
                assert!(rig.passes(Link::Pods, &packet)?);
            }
            // Any other protocol is like ICMP.
            let gre = first(&mut rig, A[family], B[family], 47);
            assert!(!rig.passes(Link::Pods, &gre)?);
        }
        Ok(())
    });
}

#[test]
fn an_error_about_a_flow_that_is_allowed_comes_back() {
    in_rig("an_error_about_a_flow_that_is_allowed_comes_back", |mut rig| {
        rig.tell([
            mesh_policy::Event::Pod(pod("a", "a", &A)),
            policy("p", json!({"policyTypes": ["Ingress", "Egress"], "egress": [{"to": [{"ipBlock": {"cidr": "192.0.2.0/24"}}]}]})),
        ])?;
        let asked = first(&mut rig, A[0], "192.0.2.1", UDP);
        assert!(rig.passes(Link::Pods, &asked)?);
        // Port unreachable (RFC 792), from a router on the way: what it is about follows its header.
        let mut error = first(&mut rig, "198.51.100.1", A[0], 1);
        error.icmp = (3, 3);
        let (packet, number) = icmp_error(&error, &asked.octets());
        assert!(rig.send(Link::Pods, &[packet])?.contains(&number), "nobody's path MTU would be found");
        // About nothing that anybody asked it is not.
        let strange = first(&mut rig, A[0], "192.0.2.99", UDP);
        let mut error = first(&mut rig, "198.51.100.1", A[0], 1);
        error.icmp = (3, 3);
        let (packet, number) = icmp_error(&error, &strange.octets());
        assert!(!rig.send(Link::Pods, &[packet])?.contains(&number));
        Ok(())
    });
}

/// An ICMP error about a packet, and the number that it is told apart by: what the packet that it is about begins with.
fn icmp_error(error: &Packet, about: &[u8]) -> (Vec<u8>, u32) {
    let mut packet = error.octets();
    packet.truncate(20 + 8);
    packet[24..28].fill(0);
    packet.extend(&about[..28]);
    let length = (packet.len() as u16).to_be_bytes();
    packet[2..4].copy_from_slice(&length);
    for (from, to, at) in [(0, 20, 10), (20, packet.len(), 22)] {
        packet[at..at + 2].fill(0);
        let sum = checksum(&packet[from..to]).to_be_bytes();
        packet[at..at + 2].copy_from_slice(&sum);
    }
    let number = u32::from_be_bytes([packet[28], packet[29], packet[30], packet[31]]);
    (packet, number)
}

fn checksum(octets: &[u8]) -> u16 {
    let mut total: u32 = octets
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
        .sum();
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    !(total as u16)
}

#[test]
fn a_rule_for_sctp_isolates_tcp_and_never_allows_it() {
    in_rig("a_rule_for_sctp_isolates_tcp_and_never_allows_it", |mut rig| {
        rig.tell([
            mesh_policy::Event::Pod(pod("a", "a", &A)),
            mesh_policy::Event::Pod(pod("b", "b", &B)),
            policy("p", json!({"podSelector": {"matchLabels": {"app": "b"}}, "ingress": [{"ports": [{"protocol": "SCTP", "port": 80}]}]})),
        ])?;
        for family in 0..2 {
            let passed = [132, TCP, UDP].map(|protocol| {
                let packet = first(&mut rig, A[family], B[family], protocol);
                let passed = rig.passes(Link::Pods, &packet).expect("sent");
                let number = rig.number();
                (passed, passed && rig.passes(Link::Pods, &packet.answer(number)).expect("sent"))
            });
            assert_eq!(passed, [(true, true), (false, false), (false, false)]);
        }
        Ok(())
    });
}

#[test]
fn fragments_and_extension_headers_hide_no_port() {
    in_rig("fragments_and_extension_headers_hide_no_port", |mut rig| {
        rig.tell([
            mesh_policy::Event::Pod(pod("a", "a", &A)),
            mesh_policy::Event::Pod(pod("b", "b", &B)),
            policy("p", json!({"podSelector": {"matchLabels": {"app": "b"}}, "ingress": [{"ports": [{"port": 80, "protocol": "UDP"}, {"port": 80}]}]})),
        ])?;
        for family in 0..2 {
            for (port, allowed) in [(80, true), (81, false)] {
                let number = rig.number();
                let packet = Packet::first(address(A[family]), address(B[family]), UDP, port, number);
                let fragments = packet.fragments();
                // The second alone says no port: it waits for the first, or is gone.
                assert!(!rig.send(Link::Pods, &fragments[1..])?.contains(&number), "{}", A[family]);
                let number = rig.number();
                let packet = Packet { number, ..packet };
                let arrived = rig.send(Link::Pods, &packet.fragments())?;
                assert_eq!(arrived.contains(&number), allowed, "fragments to {port}");
            }
        }
        for (port, allowed) in [(80, true), (81, false)] {
            for protocol in [TCP, UDP] {
                let number = rig.number();
                let packet = Packet::first(address(A[1]), address(B[1]), protocol, port, number);
                let arrived = rig.send(Link::Pods, &[packet.with_extension_headers()])?;
                assert_eq!(
                    arrived.contains(&number),
                    allowed,
                    "protocol {protocol} behind extension headers to {port}"
                );
            }
        }
        Ok(())
    });
}

#[test]
fn a_service_is_judged_by_the_pod_behind_it() {
    in_rig("a_service_is_judged_by_the_pod_behind_it", |mut rig| {
        rig.run("nft", "add table ip services")?;
        rig.run("nft", "add chain ip services prerouting { type nat hook prerouting priority dstnat ; }")?;
        rig.run(
            "nft",
            "add rule ip services prerouting ip daddr 10.96.0.1 tcp dport 80 dnat to 10.0.1.2:8080",
        )?;
        rig.run("nft", "add chain ip services postrouting { type nat hook postrouting priority srcnat ; }")?;
        rig.run("nft", "add rule ip services postrouting ip saddr 192.0.2.0/24 masquerade")?;
        rig.run("ip", "address add 10.0.1.254/32 dev lo")?;
        rig.tell([
            mesh_policy::Event::Pod(pod("a", "a", &A)),
            mesh_policy::Event::Pod(pod("b", "b", &B)),
            mesh_policy::Event::Pod(remote("c", "c", &C)),
            policy("in", json!({
                "podSelector": {"matchLabels": {"app": "b"}},
                "ingress": [
                    {"from": [{"podSelector": {"matchLabels": {"app": "a"}}}], "ports": [{"port": 8080}]},
                    {"from": [{"ipBlock": {"cidr": "192.0.2.0/28"}}]},
                ],
            })),
            policy("out", json!({
                "podSelector": {"matchLabels": {"app": "a"}}, "policyTypes": ["Egress"],
                "egress": [{"to": [{"podSelector": {"matchLabels": {"app": "b"}}}], "ports": [{"port": 8080}]}],
            })),
        ])?;
        let to_service = first(&mut rig, A[0], "10.96.0.1", TCP);
        assert!(rig.passes(Link::Pods, &to_service)?, "by the port of the pod, not of the Service");
        // The pod answers, and what it says is translated back.
        let number = rig.number();
        let answer = Packet::first(address(B[0]), address(A[0]), TCP, 40_000, number);
        let answer = Packet { source_port: 8080, flags: policy_tests::packet::SYN_ACK, ..answer };
        assert!(rig.passes(Link::Pods, &answer)?);
        let from_c = first(&mut rig, C[0], "10.96.0.1", TCP);
        assert!(!rig.passes(Link::Tunnel, &from_c)?, "who is not selected");
        // A client from outside is judged by its own address, whatever it is made of afterwards.
        for (client, allowed) in [("192.0.2.1", true), ("192.0.2.17", false)] {
            let packet = first(&mut rig, client, "10.96.0.1", TCP);
            assert_eq!(rig.passes(Link::Pods, &packet)?, allowed, "{client}");
        }
        Ok(())
    });
}

#[test]
fn labels_of_pods_and_namespaces_count_at_once() {
    in_rig("labels_of_pods_and_namespaces_count_at_once", |mut rig| {
        let selector = json!({"namespaceSelector": {"matchLabels": {"team": "red"}}, "podSelector": {"matchLabels": {"app": "a"}}});
        rig.tell([
            mesh_policy::Event::Pod(pod("a", "a", &A)),
            mesh_policy::Event::Pod(pod("b", "b", &B)),
            policy(
                "p",
                json!({"podSelector": {"matchLabels": {"app": "b"}}, "ingress": [{"from": [selector]}]}),
            ),
        ])?;
        let passes = |rig: &mut policy_tests::Rig| {
            let packet = first(rig, A[0], B[0], TCP);
            rig.passes(Link::Pods, &packet)
        };
        assert!(!passes(&mut rig)?, "nobody has said anything of the namespace");
        rig.tell([namespace("x", "team", "red")])?;
        assert!(passes(&mut rig)?);
        rig.tell([namespace("x", "team", "blue")])?;
        assert!(!passes(&mut rig)?);
        rig.tell([namespace("x", "team", "red"), mesh_policy::Event::Pod(pod("a", "z", &A))])?;
        assert!(!passes(&mut rig)?, "the pod is another now");
        rig.tell([mesh_policy::Event::Pod(pod("b", "z", &B))])?;
        assert!(passes(&mut rig)?, "the policy does not select it any more");
        rig.tell([gone("a"), gone("b")])?;
        Ok(())
    });
}

#[test]
fn a_refused_policy_isolates_and_allows_nothing() {
    in_rig("a_refused_policy_isolates_and_allows_nothing", |mut rig| {
        rig.tell([
            mesh_policy::Event::Pod(pod("a", "a", &A)),
            mesh_policy::Event::Pod(pod("b", "b", &B)),
            mesh_policy::Event::Pod(pod("c", "c", &C)),
            policy("p", json!({"podSelector": {"matchLabels": {"app": "b"}}, "ingress": [{}, {"ports": [{"port": 0}]}]})),
        ])?;
        assert_eq!(rig.enforcer.compiler.state().faults.len(), 1);
        let [to_b, to_c] = [B, C].map(|to| first(&mut rig, A[0], to[0], TCP));
        assert_eq!(rig.pass(Link::Pods, &[to_b, to_c])?, [false, true], "and harms nobody else");
        Ok(())
    });
}
