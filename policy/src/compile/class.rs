//! A class: what all endpoints with the same policies in one direction have in common, as a chain.
//!
//! A class chain is jumped to from a base chain. To allow is to return there, to pass is to go to the chain of the next tier.

use std::collections::{BTreeMap, BTreeSet};

use sha2::{Digest as _, Sha256};

use super::ranges::cover;
use super::{Logging, Resolvers, Settings};
use crate::budget::{self, Cost, Excess};
use crate::flowlog::{self, Label, RuleName};
use crate::model::{
    Action, Direction, End as TierEnd, NetworkSelector, ObjectId, PodSelector, Policy, Rule as PolicyRule,
    Tier,
};
use crate::names::Domain;
use crate::object::Key;
use crate::protocol::Protocol;
use crate::ruleset::{Element, Family, Kind, Match, Rule, State, Statement, Verdict, Way};
use crate::tiers::{Layer, Proposed, Stage, TIERS_MOST, excess};
use crate::unread;
use crate::world::World;

/// What a set holds.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Source {
    /// The addresses of pods that any of these selects.
    Pods(BTreeSet<PodSelector>),
    /// These ranges, for good: others are another set.
    Ranges(BTreeSet<Element>),
    /// The addresses of network sets and host endpoints that any of these selects.
    Networks(BTreeSet<NetworkSelector>),
    /// Protocol and ranges of ports, for good: others are another set.
    Numbers(BTreeSet<Element>),
    /// Every pod's ports of these names.
    Named(BTreeSet<(String, Protocol)>),
    /// What these names have, or had until not long ago.
    Domains(BTreeSet<Domain>, Resolves),
    /// The addresses of a Service's endpoints.
    Service(Key),
    /// The same with the ports on which they serve.
    Serves(Key),
}

/// Which of a name's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Resolves {
    /// Those that it has.
    Now,
    /// Those that it has no more, to which connections go on.
    Before,
}

impl Source {
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Pods(_) | Self::Domains(..) | Self::Service(_) => Kind::Addresses,
            Self::Ranges(_) | Self::Networks(_) => Kind::Ranges,
            Self::Numbers(_) => Kind::Numbers,
            Self::Named(..) | Self::Serves(_) => Kind::Ports,
        }
    }
}

/// A set that a class looks into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SetUse {
    pub(super) family: Family,
    pub(super) source: Source,
    /// To be in it allows something, everywhere in this class.
    pub(super) allows: bool,
}

/// A compiled class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Class {
    /// The name of its first chain.
    pub(super) name: String,
    /// Its chains, the first one included.
    pub(super) chains: BTreeMap<String, Vec<Rule>>,
    /// The sets that they look into.
    pub(super) sets: BTreeMap<String, SetUse>,
    /// What its ids in the log mean.
    pub(super) names: BTreeMap<String, RuleName>,
    /// Whether it may deny something.
    pub(super) denies: bool,
    /// What it costs by the namespaces of its policies; `None`: those of none.
    pub(super) costs: BTreeMap<Option<String>, Cost>,
    /// Which of its sets policies of a namespace look into.
    pub(super) owned: BTreeMap<String, BTreeSet<String>>,
    /// The policies of a namespace would be more than one class may be: they are closed here.
    pub(super) crowded: Option<Excess>,
}

impl Class {
    /// Sets that no class looks into, but the base chains.
    pub(super) fn of_sets(name: &str, sets: BTreeMap<String, SetUse>) -> Self {
        let (chains, names, costs, owned) = Default::default();
        Self { name: name.to_owned(), chains, sets, names, denies: false, costs, owned, crowded: None }
    }
}

