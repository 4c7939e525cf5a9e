//! Enforces policy beside the agent's loop: what the registry says of pods and policies reaches the kernel without waiting for a turn.

mod flows;
mod names;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use mesh_keyring::NodeName;
use mesh_overlay::MeshPlan;
use mesh_overlay::address::{Carried, carrier_prefix};
use mesh_policy::compile::{Logging, Settings};
use mesh_policy::enforce::Backend as _;
use mesh_policy::model::{Labels, ObjectId};
use mesh_policy::nft::{Foreign, Ownership, Table, Watch};
use mesh_policy::world::Node;
use mesh_policy::{Compiler, Enforcer, Event};
use tokio::sync::Notify;

use crate::config::{Config, Mode, Policy, SiteStances, Stance};
use crate::registry::Host;
use crate::registry::feed::Feed;
use crate::status::{PolicyCounters, PolicyStatus};
use flows::Flows;
pub use flows::aside;
use names::Answers;
pub use names::FILE as NAMES;

/// How often a table that others may change is looked after.
const LOOK: Duration = Duration::from_millis(500);
/// The most refused policies that are named.
const PROBLEMS_MOST: usize = 64;
/// After a failure the table is tried again this soon.
const RETRY: Duration = Duration::from_secs(2);

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
        check_sources: policy.check_sources,
        outside: policy.outside_interfaces.iter().map(ToString::to_string).collect(),
        vxlan: BTreeSet::new(),
        audit: policy.mode == Mode::Audit,
        log: Logging { group: policy.log.group, denied: policy.log.denied, allowed: policy.log.allowed },
        mask: policy.ct_mark_mask,
    }
}

/// The UDP ports that carry the mesh.
fn carriers(plan: &MeshPlan) -> BTreeSet<u16> {
    let vxlan = plan.guard.cleartext.iter().map(|cleartext| cleartext.vxlan_port);
    let tunnels = plan.vxlan.iter().map(|device| device.port);
    vxlan.chain(tunnels).chain([plan.device.listen_port]).collect()
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
    // Those that are no peers are nodes all the same.
    for (name, host) in said {
        nodes.entry(name.clone()).or_insert_with(|| {
            let (labels, status_addresses) = described(Some(host));
            Node { labels, status_addresses, ..Node::default() }
        });
    }
    nodes
}

/// All prefixes of the mesh and of this node.
fn known_prefixes(settings: &Settings) -> BTreeSet<IpNet> {
    settings.scope.iter().chain(&settings.own).copied().collect()
}

/// What the agent knows beside its plan.
#[derive(Debug, Clone, Default)]
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

struct Shared {
    config: Config,
    feed: Feed,
    enforcer: Option<Enforcer<Table>>,
    // As long as there is no table.
    compiler: Option<Compiler>,
    watch: Option<Watch>,
    // Surroundings and nodes as of the last plan, and what was known beside it.
    followed: Option<(Settings, BTreeMap<String, Node>, Known)>,
    // The registry has said all once.
    complete: bool,
    // This process has written the table, or taken it away.
    written: bool,
    // The sites' policies that count now.
    stances: Vec<ObjectId>,
    failure: Option<String>,
    retry_at: Option<Instant>,
    flows: Flows,
    answers: Answers,
    counters: BTreeMap<String, (u64, u64)>,
    passes: u64,
    writes: u64,
}

/// Policy with its task.
#[derive(Clone)]
pub struct Policing {
    shared: Rc<RefCell<Shared>>,
    followed: Rc<Notify>,
    news: Rc<Notify>,
}

impl Policing {
    /// Begins to enforce what the feed says, once a plan is known. Needs a `LocalSet`.
    pub fn start(config: Config, feed: Feed) -> Self {
        let flows = Flows::new(&config);
        let answers = Answers::new(&config);
        let policing = Self {
            shared: Rc::new(RefCell::new(Shared {
                config,
                feed,
                enforcer: None,
                compiler: None,
                watch: None,
                followed: None,
                complete: false,
                written: false,
                stances: Vec::new(),
                failure: None,
                retry_at: None,
                flows,
                answers,
                counters: BTreeMap::new(),
                passes: 0,
                writes: 0,
            })),
            followed: Rc::default(),
            news: Rc::default(),
        };
        tokio::task::spawn_local(policing.clone().run());
        policing
    }

