//! Prefixes that were guarded once stay guarded, whatever the registry says of them later.
//!
//! A Node object may be deleted, moved, refused or swept away while its pods go on running. Packets to
//! those pods must not leave in clear then. The ratchet remembers each guarded prefix until the operator
//! releases it by name, or until the configured grace has passed since it was last seen.
//!
//! Age is time in which the agent ran and knew its registry. It is no difference of two clock readings,
//! so that a clock that jumps ends no protection.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::prefix;

const HOUR: u64 = 3_600;
/// The most prefixes of one region that are kept although nobody holds them. Whoever may create and delete nodes
/// could fill all memory else, and a region bounds whom that concerns.
pub const KEPT_MOST: usize = 1_024;
/// A region: a /16 of IPv4, a /40 of IPv6.
const REGION: (u8, u8) = (16, 40);

/// Who held a prefix last, and for how long nobody has held it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Kept {
    /// The node, or `site NAME` for what a site was granted.
    pub holder: String,
    /// Seconds of the agent's own running time since anybody held it; 0 while somebody does. On disk it
    /// is rounded down to hours, so that an idle agent does not write.
    #[serde(default, serialize_with = "hours", deserialize_with = "from_hours", rename = "absentHours")]
    pub absent: u64,
}

fn hours<S: serde::Serializer>(seconds: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(seconds / HOUR)
}

fn from_hours<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    Ok(u64::deserialize(deserializer)?.saturating_mul(HOUR))
}

/// Every prefix that was ever guarded and was neither released nor outlived its grace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ratchet(BTreeMap<IpNet, Kept>);

impl Ratchet {
    /// Notes who holds what now. Prefixes that nobody holds any more age by `elapsed`; those older than
    /// `grace` are dropped and returned. Without a grace nothing gets too old.
    ///
    /// Beyond [`KEPT_MOST`] in one region, neighbours are joined; the youngest that remain too many are dropped
    /// and returned too.
    pub fn sight(
        &mut self,
        held: &BTreeMap<IpNet, String>,
        elapsed: Duration,
        grace: Option<Duration>,
    ) -> Vec<(IpNet, Kept)> {
        for (net, kept) in &mut self.0 {
            if !held.contains_key(net) {
                // Somebody held it at the last look: its age begins now.
                let older = if kept.absent == 0 { 1 } else { elapsed.as_secs() };
                kept.absent = kept.absent.saturating_add(older);
            }
        }
        for (net, holder) in held {
            self.0.insert(*net, Kept { holder: holder.clone(), absent: 0 });
        }
        let grace = grace.map_or(u64::MAX, |grace| grace.as_secs());
        let over = |net: &IpNet, kept: &Kept| !held.contains_key(net) && kept.absent > grace;
        let mut ended: Vec<(IpNet, Kept)> =
            self.0.iter().filter(|(net, kept)| over(net, kept)).map(|(net, k)| (*net, k.clone())).collect();
        for (net, _) in &ended {
            self.0.remove(net);
        }
        ended.extend(self.bound(held));
        ended
    }

    /// Keeps each region within its budget.
    fn bound(&mut self, held: &BTreeMap<IpNet, String>) -> Vec<(IpNet, Kept)> {
        let absent = |net: &IpNet| !held.contains_key(net);
        if self.0.keys().filter(|net| absent(net)).count() <= KEPT_MOST {
            return Vec::new();
        }
        let mut regions: BTreeMap<IpNet, Vec<IpNet>> = BTreeMap::new();
        for net in self.0.keys().filter(|net| absent(net)) {
            let length = if net.addr().is_ipv4() { REGION.0 } else { REGION.1 };
            let region =
                IpNet::new(net.addr(), length.min(net.prefix_len())).map_or(*net, |wide| wide.trunc());
            regions.entry(region).or_default().push(*net);
        }
        let mut surplus = Vec::new();
        for nets in regions.into_values().filter(|nets| nets.len() > KEPT_MOST) {
            for wide in IpNet::aggregate(&nets).into_iter().filter(|wide| !nets.contains(wide)) {
                let parts: Vec<IpNet> = nets.iter().filter(|net| wide.contains(*net)).copied().collect();
                let ages = parts.iter().filter_map(|net| self.0.remove(net)).map(|kept| kept.absent);
                let absent = ages.min().unwrap_or(1);
                self.0.insert(wide, Kept { holder: format!("{} nodes", parts.len()), absent });
            }
            let mut left: Vec<(u64, IpNet)> = IpNet::aggregate(&nets)
                .into_iter()
                .filter_map(|net| Some((self.0.get(&net)?.absent, net)))
                .collect();
            left.sort_by_key(|(absent, net)| (std::cmp::Reverse(*absent), *net));
            surplus.extend(
                left.into_iter().skip(KEPT_MOST).filter_map(|(_, net)| Some((net, self.0.remove(&net)?))),
            );
        }
        surplus
    }

    /// Returns what is remembered and lies in none of the prefixes in `held`: those protect it already,
    /// and a blackhole for a part of one would take that part from its holder.
    pub fn beyond(&self, held: &BTreeSet<IpNet>) -> BTreeMap<IpNet, Kept> {
        self.0
            .iter()
            .filter(|(net, _)| !prefix::within(net, held))
            .map(|(net, kept)| (*net, kept.clone()))
            .collect()
    }

    /// Releases a prefix, or all prefixes of a holder, and returns them. What somebody holds now is not
    /// released: `held` says what that is.
    pub fn release(&mut self, name: &str, held: &BTreeSet<IpNet>) -> Vec<IpNet> {
        let net = name.parse::<IpNet>().map(|net| net.trunc()).ok();
        let meant = |other: &IpNet, kept: &Kept| net.map_or(kept.holder == name, |net| net == *other);
        let released: Vec<IpNet> = self
            .0
            .iter()
            .filter(|(other, kept)| meant(other, kept) && !held.contains(*other))
            .map(|(other, _)| *other)
            .collect();
        for net in &released {
            self.0.remove(net);
        }
        released
    }

