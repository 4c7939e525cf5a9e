use super::*;
use crate::settings::Settings;
use mesh_keyring::PrivateKey;

fn key(n: u8) -> PublicKey {
    PrivateKey::from_bytes(&[n; 32]).unwrap().public()
}

fn config(extra: &str) -> Config {
    let text = format!(
        "node: me\nsite: aws\nmesh: test\nregistry: {{file: {{dir: /r}}}}\nsites:\n- {{name: aws, prefixes: [10.1.0.0/16]}}\n- {{name: gcp, prefixes: [10.2.0.0/16]}}\n{extra}"
    );
    Config::parse("test", &text, None).unwrap()
}

fn record(name: &str, key_of: Option<u8>, cidrs: &[&str]) -> NodeRecord {
    let claim = key_of.map(|n| Advertisement {
        public_key: key(n),
        epoch: 1,
        site: "gcp".parse().unwrap(),
        endpoints: vec![format!("gw{n}.example:51820").parse().unwrap()],
        internal_endpoints: Vec::new(),
        mtu: Some(1500),
        reflexive_endpoints: Vec::new(),
        paths: Default::default(),
        encrypts: true,
    });
    NodeRecord {
        name: name.parse().unwrap(),
        site_label: None,
        pod_cidrs: cidrs.iter().map(|c| (*c).to_owned()).collect(),
        annotations: claim.map(|c| c.to_annotations()).unwrap_or_default(),
    }
}

fn snapshot(nodes: &[NodeRecord]) -> Snapshot {
    Snapshot { nodes: nodes.to_vec(), ..Snapshot::default() }
}

/// Some moment; the same one within a test.
fn start() -> Instant {
    static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    *START
}

fn agent(config: Config, last_good: LastGood) -> Agent {
    let mut agent = Agent::new(config, key(1), 1, last_good);
    agent.underlay(ObservedUnderlay {
        default_route_addresses: vec!["192.0.2.7".parse().unwrap(), "2001:db8::7".parse().unwrap()],
        mtu: Some(1400),
        forwarding: (true, true),
        ..ObservedUnderlay::default()
    });
    agent
}

fn peers(desired: &Desired) -> Vec<&str> {
    desired.plan.peers.keys().map(NodeName::as_str).collect()
}

fn three() -> [NodeRecord; 3] {
    [
        record("me", None, &["10.1.1.0/24"]),
        record("a", Some(2), &["10.2.1.0/24"]),
        record("b", Some(3), &["10.2.2.0/24"]),
    ]
}

fn known() -> LastGood {
    let mut before = agent(config(""), LastGood::default());
    before.snapshot(snapshot(&three()), start()).unwrap();
    before.desired(start()).last_good
}

#[test]
fn before_the_first_full_read_the_last_good_peers_stand() {
    let mut agent = agent(config(""), known());
    assert_eq!(peers(&agent.desired(start())), ["a", "b"]);
    assert!(!agent.is_synced());
    agent.snapshot(snapshot(&three()[..2]), start()).unwrap();
    assert_eq!(peers(&agent.desired(start())), ["a"], "after it, whoever was deleted is pruned");
}

#[test]
fn a_registry_that_lost_this_node_is_incomplete_and_prunes_nobody() {
    let mut agent = agent(config(""), known());
    for partial in [snapshot(&[]), snapshot(&three()[1..2])] {
        let problem = agent.snapshot(partial, start()).unwrap_err();
        assert!(problem.contains("counts as incomplete"), "{problem}");
        assert_eq!(peers(&agent.desired(start())), ["a", "b"]);
    }
}

#[test]
fn publications_that_vanish_together_with_our_own_are_held_while_they_come_back_one_by_one() {
    let mut all = three();
    all[0].annotations = record("me", Some(1), &[]).annotations;
    let mut agent = agent(config(""), LastGood::default());
    agent.snapshot(snapshot(&all), start()).unwrap();
    assert_eq!(peers(&agent.desired(start())), ["a", "b"]);
    let mut emptied = three();
    emptied.iter_mut().for_each(|node| node.annotations.clear());
    agent.snapshot(snapshot(&emptied), start()).unwrap();
    assert_eq!(peers(&agent.desired(start())), ["a", "b"]);
    // Ours is back first, and one that the operator deletes meanwhile is gone at once.
    emptied[0].annotations = all[0].annotations.clone();
    let later = start() + HOLD / 2;
    agent.snapshot(snapshot(&emptied), later).unwrap();
    assert_eq!(peers(&agent.desired(later)), ["a", "b"]);
    agent.snapshot(snapshot(&emptied[..2]), later).unwrap();
    assert_eq!(peers(&agent.desired(later)), ["a"]);
    assert_eq!(peers(&agent.desired(start() + HOLD)), [""; 0], "whoever did not come back by then withdrew");
}

