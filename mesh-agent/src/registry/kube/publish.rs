//! The node's publication: its own annotations are applied, and others' writes among them are
//! removed.
//!
//! A write goes on beside the passes of the agent, so that a slow server keeps none of them waiting for long.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use mesh_keyring::NodeName;
use mesh_overlay::Advertisement;
use parking_lot::Mutex;
use serde_json::json;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};

use super::directory::{Entry, Kind, MeshNode, Node};
use super::listing::Named as _;
use super::{FIELD_MANAGER, KubeRegistry, LISTING, Shared, WRITE, WRITE_MOST, api, events, reason, resource};
use crate::problem::Problem;
use crate::registry::{Notice, RegistryError};

/// The time for which writes by others are reported.
const TOLD: Duration = Duration::from_secs(300);
/// Within [`TOLD`] others' annotations are taken away at most this often: somebody writes them again and again.
const CORRECTED_MOST: usize = 8;

type Annotations = BTreeMap<String, String>;

/// The write in progress, and annotations that others wrote.
#[derive(Debug, Default)]
pub(super) struct Publishing {
    writing: Mutex<Option<Writing>>,
    foreign: Arc<Mutex<Foreign>>,
}

#[derive(Debug)]
struct Writing {
    annotations: Annotations,
    task: JoinHandle<Result<(), RegistryError>>,
}

impl Drop for Writing {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Annotations that others wrote into the object of this node.
#[derive(Debug, Default)]
struct Foreign {
    // When they were taken away.
    corrected: VecDeque<Instant>,
    // By key, who wrote it last.
    writers: BTreeMap<String, String>,
}

impl Foreign {
    /// Returns whether one more may be taken away now, and counts it.
    fn may_correct(&mut self, now: Instant) -> bool {
        self.forget(now);
        let may = self.corrected.len() < CORRECTED_MOST;
        if may {
            self.corrected.push_back(now);
        }
        may
    }

    fn forget(&mut self, now: Instant) {
        while self.corrected.front().is_some_and(|at| now.duration_since(*at) >= TOLD) {
            self.corrected.pop_front();
        }
        if self.corrected.is_empty() {
            self.writers.clear();
        }
    }

    fn problem(&mut self, now: Instant, object: &str) -> Option<Problem> {
        self.forget(now);
        let all: Vec<String> = self.writers.iter().map(|(key, who)| format!("{key} by {who}")).collect();
        let often = self.corrected.len() >= CORRECTED_MOST;
        let text = format!(
            "annotations that only its agent writes were written by others, and {}: {}",
            if often { "again and again, so that they stay for now" } else { "taken away" },
            all.join(", ")
        );
        let remedy = "find out who wrote them, and keep them from it: they say how others reach this node";
        (!all.is_empty()).then(|| Problem::new("annotation-foreign", object, text, remedy).blocking(often))
    }
}

/// One object that this node speaks in, for writes.
#[derive(Clone)]
struct Place {
    client: Client,
    shared: Arc<Shared>,
    foreign: Arc<Mutex<Foreign>>,
    server: String,
    kind: Kind,
    name: String,
}

impl KubeRegistry {
    fn place(&self, kind: Kind, name: String) -> Place {
        Place {
            client: self.client.clone(),
            shared: Arc::clone(&self.shared),
            foreign: Arc::clone(&self.publishing.foreign),
            server: self.server.clone(),
            kind,
            name,
        }
    }

    /// Applies this node's annotations, where they differ from what stands there; says whether it wrote.
    ///
    /// # Errors
    /// [`RegistryError::Apply`].
    pub async fn publish(&self, node: &NodeName, claim: &Advertisement) -> Result<bool, RegistryError> {
        self.write(node, &claim.to_annotations()).await
    }

