//! The domain names that policies speak of, prepared so that one look-up a label finds who means a
//! name.

use std::collections::HashMap;
use std::sync::Arc;

use super::domain::Domain;

/// Domains, each with the number of places that speak of it.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    exact: HashMap<String, (Arc<Domain>, usize)>,
    below: HashMap<String, (Arc<Domain>, usize)>,
}

impl Wanted {
    fn table(&mut self, domain: &Domain) -> &mut HashMap<String, (Arc<Domain>, usize)> {
        if domain.is_wildcard() { &mut self.below } else { &mut self.exact }
    }

    /// Counts a domain once more. Returns whether it is new.
    pub fn add(&mut self, domain: &Domain) -> bool {
        let table = self.table(domain);
        if let Some((_, count)) = table.get_mut(domain.name()) {
            *count += 1;
            return false;
        }
        table.insert(domain.name().to_owned(), (Arc::new(domain.clone()), 1));
        true
    }

    /// Counts a domain once less. Returns whether nobody speaks of it any more.
    pub fn remove(&mut self, domain: &Domain) -> bool {
        let table = self.table(domain);
        let Some((_, count)) = table.get_mut(domain.name()) else { return false };
        *count -= 1;
        let gone = *count == 0;
        if gone {
            table.remove(domain.name());
        }
        gone
    }

    /// Whether nobody speaks of any domain.
    pub fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.below.is_empty()
    }

    /// Whether a policy speaks of this very name, which is in small letters and has no dot at its
    /// end.
    pub fn is_exact(&self, name: &str) -> bool {
        self.exact.contains_key(name)
    }

    /// Whether some domain means this name. Takes one look-up a label.
    pub fn wants(&self, name: &str) -> bool {
        self.is_exact(name) || self.wildcards(name).next().is_some()
    }

    /// All domains that mean this name.
    pub fn meant<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Arc<Domain>> {
        self.exact.get(name).map(|(domain, _)| domain).into_iter().chain(self.wildcards(name))
    }

    /// The wildcards that mean this name.
    pub fn wildcards<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Arc<Domain>> {
        let suffixes = suffixes(name).filter(|_| !self.below.is_empty());
        suffixes.filter_map(|suffix| self.below.get(suffix)).map(|(domain, _)| domain)
    }
}

/// The names that a name is below.
pub(crate) fn suffixes(name: &str) -> impl Iterator<Item = &str> {
    // Before the dot there is at least one byte: `.example.com` is below nothing.
    name.match_indices('.').filter(|(at, _)| *at > 0).map(|(at, _)| &name[at + 1..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_exactly_the_domains_that_match() {
        let all = ["example.com", "*.example.com", "*.a.example.com", "other.net", "*.com.example"];
        let all: Vec<Domain> = all.iter().map(|text| text.parse().unwrap()).collect();
        let mut wanted = Wanted::default();
        for domain in &all {
            assert!(wanted.add(domain));
        }
        for name in [
            "example.com",
            "a.example.com",
            "b.a.example.com",
            ".example.com",
            "..example.com",
            "badexample.com",
            "com",
            "",
            ".",
            "other.net",
            "x.other.net",
        ] {
            let meant: Vec<&Domain> = wanted.meant(name).map(|domain| &**domain).collect();
            let expected: Vec<&Domain> = all.iter().filter(|domain| domain.matches(name)).collect();
            assert_eq!(meant.len(), expected.len(), "{name}: {meant:?}");
            assert!(expected.iter().all(|domain| meant.contains(domain)), "{name}");
            assert_eq!(wanted.wants(name), !expected.is_empty(), "{name}");
        }
    }

    #[test]
    fn counts_places_that_speak_of_a_domain() {
        let (mut wanted, domain) = (Wanted::default(), "*.example.com".parse().unwrap());
        assert!(wanted.add(&domain) && !wanted.add(&domain));
        assert!(!wanted.remove(&domain) && wanted.wants("a.example.com"));
        assert!(wanted.remove(&domain) && wanted.is_empty() && !wanted.remove(&domain));
    }
}
