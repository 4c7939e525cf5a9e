//! Twelve nodes in four sites, and random faults one after the other: ports blocked at sites and nodes, one way or both, agents and devices
//! killed. After each, every pair with a carrier that lives is reachable within ten seconds; nothing is ever seen in clear.
//!
//! `SENNIT_CHAOS_CHANGES` says how many faults (6), `SENNIT_CHAOS_SEED` which ones; a run is the same for the same two.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use sim::Random;

const SITES: [&str; 4] = ["aws", "gcp", "azure", "onprem"];
const NODES_EACH: usize = 3;
const WIREGUARD: u16 = 51820;
const VXLAN: u16 = 4789;

/// Ports blocked at sites and nodes.
#[derive(Default)]
struct Blocks(BTreeMap<String, BTreeSet<u16>>);

impl Blocks {
    fn passes(&self, a: &str, b: &str, port: u16) -> bool {
        let site = |node: &str| node.split('-').next().unwrap_or_default().to_owned();
        let mut places = vec![a.to_owned(), b.to_owned()];
        if site(a) != site(b) {
            places.extend([site(a), site(b)]);
        }
        places.iter().all(|place| !self.0.get(place).is_some_and(|ports| ports.contains(&port)))
    }
}

fn nodes() -> Vec<String> {
    SITES.iter().flat_map(|site| (1..=NODES_EACH).map(move |n| format!("{site}-{n}"))).collect()
}

/// One fault, as a step.
fn fault(random: &mut Random, blocks: &mut Blocks, at: usize) -> String {
    let nodes = nodes();
    let node = nodes[random.below(nodes.len())].clone();
    let site = SITES[random.below(SITES.len())].to_owned();
    let blocked: Vec<String> = blocks.0.keys().cloned().collect();
    match random.below(10) {
        0..=3 => {
            let place = if random.chance(0.5) { site } else { node };
            let port = if random.chance(0.6) { WIREGUARD } else { VXLAN };
            let direction = ["both", "in", "out"][random.below(3)];
            blocks.0.entry(place.clone()).or_default().insert(port);
            format!(
                "- name: \"{at}: {port} is blocked at {place}, {direction}\"\n  block: {{at: {place}, protocol: udp, port: {port}, direction: {direction}}}\n"
            )
        }
        4..=6 if !blocked.is_empty() => {
            let place = &blocked[random.below(blocked.len())];
            blocks.0.remove(place);
            format!("- name: \"{at}: all is open at {place}\"\n  unblock: {place}\n")
        }
        7 => format!(
            "- name: \"{at}: the agent of {node} is killed\"\n  kill: {{nodes: {node}}}\n- start: {node}\n"
        ),
        8 => format!(
            "- name: \"{at}: the device of {node} is killed\"\n  kill: {{nodes: {node}, target: device}}\n"
        ),
        _ => format!(
            "- name: \"{at}: agent and device of {node} are killed\"\n  kill: {{nodes: {node}}}\n- kill: {{nodes: {node}, target: device}}\n- start: {node}\n"
        ),
    }
}

/// All pairs that have to reach each other, each once: the echo comes back.
fn reachable(blocks: &Blocks) -> String {
    let nodes = nodes();
    let mut pairs = String::new();
    for (n, a) in nodes.iter().enumerate() {
        let living = |b: &&String| [WIREGUARD, VXLAN].iter().any(|port| blocks.passes(a, b, *port));
        let to: Vec<String> = nodes[n + 1..].iter().filter(living).map(|b| format!("{b}-pod-1")).collect();
        if !to.is_empty() {
            let _ = writeln!(pairs, "    - {{from: {a}-pod-1, to: [{}]}}", to.join(", "));
        }
    }
    if pairs.is_empty() {
        return String::new();
    }
    format!(
        "- name: whoever has a way left is reachable within ten seconds\n  timeout: 10s\n  expect:\n    pairs:\n{}",
        pairs.replace("    - ", "      - ")
    )
}

#[test]
fn whatever_breaks_every_pair_with_a_way_left_finds_it() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (seed, changes) =
        (number("SENNIT_CHAOS_SEED").unwrap_or(20_261_124), number("SENNIT_CHAOS_CHANGES").unwrap_or(6));
    println!("SENNIT_CHAOS_SEED={seed} SENNIT_CHAOS_CHANGES={changes}");
    let (mut random, mut blocks) = (Random::new(seed), Blocks::default());
    let mut text = format!("name: chaos\ndescription: seed {seed}\nsites:\n");
    for site in SITES {
        let _ = writeln!(text, "  - {{name: {site}, nodes: {NODES_EACH}}}");
    }
    text.push_str("steps:\n");
    let mut steps =
        String::from("- capture: underlay\n- handshakes: all\n  timeout: 60s\n- expect: {matrix: pods}\n");
    for change in 1..=usize::try_from(changes).unwrap() {
        steps.push_str(&fault(&mut random, &mut blocks, change));
        steps.push_str(&reachable(&blocks));
    }
    if !blocks.0.is_empty() {
        steps.push_str("- unblock: all\n");
    }
    steps.push_str("- expect: {matrix: pods}\n  timeout: 30s\n- status: {where: [{path: \"/peers/*/path\", equals: direct}]}\n  timeout: 330s\n- assertNoCleartext: {}\n");
    for line in steps.lines() {
        let _ = writeln!(text, "  {line}");
    }
    e2e::passes("chaos", &text);
}
