//! `mesh-agent install-check`: what will not work here and why, before anything is changed.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::bail;
use mesh_keyring::PrivateKey;
use mesh_overlay::backend::{NetBackend as _, NftBackend as _, WireguardBackend as _};
use mesh_overlay::link::ALIAS;
use mesh_overlay::netlink::{Netlink, ipv6_disabled};
use mesh_overlay::nft::Nft;
use mesh_overlay::{MeshPlan, NodeRecord};
use serde::Serialize;
use tokio::time::timeout;

use super::print;
use crate::agent::Agent;
use crate::bypass::{Needs, Watcher};
use crate::cli::StatusOutput;
use crate::config::{Config, LISTEN_PORT};
use crate::identity::place;
use crate::registry::kube::trust::{Answer, missing};
use crate::registry::{MeshWord, Registry, RegistryError, Snapshot};
use crate::run;
use crate::state::LastGood;

const TUN: &str = "/dev/net/tun";
/// How long the registry has for being read.
const READING: Duration = Duration::from_secs(10);

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// As it should be.
    Fine,
    /// The mesh runs, but not everything works.
    Warning,
    /// The mesh does not run here.
    Obstacle,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    check: &'static str,
    verdict: Verdict,
    text: String,
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn fine(&mut self, check: &'static str, text: impl Into<String>) {
        self.0.push(Finding { check, verdict: Verdict::Fine, text: text.into() });
    }

    fn warn(&mut self, check: &'static str, text: impl Into<String>) {
        self.0.push(Finding { check, verdict: Verdict::Warning, text: text.into() });
    }

    fn obstacle(&mut self, check: &'static str, text: impl Into<String>) {
        self.0.push(Finding { check, verdict: Verdict::Obstacle, text: text.into() });
    }

    fn to_table(&self) -> String {
        let width = self.0.iter().map(|finding| finding.check.len()).max().unwrap_or_default();
        self.0.iter().fold(String::new(), |mut table, finding| {
            let verdict = match finding.verdict {
                Verdict::Fine => "fine    ",
                Verdict::Warning => "warning ",
                Verdict::Obstacle => "OBSTACLE",
            };
            let _ = writeln!(table, "{verdict}  {:width$}  {}", finding.check, finding.text);
            table
        })
    }
}

/// Checks this host and its registry against a configuration. Fails when there is an obstacle.
pub(super) async fn check(mut config: Config, output: StatusOutput) -> anyhow::Result<()> {
    let mut findings = Findings::default();
    findings.fine(
        "configuration",
        format!("node {}, site {}, mesh {}", config.node, config.site, config.grants.mesh),
    );
    let snapshot = registry(&mut config, &mut findings).await;
    let device = device(&config, &mut findings).await;
    port(port_of(&config, snapshot.as_ref()), device, &mut findings);
    match Nft::new().observe().await {
        Ok(_) => findings.fine("nftables", "the guard can be put up"),
        Err(e) => findings.obstacle("nftables", e.to_string()),
    }
    host(&config, snapshot, &mut findings).await;
    match output {
        StatusOutput::Json => print(&format!("{}\n", serde_json::to_string_pretty(&findings.0)?))?,
        StatusOutput::Table => print(&findings.to_table())?,
    }
    match findings.0.iter().filter(|finding| finding.verdict == Verdict::Obstacle).count() {
        0 => Ok(()),
        1 => bail!("one obstacle"),
        many => bail!("{many} obstacles"),
    }
}

async fn registry(config: &mut Config, findings: &mut Findings) -> Option<Snapshot> {
    let (mut registry, servers) =
        match Registry::open(&config.registry, &config.grants.mesh, &config.site, false).await {
            Ok(opened) => opened,
            Err(e) => {
                findings.obstacle("registry", e.to_string());
                return None;
            }
        };
    config.grants.protected.extend(servers);
    let until = Instant::now() + READING;
    let snapshot = loop {
        match registry.read() {
            Ok(snapshot) => break snapshot,
            Err(e) if Instant::now() >= until || matches!(e, RegistryError::Away { .. }) => {
                findings.obstacle("registry", e.to_string());
                return None;
            }
            Err(_) => {
                let _ = timeout(Duration::from_millis(500), registry.changed()).await;
            }
        }
    };
    if let Registry::Kube(kube) = &registry
        && kube.trust(&config.node).await == Answer::Allowed
    {
        findings.warn("admission", missing().to_string());
    }
    match snapshot.nodes.iter().find(|record| record.name == config.node) {
        Some(own) if own.pod_cidrs.is_empty() => findings.warn(
            "registry",
            format!(
                "{} nodes; {} holds no prefixes: its pods are not in the mesh",
                snapshot.nodes.len(),
                config.node
            ),
        ),
        Some(own) => findings.fine(
            "registry",
            format!("{} nodes; {} holds {}", snapshot.nodes.len(), config.node, own.pod_cidrs.join(", ")),
        ),
        None => findings.obstacle(
            "registry",
            format!("{} nodes, and none of them is {}", snapshot.nodes.len(), config.node),
        ),
    }
    let own = snapshot.nodes.iter().find(|record| record.name == config.node);
    identity(config, own, findings);
    match timeout(READING, registry.may_publish(&config.node)).await {
        Ok(Ok(())) => findings.fine("publication", "may be written"),
        Ok(Err(e)) => findings.obstacle("publication", e.to_string()),
        Err(_) => findings.obstacle("publication", "the registry does not answer"),
    }
    Some(snapshot)
}

