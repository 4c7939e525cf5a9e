//! What a thread does with traffic: one batch from the TUN device or a socket at a time, run to completion.
//!
//! With one thread every batch is in order by itself. With helpers, batches of a direction are encrypted or decrypted
//! side by side and put out in the order in which they were read ([`crate::lane`]). A peer's tunnel is locked while
//! packets of one read are under way in it, so that one peer has one core's worth of encryption at a time, and the
//! reads, writes and checksums of others go on beside it.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use crate::device::Device;
use crate::lane::Lane;
use crate::network::Network;
use crate::offload::merge::{Merger, Mode};
use crate::offload::split::{Segments, TAIL};
use crate::offload::virtio::{VIRTIO_HEADER, VirtioHeader};
use crate::peer::{Endpoint, Now, Order, Output, Peer};
use crate::pool::Pool;
use crate::sys::tun::Tun;
use crate::sys::udp::{ReceiveBatch, SendBatch, UdpPair};

// Reading stops when this much has been read, so that one read of the largest kind always fits behind it.
const READ_ENOUGH: usize = 32 << 10;
const READS: usize = 64;
// An IPv6 packet's length does not count its header.
const LARGEST_READ: usize = VIRTIO_HEADER + 65_575 + TAIL;
// Datagram trains of up to 64 KB in one receive.
const TRAINS: usize = 16;
// With helpers, what they have under way together has to stay within boringtun's replay window of 1,024.
const TRAINS_BESIDE_HELPERS: usize = 2;
const LARGEST_TRAIN: usize = 65_536;
// Who reads small packets one by one has room for a few hundred in its socket (`net.core.rmem_default`), and may share
// our processor: after so many in a row, which are this small, it gets a turn, and fewer come at once next time.
const SMALL: usize = 256;
const MANY: usize = 100;
const TRAINS_OF_SMALL: usize = 4;
const SLACK: usize = 4096;

/// What all threads of a device share.
pub struct Shared {
    /// The core.
    pub device: Arc<Device>,
    /// The sockets.
    pub network: Arc<Network>,
    /// The link.
    pub tun: Tun,
    /// From the link to the network.
    pub outgoing: Lane,
    /// From the network to the link, by family of the socket.
    pub incoming: [Lane; 2],
    /// Threads that help when there is more to do than one can.
    pub pool: Pool,
}

/// The address family of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4 = 0,
    /// IPv6.
    V6 = 1,
}

/// One thread's buffers, all of them allocated once.
pub struct Worker {
    shared: Arc<Shared>,
    order: Order,
    // The most runs of datagrams in one receive; the buffers are made for them.
    trains: usize,
    // Whether the last receive brought many small ones.
    small: bool,
    // Of the sockets in use; others may have come into use since.
    generation: u64,
    received: ReceiveBatch,
    reads: Reads,
    outbox: Outbox,
}

impl Worker {
    /// A worker with the sockets that are in use now.
    pub fn new(shared: Arc<Shared>) -> Self {
        let order = if shared.pool.is_empty() { Order::Kept } else { Order::Open };
        let features = shared.tun.features();
        let mode = if features.tun_tso { Mode::Virtio { udp: features.tun_uso } } else { Mode::Plain };
        let trains = if order == Order::Kept { TRAINS } else { TRAINS_BESIDE_HELPERS };
        Self {
            order,
            trains,
            small: false,
            generation: 0,
            received: ReceiveBatch::new(),
            reads: Reads::new(features.tun_tso),
            outbox: Outbox {
                shared: Arc::clone(&shared),
                sockets: None,
                send: SendBatch::new(),
                merger: Merger::new(mode, trains * LARGEST_TRAIN + SLACK + LARGEST_TRAIN),
                in_turn: false,
                lost_addresses: Vec::new(),
            },
            shared,
        }
    }

