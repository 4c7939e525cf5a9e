//! The end-to-end check of this node. It judges peers' checks, the guard's counters and the
//! kernel's settings.
//!
//! Handshakes and probes say that two agents reach each other on the underlay. What the routes, rules and firewalls of either host do to
//! pods' packets shows here.

use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime};

use ipnet::IpNet;
use mesh_keyring::NodeName;
use mesh_overlay::MeshPlan;
use mesh_overlay::backend::ObservedGuard;
use mesh_overlay::guard::Guard;
use mesh_overlay::path::{PeerReport, Reach};

use crate::problem::{self, Problem, Since};
use crate::status::Reports;

/// A count that rose within this time is told as one that rises.
const RISES_FOR: Duration = Duration::from_secs(30);
/// Counts are compared over at least this time: they are not read in one moment.
const WINDOW: Duration = Duration::from_secs(4);
/// The time that a forwarding result stays valid while no packets could change it.
const HOLDS: Duration = Duration::from_secs(60);
const FORWARDING_DROPPED: &str = "forwarding-dropped";
/// Fewer packets say nothing.
const PACKETS_LEAST: u64 = 10;
/// So many windows in a row decide: a pod that tries what the host's firewall forbids fills one alone.
const WINDOWS: u32 = 2;

/// The kernel's forwarding settings, for IPv4 and IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forwarding {
    /// For the host as a whole.
    pub host: (bool, bool),
    /// For what comes in by the mesh interface.
    pub tunnel: (bool, bool),
}

impl Forwarding {
    /// Reads the settings of the mesh interface. `host`: those of the host as a whole.
    pub fn read(host: (bool, bool), interface: &str) -> Self {
        // An interface that is not there yet forbids nothing.
        let on = |family: &str| {
            let path = format!("/proc/sys/net/{family}/conf/{interface}/forwarding");
            std::fs::read_to_string(path).map_or(true, |text| text.trim() != "0")
        };
        Self { host, tunnel: (on("ipv4"), on("ipv6")) }
    }
}

/// The observations of one pass.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// The plan in force.
    pub plan: &'a MeshPlan,
    /// This node's own pod prefixes.
    pub own: &'a [IpNet],
    /// The prober's reports.
    pub reports: &'a Reports,
    /// The guard with its counts.
    pub guard: &'a ObservedGuard,
    /// The kernel's settings.
    pub forwarding: Forwarding,
    /// Chains of other tables that drop what they forward by default, as `chain FORWARD of table ip filter`.
    pub closed: &'a [String],
}

/// A count, and when it rose last.
#[derive(Debug, Clone, Default)]
struct Rising {
    before: Option<u64>,
    rose: Option<(Instant, u64)>,
}

impl Rising {
    /// Takes the count of now. Returns by how much it has risen since it began to, while it rises.
    fn take(&mut self, count: u64, now: Instant) -> Option<u64> {
        let risen = self.before.replace(count).map_or(0, |before| count.saturating_sub(before));
        let rises = self.rose.filter(|(at, _)| now.saturating_duration_since(*at) < RISES_FOR);
        let by = rises.map_or(0, |(_, by)| by);
        self.rose = if risen > 0 { Some((now, by + risen)) } else { rises };
        self.rose.map(|(_, by)| by)
    }
}

#[derive(Debug, Clone, Copy)]
struct Counts {
    at: Instant,
    crossing: u64,
    crossed: u64,
    denied: u64,
}

/// Judges, and remembers what it needs of the passes before.
#[derive(Debug, Clone, Default)]
pub struct Watcher {
    egress: Rising,
    counts: Option<Counts>,
    // Windows in a row in which most of what crossed was lost.
    bad: u32,
    // Packets that were lost of all that crossed, and when that was found.
    lost: Option<(u64, u64, Instant)>,
    since: Since,
    problems: Vec<Problem>,
}

impl Watcher {
    /// Judges what a pass has seen. `denied`: packets that policy has dropped so far.
    pub fn look(&mut self, seen: &Seen<'_>, denied: u64, clock: (Instant, SystemTime)) {
        let (now, wall) = clock;
        let mut found = unreached(seen.plan, seen.reports);
        found.extend(cut_off(seen.plan, seen.reports));
        found.extend(forwarding_off(seen.own, &seen.plan.guard, seen.forwarding));
        self.count(seen.guard, denied, now);
        found.extend(self.lost.map(|(lost, all, _)| forward_dropped(lost, all, seen.closed)));
        if let Some(packets) = self.egress.take(seen.guard.egress_drops, now) {
            let problem = Problem::new(
                "packets-leave-the-mesh",
                "guard",
                "packets for the mesh were routed past the tunnel, and the guard dropped them",
                "compare `ip rule` and `ip route show table all` with what `mesh-agent plan` shows; something else on this host sets routes",
            );
            found.push(Problem { packets: Some(packets), ..problem });
        }
        self.problems = problem::bounded(found);
        self.since.note(&mut self.problems, wall);
    }

