//! `mesh-agent join`: registers a host without Kubernetes with a cluster, and gives it credentials for nothing else.

mod labels;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use ipnet::IpNet;
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::{DynamicObject, Patch, PatchParams, PostParams};
use kube::config::Kubeconfig;
use kube::{Api, ResourceExt as _};
use mesh_keyring::{ClusterName, MeshName, NodeName, SiteName};
use mesh_overlay::prefix;
use serde_json::{Value, json};

use super::{print, shown};
use crate::atomic;
use crate::registry::kube::budget::{Budget, Connected, client};
use crate::registry::kube::{GROUP, LINK, VERSION, api_config, mesh_nodes, meshes as meshes_kind, reason};

/// The namespace of the host's service account.
const NAMESPACE: &str = "sennit";
const FIELD_MANAGER: &str = "sennit-join";

/// What the operator asks for.
#[derive(Debug, Clone, clap::Args)]
pub struct Join {
    /// A kubeconfig of somebody who may create MeshNodes, and service accounts and their tokens in namespace `sennit`.
    /// It is used once and not copied.
    #[arg(long)]
    kubeconfig: PathBuf,
    /// The mesh's name, as the other agents have it.
    #[arg(long)]
    mesh: String,
    /// The site that this host stands in.
    #[arg(long)]
    site: String,
    /// The host's name in the mesh. Default: the host name.
    #[arg(long)]
    node: Option<String>,
    /// The cluster's name, where the other agents have one as `registry.kube.cluster`: the host is NODE.CLUSTER then.
    #[arg(long)]
    cluster: Option<String>,
    /// A prefix whose addresses this host holds, such as 10.4.1.0/24. May be given several times.
    #[arg(long = "pod-cidr", value_name = "CIDR")]
    pod_cidrs: Vec<IpNet>,
    /// Where configuration and credentials are put.
    #[arg(long, default_value = "/etc/sennit")]
    directory: PathBuf,
    /// How long the credentials are to be valid, in days; the cluster may grant less. Joining again renews them.
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u16).range(1..=3650))]
    valid_days: u16,
}

