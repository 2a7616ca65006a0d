//! Bits that are a function of a key and an index: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), entered at any place.
//!
//! Random rounding and fingerprints draw from it, on the host, in libtorch and in CUDA alike, so that neither depends on
//! who computes which part of a buffer.

/// By how much the state of SplitMix64 grows from one index to the next: 2^64 divided by the golden ratio.
pub const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// The steps of the output function: x becomes x ^ (x >> shift), and is multiplied by the factor. The last is only
/// shifted.
pub const ROUNDS: [(u32, u64); 3] = [
    (30, 0xbf58_476d_1ce4_e5b9),
    (27, 0x94d0_49bb_1331_11eb),
    (31, 1),
];

/// The number at `index` in the sequence of `key`.
pub fn number(key: u64, index: u64) -> u64 {
    let state = key.wrapping_add(index.wrapping_mul(STEP));
    ROUNDS.iter().fold(state, |x, &(shift, factor)| {
        (x ^ (x >> shift)).wrapping_mul(factor)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first numbers of the published generator with seed 1234567, whose state grows before each.
    #[test]
    fn it_is_splitmix64() {
        let published = [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
        ];
        assert_eq!([1, 2, 3].map(|index| number(1_234_567, index)), published);
    }
}
