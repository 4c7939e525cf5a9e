//! Other nodes' statements about this node in the registry: refusals, use of its key, and another
//! mesh name.
//!
//! All of it is for people. Nothing is done because of it.

use std::collections::BTreeMap;

use mesh_keyring::{MeshName, NodeName, PublicKey};
use mesh_overlay::advertisement::EPOCH_MOST;
use mesh_overlay::advertisement::told::{Reason, Told};
use mesh_overlay::{Advertisement, NodeRecord};

use crate::problem::Problem;

/// The most nodes that a problem names.
const NAMED_MOST: usize = 8;

/// This node's identity.
#[derive(Debug, Clone, Copy)]
pub struct Local<'a> {
    /// The node's name.
    pub node: &'a NodeName,
    /// The node's public key.
    pub key: &'a PublicKey,
    /// The mesh's name.
    pub mesh: &'a MeshName,
}

fn names<'a>(all: impl IntoIterator<Item = &'a NodeName>) -> String {
    let all: Vec<&str> = all.into_iter().map(NodeName::as_str).collect();
    let named = all[..all.len().min(NAMED_MOST)].join(", ");
    match all.len().checked_sub(NAMED_MOST) {
        None | Some(0) => named,
        Some(more) => format!("{named} and {more} more"),
    }
}

/// The node of another name that publishes this key.
pub fn holder_of<'a>(key: &PublicKey, own: &NodeName, nodes: &'a [NodeRecord]) -> Option<&'a NodeName> {
    let text = key.to_string();
    let others = nodes.iter().filter(|record| record.name != *own);
    let mut holders = others.filter(|record| {
        record.annotations.get(mesh_overlay::advertisement::PUBLIC_KEY).is_some_and(|key| *key == text)
    });
    holders.next().map(|record| &record.name)
}

/// Returns the problems that other nodes' publications show.
pub fn problems(own: Local<'_>, nodes: &[NodeRecord]) -> Vec<Problem> {
    let others = nodes.iter().filter(|record| record.name != *own.node);
    let told: BTreeMap<&NodeName, Told> =
        others.map(|record| (&record.name, Told::parse(&record.annotations))).collect();
    let mut found = Vec::new();
    // Those of an earlier version say nothing: they refuse nobody as far as is known.
    let published =
        |record: &&NodeRecord| record.annotations.contains_key(mesh_overlay::advertisement::PUBLIC_KEY);
    let all = nodes.iter().filter(|record| record.name != *own.node).filter(published).count();
    found.extend(refused(own, &told, all));
    found.extend(strangers(own, &told, all));
    found.extend(holder_of(own.key, own.node, nodes).map(|other| {
        Problem::new(
            "identity-elsewhere",
            other.as_str(),
            format!(
                "node {other} publishes this node's key; peers leave the key to whom they saw it with first"
            ),
            format!("if {other} is a copy of this host, run `mesh-agent rekey` on it"),
        )
    }));
    found
}

fn refused(own: Local<'_>, told: &BTreeMap<&NodeName, Told>, all: usize) -> Option<Problem> {
    let speaking = told.values().filter(|told| told.instance.is_some()).count();
    let says = told.iter().filter_map(|(name, told)| Some((*name, told.refuses.get(own.node)?)));
    let (whole, part): (Vec<_>, Vec<_>) = says.partition(|(_, reason)| reason.whole);
    let as_a_whole = !whole.is_empty();
    let by = if as_a_whole { &whole } else { &part };
    let (first, reason) = by.first()?;
    let what = if as_a_whole { "what this node publishes" } else { "a part of what this node publishes" };
    let text = format!("{} of {speaking} nodes refuse {what}: {first} says: {}", by.len(), reason.text);
    let problem = Problem::new(
        "refused-by-peers",
        names(by.iter().map(|(name, _)| *name)),
        text,
        remedy(reason, first),
    );
    Some(problem.blocking(as_a_whole && by.len() >= all))
}

fn remedy(reason: &Reason, peer: &NodeName) -> String {
    let text = &reason.text;
    let after = text.split_once("went back from ").and_then(|(_, rest)| {
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u64>().ok().filter(|seen| *seen < EPOCH_MOST)
    });
    if let Some(after) = after {
        return format!("run `mesh-agent rekey --after {after}` here");
    }
    if text.contains("sennit.dev/public-key") || text.contains("sennit.dev/epoch") {
        return "run `mesh-agent rekey` here".to_owned();
    }
    if text.contains("sennit.dev/site") {
        return "correct `site` in agent.yaml here, or the operator's label".to_owned();
    }
    format!("`mesh-agent status` on {peer} says more")
}

