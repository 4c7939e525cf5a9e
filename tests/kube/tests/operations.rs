//! The API server as operators treat it: restored, cut off, behind a proxy, with rights and credentials that come and go.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use kube_tests::cluster::{Bound, deployment};
use kube_tests::mesh::{As, Mesh, lossless};
use kube_tests::relay::{Proxy, delay};
use kube_tests::{eventually, programs};
use serde_json::{Value, json};

const ALL: [&str; 3] = ["aws-1", "gcp-1", "onprem-1"];

fn mesh() -> Mesh {
    Mesh::new(&[
        ("aws", &[("aws-1", As::Node)]),
        ("gcp", &[("gcp-1", As::Node)]),
        ("onprem", &[("onprem-1", As::MeshNode)]),
    ])
    .unwrap()
}

fn up() -> Mesh {
    let mut mesh = mesh();
    mesh.start_all(&ALL).unwrap();
    mesh
}

/// Waits for a problem of this code that says this, and whether the agent is ready with it.
fn until_problem(mesh: &Mesh, node: &str, code: &str, wanted: &str, ready: bool) -> Duration {
    let began = Instant::now();
    eventually("status tells the problem", || {
        let status = mesh.status(node)?;
        let all = status["problems"].as_array().cloned().unwrap_or_default();
        let found = all.iter().find(|problem| problem["code"] == code);
        let told = found.is_some_and(|problem| problem.to_string().contains(wanted));
        anyhow::ensure!(
            told && status["ready"] == ready,
            "{node}: {} {}",
            status["ready"],
            status["problems"]
        );
        Ok(())
    })
    .unwrap();
    began.elapsed()
}

fn until_ready(mesh: &Mesh, node: &str) {
    eventually("the agent is ready and nothing is wrong", || {
        let status = mesh.status(node)?;
        anyhow::ensure!(
            status["ready"] == true && status["problems"] == json!([]),
            "{node}: {} {} {}",
            status["ready"],
            status["problems"],
            status["errors"]
        );
        Ok(())
    })
    .unwrap();
}

fn policy(name: &str) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": "default"}, "spec": {"podSelector": {}, "policyTypes": ["Ingress"]},
    })
}

#[test]
fn a_restored_cluster_is_heard_again() {
    if !programs::can_run("a_restored_cluster_is_heard_again") {
        return;
    }
    let mut mesh = up();
    let flow = mesh.traffic("aws-1-pod-1", "gcp-1-pod-1").unwrap();
    mesh.cluster_mut().back_up().unwrap();
    mesh.stands(&ALL).unwrap();
    for n in 0..60 {
        mesh.cluster().kubectl(&["label", "node", "aws-1", &format!("a={n}"), "--overwrite"]).unwrap();
    }
    mesh.cluster_mut().restore().unwrap();
    let began = Instant::now();
    mesh.cluster().kubectl(&["delete", "meshnode", "onprem-1"]).unwrap();
    mesh.cluster().apply(&policy("after-the-backup")).unwrap();
    eventually("the deletion and the deny count", || {
        for node in ["aws-1", "gcp-1"] {
            let status = mesh.status(node)?;
            let peers = status["peers"].as_array().map_or(0, Vec::len);
            anyhow::ensure!(
                peers == 1 && status["policy"]["policies"] == 1,
                "{node}: {peers} {}",
                status["policy"]
            );
        }
        Ok(())
    })
    .unwrap();
    println!("a deletion and a deny after a restored backup count after {:?}", began.elapsed());
    mesh.stands(&["aws-1", "gcp-1"]).unwrap();
    until_problem(&mesh, "onprem-1", "own-node-missing", "neither a Node nor a MeshNode", false);
    lossless(flow).unwrap();
}

