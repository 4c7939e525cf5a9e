//! Nodes as endpoints, by Calico's HostEndpoints.

use std::collections::BTreeMap;
use std::net::{IpAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use mesh_policy::Event;
use mesh_policy::compile::Settings;
use mesh_policy::world::Node;
use policy_tests::objects::{pod, policy, remote};
use policy_tests::rig::{NODE, settings};
use policy_tests::{Link, Packet, Rig};
use serde_json::{Value, json};

use crate::calico::{A, B, CALICO, calico, check, gone, said};
use crate::{TCP, UDP, address, with_settings};

/// The rig's node has this address, and another node one beside it.
const HOST: &str = "192.168.7.1";
/// The port that carries the mesh.
const CARRIER: u16 = 51820;

fn host_rig(name: &str, test: impl FnOnce(Rig) -> anyhow::Result<()> + Send + 'static) {
    let settings = Settings { carriers: [CARRIER].into(), ..settings() };
    with_settings(name, settings.clone(), move |mut rig| {
        rig.run("ip", &format!("address add {HOST}/32 dev lo"))?;
        let node = |address: &str| Node {
            addresses: [address.parse().expect("an address")].into(),
            ..Node::default()
        };
        let nodes =
            BTreeMap::from([(NODE.to_owned(), node(HOST)), ("other".to_owned(), node("192.168.7.2"))]);
        rig.enforcer.compiler.configure(settings, nodes);
        rig.settle()?;
        test(rig)
    });
}

fn host(profiles: Value) -> Event {
    host_of("*", profiles)
}

/// The host endpoint of one of the rig's interfaces, or of all others.
fn host_of(interface: &str, profiles: Value) -> Event {
    let spec = json!({"node": NODE, "interfaceName": interface, "expectedIPs": [HOST], "profiles": profiles});
    let name = if interface == "*" { "here".to_owned() } else { format!("here-{interface}") };
    said(CALICO, "HostEndpoint", json!({"name": name, "labels": {"role": "node"}}), spec)
}

/// A socket of the node; of port 0 by any but the mesh's, which a device holds where there is one. A program that another test begins
/// just now has those of this one until it runs.
fn bound(address: &str, port: u16) -> anyhow::Result<UdpSocket> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match UdpSocket::bind((address, port)) {
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                std::thread::yield_now();
            }
            Ok(bound) if port == 0 && bound.local_addr()?.port() == CARRIER => {}
            bound => return Ok(bound?),
        }
    }
}

/// Whether a datagram from outside reaches a socket of the node.
fn reaches(rig: &mut Rig, from: &str, port: u16) -> anyhow::Result<bool> {
    reaches_from(rig, from, 40_000, port)
}

/// The same, from this port.
fn reaches_from(rig: &mut Rig, from: &str, source_port: u16, port: u16) -> anyhow::Result<bool> {
    reaches_by(rig, Link::Pods, (from, source_port), port)
}

fn reaches_by(
    rig: &mut Rig,
    link: Link,
    (from, source_port): (&str, u16),
    port: u16,
) -> anyhow::Result<bool> {
    let socket = bound(HOST, port)?;
    socket.set_nonblocking(true)?;
    let number = rig.number();
    let packet = Packet { source_port, ..Packet::first(address(from), address(HOST), UDP, port, number) };
    // When the call returns, the packet has been judged.
    rig.pass(link, &[packet])?;
    let mut buffer = [0; 64];
    Ok(socket.recv(&mut buffer).is_ok_and(|length| buffer[..length].starts_with(&number.to_be_bytes())))
}

/// Whether a datagram of the node's leaves it.
fn leaves(rig: &mut Rig, to: &str, port: u16) -> anyhow::Result<bool> {
    leaves_from(rig, 0, to, port)
}

/// The same, from this port.
fn leaves_from(rig: &mut Rig, from: u16, to: &str, port: u16) -> anyhow::Result<bool> {
    let socket = bound(HOST, from)?;
    let number = rig.number();
    let to: IpAddr = address(to);
    match socket.send_to(&number.to_be_bytes().repeat(2), (to, port)) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => return Ok(false),
        Err(error) => return Err(error.into()),
    }
    Ok(rig.send(Link::Pods, &[])?.contains(&number))
}

