//! Two hundred nodes between which links break, come back and break one way only, and which die and come back.
//!
//! `SENNIT_SIM_SEEDS` says how many runs there are (1), `SENNIT_SIM_SEED` which is the first (1). A failure names its seed.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use mesh_overlay::path::{Reach, Rung};
use sim::{Network, NodeId, Random, World};

const NODES: usize = 200;
/// Peers that each node chooses among the others; with those that choose it, twice as many.
const CHOSEN: usize = 5;
const CHANGES: usize = 15;
/// How soon each pair has to be reachable again.
const WITHIN: Duration = Duration::from_secs(10);

struct Field {
    blocked: BTreeSet<(NodeId, NodeId, Rung)>,
    random: Random,
}

impl World for Field {
    fn carries(&mut self, from: NodeId, to: NodeId, rung: Rung, _: u16) -> Option<Duration> {
        let delay = Duration::from_micros(200 + self.random.below(30_000) as u64);
        // A little is always lost.
        let passes = !self.blocked.contains(&(from, to, rung)) && !self.random.chance(0.01);
        passes.then_some(delay)
    }
}

fn number(name: &str, usual: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

fn lives(field: &Field, a: NodeId, b: NodeId, rung: Rung) -> bool {
    !field.blocked.contains(&(a, b, rung)) && !field.blocked.contains(&(b, a, rung))
}

// Changes some links or nodes.
fn change(network: &mut Network<Field>, pairs: &[(NodeId, NodeId)], random: &mut Random) {
    for _ in 0..60 {
        let (a, b) = pairs[random.below(pairs.len())];
        let rung = Rung::ENCRYPTED[random.below(2)];
        let field = &mut network.world.blocked;
        match random.below(4) {
            0 => drop(field.insert((a, b, rung))),
            1 => field.extend([(a, b, rung), (b, a, rung)]),
            _ => {
                for way in [(a, b), (b, a)] {
                    field.remove(&(way.0, way.1, rung));
                }
            }
        }
    }
    for _ in 0..4 {
        let id = random.below(NODES);
        if network.is_up(id) { network.kill(id) } else { network.revive(id, random) }
    }
}

fn wrong(network: &Network<Field>, pairs: &[(NodeId, NodeId)]) -> Vec<String> {
    let mut carrying: BTreeMap<(NodeId, NodeId), Option<(Rung, bool)>> = BTreeMap::new();
    for id in (0..NODES).filter(|id| network.is_up(*id)) {
        for (to, report) in network.reports(id) {
            // Whatever happens to carriers, the tunnel of this simulator takes everything.
            assert!(report.through.iter().all(|end| end.reach != Reach::Unreached), "{id} -> {to}");
            carrying.insert((id, to), report.carrying.map(|(rung, ..)| (rung, !report.blocked)));
        }
    }
    let mut wrong = Vec::new();
    for &(a, b) in pairs {
        if !network.is_up(a) || !network.is_up(b) {
            continue;
        }
        let living: Vec<Rung> =
            Rung::ENCRYPTED.into_iter().filter(|rung| lives(&network.world, a, b, *rung)).collect();
        for (from, to) in [(a, b), (b, a)] {
            let used = carrying[&(from, to)];
            let right = match used {
                Some((rung, true)) => living.contains(&rung),
                _ => living.is_empty(),
            };
            if !right {
                wrong.push(format!("{from} -> {to}: uses {used:?}, alive are {living:?}"));
            }
        }
    }
    wrong
}

// How often pairs have changed their minds since.
fn decisions(network: &Network<Field>, since: Instant) -> usize {
    let late = |id: NodeId| {
        network
            .reports(id)
            .map(|(_, report)| report.decisions.iter().filter(|one| one.at > since).count())
            .sum::<usize>()
    };
    (0..NODES).filter(|id| network.is_up(*id)).map(late).sum()
}

#[test]
fn every_pair_with_a_carrier_that_lives_is_reachable_within_ten_seconds() {
    let first = number("SENNIT_SIM_SEED", 1);
    for seed in first..first + number("SENNIT_SIM_SEEDS", 1) {
        let mut random = Random::new(seed);
        let mut chosen = BTreeSet::new();
        for id in 0..NODES {
            for _ in 0..CHOSEN {
                let other = random.below(NODES);
                if other != id {
                    chosen.insert((id.min(other), id.max(other)));
                }
            }
        }
        let pairs: Vec<(NodeId, NodeId)> = chosen.iter().copied().collect();
        let field = Field { blocked: BTreeSet::new(), random: random.clone() };
        let mut network =
            Network::new(NODES, field, &mut random, |a, b| chosen.contains(&(a.min(b), a.max(b))));
        network.run(WITHIN);
        assert_eq!(wrong(&network, &pairs), Vec::<String>::new(), "seed {seed}, at the start");
        for step in 0..CHANGES {
            change(&mut network, &pairs, &mut random);
            network.run(WITHIN);
            let wrong = wrong(&network, &pairs);
            assert!(wrong.is_empty(), "seed {seed}, change {step}: {wrong:?}");
        }
        // Nothing changes any more: after the last have gone back to what is better, nobody changes its mind.
        network.run(Duration::from_secs(330));
        let since = network.now();
        network.run(Duration::from_secs(60));
        let more = decisions(&network, since);
        assert!(more == 0, "seed {seed}: {more} decisions in a minute in which nothing changes");
        println!("seed {seed}: {} pairs, {} probes in {:?}", pairs.len(), network.sent, network.elapsed());
    }
}
