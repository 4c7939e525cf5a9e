//! From manifests to nodes: the operator's word decides who exists and what each holds, a node's own word only
//! what it claims about itself.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_keyring::NodeName;
use mesh_overlay::NodeRecord;
use mesh_overlay::advertisement::{DOMAIN, SITE, SITE_LABEL};

use super::{Problem, Snapshot};
use crate::manifest::{Node, NodeSpec, Object, Parsed};

/// The most sentences that one file gets.
const PROBLEMS_MOST: usize = 16;

/// One file of the registry, parsed.
#[derive(Debug, Clone)]
pub struct Source {
    /// Its path within the registry, for messages.
    pub path: String,
    /// Its objects.
    pub parsed: Arc<Parsed>,
    /// What is wrong with it.
    pub problems: Vec<String>,
    /// It cannot be read, and never could: its objects are unknown rather than none.
    pub unknown: bool,
}

impl Source {
    fn told(&self, node: Option<&NodeName>, out: &mut Vec<Problem>) {
        for text in self.problems.iter().take(PROBLEMS_MOST) {
            out.push(Problem { node: node.cloned(), text: format!("{}: {text}", self.path) });
        }
        if let Some(more) = self.problems.len().checked_sub(PROBLEMS_MOST + 1) {
            let text = format!("{}: and {} more", self.path, more + 1);
            out.push(Problem { node: node.cloned(), text });
        }
    }
}

/// The nodes that the operator's files name, which are ordered by path. Where two name the same one, the first counts.
pub fn operator(sources: &[Source]) -> Snapshot {
    let mut nodes: BTreeMap<NodeName, (NodeRecord, &str)> = BTreeMap::new();
    let mut problems = Vec::new();
    for source in sources {
        source.told(None, &mut problems);
        let nodes_here = source.parsed.objects.iter().filter_map(|object| match object {
            Object::Node(node) => Some(node),
            _ => None,
        });
        for node in nodes_here {
            let told = match operator_node(node) {
                Ok(record) => match nodes.get(&record.name) {
                    Some((_, first)) => {
                        let text = format!("Node {} is already in {first}, which counts", record.name);
                        Some((Some(record.name), text))
                    }
                    None => {
                        nodes.insert(record.name.clone(), (record, &source.path));
                        None
                    }
                },
                Err(text) => Some((None, text)),
            };
            if let Some((node, text)) = told {
                problems.push(Problem { node, text: format!("{}: {text}", source.path) });
            }
        }
    }
    Snapshot {
        nodes: nodes.into_values().map(|(record, _)| record).collect(),
        problems,
        incomplete: sources.iter().any(|s| s.unknown),
        ..Snapshot::default()
    }
}

/// Puts what a node says of itself into its record.
pub fn publication(record: &mut NodeRecord, source: &Source, problems: &mut Vec<Problem>) {
    let name = record.name.clone();
    source.told(Some(&name), problems);
    let mut tell = |text: String| {
        problems.push(Problem { node: Some(name.clone()), text: format!("{}: {text}", source.path) })
    };
    match source.parsed.objects.as_slice() {
        [] => {}
        [Object::Node(node)] if node.metadata.name == record.name.as_str() => {
            record.annotations = ours(&node.metadata.annotations);
            if node.spec != NodeSpec::default() {
                tell(format!(
                    "node {} claims spec.podCIDRs for itself: passed over, prefixes come from the operator's manifests",
                    record.name
                ));
            }
        }
        [Object::Node(node)] => {
            let shown: String = node.metadata.name.chars().take(64).collect();
            tell(format!(
                "speaks for node {shown:?}; a publication speaks for the node of its file name only"
            ));
        }
        objects => tell(format!("holds {} objects; a publication is one Node", objects.len())),
    }
}

fn operator_node(node: &Node) -> Result<NodeRecord, String> {
    let name: NodeName = node.metadata.name.parse().map_err(|e| format!("Node: {e}"))?;
    // The operator writes these files himself, so that the old label counts, too.
    let labels = [SITE_LABEL, SITE].into_iter();
    let label = labels.filter_map(|label| Some((label, node.metadata.labels.get(label)?))).next();
    let site_label = match label {
        Some((label, site)) => Some(site.parse().map_err(|e| format!("Node {name}: label {label}: {e}"))?),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest;

    fn source(path: &str, text: &str) -> Source {
        let parsed = manifest::parse(text.as_bytes()).unwrap();
        let problems = parsed.problems.clone();
        Source { path: path.to_owned(), parsed: Arc::new(parsed), problems, unknown: false }
    }

    /// Node `a` of the operator, with this publication.
    fn with(text: &str) -> (NodeRecord, Vec<Problem>) {
        let mut snapshot = operator(&[source("nodes.yaml", &manifest_of("a", "10.1.0.0/24"))]);
        let mut record = snapshot.nodes.remove(0);
        publication(&mut record, &source("published/a.yaml", text), &mut snapshot.problems);
        (record, snapshot.problems)
    }

    fn manifest_of(name: &str, cidr: &str) -> String {
        format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDRs: [{cidr}]}}\n")
    }

    fn own(name: &str, spec: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Node\nmetadata: {{name: {name}, annotations: {{sennit.dev/site: aws}}}}\n{spec}"
        )
    }

    #[test]
    fn a_publication_adds_the_nodes_own_annotations_to_what_the_operator_granted() {
        let (record, problems) = with(&own("a", ""));
        assert_eq!(problems, []);
        assert_eq!(record.pod_cidrs, ["10.1.0.0/24"]);
        assert_eq!(record.annotations["sennit.dev/site"], "aws");
    }

    #[test]
    fn a_publication_grants_itself_no_prefix() {
        let (record, problems) = with(&own("a", "spec: {podCIDRs: [0.0.0.0/0]}\n"));
        assert_eq!(record.pod_cidrs, ["10.1.0.0/24"]);
        assert!(problems[0].text.contains("passed over"));
    }

    #[test]
    fn nobody_speaks_for_another_node_nor_for_several() {
        for text in [own("b", ""), own(&"b".repeat(100_000), ""), own("a", "---\n") + &own("a", "")] {
            let (record, problems) = with(&text);
            assert!(record.annotations.is_empty());
            assert!(problems.len() == 1 && problems[0].text.len() < 300, "{problems:?}");
        }
    }

    #[test]
    fn the_new_site_label_wins() {
        let site = |labels: &str| {
            let text = format!("apiVersion: v1\nkind: Node\nmetadata: {{name: a, labels: {{{labels}}}}}\n");
            operator(&[source("a.yaml", &text)]).nodes[0].site_label.as_ref().map(ToString::to_string)
        };
        assert_eq!(site("sennit.dev/site: aws").as_deref(), Some("aws"));
        let both = "sennit.dev/site: aws, sennit.dev.node-restriction.kubernetes.io/site: gcp";
        assert_eq!(site(both).as_deref(), Some("gcp"));
    }

    #[test]
    fn a_node_named_twice_counts_once_and_is_named() {
        let snapshot = operator(&[
            source("a.yaml", &manifest_of("a", "10.1.0.0/24")),
            source("b.yaml", &manifest_of("a", "10.2.0.0/24")),
        ]);
        assert_eq!(snapshot.nodes[0].pod_cidrs, ["10.1.0.0/24"]);
        assert!(snapshot.problems[0].text.contains("already in a.yaml"));
    }

    #[test]
    fn a_file_full_of_mistakes_gets_a_few_sentences() {
        let bad = "---\njust: text\n".repeat(1000);
        assert_eq!(operator(&[source("bad.yaml", &bad)]).problems.len(), PROBLEMS_MOST + 1);
    }
}
