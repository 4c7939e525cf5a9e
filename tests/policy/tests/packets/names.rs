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

/// Answers of a server to questions of a client that it is asked first, many at once; how many are copied, and how many pass.
fn flood(
    rig: &mut Rig,
    listener: &mut Listener,
    client: Ipv4Addr,
    answer: &[u8],
    count: u16,
) -> anyhow::Result<usize> {
    rig.send(Link::Pods, &[datagram((client, 4000), (SERVER, 53), b"a question")])?;
    let mut copied = 0;
    for _ in 0..count / 50 {
        let answers = vec![datagram((SERVER, 53), (client, 4000), answer); 50];
        rig.send(Link::Pods, &answers)?;
        listener.receive(|logged| copied += usize::from(dns::answer(logged.packet).is_some()))?;
    }
    Ok(copied)
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

#[test]
fn a_flood_to_one_pod_starves_no_other() {
    let resolvers =
        Resolvers { group: GROUP, pods: [].into(), nets: ["10.0.1.53/32".parse().expect("a net")].into() };
    let own = ["10.0.1.0/24".parse().expect("a net")].into();
    let with = Settings { resolvers: Some(resolvers), own, strangers: true, ..settings() };
    with_settings("a_flood_to_one_pod_starves_no_other", with, |mut rig| {
        let mut listener = Listener::with_range(GROUP, 4 << 20, dns::RANGE)?;
        let rules = json!([
            {"action": "Accept", "to": [{"domainNames": ["*.example.com"]}]},
            {"action": "Accept", "to": [{"networks": ["10.0.1.0/24"]}]},
        ]);
        let policy = clusternetworkpolicy::read(&json!({
            "metadata": {"name": "names"},
            "spec": {"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}, "egress": rules},
        }));
        assert_eq!(policy.fault, None);
        rig.tell([
            Event::Pod(pod("client", "client", &["10.0.1.1"])),
            Event::Pod(pod("flooder", "flooder", &["10.0.1.2"])),
            Event::Policy(policy),
        ])?;
        let outside = Ipv4Addr::new(192, 0, 2, 1);
        let flooder = Ipv4Addr::new(10, 0, 1, 2);
        let answer = message(&[outside], 60);
        let began = std::time::Instant::now();
        let copied = flood(&mut rig, &mut listener, flooder, &answer, 2000)?;
        // A burst, and a hundred a second.
        let most = 201 + 100 * (began.elapsed().as_secs() as usize + 1);
        assert!((200..=most).contains(&copied), "{copied} of 2000, at most {most}");
        // An answer that is not copied goes on all the same.
        let number = rig.number();
        let last = datagram((SERVER, 53), (flooder, 4000), &answer);
        rig.send(Link::Pods, &vec![last; 50])?;
        let through = Packet::first(address("10.0.1.2"), address("10.0.1.1"), TCP, 80, number);
        assert!(rig.passes(Link::Pods, &through)?);
        listener.receive(|_| ())?;
        assert_eq!(ask(&mut rig, &mut listener, SERVER, &answer, 5000)?.len(), 1, "the other pod");
        // Addresses that no known pod has share what one pod has.
        let mut strangers = 0;
        let began = std::time::Instant::now();
        for n in 100..110 {
            strangers += flood(&mut rig, &mut listener, Ipv4Addr::new(10, 0, 1, n), &answer, 100)?;
        }
        let most = 201 + 100 * (began.elapsed().as_secs() as usize + 1);
        assert!((200..=most).contains(&strangers), "{strangers} of 1000, at most {most}");
        Ok(())
    });
}

#[test]
fn an_answer_opens_no_address_of_the_mesh() {
    let resolvers =
        Resolvers { group: GROUP, pods: [].into(), nets: ["10.0.1.53/32".parse().expect("a net")].into() };
    let with = Settings { resolvers: Some(resolvers), ..settings() };
    with_settings("an_answer_opens_no_address_of_the_mesh", with, |mut rig| {
        let mut listener = Listener::with_range(GROUP, 1 << 20, dns::RANGE)?;
        let rules = json!([
            {"action": "Accept", "to": [{"domainNames": ["*.example.com"]}]},
            {"action": "Accept", "to": [{"networks": ["10.0.1.53/32"]}]},
            {"action": "Deny", "to": [{"networks": ["0.0.0.0/0", "::/0"]}]},
        ]);
        let policy = clusternetworkpolicy::read(&json!({
            "metadata": {"name": "names"},
            "spec": {"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}, "egress": rules},
        }));
        assert_eq!(policy.fault, None);
        rig.tell([
            Event::Pod(pod("client", "client", &["10.0.1.1"])),
            Event::Pod(pod("victim", "victim", &["10.0.1.7"])),
            Event::Policy(policy),
        ])?;
        let (victim, outside) = (Ipv4Addr::new(10, 0, 1, 7), Ipv4Addr::new(192, 0, 2, 1));
        let learnt = ask(&mut rig, &mut listener, SERVER, &message(&[victim, outside], 60), 5000)?;
        assert_eq!(learnt.iter().map(|resolved| resolved.addresses.len()).collect::<Vec<_>>(), [2]);
        rig.tell(learnt.into_iter().map(|resolved| Event::Resolved(resolved, 100)))?;
        for (to, passes) in [(victim, false), (outside, true)] {
            let number = rig.number();
            let packet = Packet::first(address("10.0.1.1"), to.into(), TCP, 443, number);
            assert_eq!(rig.passes(Link::Pods, &packet)?, passes, "{to}");
        }
        let told: Vec<String> = rig.enforcer.compiler.state().refusals().collect();
        let refused = told.iter().find(|told| told.starts_with("dns-address-refused: "));
        assert!(
            refused.is_some_and(|told| told.contains("10.0.1.7") && told.contains("pod x/client")),
            "{told:?}"
        );
        Ok(())
    });
}
