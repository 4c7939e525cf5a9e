//! `mesh-agent federate`: the nodes of other clusters are mirrored into MeshNodes of this one.
//!
//! ```text
//! ClusterLinks, their Secrets --> a registry for each remote cluster --> mirror::judge (pure) --> MeshNodes, conditions
//! ```
//!
//! Several may run; the one that holds the Lease writes. A remote API that is away changes nothing but a condition, and what
//! is gone is taken away only after a while.

pub mod election;
pub mod link;
pub mod mirror;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, Preconditions};
use kube::config::KubeConfigOptions;
use kube::core::ApiResource;
use kube::{Api, Client};
use mesh_keyring::{ClusterName, NodeName};
use mesh_overlay::NodeRecord;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use crate::registry::Snapshot;
use crate::registry::kube::{GROUP, KubeRegistry, LINK, VERSION, api_config, limits, reason};
use crate::status::rfc3339;
use election::Election;
use link::{ClusterLink, SECRET_KEY};
use mirror::{Held, Link, Mirror, Outcome, judge};

/// Where links' Secrets and the Lease are.
pub const NAMESPACE: &str = "sennit";
const FIELD_MANAGER: &str = "sennit-federate";
const WRITE: Duration = Duration::from_secs(3);
// Links and Secrets are looked at this often, and everything else when it changes.
const LOOK: Duration = Duration::from_secs(5);
// The most refused nodes that a condition names.
const NAMED: usize = 8;

/// How to federate.
#[derive(Debug, Clone, clap::Args)]
pub struct Federate {
    /// This cluster's name, as its agents have it in `registry.kube.cluster`.
    #[arg(long, env = "SENNIT_CLUSTER")]
    cluster: String,
    /// How to reach this cluster's API. Default: as a pod, by its service account.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// Seconds after which the mirror of a node that is gone is deleted.
    #[arg(long, default_value_t = 60)]
    grace: u64,
}

struct Remote {
    link: Result<Link, String>,
    // Of the Secret that the registry was made from.
    version: Option<String>,
    registry: Result<KubeRegistry, String>,
    told: Option<Value>,
}

