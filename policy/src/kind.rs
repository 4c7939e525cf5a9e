//! Kinds of objects that policy is decided from, beside pods and namespaces.

use serde_json::Value;

use crate::calico;
use crate::clusternetworkpolicy;
use crate::endpoints;
use crate::field::Faults;
use crate::meshpolicy;
use crate::model::{ObjectId, Reach};
use crate::networkpolicy::{self, Read};
use crate::object::{self, Account, Key, ObjectError};
use crate::referent::{Referent, What};
use crate::refusal::Refusal;
use crate::state::Event;

/// A kind, by where its objects come from.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// Its name among all that policy knows.
    pub name: &'static str,
    /// As in manifests.
    pub kind: &'static str,
    /// Group and version, as in manifests.
    pub version: &'static str,
    /// Another group and version of the same, if there is one.
    pub stored: Option<&'static str>,
    /// Its name in addresses of the API.
    pub plural: &'static str,
    /// Its objects have namespaces.
    pub namespaced: bool,
    /// Each cluster knows it.
    pub everywhere: bool,
    read: fn(&Value) -> Said,
}

/// What an object says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// What is allowed.
    Policy(Read),
    /// What policies refer to.
    Referent(Referent),
}

/// The annotation with which a policy is evaluated and told of, and decides nothing.
const AUDIT: &str = "sennit.dev/audit";

fn policy(read: fn(&Value) -> Read, manifest: &Value) -> Said {
    let mut read = read(manifest);
    match manifest.pointer("/metadata/annotations").and_then(|annotations| annotations.get(AUDIT)) {
        None | Some(Value::Null) => {}
        Some(value) => match value.as_str() {
            Some("true") if read.policy.reach == Reach::Untracked => {
                let field = format!("metadata.annotations[{AUDIT}]");
                let reason = "of packets without connections nothing is told: the policy is enforced";
                note(&mut read, ObjectError::new(field, reason));
            }
            Some("true") => read.policy.staged = true,
            Some("false") => {}
            _ => {
                let field = format!("metadata.annotations[{AUDIT}]");
                let reason = "is neither \"true\" nor \"false\": the policy is enforced";
                note(&mut read, ObjectError::new(field, reason));
            }
        },
    }
    Said::Policy(read)
}

fn note(read: &mut Read, fault: ObjectError) {
    match read.fault {
        Some(_) => read.more.push(fault),
        None => read.fault = Some(fault),
    }
}

macro_rules! policies {
    ($read:path) => {
        |manifest| policy($read, manifest)
    };
}

macro_rules! referents {
    ($read:path) => {
        |manifest| Said::Referent($read(manifest))
    };
}

/// ServiceAccount.
pub const ACCOUNT: &str = "ServiceAccount";

const KUBERNETES: Kind = Kind {
    name: "",
    kind: "",
    version: "",
    stored: None,
    plural: "",
    namespaced: true,
    everywhere: true,
    read: policies!(networkpolicy::read),
};
const CALICO: Kind = Kind {
    version: calico::API_VERSION,
    stored: Some(calico::STORED_VERSION),
    everywhere: false,
    ..KUBERNETES
};

/// All of them. What policies refer to comes before them.
pub const KINDS: [Kind; 14] = [
    Kind {
        name: ACCOUNT,
        kind: ACCOUNT,
        version: "v1",
        plural: "serviceaccounts",
        read: referents!(account),
        ..KUBERNETES
    },
    Kind {
        name: endpoints::KIND,
        kind: endpoints::KIND,
        version: endpoints::API_VERSION,
        plural: "endpointslices",
        read: referents!(endpoints::read),
        ..KUBERNETES
    },
    Kind {
        name: calico::TIER,
        kind: calico::TIER,
        plural: "tiers",
        namespaced: false,
        read: referents!(calico::tier),
        ..CALICO
    },
    Kind {
        name: calico::NETWORK_SET,
        kind: calico::NETWORK_SET,
        plural: "networksets",
        read: referents!(calico::network_set),
        ..CALICO
    },
    Kind {
        name: calico::GLOBAL_NETWORK_SET,
        kind: calico::GLOBAL_NETWORK_SET,
        plural: "globalnetworksets",
        namespaced: false,
        read: referents!(calico::global_network_set),
        ..CALICO
    },
    Kind {
        name: calico::HOST_ENDPOINT,
        kind: calico::HOST_ENDPOINT,
        plural: "hostendpoints",
        namespaced: false,
        read: referents!(calico::host_endpoint),
        ..CALICO
    },
    Kind {
        name: networkpolicy::KIND,
        kind: networkpolicy::KIND,
        version: networkpolicy::API_VERSION,
        plural: "networkpolicies",
        ..KUBERNETES
    },
    Kind {
        name: clusternetworkpolicy::KIND,
        kind: clusternetworkpolicy::KIND,
        version: clusternetworkpolicy::API_VERSION,
        plural: "clusternetworkpolicies",
        namespaced: false,
        everywhere: false,
        read: policies!(clusternetworkpolicy::read),
        ..KUBERNETES
    },
    Kind {
        name: meshpolicy::KIND,
        kind: meshpolicy::KIND,
        version: meshpolicy::API_VERSION,
        plural: "meshpolicies",
        namespaced: false,
        everywhere: false,
        read: policies!(meshpolicy::read),
        ..KUBERNETES
    },
    Kind {
        name: calico::GLOBAL,
        kind: calico::GLOBAL,
        plural: "globalnetworkpolicies",
        namespaced: false,
        read: policies!(calico::global),
        ..CALICO
    },
    Kind {
        name: calico::NAMESPACED,
        kind: "NetworkPolicy",
        plural: "networkpolicies",
        read: policies!(calico::namespaced),
        ..CALICO
    },
    Kind {
        name: calico::STAGED_GLOBAL,
        kind: calico::STAGED_GLOBAL,
        plural: "stagedglobalnetworkpolicies",
        namespaced: false,
        read: policies!(calico::staged_global),
        ..CALICO
    },
    Kind {
        name: calico::STAGED_NAMESPACED,
        kind: calico::STAGED_NAMESPACED,
        plural: "stagednetworkpolicies",
        read: policies!(calico::staged_namespaced),
        ..CALICO
    },
    Kind {
        name: calico::STAGED_KUBERNETES,
        kind: calico::STAGED_KUBERNETES,
        plural: "stagedkubernetesnetworkpolicies",
        read: policies!(calico::kubernetes_staged),
        ..CALICO
    },
];

