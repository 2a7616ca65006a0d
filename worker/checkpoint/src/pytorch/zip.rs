//! The container: a zip archive whose records are stored as they are, because PyTorch reads them by memory mapping. Only its
//! central directory is read, which stands at the end; sizes and places of 64 bits are understood.

use std::{
    collections::BTreeMap,
    io::{Read, Seek, SeekFrom},
};

use super::Fault;

/// A directory or pickle beyond this is none that weights need.
const LARGEST: u64 = 256 << 20;

/// "End of central directory", without the comment.
const END: u64 = 22;
/// Its 64-bit form, and the pointer to that.
const END_64: u64 = 56;
const LOCATOR: u64 = 20;
const LOCAL: u64 = 30;
const CENTRAL: usize = 46;

/// The bytes of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Byte of the file at which they begin.
    pub start: u64,
    /// How many there are.
    pub bytes: u64,
    /// What the archive says is their CRC-32, if it keeps any.
    pub crc: Option<u32>,
}

/// A line of the central directory.
struct Entry {
    header: u64,
    bytes: u64,
    crc: u32,
    /// Neither compressed nor encrypted.
    plain: bool,
}

/// All records of an archive.
pub struct Directory {
    entries: BTreeMap<String, Entry>,
    /// Where the directory itself begins: records end before it.
    start: u64,
}

impl Directory {
    /// Reads the central directory.
    ///
    /// # Errors
    /// When the file is no zip archive or its directory contradicts itself.
    pub fn read(reader: &mut (impl Read + Seek)) -> Result<Directory, Fault> {
        let length = reader.seek(SeekFrom::End(0))?;
        let head = read_at(reader, 0, length.min(512))?;
        if is_legacy(&head) {
            return Err(Fault::Legacy);
        }
        if !head.starts_with(b"PK\x03\x04") {
            return Err(Fault::Unfit(format!(
                "not a file of PyTorch's: {}",
                match head.starts_with(b"version https://git-lfs") {
                    true =>
                        "a pointer of Git LFS, which stands for the file; `git lfs pull` downloads it",
                    false => "it does not begin as a zip archive does",
                }
            )));
        }
        let (start, bytes, count) = find_directory(reader, length)?;
        if bytes > LARGEST {
            return Err(damaged(format!("its directory has {bytes} bytes")));
        }
        let text = read_at(reader, start, bytes)?;
        let mut entries = BTreeMap::new();
        let mut rest = text.as_slice();
        while !rest.is_empty() {
            let (name, entry, after) =
                central_entry(rest).ok_or_else(|| damaged("its directory cannot be read"))?;
            if entries.insert(name, entry).is_some() {
                return Err(damaged("it holds a record twice"));
            }
            rest = after;
        }
        if entries.len() as u64 != count {
            let found = entries.len();
            return Err(damaged(format!(
                "its directory lists {found} records, its end speaks of {count}"
            )));
        }
        Ok(Directory { entries, start })
    }

