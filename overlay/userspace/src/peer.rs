//! One peer: its tunnel, where it was last heard, what waits for a session, and its counters.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::{Mutex, MutexGuard};

use crate::key::{PresharedKey, PrivateKey, PublicKey};
use crate::noise::{DATA_OVERHEAD, HANDSHAKE_SPACE, Message, Opened, Tick, Tunnel};
use crate::offload::split::Segments;
use crate::packet::padded_length;
use crate::roster::Roster;
use crate::staging::{Budget, Queue};

pub use crate::staging::{STAGED_BYTES, STAGED_PACKETS};

/// The present, read once per batch.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// For intervals.
    pub monotonic: Instant,
    /// For what `wg show` prints.
    pub wall: SystemTime,
}

impl Now {
    /// Reads the clocks.
    pub fn read() -> Self {
        Self { monotonic: Instant::now(), wall: SystemTime::now() }
    }
}

/// Where a datagram came from, and by which of our addresses, so that the answer leaves by the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The peer's address.
    pub remote: SocketAddr,
    /// Our address, where known.
    pub local: Option<IpAddr>,
}

impl From<SocketAddr> for Endpoint {
    fn from(remote: SocketAddr) -> Self {
        Self { remote, local: None }
    }
}

/// Where the core puts what it produces. Space is asked for, filled, and then either committed by the `_done`
/// call that follows or left unused. Until it is committed, asking again gives the same space with its content,
/// and the two kinds of space never overlap.
pub trait Output {
    /// At least `length` bytes for the next datagram.
    fn datagram_space(&mut self, length: usize) -> &mut [u8];
    /// The first `length` bytes of the last datagram space are a datagram for `to`.
    fn datagram_done(&mut self, to: &Endpoint, length: usize);
    /// At least `length` bytes for the next packet towards the TUN device.
    fn packet_space(&mut self, length: usize) -> &mut [u8];
    /// The first `length` bytes of the last packet space are an IP packet for the TUN device.
    fn packet_done(&mut self, length: usize);
}

/// Whether what a batch puts out keeps its place among other batches by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Nothing that was read before it is still to be put out: packets may wait for a session, and those that have
    /// waited may leave.
    Kept,
    /// Earlier batches may still be at work: only what needs no session first may be done.
    Open,
}

/// What became of packets towards a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// They were encrypted and handed to the output.
    Sealed,
    /// Some of them wait for a handshake.
    Staged,
    /// Nothing was done: it has to be asked for again once order is kept.
    OutOfTurn,
    /// The peer has no known endpoint, or the device no usable key.
    Unreachable,
}

/// What became of a datagram from a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// The packet space holds a plaintext of this many bytes, whose source is still to be checked.
    Packet(usize),
    /// It was a keepalive or a handshake message and has been dealt with.
    Handled,
    /// It was authentic, but what was inside is no IP packet.
    Malformed,
    /// It was not authentic.
    Refused,
}

/// What time did to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticked {
    /// The index of a tunnel that has ended and can be forgotten.
    pub ended: Option<u32>,
    /// Whether a handshake initiation was made, which costs much more than all else.
    pub initiated: bool,
}

/// A peer. All that changes with traffic is behind one lock.
pub struct Peer {
    key: PublicKey,
    dormant: AtomicBool,
    roster: Arc<Roster>,
    state: Mutex<PeerState>,
}

impl Peer {
    /// A peer without endpoint and keepalive, whose packets wait at the expense of `staging`, and who is on the
    /// `roster` while time has something to do here.
    pub fn new(
        key: PublicKey,
        preshared: Option<PresharedKey>,
        tunnel: Option<Box<Tunnel>>,
        staging: Arc<Budget>,
        roster: Arc<Roster>,
    ) -> Self {
        let state = PeerState {
            listed: false,
            tunnel,
            retiring: None,
            preshared,
            endpoint: None,
            keepalive: 0,
            last_traversal: None,
            staged: Queue::new(staging),
            initiations: 0,
            last_handshake: None,
            tx_bytes: 0,
            rx_bytes: 0,
        };
        Self { key, dormant: AtomicBool::new(true), roster, state: Mutex::new(state) }
    }

    /// Whose peer this is.
    pub fn key(&self) -> &PublicKey {
        &self.key
    }

    /// Whether time has nothing to do here.
    #[inline]
    pub fn is_dormant(&self) -> bool {
        self.dormant.load(Ordering::Relaxed)
    }

