//! Changes of a ruleset as they are made: the ruleset has them at once, and they are remembered for the kernel.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::union::Reshaped;
use crate::ruleset::{Chain, Change, Element, Family, Hook, Kind, Rule, Ruleset, Set};

pub(super) struct Edit<'a> {
    standing: &'a mut Ruleset,
    pub(super) changes: Vec<Change>,
    /// Whether something that was allowed may be denied now.
    pub(super) revokes: bool,
    // What did not stand before.
    fresh: BTreeSet<String>,
}

impl<'a> Edit<'a> {
    pub(super) fn of(standing: &'a mut Ruleset) -> Self {
        Self { standing, changes: Vec::new(), revokes: false, fresh: BTreeSet::new() }
    }

    pub(super) fn standing(&self) -> &Ruleset {
        self.standing
    }

    fn make(&mut self, change: Change) {
        self.standing.apply(std::slice::from_ref(&change));
        self.changes.push(change);
    }

    pub(super) fn add_counter(&mut self, name: &str) {
        if !self.standing.counters.contains(name) {
            self.make(Change::AddCounter(name.to_owned()));
        }
    }

    /// Says whether it did not stand yet.
    pub(super) fn add_set(&mut self, name: &str, family: Family, kind: Kind) -> bool {
        let fresh = !self.standing.sets.contains_key(name);
        if fresh {
            self.fresh.insert(name.to_owned());
            self.make(Change::AddSet { name: name.to_owned(), family, kind });
        }
        fresh
    }

    /// Says whether it did not stand yet.
    pub(super) fn add_chain(&mut self, name: &str, hook: Option<Hook>) -> bool {
        let fresh = !self.standing.chains.contains_key(name);
        if fresh {
            self.make(Change::AddChain { name: name.to_owned(), hook });
        }
        fresh
    }

    /// Rules of a chain that has none.
    pub(super) fn write(&mut self, chain: &str, rules: Vec<Rule>) {
        if !rules.is_empty() {
            self.make(Change::AddRules { chain: chain.to_owned(), rules });
        }
    }

    /// A chain has these rules, whatever it had.
    pub(super) fn put_chain(&mut self, name: &str, chain: Chain) {
        self.add_chain(name, chain.hook);
        let before = self.standing.chains.get(name).map(|chain| chain.rules.as_slice()).unwrap_or_default();
        if before == chain.rules {
            return;
        }
        if !before.is_empty() {
            self.revokes = true;
            self.make(Change::FlushChain(name.to_owned()));
        }
        self.write(name, chain.rules);
    }

    fn alter(&mut self, name: &str, gone: Vec<Element>, added: Vec<Element>, allows: bool) {
        let Some(Set { family, kind, .. }) = self.standing.sets.get(name) else { return };
        let (family, kind) = (*family, *kind);
        self.revokes |= !gone.is_empty() || !added.is_empty() && !allows && !self.fresh.contains(name);
        for (elements, adds) in [(gone, false), (added, true)] {
            if elements.is_empty() {
                continue;
            }
            let set = name.to_owned();
            self.make(match adds {
                true => Change::AddElements { set, family, kind, elements },
                false => Change::RemoveElements { set, family, kind, elements },
            });
        }
    }

    /// Elements of a set that has none.
    pub(super) fn fill(&mut self, name: &str, elements: Vec<Element>) {
        self.alter(name, Vec::new(), elements, true);
    }

    /// All that a set has of an address. `allows`: more of them can only allow more.
    pub(super) fn members_of(&mut self, name: &str, address: IpAddr, now: BTreeSet<Element>, allows: bool) {
        let Some(set) = self.standing.sets.get(name) else { return };
        let before: BTreeSet<Element> = match set.kind {
            Kind::Addresses => set.elements.get(&Element::Address(address)).cloned().into_iter().collect(),
            Kind::Ports => {
                let all = Element::Port(address, 0, 0)..=Element::Port(address, u8::MAX, u16::MAX);
                set.elements.range(all).cloned().collect()
            }
            Kind::Ranges | Kind::Numbers | Kind::Chains | Kind::Rates => return,
        };
        if before != now {
            let gone = before.difference(&now).cloned().collect();
            let added = now.difference(&before).cloned().collect();
            self.alter(name, gone, added, allows);
        }
    }

    /// The same, where what is gone from the set ends nothing that goes on.
    pub(super) fn gentle_members_of(&mut self, name: &str, address: IpAddr, now: BTreeSet<Element>) {
        let before = self.revokes;
        self.members_of(name, address, now, true);
        self.revokes = before;
    }

    /// All that a set has.
    pub(super) fn elements(&mut self, name: &str, now: BTreeSet<Element>) {
        let Some(before) = self.standing.sets.get(name).map(|set| &set.elements) else { return };
        if *before != now {
            let gone = before.difference(&now).cloned().collect();
            let added = now.difference(before).cloned().collect();
            self.alter(name, gone, added, false);
        }
    }

    /// Ranges of a set are other ones. `allows`: more of them can only allow more.
    pub(super) fn reshape(&mut self, name: &str, reshaped: Reshaped, allows: bool) {
        let before = self.revokes;
        let Reshaped { gone, added, grows, shrinks } = reshaped;
        let fresh = self.fresh.contains(name);
        self.alter(name, gone, added, allows);
        self.revokes = before || shrinks || grows && !allows && !fresh;
    }

    /// All prefixes that are in scope. Flows that come into scope by that were never judged, so that none has to be judged again.
    pub(super) fn scope(&mut self, name: &str, now: BTreeSet<Element>) {
        let before = self.revokes;
        self.elements(name, now);
        self.revokes = before;
    }

    pub(super) fn keep_chains(&mut self, keep: impl Fn(&String) -> bool) {
        let gone: Vec<String> = self.standing.chains.keys().filter(|name| !keep(name)).cloned().collect();
        // One may lead to another.
        gone.iter().for_each(|name| self.make(Change::FlushChain(name.clone())));
        gone.into_iter().for_each(|name| self.make(Change::DeleteChain(name)));
    }

    pub(super) fn keep_sets(&mut self, keep: impl Fn(&String) -> bool) {
        let gone: Vec<String> = self.standing.sets.keys().filter(|name| !keep(name)).cloned().collect();
        gone.into_iter().for_each(|name| self.make(Change::DeleteSet(name)));
    }
}
