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
use tokio::sync::watch;
use tokio::time::Instant;

use crate::registry::feed::Verdicts;
use crate::registry::kube::{cut, reason};

/// Who has written a condition, as the API server keeps it.
const MANAGER: &str = "sennit-agent";
/// The longest wait before somebody writes.
const SPREAD: Duration = Duration::from_secs(5);
/// The first wait after a failure, or before the same generation is written again; it doubles each time.
const RETRY: Duration = Duration::from_secs(60);
/// The longest.
const RETRY_MOST: Duration = Duration::from_secs(3600);
/// For an answer.
const ANSWER: Duration = Duration::from_secs(30);

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
    /// Makes an object's condition: accepted, audited, or refused. A refusal has the reason, and
    /// the effect until it is corrected.
    pub(super) fn of(kind: &str, generation: i64, refusal: Option<&str>, staged: bool) -> Self {
        let (status, reason, message) = match (refusal, staged) {
            (None, false) => ("True", "Accepted", "all of it is understood".to_owned()),
            (None, true) => {
                ("True", "Audited", "what it would deny is told, and nothing is denied".to_owned())
            }
            (Some(refusal), _) => ("False", "Refused", cut(refusal)),
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

    /// The same of an object that is understood, and that is more than the operator's policies may be.
    fn over_budget(&self, reason: &str) -> Self {
        let (status, kind) = ("False".to_owned(), "OverBudget".to_owned());
        let message = cut(&format!("{reason}; whom it selects is denied"));
        Self { status, reason: kind, message, ..self.clone() }
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

    /// How verdicts name it.
    fn object(&self) -> String {
        format!("{} {}", self.resource.kind, self.name)
    }

    /// With what was found when it was enforced. What is refused stays so.
    fn judged(&self, verdicts: &Verdicts) -> Self {
        let reason = verdicts.get(&self.object()).filter(|_| self.wanted.status == "True");
        let wanted = reason.map_or_else(|| self.wanted.clone(), |reason| self.wanted.over_budget(reason));
        Self { wanted, ..self.clone() }
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
    pub(super) fn new(
        client: Client,
        verdicts: watch::Receiver<Verdicts>,
    ) -> (Self, impl Future<Output = ()>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), write(client, receiver, verdicts))
    }

    pub(super) fn saw(&self, seen: Seen) {
        // Without a writer the registry is gone.
        let _ = self.0.send(seen);
    }
}

/// An object that is to be written.
struct Due {
    at: Instant,
    seen: Seen,
}

async fn write(
    client: Client,
    mut receiver: UnboundedReceiver<Seen>,
    mut verdicts: watch::Receiver<Verdicts>,
) {
    // As each was seen last, for when another verdict falls.
    let mut known: BTreeMap<(String, String), Seen> = BTreeMap::new();
    // Those to look at again.
    let mut again: Vec<Seen> = Vec::new();
    let mut due: BTreeMap<(String, String), Due> = BTreeMap::new();
    // The generation that was last tried to be written, and how often: agents of two versions must not answer each other for ever.
    let mut tried: BTreeMap<(String, String), (i64, u32)> = BTreeMap::new();
    loop {
        let next = due.iter().min_by_key(|(_, due)| due.at).map(|(key, due)| (key.clone(), due.at));
        let sleep = async {
            match &next {
                Some((_, at)) => tokio::time::sleep_until(*at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // What others have written meanwhile is known before anything is.
            biased;
            seen = seen_next(&mut receiver, &mut again) => {
                let Some(seen) = seen else { return };
                let key = (seen.resource.plural.clone(), seen.name.clone());
                known.insert(key.clone(), seen.clone());
                let seen = seen.judged(&verdicts.borrow());
                if seen.current.as_ref().is_some_and(|current| current.says(&seen.wanted)) {
                    due.remove(&key);
                    continue;
                }
                let generation = seen.wanted.observed_generation;
                let times = tried.get(&key).filter(|(last, _)| *last == generation).map_or(0, |(_, times)| *times);
                let at = Instant::now() + pause(times) + chance(SPREAD);
                let at = due.get(&key).map_or(at, |due| due.at.min(at));
                due.insert(key, Due { at, seen });
            }
            Ok(()) = verdicts.changed() => again.extend(known.values().cloned()),
            () = sleep => {
                let Some((key, Due { seen, .. })) = next.and_then(|(key, _)| due.remove_entry(&key)) else { continue };
                let generation = seen.wanted.observed_generation;
                let times = tried.get(&key).filter(|(last, _)| *last == generation).map_or(0, |(_, times)| *times) + 1;
                tried.insert(key.clone(), (generation, times));
                match tokio::time::timeout(ANSWER, patch(&client, &seen)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(kube::Error::Api(status))) if status.code == 404 => {
                        known.remove(&key);
                        tried.remove(&key);
                    }
                    failed => {
                        let why = match &failed {
                            Ok(Err(error)) => reason(error),
                            _ => "no answer".to_owned(),
                        };
                        if times == 1 {
                            tracing::warn!(object = %seen.name, "{why}: what became of the policy is not in its status");
                        }
                        due.insert(key, Due { at: Instant::now() + pause(times) + chance(SPREAD), seen });
                    }
                }
            }
        }
    }
}

/// What was seen anew; what is to be looked at again first.
async fn seen_next(receiver: &mut UnboundedReceiver<Seen>, again: &mut Vec<Seen>) -> Option<Seen> {
    match again.pop() {
        Some(seen) => Some(seen),
        None => receiver.recv().await,
    }
}

/// How long to wait before the same is written again that was tried so often.
fn pause(times: u32) -> Duration {
    match times {
        0 => Duration::ZERO,
        times => (RETRY * 2_u32.saturating_pow(times - 1).min(64)).min(RETRY_MOST),
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
    fn a_policy_over_the_operators_budget_is_not_accepted() {
        let seen = |refusal: Option<&str>| Seen {
            resource: Seen::resource("sennit.dev/v1alpha1", "MeshPolicy", "meshpolicies"),
            name: "p".to_owned(),
            current: None,
            wanted: Condition::of("Accepted", 7, refusal, false),
        };
        let verdicts: Verdicts = [("MeshPolicy p".to_owned(), "it is too much".to_owned())].into();
        let wanted = seen(None).judged(&verdicts).wanted;
        assert_eq!((wanted.status.as_str(), wanted.reason.as_str()), ("False", "OverBudget"));
        assert_eq!(wanted.message, "it is too much; whom it selects is denied");
        assert_eq!(seen(None).judged(&Verdicts::new()).wanted.status, "True");
        let refused = seen(Some("spec: wrong")).judged(&verdicts).wanted;
        assert_eq!((refused.reason.as_str(), refused.message.as_str()), ("Refused", "spec: wrong"));
    }

    #[test]
    fn a_condition_keeps_its_time_as_long_as_its_status_is_the_same() {
        let seen = |current: Option<Condition>, refusal: Option<&str>| Seen {
            resource: Seen::resource("sennit.dev/v1alpha1", "MeshPolicy", "meshpolicies"),
            name: "p".to_owned(),
            current,
            wanted: Condition::of("Accepted", 7, refusal, false),
        };
        let now: Timestamp = "2026-01-02T03:04:05.678Z".parse().unwrap();
        let patch = seen(None, None).patch(now);
        assert_eq!(
            (&patch["apiVersion"], &patch["kind"]),
            (&json!("sennit.dev/v1alpha1"), &json!("MeshPolicy"))
        );
        let condition = &patch["status"]["conditions"][0];
        assert_eq!((&condition["status"], &condition["observedGeneration"]), (&json!("True"), &json!(7)));
        assert_eq!(condition["lastTransitionTime"], "2026-01-02T03:04:05Z");
        let mut current = Condition::of("Accepted", 6, None, false);
        current.last_transition_time = "2025-01-01T00:00:00Z".to_owned();
        let patch = seen(Some(current.clone()), None).patch(now);
        assert_eq!(patch["status"]["conditions"][0]["lastTransitionTime"], "2025-01-01T00:00:00Z");
        let patch = seen(Some(current.clone()), Some("spec: wrong")).patch(now);
        let condition = &patch["status"]["conditions"][0];
        assert_eq!((&condition["status"], &condition["message"]), (&json!("False"), &json!("spec: wrong")));
        assert_eq!(condition["lastTransitionTime"], "2026-01-02T03:04:05Z");
        assert!(!current.says(&Condition::of("Accepted", 7, None, false)), "of another generation");
    }
}
