//! What a registry says of pods, namespaces and policies, in order, until somebody takes it.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_policy::Event;
use mesh_policy::kind::KINDS;
use mesh_policy::model::ObjectId;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

// Objects of a kind with a change that nobody has taken. Twice as many as are read: only those that are gone again can be more.
const WAITING_MOST: usize = 100_000;
// The most refused objects that are named.
const NAMED_MOST: usize = 64;

/// A kind of object that policy is decided from, by its name among all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kind(&'static str);

impl Kind {
    /// A pod.
    pub const POD: Self = Self("Pod");
    /// A namespace.
    pub const NAMESPACE: Self = Self("Namespace");

    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        let others = KINDS.iter().map(|kind| Self(kind.name));
        [Self::POD, Self::NAMESPACE].into_iter().chain(others)
    }

    /// The kind of objects that have this one.
    pub fn of(name: &'static str) -> Self {
        Self(name)
    }

    /// Its name.
    pub fn as_str(self) -> &'static str {
        self.0
    }
}

// Namespace and name.
type Object = (Option<String>, String);

#[derive(Debug, Default)]
struct Waiting {
    // Where the last list is in the queue, and the last event of each object after it.
    list: Option<u64>,
    objects: BTreeMap<Object, u64>,
    listed: bool,
    // Events were dropped, and only a list makes up for them.
    lost: bool,
}

#[derive(Debug, Default)]
struct Inner {
    queue: BTreeMap<u64, Event>,
    next: u64,
    waiting: BTreeMap<Kind, Waiting>,
    refused: BTreeMap<String, String>,
    // And whether the server refuses it to us.
    troubles: BTreeMap<&'static str, (String, bool)>,
}

#[derive(Debug, Default)]
struct Shared {
    inner: Mutex<Inner>,
    changed: Notify,
    // The server refuses a kind, or does so no more.
    turned: Notify,
    verdicts: watch::Sender<Verdicts>,
}

/// What is over its budget, and how, by object: what who enforces tells back.
pub type Verdicts = BTreeMap<String, String>;

/// What a registry says of pods, namespaces and policies: events in order, for the one who enforces. Clones are the same feed.
///
/// What a later event makes superfluous is not kept, so that it stays small however seldom somebody takes from it.
#[derive(Debug, Clone, Default)]
pub struct Feed {
    shared: Arc<Shared>,
}

impl Feed {
    /// Nothing has been said yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Something is different now.
    pub fn push(&self, event: Event) {
        self.shared.inner.lock().push(event);
        self.shared.changed.notify_one();
    }

    /// What is wrong with an object now, of which nothing counts then; `None`: nothing any more.
    pub fn refuse(&self, object: String, reason: Option<String>) {
        let news = {
            let refused = &mut self.shared.inner.lock().refused;
            match reason {
                Some(reason) => refused.insert(object, reason.clone()) != Some(reason),
                None => refused.remove(&object).is_some(),
            }
        };
        if news {
            self.shared.changed.notify_one();
        }
    }

    /// Why objects of a kind cannot be watched now; `None`: they can.
    pub fn trouble(&self, kind: &'static str, why: Option<String>) {
        self.tell(kind, why, false);
    }

    /// The same where the server refuses it to this agent.
    pub fn refusal(&self, kind: &'static str, why: String) {
        self.tell(kind, Some(why), true);
    }

    fn tell(&self, kind: &'static str, why: Option<String>, refused: bool) {
        let refuses = why.is_some() && refused;
        let (news, turns) = {
            let troubles = &mut self.shared.inner.lock().troubles;
            let before = match &why {
                Some(why) => troubles.insert(kind, (why.clone(), refused)),
                None => troubles.remove(kind),
            };
            let refused_before = before.as_ref().is_some_and(|(_, refused)| *refused);
            (before != why.map(|why| (why, refused)), refused_before != refuses)
        };
        if news {
            self.shared.changed.notify_one();
        }
        if turns {
            self.shared.turned.notify_one();
        }
    }

    /// Waits until the server refuses a kind, or does so no more. Safe to drop and call again; for one at a time.
    pub async fn turned(&self) {
        self.shared.turned.notified().await;
    }

    /// Kinds that the server does not let this agent watch, each with what it said.
    pub fn refusals(&self) -> Vec<(&'static str, String)> {
        let inner = self.shared.inner.lock();
        let refused = inner.troubles.iter().filter(|(_, (_, refused))| *refused);
        refused.map(|(kind, (why, _))| (*kind, why.clone())).collect()
    }

    /// Everything that was said since the last call, in order.
    pub fn take(&self) -> Vec<Event> {
        let mut inner = self.shared.inner.lock();
        inner.waiting.values_mut().for_each(|waiting| drop(waiting.forget()));
        std::mem::take(&mut inner.queue).into_values().collect()
    }

