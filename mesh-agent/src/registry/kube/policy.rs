//! What policy is decided from: Pods of all namespaces, Namespaces and policies, watched into a [`Feed`].
//!
//! Of each object only what counts is kept, from the moment that it is read: the rest of a page of pods is larger than all that is
//! kept of a cluster.

mod calico;
mod report;

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::marker::PhantomData;
use std::time::Duration;

use kube::api::ObjectMeta;
use kube::core::{DynamicResourceScope, Resource};
use kube::{Api, Client};
use mesh_keyring::ClusterName;
use mesh_policy::kind::KINDS;
use mesh_policy::model::Labels;
use mesh_policy::object::{Key, Metadata, Namespace, Pod, PodStatus};
use mesh_policy::referent::What;
use mesh_policy::{Event, Said, clusternetworkpolicy, meshpolicy, networkpolicy};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use report::{Condition, Reporter, Seen};

use super::watch::{RETRY_MOST, Sink, Watch};
use super::{Watches, reason};
use crate::registry::feed::{Feed, Kind};

// What gives an agent the right that it lacks.
const REMEDY: &str =
    "apply the ClusterRole sennit-agent of this version (deploy/kubernetes/base, or the chart)";

// So often has a kind to be unknown before there is none of it.
const MISSED_FIRST: u32 = 2;
// So often has a kind to be unknown that was known before.
const MISSED: u32 = 4;
// How long at most a cluster that does not know a kind is left before it is asked again.
const UNKNOWN: Duration = Duration::from_secs(300);

/// Watches all kinds. In a mesh of several clusters, `cluster` is the name of this one.
pub(super) fn watch(client: &Client, cluster: Option<&ClusterName>, feed: &Feed) -> Watches {
    let (calico_client, calico_cluster) = (client.clone(), cluster.cloned());
    let calico = calico::follow(calico_client, calico_cluster, feed.clone());
    let (reporter, reporting) = Reporter::new(client.clone(), feed.verdicts());
    let told = |reporter: &Reporter| Some(reporter.clone());
    Watches(vec![
        begin::<Namespace>(client, cluster, feed, None),
        begin::<Told<NETWORK_POLICY>>(client, cluster, feed, None),
        begin::<Told<CLUSTER_NETWORK_POLICY>>(client, cluster, feed, told(&reporter)),
        begin::<Told<MESH_POLICY>>(client, cluster, feed, told(&reporter)),
        begin::<Pod>(client, cluster, feed, None),
        tokio::spawn(calico),
        tokio::spawn(reporting),
    ])
}

fn begin<T: Counted>(
    client: &Client,
    cluster: Option<&ClusterName>,
    feed: &Feed,
    reporter: Option<Reporter>,
) -> JoinHandle<()> {
    let sink = Intake::<T> {
        feed: feed.clone(),
        cluster: cluster.cloned(),
        reporter,
        refused: BTreeSet::new(),
        known: false,
        unknown: false,
        missed: 0,
        kind: PhantomData,
    };
    Watch { fields: None, sink }.begin(Api::<Item<T>>::all(client.clone()))
}

/// What counts of an object.
trait Counted: Clone + std::fmt::Debug + Send + Sync + Sized + 'static {
    /// Not every cluster knows the kind.
    const OPTIONAL: bool = false;

    fn kind() -> Kind;
    /// Group and version, as in manifests.
    fn version() -> &'static str {
        "v1"
    }
    fn plural() -> &'static str;
    fn read(sent: Sent) -> Result<Self, String>;
    /// Namespace and name.
    fn key(&self) -> (Option<&str>, &str);
    /// What its status says of it, and should say.
    fn seen(&self) -> Option<Seen> {
        None
    }
    /// In a mesh of several clusters, with the mesh's names.
    fn named(self, _cluster: Option<&ClusterName>) -> Self {
        self
    }
    fn all(objects: Vec<Self>) -> Event;
    fn there(self) -> Event;
    fn gone(namespace: Option<&str>, name: &str) -> Event;
}

impl Counted for Pod {
    fn kind() -> Kind {
        Kind::POD
    }

