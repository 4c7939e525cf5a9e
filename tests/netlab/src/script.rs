//! From a plan to `ip` and `nft` scripts: pure. Every link is made by its inner end, which names the outer
//! namespace by path; the outer end is furnished in a second step, once all links exist.

use std::fmt::Write;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::Nat;
use crate::plan::{HostPlan, PodPlan, SitePlan};

/// The other end of a link to be: namespace by path, interface by name.
struct NamespaceEnd<'a> {
    path: &'a str,
    interface: &'a str,
}

/// What a pod's default route points to on its host, the same in every pod.
const POD_GATEWAY_V4: &str = "169.254.1.1";
const POD_GATEWAY_V6: &str = "fe80::1";

macro_rules! line {
    ($script:expr, $($text:tt)*) => {{
        // Writing to a String does not fail.
        let _ = writeln!($script, $($text)*);
    }};
}

fn veth(script: &mut String, mtu: u32, inner: &str, outer: NamespaceEnd<'_>) {
    let NamespaceEnd { path, interface } = outer;
    line!(script, "link set lo up");
    line!(script, "link add name {inner} mtu {mtu} type veth peer name {interface} mtu {mtu} netns {path}");
}

fn add(script: &mut String, address: &IpNet, interface: &str) {
    let nodad = if address.addr().is_ipv6() { " nodad" } else { "" };
    line!(script, "address add {address} dev {interface}{nodad}");
}

fn route(script: &mut String, to: &IpNet, via: IpAddr) {
    line!(script, "route replace {to} via {via}");
}

fn same_family(of: IpAddr) -> impl Fn(&&IpNet) -> bool {
    move |net| net.addr().is_ipv4() == of.is_ipv4()
}

/// First step in a site router.
pub(crate) fn site_inner(site: &SitePlan, core_path: &str) -> String {
    let mut script = String::new();
    veth(&mut script, site.uplink_mtu, "uplink", NamespaceEnd { path: core_path, interface: &site.port });
    line!(script, "link add name lan mtu {} type bridge", site.lan_mtu);
    for (address, interface) in
        site.uplink.iter().map(|a| (a, "uplink")).chain(site.lan.iter().map(|a| (a, "lan")))
    {
        add(&mut script, address, interface);
    }
    line!(script, "link set uplink up");
    line!(script, "link set lan up");
    script
}

/// First step in a host.
pub(crate) fn host_inner(host: &HostPlan, router_path: &str) -> String {
    let mut script = String::new();
    veth(&mut script, host.mtu, "eth0", NamespaceEnd { path: router_path, interface: &host.port });
    host.addresses.iter().for_each(|address| add(&mut script, address, "eth0"));
    line!(script, "link set eth0 up");
    script
}

/// First step in a pod. Its default route waits for the outer end to be up in IPv6.
pub(crate) fn pod_inner(pod: &PodPlan, host_path: &str) -> String {
    let mut script = String::new();
    veth(&mut script, pod.mtu, "eth0", NamespaceEnd { path: host_path, interface: &pod.port });
    line!(script, "link set eth0 up");
    for address in &pod.addresses {
        add(&mut script, &IpNet::from(*address), "eth0");
    }
    if pod.addresses.iter().any(IpAddr::is_ipv4) {
        line!(script, "route add {POD_GATEWAY_V4} dev eth0 scope link");
        line!(script, "route add default via {POD_GATEWAY_V4} dev eth0");
    }
    if pod.addresses.iter().any(IpAddr::is_ipv6) {
        line!(script, "route add default via {POD_GATEWAY_V6} dev eth0");
    }
    script
}

/// Second step in the core.
pub(crate) fn core_outer(sites: &[SitePlan], routed_pods: bool) -> String {
    let mut script = "link set lo up\n".to_owned();
    for site in sites {
        site.core.iter().for_each(|address| add(&mut script, address, &site.port));
        line!(script, "link set {} up", site.port);
        for router in site.uplink.iter().map(IpNet::addr) {
            if router.is_ipv4() && site.nat != Nat::None {
                continue;
            }
            let pods = site.hosts.iter().flat_map(|host| &host.pod_prefixes).filter(|_| routed_pods);
            for prefix in site.lan.iter().chain(pods).filter(same_family(router)) {
                route(&mut script, &prefix.trunc(), router);
            }
        }
    }
    script
}

