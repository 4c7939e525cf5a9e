//! The policy table in the kernel, written by netlink.
//!
//! Two things are never so, not for a moment: that packets are judged by half a ruleset, and that they are judged by none while
//! there was one before. nf_tables gives a part of this: a transaction happens as a whole or not at all. But on Linux (seen on 6.18)
//! its rules become live a moment before its set elements do, and elements of a `pipapo` set ([`Kind::Ranges`]) last of all. A rule
//! and the set it looks into therefore never come in the same transaction where the set could be missed: a whole ruleset is built
//! beside the old one ([`Slot`]) and packets are let to it when all of it stands; a change sends new sets of ranges ahead.

use std::collections::{BTreeMap, BTreeSet};

use nix::errno::Errno;

use crate::render::Slot;
use crate::ruleset::{Change, Kind, Ruleset};

mod error;
mod expression;
mod object;
mod others;
mod socket;
mod standing;
mod watch;
mod wire;

pub use error::NftError;
pub use others::{Deed, Doer, Flowtable, Others, OthersReader};
use socket::{Refusal, Socket};
use standing::Standing;
pub use watch::{Foreign, Watch};
use wire::Batch;

/// A transaction that is only one of several is sent when it is as long as this.
const CHUNK: usize = 256 << 10;
/// So many elements are written before that is looked at.
const CHUNK_ELEMENTS: usize = 2_000;
/// How often the old is cleared when somebody else changes it under our hands.
const CLEAR_TRIES: usize = 3;
const READING: &str = "reading what stands in the policy table";

/// Whether the table is this process' own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ownership {
    /// Nobody else can change it, `nft flush ruleset` passes it by, and it stays when this process is gone. Of Linux 6.9.
    Owner,
    /// Anybody with the privilege may change it; see [`Watch`].
    Shared,
}

/// The policy table of the network namespace that it was opened in.
#[derive(Debug)]
pub struct Table {
    socket: Socket,
    batch: Batch,
    wanted: Ownership,
    ownership: Ownership,
    slot: Slot,
    led_to: bool,
}

impl Table {
    /// Opens the table in the network namespace of this thread, and makes an empty one where there is none. One whose owner is gone
    /// is adopted with all that stands in it.
    ///
    /// Where the kernel does not know tables that stay without their owner (before 6.9), or where there is a table already that was
    /// made to be shared, it is shared; [`Table::ownership`] tells. (The kernel lets no table become one that stays: only
    /// [`Table::remove`] and a new one would make it so.) Never is it a table that goes with its owner: with it the host
    /// would be open.
    pub fn open(ownership: Ownership) -> Result<Self, NftError> {
        let socket = Socket::new()
            .map_err(|source| NftError::Socket { action: "opening a netlink socket to nf_tables", source })?;
        let mut table = Self {
            socket,
            batch: Batch::default(),
            wanted: ownership,
            ownership: Ownership::Shared,
            slot: Slot::A,
            led_to: false,
        };
        table.ensure()?;
        let live = table.standing(READING)?.live(Slot::A);
        table.led_to = live.is_some();
        table.slot = live.unwrap_or_default();
        Ok(table)
    }

    /// Whether the table is owned in fact.
    pub fn ownership(&self) -> Ownership {
        self.ownership
    }

    /// By which the kernel knows our requests; for [`Watch::foreign`].
    pub fn port_id(&self) -> u32 {
        self.socket.port_id()
    }

    /// Whether packets are judged by a ruleset in it, this process' or one before.
    pub fn is_led_to(&self) -> bool {
        self.led_to
    }

