//! A cluster's API: Nodes and MeshNodes are watched, this node's annotations are applied.
//!
//! A task for each kind lists and watches it; what comes goes into a [`Directory`], and only what matters to the mesh wakes
//! the agent. What policy is decided from goes into a [`Feed`] instead. The library's own watcher does not tell when a connection is back that brings nothing new, and
//! status has to.

pub mod access;
pub mod budget;
mod census;
mod connect;
pub mod directory;
mod events;
pub mod listing;
mod policy;
mod publish;
mod renew;
mod trouble;
pub mod trust;
mod verdict;
mod watch;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::core::{ApiResource, GroupVersionKind, Resource};
use kube::{Api, Client};
use mesh_keyring::{ClusterName, MeshName, NodeName};
use mesh_overlay::NodeRecord;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::feed::Feed;
use super::{Notice, RegistryError, Snapshot};
use access::Access;
use budget::{Budget, Connected};
pub use directory::LINK;
use directory::{Directory, Kind, MeshNode, MeshObject, Node, SiteRule};
use listing::{Named as _, Partial};
use watch::{Reading, Shelf, Watch};

/// Our group of custom resources.
pub const GROUP: &str = "sennit.dev";
/// Its version.
pub const VERSION: &str = "v1alpha1";
/// Who owns the annotations in the API's books (server-side apply).
pub const FIELD_MANAGER: &str = "sennit-agent";

// Characters of what a server says that are repeated.
const SAID_MOST: usize = 300;
const SILENCE: Duration = Duration::from_secs(270);
// A request that cannot be sent within this is given up.
const SENDING: Duration = Duration::from_secs(30);
// An answer to a question of DNS.
const NAMING: Duration = Duration::from_secs(5);
// What `cleanup` waits for the lists.
const LISTING: Duration = Duration::from_secs(10);
// A pass waits no longer than this for a write, which goes on beside it.
const WRITE: Duration = Duration::from_secs(3);
// A write that takes longer than this is given up.
const WRITE_MOST: Duration = Duration::from_secs(30);
// Changes that come together are one.
const QUIET: Duration = Duration::from_millis(30);
const SETTLED: Duration = Duration::from_millis(500);

#[derive(Debug)]
struct Shared {
    directory: Mutex<Directory>,
    changed: Arc<Notify>,
}

impl Shared {
    fn update(&self, change: impl FnOnce(&mut Directory) -> bool) {
        if change(&mut self.directory.lock()) {
            self.changed.notify_one();
        }
    }
}

/// The registry that is a cluster's API.
pub struct KubeRegistry {
    client: Client,
    server: String,
    cluster: Option<ClusterName>,
    mesh: Option<MeshName>,
    shared: Arc<Shared>,
    feed: Feed,
    watches: Watches,
    policy: Option<Watches>,
    reading: Reading,
    read: Arc<AtomicU64>,
    publishing: publish::Publishing,
    trust: trust::Trust,
    verdict: verdict::Verdict,
    // A change was taken notice of that `changed` has not answered for yet.
    stirred: bool,
}

/// Tasks that watch, as long as somebody holds this.
struct Watches(Vec<JoinHandle<()>>);

impl Drop for Watches {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

/// How to reach the API: by a kubeconfig file, or as a pod with the files that the cluster mounts.
///
/// # Errors
/// A sentence that names the file and what is wrong with it.
pub async fn api_config(kubeconfig: Option<&Path>) -> Result<Access, RegistryError> {
    Access::read(kubeconfig).await
}

/// The same configuration with our limits of time.
fn limits(mut config: kube::Config) -> kube::Config {
    config.read_timeout = Some(SILENCE);
    config.write_timeout = Some(SENDING);
    // It would wait unseen for as long as the server says.
    config.default_retry = false;
    config
}

impl KubeRegistry {
    /// Begins to watch. In a mesh of several clusters, `cluster` is the name of this one.
    ///
    /// # Errors
    /// [`RegistryError::Credentials`]; an API that does not answer is no error here.
    pub fn new(
        access: impl Into<Access>,
        cluster: Option<ClusterName>,
        mesh: &MeshName,
    ) -> Result<Self, RegistryError> {
        Self::within(access, cluster, mesh, Budget::OWN)
    }

    /// The same within a budget.
    ///
    /// # Errors
    /// As [`KubeRegistry::new`].
    pub fn within(
        access: impl Into<Access>,
        cluster: Option<ClusterName>,
        mesh: &MeshName,
        budget: Budget,
    ) -> Result<Self, RegistryError> {
        Self::begin(access.into(), cluster, Some(mesh.clone()), Arc::default(), budget)
    }

