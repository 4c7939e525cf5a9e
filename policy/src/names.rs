//! Domain names, and the addresses that they were seen to have.
//!
//! ```text
//! answer -> wanted by a policy? (one look-up a label) -> protected address? -> within the budgets? -> known
//! ```
//! What is learnt comes from the network, and what is asked for from pods: neither may open what is protected, nor grow without end.

mod budget;
mod domain;
mod protected;
mod refused;
mod wanted;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Bound;
use std::sync::Arc;

pub use budget::Budget;
use budget::{
    ADDRESSES_OF_AGENT, ADDRESSES_OF_NAME, ADDRESSES_OF_POD, NAMES_OF_AGENT, NAMES_OF_POD, NAMES_OF_WILDCARD,
    Pool, Rates, fits_share,
};
pub use domain::{Domain, DomainError, LENGTH_MOST, normal};
pub use protected::Protected;
use refused::Refused;
pub use wanted::Wanted;
pub(crate) use wanted::suffixes;

/// How long connections to an address go on that its name has no more, in seconds.
const LINGER: u64 = 24 * 3600;
/// The least time that an answer counts, in seconds: whoever asked needs a moment to connect.
const LEAST: u64 = 5;
/// The most time that an answer counts, in seconds.
const MOST: u64 = 24 * 3600;
/// What is kept over a restart may be so much shorter than what was answered, in seconds.
const MUCH: u64 = 60;
/// Stands for all askers that are no known pods: they share one budget.
pub const NOBODY: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
/// Stands for the pods that asked before a restart.
const BEFORE: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// Addresses of which something is different, with the names that have them or had them, spelled
/// backwards.
pub type Changes = BTreeMap<IpAddr, BTreeSet<Arc<str>>>;

/// What the answer to a question about a name says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The name, in small letters.
    pub name: String,
    /// Its addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// For how long, in seconds.
    pub ttl: u32,
    /// The pod that has asked, by an address.
    pub asker: IpAddr,
}

/// An address of a name, as it is kept over a restart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recalled {
    /// The name, in small letters.
    pub name: String,
    /// The address.
    pub address: IpAddr,
    /// The second of the caller's clock until which it counts.
    pub until: u64,
}

/// A name with its addresses and the second until which each counts.
#[derive(Debug, Clone)]
struct Known {
    addresses: BTreeMap<IpAddr, u64>,
    owner: IpAddr,
    // The second by which its pools know it; `None`: it is in none.
    pooled: Option<u64>,
}

/// Names, each with its addresses and the second until which each counts. The clock is the
/// caller's.
#[derive(Debug, Clone, Default)]
pub struct Names {
    now: u64,
    // Counts what was learnt or recalled.
    revision: u64,
    // Names are spelled backwards here, so that all below a domain stand side by side.
    known: BTreeMap<Arc<str>, Known>,
    // Who has an address.
    of: BTreeMap<IpAddr, BTreeSet<Arc<str>>>,
    // When something is different, if nothing is learnt.
    due: Option<u64>,
    wanted: Wanted,
    protected: Protected,
    refused: Refused,
    pods: BTreeMap<IpAddr, Pool>,
    wildcards: BTreeMap<Arc<Domain>, Pool>,
    agent: Pool,
    rates: Rates,
    // Addresses of all names, and of those in pools by who brought them.
    pairs: usize,
    pairs_of: BTreeMap<IpAddr, usize>,
}

/// Spells a name backwards, or forwards again.
pub(crate) fn backwards(name: &str) -> String {
    name.chars().rev().collect()
}

impl Names {
    /// The domains that policies speak of.
    pub fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    /// A policy speaks of a domain.
    pub fn want(&mut self, domain: &Domain) {
        let name: Arc<str> = backwards(domain.name()).into();
        if !self.wanted.add(domain) {
            return;
        }
        if !domain.is_wildcard() {
            self.leave_pools(&name);
            return;
        }
        let mut pool = Pool::default();
        for (name, known) in below(&self.known, domain) {
            if let Some(last) = known.pooled {
                pool.put(name, last, known.owner);
            }
        }
        self.wildcards.insert(Arc::new(domain.clone()), pool);
    }

    /// A policy speaks of it no more.
    pub fn unwant(&mut self, domain: &Domain) {
        if !self.wanted.remove(domain) {
            return;
        }
        match domain.is_wildcard() {
            true => drop(self.wildcards.remove(domain)),
            false => self.enter_pools(&backwards(domain.name()).into()),
        }
    }

