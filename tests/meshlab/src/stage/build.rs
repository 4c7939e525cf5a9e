//! From a scenario to a lab: namespaces, links, firewalls, files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use netlab::probe::Echo;
use netlab::{Families, HostSpec, Lab, LabSpec, Namespace, PodSpec, SiteSpec};

use super::{ECHO_PORT, Stage, registry_dir, write_atomically};
use crate::agents::{self, Binaries};
use crate::layout::{LISTEN_PORT, Layout, SiteLayout};
use crate::manifest::{self, AgentPaths};
use crate::picture::{Picture, SiteView};
use crate::run::{Options, RunError};
use crate::scenario::step::{Action, Expect, Step};
use crate::scenario::{Nat, Scenario, Site, Underlay};
use crate::steps::{Trouble, block};

impl Stage {
    /// Builds the lab and writes the files that agents start from; starts no agent.
    pub(crate) fn build(
        scenario: &Scenario,
        layout: &Layout,
        binaries: Option<Binaries>,
        options: &Options,
    ) -> Result<Self, Trouble> {
        let lab = Lab::build(&lab_spec(scenario, layout)).map_err(|error| match error {
            netlab::Error::Unsupported { .. } => Trouble::CannotBegin(RunError::Missing(error.to_string())),
            netlab::Error::Spec { .. } => Trouble::CannotBegin(RunError::Lab(error.to_string())),
            other => other.into(),
        })?;
        for site in scenario.sites.iter().map(|site| &site.value) {
            shape(&lab, site)?;
            for rule in &site.firewall {
                for rule in block::firewall_rules(rule) {
                    lab.site(&site.name)?.block(rule)?;
                }
            }
        }
        let everyone: Vec<&Namespace> =
            lab.hosts().iter().map(|host| &**host).chain(lab.pods().iter().map(|pod| &**pod)).collect();
        let echoes = ports(scenario)
            .into_iter()
            .map(|port| Echo::serve(everyone.iter().copied(), port))
            .collect::<Result<_, _>>()?;
        let wireguard_ports = match &binaries {
            Some(binaries) => write_files(&lab, scenario, layout, binaries)?,
            None => vec![LISTEN_PORT],
        };
        Ok(Self {
            picture: picture(scenario, layout),
            scenario: scenario.clone(),
            layout: layout.clone(),
            base: options.base.clone(),
            binaries,
            wireguard_ports,
            agents: BTreeMap::new(),
            recordings: Vec::new(),
            streams: BTreeMap::new(),
            blocks: Vec::new(),
            leases: BTreeMap::new(),
            lent: BTreeSet::new(),
            agents_started: None,
            interrupt: Arc::clone(&options.interrupt),
            _echoes: echoes,
            lab,
        })
    }
}

fn lab_spec(scenario: &Scenario, layout: &Layout) -> LabSpec {
    let sites = scenario.sites.iter().zip(&layout.sites).map(|(site, layout)| site_spec(&site.value, layout));
    LabSpec { sites: sites.collect(), routed_pods: scenario.routed_pods, ..LabSpec::new() }
}

fn site_spec(site: &Site, layout: &SiteLayout) -> SiteSpec {
    let hosts = layout.nodes.iter().map(|node| HostSpec {
        addresses: node.lan.clone(),
        pod_prefixes: node.pod_cidrs.clone(),
        pods: node
            .pods
            .iter()
            .map(|pod| PodSpec { addresses: pod.addresses.clone(), ..PodSpec::new(pod.name.clone()) })
            .collect(),
        ..HostSpec::new(node.name.clone())
    });
    SiteSpec {
        families: match site.underlay {
            Underlay::Ipv4 => Families::V4,
            Underlay::Ipv6 => Families::V6,
            Underlay::Dual => Families::Dual,
        },
        nat: match site.nat {
            Nat::None => netlab::Nat::None,
            Nat::Cone => netlab::Nat::Cone,
            Nat::Symmetric => netlab::Nat::Symmetric,
        },
        uplink: layout.uplink.clone(),
        lan: layout.lan.clone(),
        uplink_mtu: Some(site.mtu.into()),
        lan_mtu: Some(site.mtu.into()),
        hosts: hosts.collect(),
        ..SiteSpec::new(site.name.clone())
    }
}