    /// Sets who says in which site the cluster's Nodes stand.
    pub fn sites(&mut self, rule: SiteRule) {
        self.shared.directory.lock().sites(rule, self.mesh.clone());
    }

    /// Finds out where the name leads that the API is reached by; later changes of that are not noticed.
    pub fn resolve(&mut self, host: String, port: u16) {
        self.shared.directory.lock().reached_by_name();
        let shared = Arc::clone(&self.shared);
        self.watches.0.push(tokio::spawn(async move {
            let mut failures = 0;
            loop {
                let told = match timeout(NAMING, tokio::net::lookup_host((host.as_str(), port))).await {
                    Ok(Ok(addresses)) => {
                        let found = addresses.map(|address| address.ip()).collect();
                        shared.update(|directory| directory.resolved(found));
                        return;
                    }
                    Ok(Err(e)) => e.to_string(),
                    Err(_) => "no answer".to_owned(),
                };
                tracing::debug!("API server {host}: {told}");
                watch::pause(&mut failures, watch::RETRY_MOST).await;
            }
        }));
    }

    /// The same for nodes alone, without what is said for the mesh as a whole, with a bell of the caller's that is
    /// rung at each change, and within a budget.
    ///
    /// # Errors
    /// As [`KubeRegistry::new`].
    pub fn with_bell(
        access: impl Into<Access>,
        cluster: Option<ClusterName>,
        bell: Arc<Notify>,
        budget: Budget,
    ) -> Result<Self, RegistryError> {
        Self::begin(access.into(), cluster, None, bell, budget)
    }

    fn begin(
        access: Access,
        cluster: Option<ClusterName>,
        mesh: Option<MeshName>,
        bell: Arc<Notify>,
        budget: Budget,
    ) -> Result<Self, RegistryError> {
        let server = access.cluster_url.to_string();
        let is_proxied = access.proxy().is_some();
        let connected = budget::client(access, budget).map_err(|e| RegistryError::Credentials {
            what: format!("credentials for {server}"),
            reason: reason(&e),
        })?;
        let Connected { client, read, fresh } = connected;
        let directory = Mutex::new(Directory::new(mesh.is_some()).within(budget));
        let shared = Arc::new(Shared { directory, changed: bell });
        let reading = Reading::new(budget, fresh, is_proxied);
        let (partial, shared_too) = (|| Partial::new(budget), || Arc::clone(&shared));
        let nodes = Shelf {
            known: true,
            listing: |all| all.listing(Kind::Node),
            shared: shared_too(),
            partial: partial(),
            budget,
        };
        let mesh_nodes = Shelf {
            known: false,
            listing: |all| all.listing(Kind::MeshNode),
            shared: shared_too(),
            partial: partial(),
            budget,
        };
        let mut watches = vec![
            Watch { reading: reading.clone(), fields: None, sink: nodes }
                .begin::<Node>(api(&client, &resource(Kind::Node))),
            Watch { reading: reading.clone(), fields: None, sink: mesh_nodes }
                .begin::<MeshNode>(api(&client, &resource(Kind::MeshNode))),
        ];
        if mesh.is_some() {
            let meshes = Shelf {
                known: false,
                listing: Directory::meshes,
                shared: shared_too(),
                partial: Partial::new(budget),
                budget,
            };
            let kind = custom("Mesh", "meshes");
            watches.push(
                Watch { reading: reading.clone(), fields: None, sink: meshes }
                    .begin::<MeshObject>(api(&client, &kind)),
            );
            // The one that every API server keeps of itself.
            let fields = Some("metadata.name=kubernetes");
            let servers = Shelf {
                known: true,
                listing: Directory::servers,
                shared: shared_too(),
                partial: Partial::new(budget),
                budget,
            };
            let api = Api::<EndpointSlice>::namespaced(client.clone(), "default");
            watches.push(Watch { reading: reading.clone(), fields, sink: servers }.begin(api));
        }
        Ok(Self {
            client,
            server,
            cluster,
            mesh,
            shared,
            feed: Feed::new(),
            watches: Watches(watches),
            policy: None,
            reading,
            read,
            publishing: publish::Publishing::default(),
            trust: trust::Trust::default(),
            verdict: verdict::Verdict::default(),
            stirred: false,
        })
    }

    /// Begins to watch pods, namespaces and policies, too; what they say goes into the feed. Once.
    pub fn watch_policy(&mut self) {
        let begin = || policy::watch(&self.client, self.cluster.as_ref(), &self.feed, &self.reading);
        self.policy.get_or_insert_with(begin);
    }

    /// What the cluster says of pods, namespaces and policies, once [`KubeRegistry::watch_policy`] was called.
    pub fn feed(&self) -> &Feed {
        &self.feed
    }

