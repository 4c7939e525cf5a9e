//! From policies and identities to the ruleset of one node, kept up to date change by change.
//!
//! ```text
//! base chains: in scope? believable? judged before?
//!   -> map of local pods' addresses -> class chain (all pods with the same policies share it)
//!        -> sets: addresses of selected pods | ranges of blocks | named ports of pods
//! ```
//! Classes and the sets that they look into are named by what they mean and never change; a pod that comes, goes or is labelled anew
//! is elements more and less. So all that a change does happens at once: when the kernel turns to the next generation of elements.

mod base;
mod burden;
mod class;
mod conditions;
mod edit;
mod host;
mod members;
mod node;
pub(crate) mod ranges;
mod source;
mod union;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::budget::{Budgets, Cost};
use crate::failsafe::FailSafe;
use crate::flowlog::RuleName;
use crate::model::{Direction, Labels, PodSelector};
use crate::names::{Changes, Protected, backwards, suffixes};
use crate::object::Pod;
use crate::ruleset::{Chain, Change, Element, Family, Kind, Ruleset, Verdict};
use crate::state::{Event, State, Touched};
use crate::world::{Judged, Node};
use burden::Burden;
use class::{Applying, Class, Composition, SetUse, Source};
use edit::Edit;
use members::Index;
use node::Anybody;
use ranges::cover;
use union::Union;

/// What is logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logging {
    /// The NFLOG group.
    pub group: u16,
    /// The most messages a second of each rule that denies; 0: none.
    pub denied: u32,
    /// The most messages a second of each rule that allows; 0: none.
    pub allowed: u32,
}

/// Who is believed about domain names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolvers {
    /// The NFLOG group that answers are copied to, as a whole.
    pub group: u16,
    /// These pods.
    pub pods: BTreeSet<PodSelector>,
    /// These addresses.
    pub nets: BTreeSet<IpNet>,
}

/// What a node's ruleset depends on, beside policies and pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The node.
    pub node: String,
    /// The interfaces that decrypted packets come from.
    pub tunnels: BTreeSet<String>,
    /// Those of them on which no key says whose addresses a sender may use.
    pub keyless: BTreeSet<String>,
    /// All prefixes of the mesh, this node's included.
    pub scope: BTreeSet<IpNet>,
    /// The prefixes of this node.
    pub own: BTreeSet<IpNet>,
    /// The node's own address in the mesh.
    pub address: Option<IpAddr>,
    /// UDP ports that carry the mesh between hosts.
    pub carriers: BTreeSet<u16>,
    /// Who is believed about names, and the NFLOG group in which the kernel copies what they answer; `None`: nobody.
    pub resolvers: Option<Resolvers>,
    /// What always reaches a node whose policies protect it as such, and what it always reaches.
    pub failsafe: FailSafe,
    /// Whether addresses in this node's prefixes that no known pod has may speak, and be spoken to.
    pub strangers: bool,
    /// Whether a pod is believed that it has an address in no node's prefixes.
    pub outside_prefixes: bool,
    /// Whether what comes in by an interface that may lead to pods has to have its route back by it. Not where a CNI routes the two
    /// ways differently.
    pub check_sources: bool,
    /// The interfaces that lead to no pod of this node: underlays, other networks. All others, known or not, may lead to pods.
    pub outside: BTreeSet<String>,
    /// UDP ports of VXLAN devices of the mesh: packets to them come in by an interface of `outside` or not at all.
    pub vxlan: BTreeSet<u16>,
    /// Whether nothing is denied, but told.
    pub audit: bool,
    /// What is logged.
    pub log: Logging,
    /// The bits of conntrack's mark that are ours.
    pub mask: u32,
    /// What policies may cost.
    pub budgets: Budgets,
}

/// The bits of conntrack's mark that hold the epoch, where nobody says otherwise.
pub const MASK: u32 = 0xffff_ff00;

/// A change of a standing ruleset.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Delta {
    /// What changes.
    pub changes: Vec<Change>,
    /// Whether something that was allowed may be denied now, so that flows have to be judged again.
    pub revokes: bool,
}

/// The classes of a local address.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Local {
    egress: String,
    ingress: String,
}

/// What is copied: the group, and the sets of those that are believed.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Copied {
    group: u16,
    sets: Vec<(Family, String, Kind)>,
}

/// The class that stands for the sets of resolvers.
const RESOLVERS: &str = "resolvers";

