//! A file with changes laid over it, in memory: a repair is tried there first.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::format::SECTOR;
use crate::storage::Storage;

/// Bytes that the changes may have: a table of the largest disk, and some blocks.
pub(super) const MAX_CHANGED: u64 = 128 << 20;

/// Changes over a file that stays as it is.
#[derive(Debug)]
pub(super) struct Overlay {
    base: Arc<dyn Storage>,
    changed: Mutex<Changed>,
}

#[derive(Debug)]
struct Changed {
    sectors: BTreeMap<u64, [u8; SECTOR as usize]>,
    len: u64,
    /// Bytes of the base that show: what lies beyond was cut off once.
    shown: u64,
}

impl Overlay {
    pub(super) fn new(base: Arc<dyn Storage>) -> io::Result<Self> {
        let len = base.len()?;
        Ok(Self { base, changed: Mutex::new(Changed { sectors: BTreeMap::new(), len, shown: len }) })
    }

    /// The file below.
    pub(super) fn base(&self) -> &Arc<dyn Storage> {
        &self.base
    }

    /// Ranges that hold something else than the file below, and what; ascending, each of whole sectors but at the end.
    pub(super) fn changes(&self) -> io::Result<Vec<(u64, Vec<u8>)>> {
        let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
        let changed = self.changed();
        for (&sector, bytes) in &changed.sectors {
            let at = sector * SECTOR;
            let len = (changed.len.saturating_sub(at)).min(SECTOR) as usize;
            let mut below = [0; SECTOR as usize];
            self.read_base(&mut below, at)?;
            if below[..len] == bytes[..len] && at + len as u64 <= self.base.len()? {
                continue;
            }
            match runs.last_mut() {
                Some((start, run)) if *start + run.len() as u64 == at => run.extend_from_slice(&bytes[..len]),
                _ => runs.push((at, bytes[..len].to_vec())),
            }
        }
        Ok(runs)
    }

    fn changed(&self) -> MutexGuard<'_, Changed> {
        self.changed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the file below; zeros where it ends.
    fn read_base(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let there = (self.base.len()?.saturating_sub(at)).min(bytes.len() as u64) as usize;
        bytes[there..].fill(0);
        if there > 0 { self.base.read_at(&mut bytes[..there], at) } else { Ok(()) }
    }

    fn read(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let changed = self.changed();
        let end = at.checked_add(bytes.len() as u64).filter(|end| *end <= changed.len).ok_or(io::ErrorKind::UnexpectedEof)?;
        let shown = (changed.shown.saturating_sub(at)).min(bytes.len() as u64) as usize;
        bytes[shown..].fill(0);
        self.read_base(&mut bytes[..shown], at)?;
        for (&sector, content) in changed.sectors.range(at / SECTOR..end.div_ceil(SECTOR)) {
            let start = sector * SECTOR;
            let (from, to) = (start.max(at), (start + SECTOR).min(end));
            bytes[(from - at) as usize..(to - at) as usize]
                .copy_from_slice(&content[(from - start) as usize..(to - start) as usize]);
        }
        Ok(())
    }

    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let end = at.checked_add(bytes.len() as u64).ok_or(io::ErrorKind::FileTooLarge)?;
        if self.changed().sectors.len() as u64 * SECTOR + bytes.len() as u64 > MAX_CHANGED {
            return Err(io::Error::new(io::ErrorKind::OutOfMemory, "the repair changes too much"));
        }
        let mut sector = at / SECTOR;
        while sector * SECTOR < end {
            let start = sector * SECTOR;
            let (from, to) = (start.max(at), (start + SECTOR).min(end));
            let mut content = [0; SECTOR as usize];
            let len = self.changed().len;
            let there = len.saturating_sub(start).min(SECTOR) as usize;
            // A sector beyond the end is new.
            if there > 0 {
                self.read(&mut content[..there], start)?;
            }
            content[(from - start) as usize..(to - start) as usize]
                .copy_from_slice(&bytes[(from - at) as usize..(to - at) as usize]);
            let mut changed = self.changed();
            changed.sectors.insert(sector, content);
            changed.len = changed.len.max(to);
            sector += 1;
        }
        Ok(())
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        let len = usize::try_from(range.end.saturating_sub(range.start)).map_err(|_| io::ErrorKind::OutOfMemory)?;
        if len as u64 > MAX_CHANGED {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.write(&vec![0; len], range.start)
    }
}

impl Storage for Overlay {
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()> {
        let mut at = offset;
        for buf in bufs {
            self.read(buf, at)?;
            at += buf.len() as u64;
        }
        Ok(())
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        let mut at = offset;
        for buf in bufs {
            self.write(buf, at)?;
            at += buf.len() as u64;
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.changed().len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if !self.base.can_grow() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut changed = self.changed();
        changed.shown = changed.shown.min(len);
        changed.len = len;
        drop(changed.sectors.split_off(&len.div_ceil(SECTOR)));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.zero(range)
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        self.zero(range)
    }

    fn allocate(&self, _range: Range<u64>) -> io::Result<()> {
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let len = self.len()?;
        Ok((offset < len).then_some(offset..len))
    }

    fn can_grow(&self) -> bool {
        self.base.can_grow()
    }

    fn allocated(&self) -> io::Result<u64> {
        self.base.allocated()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    #[test]
    fn it_reads_as_the_file_would_and_leaves_that_alone() {
        let base = Arc::new(MemoryStorage::new((0..2000).map(|index| index as u8).collect()));
        let overlay = Overlay::new(Arc::clone(&base) as _).unwrap();
        let plain = MemoryStorage::new(base.to_vec());
        for both in [&overlay as &dyn Storage, &plain] {
            both.write_at(&[1; 700], 100).unwrap();
            both.set_len(1500).unwrap();
            both.set_len(3000).unwrap();
            both.write_at(&[2; 3], 2990).unwrap();
            both.write_at(&[3; 600], 4000).unwrap();
        }
        let mut found = vec![9; 4600];
        overlay.read_at(&mut found, 0).unwrap();
        assert!(found == plain.to_vec());
        assert_eq!(base.to_vec().len(), 2000);
        assert_eq!(overlay.changes().unwrap().iter().map(|(at, _)| *at).collect::<Vec<_>>(), [0, 2560, 3584]);
    }
}