    /// Takes up the sockets that are in use now; returns those used until now, if they are others.
    pub fn renew_sockets(&mut self) -> Option<Option<Arc<UdpPair>>> {
        let generation = self.shared.network.generation();
        if generation == self.generation {
            return None;
        }
        self.generation = generation;
        Some(std::mem::replace(&mut self.outbox.sockets, self.shared.network.sockets()))
    }

    /// Lets go of the sockets, so that they can be closed while this thread sleeps.
    pub fn drop_sockets(&mut self) {
        self.outbox.sockets = None;
        self.generation = 0;
    }

    /// The sockets in use.
    pub fn sockets(&self) -> Option<&Arc<UdpPair>> {
        self.outbox.sockets.as_ref()
    }

    /// One batch from a socket. Returns whether there may be more.
    pub fn receive(&mut self, family: Family) -> bool {
        let Self { shared, order, received, outbox, .. } = self;
        let most = if self.small { TRAINS_OF_SMALL.min(self.trains) } else { self.trains };
        let Some(sockets) = outbox.sockets.clone() else { return false };
        let fd = match family {
            Family::V4 => Some(sockets.v4()),
            Family::V6 => sockets.v6(),
        };
        let Some(fd) = fd else { return false };
        let read = || received.receive(fd, most).ok().filter(|count| *count > 0);
        let Some((count, mut turn)) = shared.incoming[family as usize].read(read) else { return false };
        let more = count == most;
        if more {
            shared.pool.call();
        }
        let now = Now::read();
        outbox.in_turn = *order == Order::Kept;
        let mut batch = shared.device.batch_in(*order, now);
        let (mut datagrams, mut bytes) = (0, 0);
        for train in received.trains() {
            datagrams += train.datagrams().len();
            bytes += train.bytes.len();
            batch.train(train.from, train.bytes, train.segment, outbox);
        }
        self.small = datagrams >= MANY && bytes < datagrams * SMALL;
        let waiting = batch.into_waiting();
        turn.wait();
        outbox.write_packets();
        drop(turn);
        outbox.flush();
        if !waiting.is_empty() {
            self.send_staged(waiting);
        }
        self.finish();
        if self.small {
            thread::yield_now();
        }
        more
    }

    // Behind what has been read from the link so far, and before what will be.
    #[cold]
    fn send_staged(&mut self, waiting: Vec<Arc<Peer>>) {
        let mut turn = self.shared.outgoing.enter();
        turn.wait();
        let batch = self.shared.device.batch(Now::read());
        for peer in &waiting {
            batch.send_staged(peer, &mut self.outbox);
        }
        drop(batch);
        self.outbox.flush();
    }

    /// One batch from the TUN device. Returns whether there may be more.
    pub fn transmit(&mut self) -> io::Result<bool> {
        let Self { shared, order, reads, outbox, .. } = self;
        let mut failed = None;
        let read = || match reads.fill(&shared.tun) {
            Ok(0) => None,
            Ok(_) => Some(()),
            Err(error) => {
                failed = Some(error);
                None
            }
        };
        let Some(((), mut turn)) = shared.outgoing.read(read) else {
            return failed.map_or(Ok(false), Err);
        };
        let more = reads.more;
        if more {
            shared.pool.call();
        }
        let now = Now::read();
        let mut batch = shared.device.batch_in(*order, now);
        for read in reads.iter() {
            let Ok(mut packets) = read else {
                batch.unroutable();
                continue;
            };
            if !batch.packets(&mut packets, outbox) {
                drop(batch);
                turn.wait();
                outbox.flush();
                batch = shared.device.batch(now);
                batch.packets(&mut packets, outbox);
            }
        }
        drop(batch);
        turn.wait();
        outbox.flush();
        drop(turn);
        self.finish();
        Ok(more)
    }

    /// Lets time pass; see [`Device::tick`].
    pub fn tick(&mut self) -> bool {
        let more = self.shared.device.tick(Now::read(), &mut self.outbox);
        self.outbox.flush();
        self.finish();
        more
    }

    fn finish(&mut self) {
        for lost in self.outbox.lost_addresses.drain(..) {
            self.shared.device.forget_local_address(lost);
        }
    }
}

