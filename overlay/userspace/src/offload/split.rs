//! Super-packets from the TUN device taken apart in place.
//!
//! Segments are made in order, and each is encrypted into another buffer before the next one is made. So the header of
//! a segment is written over the end of the payload before it, and nothing else is copied.

use std::net::IpAddr;

use super::checksum::Sum;
use super::virtio::{GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, VirtioHeader};
use super::{
    CWR, FIN, IPV4_HEADER, IPV6_HEADER, PSH, TCP, TCP_CHECKSUM, TCP_HEADER, UDP, UDP_CHECKSUM, UDP_HEADER,
    put_word, word,
};
use crate::packet::{self, padded_length};

/// Bytes that a buffer needs behind the packet, for padding.
pub const TAIL: usize = 16;

// More than IPv4 and TCP with all options, or IPv6 with those extension headers that are in use, take.
const MOST_HEADERS: usize = 256;

/// Why a read of the TUN device is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// No IP packet.
    #[error("it is no IP packet")]
    NoPacket,
    /// The buffer has no room for padding behind the packet.
    #[error("its buffer has no room for padding")]
    NoTail,
    /// A kind of super-packet that was not asked for.
    #[error("it is a super-packet of kind {0}, which was not asked for")]
    Kind(u8),
    /// Header fields that do not fit the packet, or each other.
    #[error("its virtio header does not fit its content")]
    Header,
}

/// One read of the TUN device, to be taken apart.
pub struct Segments<'a> {
    buffer: &'a mut [u8],
    length: usize,
    destination: IpAddr,
    kind: Kind,
    // Of all segments.
    headers: usize,
    l4: usize,
    // Where the next payload begins, and how long it is unless it is the last.
    at: usize,
    size: usize,
    count: usize,
    made: usize,
    template: [u8; MOST_HEADERS],
    // What padding has overwritten: where, and with what to restore it.
    covered: (usize, usize, [u8; TAIL]),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Whole,
    Tcp,
    Udp,
}

/// One packet of a read, ready for encryption.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// The packet with its padding, which is zero.
    pub padded: &'a [u8],
    /// The packet's length in bytes.
    pub length: usize,
}

impl<'a> Segments<'a> {
    /// Looks at what was read: `length` bytes of IP packet behind the virtio header. `buffer` has [`TAIL`] bytes more.
    pub fn new(header: &VirtioHeader, buffer: &'a mut [u8], length: usize) -> Result<Self, Malformed> {
        let mut segments = Self::whole(buffer, length)?;
        let kind = match header.gso_type & !GSO_ECN {
            GSO_NONE => {
                if header.flags & NEEDS_CSUM != 0 {
                    segments.complete(header.csum_start.into(), header.csum_offset.into())?;
                }
                return Ok(segments);
            }
            GSO_TCPV4 | GSO_TCPV6 => Kind::Tcp,
            GSO_UDP_L4 => Kind::Udp,
            other => return Err(Malformed::Kind(other)),
        };
        let v4 = segments.is_v4();
        if (header.gso_type & !GSO_ECN == GSO_TCPV4) != v4 && kind == Kind::Tcp {
            return Err(Malformed::Header);
        }
        segments.l4 = l4_offset(header, &segments.buffer[..length], kind).ok_or(Malformed::Header)?;
        let l4_header = match kind {
            Kind::Tcp => {
                let offset = segments.buffer[..length].get(segments.l4 + 12).ok_or(Malformed::Header)?;
                usize::from(offset >> 4) * 4
            }
            _ => UDP_HEADER,
        };
        let least = if kind == Kind::Tcp { TCP_HEADER } else { UDP_HEADER };
        let headers = segments.l4 + l4_header;
        let size = usize::from(header.gso_size);
        if l4_header < least || headers > length || headers > MOST_HEADERS || size == 0 {
            return Err(Malformed::Header);
        }
        segments.template[..headers].copy_from_slice(&segments.buffer[..headers]);
        (segments.kind, segments.headers, segments.at, segments.size) = (kind, headers, headers, size);
        segments.count = (length - headers).div_ceil(size).max(1);
        Ok(segments)
    }

    /// A packet as it is: one segment, with nothing to complete. `buffer` has [`TAIL`] bytes more.
    pub fn whole(buffer: &'a mut [u8], length: usize) -> Result<Self, Malformed> {
        let header = buffer.get(..length).and_then(packet::parse).ok_or(Malformed::NoPacket)?;
        if buffer.len() < length + TAIL {
            return Err(Malformed::NoTail);
        }
        Ok(Self {
            buffer,
            length,
            destination: header.destination,
            kind: Kind::Whole,
            headers: 0,
            l4: 0,
            at: 0,
            size: length,
            count: 1,
            made: 0,
            template: [0; MOST_HEADERS],
            covered: (0, 0, [0; TAIL]),
        })
    }

