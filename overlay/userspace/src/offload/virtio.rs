//! The header before each packet of a TUN device with `IFF_VNET_HDR`: `struct virtio_net_hdr` (linux/virtio_net.h),
//! in the byte order of the machine.

/// Its length in bytes.
pub const VIRTIO_HEADER: usize = 10;

/// The L4 checksum is to be completed: its field holds the sum of the pseudo header.
pub const NEEDS_CSUM: u8 = 1;

/// An ordinary packet.
pub const GSO_NONE: u8 = 0;
/// A TCP super-packet over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// A TCP super-packet over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// Several UDP datagrams as one.
pub const GSO_UDP_L4: u8 = 5;
/// Added to a TCP type: the super-packet has the CWR flag, which is the first segment's.
pub const GSO_ECN: u8 = 0x80;

/// What the kernel says of a packet, or is told. Nothing in it can be relied upon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VirtioHeader {
    /// [`NEEDS_CSUM`] and others.
    pub flags: u8,
    /// [`GSO_NONE`] or what kind of super-packet this is.
    pub gso_type: u8,
    /// Bytes of headers that each segment has; a hint.
    pub hdr_len: u16,
    /// Bytes of payload that each segment has, but for the last.
    pub gso_size: u16,
    /// Where checksumming starts: at the L4 header.
    pub csum_start: u16,
    /// Where, from there, the checksum is.
    pub csum_offset: u16,
}

impl VirtioHeader {
    /// Reads a header; what is too short is an ordinary packet's.
    #[inline]
    pub fn parse(bytes: &[u8]) -> Self {
        let Some(bytes) = bytes.first_chunk::<VIRTIO_HEADER>() else { return Self::default() };
        let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        }
    }

    /// Writes the header.
    #[inline]
    pub fn render(&self) -> [u8; VIRTIO_HEADER] {
        let mut bytes = [0; VIRTIO_HEADER];
        (bytes[0], bytes[1]) = (self.flags, self.gso_type);
        for (at, word) in [(2, self.hdr_len), (4, self.gso_size), (6, self.csum_start), (8, self.csum_offset)]
        {
            bytes[at..at + 2].copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let header = VirtioHeader {
            flags: NEEDS_CSUM,
            gso_type: GSO_TCPV4 | GSO_ECN,
            hdr_len: 52,
            gso_size: 1368,
            csum_start: 20,
            csum_offset: 16,
        };
        assert_eq!(VirtioHeader::parse(&header.render()), header);
        assert_eq!(VirtioHeader::parse(&header.render()[..9]), VirtioHeader::default());
    }
}
