use crate::problem::NAMED_MOST;
use mesh_overlay::surroundings::{Child, Hop, Way};
use mesh_policy::nft::{Doer, Flowtable};

use super::*;

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn needs() -> Needs {
    Needs {
        mesh: ["10.0.0.0/8", "fd00::/16"].map(net).into(),
        own: ["10.1.0.0/24", "fd00:1::/64"].map(net).into(),
        interfaces: ["sennit0".to_owned()].into(),
        cluster: true,
        judges: true,
        checks_sources: true,
        ..Needs::default()
    }
}

fn link(index: u32, name: &str, kind: Option<&str>) -> Neighbour {
    Neighbour { index, name: name.to_owned(), kind: kind.map(str::to_owned), ..Neighbour::default() }
}

fn around() -> Surroundings {
    Surroundings {
        links: vec![link(2, "eth0", None), link(3, "sennit0", Some("tun")), link(4, "cni0", Some("bridge"))],
        ..Surroundings::default()
    }
}

fn way(table: u32, to: &str, interface: u32) -> Way {
    Way { table, to: net(to), hops: vec![Hop { interface, gateway: None }], learnt: false }
}

#[test]
fn a_bridge_wider_than_the_prefix_is_told() {
    let mut around = around();
    let found = |around: &Surroundings| found(around).into_iter().map(|(code, _)| code).collect::<Vec<_>>();
    around.links[2].addresses = vec![(net("10.1.0.1/16"), true)];
    around.ways = vec![way(254, "10.1.0.0/16", 4), way(254, "0.0.0.0/0", 2)];
    assert_eq!(found(&around), ["pod-route-too-wide"]);
    // As wide as the prefix, or narrower, it is taken.
    for right in ["10.1.0.0/24", "10.1.0.7/32"] {
        around.ways.push(way(254, right, 4));
        assert!(found(&around).is_empty(), "{right}");
        around.ways.pop();
    }
    // A company's route leads to no pods.
    around.ways = vec![way(254, "10.0.0.0/8", 2)];
    assert!(found(&around).is_empty());
}

fn rule(priority: u32, action: Action) -> RoutingRule {
    RoutingRule {
        v6: false,
        priority,
        action,
        from: None,
        to: None,
        narrow: false,
        inverted: false,
        suppress: None,
        iif: None,
    }
}

fn ours() -> RoutingRule {
    rule(5182, Action::Table(5182))
}

fn found(around: &Surroundings) -> Vec<(String, bool)> {
    let problems = judge(&needs(), around, &Others::default(), &BTreeMap::new());
    problems.into_iter().map(|problem| (problem.code, problem.blocks)).collect()
}

fn of_rules(rules: Vec<RoutingRule>, ways: Vec<Way>) -> Vec<(String, bool)> {
    found(&Surroundings { rules, ways, ..around() })
}

#[test]
fn a_host_like_any_other_has_no_problem() {
    let rules = vec![
        rule(0, Action::Table(255)),
        ours(),
        rule(32766, Action::Table(254)),
        rule(32767, Action::Table(253)),
    ];
    let ways = vec![way(254, "0.0.0.0/0", 2), way(5182, "10.2.0.0/24", 3), way(254, "10.1.0.0/24", 4)];
    assert!(of_rules(rules, ways).is_empty());
}

#[test]
fn a_rule_ahead_that_takes_mesh_packets_blocks() {
    let elsewhere = || vec![way(51820, "0.0.0.0/0", 2)];
    let not_marked = RoutingRule { narrow: true, inverted: true, ..rule(5181, Action::Table(51820)) };
    assert_eq!(of_rules(vec![not_marked, ours()], elsewhere()), [("routing-rule-ahead".to_owned(), true)]);
    // Behind ours it takes nothing; and of one priority the one that comes first counts.
    assert!(of_rules(vec![ours(), rule(32764, Action::Table(51820))], elsewhere()).is_empty());
    assert!(of_rules(vec![ours(), rule(5182, Action::Table(51820))], elsewhere()).is_empty());
    assert_eq!(of_rules(vec![rule(5182, Action::Table(51820)), ours()], elsewhere()).len(), 1);
    // An empty table takes nothing, nor does one without a route to the mesh, nor one that leads into it.
    assert!(of_rules(vec![rule(10, Action::Table(7)), ours()], vec![]).is_empty());
    assert!(of_rules(vec![rule(10, Action::Table(7)), ours()], vec![way(7, "192.0.2.0/24", 2)]).is_empty());
    assert!(of_rules(vec![rule(10, Action::Table(7)), ours()], vec![way(7, "10.2.0.0/16", 3)]).is_empty());
    // To jump over ours is to take all.
    assert_eq!(of_rules(vec![rule(10, Action::Goto(32766)), ours()], vec![]).len(), 1);
}

