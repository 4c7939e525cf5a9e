//! The namespace that rulesets are tried in.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_policy::compile::{Logging, MASK, Settings};
use mesh_policy::failsafe::FailSafe;
use mesh_policy::nft::{Ownership, Table};
use mesh_policy::world::Node;
use mesh_policy::{Compiler, Enforcer, Event};
use netlab::Tun;
use nix::sched::{CloneFlags, unshare};

use crate::packet::{self, Packet};

/// The node that the rig is.
pub const NODE: &str = "here";
/// Packets that are sent before what came out is read: less than a TUN device's queue has room for.
const AT_ONCE: usize = 200;
/// For a packet that is surely on its way.
const PATIENCE: Duration = Duration::from_secs(10);
/// Neither is in any mesh: packets between them tell that all before them have been judged.
const SENTINEL: [&str; 2] = ["203.0.113.1", "203.0.113.2"];
/// The number of a sentinel.
const SENTINEL_NUMBER: u32 = u32::MAX;

/// The phase in which a hammer stops.
pub const END: usize = 3;
/// The phase that packets count in during which the phase changes.
pub const BETWEEN: usize = 1;
/// Sends until it is told to stop; how often each packet was sent and passed, by phase.
pub type Hammer<const N: usize> = JoinHandle<anyhow::Result<[[(u64, u64); N]; END]>>;

/// Where a packet comes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Link {
    /// Where pods and hosts beside the mesh are.
    Pods,
    /// Where decrypted packets come from.
    Tunnel,
}

/// A namespace with the ruleset under test. It belongs to the thread that made it, and that thread to it.
pub struct Rig {
    pods: Arc<Tun>,
    tunnel: Tun,
    /// What is enforced.
    pub enforcer: Enforcer<Table>,
    /// The clock that the enforcer is told: epochs end without waiting.
    pub now: Instant,
    number: u32,
}

/// Settings of the node that the rig is: everything of 10/8 and fd00::/16 is of the mesh.
pub fn settings() -> Settings {
    let nets = |nets: &[&str]| nets.iter().map(|net| net.parse().expect("a prefix")).collect();
    Settings {
        node: NODE.to_owned(),
        tunnels: ["sennit0".to_owned()].into(),
        keyless: BTreeSet::new(),
        scope: nets(&["10.0.0.0/8", "fd00::/16"]),
        own: BTreeSet::new(),
        address: None,
        strangers: false,
        outside_prefixes: true,
        carriers: BTreeSet::new(),
        failsafe: FailSafe::default(),
        resolvers: None,
        check_sources: false,
        outside: BTreeSet::new(),
        vxlan: BTreeSet::new(),
        audit: false,
        log: Logging { group: 5180, denied: 10, allowed: 0 },
        mask: MASK,
        budgets: Default::default(),
    }
}

