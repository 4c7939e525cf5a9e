//! One address of a peer: whether it answers, how fast, and when to ask again.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::limit::Bucket;
use super::pmtu::Pmtu;
use super::prober::{FAILED, OPENED};
use super::{Candidate, headers, wire};

/// The two ends of a line in use exchange a question and an answer this often, in turn.
pub const BEAT: Duration = Duration::from_millis(1200);
/// What the other end may be late by before we ask in its place.
const SLACK: Duration = Duration::from_millis(150);
/// How often to ask while a line is in doubt.
const FAST: Duration = Duration::from_millis(60);
/// So many questions in a row without an answer, after the one that raised the doubt, and a line is dead. At 30 % loss each way
/// that happens by chance once in some days.
const DEAD_AFTER: u32 = 16;
/// How often a line is asked that lives and is not needed.
const STANDBY: Duration = Duration::from_secs(30);
/// How often one is asked that would be better than the line in use, but is dead.
const BETTER: Duration = Duration::from_secs(4);
/// Of a peer that is reached nowhere, each line is asked at intervals that double from the first to the second.
const SEARCH: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));
/// An address that has never answered is asked this rarely after so many questions, some two minutes: it may be somebody else's, who has
/// no part in this. Both ends of two NATs still meet, since a NAT keeps what it was sent through for longer.
const UNPROVED: (u32, Duration) = (30, Duration::from_secs(30));
/// A question for which there was no budget is tried again after this.
const PUT_OFF: Duration = Duration::from_millis(500);
/// How long an answer is waited for: at least, at most, and where nothing is known yet.
const PATIENCE: (Duration, Duration, Duration) =
    (Duration::from_millis(100), Duration::from_secs(1), Duration::from_millis(500));
/// A late answer still tells the round-trip time.
const LATE: Duration = Duration::from_secs(5);
const ASKED_MOST: usize = 256;

/// What is known of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Liveness {
    /// Nothing yet.
    Unknown,
    /// It answers.
    Alive,
    /// It did until a moment ago.
    Doubtful,
    /// It does not answer.
    Dead,
}

/// What a line is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Traffic goes here.
    Carrying,
    /// It would be better than the one in use.
    Better,
    /// It is worse than the one in use.
    Standby,
    /// None is in use that lives.
    Searching,
}

#[derive(Debug, Clone, Copy)]
struct Asked {
    number: u64,
    at: Instant,
    size: u16,
    // It tells about the MTU, and nothing about life.
    padded: bool,
    expired: bool,
}

/// A line as status shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LineReport {
    /// The address.
    pub address: SocketAddr,
    /// The carrier.
    pub rung: super::Rung,
    /// How the address became known.
    pub origin: super::Origin,
    /// Whether it answers.
    pub state: Liveness,
    /// Whether the other end's questions arrive by it, in the last seconds: with `dead` that tells a path which is blocked one way.
    pub heard: bool,
    /// Smoothed round-trip time and its variation, in milliseconds (RFC 6298).
    pub rtt_ms: Option<f64>,
    /// As above.
    pub jitter_ms: Option<f64>,
    /// The share of questions without an answer lately, 0 to 1.
    pub loss: f64,
    /// The path MTU that was found, in bytes.
    pub mtu: Option<u16>,
    /// How the peer sees us on it.
    pub seen_as: Option<SocketAddr>,
}

/// One address of a peer.
#[derive(Debug, Clone)]
pub struct Line {
    /// The address.
    pub candidate: Candidate,
    /// Whether it answers.
    pub state: Liveness,
    /// Since when it lives, if it does.
    pub alive_since: Option<Instant>,
    /// When it answered last.
    pub answered_at: Option<Instant>,
    /// When a question of the peer came from there.
    pub heard_at: Option<Instant>,
    /// How the peer sees us on it.
    pub seen_as: Option<SocketAddr>,
    /// Its MTU from here to there.
    pub pmtu: Pmtu,
    /// Its MTU as the peer found it.
    pub their_mtu: Option<u16>,
    /// The share of questions without an answer lately.
    pub loss: f64,
    /// What is heeded of what comes from there, and is authentic.
    pub(super) opened: Bucket,
    /// What is deciphered in vain of what claims to come from there.
    pub(super) failed: Bucket,
    /// Whether the question that taught this address was surely of now.
    pub(super) fresh: bool,
    rtt: Option<(Duration, Duration)>,
    asked: VecDeque<Asked>,
    asked_at: Option<Instant>,
    due: Instant,
    lost: u32,
    tries: u32,
}

impl Line {
    /// A line that is asked at once.
    pub fn new(candidate: Candidate, now: Instant) -> Self {
        Self {
            candidate,
            state: Liveness::Unknown,
            alive_since: None,
            answered_at: None,
            heard_at: None,
            seen_as: None,
            pmtu: Pmtu::new(candidate.mtu_most),
            their_mtu: None,
            loss: 0.0,
            opened: Bucket::new(now, OPENED),
            failed: Bucket::new(now, FAILED),
            fresh: true,
            rtt: None,
            asked: VecDeque::new(),
            asked_at: None,
            due: now,
            lost: 0,
            tries: 0,
        }
    }

