//! What of a directory of manifests would be enforced, what would not, and where that stands: before anybody moves.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use mesh_policy::calico::{API_VERSION, STORED_VERSION};
use mesh_policy::model::Order;
use mesh_policy::object::ObjectError;
use mesh_policy::referent::{Referent, What};
use mesh_policy::{Kind, Said};
use serde::Serialize;
use serde_json::Value;

use crate::cli::PolicyOutput;
use crate::commands::{print, shown};
use crate::manifest::lines::Lines;
use crate::manifest::{self, FILE_MOST};

/// Calico's kinds that have nothing to do with policy.
const NO_POLICY: [&str; 17] = [
    "BGPConfiguration",
    "BGPFilter",
    "BGPPeer",
    "BlockAffinity",
    "CalicoNodeStatus",
    "ClusterInformation",
    "FelixConfiguration",
    "IPAMBlock",
    "IPAMConfig",
    "IPAMConfiguration",
    "IPAMHandle",
    "IPAddress",
    "IPPool",
    "IPReservation",
    "KubeControllersConfiguration",
    "Node",
    "WorkloadEndpoint",
];
/// Kinds before ClusterNetworkPolicy.
const ADMINS: [&str; 2] = ["AdminNetworkPolicy", "BaselineAdminNetworkPolicy"];

/// What becomes of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Outcome {
    /// It means here what it means there.
    Works,
    /// Something of it is refused.
    Refused,
    /// It is Calico's, and has nothing to do with policy: it is not read.
    NotRead,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Finding {
    file: String,
    line: u64,
    object: String,
    outcome: Outcome,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    faults: Vec<Fault>,
    /// What it does until that is mended.
    #[serde(skip_serializing_if = "Option::is_none")]
    meanwhile: Option<&'static str>,
    /// The tier that it is, or is in, where that is none that everybody has.
    #[serde(skip)]
    tier: Option<NamedTier>,
}

#[derive(Debug)]
enum NamedTier {
    Is(String),
    /// And the line that says so.
    IsIn(String, u64),
}

#[derive(Debug, Serialize)]
struct Fault {
    line: u64,
    field: String,
    reason: String,
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    objects: Vec<Finding>,
    /// Files that could not be read, with the reason.
    unreadable: Vec<String>,
    /// Objects that are neither policy nor Calico's.
    others: usize,
}

pub(super) fn check(dir: &Path, output: PolicyOutput) -> anyhow::Result<()> {
    let report = report(dir)?;
    match output {
        PolicyOutput::Json => print(&format!("{}\n", serde_json::to_string_pretty(&report)?))?,
        PolicyOutput::Table => print(&table(&report))?,
    }
    let refused = report.objects.iter().filter(|found| found.outcome == Outcome::Refused).count();
    if refused + report.unreadable.len() > 0 {
        bail!("{refused} objects and {} files are not what they are meant to be", report.unreadable.len());
    }
    Ok(())
}

fn files(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| shown(dir))? {
        let path = entry.with_context(|| shown(dir))?.path();
        if fs::symlink_metadata(&path).with_context(|| shown(&path))?.is_dir() {
            all.extend(files(&path)?);
        } else if path.extension().is_some_and(|e| ["yaml", "yml", "json"].iter().any(|known| e == *known)) {
            all.push(path);
        }
    }
    all.sort();
    Ok(all)
}

fn report(dir: &Path) -> anyhow::Result<Report> {
    let mut report = Report::default();
    for path in files(dir)? {
        let file = path.strip_prefix(dir).unwrap_or(&path).display().to_string();
        let text = match fs::metadata(&path).map(|metadata| metadata.len()) {
            Ok(length) if length > FILE_MOST => Err(format!("larger than {FILE_MOST} bytes")),
            _ => fs::read_to_string(&path).map_err(|e| e.to_string()),
        };
        let documents = text.and_then(|text| Ok((manifest::documents(text.as_bytes())?, Lines::of(&text))));
        let (documents, lines) = match documents {
            Ok(found) => found,
            Err(why) => {
                report.unreadable.push(format!("{file}: {why}"));
                continue;
            }
        };
        // Without lines where the two do not agree of what there is.
        let known = lines.len() == documents.len();
        let mut lines = lines.into_iter();
        for document in documents {
            let lines = lines.next().filter(|_| known);
            for (object, lines) in items(document, lines) {
                match look(&file, &object, lines.as_ref()) {
                    Some(found) => report.objects.push(found),
                    None => report.others += 1,
                }
            }
        }
    }
    let mut first: BTreeMap<&str, (&str, u64)> = BTreeMap::new();
    let mut again = Vec::new();
    for (index, found) in report.objects.iter().enumerate() {
        match first.get(found.object.as_str()) {
            Some((file, line)) => {
                again.push((index, format!("{file}:{line} has one of this name, which counts")))
            }
            None => drop(first.insert(&found.object, (&found.file, found.line))),
        }
    }
    for (index, reason) in again {
        let found = &mut report.objects[index];
        found.outcome = Outcome::Refused;
        found.faults.push(Fault { line: found.line, field: "metadata.name".to_owned(), reason });
    }
    let tiers: BTreeSet<String> = report.objects.iter().filter_map(Finding::is_tier).cloned().collect();
    for found in &mut report.objects {
        if let Some(NamedTier::IsIn(tier, line)) = &found.tier
            && !tiers.contains(tier)
        {
            let reason =
                "no Tier of this name is here: it comes last, and denies what none of its rules decides";
            found.outcome = Outcome::Refused;
            found.faults.push(Fault {
                line: *line,
                field: "spec.tier".to_owned(),
                reason: reason.to_owned(),
            });
        }
    }
    Ok(report)
}

