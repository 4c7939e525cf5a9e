//! Many nodes in one process, which answer an agent's probes on addresses of their own: what a thousand living peers cost that agent.
//!
//! `crowd write COUNT` prints their manifests; `crowd run COUNT PEER-KEY PEER-ADDRESS SECONDS` plays them, and prints what was sent and received.
#![allow(clippy::print_stdout)]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use mesh_keyring::{PrivateKey, PublicKey};
use mesh_overlay::path::{Candidate, Origin, PeerPaths, Prober, Rung};

const PORT: u16 = 51820;
const TICK: Duration = Duration::from_millis(2);

fn key(n: u32) -> anyhow::Result<PrivateKey> {
    let mut secret = [0x5e; 32];
    secret[1..5].copy_from_slice(&n.to_le_bytes());
    Ok(PrivateKey::from_bytes(&secret)?)
}

fn address(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 20, 0, 1)) + n)
}

fn write(count: u32) -> anyhow::Result<()> {
    for n in 0..count {
        let pods = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 100, 0, 0)) + n * 16);
        println!(
            "---\napiVersion: v1\nkind: Node\nmetadata:\n  name: crowd-{n}\n  annotations:\n    sennit.dev/public-key: \"{}\"\n    \
             sennit.dev/epoch: \"1\"\n    sennit.dev/site: near\n    sennit.dev/internal-endpoints: \"{}:{PORT}\"\n\
             spec: {{podCIDRs: [\"{pods}/28\"]}}",
            key(n)?.public(),
            address(n)
        );
    }
    Ok(())
}

fn run(count: u32, peer: PublicKey, at: SocketAddr, seconds: u64) -> anyhow::Result<()> {
    let begun = Instant::now();
    let mut nodes = Vec::new();
    for n in 0..count {
        let socket =
            UdpSocket::bind((address(n), PORT)).with_context(|| format!("binding {}", address(n)))?;
        socket.set_nonblocking(true)?;
        let mut boot = [0; 16];
        boot[..4].copy_from_slice(&n.to_le_bytes());
        let mut prober = Prober::new(key(n)?, boot);
        let candidate =
            Candidate { address: at, rung: Rung::Direct, origin: Origin::Published, mtu_most: 1500 };
        let paths = PeerPaths { candidates: vec![candidate], mtu_most: 1500, ..PeerPaths::default() };
        prober.set_peers(BTreeMap::from([(peer, paths)]), |_| true, begun);
        nodes.push((socket, prober));
    }
    // The first third is for the start.
    let settled = begun + Duration::from_secs(seconds) / 3;
    let (mut received, mut sent, mut bytes) = (0u64, 0u64, 0u64);
    let (mut out, mut buffer) = (Vec::new(), [0; 9216]);
    while begun.elapsed() < Duration::from_secs(seconds) {
        let now = Instant::now();
        let counts = u64::from(now >= settled);
        for (socket, prober) in &mut nodes {
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let taken = prober.receive(from, &mut buffer[..length], now, &mut out);
                if taken == mesh_overlay::path::prober::Received::Taken {
                    received += counts;
                    bytes += counts * (length as u64 + 28);
                }
            }
            if prober.wake_at().is_some_and(|due| due <= now) {
                prober.poll(now, &mut out);
            }
            for transmit in out.drain(..) {
                sent += counts;
                bytes += counts * (transmit.payload.len() as u64 + 28);
                socket.send_to(&transmit.payload, transmit.to)?;
            }
        }
        std::thread::sleep(TICK);
    }
    let alive = nodes.iter().filter(|(_, prober)| {
        prober.report(Instant::now()).values().all(|report| report.carrying.is_some() && !report.blocked)
    });
    let span = seconds as f64 * 2.0 / 3.0;
    println!(
        "{} of {count} peers reach the agent; per peer {:.2} probes a second from the agent and {:.2} to it, {:.0} bytes a second both ways",
        alive.count(),
        received as f64 / span / f64::from(count),
        sent as f64 / span / f64::from(count),
        bytes as f64 / span / f64::from(count)
    );
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["write", count] => write(count.parse()?),
        ["run", count, peer, at, seconds] => {
            run(count.parse()?, peer.parse()?, at.parse()?, seconds.parse()?)
        }
        _ => bail!("crowd write COUNT | crowd run COUNT PEER-KEY PEER-ADDRESS SECONDS"),
    }
}
