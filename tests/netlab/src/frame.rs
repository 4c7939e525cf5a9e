//! What a frame is: pure.

use std::net::IpAddr;

/// Class of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    Arp,
    Icmp,
    Udp { source: u16, destination: u16 },
    Other,
}

/// What a frame holds at its outermost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) class: Class,
    /// Source and destination of the IP packet, neighbour discovery excepted.
    pub(crate) addresses: Option<(IpAddr, IpAddr)>,
}

/// Reads a frame; `ethernet` says whether it has a link header. Never reads past its end.
pub(crate) fn read(frame: &[u8], ethernet: bool) -> Frame {
    let (version, packet) = if ethernet {
        let mut at = 12;
        while matches!(u16_at(frame, at), Some(0x8100 | 0x88a8)) {
            at += 4;
        }
        let version = match u16_at(frame, at) {
            Some(0x0800) => 4,
            Some(0x86dd) => 6,
            Some(0x0806) => return Frame { class: Class::Arp, addresses: None },
            _ => 0,
        };
        (version, frame.get(at + 2..).unwrap_or_default())
    } else {
        (frame.first().map_or(0, |byte| byte >> 4), frame)
    };
    let class = match version {
        4 => ipv4(packet),
        6 => ipv6(packet),
        _ => Class::Other,
    };
    let discovery = version == 6 && class == Class::Icmp && matches!(packet.get(40), Some(133..=137));
    Frame { class, addresses: addresses(version, packet).filter(|_| !discovery) }
}

fn addresses(version: u8, packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
    let v4 = |at: usize| Some(IpAddr::from(*packet.get(at..)?.first_chunk::<4>()?));
    let v6 = |at: usize| Some(IpAddr::from(*packet.get(at..)?.first_chunk::<16>()?));
    match version {
        4 => Some((v4(12)?, v4(16)?)),
        6 => Some((v6(8)?, v6(24)?)),
        _ => None,
    }
}

fn ipv4(packet: &[u8]) -> Class {
    let (Some(first), Some(protocol)) = (packet.first(), packet.get(9)) else { return Class::Other };
    let later_fragment = u16_at(packet, 6).is_none_or(|field| field & 0x1fff != 0);
    let header = usize::from(first & 0x0f) * 4;
    transport(*protocol, packet.get(header..).unwrap_or_default(), later_fragment)
}

fn ipv6(packet: &[u8]) -> Class {
    let Some(mut next) = packet.get(6).copied() else { return Class::Other };
    let mut rest = packet.get(40..).unwrap_or_default();
    let mut later_fragment = false;
    // Hop-by-hop, routing, destination options; fragment (RFC 8200 section 4).
    while matches!(next, 0 | 43 | 44 | 60) {
        let (Some(following), Some(length)) = (rest.first(), rest.get(1)) else { return Class::Other };
        let length = if next == 44 { 8 } else { (usize::from(*length) + 1) * 8 };
        later_fragment |= next == 44 && u16_at(rest, 2).is_none_or(|field| field & 0xfff8 != 0);
        next = *following;
        rest = rest.get(length..).unwrap_or_default();
    }
    transport(next, rest, later_fragment)
}

fn transport(protocol: u8, segment: &[u8], later_fragment: bool) -> Class {
    match protocol {
        1 | 58 => Class::Icmp,
        17 if !later_fragment => match (u16_at(segment, 0), u16_at(segment, 2)) {
            (Some(source), Some(destination)) => Class::Udp { source, destination },
            _ => Class::Other,
        },
        _ => Class::Other,
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classify(frame: &[u8], ethernet: bool) -> Class {
        read(frame, ethernet).class
    }

    fn ethernet(kind: u16, payload: &[u8]) -> Vec<u8> {
        [&[0; 12][..], &kind.to_be_bytes(), payload].concat()
    }

    fn ipv4_packet(protocol: u8, fragment: u16, segment: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 20];
        packet[0] = 0x45;
        packet[6..8].copy_from_slice(&fragment.to_be_bytes());
        packet[9] = protocol;
        packet.extend_from_slice(segment);
        packet
    }

    #[test]
    fn udp_ports_are_read_in_both_families_and_behind_a_vlan_tag() {
        let udp = [0xca, 0x6c, 0x12, 0xb5, 0, 8, 0, 0];
        let wanted = Class::Udp { source: 51820, destination: 4789 };
        let v4 = ipv4_packet(17, 0x4000, &udp);
        assert_eq!(classify(&ethernet(0x0800, &v4), true), wanted);
        assert_eq!(classify(&v4, false), wanted);
        let tagged = [&[0, 5, 8, 0][..], &v4].concat();
        assert_eq!(classify(&ethernet(0x8100, &tagged), true), wanted);
        let mut v6 = vec![0; 40];
        v6[0] = 0x60;
        v6[6] = 0; // hop-by-hop options first
        v6.extend([17, 0, 0, 0, 0, 0, 0, 0]);
        v6.extend(udp);
        assert_eq!(classify(&v6, false), wanted);
    }

    #[test]
    fn a_later_fragment_has_no_ports() {
        assert_eq!(classify(&ipv4_packet(17, 185, &[0xca, 0x6c, 0x12, 0xb5]), false), Class::Other);
    }

    #[test]
    fn arp_icmp_and_the_rest_are_told_apart() {
        assert_eq!(classify(&ethernet(0x0806, &[0; 28]), true), Class::Arp);
        assert_eq!(classify(&ethernet(0x0800, &ipv4_packet(1, 0, &[8, 0])), true), Class::Icmp);
        assert_eq!(classify(&ethernet(0x0800, &ipv4_packet(6, 0, &[0; 20])), true), Class::Other);
    }

    #[test]
    fn addresses_are_the_outermost_and_never_those_of_neighbour_discovery() {
        let mut v4 = ipv4_packet(17, 0, &[0; 8]);
        v4[12..20].copy_from_slice(&[10, 1, 0, 1, 10, 2, 0, 2]);
        let wanted = ("10.1.0.1".parse().unwrap(), "10.2.0.2".parse().unwrap());
        assert_eq!(read(&ethernet(0x0800, &v4), true).addresses, Some(wanted));
        assert_eq!(read(&ethernet(0x0806, &v4), true).addresses, None);
        let mut v6 = [0; 48];
        (v6[0], v6[6], v6[23], v6[40]) = (0x60, 58, 1, 128);
        assert_eq!(read(&v6, false).addresses, Some(("::1".parse().unwrap(), "::".parse().unwrap())));
        v6[40] = 135;
        assert_eq!(read(&v6, false).addresses, None);
        assert_eq!(read(&v6[..30], false).addresses, None);
    }

    #[test]
    fn truncated_frames_are_other() {
        let whole = ethernet(0x0800, &ipv4_packet(17, 0, &[1, 2, 3, 4]));
        for length in 0..whole.len() {
            assert_eq!(classify(&whole[..length], true), Class::Other, "{length}");
        }
    }
}