/// The sets of those that are believed about names.
pub(super) fn resolvers(known: &Resolvers) -> Vec<(String, SetUse)> {
    let mut all = Vec::new();
    for family in Family::BOTH {
        let mut put = |letter: &str, source: Source| {
            let name = set_name(letter, &source, family);
            all.push((name, SetUse { family, source, allows: true }));
        };
        if !known.pods.is_empty() {
            put("s", Source::Pods(known.pods.clone()));
        }
        let ranges = cover([].into_iter(), known.nets.iter().copied(), family);
        if !ranges.is_empty() {
            put("c", Source::Ranges(ranges));
        }
    }
    all
}

/// What a set is called: by what it holds, so that all who need the same share it.
pub(super) fn set_name(letter: &str, source: &Source, family: Family) -> String {
    format!("{letter}_{}{}", digest(source), family.suffix())
}

/// A short name for something long: 128 bits of a digest, so that nobody can make another thing of the same name.
pub(super) fn digest(of: &impl std::fmt::Debug) -> String {
    let hash = Sha256::digest(format!("{of:?}"));
    hash.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// What applies to an endpoint in a direction.
pub(super) struct Applying<'a> {
    /// What is enforced, tier by tier.
    pub(super) tiers: Vec<Layer<'a>>,
    /// The same with what is staged, if anything is.
    pub(super) proposed: Option<Proposed<'a>>,
    /// The host endpoint that allows nothing by itself.
    pub(super) closed: Option<&'a ObjectId>,
    /// Of packets by themselves: what becomes of what is allowed; `None`: of connections.
    pub(super) untracked: Option<Verdict>,
    /// The budget of a class that it would exceed.
    pub(super) crowded: Option<Excess>,
}

/// Tells what is compiled apart: the policies by their places in memory, which they keep while they are borrowed.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Composition {
    direction: Direction,
    enforced: Vec<*const Policy>,
    proposed: Option<(bool, Vec<*const Policy>)>,
    closed: Option<ObjectId>,
    untracked: Option<Verdict>,
}

impl Composition {
    pub(super) fn of(direction: Direction, applying: &Applying<'_>) -> Self {
        let places = |layers: &[Layer<'_>]| {
            let policies = layers.iter().flat_map(|layer| &layer.policies);
            policies.map(|policy| std::ptr::from_ref::<Policy>(policy)).collect()
        };
        Self {
            direction,
            enforced: places(&applying.tiers),
            proposed: applying.proposed.as_ref().map(|one| (one.replaces, places(&one.layers))),
            closed: applying.closed.cloned(),
            untracked: applying.untracked.clone(),
        }
    }
}

