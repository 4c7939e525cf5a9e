//! What a real API server says of pods, namespaces and policies comes out of an agent's feed, with an agent's rights.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use kube_tests::cluster::{Bound, Cluster};
use kube_tests::{PATIENCE, programs};
use mesh_agent::registry::feed::Feed;
use mesh_agent::registry::kube::{KubeRegistry, api_config};
use mesh_policy::State;
use mesh_policy::object::Pod;
use netlab::{HostSpec, Lab, LabSpec, SiteSpec};
use serde_json::{Value, json};

fn pod(app: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "web", "namespace": "shop", "labels": {"app": app}},
        "spec": {
            "nodeName": "node-1", "automountServiceAccountToken": false,
            "containers": [{"name": "c", "image": "none", "ports": [{"name": "http", "containerPort": 8080}]}],
        },
    })
}

async fn until(feed: &Feed, state: &mut State, what: &str, wanted: impl Fn(&State) -> bool) {
    let reached = async {
        loop {
            for event in feed.take() {
                state.take(event);
            }
            if wanted(state) {
                return;
            }
            // What is asked for need not come with an event of its own.
            drop(tokio::time::timeout(Duration::from_millis(200), feed.changed()).await);
        }
    };
    tokio::time::timeout(PATIENCE, reached)
        .await
        .unwrap_or_else(|_| panic!("{what}: {:?}", feed.staleness()));
}

#[test]
fn pods_namespaces_and_policies_come_change_and_go() {
    if !programs::can_run("pods_namespaces_and_policies_come_change_and_go") {
        return;
    }
    let lab = Lab::build(&LabSpec::new().site(SiteSpec::new("cluster").host(HostSpec::new("cp")))).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let host = lab.host("cp").unwrap();
    let cluster = Cluster::start(host, dir.path()).unwrap();
    cluster.deploy().unwrap();
    cluster.apply(&json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"}})).unwrap();
    cluster.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}})).unwrap();
    let kubeconfig = cluster.kubeconfig("agent", &cluster.token(Bound::Node("node-1")).unwrap()).unwrap();
    host.namespace()
        .run(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let config = api_config(Some(&kubeconfig)).await.unwrap();
                let east = Some("east".parse().unwrap());
                let mut registry = KubeRegistry::new(config, east, &"m".parse().unwrap()).unwrap();
                registry.watch_policy();
                let feed = registry.feed().clone();
                let mut state = State::default();
                let web = |state: &State| -> Option<Pod> {
                    let mut pods = state.world.pods();
                    pods.find(|pod| pod.key.to_string() == "shop/web").map(|pod| Pod::clone(pod))
                };
                until(&feed, &mut state, "all is listed", |_| feed.complete()).await;

                cluster.apply(&pod("web")).unwrap();
                until(&feed, &mut state, "the pod is there", |state| web(state).is_some()).await;
                let there = web(&state).unwrap();
                assert_eq!(there.node.as_deref(), Some("node-1.east"));
                assert_eq!((there.ports.len(), there.uid.is_empty()), (1, false));
                let status =
                    r#"{"status":{"phase":"Running","podIP":"10.1.0.7","podIPs":[{"ip":"10.1.0.7"}]}}"#;
                let patch = ["patch", "pod", "web", "-n", "shop", "--subresource=status", "-p", status];
                cluster.kubectl(&patch).unwrap();
                until(&feed, &mut state, "it has an address", |state| {
                    web(state).is_some_and(|pod| pod.addresses.len() == 1)
                })
                .await;
                cluster.apply(&pod("other")).unwrap();
                until(&feed, &mut state, "its label changes", |state| {
                    web(state).is_some_and(|pod| pod.labels["app"] == "other")
                })
                .await;

                cluster
                    .apply(&json!({
                        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                        "metadata": {"name": "p", "namespace": "shop"}, "spec": {"podSelector": {}},
                    }))
                    .unwrap();
                until(&feed, &mut state, "the policy is there", |state| state.policies.iter().count() == 1)
                    .await;
                assert!(state.faults.is_empty(), "{:?}", state.faults);
                cluster.kubectl(&["delete", "networkpolicy", "p", "-n", "shop"]).unwrap();
                until(&feed, &mut state, "it is gone", |state| state.policies.iter().count() == 0).await;

                assert!(feed.complete() && feed.staleness().is_none(), "without the kind there are none");
                cluster.serve_cluster_policies().unwrap();
                cluster
                    .apply(&json!({
                        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
                        "metadata": {"name": "c"},
                        "spec": {
                            "tier": "Admin", "priority": 5, "subject": {"namespaces": {}},
                            "ingress": [{"action": "Deny", "from": [{"namespaces": {}}]}],
                        },
                    }))
                    .unwrap();
                until(&feed, &mut state, "the policy of the cluster is there", |state| {
                    state.policies.iter().any(|policy| policy.id.to_string() == "ClusterNetworkPolicy c")
                })
                .await;
                assert!(state.faults.is_empty(), "{:?}", state.faults);
                cluster.kubectl(&["delete", "clusternetworkpolicy", "c"]).unwrap();
                until(&feed, &mut state, "it is gone, too", |state| state.policies.iter().count() == 0).await;

                let delete = ["delete", "pod", "web", "-n", "shop", "--grace-period=0", "--force"];
                cluster.kubectl(&delete).unwrap();
                until(&feed, &mut state, "the pod is gone", |state| web(state).is_none()).await;
                cluster.kubectl(&["create", "namespace", "later"]).unwrap();
                until(&feed, &mut state, "the namespace is there", |state| {
                    state.world.namespaces().any(|name| name == "later")
                })
                .await;
                assert_eq!((feed.problems(), feed.staleness()), (Vec::new(), None));
            });
        })
        .unwrap();
}