#[test]
fn a_host_endpoint_closes_a_node_but_for_what_is_allowed_and_safe() {
    host_rig("a_host_endpoint_closes_a_node_but_for_what_is_allowed_and_safe", |mut rig| {
        rig.tell([Event::Pod(pod("a", "a", &A)), Event::Pod(remote("r", "r", &B))])?;
        assert!(reaches(&mut rig, OUT, 9000)? && leaves(&mut rig, OUT, 9000)?, "nothing protects it");
        rig.tell([host(json!([]))])?;
        assert!(!reaches(&mut rig, OUT, 9000)? && !leaves(&mut rig, OUT, 9000)?);
        // DHCP and DNS, and what carries the mesh.
        assert!(reaches(&mut rig, OUT, 68)? && leaves(&mut rig, OUT, 53)?);
        // What carries the mesh is known by the port of this node, not by another's.
        assert!(reaches(&mut rig, OUT, CARRIER)? && leaves_from(&mut rig, CARRIER, OUT, 700)?);
        assert!(!leaves(&mut rig, OUT, CARRIER)? && !reaches_from(&mut rig, OUT, CARRIER, 9000)?);
        assert!(reaches(&mut rig, A[0], 9000)?, "its own pods always reach it");
        rig.tell([calico("GlobalNetworkPolicy", "p", json!({
            "selector": "role == 'node'", "types": ["Ingress", "Egress"],
            "ingress": [{"action": "Allow", "protocol": "UDP", "source": {"nets": ["192.0.2.0/24"]}, "destination": {"ports": [9000]}}],
            "egress": [{"action": "Allow", "protocol": "UDP", "destination": {"ports": [9001]}}],
        }))])?;
        assert!(
            reaches(&mut rig, OUT, 9000)?
                && !reaches(&mut rig, "198.51.100.1", 9000)?
                && !reaches(&mut rig, OUT, 9001)?
        );
        assert!(leaves(&mut rig, OUT, 9001)? && !leaves(&mut rig, OUT, 9000)?);
        // What was begun goes on both ways, until it is not allowed any more.
        let socket = bound(HOST, 9000)?;
        socket.set_nonblocking(true)?;
        let answers = |rig: &mut Rig, socket: &UdpSocket| -> anyhow::Result<bool> {
            let number = rig.number();
            socket.send_to(&number.to_be_bytes().repeat(2), ("192.0.2.1", 40_000)).map(drop).or_else(
                |error| {
                    if error.kind() == std::io::ErrorKind::PermissionDenied { Ok(()) } else { Err(error) }
                },
            )?;
            Ok(rig.send(Link::Pods, &[])?.contains(&number))
        };
        let number = rig.number();
        rig.pass(Link::Pods, &[Packet::first(address(OUT), address(HOST), UDP, 9000, number)])?;
        assert!(answers(&mut rig, &socket)?);
        // What is not allowed any more is not answered, and no answer makes it good.
        let allowed = rig.enforcer.compiler.state().policies.iter().next().cloned().context("no policy")?;
        rig.tell([gone("GlobalNetworkPolicy", "p")])?;
        assert!(!answers(&mut rig, &socket)?);
        let number = rig.number();
        rig.pass(Link::Pods, &[Packet::first(address(OUT), address(HOST), UDP, 9000, number)])?;
        let mut buffer = [0; 64];
        while let Ok(length) = socket.recv(&mut buffer) {
            assert!(!buffer[..length].starts_with(&number.to_be_bytes()), "it came through");
        }
        rig.tell([Event::Policy(allowed.into())])?;
        drop(socket);
        // Pods are judged as pods, whatever the node is.
        check(&mut rig, &[("forwarded", &B, &A, TCP, 80, true)])?;
        // One that is open is closed by policies alone.
        rig.tell([gone("GlobalNetworkPolicy", "p"), host(json!(["projectcalico-default-allow"]))])?;
        assert!(reaches(&mut rig, OUT, 9000)? && leaves(&mut rig, OUT, 9000)?);
        rig.tell([gone("HostEndpoint", "here")])?;
        assert!(reaches(&mut rig, OUT, 9000)? && leaves(&mut rig, OUT, 9000)?);
        Ok(())
    });
}

