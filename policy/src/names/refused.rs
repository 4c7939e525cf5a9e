//! Answers of which something was not learnt, counted, each kind named once.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::budget::{
    ADDRESSES_OF_AGENT, ADDRESSES_OF_NAME, ADDRESSES_OF_POD, Budget, CHANGES, NAMES_OF_AGENT, NAMES_OF_POD,
    NAMES_OF_WILDCARD,
};

/// The most that is named at a time; the rest is counted.
const NAMED_MOST: usize = 12;
/// What has not happened again for so many seconds is told no more.
const TOLD_FOR: u64 = 600;

/// Why something was not learnt.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Why {
    /// The address is protected, with the reason.
    Address(&'static str),
    /// A budget is used up.
    Over(Budget),
}

#[derive(Debug, Clone)]
struct Tally {
    count: u64,
    last: u64,
    // The first that was refused.
    name: String,
    address: Option<IpAddr>,
    asker: IpAddr,
}

/// All that was refused lately.
#[derive(Debug, Clone, Default)]
pub(super) struct Refused {
    tallies: BTreeMap<Why, Tally>,
    unnamed: u64,
}

impl Refused {
    /// Counts a protected address.
    pub(super) fn address(
        &mut self,
        why: &'static str,
        name: &str,
        address: IpAddr,
        asker: IpAddr,
        now: u64,
    ) {
        self.count(Why::Address(why), name, Some(address), asker, now);
    }

    /// Counts what a budget has no room for.
    pub(super) fn over(&mut self, budget: Budget, name: &str, asker: IpAddr, now: u64) {
        self.count(Why::Over(budget), name, None, asker, now);
    }

    fn count(&mut self, why: Why, name: &str, address: Option<IpAddr>, asker: IpAddr, now: u64) {
        if let Some(tally) = self.tallies.get_mut(&why) {
            tally.count += 1;
            tally.last = now;
        } else if self.tallies.len() < NAMED_MOST {
            self.tallies.insert(why, Tally { count: 1, last: now, name: name.to_owned(), address, asker });
        } else {
            self.unnamed += 1;
        }
    }

    /// Forgets what has not happened for a while.
    pub(super) fn pass(&mut self, now: u64) {
        self.tallies.retain(|_, tally| tally.last.saturating_add(TOLD_FOR) > now);
        if self.tallies.is_empty() {
            self.unnamed = 0;
        }
    }

    /// Tells each kind in a sentence: a code, the object, and the remedy. `who` names whoever has
    /// an address.
    pub(super) fn told(&self, who: impl Fn(IpAddr) -> String) -> Vec<String> {
        let one = |(why, tally): (&Why, &Tally)| {
            let Tally { count, name, address, asker, .. } = tally;
            match why {
                Why::Address(why) => {
                    let address = address.map(|address| address.to_string()).unwrap_or_default();
                    format!(
                        "dns-address-refused: {name} resolved to {address}, which {why} (told to {}; {count} times): domainNames never open such an address; allow it by pods, nodes or networks",
                        who(*asker)
                    )
                }
                Why::Over(budget) => {
                    let (object, remedy) = over(budget, &who);
                    format!(
                        "dns-budget: {object}; {count} answers are not learnt, such as one about {name}: {remedy}"
                    )
                }
            }
        };
        let mut told: Vec<String> = self.tallies.iter().map(one).collect();
        if self.unnamed > 0 {
            told.push(format!("dns-budget: {} answers more are not learnt", self.unnamed));
        }
        told
    }
}

fn over(budget: &Budget, who: &impl Fn(IpAddr) -> String) -> (String, &'static str) {
    const PER_POD: &str = "look at what the pod asks for, or name the hosts in the policy without a star";
    const WIDE: &str = "name the hosts in the policy without a star, or allow them by networks";
    match budget {
        Budget::PodNames(pod) => (format!("{} has {NAMES_OF_POD} names below wildcards", who(*pod)), PER_POD),
        Budget::PodAddresses(pod) => {
            (format!("{} has {ADDRESSES_OF_POD} addresses of names below wildcards", who(*pod)), PER_POD)
        }
        Budget::PodRate(pod) => {
            let (rate, _) = CHANGES;
            (
                format!(
                    "{} brings more than {rate} new addresses a second, or its part of the node's",
                    who(*pod)
                ),
                PER_POD,
            )
        }
        Budget::Wildcard(domain) => (format!("{domain} has {NAMES_OF_WILDCARD} names"), WIDE),
        Budget::AgentNames => (format!("all pods of this node have {NAMES_OF_AGENT} names"), WIDE),
        Budget::AgentAddresses => {
            (format!("all names of this node have {ADDRESSES_OF_AGENT} addresses"), WIDE)
        }
        Budget::NameAddresses => (
            format!("a name has {ADDRESSES_OF_NAME} addresses"),
            "allow the addresses of this name by networks",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_told_once_and_the_rest_is_counted() {
        let mut refused = Refused::default();
        let asker = |n: u32| IpAddr::V4(n.into());
        for n in 0..1000 {
            refused.address("is link-local", &format!("a{n}.example.com"), asker(n), asker(9), 5);
            refused.over(Budget::PodNames(asker(n)), "b.example.com", asker(n), 5);
        }
        let told = refused.told(|address| format!("pod {address}"));
        assert_eq!(told.len(), NAMED_MOST + 1);
        assert!(
            told[0].contains("a0.example.com resolved to 0.0.0.0") && told[0].contains("1000 times"),
            "{told:?}"
        );
        assert!(told[1].contains("pod 0.0.0.0 has 500 names"), "{told:?}");
        refused.pass(4 + TOLD_FOR);
        assert_eq!(refused.told(|_| String::new()).len(), NAMED_MOST + 1);
        refused.pass(5 + TOLD_FOR);
        assert!(refused.told(|_| String::new()).is_empty());
    }
}
