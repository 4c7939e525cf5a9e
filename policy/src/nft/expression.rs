//! Rules as the expressions that the kernel runs: the same that `nft` makes of the same rule.
//!
//! Attribute numbers are those of `linux/netfilter/nf_tables.h`.

use super::wire::Batch;
use crate::dns;
use crate::render::Slot;
use crate::ruleset::{End, Family, Kind, Match, Number, Rule, State, Statement, Verdict, Way};

/// `NFTA_LIST_ELEM`.
pub(super) const LIST_ELEMENT: u16 = 1;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
/// `NFTA_DATA_VALUE`.
pub(super) const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;

const NF_DROP: i32 = 0;
const NF_ACCEPT: i32 = 1;
pub(super) const NFT_JUMP: i32 = -3;
const NFT_GOTO: i32 = -4;
const NFT_RETURN: i32 = -5;

/// The verdict register.
const REG_VERDICT: u32 = 0;
/// The first register, 16 bytes.
const REG_1: u32 = 1;
/// The second, 16 bytes.
const REG_2: u32 = 2;
/// The first of four bytes; the same bytes as those of `REG_1` begin here.
const REG32_00: u32 = 8;

const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;

const CT_STATE: u32 = 0;
const CT_DIRECTION: u32 = 1;
const CT_STATUS: u32 = 2;
const CT_MARK: u32 = 3;
/// `IPS_DST_NAT`, of `CT_STATUS`.
const IPS_DST_NAT: u32 = 1 << 5;
const CT_PROTO_SRC: u32 = 11;
const CT_PROTO_DST: u32 = 12;
const CT_SRC_IP: u32 = 19;
const CT_DST_IP: u32 = 20;
const CT_SRC_IP6: u32 = 21;
const CT_DST_IP6: u32 = 22;
/// `IP_CT_DIR_ORIGINAL`.
const ORIGINAL: u8 = 0;
/// `IP_CT_DIR_REPLY`.
const REPLY: u8 = 1;

const CMP_EQ: u32 = 0;
const CMP_NEQ: u32 = 1;
const CMP_LTE: u32 = 3;
const CMP_GTE: u32 = 5;

/// `NFT_RANGE_NEQ`.
const RANGE_NEQ: u32 = 1;

/// `NFT_DYNSET_OP_UPDATE`.
const DYNSET_UPDATE: u32 = 1;

const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;

const IPPROTO_TCP: u8 = 6;
const IPPROTO_ICMPV6: u8 = 58;
/// Length of an interface's name with its end.
const IFNAMSIZ: usize = 16;
/// Bytes of a packet that a listener is given.
const LOG_SNAPLEN: u32 = 96;
/// Packets that the kernel gathers before it wakes a listener.
const LOG_QUEUE_THRESHOLD: u16 = 16;
/// `NFT_FIB_RESULT_OIF`, and of `NFTA_FIB_F_*` SADDR, IIF and PRESENT.
const FIB_RESULT_OIF: u32 = 1;
const FIB_SADDR: u32 = 1;
/// `NFT_FIB_RESULT_ADDRTYPE`, and of `NFTA_FIB_F_*` DADDR; `RTN_UNICAST`, `RTN_LOCAL`.
const FIB_RESULT_TYPE: u32 = 3;
const FIB_DADDR: u32 = 1 << 1;
const RTN_UNICAST: u32 = 1;
const RTN_LOCAL: u32 = 2;
const FIB_IIF: u32 = 1 << 3;
const FIB_PRESENT: u32 = 1 << 5;
/// `NFT_OBJECT_COUNTER`.
pub(super) const OBJECT_COUNTER: u32 = 1;

/// Writes a rule's expressions, one `NFTA_LIST_ELEM` each.
pub(super) fn rule(batch: &mut Batch, rule: &Rule, slot: Slot) {
    let mut writer = Writer { batch, slot, network: None, transport: None };
    rule.matches.iter().for_each(|condition| writer.condition(condition));
    rule.statements.iter().for_each(|statement| writer.statement(statement));
    writer.verdict(&rule.verdict);
}

/// Writes a verdict as an attribute's value.
pub(super) fn verdict_data(batch: &mut Batch, code: i32, chain: Option<(Slot, &str)>) {
    let nest = batch.nest(DATA_VERDICT);
    batch.attr(VERDICT_CODE, &code.to_be_bytes());
    if let Some((slot, chain)) = chain {
        batch.name(VERDICT_CHAIN, slot, chain);
    }
    batch.end_nest(nest);
}

struct Writer<'a> {
    batch: &'a mut Batch,
    slot: Slot,
    /// What the conditions so far have established: a header's fields are looked at only where there is such a header.
    network: Option<Family>,
    transport: Option<u8>,
}

