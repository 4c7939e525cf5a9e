//! Who talks to whom, from the first bytes of an IP packet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Numbers of protocols and of IPv6 extension headers, as IANA assigns them.
mod number {
    pub(super) const HOP_BY_HOP: u8 = 0;
    pub(super) const ICMP: u8 = 1;
    pub(super) const TCP: u8 = 6;
    pub(super) const UDP: u8 = 17;
    pub(super) const DCCP: u8 = 33;
    pub(super) const ROUTING: u8 = 43;
    pub(super) const FRAGMENT: u8 = 44;
    pub(super) const AUTHENTICATION: u8 = 51;
    pub(super) const ICMP6: u8 = 58;
    pub(super) const DESTINATION: u8 = 60;
    pub(super) const SCTP: u8 = 132;
    pub(super) const UDP_LITE: u8 = 136;
}

/// Length in bytes of an IPv6 header without extensions, and of the shortest IPv4 header.
const V6_LENGTH: usize = 40;
const V4_LENGTH: usize = 20;

/// The part of a packet that tells one flow from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Head {
    /// Where it comes from.
    pub source: IpAddr,
    /// Where it goes.
    pub destination: IpAddr,
    /// IP protocol number, behind IPv6 extension headers as far as those could be read.
    pub protocol: u8,
    /// What the protocol adds.
    pub detail: Detail,
}

/// What a protocol adds to the addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Detail {
    /// Nothing: another protocol, a fragment that is not the first, or too few bytes.
    None,
    /// Ports of TCP, UDP, UDP-Lite, SCTP and DCCP.
    Ports {
        /// Of the source.
        source: u16,
        /// Of the destination.
        destination: u16,
    },
    /// Of ICMP and `ICMPv6`.
    Icmp {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
    },
}

impl Head {
    /// Reads a packet that begins with its IP header and may end anywhere. `None` when the addresses are not in it.
    pub fn read(packet: &[u8]) -> Option<Self> {
        Self::split(packet).map(|(head, _)| head)
    }

    /// The same with what is behind its IP headers, as far as that is in it and no later part of something.
    pub fn split(packet: &[u8]) -> Option<(Self, &[u8])> {
        match packet.first()? >> 4 {
            4 => Self::split_v4(packet),
            6 => Self::split_v6(packet),
            _ => None,
        }
    }

    fn split_v4(packet: &[u8]) -> Option<(Self, &[u8])> {
        let length = usize::from(packet.first()? & 0x0f) * 4;
        if length < V4_LENGTH {
            return None;
        }
        let source = Ipv4Addr::from(array::<4>(packet, 12)?).into();
        let destination = Ipv4Addr::from(array::<4>(packet, 16)?).into();
        let protocol = *packet.get(9)?;
        // 13 bits of offset in units of 8 bytes.
        let first = u16::from_be_bytes(array(packet, 6)?) & 0x1fff == 0;
        let payload = packet.get(length..).filter(|_| first).unwrap_or_default();
        Some((Self { source, destination, protocol, detail: detail(protocol, payload) }, payload))
    }

    fn split_v6(packet: &[u8]) -> Option<(Self, &[u8])> {
        let source = Ipv6Addr::from(array::<16>(packet, 8)?).into();
        let destination = Ipv6Addr::from(array::<16>(packet, 24)?).into();
        let (protocol, payload) = skip_extensions(*packet.get(6)?, packet.get(V6_LENGTH..)?);
        let payload = payload.unwrap_or_default();
        Some((Self { source, destination, protocol, detail: detail(protocol, payload) }, payload))
    }
}

