//! What policy is decided from: Pods of all namespaces, Namespaces and policies, watched into a [`Feed`].
//!
//! Of each object only what counts is kept, from the moment that it is read: the rest of a page of pods is larger than all that is
//! kept of a cluster.

mod calico;
mod report;

use std::borrow::Cow;
use std::time::Duration;

use kube::api::ObjectMeta;
use kube::core::{DynamicResourceScope, Resource};
use kube::{Api, Client};
use mesh_keyring::ClusterName;
use mesh_policy::kind::KINDS;
use mesh_policy::model::Labels;
use mesh_policy::object::{Key, Metadata, Namespace, ObjectError, Pod, PodStatus};
use mesh_policy::referent::What;
use mesh_policy::refusal::Outcome;
use mesh_policy::{Event, Said, calico as projectcalico, clusternetworkpolicy, meshpolicy, networkpolicy};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use report::{Condition, Reporter, Seen};

use super::Watches;
use super::watch::{Reading, Watch};
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
pub(super) fn watch(
    client: &Client,
    cluster: Option<&ClusterName>,
    feed: &Feed,
    reading: &Reading,
) -> Watches {
    let from = &From { client: client.clone(), cluster: cluster.cloned(), reading: reading.clone() };
    let calico = calico::follow(from.clone(), feed.clone());
    let (reporter, reporting) = Reporter::new(client.clone(), feed.verdicts());
    let told = |reporter: &Reporter| Some(reporter.clone());
    Watches(vec![
        begin::<Namespace>(from, feed, None),
        begin::<Told<NETWORK_POLICY>>(from, feed, None),
        begin::<Told<CLUSTER_NETWORK_POLICY>>(from, feed, told(&reporter)),
        begin::<Told<MESH_POLICY>>(from, feed, told(&reporter)),
        begin::<Pod>(from, feed, None),
        tokio::spawn(calico),
        tokio::spawn(reporting),
    ])
}

/// Where objects come from.
#[derive(Clone)]
struct From {
    client: Client,
    // In a mesh of several, the name of this one.
    cluster: Option<ClusterName>,
    reading: Reading,
}

fn begin<T: Counted>(from: &From, feed: &Feed, reporter: Option<Reporter>) -> JoinHandle<()> {
    let sink = Intake::<T>::new(from, feed, reporter);
    Watch { reading: from.reading.clone(), fields: None, sink }
        .begin(Api::<Item<T>>::all(from.client.clone()))
}

