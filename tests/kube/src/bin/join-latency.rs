//! How long a node takes from being created to its first answered packet, over many joins: `make kube-bench`.
#![allow(clippy::print_stdout, reason = "this is a command")]

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use kube_tests::mesh::{As, ECHO, MARKER, Mesh};
use kube_tests::{PATIENCE, eventually, programs};
use netlab::probe::{Kind, Probe};

const JOINS: usize = 50;
const OLD: &str = "aws-1";
const NEW: &str = "gcp-1";

fn main() -> anyhow::Result<()> {
    ensure!(programs::can_run("join-latency"), "it cannot be measured here");
    let joins = std::env::args()
        .nth(1)
        .map_or(Ok(JOINS), |text| text.parse())
        .context("usage: join-latency [JOINS]")?;
    let mut mesh = Mesh::new(&[("aws", &[(OLD, As::Node)]), ("gcp", &[(NEW, As::Node)])])?;
    mesh.start(OLD)?;
    mesh.cluster().kubectl(&["delete", "node", NEW])?;
    let mut took = Vec::with_capacity(joins);
    for join in 1..=joins {
        let (from, _) = mesh.pod(&format!("{NEW}-pod-1"))?;
        let (_, to) = mesh.pod(&format!("{OLD}-pod-1"))?;
        let began = Instant::now();
        mesh.register(NEW)?;
        let registered = began.elapsed();
        mesh.start(NEW)?;
        let probe = Probe::new(&from, to, Kind::Udp(ECHO))
            .payload(MARKER)
            .deadline(PATIENCE)
            .retry(Duration::from_millis(5));
        probe.ask().map_err(|failure| anyhow::anyhow!("{failure}\n{}", mesh.logs()))?;
        let all = began.elapsed();
        println!(
            "join {join}: {} ms, of which {} ms until the Node was created",
            all.as_millis(),
            registered.as_millis()
        );
        took.push(all);
        mesh.kill(NEW)?;
        mesh.agent(NEW, &["cleanup", "--config", "/run/netlab/private/agent.yaml"])?;
        mesh.cluster().kubectl(&["delete", "node", NEW])?;
        eventually("the other one lets it go", || {
            let status = mesh.status(OLD)?;
            ensure!(status["peers"].as_array().is_some_and(Vec::is_empty), "{}", status["peers"]);
            Ok(())
        })?;
    }
    took.sort_unstable();
    let at = |share: f64| took[((took.len() - 1) as f64 * share).round() as usize].as_millis();
    println!(
        "{joins} joins, from kubectl creating the Node to the first answered packet: p50 {} ms, p99 {} ms, {} to {} ms",
        at(0.5),
        at(0.99),
        at(0.0),
        at(1.0)
    );
    Ok(())
}