struct Federator {
    client: Client,
    own: ClusterName,
    grace: Duration,
    local: KubeRegistry,
    bell: Arc<Notify>,
    election: Election,
    links: BTreeMap<String, Remote>,
    looked: Option<Instant>,
    gone: BTreeMap<NodeName, Instant>,
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// Only before the loop: no credentials, a bad name.
pub async fn federate(asked: &Federate) -> anyhow::Result<()> {
    let own: ClusterName = asked.cluster.parse().context("--cluster")?;
    let config = api_config(asked.kubeconfig.as_deref()).await?;
    let client = Client::try_from(config.clone())?;
    let bell = Arc::new(Notify::new());
    let host = nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let identity =
        format!("{host}-{:016x}", getrandom::u64().map_err(|e| anyhow::anyhow!("no randomness: {e}"))?);
    tracing::info!(cluster = %own, identity, "federating");
    let mut federator = Federator {
        local: KubeRegistry::with_bell(config, Some(own.clone()), Arc::clone(&bell))?,
        election: Election::new(client.clone(), NAMESPACE, identity),
        client,
        own,
        grace: Duration::from_secs(asked.grace),
        bell,
        links: BTreeMap::new(),
        looked: None,
        gone: BTreeMap::new(),
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut led = false;
    loop {
        tokio::select! {
            () = federator.turn() => {}
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
        let leads = federator.election.leads();
        if leads != led {
            tracing::info!(leads, "election");
            led = leads;
        }
        tokio::select! {
            () = federator.bell.notified() => tokio::time::sleep(Duration::from_millis(30)).await,
            () = tokio::time::sleep_until(federator.wake_at()) => {}
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    federator.election.resign().await;
    Ok(())
}

impl Federator {
    fn wake_at(&self) -> Instant {
        let grace = self.gone.values().min().map(|since| *since + self.grace);
        let look = self.looked.map(|at| at + LOOK);
        [Some(self.election.next()), look, grace]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or_else(Instant::now)
            .max(Instant::now() + Duration::from_millis(100))
    }

    async fn turn(&mut self) {
        self.election.step().await;
        if let Some(why) = self.election.trouble() {
            tracing::warn!("lease: {why}");
        }
        if !self.election.leads() {
            // Whoever leads next begins from what it sees then.
            self.gone.clear();
            return;
        }
        if self.looked.is_none_or(|at| at.elapsed() >= LOOK) {
            match timeout(WRITE * 2, self.look()).await {
                Ok(Ok(())) => self.looked = Some(Instant::now()),
                Ok(Err(e)) => return tracing::warn!("ClusterLinks: {}", reason(&e)),
                Err(_) => return tracing::warn!("ClusterLinks: no answer"),
            }
        }
        // Without knowing who is here nobody can be let in.
        let Ok((own, mirrors)) = self.local.own_and_mirrors() else { return };
        let outcomes = self.judge(&own, &mirrors);
        for (name, outcome) in &outcomes {
            let known = mirrors.get(name).map(Vec::as_slice).unwrap_or_default();
            self.write(name, outcome.as_ref(), known).await;
        }
        self.sweep(&outcomes, &mirrors).await;
    }

    /// Reads links and Secrets, and makes a registry for each that is new or has changed.
    async fn look(&mut self) -> Result<(), kube::Error> {
        let resource = links_resource();
        let links: Api<ClusterLink> = Api::all_with(self.client.clone(), &resource);
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), NAMESPACE);
        let listed = links.list(&ListParams::default()).await?;
        let names: BTreeSet<String> =
            listed.items.iter().filter_map(|link| link.metadata.name.clone()).collect();
        self.links.retain(|name, _| names.contains(name));
        for object in listed.items {
            let Some(name) = object.metadata.name.clone() else { continue };
            let parsed = link::parse(&object);
            let secret_name = &object.spec.kubeconfig_secret.name;
            let secret = match &parsed {
                Ok(_) => secrets.get_opt(secret_name).await?,
                Err(_) => None,
            };
            let version = secret.as_ref().and_then(|secret| secret.metadata.resource_version.clone());
            let known = self.links.remove(&name);
            let told = known.as_ref().and_then(|known| known.told.clone());
            let registry = match known {
                Some(known) if known.version == version && known.link == parsed => known.registry,
                _ => match (&parsed, &secret) {
                    (Ok(link), Some(secret)) => self.connect(link, secret).await,
                    (Ok(_), None) => Err(format!("Secret {NAMESPACE}/{secret_name} is not there")),
                    (Err(why), _) => Err(why.clone()),
                },
            };
            self.links.insert(name, Remote { link: parsed, version, registry, told });
        }
        Ok(())
    }

    async fn connect(&self, link: &Link, secret: &Secret) -> Result<KubeRegistry, String> {
        let text = secret.data.as_ref().and_then(|data| data.get(SECRET_KEY));
        let text = text.ok_or_else(|| format!("the Secret has no key {SECRET_KEY}"))?;
        let file = link::kubeconfig(&text.0)?;
        let options = KubeConfigOptions::default();
        let config = kube::Config::from_custom_kubeconfig(file, &options);
        let config = config.await.map_err(|_| format!("{SECRET_KEY} is no usable kubeconfig"))?;
        tracing::info!(link = %link.cluster, server = %config.cluster_url, "connecting");
        KubeRegistry::with_bell(limits(config), Some(link.cluster.clone()), Arc::clone(&self.bell))
            .map_err(|e| e.to_string())
    }

    /// Who has a mirror is judged before who has none, over all links, so that nobody new takes anything away.
    fn judge(
        &self,
        own: &Snapshot,
        mirrors: &BTreeMap<String, Vec<NodeRecord>>,
    ) -> BTreeMap<String, Result<Outcome, String>> {
        let mut held = Held::of(&own.nodes);
        let mut outcomes: BTreeMap<String, Result<Outcome, String>> = BTreeMap::new();
        let mut snapshots = Vec::new();
        for (name, remote) in &self.links {
            let known = mirrors.get(name).map(Vec::as_slice).unwrap_or_default();
            let names: BTreeSet<&NodeName> = known.iter().map(|record| &record.name).collect();
            let read = match (&remote.link, &remote.registry) {
                (Ok(link), Ok(registry)) => match registry.read() {
                    Ok(Snapshot { stale: Some(why), .. }) => Err(why),
                    Ok(snapshot) => Ok((link, snapshot)),
                    Err(e) => Err(e.to_string()),
                },
                (Err(why), _) | (_, Err(why)) => Err(why.clone()),
            };
            match read {
                Ok((link, snapshot)) => {
                    let (old, new) =
                        snapshot.nodes.into_iter().partition::<Vec<_>, _>(|n| names.contains(&n.name));
                    outcomes.insert(name.clone(), Ok(judge(link, &self.own, &old, &mut held)));
                    snapshots.push((name, link, new));
                }
                Err(why) => {
                    held.keep(known, name);
                    outcomes.insert(name.clone(), Err(why));
                }
            }
        }
        for (name, link, new) in snapshots {
            let more = judge(link, &self.own, &new, &mut held);
            if let Some(Ok(outcome)) = outcomes.get_mut(name) {
                outcome.mirrors.extend(more.mirrors);
                outcome.refused.extend(more.refused);
            }
        }
        outcomes
    }

    async fn write(&mut self, name: &str, outcome: Result<&Outcome, &String>, known: &[NodeRecord]) {
        let mut failed = None;
        if let Ok(outcome) = outcome {
            let known: BTreeMap<&NodeName, Mirror> =
                known.iter().filter_map(|record| Some((&record.name, Mirror::of(record)?))).collect();
            for (node, mirror) in &outcome.mirrors {
                if known.get(node) != Some(mirror)
                    && let Err(why) = self.apply(name, node, mirror).await
                {
                    failed = Some(format!("MeshNode {node}: {why}"));
                    break;
                }
            }
        }
        let condition = condition(outcome, failed.as_deref());
        let Some(remote) = self.links.get(name) else { return };
        if remote.told.as_ref() == Some(&condition) {
            return;
        }
        match self.tell(name, &condition).await {
            Ok(()) => {
                if let Some(remote) = self.links.get_mut(name) {
                    remote.told = Some(condition);
                }
            }
            Err(why) => tracing::warn!("status of ClusterLink {name}: {why}"),
        }
    }

    /// Deletes mirrors whose node or link has been gone for a while.
    async fn sweep(
        &mut self,
        outcomes: &BTreeMap<String, Result<Outcome, String>>,
        mirrors: &BTreeMap<String, Vec<NodeRecord>>,
    ) {
        let mut gone = BTreeSet::new();
        for (link, known) in mirrors {
            match outcomes.get(link) {
                // A remote API that is away says nothing about its nodes.
                Some(Err(_)) => {}
                // One that says something else than before, which is refused, is still there.
                Some(Ok(outcome)) => {
                    let there = |node: &NodeName| {
                        outcome.mirrors.contains_key(node) || outcome.refused.contains_key(node)
                    };
                    gone.extend(known.iter().map(|record| &record.name).filter(|node| !there(node)).cloned());
                }
                None => gone.extend(known.iter().map(|record| record.name.clone())),
            }
        }
        self.gone.retain(|node, _| gone.contains(node));
        let now = Instant::now();
        for node in gone {
            let since = *self.gone.entry(node.clone()).or_insert(now);
            if now.saturating_duration_since(since) < self.grace {
                continue;
            }
            match self.delete(&node).await {
                Ok(()) => {
                    self.gone.remove(&node);
                    tracing::info!(%node, "mirror deleted");
                }
                Err(why) => tracing::warn!("deleting MeshNode {node}: {why}"),
            }
        }
    }

    fn mesh_nodes(&self) -> Api<DynamicObject> {
        Api::all_with(self.client.clone(), &resource("MeshNode", "meshnodes"))
    }

    async fn apply(&self, link: &str, node: &NodeName, mirror: &Mirror) -> Result<(), String> {
        let object = json!({
            "apiVersion": format!("{GROUP}/{VERSION}"),
            "kind": "MeshNode",
            "metadata": {
                "name": node,
                "labels": {LINK: link, "app.kubernetes.io/managed-by": FIELD_MANAGER},
                "annotations": mirror.annotations,
            },
            "spec": {"site": mirror.site, "podCIDRs": mirror.pod_cidrs},
        });
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        let patch = Patch::Apply(&object);
        let api = self.mesh_nodes();
        self.fenced(api.patch(node.as_str(), &parameters, &patch)).await
    }

    async fn delete(&self, node: &NodeName) -> Result<(), String> {
        let api = self.mesh_nodes();
        let Some(object) = api.get_opt(node.as_str()).await.map_err(|e| reason(&e))? else { return Ok(()) };
        if !object.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(LINK)) {
            return Err("it is no mirror any more".into());
        }
        // The very object that was judged, and no other of its name.
        let preconditions =
            Preconditions { uid: object.metadata.uid, resource_version: object.metadata.resource_version };
        let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        self.fenced(api.delete(node.as_str(), &parameters)).await
    }

    async fn tell(&self, link: &str, condition: &Value) -> Result<(), String> {
        let mut condition = condition.clone();
        condition["lastTransitionTime"] = json!(rfc3339(SystemTime::now()));
        let nodes = condition.as_object_mut().and_then(|fields| fields.remove("nodes")).unwrap_or_default();
        let status = json!({
            "apiVersion": format!("{GROUP}/{VERSION}"),
            "kind": "ClusterLink",
            "metadata": {"name": link},
            "status": {"nodes": nodes, "conditions": [condition]},
        });
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &links_resource());
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        let patch = Patch::Apply(&status);
        self.fenced(api.patch_status(link, &parameters, &patch)).await
    }

    /// A write is begun only while the Lease is surely ours, and given up before somebody else can hold it.
    async fn fenced<T>(&self, write: impl Future<Output = Result<T, kube::Error>>) -> Result<(), String> {
        if !self.election.leads() {
            return Err("the Lease is not ours any more".into());
        }
        match timeout(WRITE, write).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(e)) => Err(reason(&e)),
            Err(_) => Err(format!("no answer within {} s", WRITE.as_secs())),
        }
    }
}