    /// Reports whether the guard saw more packets enter the forward path than leave it since the
    /// last pass. Only then do policy's drop counts matter.
    pub fn misses(&self, guard: &ObservedGuard) -> bool {
        self.counts.is_none_or(|before| {
            guard.crossing.saturating_sub(before.crossing) > guard.crossed.saturating_sub(before.crossed)
        })
    }

    fn count(&mut self, guard: &ObservedGuard, denied: u64, now: Instant) {
        let counts = Counts { at: now, crossing: guard.crossing, crossed: guard.crossed, denied };
        let Some(before) = self.counts else {
            self.counts = Some(counts);
            return;
        };
        if now.saturating_duration_since(before.at) < WINDOW {
            return;
        }
        self.counts = Some(counts);
        let risen = |of: fn(&Counts) -> u64| of(&counts).checked_sub(of(&before));
        // A guard that was written anew counts from zero.
        let (Some(crossing), Some(crossed)) = (risen(|c| c.crossing), risen(|c| c.crossed)) else { return };
        let lost = crossing.saturating_sub(crossed).saturating_sub(risen(|c| c.denied).unwrap_or(0));
        if crossing >= PACKETS_LEAST {
            // A firewall that forbids some of it is as its owner wants it; one that lets hardly anything pass cuts pods off.
            self.bad = if lost * 2 > crossing { self.bad + 1 } else { 0 };
            self.lost = (self.bad >= WINDOWS).then_some((lost, crossing, now));
        } else if self.lost.is_some_and(|(_, _, at)| now.saturating_duration_since(at) > HOLDS) {
            self.lost = None;
        }
    }

    /// Returns the time at which a second window would decide.
    pub fn wake_at(&self) -> Option<Instant> {
        self.counts.filter(|_| self.bad == 1).map(|counts| counts.at + WINDOW)
    }

    /// Returns the problems of the last pass.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// Reports whether this host cuts its pods off from the tunnel: forwarding is off, or most
    /// forwarded packets are dropped.
    pub fn cuts_pods_off(&self) -> bool {
        let cuts = |code: &str| ["forwarding-off", FORWARDING_DROPPED].contains(&code);
        self.problems.iter().any(|problem| problem.blocks && cuts(&problem.code))
    }

    /// Reports whether any problem keeps the agent from being ready.
    pub fn blocks(&self) -> bool {
        self.problems.iter().any(|problem| problem.blocks)
    }
}

/// Returns the problems of peers that have a path and are not reached through the tunnel.
fn unreached(plan: &MeshPlan, reports: &Reports) -> Vec<Problem> {
    let judged = |name: &NodeName| -> Option<(Reach, &PeerReport)> {
        let report = reports.get(&plan.peers.get(name)?.public_key)?;
        Some((reach(report), report)).filter(|(reach, _)| *reach != Reach::Unknown)
    };
    let all: Vec<_> = plan.peers.keys().filter_map(|name| Some((name, judged(name)?))).collect();
    let reached = all.iter().filter(|(_, (reach, _))| *reach == Reach::Reached).count();
    let silent = all.iter().filter(|(_, (reach, _))| *reach == Reach::Unreached);
    let problems = silent.map(|(name, (_, report))| {
        let ends = report.through.iter().filter(|end| end.reach == Reach::Unreached);
        let ends: Vec<String> = ends.map(|end| format!("{} to {}", end.from, end.to)).collect();
        Problem::new(
            "peer-unreached",
            format!("peer {name}"),
            format!(
                "a path to it lives, but no packet through the tunnel from {} comes back",
                ends.join(", nor from ")
            ),
            format!(
                "run `mesh-agent status` here and on {name}: one of the two refuses the other's prefixes, or its rules, routes or \
                 firewall take the packets"
            ),
        )
        // One peer that is not reached is one path's fault. All of them are this host's.
        .blocking(reached == 0)
    });
    problems.collect()
}

/// Peers that say themselves that their pods are cut off.
fn cut_off(plan: &MeshPlan, reports: &Reports) -> Vec<Problem> {
    let says = |key| reports.get(key).is_some_and(|report| report.through.iter().any(|end| end.cut_off));
    let peers = plan.peers.iter().filter(|(_, peer)| says(&peer.public_key));
    peers
        .map(|(name, _)| {
            Problem::new(
                "peer-pods-cut-off",
                format!("peer {name}"),
                "its agent says that its own host keeps its pods from the tunnel",
                format!("see the problems in `mesh-agent status` on {name}"),
            )
        })
        .collect()
}

/// Reports how a peer is reached as a whole.
pub fn reach(report: &PeerReport) -> Reach {
    Reach::of(report.through.iter().map(|end| end.reach))
}