    /// Where all of them go.
    pub fn destination(&self) -> IpAddr {
        self.destination
    }

    /// How many are still to come.
    pub fn remaining(&self) -> usize {
        self.count - self.made
    }

    /// The next packet, complete, padded for a link with this MTU ([`padded_length`]). The one before it is gone then.
    pub fn next(&mut self, mtu: usize) -> Option<Segment<'_>> {
        if self.made == self.count {
            return None;
        }
        let (at, length, bytes) = &self.covered;
        self.buffer[*at..at + length].copy_from_slice(&bytes[..*length]);
        let payload = self.size.min(self.length - self.at);
        let (start, end) = (self.at - self.headers, self.at + payload);
        if self.kind != Kind::Whole {
            if self.made > 0 {
                self.buffer[start..self.at].copy_from_slice(&self.template[..self.headers]);
            }
            self.finish(start, end);
        }
        self.made += 1;
        self.at = end;
        let length = end - start;
        let padding = padded_length(length, mtu) - length;
        let behind = &mut self.buffer[end..end + padding];
        self.covered.0 = end;
        self.covered.1 = padding;
        self.covered.2[..padding].copy_from_slice(behind);
        behind.fill(0);
        Some(Segment { padded: &self.buffer[start..end + padding], length })
    }

    // Fills in what differs from segment to segment.
    #[inline]
    fn finish(&mut self, start: usize, end: usize) {
        let (number, last) = (self.made, self.made + 1 == self.count);
        let v4 = self.is_v4();
        let l4 = self.l4;
        let sent = (number * self.size) as u32;
        let packet = &mut self.buffer[start..end];
        let length = packet.len();
        if v4 {
            put_word(packet, 2, length as u16);
            let id = word(packet, 4).wrapping_add(number as u16);
            put_word(packet, 4, id);
            put_word(packet, 10, 0);
            let checksum = Sum::default().few(&packet[..l4]).checksum();
            packet[10..12].copy_from_slice(&checksum);
        } else {
            put_word(packet, 4, (length - IPV6_HEADER) as u16);
        }
        let (protocol, field) = match self.kind {
            Kind::Udp => {
                put_word(packet, l4 + 4, (length - l4) as u16);
                (UDP, l4 + UDP_CHECKSUM)
            }
            _ => {
                let sequence =
                    u32::from_be_bytes([packet[l4 + 4], packet[l4 + 5], packet[l4 + 6], packet[l4 + 7]]);
                packet[l4 + 4..l4 + 8].copy_from_slice(&sequence.wrapping_add(sent).to_be_bytes());
                if !last {
                    packet[l4 + 13] &= !(FIN | PSH);
                }
                if number > 0 {
                    packet[l4 + 13] &= !CWR;
                }
                (TCP, l4 + TCP_CHECKSUM)
            }
        };
        put_word(packet, field, 0);
        let addresses = if v4 { 12..20 } else { 8..40 };
        let sum = Sum::default().pseudo(&packet[addresses], protocol, length - l4).bytes(&packet[l4..]);
        let mut checksum = sum.checksum();
        if self.kind == Kind::Udp && checksum == [0, 0] {
            checksum = [0xff, 0xff];
        }
        packet[field..field + 2].copy_from_slice(&checksum);
    }

    // Completes a checksum whose field holds the sum of the pseudo header.
    fn complete(&mut self, start: usize, offset: usize) -> Result<(), Malformed> {
        let field = start + offset;
        if start < IPV4_HEADER || field + 2 > self.length {
            return Err(Malformed::Header);
        }
        let mut checksum = Sum::default().bytes(&self.buffer[start..self.length]).checksum();
        // In UDP zero means that there is none (RFC 768); the other zero does as well elsewhere.
        if offset == UDP_CHECKSUM && checksum == [0, 0] {
            checksum = [0xff, 0xff];
        }
        self.buffer[field..field + 2].copy_from_slice(&checksum);
        Ok(())
    }

    fn is_v4(&self) -> bool {
        self.destination.is_ipv4()
    }
}

// Where TCP or UDP begins: where the kernel says so, which has to agree with what the IP header says.
fn l4_offset(header: &VirtioHeader, packet: &[u8], kind: Kind) -> Option<usize> {
    let protocol = if kind == Kind::Tcp { TCP } else { UDP };
    let claimed = (header.flags & NEEDS_CSUM != 0).then(|| usize::from(header.csum_start));
    let found = if packet[0] >> 4 == 4 {
        let offset = usize::from(packet[0] & 15) * 4;
        (packet[9] == protocol).then_some(offset)?
    } else if packet[6] == protocol {
        IPV6_HEADER
    } else {
        // Behind extension headers, of which the kernel knows more.
        claimed.filter(|offset| *offset > IPV6_HEADER)?
    };
    claimed.is_none_or(|offset| offset == found).then_some(found)
}
