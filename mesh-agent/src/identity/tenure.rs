//! The decision which of two agents may publish for a node.
//!
//! An agent that is not certain to be the one that spoke last asks: it puts its own instance under the
//! publication that stands, and changes nothing else. Whoever speaks for the node writes that back; then the
//! one who asked waits, brings up no tunnel, and asks again later, ever more rarely. Where nobody answers the
//! name is free. Two that both speak see each other's writing; the one that is the copy, or the younger one,
//! steps back. The other writes ever more slowly against somebody who does not.

use std::time::{Duration, Instant};

use mesh_keyring::PublicKey;
use mesh_overlay::advertisement::EPOCH_MOST;
use mesh_overlay::advertisement::told::Instance;

/// The longest wait for the registry before tunnels come up without it.
const PATIENCE: Duration = Duration::from_secs(3);
/// The time that a publishing agent has to answer an agent that has just started.
const ANSWER: Duration = Duration::from_secs(3);
/// And one that has met somebody before: it may look once in ten seconds only.
const ANSWER_LATE: Duration = Duration::from_secs(25);
/// For so long an answer has to stand: a registry may show once more what was there before.
const STANDS: Duration = Duration::from_secs(1);
/// The first pause of an agent that waits; twice as long each time.
const PAUSE: Duration = Duration::from_secs(8);
/// The longest pause, and the longest between two writings against somebody else.
const PAUSE_MOST: Duration = Duration::from_secs(60);
/// So many writings against somebody else come at once.
const AT_ONCE: u32 = 3;
/// After so long without one, somebody else is forgotten.
const CALM: Duration = Duration::from_secs(180);

/// The publication that stands under this node's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The publication's key, or `None` if it cannot be read.
    pub key: Option<PublicKey>,
    /// The publication's generation.
    pub generation: u64,
    /// The agent that wrote it.
    pub instance: Option<Instance>,
    /// The endpoints that it publishes.
    pub endpoints: String,
    /// True if its claim equals this agent's claim.
    pub ours: bool,
}

/// An action on the node's publication.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Publish what this node says.
    Publish,
    /// Put the own instance under what stands there.
    Ask,
    /// Nothing.
    Keep,
}

/// The result of the decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// The action on the publication.
    pub step: Step,
    /// True if tunnels may be up.
    pub dial: bool,
    /// The generation to go on with, where the one of now is not the latest that stood under the name.
    pub generation: u64,
}

/// Somebody else who speaks for this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rival {
    /// Which agent; one of an earlier version does not say.
    pub instance: Option<Instance>,
    /// The other agent's key.
    pub key: Option<PublicKey>,
    /// The other agent's endpoints.
    pub endpoints: String,
    /// The time at which it was last seen.
    pub at: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The registry was not read yet.
    Beginning,
    /// It asks: since when the question stands, since when something else does, and how long is waited.
    Asking { since: Option<Instant>, contrary: Option<Instant>, answer: Duration },
    /// Somebody else speaks: when to ask again.
    Waiting { until: Instant },
    /// It speaks.
    Speaking,
}

/// An agent's right to speak for its node.
#[derive(Debug, Clone)]
pub struct Tenure {
    own: Instance,
    key: PublicKey,
    generation: u64,
    predecessor: Option<u64>,
    // Tunnels of this key stand since before the agent began.
    stood: bool,
    // Tunnels came up while the registry was away.
    dialled: bool,
    // Since when the first question waits to be written.
    asking_from: Option<Instant>,
    begun: Instant,
    state: State,
    pause: Duration,
    rival: Option<Rival>,
    against: u32,
    write_at: Option<Instant>,
    // When something was written over that did not say whose it was.
    edited: Option<Instant>,
    // Over whose publication it was written last.
    against_whom: Option<u64>,
}

impl Tenure {
    /// An agent that begins. `predecessor`: the agent before it with this state. `stood`: whether a device
    /// with this key has peers already.
    pub fn new(
        own: Instance,
        key: PublicKey,
        generation: u64,
        predecessor: Option<u64>,
        stood: bool,
        now: Instant,
    ) -> Self {
        Self {
            own,
            key,
            generation,
            predecessor,
            stood,
            dialled: false,
            asking_from: None,
            begun: now,
            state: State::Beginning,
            pause: PAUSE,
            rival: None,
            against: 0,
            write_at: None,
            edited: None,
            against_whom: None,
        }
    }

