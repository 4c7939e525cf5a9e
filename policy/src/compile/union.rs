//! Sets of addresses of network sets and host endpoints, kept up to date prefix by prefix: one more of 200,000 costs as much as one.
//!
//! ```text
//! network sets that are selected -> prefixes, each as often as it is listed -> ranges that neither overlap nor touch
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;

use super::ranges::{Range, element, join, range};
use crate::model::{NetworkSelector, ObjectId};
use crate::ruleset::{Element, Family};
use crate::world::World;

/// The members of such a set, and the objects that list them.
#[derive(Debug, Clone)]
pub(super) struct Union {
    selectors: BTreeSet<NetworkSelector>,
    members: BTreeMap<ObjectId, Arc<BTreeSet<IpNet>>>,
    cover: Cover,
}

/// The changes of a set.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Reshaped {
    pub(super) gone: Vec<Element>,
    pub(super) added: Vec<Element>,
    /// There is an address in it that was not.
    pub(super) grows: bool,
    /// There is an address in it no more.
    pub(super) shrinks: bool,
}

impl Union {
    /// All that is selected.
    pub(super) fn of(world: &World, selectors: &BTreeSet<NetworkSelector>, family: Family) -> Self {
        let mut union =
            Self { selectors: selectors.clone(), members: BTreeMap::new(), cover: Cover::of(family) };
        let meant = selectors.iter().flat_map(|selector| world.networks(selector));
        let all: BTreeSet<ObjectId> = meant.map(|(id, _)| id.clone()).collect();
        union.update(world, &all);
        union
    }

    pub(super) fn elements(&self) -> impl Iterator<Item = Element> {
        let family = self.cover.family;
        self.cover.ranges.iter().map(move |(first, last)| element(family, (*first, *last)))
    }

    /// These network sets and host endpoints are other ones now.
    pub(super) fn update(&mut self, world: &World, changed: &BTreeSet<ObjectId>) -> Reshaped {
        let mut change = Change::default();
        let mut gone = Vec::new();
        for id in changed {
            let found = world.networks_of(id).filter(|networks| {
                let mut selectors = self.selectors.iter();
                selectors.any(|selector| world.selects_networks(selector, id, networks))
            });
            let now = found.map(|networks| Arc::clone(&networks.nets));
            let before = match &now {
                Some(now) => self.members.insert(id.clone(), Arc::clone(now)),
                None => self.members.remove(id),
            };
            let (now, before) = (now.unwrap_or_default(), before.unwrap_or_default());
            if Arc::ptr_eq(&now, &before) {
                continue;
            }
            now.difference(&before).for_each(|net| self.cover.add(net, &mut change));
            gone.extend(before.difference(&now).copied());
        }
        // What moves from one to another is never out of it.
        gone.iter().for_each(|net| self.cover.remove(net, &mut change));
        let family = self.cover.family;
        let elements = |ranges: BTreeSet<Range>| ranges.into_iter().map(|one| element(family, one)).collect();
        Reshaped {
            gone: elements(change.gone),
            added: elements(change.added),
            grows: change.grows,
            shrinks: change.shrinks,
        }
    }
}

#[derive(Default)]
struct Change {
    gone: BTreeSet<Range>,
    added: BTreeSet<Range>,
    grows: bool,
    shrinks: bool,
}

impl Change {
    fn add(&mut self, range: Range) {
        if !self.gone.remove(&range) {
            self.added.insert(range);
        }
    }

    fn remove(&mut self, range: Range) {
        if !self.added.remove(&range) {
            self.gone.insert(range);
        }
    }
}

/// Prefixes of a family, and the ranges that they cover.
#[derive(Debug, Clone)]
struct Cover {
    family: Family,
    // By first address and length: how often.
    nets: BTreeMap<(u128, u8), u32>,
    // How many there are of each length.
    lengths: BTreeMap<u8, usize>,
    // Last addresses by first ones.
    ranges: BTreeMap<u128, u128>,
}

impl Cover {
    fn of(family: Family) -> Self {
        Self { family, nets: BTreeMap::new(), lengths: BTreeMap::new(), ranges: BTreeMap::new() }
    }

    fn is_of(&self, net: &IpNet) -> bool {
        Family::of(net.addr()) == self.family
    }

    fn add(&mut self, net: &IpNet, change: &mut Change) {
        if !self.is_of(net) {
            return;
        }
        let (mut first, mut last) = range(net);
        let count = self.nets.entry((first, net.prefix_len())).or_default();
        *count += 1;
        if *count > 1 {
            return;
        }
        *self.lengths.entry(net.prefix_len()).or_default() += 1;
        let before = self.ranges.range(..=first).next_back().map(|(first, last)| (*first, *last));
        if before.is_some_and(|(_, end)| end >= last) {
            return;
        }
        change.grows = true;
        if let Some(before) = before.filter(|(_, end)| end.saturating_add(1) >= first) {
            self.take(before, change);
            first = before.0;
        }
        // Those that begin inside of it, or next to its end.
        while let Some((from, to)) =
            self.ranges.range(first..=last.saturating_add(1)).next().map(|(from, to)| (*from, *to))
        {
            self.take((from, to), change);
            last = last.max(to);
        }
        self.put((first, last), change);
    }