#[test]
fn a_publication_that_cannot_be_read_after_a_restart_counts_as_it_was_last() {
    let mut agent = agent(config(""), known());
    let mut broken = three();
    broken[1].annotations.clear();
    let unreadable = BTreeSet::from(["a".parse().unwrap()]);
    agent.snapshot(Snapshot { unreadable, ..snapshot(&broken) }, start()).unwrap();
    assert_eq!(peers(&agent.desired(start())), ["a", "b"]);
}

#[test]
fn an_operators_file_that_never_could_be_read_prunes_nobody() {
    let mut agent = agent(config(""), known());
    agent.snapshot(Snapshot { incomplete: true, ..snapshot(&three()[..2]) }, start()).unwrap();
    let desired = agent.desired(start());
    assert_eq!(peers(&desired), ["a", "b"]);
    assert!(!desired.prune && desired.synced);
    assert!(desired.warnings.iter().any(|w| w.contains("nothing is pruned")));
}

#[test]
fn without_a_full_read_nothing_is_pruned() {
    assert!(!agent(config(""), LastGood::default()).desired(start()).prune);
}

#[test]
fn a_grant_around_this_hosts_own_address_is_refused_as_a_whole() {
    let text = "node: me\nsite: aws\nmesh: test\nregistry: {file: {dir: /r}}\nsites: [{name: aws, prefixes: [192.0.0.0/16]}]\n";
    let mut agent = agent(Config::parse("test", text, None).unwrap(), LastGood::default());
    let harmful = agent.desired(start()).harmful.unwrap();
    assert!(harmful.contains("192.0.0.0/16") && harmful.contains("192.0.2.7"), "{harmful}");
}

#[test]
fn a_node_that_was_never_registered_meets_its_peers_and_says_so() {
    let mut agent = agent(config(""), LastGood::default());
    agent.snapshot(snapshot(&three()[1..]), start()).unwrap();
    let desired = agent.desired(start());
    assert_eq!(peers(&desired), ["a", "b"]);
    assert!(desired.warnings.iter().any(|w| w.contains("no Node manifest of me")));
}

#[test]
fn endpoints_and_mtu_are_derived_unless_configured() {
    let derived = agent(config(""), LastGood::default()).desired(start()).publish;
    let texts: Vec<String> = derived.endpoints.iter().map(ToString::to_string).collect();
    assert_eq!(texts, ["192.0.2.7:51820", "[2001:db8::7]:51820"]);
    assert_eq!((derived.internal_endpoints, derived.mtu), (derived.endpoints, Some(1400)));
    let behind_nat = "underlay: {endpoints: [], internalEndpoints: ['192.168.1.2:51820'], mtu: 1450}\n";
    let configured = agent(config(behind_nat), LastGood::default()).desired(start()).publish;
    assert!(configured.endpoints.is_empty());
    assert_eq!(configured.internal_endpoints[0].to_string(), "192.168.1.2:51820");
    assert_eq!(configured.mtu, Some(1450));
}

#[test]
fn prefixes_that_this_node_cannot_have_been_granted_are_not_used() {
    let mut agent = agent(config("protectedAddresses: [10.1.9.1]\n"), LastGood::default());
    let cidrs = ["10.1.1.0/24", "10.9.0.0/24", "0.0.0.0/0", "nonsense", "10.1.9.0/24"];
    agent.snapshot(snapshot(&[record("me", None, &cidrs)]), start()).unwrap();
    let desired = agent.desired(start());
    assert_eq!(desired.last_good.prefixes, ["10.1.1.0/24".parse::<IpNet>().unwrap()]);
    assert_eq!(desired.warnings.len(), 4, "{:?}", desired.warnings);
}

