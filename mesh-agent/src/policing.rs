//! Enforces policy beside the agent's loop, in a thread of its own: what the registry says of pods and policies reaches the kernel
//! without waiting for a turn, and a ruleset that takes long to compile or to commit keeps nobody waiting.
//!
//! The loop tells the thread which plan to follow, and reads what it has published last (`Seen`).

mod enforcing;
mod flows;
mod names;
mod queue;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};
use mesh_keyring::NodeName;
use mesh_overlay::address::{Carried, carrier_prefix};
use mesh_overlay::{MeshPlan, prefix};
use mesh_policy::compile::{Logging, Settings};
use mesh_policy::model::Labels;
use mesh_policy::world::Node;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use crate::config::{Config, Mode, Policy, RegistryChoice, SiteStances, Stance};
use crate::registry::Host;
use crate::registry::feed::Feed;
use crate::status::{OverBudgetStatus, PolicyStatus};
pub use enforcing::remove;
pub use flows::aside;
pub use names::FILE as NAMES;

/// How long a pass waits for the surroundings of a new plan to be enforced, before it goes on without bringing anything up.
const FOLLOWS: Duration = Duration::from_millis(300);
/// How long a status waits for what is so now, before it tells what was so last.
const ANSWERS: Duration = Duration::from_millis(200);
/// A change that takes longer than this is told as a problem.
const STUCK: Duration = Duration::from_secs(3);
/// How long the end waits for what is still to be written.
const ENDS: Duration = Duration::from_secs(1);

/// What the configuration says to the compiler. Node, interfaces and addresses are left to who knows them. `strangers`: whether local
/// addresses that no known pod has may speak, where the configuration does not say.
pub fn settings(policy: &Policy, strangers: bool) -> Settings {
    Settings {
        node: String::new(),
        tunnels: BTreeSet::new(),
        keyless: BTreeSet::new(),
        scope: BTreeSet::new(),
        own: BTreeSet::new(),
        address: None,
        strangers: policy.unknown.map_or(strangers, |stance| stance == Stance::Allow),
        carriers: BTreeSet::new(),
        failsafe: policy.failsafe(),
        resolvers: policy.dns.resolvers(),
        outside_prefixes: policy.outside_prefixes != Some(Stance::Deny),
        check_sources: policy.check_sources,
        outside: policy.outside_interfaces.iter().map(ToString::to_string).collect(),
        vxlan: BTreeSet::new(),
        audit: policy.mode == Mode::Audit,
        log: Logging { group: policy.log.group, denied: policy.log.denied, allowed: policy.log.allowed },
        mask: policy.ct_mark_mask,
        budgets: policy.budgets.budgets(),
    }
}

/// The UDP ports that carry the mesh.
fn carriers(plan: &MeshPlan) -> BTreeSet<u16> {
    let vxlan = plan.guard.cleartext.iter().map(|cleartext| cleartext.vxlan_port);
    let tunnels = plan.vxlan.iter().map(|device| device.port);
    vxlan.chain(tunnels).chain([plan.device.listen_port]).collect()
}

/// Returns whether a pod is believed that it has an address in no node's prefixes.
pub fn outside(config: &Config) -> bool {
    let said = config.policy.outside_prefixes.map(|stance| stance == Stance::Allow);
    said.unwrap_or(matches!(config.registry, RegistryChoice::File(_)))
}

/// The UDP ports on which this node's VXLAN devices listen.
fn vxlan_ports(plan: &MeshPlan) -> BTreeSet<u16> {
    plan.vxlan.iter().map(|device| device.port).collect()
}

/// The same, with a node's surroundings by its plan.
fn around(config: &Config, plan: &MeshPlan, known: &Known) -> Settings {
    let said = settings(&config.policy, known.strangers);
    // What a VXLAN device of the mesh carries is judged by the guard.
    let names = plan.vxlan.iter().map(|device| device.name.to_string());
    let guard = &plan.guard;
    let cleartext = guard.cleartext.iter().flat_map(|cleartext| &cleartext.interfaces);
    let keyless: BTreeSet<String> = cleartext.map(ToString::to_string).collect();
    // On the devices of exempt nodes their probes come from addresses of the link.
    let links =
        guard.cleartext.iter().map(|_| carrier_prefix(&config.grants.mesh, Carried::Cleartext).into());
    let inside = guard.mesh.iter().chain(&guard.local).filter(|net| !guard.outside.contains(net));
    Settings {
        node: config.node.to_string(),
        tunnels: guard.interfaces.iter().map(ToString::to_string).chain(keyless.iter().cloned()).collect(),
        keyless,
        scope: inside.copied().chain(links).collect(),
        own: guard.local.clone(),
        address: plan.addresses.iter().map(IpNet::addr).find(IpAddr::is_ipv6),
        outside_prefixes: outside(config),
        outside: said.outside.iter().chain(&known.outside).cloned().chain(names).collect(),
        vxlan: vxlan_ports(plan),
        carriers: carriers(plan),
        ..said
    }
}

