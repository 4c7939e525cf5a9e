//! The suites beside plain tunnels: silent peers, many peers, attacks.

use std::time::Duration;

use anyhow::{Result, anyhow};

use crate::generate::hostile::{self, Kind, Stage};
use crate::generate::many::{self, Load};
use crate::idle;
use crate::measure::Numbers;
use crate::program::OURS;
use crate::rounds::{Run, Taken};

/// Silent peers: once, because neither memory nor idle CPU drifts.
pub(crate) fn idle_peers(run: &mut Run) -> Result<()> {
    let length = Duration::from_secs(run.results.setup.seconds);
    for (peers, metrics) in idle::PEERS {
        for program in run.results.programs.clone() {
            if peers > 1000 && program.name != OURS {
                continue;
            }
            let numbers = idle::measure(&run.stop, &program, peers, metrics, length);
            run.take(
                &Taken { suite: "idle-peers", program: &program.name, round: 1, of: 1, metrics },
                numbers,
            )?;
        }
    }
    run.save()
}

/// One peer and many peers, both directions.
pub(crate) fn many_peers(run: &mut Run, rounds: u32) -> Result<()> {
    for round in 1..=rounds {
        for program in run.results.programs.clone() {
            let setup = run.results.setup.clone();
            let load = Load { rate: setup.peers_rate, length: Duration::from_secs(setup.seconds) };
            let what =
                |metrics| Taken { suite: "many-peers", program: &program.name, round, of: rounds, metrics };
            let one = many::one(&run.stop, &program, setup.mtu, load);
            run.take(&what(many::ONE), one)?;
            if program.name == OURS {
                run.take(&what(many::APART), many::apart(&run.stop, &program, setup.mtu, load))?;
            }
            let many = many::many(&run.stop, &program, setup.peers, setup.mtu, load);
            run.take(&what(many::MANY), many)?;
        }
        run.save()?;
    }
    Ok(())
}

/// Undisturbed, flood, replay, undisturbed, in this order; ratios are to the mean of the two undisturbed runs.
pub(crate) fn hostile(run: &mut Run, rounds: u32) -> Result<()> {
    for round in 1..=rounds {
        for program in run.results.programs.clone() {
            let (seconds, rate, mtu) =
                (run.results.setup.seconds, run.results.setup.attack_rate, run.results.setup.mtu);
            let act = || -> Result<_> {
                let stage = Stage::new(&run.stop, &program, mtu)?;
                let before = stage.calm(seconds)?;
                let flood = stage.attacked(Kind::Flood, seconds, rate);
                let replay = stage.attacked(Kind::Replay, seconds, rate);
                Ok(((before + stage.calm(seconds)?) / 2.0, flood, replay))
            };
            let what =
                |metrics| Taken { suite: "hostile", program: &program.name, round, of: rounds, metrics };
            match act() {
                Ok((calm, flood, replay)) => {
                    run.take(&what(hostile::CALM), Ok(vec![("calm_gbps", calm)]))?;
                    run.take(&what(hostile::FLOOD), flood.map(|flood| flood.numbers(hostile::FLOOD, calm)))?;
                    run.take(
                        &what(hostile::REPLAY),
                        replay.map(|replay| replay.numbers(hostile::REPLAY, calm)),
                    )?;
                }
                Err(error) => {
                    // The ratio needs the undisturbed runs: without them all is lost.
                    for metrics in [hostile::CALM, hostile::FLOOD, hostile::REPLAY] {
                        run.take(&what(metrics), Err::<Numbers, _>(anyhow!("{error:#}")))?;
                    }
                }
            }
        }
        run.save()?;
    }
    Ok(())
}