/// Registers the host, then writes `kubeconfig` and, where there is none, `agent.yaml`.
pub(super) async fn join(asked: &Join) -> anyhow::Result<()> {
    let mesh: MeshName = asked.mesh.parse().context("--mesh")?;
    let site: SiteName = asked.site.parse().context("--site")?;
    let cluster: Option<ClusterName> =
        asked.cluster.as_deref().map(str::parse).transpose().context("--cluster")?;
    let short = node_name(asked.node.as_deref())?;
    let node = match &cluster {
        Some(cluster) => short.of_cluster(cluster).context("--cluster")?,
        None => short.clone(),
    };
    for net in &asked.pod_cidrs {
        if let Some(why) = prefix::forbidden(net) {
            bail!("--pod-cidr {net}: {why}");
        }
        if net.trunc() != *net {
            bail!(
                "--pod-cidr {net}: bits are set behind the prefix length; {} is meant, perhaps",
                net.trunc()
            );
        }
    }
    let access = api_config(Some(&asked.kubeconfig)).await?;
    let server = access.cluster_url.to_string();
    let Connected { client, .. } =
        client(access, Budget::OWN).with_context(|| format!("credentials for {server}"))?;
    let said =
        |what: String| move |e: kube::Error| anyhow::anyhow!("{what}: API server {server}: {}", reason(&e));

    let mesh_nodes: Api<DynamicObject> = Api::all_with(client.clone(), &mesh_nodes());
    // Joining again to renew the token takes no prefix away.
    let standing =
        mesh_nodes.get_opt(node.as_str()).await.map_err(said.clone()(format!("MeshNode {node}")))?;
    if standing.as_ref().is_some_and(|object| object.labels().contains_key(LINK)) {
        bail!("MeshNode {node} stands for a node of another cluster: give this host another name by --node");
    }
    let standing = standing.and_then(|object| object.data.pointer("/spec/podCIDRs").cloned());
    let pod_cidrs = match standing {
        Some(standing) if asked.pod_cidrs.is_empty() => standing,
        _ => json!(asked.pod_cidrs),
    };
    let mesh_node = json!({
        "apiVersion": format!("{GROUP}/{VERSION}"),
        "kind": "MeshNode",
        "metadata": {"name": node},
        "spec": {"site": site, "podCIDRs": pod_cidrs},
    });
    let applied =
        mesh_nodes.patch(node.as_str(), &PatchParams::apply(FIELD_MANAGER), &Patch::Apply(&mesh_node)).await;
    applied.map_err(said.clone()(format!("MeshNode {node}")))?;

    // Best effort: who may register hosts need not be able to read Meshes.
    let meshes: Api<DynamicObject> = Api::all_with(client.clone(), &meshes_kind());
    let settings = meshes.get_opt(mesh.as_str()).await.ok().flatten();
    let sites = settings.as_ref().and_then(|object| object.data.pointer("/spec/sites")?.as_array());
    let granted = sites.is_some_and(|sites| !sites.is_empty());
    let old_counts =
        settings.as_ref().and_then(|object| object.data.pointer("/spec/oldSiteLabel")?.as_bool());
    let unlabelled = labels::check(client.clone(), &site, old_counts == Some(true)).await;

    let account = format!("host-{node}");
    let accounts: Api<ServiceAccount> = Api::namespaced(client, NAMESPACE);
    let service_account = json!({
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": account, "namespace": NAMESPACE},
        "automountServiceAccountToken": false,
    });
    let applied =
        accounts.patch(&account, &PatchParams::apply(FIELD_MANAGER), &Patch::Apply(&service_account)).await;
    applied.map_err(said.clone()(format!("ServiceAccount {NAMESPACE}/{account}")))?;

    let request = TokenRequest {
        spec: TokenRequestSpec {
            expiration_seconds: Some(i64::from(asked.valid_days) * 86_400),
            ..TokenRequestSpec::default()
        },
        ..TokenRequest::default()
    };
    let issued = accounts.create_token_request(&account, &PostParams::default(), &request).await;
    let issued = issued.map_err(said(format!("a token for ServiceAccount {NAMESPACE}/{account}")))?;
    let status = issued.status.context("the API server answered without a token")?;

    let directory = std::path::absolute(&asked.directory).context("--directory")?;
    atomic::make_dir(&directory, 0o755).with_context(|| shown(&directory))?;
    // A file of its own: a running agent reads it again when it was renewed.
    let token = directory.join("token");
    atomic::replace(&token, status.token.as_bytes(), 0o600).with_context(|| shown(&token))?;
    let credentials = directory.join("kubeconfig");
    let text = kubeconfig(&asked.kubeconfig, &directory, &token)?.to_string();
    atomic::replace(&credentials, text.as_bytes(), 0o600).with_context(|| shown(&credentials))?;
    let configuration = directory.join("agent.yaml");
    let wrote = if configuration.exists() {
        format!("{} was there and is left as it is", shown(&configuration))
    } else {
        let text = agent(&short, &site, &mesh, cluster.as_ref(), &credentials);
        atomic::replace(&configuration, text.as_bytes(), 0o644).with_context(|| shown(&configuration))?;
        format!("{} is written", shown(&configuration))
    };
    let grants = match granted {
        true => "",
        false => {
            "The mesh grants no prefixes to sites: this host guards a prefix once it has seen its holder, not before. Set spec.sites of the Mesh, or `sites` in agent.yaml.\n"
        }
    };
    print(&format!(
        "MeshNode {node} is registered for site {site}; {wrote}.\n{} holds a token until {}; join again to renew them.\n{grants}{unlabelled}Next: systemctl enable --now sennit-guard sennit-agent (deploy/systemd), or mesh-agent run\n",
        shown(&token),
        status.expiration_timestamp.0,
    ))
}

fn node_name(given: Option<&str>) -> anyhow::Result<NodeName> {
    if let Some(name) = given {
        return name.parse().context("--node");
    }
    let host = nix::unistd::gethostname().context("asking for the host name")?;
    host.to_string_lossy().parse().context("the host name does not serve; give --node")
}

