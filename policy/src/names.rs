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

/// Names, each with its addresses and the second until which each counts. The clock is the caller's.
#[derive(Debug, Clone, Default)]
pub struct Names {
    now: u64,
    known: BTreeMap<String, BTreeMap<IpAddr, u64>>,
}

impl Names {
    /// A name was seen to have addresses. Returns those of which something is different.
    pub fn learn(&mut self, resolved: Resolved, now: u64) -> BTreeSet<IpAddr> {
        self.now = self.now.max(now);
        if self.known.len() >= NAMES_MOST && !self.known.contains_key(&resolved.name) {
            return BTreeSet::new();
        }
        let until = self.now + u64::from(resolved.ttl).clamp(LEAST, MOST);
        let known = self.known.entry(resolved.name).or_default();
        let mut touched = BTreeSet::new();
        for address in resolved.addresses {
            if known.len() >= ADDRESSES_MOST && !known.contains_key(&address) {
                break;
            }
            // What an answer before has promised stays.
            let before = known.get(&address).copied().unwrap_or_default();
            known.insert(address, before.max(until));
            touched.extend((before <= self.now).then_some(address));
        }
        touched
    }

    /// It is so late. Returns the addresses that a name has no more, or that nobody remembers any more.
    pub fn pass(&mut self, now: u64) -> BTreeSet<IpAddr> {
        let before = self.now;
        let now = before.max(now);
        self.now = now;
        let mut touched = BTreeSet::new();
        self.known.retain(|_, addresses| {
            addresses.retain(|address, until| {
                let gone = *until + LINGER <= now;
                touched.extend((gone || (before < *until && *until <= now)).then_some(*address));
                !gone
            });
            !addresses.is_empty()
        });
        touched
    }

    /// The second in which something will be different, if nothing is learnt.
    pub fn due(&self) -> Option<u64> {
        let all = self.known.values().flat_map(BTreeMap::values);
        all.map(|until| if *until > self.now { *until } else { *until + LINGER }).min()
    }

    /// Whether one of these has the address now.
    pub fn has(&self, domains: &BTreeSet<Domain>, address: IpAddr) -> bool {
        self.of(domains).any(|(known, until)| known == address && until > self.now)
    }

    /// Whether one of these has the address no more.
    pub fn had(&self, domains: &BTreeSet<Domain>, address: IpAddr) -> bool {
        self.of(domains).any(|(known, until)| known == address && until <= self.now)
    }

    /// The addresses that one of these has, or has no more.
    pub fn addresses<'a>(&'a self, domains: &'a BTreeSet<Domain>) -> impl Iterator<Item = IpAddr> + 'a {
        self.of(domains).map(|(address, _)| address)
    }

    fn of<'a>(&'a self, domains: &'a BTreeSet<Domain>) -> impl Iterator<Item = (IpAddr, u64)> + 'a {
        let meant =
            self.known.iter().filter(move |(name, _)| domains.iter().any(|domain| domain.matches(name)));
        meant.flat_map(|(_, addresses)| addresses.iter().map(|(address, until)| (*address, *until)))
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
        assert_eq!((names.due(), names.pass(159)), (Some(160), BTreeSet::new()));
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
    fn strangers_cannot_fill_it() {
        let mut names = Names::default();
        for n in 0..2 * NAMES_MOST {
            names.learn(resolved(&format!("a{n}.example.com"), "192.0.2.1", 60), 1);
        }
        assert_eq!(names.known.len(), NAMES_MOST);
        let many = (0..1000u32).map(|n| std::net::Ipv4Addr::from(n).into()).collect();
        names.learn(Resolved { name: "a0.example.com".to_owned(), addresses: many, ttl: 60 }, 1);
        assert_eq!(names.known["a0.example.com"].len(), ADDRESSES_MOST);
    }
}
