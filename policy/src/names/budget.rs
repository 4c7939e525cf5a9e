//! How much of what is learnt one pod, one policy and the agent may hold.
//!
//! Names that a policy speaks of word by word are as many as the policies say, and always have
//! room; only how fast a pod may bring new addresses of them has a bound. Names below a wildcard are
//! as many as somebody asks for, so they are counted, three times: for the pod that brought them, for
//! the wildcard, and for the agent. A count that is full first loses names without a valid address.
//! Then the pods share it: whoever holds less than an equal share still gets room, up to twice the
//! count, so that nobody is kept out by what others hold.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::domain::Domain;

/// The most names below wildcards that one pod brings.
pub(super) const NAMES_OF_POD: usize = 500;
/// The names below one wildcard.
pub(super) const NAMES_OF_WILDCARD: usize = 2_000;
/// The names of the agent, those aside that policies speak of word by word.
pub(super) const NAMES_OF_AGENT: usize = 10_000;
/// The most addresses of names that one pod brought below wildcards.
pub(super) const ADDRESSES_OF_POD: usize = 2_000;
/// The addresses of all names; up to twice as many where shares are left.
pub(super) const ADDRESSES_OF_AGENT: usize = 40_000;
/// The most addresses of one name.
pub(super) const ADDRESSES_OF_NAME: usize = 256;
/// The new addresses that one pod brings in a second, and at once: each costs a change in the
/// kernel. Names below wildcards have one such rate, and names that policies speak of word by word
/// another.
pub(super) const CHANGES: (u64, u64) = (64, 1_024);
/// The same for all pods of the node together.
pub(super) const CHANGES_OF_NODE: (u64, u64) = (1_000, 4_096);
/// The rate and burst that each pod keeps if others use up the node's rate.
pub(super) const RESERVE: (u64, u64) = (16, 256);
/// The most pods whose rates are remembered.
const RATES_MOST: usize = 4_096;

/// The budget that is used up.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Budget {
    /// Names of a pod, by its address.
    PodNames(IpAddr),
    /// Addresses of a pod's names.
    PodAddresses(IpAddr),
    /// New addresses a second of a pod.
    PodRate(IpAddr),
    /// Names below a wildcard.
    Wildcard(Arc<Domain>),
    /// Names of the agent.
    AgentNames,
    /// Addresses of the agent.
    AgentAddresses,
    /// Addresses of a name.
    NameAddresses,
}

/// Names with the second until which each counts, and who brought how many.
#[derive(Debug, Clone, Default)]
pub(super) struct Pool {
    ages: BTreeSet<(u64, Arc<str>)>,
    owners: BTreeMap<IpAddr, usize>,
}

impl Pool {
    pub(super) fn len(&self) -> usize {
        self.ages.len()
    }

    /// The name that has had no valid address for the longest.
    pub(super) fn lapsed(&self, now: u64) -> Option<Arc<str>> {
        self.ages.first().filter(|(last, _)| *last <= now).map(|(_, name)| Arc::clone(name))
    }

    pub(super) fn put(&mut self, name: &Arc<str>, last: u64, owner: IpAddr) {
        if self.ages.insert((last, Arc::clone(name))) {
            *self.owners.entry(owner).or_default() += 1;
        }
    }

    pub(super) fn take(&mut self, name: &Arc<str>, last: u64, owner: IpAddr) {
        if !self.ages.remove(&(last, Arc::clone(name))) {
            return;
        }
        if let Some(count) = self.owners.get_mut(&owner) {
            *count -= 1;
            if *count == 0 {
                self.owners.remove(&owner);
            }
        }
    }

    /// Whether somebody may add one, beside a limit.
    pub(super) fn has_room(&self, limit: usize, owner: IpAddr) -> bool {
        self.len() < limit || fits_share(self.len(), limit, &self.owners, owner)
    }
}

/// Whether somebody holds less than an equal share of a full count, and the count less than twice
/// its limit.
pub(super) fn fits_share(
    total: usize,
    limit: usize,
    owners: &BTreeMap<IpAddr, usize>,
    owner: IpAddr,
) -> bool {
    let held = owners.get(&owner).copied().unwrap_or_default();
    let all = owners.len() + usize::from(held == 0);
    total < limit * 2 && held < limit / all.max(1)
}

/// Tokens, and the second in which there were so many.
type Bucket = (u64, u64);

/// The tokens of a bucket now, by its rate and the most that it holds.
fn filled((tokens, at): Bucket, (rate, burst): (u64, u64), now: u64) -> u64 {
    let more = now.saturating_sub(at).saturating_mul(rate);
    tokens.saturating_add(more).min(burst)
}