#[test]
fn a_host_endpoint_of_another_node_says_nothing_here() {
    host_rig("a_host_endpoint_of_another_node_says_nothing_here", |mut rig| {
        let spec = json!({"node": "other", "interfaceName": "*", "expectedIPs": ["192.168.7.2"]});
        rig.tell([said(CALICO, "HostEndpoint", json!({"name": "other", "labels": {"role": "node"}}), spec)])?;
        assert!(reaches(&mut rig, "192.0.2.1", 9000)? && leaves(&mut rig, "192.0.2.1", 9000)?);
        // But it can be meant as a peer, by the addresses that it says it has.
        rig.tell([
            Event::Pod(pod("server", "server", &A)),
            calico("GlobalNetworkPolicy", "p", json!({
                "selector": "app == 'server'", "ingress": [{"action": "Allow", "source": {"selector": "role == 'node'"}}],
            })),
        ])?;
        for (from, expected) in [("192.168.7.2", true), ("192.168.7.3", false)] {
            let number = rig.number();
            let packet = Packet::first(address(from), address(A[0]), TCP, 80, number);
            assert_eq!(rig.passes(Link::Pods, &packet)?, expected, "{from}");
        }
        Ok(())
    });
}

const OUT: &str = "192.0.2.1";
const OUT6: &str = "2001:db8::1";
/// A pod's address of another node.
const FAR: &str = "10.9.0.1";

#[test]
fn an_interface_has_a_host_endpoint_of_its_own() {
    host_rig("an_interface_has_a_host_endpoint_of_its_own", |mut rig| {
        rig.through_tunnel("10.9.0.0/16")?;
        let open = json!(["projectcalico-default-allow"]);
        // In by where pods and others are, by the tunnel; and out.
        let ways = |rig: &mut Rig| -> anyhow::Result<[bool; 4]> {
            Ok([
                reaches(rig, OUT, 9000)?,
                reaches_by(rig, Link::Tunnel, (FAR, 40_000), 9000)?,
                leaves(rig, OUT, 9000)?,
                leaves(rig, FAR, 9000)?,
            ])
        };
        rig.tell([host_of("eth9", json!([]))])?;
        assert_eq!(ways(&mut rig)?, [true; 4], "of an interface that is not there");
        rig.tell([host_of("pods0", json!([]))])?;
        assert_eq!(ways(&mut rig)?, [false, true, false, true]);
        assert!(reaches(&mut rig, OUT, 68)? && leaves(&mut rig, OUT, 53)?, "what is safe");
        rig.tell([host(json!([]))])?;
        assert_eq!(ways(&mut rig)?, [false; 4]);
        rig.tell([host_of("pods0", open.clone())])?;
        assert_eq!(ways(&mut rig)?, [true, false, true, false]);
        rig.tell([gone("HostEndpoint", "here-pods0"), host_of("sennit0", open)])?;
        assert_eq!(ways(&mut rig)?, [false, true, false, true]);
        // A policy means each by its labels, and a port by the name that one gives it.
        let named = json!({
            "node": NODE, "interfaceName": "pods0", "expectedIPs": [HOST],
            "ports": [{"name": "echo", "protocol": "UDP", "port": 9000}],
        });
        let named =
            said(CALICO, "HostEndpoint", json!({"name": "here-pods0", "labels": {"role": "edge"}}), named);
        let policy = calico(
            "GlobalNetworkPolicy",
            "p",
            json!({
                "selector": "role == 'edge'", "types": ["Ingress", "Egress"],
                "ingress": [{"action": "Allow", "protocol": "UDP", "destination": {"ports": ["echo"]}}],
                "egress": [{"action": "Allow"}],
            }),
        );
        rig.tell([named, policy])?;
        assert_eq!(ways(&mut rig)?, [true, true, true, true]);
        assert!(!reaches(&mut rig, OUT, 9001)?);
        assert!(reaches_by(&mut rig, Link::Tunnel, (FAR, 40_000), 9001)?, "it means the other alone");
        Ok(())
    });
}

/// What is forwarded, and an answer of it: from where, by which link, to where, port, whether it passes.
type Forwarded<'a> = (&'a str, Link, &'a str, &'a str, u16, bool);

