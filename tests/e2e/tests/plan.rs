//! The plan of a large mesh, from the command line.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

const NODES: usize = 1000;

/// Distinct 32 bytes as a key; the low bytes keep it off the points of small order.
fn key(n: usize) -> String {
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::from("mfPXkW7SGHJuSxrZQOYUOtXjRBpMQ7GnWzgPa9b");
    for shift in [12, 6, 0] {
        text.push(char::from(alphabet[(n >> shift) & 63]));
    }
    text + "Y="
}

fn manifest(n: usize) -> String {
    format!(
        r#"apiVersion: v1
kind: Node
metadata:
  name: node-{n}
  annotations:
    sennit.dev/public-key: "{}"
    sennit.dev/epoch: "{n}"
    sennit.dev/site: site-{}
    sennit.dev/endpoints: "203.0.{}.{}:51820"
spec: {{podCIDRs: ["10.{}.{}.0/24", "fd00:0:0:{n:x}::/64"]}}
"#,
        key(n),
        n % 7,
        n / 250,
        n % 250 + 1,
        100 + n / 256,
        n % 256
    )
}

/// Writes all nodes in an order of its own, over as many files.
fn write(dir: &Path, step: usize, files: usize) {
    std::fs::create_dir_all(dir).unwrap();
    let mut texts = vec![String::new(); files];
    for i in 0..NODES {
        // The step has no divisor in common with the number, so that each node comes once.
        let n = i * step % NODES;
        let _ = write!(texts[i % files], "---\n{}", manifest(n));
    }
    for (i, text) in texts.iter().enumerate() {
        std::fs::write(dir.join(format!("{i}.yaml")), text).unwrap();
    }
}

fn plan(dir: &Path, form: &str) -> String {
    let program: PathBuf = e2e::programs().join("mesh-agent");
    let output = Command::new(&program)
        .args(["plan", "--node", "node-0", "-o", form, "--state"])
        .arg(dir)
        .output()
        .unwrap_or_else(|e| panic!("{}: {e}: cargo build --workspace --bins", program.display()));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn shuffling_a_thousand_nodes_changes_no_byte_of_the_plan() {
    let dir = std::env::temp_dir().join(format!("sennit-plan-{}", std::process::id()));
    for (name, step, files) in [("a", 1, 1), ("b", 7, 13), ("c", 999, 3)] {
        write(&dir.join(name), step, files);
    }
    for form in ["json", "wg", "routes", "dot"] {
        let first = plan(&dir.join("a"), form);
        assert!(first.len() > 50_000, "{form}: {} bytes", first.len());
        for other in ["b", "c"] {
            assert_eq!(first, plan(&dir.join(other), form), "{form}");
        }
    }
    let json: serde_json::Value = serde_json::from_str(&plan(&dir.join("a"), "json")).unwrap();
    assert_eq!(json["plan"]["peers"].as_object().unwrap().len(), NODES - 1);
    assert_eq!(json["refused"], serde_json::json!([]));
    std::fs::remove_dir_all(&dir).unwrap();
}
