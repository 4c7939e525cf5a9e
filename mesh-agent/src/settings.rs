//! What the operator says for the mesh as a whole, in an object of kind `Mesh`. What agent.yaml says comes before it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_keyring::SiteName;
use mesh_overlay::advertisement::MTU_LEAST;
use mesh_overlay::{Exemption, prefix};
use serde::{Deserialize, Serialize};

use crate::config::{SiteStances, VxlanConfig};

/// Prefixes that a site may hold, as configuration and Mesh write it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SiteGrant {
    name: SiteName,
    prefixes: Vec<IpNet>,
}

/// Checks grants and puts them together.
///
/// # Errors
/// A sentence that names site and prefix.
pub fn grants(sites: Vec<SiteGrant>) -> Result<BTreeMap<SiteName, Vec<IpNet>>, String> {
    let mut all = BTreeMap::new();
    for SiteGrant { name, prefixes } in sites {
        for net in &prefixes {
            if let Some(why) = prefix::forbidden(net) {
                return Err(format!("{name}: {net} cannot be granted: {why}"));
            }
            if net.trunc() != *net {
                return Err(format!("{name}: {net} has host bits set; write {}", net.trunc()));
            }
        }
        if all.insert(name.clone(), prefixes).is_some() {
            return Err(format!("{name} is named twice"));
        }
    }
    match overlapping(&all) {
        Some(why) => Err(why),
        None => Ok(all),
    }
}

fn overlapping(sites: &BTreeMap<SiteName, Vec<IpNet>>) -> Option<String> {
    let all = sites.iter().flat_map(|(name, nets)| nets.iter().map(move |net| (*net, name)));
    let index = prefix::PrefixIndex::new(all);
    let pair = index.overlaps().find(|(a, b)| a.1 != b.1)?;
    let ((outer, a), (inner, b)) = pair;
    Some(format!("{inner} of {b} overlaps {outer} of {a}"))
}

