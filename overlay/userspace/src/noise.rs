//! The Noise tunnel to one peer, on boringtun's published state machine. Nothing else in this crate names it.
//!
//! boringtun reads its own clock (`CLOCK_BOOTTIME`), and only [`Tunnel::tick`] lets time pass for it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult, handshake};
use boringtun::x25519;
use parking_lot::{Mutex, MutexGuard};

use crate::guard::Guard;
use crate::key::{PresharedKey, PrivateKey, PublicKey};

/// Bytes that a data message adds to its plaintext.
pub const DATA_OVERHEAD: usize = 32;
/// Bytes of the largest message that is not data, a handshake initiation.
pub const HANDSHAKE_SPACE: usize = 148;

// Counters at or above this must not be accepted (WireGuard paper, section 6.1: Reject-After-Messages).
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

/// What kind of WireGuard message a datagram is, judged by type and length alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// Handshake initiation: the sender is unknown until it is decrypted.
    Initiation,
    /// Handshake response to the tunnel with this receiver index.
    Response(u32),
    /// Cookie reply to the tunnel with this receiver index.
    CookieReply(u32),
    /// Data for the session with this receiver index.
    Data(u32),
}

impl Message {
    /// Classifies a datagram; `None` when it is no WireGuard message at all.
    #[inline]
    pub fn classify(datagram: &[u8]) -> Option<Self> {
        let word = |at: usize| datagram.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        match (word(0)?, datagram.len()) {
            (4, 32..) => {
                let counter = u64::from(word(8)?) | (u64::from(word(12)?) << 32);
                (counter < REJECT_AFTER_MESSAGES).then_some(Self::Data(word(4)?))
            }
            (1, 148) => Some(Self::Initiation),
            (2, 92) => Some(Self::Response(word(8)?)),
            (3, 64) => Some(Self::CookieReply(word(4)?)),
            _ => None,
        }
    }
}

/// Our side of every handshake: the key pair and the guard against floods of handshakes.
pub struct Identity {
    private: PrivateKey,
    public: PublicKey,
    // boringtun's limiters only check MACs here: the one never asks for a cookie, the other always does.
    unloaded: RateLimiter,
    loaded: RateLimiter,
    guard: Mutex<Guard>,
}

/// Why a handshake message goes no further.
#[derive(Debug, PartialEq, Eq)]
pub enum Refused {
    /// Not made for our public key, or malformed.
    Invalid,
    /// We are under load; the cookie reply of this many bytes is in the buffer.
    Cookie(usize),
    /// We are under load, and either this sender, whose address is proven, has sent too many, or all together have.
    TooMany,
}

impl Identity {
    /// An identity that answers with cookies beyond `limit` initiations and as many responses a second.
    pub fn new(private: PrivateKey, limit: u64) -> Self {
        let public = private.public();
        let limiter = |limit| RateLimiter::new(&x25519::PublicKey::from(*public.as_bytes()), limit);
        let (unloaded, loaded) = (limiter(u64::MAX), limiter(0));
        Self { private, public, unloaded, loaded, guard: Mutex::new(Guard::new(limit)) }
    }

    /// Our private key.
    pub fn private(&self) -> &PrivateKey {
        &self.private
    }

    /// Our public key.
    pub fn public(&self) -> &PublicKey {
        &self.public
    }

    /// Checks the MACs of a handshake message and counts it; `first` as in [`Guard::take`]. `out` needs
    /// [`HANDSHAKE_SPACE`] bytes.
    pub fn admit(
        &self,
        message: Message,
        from: IpAddr,
        datagram: &[u8],
        first: bool,
        now: Instant,
        out: &mut [u8],
    ) -> Result<(), Refused> {
        // Under load its MAC is checked along with the cookie, and not twice.
        if self.guard.lock().is_open(message, now) {
            if self.unloaded.verify_packet(Some(from), datagram, out).is_err() {
                return Err(Refused::Invalid);
            }
            if self.guard.lock().count(message, now) {
                return Ok(());
            }
        }
        if !self.guard.lock().take(message, datagram, from, first, now) {
            return Err(Refused::TooMany);
        }
        match self.loaded.verify_packet(Some(from), datagram, out) {
            Ok(_) => {
                let mut guard = self.guard.lock();
                guard.count(message, now);
                if guard.take_from(from, now) { Ok(()) } else { Err(Refused::TooMany) }
            }
            Err(TunnResult::WriteToNetwork(cookie)) => {
                self.guard.lock().count(message, now);
                Err(Refused::Cookie(cookie.len()))
            }
            Err(_) => Err(Refused::Invalid),
        }
    }