fn described(host: Option<&Host>) -> (Option<Labels>, BTreeSet<IpAddr>) {
    host.map_or_else(Default::default, |host| (Some(host.labels.clone()), host.addresses.clone()))
}

/// The nodes of the mesh, as policy knows them, and those of the cluster.
fn nodes(config: &Config, plan: &MeshPlan, said: &BTreeMap<String, Host>) -> BTreeMap<String, Node> {
    let node = |name: &NodeName, site: String, nets: &BTreeSet<IpNet>| {
        let (own, prefixes): (BTreeSet<IpNet>, _) =
            nets.iter().partition(|net| net.prefix_len() == net.max_prefix_len());
        let (labels, status_addresses) = described(said.get(name.as_str()));
        let addresses = own.iter().map(IpNet::addr).collect();
        (name.to_string(), Node { site: Some(site), labels, addresses, status_addresses, prefixes })
    };
    let peers = plan.peers.iter();
    let others = peers.map(|(name, peer)| node(name, peer.site.to_string(), &peer.allowed_ips));
    let own = plan.guard.local.iter().chain(&plan.addresses).copied().collect();
    let mut nodes: BTreeMap<String, Node> =
        others.chain([node(&config.node, config.site.to_string(), &own)]).collect();
    let held: BTreeSet<IpNet> = nodes.values().flat_map(|node| node.prefixes.iter().copied()).collect();
    // Those that are no peers are nodes all the same.
    for (name, host) in said {
        nodes.entry(name.clone()).or_insert_with(|| {
            let (labels, status_addresses) = described(Some(host));
            // What a peer holds is no one else's.
            let theirs = |net: &&IpNet| !held.iter().any(|other| prefix::overlap(other, net));
            let prefixes = host.prefixes.iter().filter(theirs).copied().collect();
            Node { labels, status_addresses, prefixes, ..Node::default() }
        });
    }
    nodes
}

/// What the agent knows beside its plan.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Known {
    /// What the Mesh says that sites may do to each other.
    pub stances: SiteStances,
    /// What Node objects say.
    pub hosts: Arc<BTreeMap<String, Host>>,
    /// The registry was read in full since the start.
    pub synced: bool,
    /// Whether local addresses that no known pod has may speak, where nobody says.
    pub strangers: bool,
    /// Nothing was denied before this agent started.
    pub unpoliced: bool,
    /// The interfaces that lead to no pod of this node.
    pub outside: BTreeSet<String>,
}

/// What the compiler is told of a plan.
#[derive(Debug, Clone, PartialEq)]
struct Surroundings {
    settings: Settings,
    nodes: BTreeMap<String, Node>,
    known: Known,
}

/// What the loop asks of the thread. The last word counts.
#[derive(Debug, Default)]
struct Orders {
    // The plan to follow, and how many there were before.
    surroundings: Option<Arc<Surroundings>>,
    planned: u64,
    // How often the status was asked for.
    asked: u64,
    // Somebody waits for a plan to be followed no more, and wants to know when it is.
    held: bool,
    ends: bool,
}

/// What the thread has published last.
#[derive(Debug, Clone, Default)]
struct Seen {
    // The plan that was followed last, by its number.
    followed: u64,
    // The question that was answered last.
    answered: u64,
    // A ruleset judges packets, this agent's or one before.
    stands: bool,
    ready: bool,
    unpoliced: Option<bool>,
    failures: Vec<String>,
    over: Vec<OverBudgetStatus>,
    status: PolicyStatus,
    ended: bool,
}

