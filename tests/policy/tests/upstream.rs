//! Policies mean what Calico means by them, by another reading of the same manifests.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

use policy_tests::upstream::Cluster;
use policy_tests::upstream::random::Dice;

/// A few seconds; `policy-fuzz` asks for more.
const CASES: u64 = 1_500;

#[test]
fn two_readings_of_calico_agree() {
    for seed in 1..=CASES {
        let mut dice = Dice::new(seed);
        let cluster = Cluster::random(&mut dice);
        if let Err(error) = cluster.compare(&mut dice, 40) {
            panic!("seed {seed}: {error}");
        }
    }
}
