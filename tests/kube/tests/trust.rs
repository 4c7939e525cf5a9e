//! A stolen agent token can do nothing to another node: each token against each change, on a real API server.
#![allow(clippy::unwrap_used)]

use kube_tests::cluster::{Bound, Cluster};
use kube_tests::programs;
use netlab::{HostSpec, Lab, LabSpec, SiteSpec};
use serde_json::{Value, json};

const SITE_LABEL: &str = "sennit.dev.node-restriction.kubernetes.io/site";

struct Stage {
    cluster: Cluster,
    _lab: Lab,
    _dir: tempfile::TempDir,
}

fn stage() -> Stage {
    let lab = Lab::build(&LabSpec::new().site(SiteSpec::new("cluster").host(HostSpec::new("cp")))).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(lab.host("cp").unwrap(), dir.path()).unwrap();
    cluster.deploy().unwrap();
    for name in ["node-1", "node-2"] {
        let labels = json!({"a": "b", (SITE_LABEL): "aws", "sennit.dev/site": "aws"});
        let metadata = json!({"name": name, "labels": labels, "annotations": {"other.io/k": "v"}});
        cluster.apply(&json!({"apiVersion": "v1", "kind": "Node", "metadata": metadata})).unwrap();
        cluster.apply(&mesh_node(name, "10.1.0.0/24")).unwrap();
    }
    cluster.apply(&mesh_node("host-1", "10.3.0.0/24")).unwrap();
    cluster
        .apply(&json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "host-host-1", "namespace": "sennit"}}))
        .unwrap();
    cluster
        .apply(&json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": "sennit"}}))
        .unwrap();
    cluster
        .apply(&json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "agent", "namespace": "sennit"},
            "spec": {
                "serviceAccountName": "sennit-agent", "nodeName": "node-1", "automountServiceAccountToken": false,
                "containers": [{"name": "agent", "image": "none"}],
            },
        }))
        .unwrap();
    for (who, account, bound) in [
        ("node-1", "sennit-agent", Bound::Node("node-1")),
        ("pod-on-node-1", "sennit-agent", Bound::Pod("agent")),
        ("node-2", "sennit-agent", Bound::Node("node-2")),
        ("unbound", "sennit-agent", Bound::Nothing),
        ("host-1", "host-host-1", Bound::Nothing),
        ("somebody", "default", Bound::Node("node-1")),
        ("federate", "sennit-federate", Bound::Node("node-1")),
    ] {
        cluster.kubeconfig(who, &cluster.token_of(account, bound).unwrap()).unwrap();
    }
    for node in ["node-1", "node-3"] {
        let user = format!("system:node:{node}");
        cluster.client(&format!("kubelet-{node}"), &user, Some("system:nodes")).unwrap();
    }
    Stage { cluster, _lab: lab, _dir: dir }
}

fn mesh_node(name: &str, cidr: &str) -> Value {
    json!({
        "apiVersion": "sennit.dev/v1alpha1", "kind": "MeshNode", "metadata": {"name": name},
        "spec": {"site": "aws", "podCIDRs": [cidr]},
    })
}

/// `somebody` is another account of the same namespace. Federation makes MeshNodes, but changes no Node either.
const TOKENS: [&str; 6] = ["node-1", "pod-on-node-1", "node-2", "unbound", "host-1", "somebody"];

