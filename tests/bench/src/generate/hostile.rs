//! A TCP stream through the tunnel while somebody attacks one of its devices.

use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use anyhow::{Result, anyhow, bail};

use super::raw::{self, Attack, Datagram, Tap};
use super::sessions;
use crate::lab::{End, Family, PORT, Pair};
use crate::measure::Numbers;
use crate::proc;
use crate::program::Program;
use crate::stop::Stop;

/// Which attack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Handshake initiations with a valid first MAC, from strangers, each from another spoofed address.
    Flood,
    /// Data messages of the tunnel's own session, seen before.
    Replay,
}

/// Metrics of a flood, with the undisturbed stream beside it.
pub(crate) const FLOOD: &[&str] =
    &["flood_ratio", "flood_gbps", "flood_sent_kpps", "flood_dropped_kpps", "flood_sender_cpu"];
/// Metrics of a replay.
pub(crate) const REPLAY: &[&str] =
    &["replay_ratio", "replay_gbps", "replay_sent_kpps", "replay_dropped_kpps", "replay_sender_cpu"];
/// Metrics of the undisturbed stream.
pub(crate) const CALM: &[&str] = &["calm_gbps"];

// Where the spoofed senders are (RFC 2544).
const SPOOFED: [u8; 2] = [198, 18];
const STRANGERS: usize = 2000;
// The attack begins before the stream and ends after it.
const MARGIN: Duration = Duration::from_millis(300);

/// The tunnel, and all that is needed to attack the device on host B.
pub(crate) struct Stage {
    pair: Pair,
    strangers: Vec<Datagram>,
    target: SocketAddrV4,
}

/// A stream under attack.
pub(crate) struct Attacked {
    /// Gb/s of the stream.
    pub(crate) gbps: f64,
    attack: Attack,
    dropped: u64,
}

impl Stage {
    /// Makes the tunnel and the strangers.
    pub(crate) fn new(stop: &Stop, program: &Program, mtu: u32) -> Result<Stage> {
        let pair = Pair::new(stop, program, Family::V4, mtu)?;
        let IpAddr::V4(b) = Family::V4.outer(End::B) else { bail!("no IPv4 address") };
        let target = SocketAddrV4::new(b, PORT);
        let network = format!("{}.{}.0.0/16", SPOOFED[0], SPOOFED[1]);
        // Answers to strangers leave as they would towards the Internet, and end on the far side of the wire.
        pair.wire.ip(End::B, &format!("route add {network} via {} dev under\n", Family::V4.outer(End::A)))?;
        pair.wire.ip(End::A, &format!("route add blackhole {network}\n"))?;
        let from = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);
        let strangers = sessions::initiations(pair.keys[1].public, STRANGERS)?
            .iter()
            .map(|message| Datagram::new(from, target, message))
            .collect();
        Ok(Stage { pair, strangers, target })
    }

    /// The stream alone, in Gb/s.
    pub(crate) fn calm(&self, seconds: u64) -> Result<f64> {
        self.pair.wake()?;
        Ok(self.pair.tcp(seconds, &[])?.gbps)
    }

    /// The stream while `rate` hostile datagrams a second arrive.
    pub(crate) fn attacked(&self, kind: Kind, seconds: u64, rate: u64) -> Result<Attacked> {
        self.pair.wake()?;
        let mut datagrams = match kind {
            Kind::Flood => self.strangers.clone(),
            Kind::Replay => self.captured()?,
        };
        let (target, length) = (self.target, Duration::from_secs(seconds) + 2 * MARGIN);
        let daemon = self.pair.pids()[1];
        let before = proc::udp_counters(daemon)?;
        let mut number = 0u32;
        let attack = self.pair.wire.namespace(End::A)?.spawn(move || match kind {
            Kind::Flood => raw::send(&mut datagrams, target, rate, length, |datagram| {
                number = number.wrapping_add(1);
                datagram.set_source(spoofed(number));
            }),
            Kind::Replay => raw::send(&mut datagrams, target, rate, length, |_| {}),
        })?;
        std::thread::sleep(MARGIN);
        let stream = self.pair.tcp(seconds, &[]);
        let attack = attack.join().map_err(|_| anyhow!("the attacker panicked"))??;
        let dropped = proc::udp_counters(daemon)?.dropped - before.dropped;
        Ok(Attacked { gbps: stream?.gbps, attack, dropped })
    }

    // Pings make small messages, each a datagram of its own.
    fn captured(&self) -> Result<Vec<Datagram>> {
        let tap = self.pair.wire.namespace(End::B)?.run(Tap::open)??;
        self.pair.wire.ping(End::A, Family::V4.inner(End::B), 200, Duration::from_millis(2))?;
        let found = tap.drain(PORT)?;
        if found.len() < 20 {
            bail!("captured only {} messages of the tunnel", found.len());
        }
        Ok(found)
    }
}

// 65,536 addresses, each with ever other ports.
fn spoofed(number: u32) -> SocketAddrV4 {
    let mixed = number.wrapping_mul(0x9e37_79b1);
    let [a, b, ..] = mixed.to_be_bytes();
    SocketAddrV4::new(Ipv4Addr::new(SPOOFED[0], SPOOFED[1], a, b), 1024 + (number % 60_000) as u16)
}

impl Attacked {
    /// The numbers of an attack beside an undisturbed stream of `calm` Gb/s.
    pub(crate) fn numbers(&self, metrics: &[&'static str], calm: f64) -> Numbers {
        let seconds = self.attack.length.as_secs_f64();
        let values = [
            self.gbps / calm,
            self.gbps,
            self.attack.sent as f64 / seconds / 1e3,
            self.dropped as f64 / seconds / 1e3,
            100.0 * self.attack.cpu.as_secs_f64() / seconds,
        ];
        metrics.iter().copied().zip(values).collect()
    }
}

/// Roughly how long a round takes for a program, in seconds.
pub(crate) fn expected_seconds(seconds: u64) -> f64 {
    4.0 * (seconds as f64 + 0.4) + 1.5
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn spoofed_sources_differ_and_stay_in_their_network() {
        let sources: BTreeSet<SocketAddrV4> = (0..50_000).map(spoofed).collect();
        assert_eq!(sources.len(), 50_000);
        let addresses: BTreeSet<Ipv4Addr> = sources.iter().map(|source| *source.ip()).collect();
        assert!(addresses.len() > 30_000, "{}", addresses.len());
        assert!(addresses.iter().all(|address| address.octets()[..2] == SPOOFED));
    }
}
