//! Policies of Calico, enforced and staged.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::object::{name, namespace, order};
use super::rule::{BARE_ACCOUNT, BARE_NAMESPACE, Place, action, expression, rule};
use super::selector::Expression;
use super::{GLOBAL, NAMESPACED, STAGED_GLOBAL, STAGED_KUBERNETES, STAGED_NAMESPACED};
use crate::field::{Faults, Result, directions, list, shown};
use crate::model::{
    Action, Direction, Namespaces, ObjectId, Order, PodSelector, Policy, Reach, Rule, Subject, Tier,
};
use crate::networkpolicy::{self, ENTRIES_MOST, Read};
use crate::object::ObjectError;
use crate::refusal::Outcome;
use crate::selector::LabelSelector;

/// The most rules of a direction, as Calico has it.
const RULES_MOST: usize = 1024;
/// What both kinds have.
const FIELDS: [&str; 9] = [
    "tier",
    "order",
    "ingress",
    "egress",
    "selector",
    "types",
    "serviceAccountSelector",
    "performanceHints",
    "stagedAction",
];
/// What global ones have beside that.
const GLOBAL_FIELDS: [&str; 4] = ["namespaceSelector", "doNotTrack", "preDNAT", "applyOnForward"];

/// Reads a GlobalNetworkPolicy.
pub fn global(manifest: &Value) -> Read {
    read(GLOBAL, manifest, false)
}

/// Reads a NetworkPolicy of Calico's.
pub fn namespaced(manifest: &Value) -> Read {
    read(NAMESPACED, manifest, false)
}

/// Reads a StagedGlobalNetworkPolicy.
pub fn staged_global(manifest: &Value) -> Read {
    read(STAGED_GLOBAL, manifest, true)
}

/// Reads a StagedNetworkPolicy.
pub fn staged_namespaced(manifest: &Value) -> Read {
    read(STAGED_NAMESPACED, manifest, true)
}

/// Reads a StagedKubernetesNetworkPolicy.
pub fn kubernetes_staged(manifest: &Value) -> Read {
    let mut inner = manifest.clone();
    let action = match inner.get_mut("spec").and_then(Value::as_object_mut) {
        Some(spec) => staged_action(spec.remove("stagedAction").as_ref()),
        None => Ok(StagedAction::Set),
    };
    let mut read = networkpolicy::read(&inner);
    read.policy.id.kind = STAGED_KUBERNETES;
    read.policy.staged = true;
    if action != Ok(StagedAction::Set) {
        (read.policy.egress, read.policy.ingress) = (None, None);
    }
    if !matches!(action, Ok(StagedAction::Ignore) | Err(_)) {
        read.policy.replaces = instead(&read.policy.id);
    }
    if let Err(fault) = action {
        read.more.extend(read.fault.replace(fault));
    }
    read
}

/// What is to become of the policy that a staged one stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StagedAction {
    /// It is to be as the staged one says.
    Set,
    /// It is to be gone.
    Delete,
    /// It stays as it is.
    Ignore,
}

/// The policy that a staged one stands for: of the same name.
fn instead(id: &ObjectId) -> Option<ObjectId> {
    let kind = match id.kind {
        STAGED_GLOBAL => GLOBAL,
        STAGED_NAMESPACED => NAMESPACED,
        STAGED_KUBERNETES => networkpolicy::KIND,
        _ => return None,
    };
    Some(ObjectId { kind, ..id.clone() })
}

fn staged_action(value: Option<&Value>) -> Result<StagedAction> {
    match value.and_then(Value::as_str) {
        Some("Set") => Ok(StagedAction::Set),
        Some("Delete") => Ok(StagedAction::Delete),
        Some("Ignore") => Ok(StagedAction::Ignore),
        None if value.is_none_or(Value::is_null) => Ok(StagedAction::Set),
        _ => {
            let said = shown(value.unwrap_or(&Value::Null));
            Err(ObjectError::new("spec.stagedAction", format!("{said:?}; use Set, Delete or Ignore")))
        }
    }
}