    /// Whether it can carry traffic.
    pub fn lives(&self) -> bool {
        matches!(self.state, Liveness::Alive | Liveness::Doubtful)
    }

    /// The MTU both ways, in bytes, where it is known.
    pub fn mtu(&self) -> Option<u16> {
        self.pmtu.confirmed().into_iter().chain(self.their_mtu).min()
    }

    /// Whether it has ever answered. Until then nobody but the peer says that the address is its own.
    pub fn is_proved(&self) -> bool {
        self.answered_at.is_some()
    }

    /// Whether [`Line::due`] has something to ask an address that has never answered.
    pub(super) fn asks_unproved(&self, role: Role, now: Instant) -> bool {
        !self.is_proved() && now >= self.due.min(now + self.interval(role) + self.slack())
    }

    /// Whether a question of the peer came from there in the last seconds.
    pub(super) fn was_heard(&self, now: Instant) -> bool {
        self.heard_at.is_some_and(|at| now.saturating_duration_since(at) < BEAT * 4)
    }

    /// There is no budget for the question that is due.
    pub(super) fn put_off(&mut self, now: Instant) {
        self.due = now + PUT_OFF;
    }

    fn patience(&self) -> Duration {
        let (least, most, unknown) = PATIENCE;
        match self.rtt {
            Some((smoothed, variation)) => {
                (smoothed + variation * 4 + Duration::from_millis(50)).clamp(least, most)
            }
            None => unknown,
        }
    }

    fn slack(&self) -> Duration {
        self.rtt.map_or(SLACK, |(smoothed, _)| smoothed.max(SLACK))
    }

    /// Ask at once, if the next question is not due sooner.
    pub fn hurry(&mut self, now: Instant) {
        self.due = self.due.min(now);
        if self.is_proved() {
            self.tries = 0;
        }
    }

    /// Ask at once, unless that was done just now.
    pub fn hurry_once(&mut self, now: Instant) {
        if self.asked_at.is_none_or(|at| now.saturating_duration_since(at) >= FAST * 4) {
            self.due = self.due.min(now);
        }
    }

    /// Asks as soon as a question of just now has had time for an answer.
    pub fn hurry_soon(&mut self, now: Instant) {
        let earliest = self.asked_at.map_or(now, |at| (at + FAST * 4).max(now));
        self.due = self.due.min(earliest);
    }

    /// The sizes of the questions to ask now, in bytes of IP, and whether they are for the MTU alone.
    pub fn due(&mut self, role: Role, now: Instant) -> Vec<(u16, bool)> {
        let padded = if self.lives() { self.pmtu.due(now) } else { Vec::new() };
        let mut sizes: Vec<(u16, bool)> = padded.into_iter().map(|size| (size, true)).collect();
        // A line has just come to carry, or to be missed.
        self.due = self.due.min(now + self.interval(role) + self.slack());
        if now >= self.due {
            let small = wire::LEAST as u16 + headers(&self.candidate.address);
            // While it is in doubt whether anything passes, small ones tell best.
            let full = self.state == Liveness::Alive && sizes.is_empty();
            sizes.push((if full { self.pmtu.size(now) } else { small }, false));
            self.tries = self.tries.saturating_add(1);
            self.asked_at = Some(now);
            let late = if self.state == Liveness::Alive && role == Role::Carrying {
                self.slack()
            } else {
                Duration::ZERO
            };
            self.due = now + self.interval(role) + late;
        }
        sizes
    }

    fn interval(&self, role: Role) -> Duration {
        let (tries, rarely) = UNPROVED;
        let least = if self.is_proved() || self.tries < tries { Duration::ZERO } else { rarely };
        least.max(self.usual_interval(role))
    }

    fn usual_interval(&self, role: Role) -> Duration {
        match (self.state, role) {
            (Liveness::Doubtful, _) => FAST,
            (Liveness::Alive, Role::Carrying | Role::Better) => BEAT,
            (Liveness::Alive, _) => STANDBY,
            (_, Role::Better) => BETTER,
            (_, Role::Standby) => STANDBY,
            _ => (SEARCH.0 * 2u32.saturating_pow(self.tries.min(8))).min(SEARCH.1),
        }
    }

    /// A question was sent.
    pub fn note(&mut self, number: u64, size: u16, padded: bool, now: Instant) {
        if self.asked.len() >= ASKED_MOST {
            self.asked.pop_front();
        }
        self.asked.push_back(Asked { number, at: now, size, padded, expired: false });
    }

