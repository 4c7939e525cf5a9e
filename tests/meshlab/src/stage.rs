//! A running lab with everything that steps have started in it.

mod build;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use netlab::probe::Echo;
use netlab::{BlockId, Capture, Host, Lab, Namespace, Process};

use crate::agents::{self, Binaries};
use crate::layout::{Layout, NodeLayout};
use crate::picture::{LinkView, Picture, StreamView, TunnelCount};
use crate::report::count;
use crate::scenario::{Family, Scenario};
use crate::selector::Place;
use crate::status::NodeStatus;
use crate::steps::lease::Lease;
use crate::steps::{Trouble, Verdict};

/// What every probe and stream carries, so that a capture can tell whether it was ever seen in clear.
pub const MARKER: &[u8] = b"meshlab-marker-71c5fd02a9e64b38";
/// The port that every pod and node answers on.
pub const ECHO_PORT: u16 = 7777;

const AGENT_START: Duration = Duration::from_secs(30);

/// A link that is being recorded.
pub(crate) struct Recording {
    pub(crate) name: String,
    pub(crate) pcap: PathBuf,
    pub(crate) capture: Capture,
}

/// A block that a step put up: the word it was put up at, where, and its number there.
pub(crate) struct PlacedBlock {
    pub(crate) at: String,
    pub(crate) namespace: Namespace,
    pub(crate) id: BlockId,
}

/// A running stream.
pub(crate) struct Stream {
    pub(crate) flow: netlab::flow::Flow,
    pub(crate) from: String,
    pub(crate) to: String,
}

/// The lab of a run.
pub struct Stage {
    pub(crate) scenario: Scenario,
    pub(crate) layout: Layout,
    pub(crate) base: PathBuf,
    pub(crate) binaries: Option<Binaries>,
    pub(crate) wireguard_ports: Vec<u16>,
    pub(crate) agents: BTreeMap<String, Process>,
    pub(crate) recordings: Vec<Recording>,
    pub(crate) streams: BTreeMap<String, Stream>,
    pub(crate) blocks: Vec<PlacedBlock>,
    pub(crate) leases: BTreeMap<(String, Family), Lease>,
    /// Addresses that servers and clients of leases have or had.
    pub(crate) lent: BTreeSet<IpAddr>,
    pub(crate) agents_started: Option<Instant>,
    pub(crate) picture: Picture,
    interrupt: Arc<AtomicBool>,
    // Dropped last: the fields above live in the lab's namespaces.
    _echoes: Vec<Echo>,
    pub(crate) lab: Lab,
}

impl Stage {
    /// What the lab looks like, as far as it was measured.
    pub fn picture(&self) -> &Picture {
        &self.picture
    }

    /// The scenario that it was built for.
    pub fn scenario(&self) -> &Scenario {
        &self.scenario
    }

    /// Its names and addresses.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The lab underneath.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The programs under test, where there are agents.
    pub fn binaries(&self) -> Option<&Binaries> {
        self.binaries.as_ref()
    }

    /// Whether the run was asked to end.
    pub fn interrupted(&self) -> bool {
        self.interrupt.load(Ordering::SeqCst)
    }

    /// Err when the run was asked to end.
    pub(crate) fn go_on(&self) -> Result<(), Trouble> {
        if self.interrupted() { Err(Trouble::Interrupted) } else { Ok(()) }
    }

    /// The registry directory, as seen from here.
    pub(crate) fn registry(&self) -> PathBuf {
        registry_dir(&self.lab)
    }

    pub(crate) fn host(&self, name: &str) -> Result<&Host, Trouble> {
        Ok(self.lab.host(name)?)
    }

    /// The namespace of a place.
    pub(crate) fn namespace_of(&self, place: Place<'_>) -> Result<&Namespace, Trouble> {
        Ok(match place {
            Place::Node(node) => self.lab.host(&node.name)?,
            Place::Pod(pod) => self.lab.pod(&pod.name)?,
            Place::Router(site) => self.lab.site(&site.name)?,
        })
    }

