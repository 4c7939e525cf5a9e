//! What on this host takes packets past the guard or past policy, or takes them away from the mesh.
//!
//! [`judge`] is pure: it compares what the kernel says with what the mesh needs. [`Watcher`] reads, once in each pass of the agent.

mod cni;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use ipnet::IpNet;
use mesh_overlay::MeshPlan;
use mesh_overlay::local::Routing;
use mesh_overlay::netlink::Netlink;
use mesh_overlay::prefix::overlap;
use mesh_overlay::surroundings::{Action, Neighbour, RoutingRule, Surroundings};
use mesh_policy::nft::{Deed, Others, OthersReader};
use serde::{Deserialize, Serialize};

use crate::config::{Config, Mode, RegistryChoice};
use crate::problem::{self, Problem, Since};

/// How long a reading counts at least, however much changes. It counts as long as a pass of the agent at most.
const BREATH: Duration = Duration::from_secs(1);
/// Where container runtimes look for the configuration of pods' networks.
pub const CNI_FOLDER: &str = "/etc/cni/net.d";

/// What the operator knows of and accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Acknowledged {
    /// Pods whose packets do not pass this host's network stack: they leave in clear, and no policy judges them.
    PodsBesideTheHost,
    /// Flowtables of others: flows in them are neither judged nor cut.
    ForeignFlowtables,
}

/// What the mesh needs of this host.
#[derive(Debug, Clone, Default)]
pub struct Needs {
    /// All prefixes of the mesh.
    pub mesh: BTreeSet<IpNet>,
    /// Those of this node.
    pub own: BTreeSet<IpNet>,
    /// The mesh's own interfaces.
    pub interfaces: BTreeSet<String>,
    /// Our routing table and its rule.
    pub routing: Routing,
    /// Whether this host is a node of a cluster: others put pods on it.
    pub cluster: bool,
    /// Whether policy is enforced.
    pub judges: bool,
    /// Whether sources are checked by the interface that packets come in by.
    pub checks_sources: bool,
    /// What the operator accepts.
    pub acknowledged: BTreeSet<Acknowledged>,
}

impl Needs {
    /// What a node of this configuration needs for this plan.
    pub fn of(config: &Config, plan: &MeshPlan) -> Self {
        let guard = &plan.guard;
        let carriers = plan.vxlan.iter().map(|device| device.name.to_string());
        Self {
            mesh: guard.mesh.clone(),
            own: guard.local.clone(),
            interfaces: guard.interfaces.iter().map(ToString::to_string).chain(carriers).collect(),
            routing: config.routing,
            // With a registry of files too, a kubelet tells its pods so.
            cluster: matches!(config.registry, RegistryChoice::Kube(_))
                || std::env::var_os("KUBERNETES_SERVICE_HOST").is_some(),
            judges: config.policy.mode == Mode::Enforce,
            checks_sources: config.policy.check_sources,
            acknowledged: config.acknowledge.clone(),
        }
    }

    fn accepts(&self, what: Acknowledged) -> bool {
        self.acknowledged.contains(&what)
    }

    /// Prefixes of the mesh that are reached through it.
    fn elsewhere(&self) -> impl Iterator<Item = &IpNet> {
        self.mesh.iter().filter(|net| !self.own.iter().any(|own| own.contains(*net)))
    }
}

/// All that is wrong, as far as these readings tell. `cni`: kinds of pods' networks by the file that names them.
pub fn judge(
    needs: &Needs,
    around: &Surroundings,
    others: &Others,
    cni: &BTreeMap<String, String>,
) -> Vec<Problem> {
    let mut found = Vec::new();
    found.extend(flowtables(needs, others));
    found.extend(doers(needs, others));
    found.extend(rules(needs, around));
    found.extend(vrfs(needs, around));
    found.extend(wide(needs, around));
    found.extend(beside(needs, around, cni));
    found.extend(programs(needs, around));
    if needs.judges && !needs.checks_sources {
        found.push(Problem::new(
            "sources-unchecked",
            "policy.checkSources",
            "it is off: a pod may send from any address that is not of the mesh, which passes its own egress policies and others' ipBlocks",
            "set it to true, or name single interfaces in policy.outsideInterfaces",
        ));
    }
    let cut = around.cut.iter().copied().chain(others.cut.then_some("nftables rules"));
    found.extend(cut.map(|what| {
        Problem::new(
            "too-much-to-look-at",
            what,
            "this host has more of them than are looked at",
            "what takes packets past the mesh may be among the rest",
        )
    }));
    problem::bounded(found)
}

