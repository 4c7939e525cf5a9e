//! How a lab comes to be: namespaces, then links, then what needs the links.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use nix::sched::CloneFlags;

use super::{Host, Lab, Pod, Site};
use crate::namespace::{Starting, lock, write_sysctl};
use crate::pidspace::PidSpace;
use crate::plan::{HostPlan, PodPlan, SitePlan, plan};
use crate::workdir::WorkDir;
use crate::{Bind, Error, LabSpec, Link, Namespace, Nat, Result, mounts, script, tool};

const CARRIER_DEADLINE: Duration = Duration::from_secs(10);

impl Lab {
    /// Builds a lab. Needs root, or [`crate::enter_userns`] before.
    pub fn build(spec: &LabSpec) -> Result<Lab> {
        let plans = plan(spec)?;
        let work = WorkDir::new()?;
        let shared = work.subdirectory("shared")?;
        let pids = Arc::new(PidSpace::new()?);
        let warnings = Arc::new(Mutex::new(Vec::new()));

        // Namespaces first, all at once: links name each other's.
        let router = |name: &str| Starting::new(name, CloneFlags::empty(), &pids, || sysctls(true));
        let core = router("core")?;
        let mut starting = Vec::new();
        for site in &plans {
            let mut hosts = Vec::new();
            for host in &site.hosts {
                let private = work.subdirectory(&host.name)?;
                let mut binds = vec![
                    bind(&shared, Path::new("/run/netlab/shared")),
                    bind(&private, Path::new("/run/netlab/private")),
                ];
                binds.extend(spec.shared_at.iter().map(|target| bind(&shared, target)));
                binds.extend(host.binds.iter().cloned());
                let namespace = start_host(host, binds, &pids, &warnings)?;
                let pods = host.pods.iter().map(|pod| start_pod(pod, &pids)).collect::<Result<Vec<_>>>()?;
                hosts.push((namespace, private, pods));
            }
            starting.push((router(&site.name)?, hosts));
        }

        let mut lab = Lab {
            core: core.ready()?,
            sites: Vec::new(),
            hosts: Vec::new(),
            pods: Vec::new(),
            warnings: Vec::new(),
            shared,
            pods_made: 0,
            pids,
            work: Some(work),
        };
        for (site, (router, hosts)) in plans.iter().zip(starting) {
            lab.take_site(site, router.ready()?);
            for (host, (namespace, private, pods)) in site.hosts.iter().zip(hosts) {
                lab.take_host(site, host, namespace.ready()?, private)?;
                for (pod, namespace) in host.pods.iter().zip(pods) {
                    lab.take_pod(pod, &host.name, namespace.ready()?)?;
                }
            }
        }
        lab.furnish(&plans, spec.routed_pods)?;
        lab.warnings.append(&mut lock(&warnings));
        Ok(lab)
    }

    fn take_site(&mut self, plan: &SitePlan, namespace: Namespace) {
        self.sites.push(Site {
            uplink: Link::new((namespace.clone(), "uplink".into()), (self.core.clone(), plan.port.clone())),
            namespace,
            nat: plan.nat,
            uplink_addresses: plan.uplink.clone(),
            lan: plan.lan.iter().map(IpNet::trunc).collect(),
        });
    }

    fn take_host(
        &mut self,
        site: &SitePlan,
        plan: &HostPlan,
        namespace: Namespace,
        private_dir: PathBuf,
    ) -> Result<()> {
        let outer = (self.site(&site.name)?.namespace.clone(), plan.port.clone());
        self.hosts.push(Host {
            link: Link::new((namespace.clone(), "eth0".into()), outer),
            namespace,
            site: site.name.clone(),
            addresses: plan.addresses.iter().map(IpNet::addr).collect(),
            pod_prefixes: plan.pod_prefixes.clone(),
            private_dir,
        });
        Ok(())
    }

