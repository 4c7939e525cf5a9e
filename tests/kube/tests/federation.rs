//! Two clusters become one mesh by links in both; what one says is never to the harm of the other.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use kube_tests::cluster::{Bound, Cluster};
use kube_tests::mesh::{MARKER, Mesh};
use kube_tests::{eventually, programs};
use netlab::Process;
use netlab::flow::{self, FlowSpec};
use netlab::probe::Kind;
use serde_json::{Value, json};

const ALL: [&str; 4] = ["east-1", "east-2", "west-1", "west-2"];

fn federate(cluster: &Cluster, name: &str, log: &str) -> Process {
    let token = cluster.token_of("sennit-federate", Bound::Nothing).unwrap();
    let kubeconfig = cluster.kubeconfig("federate", &token).unwrap();
    let kubeconfig = kubeconfig.to_str().unwrap();
    cluster
        .run("mesh-agent", &["federate", "--cluster", name, "--kubeconfig", kubeconfig, "--grace", "2"], log)
        .unwrap()
}

/// Links a cluster to another, whose nodes may hold these prefixes.
fn link(cluster: &Cluster, to: &str, kubeconfig: &str, grants: &[&str]) {
    cluster
        .apply(&json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": to, "namespace": "sennit"},
            "stringData": {"kubeconfig": kubeconfig},
        }))
        .unwrap();
    cluster
        .apply(&json!({
            "apiVersion": "sennit.dev/v1alpha1", "kind": "ClusterLink", "metadata": {"name": to},
            "spec": {"kubeconfigSecret": {"name": to}, "site": to, "podCIDRs": grants},
        }))
        .unwrap();
}

fn credentials(cluster: &Cluster) -> String {
    // Bound to nothing, the agents' account may read and no more.
    cluster.portable_kubeconfig(&cluster.token(Bound::Nothing).unwrap()).unwrap().to_string()
}

fn ready(cluster: &Cluster, link: &str) -> Value {
    cluster.get("clusterlink", link).unwrap()["status"]["conditions"][0].clone()
}

fn until_condition(cluster: &Cluster, link: &str, status: &str, wanted: &str) {
    eventually("the link's condition", || {
        let condition = ready(cluster, link);
        let said = condition["message"].as_str().unwrap_or_default();
        anyhow::ensure!(
            condition["status"] == status && said.contains(wanted),
            "{condition}\n{}",
            cluster.log("federate-1.log")
        );
        Ok(())
    })
    .unwrap();
}

fn mirrors(cluster: &Cluster) -> Vec<String> {
    let names = cluster.kubectl(&["get", "meshnodes", "-l", "sennit.dev/link", "-o", "name"]).unwrap();
    names.lines().map(|name| name.rsplit('/').next().unwrap().to_owned()).collect()
}

struct Stage {
    mesh: Mesh,
    federators: Vec<Process>,
}

/// Two clusters whose nodes have the same names, linked both ways. East is site 1 of the lab and west is site 2.
fn linked() -> Stage {
    let hosts: [(&str, &[(&str, &str)]); 2] = [
        ("east", &[("east-1", "node-1"), ("east-2", "node-2")]),
        ("west", &[("west-1", "node-1"), ("west-2", "node-2")]),
    ];
    let mut mesh = Mesh::federated(&hosts).unwrap();
    for host in ALL {
        mesh.start(host).unwrap();
    }
    let kubeconfigs = ["east", "west"].map(|name| credentials(mesh.cluster_named(name)));
    link(mesh.cluster_named("east"), "west", &kubeconfigs[1], &["10.2.0.0/16", "fd00:2::/48"]);
    link(mesh.cluster_named("west"), "east", &kubeconfigs[0], &["10.1.0.0/16", "fd00:1::/48"]);
    let federators = ["east", "west"]
        .map(|name| federate(mesh.cluster_named(name), name, "federate-1.log"))
        .into_iter()
        .collect();
    mesh.stands(&ALL).unwrap();
    Stage { mesh, federators }
}

fn traffic(mesh: &Mesh, from: &str, to: &str) -> flow::Flow {
    let ((from, _), (_, to)) = (mesh.pod(from).unwrap(), mesh.pod(to).unwrap());
    flow::start(&from, FlowSpec { to, kind: Kind::Icmp, rate: 200, payload: MARKER.into() }).unwrap()
}

fn lossless(flow: flow::Flow) {
    let report = flow.stop(Duration::from_secs(2)).unwrap();
    assert!(report.sent > 20 && report.lost == 0, "{report:?}");
}

