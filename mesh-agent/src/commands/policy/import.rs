//! What of a directory of manifests would be enforced, what would not, and where that stands: before anybody moves.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use mesh_policy::model::Order;
use mesh_policy::object::ObjectError;
use mesh_policy::referent::{Referent, What};
use mesh_policy::{Kind, Said};
use serde::Serialize;
use serde_json::Value;

use super::assemble;
use super::engines::{self, Unread};
use super::hints::{self, Hint};
use crate::cli::PolicyOutput;
use crate::commands::{print, shown};
use crate::manifest::lines::Lines;
use crate::manifest::{self, Object, Parsed};
use crate::registry::file::{self, Listing};
use crate::registry::merge::{self, Source};

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
    /// Valid settings that may surprise the author.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    hints: Vec<Fault>,
    /// The object's effect until the faults are corrected.
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
    /// Files and folders that nobody reads, though manifests are in there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    passed_over: Vec<String>,
    /// Objects that are neither policy nor Calico's.
    others: usize,
}

pub(super) fn check(dir: &Path, recursive: bool, output: PolicyOutput) -> anyhow::Result<()> {
    let report = report(dir, recursive)?;
    match output {
        PolicyOutput::Json => print(&format!("{}\n", serde_json::to_string_pretty(&report)?))?,
        PolicyOutput::Table => print(&table(&report))?,
    }
    let refused = report.objects.iter().filter(|found| found.outcome == Outcome::Refused).count();
    if refused + report.unreadable.len() > 0 {
        bail!("{refused} objects and {} files are not what they are meant to be", report.unreadable.len());
    }
    if !report.passed_over.is_empty() {
        bail!(
            "not all manifests are read; for those that go to a cluster, look into folders with --recursive"
        );
    }
    Ok(())
}

