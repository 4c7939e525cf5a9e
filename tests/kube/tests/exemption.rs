//! An exemption from encryption in a Mesh: in force at all nodes, told in Events, and over by itself.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use kube_tests::mesh::{As, Mesh};
use kube_tests::{eventually, programs};
use serde_json::{Value, json};

fn exempting(exemptions: Value) -> Value {
    json!({
        "apiVersion": "sennit.dev/v1alpha1", "kind": "Mesh", "metadata": {"name": "kube-test"},
        "spec": {"encryption": {"exemptions": exemptions}},
    })
}

/// The time in so many seconds, as the API writes it.
fn ends_in(seconds: u64) -> String {
    let at = std::time::SystemTime::now() + Duration::from_secs(seconds);
    let output = std::process::Command::new("date")
        .args(["-u", "+%FT%TZ", "-d"])
        .arg(format!("@{}", at.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()))
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn until_state(mesh: &Mesh, wanted: &str) {
    eventually(&format!("{wanted} at both ends"), || {
        for node in ["aws-1", "onprem-1"] {
            let status = mesh.status(node)?;
            let peer = &status["peers"][0];
            anyhow::ensure!(peer["state"] == wanted && peer["encrypted"] == false, "{node}: {status}");
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_mesh_exempts_a_host_that_cannot_encrypt_and_everybody_is_told_until_it_ends() {
    if !programs::can_run("a_mesh_exempts_a_host_that_cannot_encrypt_and_everybody_is_told_until_it_ends") {
        return;
    }
    let mut mesh =
        Mesh::new(&[("aws", &[("aws-1", As::Node)]), ("onprem", &[("onprem-1", As::MeshNode)])]).unwrap();
    for node in ["aws-1", "onprem-1"] {
        let credentials = mesh.credentials(node).unwrap();
        mesh.configure(node, &credentials).unwrap();
    }
    let file = mesh.lab.host("onprem-1").unwrap().private_dir().join("agent.yaml");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    config["wireguard"]["backend"] = json!("none");
    std::fs::write(&file, config.to_string()).unwrap();
    mesh.restart("aws-1").unwrap();
    mesh.restart("onprem-1").unwrap();
    until_state(&mesh, "unencryptable");
    let claimed = &mesh.cluster().get("meshnode", "onprem-1").unwrap()["metadata"]["annotations"];
    assert_eq!(claimed["sennit.dev/wireguard"], "none");

    let both = json!([{"node": "onprem-1"}, {"site": "aws"}]);
    for (wrong, wanted) in [
        (json!([{"between": both, "expires": ends_in(60)}]), "reason"),
        (json!([{"between": both, "reason": "no TUN"}]), "expires"),
        (json!([{"between": [], "reason": "no TUN", "expires": ends_in(60)}]), "between"),
        (
            json!([{"between": [{"node": "a", "site": "b"}], "reason": "no TUN", "expires": ends_in(60)}]),
            "name a node or a site",
        ),
    ] {
        let error = mesh.cluster().apply(&exempting(wrong.clone())).unwrap_err().to_string();
        assert!(error.contains(wanted), "{wrong}: {error}");
    }
    until_state(&mesh, "unencryptable");

    let until =
        |seconds| exempting(json!([{"between": both, "reason": "no TUN", "expires": ends_in(seconds)}]));
    mesh.cluster().apply(&until(600)).unwrap();
    until_state(&mesh, "cleartext");
    // Two pods each, both ways, over both families.
    assert_eq!(mesh.reaches(&["aws-1", "onprem-1"]).unwrap(), 16);
    let told = |wanted: &str| {
        eventually(wanted, || {
            for (kind, node) in [("node", "aws-1"), ("meshnode", "onprem-1")] {
                let described = mesh.cluster().kubectl(&["describe", kind, node])?;
                anyhow::ensure!(described.contains(wanted), "{described}\n{}", mesh.logs());
            }
            Ok(())
        })
        .unwrap();
    };
    told("CleartextBegins");
    // The operator has second thoughts; then it ends by itself.
    mesh.cluster().apply(&until(5)).unwrap();
    until_state(&mesh, "unencryptable");
    told("CleartextEnds");
    let ended = mesh.status("aws-1").unwrap();
    assert_eq!(ended["exemptions"][0]["state"], "ended");
    assert!(mesh.reaches(&["aws-1", "onprem-1"]).is_err());
}