/// Checks whether anyone else uses this node's name or key.
fn identity(config: &Config, own: Option<&NodeRecord>, findings: &mut Findings) {
    let place = match place::look(config) {
        Ok(place) => place,
        Err(e) => return findings.obstacle("identity", e.to_string()),
    };
    let (copied, taken) = (place.copied(config), own.and_then(|own| place.taken(config, own)));
    if copied.is_none() && taken.is_none() {
        findings.fine("identity", "nobody else is known by this node's name or key");
    }
    copied.into_iter().for_each(|why| findings.warn("identity", why));
    taken.into_iter().for_each(|why| findings.obstacle("identity", why));
}

/// Whether the device of this node is there already.
async fn device(config: &Config, findings: &mut Findings) -> bool {
    let mut wireguard = match run::wireguard(config, None) {
        Ok(wireguard) => wireguard,
        Err(e) => {
            findings.obstacle("WireGuard", format!("{e:#}"));
            return false;
        }
    };
    if wireguard.kind() == "none" {
        findings.warn(
            "WireGuard",
            "none, as is configured: this host reaches those peers only for which exemptions from encryption are in force".to_owned(),
        );
        return false;
    }
    if wireguard.kind() == "userspace" && config.wireguard.external_device {
        findings.fine("WireGuard", "in a process that is run by somebody else (wireguard.externalDevice)");
    } else if wireguard.kind() == "userspace" {
        let program = &config.wireguard.userspace_binary;
        if find_program(program).is_none() {
            findings.obstacle(
                "WireGuard",
                format!("the kernel has none, and {} is not to be found on PATH", program.display()),
            );
        } else if let Err(e) = std::fs::OpenOptions::new().read(true).write(true).open(TUN) {
            findings.obstacle(
                "WireGuard",
                format!("{TUN}: {e}; load the module tun, and in a container pass the device in"),
            );
        } else {
            findings.fine("WireGuard", format!("{}, in a process of its own", program.display()));
        }
    } else {
        findings.fine("WireGuard", "the kernel's");
    }
    match wireguard.observe().await {
        Ok(device) => device.is_some(),
        Err(e) => {
            findings.warn("WireGuard", e.to_string());
            true
        }
    }
}

fn find_program(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return Some(program.to_owned()).filter(|path| path.is_file());
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&folders).map(|folder| folder.join(program)).find(|path| path.is_file())
}

fn port_of(config: &Config, snapshot: Option<&Snapshot>) -> u16 {
    let said = match snapshot.map(|snapshot| &snapshot.mesh) {
        Some(MeshWord::Said(settings)) => settings.listen_port,
        _ => None,
    };
    config.wireguard.listen_port.or(said).unwrap_or(LISTEN_PORT)
}

fn port(port: u16, device: bool, findings: &mut Findings) {
    if device {
        return findings.fine("UDP port", format!("{port}: the device of this node is there already"));
    }
    let v6 = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).map(drop);
    // Without IPv6 the other family alone counts.
    let bound = match v6 {
        Err(e) if e.kind() != std::io::ErrorKind::AddrInUse => {
            UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).map(drop)
        }
        taken_or_free => {
            taken_or_free.and_then(|()| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).map(drop))
        }
    };
    match bound {
        Ok(()) => findings
            .fine("UDP port", format!("{port} is free here; let it through every firewall on the way")),
        Err(e) => findings
            .obstacle("UDP port", format!("{port}: {e}; free it, or set wireguard.listenPort to another")),
    }
}

