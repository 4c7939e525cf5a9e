//! `dhcp`: a real server at a site's router, and a real client on a node.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use netlab::{Namespace, Process};

use super::{Trouble, Verdict};
use crate::agents::wait_for;
use crate::scenario::Family;
use crate::scenario::lease::{Dhcp, Offer};
use crate::stage::Stage;

/// The programs that the step runs, and Debian's package of each.
const PROGRAMS: [(&str, &str); 3] =
    [("dnsmasq", "dnsmasq-base"), ("dhcpcd", "dhcpcd-base"), ("unshare", "util-linux")];
/// The folders of programs for root, independent of `PATH`.
const SBIN: [&str; 2] = ["/usr/sbin", "/sbin"];
/// The node's link to its LAN, and the router's.
const NODE_LINK: &str = "eth0";
const ROUTER_LINK: &str = "lan";
/// The node's own folder, as its processes see it.
const PRIVATE: &str = "/run/netlab/private";
const COMMAND: Duration = Duration::from_secs(10);

/// A node's lease of one family.
pub(crate) struct Lease {
    client: Process,
    server: Process,
    offer: Offer,
    mtu: Option<u16>,
}

/// Finds the programs, or says what is missing and how to get it.
pub(crate) fn programs() -> Result<[PathBuf; 3], String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = std::env::split_paths(&path).chain(SBIN.map(PathBuf::from)).collect();
    let find = |name: &str| folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file());
    let found = PROGRAMS.map(|(name, _)| find(name));
    match found {
        [Some(server), Some(client), Some(unshare)] => Ok([server, client, unshare]),
        found => {
            let absent = PROGRAMS.iter().zip(&found).filter(|(_, path)| path.is_none());
            let absent: Vec<String> =
                absent.map(|((name, package), _)| format!("{name} (Debian: {package})")).collect();
            Err(format!("the step `dhcp` needs {}", absent.join(" and ")))
        }
    }
}

pub(super) fn perform(stage: &mut Stage, dhcp: &Dhcp, deadline: Instant) -> Verdict {
    match (&dhcp.lease, &dhcp.release) {
        (Some(node), _) => lease(stage, node, dhcp, deadline),
        (None, Some(node)) => release(stage, node, None, deadline),
        (None, None) => Ok(String::new()),
    }
}

fn lease(stage: &mut Stage, node: &str, dhcp: &Dhcp, deadline: Instant) -> Verdict {
    let offer = dhcp.offer().map_err(Trouble::failed)?;
    let programs = programs().map_err(Trouble::failed)?;
    let family = offer.family();
    stage.lent.extend([offer.address.addr(), offer.server.addr()]);
    // A client of the same family would keep the address that it has.
    release(stage, node, Some(family), deadline)?;
    let site = stage.layout.node(node).map(|node| node.site.clone()).unwrap_or_default();
    let (router, host) = (stage.lab.site(&site)?, stage.host(node)?);
    let label = format!("{node}-{}", family.label().to_lowercase());
    let mut address = vec!["addr", "replace"];
    let own = offer.server.to_string();
    address.extend([own.as_str(), "dev", ROUTER_LINK]);
    if family == Family::Ipv6 {
        address.push("nodad");
    }
    ip(router, &address)?;
    let link = ip(host, &["-o", "link", "show", "dev", NODE_LINK])?;
    let mac = link.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
    let mac = mac.ok_or_else(|| Trouble::failed(format!("{node}: {NODE_LINK} has no MAC address")))?;
    let shared = stage.lab.shared_dir();
    let log = shared.join(format!("dhcp-{label}.log"));
    let server = router
        .command(&programs[0])
        .args(server_arguments(dhcp, &offer, mac, shared, &label))
        .log_to(&log)
        .spawn()?;
    let own = host.private_dir();
    write(&own.join(format!("{label}.conf")), CLIENT, 0o644)?;
    write(&own.join("dhcp-hook"), HOOK, 0o755)?;
    let flag = if family == Family::Ipv4 { "-4" } else { "-6" };
    // It keeps what it was given in /var/lib, which is the machine's own.
    let script = "mount -t tmpfs dhcp /var/lib/dhcpcd && exec \"$@\"";
    let client = host
        .command(&programs[2])
        .args(["--mount", "sh", "-c", script, "sh"])
        .arg(&programs[1])
        .args([flag, "-B", "-d", "-f", &format!("{PRIVATE}/{label}.conf"), NODE_LINK])
        .log_to(&log)
        .spawn()?;
    let held = || {
        let shown =
            ip(host, &["-o", "addr", "show", "dev", NODE_LINK, "to", &offer.address.addr().to_string()]);
        shown.is_ok_and(|text| !text.is_empty() && !text.contains("tentative"))
    };
    let ended = |process: &Process| !matches!(process.try_wait(), Ok(None));
    let over = || stage.interrupted() || ended(&client) || ended(&server);
    wait_for(deadline, || held() || over());
    stage.go_on()?;
    if !held() {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = &lines[lines.len().saturating_sub(20)..];
        let mut failures = vec![format!("{node} did not take {}; the log's end:", offer.address)];
        failures.extend(tail.iter().map(|line| (*line).to_owned()));
        return Err(Trouble::Failed(failures));
    }
    let detail = format!("{node} holds {} of {}", offer.address, offer.server.addr());
    let lease = Lease { client, server, offer, mtu: dhcp.mtu };
    stage.leases.insert((node.to_owned(), family), lease);
    Ok(detail)
}

