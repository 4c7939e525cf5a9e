//! Messages of nf_tables: what is written in one reusable buffer, and what is read back.
//!
//! Numbers are those of `linux/netlink.h`, `linux/netfilter/nfnetlink.h` and `linux/netfilter/nf_tables.h`.

use crate::render::Slot;

pub(super) const NLMSG_ERROR: u16 = 2;
pub(super) const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
pub(super) const NLM_F_DUMP_INTR: u16 = 0x10;
pub(super) const NLM_F_DUMP: u16 = 0x300;
pub(super) const NLM_F_EXCL: u16 = 0x200;
pub(super) const NLM_F_CREATE: u16 = 0x400;
pub(super) const NLM_F_APPEND: u16 = 0x800;
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE_MASK: u16 = 0x3fff;

const NFNL_MSG_BATCH_BEGIN: u16 = 16;
const NFNL_MSG_BATCH_END: u16 = 17;
pub(super) const NFNL_SUBSYS_NFTABLES: u16 = 10;
pub(super) const NFPROTO_INET: u8 = 1;

/// `enum nf_tables_msg_types`.
pub(super) mod kind {
    pub(in crate::nft) const NEWTABLE: u8 = 0;
    pub(in crate::nft) const GETTABLE: u8 = 1;
    pub(in crate::nft) const DELTABLE: u8 = 2;
    pub(in crate::nft) const NEWCHAIN: u8 = 3;
    pub(in crate::nft) const GETCHAIN: u8 = 4;
    pub(in crate::nft) const DELCHAIN: u8 = 5;
    pub(in crate::nft) const NEWRULE: u8 = 6;
    pub(in crate::nft) const GETRULE: u8 = 7;
    pub(in crate::nft) const DELRULE: u8 = 8;
    pub(in crate::nft) const NEWSET: u8 = 9;
    pub(in crate::nft) const GETSET: u8 = 10;
    pub(in crate::nft) const DELSET: u8 = 11;
    pub(in crate::nft) const NEWSETELEM: u8 = 12;
    pub(in crate::nft) const DELSETELEM: u8 = 14;
    pub(in crate::nft) const NEWGEN: u8 = 15;
    pub(in crate::nft) const GETGEN: u8 = 16;
    pub(in crate::nft) const TRACE: u8 = 17;
    pub(in crate::nft) const NEWOBJ: u8 = 18;
    pub(in crate::nft) const GETOBJ: u8 = 19;
    pub(in crate::nft) const DELOBJ: u8 = 20;
    pub(in crate::nft) const GETFLOWTABLE: u8 = 23;
}

/// Attribute 1 of every message but `NEWGEN` and `TRACE` names the table (`NFTA_TABLE_NAME`, `NFTA_CHAIN_TABLE`, ...).
pub(super) const TABLE_ATTRIBUTE: u16 = 1;

/// `struct nlmsghdr`.
const HEADER: usize = 16;

/// Messages under construction: one transaction, or one request.
#[derive(Debug, Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    /// Where the last message begins.
    last: usize,
    /// The sequence number of the first message.
    first_sequence: u32,
    count: u32,
}

/// An attribute that is open: where it begins.
#[must_use]
pub(super) struct Nest(usize);

impl Batch {
    /// Forgets what was in it and opens a transaction; messages count from `sequence`.
    pub(super) fn begin(&mut self, sequence: u32) {
        self.clear(sequence);
        self.header(NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, 0, NFNL_SUBSYS_NFTABLES);
    }

    /// Forgets what was in it; for a request outside of a transaction.
    pub(super) fn clear(&mut self, sequence: u32) {
        self.bytes.clear();
        (self.last, self.first_sequence, self.count) = (0, sequence, 0);
    }

    /// Whether a transaction has nothing in it.
    pub(super) fn is_empty(&self) -> bool {
        self.count <= 1
    }

