//! The identity of a running agent: what it may publish, what it tells, and what is wrong with it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use mesh_keyring::{MeshName, NodeName};
use mesh_overlay::advertisement::PUBLIC_KEY;
use mesh_overlay::advertisement::told::{INSTANCE, Instance, Reason, Told};
use mesh_overlay::{Advertisement, NodeRecord};

use super::Begun;
use super::file::{IdentityFile, Kept};
use super::hearsay::{self, Local};
use super::tenure::{Seen, Step, Tenure};
use crate::agent::Desired;
use crate::config::Config;
use crate::problem::{Problem, Since};
use crate::run;

/// For so long others have to be refused alike before that is published, at first.
const STEADY: Duration = Duration::from_secs(2);
/// Twice as long after each change, up to this: every change is a write, and news for all nodes.
const STEADY_MOST: Duration = Duration::from_secs(300);
/// A list unchanged for this long resets the delay for its next change.
const CALM: Duration = Duration::from_secs(600);

/// The nodes that this node refuses, published after a delay.
#[derive(Debug)]
struct Steady {
    current: BTreeMap<NodeName, Reason>,
    next: Option<(BTreeMap<NodeName, Reason>, Instant)>,
    hold: Duration,
    changed: Option<Instant>,
}

impl Steady {
    fn new() -> Self {
        Self { current: BTreeMap::new(), next: None, hold: STEADY, changed: None }
    }

    fn note(&mut self, now_refused: BTreeMap<NodeName, Reason>, now: Instant) {
        if self.changed.is_some_and(|at| now.saturating_duration_since(at) >= CALM) {
            (self.hold, self.changed) = (STEADY, None);
        }
        if now_refused == self.current {
            self.next = None;
            return;
        }
        // What is refused for another reason now is refused all the same.
        let since = match &self.next {
            Some((next, since)) if next.keys().eq(now_refused.keys()) => *since,
            _ => now,
        };
        if now.saturating_duration_since(since) >= self.hold {
            self.hold = (self.hold * 2).min(STEADY_MOST);
            (self.current, self.next, self.changed) = (now_refused, None, Some(now));
        } else {
            self.next = Some((now_refused, since));
        }
    }

    fn wake_at(&self) -> Option<Instant> {
        self.next.as_ref().map(|(_, since)| *since + self.hold)
    }
}

/// A running agent's identity.
pub struct Identity {
    node: NodeName,
    mesh: MeshName,
    kept: Kept,
    file: IdentityFile,
    instance: Instance,
    copied: Option<String>,
    waits: bool,
    // It came from a version that did not say whose it is.
    adopted: bool,
    complaints: Vec<String>,
    tenure: Tenure,
    refuses: Steady,
    seen: Option<Seen>,
    record: BTreeMap<String, String>,
    step: Step,
    // Whether it is another node's after all, and the agent is to begin anew.
    again: bool,
    problems: Vec<Problem>,
    since: Since,
}

impl Identity {
    /// Of an agent that begins. `stood`: whether a device with this key has peers already.
    pub fn new(config: &Config, begun: &Begun, stood: bool, now: Instant) -> Self {
        let (kept, instance) = (begun.kept.clone(), begun.instance);
        let tenure = Tenure::new(instance, kept.public_key, kept.generation, begun.predecessor, stood, now);
        Self {
            node: config.node.clone(),
            mesh: config.grants.mesh.clone(),
            file: IdentityFile::beside(run::key_file(config).path()),
            instance,
            copied: begun.copied.clone(),
            waits: begun.waits,
            adopted: begun.adopted,
            complaints: begun.complaints.clone(),
            tenure,
            refuses: Steady::new(),
            seen: None,
            record: BTreeMap::new(),
            step: Step::Keep,
            again: false,
            problems: Vec::new(),
            since: Since::default(),
            kept,
        }
    }

    /// Decides what may be published and dialled, by what is known of the registry. Where nothing may be
    /// dialled, nothing is left of that in `desired`. Returns the generation to publish.
    pub fn look(
        &mut self,
        nodes: Option<&[NodeRecord]>,
        desired: &mut Desired,
        clock: (Instant, SystemTime),
    ) -> u64 {
        let (now, wall) = clock;
        let own = nodes.map(|nodes| nodes.iter().find(|record| record.name == self.node));
        let own = own.map(|own| own.filter(|own| is_published(own)));
        self.record = own.flatten().map(|own| own.annotations.clone()).unwrap_or_default();
        self.seen = own.flatten().map(|own| seen(own, &desired.publish));
        if let Some(nodes) = nodes {
            self.disown(nodes);
        }
        let mut verdict = self.tenure.look(own.map(|_| self.seen.as_ref()), now);
        if self.waits || self.again {
            (verdict.step, verdict.dial) = (Step::Keep, false);
        }
        if verdict.generation != self.kept.generation {
            self.kept.generation = verdict.generation;
            if let Err(e) = self.file.store(&self.kept) {
                self.complaints = vec![format!("{}: {e}", self.file.path().display())];
            }
            tracing::warn!(
                generation = verdict.generation,
                "another key was published under this node's name: this one goes on with a later generation"
            );
        }
        desired.publish.epoch = verdict.generation;
        self.step = verdict.step;
        self.refuses.note(refused(desired), now);
        self.problems = self.find(nodes.unwrap_or_default());
        self.since.note(&mut self.problems, wall);
        if !verdict.dial {
            desired.plan.peers.clear();
            desired.plan.device.peers.clear();
        }
        verdict.generation
    }

