//! NTFS, the lower half: file records, their attributes, and streams of bytes in runs of units.

use super::{Found, Volume, doubt, u16_at, u32_at, u64_at};

/// Attribute types.
pub(super) const ATTRIBUTE_LIST: u32 = 0x20;
pub(super) const DATA: u32 = 0x80;
pub(super) const INDEX_ROOT: u32 = 0x90;
pub(super) const INDEX_ALLOCATION: u32 = 0xA0;
pub(super) const VOLUME_INFORMATION: u32 = 0x70;
/// Ends the attributes of a record.
const END: u32 = 0xFFFF_FFFF;
/// The last two bytes of each stretch of this length are kept elsewhere, to tell torn writes.
const STRETCH: usize = 512;

/// Puts the bytes back that are kept elsewhere. False when a part of the structure is from another write.
pub(super) fn put_back(bytes: &mut [u8]) -> bool {
    let (at, count) = (usize::from(u16_at(bytes, 4)), usize::from(u16_at(bytes, 6)));
    if count == 0 || count - 1 != bytes.len() / STRETCH || at + count * 2 > STRETCH - 2 {
        return false;
    }
    let number = u16_at(bytes, at);
    for stretch in 1..count {
        let end = stretch * STRETCH;
        if u16_at(bytes, end - 2) != number {
            return false;
        }
        bytes.copy_within(at + stretch * 2..at + stretch * 2 + 2, end - 2);
    }
    true
}

/// A file record, whole.
pub(super) struct Record(Vec<u8>);

/// The value of an attribute.
pub(super) enum Value {
    /// In the record.
    Resident(Vec<u8>),
    /// In runs of units.
    Stream(Stream),
}

impl Record {
    pub(super) fn parse(mut bytes: Vec<u8>, number: u64) -> Found<Self> {
        if bytes.get(..4) != Some(b"FILE") || !put_back(&mut bytes) {
            return doubt(format!("file record {number} is damaged; chkdsk puts it right"));
        }
        match u16_at(&bytes, 22) & 1 {
            1 => Ok(Self(bytes)),
            _ => doubt(format!("file record {number} is not in use; chkdsk puts it right")),
        }
    }

    /// The value of the first attribute of a type with this name; of none with a list, which may have it elsewhere.
    pub(super) fn value(&self, kind: u32, name: &str) -> Found<Option<Value>> {
        let mut found = None;
        let mut at = usize::from(u16_at(&self.0, 20));
        while let Some(attribute) = self.0.get(at..).filter(|rest| rest.len() >= 24 && u32_at(rest, 0) != END) {
            let len = u32_at(attribute, 4) as usize;
            let Some(attribute) = attribute.get(..len).filter(|attribute| attribute.len() >= 24) else {
                return doubt("a file record contradicts itself; chkdsk puts it right");
            };
            let own = u32_at(attribute, 0);
            if own == ATTRIBUTE_LIST {
                return doubt("a file of its own is too scattered to be read here");
            }
            if own == kind && name_of(attribute) == name && found.is_none() {
                found = Some(attribute);
            }
            at += len;
        }
        let Some(attribute) = found else { return Ok(None) };
        if attribute[8] != 0 {
            return Stream::parse(attribute).map(|stream| Some(Value::Stream(stream)));
        }
        let (len, at) = (u32_at(attribute, 16) as usize, usize::from(u16_at(attribute, 20)));
        match attribute.get(at..at.saturating_add(len)) {
            Some(value) => Ok(Some(Value::Resident(value.to_vec()))),
            None => doubt("an attribute of a file contradicts itself; chkdsk puts it right"),
        }
    }
}

fn name_of(attribute: &[u8]) -> String {
    let (len, at) = (usize::from(attribute[9]) * 2, usize::from(u16_at(attribute, 10)));
    text(attribute.get(at..at + len).unwrap_or_default())
}

/// Text of UTF-16.
pub(super) fn text(bytes: &[u8]) -> String {
    let units: Vec<u16> = bytes.as_chunks::<2>().0.iter().map(|pair| u16::from_le_bytes(*pair)).collect();
    String::from_utf16_lossy(&units)
}

/// Units of the volume, in order.
#[derive(Clone, Debug, Default)]
pub(super) struct Stream {
    /// The first unit of each run on the volume, and how many.
    runs: Vec<(u64, u64)>,
    /// Bytes that were ever written.
    pub(super) len: u64,
}

impl Stream {
    fn parse(attribute: &[u8]) -> Found<Self> {
        let contradicts = || doubt("the runs of a file contradict themselves; chkdsk puts it right");
        let (lowest, mut at) = (u64_at(attribute, 16), usize::from(u16_at(attribute, 32)));
        let mut stream = Self { runs: Vec::new(), len: u64_at(attribute, 48).min(u64_at(attribute, 56)) };
        // Compressed, encrypted or sparse streams mean something else.
        if lowest != 0 || u16_at(attribute, 12) != 0 || attribute.len() < 64 {
            return contradicts();
        }
        let mut unit = 0_i64;
        while let Some(head) = attribute.get(at).copied().filter(|head| *head != 0) {
            let (len_len, offset_len) = (usize::from(head & 0xF), usize::from(head >> 4));
            let number = |from: usize, len: usize| attribute.get(from..from + len).map(signed);
            let (Some(len), Some(offset)) = (number(at + 1, len_len), number(at + 1 + len_len, offset_len)) else {
                return contradicts();
            };
            // Without an offset it would be a hole.
            let Some(first) = unit.checked_add(offset).filter(|first| *first >= 0 && len > 0 && offset_len > 0) else {
                return contradicts();
            };
            unit = first;
            stream.runs.push((first.unsigned_abs(), len.unsigned_abs()));
            at += 1 + len_len + offset_len;
        }
        Ok(stream)
    }

    /// The first unit of each run.
    pub(super) fn first_units(&self) -> impl Iterator<Item = u64> + '_ {
        self.runs.iter().map(|(first, _)| *first)
    }

    /// Bytes from `at` on; the volume has units of `unit` bytes.
    pub(super) fn read(&self, volume: &Volume<'_>, unit: u64, at: u64, len: u64) -> Found<Vec<u8>> {
        let short = || doubt(format!("a file of its own ends before byte {at}; chkdsk puts it right"));
        let mut bytes = Vec::new();
        let (mut at, mut left, mut start) = (at, len, 0_u64);
        for (first, count) in &self.runs {
            let (Some(run_len), Some(place)) = (count.checked_mul(unit), first.checked_mul(unit)) else { return short() };
            let Some(end) = start.checked_add(run_len) else { return short() };
            if left > 0 && at < end {
                let part = left.min(end - at);
                bytes.extend(volume.read(place.saturating_add(at - start), part)?);
                (at, left) = (at + part, left - part);
            }
            start = end;
        }
        if left == 0 { Ok(bytes) } else { short() }
    }
}

/// A number of up to eight bytes, negative where the highest bit is set.
fn signed(bytes: &[u8]) -> i64 {
    let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
    let mut all = [if negative { 0xFF } else { 0 }; 8];
    let len = bytes.len().min(8);
    all[..len].copy_from_slice(&bytes[..len]);
    i64::from_le_bytes(all)
}
