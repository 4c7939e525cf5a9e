//! Kubernetes manifests, as far as the mesh reads them.

pub mod lines;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use mesh_policy::object::{self, Namespace, Pod, PodSpec, PodStatus};
use mesh_policy::{Kind, Said, kind};
use serde::Deserialize;
use serde_json::Value;

use crate::settings::Settings;

/// The largest manifest file that is read, in bytes.
pub const FILE_MOST: u64 = 16 << 20;
/// The largest publication of a node that is read, in bytes.
pub const PUBLICATION_MOST: u64 = 64 << 10;

/// The metadata of an object.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Metadata {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
}

/// A Node object; fields that the mesh does not read are passed over.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Node {
    /// Name, labels, annotations.
    pub metadata: Metadata,
    /// What the cluster granted it.
    pub spec: NodeSpec,
    /// What is known of it.
    pub status: NodeStatus,
}

/// The part of `status` that is read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    /// Where it is.
    pub addresses: Vec<NodeAddress>,
}

impl NodeStatus {
    /// Those that are addresses.
    pub fn addresses(&self) -> BTreeSet<IpAddr> {
        self.addresses.iter().filter_map(|entry| entry.address.parse().ok()).collect()
    }
}

/// One of a node's addresses, or a name of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct NodeAddress {
    /// As text.
    pub address: String,
}

/// The part of `spec` that is read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct NodeSpec {
    /// The single-stack form of old.
    #[serde(rename = "podCIDR")]
    pub pod_cidr: Option<String>,
    /// The prefixes that the node's pods live in.
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Vec<String>,
}

impl NodeSpec {
    /// All prefixes, each once.
    pub fn prefixes(&self) -> Vec<String> {
        if self.pod_cidrs.is_empty() {
            self.pod_cidr.iter().cloned().collect()
        } else {
            self.pod_cidrs.clone()
        }
    }
}

/// An object of a kind that the mesh reads.
#[derive(Debug, Clone)]
pub enum Object {
    /// A Node.
    Node(Node),
    /// A Pod.
    Pod(Pod),
    /// A Namespace.
    Namespace(Namespace),
    /// A policy or what policies refer to, refused or not.
    Said(Said),
    /// A Mesh: its name, and what it says or why that cannot be understood.
    Mesh(String, Box<Result<Settings, String>>),
}

#[derive(Deserialize)]
struct PodManifest {
    metadata: object::Metadata,
    #[serde(default)]
    spec: Option<PodSpec>,
    #[serde(default)]
    status: Option<PodStatus>,
}

#[derive(Deserialize)]
struct NamespaceManifest {
    metadata: object::Metadata,
}

/// A file's objects, and what is wrong with those that were passed over.
#[derive(Debug, Clone, Default)]
pub struct Parsed {
    /// What could be read.
    pub objects: Vec<Object>,
    /// One sentence for each that could not.
    pub problems: Vec<String>,
}

/// Reads the objects of a file: YAML with several documents, or JSON, `kind: List` included. Kinds that the mesh
/// does not read are passed over.
///
/// # Errors
/// A sentence with line and column when the file as a whole is no YAML; then nothing of it counts.
pub fn parse(bytes: &[u8]) -> Result<Parsed, String> {
    let mut parsed = Parsed::default();
    for document in documents(bytes)? {
        take(document, &mut parsed);
    }
    Ok(parsed)
}

/// The documents of a file, whatever they say.
///
/// # Errors
/// As [`parse`].
pub fn documents(bytes: &[u8]) -> Result<Vec<Value>, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| format!("no UTF-8 text: {e}"))?;
    if text.contains('\0') {
        return Err("a NUL byte: this is no YAML".to_owned());
    }
    // No snippets: a message must not carry what somebody else put into the file.
    let options = serde_saphyr::options! { with_snippet: false };
    let yaml = || serde_saphyr::from_multiple_with_options(text, options).map_err(|e| e.to_string());
    if !text.trim_start().starts_with('{') {
        return yaml();
    }
    // YAML may begin so, too.
    let json = serde_json::Deserializer::from_str(text).into_iter::<Value>().collect::<Result<_, _>>();
    json.or_else(|e| yaml().map_err(|_| e.to_string()))
}