    /// Enforces for the surroundings of this plan. Whether the mesh may be brought up: policy stands, or is off.
    pub fn follow(&self, plan: &MeshPlan, known: Known) -> bool {
        let stands = self.shared.borrow_mut().follow(plan, known);
        self.followed.notify_one();
        stands
    }

    /// Whether all policies are known and stand, or policy is off.
    pub fn is_ready(&self) -> bool {
        let shared = self.shared.borrow();
        shared.is_off() || shared.complete && shared.written && shared.failure.is_none()
    }

    /// Whether there is no policy and no word of sites, where that is known.
    pub fn unpoliced(&self) -> Option<bool> {
        let shared = self.shared.borrow();
        let enforcer = shared.enforcer.as_ref().filter(|_| shared.complete)?;
        Some(enforcer.compiler.state().policies.iter().next().is_none())
    }

    /// What is wrong.
    pub fn failures(&self) -> impl Iterator<Item = String> {
        let shared = self.shared.borrow();
        let half = shared.feed.staleness().filter(|_| !shared.complete && !shared.is_off());
        let half = half.map(|why| format!("policy: pods and policies are not all known: {why}"));
        let compiler = shared.enforcer.as_ref().map(|enforcer| &enforcer.compiler);
        let unheard = compiler.and_then(|compiler| shared.answers.failure(compiler));
        [shared.failure.clone(), half, shared.flows.failure(), unheard].into_iter().flatten()
    }

    /// Waits until readiness may have changed. Safe to drop and call again.
    pub async fn changed(&self) {
        self.news.notified().await;
    }

    /// What the status says of policy.
    pub fn status(&self) -> PolicyStatus {
        self.shared.borrow_mut().status()
    }

    /// Writes what is still to be told. What is enforced stays.
    pub fn stop(&self) {
        let mut shared = self.shared.borrow_mut();
        let Shared { enforcer, flows, answers, .. } = &mut *shared;
        if let Some(enforcer) = enforcer {
            flows.turn(&enforcer.compiler, true);
            answers.keep(&enforcer.compiler);
        }
    }