    /// Whoever else speaks for the node, as far as that is not long ago.
    pub fn rival(&self) -> Option<&Rival> {
        self.rival.as_ref()
    }

    /// Reports whether this agent leaves the node to another agent.
    pub fn waits(&self) -> bool {
        let asks_late = |answer| answer == ANSWER_LATE;
        match self.state {
            State::Waiting { .. } => true,
            State::Asking { answer, .. } => asks_late(answer),
            State::Beginning | State::Speaking => false,
        }
    }

    /// Decides, by what stands in the registry: `None` while that is not known.
    pub fn look(&mut self, seen: Option<Option<&Seen>>, now: Instant) -> Verdict {
        if self.rival.as_ref().is_some_and(|rival| now.saturating_duration_since(rival.at) > CALM) {
            (self.rival, self.against, self.write_at) = (None, 0, None);
            self.against_whom = None;
        }
        let Some(seen) = seen else {
            let patient = self.state == State::Beginning
                && !self.stood
                && now.saturating_duration_since(self.begun) < PATIENCE;
            // Nothing is written over what was not read: a cluster's API may have told a part of it.
            let dial = !patient && !self.waits();
            self.dialled |= dial;
            return self.verdict(Step::Keep, dial);
        };
        match self.state {
            State::Beginning => self.begin(seen),
            State::Asking { since: Some(since), contrary, answer } => {
                self.listen(seen, since, contrary, answer, now)
            }
            State::Waiting { until } if seen.is_none() || self.is_own(seen) || now >= until => {
                self.state = match seen {
                    None => State::Speaking,
                    Some(_) => State::Asking { since: None, contrary: None, answer: ANSWER_LATE },
                };
            }
            State::Speaking => {
                if let Some(other) = seen.filter(|seen| seen.instance.is_some() && !self.is_own(Some(seen))) {
                    self.meet(other, now);
                }
            }
            State::Asking { .. } | State::Waiting { .. } => {}
        }
        match self.state {
            State::Beginning => self.verdict(Step::Keep, self.stood),
            State::Asking { since, answer, .. } => {
                let step = if since.is_none() { Step::Ask } else { Step::Keep };
                let from = *self.asking_from.get_or_insert(now);
                // A registry that takes no question must not keep a node without tunnels for ever.
                let unheard = since.is_none() && now.saturating_duration_since(from) >= PATIENCE;
                self.verdict(step, (self.stood || self.dialled || unheard) && answer == ANSWER)
            }
            State::Waiting { .. } => self.verdict(Step::Keep, false),
            State::Speaking => {
                self.overtake(seen);
                let held = self.write_at.is_some_and(|at| now < at);
                let differs = seen.is_some_and(|seen| !self.is_own(Some(seen)));
                self.verdict(if held && differs { Step::Keep } else { Step::Publish }, true)
            }
        }
    }

    fn verdict(&self, step: Step, dial: bool) -> Verdict {
        Verdict { step, dial, generation: self.generation }
    }

    fn is_own(&self, seen: Option<&Seen>) -> bool {
        seen.and_then(|seen| seen.instance).is_some_and(|instance| instance.id == self.own.id)
    }

    fn begin(&mut self, seen: Option<&Seen>) {
        let Some(seen) = seen else {
            self.state = State::Speaking;
            return;
        };
        let mine = seen.key == Some(self.key);
        let before = seen.instance.is_some_and(|instance| Some(instance.id) == self.predecessor);
        // A copy of this state has the same predecessor; but not the tunnels, nor another key.
        let known = before && (self.stood || !mine) || seen.instance.is_none() && mine && self.stood;
        self.state = if known || self.is_own(Some(seen)) {
            State::Speaking
        } else {
            State::Asking { since: None, contrary: None, answer: ANSWER }
        };
    }

