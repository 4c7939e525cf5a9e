//! The end-to-end check of one peer: whether a packet from our mesh address goes through the tunnel to the peer's, and back.
//!
//! Probes of [lines](super::line) show that agents reach each other on the underlay. They say nothing of the routes, rules and firewalls
//! of the two hosts, nor of the prefixes that each side lets the other send from. The question here is an ordinary packet
//! to all of those.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// The interval between questions on a path that works.
pub const EVERY: Duration = Duration::from_secs(11);
/// The delay allowed to the other end before this end asks instead.
const SLACK: Duration = Duration::from_millis(500);
/// The interval while in doubt. It is short, so that chance losses decide nothing.
const FAST: Duration = Duration::from_millis(120);
/// The interval while nothing comes back.
const AGAIN: Duration = Duration::from_secs(2);
/// The wait for an answer before doubt begins, and the longest time that an answer still counts.
const PATIENCE: Duration = Duration::from_millis(700);
const LATE: Duration = Duration::from_secs(5);
/// So many questions in a row without an answer decide. At 30 % loss each way that happens by chance
/// once in 12,000 doubts.
const UNREACHED_AFTER: u32 = 14;

/// The result of the check through the tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reach {
    /// Nothing was decided: no path lives, or the check has just begun.
    Unknown,
    /// Packets go through and come back.
    Reached,
    /// A path lives, and no packet through the tunnel comes back.
    Unreached,
}

impl Reach {
    /// Joins the verdicts on all address families of a peer: every one has to work.
    pub fn of(all: impl Iterator<Item = Self>) -> Self {
        all.reduce(|one, other| match (one, other) {
            (Self::Unreached, _) | (_, Self::Unreached) => Self::Unreached,
            (Self::Unknown, _) | (_, Self::Unknown) => Self::Unknown,
            _ => Self::Reached,
        })
        .unwrap_or(Self::Unknown)
    }
}

/// The flags of a message inside the tunnel. The MTU field carries them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Says {
    /// The sender's last question was answered.
    pub satisfied: bool,
    /// The pods of the sender are cut off from the tunnel, by something on its host.
    pub cut_off: bool,
}

impl Says {
    /// Reads the field. Bits that are not known say nothing.
    pub fn read(field: u16) -> Self {
        Self { satisfied: field & 1 != 0, cut_off: field & 2 != 0 }
    }

    /// Returns the field.
    pub fn field(self) -> u16 {
        u16::from(self.satisfied) | u16::from(self.cut_off) << 1
    }
}

/// The check as status shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThroughReport {
    /// Our mesh address.
    pub from: IpAddr,
    /// The peer's.
    pub to: IpAddr,
    /// The result of the check.
    pub reach: Reach,
    /// Since when.
    pub since: Instant,
    /// The time of the last answer.
    pub answered_at: Option<Instant>,
    /// True if the peer says that its pods are cut off.
    pub cut_off: bool,
}

/// The check between two mesh addresses.
#[derive(Debug, Clone)]
pub struct Through {
    /// Our mesh address.
    pub from: IpAddr,
    /// The peer's.
    pub to: IpAddr,
    reach: Reach,
    since: Instant,
    answered_at: Option<Instant>,
    // Numbers of open questions, when they were asked, and whether they have been counted as lost.
    asked: VecDeque<(u64, Instant, bool)>,
    lost: u32,
    due: Instant,
    cut_off: bool,
}

impl Through {
    /// Begins a check.
    pub fn new(from: IpAddr, to: IpAddr, now: Instant) -> Self {
        Self {
            from,
            to,
            reach: Reach::Unknown,
            since: now,
            answered_at: None,
            asked: VecDeque::new(),
            lost: 0,
            due: now,
            cut_off: false,
        }
    }

    /// Counts questions without an answer. Without a path that lives (`lives`) nothing is asked and nothing is known.
    /// Returns whether the verdict changed.
    pub fn expire(&mut self, lives: bool, now: Instant) -> bool {
        self.asked.retain(|(_, at, _)| now.saturating_duration_since(*at) < LATE);
        if !lives {
            self.asked.clear();
            self.lost = 0;
            self.due = now + PATIENCE;
            return self.becomes(Reach::Unknown, now);
        }
        for (_, at, lost) in &mut self.asked {
            if !*lost && now.saturating_duration_since(*at) >= PATIENCE {
                *lost = true;
                self.lost += 1;
            }
        }
        self.due = self.due.min(now + self.interval() + SLACK);
        self.lost >= UNREACHED_AFTER && self.becomes(Reach::Unreached, now)
    }

    /// Forgives what is open: this host gave us no processor.
    pub fn pardon(&mut self) {
        // What was counted stays counted, or a host that is always late would never find out; one answer takes it all back.
        self.asked.retain(|(.., lost)| *lost);
    }

    /// Reports whether a question is due.
    pub fn asks(&self, now: Instant) -> bool {
        now >= self.due
    }