/// Compiles what applies to an endpoint in a direction.
pub(super) fn compile(
    world: &World,
    settings: &Settings,
    direction: Direction,
    applying: &Applying<'_>,
) -> Class {
    let mut writer = Writer {
        world,
        settings,
        direction,
        sets: BTreeMap::new(),
        owned: BTreeMap::new(),
        namespace: None,
        names: BTreeMap::new(),
        denials: BTreeMap::new(),
        proposed: false,
        replaces: false,
        stage: Stage::Tracked,
        allowed: applying.untracked.clone().unwrap_or(Verdict::Return),
    };
    let is_meant = |stage: Stage| (stage == Stage::Untracked) == applying.untracked.is_some();
    let tiers = asked(&applying.tiers, is_meant);
    let closed = excess(&applying.tiers).or(applying.closed.cloned()).filter(|_| is_meant(Stage::Tracked));
    let mut bodies = writer.tiers(&tiers, closed.is_some());
    if let Some(id) = &closed {
        bodies.push(writer.closed(id));
    }
    let denies = bodies.iter().flatten().any(|rule| !is_harmless(rule));
    writer.proposed = true;
    let proposed = applying.proposed.as_ref().map(|Proposed { layers, replaces }| {
        let closed = excess(layers).or(applying.closed.cloned()).filter(|_| is_meant(Stage::Tracked));
        writer.replaces = *replaces;
        let tiers = asked(layers, is_meant);
        // What is enforced denies it in the end as well, unless what stands before that is not there then, or is passed by.
        let passes = |policy: &&Policy| {
            let rules = policy.rules(direction).unwrap_or_default();
            policy.staged && rules.iter().any(|rule| rule.action == Action::Pass)
        };
        let told = *replaces
            || tiers.iter().flat_map(|layer| layer.policies.iter().copied()).any(|one| passes(&one));
        let closed = closed.as_ref().filter(|_| told);
        let mut bodies = writer.tiers(&tiers, closed.is_some());
        bodies.extend(closed.map(|id| writer.closed(id)));
        bodies
    });
    let proposed = proposed.unwrap_or_default();
    let Writer { sets, owned, names, denials, .. } = writer;
    let side = if direction == Direction::Egress { "e" } else { "i" };
    let name = format!("{side}_{}", digest(&(&bodies, &proposed, &denials)));
    let chain = |tier: usize| if tier == 0 { name.clone() } else { format!("{name}_{tier}") };
    let shadow = |tier: usize| format!("{name}_s{tier}");
    let mut chains = denials;
    put(&mut chains, bodies, &chain);
    let first = chains.entry(name.clone()).or_default();
    if first.is_empty() {
        first.push(Rule::new(vec![], Verdict::Return));
    }
    if !proposed.is_empty() {
        // Once for each connection: what it comes to changes nothing.
        let begun = vec![BEGUN, Match::State(State::New)];
        first.insert(0, Rule::new(begun, Verdict::Jump(shadow(0))));
    }
    put(&mut chains, proposed, &shadow);
    // What no rule looks into, since no packet can be as all of its rule asks, is not a part of it.
    let rules = chains.values().flatten();
    let used: BTreeSet<&String> = rules
        .flat_map(|rule| &rule.matches)
        .filter_map(|condition| match condition {
            Match::In { set, .. } | Match::Named { set, .. } | Match::AnyOf { set, .. } => Some(set),
            _ => None,
        })
        .collect();
    let sets = sets.into_iter().filter(|(name, _)| used.contains(name)).collect();
    Class {
        name,
        chains,
        sets,
        names,
        denies,
        costs: costs(direction, applying),
        owned,
        crowded: applying.crowded,
    }
}

/// What is compiled costs, by the namespaces of the policies.
pub(super) fn costs(direction: Direction, applying: &Applying<'_>) -> BTreeMap<Option<String>, Cost> {
    let proposed = applying.proposed.iter().flat_map(|proposed| &proposed.layers);
    let mut costs: BTreeMap<Option<String>, Cost> = BTreeMap::new();
    for policy in applying.tiers.iter().chain(proposed).flat_map(|layer| &layer.policies) {
        let cost = costs.entry(policy.id.namespace.clone()).or_default();
        *cost = *cost + budget::of_direction(policy, direction);
    }
    costs
}

/// The layers that are asked, of these stages.
fn asked<'a>(layers: &[Layer<'a>], is_meant: impl Fn(Stage) -> bool) -> Vec<Layer<'a>> {
    layers.iter().take(TIERS_MOST).filter(|layer| is_meant(layer.stage)).cloned().collect()
}

/// Puts the rules of tiers into chains of their own, by whose names they speak of each other then.
fn put(chains: &mut BTreeMap<String, Vec<Rule>>, bodies: Vec<Vec<Rule>>, name: &dyn Fn(usize) -> String) {
    let count = bodies.len();
    for (index, mut rules) in bodies.into_iter().enumerate() {
        for rule in &mut rules {
            if let Verdict::Goto(to) = &mut rule.verdict
                && let Some(next) = (1..count).find(|next| *to == placeholder(*next))
            {
                *to = name(next);
            }
        }
        chains.insert(name(index), rules);
    }
}

/// Whether a rule can deny nothing.
fn is_harmless(rule: &Rule) -> bool {
    match &rule.verdict {
        Verdict::Return | Verdict::Continue | Verdict::Accept => true,
        Verdict::Goto(to) => to.starts_with(PLACEHOLDER) || to.starts_with(UNTRACKED),
        _ => false,
    }
}

