//! Keeps the kernel at what policy says, and cuts what it says no more.
//!
//! Flows that were judged bear an epoch in conntrack's mark, and are not judged again while it is the current one. A change that may
//! deny what was allowed ends the epoch in its own transaction: from then on each packet is judged. The next epoch begins only when
//! no packet can be under way any more that was judged by what stood before, since it would be marked as judged by what stands now.

use std::time::{Duration, Instant};

use crate::compile::Compiler;
use crate::nft::{NftError, Table};
use crate::ruleset::{Change, Ruleset};

/// How long a packet may take through the chains of one hook. It takes microseconds, but a virtual CPU can stand still meanwhile.
const SETTLE: Duration = Duration::from_millis(100);

/// Where a ruleset stands.
pub trait Backend {
    /// Whether a ruleset stands there, this process' or one before.
    fn stands(&self) -> bool;

    /// Makes the whole ruleset stand, whatever stood before.
    ///
    /// # Errors
    /// What the kernel says; what stood before stands, or both do.
    fn replace(&mut self, ruleset: &Ruleset) -> Result<(), NftError>;

    /// Makes changes, all at once.
    ///
    /// # Errors
    /// What the kernel says; nothing was changed.
    fn commit(&mut self, changes: &[Change]) -> Result<(), NftError>;
}

impl Backend for Table {
    fn stands(&self) -> bool {
        self.is_led_to()
    }

    fn replace(&mut self, ruleset: &Ruleset) -> Result<(), NftError> {
        Self::replace(self, ruleset)
    }

    fn commit(&mut self, changes: &[Change]) -> Result<(), NftError> {
        Self::commit(self, changes)
    }
}

/// What a pass did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pass {
    /// How many changes were made.
    pub changes: usize,
    /// Whether the whole ruleset was written.
    pub whole: bool,
    /// Whether flows are judged again.
    pub revoked: bool,
}

/// A compiler with the table that its rulesets stand in.
pub struct Enforcer<B> {
    /// What has to stand.
    pub compiler: Compiler,
    /// Where it stands.
    pub backend: B,
    epoch: u32,
    // When the next epoch begins.
    opens_at: Option<Instant>,
    // What stands is not known.
    whole: bool,
}

impl<B: Backend> Enforcer<B> {
    /// Nothing is written yet. `epoch` is by chance, so that flows marked by a predecessor are judged again.
    pub fn new(compiler: Compiler, backend: B, epoch: u32) -> Self {
        Self { compiler, backend, epoch, opens_at: None, whole: true }
    }

    /// Somebody else may have changed the table: the next pass writes all of it.
    pub fn distrust(&mut self) {
        self.whole = true;
    }

    /// When a pass is due that no event asks for.
    pub fn wake_at(&self) -> Option<Instant> {
        self.opens_at
    }

    /// Brings the kernel to what the compiler was told.
    ///
    /// # Errors
    /// What the kernel says. What stood before stands; the next pass writes all of it.
    pub fn pass(&mut self, now: Instant) -> Result<Pass, NftError> {
        let began = Instant::now();
        let delta = self.compiler.update();
        let mut pass = Pass::default();
        if !self.whole && !delta.changes.is_empty() {
            let mut changes = delta.changes;
            if delta.revokes {
                changes.extend(self.compiler.turn_epoch(None));
            }
            match self.backend.commit(&changes) {
                Ok(()) => {
                    pass.changes += changes.len();
                    pass.revoked = delta.revokes;
                }
                // What stands is not what was thought.
                Err(error) => {
                    tracing::warn!("{error}; the whole ruleset is written");
                    self.whole = true;
                }
            }
        }
        if self.whole {
            self.compiler.turn_epoch(None);
            self.replace()?;
            self.whole = false;
            (pass.whole, pass.revoked) = (true, true);
            pass.changes += 1;
        }
        if pass.revoked {
            // From when the change was made, not from when it was begun.
            self.opens_at = Some(now + began.elapsed() + SETTLE);
        }
        if self.opens_at.is_some_and(|at| at <= now) {
            self.opens_at = None;
            let value = self.next_epoch();
            let changes = self.compiler.turn_epoch(Some(value));
            if let Err(error) = self.backend.commit(&changes) {
                self.whole = true;
                return Err(error);
            }
            pass.changes += changes.len();
        }
        self.compiler.proven();
        Ok(pass)
    }