/// Compiles, and remembers what it has compiled.
pub struct Compiler {
    state: State,
    settings: Settings,
    classes: BTreeMap<String, Arc<Class>>,
    uses: BTreeMap<String, SetUse>,
    // What those of them hold that mean network sets.
    unions: BTreeMap<String, Union>,
    locals: BTreeMap<IpAddr, Local>,
    anybody: Anybody,
    // These, and whether some class denies something, as the base chains were written for.
    based: Option<(Anybody, bool)>,
    epoch: Option<u32>,
    // What stands when all changes that were handed out are made.
    standing: Ruleset,
    touched: Touched,
    // Everything has to be looked at.
    stale: bool,
    // What was compiled last would be more than the node has room for.
    burden: Burden,
}

impl Compiler {
    /// Knows nothing yet.
    pub fn new(settings: Settings) -> Self {
        Self {
            state: State::default(),
            settings,
            classes: BTreeMap::new(),
            uses: BTreeMap::new(),
            unions: BTreeMap::new(),
            locals: BTreeMap::new(),
            anybody: Anybody::default(),
            based: None,
            epoch: None,
            standing: Ruleset::default(),
            touched: Touched::default(),
            stale: true,
            burden: Burden::default(),
        }
    }

    /// Takes an event; it counts from the next [`Compiler::update`] on.
    pub fn take(&mut self, event: Event) {
        self.reopen(&event);
        let touched = self.state.take(event);
        self.touched.addresses.extend(touched.addresses);
        self.touched.meanings.extend(touched.meanings);
        self.touched.subjects.extend(touched.subjects);
        self.touched.networks.extend(touched.networks);
        self.touch_names(touched.names);
    }

    fn touch_names(&mut self, changes: Changes) {
        for (address, names) in changes {
            self.touched.names.entry(address).or_default().extend(names);
        }
    }

    /// These are the node's settings, and all nodes.
    pub fn configure(&mut self, settings: Settings, nodes: BTreeMap<String, Node>) {
        self.state.world.set_bounds(&settings.scope, settings.outside_prefixes);
        // Names mean hosts outside of the mesh.
        let prefixes = nodes.values().flat_map(|node| &node.prefixes);
        let nets = settings.scope.iter().chain(&settings.own).chain(prefixes).copied();
        let addresses =
            nodes.values().flat_map(|node| node.addresses.iter().chain(&node.status_addresses)).copied();
        let protected = Protected::of(nets, addresses.chain(settings.address));
        let forgotten = self.state.protect(protected);
        self.touch_names(forgotten);
        let moved = self.state.world.set_nodes(nodes);
        self.stale |= moved.is_some() || self.settings != settings;
        self.touched.addresses.extend(moved.into_iter().flatten());
        self.touched.subjects.extend(self.state.policies.set_budgets(settings.budgets.clone()));
        self.state.world.failsafe = settings.failsafe.clone();
        self.settings = settings;
    }

    /// All policies and identities.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// What stands when all changes that were handed out are made.
    pub fn ruleset(&self) -> &Ruleset {
        &self.standing
    }

    /// Returns of how many addresses names have said something new since the last [`Compiler::update`].
    pub fn renamed(&self) -> usize {
        self.touched.names.len()
    }

    /// The bits of conntrack's mark that hold the epoch.
    pub fn mask(&self) -> u32 {
        self.settings.mask
    }

    /// What an id in the log means.
    pub fn rule_name(&self, id: &str) -> Option<&RuleName> {
        self.classes.values().find_map(|class| class.names.get(id))
    }

    /// The addresses of this node's pods.
    pub fn locals(&self) -> impl Iterator<Item = &IpAddr> {
        self.locals.keys()
    }

    /// From now on this mark says that a flow was judged; `None`: none does, and each packet is judged.
    pub fn turn_epoch(&mut self, epoch: Option<u32>) -> Vec<Change> {
        self.epoch = epoch;
        let mut edit = Edit::of(&mut self.standing);
        for (name, rules) in base::epoch(self.settings.mask, epoch) {
            edit.put_chain(&name, Chain { hook: None, rules });
        }
        edit.changes
    }

