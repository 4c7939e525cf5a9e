//! Agents that register with a real API server become one mesh, and stay one whatever happens to the API.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use kube_tests::mesh::{As, Mesh, lossless};
use kube_tests::{eventually, programs};
use mesh_keyring::PrivateKey;
use serde_json::{Value, json};

const ALL: [&str; 4] = ["aws-1", "aws-2", "gcp-1", "onprem-1"];

fn mesh() -> Mesh {
    Mesh::new(&[
        ("aws", &[("aws-1", As::Node), ("aws-2", As::Granted)]),
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

fn annotations(mesh: &Mesh, kind: &str, name: &str) -> Value {
    mesh.cluster().get(kind, name).unwrap()["metadata"]["annotations"].clone()
}

#[test]
fn nodes_and_hosts_publish_keys_and_become_one_encrypted_mesh() {
    if !programs::can_run("nodes_and_hosts_publish_keys_and_become_one_encrypted_mesh") {
        return;
    }
    let mesh = mesh();
    let captures = mesh.watch().unwrap();
    let mut mesh = mesh;
    for node in ALL {
        mesh.start(node).unwrap();
    }
    mesh.stands(&ALL).unwrap();
    // Four nodes of two pods: 48 pairs, over both families.
    assert_eq!(mesh.reaches(&ALL).unwrap(), 96);
    for capture in captures {
        let report = capture.stop().unwrap();
        assert!(report.is_clean(), "{report:?}");
    }
    for (kind, node) in [("node", "aws-1"), ("node", "aws-2"), ("node", "gcp-1"), ("meshnode", "onprem-1")] {
        let annotations = annotations(&mesh, kind, node);
        let status = mesh.status(node).unwrap();
        assert_eq!(annotations["sennit.dev/public-key"], status["publicKey"], "{node}");
        assert_eq!(annotations["sennit.dev/site"], mesh.lab.host(node).unwrap().site());
    }
    assert_eq!(annotations(&mesh, "meshnode", "aws-2"), Value::Null, "what a Node says is in the Node");
    let described = mesh.cluster().kubectl(&["describe", "node", "aws-1"]).unwrap();
    assert!(described.contains("sennit.dev/public-key"), "{described}");
    let owner =
        mesh.cluster().kubectl(&["get", "node", "aws-1", "-o", "yaml", "--show-managed-fields"]).unwrap();
    assert!(owner.contains("manager: sennit-agent") && owner.contains("operation: Apply"), "{owner}");
}

#[test]
fn without_the_api_server_no_packet_is_lost_and_agents_restart_from_what_they_knew() {
    if !programs::can_run("without_the_api_server_no_packet_is_lost_and_agents_restart_from_what_they_knew") {
        return;
    }
    let mut mesh = up();
    let flows = [
        mesh.traffic("aws-1-pod-1", "gcp-1-pod-1").unwrap(),
        mesh.traffic("onprem-1-pod-1", "aws-2-pod-1").unwrap(),
    ];
    mesh.cluster_mut().stop_api().unwrap();
    eventually("status tells that the API is away", || {
        let status = mesh.status("aws-1")?;
        let told = status["errors"].to_string();
        anyhow::ensure!(told.contains("API server") && told.contains("last good state"), "{told}");
        Ok(())
    })
    .unwrap();
    // One agent dies meanwhile, and one device is made anew from what its agent remembers.
    mesh.kill("gcp-1").unwrap();
    mesh.restart("gcp-1").unwrap();
    eventually("the restarted agent has its peers", || {
        let status = mesh.status("gcp-1")?;
        anyhow::ensure!(
            status["peers"].as_array().is_some_and(|peers| peers.len() == 3),
            "{}",
            status["peers"]
        );
        anyhow::ensure!(status["synced"] == false && status["ready"] == false, "{status}");
        Ok(())
    })
    .unwrap();
    mesh.reaches(&ALL).unwrap();
    mesh.cluster_mut().start_api().unwrap();
    mesh.stands(&ALL).unwrap();
    // A server that has just started refuses everybody for a moment.
    eventually("nobody misses anything any more", || {
        for node in ALL {
            let errors = mesh.status(node)?["errors"].to_string();
            anyhow::ensure!(errors == "[]", "{node}: {errors}");
        }
        Ok(())
    })
    .unwrap();
    flows.into_iter().for_each(|flow| lossless(flow).unwrap());
}

#[test]
fn a_deleted_node_is_nobodys_peer_and_comes_back_with_a_new_key() {
    if !programs::can_run("a_deleted_node_is_nobodys_peer_and_comes_back_with_a_new_key") {
        return;
    }
    let mut mesh = up();
    let flow = mesh.traffic("aws-1-pod-1", "onprem-1-pod-1").unwrap();
    let key = annotations(&mesh, "node", "gcp-1")["sennit.dev/public-key"].clone();
    mesh.kill("gcp-1").unwrap();
    mesh.agent("gcp-1", &["cleanup", "--config", "/run/netlab/private/agent.yaml"]).unwrap();
    assert_eq!(annotations(&mesh, "node", "gcp-1"), Value::Null, "cleanup takes the annotations away");
    mesh.cluster().kubectl(&["delete", "node", "gcp-1"]).unwrap();
    mesh.stands(&["aws-1", "aws-2", "onprem-1"]).unwrap();
    mesh.register("gcp-1").unwrap();
    mesh.start("gcp-1").unwrap();
    mesh.stands(&ALL).unwrap();
    assert_ne!(annotations(&mesh, "node", "gcp-1")["sennit.dev/public-key"], key);
    mesh.reaches(&ALL).unwrap();
    lossless(flow).unwrap();
}

#[test]
fn annotations_edited_by_hand_are_put_right_and_a_copied_key_takes_nothing() {
    if !programs::can_run("annotations_edited_by_hand_are_put_right_and_a_copied_key_takes_nothing") {
        return;
    }
    let mesh = up();
    let flow = mesh.traffic("aws-1-pod-1", "gcp-1-pod-1").unwrap();
    let key = annotations(&mesh, "node", "aws-1")["sennit.dev/public-key"].clone();
    mesh.cluster()
        .kubectl(&[
            "annotate",
            "node",
            "aws-1",
            "--overwrite",
            "sennit.dev/public-key=garbage",
            "sennit.dev/mtu-",
        ])
        .unwrap();
    eventually("the agent applies its annotations again", || {
        let now = annotations(&mesh, "node", "aws-1");
        anyhow::ensure!(now["sennit.dev/public-key"] == key && now["sennit.dev/mtu"].is_string(), "{now}");
        Ok(())
    })
    .unwrap();
    // A node that nobody runs, with the key of another.
    let thief = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "thief", "labels": {"sennit.dev.node-restriction.kubernetes.io/site": "gcp"}, "annotations": {
            "sennit.dev/public-key": key, "sennit.dev/epoch": "1", "sennit.dev/site": "gcp",
        }},
        "spec": {"podCIDR": "10.200.0.0/24", "podCIDRs": ["10.200.0.0/24"]},
    });
    mesh.cluster().apply(&thief).unwrap();
    eventually("everybody refuses the copied key", || {
        for node in ["aws-2", "gcp-1", "onprem-1"] {
            let refused = mesh.status(node)?["refused"].to_string();
            anyhow::ensure!(refused.contains("thief") && refused.contains("public-key"), "{node}: {refused}");
        }
        Ok(())
    })
    .unwrap();
    mesh.stands(&ALL).unwrap();
    mesh.reaches(&ALL).unwrap();
    lossless(flow).unwrap();
}

