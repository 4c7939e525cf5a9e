//! Kinds of policies of other engines: what they say is not enforced, whoever reads the directory.

use mesh_policy::calico::{API_VERSION, STORED_VERSION};

/// Calico's kinds that have nothing to do with policy.
const NO_POLICY: [&str; 17] = [
    "BGPConfiguration",
    "BGPFilter",
    "BGPPeer",
    "BlockAffinity",
    "CalicoNodeStatus",
    "ClusterInformation",
    "FelixConfiguration",
    "IPAMBlock",
    "IPAMConfig",
    "IPAMConfiguration",
    "IPAMHandle",
    "IPAddress",
    "IPPool",
    "IPReservation",
    "KubeControllersConfiguration",
    "Node",
    "WorkloadEndpoint",
];

/// Groups of other engines, the kinds of theirs that say what is allowed, and who they are. No kinds: all of the group.
const OTHERS: [(&str, &[&str], &str); 17] = [
    ("cilium.io", &["CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy", "CiliumCIDRGroup"], "Cilium"),
    ("crd.antrea.io", &["ClusterNetworkPolicy", "NetworkPolicy", "Tier", "ClusterGroup", "Group"], "Antrea"),
    ("security.antrea.tanzu.vmware.com", &[], "Antrea"),
    ("crd.nsx.vmware.com", &["SecurityPolicy", "NetworkInfo"], "NSX"),
    ("security.istio.io", &["AuthorizationPolicy", "PeerAuthentication"], "Istio"),
    ("policy.linkerd.io", &[], "Linkerd"),
    ("kuma.io", &["MeshTrafficPermission", "TrafficPermission"], "Kuma"),
    ("consul.hashicorp.com", &["ServiceIntentions"], "Consul"),
    ("k8s.ovn.org", &["EgressFirewall", "AdminPolicyBasedExternalRoute"], "OVN-Kubernetes"),
    ("network.openshift.io", &["EgressNetworkPolicy"], "OpenShift SDN"),
    ("kubeovn.io", &["SecurityGroup"], "Kube-OVN"),
    ("networking.gke.io", &["FQDNNetworkPolicy", "NetworkLogging"], "GKE"),
    (
        "networking.k8s.aws",
        &["PolicyEndpoint", "ApplicationNetworkPolicy", "ClusterNetworkPolicy"],
        "AWS VPC CNI",
    ),
    ("vpcresources.k8s.aws", &["SecurityGroupPolicy"], "AWS VPC CNI"),
    ("policy.kubeslice.io", &[], "KubeSlice"),
    ("networking.kubeslice.io", &["SliceConfig"], "KubeSlice"),
    ("operator.tigera.io", &["PolicyRecommendation"], "Calico Enterprise"),
];

/// Kinds before ClusterNetworkPolicy.
const ADMINS: [&str; 2] = ["AdminNetworkPolicy", "BaselineAdminNetworkPolicy"];

/// The result for a kind that is not read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unread {
    /// It is not about policy.
    NoPolicy,
    /// It is, and does not count, by what this field says.
    Refused(&'static str, String),
}

/// Returns the result for an object of a kind that is not read. Returns `None` if the API version
/// belongs to no known policy engine.
pub(super) fn unread(version: &str, kind: &str, known: Option<String>) -> Option<Unread> {
    let refused = |field, reason: String| Some(Unread::Refused(field, reason));
    let group = version.split_once('/').map_or("", |(group, _)| group);
    let engine =
        OTHERS.iter().find(|(of, kinds, _)| group == *of && (kinds.is_empty() || kinds.contains(&kind)));
    if let Some((_, _, engine)) = engine {
        let reason = format!(
            "{kind:?} is {engine}'s: it is not read, and nothing of it is enforced; say it by NetworkPolicy, ClusterNetworkPolicy or Calico's kinds"
        );
        return refused("kind", reason);
    }
    if let Some(known) = known {
        return refused("apiVersion", format!("{version:?}; only {known} is enforced"));
    }
    if ADMINS.contains(&kind) {
        return refused("kind", "say it by a ClusterNetworkPolicy, which has taken its place".to_owned());
    }
    if ![API_VERSION, STORED_VERSION].contains(&version) {
        return None;
    }
    match kind {
        "Profile" => {
            let reason = "profiles are not read: those of namespaces (kns.) and service accounts (ksa.) follow from these; say what others allow by policies, and their labels by those of pods";
            refused("kind", reason.to_owned())
        }
        kind if NO_POLICY.contains(&kind) => Some(Unread::NoPolicy),
        kind => refused("kind", format!("{kind:?}: no such kind is known")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_engines_kinds_are_named() {
        let told = |version: &str, kind: &str, known: Option<String>| match unread(version, kind, known) {
            Some(Unread::Refused(field, reason)) => format!("{field}: {reason}"),
            other => panic!("{other:?}"),
        };
        for (version, kind, engine) in [
            ("cilium.io/v2", "CiliumNetworkPolicy", "Cilium's"),
            ("cilium.io/v2alpha1", "CiliumCIDRGroup", "Cilium's"),
            ("security.istio.io/v1", "AuthorizationPolicy", "Istio's"),
            ("projectcalico.org/v3", "Profile", "profiles are not read"),
        ] {
            assert!(told(version, kind, None).contains(engine));
        }
        // A name that others have as well.
        let known = Some("policy.networking.k8s.io/v1alpha2".to_owned());
        assert!(told("crd.antrea.io/v1beta1", "ClusterNetworkPolicy", known.clone()).contains("Antrea's"));
        assert!(told("policy.networking.k8s.io/v9", "ClusterNetworkPolicy", known).contains("only policy"));
        assert_eq!(unread("cilium.io/v2", "CiliumNode", None), None);
        assert_eq!(unread("projectcalico.org/v3", "IPPool", None), Some(Unread::NoPolicy));
    }
}