/// The objects of a list, or the one that is none.
fn items(document: Value, lines: Option<Lines>) -> Vec<(Value, Option<Lines>)> {
    let text = |value: &Value, field: &str| value.get(field).and_then(Value::as_str).map(str::to_owned);
    let kind = text(&document, "kind").unwrap_or_default();
    let (Some(of), Some(Value::Array(items))) = (kind.strip_suffix("List"), document.get("items")) else {
        return vec![(document, lines)];
    };
    let version = text(&document, "apiVersion");
    let lines = lines.map(Lines::into_items).unwrap_or_default();
    let mut lines = lines.into_iter();
    let whole = |item: &Value| {
        let mut item = item.clone();
        if let (false, Value::Object(fields)) = (of.is_empty(), &mut item) {
            fields.entry("kind").or_insert_with(|| Value::from(of));
            fields.entry("apiVersion").or_insert_with(|| Value::from(version.clone()));
        }
        item
    };
    items.iter().flat_map(|item| self::items(whole(item), lines.next())).collect()
}

impl Finding {
    fn is_tier(&self) -> Option<&String> {
        match &self.tier {
            Some(NamedTier::Is(name)) => Some(name),
            _ => None,
        }
    }
}

/// What becomes of an object; `None`: it is neither policy nor Calico's.
fn look(file: &str, object: &Value, lines: Option<&Lines>) -> Option<Finding> {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    let line = |field: &str| lines.map_or(0, |lines| lines.field(field));
    let found = |object: String| Finding {
        file: file.to_owned(),
        line: lines.map_or(0, Lines::first),
        object,
        outcome: Outcome::Works,
        faults: Vec::new(),
        meanwhile: None,
        tier: None,
    };
    let Some(known) = Kind::of(text("/apiVersion"), text("/kind")) else {
        let mut found = found(format!("{} {}", text("/kind"), text("/metadata/name")));
        (found.outcome, found.faults) = match unknown(text("/apiVersion"), text("/kind"))? {
            None => (Outcome::NotRead, Vec::new()),
            Some((field, reason)) => {
                found.meanwhile = Some("it counts for nothing");
                (Outcome::Refused, vec![Fault { line: line(field), field: field.to_owned(), reason }])
            }
        };
        return Some(found);
    };
    let said = known.read(object);
    let fault = |fault: &ObjectError| Fault {
        line: line(&fault.field),
        field: fault.field.clone(),
        reason: fault.reason.clone(),
    };
    let faults: Vec<Fault> = said.faults().map(fault).collect();
    Some(Finding {
        outcome: if faults.is_empty() { Outcome::Works } else { Outcome::Refused },
        meanwhile: (!faults.is_empty()).then(|| said.meanwhile()),
        faults,
        tier: match &said {
            Said::Policy(read) if read.policy.tier.order == Order::LAST => {
                Some(NamedTier::IsIn(read.policy.tier.name.clone(), line("spec.tier")))
            }
            Said::Referent(Referent { what: Some(What::Tier(tier)), .. }) => {
                Some(NamedTier::Is(tier.name.clone()))
            }
            Said::Policy(_) | Said::Referent(_) => None,
        },
        ..found(said.id().to_string())
    })
}

/// Why an object of a kind that is not read would not count, by the field that says so; the inner `None`: it is not about policy. The outer:
/// it is nobody's here.
fn unknown(version: &str, kind: &str) -> Option<Option<(&'static str, String)>> {
    let is_calicos = [API_VERSION, STORED_VERSION].contains(&version);
    match manifest::known_versions(kind) {
        Some(known) => Some(Some(("apiVersion", format!("{version:?}; only {known} is enforced")))),
        None if ADMINS.contains(&kind) => {
            Some(Some(("kind", "say it by a ClusterNetworkPolicy, which has taken its place".to_owned())))
        }
        None if is_calicos && NO_POLICY.contains(&kind) => Some(None),
        None if is_calicos => Some(Some(("kind", format!("{kind:?}: no such kind is known")))),
        None => None,
    }
}