// Reads of the TUN device, one behind the other.
struct Reads {
    buffer: Box<[u8]>,
    // Where each begins, and how long it is, without the space behind it.
    spans: Vec<(usize, usize)>,
    offset: usize,
    // Whether reading stopped before the device ran dry.
    more: bool,
}

impl Reads {
    fn new(virtio: bool) -> Self {
        Self {
            buffer: vec![0; READ_ENOUGH + LARGEST_READ].into(),
            spans: Vec::with_capacity(READS),
            offset: if virtio { VIRTIO_HEADER } else { 0 },
            more: false,
        }
    }

    /// Reads until enough is there or nothing more comes. An error is one only if nothing was read before it: it
    /// comes again.
    fn fill(&mut self, tun: &Tun) -> io::Result<usize> {
        self.spans.clear();
        let mut at = 0;
        self.more = true;
        while at < READ_ENOUGH && self.spans.len() < READS {
            match tun.read(&mut self.buffer[at..at + LARGEST_READ - TAIL]) {
                Ok(length) => {
                    self.spans.push((at, length));
                    at += (length + TAIL).next_multiple_of(64);
                }
                Err(error) => {
                    self.more = false;
                    let dry = error.kind() == io::ErrorKind::WouldBlock
                        || error.kind() == io::ErrorKind::Interrupted
                        // The link is down: reading waits until it is up.
                        || error.raw_os_error() == Some(libc::EIO);
                    if !dry && self.spans.is_empty() {
                        return Err(error);
                    }
                    break;
                }
            }
        }
        Ok(self.spans.len())
    }

    fn iter(&mut self) -> impl Iterator<Item = Result<Segments<'_>, crate::offload::split::Malformed>> {
        let offset = self.offset;
        let mut rest: &mut [u8] = &mut self.buffer;
        let mut before = 0;
        self.spans.iter().map(move |&(at, length)| {
            let (_, from) = std::mem::take(&mut rest).split_at_mut(at - before);
            let (read, behind) = from.split_at_mut(length + TAIL);
            (rest, before) = (behind, at + length + TAIL);
            if offset == 0 {
                return Segments::whole(read, length);
            }
            let (header, packet) = read.split_at_mut(offset.min(read.len()));
            let header = VirtioHeader::parse(header);
            Segments::new(&header, packet, length.saturating_sub(offset))
        })
    }
}

// Where the core's output goes. Datagrams gather until there is no room or `flush` is called, packets until they are
// in turn.
struct Outbox {
    shared: Arc<Shared>,
    sockets: Option<Arc<UdpPair>>,
    send: SendBatch,
    merger: Merger,
    in_turn: bool,
    lost_addresses: Vec<IpAddr>,
}

impl Outbox {
    fn flush(&mut self) {
        if let Some(sockets) = &self.sockets
            && !self.send.is_empty()
        {
            let report = self.send.send(sockets, Instant::now());
            self.lost_addresses.extend(report.lost_addresses);
        }
    }

    fn write_packets(&mut self) {
        self.merger.close();
        self.write_finished();
    }

    fn write_finished(&mut self) {
        while let Some(packet) = self.merger.take() {
            // A full queue or a link that has just gone down drops packets, as any link does.
            let _ = self.shared.tun.write(packet);
        }
    }
}

impl Output for Outbox {
    fn datagram_space(&mut self, length: usize) -> &mut [u8] {
        if !self.send.has_room(length) {
            self.flush();
        }
        self.send.space(length)
    }

    fn datagram_done(&mut self, to: &Endpoint, length: usize) {
        // Without sockets there is nowhere to go.
        if self.sockets.is_some() {
            self.send.push(to, length);
        }
    }

    fn packet_space(&mut self, length: usize) -> &mut [u8] {
        self.merger.space(length)
    }

    fn packet_done(&mut self, length: usize) {
        self.merger.done(length);
        if self.in_turn {
            self.write_finished();
        }
    }
}
