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
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::Secret;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::core::ApiResource;
use kube::{Api, Client, ResourceExt as _};
use mesh_keyring::{ClusterName, NodeName};
use mesh_overlay::NodeRecord;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use crate::config::{Config, KubeRegistryConfig, RegistryChoice};
use crate::registry::Snapshot;
use crate::registry::kube::access::Access;
use crate::registry::kube::budget::{Budget, Connected, client};
use crate::registry::kube::{GROUP, KubeRegistry, LINK, VERSION, api_config, custom, mesh_nodes, reason};
use crate::status::rfc3339;
use election::{Election, Term};
use link::{ClusterLink, SECRET_KEY};
use mirror::{Held, Link, Mirror, Outcome, is_allowed, judge};

/// Where links' Secrets and the Lease are.
pub const NAMESPACE: &str = "sennit";
const FIELD_MANAGER: &str = "sennit-federate";
const WRITE: Duration = Duration::from_secs(3);
// Links and Secrets are looked at this often, and everything else when it changes.
const LOOK: Duration = Duration::from_secs(5);
const QUIET: Duration = Duration::from_millis(30);
// What fails is tried again no sooner than this.
const BREATH: Duration = Duration::from_secs(1);
// How often credentials that cannot be read are read again.
const ACCESS_AGAIN: Duration = Duration::from_secs(2);
// In one turn through one link.
const WRITES_MOST: usize = 200;
// The most refused nodes that a condition names.
const NAMED: usize = 8;

/// How to federate.
#[derive(Debug, Clone, clap::Args)]
pub struct Federate {
    /// This cluster's name, as its agents have it in `registry.kube.cluster`.
    #[arg(long, env = "SENNIT_CLUSTER", required_unless_present = "config")]
    cluster: Option<String>,
    /// The agents' configuration, to take the cluster's name from.
    #[arg(long, conflicts_with = "cluster")]
    config: Option<PathBuf>,
    /// How to reach this cluster's API. Default: as a pod, by its service account.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// Seconds after which the mirror of a node that is gone is deleted.
    #[arg(long, default_value_t = 60)]
    grace: u64,
}

struct Remote {
    // A link of the same name that was made anew is another one.
    uid: Option<String>,
    link: Result<Link, String>,
    // Of the Secret that the registry was made from.
    version: Option<String>,
    registry: Result<KubeRegistry, String>,
    // The condition as it stands there.
    standing: Value,
    told: Option<Value>,
}

struct Federator {
    client: Client,
    own: ClusterName,
    grace: Duration,
    local: KubeRegistry,
    bell: Arc<Notify>,
    term: Arc<Term>,
    links: BTreeMap<String, Remote>,
    look_at: Instant,
    gone: BTreeMap<NodeName, Instant>,
    // Something is left to be written.
    pending: bool,
    led: bool,
}

