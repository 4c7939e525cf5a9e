//! What stands in the tables of others and takes packets past ours: flowtables, rules that keep conntrack from packets, and rules that
//! hand packets from one device to the next.

use std::io;

use nix::errno::Errno;

use super::error::NftError;
use super::socket::Socket;
use super::wire::{Attributes, Batch, Message, NLM_F_DUMP, TABLE_ATTRIBUTE, kind};
use crate::ruleset::TABLE;

/// The most rules of others that are looked at.
const RULES_MOST: usize = 20_000;
/// The most findings of each kind.
const FINDINGS_MOST: usize = 64;
/// The most tables whose rules are looked at.
const TABLES_MOST: usize = 256;
/// `NF_IP_PRI_CONNTRACK`: what comes later keeps conntrack from nothing.
const CONNTRACK: i32 = -200;
/// The guard's table, which is ours as well.
const GUARD: &str = "sennit";
const READING: &str = "reading the nftables tables of others";

const NFPROTO_NETDEV: u8 = 5;
const NF_INET_PRE_ROUTING: u32 = 0;
const NF_INET_FORWARD: u32 = 2;
const NF_INET_LOCAL_OUT: u32 = 3;
const NF_DROP: u32 = 0;
/// `XT_CT_NOTRACK`, of `struct xt_ct_target_info`.
const XT_CT_NOTRACK: u16 = 1;

/// A flowtable: flows in it pass neither forward nor postrouting.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flowtable {
    /// Its table: family and name, as `nft` takes them.
    pub table: String,
    /// Its name.
    pub name: String,
    /// The devices whose packets it takes.
    pub devices: Vec<String>,
}

/// What a rule of others does that matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Deed {
    /// `notrack`: conntrack hears nothing of the packet.
    NoTrack,
    /// `fwd to`, in a table of family `netdev`: the packet leaves by another device at once.
    HandOn,
}

/// A chain of others with such a rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Doer {
    /// What the rule does.
    pub deed: Deed,
    /// Its table: family and name, as `nft` takes them.
    pub table: String,
    /// Its chain.
    pub chain: String,
}

/// All of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Others {
    /// Flowtables.
    pub flowtables: Vec<Flowtable>,
    /// Rules, one of each chain and kind.
    pub doers: Vec<Doer>,
    /// Chains that drop what this host forwards where none of their rules accepts it, as `chain FORWARD of table ip filter`.
    pub closed: Vec<String>,
    /// Whether there was more than is looked at.
    pub cut: bool,
}

/// Reads the tables of others. While nothing in nf_tables changes it asks for the number of its generation alone.
#[derive(Debug)]
pub struct OthersReader {
    socket: Socket,
    batch: Batch,
    known: Option<(u32, Others)>,
}

impl OthersReader {
    /// Opens a socket in the network namespace of this thread.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open() -> Result<Self, NftError> {
        let action = "opening a netlink socket to nf_tables";
        let socket = Socket::new().map_err(|source| NftError::Socket { action, source })?;
        Ok(Self { socket, batch: Batch::default(), known: None })
    }

    /// What stands there now.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn read(&mut self) -> Result<&Others, NftError> {
        let generation = self.generation().map_err(|errno| NftError::whole(READING, errno))?;
        if self.known.as_ref().is_none_or(|(known, _)| *known != generation) {
            let others = self.read_all().map_err(|errno| NftError::whole(READING, errno))?;
            self.known = Some((generation, others));
        }
        let (_, others) = self.known.as_ref().ok_or_else(|| NftError::Socket {
            action: READING,
            source: io::Error::from(io::ErrorKind::NotFound),
        })?;
        Ok(others)
    }

    fn generation(&mut self) -> Result<u32, Errno> {
        self.batch.clear(self.socket.sequence());
        self.batch.message_of(0, kind::GETGEN, super::standing::NLM_F_ACK);
        let mut found = 0;
        self.socket.ask(&mut self.batch, |message| {
            // NFTA_GEN_ID
            found = message.attributes().be32(1).unwrap_or(found);
        })?;
        Ok(found)
    }

    fn read_all(&mut self) -> Result<Others, Errno> {
        let mut others = Others::default();
        let everything = |kind| move |batch: &mut Batch| batch.message_of(0, kind, NLM_F_DUMP);
        others.flowtables = nothing(self.socket.dump(
            &mut self.batch,
            everything(kind::GETFLOWTABLE),
            |found: &mut Vec<Flowtable>, message| {
                found.extend(flowtable(message).filter(|_| found.len() < FINDINGS_MOST));
            },
        ))?;
        type Chains = (Vec<(u8, String)>, Vec<String>);
        let (mut tables, closed) = nothing(self.socket.dump(
            &mut self.batch,
            everything(kind::GETCHAIN),
            |(found, closing): &mut Chains, message| {
                if let Some(table) = acting(message).filter(|table| !found.contains(table)) {
                    found.push(table);
                }
                closing.extend(closed(message).filter(|_| closing.len() < FINDINGS_MOST));
            },
        ))?;
        others.closed = closed;
        others.cut = tables.len() > TABLES_MOST;
        tables.truncate(TABLES_MOST);
        let mut looked_at = 0;
        for (family, table) in tables {
            let request = |batch: &mut Batch| {
                batch.message_of(family, kind::GETRULE, NLM_F_DUMP);
                batch.text(TABLE_ATTRIBUTE, &table);
            };
            let (seen, doers) = nothing(self.socket.dump(
                &mut self.batch,
                request,
                |(seen, found): &mut (usize, Vec<Doer>), message| {
                    *seen += 1;
                    if looked_at + *seen > RULES_MOST || found.len() >= FINDINGS_MOST {
                        return;
                    }
                    for doer in doers(message) {
                        if !found.contains(&doer) {
                            found.push(doer);
                        }
                    }
                },
            ))?;
            looked_at += seen;
            others.doers.extend(doers);
            if looked_at > RULES_MOST {
                others.cut = true;
                break;
            }
        }
        others.doers.truncate(FINDINGS_MOST);
        Ok(others)
    }
}