/// Takes a token of a bucket, if there is one.
fn drawn(bucket: &mut Bucket, limits: (u64, u64), now: u64) -> bool {
    let tokens = filled(*bucket, limits, now);
    *bucket = (tokens.saturating_sub(1), now.max(bucket.1));
    tokens > 0
}

/// The tokens of one pod: one bucket per kind of name, and a reserve for when the node's are used
/// up.
#[derive(Debug, Clone, Copy)]
struct Tokens {
    below: Bucket,
    exact: Bucket,
    reserve: Bucket,
}

/// Tokens of pods for new addresses, and those of the node. The clock is in seconds.
#[derive(Debug, Clone)]
pub(super) struct Rates {
    pods: BTreeMap<IpAddr, Tokens>,
    node: Bucket,
}

impl Default for Rates {
    fn default() -> Self {
        Self { pods: BTreeMap::new(), node: (CHANGES_OF_NODE.1, 0) }
    }
}

impl Rates {
    /// Takes a token of a pod, if there is one, and one of the node or of the pod's reserve. `exact`: for a name that a policy speaks of
    /// word by word.
    pub(super) fn take(&mut self, owner: IpAddr, exact: bool, now: u64) -> bool {
        if !self.pods.contains_key(&owner) && self.pods.len() >= RATES_MOST {
            // A full bucket says nothing that a new one does not.
            self.pods.retain(|_, pod| {
                [(pod.below, CHANGES), (pod.exact, CHANGES), (pod.reserve, RESERVE)]
                    .into_iter()
                    .any(|(bucket, limits)| filled(bucket, limits, now) < limits.1)
            });
            if self.pods.len() >= RATES_MOST {
                return false;
            }
        }
        let full = Tokens { below: (CHANGES.1, now), exact: (CHANGES.1, now), reserve: (RESERVE.1, now) };
        let Self { pods, node } = self;
        let pod = pods.entry(owner).or_insert(full);
        let own = if exact { &mut pod.exact } else { &mut pod.below };
        drawn(own, CHANGES, now)
            && (drawn(node, CHANGES_OF_NODE, now) || drawn(&mut pod.reserve, RESERVE, now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(n: u32) -> IpAddr {
        IpAddr::V4(n.into())
    }

    #[test]
    fn a_full_pool_gives_room_to_small_shares() {
        let mut pool = Pool::default();
        for n in 0..10u64 {
            assert!(pool.has_room(10, at(1)));
            pool.put(&Arc::from(format!("a{n}")), 100 + n, at(1));
        }
        assert!(!pool.has_room(10, at(1)));
        for n in 0..5u64 {
            assert!(pool.has_room(10, at(2)), "{n}");
            pool.put(&Arc::from(format!("b{n}")), 100 + n, at(2));
        }
        assert!(!pool.has_room(10, at(2)) && pool.has_room(10, at(3)));
        assert_eq!((pool.lapsed(99), pool.lapsed(100).as_deref()), (None, Some("a0")));
        pool.take(&Arc::from("a0"), 100, at(1));
        assert_eq!((pool.len(), pool.owners[&at(1)]), (14, 9));
    }

    #[test]
    fn one_pods_rate_is_not_anothers() {
        let (mut rates, (rate, burst)) = (Rates::default(), CHANGES);
        assert_eq!((0..2 * burst).filter(|_| rates.take(at(1), false, 7)).count() as u64, burst);
        assert!(rates.take(at(2), false, 7) && rates.take(at(1), true, 7));
        assert_eq!((0..2 * burst).filter(|_| rates.take(at(1), false, 8)).count() as u64, rate);
        // However many there are.
        let pods = 2 * RATES_MOST as u32;
        assert!((0..pods).filter(|n| rates.take(at(1000 + n), false, 9)).count() >= RATES_MOST - 2);
        assert!(rates.pods.len() <= RATES_MOST);
        assert!(rates.take(at(3), false, 1000));
    }

    #[test]
    fn many_pods_together_leave_each_its_reserve() {
        let mut rates = Rates::default();
        let (pods, seconds) = (110u32, 60u32);
        let mut taken = 0;
        for second in 0..seconds {
            for n in 0..200 * pods {
                taken += u64::from(rates.take(at(10 + n % pods), n % 3 == 0, u64::from(second)));
            }
        }
        let (all, each) = (CHANGES_OF_NODE, RESERVE);
        let most =
            all.1 + u64::from(seconds) * all.0 + u64::from(pods) * (each.1 + u64::from(seconds) * each.0);
        assert!(taken <= most, "{taken} of {most}");
        // Whoever has asked for little until then has room.
        assert_eq!((0..1_000).filter(|_| rates.take(at(1), false, 59)).count() as u64, each.1);
    }
}