fn flowtables<'a>(needs: &'a Needs, others: &'a Others) -> impl Iterator<Item = Problem> + 'a {
    others.flowtables.iter().filter(|table| !table.devices.is_empty()).map(|flowtable| {
        let object = format!("flowtable {} in table {}", flowtable.name, flowtable.table);
        let text = format!(
            "flows that it takes on {} pass neither policy nor the guard's last look: what is denied later goes on",
            flowtable.devices.join(", ")
        );
        let remedy = format!(
            "take it away (nft delete flowtable {} {}), or acknowledge foreign-flowtables",
            flowtable.table, flowtable.name
        );
        Problem::new("flowtable-foreign", object, text, remedy)
            .blocking(!needs.accepts(Acknowledged::ForeignFlowtables))
    })
}

fn doers<'a>(needs: &'a Needs, others: &'a Others) -> impl Iterator<Item = Problem> + 'a {
    others.doers.iter().map(|doer| {
        let object = format!("chain {} in table {}", doer.chain, doer.table);
        match doer.deed {
            Deed::NoTrack => Problem::new(
                "notrack-foreign",
                object,
                "conntrack hears nothing of some packets; where policy denies anything, those of pods are dropped",
                "see that the rule selects no packet of pods or the mesh",
            ),
            Deed::HandOn => Problem::new(
                "forwarding-before-hooks",
                object,
                "it hands packets on to another device before policy and guard see them",
                "see that the rule selects no packet of pods or the mesh, or take it away",
            )
            .blocking(needs.judges),
        }
    })
}

/// Rules that decide before ours about packets to the mesh.
fn rules<'a>(needs: &'a Needs, around: &'a Surroundings) -> impl Iterator<Item = Problem> + 'a {
    let ours = &needs.routing;
    let is_ours = |rule: &RoutingRule| {
        rule.priority == ours.priority
            && rule.action == Action::Table(ours.table)
            && rule.from.is_none()
            && rule.to.is_none()
    };
    let mut passed = [false; 2];
    let ahead = around.rules.iter().filter(move |rule| {
        // Of one priority the kernel asks them in the order in which it tells of them.
        let passed = &mut passed[usize::from(rule.v6)];
        *passed |= is_ours(rule);
        !*passed && rule.priority <= ours.priority
    });
    ahead.filter_map(move |rule| {
        let narrow = rule.narrow && !rule.inverted;
        let to = rule.to.filter(|_| !rule.inverted);
        let from = rule.from.filter(|_| !rule.inverted);
        let of_family = |net: &&IpNet| matches!(net, IpNet::V6(_)) == rule.v6;
        let meant: Vec<&IpNet> = needs
            .elsewhere()
            .filter(of_family)
            .filter(|net| to.is_none_or(|to| overlap(&to, net)))
            .collect();
        if meant.is_empty() || from.is_some_and(|from| !needs.mesh.iter().chain(&needs.own).any(|net| overlap(&from, net))) {
            return None;
        }
        let family = if rule.v6 { "-6 " } else { "" };
        let (what, takes) = match rule.action {
            Action::Goto(target) => (format!("goto {target}"), target > ours.priority),
            Action::Table(table) => (format!("lookup {table}"), takes(around, needs, rule, table, &meant)),
            Action::Vrf | Action::Nowhere => return None,
        };
        let remedy = format!(
            "give the rule a priority behind {} (ip {family}rule add ... priority 32000), or set routing.rulePriority to less than {}",
            ours.priority, rule.priority
        );
        let object = format!("ip {family}rule {}: {what}", rule.priority);
        let which = if narrow { "some packets" } else { "packets" };
        let text = format!(
            "it comes before Sennit's rule {} and leads {which} to {} elsewhere, where the guard drops them",
            ours.priority, meant[0]
        );
        takes.then(|| Problem::new("routing-rule-ahead", object, text, remedy).blocking(!narrow))
    })
}

