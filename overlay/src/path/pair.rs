//! The prober's state of one peer: its lines, the line in use, and the budgets of its requests.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::choice::{Choice, Decision};
use super::limit::{Bucket, Window};
use super::line::{Line, Liveness, Role};
use super::prober::{
    ANSWERS, ANSWERS_BEFORE, ANSWERS_ELSEWHERE, ANSWERS_INSIDE, FAILED, OPENED, PeerPaths, PeerReport,
    UNPROVED, UNPROVED_HEARD, UNPROVED_OF_ALL,
};
use super::through::Through;
use super::wire::Secrets;
use super::{Candidate, Origin, Rung};

/// So many addresses that were only learned are kept of one peer.
const LEARNED_MOST: usize = 4;
/// A learned address that does not answer is forgotten after this.
const LEARNED_FOR: Duration = Duration::from_secs(180);
/// Decisions that are remembered of a peer.
const DECISIONS_MOST: usize = 16;
/// Of the addresses that are kept as learned so many may come from such questions.
const LEARNED_BEFORE_MOST: usize = 2;

/// The prober's state of one peer, and the budgets of that peer's requests.
pub(super) struct Peer {
    pub(super) secrets: Secrets,
    pub(super) offered: PeerPaths,
    pub(super) lines: Vec<Line>,
    pub(super) choice: Choice,
    pub(super) decisions: VecDeque<Decision>,
    pub(super) nonces: Window,
    pub(super) known: Bucket,
    pub(super) before: Bucket,
    pub(super) elsewhere: Bucket,
    pub(super) elsewhere_before: Bucket,
    pub(super) opened: Bucket,
    pub(super) failed: Bucket,
    // Datagrams beyond the budget of those that fail.
    pub(super) doubtful: u32,
    pub(super) unproved: Bucket,
    pub(super) unproved_heard: Bucket,
    pub(super) through: Vec<Through>,
    pub(super) inside: Bucket,
}

impl Peer {
    pub(super) fn new(secrets: Secrets, now: Instant) -> Self {
        Self {
            secrets,
            offered: PeerPaths::default(),
            lines: Vec::new(),
            choice: Choice::default(),
            decisions: VecDeque::new(),
            nonces: Window::default(),
            known: Bucket::new(now, ANSWERS),
            before: Bucket::new(now, ANSWERS_BEFORE),
            elsewhere: Bucket::new(now, ANSWERS_ELSEWHERE),
            elsewhere_before: Bucket::new(now, ANSWERS_ELSEWHERE),
            opened: Bucket::new(now, OPENED),
            failed: Bucket::new(now, FAILED),
            doubtful: 0,
            unproved: Bucket::new(now, UNPROVED),
            unproved_heard: Bucket::new(now, UNPROVED_HEARD),
            through: Vec::new(),
            inside: Bucket::new(now, ANSWERS_INSIDE),
        }
    }

    pub(super) fn line(&self, address: &SocketAddr) -> Option<usize> {
        self.lines.iter().position(|line| line.candidate.address == *address)
    }

    /// Reports whether the line in use answers.
    pub(super) fn lives(&self) -> bool {
        !self.choice.blocked && self.choice.index(&self.lines).is_some_and(|at| self.lines[at].lives())
    }

    pub(super) fn mtu(&self) -> Option<u16> {
        self.lines[self.choice.index(&self.lines)?].mtu()
    }

    pub(super) fn offer(
        &mut self,
        paths: PeerPaths,
        reachable: &dyn Fn(&SocketAddr) -> bool,
        now: Instant,
    ) -> bool {
        let offered: Vec<Candidate> =
            paths.candidates.iter().copied().filter(|candidate| reachable(&candidate.address)).collect();
        let used = self.choice.carrying.map(|(_, address, _)| address);
        // What carries goes on to, until it dies; the way there may be known to us alone.
        for line in &mut self.lines {
            let candidate = &mut line.candidate;
            let still = offered.iter().find(|offered| offered.address == candidate.address);
            let mtu = still.map_or(paths.mtu_most, |still| still.mtu_most);
            match still {
                Some(still) => *candidate = *still,
                None if candidate.rung == Rung::Direct => {
                    (candidate.origin, candidate.mtu_most) = (Origin::Learned, mtu);
                }
                None => {}
            }
            line.pmtu.set_most(mtu);
        }
        self.lines.retain(|line| {
            let candidate = &line.candidate;
            let listed = offered.iter().any(|offered| offered.address == candidate.address);
            let direct = candidate.rung == Rung::Direct && paths.mtu_most > 0;
            let kept = direct && (line.lives() || used == Some(candidate.address));
            reachable(&candidate.address) && (listed || kept)
        });
        for candidate in offered {
            if self.line(&candidate.address).is_none() {
                self.lines.push(Line::new(candidate, now));
            }
        }
        let place = |line: &Line| {
            let listed = paths.candidates.iter().position(|other| other.address == line.candidate.address);
            (line.candidate.rank(), listed.unwrap_or(usize::MAX))
        };
        self.lines.sort_by_key(place);
        self.through.retain(|end| paths.inside.contains(&(end.from, end.to)));
        for (from, to) in &paths.inside {
            if !self.through.iter().any(|end| (end.from, end.to) == (*from, *to)) {
                self.through.push(Through::new(*from, *to, now));
            }
        }
        self.offered = paths;
        let Some((rung, address, since)) = self.choice.carrying else { return false };
        match self.line(&address) {
            Some(at) => {
                // What was learned may be known better now.
                let now_known = self.lines[at].candidate.rung;
                self.choice.carrying = Some((now_known, address, since));
                now_known != rung
            }
            None => {
                self.lines.iter_mut().for_each(|line| line.hurry(now));
                self.decide(now)
            }
        }
    }

