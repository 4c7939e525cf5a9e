//! Writes back what became of policies of the whole cluster: a condition in their status.
//!
//! Any agent may: whoever sees a condition that is not as it should be waits for a moment of chance, and writes it where nobody else has.
//! Of two that do so at once both write the same.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams};
use kube::{Api, Client};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::time::Instant;

use crate::registry::kube::{cut, reason};

/// Who has written a condition, as the API server keeps it.
const MANAGER: &str = "sennit-agent";
/// The longest wait before somebody writes.
const SPREAD: Duration = Duration::from_secs(5);
/// After a failure it is tried again this late.
const RETRY: Duration = Duration::from_secs(60);

/// A condition (`metav1.Condition`), as far as it is compared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Condition {
    #[serde(rename = "type")]
    pub(super) kind: String,
    #[serde(default)]
    pub(super) status: String,
    #[serde(default)]
    pub(super) reason: String,
    #[serde(default)]
    pub(super) message: String,
    #[serde(default)]
    pub(super) observed_generation: i64,
    #[serde(default)]
    pub(super) last_transition_time: String,
}

impl Condition {
    /// What became of an object: all of it counts, or why not.
    pub(super) fn of(kind: &str, generation: i64, refusals: &[String]) -> Self {
        let (status, reason) = if refusals.is_empty() { ("True", "Accepted") } else { ("False", "Refused") };
        let message = match refusals {
            [] => "all of it is enforced".to_owned(),
            all => cut(&all.join("; ")),
        };
        Self {
            kind: kind.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message,
            observed_generation: generation,
            last_transition_time: String::new(),
        }
    }

    /// Whether it says the same, whenever that began.
    fn says(&self, other: &Self) -> bool {
        let timeless = |condition: &Self| Self { last_transition_time: String::new(), ..condition.clone() };
        timeless(self) == timeless(other)
    }
}

/// An object as it was seen.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    /// Group, version and kind, and its name in addresses.
    pub(super) resource: ApiResource,
    pub(super) name: String,
    /// What its status says.
    pub(super) current: Option<Condition>,
    /// What it should say.
    pub(super) wanted: Condition,
}

impl Seen {
    pub(super) fn resource(version: &str, kind: &str, plural: &str) -> ApiResource {
        let (group, version) = version.rsplit_once('/').unwrap_or(("", version));
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural)
    }

    /// What is written.
    fn patch(&self, now: Timestamp) -> Value {
        let since = self.current.as_ref().filter(|current| current.status == self.wanted.status);
        let since = since.map(|current| current.last_transition_time.clone()).filter(|time| !time.is_empty());
        // The API has whole seconds.
        let now = || now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let condition = Condition { last_transition_time: since.unwrap_or_else(now), ..self.wanted.clone() };
        json!({
            "apiVersion": self.resource.api_version, "kind": self.resource.kind,
            "metadata": {"name": self.name}, "status": {"conditions": [condition]},
        })
    }
}

/// Tells what was seen to the one who writes.
#[derive(Debug, Clone)]
pub(super) struct Reporter(UnboundedSender<Seen>);

impl Reporter {
    /// With the task that writes.
    pub(super) fn new(client: Client) -> (Self, impl Future<Output = ()>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), write(client, receiver))
    }

    pub(super) fn saw(&self, seen: Seen) {
        // Without a writer the registry is gone.
        let _ = self.0.send(seen);
    }
}

async fn write(client: Client, mut receiver: UnboundedReceiver<Seen>) {
    let mut due: BTreeMap<(String, String), (Instant, Seen)> = BTreeMap::new();
    loop {
        let next = due.values().map(|(at, _)| *at).min();
        let sleep = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            seen = receiver.recv() => {
                let Some(seen) = seen else { return };
                let key = (seen.resource.plural.clone(), seen.name.clone());
                if seen.current.as_ref().is_some_and(|current| current.says(&seen.wanted)) {
                    due.remove(&key);
                } else {
                    let at = due.get(&key).map_or_else(|| Instant::now() + chance(SPREAD), |(at, _)| *at);
                    due.insert(key, (at, seen));
                }
            }
            () = sleep => {
                let now = Instant::now();
                let ready: Vec<_> = due.extract_if(.., |_, (at, _)| *at <= now).collect();
                for (key, (_, seen)) in ready {
                    if let Err(error) = patch(&client, &seen).await {
                        let gone = matches!(&error, kube::Error::Api(status) if status.code == 404);
                        tracing::debug!(object = %seen.name, error = reason(&error), "a condition was not written");
                        if !gone {
                            due.insert(key, (now + RETRY, seen));
                        }
                    }
                }
            }
        }
    }
}

async fn patch(client: &Client, seen: &Seen) -> Result<(), kube::Error> {
    let api = Api::<DynamicObject>::all_with(client.clone(), &seen.resource);
    let patch = Patch::Apply(seen.patch(Timestamp::now()));
    api.patch_status(&seen.name, &PatchParams::apply(MANAGER).force(), &patch).await.map(drop)
}

fn chance(most: Duration) -> Duration {
    // Without chance it is the longest.
    most.mul_f64(f64::from(getrandom::u32().unwrap_or(u32::MAX)) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_keeps_its_time_as_long_as_its_status_is_the_same() {
        let seen = |current: Option<Condition>, refusals: &[String]| Seen {
            resource: Seen::resource("sennit.dev/v1alpha1", "MeshPolicy", "meshpolicies"),
            name: "p".to_owned(),
            current,
            wanted: Condition::of("Accepted", 7, refusals),
        };
        let now: Timestamp = "2026-01-02T03:04:05.678Z".parse().unwrap();
        let patch = seen(None, &[]).patch(now);
        assert_eq!(
            (&patch["apiVersion"], &patch["kind"]),
            (&json!("sennit.dev/v1alpha1"), &json!("MeshPolicy"))
        );
        let condition = &patch["status"]["conditions"][0];
        assert_eq!((&condition["status"], &condition["observedGeneration"]), (&json!("True"), &json!(7)));
        assert_eq!(condition["lastTransitionTime"], "2026-01-02T03:04:05Z");
        let mut current = Condition::of("Accepted", 6, &[]);
        current.last_transition_time = "2025-01-01T00:00:00Z".to_owned();
        let patch = seen(Some(current.clone()), &[]).patch(now);
        assert_eq!(patch["status"]["conditions"][0]["lastTransitionTime"], "2025-01-01T00:00:00Z");
        let patch = seen(Some(current.clone()), &["spec: wrong".to_owned()]).patch(now);
        let condition = &patch["status"]["conditions"][0];
        assert_eq!((&condition["status"], &condition["message"]), (&json!("False"), &json!("spec: wrong")));
        assert_eq!(condition["lastTransitionTime"], "2026-01-02T03:04:05Z");
        assert!(!current.says(&Condition::of("Accepted", 7, &[])), "of another generation");
    }
}
