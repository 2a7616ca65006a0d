//! The sum that proves what was fed: BLAKE3 of every sample, added modulo 2^256.

use std::fmt;
use std::ops::{Add, AddAssign};

/// A sum modulo 2^256 of BLAKE3 digests of samples, little-endian.
///
/// A sum, because it does not depend on order or on which rank fed which sample; and not xor, which hides a pair fed twice.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of nothing.
    pub const ZERO: Digest = Digest([0; 32]);

    /// The digest of sample `id` with its `sequence_length + 1` tokens: BLAKE3(id as u64 LE || tokens as u32 LE).
    pub fn of_sample(id: u64, tokens: &[u32]) -> Digest {
        let mut bytes = Vec::with_capacity(8 + 4 * tokens.len());
        bytes.extend_from_slice(&id.to_le_bytes());
        bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
        Digest(*blake3::hash(&bytes).as_bytes())
    }

    /// The 32 bytes, least significant first.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The digest with these bytes, least significant first.
    pub fn from_bytes(bytes: [u8; 32]) -> Digest {
        Digest(bytes)
    }
}

impl Add for Digest {
    type Output = Digest;

    fn add(self, other: Digest) -> Digest {
        let mut sum = [0; 32];
        let mut carry = 0u16;
        for (byte, (a, b)) in sum.iter_mut().zip(self.0.iter().zip(other.0)) {
            let total = u16::from(*a) + u16::from(b) + carry;
            *byte = total as u8;
            carry = total >> 8;
        }
        Digest(sum)
    }
}

impl AddAssign for Digest {
    fn add_assign(&mut self, other: Digest) {
        *self = *self + other;
    }
}

impl std::iter::Sum for Digest {
    fn sum<I: Iterator<Item = Digest>>(digests: I) -> Digest {
        digests.fold(Digest::ZERO, Add::add)
    }
}

impl fmt::Display for Digest {
    /// 64 hexadecimal digits in byte order.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}
