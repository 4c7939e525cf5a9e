//! What this machine and this user offer.

use std::fmt;
use std::fs;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::{Error, Result, sys, tool};

/// A thing of the kernel, or a tool, that labs need or can use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Feature {
    /// Root, or root of a user namespace: the right to make namespaces.
    Privilege,
    /// Unprivileged user namespaces (only of interest without root).
    UserNamespaces,
    /// Network namespaces.
    NetNamespaces,
    /// Mount namespaces and tmpfs.
    MountNamespaces,
    /// PID namespaces.
    PidNamespaces,
    /// `ip` of iproute2 and veth pairs.
    Veth,
    /// `nft` and nftables in the kernel, with connection tracking.
    Nftables,
    /// nftables masquerading.
    Nat,
    /// `tc` and the tbf queueing discipline.
    Tbf,
    /// The netem queueing discipline.
    Netem,
    /// `/dev/net/tun`.
    Tun,
}

impl Feature {
    /// What is missing when the feature is, and how to get it.
    pub(crate) fn remedy(self) -> &'static str {
        match self {
            Feature::Privilege => "run as root, or call netlab::enter_userns() first in main",
            Feature::UserNamespaces => {
                "CONFIG_USER_NS=y, and user.max_user_namespaces, kernel.unprivileged_userns_clone and \
                 kernel.apparmor_restrict_unprivileged_userns (sysctl) must allow it"
            }
            Feature::NetNamespaces => "CONFIG_NET_NS=y and the right to make them",
            Feature::MountNamespaces => "the right to mount (a container needs CAP_SYS_ADMIN)",
            Feature::PidNamespaces => "CONFIG_PID_NS=y and the right to make them",
            Feature::Veth => "install iproute2; CONFIG_VETH (module veth)",
            Feature::Nftables => "install nftables; CONFIG_NF_TABLES_INET, CONFIG_NFT_CT (module nf_tables)",
            Feature::Nat => "CONFIG_NFT_MASQ, CONFIG_NF_NAT (module nft_masq)",
            Feature::Tbf => "CONFIG_NET_SCH_TBF (module sch_tbf)",
            Feature::Netem => "CONFIG_NET_SCH_NETEM (module sch_netem)",
            Feature::Tun => "CONFIG_TUN (module tun) and /dev/net/tun",
        }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Feature::Privilege => "privilege",
            Feature::UserNamespaces => "user namespaces",
            Feature::NetNamespaces => "network namespaces",
            Feature::MountNamespaces => "mount namespaces",
            Feature::PidNamespaces => "PID namespaces",
            Feature::Veth => "veth",
            Feature::Nftables => "nftables",
            Feature::Nat => "NAT",
            Feature::Tbf => "tbf",
            Feature::Netem => "netem",
            Feature::Tun => "TUN",
        })
    }
}

/// One feature and whether it is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capability {
    /// The feature.
    pub feature: Feature,
    /// `None` when present; otherwise what is missing and how to get it.
    pub missing: Option<String>,
}

/// Every [`Feature`], probed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// In the order of [`Feature`].
    pub all: Vec<Capability>,
}

impl Capabilities {
    /// Whether a feature is there.
    pub fn has(&self, feature: Feature) -> bool {
        self.all.iter().any(|c| c.feature == feature && c.missing.is_none())
    }

    /// [`crate::Error::Unsupported`] for the first of `features` that is missing.
    pub fn require(&self, features: &[Feature]) -> Result<()> {
        let wanted = |c: &&Capability| features.contains(&c.feature) && c.missing.is_some();
        match self.all.iter().find(wanted) {
            Some(Capability { feature, missing }) => {
                Err(Error::Unsupported { feature: *feature, why: missing.clone().unwrap_or_default() })
            }
            None => Ok(()),
        }
    }
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for capability in &self.all {
            match &capability.missing {
                None => writeln!(f, "{}: present", capability.feature)?,
                Some(why) => writeln!(f, "{}: MISSING: {why}", capability.feature)?,
            }
        }
        Ok(())
    }
}

