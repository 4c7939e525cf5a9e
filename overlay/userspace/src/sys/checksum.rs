//! Summing with the widest instructions that the processor has.
#![allow(unsafe_code)]

use crate::offload::checksum::sum_portable;

/// A sum that is congruent, modulo 65,535, to that of the bytes as 16-bit words in the machine's byte order; an odd last
/// byte is padded with zero. Less than 2^34.
#[inline]
pub fn sum_words(bytes: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { sum_avx2(bytes) };
    }
    sum_portable(bytes)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2(bytes: &[u8]) -> u64 {
    use std::arch::x86_64::{
        __m256i, _mm256_add_epi64, _mm256_and_si256, _mm256_set1_epi64x, _mm256_setzero_si256,
        _mm256_srli_epi64,
    };

    // Each 64-bit lane takes 32-bit halves, so that it overflows only after 2^32 of them.
    let add = |sum: __m256i, word: &[u8; 32]| {
        let word = load(word);
        let low = _mm256_and_si256(word, _mm256_set1_epi64x(0xffff_ffff));
        _mm256_add_epi64(sum, _mm256_add_epi64(low, _mm256_srli_epi64(word, 32)))
    };
    let mut sums = [_mm256_setzero_si256(); 4];
    let (blocks, rest) = bytes.as_chunks::<128>();
    for block in blocks {
        for (sum, word) in sums.iter_mut().zip(block.as_chunks::<32>().0) {
            *sum = add(*sum, word);
        }
    }
    let (words, rest) = rest.as_chunks::<32>();
    for (sum, word) in sums.iter_mut().zip(words) {
        *sum = add(*sum, word);
    }
    if !rest.is_empty() {
        let mut last = [0; 32];
        last[..rest.len()].copy_from_slice(rest);
        sums[3] = add(sums[3], &last);
    }
    let sum = _mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]), _mm256_add_epi64(sums[2], sums[3]));
    lanes(sum).iter().map(|lane| (lane & 0xffff_ffff) + (lane >> 32)).sum()
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
fn load(word: &[u8; 32]) -> std::arch::x86_64::__m256i {
    // SAFETY: the load is unaligned, and the array is as long as a register.
    unsafe { std::arch::x86_64::_mm256_loadu_si256(word.as_ptr().cast()) }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
fn lanes(sum: std::arch::x86_64::__m256i) -> [u64; 4] {
    let mut lanes = [0; 4];
    // SAFETY: the store is unaligned, and the array is as long as a register.
    unsafe { std::arch::x86_64::_mm256_storeu_si256(lanes.as_mut_ptr().cast(), sum) };
    lanes
}
