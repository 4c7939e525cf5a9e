use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;

/// Which address families a site speaks, on its uplink, its LAN and its pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Families {
    /// IPv4 and IPv6.
    #[default]
    Dual,
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
}

impl Families {
    /// Whether IPv4 is spoken.
    pub fn has_v4(self) -> bool {
        self != Families::V6
    }

    /// Whether IPv6 is spoken.
    pub fn has_v6(self) -> bool {
        self != Families::V4
    }
}

/// What a site router does between its LAN and its uplink (RFC 4787 terms).
///
/// In both NAT modes IPv4 is translated (UDP, TCP, ICMP), the core has no route to the site's IPv4 LAN, and
/// IPv6 is routed untranslated behind a stateful firewall: what the LAN did not ask for is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Nat {
    /// Plain routing; the core routes to the LAN prefixes.
    #[default]
    None,
    /// `masquerade persistent`: the external port is the internal port while no other host of the site has
    /// taken it, so one socket keeps one mapping towards every destination (endpoint-independent mapping).
    /// Inbound filtering is address- and port-dependent ("port-restricted cone"): only the endpoint that was
    /// sent to may answer. Two hosts of the site using the same source port towards the same destination get
    /// one preserved and one random mapping. No hairpinning.
    Cone,
    /// `masquerade random,fully-random`: a new external port for every destination endpoint
    /// (address- and port-dependent mapping), filtering as in [`Nat::Cone`].
    Symmetric,
}

/// A directory or file of the machine shown inside a host's mount namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// Path outside; must exist when the lab is built.
    pub source: PathBuf,
    /// Path inside. Missing mount points are made under `/run` and the host's [`HostSpec::tmpfs`] only;
    /// anywhere else they must exist, because the file system below is the machine's own.
    pub target: PathBuf,
    /// Remount read-only.
    pub read_only: bool,
}

/// The lab: sites around a core router.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LabSpec {
    /// Sites in order; the order numbers automatic addresses.
    pub sites: Vec<SiteSpec>,
    /// Whether core, site routers and hosts route pod prefixes to each other. Off for a lab in which an
    /// overlay is to do that.
    pub routed_pods: bool,
    /// Shows the shared directory at this path in every host, beside `/run/netlab/shared`. The rules of
    /// [`Bind::target`] hold.
    pub shared_at: Option<PathBuf>,
}

/// A site: a router with an uplink to the core and a LAN of hosts.
///
/// Automatic addresses of the n-th site (from 1): uplink `198.18.n.2/24` and `2001:db8:ffff:n::2/64` with the
/// core at `.1` and `::1`; LAN `172.16.n.0/24` and `2001:db8:n::/64`, router at `.1` and `::1`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SiteSpec {
    /// Unique in the lab; also the name of the router's namespace.
    pub name: String,
    /// Families of uplink and LAN.
    pub families: Families,
    /// NAT and firewall of the router.
    pub nat: Nat,
    /// The router's addresses on its uplink with their prefix; the core takes the first other address of
    /// the prefix. Empty: automatic.
    pub uplink: Vec<IpNet>,
    /// LAN prefixes, at most one per family; the router takes the first address. Empty: automatic.
    pub lan: Vec<IpNet>,
    /// MTU of the link to the core in bytes, both ends. Default 1500.
    pub uplink_mtu: Option<u32>,
    /// MTU of the LAN in bytes. Default 1500.
    pub lan_mtu: Option<u32>,
    /// Lifetime of an idle NAT mapping or firewall state for UDP. Default: the kernel's (30 s, 120 s once
    /// both directions were seen).
    pub udp_state_timeout: Option<Duration>,
    /// Hosts on the LAN.
    pub hosts: Vec<HostSpec>,
}

