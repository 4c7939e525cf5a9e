//! The measurements on one tunnel.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::generate::steady;
use crate::lab::{End, Pair};
use crate::ping;
use crate::proc;

/// Numbers by metric.
pub(crate) type Numbers = Vec<(&'static str, f64)>;

const SMALL: usize = 64;
// How often ping asks; 200 of them take a second.
const PING_EVERY: Duration = Duration::from_millis(5);

/// A run that gives one or more numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Measurement {
    RssIdle,
    Ping,
    Tcp1,
    Tcp4,
    Reverse,
    Bidir,
    Udp64,
    Udp64Rate,
    Udp1200,
    PingLoaded,
    RssLoaded,
}

/// How to measure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    /// Length of a run in seconds.
    pub(crate) seconds: u64,
    /// Rate for [`Measurement::Udp64Rate`], packets a second.
    pub(crate) udp_rate: Option<u64>,
}

impl Measurement {
    /// All, in the order of a round.
    pub(crate) const ALL: [Measurement; 11] = [
        Self::RssIdle,
        Self::Ping,
        Self::Tcp1,
        Self::Tcp4,
        Self::Reverse,
        Self::Bidir,
        Self::Udp64,
        Self::Udp64Rate,
        Self::Udp1200,
        Self::PingLoaded,
        Self::RssLoaded,
    ];

    /// Its name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::RssIdle => "rss-idle",
            Self::Ping => "ping",
            Self::Tcp1 => "tcp1",
            Self::Tcp4 => "tcp4",
            Self::Reverse => "reverse",
            Self::Bidir => "bidir",
            Self::Udp64 => "udp64",
            Self::Udp64Rate => "udp64-rate",
            Self::Udp1200 => "udp1200",
            Self::PingLoaded => "ping-loaded",
            Self::RssLoaded => "rss-loaded",
        }
    }

    /// The measurement with this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|measurement| measurement.name() == name)
    }

    /// What it gives, the most telling first.
    pub(crate) fn metrics(self) -> &'static [&'static str] {
        match self {
            Self::RssIdle => &["rss_idle_mib"],
            Self::Ping => &["ping_avg_ms", "ping_max_ms"],
            Self::Tcp1 => &["tcp1_gbps", "tcp1_cpu_s_per_gb", "tcp1_retransmits"],
            Self::Tcp4 => &["tcp4_gbps"],
            Self::Reverse => &["reverse_gbps"],
            Self::Bidir => &["bidir_gbps"],
            Self::Udp64 => &["udp64_kpps", "udp64_loss"],
            Self::Udp64Rate => &["udp64_cpu_us", "udp64_offered_kpps"],
            Self::Udp1200 => &["udp1200_kpps", "udp1200_loss"],
            Self::PingLoaded => &["ping_loaded_avg_ms", "ping_loaded_max_ms"],
            Self::RssLoaded => &["rss_loaded_mib"],
        }
    }

    /// Roughly how long it takes, in seconds.
    pub(crate) fn expected_seconds(self, seconds: u64) -> f64 {
        match self {
            Self::RssIdle | Self::RssLoaded => 0.0,
            Self::Ping => 1.2,
            _ => seconds as f64 + 0.25,
        }
    }

    /// Runs it on a tunnel.
    pub(crate) fn run(self, pair: &Pair, settings: Settings) -> Result<Numbers> {
        let values = match self {
            Self::RssIdle | Self::RssLoaded => vec![proc::resident_mib(pair.pids()[0])?],
            _ => {
                pair.wake()?;
                self.values(pair, settings)?
            }
        };
        Ok(self.metrics().iter().copied().zip(values).collect())
    }

    fn values(self, pair: &Pair, settings: Settings) -> Result<Vec<f64>> {
        let seconds = settings.seconds;
        let tcp = |arguments: &[&str]| pair.tcp(seconds, arguments);
        Ok(match self {
            Self::RssIdle | Self::RssLoaded => Vec::new(),
            Self::Ping => {
                let text = pair.wire.ping(End::A, pair.family.inner(End::B), 200, PING_EVERY)?;
                let rtt = answered(&text)?;
                vec![rtt.avg, rtt.max]
            }
            Self::Tcp1 => {
                let before = proc::cpu_seconds(&pair.pids())?;
                let tcp = tcp(&[])?;
                let used = proc::cpu_seconds(&pair.pids())? - before;
                vec![tcp.gbps, used / tcp.gigabytes, tcp.retransmits]
            }
            Self::Tcp4 => vec![tcp(&["-P", "4"])?.gbps],
            Self::Reverse => vec![tcp(&["-R"])?.gbps],
            Self::Bidir => vec![tcp(&["--bidir"])?.gbps],
            Self::Udp64 => {
                let udp = pair.udp_flood(seconds, "64")?;
                vec![udp.delivered_kpps, udp.loss]
            }
            Self::Udp1200 => {
                let udp = pair.udp_flood(seconds, "1200")?;
                vec![udp.delivered_kpps, udp.loss]
            }
            Self::Udp64Rate => {
                let rate = settings.udp_rate.ok_or_else(|| anyhow!("no rate that all sustain was found"))?;
                let run = fixed_rate(pair, rate, Duration::from_secs(seconds))?;
                if !run.sustained() {
                    bail!("{run} of {rate} pps asked for");
                }
                vec![run.cpu_us(), run.offered_kpps()]
            }
            Self::PingLoaded => {
                let rtt = std::thread::scope(|scope| {
                    let load = scope.spawn(|| tcp(&[]));
                    let text = loaded_ping(pair, Duration::from_secs(seconds));
                    load.join().map_err(|_| anyhow!("the load panicked"))?.context("the load beside ping")?;
                    answered(&text?)
                })?;
                vec![rtt.avg, rtt.max]
            }
        })
    }
}