    /// Takes the addresses that no answer may open. Returns those that are forgotten by that.
    pub fn protect(&mut self, protected: Protected) -> Changes {
        let mut changes = Changes::new();
        if self.protected == protected {
            return changes;
        }
        self.protected = protected;
        let refused = self.of.iter().filter(|(address, _)| self.protected.refuses(**address).is_some());
        let refused: Vec<_> = refused.map(|(address, names)| (*address, names.clone())).collect();
        for (address, names) in refused {
            for name in names {
                self.forget_address(&name, address, &mut changes);
            }
        }
        changes
    }

    /// A name was seen to have addresses. Returns those of which something is different.
    pub fn learn(&mut self, resolved: Resolved, now: u64) -> Changes {
        self.now = self.now.max(now);
        let Resolved { name, addresses, ttl, asker } = resolved;
        let mut changes = Changes::new();
        if name.len() > LENGTH_MOST {
            return changes;
        }
        let mut meant = BTreeSet::new();
        for address in addresses {
            let address = address.to_canonical();
            match self.protected.refuses(address) {
                Some(why) => self.refused.address(why, &name, address, asker, self.now),
                None => drop(meant.insert(address)),
            }
        }
        let spelled: Arc<str> = backwards(&name).into();
        if meant.is_empty() {
            return changes;
        }
        let exact = self.wanted.is_exact(&name);
        if !self.known.contains_key(&spelled) {
            if !exact && let Err(budget) = self.make_room(&name, asker, &mut changes) {
                self.refused.over(budget, &name, asker, self.now);
                return changes;
            }
            let known = Known { addresses: BTreeMap::new(), owner: asker, pooled: None };
            self.known.insert(Arc::clone(&spelled), known);
        }
        self.leave_pools(&spelled);
        self.adopt(&spelled, asker);
        let until = self.now + u64::from(ttl).clamp(LEAST, MOST);
        for address in meant {
            if let Err(budget) = self.put(&spelled, address, until, (exact, asker), &mut changes) {
                self.refused.over(budget, &name, asker, self.now);
                break;
            }
        }
        if self.known.get(&spelled).is_some_and(|known| known.addresses.is_empty()) {
            self.known.remove(&spelled);
        }
        if !exact {
            self.enter_pools(&spelled);
        }
        self.due = Some(self.due.map_or(until, |due| due.min(until)));
        changes
    }

    /// A name that was brought before a restart is of whoever asks for it first, if there is room.
    fn adopt(&mut self, name: &Arc<str>, asker: IpAddr) {
        let has_room = self.pods.get(&asker).is_none_or(|pool| pool.len() < NAMES_OF_POD);
        if let Some(known) = self.known.get_mut(name)
            && known.owner == BEFORE
            && has_room
        {
            known.owner = asker;
        }
    }

    /// Puts an address to a name that is in no pool.
    fn put(
        &mut self,
        name: &Arc<str>,
        address: IpAddr,
        until: u64,
        (exact, asker): (bool, IpAddr),
        changes: &mut Changes,
    ) -> Result<(), Budget> {
        let Some(known) = self.known.get(name) else { return Ok(()) };
        let before = known.addresses.get(&address).copied();
        let appears = before.is_none_or(|before| before <= self.now);
        if appears && !self.rates.take(asker, exact, self.now) {
            return Err(Budget::PodRate(asker));
        }
        if before.is_none() {
            let (owner, count) = (known.owner, known.addresses.len());
            if count >= ADDRESSES_OF_NAME {
                // Of a name that moves on what it had first goes first.
                let oldest = known.addresses.iter().min_by_key(|(_, until)| **until);
                let oldest = oldest.filter(|(_, until)| **until <= self.now).map(|(address, _)| *address);
                self.forget_address(name, oldest.ok_or(Budget::NameAddresses)?, changes);
            }
            self.make_room_for_address(owner, count, exact, changes)?;
            self.pairs += 1;
        }
        let Some(known) = self.known.get_mut(name) else { return Ok(()) };
        // What an answer before has promised stays.
        let before = before.unwrap_or_default();
        known.addresses.insert(address, before.max(until));
        self.of.entry(address).or_default().insert(Arc::clone(name));
        if appears {
            touch(name, address, changes);
        }
        // That an answer was repeated is not worth being kept at once.
        if appears || until > before + MUCH {
            self.revision += 1;
        }
        Ok(())
    }