fn report(dir: &Path, recursive: bool) -> anyhow::Result<Report> {
    let list = if recursive { file::tree } else { file::list };
    let Listing { manifests, surplus, passed_over } =
        list(dir, file::FILES_MOST).with_context(|| shown(dir))?;
    let mut report = Report { passed_over, ..Report::default() };
    if surplus > 0 {
        report.passed_over.push(format!("files beyond {} are not read", file::FILES_MOST));
    }
    let (mut sources, mut room) = (Vec::new(), file::BYTES_MOST);
    for path in manifests {
        let name = path.strip_prefix(dir).unwrap_or(&path).display().to_string();
        let length = fs::metadata(&path).map_or(0, |meta| meta.len().min(manifest::FILE_MOST));
        let text = match length <= room {
            true => file::text(&path),
            false => Err(format!("the files are larger than {} MiB together", file::BYTES_MOST >> 20)),
        };
        room = room.saturating_sub(length);
        let text = text.and_then(|bytes| String::from_utf8(bytes).map_err(|e| format!("no UTF-8 text: {e}")));
        let documents = text.and_then(|text| Ok((manifest::documents(text.as_bytes())?, Lines::of(&text))));
        let (documents, lines) = match documents {
            Ok(found) => found,
            Err(why) => {
                report.unreadable.push(format!("{name}: {why}"));
                continue;
            }
        };
        // Without lines where the two do not agree of what there is.
        let known = lines.len() == documents.len();
        let mut lines = lines.into_iter();
        let mut parsed = Parsed::default();
        for document in documents {
            let lines = lines.next().filter(|_| known);
            for (object, lines) in items(document, lines) {
                match look(&name, &object, lines.as_ref()) {
                    Some(found) => report.objects.push(found),
                    None => report.others += 1,
                }
                let one = manifest::object(object);
                parsed.objects.extend(one.objects);
            }
        }
        sources.push(Source { path: name, parsed: Arc::new(parsed), problems: Vec::new(), unknown: false });
    }
    hint(&mut report, &sources);
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

/// Adds hints that depend on several objects together.
fn hint(report: &mut Report, sources: &[Source]) {
    let snapshot = merge::operator(sources);
    let files = sources.iter().map(|source| (source.path.clone(), Arc::clone(&source.parsed))).collect();
    let Ok(loaded) = assemble(&snapshot, &files, None) else { return };
    let mut hints: BTreeMap<String, Vec<Hint>> = BTreeMap::new();
    for (id, all) in hints::hints(&loaded.state) {
        hints.entry(id.to_string()).or_default().extend(all);
    }
    for found in &mut report.objects {
        let all = hints.remove(&found.object).unwrap_or_default().into_iter();
        let line = found.line;
        found.hints.extend(all.map(|(field, reason)| Fault { line, field, reason }));
    }
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
        hints: Vec::new(),
        meanwhile: None,
        tier: None,
    };
    let (version, kind) = (text("/apiVersion"), text("/kind"));
    let fault = |field: &str, reason: String| Fault { line: line(field), field: field.to_owned(), reason };
    let Some(known) = Kind::of(version, kind) else {
        let name = [text("/metadata/namespace"), text("/metadata/name")];
        let name: Vec<&str> = name.into_iter().filter(|part| !part.is_empty()).collect();
        let mut found = found(format!("{kind} {}", name.join("/")));
        if let Some(settings) = mesh(object) {
            let hint =
                format!("it counts for agents whose agent.yaml says `mesh: {}`", text("/metadata/name"));
            found.hints.push(fault("metadata.name", hint));
            if let Err(reason) = settings {
                found.outcome = Outcome::Refused;
                found.meanwhile = Some("it counts for nothing: agents keep to what it said last");
                found.faults.push(fault("spec", reason));
            }
            return Some(found);
        }
        let problems = manifest::object(object.clone()).problems;
        match engines::unread(version, kind, manifest::known_versions(kind)) {
            Some(Unread::NoPolicy) => found.outcome = Outcome::NotRead,
            Some(Unread::Refused(field, reason)) => {
                found.meanwhile = Some("it counts for nothing");
                found.outcome = Outcome::Refused;
                found.faults.push(fault(field, reason));
            }
            None if problems.is_empty() => return None,
            None => {
                found.outcome = Outcome::Refused;
                found.faults.extend(problems.into_iter().map(|reason| fault("metadata", reason)));
            }
        }
        return Some(found);
    };
    let said = known.read(object);
    let of = |one: &ObjectError| fault(&one.field, one.reason.clone());
    let faults: Vec<Fault> = said.faults().map(of).collect();
    Some(Finding {
        outcome: if faults.is_empty() { Outcome::Works } else { Outcome::Refused },
        meanwhile: said.refusal().map(|refusal| refusal.outcome.as_str()),
        faults,
        hints: said.hints().iter().map(of).collect(),
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

/// Parses a Mesh. Returns `None` if the object is not one.
fn mesh(object: &Value) -> Option<Result<(), String>> {
    let parsed = manifest::object(object.clone());
    parsed.objects.into_iter().find_map(|object| match object {
        Object::Mesh(_, said) => Some(said.map(|_| ())),
        _ => None,
    })
}

fn table(report: &Report) -> String {
    let mut text = String::new();
    let mut counts: BTreeMap<Outcome, usize> = BTreeMap::new();
    for found in &report.objects {
        *counts.entry(found.outcome).or_default() += 1;
        let Finding { file, object, .. } = found;
        for Fault { line, field, reason } in &found.hints {
            text.push_str(&format!("hint: {file}:{line}: {object}: {field}: {reason}\n"));
        }
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
    for passed in &report.passed_over {
        text.push_str(&format!("passed over: {passed}\n"));
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
        report(dir.path(), true).unwrap()
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
                "kind: profiles are not read",
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
            let text = table(&report(dir.path(), false).unwrap());
            assert!(text.contains(told), "{told}\nis not in\n{text}");
            assert!(check(dir.path(), false, PolicyOutput::Json).is_err(), "{object}");
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

    fn told(files: &[(&str, &str)], recursive: bool) -> (String, bool) {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let fine = check(dir.path(), recursive, PolicyOutput::Json).is_ok();
        (table(&report(dir.path(), recursive).unwrap()), fine)
    }

    #[test]
    fn what_no_command_reads_is_passed_over_aloud() {
        let policy = "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {name: a}\n";
        let files =
            [("sub/a.yaml", policy), (".b.yaml", policy), ("C.YAML", policy), ("published/n.yaml", "")];
        let (text, fine) = told(&files, false);
        assert!(!fine && text.contains("0 objects work"), "{text}");
        for file in ["sub/: 1 manifest in it", ".b.yaml: is not read", "C.YAML: is not read"] {
            assert!(text.contains(&format!("passed over: {file}")), "{text}");
        }
        let (text, _) = told(&files[..1], true);
        assert!(text.contains("1 objects work") && !text.contains("passed over"), "{text}");
    }

    #[test]
    fn a_pipe_is_told_and_never_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        nix::unistd::mkfifo(&dir.path().join("x.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for recursive in [false, true] {
            let report = report(dir.path(), recursive).unwrap();
            assert_eq!(report.unreadable, ["x.yaml: no regular file"]);
        }
    }

    #[test]
    fn what_means_nothing_here_is_a_hint() {
        let (text, fine) = told(
            &[(
                "a.yaml",
                "{apiVersion: v1, kind: Node, metadata: {name: n1}, spec: {podCIDRs: [10.1.0.0/24]}}\n---\n\
                 {apiVersion: projectcalico.org/v3, kind: HostEndpoint, metadata: {name: h}, spec: {node: n2, interfaceName: eth0}}\n---\n\
                 {apiVersion: projectcalico.org/v3, kind: GlobalNetworkPolicy, metadata: {name: p}, spec: {selector: a == 'b', \
                 egress: [{action: Deny, destination: {namespaceSelector: has(x) && !has(y) || !has(z)}}]}}\n---\n\
                 {apiVersion: sennit.dev/v1alpha1, kind: Mesh, metadata: {name: acme}, spec: {policy: {sites: {default: deny}}}}\n",
            )],
            false,
        );
        assert!(fine, "{text}");
        for hint in [
            "HostEndpoint h: spec.node: no Node \"n2\" is here",
            "GlobalNetworkPolicy p: spec: it selects nobody",
            "GlobalNetworkPolicy p: spec.egress[0].destination.namespaceSelector: as in Calico, it also means",
            "Mesh acme: metadata.name: it counts for agents whose agent.yaml says `mesh: acme`",
        ] {
            assert!(text.contains(hint), "{hint}\nis not in\n{text}");
        }
    }

    #[test]
    fn a_mesh_that_is_refused_is_told() {
        let mesh = "{apiVersion: sennit.dev/v1alpha1, kind: Mesh, metadata: {name: a}, spec: {policy: {sites: {defualt: deny}}}}";
        let (text, fine) = told(&[("a.yaml", mesh)], false);
        assert!(!fine && text.contains("Mesh a: spec: ") && text.contains("defualt"), "{text}");
    }
}
