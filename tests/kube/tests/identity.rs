//! One identity in two places over an API, and clocks that are set while agents run.
#![allow(clippy::unwrap_used)]

use std::time::Instant;

use kube_tests::mesh::{As, Mesh, lossless};
use kube_tests::{eventually, programs};

const ALL: [&str; 2] = ["aws-1", "gcp-1"];

#[test]
fn a_twin_over_an_api_waits_for_its_original() {
    if !programs::can_run("a_twin_over_an_api_waits_for_its_original") {
        return;
    }
    let mut mesh = Mesh::new(&[
        ("aws", &[("aws-1", As::Node), ("aws-2", As::Unknown)]),
        ("gcp", &[("gcp-1", As::Node)]),
    ])
    .unwrap();
    mesh.start_all(&ALL).unwrap();
    let flow = mesh.traffic("gcp-1-pod-1", "aws-1-pod-1").unwrap();
    mesh.copy("aws-1", "aws-2").unwrap();
    mesh.restart("aws-2").unwrap();
    for (host, ready) in [("aws-2", false), ("aws-1", true)] {
        eventually("both say so", || {
            let status = mesh.status(host)?;
            let told = status["problems"].to_string().contains("identity-elsewhere");
            anyhow::ensure!(told && status["ready"] == ready, "{host}: {}", status["problems"]);
            Ok(())
        })
        .unwrap();
    }
    assert_eq!(mesh.status("aws-2").unwrap()["peers"].as_array().unwrap().len(), 0);
    mesh.stands(&ALL).unwrap();
    lossless(flow).unwrap();
}

#[test]
fn a_clock_that_is_set_loses_no_packet() {
    if !programs::can_run_with("a_clock_that_is_set_loses_no_packet", &["libfaketimeMT.so.1"]) {
        return;
    }
    let mut mesh = Mesh::new(&[("aws", &[("aws-1", As::Node)]), ("gcp", &[("gcp-1", As::Node)])]).unwrap();
    mesh.start("aws-1").unwrap();
    mesh.configure("gcp-1", &mesh.credentials("gcp-1").unwrap()).unwrap();
    mesh.restart_with_a_clock("gcp-1").unwrap();
    mesh.stands(&ALL).unwrap();
    let flow = mesh.traffic("aws-1-pod-1", "gcp-1-pod-1").unwrap();
    for offset in ["+1h", "-1h", "+20y", "-20y", "+0s"] {
        let before = mesh.status("gcp-1").unwrap()["observedAt"].to_string();
        mesh.set_clock("gcp-1", offset).unwrap();
        let seen = Instant::now();
        eventually("the clock is another one, and status what it was", || {
            let status = mesh.status("gcp-1")?;
            anyhow::ensure!(status["observedAt"].to_string()[..14] != before[..14], "{offset}: {before}");
            let peer = &status["peers"][0];
            let told = (&peer["state"], &status["ready"]);
            // One look is enough: whoever judges by the time of day is wrong at once.
            assert!(*told.0 == "established" && *told.1 == true, "{offset}: {}", status);
            let age = peer["handshakeAgeSeconds"].as_u64().unwrap();
            anyhow::ensure!(age <= 180, "{offset}: {age} s, {:?} after", seen.elapsed());
            Ok(())
        })
        .unwrap();
    }
    mesh.stands(&ALL).unwrap();
    lossless(flow).unwrap();
}
