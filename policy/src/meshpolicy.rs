//! The mesh's own MeshPolicy (sennit.dev/v1alpha1): a ClusterNetworkPolicy that knows sites, and nodes at both ends.
//!
//! Subject and peers may be limited to sites, or to all but some; without pods or nodes whatever has an address of these sites is meant.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::clusternetworkpolicy::{self, Dialect, pods, read_as};
use crate::field::{Result, list, required_selector};
use crate::model::{Condition, Direction, Peer, Side, Sites, Subject};
use crate::networkpolicy::Read;
use crate::object::ObjectError;

/// The kind, as in manifests.
pub const KIND: &str = "MeshPolicy";
/// The version that is read.
pub const API_VERSION: &str = "sennit.dev/v1alpha1";

/// Reads a manifest.
pub fn read(manifest: &Value) -> Read {
    read_as(KIND, Dialect::Mesh, manifest)
}

/// Whom an entry of a list of peers means.
pub(crate) enum Meant {
    /// These.
    Anywhere(Vec<Peer>),
    /// For whom all of this holds.
    InSites(BTreeSet<Condition>),
}

/// Sites that are meant, and sites that are not, with the rest of an object.
struct Limited {
    sites: Option<BTreeSet<String>>,
    not: Option<BTreeSet<String>>,
    rest: Map<String, Value>,
}

fn limited(at: &str, value: Option<&Value>) -> Result<Limited> {
    let object = value.and_then(Value::as_object).ok_or_else(|| ObjectError::new(at, "is no object"))?;
    let mut rest = object.clone();
    let mut names = |field: &str| -> Result<Option<BTreeSet<String>>> {
        let Some(value) = rest.remove(field).filter(|value| !value.is_null()) else { return Ok(None) };
        let at = format!("{at}.{field}");
        let names = list(&at, Some(&value))?.iter().enumerate().map(|(index, name)| {
            let name = name.as_str().filter(|name| !name.is_empty()).map(str::to_owned);
            name.ok_or_else(|| ObjectError::new(format!("{at}[{index}]"), "is no name of a site"))
        });
        let names: BTreeSet<String> = names.collect::<Result<_>>()?;
        match names.is_empty() {
            true => Err(ObjectError::new(at, "names no site")),
            false => Ok(Some(names)),
        }
    };
    let (sites, not) = (names("sites")?, names("notSites")?);
    if sites.is_some() && not.is_some() {
        return Err(ObjectError::new(format!("{at}.notSites"), "goes without sites beside it"));
    }
    Ok(Limited { sites, not, rest })
}

fn named(names: &BTreeSet<String>) -> BTreeSet<Peer> {
    names.iter().map(|name| Peer::Sites(Sites::Named(name.clone()))).collect()
}

/// Reads one entry of a list of peers.
pub(crate) fn peer(at: &str, entry: &Value, direction: Direction) -> Result<Meant> {
    let Limited { sites, not, rest } = limited(at, Some(entry))?;
    let side = Side::other(direction);
    let limits = sites.is_some() || not.is_some();
    let peers = match rest.is_empty() && limits {
        true => None,
        false => Some(clusternetworkpolicy::peer(at, &Value::Object(rest), Dialect::Mesh, direction)?),
    };
    let mut conditions = BTreeSet::new();
    conditions.extend(sites.map(|names| Condition::Is(side, named(&names))));
    if let Some(names) = not {
        // What is in no site is in no other either.
        conditions.insert(Condition::Is(side, [Peer::Sites(Sites::Any)].into()));
        conditions.insert(Condition::IsNot(side, named(&names)));
    }
    Ok(match peers {
        Some(peers) if !limits => Meant::Anywhere(peers),
        peers => {
            conditions.extend(peers.map(|peers| Condition::Is(side, peers.into_iter().collect())));
            Meant::InSites(conditions)
        }
    })
}

