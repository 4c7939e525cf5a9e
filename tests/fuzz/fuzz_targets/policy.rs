//! Any manifests: what is read of them is compiled, rendered and evaluated without a panic; a refused policy allows nothing; and taking
//! all of it at once or one by one comes to the same.
#![no_main]

use std::collections::BTreeMap;
use std::net::IpAddr;

use libfuzzer_sys::fuzz_target;
use mesh_agent::manifest::{self, Object};
use mesh_policy::compile::{Logging, MASK, Settings};
use mesh_policy::explain::explain;
use mesh_policy::failsafe::FailSafe;
use mesh_policy::render::{self, Slot};
use mesh_policy::world::Node;
use mesh_policy::{Compiler, Event, Flow, Protocol, Said, evaluate, networkpolicy};

fn settings() -> Settings {
    let net = |text: &str| text.parse().ok();
    Settings {
        node: "n".to_owned(),
        tunnels: ["sennit0".to_owned()].into(),
        scope: ["10.0.0.0/8", "fd00::/8"].into_iter().filter_map(net).collect(),
        own: ["10.1.0.0/24"].into_iter().filter_map(net).collect(),
        address: None,
        keyless: [].into(),
        carriers: [51820].into(),
        failsafe: FailSafe::default(),
        resolvers: None,
        strangers: false,
        outside_prefixes: true,
        check_sources: false,
        outside: [].into(),
        vxlan: [].into(),
        audit: false,
        log: Logging { group: 5, denied: 10, allowed: 1 },
        mask: MASK,
        budgets: Default::default(),
    }
}

fn compiler() -> Compiler {
    let mut compiler = Compiler::new(settings());
    let address = |text: &str| text.parse().ok();
    let node = Node {
        site: Some("s".to_owned()),
        addresses: ["10.9.0.1", "fd00:9::1"].into_iter().filter_map(address).collect(),
        ..Node::default()
    };
    compiler.configure(settings(), BTreeMap::from([("n".to_owned(), node)]));
    compiler
}

fuzz_target!(|data: &[u8]| {
    let Ok(parsed) = manifest::parse(data) else { return };
    let events: Vec<Event> = parsed
        .objects
        .into_iter()
        .filter_map(|object| match object {
            Object::Pod(pod) => Some(Event::Pod(pod)),
            Object::Namespace(namespace) => Some(Event::Namespace(namespace)),
            Object::Said(said) => {
                if let Said::Policy(read) = &said
                    && read.fault.is_some()
                    && read.policy.id.kind == networkpolicy::KIND
                    && !read.policy.staged
                {
                    assert!(read.policy.ingress.iter().chain(&read.policy.egress).all(Vec::is_empty));
                    assert!(read.policy.ingress.is_some() || read.policy.egress.is_some());
                }
                Some(said.there())
            }
            Object::Node(_) | Object::Mesh(..) => None,
        })
        .collect();
    let (mut whole, mut steps) = (compiler(), compiler());
    for event in events {
        whole.take(event.clone());
        steps.take(event);
        steps.update();
    }
    whole.update();
    steps.update();
    assert_eq!(whole.ruleset(), steps.ruleset());
    let text = render::ruleset(whole.ruleset(), Slot::A);
    assert!(
        text.lines().all(|line| !line.contains(';')
            || line.contains("hook")
            || line.trim_start().starts_with("type")
            || line.contains("flags")),
        "{text}"
    );
    let state = whole.state();
    let addresses: Vec<IpAddr> = state
        .world
        .pods()
        .flat_map(|pod| pod.addresses.iter().copied())
        .take(4)
        .chain(["10.9.0.1", "fd00:9::1"].into_iter().filter_map(|text| text.parse().ok()))
        .collect();
    for source in &addresses {
        for destination in addresses.iter().filter(|one| one.is_ipv4() == source.is_ipv4()) {
            let flow = Flow::new(*source, *destination, Protocol::TCP, 80);
            let judgement = evaluate(&state.world, &state.policies, &flow);
            let told = explain(state, &flow);
            assert_eq!(
                judgement.allowed(),
                told.lines().next().is_some_and(|line| line.ends_with("allowed"))
            );
        }
    }
});
