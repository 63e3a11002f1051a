//! Undo journals of repairs.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use vhd_core::Progress;
use vhd_core::chain::ChainOptions;
use vhd_core::ops::repair::{Journal, RepairMode, repair};
use vhd_core::storage::{MemoryStorage, Storage};

use super::{Bounded, Input};
use crate::fixture::{BlockFill, FixtureSpec, Kind, Layout, put_u32};

const CRC: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC);

/// A small image before and after a repair, and the journal of that.
struct Repaired {
    before: Vec<u8>,
    after: Vec<u8>,
    journal: Vec<u8>,
}

/// Two blocks that share bytes: the repair writes the BAT, a copy and a footer.
fn repaired() -> &'static Repaired {
    static REPAIRED: OnceLock<Repaired> = OnceLock::new();
    REPAIRED.get_or_init(|| {
        let spec = FixtureSpec { block_size: 4096, ..FixtureSpec::new(Kind::Dynamic, Layout::Classic, 64 << 10) };
        let (mut before, placed) = spec.block(0, BlockFill::tags(1, 1)).block(5, BlockFill::tags(1, 2)).to_bytes();
        let first = placed.blocks[&0] as u32 / 512;
        put_u32(&mut before, placed.bat as usize + 7 * 4, first + 3);
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("fuzzed.vhd");
        std::fs::write(&path, &before).expect("written");
        let done = repair(&path, RepairMode::All, false, &ChainOptions::default(), &Progress::default()).expect("repaired");
        let read = |path: &Path| std::fs::read(path).expect("read");
        Repaired { before, after: read(&path), journal: read(&done.journal.expect("something was repaired")) }
    })
}

/// Where the parts of a journal are: the JSON, and the tables behind it.
fn parts(journal: &[u8]) -> Option<(usize, usize, bool)> {
    let end = journal.iter().take(100).position(|byte| *byte == b'\n')?;
    let fields: Vec<_> = std::str::from_utf8(&journal[..end]).ok()?.split(' ').collect();
    let len = usize::from_str_radix(fields.get(3)?, 16).ok()?;
    let body = (end + 1).checked_add(len).filter(|body| *body <= journal.len())?;
    Some((end + 1, body, fields.get(1) == Some(&"2")))
}

/// The journal with the checksums that its content has.
fn summed(journal: &[u8]) -> Vec<u8> {
    let Some((head, body, is_old)) = parts(journal) else { return journal.to_vec() };
    let (json, rest) = (&journal[head..body], &journal[body..]);
    let line = match is_old {
        true => format!("vhd-repair-undo 2 {:08x} {:x}\n", CRC.checksum(json), json.len()),
        false => format!("vhd-repair-undo 3 {:08x} {:x} {:08x}\n", CRC.checksum(json), json.len(), CRC.checksum(rest)),
    };
    [line.as_bytes(), json, rest].concat()
}

/// Target `repair_journal`: a journal as it is, with right checksums, or a real one with edits and right checksums; beside an image
/// before its repair, after it, or in between.
///
/// # Panics
/// When a journal that fits the image does not put it back, or one that does not fit changes it by being looked at.
pub fn repair_journal(data: &[u8]) {
    let mut input = Input(data);
    let real = repaired();
    let how = input.byte();
    let mut image = if how & 1 == 0 { real.after.clone() } else { real.before.clone() };
    for _ in 0..how >> 4 {
        let at = input.number(2) as usize * 512 % image.len();
        let end = (at + 512).min(image.len());
        let other = if input.byte() & 1 == 0 { &real.before } else { &real.after };
        if let Some(other) = other.get(at..end) {
            image[at..end].copy_from_slice(other);
        }
    }
    let journal = match how >> 1 & 3 {
        0 => input.0.to_vec(),
        1 => summed(input.0),
        _ => {
            let mut journal = real.journal.clone();
            while !input.is_empty() {
                let at = input.number(2) as usize % journal.len();
                match input.byte() % 4 {
                    0 => journal[at] = input.byte(),
                    1 => {
                        let number = input.odd_number(image.len() as u64).to_be_bytes();
                        let end = (at + 8).min(journal.len());
                        journal[at..end].copy_from_slice(&number[..end - at]);
                    }
                    2 => journal.truncate(at.max(1)),
                    _ => {
                        let bytes = input.take(16).to_vec();
                        journal.splice(at..at, bytes);
                    }
                }
            }
            summed(&journal)
        }
    };
    judge(journal, image);
}

fn judge(journal: Vec<u8>, before: Vec<u8>) {
    let Ok(journal) = Journal::read(Arc::new(MemoryStorage::new(journal))) else { return };
    let image = Bounded::new(before.clone());
    let proved = journal.prove(&image);
    let Ok(standing) = journal.compare(&image) else { return };
    assert!(image.to_vec() == before, "a look changes the image");
    if proved.is_err() || standing.other.is_some() {
        return;
    }
    // It may be longer than memory is given here.
    if journal.put_back(&image, &Progress::default()).is_err() {
        return;
    }
    let after = image.to_vec();
    let again = journal.compare(&image).expect("memory can be read");
    assert!(!again.repaired && again.other.is_none(), "put back, and not as it was: {again:?}");
    journal.put_back(&image, &Progress::default()).expect("it could be put back before");
    assert!(image.to_vec() == after && image.len().expect("memory has a length") == after.len() as u64, "put back twice");
}
