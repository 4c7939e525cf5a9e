//! Nodes as endpoints, by Calico's HostEndpoints.

use std::collections::BTreeMap;
use std::net::{IpAddr, UdpSocket};

use anyhow::Context as _;
use mesh_policy::Event;
use mesh_policy::compile::Settings;
use mesh_policy::world::Node;
use policy_tests::objects::{pod, remote};
use policy_tests::rig::{NODE, settings};
use policy_tests::{Link, Packet, Rig};
use serde_json::{Value, json};

use crate::calico::{A, B, CALICO, calico, check, gone, said};
use crate::{TCP, UDP, address, with_settings};

/// The rig's node has this address, and another node one beside it.
const HOST: &str = "192.168.7.1";

fn host_rig(name: &str, test: impl FnOnce(Rig) -> anyhow::Result<()> + Send + 'static) {
    let settings = Settings { carriers: [51820].into(), ..settings() };
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
    let spec = json!({"node": NODE, "interfaceName": "*", "expectedIPs": [HOST], "profiles": profiles});
    said(CALICO, "HostEndpoint", json!({"name": "here", "labels": {"role": "node"}}), spec)
}

/// Whether a datagram from outside reaches a socket of the node.
fn reaches(rig: &mut Rig, from: &str, port: u16) -> anyhow::Result<bool> {
    reaches_from(rig, from, 40_000, port)
}

/// The same, from this port.
fn reaches_from(rig: &mut Rig, from: &str, source_port: u16, port: u16) -> anyhow::Result<bool> {
    let socket = UdpSocket::bind((HOST, port))?;
    socket.set_nonblocking(true)?;
    let number = rig.number();
    let packet = Packet { source_port, ..Packet::first(address(from), address(HOST), UDP, port, number) };
    // When the call returns, the packet has been judged.
    rig.pass(Link::Pods, &[packet])?;
    let mut buffer = [0; 64];
    Ok(socket.recv(&mut buffer).is_ok_and(|length| buffer[..length].starts_with(&number.to_be_bytes())))
}

/// Whether a datagram of the node's leaves it.
fn leaves(rig: &mut Rig, to: &str, port: u16) -> anyhow::Result<bool> {
    leaves_from(rig, 0, to, port)
}

/// The same, from this port.
fn leaves_from(rig: &mut Rig, from: u16, to: &str, port: u16) -> anyhow::Result<bool> {
    let socket = UdpSocket::bind((HOST, from))?;
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
        const OUT: &str = "192.0.2.1";
        rig.tell([Event::Pod(pod("a", "a", &A)), Event::Pod(remote("r", "r", &B))])?;
        assert!(reaches(&mut rig, OUT, 9000)? && leaves(&mut rig, OUT, 9000)?, "nothing protects it");
        rig.tell([host(json!([]))])?;
        assert!(!reaches(&mut rig, OUT, 9000)? && !leaves(&mut rig, OUT, 9000)?);
        // DHCP and DNS, and what carries the mesh.
        assert!(reaches(&mut rig, OUT, 68)? && leaves(&mut rig, OUT, 53)?);
        // What carries the mesh is known by the port of this node, not by another's.
        assert!(reaches(&mut rig, OUT, 51820)? && leaves_from(&mut rig, 51820, OUT, 700)?);
        assert!(!leaves(&mut rig, OUT, 51820)? && !reaches_from(&mut rig, OUT, 51820, 9000)?);
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
        let socket = UdpSocket::bind((HOST, 9000))?;
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
