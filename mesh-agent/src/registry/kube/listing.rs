//! What is known of one kind of object. Pure.

use std::collections::BTreeMap;

use super::budget::{Budget, Size};

/// All objects of a kind, once they have been listed.
#[derive(Debug)]
pub struct Listing<T> {
    // As in manifests.
    pub(super) kind: &'static str,
    pub(super) entries: BTreeMap<String, T>,
    pub(super) complete: bool,
    // The cluster never knew the kind.
    pub(super) unknown: bool,
    // It does not let us read it.
    pub(super) denied: bool,
    pub(super) trouble: Option<String>,
    // The trouble is that it refuses us.
    pub(super) refused: bool,
    budget: Budget,
    // What the entries weigh.
    kept: usize,
    // An object could not be kept: only a list that fits makes up for it.
    over: bool,
}

/// Something that has a name among its kind.
pub trait Named: PartialEq {
    /// The name.
    fn name(&self) -> &str;
    /// Roughly the bytes that it takes.
    fn weight(&self) -> usize;
}

/// More objects of a kind than are kept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the kind has more than {} objects, or more than {} that count of them: delete some", .0.objects, Size(.0.kept as u64))]
pub struct TooMany(Budget);

impl TooMany {
    /// More than this many.
    pub(super) fn of(objects: usize) -> Self {
        Self(Budget { objects, ..Budget::OWN })
    }
}

/// A list that is not complete yet.
#[derive(Debug)]
pub struct Partial<T> {
    entries: Vec<T>,
    kept: usize,
    budget: Budget,
}

impl<T: Named> Partial<T> {
    /// Nothing was listed yet.
    pub fn new(budget: Budget) -> Self {
        Self { entries: Vec::new(), kept: 0, budget }
    }

    /// One more object was listed.
    ///
    /// # Errors
    /// [`TooMany`].
    pub fn add(&mut self, entry: T) -> Result<(), TooMany> {
        self.kept += entry.weight();
        self.entries.push(entry);
        let fits = self.entries.len() <= self.budget.objects && self.kept <= self.budget.kept;
        if fits { Ok(()) } else { Err(TooMany(self.budget)) }
    }

    /// Returns all objects.
    pub fn into_entries(self) -> Vec<T> {
        self.entries
    }
}

impl<T: Named> Listing<T> {
    pub(super) fn new(kind: &'static str) -> Self {
        Self {
            kind,
            entries: BTreeMap::new(),
            complete: false,
            unknown: false,
            denied: false,
            trouble: None,
            refused: false,
            budget: Budget::OWN,
            kept: 0,
            over: false,
        }
    }

    /// The same with another budget.
    pub(super) fn within(self, budget: Budget) -> Self {
        Self { budget, ..self }
    }

    // Nothing is known, and the kind and its budget are the same.
    fn emptied(&self) -> Self {
        Self::new(self.kind).within(self.budget)
    }

    /// Returns whether everything is kept that was said.
    pub(super) fn whole(&self) -> bool {
        !self.over
    }

    /// All objects of the kind were listed. Returns whether that changes anything.
    pub fn replace(&mut self, entries: impl IntoIterator<Item = T>) -> bool {
        let entries: BTreeMap<String, T> =
            entries.into_iter().map(|entry| (entry.name().to_owned(), entry)).collect();
        let same = self.complete && !self.unknown && self.trouble.is_none() && self.entries == entries;
        let kept = entries.values().map(T::weight).sum();
        *self = Self { entries, complete: true, kept, ..self.emptied() };
        !same
    }

    /// One object is there now. Returns whether that changes anything. One that exceeds the budget is
    /// not kept: what was known stays, and the kind is in trouble.
    pub fn apply(&mut self, entry: T) -> bool {
        let before = self.entries.get(entry.name());
        if before == Some(&entry) {
            return false;
        }
        let count = self.entries.len() + usize::from(before.is_none());
        let kept = self.kept - before.map_or(0, T::weight) + entry.weight();
        if count > self.budget.objects || kept > self.budget.kept {
            self.over = true;
            return self.trouble(TooMany(self.budget).to_string());
        }
        self.kept = kept;
        self.entries.insert(entry.name().to_owned(), entry);
        true
    }

    /// One object is gone. Returns whether that changes anything.
    pub fn delete(&mut self, name: &str) -> bool {
        let before = self.entries.remove(name);
        self.kept -= before.as_ref().map_or(0, T::weight);
        before.is_some()
    }

    /// The cluster does not know the kind. Where it never did, there are none; where it did, what was known stays.
    pub fn unknown(&mut self) -> bool {
        if self.complete && !self.entries.is_empty() {
            return self.trouble(format!("the cluster does not know the kind {} any more", self.kind));
        }
        let same = self.complete && self.unknown && self.trouble.is_none();
        *self = Self { complete: true, unknown: true, ..self.emptied() };
        !same
    }

    /// The kind cannot be watched now. Returns whether that is news.
    pub fn trouble(&mut self, why: String) -> bool {
        let news = self.refused || self.trouble.as_ref() != Some(&why);
        (self.trouble, self.refused) = (Some(why), false);
        news
    }

    /// The server refuses it to us. Returns whether that is news.
    pub fn unauthorized(&mut self, why: String) -> bool {
        let news = !self.refused || self.trouble.as_ref() != Some(&why);
        (self.trouble, self.refused) = (Some(why), true);
        news
    }

    /// It can be watched again. Returns whether that is news.
    pub fn connected(&mut self) -> bool {
        let was_unknown = std::mem::take(&mut self.unknown);
        self.refused = false;
        self.trouble.take().is_some() || was_unknown
    }

    /// We may not read it. Returns whether that is news.
    pub fn denied(&mut self, why: String) -> bool {
        self.denied = true;
        self.unauthorized(why)
    }

    pub(super) fn obstacle(&self) -> Option<String> {
        if self.complete {
            return None;
        }
        let why = self.trouble.as_ref().map_or(" are being listed".to_owned(), |why| format!(": {why}"));
        Some(format!("{}{why}", self.plural()))
    }

    pub(super) fn staleness(&self) -> Option<String> {
        Some(format!("{}: {}", self.plural(), self.trouble.as_ref()?))
    }

    fn plural(&self) -> String {
        format!("{}{}", self.kind, if self.kind.ends_with('h') { "es" } else { "s" })
    }
}
