//! The agent's configuration file: every value is parsed into its type here, at the edge.

mod policy;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_keyring::{ClusterName, MeshName, NodeName, SiteName};
use mesh_overlay::advertisement::{ENDPOINTS_MOST, MTU_LEAST};
use mesh_overlay::guard::POD_KINDS;
use mesh_overlay::local::{InterfaceName, Routing, Vxlan};
use mesh_overlay::wireguard::Choice;
use mesh_overlay::{Endpoint, Grants};
use serde::Deserialize;

use crate::bypass::Acknowledged;
use crate::identity::IdentityConfig;
use crate::settings::{Encryption, SiteGrant, grants};
pub use policy::{Mode, Policy, SitePair, SiteStances, Stance};

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// The answer of the system.
        source: std::io::Error,
    },
    /// Not YAML, an unknown field, or a value of the wrong kind; the text has line and column.
    #[error("configuration {path}: {reason}")]
    Parse {
        /// The file.
        path: String,
        /// What is wrong, and where.
        reason: String,
    },
    /// A value that is out of range or contradicts another.
    #[error("configuration {path}: {field}: {reason}")]
    Value {
        /// The file.
        path: String,
        /// The field.
        field: String,
        /// What is wrong and what is allowed.
        reason: String,
    },
}

/// The UDP port where nobody names one.
pub const LISTEN_PORT: u16 = 51820;
/// Seconds between keepalives where nobody says.
pub const KEEPALIVE: u16 = 25;

/// The `wireguard` section.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Wireguard {
    /// Interface name.
    pub interface: InterfaceName,
    /// UDP port; absent: the Mesh's, or [`LISTEN_PORT`].
    pub listen_port: Option<u16>,
    /// Implementation.
    pub backend: Choice,
    /// The `mesh-wg` program: a name on PATH or a path.
    pub userspace_binary: PathBuf,
    /// A userspace device's process is run by somebody else, such as the DaemonSet sennit-device: the agent waits for it,
    /// and neither starts nor ends one.
    pub external_device: bool,
    /// Seconds, 0 sends none; absent: the Mesh's, or [`KEEPALIVE`].
    pub persistent_keepalive: Option<u16>,
}

impl Default for Wireguard {
    fn default() -> Self {
        Self {
            interface: default_interface(),
            listen_port: None,
            backend: Choice::Auto,
            userspace_binary: PathBuf::from("mesh-wg"),
            external_device: false,
            persistent_keepalive: None,
        }
    }
}

#[expect(clippy::expect_used, reason = "a constant that a test parses")]
fn default_interface() -> InterfaceName {
    "sennit0".parse().expect("sennit0 is an interface name")
}

/// The `underlay` section.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Underlay {
    /// Where peers of other sites dial this node; absent: derived; empty: they cannot.
    pub endpoints: Option<Vec<Endpoint>>,
    /// Where peers of the same site dial this node; absent: derived.
    pub internal_endpoints: Option<Vec<Endpoint>>,
    /// Bytes; absent: the MTU of the interface that the default route leaves through.
    pub mtu: Option<u16>,
    /// The interfaces that lead to the underlay. Their own addresses and gateways are let alone where one lies
    /// inside of a prefix of the mesh; without this nothing that the network says opens the guard.
    pub interfaces: Vec<LinkName>,
}

/// The name of any interface: 1 to 15 bytes without `/` and white space, as the kernel allows.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct LinkName(String);

impl LinkName {
    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for LinkName {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let fine = (1..=15).contains(&text.len())
            && !text.contains(|c: char| c == '/' || c == ':' || c.is_whitespace())
            && text != "."
            && text != "..";
        if fine { Ok(Self(text)) } else { Err(format!("{text:.40?} is no interface name")) }
    }
}

/// Days for which a prefix that nobody holds any more stays guarded, where nobody says.
pub const GRACE_DAYS: u32 = 30;

/// The `guard` section.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct GuardConfig {
    /// Days of the agent's running time after which a prefix that nobody holds any more is guarded no longer;
    /// 0: until it is released.
    pub grace_days: u32,
    /// Kinds of interfaces that lead to pods of this node (`ip -d link`).
    pub pod_interface_kinds: BTreeSet<LinkName>,
}