#[test]
fn two_clusters_with_the_same_node_names_become_one_mesh() {
    if !programs::can_run("two_clusters_with_the_same_node_names_become_one_mesh") {
        return;
    }
    let mut stage = linked();
    assert_eq!(stage.mesh.reaches(&ALL).unwrap(), 96);
    for (name, other) in [("east", "west"), ("west", "east")] {
        let cluster = stage.mesh.cluster_named(name);
        assert_eq!(mirrors(cluster), [format!("node-1.{other}"), format!("node-2.{other}")]);
        until_condition(cluster, other, "True", "");
        let listed = cluster.kubectl(&["get", "clusterlinks"]).unwrap();
        assert!(listed.contains("Mirrored"), "{listed}");
    }
    let flow = traffic(&stage.mesh, "east-1-pod-1", "west-1-pod-1");

    // A second federator waits, and takes over when the first dies. The remote node that came meanwhile is mirrored.
    let second = federate(stage.mesh.cluster_named("east"), "east", "federate-2.log");
    stage.federators.remove(0).kill().unwrap();
    let late = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-3"},
        "spec": {"podCIDR": "10.2.99.0/24", "podCIDRs": ["10.2.99.0/24"]},
    });
    stage.mesh.cluster_named("west").apply(&late).unwrap();
    eventually("the second one takes over", || {
        let cluster = stage.mesh.cluster_named("east");
        anyhow::ensure!(
            mirrors(cluster).contains(&"node-3.west".to_owned()),
            "{}",
            cluster.log("federate-2.log")
        );
        Ok(())
    })
    .unwrap();

    // While the other API is away only a condition changes.
    stage.mesh.cluster_named("west").stop_api().unwrap();
    until_condition(stage.mesh.cluster_named("east"), "west", "False", "mirrors stay as they are");
    assert_eq!(mirrors(stage.mesh.cluster_named("east")).len(), 3);
    stage.mesh.cluster_named("west").start_api().unwrap();
    until_condition(stage.mesh.cluster_named("east"), "west", "True", "");

    // A remote node that is gone loses its mirror, and so does a cluster without a link.
    stage.mesh.cluster_named("west").kubectl(&["delete", "node", "node-3"]).unwrap();
    eventually("the mirror goes", || {
        let left = mirrors(stage.mesh.cluster_named("east"));
        anyhow::ensure!(left.len() == 2, "{left:?}");
        Ok(())
    })
    .unwrap();
    lossless(flow);
    stage.mesh.cluster_named("east").kubectl(&["delete", "clusterlink", "west"]).unwrap();
    eventually("all mirrors go", || {
        let left = mirrors(stage.mesh.cluster_named("east"));
        anyhow::ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .unwrap();
    drop(second);
}

#[test]
fn what_a_remote_cluster_announces_beyond_its_grants_is_refused_and_named() {
    if !programs::can_run("what_a_remote_cluster_announces_beyond_its_grants_is_refused_and_named") {
        return;
    }
    let mut stage = linked();
    let flow = traffic(&stage.mesh, "east-1-pod-1", "east-2-pod-1");
    let api = stage.mesh.cluster_named("east").address();
    let east_key = stage.mesh.cluster_named("east").get("node", "node-1").unwrap()["metadata"]["annotations"]
        ["sennit.dev/public-key"]
        .clone();
    let hostile = [
        ("everything", "0.0.0.0/1".to_owned(), Value::Null, "0.0.0.0/1: it is wider than"),
        ("services", "10.97.0.0/16".to_owned(), Value::Null, "outside of what ClusterLink west grants"),
        ("api", format!("{api}/32"), Value::Null, "outside of what ClusterLink west grants"),
        ("neighbour", "10.1.1.0/24".to_owned(), Value::Null, "outside of what ClusterLink west grants"),
        (
            "thief",
            "10.2.88.0/24".to_owned(),
            east_key,
            "its public key is that of node-1.east of this cluster",
        ),
    ];
    for (name, cidr, key, wanted) in hostile {
        let mut node = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
            "spec": {"podCIDR": cidr, "podCIDRs": [cidr]},
        });
        if key.is_string() {
            node["metadata"]["annotations"] =
                json!({"sennit.dev/public-key": key, "sennit.dev/epoch": "1", "sennit.dev/site": "west"});
        }
        stage.mesh.cluster_named("west").apply(&node).unwrap();
        until_condition(stage.mesh.cluster_named("east"), "west", "False", &format!("{name}.west"));
        until_condition(stage.mesh.cluster_named("east"), "west", "False", wanted);
        assert_eq!(mirrors(stage.mesh.cluster_named("east")), ["node-1.west", "node-2.west"]);
        stage.mesh.cluster_named("west").kubectl(&["delete", "node", name]).unwrap();
        until_condition(stage.mesh.cluster_named("east"), "west", "True", "");
    }
    // A link to oneself: all of its nodes are here already.
    let own = credentials(stage.mesh.cluster_named("east"));
    link(stage.mesh.cluster_named("east"), "mirror", &own, &["10.0.0.0/8"]);
    until_condition(stage.mesh.cluster_named("east"), "mirror", "False", "of this cluster");
    link(stage.mesh.cluster_named("east"), "broken", "{{{ garbage", &["10.200.0.0/16"]);
    until_condition(stage.mesh.cluster_named("east"), "broken", "False", "no kubeconfig");
    assert_eq!(mirrors(stage.mesh.cluster_named("east")), ["node-1.west", "node-2.west"]);
    stage.mesh.stands(&ALL).unwrap();
    stage.mesh.reaches(&ALL).unwrap();
    lossless(flow);
}
