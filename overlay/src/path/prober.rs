//! All peers: what arrives is given to the line that it concerns, and what is due is asked.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use mesh_keyring::{PrivateKey, PublicKey};

use super::choice::Decision;
use super::limit::Bucket;
use super::line::LineReport;
use super::pair::Peer;
use super::through::{Says, Through, ThroughReport};
use super::wire::{self, Kind, Message, NONCE, Rejected, RouteId, Secrets};
use super::{Candidate, Rung, headers};
use crate::endpoint::is_dialable;

/// Questions of one peer that are answered, a second and at once: from where it is known to be, and from elsewhere.
pub(super) const ANSWERS: (f64, f64) = (100.0, 500.0);
pub(super) const ANSWERS_ELSEWHERE: (f64, f64) = (5.0, 20.0);
/// The same of questions that may be recordings of a boot before: they use up nothing that those of now need.
pub(super) const ANSWERS_BEFORE: (f64, f64) = (20.0, 100.0);
/// Questions to addresses of one peer that have never answered, a second and at once, and to those of all peers.
pub(super) const UNPROVED: (f64, f64) = (2.0, 24.0);
pub(super) const UNPROVED_OF_ALL: (f64, f64) = (500.0, 4_000.0);
/// The same to addresses of one peer from which a question of it came a moment ago.
pub(super) const UNPROVED_HEARD: (f64, f64) = (2.0, 8.0);
/// Questions from the peer's mesh address that are answered, a second and at once.
pub(super) const ANSWERS_INSIDE: (f64, f64) = (10.0, 40.0);
/// A poll that comes so late was held up by the host.
const STARVED: Duration = Duration::from_millis(150);
/// On a host that is always late losses count all the same, or nothing would ever be left.
const PARDON_EVERY: Duration = Duration::from_secs(3);
/// Authentic datagrams of one peer that are heeded, a second and at once, from each address where it is known to be and from all others.
pub(super) const OPENED: (f64, f64) = (2_000.0, 2_000.0);
/// The same of datagrams that are deciphered and turn out to be forged. Beyond that, what goes on with the peer's present boot is still
/// deciphered, and of the rest one in so many.
pub(super) const FAILED: (f64, f64) = (2_000.0, 2_000.0);
const SAMPLE: u32 = 8;

/// A datagram to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmit {
    /// Where to.
    pub to: SocketAddr,
    /// The address to send it from; `None`: the one that the kernel chooses.
    pub from: Option<IpAddr>,
    /// The UDP payload.
    pub payload: Vec<u8>,
}

/// Where a peer may be reached, the best first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PeerPaths {
    /// The addresses.
    pub candidates: Vec<Candidate>,
    /// What our side can put on a direct path to an address that is learned, in bytes of IP; 0: there are no direct paths.
    pub mtu_most: u16,
    /// Between which mesh addresses packets have to go through the tunnel: ours, and the peer's.
    pub inside: Vec<(IpAddr, IpAddr)>,
    /// The addresses from which its questions come through the tunnel.
    pub asking: Vec<IpAddr>,
}

/// How a peer is reached.
#[derive(Debug, Clone)]
pub struct PeerReport {
    /// The line in use and since when; `None` as long as none ever answered.
    pub carrying: Option<(Rung, SocketAddr, Instant)>,
    /// Whether the line in use does not answer, and nothing else does.
    pub blocked: bool,
    /// The MTU of the line in use both ways, in bytes of IP, where it is known.
    pub mtu: Option<u16>,
    /// All lines, the best first.
    pub lines: Vec<LineReport>,
    /// The last decisions, the oldest first.
    pub decisions: Vec<Decision>,
    /// The end-to-end checks of the peer's mesh addresses.
    pub through: Vec<ThroughReport>,
}

/// What came of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// It was a probe of a peer.
    Taken,
    /// It was none, or not made by a peer.
    Rejected(Rejected),
    /// It came again.
    Replayed,
    /// More than may be.
    TooMany,
}

/// Probes all peers.
pub struct Prober {
    own: PrivateKey,
    boot: [u8; 16],
    count: u64,
    first: u64,
    routes: HashMap<RouteId, PublicKey>,
    peers: BTreeMap<PublicKey, Peer>,
    reachable: Box<dyn Fn(&SocketAddr) -> bool + Send>,
    changes: u64,
    // The port of our own device: what comes through the tunnel to it is heeded by no program.
    port: u16,
    // What peers are told of our pods.
    cut_off: bool,
    // For questions to addresses that have never answered, and the peer for which there was none last.
    unproved: Option<Bucket>,
    short: Option<PublicKey>,
    ids: u64,
    // When something was due, as it was known after the last poll.
    due: Option<Instant>,
    pardoned: Option<Instant>,
}

