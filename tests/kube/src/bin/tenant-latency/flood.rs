//! A flood of DNS answers: a resolver of the node, which answers pods of the same node without a pause.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use netlab::Namespace;

/// Answers a second, over all pods.
const RATE: u64 = 40_000;
/// Names that policies speak of word by word, and wildcards.
pub(crate) const DOMAINS: u32 = 1_000;
/// Addresses in one answer.
pub(crate) const ADDRESSES: u32 = 20;
/// Pauses between batches of answers.
const PAUSE: Duration = Duration::from_millis(1);

/// Returns the domain that a policy speaks of. Every second one is a wildcard.
pub(crate) fn domain(n: u32) -> String {
    match n % 2 {
        0 => format!("n{n}.flood.example"),
        _ => format!("*.n{n}.flood.example"),
    }
}

/// Returns an answer: about a domain's own name, or about one below it that nobody has had before. So are the addresses.
fn answer(number: u32) -> Vec<u8> {
    let n = number % DOMAINS;
    let name = match n % 2 {
        0 => domain(n),
        _ => format!("a{number}.n{n}.flood.example"),
    };
    let mut message = vec![0, 7, 0x81, 0x80, 0, 1];
    message.extend((ADDRESSES as u16).to_be_bytes());
    message.extend([0; 4]);
    for label in name.split('.') {
        message.push(label.len() as u8);
        message.extend(label.as_bytes());
    }
    message.extend([0, 0, 1, 0, 1]);
    for index in 0..ADDRESSES {
        // A pointer to the question's name, type A, class IN, for a second.
        message.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4]);
        let low = number.wrapping_mul(ADDRESSES).wrapping_add(index) & 0x00ff_ffff;
        message.extend((11 << 24 | low).to_be_bytes());
    }
    message
}

/// A flood, until it is dropped.
pub(crate) struct Flood {
    ends: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    began: Instant,
    thread: Option<JoinHandle<()>>,
    // Where nobody listens any more the kernel would say so.
    _askers: Vec<UdpSocket>,
}

impl Flood {
    /// Has each asker ask the resolver once, and answers from then on.
    pub(crate) fn start(
        askers: (&Namespace, Vec<IpAddr>),
        resolver: (&Namespace, IpAddr),
    ) -> anyhow::Result<Self> {
        let server = SocketAddr::new(resolver.1, 53);
        let answers = resolver.0.run(move || UdpSocket::bind(server))?.context("a resolver's socket")?;
        let (netns, addresses) = askers;
        let sockets = netns.run(move || {
            let ask = |address: IpAddr| {
                let socket = UdpSocket::bind(SocketAddr::new(address, 0))?;
                socket.send_to(b"a question", server)?;
                Ok(socket)
            };
            addresses.into_iter().map(ask).collect::<std::io::Result<Vec<_>>>()
        })?;
        let sockets = sockets.context("a pod's socket")?;
        let clients: Vec<SocketAddr> =
            sockets.iter().map(UdpSocket::local_addr).collect::<std::io::Result<_>>()?;
        let (ends, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let began = Instant::now();
        let thread = {
            let (ends, sent) = (ends.clone(), sent.clone());
            std::thread::Builder::new().name("flood".to_owned()).spawn(move || {
                let mut number = 0_u32;
                while !ends.load(Ordering::Relaxed) {
                    let due = began.elapsed().as_millis() as u64 * RATE / 1000;
                    while u64::from(number) < due && !ends.load(Ordering::Relaxed) {
                        // Each pod gets names of both kinds.
                        let client = clients[(number / 2) as usize % clients.len()];
                        let went = answers.send_to(&answer(number), client).is_ok();
                        sent.fetch_add(u64::from(went), Ordering::Relaxed);
                        number += 1;
                    }
                    std::thread::sleep(PAUSE);
                }
            })?
        };
        Ok(Self { ends, sent, began, thread: Some(thread), _askers: sockets })
    }

    /// Returns how many answers went out a second.
    pub(crate) fn rate(&self) -> f64 {
        self.sent.load(Ordering::Relaxed) as f64 / self.began.elapsed().as_secs_f64()
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
