//! Names as peers: learnt from what is answered to pods, for as long as the answer says.

use std::net::Ipv4Addr;

use anyhow::Context as _;
use mesh_policy::compile::{Resolvers, Settings};
use mesh_policy::flowlog::Listener;
use mesh_policy::{Event, clusternetworkpolicy, dns};
use policy_tests::objects::pod;
use policy_tests::rig::settings;
use policy_tests::{Link, Packet, Rig};
use serde_json::json;

use crate::{TCP, address, with_settings};

const GROUP: u16 = 5182;
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 53);
const EVIL: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 66);

/// What a server answers about `www.example.com` (RFC 1035, section 4).
fn message(addresses: &[Ipv4Addr], ttl: u32) -> Vec<u8> {
    let mut out = vec![0, 7, 0x81, 0x80, 0, 1, 0, addresses.len() as u8, 0, 0, 0, 0];
    for label in ["www", "example", "com", ""] {
        out.push(label.len() as u8);
        out.extend(label.bytes());
    }
    out.extend([0, 1, 0, 1]);
    for address in addresses {
        // The name is the question's.
        out.extend([0xc0, 12, 0, 1, 0, 1]);
        out.extend(ttl.to_be_bytes());
        out.extend([0, 4]);
        out.extend(address.octets());
    }
    out
}

/// A datagram without checksums of its own: conntrack takes it.
fn datagram(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() + 8) as u16;
    let mut out = vec![0x45, 0];
    out.extend((length + 20).to_be_bytes());
    out.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    out.extend([from.0.octets(), to.0.octets()].concat());
    let sum: u32 = out.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    out[10..12].copy_from_slice(&sum.to_be_bytes());
    for part in [from.1, to.1, length, 0] {
        out.extend(part.to_be_bytes());
    }
    out.extend(payload);
    out
}

/// Asks a server, which answers, and gives what is learnt from that.
fn ask(
    rig: &mut Rig,
    listener: &mut Listener,
    server: Ipv4Addr,
    answer: &[u8],
    port: u16,
) -> anyhow::Result<Vec<mesh_policy::names::Resolved>> {
    rig.send(Link::Pods, &[datagram((CLIENT, port), (server, 53), b"a question")])?;
    rig.send(Link::Pods, &[datagram((server, 53), (CLIENT, port), answer)])?;
    let mut learnt = Vec::new();
    // The kernel hands on what it copies before the packet goes on.
    listener.receive(|logged| learnt.extend(dns::answer(logged.packet)))?;
    Ok(learnt)
}

#[test]
fn a_name_is_what_its_server_says_as_long_as_it_says() {
    let resolvers =
        Resolvers { group: GROUP, pods: [].into(), nets: ["10.0.1.53/32".parse().expect("a net")].into() };
    let with = Settings { resolvers: Some(resolvers), ..settings() };
    with_settings("a_name_is_what_its_server_says_as_long_as_it_says", with, |mut rig| {
        let mut listener = Listener::with_range(GROUP, 1 << 20, dns::RANGE)?;
        let rules = json!([
            {"action": "Accept", "to": [{"domainNames": ["*.example.com"]}], "protocols": [{"tcp": {"destinationPort": {"number": 443}}}]},
            {"action": "Accept", "to": [{"networks": ["10.0.1.0/24"]}]},
            {"action": "Deny", "to": [{"networks": ["0.0.0.0/0", "::/0"]}]},
        ]);
        let policy = clusternetworkpolicy::read(&json!({
            "metadata": {"name": "names"},
            "spec": {"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}, "egress": rules},
        }));
        assert_eq!(policy.fault, None);
        rig.tell([Event::Pod(pod("client", "client", &["10.0.1.1"])), Event::Policy(policy)])?;
        let first = Ipv4Addr::new(192, 0, 2, 1);
        let second = Ipv4Addr::new(192, 0, 2, 2);
        let connect = |rig: &mut Rig, to: Ipv4Addr, port: u16| -> anyhow::Result<(bool, Packet)> {
            let number = rig.number();
            let packet = Packet::first(address("10.0.1.1"), to.into(), TCP, port, number);
            Ok((rig.passes(Link::Pods, &packet)?, packet))
        };
        assert!(!connect(&mut rig, first, 443)?.0, "nobody has asked yet");
        // Whoever else answers is not believed: not even copied.
        assert!(ask(&mut rig, &mut listener, EVIL, &message(&[second], 60), 5000)?.is_empty());
        // Of more bytes than are told of a denied packet.
        let many: Vec<Ipv4Addr> =
            [first].into_iter().chain((10..30).map(|n| Ipv4Addr::new(192, 0, 2, n))).collect();
        let learnt = ask(&mut rig, &mut listener, SERVER, &message(&many, 60), 5001)?;
        let [resolved] = learnt.as_slice() else { anyhow::bail!("{learnt:?}") };
        let told = (resolved.name.as_str(), resolved.ttl, resolved.addresses.len());
        assert_eq!(told, ("www.example.com", 60, 21));
        rig.tell([Event::Resolved(resolved.clone(), 100)])?;
        let (passed, connected) = connect(&mut rig, first, 443)?;
        assert!(passed && !connect(&mut rig, first, 80)?.0 && !connect(&mut rig, second, 443)?.0);
        let go_on = |rig: &mut Rig| -> anyhow::Result<bool> {
            let number = rig.number();
            let answered = rig.passes(Link::Pods, &connected.answer(number))?;
            let number = rig.number();
            Ok(answered && rig.passes(Link::Pods, &connected.again(policy_tests::packet::ACK, number))?)
        };
        assert!(go_on(&mut rig)?);
        rig.tell([Event::Clock(159)])?;
        assert!(connect(&mut rig, first, 443)?.0);
        // Over: whoever is connected stays so, and nobody connects anew. Even when all is judged again.
        rig.tell([Event::Clock(160)])?;
        assert!(go_on(&mut rig)?, "right after");
        rig.enforcer.distrust();
        rig.settle()?;
        assert!(go_on(&mut rig)?, "judged again");
        let number = rig.number();
        let other = Packet {
            source_port: 41_000,
            ..Packet::first(address("10.0.1.1"), first.into(), TCP, 443, number)
        };
        assert!(!rig.passes(Link::Pods, &other)?);
        // Another answer, another address.
        let learnt = ask(&mut rig, &mut listener, SERVER, &message(&[second], 5), 5002)?;
        rig.tell([Event::Resolved(learnt.into_iter().next().context("nothing is learnt")?, 200)])?;
        assert!(connect(&mut rig, second, 443)?.0 && go_on(&mut rig)?);
        // What nobody asks for is not copied.
        rig.tell([Event::PolicyGone(
            mesh_policy::Kind::named(clusternetworkpolicy::KIND).expect("a kind").id(None, "names"),
        )])?;
        assert!(ask(&mut rig, &mut listener, SERVER, &message(&[first], 60), 5003)?.is_empty());
        Ok(())
    });
}