    /// Finds out anew whether packets are judged by a ruleset in it, after somebody else has changed the table.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn look_again(&mut self) -> Result<(), NftError> {
        let live = self.standing(READING)?.live(self.slot);
        self.led_to = live.is_some();
        Ok(())
    }

    /// The slot of the ruleset that stands.
    pub fn slot(&self) -> Slot {
        self.slot
    }

    /// Makes the whole ruleset stand, whatever stood before.
    ///
    /// It is built in the other slot, in as many transactions as it needs, while nothing leads to it. One transaction then adds its
    /// base chains, and the next takes those that were there before. In between packets have to pass both, which cannot be avoided:
    /// of two base chains with the same priority the newer is first, and a packet that is in between while a single transaction
    /// swaps them would meet the new one before and the old one after, both empty.
    pub fn replace(&mut self, ruleset: &Ruleset) -> Result<(), NftError> {
        self.ensure()?;
        let kept = self.standing(READING)?.live(self.slot);
        self.led_to = kept.is_some();
        let slot = kept.map_or(Slot::A, Slot::other);
        // What somebody left half built is in the way.
        self.clear_but(kept, "clearing what was left half built")?;
        self.build(ruleset, slot)?;
        self.lead_to(ruleset, slot)?;
        (self.slot, self.led_to) = (slot, true);
        self.clear_but(Some(slot), "clearing the ruleset before")?;
        let counters: BTreeSet<_> = standing::counters(ruleset).collect();
        let standing = self.standing(READING)?;
        self.begin();
        for (name, object_type) in standing.objects.difference(&counters) {
            object::delete_object(&mut self.batch, name, *object_type);
        }
        self.finish("clearing counters")
    }

    /// Makes changes, all in one transaction, in the slot that stands. On an error none of them is made.
    ///
    /// New sets with their elements and new chains with their rules, which nothing leads to yet, are sent in transactions of their own
    /// before: on Linux 6.18 rules are live a moment before the elements of a set of [`Kind::Ranges`], and a packet that is under way
    /// while a map turns to a chain of the same transaction finds that chain empty. They are taken back when the rest fails.
    pub fn commit(&mut self, changes: &[Change]) -> Result<(), NftError> {
        const ACTION: &str = "changing the policy";
        let ahead = sent_ahead(changes);
        let mut made = Vec::new();
        let sent = self.send_ahead(changes, &ahead, &mut made).and_then(|()| {
            let mut starts = Vec::new();
            self.begin();
            for (index, change) in changes.iter().enumerate() {
                if !ahead.has(change) {
                    starts.push((self.batch.next_sequence(), index));
                    object::change(&mut self.batch, self.slot, change);
                }
            }
            self.send(ACTION, &starts)
        });
        if sent.is_err() {
            self.begin();
            let chains = || made.iter().filter(|name| ahead.chains.contains(**name));
            chains().for_each(|name| object::flush_chain(&mut self.batch, &self.slot.name(name)));
            chains().for_each(|name| object::delete_chain(&mut self.batch, &self.slot.name(name)));
            let sets = made.iter().filter(|name| ahead.sets.contains(**name));
            sets.for_each(|name| object::delete_set(&mut self.batch, &self.slot.name(name)));
            // Whatever is left of them nothing looks into, and the next whole ruleset clears it.
            let _ = self.finish(ACTION);
        }
        sent
    }

    /// Packets and bytes of every counter.
    pub fn counters(&mut self) -> Result<BTreeMap<String, (u64, u64)>, NftError> {
        standing::counts(&mut self.socket, &mut self.batch)
            .map_err(|errno| NftError::whole("reading the policy's counters", errno))
    }

    /// Whether what stands has the table's flags, the names and the numbers of rules that it should. Contents are not
    /// compared.
    pub fn verify(&mut self, ruleset: &Ruleset) -> Result<bool, NftError> {
        const ACTION: &str = "verifying the policy table";
        let head = standing::head(&mut self.socket, &mut self.batch);
        let Some(head) = head.map_err(|errno| NftError::whole(ACTION, errno))? else {
            return Ok(false);
        };
        let owned = head.flags & OWNED == OWNED && head.owner == Some(self.port_id());
        if owned != (self.ownership == Ownership::Owner) {
            return Ok(false);
        }
        let mut standing = self.standing(ACTION)?;
        let mut expected = Standing::of(ruleset, self.slot);
        // Changes never take a counter.
        if !expected.objects.is_subset(&standing.objects) {
            return Ok(false);
        }
        standing.objects.clear();
        expected.objects.clear();
        if standing != expected {
            return Ok(false);
        }
        let rules = standing::rules(&mut self.socket, &mut self.batch)
            .map_err(|errno| NftError::whole(ACTION, errno))?;
        let slot = self.slot;
        Ok(ruleset
            .chains
            .iter()
            .all(|(name, chain)| rules.get(&slot.name(name)).copied().unwrap_or(0) == chain.rules.len()))
    }

    /// Deletes the table with all that is in it. No packet is judged any more.
    pub fn remove(&mut self) -> Result<(), NftError> {
        self.begin();
        object::message(&mut self.batch, wire::kind::DELTABLE, 0);
        (self.slot, self.led_to) = (Slot::A, false);
        match self.finish("removing the policy table") {
            Err(NftError::Refused { errno: Errno::ENOENT, .. }) => Ok(()),
            removed => removed,
        }
    }

    /// Makes or adopts the table.
    fn ensure(&mut self) -> Result<(), NftError> {
        const ACTION: &str = "opening the policy table";
        let head = standing::head(&mut self.socket, &mut self.batch)
            .map_err(|errno| NftError::whole(ACTION, errno))?;
        if self.wanted == Ownership::Owner {
            self.begin();
            object::table(&mut self.batch, OWNED);
            match self.finish(ACTION) {
                Ok(()) => {
                    self.ownership = Ownership::Owner;
                    return Ok(());
                }
                Err(NftError::Refused { errno: Errno::EOPNOTSUPP | Errno::EINVAL, .. }) => {}
                Err(error) => return Err(error),
            }
        }
        self.ownership = Ownership::Shared;
        match head {
            None => {
                self.begin();
                object::table(&mut self.batch, 0);
                self.finish(ACTION)
            }
            Some(head) if head.owner.is_some_and(|owner| owner != self.port_id()) => {
                Err(NftError::whole(ACTION, Errno::EPERM))
            }
            Some(_) => Ok(()),
        }
    }

    /// Counters, sets, chains, elements, rules and at last what leads from addresses to chains.
    fn build(&mut self, ruleset: &Ruleset, slot: Slot) -> Result<(), NftError> {
        const ACTION: &str = "building the ruleset";
        self.begin();
        for name in &ruleset.counters {
            object::counter(&mut self.batch, name);
            self.cut(ACTION)?;
        }
        for (name, set) in &ruleset.sets {
            object::set(&mut self.batch, slot, name, set.family, set.kind);
            self.cut(ACTION)?;
        }
        let chains = || ruleset.chains.iter().filter(|(_, chain)| chain.hook.is_none());
        for (name, _) in chains() {
            object::chain(&mut self.batch, slot, name, None);
            self.cut(ACTION)?;
        }
        let (maps, sets): (Vec<_>, Vec<_>) =
            ruleset.sets.iter().partition(|(_, set)| set.kind == Kind::Chains);
        self.fill(sets, slot, ACTION)?;
        for (name, chain) in chains() {
            for rule in &chain.rules {
                object::rule(&mut self.batch, slot, name, rule);
                self.cut(ACTION)?;
            }
        }
        self.fill(maps, slot, ACTION)?;
        self.finish(ACTION)
    }

    fn fill(
        &mut self,
        sets: Vec<(&String, &crate::ruleset::Set)>,
        slot: Slot,
        action: &'static str,
    ) -> Result<(), NftError> {
        for (name, set) in sets {
            let elements: Vec<_> = set.elements.iter().collect();
            for some in elements.chunks(CHUNK_ELEMENTS) {
                object::elements(&mut self.batch, slot, name, true, some.iter().copied());
                self.cut(action)?;
            }
        }
        Ok(())
    }

    /// Adds the base chains.
    fn lead_to(&mut self, ruleset: &Ruleset, slot: Slot) -> Result<(), NftError> {
        self.begin();
        for (name, chain) in ruleset.chains.iter().filter(|(_, chain)| chain.hook.is_some()) {
            object::chain(&mut self.batch, slot, name, chain.hook);
            for rule in &chain.rules {
                object::rule(&mut self.batch, slot, name, rule);
            }
        }
        self.finish("leading packets to the ruleset")
    }

    /// Deletes everything that is not in a slot, again where somebody else changed the table meanwhile.
    fn clear_but(&mut self, kept: Option<Slot>, action: &'static str) -> Result<(), NftError> {
        let mut tries = 1..CLEAR_TRIES;
        loop {
            let standing = self.standing(READING)?;
            match self.clear(&standing, kept, action) {
                Err(NftError::Refused { errno: Errno::ENOENT | Errno::EBUSY, .. })
                    if tries.next().is_some() => {}
                cleared => return cleared,
            }
        }
    }

    /// Deletes everything of `standing` that is not in a slot: first, in one transaction, where packets come in, then the rest, which
    /// nothing leads to, in the order of who refers to whom.
    fn clear(
        &mut self,
        standing: &Standing,
        kept: Option<Slot>,
        action: &'static str,
    ) -> Result<(), NftError> {
        let gone = |name: &str| kept.is_none() || Slot::of(name) != kept;
        let (base, chains): (Vec<_>, Vec<_>) =
            standing.chains.iter().filter(|(name, _)| gone(name)).partition(|(_, base)| **base);
        let (maps, sets): (Vec<_>, Vec<_>) =
            standing.sets.iter().filter(|(name, _)| gone(name)).partition(|(_, map)| **map);
        self.begin();
        for (name, _) in base {
            object::flush_chain(&mut self.batch, name);
            object::delete_chain(&mut self.batch, name);
        }
        self.finish(action)?;
        self.begin();
        for (name, _) in &chains {
            object::flush_chain(&mut self.batch, name);
            self.cut(action)?;
        }
        for (name, _) in maps {
            object::delete_set(&mut self.batch, name);
            self.cut(action)?;
        }
        for (name, _) in chains {
            object::delete_chain(&mut self.batch, name);
            self.cut(action)?;
        }
        for (name, _) in sets {
            object::delete_set(&mut self.batch, name);
            self.cut(action)?;
        }
        self.finish(action)
    }

    /// Sends new sets with their elements and new chains with their rules. `made` gets the names of those that are there from now on.
    fn send_ahead<'a>(
        &mut self,
        changes: &'a [Change],
        ahead: &Ahead<'_>,
        made: &mut Vec<&'a str>,
    ) -> Result<(), NftError> {
        const ACTION: &str = "preparing sets and chains";
        let mut starts = Vec::new();
        let mut sending = Vec::new();
        self.begin();
        for (index, change) in changes.iter().enumerate().filter(|(_, change)| ahead.has(change)) {
            if let Change::AddSet { name, .. } | Change::AddChain { name, .. } = change {
                sending.push(name.as_str());
            }
            starts.push((self.batch.next_sequence(), index));
            object::change(&mut self.batch, self.slot, change);
            if self.batch.len() > CHUNK {
                self.send(ACTION, &starts)?;
                made.append(&mut sending);
                starts.clear();
                self.begin();
            }
        }
        self.send(ACTION, &starts)?;
        made.append(&mut sending);
        Ok(())
    }

    fn standing(&mut self, action: &'static str) -> Result<Standing, NftError> {
        standing::names(&mut self.socket, &mut self.batch).map_err(|errno| NftError::whole(action, errno))
    }

    fn begin(&mut self) {
        self.batch.begin(self.socket.sequence());
    }

    /// Sends what there is when it is enough, and goes on with a new transaction.
    fn cut(&mut self, action: &'static str) -> Result<(), NftError> {
        if self.batch.len() > CHUNK {
            self.finish(action)?;
            self.begin();
        }
        Ok(())
    }

    fn finish(&mut self, action: &'static str) -> Result<(), NftError> {
        self.send(action, &[])
    }

    /// Sends the transaction, if there is anything in it. `starts` has the sequence number that each change begins with.
    fn send(&mut self, action: &'static str, starts: &[(u32, usize)]) -> Result<(), NftError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let Err(Refusal { sequence, errno }) = self.socket.transact(&mut self.batch) else {
            return Ok(());
        };
        let message = sequence.and_then(|sequence| error::describe(self.batch.bytes(), sequence));
        let first = self.batch.first_sequence();
        let change = sequence.and_then(|sequence| {
            let started = |start: u32| start.wrapping_sub(first) <= sequence.wrapping_sub(first);
            starts.iter().rev().find(|(start, _)| started(*start)).map(|(_, index)| *index)
        });
        Err(NftError::Refused { action, message, change, errno })
    }
}

