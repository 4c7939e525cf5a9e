//! The device without any I/O: datagrams and packets go in with the time, and come out through [`Output`].

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use parking_lot::{Mutex, MutexGuard, RwLock, RwLockReadGuard};

use crate::key::PublicKey;
use crate::noise::{HANDSHAKE_SPACE, Identity, Message, Refused};
use crate::offload::split::Segments;
use crate::packet;
use crate::peer::{Endpoint, Now, Order, Output, Peer, PeerState, Received, Sent};
use crate::peer_table::PeerTable;
use crate::roster::Roster;
use crate::shed::Shedding;
use crate::staging::{Budget, STAGED_BYTES_OF_ALL};

/// Handshake messages a second that are answered without asking for a cookie. One costs about 0.2 ms.
pub const HANDSHAKES_PER_SECOND: u64 = 500;

// What one call of `Device::tick` does at most, so that traffic never waits for thousands of peers: at some 0.2 ms
// an initiation, 3 ms.
const INITIATIONS_PER_TICK: usize = 16;
const PEERS_PER_TICK: usize = 4096;

/// A WireGuard device. Locks are taken in one order: the sweep, the table, then a peer.
pub struct Device {
    pub(crate) shared: RwLock<Shared>,
    // One change of configuration at a time; traffic does not wait for it.
    pub(crate) configuring: Mutex<()>,
    pub(crate) handshakes_per_second: u64,
    pub(crate) staging: Arc<Budget>,
    pub(crate) roster: Arc<Roster>,
    sweep: Mutex<Sweep>,
    mtu: AtomicUsize,
    up: AtomicBool,
    counters: Counters,
}

// The awake peers: those that time has still to pass for, and those it has passed for.
#[derive(Default)]
struct Sweep {
    pending: VecDeque<Arc<Peer>>,
    done: VecDeque<Arc<Peer>>,
}

pub(crate) struct Shared {
    pub(crate) identity: Option<Arc<Identity>>,
    pub(crate) table: PeerTable,
}