#[test]
fn names_that_peers_give_are_asked_for_and_what_they_resolve_to_is_dialled() {
    let mut agent = agent(config(""), LastGood::default());
    agent.snapshot(snapshot(&three()), start()).unwrap();
    let before = agent.desired(start());
    assert_eq!(before.names.iter().map(String::as_str).collect::<Vec<_>>(), ["gw2.example", "gw3.example"]);
    agent.resolved([("gw2.example".to_owned(), vec!["203.0.113.2".parse().unwrap()])].into());
    let after = agent.desired(start());
    let dialled: Vec<usize> = after.plan.peers.values().map(|p| p.candidates.len()).collect();
    assert_eq!(dialled, [1, 0], "the name that does not resolve disturbs nobody else");
}

fn said(settings: serde_json::Value) -> MeshWord {
    MeshWord::Said(Settings::from_spec(settings).unwrap())
}

fn bare() -> Config {
    Config::parse("test", "node: me\nsite: aws\nmesh: test\nregistry: {kube: {}}\n", None).unwrap()
}

#[test]
fn a_mesh_fills_in_what_the_configuration_leaves_out() {
    let mut agent = agent(bare(), LastGood::default());
    let mesh = said(serde_json::json!({
        "sites": [{"name": "aws", "prefixes": ["10.1.0.0/16"]}, {"name": "gcp", "prefixes": ["10.2.1.0/24"]}],
        "protectedAddresses": ["10.2.1.9"], "wireguard": {"listenPort": 4000}, "underlay": {"mtu": 1390},
    }));
    agent.snapshot(snapshot(&three()), start()).unwrap();
    let before = agent.desired(start());
    assert_eq!((before.plan.device.listen_port, before.plan.mtu, peers(&before).len()), (51820, 1320, 2));
    // At once, and from then on; one peer holds a protected address, the other lies outside of its site's grant.
    agent.snapshot(Snapshot { mesh: mesh.clone(), ..snapshot(&three()) }, start()).unwrap();
    let after = agent.desired(start());
    assert_eq!((after.plan.device.listen_port, after.plan.mtu), (4000, 1310));
    assert_eq!(after.publish.endpoints[0].to_string(), "192.0.2.7:4000");
    let all: Vec<String> = after.refused.iter().map(|problem| problem.text.clone()).collect();
    for wanted in
        ["10.2.1.0/24 holds the protected address 10.2.1.9", "10.2.2.0/24 lies outside of what site gcp"]
    {
        assert!(all.iter().any(|text| text.contains(wanted)), "{all:?}");
    }
    assert!(after.plan.peers.values().all(|peer| peer.allowed_ips.iter().all(|net| net.addr().is_ipv6())));
    // What was encrypted before does not go out in clear now, nor later, but for the protected address itself.
    agent.snapshot(Snapshot { mesh: mesh.clone(), ..snapshot(&three()) }, start()).unwrap();
    let after = agent.desired(start());
    for net in ["10.2.1.0/24", "10.2.2.0/24"] {
        assert!(
            after.plan.guard.mesh.iter().any(|wide| wide.contains(&net.parse::<IpNet>().unwrap())),
            "{net}"
        );
    }
    assert!(after.plan.guard.outside.contains(&"10.2.1.9/32".parse().unwrap()));

    // The word is remembered while the registry is away, and while it cannot be read or understood.
    let mut again = self::agent(bare(), after.last_good.clone());
    let port = |agent: &mut Agent, now| agent.desired(now).plan.device.listen_port;
    assert_eq!(port(&mut again, start()), 4000);
    for mesh in [MeshWord::Unclear("spec: nonsense".to_owned()), MeshWord::Missing("no such kind".to_owned())]
    {
        again.snapshot(Snapshot { mesh, ..snapshot(&three()) }, start()).unwrap();
        assert_eq!(port(&mut again, start()), 4000);
        assert!(again.desired(start()).refused.iter().any(|problem| problem.text.contains("in force")));
    }
    // One that is gone counts for a while: somebody may be making it anew.
    again.snapshot(snapshot(&three()), start()).unwrap();
    assert_eq!((port(&mut again, start()), again.holds_until(start())), (4000, Some(start() + HOLD)));
    again.snapshot(snapshot(&three()), start() + HOLD).unwrap();
    assert_eq!((port(&mut again, start() + HOLD), again.holds_until(start() + HOLD)), (51820, None));

    // What the node's own file says comes first.
    let mut own = self::agent(config("wireguard: {listenPort: 5000}"), LastGood::default());
    own.snapshot(Snapshot { mesh, ..snapshot(&three()) }, start()).unwrap();
    assert_eq!(own.desired(start()).plan.device.listen_port, 5000);
    assert!(own.grants().sites[&"gcp".parse().unwrap()].contains(&"10.2.0.0/16".parse().unwrap()));
}

