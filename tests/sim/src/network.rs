//! Nodes, what lies between them, and time.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use mesh_keyring::{PrivateKey, PublicKey};
use mesh_overlay::path::{Candidate, Origin, PeerPaths, PeerReport, Prober, Rung, Transmit, headers};

use crate::random::Random;

/// The WireGuard port of all nodes.
const PORT: u16 = 51820;
/// Timers fire no finer than this, as the agent's do.
const TICK: Duration = Duration::from_millis(10);

/// A node, counted from 0.
pub type NodeId = usize;

/// What the network does with a datagram.
pub trait World {
    /// Whether it arrives, and after how long. `size` is that of the packet, in bytes of IP.
    fn carries(&mut self, from: NodeId, to: NodeId, rung: Rung, size: u16) -> Option<Duration>;
}

struct Node {
    private: PrivateKey,
    key: PublicKey,
    prober: Prober,
    peers: BTreeMap<PublicKey, PeerPaths>,
    up: bool,
    wake: Option<Instant>,
}

struct Flight {
    to: NodeId,
    // Where it seems to come from.
    source: SocketAddr,
    datagram: Vec<u8>,
}

/// All nodes with what is under way between them.
pub struct Network<W> {
    /// What lies between the nodes.
    pub world: W,
    /// Datagrams sent since the start.
    pub sent: u64,
    nodes: Vec<Node>,
    ids: HashMap<PublicKey, NodeId>,
    // On a carrier, or inside of the tunnel.
    addresses: HashMap<IpAddr, (NodeId, Option<Rung>)>,
    flights: HashMap<u64, Flight>,
    queue: BinaryHeap<Reverse<(Instant, u64)>>,
    // Each node's next timer, and outdated ones.
    timers: BinaryHeap<Reverse<(Instant, NodeId)>>,
    next: u64,
    begun: Instant,
    now: Instant,
}

/// Returns a node's address on a carrier.
pub(crate) fn address(node: NodeId, rung: Rung) -> SocketAddr {
    let n = u32::try_from(node).unwrap_or(u32::MAX);
    let ip = match rung {
        Rung::Direct => IpAddr::V4(Ipv4Addr::from(0xc612_0000 + n)),
        // The simulator has no exempt pairs.
        Rung::Vxlan | Rung::Cleartext => IpAddr::V6(Ipv6Addr::from((0xfd53_u128 << 112) + u128::from(n))),
    };
    SocketAddr::new(ip, PORT)
}

/// Returns a node's address inside the tunnel.
fn mesh_address(node: NodeId) -> IpAddr {
    IpAddr::V6(Ipv6Addr::from((0xfd07_u128 << 112) + node as u128))
}

impl<W: World> Network<W> {
    /// Nodes that know of each other what `peers` says.
    pub fn new(count: usize, world: W, random: &mut Random, peers: impl Fn(NodeId, NodeId) -> bool) -> Self {
        let begun = Instant::now();
        let mut nodes = Vec::new();
        for _ in 0..count {
            let secret: [u8; 32] = std::array::from_fn(|_| random.bits() as u8);
            let Ok(private) = PrivateKey::from_bytes(&secret) else { continue };
            let prober = Prober::new(private.clone(), boot(random));
            let key = private.public();
            nodes.push(Node { private, key, prober, peers: BTreeMap::new(), up: true, wake: None });
        }
        let ids = nodes.iter().enumerate().map(|(id, node)| (node.key, id)).collect();
        let rungs = [Rung::Direct, Rung::Vxlan];
        let addresses = (0..nodes.len()).flat_map(|id| {
            let carriers = rungs.map(|rung| (address(id, rung).ip(), (id, Some(rung))));
            carriers.into_iter().chain([(mesh_address(id), (id, None))])
        });
        let addresses = addresses.collect();
        let mut network = Self {
            world,
            sent: 0,
            nodes,
            ids,
            addresses,
            flights: HashMap::new(),
            queue: BinaryHeap::new(),
            timers: BinaryHeap::new(),
            next: 0,
            begun,
            now: begun,
        };
        for id in 0..network.nodes.len() {
            let of = |other: NodeId| (network.nodes[other].key, paths(id, other));
            let known = (0..network.nodes.len()).filter(|other| *other != id && peers(id, *other)).map(of);
            let known: BTreeMap<_, _> = known.collect();
            network.nodes[id].prober.set_peers(known.clone(), |_| true, begun);
            network.nodes[id].peers = known;
            // Nobody starts at exactly the same moment.
            let spread = Duration::from_millis(random.below(1000) as u64);
            network.set_timer(id, Some(begun + spread));
        }
        network
    }

    /// Since the start.
    pub fn elapsed(&self) -> Duration {
        self.now - self.begun
    }

    /// The time.
    pub fn now(&self) -> Instant {
        self.now
    }

    /// A node dies.
    pub fn kill(&mut self, id: NodeId) {
        self.nodes[id].up = false;
    }

