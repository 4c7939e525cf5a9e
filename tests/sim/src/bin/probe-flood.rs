//! A flood of probes that are none: `probe-flood KIND TO RATE SECONDS [KEY-FILE PEER-KEY]`.
//!
//! `random`: as long and with the first bytes of a probe, of nobody; `forged`: with a peer's route id, changed; `replayed`: a peer's own, the same
//! one each time. For the last two KEY-FILE holds that peer's private key, and PEER-KEY is the public key of whom it is sent to.
#![allow(clippy::print_stdout)]

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use mesh_keyring::PrivateKey;
use mesh_overlay::path::wire::{Kind, LEAST, Message, Secrets};
use sim::Random;

const BURST: u32 = 100;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [kind, to, rate, seconds, rest @ ..] = args.as_slice() else {
        bail!("probe-flood random|forged|replayed TO RATE SECONDS [KEY-FILE PEER-KEY]")
    };
    let (to, rate, seconds): (SocketAddr, u32, u64) = (to.parse()?, rate.parse()?, seconds.parse()?);
    let mut random = Random::new(7);
    let mut datagram = vec![0; LEAST];
    if let [file, peer] = rest {
        let text = std::fs::read_to_string(file).with_context(|| file.clone())?;
        let secrets = Secrets::derive(&PrivateKey::from_base64(text.trim())?, &peer.parse()?);
        datagram = secrets.seal(&Message { kind: Kind::Question, number: 1, mtu: 0 }, LEAST, [1; 24]);
    }
    datagram[..4].copy_from_slice(&[0x53, 1, 0, 0]);
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let begun = Instant::now();
    let mut sent = 0u64;
    while begun.elapsed() < Duration::from_secs(seconds) {
        for _ in 0..BURST {
            let from = match kind.as_str() {
                "random" => 4,
                "forged" => 12,
                _ => LEAST,
            };
            for part in datagram[from..].chunks_mut(8) {
                let bits = random.bits().to_le_bytes();
                part.copy_from_slice(&bits[..part.len()]);
            }
            if socket.send_to(&datagram, to).is_ok() {
                sent += 1;
            }
        }
        let due = begun + Duration::from_secs_f64(sent as f64 / f64::from(rate));
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    println!("{kind}: {:.0} a second", sent as f64 / begun.elapsed().as_secs_f64());
    Ok(())
}
