//! The Internet checksum (RFC 1071): the one's complement of the one's complement sum of 16-bit words.

use crate::sys::checksum::sum_words;

/// What [`sum_words`] computes, with instructions that every processor has.
#[inline(always)]
pub(crate) fn sum_portable(bytes: &[u8]) -> u64 {
    let mut sums = [0u128; 2];
    let (pairs, rest) = bytes.as_chunks::<16>();
    let mut add = |pair: &[u8; 16]| {
        for (sum, word) in sums.iter_mut().zip(pair.as_chunks::<8>().0) {
            *sum += u128::from(u64::from_ne_bytes(*word));
        }
    };
    pairs.iter().for_each(&mut add);
    let mut last = [0; 16];
    last[..rest.len()].copy_from_slice(rest);
    add(&last);
    let sum = sums[0] + sums[1];
    // As many 64-bit words as memory holds leave no more than that many in the upper half.
    let sum = u128::from(sum as u64) + (sum >> 64);
    let sum = (sum as u64).wrapping_add((sum >> 64) as u64);
    (sum & 0xffff_ffff) + (sum >> 32)
}

/// A one's complement sum under way. Order and grouping do not matter, but each part has to begin at an even offset.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes.
    #[inline]
    #[must_use]
    pub fn bytes(self, bytes: &[u8]) -> Self {
        Self(self.0 + sum_words(bytes))
    }

    /// Adds a few bytes, such as a header or an address.
    #[inline]
    #[must_use]
    pub fn few(self, bytes: &[u8]) -> Self {
        Self(self.0 + sum_portable(bytes))
    }

    /// Adds a word.
    #[inline]
    #[must_use]
    pub fn word(self, word: u16) -> Self {
        Self(self.0 + u64::from(word.to_be()))
    }

    /// Adds the pseudo header (RFC 9293, section 3.1; RFC 8200, section 8.1): both addresses as they stand one behind
    /// the other in the IP header, the protocol and the length of what follows the IP header.
    #[inline]
    #[must_use]
    pub fn pseudo(self, addresses: &[u8], protocol: u8, length: usize) -> Self {
        // A length beyond 16 bits is IPv6's, and is two words.
        self.few(addresses).word(protocol.into()).word(length as u16).word((length >> 16) as u16)
    }

    /// The folded sum, as it stands in a packet whose checksum is to be completed.
    #[inline]
    pub fn folded(self) -> [u8; 2] {
        (fold(self.0) as u16).to_ne_bytes()
    }

    /// The checksum, as it stands in a packet.
    #[inline]
    pub fn checksum(self) -> [u8; 2] {
        (!(fold(self.0) as u16)).to_ne_bytes()
    }

    /// Whether a checksum that was summed along is right.
    #[inline]
    pub fn is_right(self) -> bool {
        fold(self.0) == 0xffff
    }
}

#[inline(always)]
fn fold(mut sum: u64) -> u64 {
    sum = (sum >> 32) + (sum & 0xffff_ffff);
    sum = (sum >> 32) + (sum & 0xffff_ffff);
    sum = (sum >> 16) + (sum & 0xffff);
    sum = (sum >> 16) + (sum & 0xffff);
    (sum >> 16) + (sum & 0xffff)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    // Word by word, as RFC 1071 has it.
    fn reference(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    fn same(bytes: &[u8]) -> bool {
        let expected = reference(bytes).to_be_bytes();
        let equal = |found: [u8; 2]| found == expected || (found == [0, 0] && expected == [0xff, 0xff]);
        equal(Sum::default().bytes(bytes).checksum()) && equal(Sum::default().few(bytes).checksum())
    }

    #[test]
    fn every_length_and_alignment_gives_what_the_rfc_gives() {
        let bytes: Vec<u8> = (0..2200u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        for length in 0..2100 {
            for offset in [0, 1, 2, 3, 31] {
                assert!(same(&bytes[offset..offset + length]), "{length} bytes at {offset}");
            }
        }
    }

    #[test]
    fn the_largest_sums_do_not_overflow() {
        for length in [65_535, 65_536, 3_000_001] {
            assert!(same(&vec![0xff; length]));
        }
    }

    proptest! {
        #[test]
        fn parts_add_up(bytes in proptest::collection::vec(any::<u8>(), 0..3000), cut in any::<prop::sample::Index>()) {
            let cut = cut.index(bytes.len() + 1) & !1;
            let whole = Sum::default().bytes(&bytes);
            let parts = Sum::default().bytes(&bytes[cut..]).few(&bytes[..cut]);
            prop_assert_eq!(whole.checksum(), parts.checksum());
            prop_assert!(same(&bytes));
        }
    }
}
