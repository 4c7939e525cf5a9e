//! Domain names, and the addresses that they were seen to have.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// How long connections to an address go on that its name has no more, in seconds.
const LINGER: u64 = 24 * 3600;
/// The least time that an answer counts, in seconds: whoever asked needs a moment to connect.
const LEAST: u64 = 5;
/// The most time that an answer counts, in seconds.
const MOST: u64 = 24 * 3600;
/// What is kept over a restart may be so much shorter than what was answered, in seconds.
const MUCH: u64 = 60;
/// The most names, and the most addresses of one, that are remembered.
const NAMES_MOST: usize = 10_000;
const ADDRESSES_MOST: usize = 256;

/// A domain name, or all names below one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Domain {
    // In small letters, without the dot at the end.
    name: String,
    below: bool,
}

/// It is no domain name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no domain name such as example.com or *.example.com")]
pub struct DomainError(String);

impl FromStr for Domain {
    type Err = DomainError;

    fn from_str(text: &str) -> Result<Self, DomainError> {
        let wrong = || DomainError(text.chars().take(64).collect());
        let (below, name) = match text.strip_prefix("*.") {
            Some(name) => (true, name),
            None => (false, text),
        };
        let name = normal(name);
        let label = |label: &str| {
            let ends = [label.as_bytes().first(), label.as_bytes().last()];
            (1..=63).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
                && ends.into_iter().flatten().all(|byte| *byte != b'-')
        };
        let fits = name.len() <= 253 && name.contains('.') && name.split('.').all(label);
        if fits { Ok(Self { name, below }) } else { Err(wrong()) }
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.below { "*." } else { "" }, self.name)
    }
}

impl Domain {
    /// Whether it means this name, which is in small letters and has no dot at its end.
    pub fn matches(&self, name: &str) -> bool {
        match self.below {
            false => name == self.name,
            true => name.strip_suffix(&self.name).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.')),
        }
    }
}