impl Prober {
    /// Of no peers yet. `boot` is random and another one each time: nonces are made of it.
    pub fn new(own: PrivateKey, boot: [u8; 16]) -> Self {
        let mut first = [0; 8];
        first.copy_from_slice(&boot[..8]);
        Self {
            own,
            boot,
            count: 0,
            first: u64::from_be_bytes(first),
            routes: HashMap::new(),
            peers: BTreeMap::new(),
            reachable: Box::new(|_| true),
            changes: 0,
            port: 0,
            cut_off: false,
            unproved: None,
            short: None,
            ids: 0,
            due: None,
            pardoned: None,
        }
    }

    /// A number that grows with each decision and each MTU that changes.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// The route ids of all that peers send us, in order.
    pub fn route_ids(&self) -> Vec<RouteId> {
        let mut ids: Vec<RouteId> = self.routes.keys().copied().collect();
        ids.sort_unstable();
        ids
    }

    /// A number that is another one when [`Prober::route_ids`] has others.
    pub fn route_ids_revision(&self) -> u64 {
        self.ids
    }

    /// Takes the peers as they are now. `reachable` says whether an address may be used at all: one inside of the mesh would put the
    /// tunnel into itself.
    pub fn set_peers(
        &mut self,
        peers: BTreeMap<PublicKey, PeerPaths>,
        reachable: impl Fn(&SocketAddr) -> bool + Send + 'static,
        now: Instant,
    ) {
        // Nobody has such an address, whoever claims it.
        self.reachable = Box::new(move |to| is_dialable(to.ip()) && to.port() != 0 && reachable(to));
        let (routes, ids) = (&mut self.routes, &mut self.ids);
        self.peers.retain(|key, peer| {
            let keep = peers.contains_key(key);
            if !keep {
                *ids += 1;
                routes.remove(&peer.secrets.receiving_id());
            }
            keep
        });
        for (key, paths) in peers {
            let peer = self.peers.entry(key).or_insert_with(|| {
                let secrets = Secrets::derive(&self.own, &key);
                routes.insert(secrets.receiving_id(), key);
                *ids += 1;
                Peer::new(secrets, now)
            });
            self.changes += u64::from(peer.offer(paths, &self.reachable, now));
        }
    }

    /// Sets the port of our own device, to which peers' mesh addresses are asked.
    pub fn set_port(&mut self, port: u16) {
        self.port = port;
    }

    /// Tells peers from now on whether the pods of this node are cut off from the tunnel.
    pub fn set_cut_off(&mut self, cut_off: bool) {
        self.cut_off = cut_off;
    }

    /// The device sends to this address: somebody was learned there.
    pub fn observed(&mut self, key: &PublicKey, endpoint: SocketAddr, now: Instant) {
        if (self.reachable)(&endpoint)
            && let Some(peer) = self.peers.get_mut(key)
        {
            peer.learn(endpoint, true, now);
        }
    }

    /// The same of a device that was found as an agent before us left it: what it sends to is kept while it answers.
    pub fn adopted(&mut self, key: &PublicKey, endpoint: SocketAddr, now: Instant) {
        self.observed(key, endpoint, now);
        if let Some(peer) = self.peers.get_mut(key) {
            peer.choice.adopted = Some(endpoint);
        }
    }

