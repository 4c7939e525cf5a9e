//! The check for the admission policy. Without it, one node's token can change other nodes.
//!
//! RBAC cannot tell nodes apart. Each agent asks for a change of its own Node that is forbidden to it, as a dry run.

use std::sync::Arc;
use std::time::Duration;

use kube::Api;
use kube::api::{DynamicObject, Patch, PatchParams};
use mesh_keyring::NodeName;
use parking_lot::Mutex;
use serde_json::json;
use tokio::time::{Instant, timeout};

use super::listing::Named as _;
use super::{KubeRegistry, WRITE_MOST, reason, resource};
use crate::problem::Problem;

/// The interval between checks, and the shorter one if the policy is missing or no answer came.
const AGAIN: Duration = Duration::from_secs(3600);
const SOONER: Duration = Duration::from_secs(60);
/// A label that no agent may write.
const FORBIDDEN: &str = "sennit.dev/admission-probe";

/// The API's answer to a forbidden change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It is refused.
    Refused,
    /// It would have been made.
    Allowed,
    /// Nobody knows.
    Unknown,
}

/// The state of the check.
#[derive(Debug, Default)]
pub(super) struct Trust(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    missing: bool,
    next: Option<Instant>,
}

impl KubeRegistry {
    /// Asks again whether the admission policy is there, where it is time to. Beside the caller.
    pub fn watch_trust(&self, node: &NodeName) {
        {
            let mut known = self.trust.0.lock();
            let now = Instant::now();
            if known.next.is_some_and(|next| now < next) || self.shared.directory.lock().obstacle().is_some()
            {
                return;
            }
            known.next = Some(now + SOONER);
        }
        let Some(asked) = self.forbidden(node) else { return };
        let (trust, changed) = (Arc::clone(&self.trust.0), Arc::clone(&self.shared.changed));
        tokio::spawn(async move {
            let answer = asked.await;
            let mut known = trust.lock();
            let before = known.missing;
            match answer {
                Answer::Allowed => known.missing = true,
                Answer::Refused => (known.missing, known.next) = (false, Some(Instant::now() + AGAIN)),
                Answer::Unknown => {}
            }
            if known.missing != before {
                changed.notify_one();
            }
        });
    }

    /// Asks for a forbidden change, as a dry run.
    pub async fn trust(&self, node: &NodeName) -> Answer {
        match self.forbidden(node) {
            Some(asked) => asked.await,
            None => Answer::Unknown,
        }
    }

    fn forbidden(&self, node: &NodeName) -> Option<impl Future<Output = Answer> + Send + 'static> {
        let (kind, name) = {
            let directory = self.shared.directory.lock();
            let (kind, entry) = directory.find(node, self.cluster.as_ref())?;
            (kind, entry.name().to_owned())
        };
        let objects = Api::<DynamicObject>::all_with(self.client.clone(), &resource(kind));
        Some(async move {
            let patch = Patch::Merge(json!({"metadata": {"labels": {(FORBIDDEN): "forbidden"}}}));
            let parameters = PatchParams { dry_run: true, ..PatchParams::default() };
            match timeout(WRITE_MOST, objects.patch_metadata(&name, &parameters, &patch)).await {
                Ok(Ok(_)) => Answer::Allowed,
                Ok(Err(kube::Error::Api(status))) if [403, 422].contains(&status.code) => Answer::Refused,
                Ok(Err(e)) => {
                    tracing::debug!("whether there is an admission policy: {}", reason(&e));
                    Answer::Unknown
                }
                Err(_) => Answer::Unknown,
            }
        })
    }

    /// Tells whether the admission policy is missing.
    pub(super) fn mistrust(&self) -> Option<Problem> {
        self.trust.0.lock().missing.then(missing)
    }
}

/// The problem of a cluster without the policy.
pub fn missing() -> Problem {
    Problem::new(
        "admission-policy-missing",
        "ValidatingAdmissionPolicy sennit-agent",
        "the API would let this agent's credentials change a label of its Node: with the token of one node, or the \
         credentials in use here, any node can be changed",
        "apply deploy/kubernetes/base again (policy and binding), and let agents use the account sennit-agent",
    )
}
