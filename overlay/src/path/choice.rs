//! Which line of a peer carries its traffic: the ladder, with hysteresis.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::Rung;
use super::line::{Line, Liveness};

/// A better line has to live so long before traffic goes back to it, at first.
const SETTLE: Duration = Duration::from_secs(5);
/// Each time that it dies soon after, twice as long, up to this.
const SETTLE_MOST: Duration = Duration::from_secs(300);
/// What is soon.
const SOON: Duration = Duration::from_secs(60);
/// A line that carried so long proves that its peer's paths are steady again.
const STEADY: Duration = Duration::from_secs(600);
/// At the start the best line gets so long to answer before a worse one that did is taken.
const GRACE: Duration = Duration::from_millis(200);
/// And the line that the device sends to already so long, before another one is taken; so does the line in use when a
/// worse one is the first to answer again.
const ADOPTION: Duration = Duration::from_secs(1);
/// A line that has answered within this time is known to live. Otherwise it is asked first.
const FRESH: Duration = Duration::from_secs(2);
/// A better line that loses more than this is not better.
const LOSS_MOST: f64 = 0.25;

/// Why a decision fell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// The first line that lives.
    First,
    /// The device sent there before anything was decided.
    Adopted,
    /// The one before does not answer any more.
    Died,
    /// It lived for so long, and is better.
    Better(Duration),
    /// The one before is not offered any more.
    Withdrawn,
    /// None lives.
    NoneLives,
    /// The one in use lives again.
    Recovered,
}

/// A decision, and when it fell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    /// When.
    pub at: Instant,
    /// What is used from then on; `None` when nothing lives.
    pub to: Option<(Rung, SocketAddr)>,
    /// What was used before.
    pub from: Option<(Rung, SocketAddr)>,
    /// Why.
    pub why: Why,
}

impl Decision {
    /// The decision as a sentence.
    pub fn text(&self) -> String {
        let shown = |line: Option<(Rung, SocketAddr)>| match line {
            Some((rung, address)) => format!("{} {address}", rung.as_str()),
            None => "nothing".to_owned(),
        };
        let (to, from) = (shown(self.to), shown(self.from));
        match self.why {
            Why::First => format!("{to}: the first that answers"),
            Why::Adopted => format!("{to}: the device sends there already, and it answers"),
            Why::Died => format!("{to}: {from} does not answer any more"),
            Why::Better(lived) => {
                format!("{to}: better than {from}, and alive for {} s", lived.as_secs())
            }
            Why::Withdrawn => format!("{to}: {from} is not offered any more"),
            Why::NoneLives => format!("blocked: {from} does not answer any more, and nothing else does"),
            Why::Recovered => format!("{to}: it answers again"),
        }
    }
}

/// The state of a peer's choice.
#[derive(Debug, Clone)]
pub struct Choice {
    /// The line in use, by its address, and since when.
    pub carrying: Option<(Rung, SocketAddr, Instant)>,
    /// Whether the line in use is known to be dead, and nothing else lives.
    pub blocked: bool,
    /// Where a device sends to that was found as an agent before us left it.
    pub adopted: Option<SocketAddr>,
    settle: Duration,
    // When traffic went back to a better line.
    climbed: Option<Instant>,
    first_alive: Option<Instant>,
    // Whether nothing answered when the line in use had died, and when a worse one did so again.
    silent: bool,
    revived: Option<Instant>,
}

impl Default for Choice {
    fn default() -> Self {
        Self {
            carrying: None,
            blocked: false,
            adopted: None,
            settle: SETTLE,
            climbed: None,
            first_alive: None,
            silent: false,
            revived: None,
        }
    }
}

impl Choice {
    /// Where the line in use stands among the lines, which are in order, the best first.
    pub fn index(&self, lines: &[Line]) -> Option<usize> {
        let (_, address, _) = self.carrying?;
        lines.iter().position(|line| line.candidate.address == address)
    }

    /// Reports whether a worse line answers again and the dead one in use has a moment left to do so too.
    pub fn is_reviving(&self) -> bool {
        self.revived.is_some()
    }

