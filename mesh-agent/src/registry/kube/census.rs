//! Which objects of a kind are kept, by namespace. Pure.
//!
//! Objects are counted in units of [`UNIT`] bytes. Above the bound the namespace that holds the most
//! gives way, so that one namespace cannot push the objects of another out.

use std::collections::{BTreeMap, BTreeSet};

/// The bytes that one unit of the bound stands for.
pub(super) const UNIT: usize = 4 << 10;

/// What becomes of an object that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// It is kept.
    Kept,
    /// It is not kept.
    Over,
}

/// The answer to an object: its place, and who had to give way (namespace and name).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Judged {
    pub(super) place: Place,
    pub(super) evicted: Vec<(String, String)>,
}

#[derive(Debug, Default)]
struct Share {
    units: usize,
    names: BTreeMap<String, usize>,
}

/// The objects that are kept, by namespace.
#[derive(Debug, Default)]
pub(super) struct Census {
    most: usize,
    // A namespace of which something cannot be kept keeps nothing.
    entire: bool,
    units: usize,
    kept: BTreeMap<String, Share>,
    // By size, so that the largest is found at once; only above the bound.
    sizes: Option<BTreeSet<(usize, String)>>,
    over: BTreeSet<String>,
}

impl Census {
    /// Nothing is kept yet, and at most this many units will be. With `entire`, a namespace of which
    /// something cannot be kept keeps nothing.
    pub(super) fn new(most: usize, entire: bool) -> Self {
        Self { most, entire, ..Self::default() }
    }

    /// An object of this many bytes is there. Returns what becomes of it and of others.
    pub(super) fn there(&mut self, namespace: Option<&str>, name: &str, bytes: usize) -> Judged {
        let namespace = namespace.unwrap_or_default();
        let units = 1 + bytes / UNIT;
        let mut evicted = Vec::new();
        self.take_out(namespace, name);
        if self.entire && self.over.contains(namespace) {
            return Judged { place: Place::Over, evicted };
        }
        while self.units + units > self.most {
            let own = self.kept.get(namespace).map_or(0, |share| share.units);
            let largest = self.largest().filter(|(size, other)| other != namespace && *size > own + units);
            let loser = largest.map_or_else(|| namespace.to_owned(), |(_, other)| other);
            let is_own = loser == namespace;
            self.over.insert(loser.clone());
            while let Some(last) = self.last_of(&loser, is_own) {
                self.take_out(&loser, &last);
                evicted.push((loser.clone(), last));
                if !self.entire {
                    break;
                }
            }
            if is_own {
                return Judged { place: Place::Over, evicted };
            }
        }
        let share = self.kept.entry(namespace.to_owned()).or_default();
        let before = share.units;
        share.units += units;
        share.names.insert(name.to_owned(), units);
        self.units += units;
        self.resized(namespace, before, before + units);
        Judged { place: Place::Kept, evicted }
    }

    // Of the namespace that an object is refused to, others go only where all have to.
    fn last_of(&self, namespace: &str, is_own: bool) -> Option<String> {
        let share = self.kept.get(namespace).filter(|_| self.entire || !is_own)?;
        share.names.keys().next_back().cloned()
    }

    fn largest(&mut self) -> Option<(usize, String)> {
        let kept = &self.kept;
        let sizes = self.sizes.get_or_insert_with(|| {
            kept.iter().map(|(namespace, share)| (share.units, namespace.clone())).collect()
        });
        sizes.last().cloned()
    }

    fn resized(&mut self, namespace: &str, before: usize, after: usize) {
        let Some(sizes) = &mut self.sizes else { return };
        sizes.remove(&(before, namespace.to_owned()));
        if after > 0 {
            sizes.insert((after, namespace.to_owned()));
        }
    }

    fn take_out(&mut self, namespace: &str, name: &str) -> bool {
        let Some(share) = self.kept.get_mut(namespace) else { return false };
        let Some(units) = share.names.remove(name) else { return false };
        let before = share.units;
        share.units -= units;
        if share.names.is_empty() {
            self.kept.remove(namespace);
        }
        self.units -= units;
        self.resized(namespace, before, before - units);
        true
    }

    /// An object is gone.
    pub(super) fn gone(&mut self, namespace: Option<&str>, name: &str) {
        self.take_out(namespace.unwrap_or_default(), name);
    }

    /// Returns the namespaces of which something is not kept.
    pub(super) fn over(&self) -> &BTreeSet<String> {
        &self.over
    }

    /// Returns how many units are kept.
    pub(super) fn units(&self) -> usize {
        self.units
    }

    /// Returns whether there may be room for what was not kept.
    pub(super) fn has_room(&self) -> bool {
        !self.over.is_empty() && self.units < self.most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(namespaces: &[(&str, usize)], most: usize, entire: bool) -> Census {
        let mut census = Census::new(most, entire);
        for (namespace, count) in namespaces {
            for n in 0..*count {
                census.there(Some(namespace), &format!("{n:05}"), 0);
            }
        }
        census
    }

    fn over(census: &Census) -> Vec<&str> {
        census.over().iter().map(String::as_str).collect()
    }

    #[test]
    fn the_largest_namespace_gives_way() {
        let mut census = filled(&[("big", 9), ("small", 1)], 10, false);
        assert!(over(&census).is_empty());
        let judged = census.there(Some("small"), "new", 0);
        assert_eq!(judged, Judged { place: Place::Kept, evicted: vec![("big".into(), "00008".into())] });
        assert_eq!(census.there(Some("big"), "more", 0).place, Place::Over);
        assert_eq!(over(&census), ["big"]);
        assert_eq!(census.there(Some("big"), "00001", 0).place, Place::Kept, "it is known");
    }

    #[test]
    fn order_of_arrival_pushes_nobody_out() {
        for order in [["big", "small"], ["small", "big"]] {
            let sizes = BTreeMap::from([("big", 500), ("small", 5)]);
            let census = filled(&order.map(|name| (name, sizes[name])), 100, false);
            assert_eq!(census.kept["small"].names.len(), 5);
            assert_eq!((census.units, over(&census)), (100, vec!["big"]), "{order:?}");
        }
    }

    #[test]
    fn large_objects_count_as_many() {
        let mut census = filled(&[("small", 5)], 10, false);
        assert_eq!(census.there(Some("big"), "a", 4 * UNIT).place, Place::Kept);
        assert_eq!(census.there(Some("big"), "b", 4 * UNIT).place, Place::Over);
        assert_eq!(census.there(Some("big"), "a", 0).place, Place::Kept, "it shrinks");
        assert_eq!(census.units, 6);
    }

    #[test]
    fn entire_namespaces_keep_nothing() {
        let mut census = filled(&[("small", 3), ("big", 8)], 10, true);
        assert_eq!((over(&census), census.kept.len(), census.units), (vec!["big"], 1, 3));
        assert_eq!(census.there(Some("big"), "00001", 0).place, Place::Over);
        assert_eq!(census.there(Some("small"), "new", 0).place, Place::Kept);
        assert!(census.has_room(), "for a list of less");
    }

    #[test]
    fn room_appears_when_objects_go() {
        let mut census = filled(&[("big", 11)], 10, false);
        assert!(!census.has_room());
        census.gone(Some("big"), "00010");
        assert!(!census.has_room(), "that one was not kept");
        census.gone(Some("big"), "00001");
        assert!(census.has_room());
    }
}