    /// What has to change for all that it was told.
    pub fn update(&mut self) -> Delta {
        let touched = std::mem::take(&mut self.touched);
        let stale = std::mem::take(&mut self.stale);
        if !stale && touched == Touched::default() {
            return Delta::default();
        }
        let mut standing = std::mem::take(&mut self.standing);
        let mut edit = Edit::of(&mut standing);
        self.members(touched.addresses.iter(), &mut edit, |_| true);
        let others = touched.meanings.difference(&touched.addresses);
        let others_ask = |source: &Source| !matches!(source, Source::Pods(_) | Source::Domains(..));
        self.members(others, &mut edit, others_ask);
        self.named_members(&touched.names, &mut edit);
        if !touched.networks.is_empty() {
            for (name, union) in &mut self.unions {
                let allows = self.uses.get(name).is_some_and(|uses| uses.allows);
                edit.reshape(name, union.update(&self.state.world, &touched.networks), allows);
            }
        }
        // Names alone change no class, and their sets are no namespace's. They come often, so that nothing else is looked at for them.
        let Touched { addresses, meanings, subjects, networks, .. } = &touched;
        let only_named = !stale
            && addresses.is_empty()
            && meanings.is_empty()
            && subjects.is_empty()
            && networks.is_empty();
        if !only_named && self.fit(stale, touched, edit.standing()) {
            let strict = self.classes.values().any(|class| class.denies);
            let based = Some((self.anybody.clone(), strict));
            let chains =
                (stale || self.based != based).then(|| base::chains(&self.settings, &self.anybody, strict));
            self.based = based;
            // Classes and base chains may lead to each other.
            if let Some(chains) = &chains {
                self.frame(chains, &mut edit);
            }
            self.raise(&mut edit);
            let names: Option<BTreeSet<String>> = chains.map(|chains| self.base(chains, &mut edit));
            self.enter_locals(&mut edit);
            self.fell(names.as_ref(), &mut edit);
        }
        self.burden.filled.clear();
        let (changes, revokes) = (edit.changes, edit.revokes);
        self.standing = standing;
        Delta { changes, revokes }
    }

