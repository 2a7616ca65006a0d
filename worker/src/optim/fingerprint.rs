//! What tells two flat buffers apart, whichever parts they are held in.

use tch::{Kind, Tensor};

use super::chunks;

/// The sum, modulo 2^64, over all numbers of a flat fp32 or bf16 buffer, of a hash of the number and its index, `first`
/// being that of the first. Fingerprints of parts therefore add up to that of the whole.
pub fn fingerprint(flat_m: &Tensor, first: i64) -> u64 {
    let mut host = Vec::new();
    let mut sum = 0u64;
    for (start, length) in chunks(flat_m.size()[0]) {
        host.resize(length as usize, 0f32);
        flat_m
            .narrow(0, start, length)
            .to_kind(Kind::Float)
            .copy_data(&mut host, length as usize);
        for (number, index) in host.iter().zip((first + start).cast_unsigned()..) {
            sum = sum.wrapping_add(mix(index << 32 ^ u64::from(number.to_bits())));
        }
    }
    sum
}

/// A bijection that spreads every bit over all others (the finalizer of SplitMix64, Steele, Lea and Flood 2014).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