fn forwards(rig: &mut Rig, flows: &[Forwarded<'_>]) -> anyhow::Result<()> {
    for (what, link, from, to, port, expected) in flows {
        let number = rig.number();
        let packet = Packet::first(address(from), address(to), UDP, *port, number);
        assert_eq!(rig.passes(*link, &packet)?, *expected, "{what}: {packet:?}");
    }
    Ok(())
}

#[test]
fn what_a_node_forwards_is_judged_by_its_host_endpoints_and_its_pods_policies() {
    host_rig("what_a_node_forwards_is_judged_by_its_host_endpoints_and_its_pods_policies", |mut rig| {
        rig.through_tunnel("10.9.0.0/16")?;
        rig.tell([
            Event::Pod(pod("a", "a", &A)),
            Event::Pod(pod("b", "b", &B)),
            host(json!([])),
            policy("k", json!({"podSelector": {"matchLabels": {"app": "a"}}, "ingress": [{"ports": [{"port": 80, "protocol": "UDP"}]}]})),
        ])?;
        let other = "198.51.100.1";
        let everything = |far| -> Vec<Forwarded<'_>> {
            vec![
                ("outside to a pod", Link::Pods, OUT, A[0], 80, true),
                ("the same of the other family", Link::Pods, OUT6, A[1], 80, true),
                ("a port that the pod's policy has not", Link::Pods, OUT, A[0], 81, false),
                ("others outside", Link::Pods, other, A[0], 80, far),
                ("a pod to a pod", Link::Pods, B[0], A[0], 80, true),
                ("a pod to outside", Link::Pods, A[0], other, 80, true),
                ("outside to outside", Link::Pods, OUT, "203.0.113.9", 80, true),
                ("others to outside", Link::Pods, other, "203.0.113.9", 80, far),
                ("the mesh to a pod", Link::Tunnel, FAR, A[0], 80, far),
                ("a pod to the mesh", Link::Pods, A[0], FAR, 80, true),
            ]
        };
        forwards(&mut rig, &everything(true))?;
        let with = |direction: &str, forward: bool| {
            let end = if direction == "ingress" { "source" } else { "destination" };
            let of = |nets: Value| json!({"action": "Allow", end: {"nets": nets}});
            // 253: with what the rig asks whether all was judged.
            calico(
                "GlobalNetworkPolicy",
                "p",
                json!({
                    "selector": "role == 'node'", "applyOnForward": forward,
                    direction: [of(json!(["192.0.2.0/24", "2001:db8::/32"])), {"action": "Allow", "protocol": 253}],
                }),
            )
        };
        rig.tell([with("ingress", false)])?;
        forwards(&mut rig, &everything(true))?;
        assert!(reaches(&mut rig, OUT, 9000)? && !reaches(&mut rig, other, 9000)?);
        rig.tell([with("ingress", true)])?;
        forwards(&mut rig, &everything(false))?;
        assert!(reaches(&mut rig, OUT, 9000)? && !reaches(&mut rig, other, 9000)?);
        // By one interface alone.
        rig.tell([gone("HostEndpoint", "here"), host_of("sennit0", json!([]))])?;
        let mut by_tunnel = everything(true);
        by_tunnel[8].5 = false;
        forwards(&mut rig, &by_tunnel)?;
        rig.tell([gone("HostEndpoint", "here-sennit0"), host(json!([]))])?;

        // A flow that began is cut when that ends, both ways.
        let number = rig.number();
        let begun = Packet { number, ..Packet::first(address(OUT), address(A[0]), UDP, 80, number) };
        let answer = |number| Packet {
            number,
            source_port: 80,
            ..Packet::first(begun.destination, begun.source, UDP, begun.source_port, number)
        };
        assert!(rig.passes(Link::Pods, &begun)?);
        let number = rig.number();
        assert!(rig.passes(Link::Pods, &answer(number))?);
        rig.tell([calico("GlobalNetworkPolicy", "p", json!({
            "selector": "role == 'node'", "applyOnForward": true, "ingress": [{"action": "Allow", "protocol": 253}],
        }))])?;
        let number = rig.number();
        assert!(!rig.passes(Link::Pods, &answer(number))?);
        let number = rig.number();
        assert!(!rig.passes(Link::Pods, &Packet { number, ..begun })?);

        // What goes out.
        rig.tell([with("egress", true)])?;
        forwards(
            &mut rig,
            &[
                ("a pod to where it may", Link::Pods, B[0], OUT, 80, true),
                ("a pod to others", Link::Pods, B[0], other, 80, false),
                ("a pod to the mesh", Link::Pods, B[0], FAR, 80, false),
                ("a pod to a pod", Link::Pods, B[0], A[0], 80, true),
                ("others to a pod", Link::Pods, other, A[0], 80, true),
                ("others to outside", Link::Pods, other, OUT, 80, true),
                ("outside to others", Link::Pods, OUT, other, 80, false),
            ],
        )
    });
}

