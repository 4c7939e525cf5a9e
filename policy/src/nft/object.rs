//! Tables, counters, sets, elements and chains as messages, and changes as a row of them.

use std::net::IpAddr;

use super::expression::{self, DATA_VALUE, LIST_ELEMENT, NFT_JUMP, OBJECT_COUNTER};
use super::wire::{Batch, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, Nest, TABLE_ATTRIBUTE, kind};
use crate::render::Slot;
use crate::ruleset::{Change, Element, Family, Hook, Kind, RATES_FOR, RATES_MOST, Rule, TABLE};

/// `NFT_TABLE_F_OWNER`: nobody else changes the table.
pub(super) const TABLE_OWNER: u32 = 0x2;
/// `NFT_TABLE_F_PERSIST`: it stays when its owner is gone.
pub(super) const TABLE_PERSIST: u32 = 0x4;

const SET_INTERVAL: u32 = 0x4;
/// `NFT_SET_MAP`.
pub(super) const SET_MAP: u32 = 0x8;
const SET_CONCAT: u32 = 0x80;
const SET_TIMEOUT: u32 = 0x10;
/// `NFT_SET_EVAL`: rules put elements in.
const SET_EVAL: u32 = 0x20;

/// Of `nft`'s data types, six bits each in a concatenation.
const TYPE_IPV4_ADDR: u32 = 7;
const TYPE_IPV6_ADDR: u32 = 8;
const TYPE_INET_PROTO: u32 = 12;
const TYPE_INET_SERVICE: u32 = 13;
const TYPE_BITS: u32 = 6;
/// `NFT_DATA_VERDICT`.
const TYPE_VERDICT: u32 = 0xffff_ff00;

/// What `nft` notes in a set for its own listings (libnftnl's `udata.h`), each type, length, value. The byte order of keys is
/// big-endian.
const NOTE_KEYS: &[u8] = &[0, 4, 2, 0, 0, 0];
/// Of a map besides: no byte order of its data, and that they are no intervals.
const NOTE_MAP: &[u8] = &[0, 4, 2, 0, 0, 0, 1, 4, 0, 0, 0, 0, 6, 4, 0, 0, 0, 0];
/// Of a concatenation: no byte order of the whole, and keys that are an expression of the kind "concatenation".
const NOTE_CONCATENATION: &[u8] = &[0, 4, 0, 0, 0, 0, 3, 8, 0, 4, 13, 0, 0, 0, 1, 0];

/// How long the elements of one message may be: an attribute's length has 16 bits, and one element of them less than 1024 bytes.
const ELEMENTS_BYTES: usize = 60_000;

/// Opens a message about something in our table.
pub(super) fn message(batch: &mut Batch, kind: u8, flags: u16) {
    batch.message(kind, flags);
    batch.text(TABLE_ATTRIBUTE, TABLE);
}

/// The table itself.
pub(super) fn table(batch: &mut Batch, flags: u32) {
    message(batch, kind::NEWTABLE, NLM_F_CREATE);
    batch.be32(2, flags);
}

/// A counter; one that is there already goes on counting.
pub(super) fn counter(batch: &mut Batch, name: &str) {
    message(batch, kind::NEWOBJ, NLM_F_CREATE);
    batch.text(2, name);
    batch.be32(3, OBJECT_COUNTER);
    let nest = batch.nest(4);
    batch.be64(1, 0);
    batch.be64(2, 0);
    batch.end_nest(nest);
}