/// What was dropped, and why. All count datagrams or packets since the start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Packets from the TUN device to an address that no peer has, or that are no IP packets.
    pub unroutable: AtomicU64,
    /// Packets for a peer without endpoint or usable key.
    pub unreachable: AtomicU64,
    /// Datagrams that are no WireGuard messages, are for no session of ours, or fail authentication.
    pub refused: AtomicU64,
    /// Authentic datagrams with something else than an IP packet inside.
    pub malformed: AtomicU64,
    /// Packets whose inner source address is not the peer's.
    pub foreign_source: AtomicU64,
    /// Handshake messages answered with a cookie because there were too many.
    pub cookies: AtomicU64,
    /// Handshake messages dropped because there were too many of them, from one address or from all.
    pub limited: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Device {
    /// A device with no key and no peers, which is down.
    pub fn new() -> Self {
        Self::with_handshake_limit(HANDSHAKES_PER_SECOND)
    }

    /// A device that answers with cookies beyond this many handshake messages a second.
    pub fn with_handshake_limit(handshakes_per_second: u64) -> Self {
        Self {
            shared: RwLock::new(Shared { identity: None, table: PeerTable::default() }),
            configuring: Mutex::new(()),
            handshakes_per_second,
            staging: Budget::new(STAGED_BYTES_OF_ALL),
            roster: Arc::default(),
            sweep: Mutex::default(),
            mtu: AtomicUsize::new(0),
            up: AtomicBool::new(false),
            counters: Counters::default(),
        }
    }

    /// Tells the device the link's MTU in bytes, which bounds padding.
    pub fn set_mtu(&self, mtu: usize) {
        self.mtu.store(mtu, Ordering::Relaxed);
    }

    /// Tells the device whether its link is up. While it is down nothing is sent, answered or delivered. Going
    /// down ends all sessions; coming up lets persistent keepalives begin anew.
    pub fn set_up(&self, up: bool) {
        let was_up = self.up.swap(up, Ordering::Relaxed);
        if was_up && !up {
            self.end_sessions();
        } else if up && !was_up {
            let peers: Vec<Arc<Peer>> = self.shared.read().table.peers().cloned().collect();
            for peer in peers {
                if peer.lock().hurry_keepalive() {
                    drop(peer.lock_awake());
                }
            }
        }
    }

    fn end_sessions(&self) {
        let (identity, peers): (_, Vec<Arc<Peer>>) = {
            let shared = self.shared.read();
            let awake = shared.table.peers().filter(|peer| !peer.is_dormant());
            (shared.identity.clone(), awake.cloned().collect())
        };
        // Without a key there are no sessions.
        let Some(identity) = identity else { return };
        let mut ended = Vec::new();
        for peer in peers {
            let mut state = peer.lock();
            ended.extend(state.end_sessions(identity.private()));
            // Time stands still while the link is down; whoever wakes the peer makes up for it first.
            peer.sleep(&state);
        }
        self.unmap(ended);
    }

    fn unmap(&self, ended: Vec<u32>) {
        if !ended.is_empty() {
            let mut shared = self.shared.write();
            for index in ended {
                shared.table.unmap_index(index);
            }
        }
    }

    /// Whether the link is up.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    /// What was dropped.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Begins a batch of traffic, which alone puts out what it produces. Configuration waits until the batch is
    /// dropped, so keep it short.
    pub fn batch(&self, now: Now) -> Batch<'_> {
        self.batch_in(Order::Kept, now)
    }

    /// Begins a batch of traffic beside others.
    pub fn batch_in(&self, order: Order, now: Now) -> Batch<'_> {
        Batch {
            shared: self.shared.read(),
            counters: &self.counters,
            mtu: self.mtu.load(Ordering::Relaxed),
            up: self.is_up(),
            order,
            waiting: Vec::new(),
            now,
        }
    }

    /// Lets time pass for peers; to be called at least every 250 ms. Returns whether it stopped before all had
    /// their turn, to let traffic through: call it again soon then.
    pub fn tick(&self, now: Now, out: &mut impl Output) -> bool {
        let mut sweep = self.sweep.lock();
        if !self.is_up() {
            return false;
        }
        let mut ended = Vec::new();
        {
            let shared = self.shared.read();
            let Sweep { pending, done } = &mut *sweep;
            if pending.is_empty() {
                if let Some(identity) =
                    shared.identity.as_ref().filter(|identity| identity.guard().is_pressed())
                {
                    let endpoints = shared.table.peers().filter_map(|peer| peer.lock().endpoint().copied());
                    let addresses = endpoints.map(|endpoint| endpoint.remote.ip().to_canonical()).collect();
                    identity.guard().know(addresses);
                }
                std::mem::swap(pending, done);
                self.roster.drain_into(pending);
            }
            let (mut initiations, mut peers) = (0, 0);
            while initiations < INITIATIONS_PER_TICK
                && peers < PEERS_PER_TICK
                && let Some(peer) = pending.pop_front()
            {
                peers += 1;
                // It may have been removed since the sweep began.
                if !shared.table.get(peer.key()).is_some_and(|known| Arc::ptr_eq(known, &peer)) {
                    continue;
                }
                let mut state = peer.lock();
                if !peer.is_dormant() {
                    let ticked = state.tick(now, out);
                    ended.extend(ticked.ended);
                    initiations += usize::from(ticked.initiated);
                }
                if peer.rest(&mut state) {
                    drop(state);
                    done.push_back(peer);
                }
            }
        }
        self.unmap(ended);
        !sweep.pending.is_empty()
    }

    /// Which handshake initiations the sockets are to let through from now on; to be asked about once a second.
    pub fn shedding(&self, now: Now) -> Shedding {
        let shared = self.shared.read();
        shared
            .identity
            .as_ref()
            .map_or(Shedding::NONE, |identity| identity.guard().shedding(now.monotonic).clone())
    }

    /// The sockets cannot do that.
    pub fn give_up_shedding(&self) {
        if let Some(identity) = &self.shared.read().identity {
            identity.guard().give_up_shedding();
        }
    }

    /// Makes answers leave by whatever address the routing table picks, after routes or addresses have changed.
    pub fn forget_local_addresses(&self) {
        for peer in self.shared.read().table.peers() {
            peer.lock().forget_local_address(None);
        }
    }

    /// The same for those answers only that would leave by an address that went away.
    pub fn forget_local_address(&self, lost: IpAddr) {
        for peer in self.shared.read().table.peers() {
            peer.lock().forget_local_address(Some(lost));
        }
    }
}

