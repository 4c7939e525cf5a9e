//! Which MeshNodes stand in for the nodes of another cluster. Pure.
//!
//! A remote cluster is hostile: what it says counts within its link's grants only, and never against anyone who is there
//! already. The agents judge claims again; what is refused here does not even reach them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_keyring::{ClusterName, NodeName, PublicKey, SiteName};
use mesh_overlay::{Advertisement, NodeRecord, prefix};

/// The most prefixes of one node, as the MeshNode's schema has it.
const PREFIXES_MOST: usize = 16;

/// What a link allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The remote cluster's name; the link's own name too.
    pub cluster: ClusterName,
    /// The site that all its nodes count as.
    pub site: SiteName,
    /// The prefixes that its nodes may hold.
    pub grants: Vec<IpNet>,
}

/// A MeshNode for a remote node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// Its site.
    pub site: SiteName,
    /// Its prefixes, all within the link's grants.
    pub pod_cidrs: Vec<IpNet>,
    /// What it says of itself.
    pub annotations: BTreeMap<String, String>,
}

impl Mirror {
    /// A MeshNode as it stands.
    pub fn of(record: &NodeRecord) -> Option<Self> {
        Some(Self {
            site: record.site_label.clone()?,
            pod_cidrs: record.pod_cidrs.iter().map(|text| text.parse()).collect::<Result<_, _>>().ok()?,
            annotations: record.annotations.clone(),
        })
    }
}

/// Who is there already: names, prefixes and keys, each with where it comes from.
#[derive(Debug, Default)]
pub struct Held {
    names: BTreeMap<NodeName, String>,
    // By family and first address; those that overlap are not taken in.
    prefixes: BTreeMap<(bool, u128), (IpNet, String)>,
    keys: BTreeMap<[u8; 32], String>,
}

fn bits(address: IpAddr) -> (bool, u128) {
    match address {
        IpAddr::V4(v4) => (false, u32::from(v4).into()),
        IpAddr::V6(v6) => (true, v6.into()),
    }
}

impl Held {
    /// Takes in the nodes of this cluster.
    pub fn of(records: &[NodeRecord]) -> Self {
        let mut held = Self::default();
        held.take_all(records, "this cluster");
        held
    }

    /// Takes in mirrors that stay as they are.
    pub fn keep(&mut self, records: &[NodeRecord], link: &str) {
        self.take_all(records, &format!("link {link}"));
    }

    fn take_all(&mut self, records: &[NodeRecord], whence: &str) {
        for record in records {
            let prefixes: Vec<IpNet> = record.pod_cidrs.iter().filter_map(|text| text.parse().ok()).collect();
            let key = Advertisement::parse(&record.annotations).ok().flatten().map(|claim| claim.public_key);
            self.take(&record.name, &format!("{} of {whence}", record.name), &prefixes, key);
        }
    }

    fn take(&mut self, name: &NodeName, shown: &str, prefixes: &[IpNet], key: Option<PublicKey>) {
        self.names.entry(name.clone()).or_insert_with(|| shown.to_owned());
        for net in prefixes.iter().map(IpNet::trunc) {
            self.prefixes.entry(bits(net.addr())).or_insert_with(|| (net, shown.to_owned()));
        }
        if let Some(key) = key {
            self.keys.entry(*key.as_bytes()).or_insert_with(|| shown.to_owned());
        }
    }

    fn overlapping(&self, net: &IpNet) -> Option<&(IpNet, String)> {
        let (first, last) = (bits(net.network()), bits(net.broadcast()));
        let before = self.prefixes.range(..=first).next_back().map(|(_, held)| held);
        let within = self.prefixes.range(first..=last).next().map(|(_, held)| held);
        before.filter(|(held, _)| held.contains(net)).or(within)
    }
}

/// What becomes of a remote cluster's nodes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The MeshNodes that are to be there.
    pub mirrors: BTreeMap<NodeName, Mirror>,
    /// Who is refused, and why: each sentence names both sides.
    pub refused: BTreeMap<NodeName, String>,
}

