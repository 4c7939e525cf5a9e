//! What a node learns of itself from how others see it: its address behind a NAT, the kind of the NAT, its carriers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use mesh_keyring::PublicKey;
use mesh_overlay::path::Rung;
use mesh_overlay::plan::Paths;
use mesh_overlay::{Advertisement, Endpoint};

/// What is new has to hold for so long before it is published, at first: every change is a write to the registry, and an event for
/// all nodes.
const STEADY: Duration = Duration::from_secs(3);
/// Twice as long after each change, up to this.
const STEADY_MOST: Duration = Duration::from_secs(300);
/// What has held for so long makes the next change a first one again.
const CALM: Duration = Duration::from_secs(900);

/// How a node stands in the network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Standing {
    /// Where peers of other sites see it, where that is none of its own addresses.
    pub(super) reflexive: BTreeSet<SocketAddr>,
    /// Its NAT gives it another port for each peer, so that peers behind a NAT of their own cannot reach it.
    pub(super) symmetric: bool,
    /// By which carriers it reaches peers.
    pub(super) rungs: BTreeSet<Rung>,
}

impl Standing {
    /// What a publication of this node said.
    pub(super) fn published(said: &Advertisement) -> Self {
        let address = |endpoint: &Endpoint| match endpoint {
            Endpoint::Address(address) => Some(*address),
            Endpoint::Name(..) => None,
        };
        Self {
            reflexive: said.reflexive_endpoints.iter().filter_map(address).collect(),
            symmetric: false,
            rungs: said.paths.clone(),
        }
    }

    /// What the paths say. `own` are this node's addresses, `near` the peers of its own site: from there it is seen without a NAT.
    pub(super) fn of(paths: &Paths, own: &BTreeSet<IpAddr>, near: impl Fn(&PublicKey) -> bool) -> Self {
        // One peer is one witness, and one alone is not believed against others: what it says of us all others would dial.
        let witnesses: Vec<SocketAddr> =
            paths.iter().filter(|(key, _)| !near(key)).filter_map(|(_, path)| path.seen_as).collect();
        let mut reflexive = BTreeSet::new();
        let mut symmetric = false;
        for v6 in [false, true] {
            let all: Vec<SocketAddr> = witnesses.iter().copied().filter(|us| us.is_ipv6() == v6).collect();
            let mut counts: BTreeMap<SocketAddr, usize> = BTreeMap::new();
            for us in &all {
                *counts.entry(*us).or_default() += 1;
            }
            match counts.iter().max_by_key(|(_, count)| **count) {
                Some((us, count)) if count * 2 > all.len() => {
                    reflexive.extend(Some(*us).filter(|us| !own.contains(&us.ip())));
                }
                Some(_) => {
                    let behind: Vec<&SocketAddr> =
                        counts.keys().filter(|us| !own.contains(&us.ip())).collect();
                    let ips: BTreeSet<IpAddr> = behind.iter().map(|us| us.ip()).collect();
                    // One address outside, and another port for each: several ways out would have several addresses.
                    symmetric |= ips.len() == 1 && behind.len() > 1;
                }
                None => {}
            }
        }
        let rungs = paths.values().filter(|path| path.address.is_some()).map(|path| path.rung).collect();
        Self { reflexive, symmetric, rungs }
    }
}

/// A standing that is published once it has held for a while.
#[derive(Debug, Clone, Default)]
pub(super) struct Steady {
    current: Standing,
    next: Option<(Standing, Instant)>,
    // When it changed last, and how long the next one has to hold.
    changed: Option<(Instant, Duration)>,
}

impl Steady {
    /// What may be published.
    pub(super) fn current(&self) -> &Standing {
        &self.current
    }

    /// What was published before this agent began.
    pub(super) fn recall(&mut self, standing: Standing) {
        self.current = standing;
    }

    fn hold(&self) -> Duration {
        self.changed.map_or(STEADY, |(_, hold)| hold)
    }

