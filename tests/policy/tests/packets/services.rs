//! Rules that mean Services, by their endpoints.

use mesh_policy::{Event, Kind};
use policy_tests::objects::pod;
use policy_tests::{Link, Packet, Rig};
use serde_json::{Value, json};

use crate::calico::{A, B, C, calico, check, gone};
use crate::{TCP, UDP, address, in_rig};

/// The two EndpointSlices that a Service of two families has.
fn service(name: &str, addresses: &[&[&str; 2]], ports: Value) -> Vec<Event> {
    let slice = |family: usize| {
        let kind = Kind::of("discovery.k8s.io/v1", "EndpointSlice").expect("a kind");
        let endpoints: Vec<Value> = addresses
            .iter()
            .map(|both| json!({"addresses": [both[family]], "conditions": {"ready": false}}))
            .collect();
        let labels = json!({"kubernetes.io/service-name": name});
        let metadata = json!({"name": format!("{name}-{family}"), "namespace": "x", "labels": labels});
        let said = kind.read(&json!({"metadata": metadata, "endpoints": endpoints, "ports": ports}));
        assert_eq!(said.refusal(), None);
        said.there()
    };
    vec![slice(0), slice(1)]
}

fn with_pods(rig: &mut Rig) -> anyhow::Result<()> {
    rig.tell([("a", &A), ("b", &B), ("c", &C)].map(|(name, both)| Event::Pod(pod(name, name, both))))
}

const OUT: [&str; 2] = ["192.0.2.1", "2001:db8::1"];

#[test]
fn an_egress_rule_means_what_a_service_serves_now() {
    in_rig("an_egress_rule_means_what_a_service_serves_now", |mut rig| {
        with_pods(&mut rig)?;
        let ports = json!([{"name": "web", "port": 8080, "protocol": "TCP"}]);
        rig.tell(service("web", &[&A], ports.clone()))?;
        let rule = |action: &str, more: Value| {
            let mut rules = vec![json!({"action": action, "destination": {"services": {"name": "web"}}})];
            rules.extend(more.as_array().cloned().unwrap_or_default());
            calico(
                "NetworkPolicy",
                "p",
                json!({"selector": "app == 'b'", "types": ["Egress"], "egress": rules}),
            )
        };
        rig.tell([rule("Allow", json!([]))])?;
        let both = |rig: &mut Rig, a, c, out| {
            check(
                rig,
                &[
                    ("a's port", &B, &A, TCP, 8080, a),
                    ("a's other port", &B, &A, TCP, 80, false),
                    ("another protocol", &B, &A, UDP, 8080, false),
                    ("c's port", &B, &C, TCP, 8080, c),
                    ("outside", &B, &OUT, TCP, 8080, out),
                    ("whom it does not select", &C, &A, TCP, 80, true),
                ],
            )
        };
        both(&mut rig, true, false, false)?;
        // A flow to an endpoint that is one no more is cut.
        let number = rig.number();
        let begun = Packet::first(address(B[0]), address(A[0]), TCP, 8080, number);
        assert!(rig.passes(Link::Pods, &begun)?);
        rig.tell(service("web", &[&C, &OUT], ports))?;
        both(&mut rig, false, true, true)?;
        let number = rig.number();
        assert!(!rig.passes(Link::Pods, &Packet { number, ..begun })?);
        // Another port of the same endpoints.
        rig.tell(service("web", &[&A, &C], json!([{"port": 80}, {"port": 53, "protocol": "UDP"}])))?;
        check(
            &mut rig,
            &[
                ("80", &B, &A, TCP, 80, true),
                ("53", &B, &C, UDP, 53, true),
                ("8080", &B, &A, TCP, 8080, false),
            ],
        )?;
        // The other way round: all but that.
        rig.tell([rule("Deny", json!([{"action": "Allow"}]))])?;
        check(&mut rig, &[("80", &B, &A, TCP, 80, false), ("8080", &B, &A, TCP, 8080, true)])?;
        let slice = Kind::of("discovery.k8s.io/v1", "EndpointSlice").expect("a kind");
        rig.tell([0, 1].map(|family| slice.gone(slice.id(Some("x"), &format!("web-{family}")))))?;
        check(&mut rig, &[("80", &B, &A, TCP, 80, true)])?;
        rig.tell([gone("NetworkPolicy", "p")])
    });
}

#[test]
fn an_ingress_rule_means_a_services_endpoints_by_their_addresses() {
    in_rig("an_ingress_rule_means_a_services_endpoints_by_their_addresses", |mut rig| {
        with_pods(&mut rig)?;
        rig.tell(service("clients", &[&B, &OUT], json!([{"port": 1}])))?;
        rig.tell([calico("GlobalNetworkPolicy", "p", json!({
            "selector": "app == 'a'",
            "ingress": [{"action": "Allow", "source": {"services": {"name": "clients", "namespace": "x"}}}],
        }))])?;
        let both = |rig: &mut Rig, b, c, out| {
            check(
                rig,
                &[("b", &B, &A, TCP, 80, b), ("c", &C, &A, UDP, 81, c), ("outside", &OUT, &A, TCP, 80, out)],
            )
        };
        both(&mut rig, true, false, true)?;
        rig.tell(service("clients", &[&C], json!([])))?;
        both(&mut rig, false, true, false)?;
        // One of the same name in another namespace is another.
        rig.tell([calico("GlobalNetworkPolicy", "p", json!({
            "selector": "app == 'a'",
            "ingress": [{"action": "Allow", "source": {"services": {"name": "clients", "namespace": "y"}}}],
        }))])?;
        both(&mut rig, false, false, false)
    });
}
