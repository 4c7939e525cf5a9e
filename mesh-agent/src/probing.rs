//! Runs the path prober beside the agent's loop: sockets, timers, and word of what has changed.

mod filter;
mod packet;
mod socket;
mod tap;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::rc::Rc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use mesh_keyring::{PrivateKey, PublicKey};
use mesh_overlay::MeshPlan;
use mesh_overlay::device::ObservedDevice;
use mesh_overlay::path::{LineReport, Liveness, PeerPaths, PeerReport, Prober, Rung};
use mesh_overlay::plan::{PathChoice, Paths};
use mesh_overlay::prefix::PrefixIndex;
use tokio::sync::Notify;

use socket::Sockets;
use tap::Tap;

/// Timers fire no finer than this: at a thousand peers something is due all the time.
const TICK: Duration = Duration::from_millis(10);
/// While the sockets cannot be had, they are tried again this often.
const RETRY: Duration = Duration::from_secs(10);

/// An interface that is down, or made anew, is listened on again after this.
const TAP_RETRY: Duration = Duration::from_secs(1);

struct Shared {
    prober: Prober,
    // Zero until the device's port is known.
    port: u16,
    // Whether a device listens there.
    device: bool,
    // The mesh interface, as the kernel numbers it now.
    interface: Option<u32>,
    // Whether the device was seen once.
    looked: bool,
    failure: Option<String>,
}

/// Binds a port that nobody reads.
fn hold(port: u16) -> std::io::Result<UdpSocket> {
    let both = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port));
    both.or_else(|_| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)))
}

/// How the peer sees us on the path in use: the others are asked rarely, and what they say may be long past.
fn seen_as(report: &PeerReport) -> Option<SocketAddr> {
    let (_, used, _) = report.carrying?;
    let fresh = |line: &&LineReport| {
        line.rung == Rung::Direct && line.state == Liveness::Alive && line.address == used
    };
    report.lines.iter().find(fresh)?.seen_as
}

/// The prober with its task.
#[derive(Clone)]
pub struct Probing {
    shared: Rc<RefCell<Shared>>,
    peers_changed: Rc<Notify>,
    found: Rc<Notify>,
}

impl Probing {
    /// Begins to probe: nobody yet. Needs a `LocalSet`.
    ///
    /// # Errors
    /// When the system gives no random bytes.
    pub fn start(key: PrivateKey) -> anyhow::Result<Self> {
        let mut boot = [0; 16];
        getrandom::fill(&mut boot).map_err(|e| anyhow::anyhow!("random bytes: {e}"))?;
        let probing = Self {
            shared: Rc::new(RefCell::new(Shared {
                prober: Prober::new(key, boot),
                port: 0,
                device: true,
                interface: None,
                looked: false,
                failure: None,
            })),
            peers_changed: Rc::default(),
            found: Rc::default(),
        };
        tokio::task::spawn_local(probing.clone().run());
        Ok(probing)
    }

    /// Waits until something was decided, or a path MTU has changed.
    pub async fn changed(&self) {
        self.found.notified().await;
    }

    /// Probes the peers of a plan from its port.
    pub fn follow(&self, plan: &MeshPlan) {
        let peers: BTreeMap<PublicKey, PeerPaths> =
            plan.peers.values().map(|peer| (peer.public_key, peer.paths.clone())).collect();
        let mesh: BTreeSet<IpNet> = plan.guard.mesh.iter().chain(&plan.guard.local).copied().collect();
        let mesh = PrefixIndex::new(mesh.into_iter().map(|net| (net, ())));
        let mut shared = self.shared.borrow_mut();
        // A tunnel inside of itself would carry nothing.
        shared.prober.set_peers(
            peers,
            move |to: &SocketAddr| mesh.holding(to.ip()).is_none(),
            Instant::now(),
        );
        (shared.port, shared.device) = (plan.device.listen_port, plan.encrypts);
        shared.prober.set_port(plan.device.listen_port);
        let interface = plan.guard.interfaces.first();
        shared.interface =
            interface.and_then(|interface| nix::net::if_::if_nametoindex(interface.as_str()).ok());
        drop(shared);
        self.peers_changed.notify_one();
    }

    /// Where the device sends to: addresses that peers have roamed to are looked at. What it sends to the first time was left by an
    /// agent before us, and goes before what only answers sooner.
    pub fn observed(&self, device: &ObservedDevice) {
        let mut shared = self.shared.borrow_mut();
        let now = Instant::now();
        let first = !std::mem::replace(&mut shared.looked, true);
        for (key, peer) in &device.peers {
            if let (Some(endpoint), Some(_)) = (peer.endpoint, peer.last_handshake) {
                if first {
                    shared.prober.adopted(key, endpoint, now);
                } else {
                    shared.prober.observed(key, endpoint, now);
                }
            }
        }
        drop(shared);
        self.peers_changed.notify_one();
    }

    /// Tells peers whether the pods of this node are cut off from the tunnel.
    pub fn cut_off(&self, cut_off: bool) {
        self.shared.borrow_mut().prober.set_cut_off(cut_off);
    }

    /// How all peers are reached.
    pub fn report(&self) -> BTreeMap<PublicKey, PeerReport> {
        self.shared.borrow().prober.report(Instant::now())
    }