fn answered(text: &str) -> Result<ping::Rtt> {
    let rtt = ping::parse(text)?;
    if rtt.loss > 50.0 {
        bail!("{} % of the pings were lost", rtt.loss);
    }
    Ok(rtt)
}

// Begins when the load is up and ends before it does.
fn loaded_ping(pair: &Pair, load: Duration) -> Result<String> {
    const MARGIN: Duration = Duration::from_millis(700);
    std::thread::sleep(MARGIN);
    let length = load.saturating_sub(2 * MARGIN).max(Duration::from_millis(500));
    let count = (length.as_millis() / PING_EVERY.as_millis()) as u64;
    pair.wire.ping(End::A, pair.family.inner(End::B), count, PING_EVERY)
}

/// A run at a fixed packet rate, and what the devices used for it.
pub(crate) struct FixedRate {
    traffic: steady::Traffic,
    cpu_seconds: f64,
}

impl FixedRate {
    /// Whether next to nothing was held back by the sender or lost on the way.
    pub(crate) fn sustained(&self) -> bool {
        self.traffic.offered_share() >= 0.97 && self.traffic.delivered_share() >= 0.98
    }

    fn cpu_us(&self) -> f64 {
        self.cpu_seconds * 1e6 / self.traffic.delivered as f64
    }

    fn offered_kpps(&self) -> f64 {
        self.traffic.offered_pps() / 1e3
    }
}

impl std::fmt::Display for FixedRate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (offered, delivered) = (self.traffic.offered_pps(), self.traffic.delivered_share());
        write!(f, "offered {offered:.0} pps, delivered {:.1} %", delivered * 100.0)
    }
}

/// Sends small UDP packets from A to B at `rate` a second.
pub(crate) fn fixed_rate(pair: &Pair, rate: u64, length: Duration) -> Result<FixedRate> {
    let to = vec![pair.family.inner(End::B)];
    let (from, at) = (pair.wire.namespace(End::A)?, pair.wire.namespace(End::B)?);
    let before = proc::cpu_seconds(&pair.pids())?;
    let traffic = steady::run(from, at, to, SMALL, rate, length)?;
    Ok(FixedRate { traffic, cpu_seconds: proc::cpu_seconds(&pair.pids())? - before })
}

/// The highest of these rates, from `most` down in steps of a quarter, that every tunnel sustains for a second.
pub(crate) fn sustained_rate(pairs: &[&Pair], most: u64) -> Option<u64> {
    const LEAST: u64 = 4_000;
    let mut rate = most / 1000 * 1000;
    while rate >= LEAST {
        let began = Instant::now();
        let mut all = !pairs.is_empty();
        for pair in pairs {
            let run = pair.wake().and_then(|()| fixed_rate(pair, rate, Duration::from_secs(1)));
            // One that is broken has no say; its own measurement will tell.
            all = all && run.map_or(true, |run| run.sustained());
        }
        eprintln!(
            "  {rate} packets a second of 64 B: {} ({:.0} s)",
            if all { "all sustain it" } else { "too much" },
            began.elapsed().as_secs_f64()
        );
        if all {
            return Some(rate);
        }
        rate = rate * 3 / 4 / 1000 * 1000;
    }
    None
}