    /// Brings the members of the standing sets up to date for these addresses.
    fn members<'a>(
        &mut self,
        touched: impl Iterator<Item = &'a IpAddr>,
        edit: &mut Edit<'_>,
        is_asked: fn(&Source) -> bool,
    ) {
        let world = &self.state.world;
        for address in touched {
            let (family, holder) = (Family::of(*address), world.holder(*address));
            for (name, uses) in
                self.uses.iter().filter(|(_, uses)| uses.family == family && is_asked(&uses.source))
            {
                let now = members::of_address(world, &uses.source, *address, holder.map(|pod| &**pod));
                member(edit, name, uses, *address, now);
            }
        }
    }

    /// The same for addresses of names, in the sets of domains that mean such a name alone.
    fn named_members(&self, changes: &Changes, edit: &mut Edit<'_>) {
        if changes.is_empty() {
            return;
        }
        let mut sets: HashMap<(&str, bool), Vec<(&String, &SetUse)>> = HashMap::new();
        for (name, uses) in &self.uses {
            let Source::Domains(domains, _) = &uses.source else { continue };
            for domain in domains {
                sets.entry((domain.name(), domain.is_wildcard())).or_default().push((name, uses));
            }
        }
        for (address, names) in changes {
            let mut asked: BTreeMap<&String, &SetUse> = BTreeMap::new();
            for name in names.iter().map(|name| backwards(name)) {
                let domains = suffixes(&name).map(|suffix| (suffix, true)).chain([(name.as_str(), false)]);
                asked.extend(domains.filter_map(|domain| sets.get(&domain)).flatten().copied());
            }
            let family = Family::of(*address);
            for (name, uses) in asked.into_iter().filter(|(_, uses)| uses.family == family) {
                let now = members::of_address(&self.state.world, &uses.source, *address, None);
                member(edit, name, uses, *address, now);
            }
        }
    }

    /// The classes of the local addresses for which they may be others now. Whether any is.
    fn classify(&mut self, stale: bool, touched: &Touched) -> bool {
        let (world, settings, policies) = (&self.state.world, &self.settings, &self.state.policies);
        let is_local = |pod: &Pod| pod.node.as_deref() == Some(settings.node.as_str());
        let before = (self.locals.clone(), self.anybody.clone());
        let most = settings.budgets.node;
        let (mut ahead, mut in_all) = (BTreeMap::<String, Cost>::new(), Cost::default());
        let mut is_much = false;
        let mut addresses = touched.addresses.clone();
        match stale {
            true => {
                self.locals.clear();
                self.classes.clear();
                let local = world.pods().filter(|pod| is_local(pod));
                addresses.extend(local.flat_map(|pod| world.addresses(pod)));
            }
            false => {
                let is_meant = |address: &&IpAddr| {
                    touched.subjects.iter().any(|subject| world.is_subject(subject, **address))
                };
                addresses.extend(self.locals.keys().filter(is_meant));
            }
        }
        let classes = &mut self.classes;
        // Pods with other labels may have the same policies: those are compiled once.
        let mut compiled: HashMap<Composition, String> = HashMap::new();
        let mut class_of = |judged: Judged, direction: Direction, untracked: Option<Verdict>| {
            let tiers = policies.applying(world, judged, direction);
            let proposed = policies.proposed(world, judged, direction);
            let closed = world.closed_by(judged);
            let crowded = tiers.iter().find_map(|layer| layer.crowded);
            let applying = Applying { tiers, proposed, closed, untracked, crowded };
            let known = compiled.entry(Composition::of(direction, &applying));
            let name = known.or_insert_with(|| {
                for (namespace, cost) in class::costs(direction, &applying) {
                    // From who is closed nothing more can be taken.
                    if let Some(namespace) = namespace.filter(|one| !policies.is_shut().contains_key(one)) {
                        let all = ahead.entry(namespace).or_default();
                        (*all, in_all) = (*all + cost, in_all + cost);
                        is_much |= most.share().exceeded(*all).is_some() || most.exceeded(in_all).is_some();
                    }
                }
                // It will be compiled when somebody is closed.
                if is_much {
                    return String::new();
                }
                let class = class::compile(world, settings, direction, &applying);
                let name = class.name.clone();
                // One of the same rules may have other names for them.
                classes.insert(name.clone(), Arc::new(class));
                name
            });
            name.clone()
        };
        // Replicas have the same policies.
        let mut memo: HashMap<(&str, &Labels, Option<&str>), Local> = HashMap::new();
        for address in addresses {
            let Some(pod) = world.holder(address).filter(|pod| is_local(pod)) else {
                self.locals.remove(&address);
                continue;
            };
            let key = (pod.key.namespace.as_str(), &*pod.labels, world.site_of(address));
            let local = memo.entry(key).or_insert_with(|| Local {
                egress: class_of(address.into(), Direction::Egress, None),
                ingress: class_of(address.into(), Direction::Ingress, None),
            });
            self.locals.insert(address, local.clone());
        }
        if stale || !touched.subjects.is_empty() {
            let resolvers = self.anybody.resolvers.take();
            self.anybody = Anybody { resolvers, ..Anybody::of(world, policies, settings, &mut class_of) };
        }
        self.burden.ahead = ahead;
        let needed: BTreeSet<&String> = self
            .locals
            .values()
            .flat_map(|local| [&local.egress, &local.ingress])
            .chain(self.anybody.classes())
            .collect();
        self.classes.retain(|name, _| needed.contains(name));
        self.believe();
        stale || (&self.locals, &self.anybody) != (&before.0, &before.1)
    }

    /// Who is believed about names, where a class speaks of any.
    fn believe(&mut self) {
        let mut uses = self.classes.values().flat_map(|class| class.sets.values());
        let speaks = uses.any(|uses| matches!(uses.source, Source::Domains(..)));
        let known = self.settings.resolvers.as_ref().filter(|_| speaks);
        let sets: BTreeMap<String, SetUse> = known.into_iter().flat_map(class::resolvers).collect();
        let asked = sets.iter().map(|(name, uses)| (uses.family, name.clone(), uses.source.kind()));
        self.anybody.resolvers = known.map(|known| Copied { group: known.group, sets: asked.collect() });
        self.classes.insert(RESOLVERS.to_owned(), Arc::new(Class::of_sets(RESOLVERS, sets)));
    }

    /// Makes sets and chains of classes that do not stand yet.
    fn raise(&mut self, edit: &mut Edit<'_>) {
        let mut needed: BTreeMap<&String, (&SetUse, bool)> = BTreeMap::new();
        for (name, uses) in self.classes.values().flat_map(|class| &class.sets) {
            needed.entry(name).or_insert((uses, true)).1 &= uses.allows;
        }
        let (world, mut filled) = (&self.state.world, std::mem::take(&mut self.burden.filled));
        let all = || needed.iter().map(|(name, (uses, allows))| (*name, *uses, *allows));
        let fresh: Vec<_> =
            all().filter(|(name, uses, _)| edit.add_set(name, uses.family, uses.source.kind())).collect();
        if !fresh.is_empty() {
            let index = Index::of(world, fresh.iter().map(|(_, uses, _)| &uses.source));
            for (name, uses, _) in fresh {
                if let Source::Networks(selectors) = &uses.source {
                    let union = Union::of(world, selectors, uses.family);
                    edit.fill(name, union.elements().collect());
                    self.unions.insert(name.clone(), union);
                    continue;
                }
                let known = filled.remove(name);
                let members = known.unwrap_or_else(|| index.members(&uses.source, uses.family));
                edit.fill(name, members.into_iter().collect());
            }
        }
        for (name, uses, allows) in all() {
            self.uses.entry(name.clone()).or_insert_with(|| uses.clone()).allows = allows;
        }
        let chains = || self.classes.values().flat_map(|class| &class.chains);
        let fresh: Vec<_> = chains().filter(|(name, _)| edit.add_chain(name, None)).collect();
        for (name, rules) in fresh {
            edit.write(name, rules.clone());
        }
    }

    /// Counters, sets and empty chains of what is the same for all endpoints.
    fn frame(&self, chains: &[(String, Chain)], edit: &mut Edit<'_>) {
        base::COUNTERS.iter().for_each(|name| edit.add_counter(name));
        let Settings { scope, own, .. } = &self.settings;
        for family in Family::BOTH {
            for (name, nets) in [(base::scope_set(family), scope), (base::own_set(family), own)] {
                edit.add_set(&name, family, Kind::Ranges);
                let ranges = cover([].into_iter(), nets.iter().copied(), family);
                match name == base::scope_set(family) {
                    true => edit.scope(&name, ranges),
                    false => edit.elements(&name, ranges),
                }
            }
            let links = source::link_local(family);
            if let Some((name, net)) = &links {
                edit.add_set(name, family, Kind::Ranges);
                edit.elements(name, cover([].into_iter(), [*net].into_iter(), family));
            }
            edit.add_set(&base::local_set(family), family, Kind::Addresses);
            if self.anybody.resolvers.is_some() {
                edit.add_set(&base::copied_set(family), family, Kind::Rates);
            }
            edit.add_set(&base::egress_map(family), family, Kind::Chains);
            edit.add_set(&base::ingress_map(family), family, Kind::Chains);
        }
        for (name, chain) in chains {
            edit.add_chain(name, chain.hook);
        }
        for (name, _) in base::epoch(self.settings.mask, self.epoch) {
            edit.add_chain(&name, None);
        }
    }

    /// What is the same for all endpoints; the names of its chains.
    fn base(&self, chains: Vec<(String, Chain)>, edit: &mut Edit<'_>) -> BTreeSet<String> {
        let epoch = base::epoch(self.settings.mask, self.epoch);
        let epoch = epoch.into_iter().map(|(name, rules)| (name, Chain { hook: None, rules }));
        let chains: Vec<(String, Chain)> = chains.into_iter().chain(epoch).collect();
        let names = chains.iter().map(|(name, _)| name.clone()).collect();
        for (name, chain) in chains {
            edit.put_chain(&name, chain);
        }
        names
    }

    /// Puts the local addresses into the maps.
    fn enter_locals(&mut self, edit: &mut Edit<'_>) {
        for family in Family::BOTH {
            let locals = || self.locals.iter().filter(|(address, _)| Family::of(**address) == family);
            let egress = locals().map(|(address, local)| Element::Chain(*address, local.egress.clone()));
            let ingress = locals().map(|(address, local)| Element::Chain(*address, local.ingress.clone()));
            edit.elements(&base::egress_map(family), egress.collect());
            edit.elements(&base::ingress_map(family), ingress.collect());
            let addresses = locals().map(|(address, _)| Element::Address(*address));
            edit.elements(&base::local_set(family), addresses.collect());
        }
    }

    /// Takes away classes, base chains that are none of these, and sets, that nothing leads to any more.
    fn fell(&mut self, base: Option<&BTreeSet<String>>, edit: &mut Edit<'_>) {
        let chains: BTreeSet<&String> = self.classes.values().flat_map(|class| class.chains.keys()).collect();
        edit.keep_chains(|name| match is_of_class(name) {
            true => chains.contains(name),
            false => base.is_none_or(|base| base.contains(name)),
        });
        let sets: BTreeSet<&String> = self.classes.values().flat_map(|class| class.sets.keys()).collect();
        self.uses.retain(|name, _| sets.contains(name));
        self.unions.retain(|name, _| sets.contains(name));
        edit.keep_sets(|name| !is_of_class(name) || sets.contains(name));
    }
}

/// What a set has of an address now.
fn member(edit: &mut Edit<'_>, name: &str, uses: &SetUse, address: IpAddr, now: BTreeSet<Element>) {
    match (&uses.source, uses.allows) {
        // An address that a name has no more is one that it had: connections go on.
        (Source::Domains(..), true) => edit.gentle_members_of(name, address, now),
        (_, allows) => edit.members_of(name, address, now, allows),
    }
}

/// Names of classes and their sets have a letter and an underscore in front.
fn is_of_class(name: &str) -> bool {
    name.as_bytes().get(1) == Some(&b'_') && !name.starts_with("x_")
}