/// The settings of a mesh. Empty: it leaves everything to agent.yaml.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
// Remembered too, perhaps by another version.
#[serde(rename_all = "camelCase", default)]
pub struct Settings {
    /// Sites and the prefixes that they may hold.
    pub sites: BTreeMap<SiteName, Vec<IpNet>>,
    /// Addresses that no peer may hold.
    pub protected: BTreeSet<IpAddr>,
    /// The WireGuard port.
    pub listen_port: Option<u16>,
    /// Seconds; 0 sends none.
    pub persistent_keepalive: Option<u16>,
    /// The underlay's MTU, in bytes.
    pub mtu: Option<u16>,
    /// The VXLAN network identifier.
    pub vxlan_vni: Option<u32>,
    /// The VXLAN port.
    pub vxlan_port: Option<u16>,
    /// Exemptions from encryption, in force or not.
    pub exemptions: Vec<Exemption>,
    /// Whether the label `sennit.dev/site` of Nodes counts, which their kubelets may write.
    pub old_site_label: Option<bool>,
    /// What sites may do to each other.
    #[serde(deserialize_with = "remembered")]
    pub stances: SiteStances,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Spec {
    sites: Vec<SiteGrant>,
    protected_addresses: BTreeSet<IpAddr>,
    wireguard: Wireguard,
    underlay: Underlay,
    vxlan: Vxlan,
    encryption: Encryption,
    policy: Policy,
    old_site_label: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Policy {
    sites: SiteStances,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Vxlan {
    vni: Option<u32>,
    port: Option<u16>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Wireguard {
    listen_port: Option<u16>,
    persistent_keepalive: Option<u16>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Underlay {
    mtu: Option<u16>,
}

/// How packets between nodes travel, as configuration and Mesh write it.
// A mode that this version does not know must not be taken for one that it does.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Encryption {
    mode: Mode,
    /// Pairs that may speak in clear, each with a reason and an end.
    pub exemptions: Vec<Exemption>,
}

/// The most exemptions in one place.
const EXEMPTIONS_MOST: usize = 64;

impl Encryption {
    /// What is wrong with it, if anything.
    pub fn wrong(&self) -> Option<String> {
        let count = self.exemptions.len();
        (count > EXEMPTIONS_MOST).then(|| format!("exemptions: {count} entries; at most {EXEMPTIONS_MOST}"))
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Mode {
    #[default]
    Required,
}

/// Another version may have remembered what this one does not understand: then what it has not understood denies.
fn remembered<'de, D: serde::Deserializer<'de>>(from: D) -> Result<SiteStances, D::Error> {
    let value = serde_json::Value::deserialize(from)?;
    Ok(serde_json::from_value(value).unwrap_or_else(|_| SiteStances::closed()))
}

impl Settings {
    /// Reads the `spec` of a Mesh.
    ///
    /// # Errors
    /// A sentence that names the field and what is wrong with it; nothing of the object counts then.
    pub fn from_spec(spec: serde_json::Value) -> Result<Self, String> {
        let spec: Spec = serde_json::from_value(spec).map_err(|e| format!("spec: {e}"))?;
        if spec.wireguard.listen_port == Some(0) {
            return Err("spec.wireguard.listenPort: the port has to be 1 to 65535".to_owned());
        }
        if let Some(mtu) = spec.underlay.mtu.filter(|mtu| *mtu < MTU_LEAST) {
            return Err(format!("spec.underlay.mtu: {mtu} is too small: at least {MTU_LEAST} bytes"));
        }
        if let Some((field, reason)) = VxlanConfig::wrong(spec.vxlan.vni, spec.vxlan.port) {
            return Err(format!("spec.vxlan.{field}: {reason}"));
        }
        if let Some(why) = spec.encryption.wrong() {
            return Err(format!("spec.encryption.{why}"));
        }
        if let Some(why) = spec.policy.sites.wrong() {
            return Err(format!("spec.policy.sites: {why}"));
        }
        Ok(Self {
            exemptions: spec.encryption.exemptions,
            stances: spec.policy.sites,
            old_site_label: spec.old_site_label,
            sites: grants(spec.sites).map_err(|why| format!("spec.sites: {why}"))?,
            protected: spec.protected_addresses,
            listen_port: spec.wireguard.listen_port,
            persistent_keepalive: spec.wireguard.persistent_keepalive,
            mtu: spec.underlay.mtu,
            vxlan_vni: spec.vxlan.vni,
            vxlan_port: spec.vxlan.port,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_mesh_says_all_of_it_or_nothing() {
        let settings = Settings::from_spec(json!({
            "sites": [{"name": "aws", "prefixes": ["10.1.0.0/16", "fd00:1::/48"]}, {"name": "gcp", "prefixes": []}],
            "protectedAddresses": ["192.0.2.1"],
            "encryption": {"mode": "required", "exemptions": [
                {"between": [{"node": "plc"}, {"site": "aws"}], "reason": "no TUN", "expires": "2027-01-31T00:00:00Z"},
            ]},
            "wireguard": {"listenPort": 51821, "persistentKeepalive": 0}, "underlay": {"mtu": 1400},
            "vxlan": {"vni": 77, "port": 8472},
            "oldSiteLabel": true,
        }))
        .unwrap();
        assert_eq!(settings.sites[&"aws".parse().unwrap()].len(), 2);
        assert_eq!(
            (settings.listen_port, settings.persistent_keepalive, settings.mtu),
            (Some(51821), Some(0), Some(1400))
        );
        assert_eq!(settings.exemptions.len(), 1);
        assert_eq!(settings.old_site_label, Some(true));
        assert_eq!((settings.vxlan_vni, settings.vxlan_port), (Some(77), Some(8472)));
        assert_eq!(Settings::from_spec(json!({})), Ok(Settings::default()));
        let text = serde_json::to_string(&settings).unwrap();
        assert_eq!(serde_json::from_str::<Settings>(&text).unwrap(), settings, "it is remembered");
    }

    #[test]
    fn what_a_mesh_cannot_say_is_named() {
        for (spec, wanted) in [
            (json!({"sites": [{"name": "a", "prefixes": ["0.0.0.0/0"]}]}), "spec.sites: a: 0.0.0.0/0"),
            (json!({"sites": [{"name": "a", "prefixes": ["10.1.2.3/16"]}]}), "write 10.1.0.0/16"),
            (json!({"sites": [{"name": "a", "prefixes": []}, {"name": "a", "prefixes": []}]}), "named twice"),
            (
                json!({"sites": [{"name": "a", "prefixes": ["10.0.0.0/8"]}, {"name": "b", "prefixes": ["10.1.0.0/16"]}]}),
                "10.1.0.0/16 of b overlaps 10.0.0.0/8 of a",
            ),
            (json!({"wireguard": {"listenPort": 0}}), "spec.wireguard.listenPort"),
            (json!({"underlay": {"mtu": 576}}), "spec.underlay.mtu"),
            (json!({"vxlan": {"vni": 16777216}}), "spec.vxlan.vni"),
            (json!({"vxlan": {"port": 0}}), "spec.vxlan.port"),
            (json!({"encryption": {"mode": "preferred"}}), "preferred"),
            (
                json!({"encryption": {"exemptions": [{"between": [{"node": "a"}], "reason": "why"}]}}),
                "expires",
            ),
            (
                json!({"encryption": {"exemptions": [{"between": [], "reason": "why", "expires": "2027-01-31T00:00:00Z"}]}}),
                "between",
            ),
            (json!({"sties": []}), "sties"),
            (json!("text"), "spec"),
        ] {
            let why = Settings::from_spec(spec.clone()).unwrap_err();
            assert!(why.contains(wanted), "{spec}: {why}");
        }
    }
}
