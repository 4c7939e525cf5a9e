//! Prefixes as disjoint ranges of addresses.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::model::Block;
use crate::ruleset::{Element, Family};

/// First and last address, as numbers.
pub(super) type Range = (u128, u128);

/// The addresses of a family that blocks and prefixes cover, as ranges that neither overlap nor touch.
pub(super) fn cover<'a>(
    blocks: impl Iterator<Item = &'a Block>,
    nets: impl Iterator<Item = IpNet>,
    family: Family,
) -> BTreeSet<Element> {
    let of = |net: &IpNet| matches!((net, family), (IpNet::V4(_), Family::V4) | (IpNet::V6(_), Family::V6));
    let mut ranges: Vec<Range> = nets.filter(of).map(|net| range(&net)).collect();
    for block in blocks.filter(|block| of(&block.net)) {
        // What is left out of one block may be let in by another.
        ranges.extend(subtract(
            range(&block.net),
            block.except.iter().filter(|net| of(net)).map(range).collect(),
        ));
    }
    join(ranges).into_iter().map(|range| element(family, range)).collect()
}

/// A range, as a set has it.
pub(super) fn element(family: Family, (first, last): Range) -> Element {
    let address = |number: u128| match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::from(number as u32)),
        Family::V6 => IpAddr::V6(Ipv6Addr::from(number)),
    };
    Element::Range(address(first), address(last))
}

/// Nobody needs to know how many there are beyond this.
const PIECES_MOST: usize = 1 << 20;

/// How many prefixes a block comes to without its exceptions: what the kernel makes of its ranges, and pays for.
pub(crate) fn pieces(block: &Block) -> usize {
    let bits = u32::from(block.net.max_prefix_len());
    let of = |net: &&IpNet| net.max_prefix_len() == block.net.max_prefix_len();
    let holes = block.except.iter().filter(of).map(range).collect();
    let mut count = 0;
    for (mut first, last) in subtract(range(&block.net), holes) {
        loop {
            count += 1;
            // The largest prefix that begins here and does not go beyond the end.
            let room = match (last - first).checked_add(1) {
                Some(size) => size.ilog2(),
                None => u128::BITS,
            };
            let size = first.trailing_zeros().min(bits).min(room);
            let next = 1_u128.checked_shl(size).and_then(|size| first.checked_add(size));
            match next {
                Some(next) if next <= last && count < PIECES_MOST => first = next,
                _ => break,
            }
        }
    }
    count
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address),
    }
}

pub(super) fn range(net: &IpNet) -> Range {
    (number(net.network()), number(net.broadcast()))
}

pub(super) fn join(mut ranges: Vec<Range>) -> Vec<Range> {
    ranges.sort_unstable();
    let mut joined: Vec<Range> = Vec::new();
    for (first, last) in ranges {
        match joined.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = (*end).max(last),
            _ => joined.push((first, last)),
        }
    }
    joined
}

fn subtract(whole: Range, holes: Vec<Range>) -> Vec<Range> {
    let (mut next, last) = whole;
    let mut left = Vec::new();
    for (from, to) in join(holes) {
        if from > last {
            break;
        }
        if from > next {
            left.push((next, from - 1));
        }
        match to.checked_add(1) {
            Some(after) if after <= last => next = next.max(after),
            _ => return left,
        }
    }
    left.push((next, last));
    left
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ranges(blocks: &[(&str, &[&str])], family: Family) -> Vec<String> {
        let blocks: Vec<Block> = blocks
            .iter()
            .map(|(net, except)| Block {
                net: net.parse().unwrap(),
                except: except.iter().map(|net| net.parse().unwrap()).collect(),
            })
            .collect();
        let text = |element| match element {
            Element::Range(first, last) => format!("{first}-{last}"),
            _ => unreachable!(),
        };
        cover(blocks.iter(), [].into_iter(), family).into_iter().map(text).collect()
    }

    #[test]
    fn holes_are_cut_and_neighbours_joined() {
        assert_eq!(
            ranges(&[("10.0.0.0/24", &["10.0.0.64/26", "10.0.0.128/25"])], Family::V4),
            ["10.0.0.0-10.0.0.63"]
        );
        assert_eq!(
            ranges(&[("10.0.0.0/25", &[]), ("10.0.0.128/25", &[])], Family::V4),
            ["10.0.0.0-10.0.0.255"]
        );
        assert_eq!(
            ranges(&[("0.0.0.0/0", &["255.255.255.255/32", "0.0.0.0/32"])], Family::V4),
            ["0.0.0.1-255.255.255.254"]
        );
        assert_eq!(
            ranges(&[("::/0", &["8000::/1"])], Family::V6),
            ["::-7fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"]
        );
        assert!(ranges(&[("0.0.0.0/0", &[])], Family::V6).is_empty());
        // Another block lets in again what one leaves out.
        assert_eq!(ranges(&[("10.0.0.0/24", &["10.0.0.0/25"]), ("10.0.0.0/26", &[])], Family::V4).len(), 2);
    }

    #[test]
    fn a_block_is_as_many_pieces_as_prefixes() {
        let count = |net: &str, except: &[&str]| {
            let except = except.iter().map(|net| net.parse().unwrap()).collect();
            pieces(&Block { net: net.parse().unwrap(), except })
        };
        assert_eq!(count("10.0.0.0/8", &[]), 1);
        assert_eq!(count("10.0.0.0/24", &["10.0.0.0/25"]), 1);
        assert_eq!(count("10.0.0.0/24", &["10.0.0.1/32"]), 8);
        assert_eq!((count("::/0", &[]), count("0.0.0.0/0", &[])), (1, 1));
        assert_eq!(count("::/0", &["2001:db8::1/128"]), 128);
        assert_eq!(count("0.0.0.0/0", &["0.0.0.0/0"]), 0);
        assert_eq!(count("10.0.0.0/8", &["2001:db8::1/128"]), 1, "of another family");
    }

    proptest! {
        #[test]
        fn an_address_is_covered_if_a_block_contains_it(
            blocks in prop::collection::vec((any::<u8>(), 24u8..=32, prop::collection::vec((any::<u8>(), 25u8..=32), 0..4)), 0..5),
            asked in any::<u8>(),
        ) {
            let net = |last: u8, length| IpNet::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, last)), length).unwrap().trunc();
            let blocks: Vec<Block> = blocks.into_iter().map(|(last, length, except)| Block {
                net: net(last, length),
                except: except.into_iter().map(|(last, length)| net(last, length)).collect(),
            }).collect();
            let asked = IpAddr::V4(Ipv4Addr::new(10, 0, 0, asked));
            let covered = cover(blocks.iter(), [].into_iter(), Family::V4).into_iter().any(|element| match element {
                Element::Range(first, last) => first <= asked && asked <= last,
                _ => false,
            });
            prop_assert_eq!(covered, blocks.iter().any(|block| block.contains(asked)));
        }
    }
}