#[test]
fn before_destination_nat_a_rule_sees_what_was_dialled() {
    host_rig("before_destination_nat_a_rule_sees_what_was_dialled", |mut rig| {
        rig.tell([Event::Pod(pod("a", "a", &A)), host(json!([]))])?;
        rig.run("nft", "add table ip services")?;
        rig.run("nft", "add chain ip services prerouting { type nat hook prerouting priority dstnat ; }")?;
        rig.run(
            "nft",
            "add rule ip services prerouting ip daddr 192.0.2.80 udp dport 30080 dnat to 10.0.1.1:8080",
        )?;
        let (friend, other, dialled) = ("198.51.100.7", "203.0.113.9", "192.0.2.80");
        let policy = |action: &str, source: Value, destination: Value| {
            calico(
                "GlobalNetworkPolicy",
                "p",
                json!({
                    "selector": "role == 'node'", "preDNAT": true, "applyOnForward": true,
                    "ingress": [{"action": action, "protocol": "UDP", "source": source, "destination": destination}],
                }),
            )
        };
        let friends = json!({"notNets": ["198.51.100.0/24"]});
        rig.tell([policy("Deny", friends, json!({"nets": ["192.0.2.80/32"], "ports": [30080]}))])?;
        let flows = |service, pod| -> Vec<Forwarded<'_>> {
            vec![
                ("a friend to the service", Link::Pods, friend, dialled, 30080, true),
                ("another to the service", Link::Pods, other, dialled, 30080, service),
                ("another to the pod", Link::Pods, other, A[0], 8080, pod),
            ]
        };
        forwards(&mut rig, &flows(false, true))?;
        // What it does not decide others do, of the node itself.
        assert!(!reaches(&mut rig, other, 9000)?);
        // A flow that began is cut, and so is its answer.
        rig.tell([policy("Deny", json!({}), json!({"nets": ["192.0.2.81/32"]}))])?;
        let number = rig.number();
        let begun = Packet {
            source_port: 41_000,
            ..Packet::first(address(other), address(dialled), UDP, 30080, number)
        };
        let answer = |number| Packet {
            number,
            source_port: 8080,
            ..Packet::first(address(A[0]), address(other), UDP, begun.source_port, number)
        };
        assert!(rig.passes(Link::Pods, &begun)?);
        let number = rig.number();
        assert!(rig.passes(Link::Pods, &answer(number))?);
        rig.tell([policy("Deny", json!({}), json!({"nets": ["192.0.2.80/32"]}))])?;
        let number = rig.number();
        assert!(!rig.passes(Link::Pods, &answer(number))?);
        let number = rig.number();
        assert!(!rig.passes(Link::Pods, &Packet { number, ..begun })?);
        // What it allows no other policy of the host endpoint is asked.
        rig.tell([policy("Allow", json!({}), json!({"nets": [format!("{HOST}/32")], "ports": [9000]}))])?;
        assert!(reaches(&mut rig, other, 9000)? && !reaches(&mut rig, other, 9001)?);
        Ok(())
    });
}