/// Judges the nodes of a remote cluster, which bear their names in the mesh. `own` is this cluster: a broker in the
/// middle shows us our own nodes. What is accepted is `held` from then on.
pub fn judge(link: &Link, own: &ClusterName, remote: &[NodeRecord], held: &mut Held) -> Outcome {
    let mut outcome = Outcome::default();
    let ours = format!(".{own}");
    for record in remote.iter().filter(|record| !record.name.as_str().ends_with(&ours)) {
        match mirror(link, record, held) {
            Ok((mirror, key)) => {
                let shown = format!("{} of link {}", record.name, link.cluster);
                held.take(&record.name, &shown, &mirror.pod_cidrs, key);
                outcome.mirrors.insert(record.name.clone(), mirror);
            }
            Err(why) => {
                outcome.refused.insert(record.name.clone(), why);
            }
        }
    }
    outcome
}

fn mirror(link: &Link, record: &NodeRecord, held: &Held) -> Result<(Mirror, Option<PublicKey>), String> {
    if let Some(holder) = held.names.get(&record.name) {
        return Err(format!("its name is taken by {holder}"));
    }
    if record.pod_cidrs.len() > PREFIXES_MOST {
        return Err(format!("it has {} prefixes; at most {PREFIXES_MOST} are taken", record.pod_cidrs.len()));
    }
    let mut pod_cidrs = Vec::new();
    for text in &record.pod_cidrs {
        let shown: String = text.chars().take(60).collect();
        let net: IpNet = text.parse().map_err(|_| format!("{shown:?} is no prefix"))?;
        let net = net.trunc();
        if let Some(why) = prefix::forbidden(&net) {
            return Err(format!("{net}: {why}"));
        }
        if !link.grants.iter().any(|grant| grant.contains(&net)) {
            return Err(format!("{net} lies outside of what ClusterLink {} grants", link.cluster));
        }
        if let Some((other, holder)) = held.overlapping(&net) {
            return Err(format!("{net} overlaps with {other}, which {holder} holds"));
        }
        pod_cidrs.push(net);
    }
    let claim = Advertisement::parse(&record.annotations).map_err(|e| e.to_string())?;
    if let Some(claim) = &claim {
        if let Some(holder) = held.keys.get(claim.public_key.as_bytes()) {
            return Err(format!("its public key is that of {holder}"));
        }
        if claim.site != link.site {
            return Err(format!(
                "it says that it stands in site {}; ClusterLink {} is about {}",
                claim.site, link.cluster, link.site
            ));
        }
    }
    let key = claim.as_ref().map(|claim| claim.public_key);
    let annotations = claim.map(|claim| claim.to_annotations()).unwrap_or_default();
    Ok((Mirror { site: link.site.clone(), pod_cidrs, annotations }, key))
}

#[cfg(test)]
mod tests {
    use mesh_keyring::PrivateKey;

    use super::*;

    fn record(name: &str, cidrs: &[&str], key: u8) -> NodeRecord {
        let claim = Advertisement {
            public_key: PrivateKey::from_bytes(&[key; 32]).unwrap().public(),
            epoch: 1,
            site: "west".parse().unwrap(),
            endpoints: Vec::new(),
            internal_endpoints: Vec::new(),
            mtu: None,
        };
        NodeRecord {
            name: name.parse().unwrap(),
            site_label: None,
            pod_cidrs: cidrs.iter().map(|&cidr| cidr.to_owned()).collect(),
            annotations: claim.to_annotations(),
        }
    }

    fn link(cluster: &str, grants: &[&str]) -> Link {
        Link {
            cluster: cluster.parse().unwrap(),
            site: "west".parse().unwrap(),
            grants: grants.iter().map(|grant| grant.parse().unwrap()).collect(),
        }
    }

    fn judged(remote: &[NodeRecord]) -> Outcome {
        let mut held = Held::of(&[
            record("a.east", &["10.1.0.0/24", "fd00:1::/64"], 1),
            record("b.east", &["10.2.0.0/16"], 2),
        ]);
        judge(&link("west", &["10.0.0.0/8", "fd00::/16"]), &"east".parse().unwrap(), remote, &mut held)
    }

    fn why(record: NodeRecord) -> String {
        let mut outcome = judged(&[record]);
        outcome.refused.pop_first().map(|(_, why)| why).unwrap_or_default()
    }