impl Writer<'_> {
    fn expression(&mut self, name: &str, body: impl FnOnce(&mut Batch)) {
        let element = self.batch.nest(LIST_ELEMENT);
        self.batch.text(EXPRESSION_NAME, name);
        let data = self.batch.nest(EXPRESSION_DATA);
        body(self.batch);
        self.batch.end_nest(data);
        self.batch.end_nest(element);
    }

    fn meta(&mut self, key: u32, register: u32) {
        self.expression("meta", |batch| {
            batch.be32(2, key);
            batch.be32(1, register);
        });
    }

    fn ct(&mut self, key: u32, direction: Option<u8>) {
        self.ct_into(key, direction, REG_1);
    }

    fn ct_into(&mut self, key: u32, direction: Option<u8>, register: u32) {
        self.expression("ct", |batch| {
            batch.be32(2, key);
            batch.be32(1, register);
            if let Some(direction) = direction {
                batch.attr(3, &[direction]);
            }
        });
    }

    fn payload(&mut self, base: u32, offset: u32, length: u32, register: u32) {
        self.expression("payload", |batch| {
            batch.be32(1, register);
            batch.be32(2, base);
            batch.be32(3, offset);
            batch.be32(4, length);
        });
    }

    fn compare(&mut self, operation: u32, value: &[u8]) {
        self.expression("cmp", |batch| {
            batch.be32(1, REG_1);
            batch.be32(2, operation);
            data(batch, 3, value);
        });
    }

    /// At least the first and at most the last.
    fn compare_range(&mut self, first: &[u8], last: &[u8]) {
        if first == last {
            self.compare(CMP_EQ, first);
        } else {
            self.compare(CMP_GTE, first);
            self.compare(CMP_LTE, last);
        }
    }

    /// Less than the first or more than the last.
    fn compare_outside(&mut self, first: &[u8], last: &[u8]) {
        if first == last {
            return self.compare(CMP_NEQ, first);
        }
        self.expression("range", |batch| {
            batch.be32(1, REG_1);
            batch.be32(2, RANGE_NEQ);
            data(batch, 3, first);
            data(batch, 4, last);
        });
    }

    /// `register & mask ^ xor`, in the first register.
    fn bitwise(&mut self, mask: &[u8], xor: &[u8]) {
        self.expression("bitwise", |batch| {
            batch.be32(1, REG_1);
            batch.be32(2, REG_1);
            batch.be32(3, u32::try_from(mask.len()).unwrap_or(4));
            data(batch, 4, mask);
            data(batch, 5, xor);
        });
    }

    fn lookup(&mut self, set: &str, negated: bool, verdict: bool) {
        let slot = self.slot;
        self.expression("lookup", |batch| {
            batch.be32(2, REG_1);
            if verdict {
                batch.be32(3, REG_VERDICT);
            }
            batch.name(1, slot, set);
            if negated {
                batch.be32(5, 1);
            }
        });
    }

    fn immediate(&mut self, code: i32, chain: Option<&str>) {
        let slot = self.slot;
        self.expression("immediate", |batch| {
            batch.be32(1, REG_VERDICT);
            let nest = batch.nest(2);
            verdict_data(batch, code, chain.map(|chain| (slot, chain)));
            batch.end_nest(nest);
        });
    }

    fn needs_network(&mut self, family: Family) {
        if self.network != Some(family) {
            self.family(family);
        }
    }

    fn family(&mut self, family: Family) {
        self.network = Some(family);
        self.meta(META_NFPROTO, REG_1);
        self.compare(CMP_EQ, &[if family == Family::V4 { 2 } else { 10 }]);
    }

    fn needs_transport(&mut self, protocol: u8) {
        if self.transport != Some(protocol) {
            self.protocol(protocol);
        }
    }

    fn protocol(&mut self, protocol: u8) {
        self.transport = Some(protocol);
        self.meta(META_L4PROTO, REG_1);
        self.compare(CMP_EQ, &[protocol]);
    }

    /// Loads an address into the first register.
    fn address(&mut self, end: End, family: Family) {
        let (v4, v6) = match end {
            End::Source => (12, 8),
            End::Destination => (16, 24),
            End::Client | End::Server => {
                let direction = if end == End::Client { ORIGINAL } else { REPLY };
                let key = if family == Family::V4 { CT_SRC_IP } else { CT_SRC_IP6 };
                return self.ct(key, Some(direction));
            }
            End::Dialled => {
                let key = if family == Family::V4 { CT_DST_IP } else { CT_DST_IP6 };
                return self.ct(key, Some(ORIGINAL));
            }
        };
        self.needs_network(family);
        let (offset, length) = if family == Family::V4 { (v4, 4) } else { (v6, 16) };
        self.payload(NETWORK_HEADER, offset, length, REG_1);
    }

    /// Loads a number into a register.
    fn number(&mut self, number: Number, register: u32) {
        match number {
            Number::ClientPort => self.ct_into(CT_PROTO_SRC, Some(ORIGINAL), register),
            Number::ServerPort => self.ct_into(CT_PROTO_SRC, Some(REPLY), register),
            Number::DialledPort | Number::Icmp => self.ct_into(CT_PROTO_DST, Some(ORIGINAL), register),
            Number::SourcePort | Number::PacketIcmp => self.payload(TRANSPORT_HEADER, 0, 2, register),
            Number::DestinationPort => self.payload(TRANSPORT_HEADER, 2, 2, register),
        }
    }

    fn interface(&mut self, key: u32, name: &str) {
        let mut padded = [0; IFNAMSIZ];
        padded.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
        self.meta(key, REG_1);
        self.compare(CMP_EQ, &padded);
    }

    fn condition(&mut self, condition: &Match) {
        match condition {
            Match::Interface(name) => self.interface(META_IIFNAME, name),
            Match::Leaves(name) => self.interface(META_OIFNAME, name),
            Match::In { family, end, set, kind, negated } => {
                self.address(*end, *family);
                if *kind == Kind::Ranges {
                    let register = after_address(*family);
                    self.meta(META_L4PROTO, register);
                    self.order_for_network(register);
                }
                self.lookup(set, *negated, false);
            }
            Match::Named { family, end, set, way, negated } => {
                let original = *way == Way::Original;
                // Of the source port or the destination port.
                let offset = if (*end == End::Client) == original { 0 } else { 2 };
                self.ct(CT_DIRECTION, None);
                self.compare(CMP_EQ, &[if original { ORIGINAL } else { REPLY }]);
                self.address(*end, *family);
                self.meta(META_L4PROTO, after_address(*family));
                self.payload(TRANSPORT_HEADER, offset, 2, after_protocol(*family));
                self.lookup(set, *negated, false);
            }
            Match::Family(family) => self.family(*family),
            Match::Protocol(protocol) => self.protocol(*protocol),
            Match::NotProtocol(protocol) => {
                self.meta(META_L4PROTO, REG_1);
                self.compare(CMP_NEQ, &[*protocol]);
            }
            Match::Numbers { number, first, last, negated } => {
                self.number(*number, REG_1);
                match negated {
                    false => self.compare_range(&first.to_be_bytes(), &last.to_be_bytes()),
                    true => self.compare_outside(&first.to_be_bytes(), &last.to_be_bytes()),
                }
            }
            Match::AnyOf { number, set } => {
                self.meta(META_L4PROTO, REG_1);
                self.order_for_network(REG_1);
                self.number(*number, REG32_00 + 1);
                self.lookup(set, false, false);
            }
            Match::State(state) => {
                self.ct(CT_STATE, None);
                self.bitwise(&state_bits(*state).to_ne_bytes(), &[0; 4]);
                self.compare(CMP_NEQ, &[0; 4]);
            }
            Match::Direction(way) => {
                self.ct(CT_DIRECTION, None);
                self.compare(CMP_EQ, &[if *way == Way::Original { ORIGINAL } else { REPLY }]);
            }
            Match::NoWayBack => {
                self.expression("fib", |batch| {
                    batch.be32(1, REG_1);
                    batch.be32(2, FIB_RESULT_OIF);
                    batch.be32(3, FIB_SADDR | FIB_IIF | FIB_PRESENT);
                });
                // nft has it so, whatever the kernel writes there.
                self.compare(CMP_EQ, &[0; 4]);
            }
            Match::ForAnother => self.address_type(FIB_DADDR, RTN_UNICAST),
            Match::FromThisHost => self.address_type(FIB_SADDR, RTN_LOCAL),
            Match::Translated => {
                self.ct(CT_STATUS, None);
                self.bitwise(&IPS_DST_NAT.to_ne_bytes(), &[0; 4]);
                self.compare(CMP_NEQ, &[0; 4]);
            }
            Match::MidStream => {
                self.needs_transport(IPPROTO_TCP);
                // Of the byte of flags: FIN, SYN, RST and ACK; SYN alone opens a connection.
                self.payload(TRANSPORT_HEADER, 13, 1, REG_1);
                self.bitwise(&[0x17], &[0]);
                self.compare(CMP_NEQ, &[0x02]);
            }
            Match::Icmp6(first, last) => {
                self.needs_network(Family::V6);
                self.needs_transport(IPPROTO_ICMPV6);
                self.payload(TRANSPORT_HEADER, 0, 1, REG_1);
                self.compare_range(&[*first], &[*last]);
            }
            Match::Mark { mask, value } => {
                self.ct(CT_MARK, None);
                self.bitwise(&mask.to_ne_bytes(), &[0; 4]);
                self.compare(CMP_EQ, &value.to_ne_bytes());
            }
        }
    }

    /// What kind of route leads to an address of the packet.
    fn address_type(&mut self, of: u32, kind: u32) {
        self.expression("fib", |batch| {
            batch.be32(1, REG_1);
            batch.be32(2, FIB_RESULT_TYPE);
            batch.be32(3, of);
        });
        self.compare(CMP_EQ, &kind.to_ne_bytes());
    }

    /// `nft` has this where a field of an interval's key is of the host's byte order; of one byte it changes nothing.
    fn order_for_network(&mut self, register: u32) {
        self.expression("byteorder", |batch| {
            batch.be32(1, register);
            batch.be32(2, register);
            // NFT_BYTEORDER_HTON
            batch.be32(3, 1);
            batch.be32(4, 1);
            batch.be32(5, 2);
        });
    }

    fn statement(&mut self, statement: &Statement) {
        match statement {
            Statement::Limit { rate, burst } => {
                self.expression("limit", |batch| limit(batch, *rate, *burst));
            }
            Statement::LimitEach { family, end, set, rate, burst } => {
                self.address(*end, *family);
                let slot = self.slot;
                self.expression("dynset", |batch| {
                    batch.name(1, slot, set);
                    batch.be32(3, DYNSET_UPDATE);
                    batch.be32(4, REG_1);
                    // NFTA_DYNSET_EXPR: the one of each element.
                    let each = batch.nest(7);
                    batch.text(EXPRESSION_NAME, "limit");
                    let data = batch.nest(EXPRESSION_DATA);
                    limit(batch, *rate, *burst);
                    batch.end_nest(data);
                    batch.end_nest(each);
                });
            }
            Statement::Log { prefix, group } => self.log(prefix, *group, LOG_SNAPLEN, LOG_QUEUE_THRESHOLD),
            Statement::Copy { group } => self.log("copy", *group, dns::RANGE, 1),
            Statement::NoTrack => self.expression("notrack", |_| {}),
            Statement::Count(counter) => self.expression("objref", |batch| {
                batch.be32(1, OBJECT_COUNTER);
                batch.text(2, counter);
            }),
            Statement::SetMark { mask, value } => {
                self.ct(CT_MARK, None);
                // What is set is cleared before, so that flipping sets it.
                self.bitwise(&(!(mask | value)).to_ne_bytes(), &value.to_ne_bytes());
                self.expression("ct", |batch| {
                    batch.be32(2, CT_MARK);
                    batch.be32(4, REG_1);
                });
            }
        }
    }

    fn log(&mut self, prefix: &str, group: u16, length: u32, threshold: u16) {
        self.expression("log", |batch| {
            batch.text(2, prefix);
            batch.be16(1, group);
            batch.be32(3, length);
            batch.be16(4, threshold);
        });
    }

    fn verdict(&mut self, verdict: &Verdict) {
        match verdict {
            Verdict::Continue => {}
            Verdict::Accept => self.immediate(NF_ACCEPT, None),
            Verdict::Drop => self.immediate(NF_DROP, None),
            Verdict::Return => self.immediate(NFT_RETURN, None),
            Verdict::Jump(chain) => self.immediate(NFT_JUMP, Some(chain)),
            Verdict::Goto(chain) => self.immediate(NFT_GOTO, Some(chain)),
            Verdict::Lookup { family, end, map } => {
                self.address(*end, *family);
                self.lookup(map, false, true);
            }
        }
    }
}

/// So many packets a second, and so many at once.
fn limit(batch: &mut Batch, rate: u32, burst: u32) {
    batch.be64(1, u64::from(rate));
    batch.be64(2, 1);
    batch.be32(3, burst);
    // NFT_LIMIT_PKTS, and no inversion.
    batch.be32(4, 0);
    batch.be32(5, 0);
}

/// A value as it is compared with.
fn data(batch: &mut Batch, kind: u16, value: &[u8]) {
    let nest = batch.nest(kind);
    batch.attr(DATA_VALUE, value);
    batch.end_nest(nest);
}

/// The register behind an address in the first: fields of a key follow each other.
fn after_address(family: Family) -> u32 {
    if family == Family::V4 { REG32_00 + 1 } else { REG_2 }
}

/// The register behind that.
fn after_protocol(family: Family) -> u32 {
    if family == Family::V4 { REG32_00 + 2 } else { REG32_00 + 5 }
}

/// `NF_CT_STATE_BIT`, `NF_CT_STATE_INVALID_BIT`.
fn state_bits(state: State) -> u32 {
    match state {
        State::Invalid => 1,
        State::Established => 2,
        State::Known => 2 | 4,
        State::Related => 4,
        State::New => 8,
        State::Untracked => 64,
    }
}