#[test]
fn narrow_rules_are_told_and_do_not_block() {
    let main = || vec![way(254, "0.0.0.0/0", 2)];
    let marked = RoutingRule { narrow: true, ..rule(1024, Action::Table(254)) };
    assert_eq!(of_rules(vec![marked, ours()], main()), [("routing-rule-ahead".to_owned(), false)]);
    // A cloud's rule that leads to this node's pods.
    let own = RoutingRule { to: Some(net("10.1.0.7/32")), ..rule(512, Action::Table(254)) };
    let around = Surroundings { rules: vec![own, ours()], ways: main(), ..around() };
    let needs = Needs { mesh: ["10.1.0.0/24", "10.2.0.0/24"].map(net).into(), ..needs() };
    assert!(judge(&needs, &around, &Others::default(), &BTreeMap::new()).is_empty());
    // Without default routes nothing is left (wg-quick's suppress_prefixlength 0).
    let suppressed = RoutingRule { suppress: Some(0), ..rule(10, Action::Table(254)) };
    assert!(of_rules(vec![suppressed, ours()], main()).is_empty());
    let from_lan = RoutingRule { from: Some(net("192.0.2.0/24")), ..rule(10, Action::Table(254)) };
    assert!(of_rules(vec![from_lan, ours()], main()).is_empty());
}

#[test]
fn a_vrf_that_holds_pods_or_the_mesh_blocks() {
    let mut around = around();
    around.links.push(link(9, "red", Some("vrf")));
    around.ways.push(way(254, "10.1.0.0/24", 4));
    around.links[0].master = Some(9);
    assert!(found(&around).is_empty(), "an underlay may be in one");
    around.links[2].master = Some(9);
    assert_eq!(found(&around), [("vrf-holds-interface".to_owned(), true)]);
}

#[test]
fn flowtables_and_rules_of_others_are_told() {
    let others = Others {
        closed: Vec::new(),
        flowtables: vec![Flowtable {
            table: "inet fast".into(),
            name: "f".into(),
            devices: vec!["eth0".into()],
        }],
        doers: vec![Doer { deed: Deed::NoTrack, table: "ip raw".into(), chain: "PREROUTING".into() }],
        cut: false,
    };
    let judged = |needs: &Needs| {
        let problems = judge(needs, &around(), &others, &BTreeMap::new());
        problems.into_iter().map(|problem| (problem.code, problem.blocks)).collect::<Vec<_>>()
    };
    assert_eq!(
        judged(&needs()),
        [("flowtable-foreign".to_owned(), true), ("notrack-foreign".to_owned(), false)]
    );
    let accepting = Needs { acknowledged: [Acknowledged::ForeignFlowtables].into(), ..needs() };
    assert!(judged(&accepting).iter().all(|(_, blocks)| !blocks));
}

#[test]
fn pods_beside_the_host_block_clusters_until_acknowledged() {
    let mut around = around();
    let child = |sent| Child { parent: 2, kind: "macvlan".to_owned(), sent };
    around.children = vec![child(3), child(4)];
    around.links[0].functions = 2;
    let cni = [("/etc/cni/net.d/1.conf".to_owned(), "ipvlan".to_owned())].into();
    let judged = |needs: &Needs| judge(needs, &around, &Others::default(), &cni);
    let problems = judged(&needs());
    assert_eq!(problems.len(), 3);
    assert!(problems.iter().all(|problem| problem.blocks && problem.code == "pods-beside-the-host"));
    assert!(problems[0].text.starts_with("2: ") && problems[0].packets == Some(7), "{:?}", problems[0]);
    assert!(problems[0].to_string().contains("macvlan on eth0"), "{}", problems[0]);
    let accepting = Needs { acknowledged: [Acknowledged::PodsBesideTheHost].into(), ..needs() };
    assert!(judged(&accepting).iter().all(|problem| !problem.blocks));
    assert!(judged(&Needs { cluster: false, ..needs() }).iter().all(|problem| !problem.blocks));
}

#[test]
fn unchecked_sources_are_told() {
    let off = Needs { checks_sources: false, ..needs() };
    let problems = judge(&off, &around(), &Others::default(), &BTreeMap::new());
    assert_eq!(problems[0].code, "sources-unchecked");
    assert!(!problems[0].blocks);
}

#[test]
fn many_problems_of_a_kind_are_counted() {
    let flowtable = |n: usize| Flowtable {
        table: "inet fast".into(),
        name: format!("f{n}"),
        devices: vec!["eth0".into()],
    };
    let others = Others { flowtables: (0..50).map(flowtable).collect(), ..Others::default() };
    let problems = judge(&needs(), &around(), &others, &BTreeMap::new());
    assert_eq!(problems.len(), NAMED_MOST);
    assert!(problems[NAMED_MOST - 1].text.contains("and 42 more"), "{}", problems[NAMED_MOST - 1]);
}