/// Whether a table has a route for any of these prefixes that leaves by another interface than the mesh's.
fn takes(around: &Surroundings, needs: &Needs, rule: &RoutingRule, table: u32, meant: &[&IpNet]) -> bool {
    // The kernel's own table of this host's addresses.
    const LOCAL: u32 = 255;
    let is_mesh = |index| around.link(index).is_some_and(|link| needs.interfaces.contains(&link.name));
    table != LOCAL
        && around.ways.iter().filter(|way| way.table == table).any(|way| {
            let counts = rule.suppress.is_none_or(|length| u32::from(way.to.prefix_len()) > length);
            counts
                && meant.iter().any(|net| overlap(&way.to, net))
                && way.hops.iter().any(|hop| !is_mesh(hop.interface))
        })
}

/// Interfaces of pods or of the mesh in a VRF: their packets are routed by its table, before ours.
fn vrfs<'a>(needs: &'a Needs, around: &'a Surroundings) -> impl Iterator<Item = Problem> + 'a {
    around.links.iter().filter_map(move |link| {
        let vrf = around.link(link.master?).filter(|master| master.kind.as_deref() == Some("vrf"))?;
        let mesh = needs.interfaces.contains(&link.name);
        let concerned = mesh || around.leads_to(link, &needs.own);
        concerned.then(|| {
            Problem::new(
                "vrf-holds-interface",
                format!("{} in VRF {}", link.name, vrf.name),
                "its packets are routed by the VRF's table, which knows nothing of the mesh",
                format!("take it out (ip link set {} nomaster)", link.name),
            )
            .blocking(true)
        })
    })
}

/// Routes to this node's pods that are wider than its prefix: what comes out of a tunnel takes none of them.
fn wide<'a>(needs: &'a Needs, around: &'a Surroundings) -> impl Iterator<Item = Problem> + 'a {
    const MAIN: u32 = 254;
    let of_main = || around.ways.iter().filter(|way| way.table == MAIN && !way.learnt);
    needs.own.iter().filter(move |net| !of_main().any(|way| net.contains(&way.to))).filter_map(move |net| {
        let way = of_main().filter(|way| way.to.contains(net)).max_by_key(|way| way.to.prefix_len())?;
        let links = way.hops.iter().filter(|hop| hop.gateway.is_none()).map(|hop| hop.interface);
        let link = links.filter_map(|index| around.link(index)).find(|link| around.leads_to(link, &needs.own))?;
        Some(Problem::new(
            "pod-route-too-wide",
            format!("route {} on {}", way.to, link.name),
            format!("it is wider than this node's prefix {net}: packets from the mesh do not take it, and its pods are cut off"),
            format!("grant this node {} (spec.podCIDRs), or give {} an address of {net}", way.to, link.name),
        ))
    })
}

/// Pods whose packets never pass this host's stack.
fn beside(needs: &Needs, around: &Surroundings, cni: &BTreeMap<String, String>) -> Vec<Problem> {
    const REMEDY: &str = "move these pods to a network that is routed by the host; or list pods-beside-the-host under \
                          `acknowledge` in agent.yaml, and encrypt and judge them by other means";
    let blocks = needs.cluster && !needs.accepts(Acknowledged::PodsBesideTheHost);
    let tell = |object: String, text: String| {
        Problem::new("pods-beside-the-host", object, text, REMEDY).blocking(blocks)
    };
    let mut found = Vec::new();
    let mut children: BTreeMap<(u32, &str), (usize, u64)> = BTreeMap::new();
    for child in &around.children {
        let (count, sent) = children.entry((child.parent, &child.kind)).or_default();
        *count += 1;
        *sent += child.sent;
    }
    for ((parent, kind), (count, sent)) in children {
        // On a link that leads to no outside they reach each other only.
        let name = around.link(parent).map_or_else(|| format!("link {parent}"), |link| link.name.clone());
        let links =
            if count == 1 { "a link of another namespace sends" } else { "links of other namespaces send" };
        let text = format!("{count}: {links} through it past guard and policy, in clear");
        found.push(Problem { packets: Some(sent), ..tell(format!("{kind} on {name}"), text) });
    }
    for link in around.links.iter().filter(|link| link.functions > 0) {
        found.push(tell(
            format!("SR-IOV on {}", link.name),
            format!(
                "{} virtual functions are given away: whoever has one sends past guard and policy, uncounted",
                link.functions
            ),
        ));
    }
    for (file, kind) in cni {
        found.push(tell(
            format!("CNI type {kind} in {file}"),
            "pods get interfaces that pass by this host's stack: neither encrypted, nor judged, nor counted"
                .to_owned(),
        ));
    }
    found
}