/// What counts of an object.
trait Counted: Clone + std::fmt::Debug + Send + Sync + Sized + 'static {
    /// Not every cluster knows the kind.
    const OPTIONAL: bool = false;
    /// Above the bound some of the objects can do without the others; where they cannot, the kind fails.
    const PARTS: bool = true;
    /// A namespace of which not all objects are kept keeps none.
    const ENTIRE: bool = false;

    fn kind() -> Kind;
    /// Whether it isolates those that it selects, so that it is never refused for what does not matter.
    fn isolates() -> bool {
        false
    }
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
    /// Roughly the bytes that are kept of it, of which the object had `sent`.
    fn weight(&self, sent: usize) -> usize {
        sent
    }
    /// What stands for the objects of a namespace of which not all are kept.
    fn instead(_namespace: &str) -> Option<Self> {
        None
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

    fn weight(&self, _sent: usize) -> usize {
        64 * (self.ports.len() + self.addresses.len()) + label_weight(&self.labels)
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

    fn weight(&self, _sent: usize) -> usize {
        label_weight(&self.labels)
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

/// The name of the policy that isolates a namespace of which not all policies are kept. No object can have it.
const OVER: &str = "over:limit";

/// Whether policies of a namespace decide what its pods may do.
const fn is_about_pods(name: &str) -> bool {
    same(name, networkpolicy::KIND) || same(name, projectcalico::NAMESPACED)
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
    // Policies of the whole cluster mean anybody: without one of them nobody's verdict is known.
    const PARTS: bool = KINDS[PLACE].namespaced;
    // Of a namespace's policies one may deny what another allows.
    const ENTIRE: bool = KINDS[PLACE].namespaced && is_about_pods(KINDS[PLACE].name);

    fn kind() -> Kind {
        Kind::of(Self::OF.name)
    }

    fn isolates() -> bool {
        Self::OF.has_policies()
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
        let refusal = self.said.refusal().map(|refusal| refusal.to_string());
        let staged = matches!(&self.said, Said::Policy(read) if read.policy.staged);
        Some(Seen {
            resource: Seen::resource(Self::version(), Self::OF.kind, Self::OF.plural),
            name: self.said.id().name.clone(),
            current: self.conditions.iter().find(|condition| condition.kind == kind).cloned(),
            wanted: Condition::of(kind, self.generation, refusal.as_deref(), staged),
        })
    }

    fn instead(namespace: &str) -> Option<Self> {
        let spec = match Self::OF.name {
            networkpolicy::KIND => json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}),
            projectcalico::NAMESPACED => json!({
                "selector": "all()", "types": ["Ingress", "Egress"],
                "ingress": [{"action": "Deny"}], "egress": [{"action": "Deny"}],
            }),
            _ => return None,
        };
        let mut said =
            Self::OF.read(&json!({"metadata": {"name": OVER, "namespace": namespace}, "spec": spec}));
        if let Said::Policy(read) = &mut said {
            let reason = "the namespace has more policies than are read, none of them counts, and all of its pods \
                          are isolated: delete some";
            read.fault =
                Some(ObjectError { field: "metadata.namespace".to_owned(), reason: reason.to_owned() });
            read.outcome = Outcome::Namespace;
        }
        Some(Self { said, generation: 0, conditions: Vec::new() })
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

/// The most bytes of all labels of an object.
const LABELS_MOST: usize = 32 << 10;

impl Sent {
    /// Roughly the bytes that may be kept of it, and those of its labels.
    fn weight(&self) -> (usize, usize) {
        let labels = self.metadata.labels.as_ref().map_or(0, label_weight);
        let parts = [&self.spec, &self.endpoints, &self.ports];
        (labels + parts.into_iter().map(size).sum::<usize>(), labels)
    }
}

fn label_weight(labels: &Labels) -> usize {
    labels.iter().map(|(key, value)| key.len() + value.len() + 64).sum()
}

// Without recursion deeper than the parser's own.
fn size(value: &Value) -> usize {
    let inner = match value {
        Value::String(text) => text.len(),
        Value::Array(all) => all.iter().map(size).sum(),
        Value::Object(all) => all.iter().map(|(key, value)| key.len() + 32 + size(value)).sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
    };
    inner + 16
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
    // Roughly the bytes that are kept of it.
    weight: usize,
}

impl<'de, T: Counted> Deserialize<'de> for Item<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut sent = Sent::deserialize(deserializer)?;
        let metadata = ObjectMeta {
            name: sent.metadata.name.clone(),
            namespace: sent.metadata.namespace.clone(),
            resource_version: sent.metadata.resource_version.clone(),
            ..ObjectMeta::default()
        };
        let (sent_weight, mut labels) = sent.weight();
        // Of a policy they mean nothing, and without the policy its pods would be open.
        if T::isolates() {
            (sent.metadata.labels, labels) = (None, 0);
        }
        let read = match labels <= LABELS_MOST {
            true => T::read(sent),
            false => Err(format!(
                "metadata.labels: they are larger than {} KiB together: remove some",
                LABELS_MOST >> 10
            )),
        };
        let weight = read.as_ref().map_or(0, |object| object.weight(sent_weight));
        Ok(Self { metadata, read, weight })
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
struct Found<T> {
    read: Result<T, Refusal>,
    weight: usize,
}

struct Refusal {
    namespace: Option<String>,
    name: String,
    reason: String,
}

impl<T> std::convert::From<Item<T>> for Found<T> {
    fn from(Item { metadata, read, weight }: Item<T>) -> Self {
        let read = read.map_err(|reason| Refusal {
            namespace: metadata.namespace,
            name: metadata.name.unwrap_or_default(),
            reason,
        });
        Self { read, weight }
    }
}

#[path = "policy/intake.rs"]
mod intake;
use intake::Intake;

#[cfg(test)]
#[path = "policy/tests.rs"]
mod tests;