    fn listen(
        &mut self,
        seen: Option<&Seen>,
        since: Instant,
        contrary: Option<Instant>,
        answer: Duration,
        now: Instant,
    ) {
        let over = now.saturating_duration_since(since) >= answer;
        match seen {
            None => self.state = State::Speaking,
            Some(_) if self.is_own(seen) && over => self.state = State::Speaking,
            Some(_) if self.is_own(seen) => {
                self.state = State::Asking { since: Some(since), contrary: None, answer };
            }
            Some(other) => {
                let contrary = contrary.unwrap_or(now);
                if now.saturating_duration_since(contrary) >= STANDS {
                    self.step_back(other, now);
                } else {
                    self.state = State::Asking { since: Some(since), contrary: Some(contrary), answer };
                }
            }
        }
    }

    fn step_back(&mut self, other: &Seen, now: Instant) {
        self.note(other, now);
        self.state = State::Waiting { until: now + self.pause };
        self.pause = (self.pause * 2).min(PAUSE_MOST);
        (self.stood, self.dialled) = (false, false);
    }

    fn note(&mut self, other: &Seen, now: Instant) {
        let (instance, key, endpoints) = (other.instance, other.key, other.endpoints.clone());
        self.rival = Some(Rival { instance, key, endpoints, at: now });
    }

    /// Somebody has written over the publication of an agent that speaks.
    fn meet(&mut self, other: &Seen, now: Instant) {
        let Some(theirs) = other.instance else { return };
        // Who changes nothing but the instance asks. It is answered, but for an original that asks a copy.
        let asks = other.ours;
        // A registry restored from a backup shows once what stood there before. Who is alive writes again.
        let alive = self.against_whom == Some(theirs.id);
        let yields = if asks { self.own.copied && !theirs.copied } else { alive && theirs < self.own };
        if yields {
            self.step_back(other, now);
        }
    }

    /// Nobody takes a claim for later than one that stood under the name before, unless it says so.
    fn overtake(&mut self, seen: Option<&Seen>) {
        if let Some(seen) = seen
            && seen.key.is_some_and(|key| key != self.key)
            && seen.generation >= self.generation
        {
            self.generation = seen.generation.saturating_add(1).min(EPOCH_MOST);
        }
    }

    /// The question was written.
    pub fn asked(&mut self, now: Instant) {
        if let State::Asking { since, .. } = &mut self.state {
            *since = Some(now);
        }
    }

    /// The publication was written. `over`: what stood there was not this agent's.
    pub fn wrote(&mut self, over: Option<&Seen>, now: Instant) {
        let Some(other) = over.filter(|seen| !self.is_own(Some(seen))) else { return };
        if other.instance.is_some_and(|instance| Some(instance.id) == self.predecessor.take()) {
            return;
        }
        // Somebody edited it, or the registry was restored from a backup; unless that happens all the time.
        let again = self.edited.is_some_and(|at| now.saturating_duration_since(at) < CALM);
        let past = |theirs: Instance| {
            theirs.copied == self.own.copied
                && theirs.made == self.own.made
                && theirs.starts < self.own.starts
        };
        let harmless = other.instance.is_none_or(past);
        self.against_whom = other.instance.map(|instance| instance.id);
        if harmless && self.rival.is_none() && !again {
            self.edited = Some(now);
            return;
        }
        self.note(other, now);
        self.against = self.against.saturating_add(1);
        if let Some(beyond) = self.against.checked_sub(AT_ONCE) {
            let pause = Duration::from_secs(1 << beyond.min(10)).min(PAUSE_MOST);
            self.write_at = Some(now + pause);
        }
    }

    /// Returns the time of the next check, even if nothing changes.
    pub fn wake_at(&self) -> Option<Instant> {
        match self.state {
            State::Beginning => Some(self.begun + PATIENCE),
            State::Asking { since, contrary, answer } => {
                let answered = contrary.map(|at| at + STANDS);
                let unheard = self.asking_from.filter(|_| since.is_none()).map(|at| at + PATIENCE);
                since.map(|at| at + answer).into_iter().chain(answered).chain(unheard).min()
            }
            State::Waiting { until } => Some(until),
            State::Speaking => self.write_at,
        }
    }
}

#[cfg(test)]
#[path = "tenure/tests.rs"]
mod tests;
