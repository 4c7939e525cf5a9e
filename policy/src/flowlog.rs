//! The log of denials and flows: what rules log, gathered to one record per flow and window.
//!
//! Flow: [`Listener`] → [`Logged`] → [`FlowLog::note`] → [`FlowLog::drain`] → [`Record::to_json`]. Only the first of these
//! touches the kernel; time is an argument.

mod line;
mod nflog;
mod packet;
mod prefix;

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;

pub use line::{EndField, Identify, Identity, Line, PolicyField, RuleName};
pub use nflog::{Listener, Logged, parse};
pub use packet::{Detail, Head};
pub use prefix::{Decision, Direction, Label};

/// How much is gathered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How long, from the first packet on.
    pub window: Duration,
    /// How many flows are told apart in a window. What comes beyond is counted per rule.
    pub flows: usize,
    /// How many rules have such a count in a window. What comes beyond is counted in [`FlowLog::uncounted`].
    pub rules: usize,
}

impl Default for Limits {
    /// 10 s, 4096 flows (some 1 MB) and as many rules.
    fn default() -> Self {
        Self { window: Duration::from_secs(10), flows: 4096, rules: 4096 }
    }
}

/// Packets of one flow, or of all those of a rule that were not told apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// When the first packet came.
    pub first: Timestamp,
    /// When the last one did.
    pub last: Timestamp,
    /// What was decided about them.
    pub decision: Decision,
    /// Where.
    pub direction: Direction,
    /// By which rule.
    pub id: String,
    /// The head of the first packet. All share it but for the source port or the ICMP code. `None` where packets were not
    /// told apart: there were too many flows, or they were no IP packets that could be read.
    pub flow: Option<Head>,
    /// How many packets.
    pub count: u64,
}

/// What makes packets one flow.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    label: Label,
    /// Its head without source port and ICMP code.
    flow: Head,
}

/// Packets with one key.
#[derive(Debug)]
struct Entry {
    first: Timestamp,
    last: Timestamp,
    /// The head of the first packet.
    flow: Option<Head>,
    count: u64,
}

/// Gathers packets. Holds no more than its [`Limits`], whatever comes.
#[derive(Debug)]
pub struct FlowLog {
    limits: Limits,
    /// When the first packet of this window came.
    opened: Option<Timestamp>,
    flows: BTreeMap<Key, Entry>,
    totals: BTreeMap<Label, Entry>,
    foreign: u64,
    uncounted: u64,
}

impl Default for FlowLog {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

impl FlowLog {
    /// An empty log.
    pub fn new(limits: Limits) -> Self {
        let (flows, totals) = (BTreeMap::new(), BTreeMap::new());
        Self { limits, opened: None, flows, totals, foreign: 0, uncounted: 0 }
    }

    /// Packets so far whose prefix is not ours.
    pub fn foreign(&self) -> u64 {
        self.foreign
    }

    /// Packets of ours so far that came when there were too many flows and too many rules.
    pub fn uncounted(&self) -> u64 {
        self.uncounted
    }

    /// Takes a packet.
    pub fn note(&mut self, now: Timestamp, logged: &Logged<'_>) {
        let Some(label) = Label::parse(logged.prefix) else {
            self.foreign = self.foreign.saturating_add(1);
            return;
        };
        // A clock that was set back would leave the window open for as long.
        self.opened = Some(self.opened.map_or(now, |opened| opened.min(now)));
        let label = match Head::read(logged.packet) {
            None => label,
            Some(head) => {
                let key = Key { label, flow: shared(head) };
                if let Some(entry) = self.flows.get_mut(&key) {
                    entry.add(now);
                    return;
                }
                if self.flows.len() < self.limits.flows {
                    self.flows.insert(key, Entry::new(now, Some(head)));
                    return;
                }
                key.label
            }
        };
        if let Some(entry) = self.totals.get_mut(&label) {
            entry.add(now);
        } else if self.totals.len() < self.limits.rules {
            self.totals.insert(label, Entry::new(now, None));
        } else {
            self.uncounted = self.uncounted.saturating_add(1);
        }
    }

    /// When the window closes and [`FlowLog::drain`] has something; `None` while nothing came.
    pub fn due(&self) -> Option<Timestamp> {
        let opened = self.opened?;
        Some(opened.checked_add(self.limits.window).unwrap_or(Timestamp::MAX))
    }

    /// All records of a window that has closed, flows before what was not told apart; nothing before it has.
    pub fn drain(&mut self, now: Timestamp) -> Vec<Record> {
        if self.due().is_some_and(|due| due <= now) { self.flush() } else { Vec::new() }
    }

    /// All records, also of a window that is open: at the end, or when what their names mean is about to change.
    pub fn flush(&mut self) -> Vec<Record> {
        self.opened = None;
        let flows = std::mem::take(&mut self.flows).into_iter().map(|(key, entry)| entry.record(key.label));
        let totals = std::mem::take(&mut self.totals).into_iter().map(|(label, entry)| entry.record(label));
        let mut flows: Vec<Record> = flows.collect();
        // Stable: in order of their keys where the time is the same.
        flows.sort_by_key(|record| record.first);
        flows.extend(totals);
        flows
    }
}

impl Entry {
    fn new(now: Timestamp, flow: Option<Head>) -> Self {
        Self { first: now, last: now, flow, count: 1 }
    }

    fn add(&mut self, now: Timestamp) {
        self.first = self.first.min(now);
        self.last = self.last.max(now);
        self.count = self.count.saturating_add(1);
    }

    fn record(self, label: Label) -> Record {
        let (decision, direction, id) = (label.decision(), label.direction(), label.id().to_owned());
        let Self { first, last, flow, count } = self;
        Record { first, last, decision, direction, id, flow, count }
    }
}

/// The head without what may differ within a flow.
fn shared(head: Head) -> Head {
    let detail = match head.detail {
        Detail::None => Detail::None,
        Detail::Ports { destination, .. } => Detail::Ports { source: 0, destination },
        Detail::Icmp { kind, .. } => Detail::Icmp { kind, code: 0 },
    };
    Head { detail, ..head }
}

#[cfg(test)]
mod tests;