    /// Applies these annotations of this node, as [`KubeRegistry::publish`] does.
    ///
    /// # Errors
    /// [`RegistryError::Apply`].
    pub async fn write(&self, node: &NodeName, annotations: &Annotations) -> Result<bool, RegistryError> {
        let deadline = Instant::now() + WRITE;
        loop {
            let (kind, name) = {
                let directory = self.shared.directory.lock();
                match directory.find(node, self.cluster.as_ref()) {
                    Some((_, entry)) if entry.annotations() == annotations => {
                        self.publishing.writing.lock().take();
                        return Ok(false);
                    }
                    Some((kind, entry)) => (kind, entry.name().to_owned()),
                    // Not before everything was listed is it known to be missing.
                    None => match directory.obstacle() {
                        Some(reason) => return Err(self.unreachable(reason)),
                        None => return Err(RegistryError::Unregistered(node.clone())),
                    },
                }
            };
            let place = self.place(kind, name);
            let writing = self.publishing.writing.lock().take();
            let mut writing = writing.unwrap_or_else(|| {
                let (place, annotations) = (place.clone(), annotations.clone());
                let wanted = annotations.clone();
                Writing { annotations, task: tokio::spawn(async move { place.write(&wanted).await }) }
            });
            let Ok(done) = timeout_at(deadline, &mut writing.task).await else {
                *self.publishing.writing.lock() = Some(writing);
                let why = format!(
                    "no answer within {} s yet; up to {} s are waited",
                    WRITE.as_secs(),
                    WRITE_MOST.as_secs()
                );
                return Err(place.refused(why));
            };
            let done = done.unwrap_or_else(|e| Err(place.refused(e.to_string())));
            // Of what was to be said before, it does not matter what became.
            if writing.annotations == *annotations {
                return done.map(|()| true);
            }
        }
    }

    /// Asks the API whether this node's annotations could be applied, without changing them.
    ///
    /// # Errors
    /// [`RegistryError::Apply`] with what the API said, or [`RegistryError::Unregistered`].
    pub async fn may_publish(&self, node: &NodeName) -> Result<(), RegistryError> {
        let (kind, name, annotations) = {
            let directory = self.shared.directory.lock();
            let (kind, entry) = directory
                .find(node, self.cluster.as_ref())
                .ok_or_else(|| RegistryError::Unregistered(node.clone()))?;
            (kind, entry.name().to_owned(), entry.annotations().clone())
        };
        let parameters = PatchParams::apply(FIELD_MANAGER).force().dry_run();
        self.place(kind, name).apply(&annotations, &parameters).await.map(drop)
    }

    /// Takes this node's annotations away, once it is known where they are.
    ///
    /// # Errors
    /// [`RegistryError::Apply`], or [`RegistryError::Unreachable`]. A node that is not there is no error.
    pub async fn withdraw(&self, node: &NodeName) -> Result<(), RegistryError> {
        let found = async {
            loop {
                let changed = self.shared.changed.notified();
                {
                    let directory = self.shared.directory.lock();
                    let found = directory.find(node, self.cluster.as_ref());
                    if found.is_some() || directory.obstacle().is_none() {
                        return found.map(|(kind, entry)| (kind, entry.name().to_owned()));
                    }
                }
                changed.await;
            }
        };
        match timeout(LISTING, found).await {
            Ok(Some((kind, name))) => self.place(kind, name).write(&Annotations::new()).await,
            Ok(None) => Ok(()),
            Err(_) => {
                let reason = self.shared.directory.lock().obstacle().unwrap_or_default();
                Err(self.unreachable(reason))
            }
        }
    }

    /// Tells what others wrote among this node's annotations lately.
    pub(super) fn foreign(&self, object: &str) -> Option<Problem> {
        self.publishing.foreign.lock().problem(Instant::now(), object)
    }
}

impl Place {
    /// Makes this node's annotations just these.
    async fn write(&self, annotations: &Annotations) -> Result<(), RegistryError> {
        // Whoever has edited our annotations by hand loses them to us.
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        let mut entry = self.apply(annotations, &parameters).await?;
        let foreign: Vec<String> =
            entry.annotations().keys().filter(|key| !annotations.contains_key(*key)).cloned().collect();
        // Those that only others wrote an apply leaves alone.
        if !foreign.is_empty() {
            let may = self.foreign.lock().may_correct(Instant::now());
            self.name_writers(&foreign).await;
            if may {
                let none: BTreeMap<&str, ()> = foreign.iter().map(|key| (key.as_str(), ())).collect();
                let patch = Patch::Merge(json!({"metadata": {"annotations": none}}));
                let parameters =
                    PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
                entry = self.patch(&patch, &parameters).await?;
            }
        }
        // The watch will say the same, which is no news then.
        self.shared.update(|directory| directory.listing(self.kind).apply(entry));
        Ok(())
    }

    async fn apply(
        &self,
        annotations: &Annotations,
        parameters: &PatchParams,
    ) -> Result<Entry, RegistryError> {
        let resource = resource(self.kind);
        let body = Patch::Apply(json!({
            "apiVersion": resource.api_version,
            "kind": resource.kind,
            "metadata": { "name": self.name, "annotations": annotations },
        }));
        self.patch(&body, parameters).await
    }