    /// It is back, and knows nothing of before.
    pub fn revive(&mut self, id: NodeId, random: &mut Random) {
        let now = self.now;
        let node = &mut self.nodes[id];
        node.prober = Prober::new(node.private.clone(), boot(random));
        node.prober.set_peers(node.peers.clone(), |_| true, now);
        node.up = true;
        self.set_timer(id, Some(now));
    }

    fn set_timer(&mut self, id: NodeId, at: Option<Instant>) {
        let wake = &mut self.nodes[id].wake;
        if *wake != at {
            *wake = at;
            self.timers.extend(at.map(|at| Reverse((at, id))));
        }
    }

    /// Whether a node runs.
    pub fn is_up(&self, id: NodeId) -> bool {
        self.nodes[id].up
    }

    /// All reports of a node, by node.
    pub fn reports(&self, from: NodeId) -> impl Iterator<Item = (NodeId, PeerReport)> {
        let reports = self.nodes[from].prober.report(self.now);
        reports.into_iter().filter_map(|(key, report)| Some((*self.ids.get(&key)?, report)))
    }

    /// How a node reaches another.
    pub fn report(&self, from: NodeId, to: NodeId) -> Option<PeerReport> {
        self.nodes[from].prober.report(self.now).remove(&self.nodes[to].key)
    }

    /// What a node uses to reach another, and whether it believes that it answers.
    pub fn carrying(&self, from: NodeId, to: NodeId) -> Option<(Rung, bool)> {
        let report = self.report(from, to)?;
        report.carrying.map(|(rung, ..)| (rung, !report.blocked))
    }

    /// Which nodes there are.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Lets time pass.
    pub fn run(&mut self, span: Duration) {
        let until = self.now + span;
        loop {
            let arrival = self.queue.peek().map(|Reverse((at, _))| *at);
            while self
                .timers
                .peek()
                .is_some_and(|Reverse((at, id))| !self.nodes[*id].up || self.nodes[*id].wake != Some(*at))
            {
                self.timers.pop();
            }
            let timer = self.timers.peek().map(|Reverse((at, _))| *at);
            let Some(next) = arrival.into_iter().chain(timer).min().filter(|at| *at <= until) else { break };
            self.now = self.now.max(next);
            self.deliver();
            self.fire();
        }
        self.now = until;
    }

    fn deliver(&mut self) {
        while let Some(Reverse((at, number))) = self.queue.peek().copied() {
            if at > self.now {
                return;
            }
            self.queue.pop();
            let Some(mut flight) = self.flights.remove(&number) else { continue };
            if !self.nodes[flight.to].up {
                continue;
            }
            let mut out = Vec::new();
            let from = flight.source;
            let node = &mut self.nodes[flight.to];
            node.prober.receive(from, &mut flight.datagram, self.now, &mut out);
            self.sleep(flight.to);
            self.send(flight.to, out);
        }
    }

    fn fire(&mut self) {
        while let Some(Reverse((at, id))) = self.timers.peek().copied() {
            if at > self.now {
                return;
            }
            self.timers.pop();
            let node = &mut self.nodes[id];
            if node.up && node.wake == Some(at) {
                node.wake = None;
                let mut out = Vec::new();
                node.prober.poll(self.now, &mut out);
                self.sleep(id);
                self.send(id, out);
            }
        }
    }

    fn sleep(&mut self, id: NodeId) {
        let wake = self.nodes[id].prober.wake_at().map(|at| at.max(self.now + TICK));
        self.set_timer(id, wake);
    }

    fn send(&mut self, from: NodeId, out: Vec<Transmit>) {
        for Transmit { to, payload, .. } in out {
            self.sent += 1;
            let Some(&(id, place)) = self.addresses.get(&to.ip()) else { continue };
            // What goes into the tunnel takes the path that carries.
            let carrying = || self.nodes[from].prober.carrying(&self.nodes[id].key).map(|(rung, _)| rung);
            let Some(rung) = place.or_else(carrying) else { continue };
            let source = match place {
                Some(rung) => address(from, rung),
                None => SocketAddr::new(mesh_address(from), PORT),
            };
            let size = u16::try_from(payload.len()).unwrap_or(u16::MAX) + headers(&to);
            let Some(takes) = self.world.carries(from, id, rung, size) else { continue };
            self.flights.insert(self.next, Flight { to: id, source, datagram: payload });
            self.queue.push(Reverse((self.now + takes, self.next)));
            self.next += 1;
        }
    }
}

fn boot(random: &mut Random) -> [u8; 16] {
    std::array::from_fn(|_| random.bits() as u8)
}

fn paths(own: NodeId, node: NodeId) -> PeerPaths {
    let candidate =
        |rung, origin, mtu_most| Candidate { address: address(node, rung), rung, origin, mtu_most };
    PeerPaths {
        candidates: vec![
            candidate(Rung::Direct, Origin::Published, 1500),
            candidate(Rung::Vxlan, Origin::Carrier, 1450),
        ],
        mtu_most: 1500,
        inside: vec![(mesh_address(own), mesh_address(node))],
        asking: vec![mesh_address(node)],
    }
}