/// The protocol behind IPv6 extension headers and, unless it is in another fragment or was cut off, its bytes. Every
/// header is at least 8 bytes, so this ends with the packet.
fn skip_extensions(mut protocol: u8, mut rest: &[u8]) -> (u8, Option<&[u8]>) {
    loop {
        // What their field of length counts, beyond the first 8 bytes (RFC 8200, RFC 4302); a fragment's is reserved.
        let unit = match protocol {
            number::HOP_BY_HOP | number::ROUTING | number::DESTINATION => 8,
            number::AUTHENTICATION => 4,
            number::FRAGMENT => 0,
            _ => return (protocol, Some(rest)),
        };
        let Some(&[next, length]) = rest.first_chunk() else { return (protocol, None) };
        if protocol == number::FRAGMENT {
            // 13 bits of offset, above three others.
            let Some(offset) = array(rest, 2).map(u16::from_be_bytes) else { return (next, None) };
            if offset >> 3 != 0 {
                return (next, None);
            }
        }
        protocol = next;
        let Some(behind) = rest.get(8 + usize::from(length) * unit..) else { return (protocol, None) };
        rest = behind;
    }
}

fn detail(protocol: u8, payload: &[u8]) -> Detail {
    match protocol {
        number::TCP | number::UDP | number::DCCP | number::SCTP | number::UDP_LITE => {
            let Some(&[a, b, c, d]) = payload.first_chunk() else { return Detail::None };
            Detail::Ports { source: u16::from_be_bytes([a, b]), destination: u16::from_be_bytes([c, d]) }
        }
        number::ICMP | number::ICMP6 => {
            let Some(&[kind, code]) = payload.first_chunk() else { return Detail::None };
            Detail::Icmp { kind, code }
        }
        _ => Detail::None,
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// Name of a protocol that has one here, otherwise its number.
pub(super) fn protocol_name(protocol: u8) -> String {
    let name = match protocol {
        number::ICMP => "ICMP",
        number::TCP => "TCP",
        number::UDP => "UDP",
        number::ICMP6 => "ICMPv6",
        number::SCTP => "SCTP",
        other => return other.to_string(),
    };
    name.to_owned()
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An IPv4 packet with options and a field of flags and fragment offset.
    pub(in crate::flowlog) fn v4(protocol: u8, options: &[u8], fragment: u16, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45 + u8::try_from(options.len() / 4).unwrap(), 0, 0, 0, 0, 0];
        packet.extend(fragment.to_be_bytes());
        packet.extend([64, protocol, 0, 0, 10, 1, 0, 7, 10, 2, 0, 9]);
        packet.extend(options);
        packet.extend(payload);
        packet
    }

    fn v6(next: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, 0, next, 64];
        packet.extend("fd00:1::7".parse::<Ipv6Addr>().unwrap().octets());
        packet.extend("fd00:2::9".parse::<Ipv6Addr>().unwrap().octets());
        packet.extend(payload);
        packet
    }

    const PORTS: [u8; 4] = [0x9c, 0x40, 0x01, 0xbb];
    const TOLD: Detail = Detail::Ports { source: 40_000, destination: 443 };

    fn detail_of(packet: &[u8]) -> (u8, Detail) {
        let head = Head::read(packet).unwrap();
        (head.protocol, head.detail)
    }

    #[test]
    fn an_ipv4_packet_tells_addresses_and_ports() {
        let head = Head::read(&v4(6, &[], 0x4000, &PORTS)).unwrap();
        assert_eq!(head.source, IpAddr::from([10, 1, 0, 7]));
        assert_eq!(head.destination, IpAddr::from([10, 2, 0, 9]));
        assert_eq!((head.protocol, head.detail), (6, TOLD));
    }

    #[test]
    fn ipv4_options_are_skipped() {
        assert_eq!(detail_of(&v4(17, &[1; 40], 0, &PORTS)), (17, TOLD));
        assert_eq!(
            Head::read(&[&[0x44], &v4(17, &[], 0, &PORTS)[1..]].concat()),
            None,
            "a header of 16 bytes"
        );
    }

    #[test]
    fn only_a_first_fragment_has_ports() {
        assert_eq!(detail_of(&v4(17, &[], 0x2000, &PORTS)), (17, TOLD));
        assert_eq!(detail_of(&v4(17, &[], 0x2001, &PORTS)), (17, Detail::None));
        let fragment = |offset: u8| [&[17, 0, 0, offset, 0, 0, 0, 1], &PORTS[..]].concat();
        assert_eq!(detail_of(&v6(44, &fragment(0x01))), (17, TOLD));
        assert_eq!(detail_of(&v6(44, &fragment(0x08))), (17, Detail::None));
    }

    #[test]
    fn an_ipv6_packet_tells_what_is_behind_its_extension_headers() {
        let head = Head::read(&v6(6, &PORTS)).unwrap();
        assert_eq!(head.source, "fd00:1::7".parse::<IpAddr>().unwrap());
        assert_eq!(head.destination, "fd00:2::9".parse::<IpAddr>().unwrap());
        assert_eq!((head.protocol, head.detail), (6, TOLD));
        let hop_by_hop = [43, 0, 0, 0, 0, 0, 0, 0];
        let routing = [&[51, 1], &[0; 14][..]].concat();
        let authentication = [&[60, 4], &[0; 22][..]].concat();
        let destination = [6, 0, 0, 0, 0, 0, 0, 0];
        let chain = [&hop_by_hop, &routing[..], &authentication, &destination, &PORTS].concat();
        assert_eq!(detail_of(&v6(0, &chain)), (6, TOLD));
    }

    #[test]
    fn what_is_cut_off_is_told_as_far_as_it_is_there() {
        assert_eq!(detail_of(&v6(0, &[])), (0, Detail::None));
        assert_eq!(detail_of(&v6(0, &[6, 9, 0])), (6, Detail::None));
        assert_eq!(detail_of(&v6(44, &[6, 0])), (6, Detail::None));
        assert_eq!(detail_of(&v4(6, &[], 0, &PORTS[..3])), (6, Detail::None));
        assert_eq!(detail_of(&v4(1, &[], 0, &[8])), (1, Detail::None));
        assert_eq!(Head::read(&v4(6, &[], 0, &[])[..19]), None);
        assert_eq!(Head::read(&v6(6, &[])[..39]), None);
        assert_eq!(Head::read(&[]), None);
        assert_eq!(Head::read(&[0; 96]), None);
    }

    #[test]
    fn icmp_tells_type_and_code_and_other_protocols_nothing() {
        assert_eq!(detail_of(&v4(1, &[], 0, &[3, 1, 0, 0])), (1, Detail::Icmp { kind: 3, code: 1 }));
        assert_eq!(detail_of(&v6(58, &[128, 0, 0, 0])), (58, Detail::Icmp { kind: 128, code: 0 }));
        assert_eq!(detail_of(&v4(47, &[], 0, &PORTS)), (47, Detail::None));
        assert_eq!(detail_of(&v4(51, &[], 0, &PORTS)), (51, Detail::None));
    }

    #[test]
    fn protocols_have_names_or_numbers() {
        let names = [1, 6, 17, 58, 132, 47].map(protocol_name);
        assert_eq!(names, ["ICMP", "TCP", "UDP", "ICMPv6", "SCTP", "47"]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..200), six: bool) {
            let _ = Head::read(&bytes);
            if let Some(first) = bytes.first_mut() {
                *first = if six { 0x60 } else { 0x40 | (*first & 0x0f) };
            }
            prop_assert!(Head::read(&bytes).is_none_or(|head| head.source.is_ipv6() == six));
        }

        #[test]
        fn any_chain_of_extension_headers_ends(
            next in extension(),
            chain in prop::collection::vec((extension(), 0..3_u8), 0..40),
        ) {
            let headers = chain.iter().flat_map(|(next, length)| {
                let mut header = vec![0; 8 + usize::from(*length) * 8];
                (header[0], header[1]) = (*next, *length);
                header
            });
            prop_assert!(Head::read(&v6(next, &headers.collect::<Vec<_>>())).is_some());
        }
    }

    fn extension() -> impl Strategy<Value = u8> {
        prop::sample::select(vec![0, 6, 17, 43, 44, 51, 58, 60])
    }
}