    fn plural() -> &'static str {
        "pods"
    }

    fn read(sent: Sent) -> Result<Self, String> {
        let status: PodStatus = part("status", sent.status)?;
        let metadata = Metadata {
            name: sent.metadata.name.unwrap_or_default(),
            namespace: sent.metadata.namespace,
            labels: sent.metadata.labels,
            uid: sent.metadata.uid,
            creation_timestamp: sent.metadata.creation_timestamp,
            deletion_timestamp: sent.metadata.deletion_timestamp,
        };
        Pod::new(metadata, part("spec", sent.spec)?, status).map_err(|e| e.to_string())
    }

    fn key(&self) -> (Option<&str>, &str) {
        (Some(&self.key.namespace), &self.key.name)
    }

    // A Node is known as NODE.CLUSTER there, as in the directory.
    fn named(mut self, cluster: Option<&ClusterName>) -> Self {
        if let (Some(node), Some(cluster)) = (&mut self.node, cluster) {
            *node = format!("{node}.{cluster}");
        }
        self
    }

    fn all(objects: Vec<Self>) -> Event {
        Event::Pods(objects)
    }

    fn there(self) -> Event {
        Event::Pod(self)
    }

    fn gone(namespace: Option<&str>, name: &str) -> Event {
        Event::PodGone(Key::new(namespace, name))
    }
}

impl Counted for Namespace {
    fn kind() -> Kind {
        Kind::NAMESPACE
    }

    fn plural() -> &'static str {
        "namespaces"
    }

    fn read(sent: Sent) -> Result<Self, String> {
        Ok(Self::new(&sent.metadata.name.unwrap_or_default(), sent.metadata.labels.unwrap_or_default()))
    }

    fn key(&self) -> (Option<&str>, &str) {
        (None, &self.name)
    }

    fn all(objects: Vec<Self>) -> Event {
        Event::Namespaces(objects)
    }

    fn there(self) -> Event {
        Event::Namespace(self)
    }

    fn gone(_: Option<&str>, name: &str) -> Event {
        Event::NamespaceGone(name.to_owned())
    }
}

/// An object of the kind that has this place among all. `STORED`: as Calico keeps it where it has no API server of its own.
#[derive(Debug, Clone)]
struct Told<const PLACE: usize, const STORED: bool = false> {
    said: Said,
    generation: i64,
    conditions: Vec<Condition>,
}

/// The place of a kind among all.
const fn place(name: &str) -> usize {
    let mut place = 0;
    while place < KINDS.len() {
        if same(KINDS[place].name, name) {
            return place;
        }
        place += 1;
    }
    panic!("no such kind")
}

const fn same(one: &str, other: &str) -> bool {
    let (one, other) = (one.as_bytes(), other.as_bytes());
    let mut at = 0;
    while at < one.len() && at < other.len() && one[at] == other[at] {
        at += 1;
    }
    at == one.len() && at == other.len()
}

const NETWORK_POLICY: usize = place(networkpolicy::KIND);
const CLUSTER_NETWORK_POLICY: usize = place(clusternetworkpolicy::KIND);
const MESH_POLICY: usize = place(meshpolicy::KIND);

impl<const PLACE: usize, const STORED: bool> Told<PLACE, STORED> {
    const OF: mesh_policy::Kind = KINDS[PLACE];
}

impl<const PLACE: usize, const STORED: bool> Counted for Told<PLACE, STORED> {
    const OPTIONAL: bool = !KINDS[PLACE].everywhere;

    fn kind() -> Kind {
        Kind::of(Self::OF.name)
    }