fn resource(kind: &str, plural: &str) -> ApiResource {
    ApiResource {
        group: GROUP.into(),
        version: VERSION.into(),
        api_version: format!("{GROUP}/{VERSION}"),
        kind: kind.into(),
        plural: plural.into(),
    }
}

fn links_resource() -> ApiResource {
    resource("ClusterLink", "clusterlinks")
}

/// The condition `Ready` of a link, and beside it how many nodes it mirrors.
fn condition(outcome: Result<&Outcome, &String>, failed: Option<&str>) -> Value {
    let (status, why, message) = match (outcome, failed) {
        (Err(why), _) => ("False", "Unreachable", format!("{why}; mirrors stay as they are")),
        (Ok(_), Some(why)) => ("False", "NotWritten", why.to_owned()),
        (Ok(outcome), None) if !outcome.refused.is_empty() => {
            let mut message = format!("{} nodes are refused", outcome.refused.len());
            for (node, why) in outcome.refused.iter().take(NAMED) {
                message += &format!("; {node}: {why}");
            }
            ("False", "Refused", message)
        }
        (Ok(_), None) => ("True", "Mirrored", String::new()),
    };
    let nodes = outcome.map_or(Value::Null, |outcome| json!(outcome.mirrors.len()));
    json!({"type": "Ready", "status": status, "reason": why, "message": message, "nodes": nodes})
}