/// What the names of chains begin with that let a packet pass untracked.
pub(super) const UNTRACKED: &str = "untracked";

const PLACEHOLDER: &str = "tier ";

// A class' name depends on its rules, so that those speak of the next tier by a name of their own until then.
fn placeholder(tier: usize) -> String {
    format!("{PLACEHOLDER}{tier}")
}

/// The rules that deny: told at most so many times a second, counted each time.
fn denial(settings: &Settings, direction: Direction, id: &str, begun: &[Match]) -> Vec<Rule> {
    let (side, counter) = match direction {
        Direction::Egress => (flowlog::Direction::Egress, "denied_egress"),
        Direction::Ingress => (flowlog::Direction::Ingress, "denied_ingress"),
    };
    let mut rules = refusal(settings, side, id, counter);
    for rule in rules.iter_mut().filter(|rule| is_told(rule)) {
        rule.matches.extend_from_slice(begun);
    }
    rules
}

/// Packets of who began a connection.
const BEGUN: Match = Match::Direction(Way::Original);

fn is_told(rule: &Rule) -> bool {
    rule.statements.iter().any(|statement| matches!(statement, Statement::Log { .. }))
}

pub(super) fn refusal(settings: &Settings, side: flowlog::Direction, id: &str, counter: &str) -> Vec<Rule> {
    let (decision, verdict) = match settings.audit {
        true => (flowlog::Decision::WouldBeDenied, Verdict::Return),
        false => (flowlog::Decision::Denied, Verdict::Drop),
    };
    let mut rules: Vec<Rule> =
        log(&settings.log, settings.log.denied, decision, side, id).into_iter().collect();
    let statements = vec![Statement::Count(counter.to_owned())];
    rules.push(Rule { matches: vec![], statements, verdict });
    rules
}

fn log(
    logging: &Logging,
    rate: u32,
    decision: flowlog::Decision,
    side: flowlog::Direction,
    id: &str,
) -> Option<Rule> {
    let prefix = Label::new(decision, side, id)?.to_string();
    let statements =
        vec![Statement::Limit { rate, burst: rate.max(5) }, Statement::Log { prefix, group: logging.group }];
    (rate > 0).then(|| Rule { matches: vec![], statements, verdict: Verdict::Continue })
}

pub(super) struct Writer<'a> {
    pub(super) world: &'a World,
    settings: &'a Settings,
    direction: Direction,
    pub(super) sets: BTreeMap<String, SetUse>,
    pub(super) owned: BTreeMap<String, BTreeSet<String>>,
    // Of the policy that is written.
    pub(super) namespace: Option<String>,
    names: BTreeMap<String, RuleName>,
    denials: BTreeMap<String, Vec<Rule>>,
    // Nothing is decided: what staged policies would deny is told.
    pub(super) proposed: bool,
    // What is enforced may deny something then that it does not now.
    replaces: bool,
    // Of the policies that are written.
    pub(super) stage: Stage,
    // What becomes of what is allowed.
    allowed: Verdict,
}

