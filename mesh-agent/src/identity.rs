//! The node's identity: its key and generation, the state it belongs to, and any other user of it.
//!
//! ```text
//! keys/private.key + keys/identity.json -> Begun -> Tenure (who may speak) -> problems, annotations
//! ```

pub mod file;
pub mod hearsay;
pub mod machine;
pub mod place;
pub mod tenure;
pub mod watch;

use std::time::SystemTime;

use anyhow::Context as _;
use mesh_keyring::{KeyFile, KeyStore as _, NodeName, PrivateKey};
use mesh_overlay::advertisement::told::Instance;
use serde::Deserialize;

use self::file::{IdentityFile, Kept, later};
use self::machine::Machine;
use crate::config::Config;
use crate::run;
use crate::state::LastGood;

/// The agent's action if its state comes from another node or machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum OnCopy {
    /// It makes itself a key of its own.
    #[default]
    NewKey,
    /// It brings up nothing, and waits for `mesh-agent rekey`.
    Wait,
}

/// The `identity` section.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct IdentityConfig {
    /// The action for copied state.
    pub on_copy: OnCopy,
}

/// An identity to begin with.
pub struct Begun {
    /// The key.
    pub key: PrivateKey,
    /// The stored identity. Its start count includes this start.
    pub kept: Kept,
    /// The agent that begins.
    pub instance: Instance,
    /// The number of the one before it, where this is the same state.
    pub predecessor: Option<u64>,
    /// It came from a version that kept no identity.
    pub adopted: bool,
    /// From where the state was copied, if it was, in words.
    pub copied: Option<String>,
    /// It is a copy and waits for the operator.
    pub waits: bool,
    /// Read and write errors, for status.
    pub complaints: Vec<String>,
}

/// Milliseconds since 1970.
pub fn millis(at: SystemTime) -> u64 {
    let age = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(age.as_millis()).unwrap_or(u64::MAX)
}

fn random() -> anyhow::Result<u64> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|e| anyhow::anyhow!("random bytes: {e}"))?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Loads key and identity, or makes them. A key whose state was copied is replaced before anybody sees it,
/// where the configuration wants it so. `last_good` is what the state remembers.
///
/// # Errors
/// A key that cannot be read, made or replaced.
pub fn begin(config: &Config, last_good: &mut LastGood, now: SystemTime) -> anyhow::Result<Begun> {
    begin_on(config, last_good, &Machine::own(), now)
}

fn begin_on(
    config: &Config,
    last_good: &mut LastGood,
    machine: &Machine,
    now: SystemTime,
) -> anyhow::Result<Begun> {
    let keys = run::key_file(config);
    let stored = keys.load_or_create()?;
    let file = IdentityFile::beside(keys.path());
    let (kept, broken) = file.load();
    let mut complaints: Vec<String> = broken.into_iter().collect();
    let node = &config.node;
    let public_key = stored.key.public();
    let now = millis(now);
    let fresh = |generation| Kept {
        public_key,
        generation,
        made: generation,
        node: node.clone(),
        machine: machine.clone(),
        starts: 0,
        instance: None,
        copied_from: None,
    };
    // Of a key of an earlier version: its file's date is what was published.
    let adopted = || -> anyhow::Result<Kept> {
        let made = if stored.created { now } else { millis(std::fs::metadata(keys.path())?.modified()?) };
        Ok(fresh(later(None, made)))
    };
    let was_adopted = kept.is_none() && !stored.created;
    let mut kept = match kept {
        None => adopted().context("reading the age of the key file")?,
        Some(kept) if kept.public_key == public_key => kept,
        // The key was replaced by hand: what holds for the place still does.
        Some(kept) => {
            let generation = later(Some(kept.generation), now);
            Kept { public_key, generation, made: generation, ..kept }
        }
    };
    let origin = copied_from(&kept, node, machine, last_good);
    let waits = origin.is_some() && config.identity.on_copy == OnCopy::Wait;
    let mut key = stored.key;
    let mut predecessor = kept.instance;
    if let Some((from, _)) = &origin {
        predecessor = None;
        // Of what it remembers only what protects counts: the rest is about somebody else.
        (last_good.registered, last_good.published) = (false, false);
        last_good.prefixes.clear();
        last_good.peers.0.remove(node);
        if !waits {
            key = PrivateKey::generate()?;
            keys.replace(&key)?;
            let generation = later(Some(kept.generation), now);
            kept = Kept { copied_from: Some(from.clone()), ..fresh(generation) };
            kept.public_key = key.public();
        }
    }
    let copied = origin.map(|(_, what)| what);
    let id = random()?;
    kept.starts = kept.starts.saturating_add(1);
    let instance =
        Instance { copied: kept.copied_from.is_some() || waits, made: kept.made, starts: kept.starts, id };
    kept.instance = Some(id);
    // Of a copy that waits, whose state it is stays as it is written: it is told at the next start, too.
    if !waits && let Err(e) = file.store(&kept) {
        complaints.push(format!("{}: {e}", file.path().display()));
    }
    Ok(Begun { key, kept, instance, predecessor, adopted: was_adopted, copied, waits, complaints })
}

