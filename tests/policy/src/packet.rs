//! IP packets, built and read byte by byte.

use std::net::IpAddr;

/// What a packet is about. The number travels with it, so that packets can be told apart on the way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Where it comes from.
    pub source: IpAddr,
    /// Where it goes.
    pub destination: IpAddr,
    /// Its protocol.
    pub protocol: u8,
    /// The source's port, or the identifier of an echo.
    pub source_port: u16,
    /// The destination's port.
    pub destination_port: u16,
    /// TCP's flags.
    pub flags: u8,
    /// Tells it apart.
    pub number: u32,
    /// ICMP's type and code.
    pub icmp: (u8, u8),
}

/// TCP: opens a connection.
pub const SYN: u8 = 0x02;
/// TCP: the answer to that.
pub const SYN_ACK: u8 = 0x12;
/// TCP: everything after.
pub const ACK: u8 = 0x10;
/// TCP: with payload.
pub const PSH_ACK: u8 = 0x18;

/// Octets of payload behind a UDP or TCP header.
const PAYLOAD: usize = 8;

impl Packet {
    /// The first packet of a flow.
    pub fn first(source: IpAddr, destination: IpAddr, protocol: u8, port: u16, number: u32) -> Self {
        let icmp = if protocol == 58 { (128, 0) } else { (8, 0) };
        Self {
            source,
            destination,
            protocol,
            source_port: 40_000,
            destination_port: port,
            flags: SYN,
            number,
            icmp,
        }
    }

    /// An answer to it.
    pub fn answer(&self, number: u32) -> Self {
        let icmp = match self.icmp {
            (8, code) => (0, code),
            (128, code) => (129, code),
            other => other,
        };
        // Both ways an echo has one identifier.
        let echo = matches!(self.protocol, 1 | 58);
        Self {
            source: self.destination,
            destination: self.source,
            source_port: if echo { self.source_port } else { self.destination_port },
            destination_port: if echo { self.destination_port } else { self.source_port },
            flags: SYN_ACK,
            number,
            icmp,
            ..*self
        }
    }

    /// The same again, with other TCP flags.
    pub fn again(&self, flags: u8, number: u32) -> Self {
        Self { flags, number, ..*self }
    }

