//! Tells at once which Nodes of the cluster the joining host is going to refuse: those without a site's label.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Node;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt as _};
use mesh_keyring::SiteName;
use mesh_overlay::advertisement::{SITE, SITE_LABEL};

/// The most Nodes that are named.
const NAMED_MOST: usize = 8;
/// The most Nodes that are asked for.
const ASKED_MOST: u32 = 500;

/// A Node without the label.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Unlabelled {
    name: String,
    /// The site that the old label names, or else its agent.
    site: Option<SiteName>,
}

/// Reads which Nodes have no label that counts, and says what that means for a host of `site`. Empty: all is well.
pub(super) async fn check(client: Client, site: &SiteName, old_counts: bool) -> String {
    let asked = ListParams::default().labels(&format!("!{SITE_LABEL}")).limit(ASKED_MOST);
    match Api::<Node>::all(client).list_metadata(&asked).await {
        Ok(list) => {
            let more = list.metadata.continue_.as_deref().is_some_and(|token| !token.is_empty());
            let nodes = list.items.iter().filter_map(|node| {
                let old = node.labels().get(SITE);
                let said = old.or_else(|| node.annotations().get(SITE));
                let site = said.and_then(|text| text.parse().ok());
                (old.is_none() || !old_counts).then(|| Unlabelled { name: node.name_any(), site })
            });
            told(nodes.collect(), site, more)
        }
        // Who registers hosts need not be able to read Nodes.
        Err(_) => format!(
            "Whether all Nodes have their site's label could not be read. This host refuses those of other sites \
             without: kubectl get nodes -l '!{SITE_LABEL}'\n"
        ),
    }
}

/// Returns the warning about these nodes. Nodes that claim the host's own site need no label.
fn told(nodes: Vec<Unlabelled>, own: &SiteName, more: bool) -> String {
    let nodes: Vec<Unlabelled> = nodes.into_iter().filter(|node| node.site.as_ref() != Some(own)).collect();
    if nodes.is_empty() {
        return String::new();
    }
    let count = if more { format!("{} or more", nodes.len()) } else { nodes.len().to_string() };
    let mut by_site: BTreeMap<Option<&SiteName>, Vec<&str>> = BTreeMap::new();
    for node in nodes.iter().take(NAMED_MOST) {
        by_site.entry(node.site.as_ref()).or_default().push(&node.name);
    }
    let mut text = format!(
        "{count} Nodes of the cluster have no label {SITE_LABEL}. This host takes each of them for one of site {own}, and \
         refuses it when its agent says otherwise. Label them:\n"
    );
    for (site, names) in by_site {
        let site = site.map_or("SITE", SiteName::as_str);
        text += &format!("  kubectl label node {} {SITE_LABEL}={site}\n", names.join(" "));
    }
    if more || nodes.len() > NAMED_MOST {
        text += &format!("  (and more: kubectl get nodes -l '!{SITE_LABEL}')\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, site: Option<&str>) -> Unlabelled {
        Unlabelled { name: name.to_owned(), site: site.map(|site| site.parse().unwrap()) }
    }

    fn onprem() -> SiteName {
        "onprem".parse().unwrap()
    }

    #[test]
    fn nodes_are_named_with_their_sites_command() {
        let nodes = vec![
            node("a-1", Some("aws")),
            node("a-2", Some("aws")),
            node("g-1", None),
            node("o", Some("onprem")),
        ];
        let text = told(nodes, &onprem(), false);
        assert!(text.starts_with("3 Nodes"), "{text}");
        assert!(text.contains(&format!("kubectl label node a-1 a-2 {SITE_LABEL}=aws\n")), "{text}");
        assert!(text.contains(&format!("kubectl label node g-1 {SITE_LABEL}=SITE\n")), "{text}");
        assert!(!text.contains("and more"), "{text}");
    }

    #[test]
    fn many_nodes_are_named_up_to_a_bound() {
        let nodes: Vec<Unlabelled> = (0..500).map(|n| node(&format!("n-{n}"), None)).collect();
        let text = told(nodes, &onprem(), true);
        assert!(text.starts_with("500 or more Nodes") && text.len() < 800, "{text}");
        assert!(text.contains("n-7 ") && !text.contains("n-8"), "{text}");
        assert!(text.contains("kubectl get nodes -l '!sennit"), "{text}");
    }

    #[test]
    fn labelled_clusters_are_told_nothing() {
        assert_eq!(told(vec![node("o", Some("onprem"))], &onprem(), false), "");
    }
}