    /// A datagram has arrived.
    pub fn receive(
        &mut self,
        from: SocketAddr,
        datagram: &mut [u8],
        now: Instant,
        out: &mut Vec<Transmit>,
    ) -> Received {
        let id = match wire::route_id(datagram) {
            Ok(id) => id,
            Err(why) => return Received::Rejected(why),
        };
        let known = self.routes.get(&id).and_then(|key| self.peers.get_mut(key));
        let Some(peer) = known else { return Received::Rejected(Rejected::Stranger) };
        let Some(nonce) = wire::nonce(datagram) else { return Received::Rejected(Rejected::Format) };
        if peer.nonces.knows(&nonce) {
            return Received::Replayed;
        }
        let place = peer.line(&from);
        // Each address by itself: nobody elsewhere uses up what the peer needs. And what is forged uses up nothing that what is authentic
        // needs: whoever sees the peer's datagrams can send from its address.
        let (opened, failed) = match place {
            Some(at) => {
                let line = &mut peer.lines[at];
                (&mut line.opened, &mut line.failed)
            }
            None => (&mut peer.opened, &mut peer.failed),
        };
        if !failed.has(now, FAILED) && (place.is_none() || !peer.nonces.continues(&nonce)) {
            peer.doubtful = peer.doubtful.wrapping_add(1);
            if !peer.doubtful.is_multiple_of(SAMPLE) {
                return Received::TooMany;
            }
        }
        let message = match peer.secrets.open(datagram) {
            Ok(message) => message,
            Err(why) => {
                failed.take(now, FAILED);
                return Received::Rejected(why);
            }
        };
        if !opened.take(now, OPENED) {
            return Received::TooMany;
        }
        if peer.offered.asking.contains(&from.ip()) {
            return self.through(id, from, &message, &nonce, now, out);
        }
        let present = peer.nonces.is_present(&nonce);
        match message.kind {
            Kind::Answer { seen } => {
                let before = peer.mtu();
                // It may come from another address than the question went to, where a host has several.
                let answered =
                    peer.lines.iter_mut().any(|line| line.answered(message.number, seen, message.mtu, now));
                peer.nonces.note(&nonce, answered);
                if answered {
                    self.changes += u64::from(peer.mtu() != before) + u64::from(peer.decide(now));
                    peer.rescue(now);
                }
            }
            Kind::Question => {
                peer.nonces.note(&nonce, false);
                let allowed = match (place, present) {
                    (Some(_), true) => peer.known.take(now, ANSWERS),
                    (Some(_), false) => peer.before.take(now, ANSWERS_BEFORE),
                    (None, true) => peer.elsewhere.take(now, ANSWERS_ELSEWHERE),
                    (None, false) => peer.elsewhere_before.take(now, ANSWERS_ELSEWHERE),
                };
                if !allowed {
                    return Received::TooMany;
                }
                let mtu = place.and_then(|at| peer.lines[at].pmtu.confirmed()).unwrap_or(0);
                let answer = Message { kind: Kind::Answer { seen: from }, number: message.number, mtu };
                let nonce = next_nonce(&self.boot, &mut self.count);
                out.push(Transmit {
                    to: from,
                    from: None,
                    payload: peer.secrets.seal(&answer, wire::LEAST, nonce),
                });
                match place {
                    Some(at) => {
                        let role = peer.role(at);
                        peer.lines[at].heard(role, now);
                    }
                    None if (self.reachable)(&from) => peer.learn(from, present, now),
                    None => {}
                }
            }
        }
        Received::Taken
    }

    /// A probe has come through the tunnel, from the peer's mesh address.
    fn through(
        &mut self,
        id: RouteId,
        from: SocketAddr,
        message: &Message,
        nonce: &[u8; NONCE],
        now: Instant,
        out: &mut Vec<Transmit>,
    ) -> Received {
        let known = self.routes.get(&id).and_then(|key| self.peers.get_mut(key));
        let Some(peer) = known else { return Received::Rejected(Rejected::Stranger) };
        match message.kind {
            Kind::Answer { .. } => {
                let mut ends = peer.through.iter_mut().filter(|end| end.to == from.ip());
                let changed = ends.find_map(|end| end.answered(message.number, Says::read(message.mtu), now));
                peer.nonces.note(nonce, changed.is_some());
                self.changes += u64::from(changed == Some(true));
            }
            Kind::Question => {
                peer.nonces.note(nonce, false);
                let says = Says::read(message.mtu);
                for end in peer.through.iter_mut().filter(|end| end.to == from.ip()) {
                    self.changes += u64::from(end.heard(says, now));
                }
                if !peer.inside.take(now, ANSWERS_INSIDE) {
                    return Received::TooMany;
                }
                let mtu = Says { satisfied: false, cut_off: self.cut_off }.field();
                let answer = Message { kind: Kind::Answer { seen: from }, number: message.number, mtu };
                let nonce = next_nonce(&self.boot, &mut self.count);
                let payload = peer.secrets.seal(&answer, wire::LEAST, nonce);
                out.push(Transmit { to: from, from: None, payload });
            }
        }
        Received::Taken
    }

