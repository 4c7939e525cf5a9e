//! From a description to addresses: pure.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{Bind, Error, Families, HostSpec, LabSpec, Nat, PodSpec, Result, SiteSpec};

/// Sites, and hosts of a site, that automatic addresses can number.
const MAX_INDEX: usize = 200;
const DEFAULT_MTU: u32 = 1500;
const MTU_RANGE: std::ops::RangeInclusive<u32> = 68..=65535;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SitePlan {
    pub(crate) name: String,
    pub(crate) nat: Nat,
    /// Interface of the core.
    pub(crate) port: String,
    /// The router's addresses on the uplink, and the core's.
    pub(crate) uplink: Vec<IpNet>,
    pub(crate) core: Vec<IpNet>,
    /// The router's addresses on the LAN.
    pub(crate) lan: Vec<IpNet>,
    pub(crate) uplink_mtu: u32,
    pub(crate) lan_mtu: u32,
    pub(crate) udp_state_timeout: Option<Duration>,
    pub(crate) hosts: Vec<HostPlan>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostPlan {
    pub(crate) name: String,
    /// Interface of the site router.
    pub(crate) port: String,
    pub(crate) addresses: Vec<IpNet>,
    pub(crate) pod_prefixes: Vec<IpNet>,
    pub(crate) mtu: u32,
    pub(crate) binds: Vec<Bind>,
    pub(crate) tmpfs: Vec<std::path::PathBuf>,
    pub(crate) pods: Vec<PodPlan>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodPlan {
    pub(crate) name: String,
    /// Interface of the host.
    pub(crate) port: String,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) mtu: u32,
}

/// Numbers, completes and checks a description.
pub(crate) fn plan(spec: &LabSpec) -> Result<Vec<SitePlan>> {
    if spec.sites.len() > MAX_INDEX {
        return Err(Error::spec("lab", format!("more than {MAX_INDEX} sites")));
    }
    let mut names = BTreeSet::from(["core".to_owned()]);
    let mut pod_addresses = BTreeSet::new();
    let mut uplinks = BTreeSet::new();
    let mut sites = Vec::new();
    for (i, site) in spec.sites.iter().enumerate() {
        let site = plan_site(site, i + 1)?;
        take_name(&mut names, &site.name)?;
        for address in site.uplink.iter().chain(&site.core) {
            if !uplinks.insert(address.addr()) {
                return Err(Error::spec(&site.name, format!("uplink address {address} is taken already")));
            }
        }
        let mut on_lan: BTreeSet<IpAddr> = site.lan.iter().map(IpNet::addr).collect();
        for host in &site.hosts {
            take_name(&mut names, &host.name)?;
            for address in &host.addresses {
                if !on_lan.insert(address.addr()) {
                    return Err(Error::spec(&host.name, format!("address {address} is taken on the LAN")));
                }
            }
            for pod in &host.pods {
                take_name(&mut names, &pod.name)?;
                for address in &pod.addresses {
                    if !pod_addresses.insert(*address) {
                        return Err(Error::spec(&pod.name, format!("another pod has {address}")));
                    }
                }
            }
        }
        sites.push(site);
    }
    Ok(sites)
}

fn plan_site(spec: &SiteSpec, n: usize) -> Result<SitePlan> {
    if spec.hosts.len() > MAX_INDEX {
        return Err(Error::spec(&spec.name, format!("more than {MAX_INDEX} hosts")));
    }
    let id = n as u16;
    let uplink = per_family(
        &spec.name,
        spec.families,
        &spec.uplink,
        net4([198, 18, n as u8, 2], 24),
        net6([0x2001, 0xdb8, 0xffff, id, 0, 0, 0, 2], 64),
    )?;
    let lan = per_family(
        &spec.name,
        spec.families,
        &spec.lan,
        net4([172, 16, n as u8, 0], 24),
        net6([0x2001, 0xdb8, id, 0, 0, 0, 0, 0], 64),
    )?;
    let core = uplink
        .iter()
        .map(|net| first_other(*net).ok_or_else(|| Error::spec(&spec.name, format!("{net} has no room"))))
        .collect::<Result<_>>()?;
    let lan: Vec<IpNet> = lan
        .iter()
        .map(|net| nth(*net, 1).ok_or_else(|| Error::spec(&spec.name, format!("{net} has no room"))))
        .collect::<Result<_>>()?;
    let mut site = SitePlan {
        name: spec.name.clone(),
        nat: spec.nat,
        port: format!("s{n}"),
        uplink,
        core,
        lan,
        uplink_mtu: mtu(&spec.name, spec.uplink_mtu, DEFAULT_MTU)?,
        lan_mtu: mtu(&spec.name, spec.lan_mtu, DEFAULT_MTU)?,
        udp_state_timeout: spec.udp_state_timeout,
        hosts: Vec::new(),
    };
    for (h, host) in spec.hosts.iter().enumerate() {
        site.hosts.push(plan_host(host, spec, &site, n, h + 1)?);
    }
    Ok(site)
}

fn plan_host(spec: &HostSpec, site_spec: &SiteSpec, site: &SitePlan, n: usize, h: usize) -> Result<HostPlan> {
    let addresses = site
        .lan
        .iter()
        .map(|lan| {
            let given = spec.addresses.iter().find(|a| a.is_ipv4() == lan.addr().is_ipv4());
            let found = match given {
                Some(address) if lan.contains(address) => IpNet::new(*address, lan.prefix_len()).ok(),
                Some(address) => {
                    return Err(Error::spec(&spec.name, format!("{address} is not in the LAN {lan}")));
                }
                None => nth(lan.trunc(), 9 + h as u64),
            };
            found.ok_or_else(|| Error::spec(&spec.name, format!("no room for it in the LAN {lan}")))
        })
        .collect::<Result<Vec<IpNet>>>()?;
    let unused = spec.addresses.iter().find(|a| !addresses.iter().any(|net| net.addr() == **a));
    if let Some(address) = unused {
        return Err(Error::spec(
            &spec.name,
            format!("{address}: a second one, or of a family the site lacks"),
        ));
    }
    let pod_prefixes = if spec.pod_prefixes.is_empty() {
        let v4 = net4([10, n as u8, h as u8, 0], 24);
        let v6 = net6([0xfd00, n as u16, 0, h as u16, 0, 0, 0, 0], 64);
        let family = site_spec.families;
        [family.has_v4().then_some(v4), family.has_v6().then_some(v6)].into_iter().flatten().collect()
    } else {
        spec.pod_prefixes.iter().map(IpNet::trunc).collect()
    };
    let mut host = HostPlan {
        name: spec.name.clone(),
        port: format!("h{h}"),
        addresses,
        pod_prefixes,
        mtu: mtu(&spec.name, spec.mtu, site.lan_mtu)?,
        binds: spec.binds.clone(),
        tmpfs: spec.tmpfs.clone(),
        pods: Vec::new(),
    };
    for (p, pod) in spec.pods.iter().enumerate() {
        host.pods.push(plan_pod(pod, &host.pod_prefixes, p + 1)?);
    }
    Ok(host)
}

/// Numbers a pod of a host, the `p`-th from 1.
pub(crate) fn plan_pod(spec: &PodSpec, prefixes: &[IpNet], p: usize) -> Result<PodPlan> {
    let addresses = if spec.addresses.is_empty() {
        prefixes
            .iter()
            .map(|net| nth(*net, 9 + p as u64).map(|net| net.addr()))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| Error::spec(&spec.name, "the host's pod prefixes have no room for it"))?
    } else {
        spec.addresses.clone()
    };
    let mtu = mtu(&spec.name, spec.mtu, DEFAULT_MTU)?;
    Ok(PodPlan { name: spec.name.clone(), port: format!("pod{p}"), addresses, mtu })
}