    /// The agents' status, in the order of the names.
    pub(crate) fn statuses(&self, nodes: &[&str]) -> Vec<Result<NodeStatus, String>> {
        let Some(binaries) = &self.binaries else {
            return nodes.iter().map(|name| Err(format!("{name}: the scenario runs no agents"))).collect();
        };
        let hosts: Vec<&Host> = nodes.iter().filter_map(|name| self.lab.host(name).ok()).collect();
        agents::statuses(&hosts, binaries)
    }

    /// Starts every node's agent and waits until all of them answer.
    pub(crate) fn start_all_agents(&mut self) -> Verdict {
        let nodes: Vec<NodeLayout> = self.layout.nodes().cloned().collect();
        self.agents_started = Some(Instant::now());
        self.start_agents(&nodes.iter().collect::<Vec<_>>(), Instant::now() + AGENT_START)
    }

    /// Starts these agents and waits until their status answers.
    pub(crate) fn start_agents(&mut self, nodes: &[&NodeLayout], deadline: Instant) -> Verdict {
        let Some(binaries) = self.binaries.clone() else {
            return Err(Trouble::failed("the scenario runs no agents"));
        };
        for node in nodes {
            let running = self
                .agents
                .get(&node.name)
                .is_some_and(|agent| matches!(agent.wait(Duration::ZERO), Ok(None)));
            if running {
                return Err(Trouble::failed(format!("{}: its agent is running already", node.name)));
            }
            let process = agents::start(self.host(&node.name)?, &binaries).map_err(Trouble::failed)?;
            self.agents.insert(node.name.clone(), process);
        }
        let mut waiting: Vec<&str> = nodes.iter().map(|node| node.name.as_str()).collect();
        loop {
            self.go_on()?;
            let answers = self.statuses(&waiting);
            let late: Vec<String> = answers.into_iter().filter_map(Result::err).collect();
            waiting.retain(|name| late.iter().any(|text| text.starts_with(&format!("{name}:"))));
            if waiting.is_empty() {
                return Ok(format!("status of {}", count(nodes.len(), "agent")));
            }
            for name in &waiting {
                let ended = self.agents.get(*name).map(|agent| agent.wait(Duration::ZERO));
                if let Some(Ok(Some(status))) = ended {
                    let tail = agents::log_tail(self.host(name)?, 5);
                    return Err(Trouble::failed(format!("{name}: mesh-agent ended with {status}: {tail}")));
                }
            }
            if Instant::now() >= deadline {
                return Err(Trouble::Failed(late));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Sends a signal to agents and, where the signal ends a process, waits for the end.
    pub(crate) fn signal_agents(&self, nodes: &[&NodeLayout], signal: i32, deadline: Instant) -> Verdict {
        for node in nodes {
            let agent = self.agents.get(&node.name);
            let agent =
                agent.ok_or_else(|| Trouble::failed(format!("{}: no agent was started", node.name)))?;
            agent.signal(signal)?;
        }
        if matches!(signal, libc::SIGKILL | libc::SIGTERM | libc::SIGINT) {
            for node in nodes {
                let Some(agent) = self.agents.get(&node.name) else { continue };
                let left = deadline.saturating_duration_since(Instant::now());
                if agent.wait(left)?.is_none() {
                    return Err(Trouble::failed(format!("{}: the agent did not end in time", node.name)));
                }
            }
        }
        Ok(format!("{} signalled", count(nodes.len(), "agent")))
    }

    /// Reads the agents' status and the running captures into the picture.
    pub(crate) fn look_once_more(&mut self) {
        if self.binaries.is_some() {
            let names: Vec<String> = self.layout.nodes().map(|node| node.name.clone()).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let statuses = self.statuses(&names);
            self.note_tunnels(&statuses);
        }
        // Also brings the pcap files up to date for a dump.
        if let Ok(links) = self.stop_recordings()
            && !links.is_empty()
        {
            self.picture.links = links;
        }
    }

    /// Ends the recordings and judges what they saw.
    pub(crate) fn stop_recordings(&mut self) -> Result<Vec<LinkView>, Trouble> {
        let inner: Vec<_> = self.layout.sites.iter().flat_map(|site| site.prefixes.clone()).collect();
        let mut views = Vec::new();
        for recording in std::mem::take(&mut self.recordings) {
            let stats = recording.capture.stop()?.stats;
            if stats.kernel_drops > 0 {
                return Err(Trouble::failed(format!(
                    "{}: the recording missed {} frames, so it proves nothing",
                    recording.name, stats.kernel_drops
                )));
            }
            let found = crate::pcap::search(&recording.pcap, &inner, &self.lent, MARKER)
                .map_err(|error| Trouble::failed(format!("{}: {error}", recording.name)))?;
            views.push(LinkView {
                name: recording.name,
                packets: stats.packets,
                wireguard: stats.wireguard + stats.vxlan,
                marker_hits: stats.marker_frames.iter().sum(),
                inner_addresses: found.inner_addresses,
                first_marked: found.first_marked,
                first_inner: found.first_inner,
            });
        }
        Ok(views)
    }

    fn note_tunnels(&mut self, statuses: &[Result<NodeStatus, String>]) {
        let of = |name: &str| statuses.iter().flatten().find(|status| status.node == name);
        let up = |a: &NodeLayout, b: &NodeLayout| {
            let sees = |here: &str, there: &str| of(here).is_some_and(|s| s.lacks_tunnel_to(there).is_none());
            sees(&a.name, &b.name) && sees(&b.name, &a.name)
        };
        let mut tunnels = Vec::new();
        for (index, a) in self.layout.sites.iter().enumerate() {
            for b in &self.layout.sites[index..] {
                let pairs: Vec<_> = if a.name == b.name {
                    let inside = |(i, x): (usize, _)| a.nodes[i + 1..].iter().map(move |y| (x, y));
                    a.nodes.iter().enumerate().flat_map(inside).collect()
                } else {
                    a.nodes.iter().flat_map(|x| b.nodes.iter().map(move |y| (x, y))).collect()
                };
                tunnels.push(TunnelCount {
                    a: a.name.clone(),
                    b: b.name.clone(),
                    up: pairs.iter().filter(|(x, y)| up(x, y)).count(),
                    total: pairs.len(),
                });
            }
        }
        let peers = || statuses.iter().flatten().flat_map(|status| &status.peers);
        self.picture.tunnels = tunnels;
        self.picture.handshake_ages = peers().filter_map(|peer| peer.handshake_age_seconds).collect();
        self.picture.encrypted_bytes = peers().filter(|peer| peer.encrypted).map(|peer| peer.tx_bytes).sum();
    }

    /// Notes a stream that ended.
    pub(crate) fn note_stream(&mut self, view: StreamView) {
        self.picture.streams.push(view);
    }

    /// Seconds since the agents were started.
    pub(crate) fn since_agents(&self) -> Option<f64> {
        self.agents_started.map(|at| at.elapsed().as_secs_f64())
    }

    /// Ends everything in the lab and the lab itself.
    pub(crate) fn tear_down(mut self) {
        self.streams.clear();
        self.leases.clear();
        self.recordings.clear();
        self.agents.clear();
        self.lab.shutdown();
    }
}

/// The registry directory of a lab, as seen from outside its namespaces.
fn registry_dir(lab: &Lab) -> PathBuf {
    lab.shared_dir().join("registry")
}

/// Writes a file so that a reader sees the old or the new content and nothing between.
pub(crate) fn write_atomically(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let half = path.with_file_name(format!(".{name}.half"));
    std::fs::write(&half, content)?;
    std::fs::rename(&half, path)
}
