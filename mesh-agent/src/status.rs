//! What the agent tells about itself, over its Unix socket and as a table.

mod metrics;
mod table;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant, SystemTime};

use ipnet::IpNet;
use jiff::Timestamp;
use mesh_keyring::{NodeName, PublicKey, SiteName};
use mesh_overlay::dial::is_fresh;
use mesh_overlay::path::{LineReport, PeerReport, Reach};
use mesh_overlay::plan::PlannedPeer;
use mesh_overlay::{Exemption, Kept, MeshPlan, ObservedDevice};
use mesh_policy::budget::Which;
use mesh_policy::state::OverBudget;
use serde::{Deserialize, Serialize};

use crate::agent::Exempted;
use crate::problem::Problem;
use crate::reach::reach;

/// The state of a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PeerState {
    /// A handshake younger than its lifetime.
    Established,
    /// No handshake since the tunnel was made.
    Waiting,
    /// There was one, but it is past its lifetime.
    Stale,
    /// The device does not hold this peer.
    Missing,
    /// It answers on no path any more, whatever the age of its handshake.
    Blocked,
    /// A path to it lives, and no packet through the tunnel comes back.
    Unreached,
    /// It answers, and packets to it travel in clear, by an exemption.
    Cleartext,
    /// One of the two cannot do WireGuard, and no exemption is in force: no packet goes there.
    Unencryptable,
}

/// One peer in the status.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerStatus {
    /// Its name.
    pub name: NodeName,
    /// Its site.
    pub site: SiteName,
    /// Its key.
    pub public_key: PublicKey,
    /// Where it sends to now.
    pub endpoint: Option<SocketAddr>,
    /// The carrier.
    pub path: String,
    /// Whether packets to it are encrypted.
    pub encrypted: bool,
    /// Its state.
    pub state: PeerState,
    /// Since when, RFC 3339.
    pub since: String,
    /// Seconds since the last handshake.
    pub handshake_age_seconds: Option<u64>,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// All that it holds.
    pub prefixes: Vec<IpNet>,
    /// The MTU of routes to it, in bytes.
    pub mtu: u16,
    /// Since when the path is used, RFC 3339.
    #[serde(default)]
    pub path_since: Option<String>,
    /// Why this path.
    #[serde(default)]
    pub why: Option<String>,
    /// The path in use, as the prober knows it.
    #[serde(default)]
    pub probed: Option<LineReport>,
    /// All addresses that are probed, the best first.
    #[serde(default)]
    pub candidates: Vec<LineReport>,
    /// The last decisions, the oldest first.
    #[serde(default)]
    pub decisions: Vec<DecisionStatus>,
    /// The end-to-end checks of its mesh addresses.
    #[serde(default)]
    pub through: Vec<ThroughStatus>,
    /// The exemption by which packets to it travel in clear.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exemption: Option<Exemption>,
}

impl PeerStatus {
    /// Reports whether it is reached, as far as is known: by a handshake that lives or an exemption, and no check says otherwise.
    pub fn is_up(&self) -> bool {
        matches!(self.state, PeerState::Established | PeerState::Cleartext)
    }

    /// Reports whether packets go through the tunnel to it, in every family.
    pub fn reach(&self) -> Reach {
        Reach::of(self.through.iter().map(|end| end.reach))
    }
}

/// The end-to-end check between two mesh addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ThroughStatus {
    /// This node's address.
    pub from: IpAddr,
    /// The peer's.
    pub to: IpAddr,
    /// The result of the check.
    pub reach: Reach,
    /// Since when, RFC 3339.
    pub since: String,
    /// Seconds since the last answer, or null.
    pub answered_seconds: Option<u64>,
}

/// A decision about a peer's path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecisionStatus {
    /// When it fell, RFC 3339.
    pub at: String,
    /// What, and why.
    pub text: String,
}

/// Something that was refused.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RefusedStatus {
    /// The node that it concerns, where that is known.
    pub node: Option<NodeName>,
    /// Why.
    pub reason: String,
}