/// What both sides have.
struct Line {
    config: Config,
    feed: Feed,
    orders: Mutex<Orders>,
    wake: Notify,
    news: Notify,
    // Since when the thread is at work; `None`: it waits.
    busy: Mutex<Option<Instant>>,
}

/// Policy with its thread.
#[derive(Clone)]
pub struct Policing {
    line: Arc<Line>,
    seen: watch::Receiver<Seen>,
}

impl Policing {
    /// Begins to enforce what the feed says, once a plan is known.
    ///
    /// # Errors
    /// When the thread cannot be had.
    pub fn start(config: Config, feed: Feed) -> std::io::Result<Self> {
        let line = Arc::new(Line {
            config,
            feed,
            orders: Mutex::default(),
            wake: Notify::new(),
            news: Notify::new(),
            busy: Mutex::default(),
        });
        let seen = enforcing::start(line.clone())?;
        Ok(Self { line, seen })
    }

    fn is_off(&self) -> bool {
        self.line.config.policy.mode == Mode::Off
    }

    /// Enforces for the surroundings of this plan. Whether the mesh may be brought up: policy stands for this plan, or is off.
    ///
    /// Where that takes long it answers "not yet"; [`Policing::changed`] tells when to ask again.
    pub async fn follow(&self, plan: &MeshPlan, known: Known) -> bool {
        let config = &self.line.config;
        let settings = around(config, plan, &known);
        let nodes = nodes(config, plan, &known.hosts);
        self.order(Surroundings { settings, nodes, known }).await
    }

    async fn order(&self, surroundings: Surroundings) -> bool {
        let planned = {
            let mut orders = self.line.orders.lock();
            if orders.surroundings.as_deref() != Some(&surroundings) {
                orders.surroundings = Some(Arc::new(surroundings));
                orders.planned += 1;
            }
            orders.held = false;
            orders.planned
        };
        self.line.wake.notify_one();
        let mut seen = self.seen.clone();
        let followed = tokio::time::timeout(FOLLOWS, seen.wait_for(|seen| seen.followed >= planned)).await;
        let follows = match followed {
            Ok(Ok(seen)) => return self.is_off() || seen.stands,
            _ => self.seen.borrow().followed >= planned,
        };
        self.line.orders.lock().held = !follows;
        // It may just have been followed.
        let seen = self.seen.borrow();
        self.is_off() || seen.followed >= planned && seen.stands
    }

    /// Whether all policies are known and stand, or policy is off.
    pub fn is_ready(&self) -> bool {
        self.is_off() || self.seen.borrow().ready
    }

    /// Whether there is no policy and no word of sites, where that is known.
    pub fn unpoliced(&self) -> Option<bool> {
        self.seen.borrow().unpoliced
    }

    /// Lists what is wrong.
    pub fn failures(&self) -> Vec<String> {
        let mut failures = self.seen.borrow().failures.clone();
        if self.seen.has_changed().is_err() {
            failures.push("policy: its thread has ended; what stands stays: restart the agent".to_owned());
        }
        failures.extend(self.stuck());
        failures
    }

    /// Tells since when a change has been under way, where that is long.
    fn stuck(&self) -> Option<String> {
        let since = (*self.line.busy.lock())?;
        stuck(since.elapsed(), Timestamp::now())
    }

    /// Lists what is over a budget.
    pub fn over_budget(&self) -> Vec<OverBudgetStatus> {
        self.seen.borrow().over.clone()
    }

    /// Waits until readiness, or what is over a budget, may have changed. Safe to drop and call again.
    pub async fn changed(&self) {
        self.line.news.notified().await;
    }

    /// Tells what is so of policy now, or was so last where the thread is at work for long.
    pub async fn status(&self) -> PolicyStatus {
        let asked = {
            let mut orders = self.line.orders.lock();
            orders.asked += 1;
            orders.asked
        };
        self.line.wake.notify_one();
        let mut seen = self.seen.clone();
        let fresh = tokio::time::timeout(ANSWERS, seen.wait_for(|seen| seen.answered >= asked)).await;
        let late = !matches!(fresh, Ok(Ok(_)));
        drop(fresh);
        let mut status = self.seen.borrow().status.clone();
        if late {
            let since = *self.line.busy.lock();
            status.behind_seconds = Some(since.map_or(0.0, |since| since.elapsed().as_secs_f64()));
            status.problems.extend(self.stuck());
        }
        status
    }