#[test]
fn a_site_that_the_mesh_does_not_name_holds_nothing() {
    let mut agent = agent(bare(), LastGood::default());
    let mesh = said(serde_json::json!({"sites": [{"name": "gcp", "prefixes": ["10.2.0.0/16"]}]}));
    for _ in 0..2 {
        agent.snapshot(Snapshot { mesh: mesh.clone(), ..snapshot(&three()) }, start()).unwrap();
        assert!(agent.mesh_refused().unwrap().contains("no site aws"));
    }
    let desired = agent.desired(start());
    assert!(desired.warnings.iter().any(|w| w.contains("has no site aws")), "{:?}", desired.warnings);
    assert!(desired.last_good.prefixes.is_empty());
}

#[test]
fn where_the_registry_is_reached_no_peer_holds_it() {
    let mut agent = agent(bare(), LastGood::default());
    let servers = BTreeSet::from(["10.2.1.5".parse().unwrap()]);
    agent.snapshot(Snapshot { servers, servers_known: true, ..snapshot(&three()) }, start()).unwrap();
    let desired = agent.desired(start());
    let holds = |desired: &Desired| {
        let peer = &desired.plan.peers[&"a".parse::<NodeName>().unwrap()];
        peer.allowed_ips.contains(&"10.2.1.0/24".parse().unwrap())
    };
    assert!(!holds(&desired));
    assert!(desired.refused.iter().any(|problem| problem.text.contains("10.2.1.5")), "{:?}", desired.refused);
    // Later it is away and says nothing.
    agent.snapshot(snapshot(&three()), start()).unwrap();
    assert!(!holds(&agent.desired(start())));
    let mut again = self::agent(bare(), desired.last_good);
    assert!(again.grants().protected.contains(&"10.2.1.5".parse().unwrap()));
    assert!(!holds(&again.desired(start())));
}

#[test]
fn a_cluster_that_loses_our_kinds_is_not_believed() {
    let without = Snapshot { mesh_nodes: Some(false), ..snapshot(&three()[..1]) };
    let mut agent = agent(bare(), LastGood::default());
    agent.snapshot(without.clone(), start()).unwrap();
    assert_eq!(peers(&agent.desired(start())).len(), 0, "one that never had them has none");
    agent.snapshot(Snapshot { mesh_nodes: Some(true), ..snapshot(&three()) }, start()).unwrap();
    let memory = agent.desired(start()).last_good;
    let mut again = self::agent(bare(), memory);
    let why = again.snapshot(without, start()).unwrap_err();
    assert!(why.contains("kind MeshNode") && why.contains("CRDs"), "{why}");
    let desired = again.desired(start());
    assert_eq!((peers(&desired).len(), desired.prune), (2, false));
}

#[test]
fn an_agent_that_never_understood_its_mesh_admits_nobody_and_guards_all() {
    let mut agent = agent(bare(), LastGood::default());
    let unclear = || MeshWord::Unclear("spec.sites: overlap".to_owned());
    for _ in 0..2 {
        agent.snapshot(Snapshot { mesh: unclear(), ..snapshot(&three()) }, start()).unwrap();
        let desired = agent.desired(start());
        assert!(
            desired.refused.iter().any(|p| p.text.contains("Mesh test: spec.sites: overlap")),
            "{:?}",
            desired.refused
        );
        assert_eq!(peers(&desired).len(), 0);
        let guarded = |net: &str| desired.plan.guard.mesh.contains(&net.parse().unwrap());
        assert!(guarded("10.2.1.0/24") && guarded("10.2.2.0/24"), "{:?}", desired.plan.guard);
    }
    // It waits after a restart too; one that the cluster does not know is no word.
    let mut again = self::agent(bare(), agent.desired(start()).last_good);
    again.snapshot(Snapshot { mesh: unclear(), ..snapshot(&three()) }, start()).unwrap();
    assert_eq!(peers(&again.desired(start())).len(), 0);
    let mesh = MeshWord::Missing("no such kind".to_owned());
    again.snapshot(Snapshot { mesh, ..snapshot(&three()) }, start()).unwrap();
    assert_eq!(peers(&again.desired(start())).len(), 2);
    // For one that has run without a Mesh, a first one that makes no sense changes nothing.
    again.snapshot(Snapshot { mesh: unclear(), ..snapshot(&three()[..2]) }, start()).unwrap();
    assert_eq!(peers(&again.desired(start())).len(), 1, "who is gone is gone all the same");
}