    /// Whether all kinds have been listed once.
    pub fn complete(&self) -> bool {
        let mut inner = self.shared.inner.lock();
        Kind::all().all(|kind| {
            let waiting = inner.waiting(kind);
            waiting.listed && !waiting.lost
        })
    }

    /// Whether nobody took events of this kind for so long that they were dropped: the kind has to be listed again.
    pub fn lost(&self, kind: Kind) -> bool {
        self.shared.inner.lock().waiting(kind).lost
    }

    /// Objects that were refused, each with the reason.
    pub fn problems(&self) -> Vec<String> {
        let inner = self.shared.inner.lock();
        let named = inner.refused.iter().take(NAMED_MOST);
        let mut problems: Vec<String> = named.map(|(object, reason)| format!("{object}: {reason}")).collect();
        let more = inner.refused.len() - problems.len();
        if more > 0 {
            problems.push(format!("and {more} more"));
        }
        problems
    }

    /// Why some of it may be out of date, or is not known.
    pub fn staleness(&self) -> Option<String> {
        let inner = self.shared.inner.lock();
        let troubles: Vec<String> =
            inner.troubles.iter().map(|(kind, (why, _))| format!("{kind}: {why}")).collect();
        Some(troubles.join("; ")).filter(|told| !told.is_empty())
    }

    /// Tells back what is over its budget now.
    pub fn judge(&self, verdicts: Verdicts) {
        self.shared.verdicts.send_if_modified(|before| {
            let news = *before != verdicts;
            if news {
                *before = verdicts;
            }
            news
        });
    }

    /// Follows what is over its budget.
    pub fn verdicts(&self) -> watch::Receiver<Verdicts> {
        self.shared.verdicts.subscribe()
    }

    /// Waits until something may be different: events, problems, or whether it is up to date. Safe to drop and call again; for one
    /// at a time.
    pub async fn changed(&self) {
        self.shared.changed.notified().await;
    }
}

impl Waiting {
    fn forget(&mut self) -> Vec<u64> {
        let objects = std::mem::take(&mut self.objects);
        self.list.take().into_iter().chain(objects.into_values()).collect()
    }
}

impl Inner {
    fn waiting(&mut self, kind: Kind) -> &mut Waiting {
        self.waiting.entry(kind).or_default()
    }

    fn push(&mut self, event: Event) {
        let (kind, object) = about(&event);
        let position = self.next;
        let waiting = self.waiting(kind);
        let mut superfluous = Vec::new();
        match object {
            // The list to come will have it.
            Some(_) if waiting.lost => return,
            Some(object) => superfluous.extend(waiting.objects.insert(object, position)),
            None => {
                superfluous.extend(waiting.forget());
                (waiting.list, waiting.listed, waiting.lost) = (Some(position), true, false);
            }
        }
        if waiting.objects.len() > WAITING_MOST {
            superfluous.extend(waiting.forget());
            waiting.lost = true;
            tracing::warn!("nobody takes what is said of kind {}: it will be listed again", kind.as_str());
        }
        self.next += 1;
        self.queue.insert(position, event);
        for position in superfluous {
            self.queue.remove(&position);
        }
    }
}

// Of which kind an event is, and the object that it is about, if it is about one.
fn about(event: &Event) -> (Kind, Option<Object>) {
    let object = |id: &ObjectId| (Kind(id.kind), Some((id.namespace.clone(), id.name.clone())));
    match event {
        Event::Pods(_) => (Kind::POD, None),
        Event::Pod(pod) => (Kind::POD, Some((Some(pod.key.namespace.clone()), pod.key.name.clone()))),
        Event::PodGone(key) => (Kind::POD, Some((Some(key.namespace.clone()), key.name.clone()))),
        Event::Namespaces(_) => (Kind::NAMESPACE, None),
        Event::Namespace(namespace) => (Kind::NAMESPACE, Some((None, namespace.name.clone()))),
        Event::NamespaceGone(name) => (Kind::NAMESPACE, Some((None, name.clone()))),
        Event::Policies(kind, _) | Event::Referents(kind, _) => (Kind(kind), None),
        Event::Policy(read) => object(&read.policy.id),
        Event::Referent(referent) => object(&referent.id),
        Event::PolicyGone(id) | Event::ReferentGone(id) => object(id),
        // No registry says these: they are a kind of their own, of which the last word counts for each name.
        Event::Resolved(resolved, _) => (Kind("Name"), Some((None, resolved.name.clone()))),
        Event::Clock(_) | Event::Recalled(..) => (Kind("Clock"), Some((None, String::new()))),
    }
}

#[cfg(test)]
#[path = "feed/tests.rs"]
mod tests;