impl Default for GuardConfig {
    fn default() -> Self {
        let kinds = POD_KINDS.into_iter().map(|kind| LinkName(kind.to_owned()));
        Self { grace_days: GRACE_DAYS, pod_interface_kinds: kinds.collect() }
    }
}

impl GuardConfig {
    /// Returns the time for which what nobody holds stays guarded; `None`: for ever.
    pub fn grace(&self) -> Option<Duration> {
        (self.grace_days > 0).then(|| Duration::from_secs(u64::from(self.grace_days) * 86_400))
    }
}

/// The `registry` section: one of these.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum RegistryChoice {
    /// A directory of manifests.
    File(FileRegistryConfig),
    /// A cluster's API.
    Kube(KubeRegistryConfig),
}

/// The `registry.kube` section.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct KubeRegistryConfig {
    /// How to reach the API; absent: as a pod of the cluster, by its service account.
    pub kubeconfig: Option<PathBuf>,
    /// This cluster's name, in a mesh of several: its nodes are known as NODE.CLUSTER in all of them, and so is this one.
    pub cluster: Option<ClusterName>,
    /// Whether the label `sennit.dev/site` of a Node counts, which its kubelet may write; absent: as the Mesh says, or not.
    pub old_site_label: Option<bool>,
}

/// The `registry.file` section.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FileRegistryConfig {
    /// The directory.
    pub dir: PathBuf,
}

/// The `vxlan` section: what carries WireGuard where direct UDP does not pass.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct VxlanConfig {
    /// Whether there is a VXLAN device at all.
    pub enabled: bool,
    /// What the devices' names begin with; 4 and 6 follow.
    pub interface: InterfaceName,
    /// The network identifier, the same at all nodes; absent: the Mesh's, or [`Vxlan::VNI`].
    pub vni: Option<u32>,
    /// The UDP port, the same at all nodes; absent: the Mesh's, or [`Vxlan::PORT`].
    pub port: Option<u16>,
}

impl Default for VxlanConfig {
    #[expect(clippy::expect_used, reason = "a constant that a test parses")]
    fn default() -> Self {
        let interface = Vxlan::INTERFACE.parse().expect("sennitx is an interface name");
        Self { enabled: true, interface, vni: None, port: None }
    }
}

impl VxlanConfig {
    /// What is wrong with a network identifier or a port, if anything.
    pub fn wrong(vni: Option<u32>, port: Option<u16>) -> Option<(&'static str, String)> {
        // The next one is taken too.
        if let Some(vni) = vni.filter(|vni| !(1..(1 << 24) - 1).contains(vni)) {
            return Some(("vni", format!("{vni} is no VXLAN network identifier: 1 to 16777214")));
        }
        port.filter(|port| !(1..u16::MAX).contains(port))
            .map(|_| ("port", "the port has to be 1 to 65534".to_owned()))
    }
}

