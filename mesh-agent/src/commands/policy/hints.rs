//! Hints about policies that are valid but have no effect: they select nobody, or name hosts and
//! sites that do not exist.

use std::collections::{BTreeMap, BTreeSet};

use mesh_policy::State;
use mesh_policy::model::{Condition, ObjectId, Peer, Policy, Sites, Subject};

/// A field, and what is to be known of it.
pub(super) type Hint = (String, String);

/// Hints by object.
pub(super) fn hints(state: &State) -> BTreeMap<ObjectId, Vec<Hint>> {
    let mut all: BTreeMap<ObjectId, Vec<Hint>> = BTreeMap::new();
    let world = &state.world;
    let nodes = world.nodes();
    for (id, _, host) in world.hosts().filter(|(_, _, host)| !nodes.contains_key(&host.node)) {
        // Manifests of policies alone say nothing of nodes.
        if !nodes.is_empty() {
            let hint = format!("no Node {:?} is here: it protects nothing", host.node);
            all.entry(id.clone()).or_default().push(("spec.node".to_owned(), hint));
        }
    }
    let known: BTreeSet<&str> = nodes.values().filter_map(|node| node.site.as_deref()).collect();
    let is_peopled = world.pods().next().is_some() || !nodes.is_empty();
    // What a Mesh says of sites means all of them.
    for policy in state.policies.iter().filter(|policy| policy.id.kind != "Mesh") {
        for site in sites_of(policy).into_iter().filter(|site| !known.is_empty() && !known.contains(site)) {
            let hint = format!("no node is of site {site:?}: is its name right?");
            all.entry(policy.id.clone()).or_default().push(("spec".to_owned(), hint));
        }
        if is_peopled && !world.is_anybody(&policy.subject) {
            let hint = "it selects nobody who is here".to_owned();
            all.entry(policy.id.clone()).or_default().push(("spec".to_owned(), hint));
        }
    }
    all
}

/// The sites that a policy names.
fn sites_of(policy: &Policy) -> BTreeSet<&str> {
    fn of_subject(subject: &Subject) -> Vec<&Sites> {
        match subject {
            Subject::Sites(sites) => vec![sites],
            Subject::Any(all) | Subject::All(all) => all.iter().flat_map(of_subject).collect(),
            Subject::Pods(_) | Subject::Nodes(_) | Subject::Hosts(_) => Vec::new(),
        }
    }
    let of_peers = policy.conditions().filter_map(|condition| match condition {
        Condition::Is(_, peers) | Condition::IsNot(_, peers) => Some(peers),
        _ => None,
    });
    let of_peers = of_peers.flatten().filter_map(|peer| match peer {
        Peer::Sites(sites) => Some(sites),
        _ => None,
    });
    let all = of_subject(&policy.subject).into_iter().chain(of_peers);
    let named = all.filter_map(|sites| match sites {
        Sites::Named(name) | Sites::Not(name) => Some(name.as_str()),
        Sites::Any => None,
    });
    named.collect()
}