impl Writer<'_> {
    /// The rules of each tier. `closed`: something comes after the last.
    fn tiers(&mut self, tiers: &[Layer<'_>], closed: bool) -> Vec<Vec<Rule>> {
        let mut bodies = Vec::new();
        for (index, layer) in tiers.iter().enumerate() {
            let Layer { tier, end, stage, policies, .. } = layer;
            self.stage = *stage;
            let next = match index + 1 < tiers.len() || closed {
                true => Verdict::Goto(placeholder(index + 1)),
                false => Verdict::Return,
            };
            let mut rules = Vec::new();
            for policy in policies {
                self.namespace.clone_from(&policy.id.namespace);
                for rule in policy.rules(self.direction).unwrap_or_default() {
                    self.rule(tier, policy, rule, &next, &mut rules);
                }
            }
            match end {
                TierEnd::Pass => rules.push(Rule::new(vec![], next)),
                TierEnd::Deny => rules.extend(self.end(tier, policies)),
            }
            bodies.push(rules);
        }
        bodies
    }

    /// What a tier does with what none of its rules has decided.
    fn end(&mut self, tier: &Tier, policies: &[&Policy]) -> Vec<Rule> {
        // Where one of them is enforced, the tier ends so without those that are staged.
        if self.proposed && !self.replaces && policies.iter().any(|policy| !policy.staged) {
            return vec![Rule::new(vec![], Verdict::Return)];
        }
        let ids: Vec<String> = policies.iter().map(|policy| policy.id.to_string()).collect();
        let id = format!("t_{}", digest(&(self.direction, &tier.name, &ids)));
        let name = RuleName { tier: tier.name.clone(), policies: ids, rule: None };
        self.names.insert(id.clone(), name);
        self.denial(&id)
    }

    /// What becomes of what no policy of a host endpoint decides, or no tier that is asked.
    fn closed(&mut self, host: &ObjectId) -> Vec<Rule> {
        let id = format!("h_{}", digest(&(self.direction, host)));
        let name = RuleName { tier: "profiles".to_owned(), policies: vec![host.to_string()], rule: None };
        self.names.insert(id.clone(), name);
        self.denial(&id)
    }

    fn denial(&self, id: &str) -> Vec<Rule> {
        match self.proposed {
            false => denial(self.settings, self.direction, id, self.begun()),
            true => {
                let decision = flowlog::Decision::WouldBeDenied;
                let logging = &self.settings.log;
                let told = log(logging, logging.denied, decision, self.side(), id);
                told.into_iter().chain([Rule::new(vec![], Verdict::Return)]).collect()
            }
        }
    }

    /// Of a flow its beginner's packets are told: an answer has source and destination the other way round. Of what is not tracked nobody
    /// knows that.
    fn begun(&self) -> &'static [Match] {
        if self.stage == Stage::Untracked { &[] } else { &[BEGUN] }
    }

    fn side(&self) -> flowlog::Direction {
        match self.direction {
            Direction::Egress => flowlog::Direction::Egress,
            Direction::Ingress => flowlog::Direction::Ingress,
        }
    }

    fn rule(
        &mut self,
        tier: &Tier,
        policy: &Policy,
        rule: &PolicyRule,
        next: &Verdict,
        rules: &mut Vec<Rule>,
    ) {
        let Some(rule) = unread::closed(self.world, rule) else { return };
        let rule = &*rule;
        let id = format!("r_{}", digest(&(self.direction, &policy.id, &rule.name)));
        let name = RuleName {
            tier: tier.name.clone(),
            policies: vec![policy.id.to_string()],
            rule: Some(rule.name.clone()),
        };
        self.names.insert(id.clone(), name);
        let logging = &self.settings.log;
        let told = |rate| {
            let told = log(logging, rate, flowlog::Decision::Allowed, self.side(), &id);
            told.filter(|_| !self.proposed)
        };
        let (told, verdict) = match rule.action {
            Action::Allow => (told(logging.allowed), self.allowed.clone()),
            Action::Pass => (None, next.clone()),
            Action::Log => (told(logging.denied.max(1)), Verdict::Continue),
            Action::Deny if self.proposed && !self.replaces && !policy.staged => (None, Verdict::Return),
            Action::Deny => {
                let told = (self.settings.audit, self.proposed, self.begun(), &self.settings.log);
                let chain = format!("d_{}", digest(&(&id, told)));
                self.denials.insert(chain.clone(), self.denial(&id));
                (None, Verdict::Goto(chain))
            }
        };
        for matches in self.matches(rule, rule.action == Action::Allow || self.proposed) {
            if let Some(told) = &told {
                rules.push(Rule { matches: [matches.as_slice(), self.begun()].concat(), ..told.clone() });
            }
            if verdict != Verdict::Continue {
                rules.push(Rule::new(matches, verdict.clone()));
            }
        }
    }
}
