//! What one tenant's policies cost the others of a node.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use mesh_policy::budget::{Budget, Budgets};
use mesh_policy::compile::Settings;
use mesh_policy::object::{Pod, PodSpec, PodStatus};
use mesh_policy::{Event, networkpolicy};
use serde_json::{Value, json};

use crate::Rig;
use crate::rig::{NODE, settings};

/// A pod of this node in a namespace.
pub fn pod(name: &str, namespace: &str, address: &str) -> Event {
    let from = |value: Value| serde_json::from_value(value).expect("metadata");
    let metadata = json!({"name": name, "namespace": namespace, "labels": {"app": name}});
    let spec: PodSpec = serde_json::from_value(json!({"nodeName": NODE})).expect("a spec");
    let status: PodStatus = serde_json::from_value(json!({"podIPs": [{"ip": address}]})).expect("a status");
    Event::Pod(Pod::new(from(metadata), spec, status).expect("a pod"))
}

/// A NetworkPolicy of a namespace for all of its pods.
pub fn policy(name: &str, namespace: &str, ingress: Value) -> Event {
    let spec = json!({"podSelector": {}, "ingress": ingress});
    Event::Policy(networkpolicy::read(
        &json!({"metadata": {"name": name, "namespace": namespace}, "spec": spec}),
    ))
}

/// As many ports as a policy may list, none beside another, for a block and for pods: no two policies list the same.
pub fn largest(index: u32, ports: u32) -> Value {
    let ports: Vec<Value> = (0..=ports)
        .filter(|n| *n != index)
        .map(|n| json!({"protocol": "TCP", "port": 1 + 2 * n + index % 2}))
        .collect();
    let block = json!({"ipBlock": {"cidr": format!("10.9.{}.0/24", index % 250)}});
    let pods = json!({"podSelector": {"matchLabels": {"x": format!("y{index}")}}});
    json!([{"from": [block, pods], "ports": ports}])
}

/// Everything is within its budget.
pub fn without_budgets() -> Settings {
    let none = Budget { rules: usize::MAX, elements: usize::MAX, bytes: u64::MAX };
    let budgets = Budgets { namespace: none, class: none, node: none, operator: none };
    Settings { budgets, ..settings() }
}

/// How long it takes until the kernel has an event.
///
/// # Errors
/// What the kernel says.
pub fn time(rig: &mut Rig, event: Event) -> anyhow::Result<Duration> {
    let began = Instant::now();
    rig.enforcer.compiler.take(event);
    rig.enforce()?;
    let took = began.elapsed();
    rig.settle()?;
    Ok(took)
}

/// How the time to enforce one more policy of a tenant grows with what it has, and what its neighbour's changes take beside that.
/// Ratios of one run: 1.0 is linear for the first, and "no difference" for the second.
///
/// # Errors
/// What the kernel says.
pub fn measure() -> anyhow::Result<String> {
    let mut text = String::new();
    let alone = victim(&mut rig(without_budgets())?)?;
    let ports = |index| largest(index, 4_000);
    let rules = |index| {
        json!((0..1_000).map(|n| json!({"from": [{"ipBlock": {"cidr": format!("10.9.{}.0/24", n % 250)}}], "ports": [{"port": 1 + n + index}]})).collect::<Vec<Value>>())
    };
    let kinds: [(&str, &dyn Fn(u32) -> Value); 2] = [("4,000 ports", &ports), ("1,000 rules", &rules)];
    for (what, ingress) in kinds {
        let mut first: Option<(u32, f64)> = None;
        for count in [2_u32, 4, 8, 16] {
            let mut rig = rig(without_budgets())?;
            let began = Instant::now();
            for index in 0..count {
                rig.enforcer.compiler.take(policy(&format!("p{index}"), "hostile", ingress(index)));
            }
            rig.enforce()?;
            let all = began.elapsed().as_secs_f64();
            rig.settle()?;
            let (base, each) = *first.get_or_insert((count, all));
            let linear = all / (each * f64::from(count) / f64::from(base));
            let beside = victim(&mut rig)?;
            writeln!(
                text,
                "{count:>3} policies of {what}: {:.0} ms until they stand, {linear:.2} of linear; a neighbour's new deny p50 {:.1} ms, p99 {:.1} ms, {:.2} of that alone",
                all * 1e3,
                beside.0 * 1e3,
                beside.1 * 1e3,
                beside.0 / alone.0,
            )?;
        }
    }
    Ok(text)
}

fn rig(settings: Settings) -> anyhow::Result<Rig> {
    // A thread goes into its network namespace for good.
    let mut rig = Rig::new(settings, Default::default()).context("it needs root")?;
    rig.tell([pod("h", "hostile", "10.0.1.1"), pod("v", "victim", "10.0.1.2")])?;
    Ok(rig)
}

/// Half and 99 of a hundred changes of the neighbour take no longer, in seconds.
fn victim(rig: &mut Rig) -> anyhow::Result<(f64, f64)> {
    let mut times = Vec::new();
    for turn in 0..100 {
        let rules = if turn % 2 == 0 { json!([]) } else { json!([{}]) };
        times.push(time(rig, policy("v", "victim", rules))?);
    }
    times.sort();
    Ok((times[50].as_secs_f64(), times[98].as_secs_f64()))
}
