//! What no public suite covers of Calico's policies.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use mesh_policy::compile::Settings;
use mesh_policy::flowlog::{Decision, Label, Listener};
use mesh_policy::object::Pod;
use mesh_policy::{Event, Kind};
use policy_tests::objects::{namespace, pod, policy, with_port};
use policy_tests::rig::settings;
use policy_tests::{Link, Packet, Rig};
use serde_json::{Value, json};

use crate::{TCP, UDP, address, in_rig, with_settings};

pub(crate) const A: [&str; 2] = ["10.0.1.1", "fd00:1::1"];
pub(crate) const B: [&str; 2] = ["10.0.1.2", "fd00:1::2"];
pub(crate) const C: [&str; 2] = ["10.0.1.3", "fd00:1::3"];

pub(crate) const CALICO: &str = "projectcalico.org/v3";

pub(crate) fn said(version: &str, kind: &str, metadata: Value, spec: Value) -> Event {
    let kind = Kind::of(version, kind).expect("a kind");
    let said = kind.read(&json!({"metadata": metadata, "spec": spec}));
    assert_eq!(said.refusal(), None);
    said.there()
}

pub(crate) fn calico(kind: &str, name: &str, spec: Value) -> Event {
    said(CALICO, kind, json!({"name": name, "namespace": "x"}), spec)
}

pub(crate) fn gone(kind: &str, name: &str) -> Event {
    let kind = Kind::of(CALICO, kind).expect("a kind");
    kind.gone(kind.id(Some("x"), name))
}

fn as_account(mut pod: Pod, account: &str) -> Event {
    pod.service_account = account.to_owned();
    let labels = std::sync::Arc::make_mut(&mut pod.labels);
    labels.insert("projectcalico.org/serviceaccount".to_owned(), account.to_owned());
    Event::Pod(pod)
}

/// What it is, from where, to where, protocol, port, and whether it gets through.
pub(crate) type Asked<'a> = (&'a str, &'a [&'a str; 2], &'a [&'a str; 2], u8, u16, bool);