    /// Whether the archive keeps the CRC-32 of its records. PyTorch can be told not to compute them, and then writes zeros.
    pub fn has_checksums(&self) -> bool {
        self.entries.values().any(|entry| entry.crc != 0)
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The place of a record, from its own header. None if there is none of this name.
    ///
    /// # Errors
    /// When the header differs from the directory, or the record is compressed.
    pub fn find(
        &self,
        reader: &mut (impl Read + Seek),
        name: &str,
    ) -> Result<Option<Record>, Fault> {
        let Some(entry) = self.entries.get(name) else {
            return Ok(None);
        };
        if !entry.plain {
            return Err(Fault::Unfit(format!(
                "its record `{name}` is compressed or encrypted, which torch.save never does. Save it again with torch.save"
            )));
        }
        let beyond = || damaged(format!("its record `{name}` lies outside of the file"));
        let names = entry.header.checked_add(LOCAL).ok_or_else(beyond)?;
        if names > self.start {
            return Err(beyond());
        }
        let header = read_at(reader, entry.header, LOCAL)?;
        let (named, extra) = (u16_at(&header, 26), u16_at(&header, 28));
        let (Some(named), Some(extra), true) = (named, extra, header.starts_with(b"PK\x03\x04"))
        else {
            return Err(damaged(format!("its record `{name}` has no header")));
        };
        let start = names + named + extra;
        if start
            .checked_add(entry.bytes)
            .is_none_or(|end| end > self.start)
        {
            return Err(beyond());
        }
        if read_at(reader, names, named)? != name.as_bytes() {
            return Err(damaged(format!(
                "its record `{name}` has another name in its header"
            )));
        }
        Ok(Some(Record {
            start,
            bytes: entry.bytes,
            crc: self.has_checksums().then_some(entry.crc),
        }))
    }
}

/// Reads a whole small record and compares its CRC-32.
///
/// # Errors
/// When it is too large or not what was written.
pub fn read_record(
    reader: &mut (impl Read + Seek),
    record: &Record,
    name: &str,
) -> Result<Vec<u8>, Fault> {
    if record.bytes > LARGEST {
        let bytes = record.bytes;
        return Err(Fault::Unfit(format!(
            "its record `{name}` has {bytes} bytes, far more than weights need"
        )));
    }
    let bytes = read_at(reader, record.start, record.bytes)?;
    check(crc32fast::hash(&bytes), record)?;
    Ok(bytes)
}

/// Reads a record in pieces and compares its CRC-32.
///
/// # Errors
/// When it is not what was written.
pub fn verify(reader: &mut (impl Read + Seek), record: &Record) -> Result<(), Fault> {
    let mut hasher = crc32fast::Hasher::new();
    let mut done = 0;
    while done < record.bytes {
        let bytes = read_at(
            reader,
            record.start + done,
            (record.bytes - done).min(1 << 20),
        )?;
        hasher.update(&bytes);
        done += bytes.len() as u64;
    }
    check(hasher.finalize(), record)
}

/// Whether a record is what was written.
///
/// # Errors
/// When it is not.
pub fn check(found: u32, record: &Record) -> Result<(), Fault> {
    match record.crc {
        Some(written) if written != found => Err(damaged(format!(
            "the record at byte {} has the CRC-32 {found:08x}, it was written as {written:08x}",
            record.start
        ))),
        _ => Ok(()),
    }
}

/// Reads bytes that are known to lie inside of the file.
pub(super) fn read_at(
    reader: &mut (impl Read + Seek),
    start: u64,
    bytes: u64,
) -> Result<Vec<u8>, Fault> {
    let bytes = usize::try_from(bytes).map_err(|_| damaged("a record is larger than memory"))?;
    let mut buffer = vec![0; bytes];
    reader.seek(SeekFrom::Start(start))?;
    reader.read_exact(&mut buffer)?;
    Ok(buffer)
}

/// Begin, bytes and records of the central directory.
fn find_directory(reader: &mut (impl Read + Seek), length: u64) -> Result<(u64, u64, u64), Fault> {
    let truncated = || damaged("it ends early");
    let tail_length = length.min(LOCATOR + END + u64::from(u16::MAX));
    let tail = read_at(reader, length - tail_length, tail_length)?;
    let (at, end) = (0..=tail.len().saturating_sub(END as usize))
        .rev()
        .find_map(|at| {
            let end = &tail[at..];
            let comment = u16_at(end, 20)?;
            let whole = comment + END == end.len() as u64;
            (whole && end.starts_with(b"PK\x05\x06")).then_some((at, end))
        })
        .ok_or_else(truncated)?;
    let position = length - tail_length + at as u64;
    let locator = at
        .checked_sub(LOCATOR as usize)
        .and_then(|at| tail.get(at..))
        .filter(|locator| locator.starts_with(b"PK\x06\x07"));
    let (start, bytes, count) = match locator.and_then(|locator| u64_at(locator, 8)) {
        Some(place) => {
            if place
                .checked_add(END_64 + LOCATOR)
                .is_none_or(|end| end > position)
            {
                return Err(truncated());
            }
            let wide = read_at(reader, place, END_64)?;
            if !wide.starts_with(b"PK\x06\x06") {
                return Err(truncated());
            }
            (u64_at(&wide, 48), u64_at(&wide, 40), u64_at(&wide, 32))
        }
        None => (u32_at(end, 16), u32_at(end, 12), u16_at(end, 10)),
    };
    let (Some(start), Some(bytes), Some(count)) = (start, bytes, count) else {
        return Err(truncated());
    };
    match start.checked_add(bytes) {
        Some(end) if end <= position => Ok((start, bytes, count)),
        _ => Err(truncated()),
    }
}

/// The first entry of a directory, and what follows it.
fn central_entry(text: &[u8]) -> Option<(String, Entry, &[u8])> {
    if !text.starts_with(b"PK\x01\x02") {
        return None;
    }
    let wide = u64::from(u32::MAX);
    let (flags, method) = (u16_at(text, 8)?, u16_at(text, 10)?);
    let [mut packed, mut bytes, mut header] =
        [u32_at(text, 20)?, u32_at(text, 24)?, u32_at(text, 42)?];
    let name_end = CENTRAL + u16_at(text, 28)? as usize;
    let extra_end = name_end + u16_at(text, 30)? as usize;
    let end = extra_end + u16_at(text, 32)? as usize;
    let name = std::str::from_utf8(text.get(CENTRAL..name_end)?).ok()?;
    let mut extra = text.get(name_end..extra_end)?;
    while !extra.is_empty() {
        let (tag, size) = (u16_at(extra, 0)?, u16_at(extra, 2)? as usize);
        let body = extra.get(4..4 + size)?;
        if tag == 1 {
            // Only what does not fit 32 bits stands here, in this order.
            let mut at = 0;
            for value in [&mut bytes, &mut packed, &mut header] {
                if *value == wide {
                    *value = u64_at(body, at)?;
                    at += 8;
                }
            }
        }
        extra = &extra[4 + size..];
    }
    let entry = Entry {
        header,
        bytes,
        crc: u32_at(text, 16)? as u32,
        plain: method == 0 && packed == bytes && flags & 1 == 0,
    };
    Some((name.to_owned(), entry, text.get(end..)?))
}

/// Whether a file begins as PyTorch's did before it used zip archives: a tar archive, or a magic number in a pickle.
fn is_legacy(head: &[u8]) -> bool {
    const MAGIC: &[u8] = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
    let tar = head.get(257..262) == Some(b"ustar");
    let pickled = head.first() == Some(&0x80);
    tar || pickled && head.windows(MAGIC.len()).any(|window| window == MAGIC)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + 2)?.try_into().ok()?;
    Some(u64::from(u16::from_le_bytes(bytes)))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(u64::from(u32::from_le_bytes(bytes)))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + 8)?.try_into().ok()?;
    Some(u64::from_le_bytes(bytes))
}

fn damaged(problem: impl Into<String>) -> Fault {
    Fault::Damaged(problem.into())
}