impl Federate {
    fn own(&self) -> anyhow::Result<ClusterName> {
        if let Some(name) = &self.cluster {
            return name.parse().context("--cluster");
        }
        let path = self.config.as_deref().context("neither --cluster nor --config")?;
        // Whose node this is does not matter here.
        match Config::load(path, Some("federate"))?.registry {
            RegistryChoice::Kube(KubeRegistryConfig { cluster: Some(cluster), .. }) => Ok(cluster),
            _ => bail!(
                "configuration {}: registry.kube.cluster: federation needs the cluster's name",
                path.display()
            ),
        }
    }
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// Only before the loop: no credentials, a bad name.
pub async fn federate(asked: &Federate) -> anyhow::Result<()> {
    let own = asked.own()?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let access = tokio::select! {
        access = access(asked.kubeconfig.as_deref()) => access,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    let Connected { client, .. } = client(access.clone(), Budget::OWN)?;
    let host = nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let random = getrandom::u64().map_err(|e| anyhow::anyhow!("no randomness: {e}"))?;
    let identity = format!("{host}-{random:016x}");
    tracing::info!(cluster = %own, identity, "federating");
    let election = Election::new(client.clone(), NAMESPACE, identity);
    let (stop, bell) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let mut federator = Federator {
        local: KubeRegistry::with_bell(access, Some(own.clone()), Arc::clone(&bell), Budget::OWN)?,
        client,
        own,
        grace: Duration::from_secs(asked.grace),
        bell: Arc::clone(&bell),
        term: election.term(),
        links: BTreeMap::new(),
        look_at: Instant::now(),
        gone: BTreeMap::new(),
        pending: false,
        led: false,
    };
    let election = tokio::spawn(election.run(Arc::clone(&stop), bell));
    loop {
        tokio::select! {
            () = federator.turn() => {}
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
        tokio::select! {
            () = federator.bell.notified() => tokio::time::sleep(QUIET).await,
            () = tokio::time::sleep_until(federator.wake_at()) => {}
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    stop.notify_one();
    let _ = timeout(WRITE * 2, election).await;
    Ok(())
}

/// Waits until it is known how to reach the API: a file that is missing may be there soon.
async fn access(kubeconfig: Option<&Path>) -> Access {
    let mut told = None;
    loop {
        match api_config(kubeconfig).await {
            Ok(access) => return access,
            Err(why) => {
                let why = why.to_string();
                if told.as_ref() != Some(&why) {
                    tracing::error!("{why}; it is tried again every {} s", ACCESS_AGAIN.as_secs());
                }
                told = Some(why);
            }
        }
        tokio::time::sleep(ACCESS_AGAIN).await;
    }
}

impl Federator {
    fn wake_at(&self) -> Instant {
        let now = Instant::now();
        if self.pending && self.term.is_ours() {
            return now + QUIET;
        }
        let grace = self.gone.values().map(|since| *since + self.grace).min();
        grace.map_or(self.look_at, |grace| grace.min(self.look_at)).max(now + BREATH)
    }

    async fn turn(&mut self) {
        self.pending = false;
        let leads = self.term.is_ours();
        if leads != std::mem::replace(&mut self.led, leads) {
            // Whoever leads begins from what it sees then.
            self.gone.clear();
            self.links.values_mut().for_each(|remote| remote.told = None);
            self.look_at = Instant::now();
        }
        if !leads {
            self.look_at = Instant::now() + LOOK;
            return;
        }
        if Instant::now() >= self.look_at {
            self.look_at = Instant::now() + LOOK;
            match timeout(WRITE * 2, self.look()).await {
                Ok(Ok(())) => {}
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
        let links: Api<ClusterLink> = Api::all_with(self.client.clone(), &links_resource());
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), NAMESPACE);
        let listed = links.list(&ListParams::default()).await?;
        let names: BTreeSet<String> =
            listed.items.iter().filter_map(|link| link.metadata.name.clone()).collect();
        self.links.retain(|name, _| names.contains(name));
        for object in listed.items {
            let Some(name) = object.metadata.name.clone() else { continue };
            let link = link::parse(&object, &self.own);
            let secret_name = &object.spec.kubeconfig_secret.name;
            let secret = match &link {
                Ok(_) => secrets
                    .get_opt(secret_name)
                    .await
                    .map_err(|e| format!("Secret {NAMESPACE}/{secret_name}: {}", reason(&e))),
                Err(_) => Ok(None),
            };
            let version = secret
                .as_ref()
                .ok()
                .and_then(Option::as_ref)
                .and_then(|secret| secret.metadata.resource_version.clone());
            let uid = object.metadata.uid.clone();
            let standing = object.status.as_ref().and_then(|status| status.pointer("/conditions/0")).cloned();
            let known = self.links.remove(&name).filter(|known| known.uid == uid);
            let told = known.as_ref().and_then(|known| known.told.clone());
            let registry = match (known, &link, secret) {
                (_, Err(why), _) => Err(why.clone()),
                (None, _, Err(why)) => Err(why),
                // A Secret that cannot be read now has not changed.
                (Some(known), Ok(_), Err(_)) => known.registry,
                (Some(known), _, _) if known.version == version && known.link == link => known.registry,
                (_, Ok(link), Ok(Some(secret))) => self.connect(link, &secret).await,
                (_, Ok(_), Ok(None)) => Err(format!("Secret {NAMESPACE}/{secret_name} is not there")),
            };
            let standing = standing.unwrap_or_default();
            self.links.insert(name, Remote { uid, link, version, registry, standing, told });
        }
        Ok(())
    }

    async fn connect(&self, link: &Link, secret: &Secret) -> Result<KubeRegistry, String> {
        let text = secret.data.as_ref().and_then(|data| data.get(SECRET_KEY));
        let text = text.ok_or_else(|| format!("the Secret has no key {SECRET_KEY}"))?;
        let file = link::kubeconfig(&text.0)?;
        let access =
            Access::given(file).await.map_err(|_| format!("{SECRET_KEY} is no usable kubeconfig"))?;
        tracing::info!(link = %link.cluster, server = %access.cluster_url, "connecting");
        let bell = Arc::clone(&self.bell);
        KubeRegistry::with_bell(access, Some(link.cluster.clone()), bell, Budget::REMOTE)
            .map_err(|e| e.to_string())
    }

    fn judge(
        &self,
        own: &Snapshot,
        mirrors: &BTreeMap<String, Vec<NodeRecord>>,
    ) -> BTreeMap<String, Result<Outcome, String>> {
        let mut held = Held::of(&own.nodes, mirrors);
        let mut outcomes = BTreeMap::new();
        for (name, remote) in &self.links {
            let outcome = match (&remote.link, &remote.registry) {
                (Ok(link), Ok(registry)) => match registry.own_and_mirrors() {
                    Ok((theirs, passed_on)) => {
                        let mut nodes = theirs.nodes;
                        // What a cluster has from others is theirs to tell, unless it is there to pass it on.
                        if link.site.is_none() {
                            nodes.extend(passed_on.into_values().flatten());
                        }
                        let mut outcome = judge(link, &self.own, &nodes, &mut held);
                        if theirs.mesh_nodes == Some(false) {
                            let standing = mirrors.get(name).into_iter().flatten().map(|mirror| &mirror.name);
                            let there: BTreeSet<&NodeName> = nodes.iter().map(|node| &node.name).collect();
                            outcome.unseen = standing.filter(|node| !there.contains(node)).cloned().collect();
                        }
                        Ok(outcome)
                    }
                    Err(e) => Err(e.to_string()),
                },
                (Err(why), _) | (_, Err(why)) => Err(why.clone()),
            };
            outcomes.insert(name.clone(), outcome);
        }
        outcomes
    }

    async fn write(&mut self, name: &str, outcome: Result<&Outcome, &String>, known: &[NodeRecord]) {
        let mut failed = None;
        if let Ok(outcome) = outcome {
            let known: BTreeMap<&NodeName, Option<Mirror>> =
                known.iter().map(|record| (&record.name, Mirror::of(record))).collect();
            let changed = |(node, mirror): &(&NodeName, &Mirror)| {
                known.get(node).and_then(Option::as_ref) != Some(*mirror)
            };
            for (writes, (node, mirror)) in outcome.mirrors.iter().filter(changed).enumerate() {
                // No link keeps the others waiting.
                if writes == WRITES_MOST {
                    self.pending = true;
                    break;
                }
                let written = match known.contains_key(node) {
                    true => self.replace(name, node, mirror).await,
                    false => self.create(name, node, mirror).await,
                };
                if let Err(why) = written {
                    failed = Some(format!("MeshNode {node}: {why}"));
                    break;
                }
            }
        }
        let condition = condition(outcome, failed.as_deref());
        let Some(remote) = self.links.get(name) else { return };
        if self.pending || remote.told.as_ref() == Some(&condition) {
            return;
        }
        match self.tell(name, &condition, &remote.standing).await {
            Ok(standing) => {
                if let Some(remote) = self.links.get_mut(name) {
                    (remote.standing, remote.told) = (standing, Some(condition));
                }
            }
            Err(why) => tracing::warn!("status of ClusterLink {name}: {why}"),
        }
    }

    /// Deletes mirrors whose node or link has been gone for a while, or that their link does not allow any more.
    async fn sweep(
        &mut self,
        outcomes: &BTreeMap<String, Result<Outcome, String>>,
        mirrors: &BTreeMap<String, Vec<NodeRecord>>,
    ) {
        let mut gone = BTreeMap::new();
        for (name, known) in mirrors {
            let link = self.links.get(name).and_then(|remote| remote.link.as_ref().ok());
            for record in known {
                let there = match (outcomes.get(name), link) {
                    // A remote API that is away says nothing about its nodes.
                    (Some(Err(_)), None) => true,
                    (Some(Err(_)), Some(link)) => {
                        Mirror::of(record).is_some_and(|mirror| is_allowed(link, &mirror))
                    }
                    // One that says something else than before, which is refused, is still there.
                    (Some(Ok(outcome)), Some(link)) => {
                        outcome.mirrors.contains_key(&record.name)
                            || (outcome.refused.contains_key(&record.name)
                                || outcome.unseen.contains(&record.name))
                                && Mirror::of(record).is_some_and(|mirror| is_allowed(link, &mirror))
                    }
                    _ => false,
                };
                if !there {
                    gone.insert(record.name.clone(), name.clone());
                }
            }
        }
        self.gone.retain(|node, _| gone.contains_key(node));
        let now = Instant::now();
        for (node, link) in gone {
            let since = *self.gone.entry(node.clone()).or_insert(now);
            if now.saturating_duration_since(since) < self.grace {
                continue;
            }
            match self.delete(&link, &node).await {
                Ok(()) => {
                    self.gone.remove(&node);
                    tracing::info!(%node, "mirror deleted");
                }
                Err(why) => {
                    tracing::warn!("deleting MeshNode {node}: {why}");
                    break;
                }
            }
        }
    }

    fn mesh_nodes(&self) -> Api<DynamicObject> {
        Api::all_with(self.client.clone(), &mesh_nodes())
    }

    async fn create(&self, link: &str, node: &NodeName, mirror: &Mirror) -> Result<(), String> {
        let mut object = DynamicObject::new(node.as_str(), &mesh_nodes());
        fill(&mut object, link, mirror);
        // One that somebody else makes at this moment is in the way, and stays.
        let api = self.mesh_nodes();
        self.fenced(api.create(
            &PostParams { field_manager: Some(FIELD_MANAGER.into()), ..PostParams::default() },
            &object,
        ))
        .await
    }

    async fn replace(&self, link: &str, node: &NodeName, mirror: &Mirror) -> Result<(), String> {
        let Some(mut object) = self.standing(link, node).await? else {
            return self.create(link, node, mirror).await;
        };
        fill(&mut object, link, mirror);
        // With the version that was read: what others change in between is not overwritten.
        let parameters = PostParams { field_manager: Some(FIELD_MANAGER.into()), ..PostParams::default() };
        let api = self.mesh_nodes();
        self.fenced(api.replace(node.as_str(), &parameters, &object)).await
    }

    async fn delete(&self, link: &str, node: &NodeName) -> Result<(), String> {
        let Some(object) = self.standing(link, node).await? else { return Ok(()) };
        // The very object that was judged, and no other of its name.
        let preconditions =
            Preconditions { uid: object.metadata.uid, resource_version: object.metadata.resource_version };
        let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        let api = self.mesh_nodes();
        self.fenced(api.delete(node.as_str(), &parameters)).await
    }

    /// The mirror as it stands; one that is not this link's is not touched.
    async fn standing(&self, link: &str, node: &NodeName) -> Result<Option<DynamicObject>, String> {
        let read = timeout(WRITE, self.mesh_nodes().get_opt(node.as_str())).await;
        let object = read.map_err(|_| "no answer".to_owned())?.map_err(|e| reason(&e))?;
        match object {
            Some(object) if object.labels().get(LINK).map(String::as_str) != Some(link) => {
                Err(format!("there is one that is no mirror of link {link}"))
            }
            object => Ok(object),
        }
    }

    /// Writes the condition; returns it as it stands then.
    async fn tell(&self, link: &str, condition: &Value, standing: &Value) -> Result<Value, String> {
        let mut condition = condition.clone();
        // It says since when the status has been what it is.
        let since = standing.get("lastTransitionTime").filter(|_| standing["status"] == condition["status"]);
        condition["lastTransitionTime"] = since.cloned().unwrap_or_else(|| json!(rfc3339(SystemTime::now())));
        let nodes = condition.as_object_mut().and_then(|fields| fields.remove("nodes")).unwrap_or_default();
        let status = json!({
            "apiVersion": format!("{GROUP}/{VERSION}"),
            "kind": "ClusterLink",
            "metadata": {"name": link},
            "status": {"nodes": nodes, "conditions": [&condition]},
        });
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &links_resource());
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        let patch = Patch::Apply(&status);
        self.fenced(api.patch_status(link, &parameters, &patch)).await.map(|()| condition)
    }

    /// A write is begun only while the Lease is surely ours, and given up before somebody else can hold it. One that arrives
    /// late all the same changes nothing that was changed since: it names the version that it was made for.
    async fn fenced<T>(&self, write: impl Future<Output = Result<T, kube::Error>>) -> Result<(), String> {
        if !self.term.is_ours() {
            return Err("the Lease is not ours any more".into());
        }
        match timeout(WRITE, write).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(e)) => Err(reason(&e)),
            Err(_) => Err(format!("no answer within {} s", WRITE.as_secs())),
        }
    }
}

fn fill(object: &mut DynamicObject, link: &str, mirror: &Mirror) {
    let labels = [(LINK, link), ("app.kubernetes.io/managed-by", FIELD_MANAGER)];
    object.metadata.labels = Some(labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into());
    object.metadata.annotations = Some(mirror.annotations.clone());
    object.metadata.managed_fields = None;
    object.data["spec"] = json!({"site": mirror.site, "podCIDRs": mirror.pod_cidrs});
}

fn links_resource() -> ApiResource {
    custom("ClusterLink", "clusterlinks")
}

/// The condition `Ready` of a link, and beside it how many nodes it mirrors.
fn condition(outcome: Result<&Outcome, &String>, failed: Option<&str>) -> Value {
    let (status, why, message) = match (outcome, failed) {
        (Err(why), _) => ("False", "Unreachable", format!("{why}; mirrors stay as they are")),
        (Ok(_), Some(why)) => ("False", "NotWritten", why.to_owned()),
        (Ok(outcome), None) if !outcome.unseen.is_empty() => {
            let all: Vec<&str> = outcome.unseen.iter().take(NAMED).map(NodeName::as_str).collect();
            let message = format!(
                "the cluster does not know the kind MeshNode in our version, so that {} nodes count as there: {}; apply the \
                 CRDs of deploy/kubernetes/base there",
                outcome.unseen.len(),
                all.join(", ")
            );
            ("False", "KindMissing", message)
        }
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