#[test]
fn nothing_is_written_where_nothing_changed() {
    if !programs::can_run("nothing_is_written_where_nothing_changed") {
        return;
    }
    let mesh = up();
    // The last thing that a node has to tell once peers answer.
    eventually("all have told their paths", || {
        for node in ["aws-1", "aws-2", "gcp-1"] {
            let told = annotations(&mesh, "node", node);
            anyhow::ensure!(told["sennit.dev/path"] == "direct", "{node}: {told}");
        }
        Ok(())
    })
    .unwrap();
    let version = |node| mesh.cluster().get("node", node).unwrap()["metadata"]["resourceVersion"].clone();
    let before = ["aws-1", "aws-2", "gcp-1"].map(version);
    // A label of somebody else's wakes nobody; one of ours is looked at.
    mesh.cluster().kubectl(&["label", "node", "aws-2", "color=red"]).unwrap();
    let changed = version("aws-2");
    eventually("a pass or two", || {
        let status = mesh.status("aws-1")?;
        anyhow::ensure!(status["changes"][0] == 0, "{}", status["changes"]);
        Ok(())
    })
    .unwrap();
    assert_eq!(["aws-1", "gcp-1"].map(version), [before[0].clone(), before[2].clone()]);
    assert_eq!(version("aws-2"), changed);
}

