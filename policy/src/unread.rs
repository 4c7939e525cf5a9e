//! The unread parts of an object that rules refer to. Rules that use it fail closed.
//!
//! Which addresses it was to list nobody knows: it may be any. A rule that denies or passes what it lists denies everybody then, and
//! one that allows or logs all others matches nobody. What an allowing rule knows of it stays allowed.

use std::borrow::Cow;
use std::collections::BTreeSet;

use crate::model::{Action, Condition, Peer, Port, PortMatch, Rule};
use crate::selector::LabelSelector;
use crate::world::World;

/// The unread parts of labelled addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unread {
    /// Some of the addresses.
    pub nets: bool,
    /// The values of these labels.
    pub labels: BTreeSet<String>,
    /// All labels.
    pub all_labels: bool,
    /// Some named ports.
    pub ports: bool,
}

impl Unread {
    /// Reports whether any part was not read.
    pub fn is_any(&self) -> bool {
        self.all_labels || self.nets || self.ports || !self.labels.is_empty()
    }

    /// Reports whether a selector may match through labels that were not read.
    pub(crate) fn may_be_selected(&self, selector: &LabelSelector) -> bool {
        self.all_labels || selector.keys().into_iter().any(|key| self.labels.contains(key))
    }
}

/// A rule as it is judged: closed where something that it refers to could not be read whole. `None`: nothing matches it.
pub(crate) fn closed<'a>(world: &World, rule: &'a Rule) -> Option<Cow<'a, Rule>> {
    let is_unclear = |condition: &&Condition| is_unclear(world, condition);
    if !world.has_unread() || !rule.when.iter().any(|condition| is_unclear(&condition)) {
        return Some(Cow::Borrowed(rule));
    }
    let of_others =
        |condition: &Condition| matches!(condition, Condition::IsNot(..) | Condition::NotPorts(..));
    match rule.action {
        Action::Allow | Action::Log => {
            let opens = rule.when.iter().filter(is_unclear).any(of_others);
            (!opens).then_some(Cow::Borrowed(rule))
        }
        Action::Deny | Action::Pass => {
            let kept = rule.when.iter().filter_map(|condition| match condition {
                Condition::Ports(side, ports) if is_unclear(&condition) => {
                    let any = ports.iter().map(|port| match port.ports {
                        PortMatch::Named(_) => Port { ports: PortMatch::Any, ..port.clone() },
                        _ => port.clone(),
                    });
                    Some(Condition::Ports(*side, any.collect()))
                }
                condition if is_unclear(&condition) && !of_others(condition) => None,
                condition => Some(condition.clone()),
            });
            Some(Cow::Owned(Rule { name: rule.name.clone(), action: Action::Deny, when: kept.collect() }))
        }
    }
}

/// Reports whether a condition depends on parts that were not read.
fn is_unclear(world: &World, condition: &Condition) -> bool {
    let is_named = |ports: &PortMatch| matches!(ports, PortMatch::Named(_));
    match condition {
        Condition::Is(_, peers) | Condition::IsNot(_, peers) => peers.iter().any(|peer| match peer {
            Peer::Networks(selector) => world.may_lack(selector),
            Peer::Service(service) => world.lacks_endpoints(service),
            _ => false,
        }),
        Condition::Serves(service) => world.lacks_endpoints(service),
        Condition::Ports(_, ports) => world.lacks_ports() && ports.iter().any(|port| is_named(&port.ports)),
        Condition::NotPorts(_, _, ports) => world.lacks_ports() && ports.iter().any(is_named),
        _ => false,
    }
}
