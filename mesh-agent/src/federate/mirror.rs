//! Which MeshNodes stand in for the nodes of another cluster. Pure.
//!
//! A remote cluster is hostile: what it says counts within its link's grants only, and never against anyone who is there
//! already. The agents judge claims again; what is refused here does not even reach them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_keyring::{ClusterName, NodeName, PublicKey, SiteName};
use mesh_overlay::advertisement::told::Told;
use mesh_overlay::{Advertisement, NodeRecord, prefix};

/// The most prefixes of one node, as the MeshNode's schema has it.
const PREFIXES_MOST: usize = 16;

/// What a link allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The remote cluster's name; the link's own name too.
    pub cluster: ClusterName,
    /// The site that all its nodes stand in. Without, each has its own: a broker passes on nodes of many.
    pub site: Option<SiteName>,
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

/// Who holds something: a node, and the link that it comes through; none for this cluster's own.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Holder {
    node: NodeName,
    link: Option<String>,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.link {
            Some(link) => write!(f, "{} of link {link}", self.node),
            None => write!(f, "{} of this cluster", self.node),
        }
    }
}

/// Who is there already: names, prefixes and keys, each with who holds it. Standing mirrors are among them, so that whoever
/// is judged takes nothing from anyone, in whatever order.
#[derive(Debug, Default)]
pub struct Held {
    names: BTreeMap<NodeName, Holder>,
    // By family, first address and length.
    prefixes: BTreeMap<(bool, u128, u8), Vec<Holder>>,
    keys: BTreeMap<[u8; 32], Vec<Holder>>,
}

fn place(net: &IpNet) -> (bool, u128, u8) {
    let (v6, bits) = bits(net.network());
    (v6, bits, net.prefix_len())
}

fn bits(address: IpAddr) -> (bool, u128) {
    match address {
        IpAddr::V4(v4) => (false, u32::from(v4).into()),
        IpAddr::V6(v6) => (true, v6.into()),
    }
}

impl Held {
    /// Takes in the nodes of this cluster, and the standing mirrors of each link.
    pub fn of(own: &[NodeRecord], mirrors: &BTreeMap<String, Vec<NodeRecord>>) -> Self {
        let mut held = Self::default();
        let own = own.iter().map(|record| (record, None));
        let mirrors =
            mirrors.iter().flat_map(|(link, records)| records.iter().map(move |record| (record, Some(link))));
        for (record, link) in own.chain(mirrors) {
            let prefixes: Vec<IpNet> = record.pod_cidrs.iter().filter_map(|text| text.parse().ok()).collect();
            let key = Advertisement::parse(&record.annotations).ok().flatten().map(|claim| claim.public_key);
            held.take(&Holder { node: record.name.clone(), link: link.cloned() }, &prefixes, key);
        }
        held
    }

    fn take(&mut self, holder: &Holder, prefixes: &[IpNet], key: Option<PublicKey>) {
        self.names.entry(holder.node.clone()).or_insert_with(|| holder.clone());
        for net in prefixes {
            self.prefixes.entry(place(&net.trunc())).or_default().push(holder.clone());
        }
        if let Some(key) = key {
            self.keys.entry(*key.as_bytes()).or_default().push(holder.clone());
        }
    }

    // Somebody else's prefix that overlaps: one that contains it, or one within.
    fn overlapping(&self, net: &IpNet, but: &Holder) -> Option<String> {
        let others =
            |holders: &Vec<Holder>| holders.iter().find(|holder| *holder != but).map(ToString::to_string);
        let around = (0..=net.prefix_len()).filter_map(|length| {
            let wider = IpNet::new(net.network(), length).ok()?.trunc();
            Some((wider, self.prefixes.get(&place(&wider))?))
        });
        let (v6, first) = bits(net.network());
        let within = self.prefixes.range((v6, first, 0)..=(v6, bits(net.broadcast()).1, u8::MAX)).filter_map(
            |((v6, bits, length), holders)| {
                let address = if *v6 {
                    IpAddr::from(bits.to_be_bytes())
                } else {
                    IpAddr::from((*bits as u32).to_be_bytes())
                };
                Some((IpNet::new(address, *length).ok()?, holders))
            },
        );
        around.chain(within).find_map(|(other, holders)| {
            Some(format!("overlaps with {other}, which {} holds", others(holders)?))
        })
    }
}