/// Second step in a site router.
pub(crate) fn site_outer(site: &SitePlan, routed_pods: bool) -> String {
    let mut script = String::new();
    for core in site.core.iter().map(IpNet::addr) {
        line!(script, "route add default via {core}");
    }
    for host in &site.hosts {
        line!(script, "link set {} master lan", host.port);
        line!(script, "link set {} up", host.port);
        for address in host.addresses.iter().map(IpNet::addr).filter(|_| routed_pods) {
            for prefix in host.pod_prefixes.iter().filter(same_family(address)) {
                route(&mut script, prefix, address);
            }
        }
    }
    script
}

/// Second step in a host.
pub(crate) fn host_outer(host: &HostPlan, site: &SitePlan) -> String {
    let mut script = String::new();
    for router in site.lan.iter().map(IpNet::addr) {
        line!(script, "route add default via {router}");
    }
    host.pods.iter().for_each(|pod| script.push_str(&pod_outer(pod)));
    script
}

/// Second step in a host, for one pod.
pub(crate) fn pod_outer(pod: &PodPlan) -> String {
    let mut script = String::new();
    let port = &pod.port;
    if pod.addresses.iter().any(IpAddr::is_ipv4) {
        // Link scope keeps it from being chosen as a source address.
        line!(script, "address add {POD_GATEWAY_V4}/32 dev {port} scope link");
    }
    if pod.addresses.iter().any(IpAddr::is_ipv6) {
        line!(script, "address add {POD_GATEWAY_V6}/64 dev {port} nodad");
    }
    line!(script, "link set {port} up");
    for address in &pod.addresses {
        line!(script, "route add {} dev {port}", IpNet::from(*address));
    }
    script
}

/// NAT and stateful firewall of a site router; `None` where it only routes.
pub(crate) fn nat(mode: Nat) -> Option<String> {
    let masquerade = match mode {
        Nat::None => return None,
        Nat::Cone => "masquerade persistent",
        Nat::Symmetric => "masquerade random,fully-random",
    };
    Some(format!(
        r#"table inet netlab {{
    chain site_forward {{
        type filter hook forward priority filter; policy accept;
        iifname "uplink" ct state established,related accept
        iifname "uplink" drop
    }}
    chain site_input {{
        type filter hook input priority filter; policy accept;
        iifname "uplink" ct state established,related accept
        iifname "uplink" meta l4proto {{ icmp, ipv6-icmp }} accept
        iifname "uplink" drop
    }}
    chain site_nat {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname "uplink" meta nfproto ipv4 {masquerade}
    }}
}}
"#
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::plan;
    use crate::{LabSpec, SiteSpec};

    #[test]
    fn core_has_no_ipv4_route_to_a_site_behind_nat() {
        let mut spec = LabSpec::grid(2, 1, 1);
        spec.sites[1].nat = Nat::Cone;
        let sites = plan(&spec).unwrap();
        let script = core_outer(&sites, false);
        assert!(script.contains("route replace 172.16.1.0/24 via 198.18.1.2"), "{script}");
        assert!(!script.contains("172.16.2.0/24"), "{script}");
        assert!(script.contains("route replace 2001:db8:2::/64 via 2001:db8:ffff:2::2"), "{script}");
        assert!(!script.contains("10.1.1.0/24"), "{script}");
        assert!(core_outer(&sites, true).contains("10.1.1.0/24 via 198.18.1.2"));
    }

    #[test]
    fn a_site_of_one_family_gets_no_addresses_of_the_other() {
        let site = SiteSpec::new("six").families(crate::Families::V6).host(crate::HostSpec::new("h"));
        let sites = plan(&LabSpec::new().site(site)).unwrap();
        let script = site_inner(&sites[0], "/proc/1/ns/net") + &host_outer(&sites[0].hosts[0], &sites[0]);
        assert!(!script.contains("172.16"), "{script}");
    }
}
