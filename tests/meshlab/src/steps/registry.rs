//! `apply` and `delete`: the operator's hand in the registry directory.

use super::{Trouble, Verdict};
use crate::manifest;
use crate::scenario::step::{Apply, Delete};
use crate::stage::{Stage, write_atomically};

pub(super) fn apply(stage: &mut Stage, apply: &Apply) -> Verdict {
    let content = manifest::content(apply, &stage.base).map_err(Trouble::failed)?;
    let path = stage.registry().join(&apply.file);
    let written = path
        .parent()
        .map_or(Ok(()), std::fs::create_dir_all)
        .and_then(|()| write_atomically(&path, &content));
    written.map_err(|error| Trouble::failed(format!("cannot write {}: {error}", apply.file)))?;
    Ok(format!("{} bytes into {}", content.len(), apply.file))
}

pub(super) fn delete(stage: &mut Stage, delete: &Delete) -> Verdict {
    std::fs::remove_file(stage.registry().join(&delete.file))
        .map_err(|error| Trouble::failed(format!("cannot remove {}: {error}", delete.file)))?;
    Ok(format!("{} removed", delete.file))
}