    /// Does what is due.
    pub fn poll(&mut self, now: Instant, out: &mut Vec<Transmit>) {
        // Who was not given the processor for so long may have missed every answer: what is open tells nothing.
        let late = self.due.is_some_and(|due| now.saturating_duration_since(due) >= STARVED);
        let again = self.pardoned.is_some_and(|at| now.saturating_duration_since(at) < PARDON_EVERY);
        if late && !again {
            self.pardoned = Some(now);
            for peer in self.peers.values_mut() {
                peer.lines.iter_mut().for_each(|line| line.pardon(now));
                peer.through.iter_mut().for_each(Through::pardon);
            }
        }
        let mut of_all = self.unproved.take().unwrap_or_else(|| Bucket::new(now, UNPROVED_OF_ALL));
        // Whoever went short is the first now.
        let (first, mut short) = (self.short, None);
        let (behind, ahead): (Vec<_>, Vec<_>) =
            self.peers.iter_mut().partition(|(key, _)| first.is_some_and(|first| **key < first));
        for (key, peer) in ahead.into_iter().chain(behind) {
            if peer.wake_at().is_none_or(|due| due > now) {
                continue;
            }
            let before = peer.mtu();
            for line in &mut peer.lines {
                line.expire(now);
            }
            peer.forget(now);
            self.changes += u64::from(peer.decide(now)) + u64::from(peer.mtu() != before);
            peer.rescue(now);
            let lives = peer.lives();
            for end in &mut peer.through {
                self.changes += u64::from(end.expire(lives, now));
                if !lives || !end.asks(now) {
                    continue;
                }
                let nonce = next_nonce(&self.boot, &mut self.count);
                let number = self.first.wrapping_add(self.count);
                let mtu = Says { satisfied: end.is_satisfied(), cut_off: self.cut_off }.field();
                let question = Message { kind: Kind::Question, number, mtu };
                end.note(number, now);
                out.push(Transmit {
                    to: SocketAddr::new(end.to, self.port),
                    from: Some(end.from),
                    payload: peer.secrets.seal(&question, wire::LEAST, nonce),
                });
            }
            for at in 0..peer.lines.len() {
                let role = peer.role(at);
                if peer.lines[at].asks_unproved(role, now) && !peer.may_ask(at, now, &mut of_all) {
                    // What it has used up itself is its own affair.
                    if peer.unproved.has(now, UNPROVED) {
                        short.get_or_insert(*key);
                    }
                    peer.lines[at].put_off(now);
                    continue;
                }
                for (size, padded) in peer.lines[at].due(role, now) {
                    let nonce = next_nonce(&self.boot, &mut self.count);
                    // Another one after a restart: an answer to a question of before is none to one of now.
                    let number = self.first.wrapping_add(self.count);
                    let line = &mut peer.lines[at];
                    let to = line.candidate.address;
                    let mtu = line.pmtu.confirmed().unwrap_or(0);
                    let question = Message { kind: Kind::Question, number, mtu };
                    let payload = usize::from(size.saturating_sub(headers(&to)));
                    let payload = peer.secrets.seal(&question, payload, nonce);
                    line.note(number, size, padded, now);
                    out.push(Transmit { to, from: None, payload });
                }
            }
        }
        self.short = short.or(first);
        self.unproved = Some(of_all);
        self.due = self.wake_at();
    }

    /// When [`Prober::poll`] has something to do.
    pub fn wake_at(&self) -> Option<Instant> {
        self.peers.values().filter_map(Peer::wake_at).min()
    }

    /// Returns the line that carries to a peer.
    pub fn carrying(&self, key: &PublicKey) -> Option<(Rung, SocketAddr)> {
        let (rung, address, _) = self.peers.get(key)?.choice.carrying?;
        Some((rung, address))
    }

    /// How all peers are reached.
    pub fn report(&self, now: Instant) -> BTreeMap<PublicKey, PeerReport> {
        self.peers.iter().map(|(key, peer)| (*key, peer.report(now))).collect()
    }
}

fn next_nonce(boot: &[u8; 16], count: &mut u64) -> [u8; NONCE] {
    *count += 1;
    let mut nonce = [0; NONCE];
    nonce[..16].copy_from_slice(boot);
    nonce[16..].copy_from_slice(&count.to_be_bytes());
    nonce
}
