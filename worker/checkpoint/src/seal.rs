//! JSON files that prove themselves: the last member of the object is the BLAKE3 of everything before its line.
//!
//! `head -n -2 FILE | b3sum` gives the same hash.

use serde::{Deserialize, Serialize};

/// Begins the line of the hash.
const KEY: &str = "  \"blake3\": \"";

/// The bytes of a file that holds the members of `value`, which has to be an object with some, and their hash.
pub fn seal(value: &impl Serialize) -> Vec<u8> {
    let text = serde_json::to_string_pretty(value).expect("invariant: only string keys");
    let members = text
        .strip_suffix("\n}")
        .expect("invariant: an object with members");
    let mut text = format!("{members},\n");
    let hash = blake3::hash(text.as_bytes());
    text += &format!("{KEY}{hash}\"\n}}\n");
    text.into_bytes()
}

/// Proves the bytes of a file whose `format` says, from `since` on, that it is sealed; an older one may have no hash.
///
/// # Errors
/// What is wrong with it, in words that follow its name.
pub fn check(bytes: &[u8], since: u32) -> Result<(), String> {
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    let Format { format } =
        serde_json::from_slice(bytes).map_err(|error| format!("it is damaged: {error}"))?;
    let text = std::str::from_utf8(bytes).map_err(|error| format!("it is damaged: {error}"))?;
    match text.rfind(KEY) {
        None if format < since => Ok(()),
        None => Err("it is damaged: its hash is missing".to_owned()),
        Some(_) if format < since => {
            Err("it is damaged: its format is older than its hash".to_owned())
        }
        Some(place) => {
            let (members, line) = text.split_at(place);
            let hash = blake3::hash(members.as_bytes());
            match line == format!("{KEY}{hash}\"\n}}\n") {
                true => Ok(()),
                false => Err("it is damaged: it is not what its hash says".to_owned()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    struct Small {
        format: u32,
        text: String,
    }

    fn small(format: u32) -> Small {
        // A value may look like the hash.
        let text = "x,\n  \"blake3\": \"".to_owned();
        Small { format, text }
    }

    #[test]
    fn any_bit_that_turns_and_any_cut_is_found() {
        let bytes = seal(&small(2));
        check(&bytes, 2).unwrap();
        assert_eq!(serde_json::from_slice::<Small>(&bytes).unwrap(), small(2));
        for place in 0..bytes.len() {
            check(&bytes[..place], 2).unwrap_err();
            for bit in 0..8 {
                let mut other = bytes.clone();
                other[place] ^= 1 << bit;
                check(&other, 2).unwrap_err();
            }
        }
        check(&[&bytes[..], b"\n"].concat(), 2).unwrap_err();
    }

    #[test]
    fn files_of_older_builds_have_no_hash() {
        let old = serde_json::to_vec_pretty(&small(1)).unwrap();
        check(&old, 2).unwrap();
        check(&old, 1).unwrap_err();
        // What has one is not of an older build, whatever it says.
        check(&seal(&small(1)), 2).unwrap_err();
    }
}
