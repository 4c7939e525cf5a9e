//! The Mesh's condition in its status, which `kubectl get mesh` shows.
//!
//! All agents judge the spec alike. A node may also refuse it for reasons that only that node
//! knows. Then one of the refusing nodes writes the condition. The others leave it until that node
//! withdraws it or is gone. A writer waits for a random time and looks again, so that few of a
//! thousand agents write.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use kube::Api;
use kube::api::{DynamicObject, Patch, PatchParams};
use mesh_keyring::{MeshName, NodeName};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::{Instant, timeout};

use super::directory::Directory;
use super::{FIELD_MANAGER, KubeRegistry, WRITE_MOST, cut, meshes, reason};

/// The condition's type.
const ACCEPTED: &str = "Accepted";
/// The reason for a spec that no agent understands.
const REFUSED: &str = "Refused";
/// The reason for a spec that one node refuses.
const BY_NODE: &str = "RefusedByNode";
/// The longest random wait before writing: if this node accepts the Mesh, and if it refuses it.
const SPREAD: Duration = Duration::from_secs(5);
const SPREAD_REFUSED: Duration = Duration::from_secs(1);
/// The wait before one agent writes about one generation again, doubled each time, and the longest.
const AGAIN: Duration = Duration::from_secs(10);
const AGAIN_MOST: Duration = Duration::from_secs(3600);

/// The condition of a Mesh (`metav1.Condition`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
    reason: String,
    message: String,
    observed_generation: i64,
    last_transition_time: String,
}

impl Default for Condition {
    fn default() -> Self {
        Self::of("", "", String::new(), 0)
    }
}

impl Condition {
    fn of(status: &str, reason: &str, message: String, observed_generation: i64) -> Self {
        Self {
            kind: ACCEPTED.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message: cut(&message),
            observed_generation,
            last_transition_time: String::new(),
        }
    }

    fn says(&self, other: &Self) -> bool {
        let timeless = |one: &Self| Self { last_transition_time: String::new(), ..one.clone() };
        timeless(self) == timeless(other)
    }

    /// The node in whose name a Mesh is refused.
    fn refuser(&self) -> Option<&str> {
        let named = self.message.strip_prefix("node ")?.split_once(':')?.0;
        Some(named).filter(|_| self.reason == BY_NODE)
    }

    /// Finds ours in a status.
    pub(super) fn find(status: Option<&serde_json::Value>) -> Option<Self> {
        let all = status?.get("conditions")?.as_array()?.iter();
        let mut all = all.filter_map(|one| serde_json::from_value::<Self>(one.clone()).ok());
        all.find(|one| one.kind == ACCEPTED)
    }
}

/// The Mesh's status, and the generation it belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Seen {
    pub(super) generation: i64,
    pub(super) current: Option<Condition>,
    /// The error in the spec, if it cannot be understood.
    pub(super) unclear: Option<String>,
}

/// Returns the condition that this node would write, or `None` if the current one can stay.
/// `refusal` is this node's reason to refuse the Mesh.
fn wanted(seen: &Seen, node: &str, refusal: Option<&str>, knows: impl Fn(&str) -> bool) -> Option<Condition> {
    let generation = seen.generation;
    let current = seen.current.as_ref().filter(|current| current.observed_generation == generation);
    // Somebody else refuses it, and is there to take that back.
    let other = current.and_then(Condition::refuser).is_some_and(|other| other != node && knows(other));
    let wanted = match (&seen.unclear, refusal) {
        (Some(why), _) => Condition::of("False", REFUSED, why.clone(), generation),
        (None, _) if other => return None,
        (None, Some(why)) => Condition::of("False", BY_NODE, format!("node {node}: {why}"), generation),
        (None, None) => Condition::of("True", ACCEPTED, "all of it is understood".to_owned(), generation),
    };
    (!current.is_some_and(|current| current.says(&wanted))).then_some(wanted)
}

/// The state of this node's writes.
#[derive(Debug, Default)]
pub(super) struct Verdict(Arc<Mutex<Writer>>);

#[derive(Debug, Default)]
struct Writer {
    busy: bool,
    generation: i64,
    times: u32,
    next: Option<Instant>,
    refusal: Option<String>,
}

