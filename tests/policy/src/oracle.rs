//! Cases of public suites: objects, steps, probes, and what is expected.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::Path;

use anyhow::Context as _;
use mesh_agent::manifest::{self, Object};
use mesh_policy::kind::KINDS;
use mesh_policy::object::Pod;
use mesh_policy::probe::Probe;
use mesh_policy::world::Node;
use mesh_policy::{Event, Said};
use serde::Deserialize;
use serde_json::{Value, json};

/// One case.
#[derive(Debug, Clone, Deserialize)]
pub struct Case {
    /// The suite.
    pub suite: String,
    /// Its name.
    pub name: String,
    /// What is there before the first step.
    pub resources: Vec<Value>,
    /// The steps.
    pub steps: Vec<Step>,
}

/// One step.
#[derive(Debug, Clone, Deserialize)]
pub struct Step {
    /// What is made, or replaced.
    #[serde(default)]
    pub apply: Vec<Value>,
    /// What is deleted before.
    #[serde(default)]
    pub delete: Vec<Value>,
    /// What is asked then.
    pub probes: Vec<Asked>,
}

/// One probe.
#[derive(Debug, Clone, Deserialize)]
pub struct Asked {
    /// The flow.
    #[serde(flatten)]
    pub probe: Probe,
    /// `allow`, `deny` or `ignore`.
    pub expect: String,
    /// Whom it was for before destination NAT.
    #[serde(default, rename = "preNAT")]
    pub before_nat: Option<BeforeNat>,
    /// The host itself begins it.
    #[serde(default, rename = "fromHost")]
    pub from_host: bool,
    /// It is for the host itself.
    #[serde(default, rename = "toHost")]
    pub to_host: bool,
}

/// Address and port before destination NAT.
#[derive(Debug, Clone, Deserialize)]
pub struct BeforeNat {
    /// The address.
    pub ip: IpAddr,
    /// The port.
    #[serde(default)]
    pub port: u16,
}

fn is_known(kind: &str) -> bool {
    ["Namespace", "Node", "Pod"].contains(&kind) || KINDS.iter().any(|known| known.kind == kind)
}

impl Case {
    /// All cases of a suite's folder, by file name.
    ///
    /// # Errors
    /// A folder or a file that cannot be read.
    pub fn load_all(folder: &Path) -> anyhow::Result<Vec<(String, Self)>> {
        let mut cases = Vec::new();
        for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            let case = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            cases.push((name, case));
        }
        cases.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(cases)
    }

    /// Whether a policy in it names addresses.
    pub fn has_blocks(&self) -> bool {
        let all = self.resources.iter().chain(self.steps.iter().flat_map(|step| &step.apply));
        all.map(Value::to_string).any(|text| {
            let names = ["ipBlock", "networks", "nodes", "nets", "notNets"];
            names.iter().any(|name| text.contains(&format!("\"{name}\"")))
        })
    }

    /// A kind of object in it that this version does not know.
    pub fn unknown_kind(&self) -> Option<String> {
        let all = self.resources.iter().chain(self.steps.iter().flat_map(|step| &step.apply));
        let kinds = all.filter_map(|object| object.get("kind").and_then(Value::as_str));
        kinds.filter(|kind| !is_known(kind)).map(str::to_owned).next()
    }
}

/// Objects as they stand at a step.
#[derive(Debug, Default)]
pub struct Standing(BTreeMap<(String, String, String), Value>);

fn key(object: &Value) -> (String, String, String) {
    let metadata = object.get("metadata").unwrap_or(object);
    let text =
        |value: &Value, field: &str| value.get(field).and_then(Value::as_str).unwrap_or_default().to_owned();
    // Two groups may have kinds of one name.
    let group =
        text(object, "apiVersion").rsplit_once('/').map(|(group, _)| group.to_owned()).unwrap_or_default();
    (format!("{}.{group}", text(object, "kind")), text(metadata, "namespace"), text(metadata, "name"))
}

impl Standing {
    /// What stands before the first step.
    pub fn new(resources: &[Value]) -> Self {
        Self(resources.iter().map(|object| (key(object), object.clone())).collect())
    }

    /// Makes a step's changes.
    pub fn step(&mut self, step: &Step) {
        for gone in &step.delete {
            let gone = key(gone);
            self.0.remove(&gone);
            if gone.0 == "Namespace." {
                self.0.retain(|(_, namespace, _), _| *namespace != gone.2);
            }
        }
        self.0.extend(step.apply.iter().map(|object| (key(object), object.clone())));
    }

    /// The manifest of all of it.
    pub fn manifest(&self) -> Value {
        json!({"apiVersion": "v1", "kind": "List", "items": self.0.values().collect::<Vec<_>>()})
    }

    /// Its Nodes, by their labels and addresses.
    ///
    /// # Errors
    /// A manifest that cannot be read.
    pub fn nodes(&self) -> anyhow::Result<BTreeMap<String, Node>> {
        let parsed = manifest::parse(&serde_json::to_vec(&self.manifest())?).map_err(anyhow::Error::msg)?;
        let nodes = parsed.objects.into_iter().filter_map(|object| match object {
            Object::Node(node) => {
                let addresses = node.status.addresses();
                let known = Node { labels: Some(node.metadata.labels), addresses, ..Node::default() };
                Some((node.metadata.name, known))
            }
            _ => None,
        });
        Ok(nodes.collect())
    }

    /// All of it as events that say everything, each pod changed by `place`.
    ///
    /// # Errors
    /// A manifest that cannot be read.
    pub fn events(&self, place: impl Fn(&mut Pod)) -> anyhow::Result<Vec<Event>> {
        let text = serde_json::to_vec(&self.manifest())?;
        let parsed = manifest::parse(&text).map_err(anyhow::Error::msg)?;
        let (mut pods, mut namespaces) = (Vec::new(), Vec::new());
        let mut said: BTreeMap<&str, Vec<Said>> = BTreeMap::new();
        for object in parsed.objects {
            match object {
                Object::Pod(mut pod) => {
                    place(&mut pod);
                    pods.push(pod);
                }
                Object::Namespace(namespace) => namespaces.push(namespace),
                Object::Said(one) => said.entry(one.id().kind).or_default().push(one),
                Object::Node(_) | Object::Mesh(..) => {}
            }
        }
        let mut events = vec![Event::Namespaces(namespaces), Event::Pods(pods)];
        events.extend(KINDS.iter().map(|kind| kind.all(said.remove(kind.name).unwrap_or_default())));
        Ok(events)
    }
}
