mod construction;

use std::net::IpAddr;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::IpNet;

use self::construction::{net_path, start_pod, wait_for_carrier};
use crate::pidspace::PidSpace;
use crate::plan::{check_name, plan_pod};
use crate::workdir::WorkDir;
use crate::{Error, Link, Namespace, Nat, PodSpec, Result, script};

/// A running lab. Dropping it kills every process in it, takes down its namespaces and removes its files.
#[derive(Debug)]
pub struct Lab {
    core: Namespace,
    sites: Vec<Site>,
    hosts: Vec<Host>,
    pods: Vec<Pod>,
    warnings: Vec<String>,
    shared: PathBuf,
    pods_made: usize,
    pids: Arc<PidSpace>,
    // Last: its files go when nothing can write them any more.
    work: Option<WorkDir>,
}

/// A site and its router; dereferences to the router's [`Namespace`].
#[derive(Debug, Clone)]
pub struct Site {
    namespace: Namespace,
    nat: Nat,
    uplink: Link,
    uplink_addresses: Vec<IpNet>,
    lan: Vec<IpNet>,
}

/// A host; dereferences to its [`Namespace`].
#[derive(Debug, Clone)]
pub struct Host {
    namespace: Namespace,
    site: String,
    link: Link,
    addresses: Vec<IpAddr>,
    pod_prefixes: Vec<IpNet>,
    private_dir: PathBuf,
}

/// A pod; dereferences to its [`Namespace`].
#[derive(Debug, Clone)]
pub struct Pod {
    namespace: Namespace,
    host: String,
    link: Link,
    addresses: Vec<IpAddr>,
}

impl Lab {
    /// The core router.
    pub fn core(&self) -> &Namespace {
        &self.core
    }

    /// All sites in the order of the spec.
    pub fn sites(&self) -> &[Site] {
        &self.sites
    }

    /// All hosts, site by site.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// All pods, host by host; pods added later come last.
    pub fn pods(&self) -> &[Pod] {
        &self.pods
    }

    /// A site by name.
    pub fn site(&self, name: &str) -> Result<&Site> {
        find("site", &self.sites, name)
    }

    /// A host by name.
    pub fn host(&self, name: &str) -> Result<&Host> {
        find("host", &self.hosts, name)
    }

    /// A pod by name.
    pub fn pod(&self, name: &str) -> Result<&Pod> {
        find("pod", &self.pods, name)
    }

    /// Core (`core`), site, host or pod by name.
    pub fn namespace(&self, name: &str) -> Result<&Namespace> {
        self.namespaces()
            .find(|namespace| namespace.name() == name)
            .ok_or_else(|| Error::Unknown { kind: "namespace", name: name.to_owned() })
    }

    /// Every namespace: core, sites, hosts, pods.
    pub fn namespaces(&self) -> impl Iterator<Item = &Namespace> {
        let sites = self.sites.iter().map(|site| &site.namespace);
        let hosts = self.hosts.iter().map(|host| &host.namespace);
        let pods = self.pods.iter().map(|pod| &pod.namespace);
        std::iter::once(&self.core).chain(sites).chain(hosts).chain(pods)
    }

    /// Adds a pod to a running lab. Automatic addresses go on counting from the pods that the lab ever had.
    /// Underlay routes to its host's pod prefixes are as the lab was built.
    pub fn add_pod(&mut self, host: &str, pod: &PodSpec) -> Result<&Pod> {
        check_name(&pod.name)?;
        if self.namespace(&pod.name).is_ok() {
            return Err(Error::spec(&pod.name, "the name is taken"));
        }
        let host_namespace = self.host(host)?.namespace.clone();
        let plan = plan_pod(pod, &self.host(host)?.pod_prefixes, self.pods_made + 1)?;
        if let Some(taken) = plan.addresses.iter().find(|a| self.pods.iter().any(|p| p.addresses.contains(a)))
        {
            return Err(Error::spec(&pod.name, format!("another pod has {taken}")));
        }
        let namespace = start_pod(&plan, &self.pids)?.ready()?;
        let furnished = namespace
            .ip(&script::pod_inner(&plan, &net_path(&host_namespace)))
            .and_then(|()| host_namespace.ip(&script::pod_outer(&plan)))
            .and_then(|()| wait_for_carrier(&host_namespace, std::slice::from_ref(&plan.port)))
            .and_then(|()| wait_for_carrier(&namespace, &["eth0".to_owned()]));
        if let Err(error) = furnished {
            namespace.stop();
            return Err(error);
        }
        self.take_pod(&plan, host, namespace)?;
        self.pod(&pod.name)
    }