    /// The state, for reading and configuring.
    pub fn lock(&self) -> MutexGuard<'_, PeerState> {
        self.state.lock()
    }

    /// The state, with its timers running from now on.
    #[inline]
    pub fn lock_awake(self: &Arc<Self>) -> MutexGuard<'_, PeerState> {
        let mut state = self.state.lock();
        if self.is_dormant() {
            self.wake(&mut state);
        }
        state
    }

    #[cold]
    fn wake(self: &Arc<Self>, state: &mut PeerState) {
        self.dormant.store(false, Ordering::Relaxed);
        if !std::mem::replace(&mut state.listed, true) {
            self.roster.add(Arc::clone(self));
        }
        if let Some(tunnel) = &mut state.tunnel {
            tunnel.wake();
        }
    }

    /// Stops this peer's timers until traffic or configuration wakes it.
    pub(crate) fn sleep(&self, _state: &MutexGuard<'_, PeerState>) {
        self.dormant.store(true, Ordering::Relaxed);
    }

    /// Stops this peer's timers if nothing runs. Returns whether the peer stays on the roster.
    pub(crate) fn rest(&self, state: &mut MutexGuard<'_, PeerState>) -> bool {
        if state.is_idle() {
            self.dormant.store(true, Ordering::Relaxed);
        }
        state.listed = !self.is_dormant();
        state.listed
    }
}

/// What changes with traffic and configuration.
pub struct PeerState {
    // None without a private key, or with a peer key that cannot be trusted.
    // Boxed, like the other, because each is some 11 KB and most peers have but one.
    tunnel: Option<Box<Tunnel>>,
    // The tunnel under the previous preshared key: its sessions live out their time, so that changing the key
    // on both sides one after the other loses no packet. It takes part in no handshake.
    retiring: Option<Box<Tunnel>>,
    preshared: Option<PresharedKey>,
    endpoint: Option<Endpoint>,
    keepalive: u16,
    last_traversal: Option<Instant>,
    staged: Queue,
    // Whether the roster has this peer; awake peers are on it, but not all who are on it are awake.
    listed: bool,
    // Made so far; what they cost is what limits a sweep.
    initiations: u64,
    last_handshake: Option<SystemTime>,
    tx_bytes: u64,
    rx_bytes: u64,
}

impl PeerState {
    /// Sends packets towards the peer, behind those that have waited for a session.
    pub fn send(
        &mut self,
        packets: &mut Segments<'_>,
        mtu: usize,
        now: Now,
        order: Order,
        out: &mut impl Output,
    ) -> Sent {
        let Some(endpoint) = self.endpoint else { return Sent::Unreachable };
        if self.tunnel.is_none() {
            return Sent::Unreachable;
        }
        if order == Order::Open && (self.has_staged() || !self.is_ready()) {
            return Sent::OutOfTurn;
        }
        if self.has_staged() {
            self.send_staged(mtu, now, out);
        }
        let mut sent = Sent::Sealed;
        while let Some(packet) = packets.next(mtu) {
            if !self.seal(packet.padded, &endpoint, now, out) {
                self.staged.push(&packet.padded[..packet.length]);
                sent = Sent::Staged;
            }
        }
        if self.tunnel.as_ref().is_some_and(|tunnel| !tunnel.is_ready()) {
            self.initiate(now, out);
        }
        sent
    }

    /// Encrypts one padded plaintext, whatever is in it. False without a session.
    #[inline]
    pub fn seal(&mut self, padded: &[u8], to: &Endpoint, now: Now, out: &mut impl Output) -> bool {
        let ready = |tunnel: &&mut Box<Tunnel>| tunnel.is_ready();
        let tunnel = self.tunnel.as_mut().filter(ready).or_else(|| self.retiring.as_mut().filter(ready));
        let Some(tunnel) = tunnel else { return false };
        let space = out.datagram_space((padded.len() + DATA_OVERHEAD).max(HANDSHAKE_SPACE));
        let Some(sealed) = tunnel.seal(padded, space) else { return false };
        out.datagram_done(to, sealed);
        self.note_sent(sealed, now);
        true
    }

    fn note_sent(&mut self, length: usize, now: Now) {
        self.tx_bytes += length as u64;
        self.last_traversal = Some(now.monotonic);
    }

    fn note_received(&mut self, length: usize, from: &Endpoint, now: Now) {
        self.rx_bytes += length as u64;
        self.last_traversal = Some(now.monotonic);
        if self.endpoint != Some(*from) {
            self.endpoint = Some(*from);
        }
    }

    /// Starts a handshake, unless one is running or the peer cannot be reached.
    pub fn initiate(&mut self, now: Now, out: &mut impl Output) {
        let (Some(tunnel), Some(endpoint)) = (&mut self.tunnel, self.endpoint) else { return };
        if let Some(length) = tunnel.initiate(out.datagram_space(HANDSHAKE_SPACE)) {
            self.initiations += 1;
            out.datagram_done(&endpoint, length);
            self.note_sent(length, now);
        }
    }

    fn send_keepalive(&mut self, now: Now, out: &mut impl Output) {
        let Some(endpoint) = self.endpoint else { return };
        if !self.seal(&[], &endpoint, now, out) {
            self.initiate(now, out);
        }
    }