impl Default for Device {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Peers and roster hold each other.
        self.roster.drain_into(&mut VecDeque::new());
    }
}

/// A run of packets and datagrams under one look at the peer table.
pub struct Batch<'a> {
    shared: RwLockReadGuard<'a, Shared>,
    counters: &'a Counters,
    mtu: usize,
    up: bool,
    order: Order,
    // Peers whose packets have waited for a session that is there now. Seldom any, and then few.
    waiting: Vec<Arc<Peer>>,
    now: Now,
}

impl Batch<'_> {
    /// Takes the IP packet in the first `length` bytes of `buffer` from the TUN device; `buffer` has
    /// [`TAIL`](crate::offload::split::TAIL) bytes more.
    pub fn packet(&mut self, buffer: &mut [u8], length: usize, out: &mut impl Output) {
        match Segments::whole(buffer, length) {
            Ok(mut packet) => {
                self.packets(&mut packet, out);
            }
            Err(_) => self.unroutable(),
        }
    }

    /// Takes the packets of one read of the TUN device. False when nothing was done because it was not their turn.
    pub fn packets(&mut self, packets: &mut Segments<'_>, out: &mut impl Output) -> bool {
        if !self.up {
            return true;
        }
        let Some(peer) = self.shared.table.route(packets.destination()) else {
            self.unroutable();
            return true;
        };
        let sent = peer.lock_awake().send(packets, self.mtu, self.now, self.order, out);
        if sent == Sent::Unreachable {
            count(&self.counters.unreachable);
        }
        sent != Sent::OutOfTurn
    }

    /// Counts a read of the TUN device that holds no packet for anyone.
    pub fn unroutable(&self) {
        if self.up {
            count(&self.counters.unroutable);
        }
    }

    /// Takes a datagram from the network.
    pub fn datagram(&mut self, from: &Endpoint, datagram: &[u8], out: &mut impl Output) {
        self.train(from, datagram, datagram.len().max(1), out);
    }

    /// Takes datagrams from the network that came together: each of `segment` bytes, not 0, but for the last, which
    /// may be shorter.
    pub fn train(&mut self, from: &Endpoint, datagrams: &[u8], segment: usize, out: &mut impl Output) {
        if !self.up {
            return;
        }
        if datagrams.is_empty() {
            return count(&self.counters.refused);
        }
        let mut rest = datagrams;
        while !rest.is_empty() {
            let (datagram, after) = split_first(rest, segment);
            rest = match Message::classify(datagram) {
                Some(Message::Data(index)) => self.data(index, from, rest, segment, out),
                Some(message) => {
                    self.handshake(message, from, datagram, rest.len() == datagrams.len(), out);
                    after
                }
                None => {
                    count(&self.counters.refused);
                    after
                }
            };
        }
    }

    // Data for one session under one lock. Returns what is left behind it; at least one datagram is taken.
    fn data<'d>(
        &mut self,
        index: u32,
        from: &Endpoint,
        mut datagrams: &'d [u8],
        segment: usize,
        out: &mut impl Output,
    ) -> &'d [u8] {
        let Some(peer) = self.shared.table.by_index(index >> 8) else {
            count(&self.counters.refused);
            return split_first(datagrams, segment).1;
        };
        let mut state = peer.lock_awake();
        let mut source = None;
        while !datagrams.is_empty() {
            let (datagram, after) = split_first(datagrams, segment);
            if Message::classify(datagram) != Some(Message::Data(index)) {
                break;
            }
            datagrams = after;
            match state.receive(Message::Data(index), datagram, from, self.now, out) {
                Received::Packet(length) => self.deliver(peer, length, &mut source, out),
                Received::Handled => {}
                Received::Malformed => count(&self.counters.malformed),
                Received::Refused => count(&self.counters.refused),
            }
        }
        if state.has_staged() {
            release(state, peer, self.order, self.mtu, self.now, &mut self.waiting, out);
        }
        datagrams
    }

    #[inline(never)]
    fn handshake(
        &mut self,
        message: Message,
        from: &Endpoint,
        datagram: &[u8],
        first: bool,
        out: &mut impl Output,
    ) {
        let peer = match message {
            Message::Data(index) | Message::CookieReply(index) => self.shared.table.by_index(index >> 8),
            // An answer to nothing we asked is not worth a look at its MAC, nor a place in the flood guard.
            Message::Response(index) => self
                .shared
                .table
                .by_index(index >> 8)
                .filter(|_| self.admit(message, from, datagram, first, out).is_some()),
            Message::Initiation => self
                .admit(message, from, datagram, first, out)
                .and_then(|identity| identity.initiator(datagram))
                .and_then(|key| self.shared.table.get(&key)),
        };
        let Some(peer) = peer else { return count(&self.counters.refused) };
        let mut state = peer.lock_awake();
        if state.receive(message, datagram, from, self.now, out) == Received::Refused {
            count(&self.counters.refused);
        } else if state.has_staged() {
            release(state, peer, self.order, self.mtu, self.now, &mut self.waiting, out);
        }
    }

    /// Peers whose packets have waited for a session that is there now, and were not sent because order was not
    /// kept: to be given to [`Batch::send_staged`] once it is.
    pub fn into_waiting(self) -> Vec<Arc<Peer>> {
        self.waiting
    }

    /// Sends what has waited for a session.
    pub fn send_staged(&self, peer: &Arc<Peer>, out: &mut impl Output) {
        peer.lock_awake().send_staged(self.mtu, self.now, out);
    }

    fn admit(
        &self,
        message: Message,
        from: &Endpoint,
        datagram: &[u8],
        first: bool,
        out: &mut impl Output,
    ) -> Option<&Identity> {
        let identity = self.shared.identity.as_deref()?;
        let space = out.datagram_space(HANDSHAKE_SPACE);
        match identity.admit(message, from.remote.ip(), datagram, first, self.now.monotonic, space) {
            Ok(()) => Some(identity),
            Err(Refused::Cookie(length)) => {
                out.datagram_done(from, length);
                count(&self.counters.cookies);
                None
            }
            Err(Refused::TooMany) => {
                count(&self.counters.limited);
                None
            }
            Err(Refused::Invalid) => None,
        }
    }

    // `source` is the address that was last found to be the peer's.
    #[inline]
    fn deliver(&self, peer: &Arc<Peer>, length: usize, source: &mut Option<IpAddr>, out: &mut impl Output) {
        let plaintext = &out.packet_space(length)[..length];
        let Some(header) = packet::parse(plaintext) else { return count(&self.counters.malformed) };
        if *source == Some(header.source) || self.owns(peer, header.source) {
            *source = Some(header.source);
            out.packet_done(header.length);
        } else {
            count(&self.counters.foreign_source);
        }
    }

    fn owns(&self, peer: &Arc<Peer>, source: IpAddr) -> bool {
        self.shared.table.route(source).is_some_and(|owner| Arc::ptr_eq(owner, peer))
    }

    /// The peer with this public key.
    pub fn peer(&self, key: &PublicKey) -> Option<&Arc<Peer>> {
        self.shared.table.get(key)
    }
}

// The first datagram of a train that is not empty, whatever its segments are said to be, and what is behind it.
#[inline]
fn split_first(train: &[u8], segment: usize) -> (&[u8], &[u8]) {
    train.split_at(segment.clamp(1, train.len()))
}

fn release(
    mut state: MutexGuard<'_, PeerState>,
    peer: &Arc<Peer>,
    order: Order,
    mtu: usize,
    now: Now,
    waiting: &mut Vec<Arc<Peer>>,
    out: &mut impl Output,
) {
    match order {
        Order::Kept => state.send_staged(mtu, now, out),
        Order::Open if state.is_ready() && !waiting.iter().any(|known| Arc::ptr_eq(known, peer)) => {
            waiting.push(Arc::clone(peer));
        }
        Order::Open => {}
    }
}
