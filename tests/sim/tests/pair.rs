//! Two nodes and what may lie between them.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::time::Duration;

use mesh_overlay::path::Rung;
use sim::{Network, NodeId, Random, World};

/// A network that blocks what it is told to, loses at random, and carries packets up to a size.
struct Between {
    blocked: BTreeSet<(NodeId, NodeId, Rung)>,
    loss: f64,
    mtu: u16,
    delay: Duration,
    random: Random,
}

impl World for Between {
    fn carries(&mut self, from: NodeId, to: NodeId, rung: Rung, size: u16) -> Option<Duration> {
        let outer = if rung == Rung::Vxlan { size + 50 } else { size };
        let passes =
            !self.blocked.contains(&(from, to, rung)) && outer <= self.mtu && !self.random.chance(self.loss);
        passes.then_some(self.delay)
    }
}

fn pair(delay: u64) -> Network<Between> {
    let mut random = Random::new(1);
    let between = Between {
        blocked: BTreeSet::new(),
        loss: 0.0,
        mtu: 1500,
        delay: Duration::from_millis(delay),
        random: random.clone(),
    };
    let mut network = Network::new(2, between, &mut random, |_, _| true);
    network.run(Duration::from_secs(5));
    network
}

fn both(network: &Network<Between>) -> [Option<(Rung, bool)>; 2] {
    [network.carrying(0, 1), network.carrying(1, 0)]
}

const DIRECT: [Option<(Rung, bool)>; 2] = [Some((Rung::Direct, true)); 2];
const VXLAN: [Option<(Rung, bool)>; 2] = [Some((Rung::Vxlan, true)); 2];

fn block(network: &mut Network<Between>, ways: &[(NodeId, NodeId)], rung: Rung) {
    network.world.blocked.extend(ways.iter().map(|(from, to)| (*from, *to, rung)));
}

/// How long until both use this.
fn until(network: &mut Network<Between>, wanted: [Option<(Rung, bool)>; 2], most: u64) -> Duration {
    let begun = network.elapsed();
    while both(network) != wanted {
        network.run(Duration::from_millis(20));
        let passed = network.elapsed() - begun;
        assert!(passed < Duration::from_millis(most), "{passed:?}: {:?}", both(network));
    }
    network.elapsed() - begun
}

const BOTH_WAYS: [(NodeId, NodeId); 2] = [(0, 1), (1, 0)];

#[test]
fn a_blocked_carrier_is_left_within_three_seconds_and_taken_up_again_when_it_has_lived_for_a_while() {
    for delay in [0, 20, 150] {
        for ways in [&BOTH_WAYS[..], &[(0, 1)], &[(1, 0)]] {
            for phase in (0..1500).step_by(170) {
                let mut network = pair(delay);
                assert_eq!(both(&network), DIRECT, "delay {delay}");
                network.run(Duration::from_millis(phase));
                block(&mut network, ways, Rung::Direct);
                until(&mut network, VXLAN, if delay < 100 { 3000 } else { 4500 });
                network.run(Duration::from_secs(20));
                assert_eq!(both(&network), VXLAN);
                network.world.blocked.clear();
                let back = until(&mut network, DIRECT, 12_000);
                assert!(back >= Duration::from_secs(5), "{back:?}");
            }
        }
    }
}

#[test]
fn what_is_blocked_altogether_is_said_and_found_again() {
    let mut network = pair(5);
    block(&mut network, &BOTH_WAYS, Rung::Direct);
    block(&mut network, &BOTH_WAYS, Rung::Vxlan);
    network.run(Duration::from_secs(4));
    assert_eq!(both(&network), [Some((Rung::Direct, false)); 2]);
    network.run(Duration::from_secs(600));
    network.world.blocked.retain(|(.., rung)| *rung == Rung::Direct);
    until(&mut network, VXLAN, 10_000);
    network.world.blocked.clear();
    until(&mut network, DIRECT, 12_000);
}

#[test]
fn thirty_percent_loss_each_way_makes_nobody_leave() {
    let mut network = pair(10);
    network.world.loss = 0.3;
    network.run(Duration::from_secs(1800));
    let report = network.report(0, 1).unwrap();
    assert_eq!(report.decisions.len(), 1, "{:?}", report.decisions);
    assert_eq!(both(&network), DIRECT);
    assert!((0.3..0.75).contains(&report.lines[0].loss), "{:?}", report.lines[0]);
    assert_eq!(report.mtu, Some(1500));
}