fn table_name(family: u8, table: &str) -> String {
    let family = match family {
        1 => "inet",
        2 => "ip",
        3 => "arp",
        NFPROTO_NETDEV => "netdev",
        7 => "bridge",
        10 => "ip6",
        _ => "?",
    };
    format!("{family} {table}")
}

/// The table of a message, unless it is ours.
fn of_others<'a>(message: &Message<'a>) -> Option<(u8, &'a str)> {
    let family = message.family()?;
    let table = message.attributes().text(TABLE_ATTRIBUTE)?;
    let ours = family == super::wire::NFPROTO_INET && [TABLE, GUARD].contains(&table);
    (!ours).then_some((family, table))
}

fn flowtable(message: &Message<'_>) -> Option<Flowtable> {
    let (family, table) = of_others(message)?;
    let attributes = message.attributes();
    // NFTA_FLOWTABLE_HOOK, NFTA_FLOWTABLE_HOOK_DEVS; NFTA_DEVICE_NAME, or NFTA_DEVICE_PREFIX for all that begin so
    let devices = attributes.nested(3).and_then(|hook| hook.nested(3));
    let text = |value: &[u8]| String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned();
    let devices = devices.into_iter().flatten().filter_map(|(kind, value)| match kind {
        1 => Some(text(value)),
        2 => Some(format!("{}*", text(value))),
        _ => None,
    });
    let name = attributes.text(2)?.to_owned();
    Some(Flowtable { table: table_name(family, table), name, devices: devices.take(FINDINGS_MOST).collect() })
}

/// The table of a base chain in which a rule could do anything that matters.
fn acting(message: &Message<'_>) -> Option<(u8, String)> {
    let (family, table) = of_others(message)?;
    // NFTA_CHAIN_HOOK: NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY
    let hook = message.attributes().nested(4)?;
    let (number, priority) = (hook.be32(1)?, hook.be32(2)?.cast_signed());
    let early = priority < CONNTRACK && [NF_INET_PRE_ROUTING, NF_INET_LOCAL_OUT].contains(&number);
    (early || family == NFPROTO_NETDEV).then(|| (family, table.to_owned()))
}

/// A base chain that drops by default what is forwarded.
fn closed(message: &Message<'_>) -> Option<String> {
    let (family, table) = of_others(message)?;
    let attributes = message.attributes();
    // NFTA_CHAIN_HOOK and its NFTA_HOOK_HOOKNUM, NFTA_CHAIN_POLICY, NFTA_CHAIN_NAME
    let forwards = attributes.nested(4)?.be32(1)? == NF_INET_FORWARD && [1, 2, 10].contains(&family);
    let drops = attributes.be32(5)? == NF_DROP;
    (forwards && drops).then_some(())?;
    Some(format!("chain {} of table {}", attributes.text(3)?, table_name(family, table)))
}

fn doers(message: &Message<'_>) -> Vec<Doer> {
    let Some((family, table)) = of_others(message) else { return Vec::new() };
    let attributes = message.attributes();
    // NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS
    let (Some(chain), Some(expressions)) = (attributes.text(2), attributes.nested(4)) else {
        return Vec::new();
    };
    let deeds = expressions.filter_map(|(_, element)| deed(Attributes(element)));
    let doer = |deed| Doer { deed, table: table_name(family, table), chain: chain.to_owned() };
    deeds.map(doer).collect()
}