    /// Removes a pod: its link, its namespace, and every process in it.
    pub fn remove_pod(&mut self, name: &str) -> Result<()> {
        let position = self.pods.iter().position(|pod| pod.name() == name);
        let unknown = || Error::Unknown { kind: "pod", name: name.to_owned() };
        let pod = self.pods.remove(position.ok_or_else(unknown)?);
        kill_members(&pod.namespace);
        let (host, port) = pod.link.outer_end();
        let removed = host.ip(&format!("link del {port}"));
        pod.namespace.stop();
        removed
    }

    /// A directory that this process and every host see: here at the returned path, in hosts also at
    /// `/run/netlab/shared` and where [`crate::LabSpec::shared_at`] says. Removed with the lab.
    pub fn shared_dir(&self) -> &Path {
        &self.shared
    }

    /// What could not be set up and was left out, such as a private `/sys`.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Takes the lab down now, as dropping it does: processes, then namespaces, then files. Idempotent.
    pub fn shutdown(&mut self) {
        self.pids.shutdown();
        self.namespaces().for_each(Namespace::stop);
        self.work = None;
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// Kills every process whose network namespace is this one, however it got there, except this process.
fn kill_members(namespace: &Namespace) {
    let Ok(own) = std::fs::read_link(namespace.paths().net) else { return };
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let inside = std::fs::read_link(entry.path().join("ns/net")).is_ok_and(|net| net == own);
        if inside && pid.unsigned_abs() != std::process::id() {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
}

impl Site {
    /// Namespace of the router, for what wants it by value.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Its NAT.
    pub fn nat(&self) -> Nat {
        self.nat
    }

    /// Link from router (`uplink`) to core.
    pub fn uplink(&self) -> &Link {
        &self.uplink
    }

    /// The router's addresses on the uplink: what the outside sees of a site behind NAT.
    pub fn uplink_addresses(&self) -> &[IpNet] {
        &self.uplink_addresses
    }

    /// LAN prefixes.
    pub fn lan(&self) -> &[IpNet] {
        &self.lan
    }
}

impl Host {
    /// Namespace of the host, for what wants it by value.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Name of its site.
    pub fn site(&self) -> &str {
        &self.site
    }

    /// Link from the host's `eth0` to the site's LAN.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Addresses on the LAN, IPv4 first.
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// Prefixes of its pods.
    pub fn pod_prefixes(&self) -> &[IpNet] {
        &self.pod_prefixes
    }

    /// A directory of its own: here at the returned path, inside also at `/run/netlab/private`. Removed with
    /// the lab.
    pub fn private_dir(&self) -> &Path {
        &self.private_dir
    }
}

impl Pod {
    /// Namespace of the pod, for what wants it by value.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Name of its host.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Link from the pod's `eth0` to its host.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Addresses, in the order of the spec.
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }
}

impl Deref for Site {
    type Target = Namespace;
    fn deref(&self) -> &Namespace {
        &self.namespace
    }
}

impl Deref for Host {
    type Target = Namespace;
    fn deref(&self) -> &Namespace {
        &self.namespace
    }
}

impl Deref for Pod {
    type Target = Namespace;
    fn deref(&self) -> &Namespace {
        &self.namespace
    }
}

fn find<'a, T: Deref<Target = Namespace>>(kind: &'static str, all: &'a [T], name: &str) -> Result<&'a T> {
    all.iter().find(|t| t.name() == name).ok_or_else(|| Error::Unknown { kind, name: name.to_owned() })
}
