//! What goes wrong around a mesh that registers with an API: nobody loses more than the one it concerns.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use kube_tests::mesh::{As, Mesh, lossless};
use kube_tests::{eventually, programs};
use netlab::{Direction, Ports, Protocol, Rule};
use serde_json::json;

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

/// The same, whose agents find out themselves where they are dialled.
fn derived() -> Mesh {
    let mut mesh = mesh();
    mesh.derived = true;
    // An agent asks again for a kind that the cluster does not know, by a connection that a test may need.
    mesh.cluster().serve_cluster_policies().unwrap();
    mesh.start_all(&ALL).unwrap();
    mesh
}

fn until_status(mesh: &Mesh, node: &str, field: &str, wanted: &str) {
    eventually("status tells it", || {
        let found = mesh.status(node)?[field].to_string();
        anyhow::ensure!(found.contains(wanted), "{node}: {field}: {found}");
        Ok(())
    })
    .unwrap();
}

fn mesh_object(spec: &serde_json::Value) -> serde_json::Value {
    json!({"apiVersion": "sennit.dev/v1alpha1", "kind": "Mesh", "metadata": {"name": "kube-test"}, "spec": spec})
}

#[test]
fn a_mesh_object_is_the_operators_word_for_all_nodes() {
    if !programs::can_run("a_mesh_object_is_the_operators_word_for_all_nodes") {
        return;
    }
    let mut mesh = up();
    let flow = mesh.traffic("aws-1-pod-1", "gcp-1-pod-1").unwrap();
    let sites: Vec<_> = ["aws", "gcp", "onprem"]
        .iter()
        .map(|site| {
            let hosts = mesh.lab.hosts().iter().filter(|host| host.site() == *site);
            let prefixes: Vec<String> =
                hosts.flat_map(|host| host.pod_prefixes()).map(ToString::to_string).collect();
            json!({"name": site, "prefixes": prefixes})
        })
        .collect();
    // What cannot be is refused by the API already.
    for bad in [
        json!({"sites": [{"name": "aws", "prefixes": ["0.0.0.0/0"]}]}),
        json!({"sites": [{"name": "aws", "prefixes": ["10.1.2.3/16"]}]}),
        json!({"encryption": {"mode": "off"}}),
        json!({"protectedAddresses": ["nowhere"]}),
        json!({"wireguard": {"listenPort": 0}}),
    ] {
        mesh.cluster().apply(&mesh_object(&bad)).unwrap_err();
    }
    mesh.cluster().apply(&mesh_object(&json!({"sites": sites}))).unwrap();
    let listed = mesh.cluster().kubectl(&["get", "meshes"]).unwrap();
    assert!(listed.contains("required"), "{listed}");
    mesh.stands(&ALL).unwrap();
    // One site less: its node holds nothing any more. The others go on.
    mesh.cluster().apply(&mesh_object(&json!({"sites": sites[..2]}))).unwrap();
    until_status(&mesh, "aws-1", "refused", "onprem-1");
    until_status(&mesh, "onprem-1", "refused", "has no site onprem");
    // What it says and is told does not go by the underlay instead.
    let captures = mesh.watch().unwrap();
    let silent = mesh.reaches(&ALL).unwrap_err().to_string();
    assert!(
        silent.contains("aws-1-pod-1 -> 10.3.1.10") && !silent.contains("aws-1-pod-1 -> 10.2.1.10"),
        "{silent}"
    );
    for capture in captures {
        let report = capture.stop().unwrap();
        assert!(report.is_clean(), "{report:?}");
    }
    // A word that the API lets through, and that makes no sense, changes nothing; also not for an agent that starts.
    let overlapping = json!([sites[0], {"name": "gcp", "prefixes": sites[0]["prefixes"]}]);
    mesh.cluster().apply(&mesh_object(&json!({"sites": overlapping}))).unwrap();
    until_status(&mesh, "aws-1", "refused", "overlaps");
    mesh.kill("gcp-1").unwrap();
    mesh.restart("gcp-1").unwrap();
    until_status(&mesh, "gcp-1", "refused", "what it said before stays in force");
    mesh.reaches(&ALL[..2]).unwrap();
    mesh.cluster().apply(&mesh_object(&json!({"sites": sites}))).unwrap();
    eventually("the host holds its prefixes again", || mesh.reaches(&ALL)).unwrap();
    mesh.stands(&ALL).unwrap();
    lossless(flow).unwrap();
}

