//! Which prefixes this node holds itself.

use ipnet::IpNet;
use mesh_keyring::SiteName;
use mesh_overlay::{Grants, NodeRecord, prefix};

/// Returns the prefixes that the operator's manifest gives this node, less those that it could not have been granted.
pub fn own_prefixes(
    grants: &Grants,
    site: &SiteName,
    record: &NodeRecord,
    warnings: &mut Vec<String>,
) -> Vec<IpNet> {
    let mut own = Vec::new();
    for text in &record.pod_cidrs {
        let shown: String = text.chars().take(60).collect();
        let mut refuse = |why: String| {
            warnings.push(format!("spec.podCIDRs of this node: {shown:?} is not used: {why}"));
        };
        let Ok(net) = text.parse::<IpNet>().map(|net| net.trunc()) else {
            refuse("no prefix such as 10.1.0.0/24".to_owned());
            continue;
        };
        // Where sites are named, one that is not among them was granted nothing.
        let granted = grants.sites.is_empty()
            || grants.sites.get(site).is_some_and(|wide| wide.iter().any(|wide| wide.contains(&net)));
        if let Some(why) = prefix::forbidden(&net) {
            refuse(why);
        } else if !granted {
            refuse(format!("it lies outside of what site {site} was granted"));
        } else if let Some(ip) = grants.protected.iter().find(|ip| net.contains(*ip)) {
            refuse(format!("it holds the protected address {ip}"));
        } else if !own.contains(&net) {
            own.push(net);
        }
    }
    own
}