    /// The same as the plan wants it.
    pub fn paths(&self) -> Paths {
        let of = |(key, report): (PublicKey, PeerReport)| {
            let (rung, address, _) = report.carrying?;
            let choice = PathChoice {
                rung,
                address: Some(address).filter(|_| !report.blocked),
                mtu: report.mtu,
                probed: report.lines.iter().map(|line| line.address).collect(),
                seen_as: seen_as(&report),
            };
            Some((key, choice))
        };
        // What nobody looks after any more is not known.
        if self.failure().is_some() {
            return Paths::new();
        }
        self.report().into_iter().filter_map(of).collect()
    }

    /// Why nothing is probed, if that is so.
    pub fn failure(&self) -> Option<String> {
        self.shared.borrow().failure.clone()
    }

    async fn run(self) {
        let mut sockets: Option<Sockets> = None;
        let mut out = Vec::new();
        let mut told = 0;
        let mut tried: Option<Instant> = None;
        // The peers that the sockets' filters know.
        let mut filtered = None;
        // What comes through the tunnel. The interface may be made anew.
        let mut tap: Option<Tap> = None;
        let mut tapped: Option<Instant> = None;
        // Where no device listens the kernel would answer each probe that nobody does.
        let mut held: Option<(u16, std::io::Result<UdpSocket>)> = None;
        loop {
            let port = self.shared.borrow().port;
            if sockets.as_ref().is_none_or(|sockets| sockets.port() != port)
                && port != 0
                && tried.is_none_or(|at| at.elapsed() >= RETRY)
            {
                sockets = self.open(port);
                tried = if sockets.is_some() { None } else { Some(Instant::now()) };
                filtered = None;
            }
            let device = self.shared.borrow().device;
            if device {
                held = None;
            } else if port != 0 && held.as_ref().is_none_or(|(held, _)| *held != port) {
                let bound = hold(port);
                if let Err(e) = &bound {
                    tracing::warn!(
                        "UDP port {port}: {e}; the kernel answers peers' probes as if nobody were here"
                    );
                }
                held = Some((port, bound));
            }
            let due = self.shared.borrow().prober.wake_at();
            let due = due.filter(|_| sockets.is_some()).unwrap_or_else(|| Instant::now() + RETRY);
            let due = due.max(Instant::now() + TICK);
            let interface = self.shared.borrow().interface;
            if tap.as_ref().map(Tap::index) != interface
                && tapped.is_none_or(|at: Instant| at.elapsed() >= TAP_RETRY)
            {
                tapped = Some(Instant::now());
                let ids = self.shared.borrow().prober.route_ids();
                tap = interface.and_then(|index| Tap::open(index, &ids).ok());
            }
            let arrived = async {
                match &sockets {
                    Some(sockets) => sockets.readable().await,
                    None => std::future::pending().await,
                }
            };
            let through = async {
                // Nothing is read before the sockets stand.
                match tap.as_ref().filter(|_| sockets.is_some()) {
                    Some(tap) => tap.readable().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = arrived => {}
                () = through => {}
                () = tokio::time::sleep_until(due.into()) => {}
                () = self.peers_changed.notified() => {}
            }
            let Some(sockets) = &mut sockets else { continue };
            let mut shared = self.shared.borrow_mut();
            let now = Instant::now();
            let revision = shared.prober.route_ids_revision();
            if filtered != Some(revision) {
                filtered = Some(revision);
                let ids = shared.prober.route_ids();
                sockets.admit(&ids);
                if let Some(tap) = &tap {
                    tap.admit(&ids);
                }
            }
            // First what has arrived: nothing is lost that only was not read yet.
            let mut answers = Vec::new();
            let mut take = |from, local, datagram: &mut [u8]| {
                shared.prober.receive(from, datagram, now, &mut out);
                answers.extend(out.drain(..).map(|answer| (answer, local)));
            };
            // Before the host's own input: the tap knows to which address a question was sent.
            if tap.as_mut().is_some_and(|tap| tap.receive(&mut take).is_err()) {
                tap = None;
            }
            sockets.receive(take);
            // From where the question went to, as the device answers: a firewall in between knows no other.
            for (answer, local) in answers {
                sockets.send(answer.to, local, &answer.payload, now);
            }
            shared.prober.poll(now, &mut out);
            for transmit in out.drain(..) {
                sockets.send(transmit.to, transmit.from, &transmit.payload, now);
            }
            if shared.prober.changes() != told {
                told = shared.prober.changes();
                self.found.notify_one();
            }
        }
    }

    fn open(&self, port: u16) -> Option<Sockets> {
        let opened = Sockets::open(port);
        let failure = opened.as_ref().err().map(|e| {
            let remedy = match e.kind() {
                std::io::ErrorKind::PermissionDenied => ": give the agent CAP_NET_RAW",
                _ => "; it is tried again",
            };
            format!(
                "probing paths on UDP port {port}: {e}; paths are not watched, and there is no fallback{remedy}"
            )
        });
        if self.shared.borrow().failure != failure {
            self.found.notify_one();
        }
        self.shared.borrow_mut().failure = failure;
        opened.ok()
    }
}
