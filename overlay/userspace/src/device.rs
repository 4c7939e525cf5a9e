//! The device without any I/O: datagrams and packets go in with the time, and come out through [`Output`].

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use parking_lot::{Mutex, RwLock, RwLockReadGuard};

use crate::key::PublicKey;
use crate::noise::{HANDSHAKE_SPACE, Identity, Message, Refused};
use crate::packet;
use crate::peer::{Endpoint, Now, Output, Peer, Received, Sent};
use crate::peer_table::PeerTable;
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
    // The peers that time has still to pass for.
    sweep: Mutex<VecDeque<Arc<Peer>>>,
    mtu: AtomicUsize,
    up: AtomicBool,
    counters: Counters,
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
    /// Handshake messages dropped because there were too many, and too many of them from one address.
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

    /// Begins a batch of traffic. Configuration waits until the batch is dropped, so keep it short.
    pub fn batch(&self, now: Now) -> Batch<'_> {
        Batch {
            shared: self.shared.read(),
            counters: &self.counters,
            mtu: self.mtu.load(Ordering::Relaxed),
            up: self.is_up(),
            now,
        }
    }

    /// Lets time pass for peers; to be called at least every 250 ms. Returns whether it stopped before all had
    /// their turn, to let traffic through: call it again soon then.
    pub fn tick(&self, now: Now, out: &mut impl Output) -> bool {
        let mut sweep = self.sweep.lock();
        if !self.is_up() {
            sweep.clear();
            return false;
        }
        let mut ended = Vec::new();
        {
            let shared = self.shared.read();
            if sweep.is_empty() {
                sweep.extend(shared.table.peers().filter(|peer| !peer.is_dormant()).cloned());
            }
            let (mut initiations, mut peers) = (0, 0);
            while initiations < INITIATIONS_PER_TICK
                && peers < PEERS_PER_TICK
                && let Some(peer) = sweep.pop_front()
            {
                peers += 1;
                // It may have been removed since the sweep began.
                if !shared.table.get(peer.key()).is_some_and(|known| Arc::ptr_eq(known, &peer)) {
                    continue;
                }
                let mut state = peer.lock();
                let ticked = state.tick(now, out);
                ended.extend(ticked.ended);
                initiations += usize::from(ticked.initiated);
                peer.rest(&state);
            }
        }
        self.unmap(ended);
        !sweep.is_empty()
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

/// A run of packets and datagrams under one look at the peer table.
pub struct Batch<'a> {
    shared: RwLockReadGuard<'a, Shared>,
    counters: &'a Counters,
    mtu: usize,
    up: bool,
    now: Now,
}

impl Batch<'_> {
    /// Takes the IP packet in the first `length` bytes of `buffer` from the TUN device. Up to 15 bytes behind it
    /// are overwritten with padding, if the buffer has them.
    pub fn packet(&mut self, buffer: &mut [u8], length: usize, out: &mut impl Output) {
        if !self.up {
            return;
        }
        let peer = buffer
            .get(..length)
            .and_then(packet::parse)
            .and_then(|header| self.shared.table.route(header.destination));
        let Some(peer) = peer else { return count(&self.counters.unroutable) };
        if peer.lock_awake().send(buffer, length, self.mtu, self.now, out) == Sent::Unreachable {
            count(&self.counters.unreachable);
        }
    }

    /// Takes a datagram from the network.
    pub fn datagram(&mut self, from: &Endpoint, datagram: &[u8], out: &mut impl Output) {
        if !self.up {
            return;
        }
        let Some(message) = Message::classify(datagram) else { return count(&self.counters.refused) };
        let peer = match message {
            Message::Data(index) | Message::CookieReply(index) => self.shared.table.by_index(index >> 8),
            // An answer to nothing we asked is not worth a look at its MAC, nor a place in the flood guard.
            Message::Response(index) => self
                .shared
                .table
                .by_index(index >> 8)
                .filter(|_| self.admit(message, from, datagram, out).is_some()),
            Message::Initiation => self
                .admit(message, from, datagram, out)
                .and_then(|identity| identity.initiator(datagram))
                .and_then(|key| self.shared.table.get(&key)),
        };
        let Some(peer) = peer else { return count(&self.counters.refused) };
        let received = peer.lock_awake().receive(message, datagram, from, self.mtu, self.now, out);
        match received {
            Received::Packet(length) => self.deliver(peer, length, out),
            Received::Handled => {}
            Received::Malformed => count(&self.counters.malformed),
            Received::Refused => count(&self.counters.refused),
        }
    }

    fn admit(
        &self,
        message: Message,
        from: &Endpoint,
        datagram: &[u8],
        out: &mut impl Output,
    ) -> Option<&Identity> {
        let identity = self.shared.identity.as_deref()?;
        let space = out.datagram_space(HANDSHAKE_SPACE);
        match identity.admit(message, from.remote.ip(), datagram, self.now.monotonic, space) {
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

    #[inline]
    fn deliver(&self, peer: &Arc<Peer>, length: usize, out: &mut impl Output) {
        let plaintext = &out.packet_space(length)[..length];
        match packet::parse(plaintext) {
            None => count(&self.counters.malformed),
            Some(header) if self.owns(peer, header.source) => out.packet_done(header.length),
            Some(_) => count(&self.counters.foreign_source),
        }
    }

    fn owns(&self, peer: &Arc<Peer>, source: IpAddr) -> bool {
        self.shared.table.route(source).is_some_and(|owner| Arc::ptr_eq(owner, peer))
    }

    /// The peer to whom this inner address belongs, for I/O that encrypts several packets under one lock.
    pub fn route(&self, address: IpAddr) -> Option<&Arc<Peer>> {
        self.shared.table.route(address)
    }

    /// The peer with this public key.
    pub fn peer(&self, key: &PublicKey) -> Option<&Arc<Peer>> {
        self.shared.table.get(key)
    }
}