/// What becomes of a remote cluster's nodes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The MeshNodes that are to be there.
    pub mirrors: BTreeMap<NodeName, Mirror>,
    /// Who is refused, and why: each sentence names both sides.
    pub refused: BTreeMap<NodeName, String>,
    /// Mirrored nodes that the remote cluster cannot tell of now, because it does not know our kind: they count as there.
    pub unseen: BTreeSet<NodeName>,
}

/// The most nodes that are mirrored through one link.
pub const NODES_MOST: usize = 10_000;

/// Judges the nodes of a remote cluster, which bear their names in the mesh. `own` is this cluster: a broker in the
/// middle shows us our own nodes. What is accepted is `held` from then on.
pub fn judge(link: &Link, own: &ClusterName, remote: &[NodeRecord], held: &mut Held) -> Outcome {
    let mut outcome = Outcome::default();
    let ours = format!(".{own}");
    for record in remote.iter().filter(|record| !record.name.as_str().ends_with(&ours)) {
        let holder = Holder { node: record.name.clone(), link: Some(link.cluster.to_string()) };
        let judged = if outcome.mirrors.len() < NODES_MOST {
            mirror(link, record, held, &holder)
        } else {
            Err(format!("through one link no more than {NODES_MOST} nodes are mirrored"))
        };
        match judged {
            Ok((mirror, key)) => {
                held.take(&holder, &mirror.pod_cidrs, key);
                outcome.mirrors.insert(record.name.clone(), mirror);
            }
            Err(why) => {
                outcome.refused.insert(record.name.clone(), why);
            }
        }
    }
    outcome
}

/// Whether a mirror is still what its link allows; what it stands for may have become something else since.
pub fn is_allowed(link: &Link, mirror: &Mirror) -> bool {
    link.site.as_ref().is_none_or(|site| *site == mirror.site)
        && mirror.pod_cidrs.iter().all(|net| link.grants.iter().any(|grant| grant.contains(net)))
}