    /// Bytes so far.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn first_sequence(&self) -> u32 {
        self.first_sequence
    }

    /// The sequence number that the next message will have.
    pub(super) fn next_sequence(&self) -> u32 {
        self.first_sequence.wrapping_add(self.count)
    }

    /// Ends the transaction; its last message asks for the acknowledgement. Returns that one's sequence number.
    ///
    /// The end itself is not acknowledged before Linux 6.10.
    pub(super) fn end(&mut self) -> u32 {
        self.close();
        self.set_flags(NLM_F_ACK);
        let sequence = self.next_sequence().wrapping_sub(1);
        self.header(NFNL_MSG_BATCH_END, NLM_F_REQUEST, 0, NFNL_SUBSYS_NFTABLES);
        self.close();
        sequence
    }

    /// Ends a request outside of a transaction.
    pub(super) fn end_request(&mut self) {
        self.close();
    }

    /// Opens a message.
    pub(super) fn message(&mut self, kind: u8, flags: u16) {
        let kind = NFNL_SUBSYS_NFTABLES << 8 | u16::from(kind);
        self.header(kind, NLM_F_REQUEST | flags, NFPROTO_INET, 0);
    }

    /// The same for another family; 0: for all.
    pub(super) fn message_of(&mut self, family: u8, kind: u8, flags: u16) {
        let kind = NFNL_SUBSYS_NFTABLES << 8 | u16::from(kind);
        self.header(kind, NLM_F_REQUEST | flags, family, 0);
    }

    fn header(&mut self, kind: u16, flags: u16, family: u8, resource: u16) {
        self.close();
        self.last = self.bytes.len();
        let sequence = self.next_sequence();
        self.count += 1;
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        self.bytes.extend_from_slice(&sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&[0, 0, 0, 0, family, 0]);
        self.bytes.extend_from_slice(&resource.to_be_bytes());
    }

    /// Writes the length of the message that is open.
    fn close(&mut self) {
        let length = u32::try_from(self.bytes.len() - self.last).unwrap_or(u32::MAX);
        if let Some(at) = self.bytes.get_mut(self.last..self.last + 4) {
            at.copy_from_slice(&length.to_ne_bytes());
        }
    }

    fn set_flags(&mut self, more: u16) {
        if let Some(at) = self.bytes.get_mut(self.last + 6..self.last + 8) {
            let flags = more | u16::from_ne_bytes([at[0], at[1]]);
            at.copy_from_slice(&flags.to_ne_bytes());
        }
    }

    /// An attribute of several parts one after the other.
    pub(super) fn parts(&mut self, kind: u16, parts: &[&[u8]]) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        parts.iter().for_each(|part| self.bytes.extend_from_slice(part));
        self.seal(start, kind);
    }

    pub(super) fn attr(&mut self, kind: u16, value: &[u8]) {
        self.parts(kind, &[value]);
    }

    pub(super) fn be16(&mut self, kind: u16, value: u16) {
        self.attr(kind, &value.to_be_bytes());
    }

    pub(super) fn be32(&mut self, kind: u16, value: u32) {
        self.attr(kind, &value.to_be_bytes());
    }

    pub(super) fn be64(&mut self, kind: u16, value: u64) {
        self.attr(kind, &value.to_be_bytes());
    }

    pub(super) fn text(&mut self, kind: u16, value: &str) {
        self.parts(kind, &[value.as_bytes(), &[0]]);
    }

    /// A name with its slot before it.
    pub(super) fn name(&mut self, kind: u16, slot: Slot, name: &str) {
        self.parts(kind, &[slot.prefix().as_bytes(), name.as_bytes(), &[0]]);
    }

    /// Opens an attribute with attributes in it.
    pub(super) fn nest(&mut self, kind: u16) -> Nest {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&(kind | NLA_F_NESTED).to_ne_bytes());
        Nest(start)
    }

    /// Closes it.
    pub(super) fn end_nest(&mut self, nest: Nest) {
        self.write_length(nest.0);
    }

    fn seal(&mut self, start: usize, kind: u16) {
        if let Some(at) = self.bytes.get_mut(start + 2..start + 4) {
            at.copy_from_slice(&kind.to_ne_bytes());
        }
        self.write_length(start);
        let padded = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(padded, 0);
    }

    fn write_length(&mut self, start: usize) {
        // What is too long is refused by the kernel: the attribute then ends behind its message.
        let length = u16::try_from(self.bytes.len() - start).unwrap_or(u16::MAX);
        if let Some(at) = self.bytes.get_mut(start..start + 2) {
            at.copy_from_slice(&length.to_ne_bytes());
        }
    }
}

/// A message that was read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Message<'a> {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) sequence: u32,
    /// For a notification: whose request it was.
    pub(super) port_id: u32,
    /// What follows the header.
    pub(super) payload: &'a [u8],
}