/// Probes every feature in scratch namespaces; changes nothing. Takes some 50 ms.
pub fn capabilities() -> Capabilities {
    let user = sys::try_user_namespace().map_err(|error| error.to_string());
    // On a thread of its own, whose namespaces end with it.
    let rest = std::thread::spawn(probe_in_scratch).join().unwrap_or_default();
    let mut all = vec![missing(Feature::UserNamespaces, user)];
    all.extend(rest);
    all.sort_by_key(|capability| capability.feature);
    Capabilities { all }
}

fn missing(feature: Feature, probed: std::result::Result<(), String>) -> Capability {
    Capability {
        feature,
        missing: probed.err().map(|why| {
            let first = why.lines().next().unwrap_or_default();
            format!("{} ({first})", feature.remedy())
        }),
    }
}

fn probe_in_scratch() -> Vec<Capability> {
    let enter = |flags: CloneFlags| unshare(flags).map_err(|errno| errno.to_string());
    let run = |tool: &str, args: &str, input: &str| {
        let args: Vec<String> = args.split_whitespace().map(str::to_owned).collect();
        tool::run(tool, &args, input).map(drop)
    };
    let net = enter(CloneFlags::CLONE_NEWNET);
    let mounts = enter(CloneFlags::CLONE_NEWNS).and_then(|()| {
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
            .and_then(|()| mount(Some("netlab"), "/run", Some("tmpfs"), MsFlags::empty(), none))
            .map_err(|errno| errno.to_string())
    });
    // Without an own namespace nothing below may be tried: it would change the machine's.
    let inside = |probe: &dyn Fn() -> std::result::Result<(), String>| match &net {
        Ok(()) => probe(),
        Err(_) => Err("not probed without a network namespace".to_owned()),
    };
    let veth = inside(&|| run("ip", "-batch -", "link add name v1 type veth peer name v2\nlink set lo up\n"));
    let nft = inside(&|| {
        run(
            "nft",
            "-f -",
            "table inet t { chain c { type filter hook forward priority 0; ct state new drop; }; }\n",
        )
    });
    let nat = inside(&|| {
        run(
            "nft",
            "-f -",
            "table inet n { chain c { type nat hook postrouting priority 100; masquerade; }; }\n",
        )
    });
    let tbf = inside(&|| run("tc", "qdisc add dev lo root tbf rate 1mbit burst 5kb latency 50ms", ""));
    let netem = inside(&|| run("tc", "qdisc replace dev lo root netem delay 1ms", ""));
    let tun = inside(&|| run("ip", "tuntap add dev t mode tun", ""));
    // Last: a thread that did this can start no other threads.
    let pid = enter(CloneFlags::CLONE_NEWPID);
    vec![
        missing(Feature::Privilege, net.clone()),
        missing(Feature::NetNamespaces, net),
        missing(Feature::MountNamespaces, mounts),
        missing(Feature::PidNamespaces, pid),
        missing(Feature::Veth, veth),
        missing(Feature::Nftables, nft),
        missing(Feature::Nat, nat),
        missing(Feature::Tbf, tbf),
        missing(Feature::Netem, netem),
        missing(Feature::Tun, tun),
    ]
}

/// Makes this process root of a new user and mount namespace (`uid 0` maps to the caller's). Does nothing
/// when it is root already. Call first thing in `main`: fails when other threads exist.
pub fn enter_userns() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS).map_err(|errno| {
        let why = match errno {
            nix::errno::Errno::EINVAL => {
                "this process has other threads already; call enter_userns() first thing in main".to_owned()
            }
            errno => format!("{}: {errno}", Feature::UserNamespaces.remedy()),
        };
        Error::Unsupported { feature: Feature::UserNamespaces, why }
    })?;
    let write =
        |path: &str, text: String| fs::write(path, text).map_err(Error::system(format!("write {path}")));
    // Without it an unprivileged process may not map a group (user_namespaces(7)).
    write("/proc/self/setgroups", "deny".to_owned())?;
    write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(Error::errno("make / private in the new mount namespace"))
}
