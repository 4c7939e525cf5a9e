//! Kubernetes objects that identities come from, as far as policy reads them.

mod pool;

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use serde::Deserialize;

use crate::model::Labels;
use crate::protocol::Protocol;
use pool::Pool;

static LABELS: Pool<Labels> = Pool::new();
static PORTS: Pool<BTreeSet<NamedPort>> = Pool::new();

/// The label that every namespace has, with its name as the value.
pub const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// What Calico calls a namespace's or service account's name as a label of it.
const NAME: &str = "projectcalico.org/name";
/// What Calico calls a pod's namespace, or a network set's, as a label of it.
pub(crate) const NAMESPACE: &str = "projectcalico.org/namespace";
/// What Calico calls a pod's service account as a label of it.
pub(crate) const ACCOUNT: &str = "projectcalico.org/serviceaccount";
/// What Calico calls who has made a pod as a label of it.
const ORCHESTRATOR: &str = "projectcalico.org/orchestrator";

/// Namespace and name of an object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The namespace.
    pub namespace: String,
    /// The name.
    pub name: String,
}

impl Key {
    /// A key; an object of a namespaced kind that names none is in `default`, as for kubectl.
    pub fn new(namespace: Option<&str>, name: &str) -> Self {
        let namespace = namespace.filter(|namespace| !namespace.is_empty()).unwrap_or("default");
        Self { namespace: namespace.to_owned(), name: name.to_owned() }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A port that a container gives a name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamedPort {
    /// The name.
    pub name: String,
    /// The protocol.
    pub protocol: Protocol,
    /// The number.
    pub port: u16,
}

/// A pod, as far as it has to do with policy. Two that are equal mean the same, whatever else of the object changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// Namespace and name.
    pub key: Key,
    /// Tells pods apart that had one name after the other.
    pub uid: String,
    /// When it was made (RFC 3339).
    pub created: String,
    /// It is going, and still has its addresses.
    pub terminating: bool,
    /// Its labels, with those that it has for Calico.
    pub labels: Arc<Labels>,
    /// The node that it runs on.
    pub node: Option<String>,
    /// The name of the account that it speaks as.
    pub service_account: String,
    /// It uses its node's addresses, and policy does not know it.
    pub host_network: bool,
    /// It has ended (`Succeeded`, `Failed`).
    pub ended: bool,
    /// Its addresses; empty when it has ended, since others may get them then.
    pub addresses: BTreeSet<IpAddr>,
    /// What is wrong with one of its addresses, of which nothing counts then.
    pub fault: Option<ObjectError>,
    /// Its named ports.
    pub ports: Arc<BTreeSet<NamedPort>>,
}

/// A namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    /// Its name.
    pub name: String,
    /// Its labels, with [`NAMESPACE_NAME`] and what Calico calls it.
    pub labels: Labels,
}

impl Namespace {
    /// A namespace with these labels. The label of its name is what it is, whatever the object says.
    pub fn new(name: &str, mut labels: Labels) -> Self {
        labels.insert(NAMESPACE_NAME.to_owned(), name.to_owned());
        labels.insert(NAME.to_owned(), name.to_owned());
        Self { name: name.to_owned(), labels }
    }
}

/// A service account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// Namespace and name.
    pub key: Key,
    /// Its labels, with the one that it has for Calico.
    pub labels: Labels,
}

impl Account {
    /// A service account with these labels.
    pub fn new(key: Key, mut labels: Labels) -> Self {
        labels.insert(NAME.to_owned(), key.name.clone());
        Self { key, labels }
    }
}

/// What is read of an object's metadata.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Metadata {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: Option<String>,
    /// Its labels.
    pub labels: Option<Labels>,
    /// Its UID.
    pub uid: Option<String>,
    /// When it was made.
    pub creation_timestamp: Option<String>,
    /// When it is to be gone.
    pub deletion_timestamp: Option<String>,
}

/// What is read of a pod's `spec`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct PodSpec {
    node_name: Option<String>,
    service_account_name: Option<String>,
    host_network: Option<bool>,
    containers: Option<Vec<Container>>,
    init_containers: Option<Vec<Container>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Container {
    restart_policy: Option<String>,
    ports: Option<Vec<ContainerPort>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ContainerPort {
    name: Option<String>,
    container_port: i64,
    protocol: Option<String>,
}

/// What is read of a pod's `status`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct PodStatus {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<PodIp>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct PodIp {
    ip: String,
}

/// Why an object was refused: its field, and what is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct ObjectError {
    /// The field.
    pub field: String,
    /// What is wrong, and what is allowed.
    pub reason: String,
}

/// Whether a label is one that an object has for Calico alone.
pub(crate) fn is_given(label: &str) -> bool {
    [NAME, NAMESPACE, ACCOUNT, ORCHESTRATOR].contains(&label)
}

impl ObjectError {
    pub(crate) fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }
}

impl Pod {
    /// A pod from the parts of its manifest.
    ///
    /// # Errors
    /// [`ObjectError`] for a pod without a name.
    pub fn new(metadata: Metadata, spec: PodSpec, status: PodStatus) -> Result<Self, ObjectError> {
        let key = Key::new(metadata.namespace.as_deref(), &metadata.name);
        if key.name.is_empty() {
            return Err(ObjectError::new("metadata.name", "a pod needs one"));
        }
        let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        let listed = status.pod_ips.unwrap_or_default().into_iter().map(|entry| entry.ip);
        let (mut addresses, mut fault) = (BTreeSet::new(), None);
        for text in listed.chain(status.pod_ip).filter(|text| !text.is_empty()) {
            match text.parse::<IpAddr>() {
                Ok(address) => drop(addresses.insert(address.to_canonical())),
                Err(_) => {
                    let shown: String = text.chars().take(64).collect();
                    let reason = format!("{shown:?} is no IP address; the pod's others count");
                    fault = Some(ObjectError::new("status.podIPs", reason));
                }
            }
        }
        if ended {
            addresses.clear();
        }
        // A sidecar is an init container that goes on.
        let sidecars = spec.init_containers.unwrap_or_default().into_iter();
        let sidecars = sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
        let containers = spec.containers.unwrap_or_default().into_iter().chain(sidecars);
        let ports = containers.flat_map(|container| container.ports.unwrap_or_default());
        // The API server's default.
        let service_account = spec.service_account_name.filter(|name| !name.is_empty());
        let service_account = service_account.unwrap_or_else(|| "default".to_owned());
        let mut labels = metadata.labels.unwrap_or_default();
        for (label, value) in
            [(NAMESPACE, key.namespace.as_str()), (ACCOUNT, &service_account), (ORCHESTRATOR, "k8s")]
        {
            labels.insert(label.to_owned(), value.to_owned());
        }
        Ok(Self {
            key,
            uid: metadata.uid.unwrap_or_default(),
            created: metadata.creation_timestamp.unwrap_or_default(),
            terminating: metadata.deletion_timestamp.is_some(),
            labels: LABELS.share(labels),
            node: spec.node_name.filter(|node| !node.is_empty()),
            service_account,
            ended,
            host_network: spec.host_network.unwrap_or_default(),
            addresses,
            fault,
            ports: PORTS.share(ports.filter_map(named_port).collect()),
        })
    }
}

fn named_port(port: ContainerPort) -> Option<NamedPort> {
    let protocol = port.protocol.as_deref().unwrap_or("TCP").parse().ok()?;
    let number = u16::try_from(port.container_port).ok().filter(|number| *number > 0)?;
    Some(NamedPort { name: port.name.filter(|name| !name.is_empty())?, protocol, port: number })
}