/// Programs that may move packets between devices before any hook.
fn programs(needs: &Needs, around: &Surroundings) -> Vec<Problem> {
    let mut found = Vec::new();
    let is_cilium = |link: &&Neighbour| link.name == "cilium_host" || link.kind.as_deref() == Some("netkit");
    if let Some(link) = around.links.iter().find(is_cilium) {
        found.push(
            Problem::new(
                "ebpf-host-routing",
                link.name.clone(),
                "programs of its owner may move pods' packets between devices before guard and policy see them, and route the two ways differently",
                "run Cilium with bpf.hostLegacyRouting and endpointRoutes.enabled, then acknowledge pods-beside-the-host",
            )
            .blocking(needs.cluster && !needs.accepts(Acknowledged::PodsBesideTheHost)),
        );
    }
    let with_xdp = around.links.iter().filter(|link| link.xdp);
    found.extend(with_xdp.map(|link| {
        Problem::new(
            "xdp-program",
            link.name.clone(),
            "a program of XDP on it sees packets before guard and policy, and may send them elsewhere",
            format!("see what it does (bpftool net show dev {})", link.name),
        )
    }));
    found
}

/// Reads and judges, and remembers since when.
pub struct Watcher {
    others: Option<OthersReader>,
    folder: PathBuf,
    read_at: Option<Instant>,
    around: Surroundings,
    since: Since,
    problems: Vec<Problem>,
    failure: Option<String>,
    closed: Vec<String>,
}

impl Default for Watcher {
    fn default() -> Self {
        Self {
            others: None,
            folder: CNI_FOLDER.into(),
            read_at: None,
            around: Surroundings::default(),
            since: Since::default(),
            problems: Vec::new(),
            failure: None,
            closed: Vec::new(),
        }
    }
}

impl Watcher {
    /// Looks at this host, if it is time to. What cannot be read now is what it was, and that is told.
    pub async fn look(&mut self, net: &mut Netlink, needs: &Needs, clock: (Instant, SystemTime)) {
        let (now, wall) = clock;
        // Every pass has a reason; what changes all the time is read once a second.
        if self.read_at.is_some_and(|at| now.saturating_duration_since(at) < BREATH) {
            return;
        }
        self.read_at = Some(now);
        let mut failures = Vec::new();
        match net.surroundings().await {
            Ok(around) => self.around = around,
            Err(error) => failures.push(error.to_string()),
        }
        let others = match self.others() {
            Ok(others) => others,
            Err(error) => {
                failures.push(error);
                Others::default()
            }
        };
        let cni = cni::kinds(&self.folder);
        self.closed.clone_from(&others.closed);
        self.failure = (!failures.is_empty()).then(|| {
            format!("bypass-unread: what takes packets past the mesh cannot be told: {}", failures.join("; "))
        });
        self.problems = judge(needs, &self.around, &others, &cni);
        self.since.note(&mut self.problems, wall);
    }

    fn others(&mut self) -> Result<Others, String> {
        let mut reader = match self.others.take() {
            Some(reader) => reader,
            None => OthersReader::open().map_err(|e| e.to_string())?,
        };
        let read = reader.read().cloned().map_err(|e| e.to_string());
        // After an error it is opened anew: half an answer may still be on the way.
        self.others = read.is_ok().then_some(reader);
        read
    }

    /// The names of the interfaces that lead to no pod of this node.
    pub fn outside(&self, own: &BTreeSet<IpNet>) -> BTreeSet<String> {
        self.around.outside(own)
    }

    /// Chains of others that drop by default what this host forwards.
    pub fn closed(&self) -> &[String] {
        &self.closed
    }

    /// What was found.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// What was found, as sentences, and what could not be read.
    pub fn errors(&self) -> impl Iterator<Item = String> {
        self.problems.iter().map(ToString::to_string).chain(self.failure.clone())
    }

    /// Why something could not be read.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// Whether the agent is not ready for any of it.
    pub fn blocks(&self) -> bool {
        self.problems.iter().any(|problem| problem.blocks)
    }
}

#[cfg(test)]
#[path = "bypass/tests.rs"]
mod tests;