/// Reads the subject.
pub(crate) fn subject(at: &str, value: Option<&Value>) -> Result<Subject> {
    let Limited { sites, not, rest } = limited(at, value)?;
    let mut all = BTreeSet::new();
    let any = |names: &BTreeSet<String>| {
        Subject::Any(names.iter().map(|name| Subject::Sites(Sites::Named(name.clone()))).collect())
    };
    all.extend(sites.as_ref().map(any));
    if let Some(names) = &not {
        all.insert(Subject::Sites(Sites::Any));
        all.extend(names.iter().map(|name| Subject::Sites(Sites::Not(name.clone()))));
    }
    let mut fields = rest.iter().filter(|(_, value)| !value.is_null());
    match (fields.next(), fields.next()) {
        (None, _) if all.is_empty() => {
            return Err(ObjectError::new(at, "needs one of namespaces, pods, nodes, or sites, or notSites"));
        }
        (None, _) => {}
        (Some((field, value)), None) if ["namespaces", "pods"].contains(&field.as_str()) => {
            all.insert(Subject::Pods(pods(&format!("{at}.{field}"), field, value)?));
        }
        (Some((field, value)), None) if field == "nodes" => {
            all.insert(Subject::Nodes(required_selector(&format!("{at}.nodes"), Some(value))?));
        }
        (Some((field, _)), None) => {
            let field: String = field.chars().take(64).collect();
            let reason = "no such field is known; those are namespaces, pods, nodes, sites, notSites";
            return Err(ObjectError::new(format!("{at}.{field}"), reason));
        }
        (Some(_), Some(_)) => {
            return Err(ObjectError::new(at, "has more than one of namespaces, pods, nodes"));
        }
    }
    Ok(match (all.len(), all.pop_first()) {
        (1, Some(only)) => only,
        (_, first) => Subject::All(first.into_iter().chain(all).collect()),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::{Action, Tier};

    fn policy(subject: Value, egress: Value) -> Read {
        let spec = json!({"tier": "Admin", "priority": 5, "subject": subject, "egress": egress});
        read(&json!({"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "p"}, "spec": spec}))
    }

    fn fault(read: &Read) -> String {
        read.fault.as_ref().map(ToString::to_string).unwrap_or_default()
    }

    #[test]
    fn sites_limit_subject_and_peers() {
        let read = policy(
            json!({"pods": {"podSelector": {"matchLabels": {"pci": "true"}}}, "sites": ["aws"]}),
            json!([
                {"action": "Accept", "to": [
                    {"pods": {"podSelector": {}}, "sites": ["onprem"]}, {"networks": ["10.0.0.0/8"]}, {"nodes": {}},
                ], "protocols": [{"tcp": {"destinationPort": {"number": 5432}}}]},
                {"action": "Deny", "to": [{"notSites": ["aws", "gcp"]}]},
            ]),
        );
        assert_eq!(fault(&read), "");
        assert_eq!(
            (&read.policy.tier, read.policy.id.to_string().as_str()),
            (&Tier::admin(), "MeshPolicy p")
        );
        assert!(
            matches!(&read.policy.subject, Subject::All(all) if all.len() == 2),
            "{:?}",
            read.policy.subject
        );
        let rules = read.policy.egress.unwrap();
        let sizes: Vec<_> =
            rules.iter().map(|rule| (rule.name.as_str(), rule.action, rule.when.len())).collect();
        // Pods of a site on their own; networks and nodes together.
        assert_eq!(
            sizes,
            [
                ("egress[0]", Action::Allow, 3),
                ("egress[0]", Action::Allow, 2),
                ("egress[1]", Action::Deny, 2)
            ]
        );
    }

    #[test]
    fn what_is_not_understood_fails_closed() {
        let accept = json!([{"action": "Accept", "to": [{"sites": ["a"]}]}]);
        for (subject, told) in [
            (json!({}), "spec.subject: needs one of"),
            (json!({"sites": []}), "spec.subject.sites: names no site"),
            (json!({"sites": ["a"], "notSites": ["b"]}), "spec.subject.notSites: goes without"),
            (json!({"sites": ["a"], "pods": {"podSelector": {}}, "nodes": {}}), "more than one"),
            (json!({"planets": {}}), "spec.subject.planets: no such field"),
        ] {
            let read = policy(subject, accept.clone());
            assert!(fault(&read).contains(told), "{}\nnot {told}", fault(&read));
            assert_eq!(read.policy.egress, None, "whom to deny what is not known");
        }
        for (to, told) in [
            (json!([{}]), "to[0]: needs exactly one"),
            (json!([{"sites": [7]}]), "to[0].sites[0]: is no name"),
            (json!([{"sites": ["a"], "domainNames": ["x"]}]), "to[0].domainNames: no such field"),
        ] {
            for action in ["Accept", "Deny"] {
                let read = policy(json!({"sites": ["a"]}), json!([{"action": action, "to": to}]));
                assert!(fault(&read).contains(told), "{}\nnot {told}", fault(&read));
                let denies = read.policy.egress.iter().flatten().any(|rule| rule.when.is_empty());
                assert_eq!(denies, action == "Deny");
            }
        }
    }
}