#[test]
fn a_mesh_that_strands_this_node_changes_nothing() {
    let sites =
        |name: &str, net: &str| said(serde_json::json!({"sites": [{"name": name, "prefixes": [net]}]}));
    let mut agent = agent(bare(), LastGood::default());
    agent.snapshot(snapshot(&three()), start()).unwrap();
    let before = agent.desired(start());
    for (mesh, wanted) in [
        (sites("other", "10.9.0.0/16"), "no site aws"),
        (sites("aws", "10.9.0.0/16"), "no prefix of its own"),
    ] {
        agent.snapshot(Snapshot { mesh, ..snapshot(&three()) }, start()).unwrap();
        let after = agent.desired(start());
        assert_eq!((peers(&after), &after.plan.guard), (peers(&before), &before.plan.guard));
        assert!(agent.mesh_refused().unwrap().contains(wanted), "{:?}", agent.mesh_refused());
        assert!(after.refused.iter().any(|problem| problem.text.contains(wanted)), "{:?}", after.refused);
    }
    // Mended, it counts.
    let good = serde_json::json!({"sites": [
        {"name": "aws", "prefixes": ["10.1.0.0/16"]}, {"name": "gcp", "prefixes": ["10.2.0.0/16"]},
    ]});
    agent.snapshot(Snapshot { mesh: said(good), ..snapshot(&three()) }, start()).unwrap();
    assert_eq!(agent.mesh_refused(), None);
    // It stays in force when a site is taken out later, also after a restart.
    let mut again = self::agent(bare(), agent.desired(start()).last_good);
    again.snapshot(Snapshot { mesh: sites("gcp", "10.2.0.0/16"), ..snapshot(&three()) }, start()).unwrap();
    assert_eq!(again.grants().sites.len(), 2);
    assert!(again.mesh_refused().unwrap().contains("no site aws"));
}

#[test]
fn what_is_withheld_is_guarded_before_the_registry_is_read_again() {
    let mut agent = agent(bare(), LastGood::default());
    agent.snapshot(snapshot(&three()), start()).unwrap();
    agent.desired(start());
    let sites = serde_json::json!({"sites": [{"name": "aws", "prefixes": ["10.1.0.0/16"]}]});
    agent.snapshot(Snapshot { mesh: said(sites), ..snapshot(&three()) }, start()).unwrap();
    let memory = agent.desired(start()).last_good;
    assert!(memory.peers.0.values().all(|peer| peer.prefixes.is_empty() && peer.withheld.len() == 1));
    let again = self::agent(bare(), memory).desired(start());
    assert!(again.plan.guard.mesh.contains(&"10.2.1.0/24".parse().unwrap()), "{:?}", again.plan.guard);
}

#[test]
fn a_mesh_that_would_cut_the_host_off_is_not_heeded() {
    let mut agent = agent(bare(), LastGood::default());
    let good = said(serde_json::json!({"wireguard": {"listenPort": 4000}}));
    agent.snapshot(Snapshot { mesh: good, ..snapshot(&three()) }, start()).unwrap();
    let harmful = said(serde_json::json!({"sites": [{"name": "aws", "prefixes": ["192.0.0.0/16"]}]}));
    agent.snapshot(Snapshot { mesh: harmful, ..snapshot(&three()) }, start()).unwrap();
    let desired = agent.desired(start());
    assert_eq!((desired.harmful, desired.plan.device.listen_port), (None, 4000));
    assert!(
        desired.refused.iter().any(|p| p.text.contains("192.0.0.0/16 of aws holds 192.0.2.7")),
        "{:?}",
        desired.refused
    );
}

#[test]
fn a_mesh_does_not_make_an_interface_carry_more() {
    let mut agent = agent(bare(), LastGood::default());
    let mesh = said(serde_json::json!({"underlay": {"mtu": 9000}}));
    agent.snapshot(Snapshot { mesh, ..snapshot(&three()) }, start()).unwrap();
    let desired = agent.desired(start());
    assert_eq!((desired.plan.mtu, desired.publish.mtu), (1320, Some(1400)));
    assert!(
        desired.warnings.iter().any(|w| w.contains("spec.underlay.mtu is 9000")),
        "{:?}",
        desired.warnings
    );
}

