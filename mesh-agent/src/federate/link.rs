//! ClusterLinks as they are written, and the credentials that they name.

use ipnet::IpNet;
use kube::config::Kubeconfig;
use kube::core::Object;
use mesh_keyring::ClusterName;
use mesh_overlay::prefix;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::mirror::Link;

/// The key of a link's Secret that holds the kubeconfig.
pub const SECRET_KEY: &str = "kubeconfig";

/// A ClusterLink.
pub type ClusterLink = Object<ClusterLinkSpec, Value>;

/// Its `spec`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ClusterLinkSpec {
    /// The Secret in namespace `sennit`.
    pub kubeconfig_secret: SecretName,
    /// The site that all nodes of the cluster stand in.
    pub site: Option<String>,
    /// What they may hold.
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Vec<String>,
}

/// A Secret by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SecretName {
    /// Its name.
    pub name: String,
}

/// What a ClusterLink allows.
///
/// # Errors
/// A sentence that names the field.
pub fn parse(link: &ClusterLink, own: &ClusterName) -> Result<Link, String> {
    let name = link.metadata.name.clone().unwrap_or_default();
    let cluster: ClusterName = name.parse().map_err(|e| format!("metadata.name: {e}"))?;
    if cluster == *own {
        return Err(format!("metadata.name: {own} is this cluster itself"));
    }
    let site = link.spec.site.as_deref().map(str::parse).transpose();
    let site = site.map_err(|e| format!("spec.site: {e}"))?;
    let mut grants = Vec::new();
    for text in &link.spec.pod_cidrs {
        let net: IpNet = text.parse().map_err(|_| format!("spec.podCIDRs: {text:?} is no prefix"))?;
        if let Some(why) = prefix::forbidden(&net) {
            return Err(format!("spec.podCIDRs: {net} cannot be granted: {why}"));
        }
        grants.push(net.trunc());
    }
    if link.spec.kubeconfig_secret.name.is_empty() {
        return Err("spec.kubeconfigSecret.name is empty".into());
    }
    Ok(Link { cluster, site, grants })
}

/// The kubeconfig of a link's Secret. It may hold nothing but addresses and credentials: no files of this machine, no
/// programs to run, and no server that is taken unseen.
///
/// # Errors
/// A sentence without any of the content.
pub fn kubeconfig(text: &[u8]) -> Result<Kubeconfig, String> {
    let text = std::str::from_utf8(text).map_err(|_| format!("{SECRET_KEY} is no UTF-8 text"))?;
    // What the parser says may quote what it has read.
    let config = Kubeconfig::from_yaml(text).map_err(|_| format!("{SECRET_KEY} is no kubeconfig"))?;
    for cluster in config.clusters.iter().filter_map(|named| named.cluster.as_ref()) {
        if !cluster.server.as_ref().is_some_and(|server| server.starts_with("https://")) {
            return Err("server: an address that begins with https:// is needed".into());
        }
        if cluster.certificate_authority.is_some() {
            return Err("certificate-authority names a file: put it in as certificate-authority-data".into());
        }
        if cluster.insecure_skip_tls_verify == Some(true) {
            return Err("insecure-skip-tls-verify: the server would be taken unseen".into());
        }
    }
    for user in config.auth_infos.iter().filter_map(|named| named.auth_info.as_ref()) {
        if user.exec.is_some() || user.auth_provider.is_some() {
            return Err(
                "a program would have to be run for the credentials: use a token or client-certificate-data"
                    .into(),
            );
        }
        if user.token_file.is_some() || user.client_certificate.is_some() || user.client_key.is_some() {
            return Err("the credentials are in files: put them in as token, or client-certificate-data and client-key-data".into());
        }
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn link(spec: serde_json::Value) -> Result<Link, String> {
        let link = json!({"apiVersion": "sennit.dev/v1alpha1", "kind": "ClusterLink", "metadata": {"name": "west"}, "spec": spec});
        parse(&serde_json::from_value(link).unwrap(), &"east".parse().unwrap())
    }

    #[test]
    fn a_link_is_parsed_or_refused_by_the_name_of_its_field() {
        let good = json!({"kubeconfigSecret": {"name": "west"}, "site": "west", "podCIDRs": ["10.2.0.0/16"]});
        let parsed = link(good.clone()).unwrap();
        let site = parsed.site.as_ref().map(|site| site.as_str());
        assert_eq!((parsed.cluster.as_str(), site, parsed.grants.len()), ("west", Some("west"), 1));
        for (field, value, wanted) in [
            ("site", json!("A B"), "spec.site"),
            ("podCIDRs", json!(["0.0.0.0/0"]), "spec.podCIDRs"),
            ("podCIDRs", json!(["x"]), "spec.podCIDRs"),
            ("kubeconfigSecret", json!({}), "kubeconfigSecret.name"),
        ] {
            let mut bad = good.clone();
            bad[field] = value;
            let error = link(bad).unwrap_err();
            assert!(error.contains(wanted), "{error}");
        }
    }

    fn config(cluster: &str, user: &str) -> Result<(), String> {
        let text = format!(
            "apiVersion: v1\nkind: Config\nclusters: [{{name: c, cluster: {{server: 'https://192.0.2.1'{cluster}}}}}]\nusers: [{{name: u, user: {{token: s3cret{user}}}}}]\ncontexts: [{{name: x, context: {{cluster: c, user: u}}}}]\ncurrent-context: x\n"
        );
        kubeconfig(text.as_bytes()).map(drop)
    }

    #[test]
    fn credentials_run_nothing_and_read_no_files() {
        assert_eq!(config("", ""), Ok(()));
        for (cluster, user, wanted) in [
            ("", ", exec: {apiVersion: client.authentication.k8s.io/v1, command: /bin/sh}", "a program"),
            ("", ", tokenFile: /etc/shadow", "in files"),
            ("", ", client-key: /etc/shadow", "in files"),
            (", certificate-authority: /etc/shadow", "", "names a file"),
            (", insecure-skip-tls-verify: true", "", "unseen"),
        ] {
            let error = config(cluster, user).unwrap_err();
            assert!(error.contains(wanted) && !error.contains("s3cret"), "{error}");
        }
        for garbage in [&b"\xff\xfe"[..], b"{{{ s3cret", b"[1, s3cret]"] {
            let error = kubeconfig(garbage).unwrap_err();
            assert!(!error.contains("s3cret"), "{error}");
        }
    }
}
