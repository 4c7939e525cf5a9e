//! What stands in the table: its names, not its contents.

use std::collections::{BTreeMap, BTreeSet};

use nix::errno::Errno;

use super::expression::OBJECT_COUNTER;
use super::object;
use super::socket::Socket;
use super::wire::{Batch, NLM_F_DUMP, TABLE_ATTRIBUTE, kind};
use crate::render::Slot;
use crate::ruleset::{Kind, Ruleset, TABLE};

/// `NFT_CHAIN_BINDING`: a chain within a rule.
const CHAIN_BINDING: u32 = 0x4;
/// `NFT_SET_ANONYMOUS`: a set within a rule.
const SET_ANONYMOUS: u32 = 0x1;
pub(super) const NLM_F_ACK: u16 = 0x4;

/// The table as a whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Head {
    /// `NFTA_TABLE_FLAGS`.
    pub(super) flags: u32,
    /// Whose it is: a port id, for as long as the owner lives.
    pub(super) owner: Option<u32>,
}

/// The names of everything in the table. What is part of a rule comes and goes with it, and is not here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Standing {
    /// Chains, and whether it is a base chain.
    pub(super) chains: BTreeMap<String, bool>,
    /// Sets, and whether it is a map.
    pub(super) sets: BTreeMap<String, bool>,
    /// Counters and the like: name and `NFTA_OBJ_TYPE`.
    pub(super) objects: BTreeSet<(String, u32)>,
}

impl Standing {
    /// What a ruleset should be in a slot.
    pub(super) fn of(ruleset: &Ruleset, slot: Slot) -> Self {
        let chains = ruleset.chains.iter().map(|(name, chain)| (slot.name(name), chain.hook.is_some()));
        let sets = ruleset.sets.iter().map(|(name, set)| (slot.name(name), set.kind == Kind::Chains));
        Self { chains: chains.collect(), sets: sets.collect(), objects: counters(ruleset).collect() }
    }

    /// The slot of the ruleset that packets come to. A ruleset is complete before its first base chain is there.
    pub(super) fn live(&self, preferred: Slot) -> Option<Slot> {
        let is_live =
            |slot: &Slot| self.chains.iter().any(|(name, base)| *base && Slot::of(name) == Some(*slot));
        [preferred, preferred.other()].into_iter().find(is_live)
    }
}

/// A ruleset's counters as objects.
pub(super) fn counters(ruleset: &Ruleset) -> impl Iterator<Item = (String, u32)> + '_ {
    ruleset.counters.iter().map(|name| (name.clone(), OBJECT_COUNTER))
}

/// The table, if there is one.
pub(super) fn head(socket: &mut Socket, batch: &mut Batch) -> Result<Option<Head>, Errno> {
    batch.clear(socket.sequence());
    object::message(batch, kind::GETTABLE, NLM_F_ACK);
    let mut found = None;
    let asked = socket.ask(batch, |message| {
        let attributes = message.attributes();
        // NFTA_TABLE_FLAGS and NFTA_TABLE_OWNER
        found = Some(Head { flags: attributes.be32(2).unwrap_or(0), owner: attributes.be32(7) });
    });
    match asked {
        Ok(_) => Ok(found),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Everything in the table.
pub(super) fn names(socket: &mut Socket, batch: &mut Batch) -> Result<Standing, Errno> {
    let chains = socket.dump(
        batch,
        |batch| object::message(batch, kind::GETCHAIN, NLM_F_DUMP),
        |found: &mut BTreeMap<String, bool>, message| {
            let attributes = message.attributes();
            // Chains are dumped of all tables. NFTA_CHAIN_FLAGS, NFTA_CHAIN_HOOK
            let ours = attributes.text(TABLE_ATTRIBUTE) == Some(TABLE);
            let bound = attributes.be32(10).unwrap_or(0) & CHAIN_BINDING != 0;
            if let Some(name) = attributes.text(3).filter(|_| ours && !bound) {
                found.insert(name.to_owned(), attributes.get(4).is_some());
            }
        },
    )?;
    let sets = socket.dump(
        batch,
        |batch| object::message(batch, kind::GETSET, NLM_F_DUMP),
        |found: &mut BTreeMap<String, bool>, message| {
            let attributes = message.attributes();
            let flags = attributes.be32(3).unwrap_or(0);
            if let Some(name) = attributes.text(2).filter(|_| flags & SET_ANONYMOUS == 0) {
                found.insert(name.to_owned(), flags & object::SET_MAP != 0);
            }
        },
    );
    let objects = socket.dump(
        batch,
        |batch| object::message(batch, kind::GETOBJ, NLM_F_DUMP),
        |found: &mut BTreeSet<(String, u32)>, message| {
            let attributes = message.attributes();
            if let (Some(name), Some(object_type)) = (attributes.text(2), attributes.be32(3)) {
                found.insert((name.to_owned(), object_type));
            }
        },
    );
    Ok(Standing { chains, sets: nothing(sets)?, objects: nothing(objects)? })
}

/// How many rules each chain has that has any.
pub(super) fn rules(socket: &mut Socket, batch: &mut Batch) -> Result<BTreeMap<String, usize>, Errno> {
    nothing(socket.dump(
        batch,
        |batch| object::message(batch, kind::GETRULE, NLM_F_DUMP),
        |found: &mut BTreeMap<String, usize>, message| {
            let attributes = message.attributes();
            let ours = attributes.text(TABLE_ATTRIBUTE) == Some(TABLE);
            if let Some(chain) = attributes.text(2).filter(|_| ours) {
                match found.get_mut(chain) {
                    Some(count) => *count += 1,
                    None => {
                        found.insert(chain.to_owned(), 1);
                    }
                }
            }
        },
    ))
}

/// Packets and bytes of each counter.
pub(super) fn counts(socket: &mut Socket, batch: &mut Batch) -> Result<BTreeMap<String, (u64, u64)>, Errno> {
    nothing(socket.dump(
        batch,
        |batch| {
            object::message(batch, kind::GETOBJ, NLM_F_DUMP);
            batch.be32(3, OBJECT_COUNTER);
        },
        |found: &mut BTreeMap<String, (u64, u64)>, message| {
            let attributes = message.attributes();
            if let (Some(name), Some(data)) = (attributes.text(2), attributes.nested(4)) {
                // NFTA_COUNTER_PACKETS, NFTA_COUNTER_BYTES
                let counts = (data.be64(2).unwrap_or(0), data.be64(1).unwrap_or(0));
                found.insert(name.to_owned(), counts);
            }
        },
    ))
}

/// Where there is no table there is nothing in it.
fn nothing<T: Default>(found: Result<T, Errno>) -> Result<T, Errno> {
    match found {
        Err(Errno::ENOENT) => Ok(T::default()),
        found => found,
    }
}
