//! Answers of DNS servers, as the kernel copies them.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use simple_dns::rdata::RData;
use simple_dns::{Packet, PacketFlag, RCODE};

use crate::flowlog::{Detail, Head};
use crate::names::{LENGTH_MOST, Resolved, Wanted, normal};
use crate::protocol::Protocol;

/// The port that servers answer from.
pub const PORT: u16 = 53;
/// As much of an answer as is copied, in bytes of the packet: more than DNS has in a datagram.
pub const RANGE: u32 = 4096;
/// The most aliases that one name leads through.
const ALIASES_MOST: usize = 16;

/// Bytes of a message's header (RFC 1035, section 4.1.1).
const HEADER: usize = 12;

/// Reads what a packet, from its IP header on, says of the name that was asked about; `None` where it is no answer with addresses. Of an
/// answer in several fragments only what is in the first counts.
pub fn answer(packet: &[u8]) -> Option<Resolved> {
    let (head, message) = message(packet)?;
    resolved(message, head.destination.to_canonical())
}

/// The same, of names that somebody speaks of. All others cost a look-up a label, whatever else is in the packet.
pub fn wanted(packet: &[u8], wanted: &Wanted) -> Option<Resolved> {
    let (head, message) = message(packet)?;
    wanted.wants(&question(message)?).then(|| resolved(message, head.destination.to_canonical()))?
}

fn message(packet: &[u8]) -> Option<(Head, &[u8])> {
    let (head, transport) = Head::split(packet)?;
    let Detail::Ports { source: PORT, .. } = head.detail else { return None };
    if head.protocol != Protocol::UDP.0 {
        return None;
    }
    // Behind UDP's header.
    Some((head, transport.get(8..)?))
}

/// The name that a successful answer is about, without reading further; `None` where it is none, or where no policy can speak of it.
fn question(message: &[u8]) -> Option<String> {
    let (header, mut rest) = message.split_at_checked(HEADER)?;
    // QR is set, and RCODE says that there was no error; there is one question.
    let answers = header[2] & 0x80 != 0 && header[3] & 0x0f == 0 && header[4..6] == [0, 1];
    let mut name = String::new();
    loop {
        let (&length, behind) = rest.split_first().filter(|_| answers)?;
        if length == 0 {
            return Some(name);
        }
        // A question's name comes first: there is nothing before it that it could refer to.
        let (label, behind) = behind.split_at_checked(usize::from(length)).filter(|_| length < 64)?;
        let plain = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        if name.len() + label.len() >= LENGTH_MOST || !label.iter().all(plain) {
            return None;
        }
        name.push_str(if name.is_empty() { "" } else { "." });
        name.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
        rest = behind;
    }
}