    /// A state of an earlier version does not say whose it is. One whose key another node has published, and
    /// this node never has, is that node's.
    fn disown(&mut self, nodes: &[NodeRecord]) {
        if !std::mem::take(&mut self.adopted)
            || self.seen.as_ref().is_some_and(|seen| seen.key == Some(self.kept.public_key))
        {
            return;
        }
        let Some(holder) = hearsay::holder_of(&self.kept.public_key, &self.node, nodes) else { return };
        tracing::warn!(%holder, "this state is a copy of another node's");
        let kept = Kept { node: holder.clone(), ..self.kept.clone() };
        match self.file.store(&kept) {
            Ok(()) => self.again = true,
            Err(e) => {
                self.waits = true;
                self.copied = Some(format!(
                    "the key is that of node {holder}, and {}: {e}",
                    self.file.path().display()
                ));
            }
        }
    }

    /// Reports whether the agent must restart with the state that is now stored.
    pub fn begins_anew(&self) -> bool {
        self.again
    }

    /// Reports whether it still has to ask for its name.
    pub fn asks(&self) -> bool {
        self.step == Step::Ask
    }

    /// Returns the annotations to write to the registry, if any.
    pub fn annotations(&self, claim: &Advertisement) -> Option<BTreeMap<String, String>> {
        match self.step {
            Step::Keep => None,
            Step::Ask => {
                let mut asked = self.record.clone();
                asked.insert(INSTANCE.to_owned(), self.instance.to_string());
                Some(asked)
            }
            Step::Publish => {
                let refuses = self.refuses.current.clone();
                let told = Told { mesh: Some(self.mesh.clone()), instance: Some(self.instance), refuses };
                let mut all = claim.to_annotations();
                all.extend(told.to_annotations());
                Some(all)
            }
        }
    }

    /// Records that the write is done. Returns whether it published this node.
    pub fn written(&mut self, wrote: bool, now: Instant) -> bool {
        match self.step {
            Step::Ask => self.tenure.asked(now),
            Step::Publish if wrote => self.tenure.wrote(self.seen.as_ref(), now),
            Step::Publish | Step::Keep => {}
        }
        self.step == Step::Publish
    }

    fn find(&self, nodes: &[NodeRecord]) -> Vec<Problem> {
        let local = Local { node: &self.node, key: &self.kept.public_key, mesh: &self.mesh };
        let mut found = hearsay::problems(local, nodes);
        if let Some(why) = &self.copied {
            let copied = |text: &str, remedy: &str| {
                Problem::new("identity-copied", self.node.as_str(), format!("{why}: {text}"), remedy)
            };
            found.push(match self.waits {
                false => copied(
                    "this agent has made itself a key of its own",
                    "keep the state directory out of images (docs/identity.md)",
                ),
                true => copied(
                    "no tunnel is brought up, as identity.onCopy says",
                    "run `mesh-agent rekey` here, or set identity.onCopy to newKey",
                )
                .blocking(true),
            });
        }
        if let Some(rival) = self.tenure.rival() {
            let who =
                rival.instance.map_or("an agent that does not say which".to_owned(), |one| one.to_string());
            let key = rival.key.map_or("none".to_owned(), |key| key.to_string());
            let at: String = rival.endpoints.chars().take(120).collect();
            let waits = self.tenure.waits();
            let ours = if waits {
                "this one brings up no tunnel and publishes nothing"
            } else {
                "this one holds the name, and writes ever more slowly against the other"
            };
            let text = format!(
                "another agent publishes as {}, with the key {key}, dialled at {at}; {ours}",
                self.node
            );
            let remedy = "stop one of the two, or give a copied host its own name and run `mesh-agent rekey` there (docs/identity.md)";
            found.push(Problem::new("identity-elsewhere", who, text, remedy).blocking(waits));
        }
        found
    }

    /// Returns the problems of the last pass.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// The same as sentences, with what could not be written.
    pub fn errors(&self) -> impl Iterator<Item = String> {
        self.problems.iter().map(ToString::to_string).chain(self.complaints.iter().cloned())
    }

    /// Reports whether any problem keeps the agent from being ready.
    pub fn blocks(&self) -> bool {
        self.problems.iter().any(|problem| problem.blocks)
    }

    /// Returns the time of the next check, even if nothing changes.
    pub fn wake_at(&self) -> Option<Instant> {
        self.tenure.wake_at().into_iter().chain(self.refuses.wake_at()).min()
    }
}

fn is_published(record: &NodeRecord) -> bool {
    record.annotations.contains_key(PUBLIC_KEY) || record.annotations.contains_key(INSTANCE)
}

fn seen(record: &NodeRecord, ours: &Advertisement) -> Seen {
    let claim = hearsay::claim(record);
    let endpoints = claim.iter().flat_map(|claim| claim.endpoints.iter().chain(&claim.internal_endpoints));
    let mut endpoints: Vec<String> = endpoints.map(ToString::to_string).collect();
    endpoints.dedup();
    Seen {
        key: claim.as_ref().map(|claim| claim.public_key),
        generation: claim.as_ref().map_or(0, |claim| claim.epoch),
        instance: Told::parse(&record.annotations).instance,
        endpoints: endpoints.join(", "),
        ours: claim.is_some_and(|claim| claim.essential() == ours.essential()),
    }
}

fn refused(desired: &Desired) -> BTreeMap<NodeName, Reason> {
    let mut all = BTreeMap::new();
    for (node, whole, text) in &desired.refuses {
        let reason = Reason::new(*whole, text);
        let known = all.entry(node.clone()).or_insert_with(|| reason.clone());
        // What refuses all of it goes first.
        if *whole && !known.whole {
            *known = reason;
        }
    }
    all
}
