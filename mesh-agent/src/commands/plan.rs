//! `mesh-agent plan`

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context as _, bail};
use jiff::Timestamp;
use mesh_keyring::{MeshName, NodeName};
use mesh_overlay::exemption::in_force;
use mesh_overlay::guard::POD_KINDS;
use mesh_overlay::local::{Routing, Vxlan};
use mesh_overlay::plan::Paths;
use mesh_overlay::plan::path::Resolution;
use mesh_overlay::{Advertisement, Endpoint, Grants, LocalNode, Memory, MeshPlan, NodeRecord, admit};
use serde_json::json;

use super::{print, shown};
use crate::agent::own_prefixes;
use crate::cli::PlanOutput;
use crate::config::{Config, KEEPALIVE, LISTEN_PORT, VxlanConfig, Wireguard};
use crate::registry::file::FileRegistry;

/// What a plan needs besides the registry.
struct Settings {
    grants: Grants,
    wireguard: Wireguard,
    vxlan: VxlanConfig,
    routing: Routing,
}

impl Settings {
    fn load(config: Option<&Path>) -> anyhow::Result<Self> {
        Ok(match config.map(|path| Config::load(path, None)).transpose()? {
            Some(config) => Self {
                grants: Grants {
                    exemptions: in_force(config.encryption.exemptions.iter(), Timestamp::now()),
                    ..config.grants
                },
                wireguard: config.wireguard,
                vxlan: config.vxlan,
                routing: config.routing,
            },
            None => {
                let mesh: MeshName = "mesh".parse()?;
                Self {
                    grants: Grants {
                        mesh,
                        sites: BTreeMap::new(),
                        protected: BTreeSet::new(),
                        exemptions: Vec::new(),
                    },
                    wireguard: Wireguard::default(),
                    vxlan: VxlanConfig::default(),
                    routing: Routing::default(),
                }
            }
        })
    }

    fn local(&self, record: &NodeRecord, warnings: &mut Vec<String>) -> anyhow::Result<LocalNode> {
        let node = &record.name;
        let claim = Advertisement::parse(&record.annotations)
            .with_context(|| format!("node {node}"))?
            .with_context(|| format!("node {node} publishes no key: there is no plan for it yet"))?;
        let endpoints = claim.endpoints.iter().chain(&claim.internal_endpoints);
        let underlay_addresses = endpoints.filter_map(|endpoint| match endpoint {
            Endpoint::Address(address) => Some(address.ip()),
            Endpoint::Name(..) => None,
        });
        Ok(LocalNode {
            name: node.clone(),
            underlay_addresses: underlay_addresses.collect(),
            former: Vec::new(),
            underlay_links: BTreeSet::new(),
            pod_kinds: POD_KINDS.map(str::to_owned).into(),
            holes: BTreeSet::new(),
            prefixes: own_prefixes(&self.grants, &claim.site, record, warnings),
            site: claim.site,
            public_key: claim.public_key,
            underlay_mtu: claim.mtu.unwrap_or(1500),
            encrypts: claim.encrypts,
            interface: self.wireguard.interface,
            listen_port: self.wireguard.listen_port.unwrap_or(LISTEN_PORT),
            vxlan: self.vxlan.enabled.then(|| Vxlan {
                interface: self.vxlan.interface,
                vni: self.vxlan.vni.unwrap_or(Vxlan::VNI),
                port: self.vxlan.port.unwrap_or(Vxlan::PORT),
            }),
            keepalive: Some(self.wireguard.persistent_keepalive.unwrap_or(KEEPALIVE)).filter(|s| *s > 0),
            routing: self.routing,
        })
    }
}

pub(super) fn show(
    state: &Path,
    node: &str,
    config: Option<&Path>,
    output: PlanOutput,
) -> anyhow::Result<()> {
    let node: NodeName = node.parse()?;
    let settings = Settings::load(config)?;
    let snapshot = FileRegistry::new(state).read()?;
    let Some(record) = snapshot.nodes.iter().find(|n| n.name == node) else {
        bail!("{}: no Node manifest of {node}", shown(state));
    };
    let mut warnings = Vec::new();
    let local = settings.local(record, &mut warnings)?;
    let admission = admit(&local, &settings.grants, &snapshot.nodes, &Memory::default());
    let plan = MeshPlan::compute(
        &local,
        &settings.grants,
        &admission.peers,
        &admission.reserved.keys().copied().collect(),
        &Resolution::new(),
        &Paths::new(),
    );

    let mut refused: Vec<(Option<&NodeName>, String)> =
        snapshot.problems.iter().map(|p| (p.node.as_ref(), p.text.clone())).collect();
    for (name, whys) in &admission.refused {
        refused.extend(whys.iter().map(|why| (Some(name), why.to_string())));
    }
    refused.extend(warnings.into_iter().map(|warning| (Some(&node), warning)));
    let text = match output {
        PlanOutput::Json => {
            let refused: Vec<_> =
                refused.iter().map(|(node, reason)| json!({"node": node, "reason": reason})).collect();
            let whole = json!({"plan": plan, "refused": refused, "unpublished": admission.unpublished});
            return print(&format!("{}\n", serde_json::to_string_pretty(&whole)?));
        }
        PlanOutput::Wg => plan.to_wg(),
        PlanOutput::Routes => plan.to_routes(),
        PlanOutput::Dot => plan.to_dot(),
    };
    for (name, reason) in refused {
        eprintln!("refused: {}: {reason}", name.map_or("registry", NodeName::as_str));
    }
    print(&text)
}
