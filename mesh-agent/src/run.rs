//! The running agent: one level-triggered loop. Whatever happens only says "look again"; inputs that come
//! together are handled in one pass.

mod budgets;
pub mod control;
mod drift;
mod judging;
mod lock;
mod metrics;
mod server;
mod telling;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use ipnet::IpNet;
use jiff::Timestamp;
use mesh_keyring::{KeyFile, NodeName, PublicKey};
use mesh_overlay::backend::{BackendError, NetBackend as _};
use mesh_overlay::netlink::Netlink;
use mesh_overlay::nft::Nft;
use mesh_overlay::wireguard::Wireguard;
use mesh_overlay::wireguard::userspace::UserspaceConfig;
use mesh_overlay::{Exemption, ObservedDevice};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

use crate::agent::{Agent, Desired};
use crate::boot::{self, Standing};
use crate::bypass::{Needs, Watcher};
use crate::config::{Config, Mode};
use crate::descriptors;
use crate::identity::watch::Identity;
use crate::identity::{self, Begun};
use crate::notify::notify;
use crate::policing::{Known, Policing};
use crate::probing::Probing;
use crate::problem::{Problem, Since};
use crate::reach;
use crate::reconcile::{Pass, Reconciler};
use crate::registry::Registry;
use crate::resolve::Resolver;
use crate::state::{LastGood, LastGoodFile};
use crate::status::{Health, RefusedStatus};
use drift::Drift;
pub use lock::lock;

/// A pass is made at least this often: network file systems notify nobody.
const PERIOD: Duration = Duration::from_secs(10);
/// After a pass with errors the next comes this soon, then twice as late each time, up to [`PERIOD`].
const RETRY: Duration = Duration::from_millis(500);
/// How long a node that nobody can dial waits between being published and dialling: the others have to know its key by
/// then, or WireGuard tries again after five seconds only.
const HEAD_START: Duration = Duration::from_millis(500);
/// Netlink events come in bursts, our own among them.
const SETTLE: Duration = Duration::from_millis(100);
/// Passes that events or timers ask for come no faster than this; the registry's changes do.
const BREATH: Duration = Duration::from_secs(1);
/// What others do not need of a publication and could not be written is tried again after this.
const INFORM_RETRY: Duration = Duration::from_secs(30);
/// But when a path has died traffic waits.
const GULP: Duration = Duration::from_millis(50);

/// The node's key file.
pub fn key_file(config: &Config) -> KeyFile {
    // In a directory of its own: the store closes it to others, which the state directory may be shared with.
    KeyFile::new(&config.state_dir.join("keys"), "private.key")
}

/// Where `mesh-wg` logs.
pub fn device_log(config: &Config) -> PathBuf {
    config.run_dir.join(format!("{}.log", config.wireguard.interface))
}

/// The file that keeps a second agent away.
pub fn lock_path(config: &Config) -> PathBuf {
    config.run_dir.join(lock::FILE)
}

/// Returns the path of the lock in the state directory. It serves if runDir cannot be used.
pub fn state_lock_path(config: &Config) -> PathBuf {
    config.state_dir.join(lock::FILE)
}

/// The WireGuard backend that is configured, or that this host has. `own` is the key by which it knows a device as ours.
///
/// # Errors
/// When the one configured is not to be had.
pub fn wireguard(config: &Config, own: Option<PublicKey>) -> anyhow::Result<Wireguard> {
    let wireguard = &config.wireguard;
    let userspace = UserspaceConfig {
        interface: wireguard.interface,
        binary: wireguard.userspace_binary.clone(),
        run_dir: config.run_dir.clone(),
        uapi_dir: PathBuf::from(UserspaceConfig::UAPI_DIR),
        own,
        external: wireguard.external_device,
    };
    Ok(Wireguard::choose(wireguard.backend, userspace)?)
}

/// The first failures of a part of the agent are logged once, and their end too.
#[derive(Default)]
struct Errors {
    now: Vec<String>,
}

impl Errors {
    fn replace(&mut self, mut all: Vec<String>) {
        all.dedup();
        let (before, after): (BTreeSet<&String>, BTreeSet<&String>) =
            (self.now.iter().collect(), all.iter().collect());
        for fresh in after.difference(&before) {
            tracing::error!("{fresh}");
        }
        for gone in before.difference(&after) {
            tracing::info!("no longer: {gone}");
        }
        self.now = all;
    }
}