/// The flags of a table that is owned and stays.
const OWNED: u32 = object::TABLE_OWNER | object::TABLE_PERSIST;

/// What is new and nothing leads to yet.
struct Ahead<'a> {
    sets: BTreeSet<&'a str>,
    chains: BTreeSet<&'a str>,
}

/// New sets, and new chains that are no base chains. Not of a name that is deleted too: there the order matters.
fn sent_ahead(changes: &[Change]) -> Ahead<'_> {
    let (mut sets, mut chains) = (BTreeSet::new(), BTreeSet::new());
    for change in changes {
        match change {
            Change::AddSet { name, .. } => drop(sets.insert(name.as_str())),
            Change::AddChain { name, hook: None } => drop(chains.insert(name.as_str())),
            _ => {}
        }
    }
    for change in changes {
        match change {
            Change::DeleteSet(name) => drop(sets.remove(name.as_str())),
            Change::DeleteChain(name) => drop(chains.remove(name.as_str())),
            _ => {}
        }
    }
    Ahead { sets, chains }
}

impl Ahead<'_> {
    fn has(&self, change: &Change) -> bool {
        match change {
            Change::AddCounter(_) => true,
            Change::AddSet { name, .. } => self.sets.contains(name.as_str()),
            // A map's elements are what leads to chains.
            Change::AddElements { set, kind, .. } | Change::RemoveElements { set, kind, .. } => {
                *kind != Kind::Chains && self.sets.contains(set.as_str())
            }
            Change::AddChain { name, .. } | Change::FlushChain(name) => self.chains.contains(name.as_str()),
            Change::AddRules { chain, .. } => self.chains.contains(chain.as_str()),
            _ => false,
        }
    }
}
