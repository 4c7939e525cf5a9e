//! What is known of one kind of object. Pure.

use std::collections::BTreeMap;

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
}

/// Something that has a name among its kind.
pub trait Named: PartialEq {
    /// The name.
    fn name(&self) -> &str;
}

impl<T: Named> Listing<T> {
    pub(super) fn new(kind: &'static str) -> Self {
        Self { kind, entries: BTreeMap::new(), complete: false, unknown: false, denied: false, trouble: None }
    }

    /// All objects of the kind were listed. Returns whether that changes anything.
    pub fn replace(&mut self, entries: impl IntoIterator<Item = T>) -> bool {
        let entries = entries.into_iter().map(|entry| (entry.name().to_owned(), entry)).collect();
        let same = self.complete && !self.unknown && self.trouble.is_none() && self.entries == entries;
        *self = Self { entries, complete: true, ..Self::new(self.kind) };
        !same
    }

    /// One object is there now. Returns whether that changes anything.
    pub fn apply(&mut self, entry: T) -> bool {
        if self.entries.get(entry.name()) == Some(&entry) {
            return false;
        }
        self.entries.insert(entry.name().to_owned(), entry);
        true
    }

    /// One object is gone. Returns whether that changes anything.
    pub fn delete(&mut self, name: &str) -> bool {
        self.entries.remove(name).is_some()
    }

    /// The cluster does not know the kind. Where it never did, there are none; where it did, what was known stays.
    pub fn unknown(&mut self) -> bool {
        if self.complete && !self.entries.is_empty() {
            return self.trouble(format!("the cluster does not know the kind {} any more", self.kind));
        }
        let same = self.complete && self.unknown && self.trouble.is_none();
        *self = Self { complete: true, unknown: true, ..Self::new(self.kind) };
        !same
    }

    /// The kind cannot be watched now. Returns whether that is news.
    pub fn trouble(&mut self, why: String) -> bool {
        let news = self.trouble.as_ref() != Some(&why);
        self.trouble = Some(why);
        news
    }

    /// It can be watched again. Returns whether that is news.
    pub fn connected(&mut self) -> bool {
        let was_unknown = std::mem::take(&mut self.unknown);
        self.trouble.take().is_some() || was_unknown
    }

    /// We may not read it. Returns whether that is news.
    pub fn denied(&mut self, why: String) -> bool {
        self.denied = true;
        self.trouble(why)
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
