//! DNS names of endpoints, resolved beside the loop: a slow or dead resolver holds nobody up.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use mesh_overlay::plan::path::Resolution;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// How long a name is asked for.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long an answer is used before it is asked for again.
const REFRESH: Duration = Duration::from_secs(60);
/// How soon a name without an answer is asked for again.
const RETRY: Duration = Duration::from_secs(15);
/// The most questions under way at once.
const AT_ONCE: usize = 16;
/// The most addresses taken from one answer.
const ADDRESSES_MOST: usize = 8;

#[derive(Debug, Default)]
struct Entry {
    addresses: Vec<IpAddr>,
    failure: Option<String>,
    due: Option<Instant>,
    asking: bool,
}

/// All names that are in use, with what they resolved to last.
#[derive(Debug, Default)]
pub struct Resolver {
    entries: BTreeMap<String, Entry>,
    tasks: JoinSet<(String, Result<Vec<IpAddr>, String>)>,
}

impl Resolver {
    /// Sets the names in use and asks for those that are due.
    pub fn want(&mut self, names: &BTreeSet<String>, now: Instant) {
        self.entries.retain(|name, _| names.contains(name));
        for name in names {
            self.entries.entry(name.clone()).or_default();
        }
        self.ask_due(now);
    }

    fn ask_due(&mut self, now: Instant) {
        for (name, entry) in &mut self.entries {
            if self.tasks.len() < AT_ONCE && !entry.asking && entry.due.is_none_or(|due| due <= now) {
                entry.asking = true;
                let name = name.clone();
                self.tasks.spawn_local(async move {
                    let answer = ask(&name).await;
                    (name, answer)
                });
            }
        }
    }

    /// Waits until an answer differs from what was known, and asks for what is due meanwhile; for ever while nothing is
    /// asked.
    pub async fn changed(&mut self, now: impl Fn() -> Instant) {
        loop {
            match self.tasks.join_next().await {
                Some(Ok((name, answer))) => {
                    let changed = self.take(&name, answer, now());
                    self.ask_due(now());
                    if changed {
                        return;
                    }
                }
                Some(Err(_)) => {}
                None => std::future::pending::<()>().await,
            }
        }
    }

    fn take(&mut self, name: &str, answer: Result<Vec<IpAddr>, String>, now: Instant) -> bool {
        let Some(entry) = self.entries.get_mut(name) else { return false };
        entry.asking = false;
        match answer {
            Ok(addresses) => {
                let changed = entry.addresses != addresses || entry.failure.is_some();
                *entry = Entry { addresses, due: Some(now + REFRESH), ..Entry::default() };
                changed
            }
            // What it resolved to before is better than nothing.
            Err(why) => {
                let changed = entry.failure.as_ref() != Some(&why);
                entry.failure = Some(why);
                entry.due = Some(now + RETRY);
                changed
            }
        }
    }

    /// What the names resolve to.
    pub fn resolution(&self) -> Resolution {
        let known = self.entries.iter().filter(|(_, entry)| !entry.addresses.is_empty());
        known.map(|(name, entry)| (name.clone(), entry.addresses.clone())).collect()
    }

    /// A sentence for each name that does not resolve.
    pub fn failures(&self) -> Vec<String> {
        let failed = self.entries.iter().filter_map(|(name, entry)| Some((name, entry.failure.as_ref()?)));
        failed.map(|(name, why)| format!("endpoint {name} does not resolve: {why}")).collect()
    }

    /// When the next name is due; while questions are under way their answers come first.
    pub fn wake_at(&self) -> Option<Instant> {
        if !self.tasks.is_empty() {
            return None;
        }
        self.entries.values().filter(|e| !e.asking).filter_map(|e| e.due).min()
    }
}

async fn ask(name: &str) -> Result<Vec<IpAddr>, String> {
    match tokio::time::timeout(PATIENCE, tokio::net::lookup_host((name, 0))).await {
        Ok(Ok(found)) => {
            let mut addresses: Vec<IpAddr> = found.map(|a| a.ip()).collect();
            addresses.sort_unstable();
            addresses.dedup();
            addresses.truncate(ADDRESSES_MOST);
            if addresses.is_empty() { Err("no address".to_owned()) } else { Ok(addresses) }
        }
        Ok(Err(e)) => Err(e.to_string()),
        Err(_) => Err(format!("no answer within {} s", PATIENCE.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(all: &[&str]) -> BTreeSet<String> {
        all.iter().map(|n| (*n).to_owned()).collect()
    }

    #[tokio::test]
    async fn a_name_that_fails_keeps_its_last_address_and_is_named() {
        let mut resolver = Resolver::default();
        let now = Instant::now();
        resolver
            .entries
            .insert("a.example".to_owned(), Entry { due: Some(now + REFRESH), ..Entry::default() });
        let found = || Ok(vec!["192.0.2.1".parse().unwrap()]);
        assert!(resolver.take("a.example", found(), now));
        assert!(!resolver.take("a.example", found(), now), "an equal answer is no news");
        assert!(resolver.take("a.example", Err("gone".to_owned()), now));
        assert!(!resolver.take("a.example", Err("gone".to_owned()), now));
        assert_eq!(resolver.resolution()["a.example"].len(), 1);
        assert!(resolver.failures()[0].contains("a.example"));
        assert_eq!(resolver.wake_at(), Some(now + RETRY));
        resolver.want(&names(&[]), now);
        assert!(resolver.resolution().is_empty(), "names that are not used any more are forgotten");
    }

    #[test]
    fn a_name_is_resolved_by_the_system() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let mut resolver = Resolver::default();
            resolver.want(&names(&["localhost"]), Instant::now());
            resolver.changed(Instant::now).await;
            assert!(resolver.resolution()["localhost"].iter().all(IpAddr::is_loopback));
        });
    }
}