fn take_name(names: &mut BTreeSet<String>, name: &str) -> Result<()> {
    check_name(name)?;
    if names.insert(name.to_owned()) {
        return Ok(());
    }
    Err(Error::spec(name, "the name is taken (`core` always is)"))
}

/// Names become host names and directory names.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    let starts = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    if starts && name.len() <= 63 && name.chars().all(good) {
        return Ok(());
    }
    Err(Error::spec(
        name,
        "a name is 1 to 63 letters, digits, `-` and `.`, and starts with a letter or digit",
    ))
}

fn mtu(object: &str, given: Option<u32>, default: u32) -> Result<u32> {
    let mtu = given.unwrap_or(default);
    if MTU_RANGE.contains(&mtu) {
        return Ok(mtu);
    }
    Err(Error::spec(object, format!("MTU {mtu} is outside {MTU_RANGE:?}")))
}

fn per_family(object: &str, families: Families, given: &[IpNet], v4: IpNet, v6: IpNet) -> Result<Vec<IpNet>> {
    let mut nets = Vec::new();
    for (wanted, default) in [(families.has_v4(), v4), (families.has_v6(), v6)] {
        let same = |net: &&IpNet| net.addr().is_ipv4() == default.addr().is_ipv4();
        match (wanted, given.iter().filter(same).count()) {
            (true, 0) => nets.push(default),
            (true, 1) => nets.extend(given.iter().find(same)),
            (false, 0) => {}
            (true, _) => return Err(Error::spec(object, "two prefixes of one family")),
            (false, _) => return Err(Error::spec(object, "a prefix of a family the site lacks")),
        }
    }
    Ok(nets)
}

