use super::*;
use crate::advertisement::Advertisement;
use crate::local::Routing;
use mesh_keyring::PrivateKey;

fn peer(n: u8, site: &str, prefix: &str, endpoint: Option<&str>) -> (NodeName, Peer) {
    let name: NodeName = format!("{site}-{n}").parse().unwrap();
    let site: SiteName = site.parse().unwrap();
    let mesh = "test".parse().unwrap();
    let peer = Peer {
        withheld: Vec::new(),
        address: crate::address::node_address(&mesh, &site, &name),
        name: name.clone(),
        prefixes: vec![prefix.parse().unwrap()],
        claim: Advertisement {
            public_key: PrivateKey::from_bytes(&[n; 32]).unwrap().public(),
            epoch: 1,
            site,
            endpoints: endpoint.iter().map(|e| e.parse().unwrap()).collect(),
            internal_endpoints: vec![format!("192.168.0.{n}:51820").parse().unwrap()],
            mtu: Some(1400),
            reflexive_endpoints: Vec::new(),
            paths: Default::default(),
            encrypts: true,
        },
    };
    (name, peer)
}

fn local() -> LocalNode {
    LocalNode {
        name: "aws-1".parse().unwrap(),
        site: "aws".parse().unwrap(),
        public_key: PrivateKey::from_bytes(&[1; 32]).unwrap().public(),
        prefixes: vec!["10.1.1.0/24".parse().unwrap(), "fd01:0:0:1::/64".parse().unwrap()],
        former: Vec::new(),
        underlay_addresses: BTreeSet::new(),
        underlay_links: BTreeSet::new(),
        pod_kinds: BTreeSet::new(),
        holes: BTreeSet::new(),
        underlay_mtu: 1500,
        encrypts: true,
        interface: "sennit0".parse().unwrap(),
        listen_port: 51820,
        keepalive: Some(25),
        vxlan: None,
        routing: Routing::default(),
    }
}

fn grants() -> Grants {
    Grants {
        mesh: "test".parse().unwrap(),
        sites: BTreeMap::from([
            ("aws".parse().unwrap(), vec!["10.1.0.0/16".parse().unwrap(), "fd01::/48".parse().unwrap()]),
            ("gcp".parse().unwrap(), vec!["10.2.0.0/16".parse().unwrap()]),
        ]),
        protected: BTreeSet::new(),
        exemptions: Vec::new(),
    }
}

fn plan() -> MeshPlan {
    let peers = BTreeMap::from([
        peer(2, "aws", "10.1.2.0/24", None),
        peer(3, "gcp", "10.2.3.0/24", Some("203.0.113.3:51820")),
        peer(4, "gcp", "10.2.4.0/24", Some("gw.example:51820")),
    ]);
    let resolved = Resolution::from([("gw.example".to_owned(), vec!["203.0.113.4".parse().unwrap()])]);
    MeshPlan::compute(&local(), &grants(), &peers, &BTreeSet::new(), &resolved, &Paths::new())
}

