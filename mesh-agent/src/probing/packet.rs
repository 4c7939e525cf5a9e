//! UDP datagrams in IP packets, made and read by hand: probes share the port of a device that is not ours. Pure.

use std::net::{IpAddr, SocketAddr};

const UDP: u8 = 17;
const UDP_HEADER: usize = 8;
const V4_HEADER: usize = 20;
#[cfg(test)]
const V6_HEADER: usize = 40;
/// Don't Fragment (RFC 791): what is too large is to be lost, or its size would tell nothing.
const DF: u16 = 0x4000;

/// A packet from our `port`; `None` when the two addresses are not of one family, or the payload is too long.
pub(super) fn build(
    from: IpAddr,
    port: u16,
    to: SocketAddr,
    hop_limit: u8,
    payload: &[u8],
) -> Option<Vec<u8>> {
    let udp_length = u16::try_from(UDP_HEADER + payload.len()).ok()?;
    let mut packet = match (from, to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let total = u16::try_from(V4_HEADER).ok()?.checked_add(udp_length)?;
            let mut header = vec![0x45, 0];
            header.extend(total.to_be_bytes());
            // The kernel fills in identification and checksum.
            header.extend([0, 0]);
            header.extend(DF.to_be_bytes());
            header.extend([hop_limit, UDP, 0, 0]);
            header.extend(from.octets());
            header.extend(to.octets());
            header
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let mut header = vec![0x60, 0, 0, 0];
            header.extend(udp_length.to_be_bytes());
            header.extend([UDP, hop_limit]);
            header.extend(from.octets());
            header.extend(to.octets());
            header
        }
        _ => return None,
    };
    let addresses = if packet[0] == 0x45 { 12 } else { 8 };
    let mut sum = Sum::default();
    sum.add(&packet[addresses..]);
    sum.add(&[0, UDP]);
    sum.add(&udp_length.to_be_bytes());
    let begin = packet.len();
    packet.extend(port.to_be_bytes());
    packet.extend(to.port().to_be_bytes());
    packet.extend(udp_length.to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(payload);
    sum.add(&packet[begin..]);
    packet[begin + 6..begin + 8].copy_from_slice(&sum.finish().to_be_bytes());
    Some(packet)
}

/// The Internet checksum (RFC 1071).
#[derive(Default)]
struct Sum(u32);

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        for pair in bytes.chunks(2) {
            self.0 += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
            self.0 = (self.0 & 0xffff) + (self.0 >> 16);
        }
    }

    fn finish(self) -> u16 {
        // Zero says that there is none (RFC 768).
        match !(self.0 as u16) {
            0 => u16::MAX,
            sum => sum,
        }
    }
}

/// What an IPv4 raw socket hands out, with the IP header: the sender and where the payload lies.
pub(super) fn read_v4(packet: &[u8]) -> Option<(SocketAddr, std::ops::Range<usize>)> {
    let length = usize::from(*packet.first()? & 15) * 4;
    let from: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
    if length < V4_HEADER || *packet.get(9)? != UDP {
        return None;
    }
    read_udp(packet, length, IpAddr::from(from))
}

/// Where an IPv4 packet was sent to.
pub(super) fn destination_v4(packet: &[u8]) -> Option<IpAddr> {
    let to: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
    Some(IpAddr::from(to))
}

/// What an IPv6 raw socket hands out, without the IP header.
pub(super) fn read_v6(datagram: &[u8], from: IpAddr) -> Option<(SocketAddr, std::ops::Range<usize>)> {
    read_udp(datagram, 0, from)
}

fn read_udp(packet: &[u8], at: usize, from: IpAddr) -> Option<(SocketAddr, std::ops::Range<usize>)> {
    let port = u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?);
    let length = usize::from(u16::from_be_bytes(packet.get(at + 4..at + 6)?.try_into().ok()?));
    let payload = at + UDP_HEADER..at + length;
    (length >= UDP_HEADER && packet.len() >= payload.end).then_some((SocketAddr::new(from, port), payload))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_is_read_and_its_checksum_is_right() {
        for (from, to) in [("192.0.2.1", "192.0.2.2:7"), ("2001:db8::1", "[2001:db8::2]:7")] {
            let (from, to): (IpAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
            for length in [0, 1, 2, 99, 1400] {
                let payload: Vec<u8> = (0..length).map(|n| n as u8).collect();
                let packet = build(from, 51820, to, 65, &payload).unwrap();
                let header = if from.is_ipv4() { V4_HEADER } else { V6_HEADER };
                let read = if from.is_ipv4() { read_v4(&packet) } else { read_v6(&packet[header..], from) };
                let (sender, range) = read.unwrap();
                assert_eq!(sender, SocketAddr::new(from, 51820));
                assert!(from.is_ipv6() || destination_v4(&packet) == Some(to.ip()));
                let offset = if from.is_ipv4() { 0 } else { header };
                assert_eq!(packet[range.start + offset..range.end + offset], payload);
                // Summed with its checksum it gives all ones.
                let mut sum = Sum::default();
                sum.add(&packet[if from.is_ipv4() { 12 } else { 8 }..header]);
                sum.add(&[0, UDP]);
                sum.add(&((UDP_HEADER + payload.len()) as u16).to_be_bytes());
                sum.add(&packet[header..]);
                assert_eq!(sum.0, 0xffff);
            }
        }
        assert_eq!(build([192, 0, 2, 1].into(), 1, "[::1]:7".parse().unwrap(), 65, b""), None);
    }

    #[test]
    fn what_is_cut_off_or_lies_about_its_length_is_not_read() {
        let packet = build([192, 0, 2, 1].into(), 1, "192.0.2.2:7".parse().unwrap(), 65, b"probe").unwrap();
        for length in 0..packet.len() {
            assert_eq!(read_v4(&packet[..length]), None, "{length}");
        }
        let mut lying = packet.clone();
        lying[25] = 3;
        assert_eq!(read_v4(&lying), None);
        lying = packet;
        lying[0] = 0x4f;
        assert_eq!(read_v4(&lying), None);
    }
}