/// The guard's counters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GuardStatus {
    /// Whether it stands.
    pub standing: bool,
    /// Packets that were about to leave in clear and were dropped.
    pub egress_drops: u64,
    /// Packets that came in clear and were dropped.
    pub ingress_drops: u64,
    /// Packets on a VXLAN device that were no WireGuard of the mesh and were dropped.
    #[serde(default)]
    pub carrier_drops: u64,
    /// Packets in clear inside of VXLAN that no exemption allows and that were dropped.
    #[serde(default)]
    pub cleartext_drops: u64,
    /// Prefixes that nobody holds any more and that stay guarded.
    #[serde(default)]
    pub kept: Vec<KeptStatus>,
    /// Prefixes that sites were granted. With none, a prefix is guarded once this node has seen its holder, and
    /// not before.
    #[serde(default)]
    pub grants: usize,
}

/// A prefix that stays guarded although nobody holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeptStatus {
    /// The prefix.
    pub prefix: IpNet,
    /// The node that held it last, or `site NAME`.
    pub holder: String,
    /// Seconds of the agent's running time since anybody held it.
    pub absent_seconds: u64,
    /// The command that takes it out of the guard.
    pub release: String,
}

impl KeptStatus {
    /// Puts it in words.
    pub fn of(prefix: IpNet, kept: &Kept) -> Self {
        let release = format!("mesh-agent guard release {prefix}");
        Self { prefix, holder: kept.holder.clone(), absent_seconds: kept.absent, release }
    }
}

/// Packets that policy dropped, or would have in audit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyCounters {
    /// What local pods began and may not.
    pub egress: u64,
    /// What was begun towards local pods and may not be.
    pub ingress: u64,
    /// What cannot come from its source by the interface that it came in by.
    pub spoofed: u64,
    /// What was for, or from, a local address that no known pod has.
    pub unknown: u64,
    /// What conntrack cannot place.
    pub invalid: u64,
    /// TCP in the middle of a connection that this node did not see begin.
    pub midstream: u64,
}

/// The state of policy.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyStatus {
    /// "enforce", "audit" or "off".
    pub mode: String,
    /// Whether pods, namespaces and policies have all been listed since the agent started.
    pub complete: bool,
    /// Whether the kernel has what they say.
    pub standing: bool,
    /// Whether nobody else can change it there.
    pub owned: bool,
    /// Policies, refused ones too.
    pub policies: usize,
    /// Pods of the cluster.
    pub pods: usize,
    /// Addresses of this node's pods.
    pub local_addresses: usize,
    /// Transactions written since the agent started.
    pub transactions: u64,
    /// Changes in them.
    pub changes: u64,
    /// What was dropped.
    pub dropped: PolicyCounters,
    /// Lines written to the flow log.
    pub flows_written: u64,
    /// What was lost on the way there.
    pub flows_lost: u64,
    /// Objects that were refused.
    pub problems: Vec<String>,
    /// Why some of it may be out of date.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stale: Option<String>,
    /// What is closed since its policies are over a budget.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub over_budget: Vec<OverBudgetStatus>,
    /// How many of those there are; not all may be named.
    pub over_budget_total: usize,
    /// For so long the change that is being made has been under way; all of this is as it was before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub behind_seconds: Option<f64>,
}

/// Something that is closed since its policies are over a budget.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct OverBudgetStatus {
    /// `PolicyBudgetExceeded`, or `PolicyRefusedByKernel`.
    pub code: String,
    /// A namespace, or a policy of none.
    pub object: String,
    /// The cost, and the budget.
    pub reason: String,
    /// What can be done.
    pub remedy: String,
}

impl From<OverBudget> for OverBudgetStatus {
    fn from(OverBudget { object, excess }: OverBudget) -> Self {
        if excess.which == Which::Kernel {
            return Self {
                code: "PolicyRefusedByKernel".to_owned(),
                object,
                reason: excess.to_string(),
                remedy: "its policies deny whom they select until one of them changes; the agent's log has what the kernel said"
                    .to_owned(),
            };
        }
        let field = format!("policy.budgets.{}.{}", excess.which.as_str(), excess.unit.as_str());
        let more = match excess.which {
            Which::Kept => "write it again once they are fewer, or restart the agent",
            Which::Node | Which::Share => "have fewer policies, or labels that differ in less",
            _ => "list fewer ports, prefixes and selectors, or have fewer rules",
        };
        Self {
            code: "PolicyBudgetExceeded".to_owned(),
            object,
            reason: excess.to_string(),
            remedy: format!("its policies deny whom they select; {more}, or raise {field}"),
        }
    }
}

