//! What a node learns of itself from how others see it: its address behind a NAT, the kind of the NAT, its carriers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use mesh_keyring::PublicKey;
use mesh_overlay::path::Rung;
use mesh_overlay::plan::Paths;

/// What is new has to hold for so long before it is published: every change is a write to the registry, and an event for
/// all nodes.
const STEADY: Duration = Duration::from_secs(3);

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
    /// What the paths say. `own` are this node's addresses, `near` the peers of its own site: from there it is seen without a NAT.
    pub(super) fn of(paths: &Paths, own: &BTreeSet<IpAddr>, near: impl Fn(&PublicKey) -> bool) -> Self {
        let mut seen: BTreeMap<IpAddr, BTreeSet<SocketAddr>> = BTreeMap::new();
        for (_, path) in paths.iter().filter(|(key, _)| !near(key)) {
            for (peer, us) in path.seen.iter().filter(|(_, us)| !own.contains(&us.ip())) {
                // One peer is one witness, however many addresses it has.
                seen.entry(peer.ip()).or_default().insert(*us);
            }
        }
        let all: BTreeSet<SocketAddr> = seen.values().flatten().copied().collect();
        let ports = |v6: bool| all.iter().filter(|us| us.is_ipv6() == v6).count();
        let symmetric = seen.len() > 1 && (ports(false) > 1 || ports(true) > 1);
        Self {
            // An address of a symmetric NAT is good for one peer alone.
            reflexive: if symmetric { BTreeSet::new() } else { all },
            symmetric,
            rungs: paths.values().filter(|path| path.address.is_some()).map(|path| path.rung).collect(),
        }
    }
}

/// A standing that is published once it has held for a while.
#[derive(Debug, Clone, Default)]
pub(super) struct Steady {
    current: Standing,
    next: Option<(Standing, Instant)>,
}

impl Steady {
    /// What may be published.
    pub(super) fn current(&self) -> &Standing {
        &self.current
    }

    /// The standing of this moment.
    pub(super) fn note(&mut self, standing: Standing, now: Instant) {
        if standing == self.current {
            self.next = None;
            return;
        }
        let since = match &self.next {
            Some((next, since)) if *next == standing => *since,
            _ => now,
        };
        if now.saturating_duration_since(since) >= STEADY {
            (self.current, self.next) = (standing, None);
        } else {
            self.next = Some((standing, since));
        }
    }

    /// When what is new has held long enough.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        self.next.as_ref().map(|(_, since)| *since + STEADY)
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
            let seen = vec![(at, us.parse().unwrap())];
            (
                key(*n),
                PathChoice {
                    rung: Rung::Direct,
                    address: Some(at),
                    mtu: None,
                    probed: BTreeSet::new(),
                    seen,
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
        assert_eq!(steady.current(), &one);
        steady.note(other.clone(), at(11));
        assert_eq!(steady.current(), &other);
    }
}