    /// What is open does not count as lost, and is asked again.
    pub fn pardon(&mut self, now: Instant) {
        for asked in self.asked.iter_mut().filter(|asked| !asked.expired) {
            asked.expired = true;
            self.due = self.due.min(now);
        }
    }

    /// Counts the questions that were not answered in time.
    pub fn expire(&mut self, now: Instant) {
        let patience = self.patience();
        self.asked.retain(|asked| now.saturating_duration_since(asked.at) < LATE);
        let mut expired = Vec::new();
        for asked in self.asked.iter_mut().filter(|asked| !asked.expired) {
            if now.saturating_duration_since(asked.at) >= patience {
                asked.expired = true;
                expired.push((asked.at, asked.size, asked.padded));
            }
        }
        for (at, size, padded) in expired {
            self.pmtu.lost(size, at, self.answered_at, now);
            if padded {
                continue;
            }
            self.loss += (1.0 - self.loss) / 16.0;
            let answered_since = self.answered_at.is_some_and(|answered| answered >= at);
            if answered_since {
                continue;
            }
            self.lost += 1;
            match self.state {
                Liveness::Alive => {
                    self.state = Liveness::Doubtful;
                    self.lost = 0;
                    self.due = now;
                }
                Liveness::Doubtful if self.lost >= DEAD_AFTER => {
                    self.state = Liveness::Dead;
                    self.alive_since = None;
                    self.tries = 0;
                }
                Liveness::Unknown if self.lost >= 3 => self.state = Liveness::Dead,
                _ => {}
            }
        }
    }

    /// An answer came; `false` when nothing like it was asked here.
    pub fn answered(&mut self, number: u64, seen_as: SocketAddr, their_mtu: u16, now: Instant) -> bool {
        let Some(at) = self.asked.iter().position(|asked| asked.number == number) else { return false };
        let Some(asked) = self.asked.remove(at) else { return false };
        let took = now.saturating_duration_since(asked.at);
        self.rtt = Some(match self.rtt {
            None => (took, took / 2),
            Some((smoothed, variation)) => {
                (smoothed * 7 / 8 + took / 8, variation * 3 / 4 + smoothed.abs_diff(took) / 4)
            }
        });
        if !asked.expired {
            self.loss -= self.loss / 16.0;
        }
        if !self.lives() {
            self.alive_since = Some(now);
            self.loss = 0.0;
            // Until now what was known stood: another way may lie behind the address from here on.
            if self.state == Liveness::Dead {
                self.pmtu.forget();
                self.their_mtu = None;
            }
            // The size of the question that found it was a small one.
            self.due = now;
        }
        self.state = Liveness::Alive;
        self.lost = 0;
        self.tries = 0;
        self.answered_at = Some(now);
        self.seen_as = Some(seen_as);
        self.heard_mtu(their_mtu);
        self.pmtu.answered(asked.size, now);
        true
    }

    fn heard_mtu(&mut self, theirs: u16) {
        self.their_mtu = Some(theirs).filter(|mtu| *mtu > 0).or(self.their_mtu);
    }

    /// A question of the peer came from there: that it reaches us is known, so our own may wait.
    pub fn heard(&mut self, role: Role, now: Instant) {
        let before = self.heard_at.replace(now);
        // Who asks so often is in doubt: perhaps only answers get lost, and then ours do as well.
        let urgent = before.is_some_and(|at| now.saturating_duration_since(at) < FAST * 2);
        match self.state {
            Liveness::Alive if urgent => self.hurry_once(now),
            // However much it asks, we do too: only an answer tells that ours arrive.
            Liveness::Alive if role == Role::Carrying => {
                let latest = self.asked_at.map_or(now, |at| at + BEAT * 2 + SLACK);
                self.due = (now + BEAT).min(latest);
            }
            Liveness::Alive => {}
            // It may live again.
            _ => self.hurry_once(now),
        }
    }

    /// When [`Line::expire`] or [`Line::due`] has something to do.
    pub fn wake_at(&self) -> Instant {
        let patience = self.patience();
        let open = self.asked.iter().filter(|asked| !asked.expired).map(|asked| asked.at + patience);
        let padded = self.pmtu.wake_at().filter(|_| self.lives());
        open.chain(padded).min().map_or(self.due, |at| at.min(self.due))
    }

    /// How it stands.
    pub fn report(&self, now: Instant) -> LineReport {
        let millis = |of: Duration| (of.as_secs_f64() * 1e5).round() / 100.0;
        LineReport {
            address: self.candidate.address,
            rung: self.candidate.rung,
            origin: self.candidate.origin,
            state: self.state,
            heard: self.was_heard(now),
            rtt_ms: self.rtt.map(|(smoothed, _)| millis(smoothed)),
            jitter_ms: self.rtt.map(|(_, variation)| millis(variation)),
            loss: (self.loss * 1000.0).round() / 1000.0,
            mtu: self.mtu(),
            seen_as: self.seen_as,
        }
    }
}
