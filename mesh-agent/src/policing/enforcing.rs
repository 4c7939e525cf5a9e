//! The thread that compiles policy and writes it to the kernel.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_policy::enforce::Backend as _;
use mesh_policy::model::ObjectId;
use mesh_policy::nft::{Foreign, Ownership, Table, Watch};
use mesh_policy::{Compiler, Enforcer, Event};
use tokio::sync::watch;

use super::flows::{self, Flows};
use super::names::Answers;
use super::queue::Queue;
use super::{Line, Seen, Surroundings};
use crate::config::{Config, Mode};
use crate::registry::feed::Feed;
use crate::status::{OverBudgetStatus, PolicyCounters, PolicyStatus};

/// How often a table that others may change is looked after.
const LOOK: Duration = Duration::from_millis(500);
/// The most refused policies that are named.
const PROBLEMS_MOST: usize = 64;
/// After a failure the table is tried again this soon.
const RETRY: Duration = Duration::from_secs(2);

/// Starts the thread, in the network namespace of this one.
pub(super) fn start(line: Arc<Line>) -> std::io::Result<watch::Receiver<Seen>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let status = PolicyStatus { mode: mode(&line.config).to_owned(), ..PolicyStatus::default() };
    let (publish, seen) = watch::channel(Seen { status, ..Seen::default() });
    std::thread::Builder::new().name("policy".to_owned()).spawn(move || {
        runtime.block_on(Worker::new(&line.config, line.feed.clone()).run(&line, &publish));
    })?;
    Ok(seen)
}

/// What the thread has.
struct Worker {
    config: Config,
    feed: Feed,
    queue: Queue,
    enforcer: Option<Enforcer<Table>>,
    // As long as there is no table.
    compiler: Option<Compiler>,
    watch: Option<Watch>,
    // Surroundings and nodes as of the last plan, and what was known beside it.
    followed: Option<Arc<Surroundings>>,
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

impl Worker {
    fn new(config: &Config, feed: Feed) -> Self {
        Self {
            config: config.clone(),
            feed,
            queue: Queue::default(),
            enforcer: None,
            compiler: None,
            watch: None,
            followed: None,
            complete: false,
            written: false,
            stances: Vec::new(),
            failure: None,
            retry_at: None,
            flows: Flows::new(config),
            answers: Answers::new(config),
            counters: BTreeMap::new(),
            passes: 0,
            writes: 0,
        }
    }

    async fn run(mut self, line: &Line, publish: &watch::Sender<Seen>) {
        let mut planned = 0;
        loop {
            self.wait(line).await;
            let (surroundings, asked, ends) = {
                let orders = line.orders.lock();
                let news = (orders.planned > planned).then(|| orders.surroundings.clone()).flatten();
                planned = orders.planned;
                (news, orders.asked, orders.ends)
            };
            *line.busy.lock() = Some(Instant::now());
            if ends {
                self.stop();
                publish.send_modify(|seen| seen.ended = true);
                return;
            }
            if let Some(surroundings) = surroundings {
                self.follow(surroundings);
            }
            self.turn(Instant::now());
            self.publish(line, publish, planned, asked);
            *line.busy.lock() = None;
        }
    }