/// A name as names are compared.
pub fn normal(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

/// What the answer to a question about a name says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The name, in small letters.
    pub name: String,
    /// Its addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// For how long, in seconds.
    pub ttl: u32,
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

/// Names, each with its addresses and the second until which each counts. The clock is the caller's.
#[derive(Debug, Clone, Default)]
pub struct Names {
    now: u64,
    // Counts what was learnt or recalled.
    revision: u64,
    known: BTreeMap<String, BTreeMap<IpAddr, u64>>,
    // Who has an address.
    of: BTreeMap<IpAddr, BTreeSet<String>>,
    // When something is different, if nothing is learnt.
    due: Option<u64>,
}

impl Names {
    /// A name was seen to have addresses. Returns those of which something is different.
    pub fn learn(&mut self, resolved: Resolved, now: u64) -> BTreeSet<IpAddr> {
        self.now = self.now.max(now);
        let Resolved { name, addresses, ttl } = resolved;
        let mut touched = BTreeSet::new();
        if !self.known.contains_key(&name) && self.known.len() >= NAMES_MOST && !self.make_room(&mut touched)
        {
            return touched;
        }
        let until = self.now + u64::from(ttl).clamp(LEAST, MOST);
        let known = self.known.entry(name.clone()).or_default();
        for address in addresses {
            if known.len() >= ADDRESSES_MOST && !known.contains_key(&address) {
                // Of a name that moves on what it had first goes first.
                let oldest =
                    known.iter().min_by_key(|(_, until)| **until).map(|(address, until)| (*address, *until));
                let Some((oldest, _)) = oldest.filter(|(_, until)| *until <= self.now) else { break };
                known.remove(&oldest);
                forget(&mut self.of, oldest, &name);
                touched.insert(oldest);
            }
            // What an answer before has promised stays.
            let before = known.get(&address).copied().unwrap_or_default();
            known.insert(address, before.max(until));
            self.of.entry(address).or_default().insert(name.clone());
            touched.extend((before <= self.now).then_some(address));
            // That an answer was repeated is not worth being kept at once.
            if before <= self.now || until > before + MUCH {
                self.revision += 1;
            }
        }
        self.due = Some(self.due.map_or(until, |due| due.min(until)));
        touched
    }

    /// These were known before a restart. Returns the addresses of which something is different.
    pub fn recall(&mut self, all: Vec<Recalled>, now: u64) -> BTreeSet<IpAddr> {
        self.now = self.now.max(now);
        self.revision += 1;
        let mut touched = BTreeSet::new();
        for Recalled { name, address, until } in all {
            let until = until.min(self.now + MOST);
            let room = self.known.contains_key(&name) || self.known.len() < NAMES_MOST;
            if until + LINGER <= self.now || !room {
                continue;
            }
            let known = self.known.entry(name.clone()).or_default();
            if known.len() >= ADDRESSES_MOST && !known.contains_key(&address) {
                continue;
            }
            let before = known.get(&address).copied().unwrap_or_default();
            known.insert(address, before.max(until));
            self.of.entry(address).or_default().insert(name);
            touched.insert(address);
            let next = if until > self.now { until } else { until + LINGER };
            self.due = Some(self.due.map_or(next, |due| due.min(next)));
        }
        touched
    }

    /// All that is known, to be kept over a restart.
    pub fn all(&self) -> impl Iterator<Item = Recalled> {
        self.known.iter().flat_map(|(name, addresses)| {
            addresses.iter().map(|(address, until)| Recalled {
                name: name.clone(),
                address: *address,
                until: *until,
            })
        })
    }

    /// A number that is another one when something may be worth being kept again.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Forgets the name of which all addresses have been of before for the longest. Whether there was one.
    fn make_room(&mut self, touched: &mut BTreeSet<IpAddr>) -> bool {
        let last = |addresses: &BTreeMap<IpAddr, u64>| addresses.values().max().copied().unwrap_or_default();
        let oldest = self.known.iter().min_by_key(|(_, addresses)| last(addresses));
        let oldest =
            oldest.filter(|(_, addresses)| last(addresses) <= self.now).map(|(name, _)| name.clone());
        let Some(name) = oldest else { return false };
        for address in self.known.remove(&name).into_iter().flatten().map(|(address, _)| address) {
            forget(&mut self.of, address, &name);
            touched.insert(address);
        }
        true
    }

    /// It is so late. Returns the addresses that a name has no more, or that nobody remembers any more.
    pub fn pass(&mut self, now: u64) -> BTreeSet<IpAddr> {
        let before = self.now;
        let now = before.max(now);
        self.now = now;
        let mut touched = BTreeSet::new();
        if self.due.is_none_or(|due| now < due) {
            return touched;
        }
        let of = &mut self.of;
        let mut due: Option<u64> = None;
        self.known.retain(|name, addresses| {
            addresses.retain(|address, until| {
                let gone = *until + LINGER <= now;
                touched.extend((gone || (before < *until && *until <= now)).then_some(*address));
                if gone {
                    forget(of, *address, name);
                } else {
                    let next = if *until > now { *until } else { *until + LINGER };
                    due = Some(due.map_or(next, |due| due.min(next)));
                }
                !gone
            });
            !addresses.is_empty()
        });
        self.due = due;
        touched
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
        let names = self.of.get(&address).into_iter().flatten();
        let meant = names.filter(|name| domains.iter().any(|domain| domain.matches(name)));
        meant.filter_map(move |name| self.known.get(name)?.get(&address).copied())
    }

    /// The addresses that one of these has, or has no more.
    pub fn addresses<'a>(&'a self, domains: &'a BTreeSet<Domain>) -> impl Iterator<Item = IpAddr> + 'a {
        let meant =
            self.known.iter().filter(move |(name, _)| domains.iter().any(|domain| domain.matches(name)));
        meant.flat_map(|(_, addresses)| addresses.keys().copied())
    }
}

fn forget(of: &mut BTreeMap<IpAddr, BTreeSet<String>>, address: IpAddr, name: &str) {
    if let Some(names) = of.get_mut(&address) {
        names.remove(name);
        if names.is_empty() {
            of.remove(&address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domains(text: &str) -> BTreeSet<Domain> {
        [text.parse().unwrap()].into()
    }

    fn resolved(name: &str, address: &str, ttl: u32) -> Resolved {
        Resolved { name: name.to_owned(), addresses: [address.parse().unwrap()].into(), ttl }
    }

    #[test]
    fn a_star_means_one_label_or_more() {
        let domain: Domain = "*.Example.com.".parse().unwrap();
        assert_eq!(domain.to_string(), "*.example.com");
        assert!(domain.matches("a.example.com") && domain.matches("a.b.example.com"));
        assert!(
            !domain.matches("example.com")
                && !domain.matches("badexample.com")
                && !domain.matches(".example.com")
        );
        let domain: Domain = "example.com".parse().unwrap();
        assert!(domain.matches("example.com") && !domain.matches("a.example.com"));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for text in [
            "",
            "com",
            "*",
            "*.",
            "*.com",
            "a..b",
            "-a.b",
            "a-.b",
            "a.*.b",
            "a b.c",
            "\u{e4}.de",
            &format!("{}.com", "a".repeat(64)),
        ] {
            assert!(text.parse::<Domain>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn an_address_counts_as_long_as_the_longest_answer_said_and_lingers_then() {
        let (mut names, all) = (Names::default(), domains("example.com"));
        let address: IpAddr = "192.0.2.1".parse().unwrap();
        assert_eq!(names.learn(resolved("example.com", "192.0.2.1", 60), 100), [address].into());
        assert!(names.learn(resolved("example.com", "192.0.2.1", 30), 110).is_empty());
        assert!(names.has(&all, address) && !names.had(&all, address));
        assert!(names.due().is_some_and(|due| due <= 160));
        assert_eq!((names.pass(159), names.due()), (BTreeSet::new(), Some(160)));
        assert_eq!(names.pass(160), [address].into());
        assert!(!names.has(&all, address) && names.had(&all, address));
        assert_eq!(names.due(), Some(160 + LINGER));
        assert_eq!(names.learn(resolved("example.com", "192.0.2.1", 0), 170), [address].into());
        assert!(names.has(&all, address));
        assert_eq!(names.pass(170 + LEAST), [address].into(), "a moment at least");
        assert_eq!(names.pass(170 + LEAST + LINGER), [address].into());
        assert!(!names.had(&all, address) && names.due().is_none());
        assert!(names.pass(5).is_empty(), "a clock that goes back");
    }

    #[test]
    fn what_is_recalled_counts_for_as_long_as_it_would_have() {
        let (mut names, all) = (Names::default(), domains("*.example.com"));
        names.learn(resolved("a.example.com", "192.0.2.1", 60), 100);
        names.learn(resolved("b.example.com", "192.0.2.2", 10), 100);
        names.pass(120);
        let kept: Vec<Recalled> = names.all().collect();
        assert_eq!(kept.len(), 2);
        let mut again = Names::default();
        let touched = again.recall(kept.clone(), 130);
        let [a, b]: [IpAddr; 2] = ["192.0.2.1", "192.0.2.2"].map(|text| text.parse().unwrap());
        assert_eq!(touched, [a, b].into());
        assert!(again.has(&all, a) && !again.has(&all, b) && again.had(&all, b));
        assert_eq!(again.due(), Some(160));
        assert_eq!(again.pass(160), [a].into());
        // What is too old, or says more than an answer can, is no more than that.
        let mut late = Names::default();
        assert!(late.recall(kept, 161 + LINGER).is_empty() && late.known.is_empty());
        let far = Recalled { name: "a.example.com".to_owned(), address: a, until: u64::MAX };
        late.recall(vec![far], 200 + LINGER);
        assert_eq!(late.due(), Some(200 + LINGER + MOST));
    }

    #[test]
    fn strangers_cannot_fill_it() {
        let mut names = Names::default();
        for n in 0..NAMES_MOST + 100 {
            names.learn(resolved(&format!("a{n}.example.com"), "192.0.2.1", 60), 1);
        }
        assert_eq!(names.known.len(), NAMES_MOST);
        // But what nobody has any more makes room.
        names.pass(100);
        assert_eq!(names.learn(resolved("late.example.com", "192.0.2.9", 60), 101).len(), 2);
        assert_eq!((names.known.len(), names.of.len()), (NAMES_MOST, 2));
        let many: BTreeSet<IpAddr> = (0..1000u32).map(|n| std::net::Ipv4Addr::from(n).into()).collect();
        names.learn(Resolved { name: "late.example.com".to_owned(), addresses: many, ttl: 60 }, 101);
        assert_eq!(names.known["late.example.com"].len(), ADDRESSES_MOST);
        names.pass(1000);
        let moved = names.learn(resolved("late.example.com", "203.0.113.1", 60), 1000);
        assert!(moved.len() == 2 && names.has(&domains("late.example.com"), "203.0.113.1".parse().unwrap()));
        assert_eq!(names.known["late.example.com"].len(), ADDRESSES_MOST);
    }
}
