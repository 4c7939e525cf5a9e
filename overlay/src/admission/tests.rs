use super::*;
use mesh_keyring::PrivateKey;
use proptest::prelude::*;

fn key(n: u8) -> PublicKey {
    PrivateKey::from_bytes(&[n; 32]).unwrap().public()
}

fn local() -> LocalNode {
    LocalNode {
        name: "me".parse().unwrap(),
        site: "aws".parse().unwrap(),
        public_key: key(1),
        prefixes: vec!["10.1.1.0/24".parse().unwrap()],
        underlay_addresses: ["172.16.0.1".parse().unwrap()].into(),
        former: Vec::new(),
        underlay_links: BTreeSet::new(),
        pod_kinds: BTreeSet::new(),
        holes: BTreeSet::new(),
        underlay_mtu: 1500,
        encrypts: true,
        interface: "sennit0".parse().unwrap(),
        listen_port: 51820,
        keepalive: Some(25),
        vxlan: None,
        routing: crate::local::Routing::default(),
    }
}

fn grants() -> Grants {
    let site = |name: &str, nets: &[&str]| {
        (name.parse().unwrap(), nets.iter().map(|n| n.parse().unwrap()).collect())
    };
    Grants {
        mesh: "test".parse().unwrap(),
        sites: [site("aws", &["10.1.0.0/16", "fd01::/48"]), site("gcp", &["10.2.0.0/16", "172.16.0.0/12"])]
            .into(),
        protected: ["10.2.99.1".parse().unwrap()].into(),
        exemptions: Vec::new(),
    }
}

fn claim(key_of: u8) -> Advertisement {
    Advertisement {
        public_key: key(key_of),
        epoch: 100,
        site: "gcp".parse().unwrap(),
        endpoints: vec![format!("192.0.2.{key_of}:51820").parse().unwrap()],
        internal_endpoints: Vec::new(),
        mtu: None,
        reflexive_endpoints: Vec::new(),
        paths: Default::default(),
        encrypts: true,
    }
}

fn record(name: &str, claim: &Advertisement, cidrs: &[&str]) -> NodeRecord {
    NodeRecord {
        name: name.parse().unwrap(),
        site_label: None,
        pod_cidrs: cidrs.iter().map(|c| (*c).to_owned()).collect(),
        annotations: claim.to_annotations(),
    }
}

fn judge(records: &[NodeRecord], memory: &Memory) -> Admission {
    admit(&local(), &grants(), records, memory)
}

