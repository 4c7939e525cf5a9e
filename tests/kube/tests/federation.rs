//! Two clusters become one mesh by links in both; what one says is never to the harm of the other.
#![allow(clippy::unwrap_used)]

use kube_tests::cluster::{Bound, Cluster};
use kube_tests::mesh::{Mesh, lossless};
use kube_tests::{eventually, programs};
use netlab::Process;
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
    link_at(cluster, to, Some(to), kubeconfig, grants);
}

/// The same with the site that all its nodes stand in, or none.
fn link_at(cluster: &Cluster, to: &str, site: Option<&str>, kubeconfig: &str, grants: &[&str]) {
    let mut spec = json!({"kubeconfigSecret": {"name": to}, "podCIDRs": grants});
    if let Some(site) = site {
        spec["site"] = json!(site);
    }
    cluster
        .apply(&json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": to, "namespace": "sennit"},
            "stringData": {"kubeconfig": kubeconfig},
        }))
        .unwrap();
    cluster
        .apply(&json!({
            "apiVersion": "sennit.dev/v1alpha1", "kind": "ClusterLink", "metadata": {"name": to},
            "spec": spec,
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

/// Waits for two renewals of the Lease, which take longer than the grace for mirrors; who held it then?
fn holder_after_two_renewals(cluster: &Cluster) -> Value {
    let lease = || -> anyhow::Result<Value> {
        let text = cluster.kubectl(&["get", "lease", "-n", "sennit", "sennit-federate", "-o", "json"])?;
        Ok(serde_json::from_str::<Value>(&text)?["spec"].clone())
    };
    let mut last = lease().unwrap();
    for _ in 0..2 {
        last = eventually("the Lease is renewed", || {
            let now = lease()?;
            anyhow::ensure!(now["renewTime"] != last["renewTime"], "{now}");
            Ok(now)
        })
        .unwrap();
    }
    last["holderIdentity"].clone()
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
    let flow = stage.mesh.traffic("east-1-pod-1", "west-1-pod-1").unwrap();

    // A second federator waits, and takes over when the first dies. The remote node that came meanwhile is mirrored.
    let first = holder_after_two_renewals(stage.mesh.cluster_named("east"));
    let second = federate(stage.mesh.cluster_named("east"), "east", "federate-2.log");
    assert_eq!(holder_after_two_renewals(stage.mesh.cluster_named("east")), first);
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
    assert_ne!(holder_after_two_renewals(stage.mesh.cluster_named("east")), first);
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
    lossless(flow).unwrap();
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
    let flow = stage.mesh.traffic("east-1-pod-1", "east-2-pod-1").unwrap();
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
    lossless(flow).unwrap();
}

#[test]
fn what_is_made_by_hand_stays_what_is_edited_is_put_right_and_what_is_not_granted_any_more_goes() {
    if !programs::can_run(
        "what_is_made_by_hand_stays_what_is_edited_is_put_right_and_what_is_not_granted_any_more_goes",
    ) {
        return;
    }
    let mut stage = linked();
    let by_hand = json!({
        "apiVersion": "sennit.dev/v1alpha1", "kind": "MeshNode", "metadata": {"name": "node-9.west"},
        "spec": {"site": "west", "podCIDRs": ["10.2.66.0/24"]},
    });
    stage.mesh.cluster_named("east").apply(&by_hand).unwrap();
    let remote = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-9"},
        "spec": {"podCIDR": "10.2.77.0/24", "podCIDRs": ["10.2.77.0/24"]},
    });
    stage.mesh.cluster_named("west").apply(&remote).unwrap();
    until_condition(
        stage.mesh.cluster_named("east"),
        "west",
        "False",
        "its name is taken by node-9.west of this cluster",
    );
    let cluster = stage.mesh.cluster_named("east");
    assert_eq!(cluster.get("meshnode", "node-9.west").unwrap()["spec"], by_hand["spec"]);
    stage.mesh.cluster_named("west").kubectl(&["delete", "node", "node-9"]).unwrap();
    let cluster = stage.mesh.cluster_named("east");
    cluster.kubectl(&["delete", "meshnode", "node-9.west"]).unwrap();
    until_condition(cluster, "west", "True", "");

    let before = cluster.get("meshnode", "node-1.west").unwrap()["spec"].clone();
    let wider = r#"{"spec":{"podCIDRs":["10.2.1.0/24","10.2.55.0/24"]}}"#;
    cluster.kubectl(&["patch", "meshnode", "node-1.west", "--type=merge", "-p", wider]).unwrap();
    eventually("the mirror is put right", || {
        let now = cluster.get("meshnode", "node-1.west")?["spec"].clone();
        anyhow::ensure!(now == before, "{now}");
        Ok(())
    })
    .unwrap();

    let grant = |cluster: &Cluster, grants: &[&str]| {
        let patch = json!({"spec": {"podCIDRs": grants}}).to_string();
        cluster.kubectl(&["patch", "clusterlink", "west", "--type=merge", "-p", &patch]).unwrap();
    };
    grant(cluster, &["10.2.1.0/24", "fd00:2:0:1::/64"]);
    until_condition(cluster, "west", "False", "node-2.west");
    eventually("what is not granted any more goes", || {
        let left = mirrors(cluster);
        anyhow::ensure!(left == ["node-1.west"], "{left:?}");
        Ok(())
    })
    .unwrap();
    grant(cluster, &["10.2.0.0/16", "fd00:2::/48"]);
    until_condition(cluster, "west", "True", "");
    stage.mesh.stands(&ALL).unwrap();
    stage.mesh.reaches(&ALL).unwrap();
}

#[test]
fn three_clusters_that_link_to_each_other_are_one_mesh() {
    if !programs::can_run("three_clusters_that_link_to_each_other_are_one_mesh") {
        return;
    }
    // Site n of the lab has 10.n.0.0/16, in the order of their names.
    let names = ["east", "north", "west"];
    let nodes = names.map(|name| [(format!("{name}-1"), "node-1")]);
    let nodes = nodes.each_ref().map(|hosts| hosts.each_ref().map(|(host, node)| (host.as_str(), *node)));
    let clusters: Vec<_> = names.iter().zip(&nodes).map(|(name, hosts)| (*name, &hosts[..])).collect();
    let mut mesh = Mesh::federated(&clusters).unwrap();
    let all = ["east-1", "north-1", "west-1"];
    for host in all {
        mesh.start(host).unwrap();
    }
    let kubeconfigs = names.map(|name| credentials(mesh.cluster_named(name)));
    let pairs = || (0..3).flat_map(|from| (0..3).filter(move |to| *to != from).map(move |to| (from, to)));
    for (from, to) in pairs() {
        let (v4, v6) = (format!("10.{}.0.0/16", to + 1), format!("fd00:{}::/48", to + 1));
        link(mesh.cluster_named(names[from]), names[to], &kubeconfigs[to], &[&v4, &v6]);
    }
    let _federators = names.map(|name| federate(mesh.cluster_named(name), name, "federate-1.log"));
    mesh.stands(&all).unwrap();
    assert_eq!(mesh.reaches(&all).unwrap(), 48);
    for (from, to) in pairs() {
        until_condition(mesh.cluster_named(names[from]), names[to], "True", "");
    }
    // What one has mirrored it does not pass on to who is linked to the other one, too: each is there once.
    assert_eq!(mirrors(mesh.cluster_named("east")), ["node-1.north", "node-1.west"]);

    // One of the three is away: the two others do not notice, and a node that joins one of them is known to the other.
    let flow = mesh.traffic("east-1-pod-1", "north-1-pod-1").unwrap();
    mesh.cluster_named("north").stop_api().unwrap();
    until_condition(mesh.cluster_named("east"), "north", "False", "");
    let late = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-2"},
        "spec": {"podCIDR": "10.3.99.0/24", "podCIDRs": ["10.3.99.0/24"]},
    });
    mesh.cluster_named("west").apply(&late).unwrap();
    eventually("the late node is mirrored", || {
        let known = mirrors(mesh.cluster_named("east"));
        anyhow::ensure!(known == ["node-1.north", "node-1.west", "node-2.west"], "{known:?}");
        Ok(())
    })
    .unwrap();
    lossless(flow).unwrap();
}