    /// Returns how many prefixes are remembered.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Reports whether nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn held(nets: &[(&str, &str)]) -> BTreeMap<IpNet, String> {
        nets.iter().map(|(prefix, holder)| (net(prefix), (*holder).to_owned())).collect()
    }

    const HOURS: fn(u64) -> Duration = |hours| Duration::from_secs(hours * HOUR);

    #[test]
    fn what_was_held_once_is_kept() {
        let mut ratchet = Ratchet::default();
        ratchet.sight(&held(&[("10.2.0.0/24", "b")]), HOURS(1), None);
        for _ in 0..2 {
            assert!(ratchet.sight(&held(&[]), HOURS(100_000), None).is_empty());
        }
        let kept = ratchet.beyond(&BTreeSet::new());
        assert_eq!(kept[&net("10.2.0.0/24")].holder, "b");
        assert_eq!(kept[&net("10.2.0.0/24")].absent, 100_000 * HOUR + 1);
    }

    #[test]
    fn a_grace_ends_after_the_last_sight_alone() {
        let mut ratchet = Ratchet::default();
        let grace = Some(HOURS(10));
        let both = held(&[("10.2.0.0/24", "b"), ("10.3.0.0/24", "c")]);
        assert!(ratchet.sight(&both, HOURS(50), grace).is_empty());
        let one = held(&[("10.3.0.0/24", "c")]);
        assert!(ratchet.sight(&one, HOURS(50), grace).is_empty());
        assert!(ratchet.sight(&one, HOURS(9), grace).is_empty());
        // Seen again: the age begins anew.
        assert!(ratchet.sight(&both, HOURS(5), grace).is_empty());
        assert!(ratchet.sight(&held(&[]), HOURS(50), grace).is_empty());
        assert!(ratchet.sight(&held(&[]), HOURS(9), grace).is_empty());
        let ended = ratchet.sight(&held(&[]), HOURS(1), grace);
        assert_eq!(ended.len(), 2);
        assert!(ratchet.is_empty());
    }

    #[test]
    fn what_lies_in_a_held_prefix_is_no_hole_in_it() {
        let mut ratchet = Ratchet::default();
        ratchet.sight(&held(&[("10.2.1.0/24", "b"), ("10.0.0.0/8", "site x")]), HOURS(0), None);
        let now = BTreeSet::from([net("10.2.0.0/16")]);
        assert_eq!(ratchet.beyond(&now).into_keys().collect::<Vec<_>>(), [net("10.0.0.0/8")]);
    }

    #[test]
    fn the_operator_releases_by_prefix_or_holder() {
        let mut ratchet = Ratchet::default();
        let all = held(&[("10.2.0.0/24", "b"), ("fd00:2::/64", "b"), ("10.3.0.0/24", "c")]);
        ratchet.sight(&all, HOURS(0), None);
        assert_eq!(ratchet.release("10.3.0.7/24", &BTreeSet::new()), [net("10.3.0.0/24")]);
        // A prefix in use is never released.
        assert_eq!(ratchet.release("b", &BTreeSet::from([net("10.2.0.0/24")])), [net("fd00:2::/64")]);
        assert_eq!(ratchet.release("nobody", &BTreeSet::new()), [] as [IpNet; 0]);
        assert_eq!(ratchet.len(), 1);
    }

    #[test]
    fn each_region_has_a_budget_of_its_own() {
        let mut ratchet = Ratchet::default();
        // Every second address of one region, a whole range of another, and a neighbour's prefix.
        let scattered = (0..3_000u32).map(|n| format!("10.7.{}.{}/32", n * 2 / 256, n * 2 % 256));
        let range = (0..2_048u32).map(|n| format!("10.8.{}.{}/31", n * 2 / 256, n * 2 % 256));
        let all = scattered.chain(range).chain(["10.9.0.0/24".to_owned(), "fd00:9::/64".to_owned()]);
        let all: BTreeMap<IpNet, String> = all.map(|text| (net(&text), "x".to_owned())).collect();
        assert!(ratchet.sight(&all, HOURS(0), None).is_empty(), "what somebody holds has no bound");
        let dropped = ratchet.sight(&held(&[]), HOURS(0), None);
        assert_eq!(dropped.len(), 3_000 - KEPT_MOST);
        assert!(dropped.iter().all(|(net, _)| net.to_string().starts_with("10.7.")));
        let kept = ratchet.beyond(&BTreeSet::new());
        assert_eq!(kept[&net("10.8.0.0/20")].holder, "2048 nodes");
        assert!(kept.contains_key(&net("10.9.0.0/24")) && kept.contains_key(&net("fd00:9::/64")));
        assert!(ratchet.sight(&held(&[]), HOURS(1), None).is_empty());
    }

    #[test]
    fn age_survives_the_disk_in_hours() {
        let mut ratchet = Ratchet::default();
        ratchet.sight(&held(&[("10.2.0.0/24", "b")]), HOURS(0), None);
        ratchet.sight(&held(&[]), HOURS(0), None);
        ratchet.sight(&held(&[]), Duration::from_secs(2 * HOUR + 1_000), None);
        let text = serde_json::to_string(&ratchet).unwrap();
        assert_eq!(text, r#"{"10.2.0.0/24":{"holder":"b","absentHours":2}}"#);
        let back: Ratchet = serde_json::from_str(&text).unwrap();
        assert_eq!(back.beyond(&BTreeSet::new())[&net("10.2.0.0/24")].absent, 2 * HOUR);
    }
}
