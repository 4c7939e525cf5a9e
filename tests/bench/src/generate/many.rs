//! One device and many real peers.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::sessions::{self, INNER, Session, inner_address};
use super::steady::{self, PORT as SINK_PORT, Running};
use crate::lab::{Daemon, End, Family, INTERFACE, Key, PORT, Wire, configuration};
use crate::measure::Numbers;
use crate::proc;
use crate::program::Program;
use crate::stop::Stop;

/// How to measure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    /// Packets a second of all peers together.
    pub(crate) rate: u64,
    /// Length of a run.
    pub(crate) length: Duration,
}

// Below every limit from which on devices ask for cookies; boringtun's is 100 a second.
const HANDSHAKES_PER_SECOND: f64 = 80.0;
// IPv4 and UDP headers of an inner packet.
const HEADERS: usize = 28;

/// A device on host B and its peers on host A, each with a session.
pub(crate) struct Crowd {
    wire: Wire,
    daemon: Daemon,
    sessions: Vec<Session>,
    /// CPU milliseconds of the device for a handshake.
    pub(crate) handshake_cpu_ms: f64,
}

/// A run in one direction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Direction {
    /// Thousands of packets delivered a second.
    pub(crate) kpps: f64,
    /// Thousands of packets that the sender's kernel took a second.
    pub(crate) offered_kpps: f64,
    /// CPU of the device per delivered packet.
    pub(crate) cpu_us: f64,
}

impl Crowd {
    /// Starts the device, configures `peers` peers, and shakes hands with each.
    pub(crate) fn new(stop: &Stop, program: &Program, peers: u32, mtu: u32) -> Result<Crowd> {
        let wire = Wire::new(stop)?;
        let device = Key::random()?;
        let keys = (0..peers).map(|_| Key::random()).collect::<Result<Vec<_>>>()?;
        let daemon = wire.start(End::B, program)?;
        let listed = keys.iter().enumerate().map(|(at, key)| (key.public_base64(), inner_address(at).into()));
        wire.wg(End::B, &["setconf", INTERFACE, "/dev/stdin"], &configuration(&device, listed))?;
        let inner = Family::V4.inner(End::B);
        wire.ip(
            End::B,
            &format!(
                "address add {inner}/24 dev {INTERFACE}\nlink set {INTERFACE} mtu {mtu} up\n\
                 route add 10.64.0.0/16 dev {INTERFACE}\n"
            ),
        )?;
        let (IpAddr::V4(local), IpAddr::V4(inner)) = (Family::V4.outer(End::A), inner) else {
            bail!("no IPv4 addresses");
        };
        let remote = SocketAddr::new(Family::V4.outer(End::B), PORT);
        let (public, stopped) = (device.public, stop.clone());
        let before = proc::cpu_seconds(&[daemon.pid()])?;
        let sessions = wire.namespace(End::A)?.run(move || {
            establish(&stopped, &keys, |at, key| {
                Session::new(at, key, public, local, remote, (inner, SINK_PORT))
            })
        })??;
        let used = proc::cpu_seconds(&[daemon.pid()])? - before;
        Ok(Crowd { wire, daemon, handshake_cpu_ms: used * 1e3 / sessions.len() as f64, sessions })
    }

    /// Every peer in turn sends to the device; counted behind its TUN device.
    pub(crate) fn receive(&mut self, load: Load) -> Result<Direction> {
        let sink = Running::sink(self.wire.namespace(End::B)?, true)?;
        let before = proc::cpu_seconds(&[self.daemon.pid()])?;
        let mut sessions = std::mem::take(&mut self.sessions);
        let (sessions, sent) = self.wire.namespace(End::A)?.run(move || {
            let sent = sessions::send(&mut sessions, load.rate, load.length);
            (sessions, sent)
        })?;
        self.sessions = sessions;
        let delivered = sink.finish()?;
        let offered = sent?;
        self.direction(load, before, offered, delivered)
    }