#[test]
fn an_exemption_ends_by_itself_and_one_without_a_real_end_is_none() {
    let between = "{between: [{node: plc}], reason: no TUN, expires: ";
    let extra = format!(
        "encryption:\n  exemptions:\n  - {between}'2027-01-31T00:00:00Z'}}\n  - {between}'2099-01-31T00:00:00Z'}}\n"
    );
    let mut agent = agent(config(&extra), LastGood::default());
    let mut plc = record("plc", Some(2), &["10.2.1.0/24"]);
    plc.annotations.insert("sennit.dev/wireguard".to_owned(), "none".to_owned());
    plc.annotations.insert("sennit.dev/endpoints".to_owned(), "203.0.113.2:51820".to_owned());
    agent.snapshot(snapshot(&[record("me", None, &["10.1.1.0/24"]), plc]), start()).unwrap();
    let mut at = |now: Option<&str>| {
        if let Some(now) = now {
            agent.today(now.parse().unwrap());
        }
        let desired = agent.desired(start());
        let peer = &desired.plan.peers[&"plc".parse::<NodeName>().unwrap()];
        assert!(!peer.encrypted);
        let states: Vec<_> = desired.exemptions.iter().map(|one| one.state).collect();
        let told = desired.warnings.iter().any(|text| text.contains("2099-01-31"));
        (peer.exemption.is_some(), states, told, agent.exempt_until().map(|until| until.to_string()))
    };
    // As long as the time is not known, none is in force.
    assert!(!at(None).0);
    let end = "2027-01-31T00:00:00Z".to_owned();
    use ExemptionState::{Ended, InUse, TooLong};
    assert_eq!(at(Some("2027-01-30T23:59:59Z")), (true, vec![InUse, TooLong], true, Some(end)));
    let far = "2099-01-31T00:00:00Z".to_owned();
    assert_eq!(at(Some("2027-01-31T00:00:00Z")), (false, vec![Ended, TooLong], true, Some(far)));
}

#[test]
fn a_mesh_that_cannot_be_understood_any_more_exempts_nobody() {
    let mut agent = agent(config(""), LastGood::default());
    agent.today("2027-01-01T00:00:00Z".parse().unwrap());
    let exemption = serde_json::json!({"between": [{"node": "plc"}], "reason": "no TUN", "expires": "2027-01-31T00:00:00Z"});
    let said = Settings {
        exemptions: vec![serde_json::from_value(exemption).unwrap()],
        mtu: Some(1390),
        ..Settings::default()
    };
    let with = |mesh: MeshWord| Snapshot { mesh, ..snapshot(&[record("me", None, &["10.1.1.0/24"])]) };
    agent.snapshot(with(MeshWord::Said(said)), start()).unwrap();
    assert_eq!(agent.desired(start()).exemptions.len(), 1);
    for _ in 0..2 {
        agent.snapshot(with(MeshWord::Unclear("spec: nonsense".to_owned())), start()).unwrap();
        let desired = agent.desired(start());
        assert!(desired.exemptions.is_empty());
        assert_eq!(desired.publish.mtu, Some(1390), "the rest stays");
        let told = desired.refused.iter().any(|one| one.text.contains("but for exemptions"));
        assert!(told, "{:?}", desired.refused);
    }
}

fn wide(desired: &Desired, net: &str) -> bool {
    let net: IpNet = net.parse().unwrap();
    let guarded = desired.plan.guard.mesh.iter().any(|wide| wide.contains(&net));
    let hole = |route: &mesh_overlay::Route| {
        route.kind == mesh_overlay::RouteKind::Blackhole && route.to.contains(&net)
    };
    let black_holed = desired.plan.routes.routes.iter().any(hole);
    assert_eq!(guarded, black_holed, "{net}");
    guarded
}

#[test]
fn a_deleted_node_stays_guarded_until_released() {
    let mut first = agent(bare(), LastGood::default());
    first.snapshot(snapshot(&three()), start()).unwrap();
    assert!(first.desired(start()).kept.is_empty());
    first.snapshot(snapshot(&three()[..2]), start()).unwrap();
    let desired = first.desired(start());
    assert_eq!((peers(&desired), wide(&desired, "10.2.2.0/24")), (vec!["a"], true));
    assert_eq!(desired.kept.values().map(|kept| kept.holder.as_str()).collect::<Vec<_>>(), ["b"]);
    // A restart forgets nothing, with and without the registry.
    let mut second = agent(bare(), desired.last_good);
    assert!(wide(&second.desired(start()), "10.2.2.0/24"));
    second.snapshot(snapshot(&three()[..2]), start()).unwrap();
    assert!(wide(&second.desired(start()), "10.2.2.0/24"));
    // What somebody holds is not released.
    assert_eq!(second.release("a"), []);
    assert_eq!(second.release("10.2.1.0/24"), []);
    assert_eq!(second.release("b"), ["10.2.2.0/24".parse::<IpNet>().unwrap()]);
    let desired = second.desired(start());
    assert!(!wide(&desired, "10.2.2.0/24") && wide(&desired, "10.2.1.0/24") && desired.kept.is_empty());
}

