//! The few fields of an inner IP packet that a WireGuard device looks at.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The WireGuard plaintext padding unit in bytes (WireGuard paper, section 5.4.6).
const PADDING: usize = 16;

/// Where an IP packet comes from, goes to, and ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Length in bytes that the IP header claims; never more than the bytes given to [`parse`].
    pub length: usize,
}

/// Reads the IP header at the start of `packet`, which may be followed by padding.
///
/// `None` when it is neither IPv4 nor IPv6, is truncated, or states a length that cannot be right.
pub fn parse(packet: &[u8]) -> Option<Header> {
    match packet.first()? >> 4 {
        4 => {
            let header: &[u8; 20] = packet.first_chunk()?;
            let header_length = usize::from(header[0] & 15) * 4;
            let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
            if header_length < 20 || length < header_length || length > packet.len() {
                return None;
            }
            Some(Header {
                source: Ipv4Addr::new(header[12], header[13], header[14], header[15]).into(),
                destination: Ipv4Addr::new(header[16], header[17], header[18], header[19]).into(),
                length,
            })
        }
        6 => {
            let header: &[u8; 40] = packet.first_chunk()?;
            let length = 40 + usize::from(u16::from_be_bytes([header[4], header[5]]));
            if length > packet.len() {
                return None;
            }
            Some(Header { source: v6(header, 8).into(), destination: v6(header, 24).into(), length })
        }
        _ => None,
    }
}

/// The length to which a plaintext of `length` bytes is padded: a multiple of 16, but never beyond the link's
/// MTU so that padding alone cannot make a packet too big for the path. `mtu` 0 means unknown.
pub fn padded_length(length: usize, mtu: usize) -> usize {
    let aligned = length.next_multiple_of(PADDING);
    if mtu == 0 { aligned } else { aligned.min(mtu.max(length)) }
}

fn v6(header: &[u8; 40], at: usize) -> Ipv6Addr {
    let mut octets = [0u8; 16];
    octets.copy_from_slice(&header[at..at + 16]);
    Ipv6Addr::from(octets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn v4(ihl: u8, total: u16, bytes: usize) -> Vec<u8> {
        let mut packet = vec![0u8; bytes];
        packet[0] = 0x40 | ihl;
        packet[2..4].copy_from_slice(&total.to_be_bytes());
        packet[12..16].copy_from_slice(&[10, 0, 0, 1]);
        packet[16..20].copy_from_slice(&[10, 0, 0, 2]);
        packet
    }

    #[test]
    fn padding_after_the_packet_is_not_part_of_it() {
        let header = parse(&v4(5, 30, 48)).unwrap();
        assert_eq!(header.length, 30);
        assert_eq!(header.source, IpAddr::from([10, 0, 0, 1]));
        assert_eq!(header.destination, IpAddr::from([10, 0, 0, 2]));
    }

    #[test]
    fn impossible_lengths_are_refused() {
        assert_eq!(parse(&v4(5, 49, 48)), None, "longer than the bytes");
        assert_eq!(parse(&v4(5, 19, 48)), None, "shorter than a header");
        assert_eq!(parse(&v4(5, 0, 48)), None);
        assert_eq!(parse(&v4(4, 48, 48)), None, "header length below the minimum");
        assert_eq!(parse(&v4(15, 48, 48)), None, "header longer than the packet");
        assert_eq!(parse(&v4(5, 20, 20)[..19]), None);
        assert_eq!(parse(&[0x60; 39]), None);
        assert_eq!(parse(&[]), None);
        assert_eq!(parse(&[0x50; 60]), None);
    }

    #[test]
    fn padding_stops_at_the_mtu() {
        assert_eq!(padded_length(1419, 1420), 1420);
        assert_eq!(padded_length(1420, 1420), 1420);
        assert_eq!(padded_length(1400, 1420), 1408);
        assert_eq!(padded_length(0, 1420), 0);
        assert_eq!(padded_length(1, 0), 16);
        assert_eq!(padded_length(1500, 1420), 1500, "a packet above the MTU is never cut");
    }

    proptest! {
        #[test]
        fn any_bytes_parse_without_panic_and_within_bounds(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(header) = parse(&bytes) {
                prop_assert!(header.length <= bytes.len());
                prop_assert!(header.length >= 20);
            }
        }

        #[test]
        fn padding_never_shrinks_nor_adds_more_than_fifteen(length in 0usize..70_000, mtu in 0usize..70_000) {
            let padded = padded_length(length, mtu);
            prop_assert!(padded >= length && padded < length + 16);
        }
    }
}