#[test]
fn dead_connections_are_noticed_soon() {
    if !programs::can_run("dead_connections_are_noticed_soon") {
        return;
    }
    let mesh = up();
    let flow = mesh.traffic("aws-1-pod-1", "gcp-1-pod-1").unwrap();
    let host = mesh.lab.host("aws-1").unwrap();
    let drop_open = "ports=$(ss -Htn state established '( dport = :6443 )' | awk '{n = split($3, a, \":\"); print a[n]}' | paste -sd,)
        [ -n \"$ports\" ] && nft -f - <<EOF
        table inet silence {
          chain out { type filter hook output priority 0; tcp dport 6443 tcp sport { $ports } drop; }
          chain in { type filter hook input priority 0; tcp sport 6443 tcp dport { $ports } drop; }
        }
EOF";
    let dropped = host.command("sh").args(["-c", drop_open]).output(Duration::from_secs(20)).unwrap();
    assert!(dropped.success(), "{}", dropped.stderr_text());
    let began = Instant::now();
    mesh.cluster().kubectl(&["delete", "meshnode", "onprem-1"]).unwrap();
    eventually("the deletion is seen", || {
        let peers = mesh.status("aws-1")?["peers"].as_array().map_or(0, Vec::len);
        anyhow::ensure!(peers == 1, "{peers}");
        Ok(())
    })
    .unwrap();
    println!("a deletion behind dead connections is seen after {:?}", began.elapsed());
    let log = std::fs::read_to_string(host.private_dir().join("agent.log")).unwrap();
    assert!(log.contains("broke"), "it is told");
    lossless(flow).unwrap();
}

#[test]
fn foreign_annotations_are_taken_away_and_named() {
    if !programs::can_run("foreign_annotations_are_taken_away_and_named") {
        return;
    }
    let mesh = up();
    let flow = mesh.traffic("aws-1-pod-1", "gcp-1-pod-1").unwrap();
    for (node, kind) in [("gcp-1", "node"), ("onprem-1", "meshnode")] {
        let began = Instant::now();
        mesh.cluster().kubectl(&["annotate", kind, node, "sennit.dev/wireguard=none"]).unwrap();
        eventually("it is put right", || {
            let annotations = mesh.cluster().get(kind, node)?["metadata"]["annotations"].clone();
            anyhow::ensure!(annotations.get("sennit.dev/wireguard").is_none(), "{annotations}");
            Ok(())
        })
        .unwrap();
        println!("a foreign annotation of {node} is gone after {:?}", began.elapsed());
        until_problem(&mesh, node, "annotation-foreign", "kubectl-annotate", true);
    }
    eventually("an Event names who wrote it", || {
        let events = mesh.cluster().kubectl(&["get", "events.events.k8s.io", "-o", "json"])?;
        anyhow::ensure!(
            events.contains("AnnotationForeign") && events.contains("kubectl-annotate"),
            "{events}"
        );
        Ok(())
    })
    .unwrap();
    mesh.stands(&ALL).unwrap();
    let report = flow.stop(Duration::from_secs(2)).unwrap();
    println!("meanwhile {report:?}");
}

#[test]
fn a_mesh_without_the_own_site_changes_nothing() {
    if !programs::can_run("a_mesh_without_the_own_site_changes_nothing") {
        return;
    }
    let mesh = up();
    let flow = mesh.traffic("aws-1-pod-1", "gcp-1-pod-1").unwrap();
    let other = json!({
        "apiVersion": "sennit.dev/v1alpha1", "kind": "Mesh", "metadata": {"name": "kube-test"},
        "spec": {"sites": [{"name": "other", "prefixes": ["10.232.0.0/16"]}]},
    });
    mesh.cluster().apply(&other).unwrap();
    for node in ALL {
        until_problem(&mesh, node, "mesh-refused", "has no site", false);
    }
    eventually("the Mesh says that it is refused", || {
        let listed = mesh.cluster().kubectl(&["get", "mesh", "kube-test"])?;
        anyhow::ensure!(listed.contains("False"), "{listed}");
        let message = mesh.cluster().get("mesh", "kube-test")?["status"]["conditions"][0]["message"].clone();
        anyhow::ensure!(message.as_str().is_some_and(|message| message.contains("has no site")), "{message}");
        Ok(())
    })
    .unwrap();
    mesh.reaches(&ALL).unwrap();
    let all: Vec<Value> = ["aws", "gcp", "onprem"]
        .iter()
        .map(|site| {
            let hosts = mesh.lab.hosts().iter().filter(|host| host.site() == *site);
            let prefixes: Vec<String> =
                hosts.flat_map(|host| host.pod_prefixes()).map(ToString::to_string).collect();
            json!({"name": site, "prefixes": prefixes})
        })
        .collect();
    let mut good = other.clone();
    good["spec"]["sites"] = json!(all);
    mesh.cluster().apply(&good).unwrap();
    for node in ALL {
        until_ready(&mesh, node);
    }
    eventually("the Mesh says that it is accepted", || {
        let listed = mesh.cluster().kubectl(&["get", "mesh", "kube-test"])?;
        anyhow::ensure!(listed.contains("True"), "{listed}");
        Ok(())
    })
    .unwrap();
    lossless(flow).unwrap();
}

#[test]
fn what_a_mesh_cannot_say_is_refused_by_the_api() {
    if !programs::can_run("what_a_mesh_cannot_say_is_refused_by_the_api") {
        return;
    }
    let mesh = mesh();
    let exempt = |expires: &str| json!({"encryption": {"exemptions": [{"between": [{"node": "a"}], "reason": "old", "expires": expires}]}});
    for (spec, wanted) in [
        (json!({"vxlan": {"port": 4000}, "wireguard": {"listenPort": 4000}}), "port"),
        (json!({"vxlan": {"port": 51820}}), "port"),
        (json!({"wireguard": {"listenPort": 4789}}), "port"),
        (exempt("1820-01-01T00:00:00Z"), "expires"),
        (exempt("2539-01-01T00:00:00Z"), "expires"),
    ] {
        let object = json!({
            "apiVersion": "sennit.dev/v1alpha1", "kind": "Mesh", "metadata": {"name": "bad"}, "spec": spec,
        });
        let refused = mesh.cluster().apply(&object).unwrap_err().to_string();
        assert!(refused.contains(wanted), "{refused}");
    }
    // As many sites as there may be, each with as many prefixes.
    let sites: Vec<Value> = (0..256)
        .map(|n| {
            let prefixes: Vec<String> = (0..32).map(|m| format!("10.{n}.{}.0/24", m * 4)).collect();
            json!({"name": format!("s{n}"), "prefixes": prefixes})
        })
        .collect();
    let object = json!({
        "apiVersion": "sennit.dev/v1alpha1", "kind": "Mesh", "metadata": {"name": "large"}, "spec": {"sites": sites},
    });
    mesh.cluster().apply(&object).unwrap();
    for field in ["mesh.spec", "mesh.spec.sites", "mesh.status.conditions"] {
        let told = mesh.cluster().explain(field).unwrap();
        let (_, after) = told.split_once("DESCRIPTION:").unwrap();
        assert!(!after.trim_start().starts_with("<empty>"), "{field}: {told}");
    }
}

#[test]
fn a_missing_admission_policy_is_told() {
    if !programs::can_run("a_missing_admission_policy_is_told") {
        return;
    }
    let mut mesh = up();
    mesh.cluster().kubectl(&["delete", "validatingadmissionpolicybinding", "sennit-agent"]).unwrap();
    eventually("the API goes by it", || {
        let label = ["label", "node", "aws-1", "a=b", "--dry-run=server"];
        let output = mesh.cluster().kubectl_as("aws-1", &label, "")?;
        anyhow::ensure!(output.success(), "{}", output.stderr_text());
        Ok(())
    })
    .unwrap();
    mesh.kill("aws-1").unwrap();
    mesh.restart("aws-1").unwrap();
    until_problem(&mesh, "aws-1", "admission-policy-missing", "sennit-agent", true);
    let check = ["install-check", "--config", "/run/netlab/private/agent.yaml"];
    let said = mesh.lab.host("gcp-1").unwrap().command(programs::ours("mesh-agent")).args(check);
    let said = said.output(Duration::from_secs(60)).unwrap().stdout_text();
    assert!(said.contains("admission-policy-missing"), "{said}");
    mesh.cluster().kubectl(&["apply", "--server-side", "-k", &deployment("kubernetes/base")]).unwrap();
    until_ready(&mesh, "aws-1");
}

#[test]
fn agents_reach_the_api_through_proxies() {
    if !programs::can_run("agents_reach_the_api_through_proxies") {
        return;
    }
    let mut mesh = mesh();
    let address = mesh.cluster().address();
    let proxy = Proxy::start(mesh.cluster().host(), SocketAddr::new(address, 3128)).unwrap();
    for node in ALL {
        let credentials = mesh.credentials(node).unwrap();
        mesh.configure(node, &credentials).unwrap();
    }
    let (through, nowhere) = (format!("http://{}", proxy.address), "http://192.0.2.1:9");
    let direct = "nft add table inet d; nft 'add chain inet d o { type filter hook output priority 0; }'; nft add rule inet d o tcp dport 6443 drop";
    let host = mesh.lab.host("aws-1").unwrap();
    assert!(host.command("sh").args(["-c", direct]).output(Duration::from_secs(20)).unwrap().success());
    mesh.restart_with("aws-1", &[("HTTPS_PROXY", &through)]).unwrap();
    let exempt = format!("10.99.0.0/16,{address}");
    mesh.restart_with("gcp-1", &[("https_proxy", nowhere), ("no_proxy", &exempt)]).unwrap();
    mesh.restart_with("onprem-1", &[("HTTPS_PROXY", "no proxy at all")]).unwrap();
    mesh.stands(&ALL).unwrap();
    assert!(proxy.connections() > 0);
    mesh.reaches(&ALL).unwrap();
    // A proxy that is not there is told, and ends nobody.
    mesh.kill("gcp-1").unwrap();
    mesh.restart_with("gcp-1", &[("HTTPS_PROXY", "http://127.0.0.1:9")]).unwrap();
    eventually("it is told", || {
        let status = mesh.status("gcp-1")?;
        anyhow::ensure!(
            status["ready"] == false && status["errors"].to_string().contains("API server"),
            "{status}"
        );
        Ok(())
    })
    .unwrap();
    assert!(mesh.runs("gcp-1"));
}

#[test]
fn a_node_that_the_api_refuses_is_not_ready() {
    if !programs::can_run("a_node_that_the_api_refuses_is_not_ready") {
        return;
    }
    let mut mesh = up();
    let flow = mesh.traffic("aws-1-pod-1", "onprem-1-pod-1").unwrap();
    // A token that is no longer good while the agent runs, and its successor.
    let good = mesh.cluster().token(Bound::Node("aws-1")).unwrap();
    mesh.cluster().kubeconfig("aws-1", "no token at all").unwrap();
    let took = until_problem(&mesh, "aws-1", "registry-refuses", "(401)", false);
    println!("a bad token is told after {took:?}");
    let began = Instant::now();
    mesh.cluster().kubeconfig("aws-1", &good).unwrap();
    until_ready(&mesh, "aws-1");
    println!("a good token counts after {:?}", began.elapsed());
    // A right that is missing from the start.
    let role = mesh.cluster().get("clusterrole", "sennit-agent").unwrap();
    let mut less = role.clone();
    let nodes =
        less["rules"].as_array_mut().unwrap().iter_mut().find(|rule| rule["resources"] == json!(["nodes"]));
    nodes.unwrap()["verbs"] = json!(["get", "list", "patch"]);
    let rules = |role: &Value| json!({"rules": role["rules"]}).to_string();
    mesh.cluster()
        .kubectl(&["patch", "clusterrole", "sennit-agent", "--type=merge", "-p", &rules(&less)])
        .unwrap();
    mesh.kill("gcp-1").unwrap();
    mesh.restart("gcp-1").unwrap();
    until_problem(&mesh, "gcp-1", "registry-refuses", "(403)", false);
    mesh.cluster()
        .kubectl(&["patch", "clusterrole", "sennit-agent", "--type=merge", "-p", &rules(&role)])
        .unwrap();
    until_ready(&mesh, "gcp-1");
    // Its own Node is deleted.
    mesh.cluster().kubectl(&["delete", "node", "gcp-1"]).unwrap();
    until_problem(&mesh, "gcp-1", "own-node-missing", "register it again", false);
    mesh.register("gcp-1").unwrap();
    mesh.kill("gcp-1").unwrap();
    mesh.start("gcp-1").unwrap();
    until_ready(&mesh, "gcp-1");
    lossless(flow).unwrap();
}

#[test]
fn a_credential_plugin_may_come_later() {
    if !programs::can_run("a_credential_plugin_may_come_later") {
        return;
    }
    let mut mesh = mesh();
    let private = mesh.lab.host("aws-1").unwrap().private_dir().to_owned();
    let user = json!({"exec": {
        "apiVersion": "client.authentication.k8s.io/v1", "command": "/run/netlab/private/plugin", "interactiveMode": "Never",
    }});
    let server = mesh.cluster().server();
    let kubeconfig = mesh.cluster().kubeconfig_for("plugged", &server, &user).unwrap();
    mesh.start_with("aws-1", &kubeconfig).unwrap();
    eventually("it is told", || {
        let status = mesh.status("aws-1")?;
        anyhow::ensure!(status["errors"].to_string().contains("auth exec"), "{}", status["errors"]);
        Ok(())
    })
    .unwrap();
    assert!(mesh.runs("aws-1"));
    let token = mesh.cluster().token(Bound::Node("aws-1")).unwrap();
    let answer = json!({
        "apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": token},
    });
    let new = private.join("plugin.new");
    std::fs::write(&new, format!("#!/bin/sh\ncat <<'EOF'\n{answer}\nEOF\n")).unwrap();
    std::fs::set_permissions(&new, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::rename(&new, private.join("plugin")).unwrap();
    until_ready(&mesh, "aws-1");
}

#[test]
fn an_api_that_is_far_away_is_reached() {
    if !programs::can_run("an_api_that_is_far_away_is_reached") {
        return;
    }
    let mut mesh = mesh();
    let host = mesh.lab.host("aws-1").unwrap();
    let (near, api) =
        (SocketAddr::from(([127, 0, 0, 1], 7443)), SocketAddr::new(mesh.cluster().address(), 6443));
    delay(host, near, api, Duration::from_millis(2500)).unwrap();
    let token = mesh.cluster().token(Bound::Node("aws-1")).unwrap();
    let user = json!({"token": token});
    let kubeconfig = mesh.cluster().kubeconfig_for("far", &format!("https://{near}"), &user).unwrap();
    mesh.start("gcp-1").unwrap();
    mesh.start_with("aws-1", &kubeconfig).unwrap();
    let began = Instant::now();
    mesh.stands(&["aws-1", "gcp-1"]).unwrap();
    println!("with round trips of 5 s the mesh stands after {:?}", began.elapsed());
}