fn shape(lab: &Lab, site: &Site) -> Result<(), Trouble> {
    let Some(link) = &site.link else { return Ok(()) };
    let uplink = lab.site(&site.name)?.uplink();
    if let Some(rate) = link.rate {
        uplink.set_rate(Some(netlab::Rate { bits_per_second: rate.0, burst: None, queue: None }))?;
    }
    if let Some(latency) = link.latency {
        uplink.set_delay(latency.0, std::time::Duration::ZERO)?;
    }
    if let Some(loss) = link.loss {
        uplink.set_loss(loss.0 / 100.0)?;
    }
    Ok(())
}

/// Every port that some step probes.
fn ports(scenario: &Scenario) -> BTreeSet<u16> {
    fn of_expect(expect: &Expect, ports: &mut BTreeSet<u16>) {
        ports.extend(expect.port.into_iter().chain(expect.pairs.iter().filter_map(|pair| pair.port)));
    }
    fn of_step(step: &Step, ports: &mut BTreeSet<u16>) {
        for action in step.actions() {
            match action {
                Action::Expect(expect) => of_expect(expect, ports),
                Action::Eventually(eventually) => of_step(&eventually.step, ports),
                Action::Always(always) => of_step(&always.step, ports),
                _ => {}
            }
        }
    }
    let mut ports = BTreeSet::from([ECHO_PORT]);
    scenario.steps.iter().for_each(|step| of_step(&step.value, &mut ports));
    ports
}

/// Writes the registry and every agent's configuration; answers the WireGuard ports in use.
fn write_files(
    lab: &Lab,
    scenario: &Scenario,
    layout: &Layout,
    binaries: &Binaries,
) -> Result<Vec<u16>, Trouble> {
    let registry = registry_dir(lab);
    let write = |path: &Path, text: &str| {
        write_atomically(path, text.as_bytes())
            .map_err(|error| Trouble::failed(format!("cannot write {}: {error}", path.display())))
    };
    std::fs::create_dir_all(registry.join("published"))
        .map_err(|error| Trouble::failed(format!("cannot make {}: {error}", registry.display())))?;
    write(&registry.join("nodes.yaml"), &manifest::nodes_manifest(layout))?;
    let paths = AgentPaths {
        registry: Path::new(agents::REGISTRY),
        state: Path::new(agents::STATE_DIR),
        run: Path::new(agents::RUN_DIR),
        userspace_binary: Some(&binaries.device),
    };
    let mut listen = BTreeSet::new();
    for node in layout.nodes() {
        let config = manifest::agent_config(scenario, layout, node, &paths);
        let port = serde_json::from_str::<serde_json::Value>(&config)
            .ok()
            .and_then(|config| config["wireguard"]["listenPort"].as_u64())
            .and_then(|port| u16::try_from(port).ok());
        listen.insert(port.unwrap_or(LISTEN_PORT));
        write(&lab.host(&node.name)?.private_dir().join("agent.yaml"), &config)?;
    }
    Ok(listen.into_iter().collect())
}

fn picture(scenario: &Scenario, layout: &Layout) -> Picture {
    let site = |site: &SiteLayout| SiteView {
        name: site.name.clone(),
        nodes: site.nodes.iter().map(|node| node.name.clone()).collect(),
        pods: site.nodes.iter().map(|node| node.pods.len()).sum(),
        mtu: site.mtu,
        nat: match site.nat {
            Nat::None => "none",
            Nat::Cone => "cone",
            Nat::Symmetric => "symmetric",
        }
        .to_owned(),
        prefixes: site.prefixes.iter().map(ToString::to_string).collect(),
    };
    Picture {
        name: scenario.name.clone(),
        sites: layout.sites.iter().map(site).collect(),
        ..Picture::default()
    }
}
