//! Packets out of the tunnel put together, so that one write hands many to the kernel.
//!
//! One super-packet is being built at a time: what comes out of a tunnel in bulk comes in runs of one flow. While it
//! is open, the next packet is decrypted to where its headers cover the end of the super-packet and its payload lies
//! right behind it; the bytes underneath are kept aside and put back. So a packet that joins is never copied, and one
//! that does not is, once.

use std::collections::VecDeque;

use super::checksum::Sum;
use super::virtio::{GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, VIRTIO_HEADER, VirtioHeader};
use super::{
    ACK, IPV4_HEADER, IPV6_HEADER, PSH, TCP, TCP_CHECKSUM, TCP_HEADER, UDP, UDP_CHECKSUM, UDP_HEADER,
    put_word, word,
};

// IPv6 and TCP with all options.
const MOST_HEADERS: usize = 100;
const LARGEST_PACKET: usize = 65_535;
// What the kernel takes in one UDP super-packet (UDP_MAX_SEGMENTS, include/linux/udp.h).
const MOST_DATAGRAMS: usize = 64;
const DF: u8 = 0x40;

/// What the TUN device takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Bare packets.
    Plain,
    /// Packets and TCP super-packets behind virtio headers.
    Virtio {
        /// UDP super-packets too.
        udp: bool,
    },
}

/// Gathers packets in a buffer allocated once.
pub struct Merger {
    mode: Mode,
    prefix: usize,
    arena: Box<[u8]>,
    // Behind all that is finished or open.
    end: usize,
    finished: VecDeque<(usize, usize)>,
    open: Option<Open>,
    // Where the space begins that has been handed out, and what it covers of the open super-packet.
    space: Option<usize>,
    covered: [u8; MOST_HEADERS],
}

// A super-packet being built.
#[derive(Clone, Copy)]
struct Open {
    // Of the packet; its virtio header lies before it.
    start: usize,
    layout: Layout,
    count: usize,
    // The checksums of the first packet are looked at when a second one wants to join.
    verified: bool,
    // What the next one has to begin with.
    sequence: u32,
    pushed: bool,
}

// A packet of a kind that can be put together.
#[derive(Clone, Copy)]
struct Layout {
    tcp: bool,
    l4: usize,
    headers: usize,
    payload: usize,
}

impl Merger {
    /// A merger with a buffer of `capacity` bytes.
    pub fn new(mode: Mode, capacity: usize) -> Self {
        Self {
            mode,
            prefix: if mode == Mode::Plain { 0 } else { VIRTIO_HEADER },
            arena: vec![0; capacity].into(),
            end: 0,
            finished: VecDeque::with_capacity(1024),
            open: None,
            space: None,
            covered: [0; MOST_HEADERS],
        }
    }

    /// Whether a packet space of `length` bytes fits. If not, close and take all; then it is empty again.
    pub fn has_room(&self, length: usize) -> bool {
        self.end + self.prefix + length <= self.arena.len()
    }

    /// `length` bytes for the next packet, or fewer if there is no room. Until [`Merger::done`], asking again gives
    /// the same bytes with their content.
    #[inline]
    pub fn space(&mut self, length: usize) -> &mut [u8] {
        let start = match (self.space, &self.open) {
            (Some(start), _) => start,
            (None, Some(open)) => {
                let headers = open.layout.headers;
                let start = self.end - headers;
                self.covered[..headers].copy_from_slice(&self.arena[start..self.end]);
                start
            }
            (None, None) => {
                if self.finished.is_empty() {
                    self.end = 0;
                }
                (self.end + self.prefix).min(self.arena.len())
            }
        };
        self.space = Some(start);
        let end = (start + length).min(self.arena.len());
        &mut self.arena[start..end]
    }

