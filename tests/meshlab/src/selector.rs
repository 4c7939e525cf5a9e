//! What the names in steps stand for.

use std::net::IpAddr;

use crate::layout::{Layout, NodeLayout, PodLayout, SiteLayout};
use crate::scenario::value::OneOrMany;

/// One end of a probe or stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End<'a> {
    /// A pod.
    Pod(&'a PodLayout),
    /// A node.
    Node(&'a NodeLayout),
    /// An address that need not belong to anyone; only as a destination.
    Address(IpAddr),
}

impl End<'_> {
    /// The name to show.
    pub fn name(&self) -> String {
        match self {
            Self::Pod(pod) => pod.name.clone(),
            Self::Node(node) => node.name.clone(),
            Self::Address(address) => address.to_string(),
        }
    }
}

/// Where a command runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place<'a> {
    /// On a node.
    Node(&'a NodeLayout),
    /// In a pod.
    Pod(&'a PodLayout),
    /// On a site's router.
    Router(&'a SiteLayout),
}

/// The nodes that `all`, site names and node names stand for, each once, in the layout's order.
///
/// # Errors
/// A sentence naming the word that stands for nothing.
pub fn nodes<'a>(layout: &'a Layout, names: &OneOrMany) -> Result<Vec<&'a NodeLayout>, String> {
    if names.is_empty() {
        return Err("an empty list names no node; write `all`, sites or nodes".to_owned());
    }
    for name in names.iter() {
        if name != "all" && layout.site(name).is_none() && layout.node(name).is_none() {
            return Err(unknown(layout, name, "site or node"));
        }
    }
    let wanted = |node: &&NodeLayout| names.iter().any(|n| n == "all" || n == node.site || n == node.name);
    Ok(layout.nodes().filter(wanted).collect())
}

/// The ends that a word in `from` or `to` stands for.
///
/// # Errors
/// A sentence naming the word that stands for nothing.
pub fn ends<'a>(layout: &'a Layout, names: &OneOrMany) -> Result<Vec<End<'a>>, String> {
    if names.is_empty() {
        return Err("an empty list names no one; write a pod, a node or `pods@SITE`".to_owned());
    }
    let mut found = Vec::new();
    for name in names.iter() {
        for end in one_end(layout, name)? {
            if !found.contains(&end) {
                found.push(end);
            }
        }
    }
    Ok(found)
}

fn one_end<'a>(layout: &'a Layout, name: &str) -> Result<Vec<End<'a>>, String> {
    if let Ok(address) = name.parse() {
        return Ok(vec![End::Address(address)]);
    }
    if let Some(pod) = layout.pod(name) {
        return Ok(vec![End::Pod(pod)]);
    }
    if let Some(node) = layout.node(name) {
        return Ok(vec![End::Node(node)]);
    }
    let (kind, place) = name.split_once('@').unwrap_or((name, "all"));
    let scope = || nodes(layout, &OneOrMany::One(place.to_owned()));
    match kind {
        "pods" => Ok(scope()?.into_iter().flat_map(|node| &node.pods).map(End::Pod).collect()),
        "nodes" => Ok(scope()?.into_iter().map(End::Node).collect()),
        _ => Err(unknown(layout, name, "pod or node (or write pods@SITE, nodes@SITE)")),
    }
}

/// The place that `on` in `exec` stands for.
///
/// # Errors
/// A sentence naming the word that stands for nothing.
pub fn place<'a>(layout: &'a Layout, name: &str) -> Result<Place<'a>, String> {
    if let Some(site) = name.strip_prefix("router@") {
        return layout.site(site).map(Place::Router).ok_or_else(|| unknown(layout, site, "site"));
    }
    if let Some(node) = layout.node(name) {
        return Ok(Place::Node(node));
    }
    layout.pod(name).map(Place::Pod).ok_or_else(|| unknown(layout, name, "node, pod or router@SITE"))
}

fn unknown(layout: &Layout, name: &str, kind: &str) -> String {
    let known = layout
        .sites
        .iter()
        .map(|site| &site.name)
        .chain(layout.nodes().map(|node| &node.name))
        .chain(layout.pods().map(|pod| &pod.name));
    match known.map(|other| (distance(name, other), other)).min() {
        Some((away, near)) if away <= 2 => format!("there is no {kind} `{name}`; did you mean `{near}`?"),
        _ => format!("there is no {kind} `{name}`"),
    }
}

/// Edit distance, for suggestions only.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = (diagonal + usize::from(ca != *cb)).min(row[j] + 1).min(above + 1);
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Site;

    fn layout() -> Layout {
        let sites: Vec<Site> = ["{name: aws, nodes: 2, podsPerNode: 2}", "{name: gcp, nodes: 1}"]
            .iter()
            .map(|yaml| serde_saphyr::from_str(yaml).unwrap())
            .collect();
        Layout::compute(&sites.iter().collect::<Vec<_>>()).unwrap()
    }

    fn one(name: &str) -> OneOrMany {
        OneOrMany::One(name.to_owned())
    }

    #[test]
    fn words_stand_for_sites_nodes_and_pods() {
        let layout = layout();
        assert_eq!(nodes(&layout, &one("all")).unwrap().len(), 3);
        assert_eq!(nodes(&layout, &one("aws")).unwrap().len(), 2);
        assert_eq!(nodes(&layout, &OneOrMany::Many(vec!["aws".into(), "aws-1".into()])).unwrap().len(), 2);
        assert_eq!(ends(&layout, &one("pods")).unwrap().len(), 5);
        assert_eq!(ends(&layout, &one("pods@aws-1")).unwrap().len(), 2);
        assert_eq!(ends(&layout, &one("nodes@gcp")).unwrap().len(), 1);
        assert_eq!(ends(&layout, &one("aws-1-pod-2")).unwrap()[0].name(), "aws-1-pod-2");
        assert!(matches!(ends(&layout, &one("fd00::1")).unwrap()[0], End::Address(_)));
        assert!(matches!(place(&layout, "router@aws").unwrap(), Place::Router(_)));
    }

    #[test]
    fn a_near_miss_is_answered_with_a_suggestion() {
        let layout = layout();
        assert_eq!(
            nodes(&layout, &one("aws-3")).unwrap_err(),
            "there is no site or node `aws-3`; did you mean `aws-1`?"
        );
        assert!(place(&layout, "router@azure").unwrap_err().contains("no site `azure`"));
        assert!(ends(&layout, &one("pods@mars")).unwrap_err().contains("mars"));
        assert!(nodes(&layout, &OneOrMany::Many(vec![])).is_err());
    }
}