/// A host on a site's LAN.
///
/// Automatic addresses of the h-th host (from 1) of the n-th site: `.(9+h)` and `::(9+h)` of the LAN; pod
/// prefixes `10.n.h.0/24` and `fd00:n:0:h::/64`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostSpec {
    /// Unique in the lab; also hostname and namespace name.
    pub name: String,
    /// Addresses on the LAN, at most one per family, inside the LAN's prefixes. Empty: automatic.
    pub addresses: Vec<IpAddr>,
    /// Prefixes that pods of this host get addresses from. Empty: automatic, one per family of the site.
    pub pod_prefixes: Vec<IpNet>,
    /// Pods behind this host.
    pub pods: Vec<PodSpec>,
    /// MTU of `eth0` in bytes, both ends. Default: the LAN's.
    pub mtu: Option<u32>,
    /// Further bind mounts, made in order after the fresh file systems.
    pub binds: Vec<Bind>,
    /// Existing directories to cover with an empty tmpfs, beside `/run`.
    pub tmpfs: Vec<PathBuf>,
}

/// A pod behind a host: network namespace with `eth0` and a default route via the host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodSpec {
    /// Unique in the lab.
    pub name: String,
    /// Addresses; empty: the (9+p)-th address of each of the host's pod prefixes for its p-th pod.
    pub addresses: Vec<IpAddr>,
    /// MTU of the pod's link in bytes. Default 1500.
    pub mtu: Option<u32>,
}

impl LabSpec {
    /// A lab without sites.
    pub fn new() -> LabSpec {
        LabSpec::default()
    }

    /// Adds a site.
    pub fn site(mut self, site: SiteSpec) -> LabSpec {
        self.sites.push(site);
        self
    }

    /// Routes pod prefixes in the underlay, see [`LabSpec::routed_pods`].
    pub fn routed_pods(mut self) -> LabSpec {
        self.routed_pods = true;
        self
    }

    /// `sites` sites `s1`.. of `hosts` hosts `s1-h1`.. of `pods` pods `s1-h1-p1`.., all automatic.
    pub fn grid(sites: usize, hosts: usize, pods: usize) -> LabSpec {
        let site = |s: usize| {
            let host = |h: usize| {
                let pod = |p: usize| PodSpec::new(format!("s{s}-h{h}-p{p}"));
                HostSpec { pods: (1..=pods).map(pod).collect(), ..HostSpec::new(format!("s{s}-h{h}")) }
            };
            SiteSpec { hosts: (1..=hosts).map(host).collect(), ..SiteSpec::new(format!("s{s}")) }
        };
        LabSpec { sites: (1..=sites).map(site).collect(), ..LabSpec::default() }
    }
}

impl SiteSpec {
    /// A site with defaults and no hosts.
    pub fn new(name: impl Into<String>) -> SiteSpec {
        SiteSpec { name: name.into(), ..SiteSpec::default() }
    }

    /// Sets the NAT.
    pub fn nat(mut self, nat: Nat) -> SiteSpec {
        self.nat = nat;
        self
    }

    /// Sets the families.
    pub fn families(mut self, families: Families) -> SiteSpec {
        self.families = families;
        self
    }

    /// Adds a host.
    pub fn host(mut self, host: HostSpec) -> SiteSpec {
        self.hosts.push(host);
        self
    }
}

impl HostSpec {
    /// A host with defaults and no pods.
    pub fn new(name: impl Into<String>) -> HostSpec {
        HostSpec { name: name.into(), ..HostSpec::default() }
    }

    /// Adds a pod.
    pub fn pod(mut self, pod: PodSpec) -> HostSpec {
        self.pods.push(pod);
        self
    }

    /// Adds a bind mount.
    pub fn bind(mut self, source: impl Into<PathBuf>, target: impl Into<PathBuf>) -> HostSpec {
        self.binds.push(Bind { source: source.into(), target: target.into(), read_only: false });
        self
    }
}

impl PodSpec {
    /// A pod with automatic addresses.
    pub fn new(name: impl Into<String>) -> PodSpec {
        PodSpec { name: name.into(), ..PodSpec::default() }
    }

    /// Sets the MTU of the pod's link, in bytes.
    pub fn mtu(mut self, mtu: u32) -> PodSpec {
        self.mtu = Some(mtu);
        self
    }
}
