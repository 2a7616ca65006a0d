//! One hash per row of what no chain of hashes covers: a row that was changed does not have it.

use crate::ledger::Hash;
use crate::machine::RunNumber;

/// Of a row of `facts`.
pub fn of_fact(seq: u64, run: RunNumber, fact: &str) -> Hash {
    of(b"fact", &[seq, u64::from(run)], fact)
}

/// Of the row of `snapshot`.
pub fn of_snapshot(seq: u64, format: i64, state: &str) -> Hash {
    of(b"snapshot", &[seq, format.cast_unsigned()], state)
}

fn of(table: &[u8], numbers: &[u64], text: &str) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(table);
    for number in numbers {
        hasher.update(&number.to_le_bytes());
    }
    hasher.update(text.as_bytes());
    *hasher.finalize().as_bytes()
}