#[test]
fn without_conntrack_each_packet_is_judged_by_itself() {
    host_rig("without_conntrack_each_packet_is_judged_by_itself", |mut rig| {
        rig.run("nft", "add table inet counting")?;
        rig.run("nft", "add counter inet counting untracked")?;
        rig.run("nft", "add chain inet counting input { type filter hook input priority filter + 10 ; }")?;
        rig.run("nft", "add rule inet counting input ct state untracked counter name untracked")?;
        let untracked = |rig: &Rig| -> anyhow::Result<u64> {
            let told = rig.run("nft", "list counter inet counting untracked")?;
            let packets = told.split_whitespace().skip_while(|word| *word != "packets").nth(1);
            Ok(packets.context("no counter")?.parse()?)
        };
        let bad = "198.51.100.1";
        let with = |egress: Value| {
            calico(
                "GlobalNetworkPolicy",
                "u",
                json!({
                    "selector": "role == 'node'", "doNotTrack": true, "applyOnForward": true, "types": ["Ingress", "Egress"],
                    "ingress": [
                        {"action": "Deny", "source": {"nets": ["198.51.100.0/24"]}},
                        {"action": "Allow", "protocol": "UDP", "source": {"nets": ["192.0.2.0/24"]}, "destination": {"ports": [9000]}},
                    ],
                    "egress": egress,
                }),
            )
        };
        let tracked = calico(
            "GlobalNetworkPolicy",
            "t",
            json!({
                "selector": "role == 'node'", "ingress": [{"action": "Allow", "protocol": "UDP", "destination": {"ports": [9001]}}],
            }),
        );
        rig.tell([Event::Pod(pod("a", "a", &A)), host(json!([])), tracked])?;
        rig.enforcer.compiler.take(with(json!([])));
        let pass = rig.enforcer.pass(rig.now)?;
        assert!(!pass.whole && pass.changes > 0, "it is a change like others: {pass:?}");
        rig.settle()?;
        assert!(reaches(&mut rig, OUT, 9000)?);
        assert_eq!(untracked(&rig)?, 1, "conntrack knows nothing of it");
        assert!(reaches(&mut rig, OUT, 9001)?, "what it does not decide others do");
        assert_eq!(untracked(&rig)?, 1);
        assert!(!reaches(&mut rig, OUT, 9002)? && !reaches(&mut rig, "203.0.113.9", 9000)?);
        // What it denies nobody makes good, of what is forwarded as well; but for what is safe.
        assert!(!reaches(&mut rig, bad, 9001)? && reaches(&mut rig, bad, 68)?);
        // What is for many is for this node, too.
        let socket = bound("0.0.0.0", 9000)?;
        socket.set_nonblocking(true)?;
        let before = untracked(&rig)?;
        let number = rig.number();
        rig.pass(Link::Pods, &[Packet::first(address(OUT), address("224.0.0.1"), UDP, 9000, number)])?;
        assert_eq!(untracked(&rig)?, before + 1);
        assert!(socket.recv(&mut [0; 64]).is_ok());
        drop(socket);
        // And neighbours are heard whatever it says.
        for hook in ["raw_input", "raw_output"] {
            let chains = ["a", "b"]
                .map(|slot| rig.run("nft", &format!("list chain inet sennit-policy {slot}_{hook}")));
            let chain = chains.into_iter().find_map(Result::ok).context("no such chain")?;
            let first = chain.find("icmpv6 type 130-137 accept").context("neighbours are not heard")?;
            assert!(chain.find("goto").is_none_or(|judged| first < judged), "{chain}");
        }
        forwards(
            &mut rig,
            &[
                ("whom it denies to a pod", Link::Pods, bad, A[0], 80, false),
                ("others to a pod", Link::Pods, OUT, A[0], 80, true),
                ("whom it allows, forwarded, is tracked", Link::Pods, OUT, A[0], 9000, true),
                ("a pod to whom it denies", Link::Pods, A[0], bad, 80, true),
            ],
        )?;
        // An answer needs a rule of its own.
        let socket = bound(HOST, 9000)?;
        let answers = |rig: &mut Rig| -> anyhow::Result<bool> {
            let number = rig.number();
            match socket.send_to(&number.to_be_bytes().repeat(2), (OUT, 40_000)) {
                Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => return Ok(false),
                sent => sent?,
            };
            Ok(rig.send(Link::Pods, &[])?.contains(&number))
        };
        assert!(!answers(&mut rig)?);
        let answer = json!({"action": "Allow", "protocol": "UDP", "source": {"ports": [9000]}, "destination": {"nets": ["192.0.2.0/24"]}});
        rig.tell([with(json!([answer]))])?;
        assert!(answers(&mut rig)?);
        let gone_of_them = gone("GlobalNetworkPolicy", "u");
        rig.enforcer.compiler.take(gone_of_them);
        let pass = rig.enforcer.pass(rig.now)?;
        assert!(!pass.whole && pass.changes > 0, "it is a change like others: {pass:?}");
        rig.settle()?;
        assert!(!answers(&mut rig)?);
        drop(socket);
        assert!(!reaches(&mut rig, OUT, 9000)? && reaches(&mut rig, bad, 9001)?);
        let chains = rig.run("nft", "list chains inet")?;
        assert!(!chains.contains("raw_input"), "nothing is left of it");
        Ok(())
    });
}