fn run(program: &str, arguments: &str) -> anyhow::Result<String> {
    let output =
        Command::new(program).args(arguments.split_whitespace()).output().context(program.to_owned())?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{program} {arguments}: {said}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Rig {
    /// Makes the namespace, and takes the calling thread into it for good. Needs root.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(settings: Settings, nodes: BTreeMap<String, Node>) -> anyhow::Result<Self> {
        Self::with(settings, nodes, Ownership::Owner)
    }

    /// The same with a table that others may change too, or may not.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn with(
        settings: Settings,
        nodes: BTreeMap<String, Node>,
        ownership: Ownership,
    ) -> anyhow::Result<Self> {
        unshare(CloneFlags::CLONE_NEWNET).context("a network namespace")?;
        for (key, value) in [
            ("ipv4/ip_forward", "1"),
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "0"),
            ("ipv4/conf/all/send_redirects", "0"),
            ("ipv4/conf/default/send_redirects", "0"),
            ("ipv6/conf/all/forwarding", "1"),
            ("ipv6/conf/default/accept_dad", "0"),
            ("ipv6/conf/default/addr_gen_mode", "1"),
        ] {
            std::fs::write(format!("/proc/sys/net/{key}"), value).with_context(|| key.to_owned())?;
        }
        let (pods, tunnel) = (Tun::open("pods0")?, Tun::open("sennit0")?);
        for name in ["lo", "pods0", "sennit0"] {
            run("ip", &format!("link set {name} up"))?;
        }
        for family in ["-4", "-6"] {
            run("ip", &format!("{family} route add default dev pods0"))?;
        }
        let mut compiler = Compiler::new(settings.clone());
        compiler.configure(settings, nodes);
        let mut rig = Self {
            pods: Arc::new(pods),
            tunnel,
            enforcer: Enforcer::new(compiler, Table::open(ownership)?, 1),
            now: Instant::now(),
            number: 0,
        };
        rig.settle()?;
        Ok(rig)
    }

    /// Routes a prefix into the tunnel.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn through_tunnel(&self, net: &str) -> anyhow::Result<()> {
        run("ip", &format!("route add {net} dev sennit0")).map(drop)
    }

    /// Runs a program in the namespace, and gives what it says.
    ///
    /// # Errors
    /// When it fails.
    pub fn run(&self, program: &str, arguments: &str) -> anyhow::Result<String> {
        run(program, arguments)
    }

    /// Enforces what was told to the compiler, without the next epoch.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn enforce(&mut self) -> anyhow::Result<()> {
        self.enforcer.pass(self.now)?;
        Ok(())
    }

    /// Enforces it, and begins the next epoch.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn settle(&mut self) -> anyhow::Result<()> {
        self.enforce()?;
        // No packet of ours is under way: each was judged when the call that sent it returned.
        if let Some(at) = self.enforcer.wake_at() {
            self.now = self.now.max(at);
            self.enforcer.pass(self.now)?;
        }
        Ok(())
    }

    /// Tells the compiler, and settles.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn tell(&mut self, events: impl IntoIterator<Item = Event>) -> anyhow::Result<()> {
        events.into_iter().for_each(|event| self.enforcer.compiler.take(event));
        self.settle()
    }

    /// Closes the table's socket, as the end of its process does. What was enforced by it is given back.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn orphan(&mut self) -> anyhow::Result<Compiler> {
        // Another table of the same name cannot be opened while this one has an owner, so that one of another namespace stands in.
        let elsewhere = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            anyhow::Ok(Table::open(Ownership::Owner)?)
        });
        let elsewhere = elsewhere.join().map_err(|_| anyhow::anyhow!("no other namespace"))??;
        let stand_in = Enforcer::new(Compiler::new(settings()), elsewhere, 1);
        Ok(std::mem::replace(&mut self.enforcer, stand_in).compiler)
    }

    /// Another agent takes over the table, knowing the same.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn adopt(&mut self, compiler: Compiler) -> anyhow::Result<()> {
        self.number += 1;
        self.enforcer = Enforcer::new(compiler, Table::open(Ownership::Owner)?, self.number << 8);
        self.enforce()
    }

    /// Sends these packets of pods again and again until the phase is [`END`], and counts for each, by phase, how often it was sent
    /// and how often it passed.
    pub fn hammer<const N: usize>(&mut self, packets: [Packet; N], phase: &Arc<AtomicUsize>) -> Hammer<N> {
        let (pods, phase) = (Arc::clone(&self.pods), Arc::clone(phase));
        std::thread::spawn(move || {
            const FIRST: u32 = 1 << 30;
            let mut counts = [[(0, 0); N]; END];
            // By number: in which phase a packet was sent.
            let mut phases: Vec<u8> = Vec::new();
            let mut buffer = [0; 2048];
            loop {
                let over = phase.load(Ordering::SeqCst) >= END;
                for (index, packet) in packets.iter().enumerate().filter(|_| !over) {
                    let number = FIRST + phases.len() as u32;
                    let before = phase.load(Ordering::SeqCst);
                    pods.send(&Packet { number, ..*packet }.octets()).context("sending a packet")?;
                    let same = before == phase.load(Ordering::SeqCst) && before < END;
                    let of = if same { before } else { BETWEEN };
                    counts[of][index].0 += 1;
                    phases.push(of as u8);
                }
                let patience = Duration::from_millis(if over { 200 } else { 0 });
                while let Some(length) = pods.receive(&mut buffer, Instant::now() + patience)? {
                    let number =
                        packet::number(&buffer[..length]).and_then(|number| number.checked_sub(FIRST));
                    if let Some(number) =
                        number.map(|number| number as usize).filter(|number| *number < phases.len())
                    {
                        counts[usize::from(phases[number])][number % N].1 += 1;
                    }
                }
                if over {
                    return Ok(counts);
                }
            }
        })
    }

    /// A number that no packet had before.
    pub fn number(&mut self) -> u32 {
        self.number += 1;
        self.number
    }

    /// Which of these packets pass, in their order.
    ///
    /// # Errors
    /// When a packet cannot be sent, or not even one that nothing judges comes back.
    pub fn pass(&mut self, link: Link, packets: &[Packet]) -> anyhow::Result<Vec<bool>> {
        let mut passed = Vec::with_capacity(packets.len());
        for some in packets.chunks(AT_ONCE) {
            let octets: Vec<Vec<u8>> = some.iter().map(Packet::octets).collect();
            let arrived = self.send(link, &octets)?;
            passed.extend(some.iter().map(|packet| arrived.contains(&packet.number)));
        }
        Ok(passed)
    }

    /// Whether a packet passes.
    ///
    /// # Errors
    /// As [`Rig::pass`].
    pub fn passes(&mut self, link: Link, packet: &Packet) -> anyhow::Result<bool> {
        Ok(self.pass(link, std::slice::from_ref(packet))?[0])
    }

    /// Sends packets, at most 200, and gives the numbers of those that come out somewhere.
    ///
    /// # Errors
    /// As [`Rig::pass`].
    pub fn send(&mut self, link: Link, packets: &[Vec<u8>]) -> anyhow::Result<BTreeSet<u32>> {
        let from = match link {
            Link::Pods => &self.pods,
            Link::Tunnel => &self.tunnel,
        };
        for packet in packets {
            from.send(packet).context("sending a packet")?;
        }
        let [source, destination] = SENTINEL.map(|text| text.parse::<IpAddr>().expect("an address"));
        let sentinel = Packet::first(source, destination, 253, 0, SENTINEL_NUMBER);
        self.pods.send(&sentinel.octets()).context("sending a packet")?;
        let deadline = Instant::now() + PATIENCE;
        let mut arrived = BTreeSet::new();
        let mut buffer = [0; 2048];
        loop {
            let length =
                self.pods.receive(&mut buffer, deadline)?.context("a packet that nothing judges is gone")?;
            match packet::number(&buffer[..length]) {
                Some(SENTINEL_NUMBER) => break,
                number => arrived.extend(number),
            }
        }
        while let Some(length) = self.tunnel.receive(&mut buffer, Instant::now())? {
            arrived.extend(packet::number(&buffer[..length]));
        }
        Ok(arrived)
    }
}