impl<'a> Message<'a> {
    /// Which message of nf_tables it is.
    pub(super) fn nft_kind(&self) -> Option<u8> {
        let [subsystem, kind] = self.kind.to_be_bytes();
        (u16::from(subsystem) == NFNL_SUBSYS_NFTABLES).then_some(kind)
    }

    /// `nfgen_family`.
    pub(super) fn family(&self) -> Option<u8> {
        self.payload.first().copied()
    }

    /// The attributes behind `struct nfgenmsg`.
    pub(super) fn attributes(&self) -> Attributes<'a> {
        Attributes(self.payload.get(4..).unwrap_or_default())
    }

    /// The error number of an `NLMSG_ERROR` or the end of a dump: positive, zero for success.
    pub(super) fn errno(&self) -> i32 {
        let code = self.payload.first_chunk::<4>().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
        code.saturating_neg()
    }
}

/// All messages in a datagram.
pub(super) struct Messages<'a>(pub(super) &'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let header = self.0.first_chunk::<HEADER>()?;
        let word =
            |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let half = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
        let length = (word(0) as usize).max(HEADER);
        let end = length.min(self.0.len());
        let payload = self.0.get(HEADER..end)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message { kind: half(4), flags: half(6), sequence: word(8), port_id: word(12), payload })
    }
}

/// Attributes one after the other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attributes<'a>(pub(super) &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let [l0, l1, k0, k1] = *self.0.first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([l0, l1])).max(4);
        let value = self.0.get(4..length.min(self.0.len()))?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]) & NLA_TYPE_MASK, value))
    }
}

impl<'a> Attributes<'a> {
    /// The first of a kind.
    pub(super) fn get(mut self, kind: u16) -> Option<&'a [u8]> {
        self.find(|(found, _)| *found == kind).map(|(_, value)| value)
    }

    /// The attributes in it.
    pub(super) fn nested(self, kind: u16) -> Option<Self> {
        self.get(kind).map(Attributes)
    }

    pub(super) fn text(self, kind: u16) -> Option<&'a str> {
        let value = self.get(kind)?;
        std::str::from_utf8(value.strip_suffix(&[0]).unwrap_or(value)).ok()
    }

    pub(super) fn be32(self, kind: u16) -> Option<u32> {
        self.get(kind)?.first_chunk().copied().map(u32::from_be_bytes)
    }

    pub(super) fn be64(self, kind: u16) -> Option<u64> {
        self.get(kind)?.first_chunk().copied().map(u64::from_be_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut batch = Batch::default();
        batch.begin(7);
        assert!(batch.is_empty());
        batch.message(kind::NEWSET, NLM_F_CREATE);
        batch.name(2, Slot::B, "x");
        let nest = batch.nest(9);
        batch.be32(1, 0x0102_0304);
        batch.be16(2, 5);
        batch.end_nest(nest);
        assert!(!batch.is_empty());
        assert_eq!(batch.end(), 8);

        let messages: Vec<_> = Messages(batch.bytes()).collect();
        assert_eq!(messages.iter().map(|message| message.sequence).collect::<Vec<_>>(), [7, 8, 9]);
        assert_eq!(messages[1].nft_kind(), Some(kind::NEWSET));
        assert_eq!(messages[1].flags, NLM_F_REQUEST | NLM_F_CREATE | NLM_F_ACK);
        assert_eq!(messages[1].family(), Some(NFPROTO_INET));
        let attributes = messages[1].attributes();
        assert_eq!(attributes.text(2), Some("b_x"));
        let nested = attributes.nested(9).unwrap();
        assert_eq!((nested.be32(1), nested.get(2)), (Some(0x0102_0304), Some(&[0, 5][..])));
        assert_eq!(messages[2].kind, NFNL_MSG_BATCH_END);
    }

    #[test]
    fn what_is_cut_off_is_read_without_going_beyond() {
        let mut batch = Batch::default();
        batch.clear(1);
        batch.message(kind::GETSET, 0);
        batch.text(1, "table");
        batch.end_request();
        for length in 0..batch.len() {
            for message in Messages(&batch.bytes()[..length]) {
                let _ = message.attributes().count();
            }
        }
        assert_eq!(Attributes(&[0, 0, 0, 0, 1]).count(), 1);
    }
}