/// The `metrics` section.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Metrics {
    /// Where Prometheus finds them, at `/metrics`; absent: nowhere.
    pub listen: Option<SocketAddr>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RoutingConfig {
    table: Option<u32>,
    rule_priority: Option<u32>,
    protocol: Option<u8>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Document {
    node: Option<NodeName>,
    site: SiteName,
    mesh: MeshName,
    state_dir: Option<PathBuf>,
    run_dir: Option<PathBuf>,
    registry: RegistryChoice,
    #[serde(default)]
    wireguard: Wireguard,
    #[serde(default)]
    underlay: Underlay,
    #[serde(default)]
    vxlan: VxlanConfig,
    #[serde(default)]
    guard: GuardConfig,
    #[serde(default)]
    identity: IdentityConfig,
    #[serde(default)]
    encryption: Encryption,
    #[serde(default)]
    metrics: Metrics,
    #[serde(default)]
    sites: Vec<SiteGrant>,
    #[serde(default)]
    protected_addresses: BTreeSet<IpAddr>,
    #[serde(default)]
    routing: RoutingConfig,
    #[serde(default)]
    policy: Policy,
    #[serde(default)]
    acknowledge: BTreeSet<Acknowledged>,
    #[serde(default)]
    log: LogLevel,
}

/// How much is logged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// What needs somebody.
    Error,
    /// And what may soon.
    Warn,
    /// And what changed.
    #[default]
    Info,
    /// And each decision.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    /// The level as tracing's filter wants it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// A valid configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// This node.
    pub node: NodeName,
    /// Its site.
    pub site: SiteName,
    /// What the operator grants.
    pub grants: Grants,
    /// Keys and last good state.
    pub state_dir: PathBuf,
    /// Socket, lock and the device's log.
    pub run_dir: PathBuf,
    /// Where nodes are published.
    pub registry: RegistryChoice,
    /// The tunnel device.
    pub wireguard: Wireguard,
    /// How others reach this node.
    pub underlay: Underlay,
    /// What carries WireGuard where direct UDP does not pass.
    pub vxlan: VxlanConfig,
    /// Bounds what is guarded, and for how long.
    pub guard: GuardConfig,
    /// The settings for a node whose identity is also used elsewhere.
    pub identity: IdentityConfig,
    /// How packets between nodes travel.
    pub encryption: Encryption,
    /// Where metrics are told.
    pub metrics: Metrics,
    /// What is done with policies.
    pub policy: Policy,
    /// What the operator knows of and accepts.
    pub acknowledge: BTreeSet<Acknowledged>,
    /// Our numbers in the kernel's tables.
    pub routing: Routing,
    /// How much is logged.
    pub log: LogLevel,
}

/// The largest configuration that is read, in bytes.
const FILE_MOST: u64 = 1 << 20;

fn read(path: &Path) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(path)?.take(FILE_MOST + 1).read_to_string(&mut text)?;
    if text.len() as u64 > FILE_MOST {
        return Err(std::io::Error::other(format!("larger than {} KiB", FILE_MOST >> 10)));
    }
    Ok(text)
}

impl Config {
    /// Reads a configuration file. Where it names no node, it is `node`, and without that the host's name.
    ///
    /// # Errors
    /// [`ConfigError`] names file, field or position, and what is allowed.
    pub fn load(path: &Path, node: Option<&str>) -> Result<Self, ConfigError> {
        let shown = path.display().to_string();
        let text = read(path).map_err(|source| ConfigError::Read { path: shown.clone(), source })?;
        let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
        Self::parse(&shown, &text, node.or(host.as_deref()))
    }