    /// Makes room for one address more. `held`: as many as its own name has, which is in no pool.
    fn make_room_for_address(
        &mut self,
        owner: IpAddr,
        held: usize,
        exact: bool,
        changes: &mut Changes,
    ) -> Result<(), Budget> {
        let of_pod = |names: &Self| names.pairs_of.get(&owner).copied().unwrap_or_default() + held;
        while !exact && of_pod(self) >= ADDRESSES_OF_POD {
            let lapsed = self.pods.get(&owner).and_then(|pool| pool.lapsed(self.now));
            self.forget(&lapsed.ok_or(Budget::PodAddresses(owner))?, changes);
        }
        while self.pairs >= ADDRESSES_OF_AGENT {
            if let Some(lapsed) = self.agent.lapsed(self.now) {
                self.forget(&lapsed, changes);
                continue;
            }
            let fits = match exact {
                true => self.pairs < 2 * ADDRESSES_OF_AGENT,
                false => fits_share(self.pairs, ADDRESSES_OF_AGENT, &self.pairs_of, owner),
            };
            return if fits { Ok(()) } else { Err(Budget::AgentAddresses) };
        }
        Ok(())
    }

    /// Makes room for a name more that no policy speaks of word by word.
    fn make_room(&mut self, name: &str, owner: IpAddr, changes: &mut Changes) -> Result<(), Budget> {
        while self.pods.get(&owner).is_some_and(|pool| pool.len() >= NAMES_OF_POD) {
            let lapsed = self.pods.get(&owner).and_then(|pool| pool.lapsed(self.now));
            self.forget(&lapsed.ok_or(Budget::PodNames(owner))?, changes);
        }
        let domains: Vec<Arc<Domain>> = self.wanted.wildcards(name).cloned().collect();
        for domain in domains {
            while let Some(pool) = self.wildcards.get(&domain).filter(|pool| pool.len() >= NAMES_OF_WILDCARD)
            {
                match pool.lapsed(self.now) {
                    Some(lapsed) => self.forget(&lapsed, changes),
                    None if pool.has_room(NAMES_OF_WILDCARD, owner) => break,
                    None => return Err(Budget::Wildcard(domain)),
                }
            }
        }
        while self.agent.len() >= NAMES_OF_AGENT {
            match self.agent.lapsed(self.now) {
                Some(lapsed) => self.forget(&lapsed, changes),
                None if self.agent.has_room(NAMES_OF_AGENT, owner) => break,
                None => return Err(Budget::AgentNames),
            }
        }
        Ok(())
    }

    /// These were known before a restart. Returns the addresses of which something is different.
    pub fn recall(&mut self, all: Vec<Recalled>, now: u64) -> Changes {
        self.now = self.now.max(now);
        self.revision += 1;
        let mut changes = Changes::new();
        let mut touched = BTreeSet::new();
        for Recalled { name, address, until } in all {
            let (until, address) = (until.min(self.now + MOST), address.to_canonical());
            let wrong = name.len() > LENGTH_MOST || normal(&name) != name;
            if wrong || until + LINGER <= self.now {
                continue;
            }
            if let Some(why) = self.protected.refuses(address) {
                self.refused.address(why, &name, address, BEFORE, self.now);
                continue;
            }
            let spelled: Arc<str> = backwards(&name).into();
            let room = self.known.contains_key(&spelled) || self.known.len() < NAMES_OF_AGENT;
            if !room || self.pairs >= ADDRESSES_OF_AGENT {
                continue;
            }
            self.leave_pools(&spelled);
            let fresh = || Known { addresses: BTreeMap::new(), owner: BEFORE, pooled: None };
            let known = self.known.entry(Arc::clone(&spelled)).or_insert_with(fresh);
            touched.insert(Arc::clone(&spelled));
            let before = known.addresses.get(&address).copied();
            if before.is_none() && known.addresses.len() >= ADDRESSES_OF_NAME {
                continue;
            }
            self.pairs += usize::from(before.is_none());
            known.addresses.insert(address, before.unwrap_or_default().max(until));
            self.of.entry(address).or_default().insert(Arc::clone(&spelled));
            touch(&spelled, address, &mut changes);
            let next = if until > self.now { until } else { until + LINGER };
            self.due = Some(self.due.map_or(next, |due| due.min(next)));
        }
        for name in touched {
            self.enter_pools(&name);
        }
        changes
    }