    async fn run(self) {
        let feed = self.shared.borrow().feed.clone();
        loop {
            let wake = self.shared.borrow().wake_at();
            let sleep = async {
                match wake {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            let listener = self.shared.borrow().flows.listener();
            let answers = self.shared.borrow().answers.listener();
            let readable = |socket: Option<flows::Socket>| async move {
                match socket {
                    Some(socket) => flows::readable(&socket).await,
                    None => std::future::pending().await,
                }
            };
            let (logged, answered) = (readable(listener), readable(answers));
            tokio::select! {
                () = feed.changed() => {}
                () = self.followed.notified() => {}
                () = sleep => {}
                () = logged => {}
                () = answered => {}
            }
            let before = (self.is_ready(), self.unpoliced());
            self.shared.borrow_mut().turn(Instant::now());
            if before != (self.is_ready(), self.unpoliced()) {
                self.news.notify_one();
            }
        }
    }
}

impl Shared {
    fn is_off(&self) -> bool {
        self.config.policy.mode == Mode::Off
    }

    fn follow(&mut self, plan: &MeshPlan, known: Known) -> bool {
        if self.is_off() {
            self.leave();
            return true;
        }
        let around = around(&self.config, plan, &known);
        let nodes = nodes(&self.config, plan, &known.hosts);
        self.followed = Some((around, nodes, known));
        self.configure();
        self.turn(Instant::now());
        self.enforcer.as_ref().is_some_and(|enforcer| enforcer.backend.stands())
    }

    /// Tells the compiler what was followed last.
    fn configure(&mut self) {
        let Some((mut settings, nodes, known)) = self.followed.clone() else { return };
        // As long as half is known, nobody is let through who may turn out to be isolated; where nothing was denied before, nobody is
        // kept.
        if !self.complete {
            settings.strangers = known.unpoliced;
        }
        if !self.flows.hears() {
            (settings.log.denied, settings.log.allowed) = (0, 0);
        }
        settings.resolvers = settings.resolvers.filter(|_| self.answers.hears());
        let own = &self.config.policy.sites;
        let said = if own.is_silent() { &known.stances } else { own };
        let site = [self.config.site.to_string()].into();
        let stances = said.policies(&self.config.grants.mesh, &site);
        if self.enforcer.is_none() && self.compiler.is_none() {
            let mut compiler = Compiler::new(settings.clone());
            self.answers.recall(&mut compiler, &known_prefixes(&settings));
            self.compiler = Some(compiler);
        }
        if let Some(compiler) = self.compiler() {
            compiler.configure(settings, nodes);
        }
        let kept: Vec<ObjectId> = stances.iter().map(|policy| policy.id.clone()).collect();
        let before = std::mem::replace(&mut self.stances, kept.clone());
        for id in before.into_iter().filter(|id| !kept.contains(id)) {
            self.tell(Event::PolicyGone(id));
        }
        for policy in stances {
            self.tell(Event::Policy(policy.into()));
        }
    }

    fn compiler(&mut self) -> Option<&mut Compiler> {
        match &mut self.enforcer {
            Some(enforcer) => Some(&mut enforcer.compiler),
            None => self.compiler.as_mut(),
        }
    }

    fn tell(&mut self, event: Event) {
        if let Some(compiler) = self.compiler() {
            compiler.take(event);
        }
    }

    /// Takes a table away that an agent with another configuration has left.
    fn leave(&mut self) {
        if !self.written {
            self.failure = remove().err();
            self.written = self.failure.is_none();
        }
    }

    fn wake_at(&self) -> Option<Instant> {
        let looked_after = self.watch.is_some().then(|| Instant::now() + LOOK);
        let opens = self.enforcer.as_ref().and_then(|enforcer| enforcer.wake_at());
        // After a failure nothing is due before the next try.
        let due = self.retry_at.or(opens);
        let told = self.enforcer.as_ref().and_then(|_| self.flows.wake_at());
        let named = self.answers.wake_at(self.enforcer.as_ref().map(|enforcer| &enforcer.compiler));
        [looked_after, due, told, named].into_iter().flatten().min()
    }

    fn turn(&mut self, now: Instant) {
        // Before anything was planned nobody knows what is to be enforced.
        if self.is_off() || self.compiler().is_none() {
            return;
        }
        let heard = (self.flows.hears(), self.answers.hears());
        self.flows.listen();
        self.answers.listen();
        if (self.flows.hears(), self.answers.hears()) != heard {
            self.configure();
        }
        // Who had an address when its packet was told, not who has it after what comes now.
        let Self { enforcer, flows, answers, followed, .. } = self;
        if let Some(enforcer) = enforcer {
            flows.turn(&enforcer.compiler, false);
            let mesh = followed.as_ref().map(|(settings, ..)| known_prefixes(settings)).unwrap_or_default();
            answers.turn(&mut enforcer.compiler, &mesh);
        }
        // Half of it would open what the other half closes.
        if self.complete || self.feed.complete() {
            let events = self.feed.take();
            if !std::mem::replace(&mut self.complete, true) {
                self.configure();
            }
            events.into_iter().for_each(|event| self.tell(event));
        }
        if self.retry_at.is_some_and(|at| now < at) {
            return;
        }
        self.retry_at = None;
        match self.enforce(now) {
            Ok(()) => self.failure = None,
            Err(why) => {
                self.failure = Some(format!("policy: {why}"));
                self.retry_at = Some(now + RETRY);
            }
        }
    }

    fn enforce(&mut self, now: Instant) -> Result<(), String> {
        if let Some(compiler) = self.compiler.take() {
            match open() {
                Ok((table, watch)) => {
                    let chance = getrandom::u32().unwrap_or_default();
                    self.enforcer = Some(Enforcer::new(compiler, table, chance));
                    self.watch = watch;
                }
                Err(why) => {
                    self.compiler = Some(compiler);
                    return Err(why);
                }
            }
        }
        let synced = self.followed.as_ref().is_some_and(|(.., known)| known.synced);
        let Some(enforcer) = &mut self.enforcer else { return Ok(()) };
        if let Some(watch) = &mut self.watch {
            heed(watch, enforcer)?;
        }
        // What an agent before this one has left is better than what is known of half a registry.
        if !self.written && enforcer.backend.stands() && !(self.complete && synced) {
            return Ok(());
        }
        let began = Instant::now();
        let pass = enforcer.pass(now).map_err(|e| e.to_string())?;
        self.written = true;
        if pass.changes > 0 {
            self.passes += 1;
            self.writes += pass.changes as u64;
            tracing::debug!(changes = pass.changes, whole = pass.whole, revoked = pass.revoked, took = ?began.elapsed(), "policy");
        }
        Ok(())
    }

    fn status(&mut self) -> PolicyStatus {
        let mode = match self.config.policy.mode {
            Mode::Enforce => "enforce",
            Mode::Audit => "audit",
            Mode::Off => "off",
        };
        let mut status = PolicyStatus {
            mode: mode.to_owned(),
            complete: self.complete,
            problems: self.feed.problems(),
            stale: self.feed.staleness(),
            transactions: self.passes,
            changes: self.writes,
            ..PolicyStatus::default()
        };
        if let Some(enforcer) = &mut self.enforcer {
            status.standing = enforcer.backend.stands() && self.failure.is_none();
            status.owned = enforcer.backend.ownership() == Ownership::Owner;
            // What cannot be read now is what it was.
            if let Ok(counters) = enforcer.backend.counters() {
                self.counters = counters;
            }
            let packets = |name: &str| self.counters.get(name).map_or(0, |(packets, _)| *packets);
            status.dropped = PolicyCounters {
                egress: packets("denied_egress"),
                ingress: packets("denied_ingress"),
                spoofed: packets("spoofed"),
                unknown: packets("unknown"),
                invalid: packets("invalid"),
                midstream: packets("midstream"),
            };
            let state = enforcer.compiler.state();
            status.policies = state.policies.iter().count();
            status.pods = state.world.pods().count();
            status.local_addresses = enforcer.compiler.locals().count();
            status.problems.extend(state.refusals().take(PROBLEMS_MOST));
            if let Some(more) = state.faults.len().checked_sub(PROBLEMS_MOST + 1) {
                status.problems.push(format!("and {} objects more", more + 1));
            }
        }
        (status.flows_written, status.flows_lost) = self.flows.counts();
        status
    }
}

/// Whether somebody else has changed a table that is not ours alone.
fn heed(watch: &mut Watch, enforcer: &mut Enforcer<Table>) -> Result<(), String> {
    let own = enforcer.backend.port_id();
    let foreign = match watch.foreign(own).unwrap_or(Foreign::Perhaps) {
        Foreign::No => false,
        Foreign::Yes => true,
        // Large changes of our own are too much for it as well.
        Foreign::Perhaps => !enforcer.backend.verify(enforcer.compiler.ruleset()).unwrap_or(false),
    };
    if foreign {
        tracing::warn!("somebody else has changed the nftables table of policy: it is written anew");
        enforcer.distrust();
        enforcer.backend.look_again().map_err(|e| e.to_string())?;
    }
    Ok(())
}

fn open() -> Result<(Table, Option<Watch>), String> {
    // Before the table: what happens to it in between is noticed.
    let watch = Watch::new().map_err(|e| format!("watching nftables: {e}"))?;
    let table = Table::open(Ownership::Owner).map_err(|e| e.to_string())?;
    let shared = table.ownership() == Ownership::Shared;
    Ok((table, shared.then_some(watch)))
}

/// Removes the table of policy.
///
/// # Errors
/// What the kernel says.
pub fn remove() -> Result<(), String> {
    let mut table = Table::open(Ownership::Owner).map_err(|e| e.to_string())?;
    table.remove().map_err(|e| e.to_string())
}
