//! Where nodes are published: what a registry yields, the one that is a directory of manifests, and the one that is a
//! cluster's API.

pub mod feed;
pub mod file;
pub mod kube;
pub mod merge;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use mesh_keyring::{MeshName, NodeName, SiteName};
use mesh_overlay::{Advertisement, NodeRecord};
use mesh_policy::model::Labels;

use self::feed::Feed;
use self::file::FileRegistry;
use self::kube::KubeRegistry;
use self::kube::directory::SiteRule;
use crate::config::RegistryChoice;
use crate::settings::Settings;

/// The registry that is configured.
pub enum Registry {
    /// A directory of manifests.
    File(FileRegistry),
    /// A cluster's API.
    Kube(KubeRegistry),
    /// One that cannot be opened now, and why: nothing is known of it. It is tried again.
    Closed(Closed),
}

/// A registry that could not be opened.
pub struct Closed {
    why: String,
    choice: RegistryChoice,
    mesh: MeshName,
    site: SiteName,
    feed: Feed,
    opens: bool,
}

/// How often a registry that cannot be opened is tried again.
const OPEN_AGAIN: Duration = Duration::from_secs(2);

impl Closed {
    fn away(&self) -> RegistryError {
        RegistryError::Closed(self.why.clone())
    }
}

impl Registry {
    /// Opens it; nothing need be there yet. Also says which addresses it is reached at, which no peer may hold.
    /// Of objects of kind Mesh, the one of this name counts. Nodes of a cluster that no label tells of stand in `site`. With `policy`, a cluster's pods, namespaces and policies are watched, too.
    ///
    /// # Errors
    /// [`RegistryError::Credentials`].
    pub async fn open(
        choice: &RegistryChoice,
        mesh: &MeshName,
        site: &SiteName,
        policy: bool,
    ) -> Result<(Self, Vec<IpAddr>), RegistryError> {
        match choice {
            RegistryChoice::File(file) => {
                Ok((Self::File(FileRegistry::of_mesh(&file.dir, mesh)), Vec::new()))
            }
            RegistryChoice::Kube(kube) => {
                let access = self::kube::api_config(kube.kubeconfig.as_deref()).await?;
                // Where there is a proxy, it is the proxy that nobody may take away.
                let (server, port) = access.reached_at();
                let address: Option<IpAddr> = server.parse().ok();
                let mut registry = KubeRegistry::new(access, kube.cluster.clone(), mesh)?;
                registry.sites(SiteRule { old_label: kube.old_site_label, unlabelled: Some(site.clone()) });
                if address.is_none() {
                    registry.resolve(server, port);
                }
                if policy {
                    registry.watch_policy();
                }
                Ok((Self::Kube(registry), address.into_iter().collect()))
            }
        }
    }

    /// Opens it as [`Registry::open`] does; one that cannot be opened is [`Registry::Closed`], so that what needs
    /// no registry goes on.
    pub async fn open_or_closed(
        choice: &RegistryChoice,
        mesh: &MeshName,
        site: &SiteName,
        policy: bool,
    ) -> (Self, Vec<IpAddr>) {
        match Self::open(choice, mesh, site, policy).await {
            Ok(opened) => opened,
            Err(why) => {
                let closed = Closed {
                    why: why.to_string(),
                    choice: choice.clone(),
                    mesh: mesh.clone(),
                    site: site.clone(),
                    feed: Feed::default(),
                    opens: false,
                };
                (Self::Closed(closed), Vec::new())
            }
        }
    }

    /// Whether it could not be opened, and now can be.
    pub fn opens(&self) -> bool {
        matches!(self, Self::Closed(closed) if closed.opens)
    }

    /// Everything that it holds.
    ///
    /// # Errors
    /// When that is not known; what was read before stays in force.
    pub fn read(&mut self) -> Result<Snapshot, RegistryError> {
        match self {
            Self::File(file) => file.read(),
            Self::Kube(kube) => kube.read(),
            Self::Closed(closed) => Err(closed.away()),
        }
    }