    /// The standing of this moment.
    pub(super) fn note(&mut self, standing: Standing, now: Instant) {
        if self.changed.is_some_and(|(at, _)| now.saturating_duration_since(at) >= CALM) {
            self.changed = None;
        }
        if standing == self.current {
            self.next = None;
            return;
        }
        let since = match &self.next {
            Some((next, since)) if *next == standing => *since,
            _ => now,
        };
        if now.saturating_duration_since(since) >= self.hold() {
            self.changed = Some((now, (self.hold() * 2).min(STEADY_MOST)));
            (self.current, self.next) = (standing, None);
        } else {
            self.next = Some((standing, since));
        }
    }

    /// When what is new has held long enough.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        self.next.as_ref().map(|(_, since)| *since + self.hold())
    }
}

#[cfg(test)]
mod tests {
    use mesh_keyring::PrivateKey;
    use mesh_overlay::plan::PathChoice;

    use super::*;

    fn key(n: u8) -> PublicKey {
        PrivateKey::from_bytes(&[n; 32]).unwrap().public()
    }

    // Peers with the address at which each sees us.
    fn standing(views: &[(u8, &str)]) -> Standing {
        let path = |(n, us): &(u8, &str)| {
            let at = SocketAddr::from(([192, 0, 2, *n], 51820));
            let seen_as = Some(us.parse().unwrap());
            (
                key(*n),
                PathChoice {
                    rung: Rung::Direct,
                    address: Some(at),
                    mtu: None,
                    probed: BTreeSet::new(),
                    seen_as,
                },
            )
        };
        Standing::of(&views.iter().map(path).collect(), &BTreeSet::from([[10, 0, 0, 5].into()]), |peer| {
            *peer == key(9)
        })
    }

    #[test]
    fn one_address_from_everywhere_is_a_cone_and_several_are_symmetric() {
        let open = standing(&[(1, "10.0.0.5:51820"), (2, "10.0.0.5:51820")]);
        assert!(open.reflexive.is_empty() && !open.symmetric);
        let cone = standing(&[(1, "198.51.100.1:4000"), (2, "198.51.100.1:4000"), (9, "192.168.0.1:1")]);
        assert_eq!(cone.reflexive, BTreeSet::from(["198.51.100.1:4000".parse().unwrap()]));
        let symmetric = standing(&[(1, "198.51.100.1:4000"), (2, "198.51.100.1:4001")]);
        assert!(symmetric.reflexive.is_empty() && symmetric.symmetric);
        assert!(!standing(&[(1, "198.51.100.1:4000")]).symmetric);
        // Two ways out are no symmetric NAT.
        assert!(!standing(&[(1, "198.51.100.1:4000"), (2, "203.0.113.9:4000")]).symmetric);
    }

    #[test]
    fn one_liar_among_witnesses_changes_nothing() {
        let honest = [(1, "198.51.100.1:4000"), (2, "198.51.100.1:4000")];
        for lie in ["203.0.113.66:53", "198.51.100.1:4999", "10.0.0.5:51820"] {
            let with = standing(&[honest[0], honest[1], (3, lie)]);
            assert_eq!(with.reflexive, standing(&honest).reflexive, "{lie}");
            assert!(!with.symmetric, "{lie}");
        }
    }

    #[test]
    fn what_comes_and_goes_is_not_published() {
        let (mut steady, begun) = (Steady::default(), Instant::now());
        let at = |seconds| begun + Duration::from_secs(seconds);
        let [one, other] = ["198.51.100.1:4000", "198.51.100.1:5000"].map(|us| standing(&[(1, us)]));
        steady.note(one.clone(), at(0));
        assert_eq!((steady.current(), steady.wake_at()), (&Standing::default(), Some(at(3))));
        steady.note(one.clone(), at(3));
        assert_eq!(steady.current(), &one);
        steady.note(other.clone(), at(4));
        steady.note(one.clone(), at(5));
        steady.note(other.clone(), at(8));
        steady.note(other.clone(), at(13));
        assert_eq!(steady.current(), &one, "the second change has to hold for longer");
        steady.note(other.clone(), at(14));
        assert_eq!(steady.current(), &other);
        for n in 0..100 {
            steady.note(if n % 2 == 0 { one.clone() } else { other.clone() }, at(20 + n));
        }
        assert_eq!(steady.current(), &other);
    }
}