    /// At most so many addresses that are known, to be kept over a restart: of names that policies
    /// speak of word by word first, then those that count the longest.
    pub fn kept(&self, most: usize) -> Vec<Recalled> {
        let mut all: Vec<(bool, Recalled)> = Vec::with_capacity(self.pairs);
        for (name, known) in &self.known {
            let name = backwards(name);
            let exact = self.wanted.is_exact(&name);
            all.extend(known.addresses.iter().map(|(address, until)| {
                (exact, Recalled { name: name.clone(), address: *address, until: *until })
            }));
        }
        all.sort_by_key(|(exact, recalled)| std::cmp::Reverse((*exact, recalled.until)));
        all.truncate(most);
        all.into_iter().map(|(_, recalled)| recalled).collect()
    }

    /// A number that is another one when something may be worth being kept again.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// What was not learnt lately, and why. `who` names whoever has an address.
    pub fn refusals(&self, who: impl Fn(IpAddr) -> String) -> Vec<String> {
        let known = |address: IpAddr| match address {
            NOBODY => "an address of no known pod".to_owned(),
            BEFORE => "a pod before a restart".to_owned(),
            address => who(address),
        };
        self.refused.told(known)
    }

    /// Forgets a name with all that it has or had.
    fn forget(&mut self, name: &Arc<str>, changes: &mut Changes) {
        self.leave_pools(name);
        let addresses = self.known.remove(name).map(|known| known.addresses);
        for address in addresses.into_iter().flatten().map(|(address, _)| address) {
            self.pairs = self.pairs.saturating_sub(1);
            forget(&mut self.of, address, name);
            touch(name, address, changes);
        }
    }

    /// Forgets an address of a name. One that has none left stays until its pools are entered
    /// again, or is forgotten as well.
    fn forget_address(&mut self, name: &Arc<str>, address: IpAddr, changes: &mut Changes) {
        let Some(known) = self.known.get(name) else { return };
        let pooled = known.pooled.is_some();
        if known.addresses.len() == 1 && known.addresses.contains_key(&address) {
            return self.forget(name, changes);
        }
        if pooled {
            self.leave_pools(name);
        }
        if self.known.get_mut(name).is_some_and(|known| known.addresses.remove(&address).is_some()) {
            self.pairs = self.pairs.saturating_sub(1);
            forget(&mut self.of, address, name);
            touch(name, address, changes);
        }
        if pooled {
            self.enter_pools(name);
        }
    }

    /// Counts a name in the pools of its pod, its wildcards and the agent.
    fn enter_pools(&mut self, name: &Arc<str>) {
        let Some(known) = self.known.get_mut(name).filter(|known| known.pooled.is_none()) else { return };
        let plain = backwards(name);
        if self.wanted.is_exact(&plain) {
            return;
        }
        let last = known.addresses.values().max().copied().unwrap_or_default();
        let (owner, count) = (known.owner, known.addresses.len());
        known.pooled = Some(last);
        *self.pairs_of.entry(owner).or_default() += count;
        self.agent.put(name, last, owner);
        self.pods.entry(owner).or_default().put(name, last, owner);
        for domain in self.wanted.wildcards(&plain) {
            if let Some(pool) = self.wildcards.get_mut(domain) {
                pool.put(name, last, owner);
            }
        }
    }

    fn leave_pools(&mut self, name: &Arc<str>) {
        let Some(known) = self.known.get_mut(name) else { return };
        let Some(last) = known.pooled.take() else { return };
        let (owner, count) = (known.owner, known.addresses.len());
        less(&mut self.pairs_of, owner, count);
        self.agent.take(name, last, owner);
        if let Some(pool) = self.pods.get_mut(&owner) {
            pool.take(name, last, owner);
            if pool.len() == 0 {
                self.pods.remove(&owner);
            }
        }
        for domain in self.wanted.wildcards(&backwards(name)) {
            if let Some(pool) = self.wildcards.get_mut(domain) {
                pool.take(name, last, owner);
            }
        }
    }