/// Who may, by name of the change, for changes to `node-1`, and to `host-1` where the name says so.
const CHANGES: &[(&str, &[&str], &str, &[&str])] = &[
    (
        "own annotation",
        &["patch", "node", "node-1"],
        r#"{"metadata":{"annotations":{"sennit.dev/epoch":"WHO"}}}"#,
        &["node-1", "pod-on-node-1"],
    ),
    (
        "own annotation away",
        &["patch", "node", "node-1"],
        r#"{"metadata":{"annotations":{"sennit.dev/epoch":null}}}"#,
        &["node-1", "pod-on-node-1"],
    ),
    (
        "annotation of the MeshNode of its name",
        &["patch", "meshnode", "node-1"],
        r#"{"metadata":{"annotations":{"sennit.dev/epoch":"WHO"}}}"#,
        &[],
    ),
    (
        "host's annotation",
        &["patch", "meshnode", "host-1"],
        r#"{"metadata":{"annotations":{"sennit.dev/epoch":"WHO"}}}"#,
        &["host-1"],
    ),
    ("label", &["patch", "node", "node-1"], r#"{"metadata":{"labels":{"sennit.dev/site":"gcp"}}}"#, &[]),
    ("label away", &["patch", "node", "node-1"], r#"{"metadata":{"labels":{"a":null}}}"#, &[]),
    (
        "foreign annotation",
        &["patch", "node", "node-1"],
        r#"{"metadata":{"annotations":{"other.io/new":"v"}}}"#,
        &[],
    ),
    (
        "foreign annotation changed",
        &["patch", "node", "node-1"],
        r#"{"metadata":{"annotations":{"other.io/k":"w"}}}"#,
        &[],
    ),
    (
        "foreign annotation away",
        &["patch", "node", "node-1"],
        r#"{"metadata":{"annotations":{"other.io/k":null}}}"#,
        &[],
    ),
    ("finalizer", &["patch", "node", "node-1"], r#"{"metadata":{"finalizers":["sennit.dev/stay"]}}"#, &[]),
    (
        "owner",
        &["patch", "node", "node-1"],
        r#"{"metadata":{"ownerReferences":[{"apiVersion":"v1","kind":"Pod","name":"x","uid":"1"}]}}"#,
        &[],
    ),
    ("spec", &["patch", "node", "node-1"], r#"{"spec":{"unschedulable":true}}"#, &[]),
    (
        "taint",
        &["patch", "node", "node-1"],
        r#"{"spec":{"taints":[{"key":"a","effect":"NoSchedule"}]}}"#,
        &[],
    ),
    (
        "prefixes",
        &["patch", "node", "node-1"],
        r#"{"spec":{"podCIDR":"10.9.0.0/24","podCIDRs":["10.9.0.0/24"]}}"#,
        &[],
    ),
    (
        "status",
        &["patch", "node", "node-1", "--subresource=status"],
        r#"{"status":{"phase":"Running"}}"#,
        &[],
    ),
    (
        "MeshNode's prefixes",
        &["patch", "meshnode", "node-1"],
        r#"{"spec":{"podCIDRs":["10.9.0.0/24"]}}"#,
        &[],
    ),
    ("host's prefixes", &["patch", "meshnode", "host-1"], r#"{"spec":{"podCIDRs":["10.9.0.0/24"]}}"#, &[]),
];

#[test]
fn each_token_changes_its_own_nodes_mesh_annotations_and_nothing_else() {
    if !programs::can_run("each_token_changes_its_own_nodes_mesh_annotations_and_nothing_else") {
        return;
    }
    let stage = stage();
    let mut wrong = Vec::new();
    for (what, target, patch, may) in CHANGES {
        for who in TOKENS {
            let patch = patch.replace("WHO", who);
            let args: Vec<&str> = target.iter().copied().chain(["--type=merge", "-p", &patch]).collect();
            let output = stage.cluster.kubectl_as(who, &args, "").unwrap();
            let refused = output.stderr_text().contains("orbidden");
            if output.success() != may.contains(&who) || output.success() == refused {
                wrong.push(format!("{who}: {what}: {}{}", output.stdout_text(), output.stderr_text()));
            }
        }
    }
    for (what, target, patch, _) in CHANGES.iter().filter(|(_, target, ..)| target[1] == "node") {
        let args: Vec<&str> = target.iter().copied().chain(["--type=merge", "-p", patch]).collect();
        let output = stage.cluster.kubectl_as("federate", &args, "").unwrap();
        if output.success() || !output.stderr_text().contains("orbidden") {
            wrong.push(format!("federate: {what}: {}", output.stderr_text()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What the kubelet of `node-1` may write, by name of the change.
const OF_A_KUBELET: &[(&str, &[&str], &str, bool)] = &[
    (
        "site",
        &["node", "node-1"],
        r#"{"metadata":{"labels":{"sennit.dev.node-restriction.kubernetes.io/site":"gcp"}}}"#,
        false,
    ),
    ("old site", &["node", "node-1"], r#"{"metadata":{"labels":{"sennit.dev/site":"gcp"}}}"#, false),
    ("old site away", &["node", "node-1"], r#"{"metadata":{"labels":{"sennit.dev/site":null}}}"#, false),
    ("a label of ours", &["node", "node-1"], r#"{"metadata":{"labels":{"sennit.dev/new":"x"}}}"#, false),
    (
        "prefixes",
        &["node", "node-1"],
        r#"{"spec":{"podCIDR":"10.9.0.0/24","podCIDRs":["10.9.0.0/24"]}}"#,
        false,
    ),
    (
        "another's annotation",
        &["node", "node-2"],
        r#"{"metadata":{"annotations":{"sennit.dev/epoch":"1"}}}"#,
        false,
    ),
    ("the MeshNode of its name", &["meshnode", "node-1"], r#"{"spec":{"podCIDRs":["10.9.0.0/24"]}}"#, false),
    // Its Node's credentials are as good as its agent's.
    ("own annotation", &["node", "node-1"], r#"{"metadata":{"annotations":{"sennit.dev/epoch":"1"}}}"#, true),
    ("another label", &["node", "node-1"], r#"{"metadata":{"labels":{"example.com/rack":"r1"}}}"#, true),
];

#[test]
fn a_kubelet_writes_neither_site_nor_prefixes() {
    if !programs::can_run("a_kubelet_writes_neither_site_nor_prefixes") {
        return;
    }
    let stage = stage();
    let mut wrong = Vec::new();
    let mut judge = |what: &str, may: bool, output: netlab::Output| {
        let told = format!("{}{}", output.stdout_text(), output.stderr_text());
        if output.success() != may || output.success() == told.contains("orbidden") {
            wrong.push(format!("{what}: {told}"));
        }
    };
    for (what, target, patch, may) in OF_A_KUBELET {
        let args = [&["patch"], *target, &["--type=merge", "-p", patch]].concat();
        judge(what, *may, stage.cluster.kubectl_as("kubelet-node-1", &args, "").unwrap());
    }
    // kubectl would read the status first, which no kubelet may.
    let put = |change: fn(&mut Value)| {
        let mut node = stage.cluster.get("node", "node-1").unwrap();
        change(&mut node);
        let args = ["replace", "--raw", "/api/v1/nodes/node-1/status", "-f", "-"];
        stage.cluster.kubectl_as("kubelet-node-1", &args, &node.to_string()).unwrap()
    };
    let old_site = |node: &mut Value| node["metadata"]["labels"]["sennit.dev/site"] = json!("gcp");
    judge("old site by its status", false, put(old_site));
    // Agents judge what it says there.
    let addresses = |node: &mut Value| {
        node["status"]["addresses"] = json!([{"type": "InternalIP", "address": "10.2.0.66"}]);
    };
    judge("own addresses", true, put(addresses));
    let registered = |labels: Value, spec: Value| json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-3", "labels": labels}, "spec": spec});
    for (what, node, may) in [
        ("registers with a site", registered(json!({(SITE_LABEL): "aws"}), json!({})), false),
        ("registers with an old site", registered(json!({"sennit.dev/site": "aws"}), json!({})), false),
        ("registers with prefixes", registered(json!({}), json!({"podCIDRs": ["10.9.0.0/24"]})), false),
        ("registers with a prefix", registered(json!({}), json!({"podCIDR": "10.9.0.0/24"})), false),
        ("registers", registered(json!({"example.com/rack": "r1"}), json!({})), true),
    ] {
        let args = ["create", "-f", "-"];
        judge(what, may, stage.cluster.kubectl_as("kubelet-node-3", &args, &node.to_string()).unwrap());
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let node = stage.cluster.get("node", "node-1").unwrap();
    assert_eq!(node["metadata"]["labels"][SITE_LABEL], "aws");
    assert_eq!(node["metadata"]["labels"]["sennit.dev/site"], "aws");
    assert!(node["spec"]["podCIDRs"].is_null(), "{node}");
}

#[test]
fn no_token_creates_or_deletes() {
    if !programs::can_run("no_token_creates_or_deletes") {
        return;
    }
    let stage = stage();
    let created = [
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-9"}}),
        mesh_node("node-1-too", "10.9.0.0/24"),
    ];
    for who in TOKENS {
        for manifest in &created {
            // By server-side apply too, which creates what is not there.
            for apply in
                [&["create", "-f", "-"][..], &["apply", "--server-side", "--validate=false", "-f", "-"]]
            {
                let output = stage.cluster.kubectl_as(who, apply, &manifest.to_string()).unwrap();
                assert!(!output.success(), "{who}: {}", output.stdout_text());
                assert!(output.stderr_text().contains("orbidden"), "{who}: {}", output.stderr_text());
            }
        }
        for target in [["node", "node-1"], ["meshnode", "node-1"], ["meshnode", "host-1"]] {
            let output = stage.cluster.kubectl_as(who, &["delete", target[0], target[1]], "").unwrap();
            assert!(
                !output.success() && output.stderr_text().contains("orbidden"),
                "{who} deletes {target:?}"
            );
        }
        for secret in ["secrets", "configmaps"] {
            let output = stage.cluster.kubectl_as(who, &["get", secret, "-A"], "").unwrap();
            assert!(!output.success(), "{who} reads {secret}");
        }
    }
    // Federation makes and deletes mirrors, and no other MeshNodes.
    let plain = stage.cluster.kubectl_as(
        "federate",
        &["create", "-f", "-"],
        &mesh_node("plain", "10.9.0.0/24").to_string(),
    );
    assert!(plain.unwrap().stderr_text().contains("orbidden"));
    let deleted = stage.cluster.kubectl_as("federate", &["delete", "meshnode", "host-1"], "").unwrap();
    assert!(deleted.stderr_text().contains("is no mirror"), "{}", deleted.stderr_text());
    let mut mirror = mesh_node("n.west", "10.9.0.0/24");
    mirror["metadata"]["labels"] = json!({"sennit.dev/link": "west"});
    for args in [&["create", "-f", "-"][..], &["delete", "-f", "-"]] {
        let output = stage.cluster.kubectl_as("federate", args, &mirror.to_string()).unwrap();
        assert!(output.success(), "{}", output.stderr_text());
    }
    for name in ["node-1", "node-2"] {
        assert_eq!(stage.cluster.get("node", name).unwrap()["metadata"]["annotations"]["other.io/k"], "v");
    }
}

#[test]
fn agents_read_what_policy_is_decided_from_and_write_none_of_it() {
    if !programs::can_run("agents_read_what_policy_is_decided_from_and_write_none_of_it") {
        return;
    }
    let stage = stage();
    let policy = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "p", "namespace": "sennit"},
        "spec": {"podSelector": {}},
    });
    stage.cluster.apply(&policy).unwrap();
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "new"}});
    let mut pod = stage.cluster.get("pods/agent", "--namespace=sennit").unwrap();
    pod["metadata"] = json!({"name": "new", "namespace": "sennit"});
    let mut other = policy.clone();
    other["metadata"]["name"] = json!("new");
    let label = r#"{"metadata":{"labels":{"stolen":"yes"}}}"#;
    for who in TOKENS {
        for kind in ["pods", "namespaces", "networkpolicies"] {
            let output = stage.cluster.kubectl_as(who, &["get", kind, "-A"], "").unwrap();
            assert!(output.success(), "{who} reads {kind}: {}", output.stderr_text());
        }
        let refused = |args: &[&str], input: &str| {
            let output = stage.cluster.kubectl_as(who, args, input).unwrap();
            let told = output.stderr_text();
            assert!(!output.success() && told.contains("orbidden"), "{who}: {args:?}: {told}");
        };
        for object in [&namespace, &pod, &other] {
            refused(&["create", "-f", "-"], &object.to_string());
        }
        for target in [["pod", "agent"], ["namespace", "sennit"], ["networkpolicy", "p"]] {
            let at = [target[0], target[1], "--namespace=sennit"];
            refused(&[&["patch"], &at[..], &["--type=merge", "-p", label]].concat(), "");
            refused(&[&["delete", "--wait=false"], &at[..]].concat(), "");
        }
    }
    // By its own role federation has nothing to do with any of it.
    let role = stage.cluster.get("clusterrole", "sennit-federate").unwrap()["rules"].to_string();
    for resource in ["pods", "namespaces", "networkpolicies"] {
        assert!(!role.contains(&format!("\"{resource}\"")), "{role}");
    }
}

#[test]
fn an_agent_writes_events_about_its_own_node_alone() {
    if !programs::can_run("an_agent_writes_events_about_its_own_node_alone") {
        return;
    }
    let stage = stage();
    let event = |kind: &str, name: &str, reporter: &str, instance: &str| {
        json!({
            "apiVersion": "events.k8s.io/v1", "kind": "Event",
            "metadata": {"generateName": "test-", "namespace": "default"},
            "eventTime": "2026-01-01T00:00:00.000000Z", "action": "Encrypt", "reason": "CleartextBegins", "type": "Warning",
            "note": "a note", "reportingController": reporter, "reportingInstance": instance,
            "regarding": {
                "apiVersion": if kind == "Node" { "v1" } else { "sennit.dev/v1alpha1" }, "kind": kind, "name": name,
            },
        })
    };
    let ours = "sennit.dev/agent";
    let mut wrong = Vec::new();
    for (kind, name, reporter, instance, may) in [
        ("Node", "node-1", ours, "node-1", &["node-1", "pod-on-node-1"][..]),
        ("Node", "node-2", ours, "node-2", &["node-2"]),
        ("MeshNode", "host-1", ours, "host-1", &["host-1"]),
        ("MeshNode", "node-1", ours, "node-1", &[]),
        ("Node", "host-1", ours, "host-1", &[]),
        ("Node", "node-1", "kubelet", "node-1", &[]),
        ("Pod", "node-1", ours, "node-1", &[]),
    ] {
        for who in TOKENS.into_iter().chain(["federate"]) {
            let text = event(kind, name, reporter, instance).to_string();
            let output = stage.cluster.kubectl_as(who, &["create", "-f", "-"], &text).unwrap();
            if output.success() != may.contains(&who)
                || output.success() == output.stderr_text().contains("orbidden")
            {
                wrong
                    .push(format!("{who}: {kind} {name} by {reporter} {instance}: {}", output.stderr_text()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_mesh_node_grants_prefixes_only() {
    if !programs::can_run("a_mesh_node_grants_prefixes_only") {
        return;
    }
    let stage = stage();
    for (cidr, wanted) in [
        ("0.0.0.0/0", "default route"),
        ("::/0", "default route"),
        ("10.1.2.3/16", "behind the prefix length"),
        ("10.1.0.0", "no prefix"),
        ("nonsense", "no prefix"),
    ] {
        let error = stage.cluster.apply(&mesh_node("wide", cidr)).unwrap_err().to_string();
        assert!(error.contains(wanted), "{cidr}: {error}");
    }
    let explained = stage.cluster.explain("meshnode.spec").unwrap();
    assert!(explained.contains("podCIDRs") && explained.contains("peers route to this node"), "{explained}");
    let listed = stage.cluster.kubectl(&["get", "meshnodes"]).unwrap();
    assert!(listed.lines().next().unwrap().contains("SITE") && listed.contains("host-1"), "{listed}");
}

#[test]
fn an_agent_writes_one_condition_of_a_mesh() {
    if !programs::can_run("an_agent_writes_one_condition_of_a_mesh") {
        return;
    }
    let stage = stage();
    let mesh = json!({
        "apiVersion": "sennit.dev/v1alpha1", "kind": "Mesh", "metadata": {"name": "m"}, "spec": {"underlay": {"mtu": 1400}},
    });
    stage.cluster.apply(&mesh).unwrap();
    // Not by `kubectl patch`, which reads first what no agent has to.
    let write = |who: &str, kind: &str| {
        let condition = json!({
            "type": kind, "status": "True", "reason": "Accepted", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z",
        });
        let object = json!({
            "apiVersion": "sennit.dev/v1alpha1", "kind": "Mesh", "metadata": {"name": "m"},
            "status": {"conditions": [condition]},
        });
        let args = ["apply", "--server-side", "--subresource=status", "--force-conflicts", "-f", "-"];
        stage.cluster.kubectl_as(who, &args, &object.to_string()).unwrap()
    };
    for who in ["node-1", "host-1"] {
        let output = write(who, "Accepted");
        assert!(output.success(), "{who}: {}", output.stderr_text());
        let output = write(who, "Other");
        assert!(
            !output.success() && output.stderr_text().contains("none of others"),
            "{who}: {}",
            output.stderr_text()
        );
        let spec = ["patch", "mesh", "m", "--type=merge", "-p", r#"{"spec": {"underlay": {"mtu": 1500}}}"#];
        let output = stage.cluster.kubectl_as(who, &spec, "").unwrap();
        assert!(!output.success() && output.stderr_text().contains("orbidden"), "{who} writes spec");
    }
    for who in ["unbound", "somebody", "federate"] {
        assert!(!write(who, "Accepted").success(), "{who} writes the condition");
    }
    assert_eq!(stage.cluster.get("mesh", "m").unwrap()["spec"]["underlay"]["mtu"], 1400);
}
