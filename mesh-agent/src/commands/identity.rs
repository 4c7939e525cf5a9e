//! `mesh-agent rekey` and `mesh-agent forget`

use std::time::SystemTime;

use anyhow::{Context as _, bail};
use mesh_keyring::NodeName;

use super::guard::ask;
use super::{block_on, print, shown};
use crate::config::Config;
use crate::identity;
use crate::run;
use crate::run::control::{Answer, Request};
use crate::state::LastGoodFile;

/// Makes a new key, by the running agent or for the next one.
pub(super) fn rekey(after: Option<u64>, config: &Config) -> anyhow::Result<()> {
    match block_on(ask(&config.control_socket(), &Request::Rekey(after))) {
        Ok(Answer::Rekeyed(key, generation)) => {
            print(&format!("new key {key}, generation {generation}: the agent goes on with it\n"))
        }
        Ok(Answer::Refused(why)) => bail!("{why}"),
        Ok(other) => bail!("the agent answered something else: {other:?}"),
        Err(why) => {
            let rekeyed = run::lock(config).and_then(|lock| {
                let kept = identity::rekey(config, after, SystemTime::now());
                drop(lock);
                kept
            });
            let kept = rekeyed.map_err(|e| why.context(format!("{e:#}")))?;
            print(&format!(
                "new key {}, generation {}: the next agent to start has it\n",
                kept.public_key, kept.generation
            ))
        }
    }
}

/// Forgets another node, by the running agent or for the next one.
pub(super) fn forget(name: &str, config: &Config) -> anyhow::Result<()> {
    let node: NodeName = name.parse()?;
    if node == config.node {
        bail!("{node} is this node; `mesh-agent rekey` gives it a new key");
    }
    let known = match block_on(ask(&config.control_socket(), &Request::Forget(node.clone()))) {
        Ok(Answer::Forgotten(known)) => known,
        Ok(Answer::Refused(why)) => bail!("{why}"),
        Ok(other) => bail!("the agent answered something else: {other:?}"),
        Err(why) => forget_at_rest(config, &node).map_err(|e| why.context(format!("{e:#}")))?,
    };
    if known {
        print(&format!("{node} is forgotten; what it says next is judged as if it were new\n"))
    } else {
        bail!("nothing is remembered of {node}")
    }
}

fn forget_at_rest(config: &Config, node: &NodeName) -> anyhow::Result<bool> {
    let _lock = run::lock(config)?;
    let file = LastGoodFile::new(&config.state_dir);
    let (mut state, broken) = file.load();
    if let Some(why) = broken {
        bail!("{why}");
    }
    let known = state.peers.0.remove(node).is_some();
    file.store(&state).with_context(|| shown(file.path()))?;
    Ok(known)
}