/// Whether each of these gets through, of both families.
pub(crate) fn check(rig: &mut Rig, flows: &[Asked<'_>]) -> anyhow::Result<()> {
    for (what, from, to, protocol, port, expected) in flows {
        for family in 0..2 {
            let number = rig.number();
            let packet = Packet::first(address(from[family]), address(to[family]), *protocol, *port, number);
            assert_eq!(rig.passes(Link::Pods, &packet)?, *expected, "{what}: {packet:?}");
        }
    }
    Ok(())
}

#[test]
fn a_namespaced_policy_means_its_own_namespace() {
    in_rig("a_namespaced_policy_means_its_own_namespace", |mut rig| {
        let elsewhere = |name: &str, app: &str, addresses: &[&str]| {
            let mut pod = pod(name, app, addresses);
            pod.key.namespace = "y".to_owned();
            let labels = std::sync::Arc::make_mut(&mut pod.labels);
            labels.insert("projectcalico.org/namespace".to_owned(), "y".to_owned());
            Event::Pod(pod)
        };
        rig.tell([
            Event::Pod(pod("server", "server", &A)),
            Event::Pod(pod("client", "client", &B)),
            elsewhere("client", "client", &C),
            namespace("y", "team", "blue"),
        ])?;
        let with = |source: Value| {
            calico(
                "NetworkPolicy",
                "p",
                json!({"selector": "app == 'server'", "ingress": [{"action": "Allow", "source": source}]}),
            )
        };
        rig.tell([with(json!({"selector": "app == 'client'"}))])?;
        let both = |rig: &mut Rig, near, far| {
            check(
                rig,
                &[
                    ("near", &B, &A, TCP, 80, near),
                    ("far", &C, &A, TCP, 80, far),
                    ("not selected", &A, &B, TCP, 80, true),
                ],
            )
        };
        both(&mut rig, true, false)?;
        rig.tell([with(json!({"selector": "app == 'client'", "namespaceSelector": "team == 'blue'"}))])?;
        both(&mut rig, false, true)?;
        rig.tell([with(json!({"namespaceSelector": "all()"}))])?;
        both(&mut rig, true, true)?;
        rig.tell([with(json!({"namespaceSelector": "projectcalico.org/name == 'y'"}))])?;
        both(&mut rig, false, true)?;
        rig.tell([with(
            json!({"selector": "projectcalico.org/namespace == 'y'", "namespaceSelector": "all()"}),
        )])?;
        both(&mut rig, false, true)?;
        // One that says whom not means its own namespace then.
        rig.tell([with(json!({"notSelector": "app == 'other'"}))])?;
        both(&mut rig, true, false)?;
        // And all of it is gone with the policy: profiles of namespaces allow everything.
        rig.tell([gone("NetworkPolicy", "p")])?;
        both(&mut rig, true, true)
    });
}

#[test]
fn egress_rules_judge_what_is_begun_and_ports_of_both_ends() {
    in_rig("egress_rules_judge_what_is_begun_and_ports_of_both_ends", |mut rig| {
        rig.tell([
            Event::Pod(pod("client", "client", &A)),
            Event::Pod(with_port(pod("one", "server", &B), "web", 8080)),
            Event::Pod(with_port(pod("two", "server", &C), "web", 9090)),
            calico("GlobalNetworkPolicy", "p", json!({
                "selector": "app in {'client'}", "types": ["Egress"],
                "egress": [
                    {"action": "Deny", "protocol": "TCP", "source": {"ports": ["1000:2000"]}},
                    {"action": "Allow", "protocol": "TCP", "destination": {"ports": ["web", "443:445"], "notPorts": [444]}},
                    {"action": "Allow", "protocol": "UDP", "destination": {"notPorts": ["web", 53]}},
                    {"action": "Allow", "notProtocol": "TCP", "ipVersion": 6},
                ],
            })),
        ])?;
        check(
            &mut rig,
            &[
                ("web of the one", &A, &B, TCP, 8080, true),
                ("web of the other", &A, &B, TCP, 9090, false),
                ("web of the other", &A, &C, TCP, 9090, true),
                ("in the range", &A, &B, TCP, 445, true),
                ("left out of it", &A, &B, TCP, 444, false),
                ("any but web", &A, &B, UDP, 81, true),
                ("it judges no ingress", &B, &A, TCP, 1, true),
            ],
        )?;
        for (to, port, family, expected) in
            [(B, 8080, 0, false), (B, 8080, 1, true), (B, 53, 0, false), (B, 9090, 0, true)]
        {
            let number = rig.number();
            let packet = Packet::first(address(A[family]), address(to[family]), UDP, port, number);
            assert_eq!(rig.passes(Link::Pods, &packet)?, expected, "{packet:?}");
        }
        for (source_port, expected) in [(999, true), (1000, false), (2000, false), (2001, true)] {
            let number = rig.number();
            let packet =
                Packet { source_port, ..Packet::first(address(A[0]), address(B[0]), TCP, 8080, number) };
            assert_eq!(rig.passes(Link::Pods, &packet)?, expected, "from {source_port}");
            // What answers is no other flow.
            let number = rig.number();
            assert_eq!(rig.passes(Link::Pods, &packet.answer(number))?, expected, "to {source_port}");
        }
        Ok(())
    });
}

#[test]
fn service_accounts_are_meant_by_name_and_by_label() {
    in_rig("service_accounts_are_meant_by_name_and_by_label", |mut rig| {
        let account = |name: &str, labels: Value| {
            said(
                "v1",
                "ServiceAccount",
                json!({"name": name, "namespace": "x", "labels": labels}),
                Value::Null,
            )
        };
        let policy = |spec: Value| calico("GlobalNetworkPolicy", "p", spec);
        rig.tell([
            as_account(pod("server", "server", &A), "servers"),
            as_account(pod("one", "one", &B), "alice"),
            as_account(pod("two", "two", &C), "bob"),
            policy(json!({
                "serviceAccountSelector": "projectcalico.org/name == 'servers'",
                "ingress": [{"action": "Allow", "source": {"serviceAccounts": {"names": ["alice"]}}}],
            })),
        ])?;
        let both = |rig: &mut Rig, alice, bob| {
            check(
                rig,
                &[
                    ("alice", &B, &A, TCP, 80, alice),
                    ("bob", &C, &A, TCP, 80, bob),
                    ("not selected", &A, &C, TCP, 80, true),
                ],
            )
        };
        both(&mut rig, true, false)?;
        rig.tell([policy(json!({
            "serviceAccountSelector": "projectcalico.org/name == 'servers'",
            "ingress": [{"action": "Allow", "source": {"serviceAccounts": {"selector": "role == 'reader'"}}}],
        }))])?;
        both(&mut rig, false, false)?;
        rig.tell([account("bob", json!({"role": "reader"}))])?;
        both(&mut rig, false, true)?;
        rig.tell([account("bob", json!({})), account("alice", json!({"role": "reader"}))])?;
        both(&mut rig, true, false)
    });
}

#[test]
fn network_sets_are_selected_like_pods_and_change_at_once() {
    in_rig("network_sets_are_selected_like_pods_and_change_at_once", |mut rig| {
        let set = |kind: &str, name: &str, labels: Value, nets: &[&str]| {
            said(
                CALICO,
                kind,
                json!({"name": name, "namespace": "x", "labels": labels}),
                json!({"nets": nets}),
            )
        };
        let (near, far) = (["192.0.2.1", "2001:db8::1"], ["198.51.100.1", "2001:db8:1::1"]);
        rig.tell([
            Event::Pod(pod("server", "server", &A)),
            Event::Pod(pod("client", "client", &B)),
            set("GlobalNetworkSet", "g", json!({"zone": "near"}), &["192.0.2.0/24", "2001:db8::/64"]),
            calico(
                "GlobalNetworkPolicy",
                "p",
                json!({
                    "selector": "app == 'server'", "order": 5,
                    "ingress": [{"action": "Allow", "source": {"selector": "zone == 'near'"}}],
                }),
            ),
        ])?;
        let both = |rig: &mut Rig, first, second, pod| {
            check(
                rig,
                &[
                    ("near", &near, &A, TCP, 80, first),
                    ("far", &far, &A, TCP, 80, second),
                    ("pod", &B, &A, TCP, 80, pod),
                ],
            )
        };
        both(&mut rig, true, false, false)?;
        rig.tell([set(
            "GlobalNetworkSet",
            "g",
            json!({"zone": "near"}),
            &["198.51.100.1", "2001:db8:1::1"],
        )])?;
        both(&mut rig, false, true, false)?;
        rig.tell([set("NetworkSet", "n", json!({"zone": "near"}), &["192.0.2.1/32", "2001:db8::1/128"])])?;
        both(&mut rig, true, true, false)?;
        // Without a namespaceSelector a namespaced policy means no global set; with global() nothing else.
        rig.tell([
            gone("GlobalNetworkPolicy", "p"),
            calico("NetworkPolicy", "p", json!({"selector": "app == 'server'", "ingress": [{"action": "Allow", "source": {"selector": "zone == 'near'"}}]})),
        ])?;
        both(&mut rig, true, false, false)?;
        let source = json!({"selector": "all()", "namespaceSelector": "global()"});
        rig.tell([calico(
            "NetworkPolicy",
            "p",
            json!({"selector": "app == 'server'", "ingress": [{"action": "Allow", "source": source}]}),
        )])?;
        both(&mut rig, false, true, false)?;
        // A label that is not there is not the one asked for: known endpoints alone, or everybody else.
        let ingress = |source: Value| {
            calico(
                "NetworkPolicy",
                "p",
                json!({"selector": "app == 'server'", "ingress": [{"action": "Allow", "source": source}]}),
            )
        };
        rig.tell([ingress(json!({"selector": "zone != 'near'"}))])?;
        both(&mut rig, false, false, true)?;
        rig.tell([gone("NetworkPolicy", "p"), calico("GlobalNetworkPolicy", "p", json!({
            "selector": "app == 'server'", "ingress": [{"action": "Allow", "source": {"notSelector": "zone == 'near'"}}],
        }))])?;
        both(&mut rig, false, false, true)?;
        check(&mut rig, &[("nobody's", &["203.0.113.9", "2001:db8:9::9"], &A, TCP, 80, true)])
    });
}

#[test]
fn tiers_decide_by_their_order_and_end_as_they_say() {
    in_rig("tiers_decide_by_their_order_and_end_as_they_say", |mut rig| {
        let tier = |order: f64, end: &str| {
            said(CALICO, "Tier", json!({"name": "first"}), json!({"order": order, "defaultAction": end}))
        };
        let with_tier = |name: &str, order: Value, action: &str| {
            calico(
                "GlobalNetworkPolicy",
                name,
                json!({
                    "tier": "first", "order": order, "selector": "app == 'server'",
                    "ingress": [{"action": action, "protocol": "TCP", "destination": {"ports": [80]}}],
                }),
            )
        };
        let allow = policy(
            "k",
            json!({"podSelector": {"matchLabels": {"app": "server"}}, "ingress": [{"ports": [{"port": 81}]}]}),
        );
        rig.tell([
            Event::Pod(pod("server", "server", &A)),
            Event::Pod(pod("client", "client", &B)),
            tier(10.0, "Pass"),
            with_tier("b", json!(2), "Deny"),
            allow,
        ])?;
        let both = |rig: &mut Rig, port_80, port_81| {
            check(rig, &[("80", &B, &A, TCP, 80, port_80), ("81", &B, &A, TCP, 81, port_81)])
        };
        both(&mut rig, false, true)?;
        rig.tell([with_tier("a", json!(1), "Allow")])?;
        both(&mut rig, true, true)?;
        // Without an order it comes last.
        rig.tell([with_tier("a", Value::Null, "Allow")])?;
        both(&mut rig, false, true)?;
        rig.tell([gone("GlobalNetworkPolicy", "b")])?;
        both(&mut rig, true, true)?;
        rig.tell([tier(10.0, "Deny")])?;
        both(&mut rig, true, false)?;
        // Behind the developers' tier it has nothing to say any more of what that denies.
        rig.tell([tier(2e6, "Pass")])?;
        both(&mut rig, false, true)?;
        rig.tell([gone("GlobalNetworkPolicy", "a")])?;
        both(&mut rig, false, true)
    });
}

/// What is told of these packets, by who decided.
fn told(rig: &mut Rig, group: u16, packets: &[Packet]) -> anyhow::Result<Vec<(bool, Decision)>> {
    let mut listener = Listener::new(group, 1 << 20)?;
    let passed = rig.pass(Link::Pods, packets)?;
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut decisions = BTreeMap::new();
    while decisions.len() < packets.len() && Instant::now() < deadline {
        listener.receive(|logged| {
            let number = policy_tests::packet::number(logged.packet);
            let label = Label::parse(logged.prefix);
            if let (Some(number), Some(label)) = (number, label) {
                // What would be is told before what is.
                decisions.entry(number).or_insert(label.decision());
            }
        })?;
        std::thread::yield_now();
    }
    let each = packets.iter().zip(passed);
    each.map(|(packet, passed)| {
        Ok((passed, *decisions.get(&packet.number).context("nothing is told of a packet")?))
    })
    .collect()
}

#[test]
fn what_is_staged_decides_nothing_and_tells_what_it_would_deny() {
    let logged = Settings {
        log: mesh_policy::compile::Logging { group: 5181, denied: 1000, allowed: 1000 },
        ..settings()
    };
    with_settings("what_is_staged_decides_nothing_and_tells_what_it_would_deny", logged, |mut rig| {
        let spec = json!({"podSelector": {"matchLabels": {"app": "server"}}, "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "friend"}}}]}]});
        let tells = |rig: &mut Rig, from: &str| {
            let number = rig.number();
            told(rig, 5181, &[Packet::first(address(from), address(A[0]), TCP, 80, number)]).map(|all| all[0])
        };
        rig.tell([
            Event::Pod(pod("server", "server", &A)),
            Event::Pod(pod("friend", "friend", &B)),
            Event::Pod(pod("other", "other", &C)),
            said(
                CALICO,
                "StagedKubernetesNetworkPolicy",
                json!({"name": "s", "namespace": "x"}),
                spec.clone(),
            ),
        ])?;
        assert_eq!(tells(&mut rig, C[0])?, (true, Decision::WouldBeDenied));
        // An annotation does the same with any policy.
        let kind = Kind::of("networking.k8s.io/v1", "NetworkPolicy").expect("a kind");
        let metadata = json!({"name": "a", "namespace": "x", "annotations": {"sennit.dev/audit": "true"}});
        rig.tell([
            gone("StagedKubernetesNetworkPolicy", "s"),
            kind.read(&json!({"metadata": metadata, "spec": spec})).there(),
        ])?;
        assert_eq!(tells(&mut rig, C[0])?, (true, Decision::WouldBeDenied));
        rig.tell([
            kind.read(&json!({"metadata": {"name": "a", "namespace": "x"}, "spec": spec})).there(),
            calico("StagedGlobalNetworkPolicy", "d", json!({
                "stagedAction": "Set", "order": 1, "selector": "app == 'server'", "ingress": [{"action": "Deny"}],
            })),
        ])?;
        assert!(!tells(&mut rig, C[0])?.0, "what is enforced is enforced");
        let number = rig.number();
        let friend = Packet::first(address(B[0]), address(A[0]), TCP, 80, number);
        assert!(rig.passes(Link::Pods, &friend)?);
        // What is staged under the name of what is enforced stands in its place.
        let friends = |kind: &str, action: &str, staged: &str| {
            let mut spec = json!({
                "selector": "app == 'server'", "order": 1,
                "ingress": [{"action": action, "source": {"selector": "app == 'friend'"}}, {"action": "Pass"}],
            });
            if !staged.is_empty() {
                spec["stagedAction"] = json!(staged);
            }
            calico(kind, "f", spec)
        };
        rig.tell([gone("StagedGlobalNetworkPolicy", "d"), friends("GlobalNetworkPolicy", "Allow", "")])?;
        assert_eq!(tells(&mut rig, B[0])?, (true, Decision::Allowed));
        rig.tell([friends("StagedGlobalNetworkPolicy", "Deny", "Set")])?;
        assert_eq!(tells(&mut rig, B[0])?, (true, Decision::WouldBeDenied));
        rig.tell([friends("StagedGlobalNetworkPolicy", "Deny", "Ignore")])?;
        assert_eq!(tells(&mut rig, B[0])?, (true, Decision::Allowed));
        // Without it others isolate the server.
        let nobody = json!({"podSelector": {"matchLabels": {"app": "server"}}, "ingress": []});
        rig.tell([
            kind.read(&json!({"metadata": {"name": "a", "namespace": "x"}, "spec": nobody})).there(),
            friends("StagedGlobalNetworkPolicy", "Deny", "Delete"),
        ])?;
        assert_eq!(tells(&mut rig, B[0])?, (true, Decision::WouldBeDenied));
        rig.tell([gone("StagedGlobalNetworkPolicy", "f")])?;
        assert_eq!(tells(&mut rig, B[0])?, (true, Decision::Allowed));
        Ok(())
    });
}

#[test]
fn pods_in_the_hosts_network_are_meant_by_nobody() {
    in_rig("pods_in_the_hosts_network_are_meant_by_nobody", |mut rig| {
        let host = Pod { host_network: true, ..pod("host", "client", &B) };
        rig.tell([
            Event::Pod(pod("server", "server", &A)),
            Event::Pod(host),
            Event::Pod(pod("client", "client", &C)),
            calico("GlobalNetworkPolicy", "p", json!({
                "selector": "app == 'server'", "ingress": [{"action": "Allow", "source": {"selector": "app == 'client'"}}],
            })),
        ])?;
        check(
            &mut rig,
            &[("in the host's network", &B, &A, TCP, 80, false), ("a pod", &C, &A, TCP, 80, true)],
        )
    });
}

#[test]
fn a_network_set_changes_prefix_by_prefix() {
    in_rig("a_network_set_changes_prefix_by_prefix", |mut rig| {
        let set = |nets: &[&str]| {
            let metadata = json!({"name": "feed", "labels": {"feed": "bad"}});
            said(CALICO, "GlobalNetworkSet", metadata, json!({"nets": nets}))
        };
        let rules = json!([{"action": "Deny", "source": {"selector": "feed == 'bad'"}}, {"action": "Allow"}]);
        rig.tell([
            Event::Pod(pod("server", "server", &A)),
            Event::Pod(pod("client", "client", &B)),
            Event::Pod(pod("other", "other", &C)),
            calico("GlobalNetworkPolicy", "p", json!({"types": ["Ingress"], "ingress": rules})),
        ])?;
        // Neighbours become one range, and two again; a wider prefix takes both in and leaves them.
        for (nets, b, c) in [
            (vec![B[0], B[1]], false, true),
            (vec![B[0], B[1], C[0], C[1]], false, false),
            (vec![C[0], C[1]], true, false),
            (vec![C[0], C[1], "10.0.1.0/24", "fd00:1::/64"], false, false),
            (vec!["10.0.1.0/24", "fd00:1::/64"], false, false),
            (vec![B[0], B[1]], false, true),
            (vec![], true, true),
        ] {
            rig.tell([set(&nets)])?;
            check(&mut rig, &[("B", &B, &A, TCP, 80, b), ("C", &C, &A, TCP, 80, c)])?;
        }
        Ok(())
    });
}

#[test]
fn names_of_ports_need_no_protocol() {
    in_rig("names_of_ports_need_no_protocol", |mut rig| {
        let rules = |field: &str| json!([{"action": "Allow", "destination": {field: ["http"]}}]);
        rig.tell([
            Event::Pod(with_port(pod("server", "server", &A), "http", 80)),
            Event::Pod(pod("client", "client", &B)),
            calico("NetworkPolicy", "p", json!({"selector": "app == 'server'", "ingress": rules("ports")})),
        ])?;
        let asked = |named: bool| {
            [
                ("the port of the name", &B, &A, TCP, 80, named),
                ("another", &B, &A, TCP, 81, !named),
                ("of another protocol", &B, &A, UDP, 80, named),
            ]
        };
        check(&mut rig, &asked(true))?;
        let not = json!({"selector": "app == 'server'", "ingress": rules("notPorts")});
        rig.tell([calico("NetworkPolicy", "p", not)])?;
        check(&mut rig, &asked(false))
    });
}