/// The cluster of the operator's kubeconfig, with the host's own token.
fn kubeconfig(operators: &Path, directory: &Path, token: &Path) -> anyhow::Result<Value> {
    // It was read before; what the parser says could quote it.
    let Ok(file) = Kubeconfig::read_from(operators) else { bail!("{} is no kubeconfig", shown(operators)) };
    let context =
        file.current_context.as_deref().and_then(|name| file.contexts.iter().find(|c| c.name == name));
    let context =
        context.and_then(|named| named.context.as_ref()).context("the kubeconfig has no current context")?;
    let cluster = file.clusters.iter().find(|cluster| cluster.name == context.cluster);
    let cluster = cluster
        .and_then(|named| named.cluster.as_ref())
        .context("the current context's cluster is missing")?;
    let mut own = json!({"server": cluster.server});
    if let Some(name) = &cluster.tls_server_name {
        own["tls-server-name"] = json!(name);
    }
    match (&cluster.certificate_authority_data, &cluster.certificate_authority) {
        (Some(data), _) => own["certificate-authority-data"] = json!(data),
        (None, Some(path)) => {
            let copy = directory.join("cluster-ca.crt");
            let authority = std::fs::read(path).with_context(|| path.clone())?;
            atomic::replace(&copy, &authority, 0o644).with_context(|| shown(&copy))?;
            own["certificate-authority"] = json!(copy);
        }
        (None, None) => {}
    }
    Ok(json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "cluster", "cluster": own}],
        "users": [{"name": "host", "user": {"tokenFile": token}}],
        "contexts": [{"name": "mesh", "context": {"cluster": "cluster", "user": "host"}}],
        "current-context": "mesh",
    }))
}

fn agent(
    node: &NodeName,
    site: &SiteName,
    mesh: &MeshName,
    cluster: Option<&ClusterName>,
    credentials: &Path,
) -> String {
    let cluster = cluster.map(|cluster| format!("    cluster: {cluster}\n")).unwrap_or_default();
    format!(
        "# Written by mesh-agent join. All settings: deploy/examples/agent.yaml\nnode: {node}\nsite: {site}\nmesh: {mesh}\nregistry:\n  kube:\n    kubeconfig: {}\n{cluster}",
        shown(credentials)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, RegistryChoice};

    #[test]
    fn what_join_writes_is_a_configuration() {
        let text = agent(
            &"onprem-1".parse().unwrap(),
            &"onprem".parse().unwrap(),
            &"prod".parse().unwrap(),
            Some(&"west".parse().unwrap()),
            Path::new("/etc/sennit/kubeconfig"),
        );
        let config = Config::parse("agent.yaml", &text, None).unwrap();
        let RegistryChoice::Kube(kube) = config.registry else { panic!("{text}") };
        assert_eq!(kube.kubeconfig.unwrap(), Path::new("/etc/sennit/kubeconfig"));
        assert_eq!((config.node.as_str(), config.site.as_str()), ("onprem-1.west", "onprem"));
    }

    #[test]
    fn the_operators_own_credentials_are_not_copied() {
        let dir = tempfile::tempdir().unwrap();
        let operators = dir.path().join("admin");
        let authority = dir.path().join("authority.crt");
        std::fs::write(&authority, "an authority").unwrap();
        let given = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "x",
            "clusters": [{"name": "c", "cluster": {"server": "https://192.0.2.1:6443", "certificate-authority": authority}}],
            "users": [{"name": "u", "user": {"token": "the operator's secret"}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        });
        std::fs::write(&operators, given.to_string()).unwrap();
        let own = kubeconfig(&operators, dir.path(), Path::new("/etc/sennit/token")).unwrap();
        assert!(!own.to_string().contains("operator"), "{own}");
        assert_eq!(own["users"][0]["user"], json!({"tokenFile": "/etc/sennit/token"}));
        assert_eq!(own["clusters"][0]["cluster"]["server"], "https://192.0.2.1:6443");
        assert_eq!(std::fs::read(dir.path().join("cluster-ca.crt")).unwrap(), b"an authority");
    }
}