#[test]
fn clusters_that_link_to_a_broker_alone_are_one_mesh() {
    if !programs::can_run("clusters_that_link_to_a_broker_alone_are_one_mesh") {
        return;
    }
    let mut mesh = Mesh::federated(&[
        ("east", &[("east-1", "node-1")]),
        ("west", &[("west-1", "node-1")]),
        ("hub", &[("hub-1", "node-1")]),
    ])
    .unwrap();
    let all = ["east-1", "west-1", "hub-1"];
    for host in all {
        mesh.start(host).unwrap();
    }
    // Site n of the lab has 10.n.0.0/16, in the order of their names: east, hub, west.
    let grants = [
        ("east", "10.1.0.0/16", "fd00:1::/48"),
        ("hub", "10.2.0.0/16", "fd00:2::/48"),
        ("west", "10.3.0.0/16", "fd00:3::/48"),
    ];
    let hub = credentials(mesh.cluster_named("hub"));
    for (spoke, v4, v6) in [grants[0], grants[2]] {
        let kubeconfig = credentials(mesh.cluster_named(spoke));
        link(mesh.cluster_named("hub"), spoke, &kubeconfig, &[v4, v6]);
        let all: Vec<&str> = grants.iter().flat_map(|(_, v4, v6)| [*v4, *v6]).collect();
        link_at(mesh.cluster_named(spoke), "hub", None, &hub, &all);
    }
    let mut federators: Vec<Process> = ["east", "west", "hub"]
        .map(|name| federate(mesh.cluster_named(name), name, "federate-1.log"))
        .into_iter()
        .collect();
    mesh.stands(&all).unwrap();
    mesh.reaches(&all).unwrap();
    assert_eq!(mirrors(mesh.cluster_named("east")), ["node-1.hub", "node-1.west"]);
    assert_eq!(mirrors(mesh.cluster_named("hub")), ["node-1.east", "node-1.west"]);
    for (cluster, links) in [("east", &["hub"][..]), ("west", &["hub"]), ("hub", &["east", "west"])] {
        for link in links {
            until_condition(mesh.cluster_named(cluster), link, "True", "");
        }
    }

    // The broker forgets the kind, and a federator that knows nothing of before takes over: nobody is gone for that.
    let flow = mesh.traffic("east-1-pod-1", "west-1-pod-1").unwrap();
    mesh.cluster_named("hub").serve_mesh_nodes(false).unwrap();
    federators.remove(0).kill().unwrap();
    federators.push(federate(mesh.cluster_named("east"), "east", "federate-1.log"));
    until_condition(mesh.cluster_named("east"), "hub", "False", "does not know the kind MeshNode");
    holder_after_two_renewals(mesh.cluster_named("east"));
    assert_eq!(mirrors(mesh.cluster_named("east")), ["node-1.hub", "node-1.west"]);
    mesh.cluster_named("hub").serve_mesh_nodes(true).unwrap();
    until_condition(mesh.cluster_named("east"), "hub", "True", "");
    mesh.stands(&all).unwrap();
    lossless(flow).unwrap();
}

#[test]
fn a_restored_remote_cluster_is_heard_again() {
    if !programs::can_run("a_restored_remote_cluster_is_heard_again") {
        return;
    }
    let mut stage = linked();
    let flow = stage.mesh.traffic("east-1-pod-1", "west-1-pod-1").unwrap();
    stage.mesh.cluster_named("west").back_up().unwrap();
    until_condition(stage.mesh.cluster_named("east"), "west", "True", "");
    let west = stage.mesh.cluster_named("west");
    for n in 0..60 {
        west.kubectl(&["label", "node", "node-1", &format!("a={n}"), "--overwrite"]).unwrap();
    }
    west.restore().unwrap();
    west.kubectl(&["delete", "node", "node-2"]).unwrap();
    eventually("the mirror goes", || {
        let mirrors = mirrors(stage.mesh.cluster_named("east"));
        anyhow::ensure!(mirrors == ["node-1.west"], "{mirrors:?}");
        Ok(())
    })
    .unwrap();
    lossless(flow).unwrap();
    drop(stage.federators);
}