struct Running {
    config: Config,
    public_key: PublicKey,
    agent: Agent,
    registry: Registry,
    resolver: Resolver,
    reconciler: Reconciler<Wireguard, Netlink, Nft>,
    last_good: LastGoodFile,
    probing: Probing,
    policing: Policing,
    bypass: Watcher,
    reach: reach::Watcher,
    // What is wrong between this node and the registry.
    estranged: Vec<Problem>,
    estranged_since: Since,
    identity: Identity,
    health: Health,
    errors: Errors,
    refused: Vec<RefusedStatus>,
    budgets: budgets::Told,
    // To whom packets travel in clear, and why.
    in_clear: BTreeMap<NodeName, Exemption>,
    desired: Desired,
    pass: Pass,
    changes: usize,
    // Packets that policy had dropped when that was last of interest.
    denied: u64,
    failures: u32,
    ready: bool,
    notified: bool,
    announced_at: Option<Instant>,
    // Dialling was put off by the head start.
    held_back: bool,
    // The registry holds what others need to know of us.
    stands: bool,
    // When what comes and goes of a publication may be written again, after it could not.
    inform_at: Instant,
    complaint: Option<Complaint>,
    // Something that this agent could not begin with can be had now: it begins anew.
    again: bool,
    // Prefixes that stay guarded, as told last.
    kept: BTreeSet<IpNet>,
}

/// A configuration that could not be used: the last one that could is in force.
#[derive(Debug, Clone)]
pub struct Complaint {
    /// What is wrong with it.
    pub why: String,
    /// The file.
    pub file: PathBuf,
    /// The node's name where the file has none.
    pub node: Option<String>,
}

/// Why an agent ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It was told to.
    Told,
    /// Registry or configuration, which could not be used when it began, now can: it is to begin anew.
    Again,
}