    /// `fresh`: the peer was there a moment ago, whereas a recording of a boot before may come from anywhere.
    pub(super) fn learn(&mut self, address: SocketAddr, fresh: bool, now: Instant) {
        if let Some(at) = self.line(&address) {
            self.lines[at].fresh |= fresh;
            return;
        }
        let learned = |line: &&Line| line.candidate.origin == Origin::Learned;
        let stale = |line: &&Line| learned(line) && !line.fresh;
        let full = self.lines.iter().filter(learned).count() >= LEARNED_MOST;
        if full || !fresh && self.lines.iter().filter(stale).count() >= LEARNED_BEFORE_MOST {
            let used = self.choice.index(&self.lines);
            let oldest = self.lines.iter().enumerate().filter(|(at, line)| {
                learned(line) && (fresh || !line.fresh) && !line.lives() && Some(*at) != used
            });
            let Some((at, _)) = oldest.min_by_key(|(_, line)| line.heard_at) else { return };
            self.lines.remove(at);
        }
        // On a VXLAN device it is not direct, whatever its port.
        let carrier = self
            .offered
            .candidates
            .iter()
            .find(|one| one.rung > Rung::Direct && one.address.ip() == address.ip());
        let candidate = match carrier {
            Some(carrier) => Candidate { address, ..*carrier },
            None if self.offered.mtu_most == 0 => return,
            None => Candidate {
                address,
                rung: Rung::Direct,
                origin: Origin::Learned,
                mtu_most: self.offered.mtu_most,
            },
        };
        let mut line = Line::new(candidate, now);
        line.heard_at = Some(now);
        line.fresh = fresh;
        let place = self.lines.iter().position(|line| line.candidate.rung > candidate.rung);
        self.lines.insert(place.unwrap_or(self.lines.len()), line);
    }

    pub(super) fn forget(&mut self, now: Instant) {
        let used = self.choice.carrying.map(|(_, address, _)| address);
        self.lines.retain(|line| {
            let last = line.heard_at.max(line.answered_at);
            line.candidate.origin != Origin::Learned
                || line.lives()
                || used == Some(line.candidate.address)
                || last.is_some_and(|at| now.saturating_duration_since(at) < LEARNED_FOR)
        });
    }

    /// Reports whether the budget allows a question to an address that has never answered. An
    /// address the peer was heard at a moment ago has its own budget. The peer's other claims do
    /// not use it up.
    pub(super) fn may_ask(&mut self, at: usize, now: Instant, of_all: &mut Bucket) -> bool {
        if self.lines[at].was_heard(now) && self.unproved_heard.take(now, UNPROVED_HEARD) {
            return true;
        }
        let has_token = self.unproved.has(now, UNPROVED) && of_all.take(now, UNPROVED_OF_ALL);
        has_token && self.unproved.take(now, UNPROVED)
    }

    pub(super) fn role(&self, at: usize) -> Role {
        match self.choice.index(&self.lines) {
            Some(used) if used == at && self.lines[used].lives() => Role::Carrying,
            Some(used) if self.lines[used].lives() => {
                let rank = |at: usize| self.lines[at].candidate.rank();
                if rank(at) < rank(used) { Role::Better } else { Role::Standby }
            }
            _ => Role::Searching,
        }
    }

    /// While the line in use is in doubt, the others show whether they live.
    pub(super) fn rescue(&mut self, now: Instant) {
        if self.choice.carrying.is_none() {
            return;
        }
        let used = self.choice.index(&self.lines);
        if used.is_some_and(|used| self.lines[used].state == Liveness::Alive) {
            return;
        }
        for (at, line) in self.lines.iter_mut().enumerate() {
            let recently = |at: Instant| now.saturating_duration_since(at) < Duration::from_secs(1);
            let stale = line.state == Liveness::Alive && !line.answered_at.is_some_and(recently);
            if Some(at) == used && self.choice.is_reviving() {
                line.hurry_soon(now);
            } else if Some(at) != used && stale {
                line.hurry_once(now);
            }
        }
    }

    pub(super) fn decide(&mut self, now: Instant) -> bool {
        let Some(decision) = self.choice.decide(&self.lines, now) else { return false };
        if self.decisions.len() == DECISIONS_MOST {
            self.decisions.pop_front();
        }
        self.decisions.push_back(decision);
        true
    }

    pub(super) fn wake_at(&self) -> Option<Instant> {
        let lines = self.lines.iter().map(Line::wake_at);
        let ends = self.through.iter().map(Through::wake_at);
        lines.chain(ends).chain(self.choice.wake_at(&self.lines)).min()
    }

    pub(super) fn report(&self, now: Instant) -> PeerReport {
        PeerReport {
            carrying: self.choice.carrying,
            blocked: self.choice.blocked,
            mtu: self.mtu(),
            lines: self.lines.iter().map(|line| line.report(now)).collect(),
            decisions: self.decisions.iter().copied().collect(),
            through: self.through.iter().map(Through::report).collect(),
        }
    }
}