    async fn patch(
        &self,
        body: &Patch<serde_json::Value>,
        parameters: &PatchParams,
    ) -> Result<Entry, RegistryError> {
        let resource = resource(self.kind);
        let applied = async {
            Ok::<Entry, kube::Error>(match self.kind {
                Kind::Node => {
                    api::<Node>(&self.client, &resource).patch(&self.name, parameters, body).await?.into()
                }
                Kind::MeshNode => {
                    api::<MeshNode>(&self.client, &resource).patch(&self.name, parameters, body).await?.into()
                }
            })
        };
        match timeout(WRITE_MOST, applied).await {
            Ok(Ok(entry)) => Ok(entry),
            Ok(Err(e)) => Err(self.refused(reason(&e))),
            Err(_) => Err(self.refused(format!("no answer within {} s", WRITE_MOST.as_secs()))),
        }
    }

    /// Finds out who wrote these annotations, and tells it.
    async fn name_writers(&self, keys: &[String]) {
        let objects = Api::<kube::api::DynamicObject>::all_with(self.client.clone(), &resource(self.kind));
        let asked = timeout(WRITE_MOST, objects.get_metadata(&self.name)).await;
        let managed = match asked {
            Ok(Ok(object)) => object.metadata.managed_fields.unwrap_or_default(),
            _ => Vec::new(),
        };
        let managed = serde_json::to_value(managed).unwrap_or_default();
        let fresh: Vec<String> = {
            let mut foreign = self.foreign.lock();
            let news = keys.iter().filter_map(|key| {
                let who = writer(&managed, key);
                let known = foreign.writers.insert(key.clone(), who.clone());
                (known.as_ref() != Some(&who)).then(|| format!("{key} by {who}"))
            });
            news.collect()
        };
        if fresh.is_empty() {
            return;
        }
        let object = format!("{} {}", self.kind.as_str(), self.name);
        let note = format!(
            "annotations of {object} that only its agent writes were written by others: {}",
            fresh.join(", ")
        );
        tracing::warn!("{note}");
        let notice = Notice { warning: true, reason: "AnnotationForeign", note };
        // One that is lost is in the log and in status.
        let _ = timeout(WRITE_MOST, events::write(self.client.clone(), self.kind, &self.name, &notice)).await;
    }

    fn refused(&self, reason: String) -> RegistryError {
        RegistryError::Apply {
            object: format!("{} {}", self.kind.as_str(), self.name),
            server: self.server.clone(),
            reason,
        }
    }
}

/// Names the writer of an annotation, by the object's managed fields.
fn writer(managed: &serde_json::Value, key: &str) -> String {
    let entries = managed.as_array().into_iter().flatten();
    let wrote = |entry: &&serde_json::Value| {
        entry["manager"] != FIELD_MANAGER
            && entry["fieldsV1"]["f:metadata"]["f:annotations"].get(format!("f:{key}")).is_some()
    };
    let manager = entries.filter(wrote).filter_map(|entry| entry["manager"].as_str()).next();
    manager.map_or("somebody unknown".to_owned(), |manager| manager.chars().take(64).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_writer_of_an_annotation_is_named() {
        let fields = |key: &str| json!({"f:metadata": {"f:annotations": {(format!("f:{key}")): {}}}});
        let managed = json!([
            {"manager": FIELD_MANAGER, "fieldsV1": fields("sennit.dev/mtu")},
            {"manager": "kubectl-annotate", "fieldsV1": fields("sennit.dev/wireguard")},
            {"manager": "kubelet"},
        ]);
        assert_eq!(writer(&managed, "sennit.dev/wireguard"), "kubectl-annotate");
        assert_eq!(writer(&managed, "sennit.dev/mtu"), "somebody unknown");
        assert_eq!(writer(&serde_json::Value::Null, "x"), "somebody unknown");
    }

    #[test]
    fn a_second_writer_is_not_fought_for_ever() {
        let (mut foreign, now) = (Foreign::default(), Instant::now());
        for _ in 0..CORRECTED_MOST {
            assert!(foreign.may_correct(now));
            foreign.writers.insert("sennit.dev/wireguard".to_owned(), "robot".to_owned());
        }
        assert!(!foreign.may_correct(now));
        let problem = foreign.problem(now, "Node a").unwrap();
        assert!(problem.blocks && problem.text.contains("sennit.dev/wireguard by robot"), "{problem}");
        assert!(foreign.may_correct(now + TOLD));
        assert!(foreign.problem(now + TOLD + TOLD, "Node a").is_none());
    }
}