    /// The first `length` bytes of the space are a whole IP packet.
    #[inline]
    pub fn done(&mut self, length: usize) {
        let Some(start) = self.space.take() else { return };
        let length = length.min(self.arena.len() - start);
        let layout = self.layout(start, length);
        let mut at = start;
        if let Some(open) = self.open {
            if let Some(layout) = layout
                && self.joins(&open, start, &layout)
            {
                self.join(open, start, layout);
                return;
            }
            // It gets a place of its own behind the super-packet that it has ended.
            at = self.end + self.prefix;
            let fits = at + length <= self.arena.len();
            if fits {
                self.arena.copy_within(start..start + length, at);
            }
            self.uncover(start, open.layout.headers);
            self.finish(open);
            if !fits {
                return;
            }
        }
        let begin = at - self.prefix;
        self.arena[begin..at].fill(0);
        self.end = at + length;
        match layout {
            Some(layout) => {
                let packet = &self.arena[at..at + length];
                let (sequence, pushed) = if layout.tcp {
                    (
                        sequence(packet, layout.l4).wrapping_add(layout.payload as u32),
                        packet[layout.l4 + 13] & PSH != 0,
                    )
                } else {
                    (0, false)
                };
                let open = Open { start: at, layout, count: 1, verified: false, sequence, pushed };
                self.open = Some(open);
                if pushed {
                    self.finish(open);
                }
            }
            None => self.finished.push_back((begin, self.end)),
        }
    }

    /// Ends the super-packet that is being built.
    pub fn close(&mut self) {
        let space = self.space.take();
        if let Some(open) = self.open {
            if let Some(start) = space {
                self.uncover(start, open.layout.headers);
            }
            self.finish(open);
        }
    }

    /// The next finished write, in the order in which packets came: the virtio header, if any, and the packet.
    pub fn take(&mut self) -> Option<&[u8]> {
        let (begin, end) = self.finished.pop_front()?;
        Some(&self.arena[begin..end])
    }

    fn uncover(&mut self, start: usize, headers: usize) {
        self.arena[start..start + headers].copy_from_slice(&self.covered[..headers]);
    }

    // The layout of a packet that may be the first of a super-packet, or join one.
    #[inline]
    fn layout(&self, start: usize, length: usize) -> Option<Layout> {
        let Mode::Virtio { udp } = self.mode else { return None };
        let packet = &self.arena[start..start + length];
        let (protocol, l4) = match *packet.first()? {
            // Without options, and no fragment.
            0x45 if length >= IPV4_HEADER && packet[6] & !DF == 0 && packet[7] == 0 => {
                (packet[9], IPV4_HEADER)
            }
            first if first >> 4 == 6 && length >= IPV6_HEADER => (packet[6], IPV6_HEADER),
            _ => return None,
        };
        let l4_header = match protocol {
            TCP if length >= l4 + TCP_HEADER => {
                let (offset, flags) = (usize::from(packet[l4 + 12] >> 4) * 4, packet[l4 + 13]);
                if offset < TCP_HEADER || flags & !PSH != ACK || packet[l4 + 12] & 0x0f != 0 {
                    return None;
                }
                offset
            }
            UDP if udp && length >= l4 + UDP_HEADER => {
                let unsummed = packet[l4 + UDP_CHECKSUM..][..2] == [0, 0];
                if usize::from(word(packet, l4 + 4)) != length - l4 || unsummed {
                    return None;
                }
                UDP_HEADER
            }
            _ => return None,
        };
        let headers = l4 + l4_header;
        let payload = length.checked_sub(headers).filter(|payload| *payload > 0)?;
        Some(Layout { tcp: protocol == TCP, l4, headers, payload })
    }

