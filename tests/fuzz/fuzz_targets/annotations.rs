//! Arbitrary annotations of two nodes: no panic, what is read is written back as the same claim, and whatever the two claim,
//! they share neither key nor prefix.
#![no_main]

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use libfuzzer_sys::fuzz_target;
use mesh_overlay::local::Routing;
use mesh_overlay::{Advertisement, Grants, LocalNode, Memory, NodeRecord, admit};

/// `key=value` lines; a line `/` begins the second node, a line without `=` is a prefix in `spec.podCIDRs`.
fn node(name: &str, text: &str) -> NodeRecord {
    let mut annotations = BTreeMap::new();
    let mut pod_cidrs = Vec::new();
    for line in text.lines() {
        match line.split_once('=') {
            Some((key, value)) => {
                annotations.insert(format!("sennit.dev/{key}"), value.to_owned());
            }
            None => pod_cidrs.push(line.to_owned()),
        }
    }
    NodeRecord { name: name.parse().expect("a name"), site_label: None, pod_cidrs, annotations }
}

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    let (first, second) = text.split_once("\n/\n").unwrap_or((&text, ""));
    let records = [node("a", first), node("b", second)];
    for record in &records {
        if let Ok(Some(claim)) = Advertisement::parse(&record.annotations) {
            assert_eq!(Advertisement::parse(&claim.to_annotations()), Ok(Some(claim)));
        }
    }
    let local = LocalNode {
        name: "me".parse().expect("a name"),
        site: "aws".parse().expect("a site"),
        public_key: "mfPXkW7SGHJuSxrZQOYUOtXjRBpMQ7GnWzgPa9b0sxY=".parse().expect("a key"),
        prefixes: vec!["10.1.0.0/24".parse().expect("a prefix")],
        underlay_addresses: BTreeSet::from(["192.0.2.1".parse().expect("an address")]),
        former: Vec::new(),
        underlay_links: BTreeSet::new(),
        pod_kinds: BTreeSet::new(),
        holes: BTreeSet::new(),
        underlay_mtu: 1500,
        encrypts: true,
        interface: "sennit0".parse().expect("an interface"),
        listen_port: 51820,
        keepalive: None,
        vxlan: None,
        routing: Routing::default(),
    };
    let grants = Grants {
        mesh: "fuzz".parse().expect("a mesh"),
        sites: BTreeMap::new(),
        protected: BTreeSet::new(),
        exemptions: Vec::new(),
    };
    let admission = admit(&local, &grants, &records, &Memory::default());
    let held: Vec<&IpNet> = admission.peers.values().flat_map(|p| &p.prefixes).collect();
    for net in &held {
        assert!(net.prefix_len() >= 8, "{net}");
        assert!(!net.contains(&local.prefixes[0]) && !local.prefixes[0].contains(*net), "{net}");
    }
    if let (Some(a), Some(b)) = (admission.peers.get(&records[0].name), admission.peers.get(&records[1].name))
    {
        assert_ne!(a.claim.public_key, b.claim.public_key);
        assert!(a.prefixes.iter().all(|x| b.prefixes.iter().all(|y| !x.contains(y) && !y.contains(x))));
    }
    let again = admit(&local, &grants, &records, &admission.memory());
    assert_eq!(again.peers, admission.peers);
});