    /// Has what is still to be told written. What is enforced stays.
    pub async fn stop(&self) {
        self.line.orders.lock().ends = true;
        self.line.wake.notify_one();
        let mut seen = self.seen.clone();
        // A commit that hangs must not keep the agent from ending.
        let _ = tokio::time::timeout(ENDS, seen.wait_for(|seen| seen.ended)).await;
    }
}

/// Returns the problem if a policy change has been under way for too long.
fn stuck(took: Duration, now: Timestamp) -> Option<String> {
    let since = (took >= STUCK).then(|| now - SignedDuration::try_from(took).unwrap_or_default())?;
    Some(format!(
        "policy-stuck: a change of policy has been under way since {since:.0}: no change after it is enforced yet; what stood before stands, and so does the guard. If it lasts, look at the kernel's log for nf_tables, and restart the agent"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = "site: aws\nmesh: prod\nregistry:\n  file:\n    dir: /etc/sennit/registry\n";

    /// Without a thread: what that would publish, the test does.
    fn alone() -> (Policing, watch::Sender<Seen>) {
        let config = Config::parse("agent.yaml", CONFIG, Some("n1")).unwrap();
        let line = Line {
            config,
            feed: Feed::new(),
            orders: Mutex::default(),
            wake: Notify::new(),
            news: Notify::new(),
            busy: Mutex::new(Some(Instant::now())),
        };
        let (publish, seen) = watch::channel(Seen::default());
        (Policing { line: Arc::new(line), seen }, publish)
    }

    fn surroundings(policing: &Policing, strangers: bool) -> Surroundings {
        let settings = settings(&policing.line.config.policy, strangers);
        Surroundings { settings, nodes: BTreeMap::new(), known: Known::default() }
    }

    fn run(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { tokio::time::timeout(Duration::from_secs(30), test).await.unwrap() });
    }

    #[test]
    fn nothing_is_brought_up_before_its_plan_stands() {
        run(async {
            let (policing, publish) = alone();
            assert!(!policing.order(surroundings(&policing, true)).await, "the thread is at work");
            assert!(policing.line.orders.lock().held);
            publish.send_modify(|seen| (seen.followed, seen.stands) = (1, true));
            assert!(policing.order(surroundings(&policing, true)).await);
            assert!(!policing.order(surroundings(&policing, false)).await, "another plan");
            publish.send_modify(|seen| (seen.followed, seen.stands) = (2, false));
            assert!(!policing.order(surroundings(&policing, false)).await, "the table could not be written");
        });
    }

    #[test]
    fn a_status_does_not_wait_for_the_thread() {
        run(async {
            let (policing, publish) = alone();
            publish.send_modify(|seen| seen.status.policies = 7);
            let status = policing.status().await;
            assert_eq!((status.policies, status.behind_seconds.is_some()), (7, true));
            publish.send_modify(|seen| (seen.answered, seen.status.policies) = (2, 8));
            let status = policing.status().await;
            assert_eq!((status.policies, status.behind_seconds), (8, None));
        });
    }

    #[test]
    fn a_change_that_hangs_is_told_with_its_beginning() {
        let now: Timestamp = "2026-12-01T10:00:07Z".parse().unwrap();
        assert_eq!(stuck(STUCK - Duration::from_millis(1), now), None);
        let told = stuck(Duration::from_secs(7), now).unwrap();
        assert!(told.starts_with("policy-stuck: ") && told.contains("since 2026-12-01T10:00:00Z"), "{told}");
        run(async {
            let (policing, _publish) = alone();
            assert!(policing.failures().is_empty() && policing.status().await.problems.is_empty());
            *policing.line.busy.lock() = Instant::now().checked_sub(2 * STUCK);
            assert!(policing.failures()[0].starts_with("policy-stuck: "));
            assert_eq!(policing.status().await.problems, policing.failures());
            *policing.line.busy.lock() = None;
            assert!(policing.failures().is_empty());
        });
    }

    #[test]
    fn the_end_does_not_wait_for_ever() {
        run(async {
            let (policing, publish) = alone();
            policing.stop().await;
            assert!(policing.line.orders.lock().ends && policing.failures().is_empty());
            drop(publish);
            policing.stop().await;
            assert_eq!(policing.failures().len(), 1, "nobody enforces any more");
        });
    }
}