/// Runs until SIGTERM or SIGINT. What carries traffic stays as it is. A registry that cannot be opened, a device
/// that cannot be had and sockets that cannot be bound are told in status and tried again.
///
/// # Errors
/// Only before the loop: a bad key, a second agent, no netlink, neither runDir nor stateDir.
pub async fn run(mut config: Config, complaint: Option<Complaint>) -> anyhow::Result<Ended> {
    let mut lock = lock(&config)?;
    let policy = config.policy.mode != Mode::Off;
    let (registry, servers) =
        Registry::open_or_closed(&config.registry, &config.grants.mesh, &config.site, policy).await;
    // A peer that held them would take the API away from us.
    config.grants.protected.extend(servers);
    let last_good = LastGoodFile::new(&config.state_dir);
    let (mut remembered, broken) = last_good.load();
    if let Some(why) = broken {
        tracing::warn!("{why}");
    }
    let begun = identity::begin(&config, &mut remembered, SystemTime::now())?;
    let (public_key, epoch) = (begun.key.public(), begun.kept.generation);
    tracing::info!(node = %config.node, %public_key, epoch, instance = %begun.instance, "starting");
    disowned(&begun, &remembered, &last_good);
    let mut net = Netlink::new()?;
    let mut drift = Drift::new();
    let mut agent = Agent::new(config.clone(), public_key, epoch, remembered);
    agent.today(Timestamp::now());
    agent.underlay(net.observe(&config.wireguard.interface, &config.routing).await?.underlay);
    let desired = agent.desired(std::time::Instant::now());
    let probing = Probing::start(begun.key.clone())?;
    let policing =
        Policing::start(config.clone(), registry.feed().clone()).context("starting the thread of policy")?;
    let device = wireguard_or_missing(&config, public_key);
    let mut reconciler = Reconciler::new(device, net, Nft::new(), begun.key.clone());
    let stood = stands(reconciler.look_at_device().await.ok().flatten(), public_key);
    let identity = Identity::new(&config, &begun, stood, std::time::Instant::now());
    let standing = Standing::load(&config.state_dir).ok().flatten();
    reconciler.replaces(standing.map(|standing| standing.fingerprint()));
    let mut server = server::Listener::new(&config.socket());
    let mut control = control::Server::new(&config.control_socket());
    let mut metrics = metrics::Server::new(config.metrics.listen).await;
    let mut running = Running {
        registry,
        config,
        public_key,
        agent,
        resolver: Resolver::default(),
        reconciler,
        last_good,
        probing,
        policing,
        bypass: Watcher::default(),
        reach: reach::Watcher::default(),
        estranged: Vec::new(),
        estranged_since: Since::default(),
        identity,
        health: Health::default(),
        errors: Errors::default(),
        refused: Vec::new(),
        budgets: budgets::Told::default(),
        in_clear: BTreeMap::new(),
        desired,
        pass: Pass::default(),
        changes: 0,
        denied: 0,
        failures: 0,
        ready: false,
        notified: false,
        announced_at: None,
        held_back: false,
        stands: false,
        inform_at: Instant::now(),
        complaint,
        again: false,
        kept: BTreeSet::new(),
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let ended = loop {
        lock.again();
        let own = [
            descriptors::shortage(),
            lock.failure(),
            server.failure(),
            control.failure(),
            metrics.failure(),
            drift.failure(),
        ];
        // A turn that hangs on a wedged device must not keep the agent from ending.
        tokio::select! {
            () = running.turn(own.into_iter().flatten()) => {}
            _ = terminate.recv() => break Ended::Told,
            _ = interrupt.recv() => break Ended::Told,
        }
        if running.again {
            break Ended::Again;
        }
        let ended = Instant::now();
        let mut wake = running.wake_at();
        let (probing, policing) = (running.probing.clone(), running.policing.clone());
        let again = loop {
            tokio::select! {
                _ = terminate.recv() => break false,
                _ = interrupt.recv() => break false,
                () = running.registry.changed() => break true,
                () = policing.changed() => wake = wake.min(ended + GULP).max(Instant::now()),
                () = probing.changed() => wake = wake.min(ended + GULP).max(Instant::now()),
                () = running.resolver.changed(Instant::now) => wake = wake.min(ended + BREATH),
                () = drift.changed() => {
                    let settled = Instant::now() + SETTLE;
                    wake = wake.min(settled.max(ended + BREATH));
                }
                () = tokio::time::sleep_until(wake) => break true,
                asked = metrics.asked() => {
                    // Who has gone away needs no answer.
                    let _ = asked.send(running.status().await.to_metrics());
                }
                stream = server.accept() => {
                    let status = running.status().await;
                    server::answer(stream, &status);
                }
                asked = control.asked() => {
                    let answer = running.control(asked.request);
                    // Who has gone away needs no answer.
                    let _ = asked.answer.send(answer);
                    wake = Instant::now();
                }
            }
        };
        if !again {
            break Ended::Told;
        }
    };
    running.policing.stop().await;
    match ended {
        Ended::Told => {
            notify("STOPPING=1");
            tracing::info!("stopping; tunnels, routes and guard stay as they are");
        }
        Ended::Again => tracing::info!("beginning anew: what was missing at the start is there"),
    }
    Ok(ended)
}

/// Reports whether a device with this key has peers.
fn stands(device: Option<ObservedDevice>, key: PublicKey) -> bool {
    device.is_some_and(|device| device.public_key == Some(key) && !device.peers.is_empty())
}

/// Stores the state of a copy, so that a restart does not bring back the original's.
fn disowned(begun: &Begun, remembered: &LastGood, file: &LastGoodFile) {
    let Some(why) = &begun.copied else { return };
    tracing::warn!("this state was copied: {why}");
    if let Err(e) = file.store(remembered) {
        tracing::warn!("{}: {e}", file.path().display());
    }
}

/// As [`wireguard`]; one that cannot be had is missing, and tried again.
fn wireguard_or_missing(config: &Config, own: PublicKey) -> Wireguard {
    wireguard(config, Some(own)).unwrap_or_else(|why| {
        let why = match why.downcast::<BackendError>() {
            Ok(why) => why,
            Err(why) => BackendError::failed("choosing the WireGuard backend", format!("{why:#}")),
        };
        Wireguard::Missing(config.wireguard.interface, why)
    })
}

impl Running {
    /// Answers a request.
    fn control(&mut self, request: control::Request) -> control::Answer {
        match request {
            control::Request::Release(name) => {
                let released = self.agent.release(&name);
                for net in &released {
                    tracing::warn!(%net, name, "released from the guard: packets to it may leave in clear");
                }
                control::Answer::Released(released.iter().map(ToString::to_string).collect())
            }
            control::Request::Forget(node) => {
                let known = self.agent.forget(&node);
                tracing::warn!(%node, known, "forgotten: what it says next is judged as if it were new");
                control::Answer::Forgotten(known)
            }
            control::Request::Rekey(after) => match identity::rekey(&self.config, after, SystemTime::now()) {
                Ok(kept) => {
                    self.again = true;
                    tracing::warn!(public_key = %kept.public_key, "a new key was made");
                    control::Answer::Rekeyed(kept.public_key, kept.generation)
                }
                Err(why) => control::Answer::Refused(format!("{why:#}")),
            },
        }
    }

    /// Looks again at what could not be used at the start; returns what is wrong with the configuration.
    fn look_again(&mut self) -> Option<String> {
        self.again |= self.registry.opens();
        if let Wireguard::Missing(..) = self.reconciler.wireguard {
            self.reconciler.wireguard = wireguard_or_missing(&self.config, self.public_key);
        }
        let complaint = self.complaint.as_ref()?;
        self.again |= Config::load(&complaint.file, complaint.node.as_deref()).is_ok();
        Some(format!(
            "{}; the last configuration that was fine stays in force until it is mended",
            complaint.why
        ))
    }

    /// One turn: read what changed, decide, apply, remember, publish. `own`: what is wrong with this process itself.
    async fn turn(&mut self, own: impl Iterator<Item = String>) {
        let mut errors: Vec<String> = self.look_again().into_iter().chain(own).collect();
        // What is decided now is decided by what the kernel shows now.
        let seen = self.reconciler.look(&self.config.wireguard.interface, &self.config.routing).await;
        if seen.net.underlay != Default::default() {
            self.agent.underlay(seen.net.underlay);
        }
        match self.registry.read() {
            Ok(snapshot) => {
                errors.extend(snapshot.stale.clone());
                match self.agent.snapshot(snapshot, std::time::Instant::now()) {
                    Ok(()) => self.registry.accepted(),
                    Err(why) => errors.push(why),
                }
            }
            Err(e) => errors.push(e.to_string()),
        }
        self.estrangement();
        self.agent.pods_are_objects(self.registry.knows_pods_of(&self.config.node));
        self.agent.resolved(self.resolver.resolution());
        self.agent.paths(self.probing.paths(), std::time::Instant::now());
        self.agent.today(Timestamp::now());
        self.desired = self.agent.desired(std::time::Instant::now());
        self.head_start();
        errors.extend(self.desired.warnings.iter().cloned());
        self.resolver.want(&self.desired.names, Instant::now());
        errors.extend(self.resolver.failures());

        let now = SystemTime::now();
        let needs = Needs::of(&self.config, &self.desired.plan);
        self.bypass.look(&mut self.reconciler.net, &needs, (std::time::Instant::now(), now)).await;
        errors.extend(self.bypass.errors());
        // Before the interface comes up. Where policy cannot stand, nothing does.
        let known = Known {
            stances: self.agent.stances(),
            hosts: self.agent.hosts(),
            synced: self.agent.is_synced(),
            strangers: self.agent.has_strangers(),
            unpoliced: self.agent.was_unpoliced(),
            outside: self.bypass.outside(&self.desired.plan.guard.local),
        };
        self.desired.judged = self.policing.follow(&self.desired.plan, known).await;
        if let Some(unpoliced) = self.policing.unpoliced() {
            self.agent.unpoliced(unpoliced);
            self.desired.last_good.unpoliced = Some(unpoliced);
        }
        errors.extend(self.policing.failures());
        // Before the host is changed: what stands after a crash or a reboot is never less than what stood.
        if self.agent.is_synced() && self.desired.harmful.is_none() {
            let standing = Standing::of(&self.desired.plan);
            if let Err(e) = standing.store(&self.config.state_dir) {
                errors.push(format!("{}: {e}", self.config.state_dir.join(boot::FILE).display()));
            }
        }
        if self.agent.is_synced()
            && let Err(e) = self.last_good.store(&self.desired.last_good)
        {
            errors.push(format!("{}: {e}", self.last_good.path().display()));
        }
        let clock = (std::time::Instant::now(), now);
        let generation = self.identity.look(self.agent.nodes(), &mut self.desired, clock);
        self.agent.generation(generation);
        self.again |= self.identity.begins_anew();
        errors.extend(self.identity.errors());
        let pass = match &self.desired.harmful {
            Some(why) => {
                errors.push(why.clone());
                // It may be over as soon as an address is gone.
                self.reconciler.revoke_only(&self.desired, now).await
            }
            None => self.reconciler.pass(&self.desired, now).await,
        };
        if pass.changes > 0 {
            tracing::info!(changes = pass.changes, peers = self.desired.plan.peers.len(), "applied");
        }
        self.probing.follow(&self.desired.plan);
        if let Some(device) = &pass.device {
            self.probing.observed(device);
        }
        errors.extend(self.probing.failure());
        errors.extend(pass.hindered.iter().map(ToString::to_string));
        let failed = !pass.errors.is_empty();
        errors.extend(pass.errors.iter().map(ToString::to_string));
        // Others may dial only what is there: publish after the device listens.
        let (mut published, mut held) = (false, false);
        if pass.device.is_some() && !failed {
            // What others need of us stands there already; the rest can wait.
            published = self.stands && !self.identity.asks();
            let annotations = self.identity.annotations(&self.desired.publish);
            // Of a registry that was not read nothing is known, and what stood there last has to do.
            held = annotations.is_none() && self.agent.is_synced();
            published &= !held;
            if let Some(annotations) = annotations.filter(|_| !published || Instant::now() >= self.inform_at)
            {
                match self.registry.write(&self.config.node, &annotations).await {
                    Ok(wrote) => {
                        published = self.identity.written(wrote, std::time::Instant::now());
                        held = !published;
                    }
                    Err(e) => {
                        self.inform_at = Instant::now() + INFORM_RETRY;
                        errors.push(e.to_string());
                    }
                }
            }
        }
        let reports = self.probing.report();
        for (node, state) in self.health.observe(&self.desired.plan, pass.device.as_ref(), &reports, now) {
            tracing::info!(peer = %node, ?state, "tunnel");
        }
        for (node, text) in self.health.decisions(&self.desired.plan, &reports) {
            tracing::info!(peer = %node, "path: {text}");
        }
        self.changes += pass.changes;
        self.pass = pass;
        self.look_at_reach(&reports, now).await;
        errors.extend(self.reach.problems().iter().map(ToString::to_string));
        self.tell_refusals();
        self.tell_kept();
        for notice in self.budgets.fresh(&self.policing.over_budget(), std::time::Instant::now()) {
            tracing::warn!("{}: {}", notice.reason, notice.note);
            self.registry.tell(&self.config.node, notice);
        }
        if self.agent.is_synced() {
            self.tell_exemptions();
        }
        let unfinished = failed || !published;
        // Who may not publish yet has not failed.
        self.failures = if unfinished && (failed || !held) { self.failures.saturating_add(1) } else { 0 };
        self.errors.replace(errors);
        // For the service manager guard and device are enough: with the registry away a restart would mend nothing.
        if !failed && self.pass.device.is_some() && !std::mem::replace(&mut self.notified, true) {
            notify("READY=1");
        }
        let ready = !unfinished && self.agent.is_synced() && self.policing.is_ready() && !self.blocked();
        if ready && !self.ready {
            tracing::info!(peers = self.desired.plan.peers.len(), "ready");
        }
        self.ready = ready;
    }

    fn head_start(&mut self) {
        self.held_back = false;
        self.stands = self.desired.announced;
        if !self.desired.announced {
            return;
        }
        let since = *self.announced_at.get_or_insert_with(Instant::now);
        let hidden = self.desired.publish.endpoints.is_empty();
        self.desired.announced = !hidden || since.elapsed() >= HEAD_START;
        self.held_back = !self.desired.announced;
    }

    fn wake_at(&self) -> Instant {
        let now = Instant::now();
        let mut wake = now + PERIOD;
        if self.failures > 0 {
            wake = wake.min(now + RETRY * 2u32.saturating_pow((self.failures - 1).min(8)));
        }
        // Not where a publication that differs again cannot be written: the head start is long over then.
        if let Some(at) = self.announced_at.filter(|_| self.held_back) {
            wake = wake.min(at + HEAD_START);
        }
        // While passes fail before they come to dialling, its timers stand still.
        if let Some(due) = self.reconciler.wake_at().filter(|_| self.failures == 0) {
            let left = due.duration_since(SystemTime::now()).unwrap_or_default();
            wake = wake.min(now + left.max(BREATH));
        }
        if let Some(due) = self.reach.wake_at() {
            wake = wake.min(Instant::from_std(due).max(now + BREATH));
        }
        if let Some(due) = self.resolver.wake_at() {
            wake = wake.min(due.max(now + BREATH));
        }
        if let Some(until) = self.agent.exempt_until() {
            let left = until.duration_since(Timestamp::now());
            wake = wake.min(now + Duration::try_from(left).unwrap_or_default());
        }
        if let Some(due) = self.identity.wake_at() {
            wake = wake.min(Instant::from_std(due).max(now + GULP));
        }
        if let Some(until) = self.agent.holds_until(now.into_std()) {
            wake = wake.min(Instant::from_std(until));
        }
        wake
    }
}