    /// Whether packets wait for a session.
    pub fn has_staged(&self) -> bool {
        !self.staged.is_empty()
    }

    /// Sends what has waited for a session, if there is one now.
    pub fn send_staged(&mut self, mtu: usize, now: Now, out: &mut impl Output) {
        let Some(endpoint) = self.endpoint else { return };
        let mut padded = Vec::new();
        while self.is_ready()
            && let Some(packet) = self.staged.pop()
        {
            padded.clear();
            padded.extend_from_slice(&packet);
            padded.resize(padded_length(packet.len(), mtu), 0);
            self.seal(&padded, &endpoint, now, out);
        }
    }

    /// Takes in a message that was found to be for this peer. After [`Received::Packet`] the packet space of
    /// `out` holds the plaintext, which the caller commits or abandons. What waited for a session is the caller's
    /// to send.
    pub fn receive(
        &mut self,
        message: Message,
        datagram: &[u8],
        from: &Endpoint,
        now: Now,
        out: &mut impl Output,
    ) -> Received {
        let Some(tunnel) = tunnel_for(&mut self.tunnel, &mut self.retiring, message) else {
            return Received::Refused;
        };
        let space_length = datagram.len().max(HANDSHAKE_SPACE);
        let opened = if let Message::Data(_) = message {
            tunnel.open(message, datagram, out.packet_space(space_length))
        } else {
            tunnel.open(message, datagram, out.datagram_space(space_length))
        };
        match opened {
            None => Received::Refused,
            Some(Opened::Cookie) => Received::Handled,
            Some(Opened::Data { length, confirms }) => {
                self.note_received(datagram.len(), from, now);
                if confirms {
                    self.last_handshake = Some(now.wall);
                }
                match length {
                    Some(0) => Received::Handled,
                    Some(length) => Received::Packet(length),
                    None => Received::Malformed,
                }
            }
            Some(Opened::Respond(length)) => {
                // After a change of the preshared key any recorded initiation looks new: where the peer is, only
                // the data says that confirms the session.
                let known = self.endpoint.unwrap_or(*from);
                self.note_received(datagram.len(), &known, now);
                out.datagram_done(from, length);
                self.note_sent(length, now);
                Received::Handled
            }
            Some(Opened::Established(length)) => {
                self.note_received(datagram.len(), from, now);
                self.last_handshake = Some(now.wall);
                // Data confirms the session to the responder just as well as the empty message does.
                out.datagram_done(from, length);
                self.note_sent(length, now);
                Received::Handled
            }
        }
    }

    /// Lets time pass.
    pub fn tick(&mut self, now: Now, out: &mut impl Output) -> Ticked {
        let before = self.initiations;
        let ended = self.tick_retiring(now, out);
        if let Some(tunnel) = &mut self.tunnel {
            match tunnel.tick(out.datagram_space(HANDSHAKE_SPACE)) {
                Tick::Quiet => {}
                Tick::Expired => self.staged.clear(),
                Tick::Send(length) => {
                    if out.datagram_space(HANDSHAKE_SPACE).first() == Some(&1) {
                        self.initiations += 1;
                    }
                    if let Some(endpoint) = self.endpoint {
                        out.datagram_done(&endpoint, length);
                        self.note_sent(length, now);
                    }
                }
            }
        }
        if self.keepalive_is_due(now) {
            // Due again only after another interval, even if nothing could be sent.
            self.last_traversal = Some(now.monotonic);
            self.send_keepalive(now, out);
        }
        Ticked { ended, initiated: self.initiations != before }
    }

    fn tick_retiring(&mut self, now: Now, out: &mut impl Output) -> Option<u32> {
        let retiring = self.retiring.as_mut()?;
        let space = out.datagram_space(HANDSHAKE_SPACE);
        match retiring.tick(space) {
            Tick::Send(length) if space.first() == Some(&4) => {
                if let Some(endpoint) = self.endpoint {
                    out.datagram_done(&endpoint, length);
                    self.note_sent(length, now);
                }
            }
            // It wants a handshake: the current preshared key's tunnel has that one.
            Tick::Send(_) => self.initiate(now, out),
            Tick::Quiet | Tick::Expired => {}
        }
        self.retiring.take_if(|retiring| !retiring.is_ready()).map(|retiring| retiring.index())
    }

    fn keepalive_is_due(&self, now: Now) -> bool {
        self.keepalive != 0
            && self.endpoint.is_some()
            && self.last_traversal.is_none_or(|last| {
                now.monotonic.saturating_duration_since(last) >= Duration::from_secs(self.keepalive.into())
            })
    }

    fn is_idle(&self) -> bool {
        let asleep = self.tunnel.as_ref().is_none_or(|tunnel| tunnel.is_expired() && !tunnel.is_ready());
        asleep && self.retiring.is_none() && self.keepalive == 0 && self.staged.is_empty()
    }