#[test]
fn moved_refused_and_surplus_prefixes_stay_guarded() {
    for cidrs in [
        vec!["10.2.9.0/24".to_owned()],
        vec!["10.2.2.0/99".to_owned()],
        vec![],
        (0..17).map(|n| format!("10.9.{n}.0/24")).collect(),
    ] {
        let mut agent = agent(bare(), LastGood::default());
        agent.snapshot(snapshot(&three()), start()).unwrap();
        agent.desired(start());
        let mut nodes = three();
        nodes[2].pod_cidrs.clone_from(&cidrs);
        agent.snapshot(snapshot(&nodes), start()).unwrap();
        let desired = agent.desired(start());
        assert!(wide(&desired, "10.2.2.0/24"), "{cidrs:?}");
        for cidr in cidrs.iter().filter(|cidr| !cidr.ends_with("99")) {
            assert!(wide(&desired, cidr), "{cidr}");
        }
    }
}

#[test]
fn a_grace_ends_by_running_time_alone() {
    let config = Config::parse(
        "test",
        "node: me\nsite: aws\nmesh: test\nregistry: {kube: {}}\nguard: {graceDays: 1}\n",
        None,
    );
    let mut agent = agent(config.unwrap(), LastGood::default());
    let at = |hours: u64| start() + Duration::from_secs(hours * 3_600);
    agent.snapshot(snapshot(&three()), at(0)).unwrap();
    agent.desired(at(0));
    agent.snapshot(snapshot(&three()[..2]), at(500)).unwrap();
    agent.desired(at(500));
    // The time before it was gone does not count, nor does the clock of the day.
    agent.today("2099-01-01T00:00:00Z".parse().unwrap());
    assert!(wide(&agent.desired(at(523)), "10.2.2.0/24"));
    assert!(!wide(&agent.desired(at(1_048)), "10.2.2.0/24"));
}

#[test]
fn a_prefix_that_passes_on_belongs_to_its_holder() {
    let mut agent = agent(bare(), LastGood::default());
    agent.snapshot(snapshot(&three()), start()).unwrap();
    agent.desired(start());
    // Now c has it, as a part of a wider one.
    let nodes = [three()[0].clone(), three()[1].clone(), record("c", Some(4), &["10.2.2.0/23"])];
    agent.snapshot(snapshot(&nodes), start()).unwrap();
    let desired = agent.desired(start());
    let holes: Vec<String> = desired.plan.routes.routes.iter().map(|route| route.to.to_string()).collect();
    assert!(!holes.contains(&"10.2.2.0/24".to_owned()), "{holes:?}");
    assert!(desired.kept.is_empty() && wide(&desired, "10.2.2.0/24"));
}

#[test]
fn own_former_prefixes_stay_with_our_pods() {
    let mut agent = agent(bare(), LastGood::default());
    let me = |cidr: &str| record("me", None, &[cidr]);
    agent.snapshot(snapshot(&[me("10.1.0.0/24"), three()[1].clone()]), start()).unwrap();
    agent.desired(start());
    agent.snapshot(snapshot(&[me("10.1.7.0/24"), three()[1].clone()]), start()).unwrap();
    let plan = agent.desired(start()).plan;
    let former: IpNet = "10.1.0.0/24".parse().unwrap();
    assert!(plan.guard.local.contains(&former) && plan.routes.own.contains(&former));
    // Another node is given it.
    let other = record("b", Some(3), &["10.1.0.0/24"]);
    agent.snapshot(snapshot(&[me("10.1.7.0/24"), three()[1].clone(), other]), start()).unwrap();
    let plan = agent.desired(start()).plan;
    assert!(!plan.guard.local.contains(&former) && plan.guard.mesh.contains(&former));
}