fn net4(octets: [u8; 4], length: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::from(octets), length))
}

fn net6(groups: [u16; 8], length: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::from(groups), length))
}

/// The n-th address of a prefix, with the prefix length.
fn nth(net: IpNet, n: u64) -> Option<IpNet> {
    let address = match net.network() {
        IpAddr::V4(base) => IpAddr::V4(Ipv4Addr::from(u32::from(base).checked_add(n.try_into().ok()?)?)),
        IpAddr::V6(base) => IpAddr::V6(Ipv6Addr::from(u128::from(base).checked_add(n.into())?)),
    };
    if !net.contains(&address) || (address.is_ipv4() && address == net.broadcast() && net.prefix_len() < 31) {
        return None;
    }
    IpNet::new(address, net.prefix_len()).ok()
}

/// The first address of the prefix that is not the given one.
fn first_other(net: IpNet) -> Option<IpNet> {
    (1..=2).filter_map(|n| nth(net, n)).find(|other| other.addr() != net.addr())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_is_numbered_the_documented_way() {
        let sites = plan(&LabSpec::grid(2, 3, 2)).unwrap();
        assert_eq!(sites[1].uplink[0].to_string(), "198.18.2.2/24");
        assert_eq!(sites[1].core[1].to_string(), "2001:db8:ffff:2::1/64");
        assert_eq!(sites[1].lan[0].to_string(), "172.16.2.1/24");
        let host = &sites[1].hosts[2];
        assert_eq!(host.addresses[0].to_string(), "172.16.2.12/24");
        assert_eq!(host.pod_prefixes[1].to_string(), "fd00:2:0:3::/64");
        assert_eq!(host.pods[1].addresses[0].to_string(), "10.2.3.11");
        assert_eq!(host.pods[1].addresses[1].to_string(), "fd00:2:0:3::b");
    }

    #[test]
    fn contradictions_are_refused_by_name() {
        let bad = |site: SiteSpec| plan(&LabSpec::new().site(site)).unwrap_err().to_string();
        assert!(bad(SiteSpec::new("core")).contains("core"));
        assert!(bad(SiteSpec::new("../x")).contains("../x"));
        let twice = SiteSpec::new("a").host(HostSpec::new("a"));
        assert!(bad(twice).contains("taken"));
        let outside = HostSpec { addresses: vec!["10.9.9.9".parse().unwrap()], ..HostSpec::new("h") };
        assert!(bad(SiteSpec::new("a").host(outside)).contains("10.9.9.9"));
        let v6 = HostSpec { addresses: vec!["2001:db8::5".parse().unwrap()], ..HostSpec::new("h") };
        assert!(bad(SiteSpec::new("a").families(Families::V4).host(v6)).contains("lacks"));
        let tiny = SiteSpec { lan_mtu: Some(20), ..SiteSpec::new("a") };
        assert!(bad(tiny).contains("MTU 20"));
    }

    #[test]
    fn given_addresses_are_kept() {
        let host = HostSpec { addresses: vec!["10.0.1.5".parse().unwrap()], ..HostSpec::new("aws-1") };
        let site = SiteSpec {
            lan: vec!["10.0.1.0/24".parse().unwrap()],
            uplink: vec!["203.0.113.5/24".parse().unwrap()],
            families: Families::V4,
            ..SiteSpec::new("aws").host(host)
        };
        let sites = plan(&LabSpec::new().site(site)).unwrap();
        assert_eq!(sites[0].core[0].to_string(), "203.0.113.1/24");
        assert_eq!(sites[0].hosts[0].addresses[0].to_string(), "10.0.1.5/24");
        assert_eq!(sites[0].lan.len(), 1);
    }
}