    /// The octets behind the IP header, checksum included.
    pub fn transport(&self) -> Vec<u8> {
        let [source, destination] = [self.source_port, self.destination_port].map(u16::to_be_bytes);
        let number = self.number.to_be_bytes();
        let mut out = Vec::new();
        let at = match self.protocol {
            6 => {
                out.extend([source, destination].concat());
                // The number is in the payload: conntrack judges sequence numbers.
                out.extend(1_u32.to_be_bytes());
                out.extend(if self.flags & 0x10 == 0 { 0_u32 } else { 2 }.to_be_bytes());
                out.extend([5 << 4, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
                out.extend(number.repeat(PAYLOAD / 4));
                16
            }
            17 => {
                out.extend([source, destination, (8 + PAYLOAD as u16).to_be_bytes(), [0, 0]].concat());
                out.extend(number.repeat(PAYLOAD / 4));
                6
            }
            132 => return self.sctp(),
            1 | 58 => {
                out.extend([self.icmp.0, self.icmp.1, 0, 0]);
                out.extend(self.source_port.to_be_bytes());
                out.extend([0, 1]);
                out.extend(number.repeat(PAYLOAD / 4));
                2
            }
            _ => {
                out.extend(number.repeat(PAYLOAD / 4));
                return out;
            }
        };
        let sum = match self.protocol {
            1 => checksum(&out, 0),
            protocol => checksum(&out, self.pseudo_header(protocol, out.len())),
        };
        out[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        out
    }

    /// SCTP's INIT, or its answer (RFC 9260).
    fn sctp(&self) -> Vec<u8> {
        let answers = self.flags == SYN_ACK;
        let mut out = [self.source_port, self.destination_port].map(u16::to_be_bytes).concat();
        // An INIT has no verification tag; its answer has the INIT's.
        let tag: u32 = if answers { 1 } else { 0 };
        out.extend(tag.to_be_bytes());
        out.extend([0; 4]);
        out.extend([if answers { 2 } else { 1 }, 0, 0, 28]);
        out.extend(1_u32.to_be_bytes());
        out.extend(65_535_u32.to_be_bytes());
        out.extend([0, 1, 0, 1]);
        // The initial TSN is what tells it apart.
        out.extend(self.number.to_be_bytes());
        // An unknown parameter that is passed over, so that there are no less octets than a chunk needs.
        out.extend([0xc0, 0x00, 0, 8, 0, 0, 0, 0]);
        let sum = crc32c(&out).to_le_bytes();
        out[8..12].copy_from_slice(&sum);
        out
    }

    fn pseudo_header(&self, protocol: u8, length: usize) -> u32 {
        let octets = |address: IpAddr| match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        let addresses = [octets(self.source), octets(self.destination)].concat();
        sum(&addresses) + u32::from(protocol) + length as u32
    }

    /// The whole packet.
    pub fn octets(&self) -> Vec<u8> {
        self.with_payload(self.protocol, &self.transport(), 0)
    }

    /// As [`Packet::octets`], with extension headers before the transport (IPv6): hop-by-hop options, destination options.
    pub fn with_extension_headers(&self) -> Vec<u8> {
        // Each of eight octets: next header, length, PadN.
        let mut payload = vec![60, 0, 1, 4, 0, 0, 0, 0];
        payload.extend([self.protocol, 0, 1, 4, 0, 0, 0, 0]);
        payload.extend(self.transport());
        self.with_payload(0, &payload, 0)
    }

    /// In two fragments.
    pub fn fragments(&self) -> [Vec<u8>; 2] {
        let transport = self.transport();
        // Ports are in the first, what is behind eight octets in the second.
        let (first, second) = transport.split_at(8);
        match self.source {
            IpAddr::V4(_) => {
                [self.with_payload(self.protocol, first, 0x2000), self.with_payload(self.protocol, second, 1)]
            }
            IpAddr::V6(_) => [(first, 0_u16, 1_u16), (second, 1, 0)].map(|(part, offset, more)| {
                let mut payload = vec![self.protocol, 0];
                payload.extend((offset << 3 | more).to_be_bytes());
                payload.extend(self.number.to_be_bytes());
                payload.extend(part);
                self.with_payload(44, &payload, 0)
            }),
        }
    }

    fn with_payload(&self, protocol: u8, payload: &[u8], fragment: u16) -> Vec<u8> {
        let mut out = Vec::with_capacity(40 + payload.len());
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                out.extend([0x45, 0]);
                out.extend((20 + payload.len() as u16).to_be_bytes());
                out.extend((self.number as u16).to_be_bytes());
                out.extend(fragment.to_be_bytes());
                out.extend([64, protocol, 0, 0]);
                out.extend(source.octets());
                out.extend(destination.octets());
                let sum = checksum(&out, 0).to_be_bytes();
                out[10..12].copy_from_slice(&sum);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                out.extend([0x60, 0, 0, 0]);
                out.extend((payload.len() as u16).to_be_bytes());
                out.extend([protocol, 64]);
                out.extend(source.octets());
                out.extend(destination.octets());
            }
            _ => panic!("{self:?}: two families"),
        }
        out.extend(payload);
        out
    }
}

/// The number of a packet of ours, if it is one.
pub fn number(packet: &[u8]) -> Option<u32> {
    let (mut protocol, mut at) = match packet.first()? >> 4 {
        4 => (*packet.get(9)?, usize::from(packet[0] & 15) * 4),
        6 => (*packet.get(6)?, 40),
        _ => return None,
    };
    let mut later_fragment = packet[0] >> 4 == 4 && packet.get(6..8)? != [0x20, 0] && packet[7] != 0;
    loop {
        let skip = match protocol {
            0 | 60 => usize::from(*packet.get(at + 1)?) * 8 + 8,
            44 => {
                later_fragment |= u16::from_be_bytes([*packet.get(at + 2)?, *packet.get(at + 3)?]) >> 3 > 0;
                8
            }
            _ => break,
        };
        (protocol, at) = (*packet.get(at)?, at + skip);
    }
    // Ours are cut where what tells them apart begins.
    if later_fragment {
        protocol = 253;
    }
    let at = at
        + match protocol {
            6 => 20,
            1 | 17 | 58 => 8,
            132 => 12 + 16,
            _ => 0,
        };
    Some(u32::from_be_bytes(packet.get(at..at + 4)?.try_into().ok()?))
}

fn sum(octets: &[u8]) -> u32 {
    octets.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]))).sum()
}

/// The Internet checksum (RFC 1071).
fn checksum(octets: &[u8], start: u32) -> u16 {
    let mut total = start + sum(octets);
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    !(total as u16)
}

/// CRC-32C, as SCTP has it (RFC 9260, appendix A).
fn crc32c(octets: &[u8]) -> u32 {
    !octets.iter().fold(u32::MAX, |crc, octet| {
        (0..8).fold(
            crc ^ u32::from(*octet),
            |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 },
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_is_read_back() {
        for (source, destination) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
            let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
            for protocol in [6, 17, 132, 1, 58, 47] {
                let packet = Packet::first(source, destination, protocol, 80, 0xdead_beef);
                assert_eq!(number(&packet.octets()), Some(0xdead_beef), "{protocol}");
                assert_eq!(number(&packet.answer(7).octets()), Some(7));
            }
        }
        let packet = Packet::first("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap(), 6, 80, 9);
        assert_eq!(number(&packet.with_extension_headers()), Some(9));
        for source in ["10.0.0.1", "fd00::1"] {
            let source = source.parse().unwrap();
            let packet = Packet::first(source, source, 17, 80, 0x0102_0304);
            assert_eq!(number(&packet.fragments()[1]), Some(0x0102_0304), "{source}");
        }
    }

    #[test]
    fn checksums_are_those_of_the_standards() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7], 0), !0xddf2);
    }
}