impl KubeRegistry {
    /// Says in the Mesh's status what became of it. Beside the caller.
    pub fn tell_mesh(&self, node: &NodeName, refusal: Option<&str>) {
        let Some(mesh) = self.mesh.clone() else { return };
        let node = node.to_string();
        let seen = |directory: &Directory| directory.seen(&mesh);
        let Some(first) = seen(&self.shared.directory.lock()) else { return };
        let wait = {
            let mut writer = self.verdict.0.lock();
            writer.refusal = refusal.map(str::to_owned);
            if writer.generation != first.generation {
                (writer.generation, writer.times, writer.next) = (first.generation, 0, None);
            }
            let now = Instant::now();
            let wants =
                wanted(&first, &node, refusal, |other| self.shared.directory.lock().knows(other)).is_some();
            if writer.busy || !wants || writer.next.is_some_and(|next| now < next) {
                return;
            }
            writer.busy = true;
            chance(if refusal.is_some() { SPREAD_REFUSED } else { SPREAD })
        };
        let (shared, writer, client) =
            (Arc::clone(&self.shared), Arc::clone(&self.verdict.0), self.client.clone());
        tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            let refusal = writer.lock().refusal.clone();
            let now = {
                let directory = shared.directory.lock();
                directory.seen(&mesh).and_then(|seen| {
                    let wanted = wanted(&seen, &node, refusal.as_deref(), |other| directory.knows(other))?;
                    Some((seen, wanted))
                })
            };
            if let Some((seen, condition)) = now {
                let told = timeout(WRITE_MOST, write(client, &mesh, seen.current.as_ref(), condition)).await;
                let mut writer = writer.lock();
                writer.times += 1;
                let again = AGAIN.saturating_mul(2_u32.saturating_pow(writer.times.min(16))).min(AGAIN_MOST);
                writer.next = Some(Instant::now() + again);
                match told {
                    Ok(Ok(())) => {}
                    Ok(Err(e)) if writer.times == 1 => {
                        tracing::warn!("status of Mesh {mesh}: {}", reason(&e));
                    }
                    _ => {}
                }
            }
            writer.lock().busy = false;
        });
    }
}

async fn write(
    client: kube::Client,
    mesh: &MeshName,
    current: Option<&Condition>,
    wanted: Condition,
) -> Result<(), kube::Error> {
    let resource = meshes();
    let since = current.filter(|current| current.status == wanted.status);
    let since = since.map(|current| current.last_transition_time.clone()).filter(|time| !time.is_empty());
    // The API has whole seconds.
    let now = || Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let condition = Condition { last_transition_time: since.unwrap_or_else(now), ..wanted };
    let patch = Patch::Apply(json!({
        "apiVersion": resource.api_version, "kind": resource.kind,
        "metadata": {"name": mesh}, "status": {"conditions": [condition]},
    }));
    let api = Api::<DynamicObject>::all_with(client, &resource);
    api.patch_status(mesh.as_str(), &PatchParams::apply(FIELD_MANAGER).force(), &patch).await.map(drop)
}

fn chance(most: Duration) -> Duration {
    // Without chance it is the longest.
    most.mul_f64(f64::from(getrandom::u32().unwrap_or(u32::MAX)) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets agents speak in turn, each as it sees it, until nobody wants to; returns what stands then and how often it was written.
    fn settled(mut seen: Seen, refusals: &[(&str, Option<&str>)]) -> (Condition, usize) {
        let knows = |name: &str| refusals.iter().any(|(node, _)| *node == name);
        for writes in 0..20 {
            let next = refusals.iter().find_map(|(node, why)| wanted(&seen, node, *why, knows));
            match next {
                Some(condition) => seen.current = Some(condition),
                None => return (seen.current.unwrap(), writes),
            }
        }
        panic!("they never agree: {seen:?}");
    }

    #[test]
    fn agents_agree_after_few_writes() {
        let seen = Seen { generation: 3, ..Seen::default() };
        let (condition, writes) = settled(seen.clone(), &[("a", None), ("b", None), ("c", None)]);
        assert_eq!((condition.status.as_str(), condition.observed_generation, writes), ("True", 3, 1));
        // One that refuses it has the last word, and says so once for all that do.
        let two = [("a", None), ("b", Some("no site")), ("c", Some("no site"))];
        let (condition, writes) = settled(seen.clone(), &two);
        assert_eq!((condition.status.as_str(), condition.message.as_str()), ("False", "node b: no site"));
        assert_eq!(writes, 2);
        // It takes that back.
        let seen = Seen { current: Some(condition), ..seen };
        let (condition, _) = settled(seen.clone(), &[("a", None), ("b", None), ("c", Some("no site"))]);
        assert_eq!(condition.message, "node c: no site");
        // Or it is gone.
        let (condition, writes) = settled(seen.clone(), &[("a", None)]);
        assert_eq!((condition.reason.as_str(), writes), ("Accepted", 1));
        // What nobody understands nobody accepts.
        let seen = Seen { unclear: Some("spec: wrong".to_owned()), ..seen };
        let (condition, writes) = settled(seen, &two);
        assert_eq!(
            (condition.reason.as_str(), condition.message.as_str(), writes),
            ("Refused", "spec: wrong", 1)
        );
    }

    #[test]
    fn a_verdict_is_of_one_generation() {
        let old = Condition::of("False", BY_NODE, "node b: no site".to_owned(), 3);
        let seen = Seen { generation: 4, current: Some(old), unclear: None };
        let (condition, _) = settled(seen, &[("a", None), ("b", None)]);
        assert_eq!((condition.status.as_str(), condition.observed_generation), ("True", 4));
    }
}
