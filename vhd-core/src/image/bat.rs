//! The block allocation table in memory: loaded a piece at a time, read without locks.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::format::{BAT_ENTRY_LEN, BAT_UNUSED};
use crate::storage::Storage;

/// Entries that are loaded together: 4 KiB of the file.
const PAGE_ENTRIES: usize = 1024;
/// Set beside an entry once all sectors of its block are known to be present.
const FULL: u64 = 1 << 32;

type Page = Box<[AtomicU64]>;

/// What the BAT says of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(u64);

impl Entry {
    pub(super) const UNUSED: Self = Self(BAT_UNUSED as u64);

    /// A block whose slot begins at this sector of the file.
    pub(super) fn new(sector: u32, full: bool) -> Self {
        Self(u64::from(sector) | if full { FULL } else { 0 })
    }

    /// First sector of the block's slot; `None` when no block is allocated.
    pub(super) fn sector(self) -> Option<u32> {
        let sector = self.0 as u32;
        (sector != BAT_UNUSED).then_some(sector)
    }

    /// True when the sector bitmap need not be looked at.
    pub(super) fn is_full(self) -> bool {
        self.0 & FULL != 0
    }

    /// The entry as the file stores it.
    pub(super) fn to_bytes(self) -> [u8; 4] {
        self.sector().unwrap_or(BAT_UNUSED).to_be_bytes()
    }
}

/// The live table: what readers see, which may be ahead of the file.
#[derive(Debug)]
pub(super) struct Bat {
    /// File offset of the table.
    offset: u64,
    /// Blocks of the disk. The table in the file may be longer.
    blocks: u32,
    pages: Box<[OnceLock<Page>]>,
}

impl Bat {
    pub(super) fn new(offset: u64, blocks: u32) -> Self {
        let pages = (blocks as usize).div_ceil(PAGE_ENTRIES);
        Self { offset, blocks, pages: std::iter::repeat_with(OnceLock::new).take(pages).collect() }
    }

    /// File offset of the table.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    fn slot(&self, storage: &dyn Storage, block: u32) -> io::Result<&AtomicU64> {
        let (page, index) = (block as usize / PAGE_ENTRIES, block as usize % PAGE_ENTRIES);
        let cell = self.pages.get(page).ok_or(io::ErrorKind::InvalidInput)?;
        if cell.get().is_none() {
            // Two threads may load the same page: the first to set it wins, and the table in the file does not
            // change before the page is in memory.
            let _ = cell.set(self.load(storage, page)?);
        }
        cell.get().and_then(|page| page.get(index)).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    fn load(&self, storage: &dyn Storage, page: usize) -> io::Result<Page> {
        let first = page * PAGE_ENTRIES;
        let count = PAGE_ENTRIES.min(self.blocks as usize - first);
        let mut bytes = vec![0; count * BAT_ENTRY_LEN as usize];
        storage.read_at(&mut bytes, self.offset + first as u64 * BAT_ENTRY_LEN)?;
        Ok(entries(&bytes).map(|sector| AtomicU64::new(u64::from(sector))).collect())
    }

    /// What the table says of a block, where that piece of it was loaded already.
    pub(super) fn known(&self, block: u32) -> Option<Entry> {
        let page = self.pages.get(block as usize / PAGE_ENTRIES)?.get()?;
        page.get(block as usize % PAGE_ENTRIES).map(|entry| Entry(entry.load(Ordering::Acquire)))
    }

    /// What the table says of a block.
    pub(super) fn get(&self, storage: &dyn Storage, block: u32) -> io::Result<Entry> {
        Ok(Entry(self.slot(storage, block)?.load(Ordering::Acquire)))
    }

    /// Makes readers see another entry. Callers hold the block's lock.
    pub(super) fn set(&self, storage: &dyn Storage, block: u32, entry: Entry) -> io::Result<()> {
        self.slot(storage, block)?.store(entry.0, Ordering::Release);
        Ok(())
    }

    /// Notes that all sectors of a block are present, unless its entry changed since `seen` was read.
    pub(super) fn note_full(&self, storage: &dyn Storage, block: u32, seen: Entry) {
        if let Ok(slot) = self.slot(storage, block) {
            let _ = slot.compare_exchange(seen.0, seen.0 | FULL, Ordering::AcqRel, Ordering::Relaxed);
        }
    }

    /// Calls `visit` with each allocated block's index and sector, straight from the file: for a scan of the whole
    /// table that leaves no table in memory.
    pub(super) fn scan(&self, storage: &dyn Storage, mut visit: impl FnMut(u32, u32)) -> io::Result<()> {
        const CHUNK: usize = 64 << 10;
        let mut bytes = vec![0; CHUNK];
        let mut block = 0;
        while block < self.blocks {
            let count = (CHUNK / BAT_ENTRY_LEN as usize).min((self.blocks - block) as usize);
            let bytes = &mut bytes[..count * BAT_ENTRY_LEN as usize];
            storage.read_at(bytes, self.offset + u64::from(block) * BAT_ENTRY_LEN)?;
            for sector in entries(bytes) {
                if sector != BAT_UNUSED {
                    visit(block, sector);
                }
                block += 1;
            }
        }
        Ok(())
    }
}

fn entries(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.as_chunks::<4>().0.iter().map(|entry| u32::from_be_bytes(*entry))
}