fn strangers(own: Local<'_>, told: &BTreeMap<&NodeName, Told>, all: usize) -> Option<Problem> {
    let said: Vec<(&NodeName, &MeshName)> =
        told.iter().filter_map(|(name, told)| Some((*name, told.mesh.as_ref()?))).collect();
    let other: Vec<_> = said.iter().filter(|(_, mesh)| *mesh != own.mesh).collect();
    let (first, theirs) = other.first()?;
    let text = format!(
        "{first} says that it belongs to mesh {theirs}, and this node belongs to {}: their mesh addresses differ",
        own.mesh
    );
    let remedy = "correct `mesh` in agent.yaml where it is wrong";
    let problem = Problem::new("another-mesh", names(other.iter().map(|(name, _)| *name)), text, remedy);
    Some(problem.blocking(other.len() >= all))
}

/// Returns the record's claim, if there is a valid one.
pub fn claim(record: &NodeRecord) -> Option<Advertisement> {
    Advertisement::parse(&record.annotations).ok().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_keyring::PrivateKey;
    use mesh_overlay::advertisement::PUBLIC_KEY;
    use mesh_overlay::advertisement::told::{INSTANCE, MESH, REFUSES};

    fn record(name: &str, annotations: &[(&str, &str)]) -> NodeRecord {
        let published = [(PUBLIC_KEY, "another")];
        let annotations = published.iter().chain(annotations);
        let annotations = annotations.map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        NodeRecord { name: name.parse().unwrap(), site_label: None, pod_cidrs: Vec::new(), annotations }
    }

    fn found(nodes: &[NodeRecord]) -> Vec<Problem> {
        let (node, mesh) = ("me".parse().unwrap(), "acme".parse().unwrap());
        let key = PrivateKey::from_bytes(&[1; 32]).unwrap().public();
        problems(Local { node: &node, key: &key, mesh: &mesh }, nodes)
    }

    const SPEAKS: (&str, &str) = (INSTANCE, "home-1-1-0000000000000001");

    #[test]
    fn a_refusal_of_all_peers_blocks_and_names_the_command() {
        let why = "me: annotation sennit.dev/epoch went back from 2000 to 1000 with another key";
        let both = [record("a", &[SPEAKS, (REFUSES, why)]), record("b", &[SPEAKS, (REFUSES, why)])];
        let all = found(&both);
        let [problem] = &all[..] else { panic!("{all:?}") };
        assert_eq!(
            (problem.code.as_str(), problem.object.as_str(), problem.blocks),
            ("refused-by-peers", "a, b", true)
        );
        assert!(problem.remedy.contains("rekey --after 2000"), "{problem}");
        // One of two, and one that says so of somebody else.
        let one = [record("a", &[SPEAKS, (REFUSES, why)]), record("b", &[SPEAKS, (REFUSES, "c: because")])];
        assert!(!found(&one)[0].blocks);
        let part = [record("a", &[SPEAKS, (REFUSES, "me: in part: spec.podCIDRs: no")])];
        assert!(!found(&part)[0].blocks && found(&part)[0].text.contains("a part of"));
    }

    #[test]
    fn what_a_peer_says_cannot_grow_a_problem() {
        let nodes: Vec<_> = (0..500)
            .map(|n| record(&format!("n{n}"), &[SPEAKS, (REFUSES, &format!("me: {}", "x".repeat(4000)))]))
            .collect();
        let problem = &found(&nodes)[0];
        assert!(problem.to_string().len() < 600, "{}", problem.to_string().len());
    }

    #[test]
    fn a_peer_of_another_mesh_is_told() {
        assert!(found(&[record("a", &[(MESH, "acme")]), record("b", &[])]).is_empty());
        let some = found(&[record("a", &[(MESH, "acme")]), record("b", &[(MESH, "acmee")])]);
        assert!(some[0].code == "another-mesh" && some[0].object == "b" && !some[0].blocks, "{some:?}");
        assert!(found(&[record("b", &[(MESH, "acmee")])])[0].blocks, "it may well be this one that is wrong");
        // Agents of before do not say: one that is wrong is not all of them.
        let old = found(&[record("a", &[]), record("b", &[(MESH, "acmee")])]);
        assert!(!old[0].blocks, "{old:?}");
    }

    #[test]
    fn our_key_under_another_name_is_told() {
        let key = PrivateKey::from_bytes(&[1; 32]).unwrap().public().to_string();
        let all = found(&[record("a", &[(PUBLIC_KEY, &key)])]);
        assert!(all[0].code == "identity-elsewhere" && !all[0].blocks, "{all:?}");
        assert!(found(&[record("me", &[(PUBLIC_KEY, &key)])]).is_empty());
    }
}