    /// Writes the whole ruleset: without the policies of one namespace, where the kernel refuses it for the last change of that.
    fn replace(&mut self) -> Result<(), NftError> {
        let Err(first) = self.backend.replace(self.compiler.ruleset()) else { return Ok(()) };
        if !first.is_about_contents() {
            return Err(first);
        }
        while let Some(namespace) = self.compiler.blame() {
            // What differs is in the whole.
            self.compiler.update();
            if self.backend.replace(self.compiler.ruleset()).is_ok() {
                tracing::warn!(
                    "{first}; namespace {namespace} is closed: without its policies the kernel takes the rest"
                );
                return Ok(());
            }
        }
        self.compiler.update();
        Err(first)
    }

    /// The next value of the mark, never zero: that is what a flow has that nobody marked.
    fn next_epoch(&mut self) -> u32 {
        let mask = self.compiler.mask();
        loop {
            self.epoch = self.epoch.wrapping_add(1);
            let value = spread(self.epoch, mask);
            if value != 0 {
                return value;
            }
        }
    }
}

/// The low bits of a number, put where the mask has bits.
fn spread(number: u32, mask: u32) -> u32 {
    let places = (0..u32::BITS).filter(|bit| mask >> bit & 1 == 1);
    places.enumerate().fold(0, |value, (index, bit)| value | (number >> index & 1) << bit)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::collections::BTreeSet;

    use nix::errno::Errno;
    use serde_json::json;

    use super::*;
    use crate::compile::{Logging, MASK, Settings};
    use crate::networkpolicy;
    use crate::object::{Pod, PodStatus};
    use crate::ruleset::{Match, Number, Ruleset};
    use crate::state::Event;

    /// A kernel that keeps what it is told, and refuses when it is told to.
    #[derive(Default)]
    struct Memory {
        standing: Ruleset,
        led_to: bool,
        refuses: bool,
        // What the kernel takes no chain with a rule of.
        poison: Option<Match>,
        writes: usize,
    }

    impl Memory {
        fn is_poisoned(&self, ruleset: &Ruleset) -> bool {
            let mut rules = ruleset.chains.values().flat_map(|chain| &chain.rules);
            self.poison.as_ref().is_some_and(|poison| rules.any(|rule| rule.matches.contains(poison)))
        }
    }

    impl Backend for Memory {
        fn stands(&self) -> bool {
            self.led_to
        }

        fn replace(&mut self, ruleset: &Ruleset) -> Result<(), NftError> {
            if self.is_poisoned(ruleset) {
                return Err(NftError::whole("building the ruleset", Errno::EINVAL));
            }
            self.led_to = true;
            self.standing = ruleset.clone();
            Ok(())
        }

        fn commit(&mut self, changes: &[Change]) -> Result<(), NftError> {
            if std::mem::take(&mut self.refuses) {
                return Err(NftError::whole("changing the policy", Errno::ENOENT));
            }
            let mut next = self.standing.clone();
            next.apply(changes);
            if self.is_poisoned(&next) {
                return Err(NftError::whole("changing the policy", Errno::EINVAL));
            }
            self.writes += 1;
            self.standing = next;
            Ok(())
        }
    }

    fn pod(name: &str, address: &str) -> Event {
        let metadata = serde_json::from_value(json!({"name": name, "labels": {"app": name}})).unwrap();
        let spec = serde_json::from_value(json!({"nodeName": "n1"})).unwrap();
        let status: PodStatus = serde_json::from_value(json!({"podIP": address})).unwrap();
        Event::Pod(Pod::new(metadata, spec, status).unwrap())
    }

    fn policy(from: &str) -> Event {
        Event::Policy(networkpolicy::read(&json!({
            "metadata": {"name": "p"},
            "spec": {"ingress": [{"from": [{"podSelector": {"matchLabels": {"app": from}}}]}]},
        })))
    }

    fn enforcer() -> Enforcer<Memory> {
        let settings = Settings {
            node: "n1".to_owned(),
            tunnels: ["sennit0".to_owned()].into(),
            keyless: [].into(),
            scope: ["10.0.0.0/8".parse().unwrap()].into(),
            own: ["10.0.1.0/24".parse().unwrap()].into(),
            address: None,
            strangers: false,
            outside_prefixes: true,
            carriers: [].into(),
            failsafe: crate::failsafe::FailSafe::default(),
            resolvers: None,
            check_sources: false,
            outside: BTreeSet::new(),
            vxlan: BTreeSet::new(),
            audit: false,
            log: Logging { group: 5, denied: 10, allowed: 0 },
            mask: MASK,
            budgets: Default::default(),
        };
        let mut compiler = Compiler::new(settings.clone());
        compiler.configure(settings, BTreeMap::new());
        Enforcer::new(compiler, Memory::default(), 7)
    }

    fn marks(enforcer: &Enforcer<Memory>) -> (usize, usize) {
        let rules = |name: &str| enforcer.backend.standing.chains[name].rules.len();
        (rules("established"), rules("stamp"))
    }

    const CLOSED: (usize, usize) = (2, 0);
    const OPEN: (usize, usize) = (3, 1);

    #[test]
    fn an_epoch_begins_only_when_packets_of_before_are_through() {
        let (mut enforcer, start) = (enforcer(), Instant::now());
        enforcer.compiler.take(pod("a", "10.0.1.1"));
        assert!(enforcer.pass(start).unwrap().whole);
        assert_eq!(marks(&enforcer), CLOSED);
        assert_eq!(enforcer.pass(start + SETTLE / 2).unwrap(), Pass::default());
        enforcer.pass(enforcer.wake_at().unwrap()).unwrap();
        assert_eq!((marks(&enforcer), enforcer.wake_at()), (OPEN, None));
        let first = enforcer.backend.standing.chains["stamp"].clone();
        // A change that can only allow more leaves it; one that may deny ends it at once.
        enforcer.compiler.take(policy("b"));
        assert!(enforcer.pass(start).unwrap().revoked);
        assert_eq!(marks(&enforcer), CLOSED);
        enforcer.pass(enforcer.wake_at().unwrap_or(start)).unwrap();
        enforcer.compiler.take(pod("b", "10.0.2.1"));
        let mut remote = enforcer.pass(start).unwrap();
        assert!(remote.revoked, "a local pod");
        enforcer.pass(enforcer.wake_at().unwrap_or(start)).unwrap();
        enforcer.compiler.take(match pod("b", "10.0.2.2") {
            Event::Pod(pod) => {
                Event::Pod(Pod { key: crate::object::Key::new(None, "b2"), node: None, ..pod })
            }
            other => other,
        });
        remote = enforcer.pass(start).unwrap();
        assert!(remote.changes > 0 && !remote.revoked && marks(&enforcer) == OPEN);
        assert_ne!(enforcer.backend.standing.chains["stamp"], first, "another epoch");
        assert_eq!(&enforcer.backend.standing, enforcer.compiler.ruleset());
    }

    #[test]
    fn what_the_kernel_refuses_is_written_as_a_whole() {
        let (mut enforcer, start) = (enforcer(), Instant::now());
        enforcer.pass(start).unwrap();
        enforcer.backend.refuses = true;
        enforcer.compiler.take(pod("a", "10.0.1.1"));
        assert!(enforcer.pass(start).unwrap().whole);
        assert_eq!(&enforcer.backend.standing, enforcer.compiler.ruleset());
    }

    fn of_namespace(namespace: &str, port: u16) -> Event {
        Event::Policy(networkpolicy::read(&json!({
            "metadata": {"name": "p", "namespace": namespace},
            "spec": {"ingress": [{"ports": [{"port": port}]}]},
        })))
    }

    fn pod_of(namespace: &str, address: &str) -> Event {
        match pod("a", address) {
            Event::Pod(pod) => Event::Pod(Pod { key: crate::object::Key::new(Some(namespace), "a"), ..pod }),
            other => other,
        }
    }

    #[test]
    fn what_the_kernel_refuses_closes_one_namespace() {
        let (mut enforcer, start) = (enforcer(), Instant::now());
        for (namespace, address) in [("first", "10.0.1.1"), ("bad", "10.0.1.2"), ("last", "10.0.1.3")] {
            enforcer.compiler.take(pod_of(namespace, address));
            enforcer.compiler.take(of_namespace(namespace, 80));
        }
        enforcer.pass(start).unwrap();
        let first =
            |port| Match::Numbers { number: Number::ServerPort, first: port, last: port, negated: false };
        enforcer.backend.poison = Some(first(666));
        // The one that is refused is neither the first nor the last of those that changed.
        for (namespace, port) in [("first", 81), ("bad", 666), ("last", 82)] {
            enforcer.compiler.take(of_namespace(namespace, port));
        }
        assert!(enforcer.pass(start).unwrap().whole);
        let closed = |enforcer: &Enforcer<Memory>| -> Vec<String> {
            enforcer.compiler.excesses().into_iter().map(|over| over.object).collect()
        };
        assert_eq!(closed(&enforcer), ["Namespace bad"]);
        assert_eq!(&enforcer.backend.standing, enforcer.compiler.ruleset());
        let rules = |enforcer: &Enforcer<Memory>, port| {
            let ruleset = &enforcer.backend.standing;
            let all = ruleset.chains.values().flat_map(|chain| &chain.rules);
            all.filter(|rule| rule.matches.contains(&first(port))).count()
        };
        assert!(rules(&enforcer, 81) > 0 && rules(&enforcer, 82) > 0, "the others have what they ask for");
        // Whatever others change meanwhile, it stays closed; what itself changes is tried.
        enforcer.compiler.take(of_namespace("last", 83));
        enforcer.pass(start).unwrap();
        assert!(rules(&enforcer, 83) > 0 && closed(&enforcer) == ["Namespace bad"]);
        enforcer.compiler.take(of_namespace("bad", 84));
        enforcer.pass(start).unwrap();
        assert!(rules(&enforcer, 84) > 0 && closed(&enforcer).is_empty());
    }

    #[test]
    fn nobody_is_closed_for_what_nobody_caused() {
        let (mut enforcer, start) = (enforcer(), Instant::now());
        enforcer.compiler.take(pod_of("first", "10.0.1.1"));
        enforcer.compiler.take(of_namespace("first", 80));
        enforcer.pass(start).unwrap();
        let before = enforcer.backend.standing.clone();
        enforcer.backend.poison = Some(Match::State(crate::ruleset::State::Known));
        enforcer.compiler.take(of_namespace("first", 81));
        assert!(enforcer.pass(start).is_err() && enforcer.compiler.excesses().is_empty());
        assert_eq!(enforcer.backend.standing, before, "what stood stands");
        enforcer.backend.poison = None;
        assert!(enforcer.pass(start).unwrap().whole);
        assert_eq!(&enforcer.backend.standing, enforcer.compiler.ruleset());
    }

    #[test]
    fn a_pass_that_finds_nothing_new_writes_nothing() {
        let (mut enforcer, start) = (enforcer(), Instant::now());
        enforcer.compiler.take(pod("a", "10.0.1.1"));
        enforcer.pass(start).unwrap();
        enforcer.pass(enforcer.wake_at().unwrap_or(start)).unwrap();
        let writes = enforcer.backend.writes;
        enforcer.compiler.take(pod("a", "10.0.1.1"));
        assert_eq!(enforcer.pass(start + SETTLE).unwrap(), Pass::default());
        assert_eq!(enforcer.backend.writes, writes);
    }

    #[test]
    fn a_mark_stays_within_its_mask() {
        assert_eq!(spread(0b1011, 0xff00), 0b1011 << 8);
        assert_eq!(spread(0b11, 0b1010), 0b1010);
        assert_eq!(spread(u32::MAX, 0xffff_ff00), 0xffff_ff00);
        let mut enforcer = enforcer();
        enforcer.epoch = 0x00ff_ffff - 1;
        assert_eq!([enforcer.next_epoch(), enforcer.next_epoch()], [MASK, 0x100]);
    }
}
