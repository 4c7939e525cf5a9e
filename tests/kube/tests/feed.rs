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
