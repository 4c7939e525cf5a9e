//! Calico's objects (projectcalico.org/v3, and as crd.projectcalico.org/v1 keeps them).
//!
//! What is not done of them is refused by name. A rule that is not understood fails closed: one that allows or logs matches nothing, one that
//! denies or passes denies everything. So does a policy of which the selector is not understood, as far as it can be told to whom it
//! applies: one of a namespace isolates that; a global one counts for nothing.

mod object;
mod policy;
mod rule;
pub mod selector;

use serde_json::Value;

pub use object::{global_network_set, host_endpoint, network_set, tier};
pub use policy::{global, kubernetes_staged, namespaced, staged_global, staged_namespaced};

/// Where Calico keeps labels and annotations of an object that it stores.
const METADATA: &str = "projectcalico.org/metadata";

/// An object as its author wrote it: of what Calico has put aside in an annotation, labels and annotations come back. `None`: nothing was.
pub(crate) fn whole(manifest: &Value) -> Option<Value> {
    let kept = manifest.pointer("/metadata/annotations")?.get(METADATA)?.as_str()?;
    let kept: Value = serde_json::from_str(kept).ok()?;
    let mut manifest = manifest.clone();
    for field in ["labels", "annotations"] {
        let Some(Value::Object(kept)) = kept.get(field) else { continue };
        let metadata = manifest.get_mut("metadata")?.as_object_mut()?;
        let there = metadata.entry(field).or_insert_with(|| Value::Object(Default::default()));
        if there.is_null() {
            *there = Value::Object(Default::default());
        }
        if let Value::Object(there) = there {
            there.extend(kept.iter().map(|(key, value)| (key.clone(), value.clone())));
        }
    }
    Some(manifest)
}

/// The API group of manifests.
pub const API_VERSION: &str = "projectcalico.org/v3";
/// The API group in which Calico keeps objects where it has no API server of its own.
pub const STORED_VERSION: &str = "crd.projectcalico.org/v1";

/// GlobalNetworkPolicy.
pub const GLOBAL: &str = "GlobalNetworkPolicy";
/// NetworkPolicy, told apart from the one of Kubernetes.
pub const NAMESPACED: &str = "NetworkPolicy.projectcalico.org";
/// StagedGlobalNetworkPolicy.
pub const STAGED_GLOBAL: &str = "StagedGlobalNetworkPolicy";
/// StagedNetworkPolicy.
pub const STAGED_NAMESPACED: &str = "StagedNetworkPolicy";
/// StagedKubernetesNetworkPolicy.
pub const STAGED_KUBERNETES: &str = "StagedKubernetesNetworkPolicy";
/// Tier.
pub const TIER: &str = "Tier";
/// NetworkSet.
pub const NETWORK_SET: &str = "NetworkSet";
/// GlobalNetworkSet.
pub const GLOBAL_NETWORK_SET: &str = "GlobalNetworkSet";
/// HostEndpoint.
pub const HOST_ENDPOINT: &str = "HostEndpoint";

#[cfg(test)]
mod tests;