    #[test]
    fn a_remote_node_within_the_grants_gets_a_mirror_with_its_claim() {
        let remote = record("c.west", &["10.3.0.0/24", "fd00:3::/64"], 3);
        let outcome = judged(std::slice::from_ref(&remote));
        assert!(outcome.refused.is_empty(), "{outcome:?}");
        let mirror = &outcome.mirrors[&remote.name];
        assert_eq!(mirror.pod_cidrs, ["10.3.0.0/24".parse().unwrap(), "fd00:3::/64".parse().unwrap()]);
        assert_eq!(mirror.annotations, remote.annotations);
    }

    #[test]
    fn conflicts_are_refused_and_name_both_sides() {
        for (remote, wanted) in [
            (
                record("c.west", &["10.1.0.0/25"], 3),
                "10.1.0.0/25 overlaps with 10.1.0.0/24, which a.east of this cluster holds",
            ),
            (record("c.west", &["10.0.0.0/15"], 3), "10.0.0.0/15 overlaps with 10.1.0.0/24, which a.east"),
            (record("c.west", &["10.2.9.0/24"], 3), "overlaps with 10.2.0.0/16, which b.east"),
            (record("c.west", &["10.3.0.0/24"], 1), "its public key is that of a.east of this cluster"),
            (record("c.west", &["0.0.0.0/0"], 3), "0.0.0.0/0"),
            (record("c.west", &["192.0.2.0/24"], 3), "outside of what ClusterLink west grants"),
            (record("c.west", &["nonsense"], 3), "no prefix"),
            (record("c.west", &["10.3.0.0/24"; 17], 3), "17 prefixes"),
        ] {
            let why = why(remote);
            assert!(why.contains(wanted), "{why:?} has no {wanted:?}");
        }
    }

    #[test]
    fn names_keys_and_sites_are_judged() {
        let mut held = Held::of(&[record("a.west", &["10.1.0.0/24"], 1)]);
        let link = link("west", &["10.0.0.0/8"]);
        let own: ClusterName = "east".parse().unwrap();
        let outcome = judge(&link, &own, &[record("a.west", &["10.7.0.0/24"], 7)], &mut held);
        assert!(outcome.refused.values().any(|why| why.contains("name is taken by a.west of this cluster")));
        let mut elsewhere = record("c.west", &["10.3.0.0/24"], 3);
        elsewhere.annotations.insert("sennit.dev/site".into(), "east".into());
        assert!(why(elsewhere).contains("site east"));
        let mut garbage = record("c.west", &["10.3.0.0/24"], 3);
        garbage.annotations.insert("sennit.dev/public-key".into(), "garbage".into());
        assert!(why(garbage).contains("public-key"));
    }

    #[test]
    fn one_link_takes_nothing_from_another_and_two_remote_nodes_nothing_from_each_other() {
        let mut held = Held::default();
        let own: ClusterName = "east".parse().unwrap();
        let first =
            judge(&link("west", &["10.0.0.0/8"]), &own, &[record("a.west", &["10.1.0.0/24"], 1)], &mut held);
        assert_eq!(first.mirrors.len(), 1);
        let remote = [
            record("a.north", &["10.1.0.0/24"], 2),
            record("b.north", &["10.5.0.0/24"], 1),
            record("c.north", &["10.6.0.0/24"], 3),
            record("d.north", &["10.6.0.0/24"], 4),
        ];
        let second = judge(&link("north", &["10.0.0.0/8"]), &own, &remote, &mut held);
        let refused: Vec<&str> = second.refused.keys().map(NodeName::as_str).collect();
        assert_eq!(refused, ["a.north", "b.north", "d.north"]);
        assert!(second.refused.values().all(|why| why.contains("of link")), "{second:?}");
    }

    #[test]
    fn a_broker_shows_us_our_own_nodes_and_we_pass_them_over() {
        let outcome = judged(&[record("a.east", &["10.1.0.0/24"], 1), record("c.west", &["10.3.0.0/24"], 3)]);
        assert!(outcome.refused.is_empty());
        assert_eq!(outcome.mirrors.keys().map(NodeName::as_str).collect::<Vec<_>>(), ["c.west"]);
    }

    #[test]
    fn a_node_that_has_not_published_yet_holds_its_prefixes_already() {
        let mut silent = record("c.west", &["10.3.0.0/24"], 3);
        silent.annotations.clear();
        let outcome = judged(&[silent, record("d.west", &["10.3.0.0/24"], 4)]);
        assert_eq!(outcome.mirrors.len(), 1);
        assert!(outcome.refused.values().next().unwrap().contains("c.west of link west"));
    }
}