/// From which node this state was copied, and that in words.
fn copied_from(
    kept: &Kept,
    node: &NodeName,
    machine: &Machine,
    last_good: &LastGood,
) -> Option<(NodeName, String)> {
    if kept.node != *node {
        return Some((kept.node.clone(), format!("the key was made for node {}", kept.node)));
    }
    if kept.machine.is_other(machine) {
        return Some((node.clone(), "the key was made on another machine".to_owned()));
    }
    // Nobody is a peer of its own: a state of an earlier version, which did not say whose it is.
    let stranger = kept.starts == 0 && last_good.peers.0.contains_key(node);
    stranger.then(|| (node.clone(), format!("the state knows {node} as a peer, so it is another node's")))
}

/// Makes a new key with a later generation; the next agent to start has it. `after`: a generation that
/// somebody remembers of this node.
///
/// # Errors
/// Fails if the key or its record cannot be written. Then either both are new, or the key is
/// unchanged.
pub fn rekey(config: &Config, after: Option<u64>, now: SystemTime) -> anyhow::Result<Kept> {
    let keys: KeyFile = run::key_file(config);
    let file = IdentityFile::beside(keys.path());
    let before = keys.load_or_create()?;
    let (kept, _) = file.load();
    let age = || std::fs::metadata(keys.path()).and_then(|meta| meta.modified()).map(millis);
    let last = match &kept {
        Some(kept) => kept.generation,
        None => age().unwrap_or_default(),
    };
    let last = last.max(after.unwrap_or_default());
    anyhow::ensure!(
        last < mesh_overlay::advertisement::EPOCH_MOST,
        "there is no generation after {last}; run `mesh-agent forget {}` on the peers instead",
        config.node
    );
    let generation = later(Some(last), millis(now));
    let key = PrivateKey::generate()?;
    // The place is this node's own from now on, whatever it was before.
    let instance = kept.as_ref().filter(|kept| kept.node == config.node);
    let next = Kept {
        public_key: key.public(),
        generation,
        made: generation,
        node: config.node.clone(),
        machine: Machine::own(),
        starts: instance.map_or(0, |kept| kept.starts),
        instance: instance.and_then(|kept| kept.instance),
        copied_from: instance.and_then(|kept| kept.copied_from.clone()),
    };
    // An identity of a key that is not there yet counts for its generation alone, so it goes first.
    file.store(&next).with_context(|| file.path().display().to_string())?;
    keys.replace(&key)?;
    debug_assert!(before.key.public() != key.public());
    Ok(next)
}

#[cfg(test)]
#[path = "identity/tests.rs"]
mod tests;