fn account(manifest: &Value) -> Referent {
    let text = |pointer: &str| manifest.pointer(pointer).and_then(Value::as_str);
    let key = Key::new(text("/metadata/namespace"), text("/metadata/name").unwrap_or("(unnamed)"));
    let id = ObjectId { kind: ACCOUNT, namespace: Some(key.namespace.clone()), name: key.name.clone() };
    let mut faults = Faults::default();
    let metadata = manifest.get("metadata").cloned().unwrap_or_default();
    let metadata = serde_json::from_value::<object::Metadata>(metadata);
    let metadata = faults.keep(metadata.map_err(|e| ObjectError::new("metadata", e.to_string())));
    let account = metadata.map(|metadata| Account::new(key, metadata.labels.unwrap_or_default()));
    Referent::of(id, account.map(What::Account), faults)
}

impl Kind {
    /// The kind of manifests that say this.
    pub fn of(version: &str, kind: &str) -> Option<&'static Self> {
        let is_meant =
            |one: &&Self| one.kind == kind && (one.version == version || one.stored == Some(version));
        ALL.iter().find(is_meant)
    }

    /// By its name.
    pub fn named(name: &str) -> Option<&'static Self> {
        ALL.iter().find(|kind| kind.name == name)
    }

    /// What a manifest of this kind says.
    pub fn read(&self, manifest: &Value) -> Said {
        match self.stored.and_then(|_| calico::whole(manifest)) {
            Some(whole) => (self.read)(&whole),
            None => (self.read)(manifest),
        }
    }

    /// An object of this kind.
    pub fn id(&self, namespace: Option<&str>, name: &str) -> ObjectId {
        let namespace = self.namespaced.then(|| Key::new(namespace, "").namespace);
        ObjectId { kind: self.name, namespace, name: name.to_owned() }
    }

    /// It is gone.
    pub fn gone(&self, id: ObjectId) -> Event {
        match self.has_policies() {
            true => Event::PolicyGone(id),
            false => Event::ReferentGone(id),
        }
    }

    /// Whether its objects say what is allowed.
    pub fn has_policies(&self) -> bool {
        let referents = [
            ACCOUNT,
            endpoints::KIND,
            calico::TIER,
            calico::NETWORK_SET,
            calico::GLOBAL_NETWORK_SET,
            calico::HOST_ENDPOINT,
        ];
        !referents.contains(&self.name)
    }

    /// These are all.
    pub fn all(&self, all: impl IntoIterator<Item = Said>) -> Event {
        let (mut policies, mut referents) = (Vec::new(), Vec::new());
        for said in all {
            match said {
                Said::Policy(read) => policies.push(read),
                Said::Referent(referent) => referents.push(referent),
            }
        }
        match self.has_policies() {
            true => Event::Policies(self.name, policies),
            false => Event::Referents(self.name, referents),
        }
    }
}

static ALL: [Kind; KINDS.len()] = KINDS;

impl Said {
    /// The object.
    pub fn id(&self) -> &ObjectId {
        match self {
            Self::Policy(read) => &read.policy.id,
            Self::Referent(referent) => &referent.id,
        }
    }

    /// All that is wrong with it.
    pub fn faults(&self) -> impl Iterator<Item = &ObjectError> {
        let (fault, more) = match self {
            Self::Policy(read) => (&read.fault, &read.more),
            Self::Referent(referent) => (&referent.fault, &referent.more),
        };
        fault.iter().chain(more)
    }

    /// Returns the refused parts, and the object's effect until they are corrected.
    pub fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Policy(read) => read.refusal(),
            Self::Referent(referent) => referent.refusal(),
        }
    }

    /// Returns hints about valid settings that may surprise the author.
    pub fn hints(&self) -> &[ObjectError] {
        match self {
            Self::Policy(read) => &read.hints,
            Self::Referent(_) => &[],
        }
    }

    /// It is there, or is different now.
    pub fn there(self) -> Event {
        match self {
            Self::Policy(read) => Event::Policy(read),
            Self::Referent(referent) => Event::Referent(referent),
        }
    }
}