    /// Parses a configuration; `path` is for messages, `host` is the node's name where none is configured.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(path: &str, text: &str, host: Option<&str>) -> Result<Self, ConfigError> {
        let document: Document = serde_saphyr::from_str(text)
            .map_err(|e| ConfigError::Parse { path: path.to_owned(), reason: e.to_string() })?;
        let bad = |field: &str, reason: String| ConfigError::Value {
            path: path.to_owned(),
            field: field.to_owned(),
            reason,
        };
        let mut node: NodeName = match document.node {
            Some(node) => node,
            None => host
                .unwrap_or_default()
                .parse()
                .map_err(|e| bad("node", format!("not set, and the host name does not serve: {e}")))?,
        };
        let sites = grants(document.sites).map_err(|reason| bad("sites", reason))?;
        if !sites.is_empty() && !sites.contains_key(&document.site) {
            return Err(bad("site", format!("{} has no entry under `sites`", document.site)));
        }
        if document.guard.pod_interface_kinds.iter().any(|kind| kind.as_str().contains('"')) {
            return Err(bad("guard.podInterfaceKinds", "a kind such as veth is needed".to_owned()));
        }
        if document.wireguard.listen_port == Some(0) {
            return Err(bad("wireguard.listenPort", "the port has to be 1 to 65535".to_owned()));
        }
        if let Some(mtu) = document.underlay.mtu.filter(|mtu| *mtu < MTU_LEAST) {
            return Err(bad("underlay.mtu", format!("{mtu} is too small: at least {MTU_LEAST} bytes")));
        }
        for (field, list) in [
            ("underlay.endpoints", &document.underlay.endpoints),
            ("underlay.internalEndpoints", &document.underlay.internal_endpoints),
        ] {
            let count = list.as_ref().map_or(0, Vec::len);
            if count > ENDPOINTS_MOST {
                return Err(bad(field, format!("{count} entries; at most {ENDPOINTS_MOST} are published")));
            }
        }
        if let Some(reason) = document.encryption.wrong() {
            return Err(bad("encryption", reason));
        }
        if let Some(reason) = document.policy.sites.wrong() {
            return Err(bad("policy.sites", reason));
        }
        if document.policy.ct_mark_mask.count_ones() < 8 {
            let reason = format!("{:#x}: at least 8 bits are needed", document.policy.ct_mark_mask);
            return Err(bad("policy.ctMarkMask", reason));
        }
        if let Some((field, reason)) = VxlanConfig::wrong(document.vxlan.vni, document.vxlan.port) {
            return Err(bad(&format!("vxlan.{field}"), reason));
        }
        let vxlan = &document.vxlan.interface;
        if vxlan.as_str().len() > 13 || vxlan.as_str() == document.wireguard.interface.as_str() {
            let reason = format!(
                "{vxlan}: at most 13 characters, since 4 or 6 follows, or c4 or c6, and another name than wireguard.interface"
            );
            return Err(bad("vxlan.interface", reason));
        }
        if document.wireguard.listen_port.is_some() && document.wireguard.listen_port == document.vxlan.port {
            return Err(bad("vxlan.port", "it is WireGuard's".to_owned()));
        }
        let standard = Routing::default();
        let routing = Routing {
            table: document.routing.table.unwrap_or(standard.table),
            priority: document.routing.rule_priority.unwrap_or(standard.priority),
            protocol: document.routing.protocol.unwrap_or(standard.protocol),
        };
        if routing.table == 0 || (253..=255).contains(&routing.table) {
            return Err(bad("routing.table", format!("{} belongs to the system", routing.table)));
        }
        // The next two are taken too.
        if !(1..32764).contains(&routing.priority) {
            let reason = "1 to 32763: it and the next two stand before the main table's rule".to_owned();
            return Err(bad("routing.rulePriority", reason));
        }
        if routing.protocol < 5 {
            return Err(bad("routing.protocol", "5 to 255: the lower ones belong to the kernel".to_owned()));
        }
        if let RegistryChoice::Kube(KubeRegistryConfig { cluster: Some(cluster), .. }) = &document.registry {
            node = node.of_cluster(cluster).map_err(|e| bad("registry.kube.cluster", e.to_string()))?;
        }
        let registry = match &document.registry {
            RegistryChoice::File(file) => ("registry.file.dir", Some(&file.dir)),
            RegistryChoice::Kube(kube) => ("registry.kube.kubeconfig", kube.kubeconfig.as_ref()),
        };
        for (field, dir) in [
            registry,
            ("stateDir", document.state_dir.as_ref()),
            ("runDir", document.run_dir.as_ref()),
            ("policy.log.file", document.policy.log.file.as_ref()),
        ] {
            if dir.is_some_and(|dir| !dir.is_absolute()) {
                return Err(bad(field, "an absolute path is needed".to_owned()));
            }
        }
        Ok(Self {
            node,
            site: document.site,
            grants: Grants {
                mesh: document.mesh,
                sites,
                protected: document.protected_addresses,
                exemptions: Vec::new(),
            },
            state_dir: document.state_dir.unwrap_or_else(|| PathBuf::from("/var/lib/sennit")),
            run_dir: document.run_dir.unwrap_or_else(|| PathBuf::from("/run/sennit")),
            registry: document.registry,
            wireguard: document.wireguard,
            underlay: document.underlay,
            vxlan: document.vxlan,
            guard: document.guard,
            identity: document.identity,
            encryption: document.encryption,
            metrics: document.metrics,
            policy: document.policy,
            acknowledge: document.acknowledge,
            routing,
            log: document.log,
        })
    }

    /// Where denied flows are told.
    pub fn flow_log(&self) -> PathBuf {
        self.policy.log.file.clone().unwrap_or_else(|| self.state_dir.join("flows.jsonl"))
    }

    /// The socket by which a running agent is told something.
    pub fn control_socket(&self) -> PathBuf {
        self.run_dir.join("control.sock")
    }

    /// The agent's status socket.
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join("agent.sock")
    }
}

#[cfg(test)]
#[path = "config/tests.rs"]
mod tests;