    // Whether a packet continues the open super-packet, and is whole.
    #[inline]
    fn joins(&mut self, open: &Open, start: usize, layout: &Layout) -> bool {
        let first = open.layout;
        let (tcp, l4, headers) = (first.tcp, first.l4, first.headers);
        let total = self.end - open.start + layout.payload;
        if (layout.tcp, layout.l4, layout.headers) != (tcp, l4, headers)
            || layout.payload > first.payload
            || total > LARGEST_PACKET
            || (!tcp && open.count >= MOST_DATAGRAMS)
        {
            return false;
        }
        let old = &self.arena[open.start..open.start + headers];
        let new = &self.arena[start..start + headers];
        let ip = if l4 == IPV4_HEADER {
            let id = word(old, 4).wrapping_add(open.count as u16);
            // Type of service; flags, time to live and protocol; addresses.
            old[1] == new[1]
                && old[6..10] == new[6..10]
                && old[12..20] == new[12..20]
                && (old[6] & DF != 0 || word(new, 4) == id)
        } else {
            // Traffic class and flow label; next header, hop limit and addresses.
            old[..4] == new[..4] && old[6..40] == new[6..40]
        };
        let ports = old[l4..l4 + 4] == new[l4..l4 + 4];
        let flow = ip
            && ports
            && (!tcp
                // Acknowledgement and offset; window; urgent pointer and options.
                || (old[l4 + 8..l4 + 13] == new[l4 + 8..l4 + 13]
                    && old[l4 + 14..l4 + 16] == new[l4 + 14..l4 + 16]
                    && old[l4 + 18..] == new[l4 + 18..]
                    && sequence(new, l4) == open.sequence));
        if !flow || !whole(&self.arena[start..start + headers + layout.payload], layout) {
            return false;
        }
        if !open.verified {
            // Its end lies under the new packet's headers.
            let mut under = [0; MOST_HEADERS];
            under[..headers].copy_from_slice(&self.arena[start..start + headers]);
            self.uncover(start, headers);
            let verified = whole(&self.arena[open.start..self.end], &first);
            self.arena[start..start + headers].copy_from_slice(&under[..headers]);
            return verified;
        }
        true
    }

    #[inline]
    fn join(&mut self, mut open: Open, start: usize, layout: Layout) {
        open.pushed = layout.tcp && self.arena[start + layout.l4 + 13] & PSH != 0;
        self.uncover(start, layout.headers);
        self.end += layout.payload;
        open.count += 1;
        open.verified = true;
        open.sequence = open.sequence.wrapping_add(layout.payload as u32);
        self.open = Some(open);
        if open.pushed || layout.payload < open.layout.payload {
            self.finish(open);
        }
    }

    fn finish(&mut self, open: Open) {
        self.open = None;
        let begin = open.start - self.prefix;
        self.finished.push_back((begin, self.end));
        if open.count == 1 {
            return;
        }
        let Layout { tcp, l4, headers, payload } = open.layout;
        let packet = &mut self.arena[open.start..self.end];
        let length = packet.len();
        let v4 = l4 == IPV4_HEADER;
        if v4 {
            put_word(packet, 2, length as u16);
            put_word(packet, 10, 0);
            let checksum = Sum::default().few(&packet[..IPV4_HEADER]).checksum();
            packet[10..12].copy_from_slice(&checksum);
        } else {
            put_word(packet, 4, (length - IPV6_HEADER) as u16);
        }
        let (protocol, field) = if tcp {
            packet[l4 + 13] |= if open.pushed { PSH } else { 0 };
            (TCP, TCP_CHECKSUM)
        } else {
            put_word(packet, l4 + 4, (length - l4) as u16);
            (UDP, UDP_CHECKSUM)
        };
        let addresses = if v4 { 12..20 } else { 8..40 };
        let pseudo = Sum::default().pseudo(&packet[addresses], protocol, length - l4).folded();
        packet[l4 + field..l4 + field + 2].copy_from_slice(&pseudo);
        let gso_type = match (tcp, v4) {
            (true, true) => GSO_TCPV4,
            (true, false) => GSO_TCPV6,
            (false, _) => GSO_UDP_L4,
        };
        let header = VirtioHeader {
            flags: NEEDS_CSUM,
            gso_type,
            hdr_len: headers as u16,
            gso_size: payload as u16,
            csum_start: l4 as u16,
            csum_offset: field as u16,
        };
        self.arena[begin..open.start].copy_from_slice(&header.render());
    }
}

#[inline]
fn sequence(packet: &[u8], l4: usize) -> u32 {
    u32::from_be_bytes([packet[l4 + 4], packet[l4 + 5], packet[l4 + 6], packet[l4 + 7]])
}

// Whether its checksums are right. A wrong one must reach the receiver as it is; a super-packet gets new ones.
#[inline]
fn whole(packet: &[u8], layout: &Layout) -> bool {
    let v4 = layout.l4 == IPV4_HEADER;
    let (addresses, protocol) = if v4 { (12..20, packet[9]) } else { (8..40, packet[6]) };
    (!v4 || Sum::default().few(&packet[..IPV4_HEADER]).is_right())
        && Sum::default()
            .pseudo(&packet[addresses], protocol, packet.len() - layout.l4)
            .bytes(&packet[layout.l4..])
            .is_right()
}