    fn version() -> &'static str {
        Self::OF.stored.filter(|_| STORED).unwrap_or(Self::OF.version)
    }

    fn plural() -> &'static str {
        Self::OF.plural
    }

    fn read(sent: Sent) -> Result<Self, String> {
        let SentMetadata { name, namespace, labels, annotations, generation, .. } = sent.metadata;
        let metadata =
            json!({"name": name, "namespace": namespace, "labels": labels, "annotations": annotations});
        let said = Self::OF.read(&json!({
            "metadata": metadata, "spec": sent.spec,
            "endpoints": sent.endpoints, "ports": sent.ports, "addressType": sent.address_type,
        }));
        // What others have written there is theirs.
        let conditions = sent.status.get("conditions").cloned().unwrap_or_default();
        let conditions = serde_json::from_value(conditions).unwrap_or_default();
        Ok(Self { said, generation: generation.unwrap_or_default(), conditions })
    }

    fn seen(&self) -> Option<Seen> {
        // Others write theirs into the same status.
        let kind = match Self::OF.name {
            meshpolicy::KIND => "Accepted",
            _ => "sennit.dev/Accepted",
        };
        let refusals: Vec<String> = self.said.faults().map(ToString::to_string).collect();
        let staged = matches!(&self.said, Said::Policy(read) if read.policy.staged);
        Some(Seen {
            resource: Seen::resource(Self::version(), Self::OF.kind, Self::OF.plural),
            name: self.said.id().name.clone(),
            current: self.conditions.iter().find(|condition| condition.kind == kind).cloned(),
            wanted: Condition::of(kind, self.generation, &refusals, staged),
        })
    }

    fn key(&self) -> (Option<&str>, &str) {
        let id = self.said.id();
        (id.namespace.as_deref(), &id.name)
    }

    // A host endpoint names its node as its cluster does.
    fn named(mut self, cluster: Option<&ClusterName>) -> Self {
        if let (Said::Referent(referent), Some(cluster)) = (&mut self.said, cluster)
            && let Some(What::Networks(networks)) = &mut referent.what
            && let Some(host) = &mut networks.host
        {
            host.node = format!("{}.{cluster}", host.node);
        }
        self
    }

    fn all(objects: Vec<Self>) -> Event {
        Self::OF.all(objects.into_iter().map(|told| told.said))
    }

    fn there(self) -> Event {
        self.said.there()
    }

    fn gone(namespace: Option<&str>, name: &str) -> Event {
        Self::OF.gone(Self::OF.id(namespace, name))
    }
}

/// An object as the API sends it, but for what nobody asks for.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Sent {
    metadata: SentMetadata,
    spec: Value,
    status: Value,
    // An EndpointSlice has no `spec`.
    endpoints: Value,
    ports: Value,
    #[serde(rename = "addressType")]
    address_type: Value,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct SentMetadata {
    name: Option<String>,
    namespace: Option<String>,
    labels: Option<Labels>,
    annotations: Option<Labels>,
    uid: Option<String>,
    generation: Option<i64>,
    creation_timestamp: Option<String>,
    deletion_timestamp: Option<String>,
    resource_version: Option<String>,
}

fn part<T: DeserializeOwned + Default>(field: &str, value: Value) -> Result<T, String> {
    if value.is_null() {
        return Ok(T::default());
    }
    serde_json::from_value(value).map_err(|e| format!("{field}: {e}"))
}

/// What was made of an object, or why nothing could be. One that is wrong must not make its whole page unreadable.
#[derive(Debug, Clone)]
struct Item<T> {
    // Name, namespace and version alone.
    metadata: ObjectMeta,
    read: Result<T, String>,
}

impl<'de, T: Counted> Deserialize<'de> for Item<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let sent = Sent::deserialize(deserializer)?;
        let metadata = ObjectMeta {
            name: sent.metadata.name.clone(),
            namespace: sent.metadata.namespace.clone(),
            resource_version: sent.metadata.resource_version.clone(),
            ..ObjectMeta::default()
        };
        Ok(Self { metadata, read: T::read(sent) })
    }
}

impl<T: Counted> Resource for Item<T> {
    type DynamicType = ();
    type Scope = DynamicResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        T::kind().as_str().into()
    }

    fn group((): &()) -> Cow<'_, str> {
        T::version().rsplit_once('/').map_or("", |(group, _)| group).into()
    }

    fn version((): &()) -> Cow<'_, str> {
        T::version().rsplit_once('/').map_or(T::version(), |(_, version)| version).into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        T::plural().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// The same without what the watch alone needs.
struct Found<T>(Result<T, Refusal>);

struct Refusal {
    namespace: Option<String>,
    name: String,
    reason: String,
}

impl<T> From<Item<T>> for Found<T> {
    fn from(Item { metadata, read }: Item<T>) -> Self {
        Self(read.map_err(|reason| Refusal {
            namespace: metadata.namespace,
            name: metadata.name.unwrap_or_default(),
            reason,
        }))
    }
}