fn read(kind: &'static str, manifest: &Value, staged: bool) -> Read {
    let mut faults = Faults::default();
    let is_global = [GLOBAL, STAGED_GLOBAL].contains(&kind);
    let namespace = (!is_global).then(|| namespace(manifest));
    let id = ObjectId { kind, namespace, name: name(manifest, &mut faults) };
    let nothing = Map::new();
    let spec = match manifest.get("spec") {
        Some(Value::Object(spec)) => spec,
        None | Some(Value::Null) => &nothing,
        Some(_) => {
            faults.note(ObjectError::new("spec", "is no object"));
            &nothing
        }
    };
    let mut fields = FIELDS.to_vec();
    fields.extend(GLOBAL_FIELDS.iter().filter(|_| is_global));
    fields.retain(|field| staged || *field != "stagedAction");
    faults.known("spec", spec, &fields);
    let mut is_placed = true;
    let tier = match spec.get("tier") {
        None | Some(Value::Null) => Tier::kubernetes(),
        Some(value) => match value.as_str() {
            Some("") => Tier::kubernetes(),
            Some(name) => Tier::named(name),
            None => {
                faults.note(ObjectError::new("spec.tier", "is no text"));
                is_placed = false;
                Tier::kubernetes()
            }
        },
    };
    let order = faults.keep(order(spec.get("order")));
    is_placed &= order.is_some();
    // Whose rules it comes before is not known: it comes first, and allows nothing.
    let order = order.filter(|_| is_placed).unwrap_or(Order(f64::MIN));
    // Of a namespace's policies these are no fields.
    let reach = if is_global { reach(spec, staged) } else { Ok(Reach::Ends) };
    let action = match staged {
        true => staged_action(spec.get("stagedAction")).map(Some),
        false => Ok(None),
    };
    let before = faults.seen();
    let meant = reach.clone().map(|reach| subject(&id, spec, reach, &mut faults));
    let meant = faults.keep(meant);
    let action = faults.keep(action);
    let understood = faults.seen() == before;
    let action = action.flatten();
    let subject = meant.filter(|_| understood).unwrap_or_else(|| match &id.namespace {
        // Whom it means is not known: everybody whom it may.
        Some(namespace) => {
            let own = Namespaces::Named(namespace.clone());
            Subject::Pods(PodSelector::new(own, LabelSelector::default()))
        }
        None => Subject::Any(BTreeSet::new()),
    });
    let before = faults.seen();
    let before_nat = reach == Ok(Reach::BeforeNat);
    let [egress, ingress] = [Direction::Egress, Direction::Ingress].map(|direction| {
        let reach = reach.clone().unwrap_or_default();
        let place = Place { namespace: id.namespace.as_deref(), direction, reach };
        rules(spec, place, &mut faults)
    });
    let types = directions("spec.types", spec.get("types"), &mut faults);
    let types = types.unwrap_or_else(|| Some(Direction::BOTH.into()));
    // What Calico's server fills in, by what is written, whether it is understood or not.
    let says_nothing = |direction: Direction| match spec.get(direction.as_str()) {
        None | Some(Value::Null) => true,
        Some(value) => value.as_array().is_some_and(Vec::is_empty),
    };
    let written = (says_nothing(Direction::Egress), says_nothing(Direction::Ingress));
    if before_nat && types.as_ref().is_some_and(|types| types.contains(&Direction::Egress)) {
        let reason = "preDNAT judges what comes in: use Ingress alone";
        faults.note(ObjectError::new("spec.types", reason));
    }
    let types = types.unwrap_or_else(|| match written {
        (true, _) => [Direction::Ingress].into(),
        (false, true) => [Direction::Egress].into(),
        (false, false) => Direction::BOTH.into(),
    });
    let judged = |direction, rules: Vec<Rule>| {
        let mut rules = if understood { rules } else { Vec::new() };
        rules.retain(|rule| is_placed || rule.action != Action::Allow);
        let counts = action.is_none_or(|action| action == StagedAction::Set);
        (counts && types.contains(&direction)).then_some(rules)
    };
    let outcome = match understood {
        false if id.namespace.is_some() => Outcome::Namespace,
        false => Outcome::Nobody,
        true if !is_placed => Outcome::First,
        true if faults.seen() > before => Outcome::Rules,
        true => Outcome::Rest,
    };
    let policy = Policy {
        tier,
        order,
        subject,
        egress: judged(Direction::Egress, egress),
        ingress: judged(Direction::Ingress, ingress),
        reach: reach.unwrap_or_default(),
        replaces: match action {
            Some(StagedAction::Set | StagedAction::Delete) if understood => instead(&id),
            _ => None,
        },
        staged,
        id,
    };
    Read::of(policy, faults, outcome)
}

/// Whether a flag is there and not false.
fn is_set(spec: &Map<String, Value>, flag: &str) -> Result<bool> {
    match spec.get(flag) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(set)) => Ok(*set),
        Some(_) => Err(ObjectError::new(format!("spec.{flag}"), "is neither true nor false")),
    }
}

