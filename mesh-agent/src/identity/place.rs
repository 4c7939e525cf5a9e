//! The state of this node's identity, as seen by the installer before any agent runs.

use mesh_keyring::{KeyStore as _, PublicKey, StoreError};
use mesh_overlay::NodeRecord;
use mesh_overlay::advertisement::told::Told;

use super::file::{IdentityFile, Kept};
use super::machine::Machine;
use super::{OnCopy, hearsay};
use crate::config::Config;
use crate::run;

/// The identity that is already stored on this host.
#[derive(Debug)]
pub struct Place {
    key: Option<PublicKey>,
    kept: Option<Kept>,
}

/// Reads key and identity, where they are there. Makes none.
///
/// # Errors
/// Fails if a key exists and cannot be used.
pub fn look(config: &Config) -> Result<Place, StoreError> {
    let keys = run::key_file(config);
    let there = std::fs::symlink_metadata(keys.path()).is_ok();
    let key = if there { Some(keys.load_or_create()?.key.public()) } else { None };
    let (kept, _) = IdentityFile::beside(keys.path()).load();
    Ok(Place { key, kept: kept.filter(|kept| Some(kept.public_key) == key) })
}

impl Place {
    /// Returns the reason if the state belongs to another node or machine.
    pub fn copied(&self, config: &Config) -> Option<String> {
        let kept = self.kept.as_ref()?;
        let whose = if kept.node != config.node {
            format!("the key is that of node {}", kept.node)
        } else if kept.machine.is_other(&Machine::own()) {
            "the key was made on another machine".to_owned()
        } else {
            return None;
        };
        Some(match config.identity.on_copy {
            OnCopy::NewKey => format!("{whose}: the agent makes itself a new one"),
            OnCopy::Wait => {
                format!("{whose}: the agent waits for `mesh-agent rekey`, as identity.onCopy says")
            }
        })
    }

    /// Describes another agent that published under this node's name, if there is one.
    pub fn taken(&self, config: &Config, record: &NodeRecord) -> Option<String> {
        let claim = hearsay::claim(record)?;
        let instance = Told::parse(&record.annotations).instance;
        let last = self.kept.as_ref().and_then(|kept| kept.instance);
        let ours = Some(claim.public_key) == self.key
            && instance.is_none_or(|instance| last.is_none_or(|last| last == instance.id));
        if ours {
            return None;
        }
        let at = claim.endpoints.iter().chain(&claim.internal_endpoints).map(ToString::to_string);
        let at: Vec<String> = at.take(4).collect();
        let who = instance.map_or("an agent".to_owned(), |instance| format!("agent {instance}"));
        let node = &config.node;
        Some(format!(
            "{who} publishes as {node}, with the key {}, dialled at {}; set `node` to another name, or stop that agent. Where it is \
             gone for good, take its publication away (`mesh-agent cleanup` there, the file published/{node}.yaml, or the sennit.dev/ \
             annotations), or start this agent: it takes the name when nobody answers",
            claim.public_key,
            if at.is_empty() { "no address".to_owned() } else { at.join(", ") },
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_keyring::PrivateKey;
    use mesh_overlay::Advertisement;
    use mesh_overlay::advertisement::told::Instance;

    fn record(key: PublicKey, instance: Option<Instance>) -> NodeRecord {
        let claim = Advertisement {
            public_key: key,
            epoch: 1,
            site: "aws".parse().unwrap(),
            endpoints: vec!["192.0.2.1:51820".parse().unwrap()],
            internal_endpoints: Vec::new(),
            mtu: None,
            reflexive_endpoints: Vec::new(),
            paths: Default::default(),
            encrypts: true,
        };
        let mut annotations = claim.to_annotations();
        annotations.extend(Told { instance, ..Told::default() }.to_annotations());
        NodeRecord { name: "a".parse().unwrap(), site_label: None, pod_cidrs: Vec::new(), annotations }
    }

    #[test]
    fn a_name_that_another_agent_has_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let text = format!(
            "node: a\nsite: aws\nmesh: test\nstateDir: {}\nregistry: {{file: {{dir: /r}}}}\n",
            dir.path().display()
        );
        let config = Config::parse("test", &text, None).unwrap();
        let stranger = record(PrivateKey::from_bytes(&[9; 32]).unwrap().public(), None);
        let taken = look(&config).unwrap().taken(&config, &stranger).unwrap();
        assert!(taken.contains("192.0.2.1:51820") && taken.contains("publishes as a"), "{taken}");
        assert!(!run::key_file(&config).path().exists(), "nothing was made");

        let mut last = crate::state::LastGood::default();
        let begun = super::super::begin(&config, &mut last, std::time::SystemTime::now()).unwrap();
        let place = look(&config).unwrap();
        assert!(place.copied(&config).is_none());
        assert_eq!(place.taken(&config, &record(begun.key.public(), Some(begun.instance))), None);
        assert_eq!(place.taken(&config, &record(begun.key.public(), None)), None);
        let twin = Instance { id: begun.instance.id ^ 1, ..begun.instance };
        assert!(place.taken(&config, &record(begun.key.public(), Some(twin))).is_some());
        assert!(place.taken(&config, &stranger).is_some());
    }
}
