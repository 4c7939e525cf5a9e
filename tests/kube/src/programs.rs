//! Where the programs are: the cluster's, and ours.

use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Set by `run.sh`: the folder of etcd, kube-apiserver and kubectl.
const VARIABLE: &str = "SENNIT_KUBE_BIN";
const NEEDED: [&str; 3] = ["etcd", "kube-apiserver", "kubectl"];
const NODES: [&str; 10] = [
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "runc",
    "busybox",
    "../cni/bridge",
];

/// A program of the cluster.
pub fn kubernetes(name: &str) -> PathBuf {
    PathBuf::from(std::env::var_os(VARIABLE).unwrap_or_default()).join(name)
}

/// A program of ours: from `$SENNIT_BIN_DIR`, or where cargo puts what it builds with the tests.
pub fn ours(name: &str) -> PathBuf {
    let built = || {
        let test = std::env::current_exe().unwrap_or_default();
        test.parent().and_then(Path::parent).unwrap_or(Path::new(".")).to_owned()
    };
    std::env::var_os("SENNIT_BIN_DIR").map_or_else(built, PathBuf::from).join(name)
}

/// Whether a cluster can be started here and these programs are there; else as [`can_run`].
pub fn can_run_with(test: &str, more: &[&'static str]) -> bool {
    can_run_all(test, &[&NEEDED[..], more].concat())
}

/// Whether whole nodes can be started here; else as [`can_run`].
pub fn can_run_nodes(test: &str) -> bool {
    can_run_all(test, &[&NEEDED[..], &NODES].concat())
}

/// Whether a cluster can be started here; if not, says so loudly, and under `CI=true` fails.
pub fn can_run(test: &str) -> bool {
    can_run_all(test, &NEEDED)
}

fn can_run_all(test: &str, needed: &[&'static str]) -> bool {
    let cluster = needed.iter().copied().map(|name| (name, kubernetes(name)));
    let mesh = ["mesh-agent", "mesh-wg"].into_iter().map(|name| (name, ours(name)));
    let absent: Vec<&str> =
        cluster.chain(mesh).filter(|(_, path)| !path.is_file()).map(|(name, _)| name).collect();
    let missing = if !is_root() {
        "root".to_owned()
    } else if absent.is_empty() {
        return true;
    } else {
        format!("{} (start the tests by `make kube-test`)", absent.join(", "))
    };
    // Not by a macro: libtest keeps what those print to itself when a test passes.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {missing}");
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "under CI nothing is skipped: {test} needs {missing}"
    );
    false
}

fn is_root() -> bool {
    std::fs::read_to_string("/proc/self/status")
        .is_ok_and(|text| text.lines().any(|line| line.starts_with("Uid:\t0\t")))
}
