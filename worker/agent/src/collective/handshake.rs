//! Proof that a connection belongs to this generation.
//!
//! Both ends know the generation's random key and show it without sending it:
//!
//! 1. the caller sends who it is, whom it wants, and a nonce;
//! 2. the listener answers with a nonce of its own and a MAC over both;
//! 3. the caller answers with a MAC over the same under another label.

use std::io::{self, Read, Write};

const MAGIC: [u8; 8] = *b"supra\0r1";
const NONCE: usize = 32;
const MAC: usize = 32;
const HELLO: usize = MAGIC.len() + 8 + 4 + 4 + 4 + NONCE;

/// One directed connection of a generation's ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Edge {
    pub generation: u64,
    pub world: u32,
    /// Rank that connects, and then sends.
    pub from: u32,
    /// Rank that accepts, and then receives.
    pub to: u32,
}

/// The caller's part.
pub(super) fn call(stream: &mut (impl Read + Write), key: &[u8; 32], edge: Edge) -> io::Result<()> {
    let hello = encode(edge, rand::random());
    stream.write_all(&hello)?;
    let mut answer = [0; NONCE + MAC];
    stream
        .read_exact(&mut answer)
        .map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => io::Error::new(
                io::ErrorKind::ConnectionRefused,
                "it hung up: it is of another generation, or no worker of this run",
            ),
            _ => error,
        })?;
    let (nonce, mac) = answer.split_at(NONCE);
    if blake3::Hash::from_slice(mac).is_ok_and(|mac| mac == proof(key, b"listener", &hello, nonce))
    {
        stream.write_all(proof(key, b"caller", &hello, nonce).as_bytes())
    } else {
        Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "it does not know the key of this generation",
        ))
    }
}

/// The listener's part: refuses everybody but the one expected.
pub(super) fn answer(
    stream: &mut (impl Read + Write),
    key: &[u8; 32],
    expected: Edge,
) -> io::Result<()> {
    let refuse = |why: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    let mut hello = [0; HELLO];
    stream.read_exact(&mut hello)?;
    match decode(&hello) {
        Some(edge) if edge == expected => {}
        Some(edge) => return refuse(format!("expected {expected:?}, got {edge:?}")),
        None => return refuse("it does not speak this protocol".to_owned()),
    }
    let nonce: [u8; NONCE] = rand::random();
    let mut answer = nonce.to_vec();
    answer.extend_from_slice(proof(key, b"listener", &hello, &nonce).as_bytes());
    stream.write_all(&answer)?;
    let mut mac = [0; MAC];
    stream.read_exact(&mut mac)?;
    if blake3::Hash::from_bytes(mac) == proof(key, b"caller", &hello, &nonce) {
        Ok(())
    } else {
        refuse("it does not know the key of this generation".to_owned())
    }
}

/// The two labels keep one end's proof from being played back as the other's.
fn proof(key: &[u8; 32], label: &[u8], hello: &[u8; HELLO], nonce: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(hello).update(nonce).update(label);
    hasher.finalize()
}

fn encode(edge: Edge, nonce: [u8; NONCE]) -> [u8; HELLO] {
    let mut hello = [0; HELLO];
    let parts: [&[u8]; 6] = [
        &MAGIC,
        &edge.generation.to_le_bytes(),
        &edge.world.to_le_bytes(),
        &edge.from.to_le_bytes(),
        &edge.to.to_le_bytes(),
        &nonce,
    ];
    let mut rest = &mut hello[..];
    for part in parts {
        let (head, tail) = rest.split_at_mut(part.len());
        head.copy_from_slice(part);
        rest = tail;
    }
    hello
}

fn decode(hello: &[u8; HELLO]) -> Option<Edge> {
    let rest = hello.strip_prefix(&MAGIC)?;
    let (generation, rest) = rest.split_first_chunk()?;
    let (world, rest) = rest.split_first_chunk()?;
    let (from, rest) = rest.split_first_chunk()?;
    let (to, _nonce) = rest.split_first_chunk()?;
    Some(Edge {
        generation: u64::from_le_bytes(*generation),
        world: u32::from_le_bytes(*world),
        from: u32::from_le_bytes(*from),
        to: u32::from_le_bytes(*to),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    const EDGE: Edge = Edge {
        generation: 3,
        world: 4,
        from: 1,
        to: 2,
    };

    /// Both results of a handshake between a caller and a listener.
    fn meet(
        caller: ([u8; 32], Edge),
        listener: ([u8; 32], Edge),
    ) -> (io::Result<()>, io::Result<()>) {
        let (mut a, mut b) = UnixStream::pair().unwrap();
        let listening = std::thread::spawn(move || answer(&mut b, &listener.0, listener.1));
        let called = call(&mut a, &caller.0, caller.1);
        drop(a);
        (called, listening.join().unwrap())
    }

    #[test]
    fn the_same_key_and_edge_meet() {
        let (caller, listener) = meet(([1; 32], EDGE), ([1; 32], EDGE));
        caller.unwrap();
        listener.unwrap();
    }

    #[test]
    fn another_key_is_refused_on_both_ends() {
        let (caller, listener) = meet(([1; 32], EDGE), ([2; 32], EDGE));
        assert!(
            caller
                .unwrap_err()
                .to_string()
                .contains("does not know the key")
        );
        assert!(listener.is_err());
    }

    #[test]
    fn another_generation_or_rank_is_refused() {
        for other in [
            Edge {
                generation: 2,
                ..EDGE
            },
            Edge { from: 0, ..EDGE },
            Edge { world: 3, ..EDGE },
        ] {
            let (caller, listener) = meet(([1; 32], other), ([1; 32], EDGE));
            assert!(caller.unwrap_err().to_string().contains("hung up"));
            assert!(listener.is_err());
        }
    }

    #[test]
    fn a_foreign_protocol_is_refused() {
        let (mut a, mut b) = UnixStream::pair().unwrap();
        a.write_all(&[b'x'; HELLO]).unwrap();
        let error = answer(&mut b, &[1; 32], EDGE).unwrap_err();
        assert!(error.to_string().contains("does not speak"), "{error}");
    }
}
