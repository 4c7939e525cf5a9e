use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::namespace::lock;
use crate::{BlockId, Capture, CaptureSpec, Error, Feature, Namespace, Result, Rule, tool};

/// Throughput limit of one direction of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Bits per second on the wire (Ethernet header included).
    pub bits_per_second: u64,
    /// Token bucket in bytes; `None`: 10 ms worth, at least 8 KiB.
    pub burst: Option<u32>,
    /// How long a packet may queue before it is dropped; `None`: 50 ms.
    pub queue: Option<Duration>,
}

impl Rate {
    /// A rate in megabits per second with default burst and queue.
    pub fn mbit(megabits: u64) -> Rate {
        Rate { bits_per_second: megabits * 1_000_000, burst: None, queue: None }
    }
}

impl Rate {
    fn tbf(self) -> Vec<String> {
        let ten_ms = u32::try_from(self.bits_per_second / 800).unwrap_or(u32::MAX);
        let burst = self.burst.unwrap_or(ten_ms.max(8192));
        let queue = self.queue.unwrap_or(Duration::from_millis(50)).as_micros();
        ["tbf", "rate", &format!("{}bit", self.bits_per_second), "burst", &format!("{burst}b"), "latency"]
            .into_iter()
            .map(str::to_owned)
            .chain([format!("{queue}us")])
            .collect()
    }
}

fn netem(delay: Duration, jitter: Duration, rate: Option<Rate>) -> Vec<String> {
    let mut words = vec!["netem".to_owned(), "delay".to_owned(), format!("{}us", delay.as_micros())];
    if !jitter.is_zero() {
        words.push(format!("{}us", jitter.as_micros()));
    }
    if let Some(rate) = rate {
        words.extend(["rate".to_owned(), format!("{}bit", rate.bits_per_second)]);
    }
    words
}

fn unknown_discipline(error: Error, delay: bool) -> Error {
    let feature = if delay { Feature::Netem } else { Feature::Tbf };
    match error {
        Error::Tool { message, .. } if message.contains("qdisc kind is unknown") => {
            Error::Unsupported { feature, why: feature.remedy().to_owned() }
        }
        other => other,
    }
}

/// A veth pair of the lab. The outer end is nearer to the core.
#[derive(Debug, Clone)]
pub struct Link {
    inner: (Namespace, String),
    outer: (Namespace, String),
    shape: Arc<Mutex<Shape>>,
}

/// What was asked of a link and is in force.
#[derive(Debug, Default)]
struct Shape {
    rate: Option<Rate>,
    delay: Option<(Duration, Duration)>,
    loss: Option<BlockId>,
}

impl Link {
    pub(crate) fn new(inner: (Namespace, String), outer: (Namespace, String)) -> Link {
        Link { inner, outer, shape: Arc::default() }
    }

    fn ends(&self) -> [&(Namespace, String); 2] {
        [&self.inner, &self.outer]
    }

    /// Namespace and interface of the end farther from the core (router's `uplink`, host's or pod's `eth0`).
    pub fn inner_end(&self) -> (&Namespace, &str) {
        (&self.inner.0, &self.inner.1)
    }

    /// Namespace and interface of the end nearer to the core (core's `s1`, router's `h1`, host's `pod1`).
    pub fn outer_end(&self) -> (&Namespace, &str) {
        (&self.outer.0, &self.outer.1)
    }

    /// Sets the MTU of both ends, in bytes.
    pub fn set_mtu(&self, mtu: u32) -> Result<()> {
        self.ends()
            .into_iter()
            .try_for_each(|(namespace, interface)| namespace.ip(&format!("link set {interface} mtu {mtu}")))
    }

    /// Limits both directions (`tc tbf` on both ends); `None` lifts the limit. A veth carries segments of up
    /// to 64 KiB as one packet; tbf cuts those that exceed the burst.
    pub fn set_rate(&self, rate: Option<Rate>) -> Result<()> {
        let mut shape = lock(&self.shape);
        self.apply(rate, shape.delay)?;
        shape.rate = rate;
        Ok(())
    }

    /// Delays each direction by `delay` ± `jitter`; zero lifts it. Needs netem in the kernel, else
    /// [`crate::Error::Unsupported`].
    pub fn set_delay(&self, delay: Duration, jitter: Duration) -> Result<()> {
        let mut shape = lock(&self.shape);
        let delay = Some((delay, jitter)).filter(|(delay, jitter)| !(delay.is_zero() && jitter.is_zero()));
        self.apply(shape.rate, delay)?;
        shape.delay = delay;
        Ok(())
    }

    /// Replaces the queueing disciplines of both ends. netem has a rate of its own, so one always suffices.
    fn apply(&self, rate: Option<Rate>, delay: Option<(Duration, Duration)>) -> Result<()> {
        for (namespace, interface) in self.ends() {
            let discipline = match (rate, delay) {
                (None, None) => {
                    let _ = tool::tc(namespace, &["qdisc", "del", "dev", interface, "root"]);
                    continue;
                }
                (Some(rate), None) => rate.tbf(),
                (rate, Some((delay, jitter))) => netem(delay, jitter, rate),
            };
            let mut args = vec!["qdisc", "replace", "dev", interface, "root"];
            args.extend(discipline.iter().map(String::as_str));
            tool::tc(namespace, &args).map_err(|error| unknown_discipline(error, delay.is_some()))?;
        }
        Ok(())
    }

    /// Drops this share (0.0 to 1.0) of the packets in each direction, at random and independently, by an
    /// nftables rule at the inner end; needs no netem. 0.0 lifts it.
    pub fn set_loss(&self, share: f64) -> Result<()> {
        let mut shape = lock(&self.shape);
        let (namespace, interface) = &self.inner;
        let lossy = if share == 0.0 {
            None
        } else {
            Some(namespace.block(Rule::interface(interface.as_str()).share(share))?)
        };
        match std::mem::replace(&mut shape.loss, lossy) {
            Some(before) => namespace.unblock(before),
            None => Ok(()),
        }
    }

    /// Drops all IP packets in both directions while interfaces, addresses and routes stay, as a cut cable
    /// two hops away would. What the inner end's own sockets send fails with EPERM. Returned id: for
    /// [`Link::restore`].
    pub fn cut(&self) -> Result<BlockId> {
        self.inner.0.block(Rule::interface(self.inner.1.as_str()))
    }

    /// Undoes [`Link::cut`].
    pub fn restore(&self, cut: BlockId) -> Result<()> {
        self.inner.0.unblock(cut)
    }

    /// Captures at the inner end.
    pub fn capture(&self, spec: CaptureSpec) -> Result<Capture> {
        self.inner.0.capture(&self.inner.1, spec)
    }
}
