//! Ways in which a file becomes another one.

use std::fmt;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// Most bytes that are lost or added together: a sector of a disk.
const SECTOR: usize = 512;

/// What happened to a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Damage {
    /// One bit at this place turned.
    Flip { place: usize, bit: u8 },
    /// One byte became another.
    Byte { place: usize, value: u8 },
    /// Some bytes became zeros.
    Zeros { place: usize, length: usize },
    /// The file ends early.
    Cut { length: usize },
    /// Bytes were added at the end.
    Longer { more: Vec<u8> },
    /// Another file stands in its place.
    Swapped { other: usize },
}

impl Damage {
    /// Some damage of a file of so many bytes, beside which there are so many others.
    pub fn any(bytes: usize, others: usize, random: &mut ChaCha8Rng) -> Damage {
        let place = random.random_range(0..bytes.max(1));
        match random.random_range(0..10) {
            0..=3 => Damage::Flip {
                place,
                bit: random.random_range(0..8),
            },
            4 | 5 => Damage::Byte {
                place,
                value: random.random(),
            },
            6 => Damage::Zeros {
                place,
                length: random.random_range(1..=SECTOR),
            },
            7 => Damage::Cut { length: place },
            8 if others > 0 => Damage::Swapped {
                other: random.random_range(0..others),
            },
            _ => {
                let length = random.random_range(1..=SECTOR);
                Damage::Longer {
                    more: (0..length).map(|_| random.random()).collect(),
                }
            }
        }
    }

    /// The file as it is then.
    pub fn of(&self, bytes: &[u8], others: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        match self {
            Damage::Flip { place, bit } => {
                if let Some(byte) = bytes.get_mut(*place) {
                    *byte ^= 1 << bit;
                }
            }
            Damage::Byte { place, value } => {
                if let Some(byte) = bytes.get_mut(*place) {
                    *byte = *value;
                }
            }
            Damage::Zeros { place, length } => {
                let end = bytes.len().min(place + length);
                bytes[*place..end].fill(0);
            }
            Damage::Cut { length } => bytes.truncate(*length),
            Damage::Longer { more } => bytes.extend(more),
            Damage::Swapped { other } => bytes.clone_from(&others[*other]),
        }
        bytes
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Damage::Flip { place, bit } => write!(f, "bit {bit} of byte {place} turned"),
            Damage::Byte { place, value } => write!(f, "byte {place} became {value:#04x}"),
            Damage::Zeros { place, length } => write!(f, "{length} zeros from byte {place} on"),
            Damage::Cut { length } => write!(f, "cut to {length} bytes"),
            Damage::Longer { more } => write!(f, "{} more bytes", more.len()),
            Damage::Swapped { other } => write!(f, "swapped with file {other} of its kind"),
        }
    }
}
