//! A host with systemd on a disk of its own, booted again and again, and its wire.
//!
//! ```text
//!  site kernel:  router -- bridge `lan` -- tap0 -- QEMU: systemd, the two units of deploy/systemd,
//!                                    |             a kubelet that writes down what stands,
//!                                 capture          a sender of marked packets to a peer's pods
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use netlab::{Capture, CaptureSpec, CaptureStats, IpNet, Lab, LabSpec, SiteSpec};
use serde_json::json;

use crate::guest::{Guest, Image};
use crate::mesh::{GUEST, TAP, eventually};
use crate::transfer::MARKER;

/// The unit that restores the guard.
pub const GUARD: &str = "sennit-guard.service";
/// The agent's unit.
pub const AGENT: &str = "sennit-agent.service";
/// The unit that plays systemd-networkd.
pub const NETWORK: &str = "lab-network.service";
/// The unit that plays kubelet.
pub const KUBELET: &str = "kubelet.service";
/// The target that is reached before any network.
pub const PRE: &str = "network-pre.target";
/// The host's configuration.
pub const CONFIG: &str = "/etc/sennit/agent.yaml";
/// The prefixes of a peer's pods.
const PEER: [&str; 2] = ["10.2.0.0/16", "fd00:2::/48"];
/// Rounds of marked packets that a boot is watched for after its network is up.
const ROUNDS: u64 = 100;

/// The images that hosts boot from.
#[derive(Debug, Clone)]
pub struct Template {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs that mounts the disk.
    pub initramfs: PathBuf,
    /// The disk.
    pub disk: PathBuf,
}

/// A host of a lab of its own, with a disk that outlives the power.
#[derive(Debug)]
pub struct Host {
    lab: Lab,
    image: Image,
    dir: tempfile::TempDir,
}

/// A boot of it.
#[derive(Debug)]
pub struct Boot {
    /// The machine.
    pub guest: Guest,
    /// All that has crossed its interface since power on.
    pub capture: Capture,
}

/// The observations of one boot.
#[derive(Debug)]
pub struct Seen {
    /// The times at which units became active, in microseconds since power on. Units that did not
    /// are absent.
    pub active: BTreeMap<&'static str, u64>,
    /// The ruleset, routes and rules at kubelet's start.
    pub kubelet: String,
    /// The ruleset, routes and rules before the network was brought up.
    pub network: String,
    /// The packets on the wire.
    pub wire: CaptureStats,
}

impl Host {
    /// Builds a lab of one site, and a host with a copy of the disk.
    ///
    /// # Errors
    /// Fails if the lab cannot be built.
    pub fn new(template: &Template) -> anyhow::Result<Self> {
        let lab = Lab::build(&LabSpec::new().site(SiteSpec::new(GUEST.1)))?;
        lab.site(GUEST.1)?.namespace().ip(&format!(
            "link set lan type bridge mcast_snooping 0\ntuntap add dev {TAP} mode tap\nlink set {TAP} master lan up"
        ))?;
        let dir = tempfile::tempdir()?;
        let disk = dir.path().join("disk");
        std::fs::copy(&template.disk, &disk).context("copying the disk")?;
        let image = Image {
            kernel: template.kernel.clone(),
            initramfs: vec![template.initramfs.clone()],
            disk: Some(disk),
            words: String::new(),
        };
        Ok(Self { lab, image, dir })
    }

    /// Copies the disk, with the power off.
    ///
    /// # Errors
    /// Returns the system's error.
    pub fn copy_disk(&self, to: &Path) -> anyhow::Result<()> {
        let disk = self.image.disk.as_ref().context("a host has a disk")?;
        std::fs::copy(disk, to).map(drop).context("copying the disk")
    }

    /// Boots it with some units masked, as though nobody had installed them.
    ///
    /// # Errors
    /// As [`Guest::boot`].
    pub fn boot(&self, masked: &[&str]) -> anyhow::Result<Boot> {
        let router = self.lab.site(GUEST.1)?.namespace();
        let mut spec = CaptureSpec::new().marker(MARKER);
        for prefix in PEER {
            spec = spec.watch(prefix.parse::<IpNet>()?);
        }
        let capture = router.capture(TAP, spec)?;
        let words = masked.iter().map(|unit| format!(" systemd.mask={unit}")).collect();
        let image = Image { words, ..self.image.clone() };
        Ok(Boot { guest: Guest::boot(&image, router, TAP, self.dir.path())?, capture })
    }
}

impl Boot {
    /// Waits until the network has been up for a while, and reports.
    ///
    /// # Errors
    /// Fails if the network or kubelet does not come up.
    pub fn seen(&self) -> anyhow::Result<Seen> {
        let rounds = || -> anyhow::Result<u64> { Ok(self.guest.run("cat /run/sent")?.trim().parse()?) };
        eventually("network and kubelet are up", || {
            self.guest.run(&format!("systemctl is-active {NETWORK} {KUBELET}"))
        })?;
        let up = rounds()?;
        eventually("marked packets were sent", || {
            let rounds = rounds()?;
            ensure!(rounds >= up + ROUNDS, "{} rounds", rounds - up);
            Ok(())
        })?;
        let mut active = BTreeMap::new();
        for unit in [GUARD, PRE, NETWORK, KUBELET, AGENT] {
            if let Ok(at) = self.show(unit, "ActiveEnterTimestampMonotonic")?.parse()
                && at > 0
            {
                active.insert(unit, at);
            }
        }
        Ok(Seen {
            active,
            kubelet: self.guest.run("cat /run/kubelet")?,
            network: self.guest.run("cat /run/network")?,
            wire: self.capture.stats()?,
        })
    }

    /// Returns a unit's property, as systemd reports it.
    ///
    /// # Errors
    /// Fails if systemd does not answer.
    pub fn show(&self, unit: &str, property: &str) -> anyhow::Result<String> {
        let text = self.guest.run(&format!("systemctl show --value -p {property} {unit}"))?;
        Ok(text.trim().to_owned())
    }

    /// Writes configuration and registry of a host that has one peer site, and starts the agent.
    ///
    /// # Errors
    /// Fails if the guest does not answer.
    pub fn join(&self) -> anyhow::Result<()> {
        let endpoints = ["172.16.1.10:51820"];
        let config = json!({
            "node": GUEST.0,
            "site": GUEST.1,
            "mesh": "kernel-test",
            "registry": {"file": {"dir": "/etc/sennit/registry"}},
            "wireguard": {"backend": "kernel"},
            "underlay": {"endpoints": endpoints, "internalEndpoints": endpoints, "mtu": 1500},
            "sites": [
                {"name": GUEST.1, "prefixes": ["10.3.0.0/16", "fd00:3::/48"]},
                {"name": "west", "prefixes": PEER},
            ],
        });
        let node = json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": GUEST.0, "labels": {"sennit.dev.node-restriction.kubernetes.io/site": GUEST.1}},
            "spec": {"podCIDRs": ["10.3.1.0/24", "fd00:3:0:1::/64"]},
        });
        self.guest.write("/etc/sennit/registry/nodes.yaml", &format!("{node}\n"))?;
        self.guest.write(CONFIG, &format!("{config:#}\n"))?;
        self.guest.run(&format!("systemctl reset-failed {AGENT}; systemctl restart {AGENT}")).map(drop)
    }

    /// Cuts its power off, and returns what was on the wire until then.
    ///
    /// # Errors
    /// Returns the system's error.
    pub fn cut_power(self) -> anyhow::Result<CaptureStats> {
        self.guest.cut_power()?;
        Ok(self.capture.stop()?.stats)
    }
}