/// The whole status.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// This node.
    pub node: NodeName,
    /// Its site.
    pub site: SiteName,
    /// Its mesh.
    pub mesh: String,
    /// Its key.
    pub public_key: PublicKey,
    /// Its mesh interface.
    pub interface: String,
    /// "kernel" or "userspace".
    pub backend: String,
    /// What a userspace device uses of the kernel, as `name=value`.
    #[serde(default)]
    pub features: Vec<String>,
    /// The mesh interface's MTU, in bytes.
    pub mtu: u16,
    /// Whether the last pass brought all to where it should be, from a registry that was read in full.
    pub ready: bool,
    /// Whether the registry was read in full since the agent started.
    pub synced: bool,
    /// When the tunnels were looked at, RFC 3339.
    pub observed_at: String,
    /// Changes made to this host by the last pass, and since the agent started.
    pub changes: (usize, usize),
    /// Addresses of the mesh interface.
    pub mesh_addresses: Vec<IpAddr>,
    /// All peers.
    pub peers: Vec<PeerStatus>,
    /// What the operator has exempted from encryption.
    #[serde(default)]
    pub exemptions: Vec<Exempted>,
    /// All that was refused.
    pub refused: Vec<RefusedStatus>,
    /// Nodes that publish no key.
    pub unpublished: Vec<NodeName>,
    /// What is wrong on this host.
    pub errors: Vec<String>,
    /// What takes packets past the mesh; also among `errors`.
    #[serde(default)]
    pub problems: Vec<Problem>,
    /// The guard.
    pub guard: GuardStatus,
    /// Policy.
    #[serde(default)]
    pub policy: PolicyStatus,
}

/// What has arrived from a peer within this time says that its path is not blocked.
const ARRIVES: Duration = Duration::from_secs(5);

const UNENCRYPTABLE: &str =
    "blocked: one of the two cannot do WireGuard, and no exemption from encryption names them now";

/// Since when each peer has been in its state.
#[derive(Debug, Clone, Default)]
pub struct Health {
    states: BTreeMap<NodeName, (PeerState, SystemTime)>,
    // Bytes received when they last grew, and when that was.
    received: BTreeMap<NodeName, (u64, Instant)>,
    told: BTreeMap<NodeName, Instant>,
}

/// What the prober knows, by key.
pub type Reports = BTreeMap<PublicKey, PeerReport>;

fn state_of(
    peer: &PlannedPeer,
    device: Option<&ObservedDevice>,
    report: Option<&PeerReport>,
    blocked: bool,
    now: SystemTime,
) -> PeerState {
    if !peer.encrypted {
        return match (&peer.exemption, report.and_then(|report| report.carrying)) {
            (None, _) => PeerState::Unencryptable,
            (Some(_), _) if blocked => PeerState::Blocked,
            (Some(_), Some(_)) => PeerState::Cleartext,
            (Some(_), None) => PeerState::Waiting,
        };
    }
    match device.and_then(|d| d.peers.get(&peer.public_key)) {
        None => PeerState::Missing,
        Some(_) if blocked => PeerState::Blocked,
        Some(_) if report.is_some_and(|report| reach(report) == Reach::Unreached) => PeerState::Unreached,
        Some(found) if is_fresh(found.last_handshake, now) => PeerState::Established,
        Some(found) if found.last_handshake.is_some() => PeerState::Stale,
        Some(_) => PeerState::Waiting,
    }
}

impl Health {
    /// Takes note of every peer's state and answers which changed.
    pub fn observe(
        &mut self,
        plan: &MeshPlan,
        device: Option<&ObservedDevice>,
        reports: &Reports,
        now: SystemTime,
    ) -> Vec<(NodeName, PeerState)> {
        self.states.retain(|name, _| plan.peers.contains_key(name));
        self.received.retain(|name, _| plan.peers.contains_key(name));
        let mut changed = Vec::new();
        for (name, peer) in &plan.peers {
            let rx =
                device.and_then(|found| found.peers.get(&peer.public_key)).map_or(0, |found| found.rx_bytes);
            match self.received.get_mut(name) {
                Some((before, at)) if rx > *before => (*before, *at) = (rx, Instant::now()),
                Some((before, _)) => *before = rx,
                None => drop(self.received.insert(name.clone(), (rx, Instant::now()))),
            }
            let report = reports.get(&peer.public_key);
            let blocked = self.is_blocked(name, report);
            let state = state_of(peer, device, report, blocked, now);
            if self.states.get(name).is_none_or(|(before, _)| *before != state) {
                self.states.insert(name.clone(), (state, now));
                changed.push((name.clone(), state));
            }
        }
        changed
    }