/// What a policy judges of hosts.
fn reach(spec: &Map<String, Value>, staged: bool) -> Result<Reach> {
    let forwarded = is_set(spec, "applyOnForward")?;
    let (before_nat, untracked) = (is_set(spec, "preDNAT")?, is_set(spec, "doNotTrack")?);
    if (before_nat || untracked) && !forwarded {
        let reason = "has to be true where preDNAT or doNotTrack is: what is forwarded is judged, too";
        return Err(ObjectError::new("spec.applyOnForward", reason));
    }
    match (before_nat, untracked) {
        (false, false) if forwarded => Ok(Reach::Forwarded),
        (false, false) => Ok(Reach::Ends),
        (false, true) if staged => {
            let reason = "of packets without connections nothing is told: it goes into no staged policy";
            Err(ObjectError::new("spec.doNotTrack", reason))
        }
        (false, true) => Ok(Reach::Untracked),
        (true, true) => {
            let reason = "goes without preDNAT: a policy is one or the other";
            Err(ObjectError::new("spec.doNotTrack", reason))
        }
        (true, false) => match spec.get("egress").and_then(Value::as_array) {
            Some(egress) if !egress.is_empty() => {
                let reason = "there is none before destination NAT: preDNAT judges what comes in";
                Err(ObjectError::new("spec.egress", reason))
            }
            _ => Ok(Reach::BeforeNat),
        },
    }
}

/// Whom a policy applies to.
fn subject(id: &ObjectId, spec: &Map<String, Value>, reach: Reach, faults: &mut Faults) -> Subject {
    let mut of =
        |field: &str| faults.keep(expression(&format!("spec.{field}"), spec.get(field), false)).flatten();
    let (labels, namespaces, accounts) =
        (of("selector"), of("namespaceSelector"), of("serviceAccountSelector"));
    let placed = namespaces.is_some() || accounts.is_some();
    // Hosts have no namespace and no account: of these nothing holds but what is said of labels that are not there. Beside a selector
    // of them `all()` means what is in a namespace, as in Calico.
    let hosts = match &labels {
        Some(labels) if placed => labels.placed.clone(),
        Some(labels) => labels.selector.clone(),
        None => LabelSelector::default(),
    };
    let is_bare = |expression: &Option<Expression>| expression.as_ref().is_none_or(|one| one.bare);
    let hosts = (is_bare(&namespaces) && is_bare(&accounts)).then_some(Subject::Hosts(hosts));
    if id.namespace.is_none() && placed && hosts.is_some() {
        for (field, said, told) in [
            ("spec.namespaceSelector", &namespaces, BARE_NAMESPACE),
            ("spec.serviceAccountSelector", &accounts, BARE_ACCOUNT),
        ] {
            if said.is_some() {
                faults.hint(ObjectError::new(field, told));
            }
        }
    }
    if [Reach::BeforeNat, Reach::Untracked].contains(&reach) {
        // No pod's.
        return hosts.unwrap_or_else(|| Subject::Any(BTreeSet::new()));
    }
    let hosts = hosts.filter(|_| id.namespace.is_none());
    let selector = |expression: Option<Expression>| expression.map(|expression| expression.selector);
    let namespaces = match &id.namespace {
        Some(namespace) => Namespaces::Named(namespace.clone()),
        None => Namespaces::Selected(selector(namespaces).unwrap_or_default()),
    };
    let pods = selector(labels).unwrap_or_default();
    let pods = Subject::Pods(PodSelector { namespaces, pods, accounts: selector(accounts) });
    match hosts {
        Some(hosts) => Subject::Any([pods, hosts].into()),
        None => pods,
    }
}

fn rules(spec: &Map<String, Value>, place: Place<'_>, faults: &mut Faults) -> Vec<Rule> {
    let field = place.direction.as_str();
    let denial = |name: String| Rule { name, action: Action::Deny, when: BTreeSet::new() };
    let entries = list(&format!("spec.{field}"), spec.get(field)).and_then(|entries| match entries.len() {
        0..=RULES_MOST => Ok(entries),
        more => {
            let reason = format!("has {more} rules; at most {RULES_MOST}");
            Err(ObjectError::new(format!("spec.{field}"), reason))
        }
    });
    let Some(entries) = faults.keep(entries) else { return vec![denial(field.to_owned())] };
    let mut ways = 0;
    let rules = entries.iter().enumerate().filter_map(|(index, entry)| {
        let name = format!("{field}[{index}]");
        let rule = rule(&name, entry, place, faults).and_then(|rule| {
            ways += rule.ways();
            if ways > ENTRIES_MOST {
                let reason = format!("the kernel would have more than {ENTRIES_MOST} rules of this policy");
                faults.note(ObjectError::new(format!("spec.{name}"), reason));
                return None;
            }
            Some(rule)
        });
        let opens = matches!(action(entry), Some(Action::Allow | Action::Log));
        rule.or_else(|| (!opens).then(|| denial(name)))
    });
    rules.collect()
}