fn mirror(
    link: &Link,
    record: &NodeRecord,
    held: &Held,
    holder: &Holder,
) -> Result<(Mirror, Option<PublicKey>), String> {
    // A broker passes on nodes of others.
    if link.site.is_some() && !record.name.as_str().ends_with(&format!(".{}", link.cluster)) {
        return Err(format!("its name does not end with .{}, as those of cluster {0} do", link.cluster));
    }
    if let Some(other) = held.names.get(&record.name).filter(|other| *other != holder) {
        return Err(format!("its name is taken by {other}"));
    }
    if record.pod_cidrs.len() > PREFIXES_MOST {
        return Err(format!("it has {} prefixes; at most {PREFIXES_MOST} are taken", record.pod_cidrs.len()));
    }
    let mut pod_cidrs: Vec<IpNet> = Vec::new();
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
        if let Some(overlap) = held.overlapping(&net, holder) {
            return Err(format!("{net} {overlap}"));
        }
        if !pod_cidrs.contains(&net) {
            pod_cidrs.push(net);
        }
    }
    let claim = Advertisement::parse(&record.annotations).map_err(|e| e.to_string())?;
    let key = claim.as_ref().map(|claim| claim.public_key);
    let holders = key.and_then(|key| held.keys.get(key.as_bytes()));
    if let Some(other) = holders.and_then(|holders| holders.iter().find(|other| *other != holder)) {
        return Err(format!("its public key is that of {other}"));
    }
    let claimed = claim.as_ref().map(|claim| &claim.site);
    let site = link.site.as_ref().or(record.site_label.as_ref()).or(claimed);
    let Some(site) = site.cloned() else {
        return Err(format!("nobody says in which site it stands; ClusterLink {} does not", link.cluster));
    };
    if let Some(claimed) = claimed.filter(|claimed| **claimed != site) {
        return Err(format!("it says that it stands in site {claimed}; others say {site}"));
    }
    let mut annotations = claim.map(|claim| claim.to_annotations()).unwrap_or_default();
    if !annotations.is_empty() {
        // Who refuses whom has to come back to whom it concerns; which agent speaks is its own cluster's affair.
        let told = Told { instance: None, ..Told::parse(&record.annotations) };
        annotations.extend(told.to_annotations());
    }
    Ok((Mirror { site, pod_cidrs, annotations }, key))
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
            reflexive_endpoints: Vec::new(),
            paths: Default::default(),
            encrypts: true,
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
            site: Some("west".parse().unwrap()),
            grants: grants.iter().map(|grant| grant.parse().unwrap()).collect(),
        }
    }

    fn judged(remote: &[NodeRecord]) -> Outcome {
        let mut held = Held::of(
            &[record("a.east", &["10.1.0.0/24", "fd00:1::/64"], 1), record("b.east", &["10.2.0.0/16"], 2)],
            &BTreeMap::new(),
        );
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
        let mut held = Held::of(&[record("a.west", &["10.1.0.0/24"], 1)], &BTreeMap::new());
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
    fn a_link_speaks_for_nodes_of_its_own_cluster_unless_it_is_a_brokers() {
        assert!(why(record("c.north", &["10.3.0.0/24"], 3)).contains("does not end with .west"));
        assert!(why(record("onprem", &["10.3.0.0/24"], 3)).contains("does not end with .west"));
    }

    #[test]
    fn standing_mirrors_are_taken_from_nobody_whatever_the_order() {
        let own: ClusterName = "east".parse().unwrap();
        let standing = record("n.west", &["10.4.0.0/24"], 4);
        let mirrors = BTreeMap::from([("west".to_owned(), vec![standing.clone()])]);
        let hub = Link { site: None, ..link("hub", &["10.0.0.0/8"]) };
        // Judged before west is, and although west itself is refused now.
        let mut held = Held::of(&[], &mirrors);
        for thief in [
            record("n.west", &["10.9.0.0/24"], 9),
            record("m.hub", &["10.4.0.128/25"], 9),
            record("m.hub", &["10.9.0.0/24"], 4),
        ] {
            let outcome = judge(&hub, &own, std::slice::from_ref(&thief), &mut held);
            let why = outcome.refused.values().next().unwrap();
            assert!(why.contains("n.west of link west"), "{why}");
        }
        // To itself it is no obstacle, with another prefix and another key as well.
        let mut held = Held::of(&[], &mirrors);
        let renewed = record("n.west", &["10.4.0.0/25"], 5);
        assert!(judge(&link("west", &["10.0.0.0/8"]), &own, &[renewed], &mut held).refused.is_empty());
        assert!(is_allowed(
            &link("west", &["10.4.0.0/16"]),
            &Mirror::of(&labelled(standing.clone())).unwrap()
        ));
        assert!(!is_allowed(&link("west", &["10.5.0.0/16"]), &Mirror::of(&labelled(standing)).unwrap()));
    }

    fn labelled(record: NodeRecord) -> NodeRecord {
        NodeRecord { site_label: Some("west".parse().unwrap()), ..record }
    }

    #[test]
    fn prefixes_within_each_other_are_all_seen() {
        let own: ClusterName = "east".parse().unwrap();
        let nested = [record("a.east", &["10.1.0.0/16"], 1), record("b.east", &["10.1.5.0/24"], 2)];
        let mut held = Held::of(&nested, &BTreeMap::new());
        for cidr in ["10.1.9.0/24", "10.1.5.128/25", "10.0.0.0/12"] {
            let outcome =
                judge(&link("west", &["10.0.0.0/8"]), &own, &[record("c.west", &[cidr], 3)], &mut held);
            assert_eq!(outcome.refused.len(), 1, "{cidr}");
        }
    }

    #[test]
    fn through_a_broker_each_node_keeps_its_site() {
        let broker = Link { site: None, ..link("hub", &["10.0.0.0/8"]) };
        let own: ClusterName = "east".parse().unwrap();
        let mut labelled = record("b.north", &["10.4.0.0/24"], 4);
        labelled.site_label = Some("north".parse().unwrap());
        let mut silent = record("d.north", &["10.6.0.0/24"], 6);
        silent.annotations.clear();
        let remote = [record("a.west", &["10.3.0.0/24"], 3), labelled, silent];
        let outcome = judge(&broker, &own, &remote, &mut Held::default());
        assert_eq!(outcome.mirrors[&remote[0].name].site.as_str(), "west");
        let refused: Vec<&String> = outcome.refused.values().collect();
        assert!(refused[0].contains("site west; others say north"), "{refused:?}");
        assert!(refused[1].contains("nobody says"), "{refused:?}");
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