    /// Forgets sessions and what waits for one, because the link went down. Returns an index to forget.
    pub(crate) fn end_sessions(&mut self, private: &PrivateKey) -> Option<u32> {
        self.staged.clear();
        if let Some(tunnel) = &mut self.tunnel {
            tunnel.end_sessions(private);
        }
        self.retiring.take().map(|tunnel| tunnel.index())
    }

    /// Makes a persistent keepalive due at once. False where there is none.
    pub(crate) fn hurry_keepalive(&mut self) -> bool {
        self.last_traversal = None;
        self.keepalive != 0
    }

    /// Replaces the tunnel because our own key has changed; all sessions end. Returns indices to forget.
    pub(crate) fn rekey(&mut self, tunnel: Option<Box<Tunnel>>) -> impl Iterator<Item = u32> + use<> {
        let old = [self.retiring.take(), std::mem::replace(&mut self.tunnel, tunnel)];
        self.staged.clear();
        old.into_iter().flatten().map(|tunnel| tunnel.index())
    }

    /// Replaces the preshared key; running sessions live out their time. Returns an index to forget.
    pub(crate) fn set_preshared(
        &mut self,
        preshared: Option<PresharedKey>,
        tunnel: Option<Box<Tunnel>>,
    ) -> Option<u32> {
        self.preshared = preshared;
        let old = std::mem::replace(&mut self.tunnel, tunnel)?;
        if old.is_ready() {
            // A retiring tunnel that still counts has been replaced twice within its sessions' lifetime.
            self.retiring.replace(old).map(|tunnel| tunnel.index())
        } else {
            Some(old.index())
        }
    }

    pub(crate) fn set_keepalive(&mut self, seconds: u16) {
        if self.keepalive == 0 {
            self.last_traversal = None;
        }
        self.keepalive = seconds;
    }

    pub(crate) fn set_endpoint(&mut self, endpoint: SocketAddr) {
        if self.endpoint.is_none_or(|known| known.remote != endpoint) {
            self.endpoint = Some(endpoint.into());
        }
    }

    /// Forgets which of our addresses the peer was answered from, if it is `lost`, or whichever it is.
    pub(crate) fn forget_local_address(&mut self, lost: Option<IpAddr>) {
        if let Some(endpoint) = &mut self.endpoint
            && (lost.is_none() || endpoint.local == lost)
        {
            endpoint.local = None;
        }
    }

    /// Indices of the tunnels in use.
    pub(crate) fn indices(&self) -> impl Iterator<Item = u32> + '_ {
        self.tunnel.iter().chain(&self.retiring).map(|tunnel| tunnel.index())
    }

    /// The preshared key.
    pub fn preshared(&self) -> Option<&PresharedKey> {
        self.preshared.as_ref()
    }

    /// Where the peer is thought to be.
    pub fn endpoint(&self) -> Option<&Endpoint> {
        self.endpoint.as_ref()
    }

    /// The persistent keepalive interval in seconds; 0 for off.
    pub fn keepalive(&self) -> u16 {
        self.keepalive
    }

    /// When the last handshake was completed.
    pub fn last_handshake(&self) -> Option<SystemTime> {
        self.last_handshake
    }

    /// Bytes of UDP payload sent and, authenticated, received.
    pub fn traffic(&self) -> (u64, u64) {
        (self.tx_bytes, self.rx_bytes)
    }

    /// Whether there is a session to send with.
    pub fn is_ready(&self) -> bool {
        self.tunnel.iter().chain(&self.retiring).any(|tunnel| tunnel.is_ready())
    }
}

/// Makes a tunnel for a peer under our private key, if both are there and fit.
pub(crate) fn tunnel(
    private: Option<&PrivateKey>,
    peer: &PublicKey,
    preshared: Option<&PresharedKey>,
    index: u32,
) -> Option<Box<Tunnel>> {
    let tunnel = Tunnel::new(private?, peer, preshared, index).map(Box::new);
    if tunnel.is_none() {
        tracing::warn!(%peer, "peer's public key is of low order; it will never be talked to");
    }
    tunnel
}

fn tunnel_for<'a>(
    current: &'a mut Option<Box<Tunnel>>,
    retiring: &'a mut Option<Box<Tunnel>>,
    message: Message,
) -> Option<&'a mut Box<Tunnel>> {
    let index = match message {
        Message::Initiation => return current.as_mut(),
        Message::Response(index) | Message::CookieReply(index) => {
            return current.as_mut().filter(|tunnel| tunnel.index() == index >> 8);
        }
        Message::Data(index) => index >> 8,
    };
    [current, retiring].into_iter().flatten().find(|tunnel| tunnel.index() == index)
}