    /// What keeps floods of handshakes away.
    pub fn guard(&self) -> MutexGuard<'_, Guard> {
        self.guard.lock()
    }

    /// The public key that the sender of a handshake initiation claims; unproven until the tunnel accepts it.
    pub fn initiator(&self, datagram: &[u8]) -> Option<PublicKey> {
        let Ok(Packet::HandshakeInit(initiation)) = Tunn::parse_incoming_packet(datagram) else {
            return None;
        };
        let public = x25519::PublicKey::from(*self.public.as_bytes());
        handshake::parse_handshake_anon(&self.private.secret(), &public, &initiation)
            .ok()
            .map(|half| PublicKey::new(half.peer_static_public))
    }
}

/// What an authentic datagram turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub enum Opened {
    /// An initiation; the response of this many bytes is in the buffer.
    Respond(usize),
    /// A response: the session is up; its confirming keepalive of this many bytes is in the buffer.
    Established(usize),
    /// A cookie that the next handshake will carry. It proves nothing about the sender's address.
    Cookie,
    /// Data.
    Data {
        /// Length in bytes of the plaintext at the start of the buffer, padding removed; 0 for a keepalive;
        /// `None` when what was inside is not an IP packet.
        length: Option<usize>,
        /// Whether this message confirmed a session that we had responded to.
        confirms: bool,
    },
}

/// What passing time asks of a tunnel.
#[derive(Debug, PartialEq, Eq)]
pub enum Tick {
    /// Nothing to send.
    Quiet,
    /// The message of this many bytes in the buffer has to be sent.
    Send(usize),
    /// No session, and the handshake has been given up.
    Expired,
}

/// The handshake and session state towards one peer under one preshared key.
pub struct Tunnel {
    tunn: Tunn,
    index: u32,
    ready: bool,
    // boringtun keeps sessions in eight slots (receiver index modulo 8) and says neither which one it seals with
    // nor whether that is confirmed, so both are followed here by its own rule: a session whose data arrives is
    // used from then on, unless the one in use is there and younger.
    current: u8,
    occupied: bool,
    // One bit per slot: responded to, not yet confirmed by data.
    unconfirmed: u8,
    // The number of the clock reading at which each slot's session was established.
    established: [u64; SLOTS],
    readings: u64,
    // The handshake in progress, if any, is one that nobody answers any more.
    restart: bool,
}

const SLOTS: usize = 8;

fn unlimited(private: &PrivateKey) -> Arc<RateLimiter> {
    // Floods are judged once, for the whole device; a tunnel with a limit of its own would count twice.
    Arc::new(RateLimiter::new(&x25519::PublicKey::from(*private.public().as_bytes()), u64::MAX))
}

impl Tunnel {
    /// A tunnel whose receiver indices are `index << 8 | 0..256`.
    ///
    /// `None` when the peer's key is of low order: the shared secret would be known to everyone, and anyone
    /// could handshake in its name.
    pub fn new(
        private: &PrivateKey,
        peer: &PublicKey,
        preshared: Option<&PresharedKey>,
        index: u32,
    ) -> Option<Self> {
        let peer = x25519::PublicKey::from(*peer.as_bytes());
        if !private.secret().diffie_hellman(&peer).was_contributory() {
            return None;
        }
        let preshared = preshared.map(|key| *key.expose());
        let tunn = Tunn::new(private.secret(), peer, preshared, None, index, Some(unlimited(private)));
        Some(Self {
            tunn,
            index,
            ready: false,
            current: 0,
            occupied: false,
            unconfirmed: 0,
            established: [0; SLOTS],
            readings: 0,
            restart: false,
        })
    }

    /// The upper 24 bits of this tunnel's receiver indices.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Whether there is a confirmed session to send with.
    #[inline]
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// Encrypts `plaintext` into `out`, which needs `plaintext.len() + DATA_OVERHEAD` bytes and no less than
    /// [`HANDSHAKE_SPACE`]. `None` without a session.
    #[inline]
    pub fn seal(&mut self, plaintext: &[u8], out: &mut [u8]) -> Option<usize> {
        // Without a session boringtun would queue the packet itself; staging is the peer's business.
        if !self.ready || out.len() < (plaintext.len() + DATA_OVERHEAD).max(HANDSHAKE_SPACE) {
            return None;
        }
        match self.tunn.encapsulate(plaintext, out) {
            TunnResult::WriteToNetwork(message) => Some(message.len()),
            _ => None,
        }
    }