fn on_eth0(ip: &str, permanent: bool) -> ObservedUnderlay {
    let ip: IpAddr = ip.parse().unwrap();
    let eth0 = OtherLink {
        name: "eth0".to_owned(),
        addresses: [("192.0.2.7".parse().unwrap(), true), (ip, permanent)].into(),
        leads_away: true,
        gateways: ["10.2.1.1".parse().unwrap()].into(),
    };
    ObservedUnderlay {
        default_route_addresses: vec!["192.0.2.7".parse().unwrap(), ip],
        links: [(2, eth0)].into(),
        mtu: Some(1400),
        forwarding: (true, true),
        ..ObservedUnderlay::default()
    }
}

#[test]
fn an_address_on_the_underlay_takes_nothing() {
    for config in [bare(), config("")] {
        for (permanent, restarted) in [(false, false), (true, false), (false, true)] {
            let mut agent = agent(config.clone(), LastGood::default());
            agent.snapshot(snapshot(&three()), start()).unwrap();
            let before = agent.desired(start());
            if restarted {
                agent = super::tests::agent(config.clone(), before.last_good.clone());
            }
            agent.underlay(on_eth0("10.2.1.9", permanent));
            agent.snapshot(snapshot(&three()), start()).unwrap();
            let after = agent.desired(start());
            assert_eq!(after.harmful, None);
            assert_eq!(after.plan.device.peers, before.plan.device.peers);
            assert_eq!(after.plan.guard.mesh, before.plan.guard.mesh);
            assert!(after.plan.guard.outside.is_empty() && after.plan.guard.underlay.contains(&2));
            let told = after.warnings.iter().any(|text| text.contains("10.2.1.9 on eth0"));
            assert!(told, "{:?}", after.warnings);
        }
    }
}

#[test]
fn named_underlay_gets_the_smallest_hole() {
    let mut agent = agent(config("underlay: {interfaces: [eth0]}\n"), LastGood::default());
    agent.snapshot(snapshot(&three()), start()).unwrap();
    agent.desired(start());
    agent.underlay(on_eth0("10.2.1.9", true));
    let plan = agent.desired(start()).plan;
    let outside: Vec<String> = plan.guard.outside.iter().map(ToString::to_string).collect();
    assert_eq!(outside, ["10.2.1.1/32", "10.2.1.9/32"]);
    assert!(plan.guard.mesh.iter().any(|net| net.contains(&"10.2.1.0/24".parse::<IpNet>().unwrap())));
}

#[test]
fn a_mesh_in_force_is_not_undone_by_an_address() {
    let mut agent = agent(bare(), LastGood::default());
    let mesh = || {
        said(serde_json::json!({"sites": [
        {"name": "aws", "prefixes": ["10.1.0.0/16"]}, {"name": "gcp", "prefixes": ["10.2.0.0/16"]}]}))
    };
    agent.snapshot(Snapshot { mesh: mesh(), ..snapshot(&three()) }, start()).unwrap();
    agent.desired(start());
    agent.underlay(on_eth0("10.2.1.9", false));
    agent.snapshot(Snapshot { mesh: mesh(), ..snapshot(&three()) }, start()).unwrap();
    let desired = agent.desired(start());
    assert_eq!((desired.harmful.clone(), peers(&desired)), (None, vec!["a", "b"]));
    assert!(wide(&desired, "10.2.77.0/24"));
    assert!(desired.refused.is_empty(), "{:?}", desired.refused);
}

#[test]
fn a_dns_answer_opens_no_guard() {
    let mut agent = agent(config(""), LastGood::default());
    agent.snapshot(snapshot(&three()), start()).unwrap();
    agent.desired(start());
    let answer: BTreeSet<IpAddr> = ["10.2.1.5".parse().unwrap(), "192.0.2.99".parse().unwrap()].into();
    let said = || Snapshot {
        servers: answer.clone(),
        named: answer.clone(),
        servers_known: true,
        ..snapshot(&three())
    };
    agent.snapshot(said(), start()).unwrap();
    let desired = agent.desired(start());
    assert!(desired.plan.guard.outside.is_empty() && peers(&desired) == ["a", "b"]);
    assert!(desired.refused.iter().any(|one| one.text.contains("10.2.1.5")), "{:?}", desired.refused);
    assert!(agent.grants().protected.contains(&"192.0.2.99".parse().unwrap()));
    // What the cluster itself says counts.
    agent.snapshot(Snapshot { named: BTreeSet::new(), ..said() }, start()).unwrap();
    assert_eq!(agent.desired(start()).plan.guard.outside.len(), 1);
}