    /// What it says of pods, namespaces and policies.
    pub fn feed(&self) -> &Feed {
        match self {
            Self::File(file) => file.feed(),
            Self::Kube(kube) => kube.feed(),
            Self::Closed(closed) => &closed.feed,
        }
    }

    /// What was read last was taken for the operator's will.
    pub fn accepted(&mut self) {
        if let Self::File(file) = self {
            file.accepted();
        }
    }

    /// Whether it has an object for each pod of this node, which are those with a kubelet; `None`: that is not known yet.
    pub fn knows_pods_of(&self, node: &NodeName) -> Option<bool> {
        match self {
            Self::File(_) => Some(false),
            Self::Kube(kube) => kube.has_kubelet(node),
            Self::Closed(_) => None,
        }
    }

    /// Publishes what this node says of itself, if it differs from what stands there; says whether it wrote.
    ///
    /// # Errors
    /// The previous publication stays in force.
    pub async fn publish(&self, node: &NodeName, claim: &Advertisement) -> Result<bool, RegistryError> {
        match self {
            Self::File(file) => file.publish(node, claim),
            Self::Kube(kube) => kube.publish(node, claim).await,
            Self::Closed(closed) => Err(closed.away()),
        }
    }

    /// Writes these annotations of this node, if they differ from what stands there; says whether it wrote.
    ///
    /// # Errors
    /// The previous publication stays in force.
    pub async fn write(
        &self,
        node: &NodeName,
        annotations: &BTreeMap<String, String>,
    ) -> Result<bool, RegistryError> {
        match self {
            Self::File(file) => file.write(node, annotations),
            Self::Kube(kube) => kube.write(node, annotations).await,
            Self::Closed(closed) => Err(closed.away()),
        }
    }

    /// Tells people something about this node, where the registry has a place for that: a cluster's Events. Beside the loop; one
    /// that cannot be written is lost, and logged.
    pub fn tell(&self, node: &NodeName, notice: Notice) {
        match self {
            // Who reads a directory reads the log and status.
            Self::File(_) | Self::Closed(_) => {}
            Self::Kube(kube) => kube.tell(node, notice),
        }
    }

    /// Says in the registry what became of the Mesh, where it has a place for that. `refusal`: why this node refuses it.
    pub fn tell_mesh(&self, node: &NodeName, refusal: Option<&str>) {
        if let Self::Kube(kube) = self {
            kube.tell_mesh(node, refusal);
        }
    }

    /// Tells what is wrong between this node and the registry, and looks again where it is time to.
    pub fn problems(&self, node: &NodeName) -> Vec<crate::problem::Problem> {
        match self {
            Self::File(_) | Self::Closed(_) => Vec::new(),
            Self::Kube(kube) => {
                kube.watch_trust(node);
                kube.problems(node)
            }
        }
    }

    /// Whether this node's publication could be written. Writes nothing.
    ///
    /// # Errors
    /// Why it could not.
    pub async fn may_publish(&self, node: &NodeName) -> Result<(), RegistryError> {
        match self {
            Self::File(file) => file.may_publish(node),
            Self::Kube(kube) => kube.may_publish(node).await,
            Self::Closed(closed) => Err(closed.away()),
        }
    }

    /// Takes this node's publication away.
    ///
    /// # Errors
    /// When it may still be there. No publication is no error.
    pub async fn withdraw(&self, node: &NodeName) -> Result<(), RegistryError> {
        match self {
            Self::File(file) => file.withdraw(node),
            Self::Kube(kube) => kube.withdraw(node).await,
            Self::Closed(closed) => Err(closed.away()),
        }
    }

    /// Waits until something may have changed. Safe to drop and call again.
    pub async fn changed(&mut self) {
        match self {
            Self::File(file) => file.changed().await,
            Self::Kube(kube) => kube.changed().await,
            Self::Closed(closed) => loop {
                tokio::time::sleep(OPEN_AGAIN).await;
                match Self::open(&closed.choice, &closed.mesh, &closed.site, false).await {
                    Ok(_) => {
                        closed.opens = true;
                        return;
                    }
                    Err(why) if why.to_string() != closed.why => {
                        closed.why = why.to_string();
                        return;
                    }
                    Err(_) => {}
                }
            },
        }
    }
}

