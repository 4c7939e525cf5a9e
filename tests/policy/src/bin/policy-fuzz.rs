//! Compares policies by chance with another reading of Calico's.

use clap::Parser;
use policy_tests::upstream::Cluster;
use policy_tests::upstream::random::Dice;

/// Asks clusters and flows by chance of two readings of Calico's policies, until they disagree.
#[derive(Debug, Parser)]
struct Cli {
    /// Clusters.
    #[arg(long, default_value_t = 100_000)]
    cases: u64,
    /// Flows in each.
    #[arg(long, default_value_t = 40)]
    flows: usize,
    /// The first seed: the others follow.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[expect(clippy::print_stdout, reason = "its output is what it is run for")]
fn main() -> anyhow::Result<()> {
    let Cli { cases, flows, seed } = Cli::parse();
    for seed in seed..seed.saturating_add(cases) {
        let mut dice = Dice::new(seed);
        let cluster = Cluster::random(&mut dice);
        cluster.compare(&mut dice, flows).map_err(|error| error.context(format!("seed {seed}")))?;
    }
    println!("{cases} clusters, {flows} flows each: 0 disagreements");
    Ok(())
}
