//! The classes by which a node is judged beside its pods: what is for it, from it, and through it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use super::{Copied, Local, Settings, host};
use crate::interface::Interface;
use crate::model::Direction;
use crate::ruleset::Verdict;
use crate::tiers::{PolicySet, Stage, is_protected};
use crate::world::{Judged, World};

/// The classes that base chains lead to by themselves.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Anybody {
    /// What is begun towards the node itself.
    pub(super) node: String,
    /// The same, towards local addresses that no known pod has.
    pub(super) stranger: String,
    /// What the node itself begins, where it is protected as such.
    pub(super) host: Option<String>,
    /// The same, by interfaces that have a host endpoint of their own.
    pub(super) interfaces: BTreeMap<Interface, Local>,
    /// What the node forwards, by these and by all others.
    pub(super) forwarded: BTreeMap<Option<Interface>, Sides>,
    /// What packets are asked by themselves, by the same; empty: nothing.
    pub(super) untracked: BTreeMap<Option<Interface>, Untracked>,
    /// Where policies speak of names.
    pub(super) resolvers: Option<Copied>,
}

/// A class for what comes in and one for what goes out; `None`: nobody judges it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Sides {
    pub(super) ingress: Option<String>,
    pub(super) egress: Option<String>,
}

impl Sides {
    fn of(mut class: impl FnMut(Direction) -> Option<String>) -> Self {
        let [egress, ingress] = Direction::BOTH.map(&mut class);
        Self { ingress, egress }
    }

    fn classes(&self) -> impl Iterator<Item = &String> {
        self.egress.iter().chain(&self.ingress)
    }
}

/// The classes that judge packets by themselves: before conntrack, and where those pass that it was told nothing of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Untracked {
    pub(super) before: Sides,
    pub(super) behind: Sides,
}

/// Compiles the class of who is judged, and says its name. With a verdict: of packets by themselves, and what becomes of what is
/// allowed.
pub(super) type ClassOf<'a> = dyn FnMut(Judged, Direction, Option<Verdict>) -> String + 'a;

impl Anybody {
    /// Those of this node, but for who is believed about names.
    pub(super) fn of(
        world: &World,
        policies: &PolicySet,
        settings: &Settings,
        class_of: &mut ClassOf<'_>,
    ) -> Self {
        let anywhere = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        // By any of its own: policies know nodes, not their addresses.
        let own = || world.nodes().get(&settings.node)?.any_address();
        let own = Judged::from(settings.address.or_else(own).unwrap_or(anywhere));
        let by = |interface: &Option<Interface>| Judged { interface: *interface, ..own };
        let hosts = world.hosts_of(&settings.node);
        let interfaces: BTreeSet<Interface> = hosts.filter_map(|(_, _, host)| host.interface).collect();
        let all: BTreeSet<Option<Interface>> = interfaces.iter().copied().map(Some).chain([None]).collect();
        let applies = |judged: Judged, direction: Direction, stage: Option<Stage>| {
            let layers = policies.applying(world, judged, direction);
            layers.iter().any(|layer| stage.is_none_or(|stage| layer.stage == stage))
        };
        let mut forwarded = BTreeMap::new();
        for interface in &all {
            let judged = Judged { forwards: true, ..by(interface) };
            let sides = Sides::of(|direction| {
                let applies =
                    applies(judged, direction, None) || policies.proposed(world, judged, direction).is_some();
                applies.then(|| class_of(judged, direction, None))
            });
            forwarded.insert(*interface, sides);
        }
        let mut untracked = BTreeMap::new();
        for interface in &all {
            let judged = by(interface);
            let mut sides = |allowed: fn(Direction) -> Verdict| {
                Sides::of(|direction| {
                    let applies = applies(judged, direction, Some(Stage::Untracked));
                    applies.then(|| class_of(judged, direction, Some(allowed(direction))))
                })
            };
            let before = sides(|direction| Verdict::Goto(host::untracked(direction).to_owned()));
            untracked.insert(*interface, Untracked { before, behind: sides(|_| Verdict::Accept) });
        }
        if untracked.values().all(|untracked| *untracked == Untracked::default()) {
            untracked.clear();
        }
        let mut of = |interface: &Interface, direction| class_of(by(&Some(*interface)), direction, None);
        let interfaces = interfaces.iter().map(|interface| {
            let (egress, ingress) = (of(interface, Direction::Egress), of(interface, Direction::Ingress));
            (*interface, Local { egress, ingress })
        });
        let interfaces = interfaces.collect();
        let protected = is_protected(world, policies, own);
        // Of strangers only the site is known.
        let strangers = settings.own.iter().flat_map(|net| [net.addr(), net.broadcast()]);
        let stranger = strangers.into_iter().find(|address| world.holder(*address).is_none());
        Self {
            node: class_of(own, Direction::Ingress, None),
            stranger: class_of(stranger.unwrap_or(anywhere).into(), Direction::Ingress, None),
            host: protected.then(|| class_of(own, Direction::Egress, None)),
            interfaces,
            forwarded,
            untracked,
            resolvers: None,
        }
    }

    /// The names of all of them.
    pub(super) fn classes(&self) -> impl Iterator<Item = &String> {
        let interfaces = self.interfaces.values().flat_map(|local| [&local.egress, &local.ingress]);
        let untracked = self.untracked.values().flat_map(|of| of.before.classes().chain(of.behind.classes()));
        let own = [&self.node, &self.stranger].into_iter().chain(&self.host);
        own.chain(interfaces).chain(self.forwarded.values().flat_map(Sides::classes)).chain(untracked)
    }

    /// Whether the node is protected, by all or by some interfaces.
    pub(super) fn is_protected(&self) -> bool {
        self.host.is_some() || !self.interfaces.is_empty()
    }

    /// Whether what it forwards is judged.
    pub(super) fn judges_forwarded(&self) -> bool {
        self.forwarded.values().any(|sides| *sides != Sides::default())
    }
}
