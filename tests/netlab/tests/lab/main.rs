//! Labs on the real kernel.
//! - reach: routes, probes and why they fail
//! - nat: mappings, filtering
//! - firewall: blocks, loss, cuts
//! - link: MTU, rate, delay
//! - capture: markers, counters, pcap
//! - flow: constant-rate streams
//! - host: processes, mounts, names
//! - lifecycle: what is left behind

// Clippy's leave for tests covers test functions only, not what they share.
#![allow(clippy::unwrap_used)]

mod capture;
mod firewall;
mod flow;
mod host;
mod lifecycle;
mod link;
mod nat;
mod reach;

use std::io::Write;
use std::net::IpAddr;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use netlab::probe::{Echo, Kind, Probe};
use netlab::{Capabilities, Feature, Lab, LabSpec, Namespace, capabilities};

/// Long enough to be reached only by failure.
const PATIENCE: Duration = Duration::from_secs(5);
/// Long enough for an answer that would come to have come.
const SILENCE: Duration = Duration::from_millis(300);
const PORT: u16 = 7777;

const NEEDED: &[Feature] = &[
    Feature::Privilege,
    Feature::NetNamespaces,
    Feature::MountNamespaces,
    Feature::PidNamespaces,
    Feature::Veth,
    Feature::Nftables,
    Feature::Nat,
];

fn probed() -> &'static Capabilities {
    static PROBED: OnceLock<Capabilities> = OnceLock::new();
    PROBED.get_or_init(capabilities)
}

/// Says loudly why a test cannot run; in CI that is a failure.
fn skip(test: &str, why: &str) {
    assert!(std::env::var_os("CI").is_none(), "SKIPPED {test}: {why}");
    // Not eprintln: the test harness hides that of a passing test.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}");
}

/// The lab, or a loud skip.
fn build(test: &str, spec: &LabSpec) -> Option<Lab> {
    match probed().require(NEEDED) {
        Ok(()) => Some(Lab::build(spec).unwrap()),
        Err(missing) => {
            skip(test, &missing.to_string());
            None
        }
    }
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < until, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn v4(addresses: &[IpAddr]) -> IpAddr {
    *addresses.iter().find(|address| address.is_ipv4()).unwrap()
}

fn v6(addresses: &[IpAddr]) -> IpAddr {
    *addresses.iter().find(|address| address.is_ipv6()).unwrap()
}

fn echo_everywhere(lab: &Lab) -> Echo {
    Echo::serve(lab.namespaces(), PORT).unwrap()
}

fn udp(from: &Namespace, to: IpAddr) -> Probe {
    Probe::new(from, to, Kind::Udp(PORT)).deadline(PATIENCE)
}