    /// A local sender behind the device's TUN device sends to every peer in turn; counted by the peers.
    pub(crate) fn send(&mut self, load: Load) -> Result<Direction> {
        const SILENCE: Duration = Duration::from_millis(200);
        let to: Vec<IpAddr> = (0..self.sessions.len()).map(|at| inner_address(at).into()).collect();
        let sessions = std::mem::take(&mut self.sessions);
        let before = proc::cpu_seconds(&[self.daemon.pid()])?;
        let counter = self.wire.namespace(End::A)?.spawn(move || {
            sessions::drain(&sessions);
            let count = sessions::count(&sessions, load.length, SILENCE);
            (sessions, count)
        })?;
        let offered = self
            .wire
            .namespace(End::B)?
            .run(move || steady::send(&to, INNER - HEADERS, load.rate, load.length))?;
        let (sessions, delivered) = counter.join().map_err(|_| anyhow!("the counter panicked"))?;
        self.sessions = sessions;
        self.direction(load, before, offered?, delivered?)
    }

    fn both_ways(&mut self, load: Load) -> Result<[f64; 6]> {
        let (receive, send) = (self.receive(load)?, self.send(load)?);
        Ok([receive.kpps, receive.offered_kpps, receive.cpu_us, send.kpps, send.offered_kpps, send.cpu_us])
    }

    fn direction(&self, load: Load, cpu_before: f64, offered: u64, delivered: u64) -> Result<Direction> {
        let used = proc::cpu_seconds(&[self.daemon.pid()])? - cpu_before;
        if delivered == 0 {
            bail!("no packet was delivered of {offered}");
        }
        let thousands = |packets: u64| packets as f64 / load.length.as_secs_f64() / 1e3;
        Ok(Direction {
            kpps: thousands(delivered),
            offered_kpps: thousands(offered),
            cpu_us: used * 1e6 / delivered as f64,
        })
    }
}

fn establish(
    stop: &Stop,
    keys: &[Key],
    session: impl Fn(usize, &Key) -> Result<Session>,
) -> Result<Vec<Session>> {
    let began = Instant::now();
    let mut sessions = Vec::with_capacity(keys.len());
    for (at, key) in keys.iter().enumerate() {
        let mut next = session(at, key)?;
        next.establish(stop).with_context(|| format!("peer {at}"))?;
        sessions.push(next);
        let due = began + Duration::from_secs_f64(sessions.len() as f64 / HANDSHAKES_PER_SECOND);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    Ok(sessions)
}

/// Metrics of [`one`].
pub(crate) const ONE: &[&str] = &[
    "receive1_kpps",
    "receive1_offered_kpps",
    "receive1_cpu_us",
    "send1_kpps",
    "send1_offered_kpps",
    "send1_cpu_us",
];
/// Metrics of [`many`].
pub(crate) const MANY: &[&str] = &[
    "receive_many_kpps",
    "receive_many_offered_kpps",
    "receive_many_cpu_us",
    "send_many_kpps",
    "send_many_offered_kpps",
    "send_many_cpu_us",
    "handshake_cpu_ms",
];

/// Both directions with a single peer.
pub(crate) fn one(stop: &Stop, program: &Program, mtu: u32, load: Load) -> Result<Numbers> {
    let mut crowd = Crowd::new(stop, program, 1, mtu)?;
    Ok(ONE.iter().copied().zip(crowd.both_ways(load)?).collect())
}

/// Metrics of [`apart`].
pub(crate) const APART: &[&str] = &["receive1_apart_cpu_us", "send1_apart_cpu_us"];

/// Both directions with a single peer, of our program with the features switched off by which packets of one peer travel
/// in runs: what a packet costs that travels alone, as each does among many peers.
pub(crate) fn apart(stop: &Stop, program: &Program, mtu: u32, load: Load) -> Result<Numbers> {
    let alone = program.with_variable("MESH_WG_DISABLE", "udp-gso,udp-gro,tun-uso");
    let mut crowd = Crowd::new(stop, &alone, 1, mtu)?;
    let [_, _, receive, _, _, send] = crowd.both_ways(load)?;
    Ok(APART.iter().copied().zip([receive, send]).collect())
}

/// Both directions with many peers.
pub(crate) fn many(stop: &Stop, program: &Program, peers: u32, mtu: u32, load: Load) -> Result<Numbers> {
    let mut crowd = Crowd::new(stop, program, peers, mtu)?;
    let values = crowd.both_ways(load)?.into_iter().chain([crowd.handshake_cpu_ms]);
    Ok(MANY.iter().copied().zip(values).collect())
}

/// Roughly how long a program takes, in seconds.
pub(crate) fn expected_seconds(peers: u32, seconds: u64) -> f64 {
    f64::from(peers) / HANDSHAKES_PER_SECOND + 5.0 * (seconds as f64 + 0.25) + 1.0
}