/// Something that people should know about a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// Whether it asks for attention.
    pub warning: bool,
    /// What, in one word (CamelCase).
    pub reason: &'static str,
    /// What, in a sentence.
    pub note: String,
}

/// Everything that a registry holds at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The nodes that the operator knows, by name, each with its own publication merged in.
    pub nodes: Vec<NodeRecord>,
    /// What their Node objects say of them beside that, by name.
    pub hosts: Arc<BTreeMap<String, Host>>,
    /// What could not be read, each with the object and the remedy. Nothing of it counts.
    pub problems: Vec<Problem>,
    /// A file of the operator could not be read, and what it held before is not known: nodes may be missing.
    pub incomplete: bool,
    /// Why some of it may be out of date, as a sentence for the status. It counts all the same.
    pub stale: Option<String>,
    /// Nodes whose publication could not be read, and what it held before is not known.
    pub unreadable: BTreeSet<NodeName>,
    /// Whether the cluster knows the kind MeshNode; `None` where that is no question.
    pub mesh_nodes: Option<bool>,
    /// What the operator says for the mesh as a whole.
    pub mesh: MeshWord,
    /// Where the registry itself is reached, beside what the configuration says.
    pub servers: BTreeSet<IpAddr>,
    /// Those of them that only a name leads to: whoever answers DNS could choose them.
    pub named: BTreeSet<IpAddr>,
    /// Whether that is all, so that what was known before counts no longer.
    pub servers_known: bool,
}

/// What a Node object says that policy asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Host {
    /// Its labels.
    pub labels: Labels,
    /// Its addresses, by its `status`.
    pub addresses: BTreeSet<IpAddr>,
    /// The prefixes that it was granted.
    pub prefixes: BTreeSet<IpNet>,
}

/// What the registry's Mesh says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum MeshWord {
    /// There is none.
    #[default]
    Silent,
    /// This.
    Said(Settings),
    /// The cluster does not know the kind, or does not let us read it. Where there was one, it stays in force.
    Missing(String),
    /// Nothing that can be understood, and why. Where it said something before, that stays in force.
    Unclear(String),
}

/// Something in the registry that was refused.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The node that it concerns, where that is known.
    pub node: Option<NodeName>,
    /// Object and reason.
    pub text: String,
}

/// Why the registry as a whole could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The directory is away. What was known stays in force.
    #[error("registry directory {path}: {source}; the last good state stays in force")]
    Away {
        /// The directory.
        path: String,
        /// The answer of the system.
        source: std::io::Error,
    },
    /// This node's own publication could not be written.
    #[error("publishing {path}: {source}; the previous publication stays in force")]
    Publish {
        /// The file.
        path: String,
        /// The answer of the system.
        source: std::io::Error,
    },
    /// It could not be opened yet.
    #[error("{0}; the last good state stays in force, and the registry is tried again every 2 s")]
    Closed(String),
    /// No way to the API is known.
    #[error("{what}: {reason}")]
    Credentials {
        /// File, or what stands for one.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// Not everything is known. What was known stays in force.
    #[error("API server {server}: {reason}; the last good state stays in force")]
    Unreachable {
        /// Its address.
        server: String,
        /// What stands in the way.
        reason: String,
    },
    /// Nobody has registered this node.
    #[error(
        "the cluster has neither a Node nor a MeshNode {0}: nothing is published; set `node`, or create the MeshNode"
    )]
    Unregistered(NodeName),
    /// This node's annotations could not be applied.
    #[error(
        "applying the annotations of {object} to API server {server}: {reason}; the previous publication stays in force"
    )]
    Apply {
        /// Kind and name.
        object: String,
        /// Where.
        server: String,
        /// What it said.
        reason: String,
    },
}