    pub(super) fn take_pod(&mut self, plan: &PodPlan, host: &str, namespace: Namespace) -> Result<()> {
        let outer = (self.host(host)?.namespace.clone(), plan.port.clone());
        self.pods_made += 1;
        self.pods.push(Pod {
            link: Link::new((namespace.clone(), "eth0".into()), outer),
            namespace,
            host: host.to_owned(),
            addresses: plan.addresses.clone(),
        });
        Ok(())
    }

    /// Links, addresses, routes, NAT: one `ip` process per namespace and step, all namespaces of a step at
    /// once.
    fn furnish(&mut self, plans: &[SitePlan], routed_pods: bool) -> Result<()> {
        let mut inner = Vec::new();
        let mut outer = vec![(self.core.clone(), script::core_outer(plans, routed_pods), None)];
        let core = self.core.clone();
        for site in plans {
            let router = self.site(&site.name)?.namespace.clone();
            inner.push((router.clone(), script::site_inner(site, &net_path(&core))));
            outer.push((router.clone(), script::site_outer(site, routed_pods), script::nat(site.nat)));
            for host in &site.hosts {
                let namespace = self.host(&host.name)?.namespace.clone();
                inner.push((namespace.clone(), script::host_inner(host, &net_path(&router))));
                outer.push((namespace.clone(), script::host_outer(host, site), None));
                for pod in &host.pods {
                    let pod_namespace = self.pod(&pod.name)?.namespace.clone();
                    inner.push((pod_namespace, script::pod_inner(pod, &net_path(&namespace))));
                }
            }
        }
        at_once(inner, |(namespace, script)| namespace.ip(&script))?;
        at_once(outer, |(namespace, script, nat)| {
            namespace.ip(&script)?;
            nat.map_or(Ok(()), |ruleset| tool::nft(&namespace, &ruleset))
        })?;
        self.wait_for_carriers(plans)?;
        for site in plans {
            let Some(timeout) = site.udp_state_timeout.filter(|_| site.nat != Nat::None) else { continue };
            let seconds = timeout.as_secs().max(1).to_string();
            let router = self.site(&site.name)?;
            router.sysctl("netfilter/nf_conntrack_udp_timeout", &seconds)?;
            router.sysctl("netfilter/nf_conntrack_udp_timeout_stream", &seconds)?;
        }
        // Last, because the links above were named by paths under the outer /proc.
        let mounted = at_once(self.hosts.clone(), |host| Ok((host.name().to_owned(), mount_proc(&host))));
        for (host, problem) in mounted?.into_iter().filter_map(|(host, mounted)| Some((host, mounted.err()?)))
        {
            self.warnings.push(format!("{host}: /proc shows the processes outside: {problem}"));
        }
        Ok(())
    }

    fn wait_for_carriers(&self, plans: &[SitePlan]) -> Result<()> {
        let mut waits: Vec<(Namespace, Vec<String>)> = Vec::new();
        waits.push((self.core.clone(), plans.iter().map(|site| site.port.clone()).collect()));
        for site in plans {
            let ports = site.hosts.iter().map(|host| host.port.clone());
            let lan = (!site.hosts.is_empty()).then(|| "lan".to_owned());
            let interfaces = std::iter::once("uplink".to_owned()).chain(ports).chain(lan).collect();
            waits.push((self.site(&site.name)?.namespace.clone(), interfaces));
            for host in &site.hosts {
                let ports = host.pods.iter().map(|pod| pod.port.clone());
                let interfaces = std::iter::once("eth0".to_owned()).chain(ports).collect();
                waits.push((self.host(&host.name)?.namespace.clone(), interfaces));
            }
        }
        let pods = self.pods.iter().map(|pod| (pod.namespace.clone(), vec!["eth0".to_owned()]));
        waits.extend(pods);
        at_once(waits, |(namespace, interfaces)| wait_for_carrier(&namespace, &interfaces)).map(drop)
    }
}