    /// Whether this node is one of the cluster, rather than a host with a MeshNode; `None`: that is not known yet.
    pub fn has_kubelet(&self, node: &NodeName) -> Option<bool> {
        let directory = self.shared.directory.lock();
        directory.find(node, self.cluster.as_ref()).map(|(kind, _)| kind == Kind::Node)
    }

    /// Returns how many bytes of answers were read so far.
    pub fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// What is known.
    ///
    /// # Errors
    /// [`RegistryError::Unreachable`] while something has never been listed.
    pub fn read(&self) -> Result<Snapshot, RegistryError> {
        let directory = self.shared.directory.lock();
        match directory.obstacle() {
            Some(reason) => Err(self.unreachable(reason)),
            None => {
                let stale = directory.staleness().map(|reason| self.unreachable(reason).to_string());
                let mut snapshot = Snapshot { stale, ..directory.snapshot(self.cluster.as_ref()) };
                if let Some(name) = &self.mesh {
                    snapshot.mesh = directory.mesh(name);
                    (snapshot.servers, snapshot.servers_known) = directory.server_addresses();
                    snapshot.named = directory.named();
                }
                Ok(snapshot)
            }
        }
    }

    /// What is known of the cluster itself, and apart from it, by link, the MeshNodes that stand in for others' nodes.
    ///
    /// # Errors
    /// As [`KubeRegistry::read`].
    pub fn own_and_mirrors(&self) -> Result<(Snapshot, BTreeMap<String, Vec<NodeRecord>>), RegistryError> {
        let directory = self.shared.directory.lock();
        // Of what may be out of date nobody is judged.
        match directory.obstacle().or_else(|| directory.staleness()) {
            Some(reason) => Err(self.unreachable(reason)),
            None => Ok(directory.own_and_mirrors(self.cluster.as_ref())),
        }
    }

    fn unreachable(&self, reason: String) -> RegistryError {
        RegistryError::Unreachable { server: self.server.clone(), reason }
    }

    /// Writes an Event about this node.
    pub fn tell(&self, node: &NodeName, notice: Notice) {
        let found = self
            .shared
            .directory
            .lock()
            .find(node, self.cluster.as_ref())
            .map(|(kind, entry)| (kind, entry.name().to_owned()));
        let Some((kind, name)) = found else { return };
        let client = self.client.clone();
        tokio::spawn(async move {
            match timeout(WRITE_MOST, events::write(client, kind, &name, &notice)).await {
                Ok(Ok(())) => {}
                Ok(Err(e)) => {
                    tracing::warn!("writing an Event about {} {name}: {}", kind.as_str(), reason(&e))
                }
                Err(_) => tracing::warn!(
                    "writing an Event about {} {name}: no answer within {} s",
                    kind.as_str(),
                    WRITE_MOST.as_secs()
                ),
            }
        });
    }

    /// Waits until something that matters has changed. Safe to drop and call again.
    pub async fn changed(&mut self) {
        if !self.stirred {
            tokio::select! {
                () = self.shared.changed.notified() => {}
                () = self.feed.turned() => {}
            }
            self.stirred = true;
        }
        let settled = Instant::now() + SETTLED;
        while Instant::now() < settled && timeout(QUIET, self.shared.changed.notified()).await.is_ok() {}
        self.stirred = false;
    }
}

fn resource(kind: Kind) -> ApiResource {
    match kind {
        Kind::Node => ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("", "v1", "Node"), "nodes"),
        Kind::MeshNode => custom(kind.as_str(), "meshnodes"),
    }
}

/// A custom resource of ours.
pub fn custom(kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(GROUP, VERSION, kind), plural)
}

/// The custom resource `MeshNode`.
pub fn mesh_nodes() -> ApiResource {
    resource(Kind::MeshNode)
}

/// The kind Mesh, for requests.
pub fn meshes() -> ApiResource {
    custom("Mesh", "meshes")
}

fn api<K: Resource<DynamicType = ApiResource>>(client: &Client, resource: &ApiResource) -> Api<K> {
    Api::all_with(client.clone(), resource)
}

/// What the API said, without what the library thinks of it.
pub fn reason(error: &kube::Error) -> String {
    let text = match error {
        kube::Error::Api(status) => format!("{} ({})", cut(&status.message), status.code),
        kube::Error::Service(source) => root(source.as_ref()),
        kube::Error::HyperError(source) => root(source),
        kube::Error::ReadEvents(source) => root(source),
        // It would quote the answer.
        kube::Error::SerdeError(_) => "the answer is not what was asked for".into(),
        other => other.to_string(),
    };
    cut(&text)
}

// A server may say anything, and at any length.
fn cut(text: &str) -> String {
    text.chars().take(SAID_MOST).collect()
}

// The innermost cause says what happened.
fn root(error: &(dyn std::error::Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}