/// Reads one object.
pub fn object(document: Value) -> Parsed {
    let mut parsed = Parsed::default();
    take(document, &mut parsed);
    parsed
}

fn take(document: Value, parsed: &mut Parsed) {
    if document.is_null() {
        return;
    }
    let kind = document.get("kind").and_then(Value::as_str).unwrap_or_default().to_owned();
    let name = document.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
    let name: String = name.chars().take(64).collect();
    let version = document.get("apiVersion").and_then(Value::as_str).unwrap_or_default().to_owned();
    match (version.as_str(), kind.as_str()) {
        (_, kind) if is_list(kind) => {
            let Value::Object(mut list) = document else { return };
            let kind = kind.to_owned();
            // Of a list of one kind the items need not say so themselves.
            let of = kind.strip_suffix("List").filter(|of| !of.is_empty()).map(str::to_owned);
            let whole = |mut item: Value| {
                if let (Some(of), Value::Object(item)) = (&of, &mut item) {
                    item.entry("kind").or_insert_with(|| Value::from(of.as_str()));
                    item.entry("apiVersion").or_insert_with(|| Value::from(version.as_str()));
                }
                item
            };
            match list.remove("items") {
                Some(Value::Array(items)) => items.into_iter().for_each(|item| take(whole(item), parsed)),
                _ => parsed.problems.push(format!("{kind}: items is no list")),
            }
        }
        ("v1", "Node") => match serde_json::from_value(document) {
            Ok(node) => parsed.objects.push(Object::Node(node)),
            Err(e) => parsed.problems.push(format!("Node {name:?}: {e}")),
        },
        ("v1", "Pod") => {
            let pod = serde_json::from_value::<PodManifest>(document).map_err(|e| e.to_string());
            match pod.and_then(|pod| {
                Pod::new(pod.metadata, pod.spec.unwrap_or_default(), pod.status.unwrap_or_default())
                    .map_err(|e| e.to_string())
            }) {
                Ok(pod) => {
                    parsed.problems.extend(pod.fault.iter().map(|fault| format!("Pod {}: {fault}", pod.key)));
                    parsed.objects.push(Object::Pod(pod));
                }
                Err(e) => parsed.problems.push(format!("Pod {name:?}: {e}")),
            }
        }
        ("v1", "Namespace") => match serde_json::from_value::<NamespaceManifest>(document) {
            Ok(NamespaceManifest { metadata }) if !metadata.name.is_empty() => {
                let namespace = Namespace::new(&metadata.name, metadata.labels.unwrap_or_default());
                parsed.objects.push(Object::Namespace(namespace));
            }
            Ok(_) => parsed.problems.push("Namespace: metadata.name: a namespace needs one".to_owned()),
            Err(e) => parsed.problems.push(format!("Namespace {name:?}: {e}")),
        },
        ("sennit.dev/v1alpha1", "Mesh") => {
            let spec = document.get("spec").cloned().unwrap_or_else(|| Value::Object(Default::default()));
            parsed.objects.push(Object::Mesh(name, Box::new(Settings::from_spec(spec))));
        }
        (version, kind) if Kind::of(version, kind).is_some() => {
            let said = Kind::of(version, kind).map(|kind| kind.read(&document));
            parsed.problems.extend(said.as_ref().and_then(|said| Some(said.refusal()?.told(said.id()))));
            parsed.objects.extend(said.map(Object::Said));
        }
        (version, kind) if is_policy(kind) => {
            let version: String = version.chars().take(64).collect();
            let known = known_versions(kind).unwrap_or_default();
            parsed
                .problems
                .push(format!("{kind} {name:?}: apiVersion {version:?}; only {known} is enforced"));
        }
        ("", _) | (_, "") => {
            parsed.problems.push(format!("object {name:?} has no apiVersion or no kind: it is no manifest"));
        }
        _ => {}
    }
}

/// The versions in which a kind that says what is allowed is known; `None`: it is not.
pub fn known_versions(kind: &str) -> Option<String> {
    let known = kind::KINDS.iter().filter(|one| one.kind == kind && one.has_policies());
    let known: Vec<&str> = known.map(|one| one.version).collect();
    (!known.is_empty()).then(|| known.join(" and "))
}