/// The way of a kind into the feed.
struct Intake<T> {
    feed: Feed,
    cluster: Option<ClusterName>,
    // Who writes back what became of an object.
    reporter: Option<Reporter>,
    // Keys of those that the feed knows as refused.
    refused: BTreeSet<String>,
    // They were listed.
    known: bool,
    // The cluster does not know the kind, and the feed was told that there are none.
    unknown: bool,
    // How often in succession it did not.
    missed: u32,
    kind: PhantomData<fn(T)>,
}

impl<T: Counted> Intake<T> {
    fn title((namespace, name): (Option<&str>, &str)) -> String {
        let namespace = namespace.map(|namespace| format!("{namespace}/")).unwrap_or_default();
        format!("{} {namespace}{name}", T::kind().as_str())
    }

    fn refuse(&mut self, title: String, reason: String) {
        self.refused.insert(title.clone());
        self.feed.refuse(title, Some(super::cut(&reason)));
    }

    fn report(&self, object: &T) {
        if let (Some(reporter), Some(seen)) = (&self.reporter, object.seen()) {
            reporter.saw(seen);
        }
    }

    fn mended(&mut self, key: (Option<&str>, &str)) {
        if !self.refused.is_empty() {
            let title = Self::title(key);
            self.refused.remove(&title);
            self.feed.refuse(title, None);
        }
    }
}

impl<T: Counted> Sink for Intake<T> {
    type Entry = Found<T>;

    fn listed(&mut self, entries: Vec<Found<T>>) {
        let mut objects = Vec::with_capacity(entries.len());
        let mut mended = std::mem::take(&mut self.refused);
        for Found(found) in entries {
            match found {
                Ok(object) => {
                    self.report(&object);
                    objects.push(object.named(self.cluster.as_ref()));
                }
                Err(Refusal { namespace, name, reason }) => {
                    let title = Self::title((namespace.as_deref(), &name));
                    mended.remove(&title);
                    self.refuse(title, reason);
                }
            }
        }
        for title in mended {
            self.feed.refuse(title, None);
        }
        (self.known, self.unknown, self.missed) = (true, false, 0);
        self.feed.trouble(T::kind().as_str(), None);
        self.feed.push(T::all(objects));
    }

    fn connected(&mut self) {
        self.feed.trouble(T::kind().as_str(), None);
    }

    fn there(&mut self, Found(found): Found<T>) {
        match found {
            Ok(object) => {
                self.report(&object);
                self.mended(object.key());
                self.feed.push(object.named(self.cluster.as_ref()).there());
            }
            // What it was before, it may be no longer.
            Err(Refusal { namespace, name, reason }) => {
                self.refuse(Self::title((namespace.as_deref(), &name)), reason);
                self.feed.push(T::gone(namespace.as_deref(), &name));
            }
        }
    }

    fn gone(&mut self, object: &ObjectMeta) {
        let (namespace, name) = (object.namespace.as_deref(), object.name.as_deref().unwrap_or_default());
        self.mended((namespace, name));
        self.feed.push(T::gone(namespace, name));
    }

    fn failed(&mut self, error: &kube::Error) {
        if T::OPTIONAL && matches!(error, kube::Error::Api(status) if status.code == 404) {
            self.missed += 1;
            // One server may know less than another, for a moment.
            if self.known && self.missed < MISSED {
                let told = format!("the cluster does not know the kind any more: {}", reason(error));
                self.feed.trouble(T::kind().as_str(), Some(told));
            } else if !self.known && !self.unknown && self.missed < MISSED_FIRST {
                // Right after its start a server may not know yet what it will.
            } else if self.known || !self.unknown || self.feed.lost(T::kind()) {
                self.listed(Vec::new());
                (self.known, self.unknown) = (false, true);
            } else {
                self.feed.trouble(T::kind().as_str(), None);
            }
            return;
        }
        self.unknown = false;
        let told = match error {
            kube::Error::Api(status) if status.code == 403 => format!("{}; {REMEDY}", reason(error)),
            error => reason(error),
        };
        self.feed.trouble(T::kind().as_str(), Some(told));
    }

    fn whole(&self) -> bool {
        self.missed == 0 && !self.feed.lost(T::kind())
    }

    fn retry_most(&self) -> Duration {
        if self.unknown { UNKNOWN } else { RETRY_MOST }
    }
}

#[cfg(test)]
#[path = "policy/tests.rs"]
mod tests;
