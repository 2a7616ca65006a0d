//! Whether bytes are a struct of certain fields in Thrift's compact protocol.

use std::io::Read;

use thrift::protocol::{TCompactInputProtocol, TFieldIdentifier, TInputProtocol, TType};
use thrift::{Error, ProtocolError, ProtocolErrorKind, Result};

/// How deep fields may be nested that nobody knows.
const DEPTH: u32 = 32;

/// What a field holds.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    Bool,
    I8,
    I16,
    I32,
    I64,
    Double,
    Binary,
    List(&'static Kind),
    /// Fields by number; there may be others.
    Struct(&'static [(i16, Kind)]),
}

impl Kind {
    fn of_thrift(self) -> TType {
        match self {
            Kind::Bool => TType::Bool,
            Kind::I8 => TType::I08,
            Kind::I16 => TType::I16,
            Kind::I32 => TType::I32,
            Kind::I64 => TType::I64,
            Kind::Double => TType::Double,
            Kind::Binary => TType::String,
            Kind::List(_) => TType::List,
            Kind::Struct(_) => TType::Struct,
        }
    }
}

/// That a struct begins here, that its `fields` are of their types, and that collections are as long as they claim. What is in
/// fields of other numbers is free, but for collections of booleans, which some readers expect in no bytes at all.
///
/// # Errors
/// It is not so, or cannot be read.
pub(crate) fn check(from: impl Read, fields: &[(i16, Kind)]) -> Result<()> {
    structure(&mut TCompactInputProtocol::new(from), fields, DEPTH)
}

fn structure(input: &mut impl TInputProtocol, fields: &[(i16, Kind)], depth: u32) -> Result<()> {
    input.read_struct_begin()?;
    loop {
        let TFieldIdentifier { field_type, id, .. } = input.read_field_begin()?;
        if field_type == TType::Stop {
            return input.read_struct_end();
        }
        match fields.iter().find(|(known, _)| Some(*known) == id) {
            Some((_, kind)) => {
                expect(*kind, field_type)?;
                value(input, *kind, depth)?;
            }
            None => unknown(input, field_type, depth)?,
        }
    }
}

fn value(input: &mut impl TInputProtocol, kind: Kind, depth: u32) -> Result<()> {
    match kind {
        Kind::List(element) => {
            let list = input.read_list_begin()?;
            // Of an empty list some writers do not say of what.
            if list.size > 0 {
                expect(*element, list.element_type)?;
            }
            (0..list.size).try_for_each(|_| value(input, *element, depth))
        }
        Kind::Struct(fields) => structure(input, fields, depth),
        plain => unknown(input, plain.of_thrift(), depth),
    }
}

/// Something of which only its type is known.
fn unknown(input: &mut impl TInputProtocol, of: TType, depth: u32) -> Result<()> {
    let Some(depth) = depth.checked_sub(1) else {
        return Err(invalid("fields are nested too deep".to_owned()));
    };
    match of {
        TType::Struct => structure(input, &[], depth),
        TType::List | TType::Set => {
            let list = input.read_list_begin()?;
            if list.size > 0 {
                countable(list.element_type)?;
            }
            (0..list.size).try_for_each(|_| unknown(input, list.element_type, depth))
        }
        TType::Map => {
            let map = input.read_map_begin()?;
            let (Some(key), Some(of)) = (map.key_type, map.value_type) else {
                return Ok(());
            };
            countable(key)?;
            countable(of)?;
            (0..map.size).try_for_each(|_| {
                unknown(input, key, depth)?;
                unknown(input, of, depth)
            })
        }
        plain => input.skip(plain),
    }
}

/// That elements of a collection take bytes in the eyes of every reader.
fn countable(element: TType) -> Result<()> {
    match element {
        TType::Bool => Err(invalid("an unknown collection of booleans".to_owned())),
        _ => Ok(()),
    }
}

fn expect(kind: Kind, found: TType) -> Result<()> {
    if found == kind.of_thrift() {
        return Ok(());
    }
    let expected = kind.of_thrift();
    Err(invalid(format!("{found:?} where {expected:?} belongs")))
}

fn invalid(message: String) -> Error {
    Error::Protocol(ProtocolError::new(ProtocolErrorKind::InvalidData, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIELDS: &[(i16, Kind)] = &[(1, Kind::I32), (2, Kind::List(&Kind::Binary))];

    /// A struct with a field 100, which nobody knows, of Thrift's type `of`.
    fn unknown_field(of: u8, field: &[u8]) -> Vec<u8> {
        [&[of, 200, 1], field, &[0]].concat()
    }

    fn holds(bytes: &[u8]) -> bool {
        check(bytes, FIELDS).is_ok()
    }

    #[test]
    fn unknown_collections_are_as_long_as_they_claim_and_not_of_booleans() {
        const MOST: [u8; 5] = [255, 255, 255, 255, 7];
        let (list, map) = (9, 11);
        let endless = [&[0xf2], &MOST[..]].concat();
        assert!(!holds(&unknown_field(list, &endless)));
        assert!(!holds(&unknown_field(
            list,
            &[&[0x19], &endless[..]].concat()
        )));
        assert!(!holds(&unknown_field(list, &[&[0xf5], &MOST[..]].concat())));
        assert!(!holds(&unknown_field(map, &[&MOST[..], &[0x52]].concat())));
        assert!(!holds(&unknown_field(list, &[0x22, 1, 2])));

        assert!(holds(&unknown_field(list, &[0x25, 1, 2])));
        assert!(holds(&unknown_field(map, &[0])));
        // As some writers have an empty list.
        assert!(holds(&unknown_field(list, &[0])));
        assert!(holds(&unknown_field(1, &[])));
        assert!(!holds(&[]));
    }

    #[test]
    fn known_fields_are_of_their_types() {
        assert!(holds(&[0x15, 7, 0x19, 0x18, 1, b'a', 0]));
        assert!(holds(&[0x15, 7, 0x19, 0, 0]));
        assert!(!holds(&[0x18, 1, b'a', 0]));
        assert!(!holds(&[0x29, 0x15, 7, 0]));
        let nested = [vec![0x1c; 100], vec![0; 101]].concat();
        assert!(!holds(&nested));
    }
}