    fn remove(&mut self, net: &IpNet, change: &mut Change) {
        let (first, last) = range(net);
        let key = (first, net.prefix_len());
        let Some(count) = self.nets.get_mut(&key).filter(|_| Family::of(net.addr()) == self.family) else {
            return;
        };
        *count -= 1;
        if *count > 0 {
            return;
        }
        self.nets.remove(&key);
        if let Some(of_length) = self.lengths.get_mut(&net.prefix_len()) {
            *of_length -= 1;
            if *of_length == 0 {
                self.lengths.remove(&net.prefix_len());
            }
        }
        // Prefixes lie inside of each other or apart: one that holds an address of it holds all, or lies inside.
        let is_around = |length: &u8| {
            let around = IpNet::new(net.addr(), *length).map(|around| range(&around.trunc()).0);
            around.is_ok_and(|first| self.nets.contains_key(&(first, *length)))
        };
        if self.lengths.range(..net.prefix_len()).any(|(length, _)| is_around(length)) {
            return;
        }
        let Some(whole) = self.ranges.range(..=first).next_back().map(|(first, last)| (*first, *last)) else {
            return;
        };
        let mut left = Vec::new();
        if whole.0 < first {
            left.push((whole.0, first - 1));
        }
        let inside =
            self.nets.range((first, 0)..=(last, u8::MAX)).map(|((first, length), _)| (*first, *length));
        left.extend(inside.map(|(first, length)| (first, first | self.host_bits(length))));
        if whole.1 > last {
            left.push((last + 1, whole.1));
        }
        let left = join(left);
        if left == [whole] {
            return;
        }
        change.shrinks = true;
        self.take(whole, change);
        left.into_iter().for_each(|range| self.put(range, change));
    }

    /// The bits that a prefix of this length leaves open.
    fn host_bits(&self, length: u8) -> u128 {
        let bits = if self.family == Family::V4 { 32 } else { 128 };
        match bits - u32::from(length) {
            0 => 0,
            open => u128::MAX >> (u128::BITS - open),
        }
    }

    fn take(&mut self, range: Range, change: &mut Change) {
        self.ranges.remove(&range.0);
        change.remove(range);
    }

    fn put(&mut self, range: Range, change: &mut Change) {
        self.ranges.insert(range.0, range.1);
        change.add(range);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::ranges::cover;
    use super::*;

    fn net(octet: u8, length: u8, family: Family) -> IpNet {
        let text = match family {
            Family::V4 => format!("10.0.0.{octet}/{}", 24 + length),
            Family::V6 => format!("fd00::{octet:x}/{}", 120 + length),
        };
        let net: IpNet = text.parse().unwrap();
        net.trunc()
    }

    #[test]
    fn the_whole_space_comes_and_goes() {
        for all in ["0.0.0.0/0", "::/0"] {
            let all: IpNet = all.parse().unwrap();
            let family = Family::of(all.addr());
            let mut cover = Cover::of(family);
            let mut change = Change::default();
            cover.add(&net(7, 8, family), &mut change);
            cover.add(&all, &mut change);
            assert_eq!((cover.ranges.len(), change.added.len()), (1, 1));
            cover.remove(&all, &mut change);
            assert_eq!((cover.ranges.len(), change.shrinks), (1, true));
            cover.remove(&net(7, 8, family), &mut change);
            assert!(cover.ranges.is_empty() && change.added.is_empty() && change.gone.is_empty());
        }
    }

    proptest! {
        #[test]
        fn ranges_follow_what_is_listed(
            v6 in any::<bool>(),
            steps in prop::collection::vec(prop::collection::vec((any::<bool>(), any::<u8>(), 0u8..=8), 1..4), 1..40),
        ) {
            let family = if v6 { Family::V6 } else { Family::V4 };
            let mut tested = Cover::of(family);
            let mut listed: Vec<IpNet> = Vec::new();
            let mut standing: BTreeSet<Element> = BTreeSet::new();
            for step in steps {
                let mut change = Change::default();
                for (adds, octet, length) in step {
                    let net = net(octet, length, family);
                    match (adds, listed.iter().position(|one| *one == net)) {
                        (false, Some(index)) => {
                            listed.swap_remove(index);
                            tested.remove(&net, &mut change);
                        }
                        _ => {
                            listed.push(net);
                            tested.add(&net, &mut change);
                        }
                    }
                }
                for range in &change.gone {
                    prop_assert!(standing.remove(&element(family, *range)));
                }
                for range in &change.added {
                    prop_assert!(standing.insert(element(family, *range)));
                }
                prop_assert_eq!(&standing, &cover([].into_iter(), listed.iter().copied(), family));
                prop_assert!(change.grows || change.shrinks || change.added.is_empty());
            }
        }
    }
}