/// What a message says.
fn resolved(message: &[u8], asker: IpAddr) -> Option<Resolved> {
    let message = Packet::parse(message).ok()?;
    if !message.has_flags(PacketFlag::RESPONSE) || message.rcode() != RCODE::NoError {
        return None;
    }
    let [question] = message.questions.as_slice() else { return None };
    let name = normal(&question.qname.to_string());
    let records: Vec<_> =
        message.answers.iter().map(|record| (normal(&record.name.to_string()), record)).collect();
    let mut owner = name.clone();
    let mut ttl = u32::MAX;
    // Aliases need not stand in the order in which they lead on.
    for _ in 0..ALIASES_MOST {
        let alias = records.iter().find_map(|(of, record)| match &record.rdata {
            RData::CNAME(target) if *of == owner => Some((normal(&target.to_string()), record.ttl)),
            _ => None,
        });
        let Some((target, of_alias)) = alias else { break };
        (owner, ttl) = (target, ttl.min(of_alias));
    }
    let mut addresses = BTreeSet::new();
    for (_, record) in records.iter().filter(|(of, _)| *of == owner) {
        let address: IpAddr = match &record.rdata {
            RData::A(a) => Ipv4Addr::from(a.address).into(),
            RData::AAAA(aaaa) => Ipv6Addr::from(aaaa.address).into(),
            _ => continue,
        };
        ttl = ttl.min(record.ttl);
        addresses.insert(address.to_canonical());
    }
    (!addresses.is_empty()).then_some(Resolved { name, addresses, ttl, asker })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use simple_dns::rdata::{A, AAAA, CNAME};
    use simple_dns::{CLASS, Name, Question, ResourceRecord, TYPE};

    use super::*;

    fn record(name: &str, ttl: u32, rdata: RData<'static>) -> ResourceRecord<'static> {
        ResourceRecord::new(Name::new(name).unwrap().into_owned(), CLASS::IN, ttl, rdata)
    }

    fn alias(name: &str, ttl: u32, to: &str) -> ResourceRecord<'static> {
        record(name, ttl, RData::CNAME(CNAME(Name::new(to).unwrap().into_owned())))
    }

    fn a(name: &str, ttl: u32, address: [u8; 4]) -> ResourceRecord<'static> {
        record(name, ttl, RData::A(A { address: u32::from_be_bytes(address) }))
    }

    /// A message that answers a question about a name, in a packet.
    fn packet(v6: bool, asked: &str, records: Vec<ResourceRecord<'static>>) -> Vec<u8> {
        let mut message = Packet::new_reply(7);
        let name = Name::new(asked).unwrap().into_owned();
        message.questions.push(Question::new(name, TYPE::A.into(), CLASS::IN.into(), false));
        message.answers = records;
        let payload = message.build_bytes_vec_compressed().unwrap();
        let length = (payload.len() + 8) as u16;
        let mut packet = match v6 {
            false => {
                let mut header = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 53, 10, 0, 0, 1];
                header[2..4].copy_from_slice(&(length + 20).to_be_bytes());
                header
            }
            true => {
                let mut header = vec![0x60, 0, 0, 0, 0, 0, 17, 64];
                header[4..6].copy_from_slice(&length.to_be_bytes());
                header.extend([0xfd; 32]);
                header
            }
        };
        packet.extend(PORT.to_be_bytes());
        packet.extend(40_000_u16.to_be_bytes());
        packet.extend(length.to_be_bytes());
        packet.extend([0, 0]);
        packet.extend(payload);
        packet
    }

    #[test]
    fn addresses_are_those_of_the_name_that_was_asked_about_whatever_its_aliases_are() {
        for v6 in [false, true] {
            let records = vec![
                a("edge.cdn.net", 50, [192, 0, 2, 1]),
                alias("WWW.example.com", 300, "site.cdn.net"),
                alias("site.cdn.net", 20, "edge.cdn.net"),
                a("edge.cdn.net", 40, [192, 0, 2, 2]),
                record("edge.cdn.net", 60, RData::AAAA(AAAA { address: 0x2001_0db8 << 96 | 1 })),
                a("evil.example.org", 60, [203, 0, 113, 1]),
            ];
            let resolved = answer(&packet(v6, "www.EXAMPLE.com", records)).unwrap();
            assert_eq!((resolved.name.as_str(), resolved.ttl), ("www.example.com", 20));
            let addresses: Vec<String> = resolved.addresses.iter().map(ToString::to_string).collect();
            assert_eq!(addresses, ["192.0.2.1", "192.0.2.2", "2001:db8::1"]);
            let asker = if v6 { [0xfd; 16].into() } else { IpAddr::from([10, 0, 0, 1]) };
            assert_eq!(resolved.asker, asker);
        }
    }

    #[test]
    fn only_names_that_somebody_wants_are_read() {
        let mut wanted_names = Wanted::default();
        wanted_names.add(&"*.example.com".parse().unwrap());
        let of = |asked: &str| packet(false, asked, vec![a(asked, 1, [1, 2, 3, 4])]);
        let packet = of("WWW.Example.com");
        assert_eq!(wanted(&packet, &wanted_names), answer(&packet));
        assert!(answer(&packet).is_some());
        for other in ["example.com", "www.example.org"] {
            assert_eq!(wanted(&of(other), &wanted_names), None, "{other}");
        }
        // A question whose name refers to itself, ends nowhere, or has no end.
        for name in [&[0xc0, 12][..], &[3, b'w'], &[3, b'w', b'w', b'w'], &[1, b'.', 0], &[0x40, 0]] {
            let message = [&[0, 7, 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0], name].concat();
            assert_eq!(question(&message), None, "{name:?}");
        }
    }

    #[test]
    fn what_answers_nothing_is_none() {
        assert_eq!(answer(&packet(false, "example.com", vec![])), None);
        let loops = vec![alias("example.com", 1, "b.example.com"), alias("b.example.com", 1, "example.com")];
        assert_eq!(answer(&packet(false, "example.com", loops)), None);
        let mut question = packet(false, "example.com", vec![a("example.com", 1, [1, 2, 3, 4])]);
        question[20 + 8 + 2] &= 0x7f;
        assert_eq!(answer(&question), None, "a question");
        let mut failed = packet(false, "example.com", vec![a("example.com", 1, [1, 2, 3, 4])]);
        failed[20 + 8 + 3] |= 3;
        assert_eq!(answer(&failed), None, "no such name");
        let mut elsewhere = packet(false, "example.com", vec![a("example.com", 1, [1, 2, 3, 4])]);
        elsewhere[21] = 54;
        assert_eq!(answer(&elsewhere), None, "another port");
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_answer_or_none(mut bytes in prop::collection::vec(any::<u8>(), 0..200), cut in 0..200usize) {
            let mut every = Wanted::default();
            every.add(&"example.com".parse().unwrap());
            let _ = (answer(&bytes), wanted(&bytes, &every));
            let mut whole = packet(false, "example.com", vec![a("example.com", 1, [1, 2, 3, 4])]);
            let at = cut % whole.len();
            whole.truncate(at.max(28));
            whole.append(&mut bytes);
            let _ = answer(&whole);
        }
    }
}