/// Whether objects of this kind say what is allowed, in some version.
fn is_policy(kind: &str) -> bool {
    kind::KINDS.iter().any(|one| one.kind == kind && one.has_policies())
}

fn is_list(kind: &str) -> bool {
    kind.strip_suffix("List").is_some_and(|of| {
        ["", "Node", "Pod", "Namespace"].contains(&of) || kind::KINDS.iter().any(|kind| kind.kind == of)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names(text: &str) -> Vec<String> {
        let parsed = parse(text.as_bytes()).unwrap();
        let nodes = parsed.objects.iter().filter_map(|object| match object {
            Object::Node(node) => Some(node.metadata.name.clone()),
            _ => None,
        });
        nodes.collect()
    }

    #[test]
    fn nodes_are_read_from_documents_lists_and_json() {
        let yaml = "apiVersion: v1\nkind: Node\nmetadata: {name: a}\nstatus: {x: 1}\n---\n\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: p}\n";
        assert_eq!(names(yaml), ["a"]);
        let list = r#"{"apiVersion":"v1","kind":"List","items":[{"apiVersion":"v1","kind":"Node","metadata":{"name":"b"},"spec":{"podCIDR":"10.0.0.0/24"}}]}"#;
        assert_eq!(names(list), ["b"]);
    }

    #[test]
    fn items_of_a_list_of_one_kind_need_not_say_so() {
        let list = r#"{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicyList","items":[{"metadata":{"name":"p","namespace":"x"},"spec":{"podSelector":{}}}]}"#;
        let parsed = parse(list.as_bytes()).unwrap();
        assert!(
            matches!(&parsed.objects[..], [Object::Said(said)] if said.refusal().is_none()),
            "{:?}",
            parsed.problems
        );
        let pods = "apiVersion: v1\nkind: PodList\nitems:\n- metadata: {name: a, labels: null}\n  spec: null\n  status:\n";
        assert!(matches!(&parse(pods.as_bytes()).unwrap().objects[..], [Object::Pod(_)]));
    }

    #[test]
    fn a_policy_of_another_version_is_named() {
        let parsed =
            parse(b"apiVersion: extensions/v1beta1\nkind: NetworkPolicy\nmetadata: {name: old}\n").unwrap();
        assert!(
            parsed.objects.is_empty() && parsed.problems[0].contains("only networking.k8s.io/v1"),
            "{:?}",
            parsed.problems
        );
    }

    #[test]
    fn a_truncated_or_binary_file_counts_for_nothing_and_says_where() {
        let whole =
            "apiVersion: v1\nkind: Node\nmetadata:\n  name: a\n  annotations: {\"sennit.dev/site\": \"aws\"";
        assert!(parse(whole.as_bytes()).unwrap_err().contains("line"));
        assert!(parse(&[0xff, 0xfe, 0x00]).is_err());
        assert!(parse(b"a: b\0").is_err());
        assert!(parse(br#"{"apiVersion":"v1","kind":"No"#).is_err());
    }

    #[test]
    fn a_bad_object_is_named_and_the_others_stay() {
        let text = "apiVersion: v1\nkind: Node\nmetadata: {name: bad, annotations: [1]}\n---\napiVersion: v1\nkind: Node\nmetadata: {name: good}\n---\njust: text\n";
        let parsed = parse(text.as_bytes()).unwrap();
        assert_eq!(parsed.objects.len(), 1);
        assert!(parsed.problems[0].contains("\"bad\""), "{:?}", parsed.problems);
        assert_eq!(parsed.problems.len(), 2);
    }

    #[test]
    fn a_document_that_blows_itself_up_is_refused() {
        let mut bomb = String::from("a: &a [x,x,x,x,x,x,x,x,x,x]\n");
        for (name, last) in ('b'..='k').zip('a'..) {
            bomb.push_str(&format!("{name}: &{name} [{}]\n", vec![format!("*{last}"); 10].join(",")));
        }
        assert!(parse(bomb.as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), text in "[a-z:{}\\[\\]\\-&*#|>\n \"']{0,80}") {
            let _ = parse(&bytes);
            let _ = parse(text.as_bytes());
        }
    }
}