#[test]
fn calicos_objects_and_mesh_policies_count_and_are_told_what_became_of_them() {
    if !programs::can_run("calicos_objects_and_mesh_policies_count_and_are_told_what_became_of_them") {
        return;
    }
    let lab = Lab::build(&LabSpec::new().site(SiteSpec::new("cluster").host(HostSpec::new("cp")))).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let host = lab.host("cp").unwrap();
    let cluster = Cluster::start(host, dir.path()).unwrap();
    cluster.deploy().unwrap();
    cluster.serve_calico().unwrap();
    cluster.serve_cluster_policies().unwrap();
    cluster.apply(&json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"}})).unwrap();
    let kubeconfig = cluster.kubeconfig("agent", &cluster.token(Bound::Node("node-1")).unwrap()).unwrap();
    let calico = |kind: &str, name: &str, spec: Value| {
        let namespace = matches!(kind, "NetworkPolicy" | "NetworkSet").then_some("default");
        let metadata = json!({"name": name, "namespace": namespace, "labels": {"set": name}});
        json!({"apiVersion": "crd.projectcalico.org/v1", "kind": kind, "metadata": metadata, "spec": spec})
    };
    let mesh_policy = |name: &str, subject: Value, to: Value| {
        json!({
            "apiVersion": "sennit.dev/v1alpha1", "kind": "MeshPolicy", "metadata": {"name": name},
            "spec": {
                "tier": "Admin", "priority": 1, "subject": subject,
                "egress": [{"action": "Deny", "to": [to], "protocols": [{"tcp": {"destinationPort": {"range": {"start": 1, "end": 9}}}}]}],
            },
        })
    };
    host.namespace()
        .run(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let config = api_config(Some(&kubeconfig)).await.unwrap();
                let mut registry = KubeRegistry::new(config, None, &"m".parse().unwrap()).unwrap();
                registry.watch_policy();
                let feed = registry.feed().clone();
                let mut state = State::default();
                // A kind that was only just defined is slow to answer.
                until(&feed, &mut state, "all is listed", |_| feed.complete() && feed.staleness().is_none())
                    .await;
                assert_eq!(feed.problems(), Vec::<String>::new());

                let rule = json!([{"action": "Allow", "source": {"selector": "set == 'n'"}}]);
                for object in [
                    calico("Tier", "first", json!({"order": 7, "defaultAction": "Pass"})),
                    calico("GlobalNetworkSet", "n", json!({"nets": ["192.0.2.0/24"]})),
                    calico("NetworkSet", "m", json!({"nets": ["192.0.2.0/24"]})),
                    calico("GlobalNetworkPolicy", "g", json!({"tier": "first", "ingress": rule})),
                    calico("NetworkPolicy", "default.p", json!({"ingress": rule})),
                    calico("StagedGlobalNetworkPolicy", "s", json!({"ingress": rule})),
                    calico("HostEndpoint", "h", json!({"node": "node-1", "interfaceName": "*"})),
                ] {
                    cluster.apply(&object).unwrap();
                }
                until(&feed, &mut state, "Calico's policies are there", |state| {
                    let mut policies = state.policies.iter();
                    let known = |name: &str| {
                        let mut all = state.policies.iter();
                        all.any(|policy| policy.id.to_string() == name)
                    };
                    known("GlobalNetworkPolicy g")
                        && known("NetworkPolicy.projectcalico.org default/default.p")
                        && policies.any(|policy| policy.staged)
                })
                .await;
                until(&feed, &mut state, "the policy has the place of its tier", |state| {
                    state.policies.iter().any(|policy| policy.tier.order.0 == 7.0)
                })
                .await;
                assert!(state.faults.is_empty(), "{:?}", state.faults);
                // Services, by the EndpointSlices of a cluster that has Calico's policies.
                let slice = |address: &str| {
                    json!({
                        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                        "metadata": {"name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
                        "endpoints": [{"addresses": [address]}], "ports": [{"name": "web", "port": 80, "protocol": "TCP"}],
                    })
                };
                let web = mesh_policy::object::Key::new(None, "web");
                for address in ["192.0.2.7", "192.0.2.8"] {
                    cluster.apply(&slice(address)).unwrap();
                    until(&feed, &mut state, "the Service has its endpoint", |state| {
                        state.world.serves(&web, address.parse().unwrap()).any(|ports| ports.len() == 1)
                    })
                    .await;
                }
                cluster.kubectl(&["delete", "endpointslice", "web-1"]).unwrap();
                until(&feed, &mut state, "the Service has no endpoint", |state| {
                    state.world.endpoints(&web).next().is_none()
                })
                .await;
                let wrong = calico(
                    "NetworkPolicy",
                    "default.p",
                    json!({"ingress": [{"action": "Allow", "http": {"methods": ["GET"]}}]}),
                );
                cluster.apply(&wrong).unwrap();
                until(&feed, &mut state, "what is wrong with one is told", |state| {
                    state.refusals().any(|told| told.contains("spec.ingress[0].http"))
                })
                .await;
                cluster.kubectl(&["delete", "tiers.crd.projectcalico.org", "first"]).unwrap();
                until(&feed, &mut state, "the tier is gone", |state| {
                    state.policies.iter().all(|policy| policy.tier.order.0 != 7.0)
                })
                .await;

                // A Calico that comes to keep its objects in its own group: what it has left in the other counts no more.
                cluster.serve_native_calico().unwrap();
                let mut moved = calico("GlobalNetworkPolicy", "moved", json!({"ingress": rule}));
                moved["apiVersion"] = json!("projectcalico.org/v3");
                cluster.apply(&moved).unwrap();
                let names = |state: &State| -> Vec<String> {
                    let mut of_calico = state.policies.iter().filter(|policy| policy.id.kind == "GlobalNetworkPolicy");
                    of_calico.by_ref().map(|policy| policy.id.name.clone()).collect()
                };
                until(&feed, &mut state, "what was moved counts, and what was left does not", |state| {
                    names(state) == ["moved"]
                })
                .await;

                // What no MeshPolicy can be the API server refuses, with the reason.
                let sites = json!({"sites": ["aws"]});
                for (subject, to, told) in [
                    (json!({}), sites.clone(), "names nobody"),
                    (
                        json!({"sites": ["aws"], "notSites": ["gcp"]}),
                        sites.clone(),
                        "sites goes without notSites",
                    ),
                    (sites.clone(), json!({"pods": {"podSelector": {}}, "nodes": {}}), "at most one of"),
                    (sites.clone(), json!({"networks": ["10.0.0.0"]}), "is no prefix"),
                    (sites.clone(), json!({"sites": ["Not A Name"]}), "should match"),
                    (
                        json!({"nodes": {"matchExpressions": [{"key": "a", "operator": "In"}]}}),
                        sites.clone(),
                        "need values",
                    ),
                ] {
                    let refused = cluster.apply(&mesh_policy("wrong", subject, to)).unwrap_err().to_string();
                    assert!(refused.contains(told), "{refused}\nnot {told}");
                }
                cluster.apply(&mesh_policy("m", sites.clone(), json!({"notSites": ["aws"]}))).unwrap();
                cluster
                    .apply(&json!({
                        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
                        "metadata": {"name": "c"},
                        "spec": {
                            "tier": "Admin", "priority": 5, "subject": {"namespaces": {}},
                            "ingress": [{"action": "Deny", "from": [{"planets": {}}]}],
                        },
                    }))
                    .unwrap();
                until(&feed, &mut state, "both are there", |state| {
                    let kinds = ["MeshPolicy", "ClusterNetworkPolicy"];
                    kinds.iter().all(|kind| state.policies.iter().any(|policy| policy.id.kind == *kind))
                })
                .await;
                let condition = |kind: &str, name: &str, of: &str| {
                    let status = cluster.get(kind, name).unwrap()["status"].clone();
                    let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
                    conditions.into_iter().find(|condition| condition["type"] == of)
                };
                let written = async {
                    loop {
                        let accepted = condition("meshpolicies", "m", "Accepted");
                        let refused = condition("clusternetworkpolicies", "c", "sennit.dev/Accepted");
                        if let (Some(accepted), Some(refused)) = (accepted, refused) {
                            return (accepted, refused);
                        }
                        drop(tokio::time::timeout(Duration::from_millis(200), feed.changed()).await);
                    }
                };
                let (accepted, refused) = tokio::time::timeout(PATIENCE, written).await.unwrap();
                assert_eq!(
                    (&accepted["status"], &accepted["observedGeneration"]),
                    (&json!("True"), &json!(1))
                );
                assert_eq!(refused["status"], "False");
                let message = refused["message"].as_str().unwrap();
                assert!(message.contains("spec.ingress[0].from[0].planets: no such field"), "{message}");
                // When it is mended, that is told, too.
                cluster
                    .kubectl(&[
                        "patch",
                        "clusternetworkpolicy",
                        "c",
                        "--type=merge",
                        "-p",
                        r#"{"spec":{"ingress":[]}}"#,
                    ])
                    .unwrap();
                let mended = async {
                    loop {
                        let condition = condition("clusternetworkpolicies", "c", "sennit.dev/Accepted");
                        if condition.is_some_and(|condition| condition["status"] == "True") {
                            return;
                        }
                        drop(tokio::time::timeout(Duration::from_millis(200), feed.changed()).await);
                    }
                };
                tokio::time::timeout(PATIENCE, mended).await.unwrap();

                // It is the agents' own, and they write nobody else's; others do not write it.
                let other = r#"[{"op": "add", "path": "/status/conditions/-", "value": {"type": "Other", "status": "True",
                    "reason": "R", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}}]"#;
                let status = ["patch", "clusternetworkpolicy", "c", "--subresource=status"];
                cluster.kubectl(&[&status[..], &["--type=json", "-p", other]].concat()).unwrap();
                let apply = [
                    "apply", "--server-side", "--subresource=status", "--field-manager=test", "--force-conflicts",
                    "--validate=false", "-f", "-",
                ];
                let emptied = json!({
                    "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
                    "metadata": {"name": "c"}, "status": {"conditions": []},
                })
                .to_string();
                let refused = |kubeconfig: &str| {
                    let output = cluster.kubectl_as(kubeconfig, &apply, &emptied).unwrap();
                    assert!(!output.success(), "{kubeconfig} may");
                    String::from_utf8_lossy(&output.stderr).into_owned()
                };
                let told = refused("agent");
                assert!(told.contains("writes condition sennit.dev/Accepted, and none of others"), "{told}");
                cluster.kubeconfig("unbound", &cluster.token(Bound::Nothing).unwrap()).unwrap();
                let told = refused("unbound");
                assert!(told.contains("only agents tell what became of policies"), "{told}");
            });
        })
        .unwrap();
}
