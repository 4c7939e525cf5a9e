//! Arbitrary bytes as probes from arbitrary places, some sealed by a peer's own hand: no panic, no answer that is larger than its question, and
//! no more addresses than may be.
#![no_main]

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use mesh_keyring::PrivateKey;
use mesh_overlay::path::wire::{Kind, Message, Secrets};
use mesh_overlay::path::{Candidate, Origin, PeerPaths, Prober, Rung};

fn candidate(n: u8) -> Candidate {
    let address = SocketAddr::from(([192, 0, 2, n], 51820));
    Candidate { address, rung: Rung::Direct, origin: Origin::Published, mtu_most: 1500 }
}

fuzz_target!(|bytes: &[u8]| {
    let [Ok(own), Ok(peer)] = [1, 2].map(|n| PrivateKey::from_bytes(&[n; 32])) else { return };
    let theirs = Secrets::derive(&peer, &own.public());
    let key = peer.public();
    let mut prober = Prober::new(own, [7; 16]);
    let mut now = Instant::now();
    let paths =
        PeerPaths { candidates: vec![candidate(1), candidate(2)], mtu_most: 1500, ..PeerPaths::default() };
    prober.set_peers(BTreeMap::from([(key, paths)]), |_| true, now);
    for (n, part) in bytes.chunks(64).enumerate() {
        let (Some(how), Some(host)) = (part.first(), part.get(1)) else { break };
        let from = SocketAddr::new(IpAddr::from([192, 0, 2, *host]), u16::from(*host) << 8);
        let kind = if how & 1 == 0 { Kind::Question } else { Kind::Answer { seen: from } };
        let number = u64::from(part.get(2).copied().unwrap_or(0));
        let mut datagram = if how & 2 == 0 {
            part.to_vec()
        } else {
            let mut nonce = [0; 24];
            nonce[..8].copy_from_slice(&(n as u64).to_le_bytes());
            let mtu = u16::from_le_bytes([*how, *host]);
            theirs.seal(&Message { kind, number, mtu }, part.len() * usize::from(*host), nonce)
        };
        let length = datagram.len();
        let mut out = Vec::new();
        prober.receive(from, &mut datagram, now, &mut out);
        assert!(out.len() <= 1 && out.iter().all(|answer| answer.payload.len() <= length));
        now += Duration::from_millis(u64::from(*how) * 4);
        out.clear();
        prober.poll(now, &mut out);
        assert!(out.len() < 200, "{} questions at once", out.len());
        let report = &prober.report(now)[&key];
        assert!(report.lines.len() <= 6, "{} addresses", report.lines.len());
    }
});