    /// Decides anew.
    pub fn decide(&mut self, lines: &[Line], now: Instant) -> Option<Decision> {
        let Some((rung, address, since)) = self.carrying else { return self.first(lines, now) };
        let from = Some((rung, address));
        let index = self.index(lines);
        let lives = index.is_some_and(|at| lines[at].lives());
        if lives {
            (self.silent, self.revived) = (false, None);
            if self.blocked {
                self.blocked = false;
                return Some(Decision { at: now, to: from, from, why: Why::Recovered });
            }
            if now.saturating_duration_since(since) >= STEADY {
                self.settle = SETTLE;
            }
            return self.climb(lines, index.unwrap_or(lines.len()), now);
        }
        // What died within moments of coming back to it gets longer to prove itself.
        if self.climbed.take().is_some_and(|at| now.saturating_duration_since(at) < SOON) {
            self.settle = (self.settle * 2).min(SETTLE_MOST);
        }
        let fresh = |line: &&Line| {
            line.state == Liveness::Alive
                && line.answered_at.is_some_and(|at| now.saturating_duration_since(at) < FRESH)
        };
        if let Some(line) = lines.iter().find(fresh) {
            // A peer whose agent starts again answers by all lines, in whatever order they were asked.
            let worse = index.is_some_and(|used| line.candidate.rank() > lines[used].candidate.rank());
            if self.silent && worse {
                let since = *self.revived.get_or_insert(now);
                if now.saturating_duration_since(since) < ADOPTION {
                    return None;
                }
            }
            (self.blocked, self.silent, self.revived) = (false, false, None);
            let why = if index.is_some() { Why::Died } else { Why::Withdrawn };
            return Some(self.take(line, from, why, now));
        }
        (self.silent, self.revived) = (true, None);
        if self.blocked || lines.iter().any(Line::lives) {
            return None;
        }
        self.blocked = true;
        Some(Decision { at: now, to: None, from, why: Why::NoneLives })
    }

    fn take(&mut self, line: &Line, from: Option<(Rung, SocketAddr)>, why: Why, now: Instant) -> Decision {
        let (rung, address) = (line.candidate.rung, line.candidate.address);
        self.carrying = Some((rung, address, now));
        Decision { at: now, to: Some((rung, address)), from, why }
    }

    fn first(&mut self, lines: &[Line], now: Instant) -> Option<Decision> {
        let best = lines.iter().find(|line| line.state == Liveness::Alive)?;
        let since = *self.first_alive.get_or_insert(now);
        let adopted = self.adopted(lines);
        if let Some(line) = adopted.filter(|line| line.state == Liveness::Alive) {
            return Some(self.take(line, None, Why::Adopted, now));
        }
        let is_best = adopted.is_none() && lines.first().is_some_and(|line| line.candidate == best.candidate);
        let waited = now.saturating_duration_since(since) >= self.patience(lines);
        (is_best || waited).then(|| self.take(best, None, Why::First, now))
    }

    /// The line that the device sends to already, unless it is known to be dead.
    fn adopted<'a>(&self, lines: &'a [Line]) -> Option<&'a Line> {
        let address = self.adopted?;
        lines.iter().find(|line| line.candidate.address == address && line.state != Liveness::Dead)
    }

    fn patience(&self, lines: &[Line]) -> Duration {
        if self.adopted(lines).is_some() { ADOPTION } else { GRACE }
    }

    fn climb(&mut self, lines: &[Line], index: usize, now: Instant) -> Option<Decision> {
        let used = &lines[index].candidate;
        let better = lines[..index].iter().find(|line| {
            better(line, used)
                && line.alive_since.is_some_and(|at| now.saturating_duration_since(at) >= self.settle)
        })?;
        let lived = better.alive_since.map(|at| now.saturating_duration_since(at)).unwrap_or_default();
        self.climbed = Some(now);
        let from = Some((used.rung, used.address));
        Some(self.take(better, from, Why::Better(lived), now))
    }

    /// When something may be decided without any news.
    pub fn wake_at(&self, lines: &[Line]) -> Option<Instant> {
        let Some(index) = self.index(lines) else {
            let any = self.carrying.is_none() && lines.iter().any(|line| line.state == Liveness::Alive);
            return self.first_alive.filter(|_| any).map(|at| at + self.patience(lines));
        };
        if let Some(at) = self.revived {
            return Some(at + ADOPTION);
        }
        let used = &lines[index];
        let settling = lines[..index].iter().filter(|line| used.lives() && better(line, &used.candidate));
        settling.filter_map(|line| line.alive_since).map(|at| at + self.settle).min()
    }
}

/// Whether a line is worth going back to, once it has lived for a while. One published address is as good as the next.
fn better(line: &Line, used: &super::Candidate) -> bool {
    line.candidate.rank() < used.rank() && line.state == Liveness::Alive && line.loss <= LOSS_MOST
}