/// An empty set that is not there yet.
pub(super) fn set(batch: &mut Batch, slot: Slot, name: &str, family: Family, kind: Kind) {
    message(batch, kind::NEWSET, NLM_F_CREATE | NLM_F_EXCL);
    batch.name(2, slot, name);
    let (address_type, address_length) = match family {
        Family::V4 => (TYPE_IPV4_ADDR, 4),
        Family::V6 => (TYPE_IPV6_ADDR, 16),
    };
    let join = |types: u32, next: u32| types << TYPE_BITS | next;
    let (flags, key_type, key_length) = match kind {
        Kind::Addresses => (0, address_type, address_length),
        Kind::Rates => (SET_TIMEOUT | SET_EVAL, address_type, address_length),
        Kind::Chains => (SET_MAP, address_type, address_length),
        Kind::Ranges => (SET_INTERVAL | SET_CONCAT, join(address_type, TYPE_INET_PROTO), address_length + 4),
        Kind::Numbers => (SET_INTERVAL | SET_CONCAT, join(TYPE_INET_PROTO, TYPE_INET_SERVICE), 8),
        Kind::Ports => (0, join(join(address_type, TYPE_INET_PROTO), TYPE_INET_SERVICE), address_length + 8),
    };
    batch.be32(3, flags);
    batch.be32(4, key_type);
    batch.be32(5, key_length);
    if kind == Kind::Chains {
        batch.be32(6, TYPE_VERDICT);
        batch.be32(7, 0);
    }
    // Its number in the transaction: the kernel wants one, rules name the set.
    let sequence = batch.next_sequence();
    batch.be32(10, sequence);
    if kind.is_interval() {
        let lengths = if kind == Kind::Numbers { [1, 2] } else { [address_length, 1] };
        let description = batch.nest(9);
        let fields = batch.nest(2);
        for length in lengths {
            let field = batch.nest(LIST_ELEMENT);
            batch.be32(1, length);
            batch.end_nest(field);
        }
        batch.end_nest(fields);
        batch.end_nest(description);
    }
    if kind == Kind::Rates {
        // NFTA_SET_DESC_SIZE; the timeout is in milliseconds.
        let description = batch.nest(9);
        batch.be32(1, RATES_MOST);
        batch.end_nest(description);
        batch.be64(11, u64::from(RATES_FOR) * 1000);
    }
    batch.attr(
        13,
        match kind {
            Kind::Addresses | Kind::Rates => NOTE_KEYS,
            Kind::Chains => NOTE_MAP,
            Kind::Ranges | Kind::Ports | Kind::Numbers => NOTE_CONCATENATION,
        },
    );
}

/// An empty chain that is not there yet.
pub(super) fn chain(batch: &mut Batch, slot: Slot, name: &str, hook: Option<Hook>) {
    message(batch, kind::NEWCHAIN, NLM_F_CREATE | NLM_F_EXCL);
    batch.name(3, slot, name);
    if let Some(hook) = hook {
        batch.text(7, "filter");
        // NF_ACCEPT
        batch.be32(5, 1);
        let nest = batch.nest(4);
        // NF_INET_PRE_ROUTING and so on; NF_IP_PRI_FILTER, NF_IP_PRI_RAW
        let (number, priority): (u32, i32) = match hook {
            Hook::Sources => (0, -310),
            Hook::RawInput => (0, -300),
            Hook::Input => (1, 0),
            Hook::Forward => (2, 0),
            Hook::Output => (3, 0),
            Hook::RawOutput => (3, -300),
            Hook::Postrouting => (4, 0),
        };
        batch.be32(1, number);
        batch.attr(2, &priority.to_be_bytes());
        batch.end_nest(nest);
    }
}

/// A rule at the end of a chain.
pub(super) fn rule(batch: &mut Batch, slot: Slot, chain: &str, rule: &Rule) {
    message(batch, kind::NEWRULE, NLM_F_CREATE | NLM_F_APPEND);
    batch.name(2, slot, chain);
    let nest = batch.nest(4);
    expression::rule(batch, rule, slot);
    batch.end_nest(nest);
}

/// Elements more or less, in as many messages as they need.
pub(super) fn elements<'a>(
    batch: &mut Batch,
    slot: Slot,
    set: &str,
    more: bool,
    elements: impl IntoIterator<Item = &'a Element>,
) {
    let mut open: Option<(Nest, usize)> = None;
    for element in elements {
        if open.as_ref().is_some_and(|(_, start)| batch.len() - start > ELEMENTS_BYTES)
            && let Some((nest, _)) = open.take()
        {
            batch.end_nest(nest);
        }
        if open.is_none() {
            let (kind, flags) = if more { (kind::NEWSETELEM, NLM_F_CREATE) } else { (kind::DELSETELEM, 0) };
            message(batch, kind, flags);
            batch.name(2, slot, set);
            open = Some((batch.nest(3), batch.len()));
        }
        one_element(batch, slot, element, more);
    }
    if let Some((nest, _)) = open {
        batch.end_nest(nest);
    }
}

fn one_element(batch: &mut Batch, slot: Slot, element: &Element, more: bool) {
    let nest = batch.nest(LIST_ELEMENT);
    match element {
        Element::Address(address) => key(batch, 1, *address, &[]),
        Element::Range(first, last) => {
            key(batch, 1, *first, &[0, 0, 0, 0]);
            // NFTA_SET_ELEM_KEY_END; of all protocols
            key(batch, 10, *last, &[255, 0, 0, 0]);
        }
        Element::Port(address, protocol, port) => {
            let [high, low] = port.to_be_bytes();
            key(batch, 1, *address, &[*protocol, 0, 0, 0, high, low, 0, 0]);
        }
        Element::Numbers(protocol, first, last) => {
            numbers_key(batch, 1, *protocol, *first);
            numbers_key(batch, 10, *protocol, *last);
        }
        Element::Chain(address, chain) => {
            key(batch, 1, *address, &[]);
            if more {
                let data = batch.nest(2);
                expression::verdict_data(batch, NFT_JUMP, Some((slot, chain)));
                batch.end_nest(data);
            }
        }
    }
    batch.end_nest(nest);
}

