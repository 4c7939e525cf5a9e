//! From manifests to nodes: the operator's word decides who exists and what each holds, a node's own word only
//! what it claims about itself.

use std::collections::BTreeMap;

use mesh_keyring::NodeName;
use mesh_overlay::NodeRecord;
use mesh_overlay::advertisement::{DOMAIN, SITE};

use super::{Problem, Snapshot};
use crate::manifest::{Node, NodeSpec, Object};

/// One file of the registry, parsed.
#[derive(Debug, Clone)]
pub struct Source {
    /// Its path within the registry, for messages.
    pub path: String,
    /// For a node's own publication: the name that the file has.
    pub published_by: Option<String>,
    /// Its objects.
    pub objects: Vec<Object>,
    /// What is wrong with it.
    pub problems: Vec<String>,
}

/// Merges all files, which are ordered by path. A publication speaks for the node of its file name alone.
pub fn merge(sources: &[Source]) -> Snapshot {
    let mut nodes: BTreeMap<NodeName, NodeRecord> = BTreeMap::new();
    let mut seen_in: BTreeMap<NodeName, &str> = BTreeMap::new();
    let mut problems = Vec::new();
    for source in sources {
        let about = source.published_by.as_ref().and_then(|name| name.parse().ok());
        let file = |text: &String| Problem { node: about.clone(), text: format!("{}: {text}", source.path) };
        problems.extend(source.problems.iter().map(file));
    }
    for source in sources.iter().filter(|s| s.published_by.is_none()) {
        for Object::Node(node) in &source.objects {
            match operator_node(node) {
                Ok(record) => {
                    if let Some(first) = seen_in.get(&record.name) {
                        let text = format!(
                            "{}: Node {} is already in {first}, which counts",
                            source.path, record.name
                        );
                        problems.push(Problem { node: Some(record.name), text });
                    } else {
                        seen_in.insert(record.name.clone(), &source.path);
                        nodes.insert(record.name.clone(), record);
                    }
                }
                Err(text) => problems.push(Problem { node: None, text: format!("{}: {text}", source.path) }),
            }
        }
    }
    for source in sources {
        let Some(stem) = &source.published_by else { continue };
        for Object::Node(node) in &source.objects {
            match publication(stem, node, &mut nodes) {
                Ok(None) => {}
                Ok(Some(text)) | Err(text) => problems
                    .push(Problem { node: stem.parse().ok(), text: format!("{}: {text}", source.path) }),
            }
        }
    }
    problems.sort();
    Snapshot { nodes: nodes.into_values().collect(), problems }
}

fn operator_node(node: &Node) -> Result<NodeRecord, String> {
    let name: NodeName = node.metadata.name.parse().map_err(|e| format!("Node: {e}"))?;
    let site_label = match node.metadata.labels.get(SITE) {
        Some(site) => Some(site.parse().map_err(|e| format!("Node {name}: label {SITE}: {e}"))?),
        None => None,
    };
    Ok(NodeRecord {
        site_label,
        pod_cidrs: node.spec.prefixes(),
        annotations: ours(&node.metadata.annotations),
        name,
    })
}

fn ours(annotations: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let ours = annotations.iter().filter(|(key, _)| key.starts_with(DOMAIN));
    ours.map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// Puts a node's own annotations into its record. A sentence tells of a part that was passed over (`Ok`), or
/// why nothing was taken (`Err`).
fn publication(
    stem: &str,
    node: &Node,
    nodes: &mut BTreeMap<NodeName, NodeRecord>,
) -> Result<Option<String>, String> {
    let name = &node.metadata.name;
    if name != stem {
        let shown: String = name.chars().take(64).collect();
        return Err(format!(
            "speaks for node {shown:?}; a publication speaks for the node of its file name only"
        ));
    }
    let known = name.parse::<NodeName>().ok().and_then(|name| nodes.get_mut(&name));
    let Some(record) = known else {
        return Err(format!("node {name:?} publishes itself, but the operator has no Node manifest of it"));
    };
    record.annotations = ours(&node.metadata.annotations);
    Ok((node.spec != NodeSpec::default()).then(|| {
        format!("node {name} claims spec.podCIDRs for itself: passed over, prefixes come from the operator's manifests")
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest;

    fn source(path: &str, published_by: Option<&str>, text: &str) -> Source {
        let parsed = manifest::parse(text.as_bytes()).unwrap();
        Source {
            path: path.to_owned(),
            published_by: published_by.map(str::to_owned),
            objects: parsed.objects,
            problems: parsed.problems,
        }
    }

    fn operator(name: &str, cidr: &str) -> String {
        format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDRs: [{cidr}]}}\n")
    }

    fn own(name: &str, spec: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Node\nmetadata: {{name: {name}, annotations: {{sennit.dev/site: aws}}}}\n{spec}"
        )
    }

    #[test]
    fn a_publication_adds_the_nodes_own_annotations_to_what_the_operator_granted() {
        let merged = merge(&[
            source("nodes.yaml", None, &operator("a", "10.1.0.0/24")),
            source("published/a.yaml", Some("a"), &own("a", "")),
        ]);
        assert_eq!(merged.problems, []);
        assert_eq!(merged.nodes[0].pod_cidrs, ["10.1.0.0/24"]);
        assert_eq!(merged.nodes[0].annotations["sennit.dev/site"], "aws");
    }

    #[test]
    fn a_publication_grants_itself_no_prefix() {
        let merged = merge(&[
            source("nodes.yaml", None, &operator("a", "10.1.0.0/24")),
            source("published/a.yaml", Some("a"), &own("a", "spec: {podCIDRs: [0.0.0.0/0]}\n")),
        ]);
        assert_eq!(merged.nodes[0].pod_cidrs, ["10.1.0.0/24"]);
        assert!(merged.problems[0].text.contains("passed over"));
    }

    #[test]
    fn nobody_speaks_for_another_node() {
        let merged = merge(&[
            source(
                "nodes.yaml",
                None,
                &(operator("a", "10.1.0.0/24") + "---\n" + &operator("b", "10.2.0.0/24")),
            ),
            source("published/b.yaml", Some("b"), &own("a", "")),
        ]);
        assert!(merged.nodes.iter().all(|n| n.annotations.is_empty()));
        assert!(merged.problems[0].text.contains("file name only"));
    }

    #[test]
    fn a_node_that_the_operator_does_not_know_is_no_node() {
        let merged = merge(&[source("published/x.yaml", Some("x"), &own("x", ""))]);
        assert!(merged.nodes.is_empty());
        assert!(merged.problems[0].text.contains("the operator has no Node manifest"));
    }

    #[test]
    fn a_node_named_twice_counts_once_and_is_named() {
        let merged = merge(&[
            source("a.yaml", None, &operator("a", "10.1.0.0/24")),
            source("b.yaml", None, &operator("a", "10.2.0.0/24")),
        ]);
        assert_eq!(merged.nodes[0].pod_cidrs, ["10.1.0.0/24"]);
        assert!(merged.problems[0].text.contains("already in a.yaml"));
    }
}