#[test]
fn a_port_that_changes_for_all_is_dialled_by_all_also_where_nobody_speaks() {
    if !programs::can_run("a_port_that_changes_for_all_is_dialled_by_all_also_where_nobody_speaks") {
        return;
    }
    let mesh = derived();
    let ports = |mesh: &Mesh, wanted: &str| {
        eventually("every device listens there and dials the others there", || {
            for node in ALL {
                let ask = |what: &str| {
                    let asked = mesh.lab.host(node)?.command("wg").args(["show", "sennit0", what]);
                    anyhow::Ok(asked.output(std::time::Duration::from_secs(20))?.stdout_text())
                };
                let (port, endpoints) = (ask("listen-port")?, ask("endpoints")?);
                let all = endpoints.lines().all(|line| line.ends_with(&format!(":{wanted}")));
                anyhow::ensure!(port.trim() == wanted && all, "{node}: {port}: {endpoints}");
            }
            Ok(())
        })
        .unwrap();
    };
    ports(&mesh, "51820");
    // Without keepalives an idle pair would never find out by itself.
    mesh.cluster().apply(&mesh_object(&json!({"wireguard": {"persistentKeepalive": 0}}))).unwrap();
    let quiet = json!({"wireguard": {"persistentKeepalive": 0, "listenPort": 51999}});
    mesh.cluster().apply(&mesh_object(&quiet)).unwrap();
    ports(&mesh, "51999");
    mesh.reaches(&ALL).unwrap();
    mesh.cluster().kubectl(&["delete", "mesh", "kube-test"]).unwrap();
    until_status(&mesh, "aws-1", "refused", "Mesh kube-test is gone");
    mesh.reaches(&ALL).unwrap();
}

#[test]
fn a_node_whose_address_changes_is_followed() {
    if !programs::can_run("a_node_whose_address_changes_is_followed") {
        return;
    }
    let mesh = derived();
    let others = mesh.traffic("aws-1-pod-1", "onprem-1-pod-1").unwrap();
    let host = mesh.lab.host("gcp-1").unwrap();
    let old = host.addresses().iter().find(|address| address.is_ipv4()).unwrap().to_string();
    let new = old.rsplit_once('.').unwrap().0.to_owned() + ".99";
    let gateway = old.rsplit_once('.').unwrap().0.to_owned() + ".1";
    host.ip(&format!(
        "addr del {old}/24 dev eth0\naddr add {new}/24 dev eth0\nroute replace default via {gateway} dev eth0\n"
    ))
    .unwrap();
    eventually("the new address is published and dialled", || {
        let annotations = mesh.cluster().get("node", "gcp-1")?["metadata"]["annotations"].clone();
        let endpoints = annotations["sennit.dev/endpoints"].as_str().unwrap_or_default().to_owned();
        anyhow::ensure!(endpoints.contains(&new) && !endpoints.contains(&old), "{endpoints}");
        for node in ["aws-1", "onprem-1"] {
            let status = mesh.status(node)?;
            let peers = status["peers"].as_array().unwrap().clone();
            let peer = peers.iter().find(|peer| peer["name"] == "gcp-1").unwrap();
            let endpoint = peer["endpoint"].as_str().unwrap_or_default();
            anyhow::ensure!(
                peer["state"] == "established" && !endpoint.starts_with(&format!("{old}:")),
                "{node}: {peer}"
            );
        }
        Ok(())
    })
    .unwrap();
    mesh.reaches(&ALL).unwrap();
    lossless(others).unwrap();
}