    /// Whether a peer answers nowhere, and nothing arrives from it either: an agent that restarts answers no probe, and its device
    /// goes on.
    fn is_blocked(&self, name: &NodeName, report: Option<&PeerReport>) -> bool {
        let arrives = self.received.get(name).is_some_and(|(_, at)| at.elapsed() < ARRIVES);
        report.is_some_and(|report| report.blocked) && !arrives
    }

    /// Decisions of the prober that were not told yet.
    pub fn decisions(&mut self, plan: &MeshPlan, reports: &Reports) -> Vec<(NodeName, String)> {
        self.told.retain(|name, _| plan.peers.contains_key(name));
        let mut news = Vec::new();
        for (name, peer) in &plan.peers {
            let Some(report) = reports.get(&peer.public_key) else { continue };
            let told = self.told.get(name).copied();
            let fresh = report.decisions.iter().filter(|one| told.is_none_or(|at| one.at > at));
            news.extend(fresh.map(|one| (name.clone(), one.text())));
            if let Some(last) = report.decisions.last() {
                self.told.insert(name.clone(), last.at);
            }
        }
        news
    }

    /// The peers as status tells them.
    pub fn peers(
        &self,
        plan: &MeshPlan,
        device: Option<&ObservedDevice>,
        reports: &Reports,
        now: SystemTime,
    ) -> Vec<PeerStatus> {
        let status = |(name, peer): (&NodeName, &PlannedPeer)| {
            let found = device.and_then(|d| d.peers.get(&peer.public_key));
            let (state, since) = self.states.get(name).copied().unwrap_or((PeerState::Missing, now));
            let age =
                found.and_then(|f| f.last_handshake).map(|at| now.duration_since(at).unwrap_or_default());
            let report = reports.get(&peer.public_key);
            let carrying = report.and_then(|report| report.carrying);
            let ago = |at: Instant| rfc3339(now.checked_sub(at.elapsed()).unwrap_or(now));
            let lines = report.map(|report| report.lines.clone()).unwrap_or_default();
            let decisions: Vec<DecisionStatus> = report
                .map(|report| report.decisions.as_slice())
                .unwrap_or_default()
                .iter()
                .map(|one| DecisionStatus { at: ago(one.at), text: one.text() })
                .collect();
            let blocked = self.is_blocked(name, report);
            PeerStatus {
                path_since: carrying.map(|(.., at)| ago(at)),
                why: match state {
                    PeerState::Unencryptable => Some(UNENCRYPTABLE.to_owned()),
                    _ => decisions.last().map(|one| one.text.clone()),
                },
                exemption: peer.exemption.clone(),
                probed: lines
                    .iter()
                    .find(|line| carrying.is_some_and(|(_, address, _)| address == line.address))
                    .cloned(),
                through: report
                    .map(|report| report.through.as_slice())
                    .unwrap_or_default()
                    .iter()
                    .map(|end| ThroughStatus {
                        from: end.from,
                        to: end.to,
                        reach: end.reach,
                        since: ago(end.since),
                        answered_seconds: end.answered_at.map(|at| at.elapsed().as_secs()),
                    })
                    .collect(),
                candidates: lines,
                decisions,
                name: name.clone(),
                site: peer.site.clone(),
                public_key: peer.public_key,
                endpoint: found
                    .and_then(|f| f.endpoint)
                    .or(carrying.filter(|_| !peer.encrypted).map(|(_, address, _)| address)),
                path: if blocked || state == PeerState::Unencryptable {
                    "blocked".to_owned()
                } else {
                    peer.path.as_str().to_owned()
                },
                encrypted: peer.encrypted,
                state,
                since: rfc3339(since),
                handshake_age_seconds: age.map(|age| age.as_secs()),
                rx_bytes: found.map_or(0, |f| f.rx_bytes),
                tx_bytes: found.map_or(0, |f| f.tx_bytes),
                prefixes: peer.allowed_ips.iter().copied().collect(),
                mtu: peer.mtu,
            }
        };
        plan.peers.iter().map(status).collect()
    }
}

/// A time as RFC 3339 in UTC, to the second.
pub fn rfc3339(at: SystemTime) -> String {
    let seconds = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let known = i64::try_from(seconds).ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
    known.unwrap_or(Timestamp::MAX).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_rfc_3339() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
        ] {
            assert_eq!(rfc3339(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }
}