    /// Notes that a question was sent.
    pub fn note(&mut self, number: u64, now: Instant) {
        self.asked.push_back((number, now, false));
        self.due = now + self.interval();
    }

    /// Takes an answer. Returns whether the verdict changed; `None` when nothing like it was asked here.
    pub fn answered(&mut self, number: u64, says: Says, now: Instant) -> Option<bool> {
        let at = self.asked.iter().position(|(asked, ..)| *asked == number)?;
        // What was asked before it is of no interest any more.
        self.asked.drain(..=at);
        self.lost = 0;
        self.answered_at = Some(now);
        self.due = now + EVERY;
        let news = std::mem::replace(&mut self.cut_off, says.cut_off) != says.cut_off;
        Some(self.becomes(Reach::Reached, now) | news)
    }

    /// Takes note of a question of the peer's. Returns whether it says anything new.
    pub fn heard(&mut self, says: Says, now: Instant) -> bool {
        // Its own last question was answered, so that packets go both ways.
        if says.satisfied && self.reach == Reach::Reached && self.lost == 0 {
            self.answered_at = Some(now);
            self.due = now + EVERY + SLACK;
        }
        std::mem::replace(&mut self.cut_off, says.cut_off) != says.cut_off
    }

    /// Reports whether the last question was answered. The next question then says so.
    pub fn is_satisfied(&self) -> bool {
        self.reach == Reach::Reached && self.lost == 0
    }

    fn interval(&self) -> Duration {
        match self.reach {
            Reach::Unreached => AGAIN,
            _ if self.lost > 0 => FAST,
            Reach::Unknown => AGAIN,
            Reach::Reached => EVERY,
        }
    }

    fn becomes(&mut self, reach: Reach, now: Instant) -> bool {
        if self.reach == reach {
            return false;
        }
        (self.reach, self.since) = (reach, now);
        true
    }

    /// Returns the time at which [`Through::expire`] or a question is due.
    pub fn wake_at(&self) -> Instant {
        let open = self.asked.iter().filter(|(.., lost)| !lost).map(|(_, at, _)| *at + PATIENCE).min();
        open.map_or(self.due, |at| at.min(self.due))
    }

    /// Reports how it stands.
    pub fn report(&self) -> ThroughReport {
        let Self { from, to, reach, since, answered_at, cut_off, .. } = *self;
        ThroughReport { from, to, reach, since, answered_at, cut_off }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(now: Instant) -> Through {
        Through::new("fd07::1".parse().unwrap(), "fd07::2".parse().unwrap(), now)
    }

    // Runs the check from one moment to another. Returns how often it asked.
    fn run(
        check: &mut Through,
        from: Instant,
        millis: std::ops::Range<u64>,
        answers: impl Fn(u64) -> bool,
    ) -> usize {
        let mut asked = 0;
        for at in millis.step_by(10) {
            let now = from + Duration::from_millis(at);
            check.expire(true, now);
            if check.asks(now) {
                asked += 1;
                check.note(at, now);
                if answers(at) {
                    assert!(check.answered(at, Says::default(), now).is_some());
                }
            }
        }
        asked
    }

    #[test]
    fn silence_is_told_within_fifteen_seconds() {
        let begun = Instant::now();
        let mut check = check(begun);
        assert!(run(&mut check, begun, 0..60_000, |_| true) <= 11);
        assert_eq!(check.report().reach, Reach::Reached);
        run(&mut check, begun, 60_000..75_000, |_| false);
        assert_eq!(check.report().reach, Reach::Unreached);
        let asked = run(&mut check, begun, 75_000..85_000, |_| false);
        assert!(asked <= 11, "{asked}");
        run(&mut check, begun, 85_000..88_000, |_| true);
        assert_eq!(check.report().reach, Reach::Reached);
    }

    #[test]
    fn a_late_host_finds_out_too() {
        let begun = Instant::now();
        let mut check = check(begun);
        run(&mut check, begun, 0..1000, |_| true);
        for window in 0..30 {
            run(&mut check, begun, 1000 + window * 3000..4000 + window * 3000, |_| false);
            check.pardon();
        }
        assert_eq!(check.report().reach, Reach::Unreached);
    }

    #[test]
    fn half_of_all_answers_suffice() {
        let begun = Instant::now();
        let mut check = check(begun);
        run(&mut check, begun, 0..3_600_000, |at| (at / 10).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 63 == 0);
        assert_eq!(check.report().reach, Reach::Reached);
        assert!(check.report().since <= begun + Duration::from_secs(5));
    }

    #[test]
    fn no_path_means_no_verdict() {
        let begun = Instant::now();
        let mut check = check(begun);
        run(&mut check, begun, 0..30_000, |_| false);
        assert_eq!(check.report().reach, Reach::Unreached);
        assert!(check.expire(false, begun + Duration::from_secs(31)));
        assert_eq!(check.report().reach, Reach::Unknown);
        // An answer to what was asked before says nothing of now.
        assert_eq!(check.answered(29_000, Says::default(), begun + Duration::from_secs(32)), None);
    }
}