#[test]
fn a_host_joins_with_a_token_for_its_own_annotations_alone() {
    if !programs::can_run("a_host_joins_with_a_token_for_its_own_annotations_alone") {
        return;
    }
    let mut mesh =
        Mesh::new(&[("aws", &[("aws-1", As::Node)]), ("onprem", &[("onprem-1", As::Unknown)])]).unwrap();
    mesh.start("aws-1").unwrap();
    let host = mesh.lab.host("onprem-1").unwrap().clone();
    let prefixes: Vec<String> = host.pod_prefixes().iter().map(ToString::to_string).collect();
    let admin = mesh.cluster().admin();
    let directory = "/run/netlab/private/etc";
    let join = |cidrs: &[&str]| {
        let mut args = vec!["join", "--kubeconfig", &admin, "--mesh", "kube-test", "--site", "onprem"];
        args.extend(["--node", "onprem-1", "--directory", directory]);
        args.extend(cidrs.iter().flat_map(|cidr| ["--pod-cidr", *cidr]));
        mesh.agent("onprem-1", &args)
    };
    let refused = join(&["0.0.0.0/0"]).unwrap_err().to_string();
    assert!(refused.contains("--pod-cidr 0.0.0.0/0"), "{refused}");
    let said = join(&prefixes.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    assert!(said.contains("MeshNode onprem-1 is registered for site onprem"), "{said}");
    assert!(!said.contains("kubectl label"), "{said}");
    // A Node that lost its label is named at once, with its own site.
    let label = "sennit.dev.node-restriction.kubernetes.io/site";
    mesh.cluster().kubectl(&["label", "node", "aws-1", &format!("{label}-")]).unwrap();
    // Its agent says where it stands.
    eventually("aws-1 has published", || {
        let node = mesh.cluster().get("node", "aws-1")?;
        anyhow::ensure!(node["metadata"]["annotations"]["sennit.dev/site"] == "aws", "{}", node["metadata"]);
        Ok(())
    })
    .unwrap();
    // Renewed without a word on prefixes: they stay.
    let said = join(&[]).unwrap();
    assert!(said.contains(&format!("kubectl label node aws-1 {label}=aws")), "{said}");
    mesh.cluster().kubectl(&["label", "node", "aws-1", &format!("{label}=aws")]).unwrap();
    assert_eq!(
        mesh.cluster().get("meshnode", "onprem-1").unwrap()["spec"]["podCIDRs"].as_array().unwrap().len(),
        prefixes.len()
    );
    let etc = host.private_dir().join("etc");
    for secret in ["token", "kubeconfig"] {
        use std::os::unix::fs::PermissionsExt as _;
        assert_eq!(
            std::fs::metadata(etc.join(secret)).unwrap().permissions().mode() & 0o777,
            0o600,
            "{secret}"
        );
    }
    let configuration = std::fs::read_to_string(etc.join("agent.yaml")).unwrap();
    assert!(configuration.contains("node: onprem-1\nsite: onprem\nmesh: kube-test"), "{configuration}");
    mesh.start_with("onprem-1", format!("{directory}/kubeconfig").as_ref()).unwrap();
    let both = ["aws-1", "onprem-1"];
    mesh.stands(&both).unwrap();
    mesh.reaches(&both).unwrap();
    let token = std::fs::read_to_string(etc.join("token")).unwrap();
    mesh.cluster().kubeconfig("joined", &token).unwrap();
    for target in ["node/aws-1", "meshnode/aws-1", "meshnode/onprem-1"] {
        let output = mesh
            .cluster()
            .kubectl_as("joined", &["annotate", target, "--overwrite", "sennit.dev/probe=1"], "")
            .unwrap();
        assert_eq!(output.success(), target == "meshnode/onprem-1", "{target}: {}", output.stderr_text());
    }
}

/// Nodes that nobody runs: with keys, but without endpoints, so that nobody dials them.
fn strangers(kind: As, numbers: std::ops::Range<u32>) -> Value {
    let stranger = |n: u32| {
        let mut secret = [9; 32];
        // Not in the first byte, whose lowest bits are cleared.
        secret[1..5].copy_from_slice(&n.to_le_bytes());
        let key = PrivateKey::from_bytes(&secret).unwrap().public().to_string();
        let cidr = format!("10.{}.{}.0/26", 100 + n / 1024, (n / 4) % 256);
        let cidr = cidr.replace(".0/26", &format!(".{}/26", (n % 4) * 64));
        let metadata = json!({"name": format!("stranger-{n}"), "labels": {"sennit.dev.node-restriction.kubernetes.io/site": "far"}, "annotations": {
            "sennit.dev/public-key": key, "sennit.dev/epoch": "1", "sennit.dev/site": "far",
        }});
        match kind {
            As::Node => {
                json!({"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": {"podCIDR": cidr, "podCIDRs": [cidr]}})
            }
            _ => {
                json!({"apiVersion": "sennit.dev/v1alpha1", "kind": "MeshNode", "metadata": metadata, "spec": {"site": "far", "podCIDRs": [cidr]}})
            }
        }
    };
    json!({"apiVersion": "v1", "kind": "List", "items": numbers.map(stranger).collect::<Vec<_>>()})
}

/// All that an agent keeps in the kernel, but for counters and what changes by itself.
fn host_state(mesh: &Mesh, node: &str) -> String {
    let host = mesh.lab.host(node).unwrap();
    let commands = [
        "wg show sennit0 allowed-ips | sort",
        "ip route show table all proto 82 | sort",
        "ip -6 route show table all proto 82 | sort",
        "ip rule",
        // Which of its two slots the guard is in depends on how many changes came together.
        "nft -s list table inet sennit | grep -v counter | sed -E 's/_[ab] / /'",
    ];
    let run = |command: &&str| {
        let output = host.command("sh").args(["-c", command]).output(Duration::from_secs(20)).unwrap();
        format!("{command}\n{}", output.stdout_text())
    };
    commands.iter().map(run).collect()
}

fn peers(mesh: &Mesh, node: &str) -> anyhow::Result<usize> {
    let text = mesh
        .lab
        .host(node)?
        .command("wg")
        .args(["show", "sennit0", "peers"])
        .output(Duration::from_secs(20))?
        .stdout_text();
    Ok(text.lines().count())
}

fn until_peers(mesh: &Mesh, node: &str, wanted: usize) {
    eventually("peers in the device", || {
        let found = peers(mesh, node)?;
        anyhow::ensure!(
            found == wanted,
            "{node} has {found} peers instead of {wanted}: {}",
            mesh.status(node)?["errors"]
        );
        Ok(())
    })
    .unwrap();
}

#[test]
fn fifty_nodes_that_come_and_go_leave_nothing_behind() {
    if !programs::can_run("fifty_nodes_that_come_and_go_leave_nothing_behind") {
        return;
    }
    let mesh = up();
    let flow = mesh.traffic("aws-1-pod-1", "gcp-1-pod-1").unwrap();
    let before = host_state(&mesh, "aws-1");
    for _ in 0..2 {
        mesh.cluster().apply(&strangers(As::Node, 0..50)).unwrap();
        until_peers(&mesh, "aws-1", 53);
        assert_ne!(host_state(&mesh, "aws-1"), before);
        let names: Vec<String> = (0..50).map(|n| format!("stranger-{n}")).collect();
        let args: Vec<&str> =
            ["delete", "node"].into_iter().chain(names.iter().map(String::as_str)).collect();
        mesh.cluster().kubectl(&args).unwrap();
        until_peers(&mesh, "aws-1", 3);
        // Their pods may run on: nothing goes there in clear until the operator says so.
        eventually("what they held stays guarded", || {
            let kept = mesh.status("aws-1")?["guard"]["kept"].as_array().map_or(0, Vec::len);
            anyhow::ensure!(kept == 50, "{kept}");
            Ok(())
        })
        .unwrap();
        let release = ["guard", "release", "--config", "/run/netlab/private/agent.yaml"];
        let release: Vec<&str> = release.into_iter().chain(names.iter().map(String::as_str)).collect();
        mesh.agent("aws-1", &release).unwrap();
        eventually("the host is as it was", || {
            let now = host_state(&mesh, "aws-1");
            anyhow::ensure!(now == before, "before:\n{before}\nnow:\n{now}");
            Ok(())
        })
        .unwrap();
    }
    lossless(flow).unwrap();
}

#[test]
fn five_thousand_mesh_nodes_harm_nobody() {
    if !programs::can_run("five_thousand_mesh_nodes_harm_nobody") {
        return;
    }
    let mesh = up();
    let flow = mesh.traffic("aws-1-pod-1", "gcp-1-pod-1").unwrap();
    for thousand in 0..5 {
        mesh.cluster().apply(&strangers(As::MeshNode, thousand * 1000..(thousand + 1) * 1000)).unwrap();
    }
    for node in ["aws-1", "gcp-1"] {
        until_peers(&mesh, node, 5003);
    }
    let rss = |program: &str| {
        let script = format!("grep VmRSS /proc/$(pgrep -x {program} | head -n 1)/status");
        let host = mesh.lab.host("aws-1").unwrap();
        host.command("sh").args(["-c", &script]).output(Duration::from_secs(20)).unwrap().stdout_text()
    };
    println!("with 5,000 MeshNodes: mesh-agent {}mesh-wg {}", rss("mesh-agent"), rss("mesh-wg"));
    mesh.reaches(&ALL).unwrap();
    lossless(flow).unwrap();
}

#[test]
fn a_token_that_is_no_longer_good_costs_nothing_and_its_successor_is_taken_up() {
    if !programs::can_run("a_token_that_is_no_longer_good_costs_nothing_and_its_successor_is_taken_up") {
        return;
    }
    let mesh = up();
    let flow = mesh.traffic("aws-1-pod-1", "gcp-1-pod-1").unwrap();
    let good = mesh.cluster().token(kube_tests::cluster::Bound::Node("gcp-1")).unwrap();
    mesh.cluster().kubeconfig("gcp-1", "no token at all").unwrap();
    // What is open goes on until the server ends it; a restart asks anew.
    let mut mesh = mesh;
    mesh.kill("gcp-1").unwrap();
    mesh.restart("gcp-1").unwrap();
    eventually("status says that the API refuses us", || {
        let status = mesh.status("gcp-1")?;
        let errors = status["errors"].to_string();
        anyhow::ensure!(errors.contains("(401)"), "{errors}");
        anyhow::ensure!(
            status["peers"].as_array().is_some_and(|peers| peers.len() == 3),
            "{}",
            status["peers"]
        );
        Ok(())
    })
    .unwrap();
    mesh.reaches(&ALL).unwrap();
    mesh.cluster().kubeconfig("gcp-1", &good).unwrap();
    // A token file is read again once a minute.
    let taken = || mesh.stands(&ALL);
    taken().or_else(|_| taken()).unwrap();
    lossless(flow).unwrap();
}

#[test]
fn an_install_check_names_what_is_in_the_way_and_changes_nothing() {
    if !programs::can_run("an_install_check_names_what_is_in_the_way_and_changes_nothing") {
        return;
    }
    let mut mesh = mesh();
    mesh.start("aws-1").unwrap();
    mesh.stands(&["aws-1"]).unwrap();
    let check = |node: &str, kubeconfig: &str| {
        mesh.configure(node, kubeconfig.as_ref()).unwrap();
        let args = ["install-check", "--config", "/run/netlab/private/agent.yaml"];
        mesh.lab
            .host(node)
            .unwrap()
            .command(programs::ours("mesh-agent"))
            .args(args)
            .output(Duration::from_secs(30))
            .unwrap()
    };
    let before = host_state(&mesh, "gcp-1");
    let own = mesh.credentials("gcp-1").unwrap().display().to_string();
    let good = check("gcp-1", &own);
    let said = good.stdout_text();
    assert!(good.success(), "{said}{}", good.stderr_text());
    for wanted in ["node gcp-1, site gcp", "gcp-1 holds 10.", "may be written", "51820 is free", "1 peers"] {
        assert!(said.contains(wanted), "no {wanted:?} in:\n{said}");
    }
    assert_eq!(annotations(&mesh, "node", "gcp-1"), Value::Null);
    // With the token of another node nothing may be written; without the API nothing is known.
    let others = mesh.credentials("aws-2").unwrap().display().to_string();
    let refused = check("gcp-1", &others);
    assert!(!refused.success());
    assert!(refused.stdout_text().contains("is bound to node \"aws-2\""), "{}", refused.stdout_text());
    let garbage = check("gcp-1", "/dev/null");
    assert!(
        !garbage.success() && garbage.stdout_text().contains("OBSTACLE  registry"),
        "{}",
        garbage.stdout_text()
    );
    let taken =
        mesh.lab.host("gcp-1").unwrap().run(|| std::net::UdpSocket::bind("0.0.0.0:51820")).unwrap().unwrap();
    let taken_port = check("gcp-1", &own);
    assert!(taken_port.stdout_text().contains("OBSTACLE  UDP port"), "{}", taken_port.stdout_text());
    drop(taken);
    assert_eq!(host_state(&mesh, "gcp-1"), before);
}