#[test]
fn private_endpoints_are_dialled_inside_a_site_only() {
    let plan = plan();
    let dialled = |name: &str| {
        let found = &plan.peers[&name.parse::<NodeName>().unwrap()].candidates;
        found.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(dialled("aws-2"), ["192.168.0.2:51820"]);
    assert_eq!(dialled("gcp-3"), ["203.0.113.3:51820"]);
    assert_eq!(dialled("gcp-4"), ["203.0.113.4:51820"]);
}

#[test]
fn a_name_that_does_not_resolve_leaves_the_peer_in_place_without_an_endpoint() {
    let peers = BTreeMap::from([peer(4, "gcp", "10.2.4.0/24", Some("nowhere.example:1"))]);
    let plan =
        MeshPlan::compute(&local(), &grants(), &peers, &BTreeSet::new(), &Resolution::new(), &Paths::new());
    assert!(plan.peers.values().all(|p| p.candidates.is_empty()));
    assert_eq!(plan.device.peers.len(), 1);
}

#[test]
fn a_name_that_resolves_into_the_mesh_or_to_ourselves_is_not_dialled() {
    let peers = BTreeMap::from([peer(4, "gcp", "10.2.4.0/24", Some("gw.example:51820"))]);
    let mesh = grants().mesh_prefix().addr().to_string();
    let mut us = local();
    us.underlay_addresses = ["198.51.100.1".parse().unwrap()].into();
    for inside in ["10.2.9.9", "10.1.1.5", "198.51.100.1", &mesh] {
        let resolved = Resolution::from([("gw.example".to_owned(), vec![inside.parse().unwrap()])]);
        let plan = MeshPlan::compute(&us, &grants(), &peers, &BTreeSet::new(), &resolved, &Paths::new());
        assert!(plan.peers.values().all(|p| p.candidates.is_empty()), "{inside}");
    }
}

#[test]
fn addresses_of_a_family_that_the_underlay_does_not_speak_are_not_dialled() {
    let (name, mut dual) = peer(4, "gcp", "10.2.4.0/24", Some("203.0.113.4:51820"));
    dual.claim.endpoints.push("[2001:db8::4]:51820".parse().unwrap());
    let peers = BTreeMap::from([(name, dual)]);
    for (own, wanted) in [("198.51.100.1", "203.0.113.4:51820"), ("2001:db8::1", "[2001:db8::4]:51820")] {
        let mut us = local();
        us.underlay_addresses = [own.parse().unwrap()].into();
        let plan =
            MeshPlan::compute(&us, &grants(), &peers, &BTreeSet::new(), &Resolution::new(), &Paths::new());
        let dialled: Vec<String> =
            plan.peers.values().flat_map(|p| p.candidates.iter().map(ToString::to_string)).collect();
        assert_eq!(dialled, [wanted]);
    }
}

#[test]
fn prefixes_of_nodes_that_are_no_peers_are_guarded_and_lead_nowhere() {
    let without_sites = Grants { sites: BTreeMap::new(), ..grants() };
    let reserved = BTreeSet::from(["10.9.0.0/24".parse().unwrap()]);
    let plan = MeshPlan::compute(
        &local(),
        &without_sites,
        &BTreeMap::new(),
        &reserved,
        &Resolution::new(),
        &Paths::new(),
    );
    let net: IpNet = "10.9.0.0/24".parse().unwrap();
    assert!(plan.guard.mesh.iter().any(|wide| wide.contains(&net)));
    assert!(plan.routes.routes.contains(&Route::new(net, RouteKind::Blackhole)));
    assert!(plan.device.peers.is_empty());
}

#[test]
fn a_protected_address_inside_of_a_grant_is_left_to_the_main_table() {
    let protecting =
        Grants { protected: ["10.2.99.1".parse().unwrap(), "192.0.2.1".parse().unwrap()].into(), ..grants() };
    let plan = MeshPlan::compute(
        &local(),
        &protecting,
        &BTreeMap::new(),
        &BTreeSet::new(),
        &Resolution::new(),
        &Paths::new(),
    );
    let net: IpNet = "10.2.99.1/32".parse().unwrap();
    assert_eq!(plan.guard.outside, BTreeSet::from([net]));
    assert!(plan.routes.routes.contains(&Route::new(net, RouteKind::Throw)));
}

#[test]
fn every_mesh_prefix_is_guarded_and_black_holed_in_both_families() {
    let plan = plan();
    for peer in plan.peers.values() {
        for net in &peer.allowed_ips {
            assert!(plan.guard.mesh.iter().any(|wide| wide.contains(net)), "{net} is not guarded");
            assert!(plan.routes.routes.contains(&Route::new(*net, RouteKind::Blackhole)), "{net}");
            assert!(plan.routes.routes.contains(&Route::new(*net, RouteKind::Mesh { mtu: 1312 })), "{net}");
        }
    }
    for grant in ["10.1.0.0/16", "10.2.0.0/16", "fd01::/48"] {
        assert!(
            plan.routes.routes.contains(&Route::new(grant.parse().unwrap(), RouteKind::Blackhole)),
            "{grant}"
        );
    }
}

#[test]
fn a_guard_stands_for_the_granted_sites_before_any_peer_is_known() {
    let plan = MeshPlan::compute(
        &local(),
        &grants(),
        &BTreeMap::new(),
        &BTreeSet::new(),
        &Resolution::new(),
        &Paths::new(),
    );
    let guarded = |text: &str| plan.guard.mesh.iter().any(|n| n.contains(&text.parse::<IpNet>().unwrap()));
    assert!(guarded("10.2.0.0/16") && guarded("10.1.0.0/16") && guarded("fd01::/48"));
}

#[test]
fn our_own_pods_are_neither_black_holed_nor_guarded() {
    let plan = plan();
    for own in &local().prefixes {
        assert!(plan.routes.routes.contains(&Route::new(*own, RouteKind::Throw)), "{own}");
        assert!(plan.guard.local.iter().any(|n| n.contains(own)), "{own}");
    }
}

#[test]
fn node_addresses_are_single_addresses_of_both_families() {
    let texts: Vec<String> = plan().addresses.iter().map(ToString::to_string).collect();
    assert_eq!(texts[0], "10.1.1.0/32");
    assert!(texts[1].starts_with("fd") && texts[1].ends_with("/128"), "{texts:?}");
}

#[test]
fn the_forms_for_other_tools_name_every_peer_and_no_secret() {
    let plan = plan();
    let (wg, routes, dot) = (plan.to_wg(), plan.to_routes(), plan.to_dot());
    assert!(!wg.contains("PrivateKey"));
    for (name, peer) in &plan.peers {
        assert!(wg.contains(&peer.public_key.to_string()) && dot.contains(name.as_str()));
        assert!(peer.allowed_ips.iter().all(|net| routes.contains(&net.to_string())));
    }
    assert!(serde_json::to_string(&plan).unwrap().contains("allowedIps"));
}

/// aws-1 and a gcp-3 that cannot do WireGuard, with this exemption, if any.
fn with_a_peer_in_clear(exempt: Option<&str>, us_too: bool) -> MeshPlan {
    let (name, mut unable) = peer(3, "gcp", "10.2.3.0/24", Some("203.0.113.3:51820"));
    unable.claim.encrypts = false;
    let peers = BTreeMap::from([(name, unable), peer(4, "gcp", "10.2.4.0/24", Some("203.0.113.4:51820"))]);
    let vxlan = Some(crate::local::Vxlan { interface: "sennitx".parse().unwrap(), vni: 5182, port: 4789 });
    let underlay_addresses = BTreeSet::from(["198.51.100.1".parse().unwrap()]);
    let local = LocalNode { vxlan, encrypts: !us_too, underlay_addresses, ..local() };
    let exemptions = exempt.map(|between| {
        serde_json::from_str(&format!(
            r#"{{"between": [{between}], "reason": "no TUN", "expires": "2027-01-31T00:00:00Z"}}"#
        ))
        .unwrap()
    });
    let grants = Grants { exemptions: exemptions.into_iter().collect(), ..grants() };
    MeshPlan::compute(&local, &grants, &peers, &BTreeSet::new(), &Resolution::new(), &Paths::new())
}

fn routes_to(plan: &MeshPlan, net: &str) -> Vec<RouteKind> {
    let net: IpNet = net.parse().unwrap();
    plan.routes.routes.iter().filter(|route| route.to == net).map(|route| route.kind).collect()
}

#[test]
fn a_peer_that_cannot_encrypt_is_reached_nowhere_without_an_exemption() {
    for exempt in [None, Some(r#"{"node": "gcp-4"}"#), Some(r#"{"site": "gcp"}, {"site": "azure"}"#)] {
        let plan = with_a_peer_in_clear(exempt, false);
        let peer = &plan.peers[&"gcp-3".parse::<NodeName>().unwrap()];
        assert!(
            !peer.encrypted && peer.exemption.is_none() && peer.paths.candidates.is_empty(),
            "{exempt:?}"
        );
        assert!(!plan.device.peers.contains_key(&peer.public_key));
        assert_eq!(routes_to(&plan, "10.2.3.0/24"), [RouteKind::Blackhole]);
        // Those of others who speak WireGuard, and nobody in clear.
        assert!(plan.vxlan.iter().all(|device| device.vni == 5182 && device.neighbours.len() == 1));
        let clear = plan.guard.cleartext.unwrap();
        assert!(clear.exempt.is_empty() && clear.interfaces.is_empty());
    }
}

#[test]
fn an_exemption_opens_one_way_in_clear_to_one_peer_until_its_end() {
    for exempt in [r#"{"node": "gcp-3"}"#, r#"{"site": "gcp"}"#, r#"{"site": "gcp"}, {"node": "aws-1"}"#] {
        let plan = with_a_peer_in_clear(Some(exempt), false);
        let peer = &plan.peers[&"gcp-3".parse::<NodeName>().unwrap()];
        assert!(!peer.encrypted && peer.exemption.is_some() && peer.path == Rung::Cleartext);
        assert!(
            peer.paths
                .candidates
                .iter()
                .all(|one| one.rung == Rung::Cleartext && one.origin == Origin::Carrier)
        );
        assert!(!plan.device.peers.contains_key(&peer.public_key));
        let [RouteKind::Cleartext { device, via, source, mtu }, RouteKind::Blackhole] =
            routes_to(&plan, "10.2.3.0/24")[..]
        else {
            panic!("{:?}", plan.routes);
        };
        assert_eq!((device.as_str(), source, mtu), ("sennitxc4", Some("10.1.1.0".parse().unwrap()), 1350));
        let clear = plan.guard.cleartext.unwrap();
        let until = 1_801_353_600;
        assert_eq!(clear.exempt.keys().copied().collect::<Vec<_>>(), [until]);
        assert!(clear.exempt[&until].prefixes.contains(&"10.2.3.0/24".parse().unwrap()));
        assert!(!clear.exempt[&until].prefixes.contains(&"10.2.4.0/24".parse().unwrap()));
        assert_eq!(clear.exempt[&until].remotes, ["203.0.113.3/32".parse().unwrap()].into());
        // Who can encrypt does, whatever is exempt.
        let other = &plan.peers[&"gcp-4".parse::<NodeName>().unwrap()];
        assert!(
            other.encrypted && other.exemption.is_none() && plan.device.peers.contains_key(&other.public_key)
        );
        let on = |vni: u32| plan.vxlan.iter().find(|device| device.vni == vni).unwrap();
        assert!(on(5183).neighbours.contains_key(&via) && on(5183).neighbours.len() == 1);
        assert!(!on(5182).neighbours.contains_key(&via) && on(5182).neighbours.len() == 1);
    }
}

#[test]
fn packets_in_clear_take_the_way_that_answers() {
    let (name, mut unable) = peer(3, "gcp", "10.2.3.0/24", Some("203.0.113.3:51820"));
    unable.claim.encrypts = false;
    unable.claim.endpoints.push("[2001:db8::3]:51820".parse().unwrap());
    let key = unable.claim.public_key;
    let peers = BTreeMap::from([(name, unable)]);
    let vxlan = Some(crate::local::Vxlan { interface: "sennitx".parse().unwrap(), vni: 5182, port: 4789 });
    let exemption =
        r#"{"between": [{"node": "gcp-3"}], "reason": "no TUN", "expires": "2027-01-31T00:00:00Z"}"#;
    let grants = Grants { exemptions: vec![serde_json::from_str(exemption).unwrap()], ..grants() };
    let through = |outer_v6: Option<bool>| {
        let site: SiteName = "gcp".parse().unwrap();
        let address = |outer_v6| {
            let node: NodeName = "gcp-3".parse().unwrap();
            address::carrier_address(&grants.mesh, &site, &node, Carried::Cleartext, outer_v6)
        };
        let paths = outer_v6.map(|outer_v6| {
            let at = SocketAddr::new(address(outer_v6).into(), 51820);
            let choice = PathChoice {
                rung: Rung::Cleartext,
                address: Some(at),
                mtu: None,
                probed: [at].into(),
                seen_as: None,
            };
            (key, choice)
        });
        let local = LocalNode { vxlan: vxlan.clone(), ..local() };
        let plan = MeshPlan::compute(
            &local,
            &grants,
            &peers,
            &BTreeSet::new(),
            &Resolution::new(),
            &paths.into_iter().collect(),
        );
        match routes_to(&plan, "10.2.3.0/24")[..] {
            [RouteKind::Cleartext { device, .. }, _] => device.as_str().to_owned(),
            ref other => panic!("{other:?}"),
        }
    };
    assert_eq!([None, Some(false), Some(true)].map(through), ["sennitxc4", "sennitxc4", "sennitxc6"]);
}

#[test]
fn a_node_that_cannot_encrypt_has_no_device_and_reaches_whom_it_is_exempt_with() {
    let plan = with_a_peer_in_clear(Some(r#"{"node": "aws-1"}, {"node": "gcp-4"}"#), true);
    assert!(!plan.encrypts && plan.device.peers.is_empty() && plan.guard.interfaces.is_empty());
    assert!(plan.guard.carriers.is_none());
    let [device] = &plan.vxlan[..] else { panic!("{:?}", plan.vxlan) };
    // It has no other place for its own addresses.
    assert!(device.vni == 5183 && plan.addresses.is_subset(&device.addresses));
    assert!(routes_to(&plan, "10.2.4.0/24").iter().any(RouteKind::carries));
    assert_eq!(routes_to(&plan, "10.2.3.0/24"), [RouteKind::Blackhole]);
    let without = with_a_peer_in_clear(None, true);
    assert!(without.vxlan.is_empty() && without.routes.routes.iter().all(|route| !route.kind.carries()));
}

#[test]
fn a_peer_is_looked_for_at_few_addresses() {
    let many = |first: u8| -> Vec<Endpoint> {
        (0..8).map(|n| format!("203.0.{first}.{n}:51820").parse().unwrap()).collect()
    };
    for (site, most) in
        [("gcp", path::CANDIDATES_MOST + path::REFLEXIVE_MOST), ("aws", path::CANDIDATES_MOST)]
    {
        let (_, mut peer) = peer(2, site, "10.2.2.0/24", None);
        peer.claim.endpoints = many(1);
        peer.claim.internal_endpoints = many(2);
        peer.claim.reflexive_endpoints = many(3);
        // Names have no count of their own: each may resolve to hundreds.
        peer.claim.endpoints[1] = "many.example.com:51820".parse().unwrap();
        let ips = (0..=255).map(|n| IpAddr::from([203, 0, 4, n])).collect();
        let resolved = Resolution::from([("many.example.com".to_owned(), ips)]);
        let candidates = path::candidates(&local(), &peer, &resolved);
        assert_eq!(candidates.len(), path::CANDIDATES_MOST);
        let paths = probed(&local(), &grants(), &peer, &candidates, true);
        assert_eq!(paths.candidates.len(), most, "{site}");
    }
}
