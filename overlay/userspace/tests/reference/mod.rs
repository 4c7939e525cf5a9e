//! Segmentation as the RFCs have it: slow, obvious, on vectors of bytes. For tests and fuzz targets.
#![allow(dead_code, unreachable_pub)]

use mesh_wg::offload::virtio::{
    GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, VIRTIO_HEADER, VirtioHeader,
};

/// RFC 1071, word by word, over a pseudo header and what it covers.
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn pseudo(packet: &[u8], l4: usize, protocol: u8) -> Vec<u8> {
    let addresses = if packet[0] >> 4 == 4 { &packet[12..20] } else { &packet[8..40] };
    let length = (packet.len() - l4) as u32;
    [addresses, &length.to_be_bytes(), &[0, 0, 0, protocol]].concat()
}

/// Puts right the lengths and checksums of a packet whose TCP (6) or UDP (17) header is at `l4`.
pub fn complete(packet: &mut [u8], l4: usize, protocol: u8) {
    let length = packet.len();
    if packet[0] >> 4 == 4 {
        packet[2..4].copy_from_slice(&(length as u16).to_be_bytes());
        packet[10..12].fill(0);
        let sum = checksum(&[&packet[..l4]]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        packet[4..6].copy_from_slice(&((length - 40) as u16).to_be_bytes());
    }
    let field = if protocol == 6 { l4 + 16 } else { l4 + 6 };
    if protocol == 17 {
        packet[l4 + 4..l4 + 6].copy_from_slice(&((length - l4) as u16).to_be_bytes());
    }
    packet[field..field + 2].fill(0);
    let mut sum = checksum(&[&pseudo(packet, l4, protocol), &packet[l4..]]);
    if protocol == 17 && sum == 0 {
        sum = 0xffff;
    }
    packet[field..field + 2].copy_from_slice(&sum.to_be_bytes());
}

/// The packets that a well-formed super-packet stands for.
pub fn split(header: &VirtioHeader, packet: &[u8]) -> Vec<Vec<u8>> {
    let kind = header.gso_type & !GSO_ECN;
    if kind == GSO_NONE {
        let mut packet = packet.to_vec();
        if header.flags & NEEDS_CSUM != 0 {
            let (start, offset) = (usize::from(header.csum_start), usize::from(header.csum_offset));
            let mut sum = checksum(&[&packet[start..]]);
            if offset == 6 && sum == 0 {
                sum = 0xffff;
            }
            packet[start + offset..start + offset + 2].copy_from_slice(&sum.to_be_bytes());
        }
        return vec![packet];
    }
    assert!([GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4].contains(&kind));
    let v4 = packet[0] >> 4 == 4;
    let l4 = if header.flags & NEEDS_CSUM != 0 {
        usize::from(header.csum_start)
    } else if v4 {
        usize::from(packet[0] & 15) * 4
    } else {
        40
    };
    let protocol = if kind == GSO_UDP_L4 { 17 } else { 6 };
    let headers = l4 + if protocol == 17 { 8 } else { usize::from(packet[l4 + 12] >> 4) * 4 };
    let payload = &packet[headers..];
    let mut chunks: Vec<&[u8]> = payload.chunks(header.gso_size.into()).collect();
    if chunks.is_empty() {
        chunks.push(&[]);
    }
    let count = chunks.len();
    let mut sent = 0u32;
    let mut segments = Vec::new();
    for (i, chunk) in chunks.into_iter().enumerate() {
        let mut segment = [&packet[..headers], chunk].concat();
        if v4 {
            let id = u16::from_be_bytes([segment[4], segment[5]]).wrapping_add(i as u16);
            segment[4..6].copy_from_slice(&id.to_be_bytes());
        }
        if protocol == 6 {
            let sequence = u32::from_be_bytes(segment[l4 + 4..l4 + 8].try_into().unwrap_or_default());
            segment[l4 + 4..l4 + 8].copy_from_slice(&sequence.wrapping_add(sent).to_be_bytes());
            if i + 1 < count {
                segment[l4 + 13] &= !0x09;
            }
            if i > 0 {
                segment[l4 + 13] &= !0x80;
            }
        }
        complete(&mut segment, l4, protocol);
        sent = sent.wrapping_add(chunk.len() as u32);
        segments.push(segment);
    }
    segments
}

/// The packets that a write to the TUN device stands for.
pub fn written(write: &[u8]) -> Vec<Vec<u8>> {
    split(&VirtioHeader::parse(write), &write[VIRTIO_HEADER..])
}

/// A packet as a receiver sees it that does not care for the identification of what cannot be fragmented.
pub fn seen(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet.len() >= 20 && packet[0] == 0x45 && packet[6] & 0x40 != 0 {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    packet
}

/// What tells packets of one conversation apart.
#[derive(Clone, Debug)]
pub struct Flow {
    pub v4: bool,
    pub tcp: bool,
    pub port: u16,
    /// Bytes of TCP options, a multiple of 4.
    pub options: usize,
    pub sequence: u32,
    pub id: u16,
    pub flags: u8,
    pub window: u16,
    pub df: bool,
}

impl Flow {
    pub fn l4(&self) -> usize {
        if self.v4 { 20 } else { 40 }
    }

    pub fn protocol(&self) -> u8 {
        if self.tcp { 6 } else { 17 }
    }

    pub fn headers(&self) -> usize {
        self.l4() + if self.tcp { 20 + self.options } else { 8 }
    }

    /// The flow's next packet, complete.
    pub fn packet(&mut self, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0u8; self.headers()];
        if self.v4 {
            packet[0] = 0x45;
            packet[4..6].copy_from_slice(&self.id.to_be_bytes());
            packet[6] = if self.df { 0x40 } else { 0 };
            (packet[8], packet[9]) = (64, self.protocol());
            packet[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        } else {
            packet[0] = 0x60;
            (packet[6], packet[7]) = (self.protocol(), 64);
            (packet[8], packet[23], packet[24], packet[39]) = (0xfd, 1, 0xfd, 2);
        }
        let l4 = self.l4();
        packet[l4..l4 + 2].copy_from_slice(&self.port.to_be_bytes());
        packet[l4 + 2..l4 + 4].copy_from_slice(&443u16.to_be_bytes());
        if self.tcp {
            packet[l4 + 4..l4 + 8].copy_from_slice(&self.sequence.to_be_bytes());
            packet[l4 + 12] = ((5 + self.options / 4) << 4) as u8;
            packet[l4 + 13] = self.flags;
            packet[l4 + 14..l4 + 16].copy_from_slice(&self.window.to_be_bytes());
            packet[l4 + 20..].fill(1);
        }
        packet.extend_from_slice(payload);
        complete(&mut packet, l4, self.protocol());
        self.sequence = self.sequence.wrapping_add(payload.len() as u32);
        self.id = self.id.wrapping_add(1);
        packet
    }

    /// The virtio header of a super-packet of this flow.
    pub fn virtio(&self, gso_size: u16) -> VirtioHeader {
        VirtioHeader {
            flags: NEEDS_CSUM,
            gso_type: match (self.tcp, self.v4) {
                (true, true) => GSO_TCPV4,
                (true, false) => GSO_TCPV6,
                (false, _) => GSO_UDP_L4,
            },
            hdr_len: self.headers() as u16,
            gso_size,
            csum_start: self.l4() as u16,
            csum_offset: if self.tcp { 16 } else { 6 },
        }
    }
}