    /// Waits until there may be something to do.
    async fn wait(&mut self, line: &Line) {
        let wake = self.wake_at();
        let sleep = async {
            match wake {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        let readable = |socket: Option<flows::Socket>| async move {
            match socket {
                Some(socket) => flows::readable(&socket).await,
                None => std::future::pending().await,
            }
        };
        let (logged, answered) = (readable(self.flows.listener()), readable(self.answers.listener()));
        tokio::select! {
            () = self.feed.changed() => {}
            () = line.wake.notified() => {}
            () = sleep => {}
            () = logged => {}
            () = answered => {}
        }
    }

    /// Publishes what is so now; the whole status where somebody has asked for it.
    fn publish(&mut self, line: &Line, publish: &watch::Sender<Seen>, planned: u64, asked: u64) {
        let enforcer = self.enforcer.as_ref();
        let stands = enforcer.is_some_and(|enforcer| enforcer.backend.stands());
        let ready = self.complete && self.written && self.failure.is_none();
        let known = enforcer.filter(|_| self.complete).map(|enforcer| enforcer.compiler.state());
        let unpoliced = known.map(|state| state.policies.iter().next().is_none());
        let failures: Vec<String> = self.failures().collect();
        let over: Vec<OverBudgetStatus> = enforcer.into_iter().flat_map(over_budget).collect();
        let status = (asked > publish.borrow().answered).then(|| self.status());
        let verdicts = over.iter().map(|over| (over.object.clone(), over.reason.clone()));
        self.feed.judge(verdicts.collect());
        let held = {
            let mut orders = line.orders.lock();
            orders.planned == planned && std::mem::take(&mut orders.held)
        };
        let mut news = false;
        publish.send_modify(|seen| {
            let before = (seen.ready, seen.unpoliced, seen.stands);
            news = before != (ready, unpoliced, stands) || held && seen.followed < planned;
            news |= seen.over != over;
            seen.over = over;
            (seen.ready, seen.unpoliced, seen.stands) = (ready, unpoliced, stands);
            (seen.followed, seen.failures) = (planned, failures);
            if let Some(status) = status {
                (seen.answered, seen.status) = (asked, status);
            }
        });
        if news {
            line.news.notify_one();
        }
    }

    fn failures(&self) -> impl Iterator<Item = String> {
        let half = self.feed.staleness().filter(|_| !self.complete && !self.is_off());
        let half = half.map(|why| format!("policy: pods and policies are not all known: {why}"));
        let compiler = self.enforcer.as_ref().map(|enforcer| &enforcer.compiler);
        let unheard = compiler.and_then(|compiler| self.answers.failure(compiler));
        [self.failure.clone(), half, self.flows.failure(), unheard].into_iter().flatten()
    }

    fn is_off(&self) -> bool {
        self.config.policy.mode == Mode::Off
    }

    fn stop(&mut self) {
        if let Some(enforcer) = &self.enforcer {
            self.flows.turn(&enforcer.compiler, true);
            self.answers.keep(&enforcer.compiler);
        }
    }

    fn follow(&mut self, surroundings: Arc<Surroundings>) {
        self.followed = Some(surroundings);
        if !self.is_off() {
            self.configure();
        }
    }

    /// Tells the compiler what was followed last.
    fn configure(&mut self) {
        let Some(surroundings) = self.followed.clone() else { return };
        let Surroundings { mut settings, nodes, known } = Surroundings::clone(&surroundings);
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
            self.answers.recall(&mut compiler);
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
        let waits = (!self.queue.is_empty()).then(Instant::now);
        [looked_after, due, told, named, waits].into_iter().flatten().min()
    }

    fn turn(&mut self, now: Instant) {
        // Before anything was planned nobody knows what is to be enforced.
        if self.is_off() {
            if self.followed.is_some() {
                self.leave();
            }
            return;
        }
        if self.compiler().is_none() {
            return;
        }
        let heard = (self.flows.hears(), self.answers.hears());
        self.flows.listen();
        self.answers.listen();
        if (self.flows.hears(), self.answers.hears()) != heard {
            self.configure();
        }
        // Who had an address when its packet was told, not who has it after what comes now.
        let Self { enforcer, flows, answers, .. } = self;
        if let Some(enforcer) = enforcer {
            flows.turn(&enforcer.compiler, false);
            answers.turn(&mut enforcer.compiler);
        }
        // Half of it would open what the other half closes.
        if self.complete || self.feed.complete() {
            let first = !std::mem::replace(&mut self.complete, true);
            if first {
                self.configure();
            }
            self.listen(first);
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

    /// Tells the compiler what comes next. `all`: everything at once.
    fn listen(&mut self, all: bool) {
        let events = self.feed.take();
        let Self { enforcer, compiler, queue, .. } = self;
        let compiler = match enforcer {
            Some(enforcer) => &mut enforcer.compiler,
            None => match compiler {
                Some(compiler) => compiler,
                None => return,
            },
        };
        let known = &compiler.state().policies;
        events.into_iter().for_each(|event| queue.push(event, known));
        let next = if all { queue.all() } else { queue.next(known) };
        next.into_iter().for_each(|event| compiler.take(event));
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
        let synced = self.followed.as_ref().is_some_and(|followed| followed.known.synced);
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
        let mut status = PolicyStatus {
            mode: mode(&self.config).to_owned(),
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
            if let Some(more) = state.refused().checked_sub(PROBLEMS_MOST + 1) {
                status.problems.push(format!("and {} objects more", more + 1));
            }
            status.over_budget_total = enforcer.compiler.excesses().len();
            status.over_budget = over_budget(enforcer).collect();
        }
        (status.flows_written, status.flows_lost) = self.flows.counts();
        status
    }
}

/// What is over a budget, as far as it is named.
fn over_budget(enforcer: &Enforcer<Table>) -> impl Iterator<Item = OverBudgetStatus> + use<> {
    enforcer.compiler.excesses().into_iter().take(PROBLEMS_MOST).map(OverBudgetStatus::from)
}

fn mode(config: &Config) -> &'static str {
    match config.policy.mode {
        Mode::Enforce => "enforce",
        Mode::Audit => "audit",
        Mode::Off => "off",
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