    /// It is so late. Returns the addresses that a name has no more, or that nobody remembers any
    /// more.
    pub fn pass(&mut self, now: u64) -> Changes {
        let before = self.now;
        let now = before.max(now);
        self.now = now;
        self.refused.pass(now);
        let mut changes = Changes::new();
        if self.due.is_none_or(|due| now < due) {
            return changes;
        }
        let mut due: Option<u64> = None;
        let (mut touched, mut gone) = (Vec::new(), Vec::new());
        for (name, known) in &self.known {
            for (address, until) in &known.addresses {
                if *until + LINGER <= now {
                    gone.push((Arc::clone(name), *address));
                    continue;
                }
                if before < *until && *until <= now {
                    touched.push((Arc::clone(name), *address));
                }
                let next = if *until > now { *until } else { *until + LINGER };
                due = Some(due.map_or(next, |due| due.min(next)));
            }
        }
        for (name, address) in touched {
            touch(&name, address, &mut changes);
        }
        for (name, address) in gone {
            self.forget_address(&name, address, &mut changes);
        }
        self.due = due;
        changes
    }

    /// The second in which something will be different, if nothing is learnt.
    pub fn due(&self) -> Option<u64> {
        self.due
    }

    /// Whether one of these has the address now.
    pub fn has(&self, domains: &BTreeSet<Domain>, address: IpAddr) -> bool {
        self.until(domains, address).any(|until| until > self.now)
    }

    /// Whether one of these has the address no more.
    pub fn had(&self, domains: &BTreeSet<Domain>, address: IpAddr) -> bool {
        self.until(domains, address).any(|until| until <= self.now)
    }

    fn until<'a>(&'a self, domains: &'a BTreeSet<Domain>, address: IpAddr) -> impl Iterator<Item = u64> + 'a {
        let names = self.of.get(&address);
        let meant = names.into_iter().flat_map(move |names| {
            domains.iter().flat_map(move |domain| {
                let spelled = backwards(domain.name());
                let exact = names.get(spelled.as_str()).filter(|_| !domain.is_wildcard());
                let prefix = spelled + ".";
                let from = (Bound::Excluded(prefix.as_str()), Bound::Unbounded);
                let below = names.range::<str, _>(from);
                let below = below.take_while(move |name| domain.is_wildcard() && name.starts_with(&prefix));
                exact.into_iter().chain(below)
            })
        });
        meant.filter_map(move |name| self.known.get(name)?.addresses.get(&address).copied())
    }

    /// The addresses that one of these has, or has no more.
    pub fn addresses<'a>(&'a self, domains: &'a BTreeSet<Domain>) -> impl Iterator<Item = IpAddr> + 'a {
        let meant = domains.iter().flat_map(|domain| {
            let exact = Some(domain).filter(|domain| !domain.is_wildcard());
            let exact = exact.and_then(|domain| self.known.get(backwards(domain.name()).as_str()));
            exact.into_iter().chain(below(&self.known, domain).map(|(_, known)| known))
        });
        meant.flat_map(|known| known.addresses.keys().copied())
    }
}

/// The names that a wildcard means; none for a name.
fn below<'a>(
    known: &'a BTreeMap<Arc<str>, Known>,
    domain: &Domain,
) -> impl Iterator<Item = (&'a Arc<str>, &'a Known)> + use<'a> {
    let (prefix, meant) = (backwards(domain.name()) + ".", domain.is_wildcard());
    let from = (Bound::Excluded(prefix.as_str()), Bound::Unbounded);
    known.range::<str, _>(from).take_while(move |(name, _)| meant && name.starts_with(&prefix))
}

fn touch(name: &Arc<str>, address: IpAddr, changes: &mut Changes) {
    changes.entry(address).or_default().insert(Arc::clone(name));
}

fn forget(of: &mut BTreeMap<IpAddr, BTreeSet<Arc<str>>>, address: IpAddr, name: &Arc<str>) {
    if let Some(names) = of.get_mut(&address) {
        names.remove(name);
        if names.is_empty() {
            of.remove(&address);
        }
    }
}

fn less(counts: &mut BTreeMap<IpAddr, usize>, owner: IpAddr, by: usize) {
    if let Some(count) = counts.get_mut(&owner) {
        *count = count.saturating_sub(by);
        if *count == 0 {
            counts.remove(&owner);
        }
    }
}

#[cfg(test)]
mod tests;
