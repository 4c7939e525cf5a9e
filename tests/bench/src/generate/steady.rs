//! Small UDP packets at a fixed rate from one host to another, round-robin over inner addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use netlab::Namespace;
use nix::sys::socket::SockaddrStorage;

use super::socket::{BATCH, Sender, Sink, enlarge};
use super::{GENTLE, Pace};

/// The port of the sink.
pub(crate) const PORT: u16 = 9999;

/// What was sent at a fixed rate and what arrived.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Traffic {
    /// Packets asked for.
    pub(crate) wanted: u64,
    /// Packets that the sender's kernel took.
    pub(crate) offered: u64,
    /// Packets that arrived.
    pub(crate) delivered: u64,
    /// Length of the run.
    pub(crate) length: Duration,
}

impl Traffic {
    /// Packets offered a second.
    pub(crate) fn offered_pps(&self) -> f64 {
        self.offered as f64 / self.length.as_secs_f64()
    }

    /// Offered of wanted.
    pub(crate) fn offered_share(&self) -> f64 {
        self.offered as f64 / self.wanted.max(1) as f64
    }

    /// Delivered of offered.
    pub(crate) fn delivered_share(&self) -> f64 {
        self.delivered as f64 / self.offered.max(1) as f64
    }
}

/// A sink that runs on a thread of its own, and what it has counted.
pub(crate) struct Running {
    count: Arc<AtomicU64>,
    end: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Result<()>>,
}

impl Running {
    /// Starts to count the UDP packets for [`PORT`] that reach the host.
    pub(crate) fn sink(host: &Namespace, v4: bool) -> Result<Running> {
        let (count, end) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let at: IpAddr = if v4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let (theirs, their_end) = (Arc::clone(&count), Arc::clone(&end));
        let sink = host.run(move || Sink::bind(SocketAddr::new(at, PORT), theirs, their_end))??;
        let thread = host.spawn(move || sink.run())?;
        Ok(Running { count, end, thread })
    }

    /// Packets so far.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Waits until nothing more arrives, ends it, and returns the count.
    pub(crate) fn finish(self) -> Result<u64> {
        settle(|| self.count());
        self.end.store(true, Ordering::Relaxed);
        let count = Arc::clone(&self.count);
        self.thread.join().map_err(|_| anyhow!("the sink panicked"))??;
        Ok(count.load(Ordering::Relaxed))
    }
}

/// Waits until a counter stands still for 100 ms, 2 s at most.
pub(crate) fn settle(count: impl Fn() -> u64) {
    let until = Instant::now() + Duration::from_secs(2);
    let mut last = count();
    loop {
        std::thread::sleep(Duration::from_millis(100));
        let now = count();
        if now == last || Instant::now() > until {
            return;
        }
        last = now;
    }
}

/// Sends UDP packets with `size` bytes of payload from `from` to each address in turn, `rate` a second in all, and
/// counts those that reach `at`.
pub(crate) fn run(
    from: &Namespace,
    at: &Namespace,
    to: Vec<IpAddr>,
    size: usize,
    rate: u64,
    length: Duration,
) -> Result<Traffic> {
    let v4 = to.iter().all(IpAddr::is_ipv4);
    let sink = Running::sink(at, v4)?;
    let offered = from.run(move || send(&to, size, rate, length))??;
    let delivered = sink.finish()?;
    let wanted = (rate as f64 * length.as_secs_f64()) as u64;
    Ok(Traffic { wanted, offered, delivered, length })
}

/// Sends from the calling thread's namespace; returns how many packets the kernel took.
pub(crate) fn send(to: &[IpAddr], size: usize, rate: u64, length: Duration) -> Result<u64> {
    let first = *to.first().ok_or_else(|| anyhow!("nobody to send to"))?;
    let any: IpAddr =
        if first.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).context("bind the sender")?;
    enlarge(&socket);
    let payload = vec![0x5a; size];
    let addresses: Vec<SockaddrStorage> = to.iter().map(|to| SocketAddr::new(*to, PORT).into()).collect();
    let mut turn = addresses.iter().cycle();
    let mut sender = Sender::new();
    let mut batch: Vec<(&[u8], Option<SockaddrStorage>)> = Vec::with_capacity(BATCH);
    let mut pace = Pace::new(rate, Instant::now(), length, GENTLE);
    let mut sent = 0;
    while let Some(mut due) = pace.due(Instant::now()) {
        while due > 0 {
            batch.clear();
            let next = turn.by_ref().take(BATCH.min(due as usize));
            batch.extend(next.map(|to| (payload.as_slice(), Some(*to))));
            due -= batch.len() as u64;
            sent += sender.send(&socket, &batch).context("send to the tunnel")? as u64;
        }
        pace.rest();
    }
    Ok(sent)
}