/// Interfaces of a fresh link drop what they should send until the kernel's link watch has run.
pub(super) fn wait_for_carrier(namespace: &Namespace, interfaces: &[String]) -> Result<()> {
    let until = Instant::now() + CARRIER_DEADLINE;
    // Asking for one device by name makes recent kernels catch up on the spot.
    let script: String = interfaces.iter().map(|name| format!("link show dev {name}\n")).collect();
    loop {
        let links = tool::ip_read(namespace, &script)?;
        let down = links.lines().find(|line| line.contains("state DOWN") || line.contains("NO-CARRIER"));
        match down {
            None => return Ok(()),
            Some(link) if Instant::now() > until => {
                let message = format!("no carrier after {CARRIER_DEADLINE:?}: {link}");
                return Err(Error::Tool { tool: "ip", namespace: namespace.name().to_owned(), message });
            }
            Some(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn bind(source: &Path, target: &Path) -> Bind {
    Bind { source: source.to_owned(), target: target.to_owned(), read_only: false }
}

pub(super) fn net_path(namespace: &Namespace) -> String {
    format!("{}/net", namespace.thread_path())
}

fn start_host(
    plan: &HostPlan,
    binds: Vec<Bind>,
    pids: &Arc<PidSpace>,
    warnings: &Arc<Mutex<Vec<String>>>,
) -> Result<Starting> {
    let (name, tmpfs, warnings) = (plan.name.clone(), plan.tmpfs.clone(), Arc::clone(warnings));
    let flags = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS;
    Starting::new(&plan.name, flags, pids, move || {
        nix::unistd::sethostname(&name).map_err(Error::errno(format!("set the hostname {name}")))?;
        sysctls(true)?;
        let left_out = mounts::furnish(&tmpfs, &binds)?;
        lock(&warnings).extend(left_out.into_iter().map(|warning| format!("{name}: {warning}")));
        Ok(())
    })
}

pub(super) fn start_pod(plan: &PodPlan, pids: &Arc<PidSpace>) -> Result<Starting> {
    Starting::new(&plan.name, CloneFlags::empty(), pids, || sysctls(false))
}

/// Sysctls of the calling thread's fresh network namespace.
fn sysctls(forward: bool) -> Result<()> {
    if forward {
        // First: it resets other values.
        write_sysctl("ipv4/ip_forward", "1")?;
    }
    for scope in ["all", "default"] {
        if forward {
            write_sysctl(&format!("ipv6/conf/{scope}/forwarding"), "1")?;
        }
        for (key, value) in [
            ("ipv6/conf/SCOPE/accept_dad", "0"),
            ("ipv6/conf/SCOPE/accept_ra", "0"),
            ("ipv4/conf/SCOPE/rp_filter", "0"),
            ("ipv4/conf/SCOPE/send_redirects", "0"),
            ("ipv4/conf/SCOPE/accept_redirects", "0"),
        ] {
            write_sysctl(&key.replace("SCOPE", scope), value)?;
        }
    }
    // Group 0 may open ICMP sockets, which probes use.
    write_sysctl("ipv4/ping_group_range", "0 0")
}

/// Mounts the lab's own /proc in a host, from a process inside the PID namespace.
fn mount_proc(host: &Namespace) -> std::result::Result<(), String> {
    let output = host
        .command("mount")
        .args(["-n", "-t", "proc", "proc", "/proc"])
        .output(Duration::from_secs(5))
        .map_err(|error| error.to_string())?;
    if output.success() { Ok(()) } else { Err(output.stderr_text().trim().to_owned()) }
}

/// Runs `f` on every item concurrently; the first error in order wins.
fn at_once<I: Send, T: Send>(items: Vec<I>, f: impl Fn(I) -> Result<T> + Sync) -> Result<Vec<T>> {
    std::thread::scope(|scope| {
        let running: Vec<_> = items.into_iter().map(|item| scope.spawn(|| f(item))).collect();
        let panicked = |_| Err(Error::Panicked { namespace: "lab".into() });
        running.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
    })
}