fn deed(expression: Attributes<'_>) -> Option<Deed> {
    // NFTA_EXPR_NAME, NFTA_EXPR_DATA
    match expression.text(1)? {
        "notrack" => Some(Deed::NoTrack),
        "fwd" => Some(Deed::HandOn),
        "target" => {
            // iptables: NFTA_TARGET_NAME, NFTA_TARGET_INFO
            let data = expression.nested(2)?;
            let flags = || data.get(3)?.first_chunk().copied().map(u16::from_ne_bytes);
            let untracked = match data.text(1)? {
                "NOTRACK" => true,
                "CT" => flags().is_some_and(|flags| flags & XT_CT_NOTRACK != 0),
                _ => false,
            };
            untracked.then_some(Deed::NoTrack)
        }
        _ => None,
    }
}

/// Where there is no such thing, or no such kind of things, there is none.
fn nothing<T: Default>(found: Result<T, Errno>) -> Result<T, Errno> {
    match found {
        Err(Errno::ENOENT | Errno::EOPNOTSUPP | Errno::EINVAL) => Ok(T::default()),
        found => found,
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::Messages;
    use super::*;

    /// A message as the kernel would send it.
    fn said(family: u8, kind: u8, table: &str, write: impl FnOnce(&mut Batch)) -> Batch {
        let mut batch = Batch::default();
        batch.clear(1);
        batch.message_of(family, kind, 0);
        batch.text(TABLE_ATTRIBUTE, table);
        write(&mut batch);
        batch.end_request();
        batch
    }

    fn rule(family: u8, table: &str, name: &str, data: impl FnOnce(&mut Batch)) -> Vec<Doer> {
        let batch = said(family, kind::NEWRULE, table, |batch| {
            batch.text(2, "raw");
            let list = batch.nest(4);
            let element = batch.nest(1);
            batch.text(1, name);
            let inner = batch.nest(2);
            data(batch);
            batch.end_nest(inner);
            batch.end_nest(element);
            batch.end_nest(list);
        });
        doers(&Messages(batch.bytes()).next().unwrap())
    }

    #[test]
    fn flowtables_of_others_are_read_with_their_devices() {
        let write = |batch: &mut Batch| {
            batch.text(2, "fast");
            let hook = batch.nest(3);
            batch.be32(1, 0);
            let devices = batch.nest(3);
            batch.text(1, "eth0");
            batch.text(2, "cali");
            batch.end_nest(devices);
            batch.end_nest(hook);
        };
        let read = |family, table| {
            let batch = said(family, kind::GETFLOWTABLE, table, write);
            flowtable(&Messages(batch.bytes()).next().unwrap())
        };
        let found = read(1, "router").unwrap();
        assert_eq!((found.table.as_str(), found.name.as_str()), ("inet router", "fast"));
        assert_eq!(found.devices, ["eth0", "cali*"]);
        assert!(read(1, TABLE).is_none() && read(2, TABLE).is_some());
    }

    #[test]
    fn rules_that_take_packets_past_ours_are_known() {
        assert_eq!(rule(1, "t", "notrack", |_| {})[0].deed, Deed::NoTrack);
        assert_eq!(rule(NFPROTO_NETDEV, "t", "fwd", |_| {})[0].table, "netdev t");
        assert!(rule(1, "t", "counter", |_| {}).is_empty());
        let ct = |flags: u16| {
            rule(2, "raw", "target", |batch| {
                batch.text(1, "CT");
                batch.attr(3, &flags.to_ne_bytes());
            })
        };
        assert_eq!((ct(1).len(), ct(0).len()), (1, 0));
        assert!(rule(1, GUARD, "notrack", |_| {}).is_empty());
    }

    #[test]
    fn chains_behind_conntrack_are_passed_by() {
        let chain = |family, number: u32, priority: i32| {
            let batch = said(family, kind::NEWCHAIN, "t", |batch| {
                let hook = batch.nest(4);
                batch.be32(1, number);
                batch.be32(2, priority.cast_unsigned());
                batch.end_nest(hook);
            });
            acting(&Messages(batch.bytes()).next().unwrap()).is_some()
        };
        assert!(chain(1, 0, -300) && chain(2, 3, -300) && chain(NFPROTO_NETDEV, 0, 0));
        assert!(!chain(1, 0, -100) && !chain(1, 2, -300));
    }
}