fn forwarding_off(own: &[IpNet], guard: &Guard, forwarding: Forwarding) -> Vec<Problem> {
    // The guard's local prefixes hold the node's own IPv6 mesh address, which needs no forwarding.
    let local: BTreeSet<bool> = own.iter().map(|net| net.addr().is_ipv6()).collect();
    let tunnel = guard.interfaces.first();
    let families = [
        (false, "IPv4", "ipv4", "net.ipv4.ip_forward", forwarding.host.0, forwarding.tunnel.0),
        (true, "IPv6", "ipv6", "net.ipv6.conf.all.forwarding", forwarding.host.1, forwarding.tunnel.1),
    ];
    let held = families.into_iter().filter(|(v6, ..)| local.contains(v6));
    held.filter_map(|(_, family, folder, setting, host, of_tunnel)| {
        let setting = match (host, of_tunnel, tunnel) {
            (false, ..) => setting.to_owned(),
            (true, false, Some(tunnel)) => format!("net.{folder}.conf.{tunnel}.forwarding"),
            _ => return None,
        };
        let text = format!("the kernel forwards no {family} packets: pods of this node cannot use the mesh");
        let remedy = format!("run `sysctl -w {setting}=1`, and write it to a file in /etc/sysctl.d");
        Some(Problem::new("forwarding-off", setting, text, remedy).blocking(true))
    })
    .collect()
}

fn forward_dropped(lost: u64, all: u64, closed: &[String]) -> Problem {
    let who = match closed {
        [] => "another table or program of this host".to_owned(),
        some => some.join(", "),
    };
    let problem = Problem::new(
        FORWARDING_DROPPED,
        who,
        format!("{lost} of {all} packets between pods and the tunnel were dropped while they were forwarded, and not by policy"),
        "let the host's firewall accept what it forwards from and to the mesh interface, such as by `iptables -I FORWARD -i sennit0 -j \
         ACCEPT` and `-o sennit0`, or put the interface into firewalld's zone trusted",
    )
    // Where something passes its owner wants it so.
    .blocking(lost * 20 >= all * 19);
    Problem { packets: Some(lost), ..problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(crossing: u64, crossed: u64) -> ObservedGuard {
        ObservedGuard { crossing, crossed, ..ObservedGuard::default() }
    }

    fn after(seconds: u64, begun: Instant) -> Instant {
        begun + Duration::from_secs(seconds)
    }

    #[test]
    fn a_firewall_that_drops_everything_is_told() {
        let begun = Instant::now();
        let mut watcher = Watcher::default();
        for (second, crossing, crossed, denied, lost) in [
            (0, 100, 100, 0, false),
            (10, 200, 190, 0, false),
            // One pod alone may fill a window with what the firewall forbids.
            (20, 300, 195, 0, false),
            (24, 400, 195, 0, true),
            // Nothing says that it is over.
            (30, 401, 195, 0, true),
            (40, 501, 290, 0, false),
            // Policy has dropped them.
            (50, 601, 295, 100, false),
            (60, 701, 295, 100, false),
            (70, 801, 295, 100, true),
            // A new guard counts anew, and says nothing.
            (80, 5, 5, 100, true),
            (90, 105, 105, 100, false),
        ] {
            watcher.count(&guard(crossing, crossed), denied, after(second, begun));
            assert_eq!(watcher.lost.is_some(), lost, "after {second} s");
        }
    }

    #[test]
    fn a_count_that_rests_is_forgotten() {
        let begun = Instant::now();
        let mut rising = Rising::default();
        assert_eq!(rising.take(7, begun), None);
        assert_eq!(rising.take(9, after(1, begun)), Some(2));
        assert_eq!(rising.take(10, after(20, begun)), Some(3));
        assert_eq!(rising.take(10, after(49, begun)), Some(3));
        assert_eq!(rising.take(10, after(51, begun)), None);
    }

    #[test]
    fn forwarding_is_told_by_its_setting() {
        let guard = Guard {
            mesh: BTreeSet::new(),
            // The node's own mesh address.
            local: BTreeSet::from(["fd07::1/128".parse().unwrap()]),
            outside: BTreeSet::new(),
            interfaces: BTreeSet::from(["sennit0".parse().unwrap()]),
            pod_kinds: BTreeSet::new(),
            underlay: BTreeSet::new(),
            carriers: None,
            cleartext: None,
        };
        let settings = |own: &[&str], host, tunnel| -> Vec<String> {
            let own: Vec<IpNet> = own.iter().map(|net| net.parse().unwrap()).collect();
            let found = forwarding_off(&own, &guard, Forwarding { host, tunnel });
            found.into_iter().map(|problem| problem.object).collect()
        };
        assert!(settings(&[], (false, false), (false, false)).is_empty(), "no pods");
        let v4 = &["10.1.0.0/24"];
        assert_eq!(settings(v4, (false, false), (true, true)), ["net.ipv4.ip_forward"]);
        let both = &["10.1.0.0/24", "fd00:1::/64"];
        assert_eq!(
            settings(both, (true, false), (false, true)),
            ["net.ipv4.conf.sennit0.forwarding", "net.ipv6.conf.all.forwarding"]
        );
        assert!(settings(both, (true, true), (true, true)).is_empty());
    }
}