/// An address and the fields behind it, each filled up to four bytes.
fn key(batch: &mut Batch, kind: u16, address: IpAddr, rest: &[u8]) {
    let nest = batch.nest(kind);
    match address {
        IpAddr::V4(address) => batch.parts(DATA_VALUE, &[&address.octets(), rest]),
        IpAddr::V6(address) => batch.parts(DATA_VALUE, &[&address.octets(), rest]),
    }
    batch.end_nest(nest);
}

/// A protocol and a port, each filled up to four bytes.
fn numbers_key(batch: &mut Batch, kind: u16, protocol: u8, port: u16) {
    let nest = batch.nest(kind);
    let [high, low] = port.to_be_bytes();
    batch.attr(DATA_VALUE, &[protocol, 0, 0, 0, high, low, 0, 0]);
    batch.end_nest(nest);
}

/// All rules of a chain less; its name as the kernel has it.
pub(super) fn flush_chain(batch: &mut Batch, name: &str) {
    message(batch, kind::DELRULE, 0);
    batch.text(2, name);
}

/// A chain less.
pub(super) fn delete_chain(batch: &mut Batch, name: &str) {
    message(batch, kind::DELCHAIN, 0);
    batch.text(3, name);
}

/// A set less.
pub(super) fn delete_set(batch: &mut Batch, name: &str) {
    message(batch, kind::DELSET, 0);
    batch.text(2, name);
}

/// A counter or what else has a name of its own less.
pub(super) fn delete_object(batch: &mut Batch, name: &str, object_type: u32) {
    message(batch, kind::DELOBJ, 0);
    batch.text(2, name);
    batch.be32(3, object_type);
}

/// One change.
pub(super) fn change(batch: &mut Batch, slot: Slot, change: &Change) {
    match change {
        Change::AddCounter(name) => counter(batch, name),
        Change::AddSet { name, family, kind } => set(batch, slot, name, *family, *kind),
        Change::AddChain { name, hook } => chain(batch, slot, name, *hook),
        Change::AddRules { chain, rules } => rules.iter().for_each(|one| rule(batch, slot, chain, one)),
        Change::FlushChain(name) => flush_chain(batch, &slot.name(name)),
        Change::AddElements { set, elements: all, .. } => elements(batch, slot, set, true, all),
        Change::RemoveElements { set, elements: all, .. } => elements(batch, slot, set, false, all),
        Change::DeleteChain(name) => delete_chain(batch, &slot.name(name)),
        Change::DeleteSet(name) => delete_set(batch, &slot.name(name)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::Messages;
    use super::*;

    #[test]
    fn more_elements_than_an_attribute_holds_go_into_several_messages() {
        let at = |n: u32| IpAddr::V6(u128::from(n).into());
        let all: Vec<_> = (0..5_000).map(|n| Element::Range(at(2 * n), at(2 * n + 1))).collect();
        let mut batch = Batch::default();
        batch.begin(1);
        elements(&mut batch, Slot::A, "r", true, &all);
        batch.end();
        let mut count = 0;
        for message in Messages(batch.bytes()).filter(|message| message.nft_kind() == Some(kind::NEWSETELEM))
        {
            assert_eq!(message.attributes().text(2), Some("a_r"));
            let list = message.attributes().nested(3).unwrap();
            assert!(list.0.len() < usize::from(u16::MAX));
            count += list.count();
        }
        assert_eq!(count, all.len());
    }

    #[test]
    fn a_range_is_of_all_protocols() {
        let mut batch = Batch::default();
        batch.begin(1);
        let range = Element::Range([10, 0, 0, 1].into(), [10, 0, 0, 9].into());
        elements(&mut batch, Slot::A, "r", true, [&range]);
        batch.end();
        let message = Messages(batch.bytes()).nth(1).unwrap();
        let element = message.attributes().nested(3).unwrap().nested(LIST_ELEMENT).unwrap();
        let value = |kind| element.nested(kind).unwrap().get(DATA_VALUE).unwrap();
        assert_eq!(value(1), [10, 0, 0, 1, 0, 0, 0, 0]);
        assert_eq!(value(10), [10, 0, 0, 9, 255, 0, 0, 0]);
    }
}
