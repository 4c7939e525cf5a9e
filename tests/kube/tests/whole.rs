//! Whole nodes, from `kubectl apply -k` to the last pod.
#![allow(clippy::unwrap_used)]

use std::io::Write as _;
use std::time::Instant;

use kube_tests::programs;
use kube_tests::whole::Whole;

fn tell(what: &str) {
    let _ = writeln!(std::io::stderr(), "{what}");
}

#[test]
fn two_clusters_and_two_hosts_become_one_mesh_by_their_manifests() {
    if !programs::can_run_nodes("two_clusters_and_two_hosts_become_one_mesh_by_their_manifests") {
        return;
    }
    let mut whole = Whole::new().unwrap();
    let pods = whole.pods().unwrap();
    let captures = whole.watch().unwrap();
    let applied = Instant::now();
    whole.install().unwrap();
    let answers = whole.stands(&pods).unwrap();
    tell(&format!("{answers} answers among {} pods, {:.1} s after kubectl apply", pods.len(), applied.elapsed().as_secs_f64()));
    for capture in captures {
        let report = capture.stop().unwrap();
        assert!(report.is_clean(), "{report:?}");
    }
}
