//! The order of windows: computed, random access, constant memory, and kind to compressed files.
//!
//! A pass cuts the windows into blocks of 64 consecutive ones, permutes the full blocks, takes 16 of them at a time as a
//! pool, and permutes the windows inside each pool. A reader that holds one pool decodes every block once. The partial
//! block at the end of the dataset belongs to the last pool. Each pass and each pool has its own keyed permutation.

use std::ops::Range;

/// Windows per block.
const BLOCK: u64 = 64;
/// Blocks per pool.
const POOL_BLOCKS: u64 = 16;
/// Windows per pool, except the last one's.
const POOL: u64 = BLOCK * POOL_BLOCKS;
/// Rounds of the Feistel network; pairs of halves are well mixed after four.
const ROUNDS: usize = 8;

/// The order of one dataset: pass `p` is samples `p * windows .. (p + 1) * windows`.
#[derive(Clone, Debug)]
pub(super) struct Order {
    windows: u64,
    key: [u8; 32],
}

/// The part of a pass that a reader holds at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Number of the pool, running on over passes.
    pub number: u64,
    /// The samples drawn from it: all of them, and only they.
    pub samples: Range<u64>,
    /// The windows it covers, one range per block, in the order of the block permutation.
    pub blocks: Vec<Range<u64>>,
}

/// Where a sample stands: its pass, the pool inside the pass, its offset inside the pool.
struct Place {
    pass: u64,
    pool: u64,
    offset: u64,
}

impl Order {
    /// The order of `windows` windows, keyed by what identifies them and the recipe's seed.
    pub(super) fn new(
        windows: u64,
        manifest_hash: [u8; 32],
        sequence_length: u64,
        seed: u64,
    ) -> Order {
        let mut hasher = blake3::Hasher::new_derive_key("supra plan 1: order of windows");
        hasher.update(&manifest_hash);
        hasher.update(&sequence_length.to_le_bytes());
        hasher.update(&seed.to_le_bytes());
        Order {
            windows: windows.max(1),
            key: *hasher.finalize().as_bytes(),
        }
    }

    /// The window that `sample` is.
    pub(super) fn window(&self, sample: u64) -> u64 {
        let place = self.place(sample);
        let blocks = self.pool_blocks(place.pool);
        let full = blocks.end - blocks.start;
        let inside = self
            .permutation(place.pass, 1 + place.pool, self.pool_windows(place.pool))
            .apply(place.offset);
        if inside / BLOCK < full {
            let block = self
                .permutation(place.pass, 0, self.full_blocks())
                .apply(blocks.start + inside / BLOCK);
            block * BLOCK + inside % BLOCK
        } else {
            self.full_blocks() * BLOCK + (inside - full * BLOCK)
        }
    }

    /// The pool of `sample`, with everything a reader needs to fetch it.
    pub(super) fn pool_of(&self, sample: u64) -> Pool {
        let place = self.place(sample);
        let full = self.full_blocks();
        let permutation = self.permutation(place.pass, 0, full);
        let mut blocks: Vec<Range<u64>> = self
            .pool_blocks(place.pool)
            .map(|block| permutation.apply(block) * BLOCK)
            .map(|first| first..first + BLOCK)
            .collect();
        if place.pool + 1 == self.pools() && full * BLOCK < self.windows {
            blocks.push(full * BLOCK..self.windows);
        }
        let first = sample - place.offset;
        Pool {
            number: place
                .pass
                .saturating_mul(self.pools())
                .saturating_add(place.pool),
            samples: first..first.saturating_add(self.pool_windows(place.pool)),
            blocks,
        }
    }

    fn place(&self, sample: u64) -> Place {
        let (pass, within) = (sample / self.windows, sample % self.windows);
        let pool = (within / POOL).min(self.pools() - 1);
        Place {
            pass,
            pool,
            offset: within - pool * POOL,
        }
    }

    fn full_blocks(&self) -> u64 {
        self.windows / BLOCK
    }

    fn pools(&self) -> u64 {
        self.full_blocks().div_ceil(POOL_BLOCKS).max(1)
    }

    /// Places in the block permutation that make up pool `pool`.
    fn pool_blocks(&self, pool: u64) -> Range<u64> {
        pool * POOL_BLOCKS..((pool + 1) * POOL_BLOCKS).min(self.full_blocks())
    }

    fn pool_windows(&self, pool: u64) -> u64 {
        if pool + 1 == self.pools() {
            self.windows - pool * POOL
        } else {
            POOL
        }
    }

    /// The permutation `number` of pass `pass`: 0 orders the blocks, `1 + p` the windows of pool `p`.
    fn permutation(&self, pass: u64, number: u64, size: u64) -> Permutation {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(&pass.to_le_bytes());
        hasher.update(&number.to_le_bytes());
        let mut bytes = [0; 8 * ROUNDS];
        hasher.finalize_xof().fill(&mut bytes);
        let mut keys = [0; ROUNDS];
        for (key, chunk) in keys.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *key = u64::from_le_bytes(*chunk);
        }
        Permutation::new(size, keys)
    }
}

/// A keyed bijection of `0..size`: a balanced Feistel network on the next even number of bits, walked along its cycle
/// until it comes back into range.
struct Permutation {
    size: u64,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    fn new(size: u64, keys: [u64; ROUNDS]) -> Permutation {
        let bits = u64::BITS - size.saturating_sub(1).leading_zeros();
        Permutation {
            size,
            half_bits: bits.div_ceil(2).max(1),
            keys,
        }
    }

    /// The image of `index`, which is below `size`.
    fn apply(&self, index: u64) -> u64 {
        let mut image = self.network(index);
        // The network has fewer than 4 * size points (8 for tiny sizes), so the walk is short; it ends because the cycle
        // through `index` contains at least `index` itself.
        while image >= self.size {
            image = self.network(image);
        }
        image
    }

    fn network(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        (left << self.half_bits) | right
    }
}

/// A 64-bit finaliser: every input bit reaches every output bit (the constants are those of SplitMix64).
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