fn why(admission: &Admission, node: &str) -> String {
    let all = admission.refused.get(&node.parse().unwrap()).map(Vec::as_slice).unwrap_or_default();
    all.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn prefixes(admission: &Admission, node: &str) -> Vec<String> {
    let peer = admission.peers.get(&node.parse().unwrap());
    peer.map(|p| p.prefixes.iter().map(ToString::to_string).collect()).unwrap_or_default()
}

fn remembered(records: &[NodeRecord]) -> Memory {
    judge(records, &Memory::default()).memory()
}

#[test]
fn an_honest_node_becomes_a_peer_with_what_it_was_granted() {
    let admission = judge(&[record("a", &claim(2), &["10.2.1.0/24"])], &Memory::default());
    assert_eq!(prefixes(&admission, "a"), ["10.2.1.0/24"]);
    assert!(admission.refused.is_empty());
}

#[test]
fn a_malformed_claim_keeps_the_last_good_one_and_hurts_nobody_else() {
    let good = [record("a", &claim(2), &["10.2.1.0/24"]), record("b", &claim(3), &["10.2.2.0/24"])];
    let memory = remembered(&good);
    let mut bad = good.clone();
    bad[0].annotations.insert("sennit.dev/public-key".to_owned(), "garbage".to_owned());
    let admission = judge(&bad, &memory);
    assert_eq!(admission.memory(), memory);
    assert!(why(&admission, "a").contains("sennit.dev/public-key"));
    assert_eq!(why(&admission, "b"), "");
    let fresh = judge(&bad, &Memory::default());
    assert!(!fresh.peers.contains_key(&"a".parse().unwrap()), "without a last good claim there is no peer");
}

#[test]
fn a_replayed_old_claim_does_not_bring_the_old_key_back() {
    let newer = Advertisement { epoch: 200, ..claim(3) };
    let memory = remembered(&[record("a", &newer, &[])]);
    let admission = judge(&[record("a", &claim(2), &[])], &memory);
    assert_eq!(admission.peers.values().next().unwrap().claim.public_key, key(3));
    assert!(why(&admission, "a").contains("went back from 200 to 100"));
    let same_epoch = judge(&[record("a", &Advertisement { epoch: 200, ..claim(2) }, &[])], &memory);
    assert_eq!(same_epoch.peers.values().next().unwrap().claim.public_key, key(3));
    assert!(why(&same_epoch, "a").contains("needs a later epoch"));
}

#[test]
fn the_same_key_with_an_earlier_generation_is_no_replay() {
    let later = Advertisement { epoch: 200, ..claim(3) };
    let memory = remembered(&[record("a", &later, &[])]);
    let moved =
        Advertisement { epoch: 50, endpoints: vec!["192.0.2.77:1".parse().unwrap()], ..later.clone() };
    let admission = judge(&[record("a", &moved, &[])], &memory);
    assert_eq!(why(&admission, "a"), "");
    let peer = admission.peers.values().next().unwrap();
    assert_eq!((&peer.claim.endpoints, peer.claim.epoch), (&moved.endpoints, 200));
    // And it opens no way back for the key of before.
    let replayed = judge(&[record("a", &Advertisement { epoch: 100, ..claim(2) }, &[])], &admission.memory());
    assert_eq!(replayed.peers.values().next().unwrap().claim.public_key, key(3));
}

#[test]
fn no_generation_is_so_late_that_none_can_follow() {
    let mut last = record("a", &claim(2), &[]);
    last.annotations.insert("sennit.dev/epoch".to_owned(), u64::MAX.to_string());
    assert!(why(&judge(&[last], &Memory::default()), "a").contains("sennit.dev/epoch"));
}

#[test]
fn copying_a_key_takes_nothing_from_the_node_that_held_it_first() {
    let victim = record("victim", &claim(2), &["10.2.1.0/24"]);
    let memory = remembered(std::slice::from_ref(&victim));
    for thief in ["a-thief", "z-thief"] {
        let admission = judge(&[victim.clone(), record(thief, &claim(2), &["10.2.2.0/24"])], &memory);
        assert_eq!(admission.memory(), memory);
        assert!(why(&admission, thief).contains("belongs to node victim"), "{}", why(&admission, thief));
        assert_eq!(why(&admission, "victim"), "");
    }
}

#[test]
fn a_key_that_nobody_held_before_goes_to_none_of_its_claimants() {
    let both = [record("a", &claim(2), &[]), record("b", &claim(2), &[]), record("c", &claim(3), &[])];
    let admission = judge(&both, &Memory::default());
    assert_eq!(admission.peers.keys().map(NodeName::as_str).collect::<Vec<_>>(), ["c"]);
    assert!(why(&admission, "a").contains("a, b"));
}

#[test]
fn a_node_that_claims_our_own_key_is_refused() {
    let admission = judge(&[record("a", &claim(1), &[])], &Memory::default());
    assert!(admission.peers.is_empty());
    assert!(why(&admission, "a").contains("belongs to node me"));
}

#[test]
fn prefixes_that_nobody_may_hold_are_refused_one_by_one() {
    for (cidr, reason) in [
        ("0.0.0.0/0", "wider"),
        ("::/0", "wider"),
        ("10.2.99.0/24", "protected address 10.2.99.1"),
        ("10.3.0.0/24", "outside of what site gcp"),
        ("10.1.1.0/24", "of node me"),
        ("10.1.1.128/25", "of node me"),
        ("10.1.0.0/16", "of node me"),
        ("127.0.0.0/24", "loopback"),
        ("10.2.0.0/33", "no prefix"),
        ("x".repeat(5000).as_str(), "no prefix"),
    ] {
        let admission = judge(&[record("a", &claim(2), &[cidr, "10.2.1.0/24"])], &Memory::default());
        assert!(why(&admission, "a").contains(reason), "{cidr:.60}: {}", why(&admission, "a"));
        assert_eq!(prefixes(&admission, "a"), ["10.2.1.0/24"], "the honest prefix stays");
    }
    let ours = grants().mesh_prefix().to_string();
    let admission = judge(&[record("a", &claim(2), &[&ours])], &Memory::default());
    assert!(why(&admission, "a").contains("mesh addresses"));
}

#[test]
fn claiming_anothers_prefix_takes_nothing_from_its_holder() {
    let victim = record("victim", &claim(2), &["10.2.1.0/24"]);
    let memory = remembered(std::slice::from_ref(&victim));
    for cidr in ["10.2.1.0/24", "10.2.0.0/20", "10.2.1.8/32"] {
        let admission = judge(&[victim.clone(), record("a", &claim(3), &[cidr])], &memory);
        assert_eq!(prefixes(&admission, "victim"), ["10.2.1.0/24"]);
        assert_eq!(prefixes(&admission, "a"), [""; 0]);
        assert!(why(&admission, "a").contains("of node victim"), "{}", why(&admission, "a"));
    }
    let fresh = judge(&[victim, record("a", &claim(3), &["10.2.1.0/25"])], &Memory::default());
    assert_eq!(
        (prefixes(&fresh, "a").len(), prefixes(&fresh, "victim").len()),
        (0, 0),
        "nobody held it first"
    );
}

#[test]
fn an_endpoint_inside_of_the_mesh_is_dropped_and_named() {
    let mesh = address::node_address(&grants().mesh, &"gcp".parse().unwrap(), &"a".parse().unwrap());
    for inside in [format!("[{mesh}]:51820"), "10.2.1.1:51820".to_owned(), "10.1.200.1:51820".to_owned()] {
        let mut bad = claim(2);
        bad.endpoints.push(inside.parse().unwrap());
        let admission = judge(&[record("a", &bad, &["10.2.1.0/24"])], &Memory::default());
        assert!(why(&admission, "a").contains("cannot run through itself"), "{inside}");
        assert_eq!(admission.peers.values().next().unwrap().claim.endpoints, claim(2).endpoints);
    }
    let mut us = claim(2);
    us.endpoints = vec!["172.16.0.1:51820".parse().unwrap()];
    let mut wide = grants();
    wide.sites.insert("gcp".parse().unwrap(), vec!["10.2.0.0/16".parse().unwrap()]);
    let admission = admit(&local(), &wide, &[record("a", &us, &[])], &Memory::default());
    assert!(why(&admission, "a").contains("this node itself"), "{}", why(&admission, "a"));
}

#[test]
fn the_operators_site_label_overrules_the_claim() {
    let mut labelled = record("a", &claim(2), &["10.2.1.0/24"]);
    labelled.site_label = Some("aws".parse().unwrap());
    let admission = judge(&[labelled], &Memory::default());
    assert!(admission.peers.is_empty());
    assert!(why(&admission, "a").contains("the operator says aws"));
}

#[test]
fn a_node_that_withdraws_its_claim_is_no_peer_any_more() {
    let memory = remembered(&[record("a", &claim(2), &[])]);
    let mut silent = record("a", &claim(2), &[]);
    silent.annotations.clear();
    let admission = judge(&[silent], &memory);
    assert!(admission.peers.is_empty() && admission.refused.is_empty());
    assert_eq!(admission.unpublished.len(), 1);
    // Its key stays its own: nobody takes it over while it is silent.
    let mut silent = record("a", &claim(2), &[]);
    silent.annotations.clear();
    let taken = judge(&[silent, record("thief", &claim(2), &[])], &admission.memory());
    assert!(taken.peers.is_empty() || why(&taken, "thief").contains("belongs"), "{taken:?}");
}

#[test]
fn prefixes_of_nodes_without_a_key_or_in_dispute_are_reserved_all_the_same() {
    let mut keyless = record("keyless", &claim(2), &["10.2.1.0/24"]);
    keyless.annotations.clear();
    let both = [keyless, record("a", &claim(3), &["10.2.2.0/24"]), record("b", &claim(4), &["10.2.2.0/25"])];
    let admission = judge(&both, &Memory::default());
    let reserved: Vec<String> = admission.reserved.keys().map(ToString::to_string).collect();
    assert_eq!(reserved, ["10.2.1.0/24", "10.2.2.0/24", "10.2.2.0/25"]);
}

#[test]
fn a_node_that_the_operator_moves_to_another_site_does_not_keep_the_old_one() {
    let memory = remembered(&[record("a", &claim(2), &["10.2.1.0/24"])]);
    let mut moved = record("a", &claim(2), &["10.2.1.0/24"]);
    moved.site_label = Some("aws".parse().unwrap());
    assert!(judge(&[moved], &memory).peers.is_empty());
}

#[test]
fn what_the_operator_takes_back_stays_guarded_as_long_as_the_node_has_it() {
    let net = |text: &str| text.parse::<IpNet>().unwrap();
    // With bits behind the length, as a manifest may have it.
    let holder = record("a", &claim(2), &["10.2.1.5/24"]);
    let mut grants = grants();
    let memory = admit(&local(), &grants, std::slice::from_ref(&holder), &Memory::default()).memory();
    grants.sites.get_mut(&"gcp".parse().unwrap()).unwrap().clear();
    let mut admission = admit(&local(), &grants, std::slice::from_ref(&holder), &memory);
    for _ in 0..2 {
        assert_eq!(prefixes(&admission, "a"), [""; 0]);
        assert!(admission.reserved.contains_key(&net("10.2.1.0/24")), "{:?}", admission.reserved);
        admission = admit(&local(), &grants, std::slice::from_ref(&holder), &admission.memory());
    }
    let memory = admission.memory();
    assert!(Admission::remembered(&memory).reserved.contains_key(&net("10.2.1.0/24")));

    // It is still the one who held it first, when it is given back.
    let thief = record("b", &claim(3), &["10.2.1.0/24"]);
    let back = judge(&[holder.clone(), thief.clone()], &memory);
    assert_eq!((prefixes(&back, "a").len(), prefixes(&back, "b").len()), (1, 0), "{}", why(&back, "b"));

    // What lies in another's, who holds it rightly, is that one's.
    grants.sites.insert("azure".parse().unwrap(), vec![net("10.2.0.0/20")]);
    let wide = record("c", &Advertisement { site: "azure".parse().unwrap(), ..claim(4) }, &["10.2.0.0/20"]);
    let both = admit(&local(), &grants, &[holder.clone(), wide], &memory);
    assert_eq!(prefixes(&both, "c"), ["10.2.0.0/20"]);
    assert!(!both.reserved.contains_key(&net("10.2.1.0/24")), "a blackhole of it would take that from c");

    // Nobody dials into it, and when the cluster does not grant it any more it is forgotten.
    let inside = Advertisement { endpoints: vec!["10.2.1.77:51820".parse().unwrap()], ..claim(5) };
    let dialled = admit(&local(), &grants, &[holder, record("d", &inside, &[])], &memory);
    assert!(why(&dialled, "d").contains("lies inside of the mesh prefix"), "{}", why(&dialled, "d"));
    let gone = admit(&local(), &grants, &[record("a", &claim(2), &[])], &memory);
    assert!(gone.reserved.is_empty() && gone.memory().0.values().all(|peer| peer.withheld.is_empty()));
}

fn any_record() -> impl Strategy<Value = NodeRecord> {
    let cidr = prop_oneof![
        (0u8..4, 20u8..=32).prop_map(|(b, l)| format!("10.2.{b}.0/{l}")),
        Just("10.1.1.0/24".to_owned()),
        Just("0.0.0.0/0".to_owned()),
        "\\PC{0,12}",
    ];
    (0u8..12, 1u8..6, 95u64..105, prop::collection::vec(cidr, 0..3)).prop_map(|(n, k, epoch, cidrs)| {
        let mut record = record(&format!("n{n}"), &Advertisement { epoch, ..claim(k) }, &[]);
        record.pod_cidrs = cidrs;
        record
    })
}

proptest! {
    #[test]
    fn whatever_is_claimed_no_two_peers_share_a_key_or_an_address(
        mut records in prop::collection::vec(any_record(), 0..12),
        before in prop::collection::vec(any_record(), 0..6),
    ) {
        records.sort_by(|a, b| a.name.cmp(&b.name));
        records.dedup_by(|a, b| a.name == b.name);
        let memory = remembered(&before);
        let admission = judge(&records, &memory);
        let keys: BTreeSet<_> = admission.peers.values().map(|p| p.claim.public_key).collect();
        prop_assert_eq!(keys.len(), admission.peers.len());
        let held: Vec<_> =
            admission.peers.values().flat_map(|p| p.prefixes.iter().map(move |n| (n, &p.name))).collect();
        for (i, (a, x)) in held.iter().enumerate() {
            for (b, y) in &held[i + 1..] {
                prop_assert!(x == y || !prefix::overlap(a, b), "{x} {a} and {y} {b}");
            }
        }
        let mut shuffled = records.clone();
        shuffled.reverse();
        prop_assert_eq!(&judge(&shuffled, &memory), &admission);
        // Whatever the others say, a second pass over the same input changes nothing.
        prop_assert_eq!(judge(&records, &admission.memory()).peers, admission.peers);
    }
}

#[test]
fn observed_addresses_refuse_no_prefix() {
    // 172.16.0.1 is an address of the underlay: whoever runs that network could choose it.
    let grants = Grants { sites: BTreeMap::new(), ..grants() };
    let node = record("a", &claim(2), &["172.16.0.0/24"]);
    let admission = admit(&local(), &grants, std::slice::from_ref(&node), &Memory::default());
    assert_eq!(prefixes(&admission, "a"), ["172.16.0.0/24"]);
    assert!(admission.reserved.contains_key(&"172.16.0.0/24".parse().unwrap()));
}

#[test]
fn prefixes_beyond_the_limit_stay_guarded() {
    let many: Vec<String> = (0..40).map(|n| format!("10.2.{n}.0/24")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let admission = judge(&[record("a", &claim(2), &many)], &Memory::default());
    assert!(why(&admission, "a").contains("40 entries"));
    assert_eq!((prefixes(&admission, "a").len(), admission.reserved.len()), (0, 40));
}

#[test]
fn around_a_protected_address_all_stays_guarded() {
    let admission = judge(&[record("a", &claim(2), &["10.2.99.0/24"])], &Memory::default());
    assert_eq!(prefixes(&admission, "a"), [""; 0]);
    assert!(admission.reserved.contains_key(&"10.2.99.0/24".parse().unwrap()));
}