#[test]
fn a_firewall_that_flaps_is_not_followed_each_time() {
    let mut network = pair(1);
    let begun = network.sent;
    for _ in 0..60 {
        block(&mut network, &BOTH_WAYS, Rung::Direct);
        network.run(Duration::from_secs(10));
        network.world.blocked.clear();
        network.run(Duration::from_secs(10));
        // Whatever is used lives.
        assert!(both(&network).iter().all(|way| way.unwrap().1));
    }
    let changes = network.report(0, 1).unwrap().decisions.len();
    assert!(changes <= 12, "{changes} decisions in 20 minutes");
    assert!(network.sent - begun < 1200 * 8, "{} probes", network.sent - begun);
}

#[test]
fn an_mtu_that_shrinks_is_known_at_both_ends_within_five_seconds() {
    for phase in (0..3000).step_by(310) {
        let mut network = pair(2);
        network.run(Duration::from_millis(phase));
        assert_eq!(network.report(0, 1).unwrap().mtu, Some(1500));
        network.world.mtu = 1300;
        let begun = network.elapsed();
        while [network.report(0, 1), network.report(1, 0)]
            .iter()
            .any(|end| end.as_ref().unwrap().mtu != Some(1300))
        {
            network.run(Duration::from_millis(20));
            let passed = network.elapsed() - begun;
            assert!(passed < Duration::from_secs(5), "{:?}", network.report(0, 1).unwrap());
        }
        assert_eq!(both(&network), DIRECT, "small packets pass");
    }
}

#[test]
fn an_idle_pair_costs_less_than_one_packet_a_second_at_each_end() {
    let mut network = pair(1);
    let before = network.sent;
    network.run(Duration::from_secs(600));
    let rate = (network.sent - before) as f64 / 600.0 / 2.0;
    assert!((0.5..1.0).contains(&rate), "{rate}");
}

#[test]
fn a_pair_that_reaches_each_other_nowhere_costs_little() {
    let mut network = pair(1);
    block(&mut network, &BOTH_WAYS, Rung::Direct);
    block(&mut network, &BOTH_WAYS, Rung::Vxlan);
    network.run(Duration::from_secs(10));
    let before = network.sent;
    network.run(Duration::from_secs(600));
    let rate = (network.sent - before) as f64 / 600.0 / 2.0;
    assert!((0.1..1.0).contains(&rate), "{rate}");
}

#[test]
fn after_trouble_a_pair_is_as_quiet_as_before() {
    let mut network = pair(1);
    block(&mut network, &[(0, 1)], Rung::Direct);
    network.run(Duration::from_secs(10));
    network.world.blocked.clear();
    network.run(Duration::from_secs(30));
    assert_eq!(both(&network), DIRECT);
    let before = network.sent;
    network.run(Duration::from_secs(120));
    let rate = (network.sent - before) as f64 / 120.0 / 2.0;
    assert!(rate < 1.0, "{rate}");
}

#[test]
fn a_narrow_path_is_measured_at_any_distance_and_stays_alive_meanwhile() {
    for delay in [1, 30, 55, 75, 110, 150] {
        let mut network = pair(delay);
        network.run(Duration::from_secs(10));
        network.world.mtu = 1300;
        network.run(Duration::from_secs(20));
        for (from, to) in [(0, 1), (1, 0)] {
            let report = network.report(from, to).unwrap();
            assert_eq!(report.mtu, Some(1300), "delay {delay}: {report:?}");
            assert_eq!(report.decisions.len(), 1, "delay {delay}: {:?}", report.decisions);
        }
    }
}

#[test]
fn a_path_that_gets_wide_again_is_found_so() {
    let mut network = pair(2);
    network.world.mtu = 1300;
    network.run(Duration::from_secs(30));
    assert_eq!(network.report(0, 1).unwrap().mtu, Some(1300));
    network.world.mtu = 1500;
    network.run(Duration::from_secs(700));
    assert_eq!(network.report(0, 1).unwrap().mtu, Some(1500));
}