#[test]
fn what_a_node_begins_is_judged_by_where_it_goes_and_not_where_it_was_dialled() {
    host_rig("what_a_node_begins_is_judged_by_where_it_goes_and_not_where_it_was_dialled", |mut rig| {
        rig.through_tunnel("10.9.0.0/16")?;
        rig.run("nft", "add table ip services")?;
        rig.run("nft", "add chain ip services output { type nat hook output priority -100 ; }")?;
        for (dialled, to) in [
            ("192.0.2.80 udp dport 30080", "10.9.0.1:8080"),
            ("10.9.0.2 udp dport 30081", "192.0.2.1:8080"),
            ("192.168.7.1 udp dport 30082", "192.0.2.1:8080"),
            ("192.0.2.80 udp dport 30083", "192.168.7.1:9000"),
        ] {
            rig.run("nft", &format!("add rule ip services output ip daddr {dialled} dnat to {to}"))?;
        }
        let ways = |rig: &mut Rig| -> anyhow::Result<[bool; 3]> {
            Ok([
                leaves(rig, "192.0.2.80", 30080)?,
                leaves(rig, "10.9.0.2", 30081)?,
                leaves(rig, HOST, 30082)?,
            ])
        };
        // To itself by an address that stands for it.
        let itself = || -> anyhow::Result<bool> {
            let (server, client) = (bound(HOST, 9000)?, bound(HOST, 0)?);
            server.set_nonblocking(true)?;
            match client.send_to(b"to itself", ("192.0.2.80", 30083)) {
                Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => return Ok(false),
                sent => sent?,
            };
            Ok(server.recv(&mut [0; 16]).is_ok())
        };
        let expect = |rig: &mut Rig, expected: [bool; 3]| -> anyhow::Result<()> {
            let found = ways(rig)?;
            assert_eq!(found, expected, "{}", rig.run("nft", "list ruleset")?);
            Ok(())
        };
        expect(&mut rig, [true; 3])?;
        assert!(itself()?);
        rig.tell([host_of("sennit0", json!([]))])?;
        expect(&mut rig, [false, true, true])?;
        rig.tell([gone("HostEndpoint", "here-sennit0"), host_of("pods0", json!([]))])?;
        expect(&mut rig, [true, false, false])?;
        assert!(itself()?, "it never leaves");
        rig.tell([gone("HostEndpoint", "here-pods0"), host(json!([]))])?;
        expect(&mut rig, [false; 3])?;
        assert!(itself()?, "it never leaves");
        Ok(())
    });
}

#[test]
fn whoever_takes_a_pods_address_or_a_nodes_gets_nothing_by_it() {
    host_rig("whoever_takes_a_pods_address_or_a_nodes_gets_nothing_by_it", |mut rig| {
        rig.tell([Event::Pod(pod("a", "a", &A)), host_of("pods0", json!([]))])?;
        assert!(!reaches(&mut rig, A[0], 9000)?, "by an interface that has a host endpoint of its own");
        rig.tell([gone("HostEndpoint", "here-pods0"), host(json!([]))])?;
        assert!(reaches(&mut rig, A[0], 9000)?, "by where pods are");
        // A pod of another node that says it has this node's address opens nothing by its policies.
        rig.tell([
            Event::Pod(remote("r", "r", &[HOST])),
            policy("k", json!({"podSelector": {"matchLabels": {"app": "r"}}, "ingress": [{}]})),
        ])?;
        assert!(!reaches(&mut rig, OUT, 9000)?);
        Ok(())
    });
}