#[test]
fn a_write_whose_answer_is_lost_is_done_once_and_told() {
    if !programs::can_run("a_write_whose_answer_is_lost_is_done_once_and_told") {
        return;
    }
    let mesh = derived();
    let flow = mesh.traffic("aws-1-pod-1", "gcp-1-pod-1").unwrap();
    let host = mesh.lab.host("aws-1").unwrap().clone();
    let mtu = |mesh: &Mesh| {
        let node = mesh.cluster().get("node", "aws-1")?;
        anyhow::Ok(node["metadata"]["annotations"]["sennit.dev/mtu"].as_str().unwrap_or_default().to_owned())
    };
    let until_mtu = |mesh: &Mesh, wanted: &str| {
        eventually("the write arrives", || {
            let mtu = mtu(mesh)?;
            anyhow::ensure!(mtu == wanted, "{mtu}");
            Ok(())
        })
        .unwrap();
    };
    // So that there is a connection that has just been used and will be used again.
    mesh.cluster().kubectl(&["annotate", "node", "aws-1", "--overwrite", "sennit.dev/mtu=garbage"]).unwrap();
    until_mtu(&mesh, "1500");
    // Requests go, answers do not come.
    let answers = Rule {
        protocol: Some(Protocol::Tcp),
        ports: Some(Ports::Source(6443, 6443)),
        direction: Direction::In,
        ..Rule::any()
    };
    // A question of the agent's own may just have taken the connection; then the write has none, and it is tried again.
    let (cut, written) = [1480, 1472, 1464, 1456, 1448]
        .into_iter()
        .find_map(|wanted| {
            let cut = host.block(answers.clone()).unwrap();
            host.ip(&format!("link set eth0 mtu {wanted}\n")).unwrap();
            let (deadline, wanted) = (Instant::now() + Duration::from_secs(10), wanted.to_string());
            while Instant::now() < deadline {
                if mtu(&mesh).unwrap() == wanted {
                    return Some((cut, wanted));
                }
            }
            host.unblock(cut).unwrap();
            until_mtu(&mesh, &wanted);
            None
        })
        .expect("no write without an answer arrives");
    until_status(&mesh, "aws-1", "errors", "previous publication stays in force");
    host.unblock(cut).unwrap();
    eventually("nothing is amiss any more", || {
        let status = mesh.status("aws-1")?;
        anyhow::ensure!(
            status["errors"] == serde_json::json!([]) && status["ready"] == true,
            "{}",
            status["errors"]
        );
        Ok(())
    })
    .unwrap();
    assert_eq!(mtu(&mesh).unwrap(), written);
    mesh.stands(&ALL).unwrap();
    mesh.reaches(&ALL).unwrap();
    lossless(flow).unwrap();
}

#[test]
fn a_cluster_with_kinds_of_another_version_keeps_whom_it_had() {
    if !programs::can_run("a_cluster_with_kinds_of_another_version_keeps_whom_it_had") {
        return;
    }
    let mut mesh = up();
    let flow = mesh.traffic("aws-1-pod-1", "onprem-1-pod-1").unwrap();
    mesh.cluster().serve_mesh_nodes(false).unwrap();
    until_status(&mesh, "aws-1", "errors", "does not know the kind MeshNode");
    // One that starts now does not take the host for gone, which it has never seen itself.
    mesh.kill("aws-1").unwrap();
    mesh.restart("aws-1").unwrap();
    until_status(&mesh, "aws-1", "errors", "apply the CRDs of deploy/kubernetes/base again");
    mesh.reaches(&ALL).unwrap();
    mesh.cluster().serve_mesh_nodes(true).unwrap();
    mesh.stands(&ALL).unwrap();
    lossless(flow).unwrap();
}

#[test]
fn clocks_that_are_hours_off_make_no_difference() {
    if !programs::can_run_with("clocks_that_are_hours_off_make_no_difference", &["libfaketimeMT.so.1"]) {
        return;
    }
    let mut mesh = mesh();
    mesh.start("aws-1").unwrap();
    for (node, offset) in [("gcp-1", "+5h"), ("onprem-1", "-9h")] {
        let credentials = mesh.credentials(node).unwrap();
        mesh.configure(node, &credentials).unwrap();
        mesh.restart_at(node, offset).unwrap();
    }
    mesh.stands(&ALL).unwrap();
    mesh.reaches(&ALL).unwrap();
    let observed = mesh.status("gcp-1").unwrap()["observedAt"].to_string();
    assert_ne!(
        observed[..14],
        mesh.status("aws-1").unwrap()["observedAt"].to_string()[..14],
        "the clock is not off"
    );
    // Somebody sets it right: agent and device see time run backwards. Who knows later handshakes of it takes its earlier
    // ones for replays (WireGuard, 5.4.2), but makes some of its own as soon as there is something to send.
    mesh.kill("gcp-1").unwrap();
    mesh.lab.host("gcp-1").unwrap().ip("link del sennit0\n").unwrap();
    mesh.restart("gcp-1").unwrap();
    eventually("traffic brings the tunnels back", || mesh.reaches(&ALL)).unwrap();
    mesh.stands(&ALL).unwrap();
}