    /// Starts a handshake unless one is in progress. `out` needs [`HANDSHAKE_SPACE`] bytes.
    pub fn initiate(&mut self, out: &mut [u8]) -> Option<usize> {
        let restart = std::mem::take(&mut self.restart);
        match self.tunn.format_handshake_initiation(out, restart) {
            TunnResult::WriteToNetwork(message) => Some(message.len()),
            _ => None,
        }
    }

    /// Drops all sessions. What was learned against replayed initiations stays.
    pub fn end_sessions(&mut self, private: &PrivateKey) {
        // Of all that boringtun offers, only this drops sessions and nothing else; the key is the same.
        let public = x25519::PublicKey::from(*private.public().as_bytes());
        self.tunn.set_static_private(private.secret(), public, Some(unlimited(private)));
        self.unconfirmed = 0;
        self.restart = true;
        self.refresh();
    }

    /// Lets the tunnel see the present after a time without [`Tunnel::tick`].
    pub fn wake(&mut self) {
        let mut scratch = [0u8; HANDSHAKE_SPACE];
        let _ = self.tunn.update_timers(&mut scratch);
        self.readings += 1;
        self.refresh();
    }

    /// Lets time pass; to be called at least every 250 ms while the tunnel lives. `out` needs
    /// [`HANDSHAKE_SPACE`] bytes.
    pub fn tick(&mut self, out: &mut [u8]) -> Tick {
        let tick = match self.tunn.update_timers(out) {
            TunnResult::WriteToNetwork(message) => Tick::Send(message.len()),
            TunnResult::Err(WireGuardError::ConnectionExpired) => Tick::Expired,
            _ => Tick::Quiet,
        };
        self.readings += 1;
        self.refresh();
        match tick {
            // A keepalive in a session that the peer may not have.
            Tick::Send(_) if !self.ready && out.first() == Some(&4) => Tick::Quiet,
            tick => tick,
        }
    }

    /// Whether there is neither a session nor a handshake to keep alive.
    pub fn is_expired(&self) -> bool {
        self.tunn.is_expired()
    }

    /// Decrypts and authenticates a message that [`Message::classify`] accepted. `out` needs as many bytes as
    /// the datagram has and no less than [`HANDSHAKE_SPACE`]. `None` when it is not authentic or a replay.
    #[inline]
    pub fn open(&mut self, message: Message, datagram: &[u8], out: &mut [u8]) -> Option<Opened> {
        if out.len() < datagram.len().max(HANDSHAKE_SPACE) {
            return None;
        }
        let result = self.tunn.decapsulate(None, datagram, out);
        match (message, result) {
            (Message::Data(index), result) => {
                let length = match result {
                    // An IPv4 header that claims no length at all is cut to nothing, but is no keepalive.
                    TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                        (!packet.is_empty()).then_some(packet.len())
                    }
                    TunnResult::Done => Some(0),
                    // Only an authenticated plaintext that is no IP packet is answered like this.
                    TunnResult::Err(WireGuardError::InvalidPacket) => None,
                    _ => return None,
                };
                let slot = slot(index);
                let confirms = self.unconfirmed & bit(slot) != 0;
                if confirms || slot != self.current {
                    self.unconfirmed &= !bit(slot);
                    self.follow(slot);
                    self.refresh();
                }
                Some(Opened::Data { length, confirms })
            }
            (Message::Initiation, TunnResult::WriteToNetwork(response)) => {
                let slot = slot(response.get(4).copied().unwrap_or(0).into());
                self.unconfirmed |= bit(slot);
                self.established[usize::from(slot)] = self.readings;
                let length = response.len();
                self.refresh();
                Some(Opened::Respond(length))
            }
            (Message::Response(index), TunnResult::WriteToNetwork(keepalive)) => {
                let length = keepalive.len();
                let slot = slot(index);
                self.unconfirmed &= !bit(slot);
                self.established[usize::from(slot)] = self.readings;
                self.restart = false;
                self.follow(slot);
                self.refresh();
                Some(Opened::Established(length))
            }
            (Message::CookieReply(_), TunnResult::Done) => Some(Opened::Cookie),
            _ => None,
        }
    }

    fn follow(&mut self, slot: u8) {
        let established = |slot: u8| self.established[usize::from(slot)];
        if !self.occupied || established(slot) >= established(self.current) {
            self.current = slot;
        }
    }

    fn refresh(&mut self) {
        self.occupied = self.tunn.time_since_last_handshake().is_some();
        self.ready = self.occupied && self.unconfirmed & bit(self.current) == 0;
    }
}

fn slot(index: u32) -> u8 {
    (index & 7) as u8
}

fn bit(slot: u8) -> u8 {
    1 << (slot & 7)
}