fn table(report: &Report) -> String {
    let mut text = String::new();
    let mut counts: BTreeMap<Outcome, usize> = BTreeMap::new();
    for found in &report.objects {
        *counts.entry(found.outcome).or_default() += 1;
        let Finding { file, object, .. } = found;
        match found.outcome {
            Outcome::Works => {}
            Outcome::NotRead => {
                text.push_str(&format!(
                    "{file}:{}: {object}: is not about policy, and is not read\n",
                    found.line
                ));
            }
            Outcome::Refused => {
                for Fault { line, field, reason } in &found.faults {
                    text.push_str(&format!("{file}:{line}: {object}: {field}: {reason}\n"));
                }
                if let Some(meanwhile) = found.meanwhile {
                    text.push_str(&format!(
                        "{file}:{}: {object}: until that is mended, {meanwhile}\n",
                        found.line
                    ));
                }
            }
        }
    }
    for unreadable in &report.unreadable {
        text.push_str(&format!("{unreadable}\n"));
    }
    let count = |outcome| counts.get(&outcome).copied().unwrap_or_default();
    text.push_str(&format!(
        "{} objects work as they are, {} do not, {} of Calico's are not about policy, {} others; {} files cannot be read\n",
        count(Outcome::Works),
        count(Outcome::Refused),
        count(Outcome::NotRead),
        report.others,
        report.unreadable.len(),
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICIES: &str = "\
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata:
  name: web
spec:
  selector: role == 'web'
  tier: platform
  ingress:
  - action: Allow
    protocol: TCP
    destination:
      ports: [80, '8080:8090']
  - action: Allow
    http:
      methods: [GET]
  - action: Deny
    source:
      selector: role = 'x'
---
apiVersion: crd.projectcalico.org/v1
kind: NetworkPolicyList
items:
- metadata: {name: default.ok, namespace: shop}
  spec: {selector: all()}
- metadata: {name: default.bad, namespace: shop}
  spec:
    order: first
---
apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: pool}
---
apiVersion: v1
kind: Service
metadata: {name: s}
";

    fn checked(extra: &str) -> Report {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("deep")).unwrap();
        fs::write(dir.path().join("deep/policies.yaml"), POLICIES).unwrap();
        fs::write(dir.path().join("tier.yml"), extra).unwrap();
        fs::write(dir.path().join("notes.txt"), "no: [manifest").unwrap();
        report(dir.path()).unwrap()
    }

    #[test]
    fn each_fault_has_its_file_and_line() {
        let report = checked("a: [");
        let text = table(&report);
        for line in [
            "deep/policies.yaml:14: GlobalNetworkPolicy web: spec.ingress[1].http: what is inside of HTTP",
            "deep/policies.yaml:18: GlobalNetworkPolicy web: spec.ingress[2].source.selector: \"role = 'x'\": character 6",
            "deep/policies.yaml:7: GlobalNetworkPolicy web: spec.tier: no Tier of this name",
            "deep/policies.yaml:27: NetworkPolicy.projectcalico.org shop/default.bad: spec.order: \"first\" is no number",
            "deep/policies.yaml:29: IPPool pool: is not about policy",
            "tier.yml: ",
            "1 objects work as they are, 2 do not, 1 of Calico's are not about policy, 1 others; 1 files",
        ] {
            assert!(text.contains(line), "{line}\nis not in\n{text}");
        }
    }

    #[test]
    fn of_two_objects_of_one_name_the_second_is_named() {
        let report = checked(&POLICIES[..POLICIES.find("---").unwrap()]);
        let text = table(&report);
        let told =
            "tier.yml:1: GlobalNetworkPolicy web: metadata.name: deep/policies.yaml:1 has one of this name";
        assert!(text.contains(told), "{text}");
    }

    #[test]
    fn what_would_not_count_is_never_passed_over() {
        for (object, told) in [
            (
                "{apiVersion: extensions/v1beta1, kind: NetworkPolicy, metadata: {name: a}}",
                "apiVersion: \"extensions/v1beta1\"; only",
            ),
            (
                "{apiVersion: projectcalico.org/v3, kind: GlobalNetworkpolicy, metadata: {name: a}}",
                "kind: \"GlobalNetworkpolicy\": no such",
            ),
            (
                "{apiVersion: projectcalico.org/v3, kind: Profile, metadata: {name: a}}",
                "kind: \"Profile\": no such",
            ),
            (
                "{apiVersion: policy.networking.k8s.io/v1alpha1, kind: AdminNetworkPolicy, metadata: {name: a}}",
                "kind: say it by",
            ),
            (
                "{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: List, items: [{apiVersion: projectcalico.org/v3, kind: Tier, metadata: {name: t}, spec: {order: x}}]}]}",
                "spec.order",
            ),
        ] {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("a.yaml"), object).unwrap();
            let text = table(&report(dir.path()).unwrap());
            assert!(text.contains(told), "{told}\nis not in\n{text}");
            assert!(check(dir.path(), PolicyOutput::Json).is_err(), "{object}");
        }
    }

    #[test]
    fn a_tier_that_is_there_is_found_wherever_it_is() {
        let tier =
            "apiVersion: projectcalico.org/v3\nkind: Tier\nmetadata: {name: platform}\nspec: {order: 5}\n";
        let report = checked(tier);
        assert!(report.unreadable.is_empty());
        assert!(!table(&report).contains("spec.tier"));
    }
}