/// Ends the node's leases, of one family or of both: its clients take back addresses and routes.
fn release(stage: &mut Stage, node: &str, family: Option<Family>, deadline: Instant) -> Verdict {
    let families = family.map_or(vec![Family::Ipv4, Family::Ipv6], |family| vec![family]);
    let mut ended = 0;
    for family in families {
        let Some(lease) = stage.leases.remove(&(node.to_owned(), family)) else { continue };
        lease.client.signal(libc::SIGTERM)?;
        let left = deadline.saturating_duration_since(Instant::now());
        if lease.client.wait(left)?.is_none() {
            return Err(Trouble::failed(format!("{node}: its DHCP client did not end in time")));
        }
        lease.server.kill()?;
        let site = stage.layout.node(node).map(|node| node.site.clone()).unwrap_or_default();
        let own = lease.offer.server.to_string();
        // Another node's server may have had the same address: gone is gone.
        let _ = ip(stage.lab.site(&site)?, &["addr", "del", &own, "dev", ROUTER_LINK]);
        if let (Some(_), Some(site)) = (lease.mtu, stage.layout.site(&site)) {
            ip(stage.host(node)?, &["link", "set", "dev", NODE_LINK, "mtu", &site.mtu.to_string()])?;
        }
        ended += 1;
    }
    Ok(crate::report::count(ended, "lease") + " ended")
}

/// It serves this node alone, so that each node of a LAN may have a server of its own.
fn server_arguments(dhcp: &Dhcp, offer: &Offer, mac: &str, folder: &Path, label: &str) -> Vec<String> {
    let (address, server) = (offer.address.addr(), offer.server.addr());
    let file = |end: &str| folder.join(format!("dhcp-{label}.{end}")).display().to_string();
    let mut all: Vec<String> = ["--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--user=root"]
        .into_iter()
        .chain(["--bind-interfaces", "--no-ping", "--dhcp-authoritative", "--log-facility=-", "--log-dhcp"])
        .map(str::to_owned)
        .collect();
    all.push(format!("--interface={ROUTER_LINK}"));
    all.push("--except-interface=lo".to_owned());
    all.push(format!("--pid-file={}", file("pid")));
    all.push(format!("--dhcp-leasefile={}", file("leases")));
    all.push("--dhcp-ignore=tag:!known".to_owned());
    match offer.family() {
        Family::Ipv4 => {
            all.push(format!("--dhcp-range={address},{address},{},12h", offer.address.netmask()));
            all.push(format!("--dhcp-host={mac},{address}"));
            // Without a value the server does not send the option at all.
            all.push(if dhcp.gateway {
                format!("--dhcp-option=3,{server}")
            } else {
                "--dhcp-option=3".into()
            });
            if !offer.routes.is_empty() {
                let routes: Vec<String> = offer.routes.iter().map(|net| format!("{net},{server}")).collect();
                all.push(format!("--dhcp-option-force=121,{}", routes.join(",")));
            }
            all.extend(dhcp.mtu.map(|mtu| format!("--dhcp-option-force=26,{mtu}")));
        }
        Family::Ipv6 => {
            let length = offer.address.prefix_len();
            all.push(format!("--dhcp-range={address},{address},{length},12h"));
            all.push(format!("--dhcp-host={mac},[{address}]"));
            all.push("--enable-ra".to_owned());
            all.push(format!("--ra-param={ROUTER_LINK},10,{}", if dhcp.gateway { 1800 } else { 0 }));
        }
    }
    all
}

/// Takes what is offered, at once, and writes nothing outside of the lab.
const CLIENT: &str = "noarp
nodelay
ipv6rs
ia_na
option classless_static_routes, interface_mtu, routers
script /run/netlab/private/dhcp-hook
";

/// Does what the clients of distributions do with an MTU. It leaves resolv.conf alone.
const HOOK: &str = "#!/bin/sh
[ -z \"$new_interface_mtu\" ] || ip link set dev \"$interface\" mtu \"$new_interface_mtu\"
";

fn write(path: &Path, text: &str, mode: u32) -> Result<(), Trouble> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::write(path, text)
        .and_then(|()| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)))
        .map_err(|error| Trouble::failed(format!("cannot write {}: {error}", path.display())))
}

fn ip(namespace: &Namespace, arguments: &[&str]) -> Result<String, Trouble> {
    let output = namespace.command("ip").args(arguments.iter().copied()).output(COMMAND)?;
    if output.success() {
        return Ok(output.stdout_text());
    }
    let command = arguments.join(" ");
    Err(Trouble::failed(format!("{}: ip {command}: {}", namespace.name(), output.stderr_text().trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(dhcp: &Dhcp) -> String {
        let offer = dhcp.offer().unwrap();
        server_arguments(dhcp, &offer, "02:00:00:00:00:01", Path::new("/lab"), "aws-1-ipv4").join(" ")
    }

    #[test]
    fn a_server_offers_what_the_step_says() {
        let dhcp = Dhcp {
            address: Some("10.2.0.77/24".into()),
            routes: vec!["10.2.0.0/25".into(), "0.0.0.0/0".into()],
            mtu: Some(68),
            ..Dhcp::default()
        };
        let text = arguments(&dhcp);
        for part in [
            "--dhcp-range=10.2.0.77,10.2.0.77,255.255.255.0,12h",
            "--dhcp-option=3 ",
            "121,10.2.0.0/25,10.2.0.1,0.0.0.0/0,10.2.0.1",
            "--dhcp-option-force=26,68",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn a_server_of_ipv6_advertises_itself_on_demand() {
        let mut dhcp = Dhcp { address: Some("fd00:2::77/64".into()), ..Dhcp::default() };
        assert!(arguments(&dhcp).ends_with("--ra-param=lan,10,0"));
        dhcp.gateway = true;
        let text = arguments(&dhcp);
        assert!(text.ends_with("--ra-param=lan,10,1800") && text.contains("[fd00:2::77]"), "{text}");
    }
}
