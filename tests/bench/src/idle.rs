//! What configured peers cost that never say anything.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::generate::sessions::inner_address;
use crate::lab::{End, INTERFACE, Key, Wire, configuration};
use crate::measure::Numbers;
use crate::proc;
use crate::program::Program;
use crate::stop::Stop;

/// Numbers of peers, each with its metrics.
pub(crate) const PEERS: [(usize, &[&str]); 4] = [
    (1, &["peers1_rss_mib", "peers1_idle_cpu"]),
    (100, &["peers100_rss_mib", "peers100_idle_cpu"]),
    (1000, &["peers1000_rss_mib", "peers1000_idle_cpu"]),
    (5000, &["peers5000_rss_mib", "peers5000_idle_cpu"]),
];

const SETTLE: Duration = Duration::from_secs(1);

/// Roughly how long it takes for a program, in seconds.
pub(crate) fn expected_seconds(seconds: u64) -> f64 {
    seconds as f64 + SETTLE.as_secs_f64() + 0.4
}

/// Memory and CPU of a device with this many peers, over `length`.
pub(crate) fn measure(
    stop: &Stop,
    program: &Program,
    peers: usize,
    metrics: &[&'static str],
    length: Duration,
) -> Result<Numbers> {
    let wire = Wire::new(stop)?;
    let daemon = wire.start(End::B, program)?;
    let key = Key::random()?;
    let peers = (0..peers).map(stranger).collect::<Result<Vec<_>>>()?;
    wire.wg(End::B, &["setconf", INTERFACE, "/dev/stdin"], &configuration(&key, peers.into_iter()))?;
    wire.ip(End::B, &format!("link set {INTERFACE} up\n"))?;
    std::thread::sleep(SETTLE);
    let (before, began) = (proc::fine_cpu_seconds(daemon.pid())?, Instant::now());
    std::thread::sleep(length);
    let used = proc::fine_cpu_seconds(daemon.pid())? - before;
    let values = [proc::resident_mib(daemon.pid())?, 100.0 * used / began.elapsed().as_secs_f64()];
    Ok(metrics.iter().copied().zip(values).collect())
}

// Any 32 bytes are a public key; nobody has its secret.
fn stranger(number: usize) -> Result<(String, IpAddr)> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|error| anyhow!("no randomness: {error}"))?;
    Ok((BASE64.encode(bytes), inner_address(number).into()))
}