/// What the agent itself would say of this host, and of everybody in the registry.
async fn host(config: &Config, snapshot: Option<Snapshot>, findings: &mut Findings) {
    let observed = match Netlink::new() {
        Ok(mut net) => net.observe(&config.wireguard.interface, &config.routing).await,
        Err(e) => Err(e),
    };
    let observed = match observed {
        Ok(observed) => observed,
        Err(e) => return findings.obstacle("network", e.to_string()),
    };
    if let Some(link) = observed.link.as_ref().filter(|link| link.alias.as_deref() != Some(ALIAS)) {
        let what = link.kind.as_deref().unwrap_or("hardware");
        let name = &config.wireguard.interface;
        findings.obstacle(
            "interface",
            format!("{name} is there and not ours ({what}): remove it, or set wireguard.interface"),
        );
    }
    if let Some(why) = ipv6_disabled(&config.wireguard.interface) {
        findings.warn(
            "ipv6",
            format!("{why}; until then this node has no IPv6 mesh address, and only IPv4 pods use the mesh"),
        );
    }
    if observed.underlay.default_route_addresses.is_empty() && config.underlay.endpoints.is_none() {
        findings.warn(
            "underlay",
            "there is no default route with an address: peers cannot dial this node unless underlay.endpoints says where",
        );
    }
    let Ok(key) = PrivateKey::generate() else {
        return findings.obstacle("key", "the system gives no randomness");
    };
    let mut agent = Agent::new(config.clone(), key.public(), 0, LastGood::default());
    agent.underlay(observed.underlay);
    let read = snapshot.is_some();
    if let Some(snapshot) = snapshot
        && let Err(why) = agent.snapshot(snapshot, Instant::now())
    {
        findings.obstacle("registry", why);
    }
    let desired = agent.desired(Instant::now());
    if agent.grants().sites.is_empty() {
        findings.warn(
            "sites",
            "no site has a grant: the guard knows a prefix only once this node has seen its holder, so that packets to a node \
             that nobody has seen yet leave in clear; set `sites` in agent.yaml or the Mesh",
        );
    }
    bypass(config, &desired.plan, findings).await;
    if let Some(why) = desired.harmful {
        findings.obstacle("grants", why);
    }
    desired.warnings.into_iter().for_each(|why| findings.warn("host", why));
    for refused in desired.refused {
        let node = refused.node.map(|node| format!("{node}: ")).unwrap_or_default();
        findings.warn("peers", format!("{node}{}", refused.text));
    }
    if read {
        findings.fine("plan", format!("{} peers, MTU {}", desired.plan.peers.len(), desired.plan.mtu));
    }
}

/// What takes packets past the mesh on this host.
async fn bypass(config: &Config, plan: &MeshPlan, findings: &mut Findings) {
    let mut watcher = Watcher::default();
    match Netlink::new() {
        Ok(mut net) => {
            let clock = (Instant::now(), std::time::SystemTime::now());
            watcher.look(&mut net, &Needs::of(config, plan), clock).await;
        }
        Err(e) => return findings.obstacle("bypass", e.to_string()),
    }
    for problem in watcher.problems() {
        match problem.blocks {
            true => findings.obstacle("bypass", problem.to_string()),
            false => findings.warn("bypass", problem.to_string()),
        }
    }
    if let Some(why) = watcher.failure() {
        findings.warn("bypass", why);
    } else if watcher.problems().is_empty() {
        findings.fine("bypass", "nothing is known that takes packets past the mesh");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_is_an_obstacle_and_a_free_one_is_not() {
        let taken = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let number = taken.local_addr().unwrap().port();
        let verdict = |device| {
            let mut findings = Findings::default();
            port(number, device, &mut findings);
            findings.0[0].verdict
        };
        assert_eq!(verdict(false), Verdict::Obstacle);
        assert_eq!(verdict(true), Verdict::Fine);
        drop(taken);
        assert_eq!(verdict(false), Verdict::Fine);
    }

    #[test]
    fn programs_are_found_as_they_would_be_run() {
        assert!(find_program(Path::new("sh")).is_some());
        assert!(find_program(Path::new("/bin/sh")).is_some());
        assert!(find_program(Path::new("no-such-program-anywhere")).is_none());
        assert!(find_program(Path::new("/no/such/program")).is_none());
    }

    #[test]
    fn the_table_shows_obstacles_as_such() {
        let mut findings = Findings::default();
        findings.fine("a", "good");
        findings.obstacle("longer", "bad");
        assert_eq!(findings.to_table(), "fine      a       good\nOBSTACLE  longer  bad\n");
    }
}
