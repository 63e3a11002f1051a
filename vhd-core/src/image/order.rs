//! The blocks of a BAT in the order in which they lie in the file, however many there are, in bounded memory.
//!
//! The table is read once to count how many entries name each part of the file, and once for each part whose entries are sorted
//! together. What is a hole of the file is not read.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::format::{BAT_ENTRY_LEN, BAT_UNUSED};
use crate::storage::Storage;

/// Entries that are sorted together: 16 MiB.
const TOGETHER: u64 = 2 << 20;
/// Times that a table is read to sort it all, about: of half a thousand million entries more are sorted together.
const PASSES: u64 = 32;
/// Bytes of a table that are read at once.
const CHUNK: u64 = 64 << 10;
/// Sectors that are counted together first, as a power of two.
const COARSE: u32 = 16;
/// Parts of so many sectors that are counted by the sector in one pass.
const FINE_TOGETHER: usize = 16;

/// A part of a BAT in a file.
#[derive(Clone, Debug)]
pub(crate) struct TablePart {
    /// File offset of the table's first entry.
    pub(crate) offset: u64,
    /// Blocks.
    pub(crate) blocks: Range<u32>,
}

/// Some entries of a BAT, in the order of blocks.
pub(crate) enum Entries<'a> {
    /// The first block's number, and the entries as they are in the file.
    Read(u32, &'a [[u8; 4]]),
    /// A hole of the file: all of these name sector 0.
    Zeros(Range<u32>),
}

impl TablePart {
    fn at(&self, block: u32) -> u64 {
        self.offset + u64::from(block) * BAT_ENTRY_LEN
    }

    /// Calls `visit` with all entries, as far as the file has them, until it returns false.
    pub(crate) fn scan(&self, storage: &dyn Storage, visit: &mut dyn FnMut(Entries<'_>) -> Result<bool>) -> Result<()> {
        let failed = |error, at: u64| Error::io(error, format!("can't be read at {at:#x}"));
        let there = storage.len().map_err(|error| failed(error, 0))?.saturating_sub(self.offset) / BAT_ENTRY_LEN;
        let end = u64::from(self.blocks.end).min(there) as u32;
        let most = CHUNK.min(u64::from(end.saturating_sub(self.blocks.start)) * BAT_ENTRY_LEN);
        let (mut bytes, mut data, mut block) = (vec![0; most as usize], 0..0, self.blocks.start);
        while block < end {
            let at = self.at(block);
            if !data.contains(&at) {
                data = storage.next_data(at).map_err(|error| failed(error, at))?.unwrap_or(u64::MAX..u64::MAX);
            }
            // Entries that lie in the hole as a whole.
            let hole = ((data.start.max(at) - at) / BAT_ENTRY_LEN).min(u64::from(end - block)) as u32;
            if hole > 0 {
                if !visit(Entries::Zeros(block..block + hole))? {
                    return Ok(());
                }
                block += hole;
                continue;
            }
            let until = (data.end - at).div_ceil(BAT_ENTRY_LEN).min(CHUNK / BAT_ENTRY_LEN).min(u64::from(end - block)) as u32;
            let bytes = &mut bytes[..until as usize * BAT_ENTRY_LEN as usize];
            storage.read_at(bytes, at).map_err(|error| failed(error, at))?;
            if !visit(Entries::Read(block, bytes.as_chunks().0))? {
                return Ok(());
            }
            block += until;
        }
        Ok(())
    }

    /// Calls `visit` with the block and sector of each entry that is used.
    pub(crate) fn used(&self, storage: &dyn Storage, mut visit: impl FnMut(u32, u32)) -> Result<()> {
        self.scan_in(storage, &(0..BAT_UNUSED), &mut |block, sector| {
            visit(block, sector);
            true
        })
    }

    /// Calls `visit` with the block and sector of each entry that names a sector in a range.
    fn scan_in(&self, storage: &dyn Storage, sectors: &Range<u32>, visit: &mut dyn FnMut(u32, u32) -> bool) -> Result<()> {
        self.scan(storage, &mut |entries| {
            Ok(match entries {
                Entries::Read(first, entries) => (first..).zip(entries).all(|(block, entry)| {
                    let sector = u32::from_be_bytes(*entry);
                    !sectors.contains(&sector) || visit(block, sector)
                }),
                Entries::Zeros(blocks) => !sectors.contains(&0) || blocks.into_iter().all(|block| visit(block, 0)),
            })
        })
    }
}

/// A block and where it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PlacedBlock(u64);

impl PlacedBlock {
    fn new(sector: u32, block: u32) -> Self {
        Self(u64::from(sector) << 32 | u64::from(block))
    }

    /// First sector of its slot.
    pub(crate) fn sector(self) -> u32 {
        (self.0 >> 32) as u32
    }

    pub(crate) fn block(self) -> u32 {
        self.0 as u32
    }
}

/// Entries that are sorted together.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Window {
    Sectors(Range<u32>),
    /// More name this one sector than are sorted together: they come in the order of blocks.
    One(u32),
}

/// The order of a table's blocks in the file.
pub(crate) struct Order {
    table: TablePart,
    windows: Vec<Window>,
    /// Where that is all: the sorted entries.
    all: Option<Arc<Vec<PlacedBlock>>>,
    together: u64,
    count: u64,
}

impl Order {
    /// The order of the blocks that begin in a range of sectors.
    pub(crate) fn of(storage: &dyn Storage, table: TablePart, sectors: Range<u32>) -> Result<Self> {
        Self::with(storage, table, sectors, TOGETHER)
    }

    fn with(storage: &dyn Storage, table: TablePart, sectors: Range<u32>, together: u64) -> Result<Self> {
        // The last number, which is no sector, is in no range.
        let mut order = Self { table, windows: vec![Window::Sectors(sectors.clone())], all: None, together, count: 0 };
        if order.table.blocks.len() as u64 > together {
            order.count_all(storage, &sectors)?;
        }
        if let [Window::Sectors(_)] = order.windows[..] {
            let mut all = Vec::new();
            order.load(storage, 0, 0, &mut all)?;
            order.count = all.len() as u64;
            order.all = Some(Arc::new(all));
        }
        Ok(order)
    }

    /// Finds out what can be sorted together.
    fn count_all(&mut self, storage: &dyn Storage, sectors: &Range<u32>) -> Result<()> {
        let mut counts = vec![0_u32; 1 << (u32::BITS - COARSE)];
        self.table.scan_in(storage, sectors, &mut |_, sector| {
            counts[(sector >> COARSE) as usize] += 1;
            true
        })?;
        self.count = counts.iter().map(|count| u64::from(*count)).sum::<u64>();
        self.together = self.together.max(self.count / PASSES);
        self.windows.clear();
        let part = |index: u64| index << COARSE..(index + 1) << COARSE;
        let crowded = self.group((0..).map(part).zip(counts));
        for parts in crowded.chunks(FINE_TOGETHER) {
            self.count_sectors(storage, parts, sectors)?;
        }
        self.windows.sort_unstable_by_key(|window| match window {
            Window::Sectors(sectors) => sectors.start,
            Window::One(sector) => *sector,
        });
        for window in &mut self.windows {
            if let Window::Sectors(part) = window {
                *part = part.start.max(sectors.start)..part.end.min(sectors.end);
            }
        }
        Ok(())
    }

    /// Makes windows of neighbouring parts that are sorted together. Returns those that have too many for that.
    fn group(&mut self, parts: impl Iterator<Item = (Range<u64>, u32)>) -> Vec<Range<u64>> {
        let (mut crowded, mut open, mut total) = (Vec::new(), None::<Range<u64>>, 0);
        let sectors = |range: Range<u64>| range.start as u32..u32::try_from(range.end).unwrap_or(u32::MAX);
        for (part, count) in parts.filter(|(_, count)| *count > 0) {
            let count = u64::from(count);
            if (total + count > self.together || count > self.together)
                && let Some(full) = open.take()
            {
                self.windows.push(Window::Sectors(sectors(full)));
            }
            if count > self.together {
                crowded.push(part);
                continue;
            }
            total = open.as_ref().map_or(0, |_| total) + count;
            open = Some(open.map_or(part.start, |open| open.start)..part.end);
        }
        self.windows.extend(open.map(|open| Window::Sectors(sectors(open))));
        crowded
    }

    /// Counts by the sector in parts where there are too many.
    fn count_sectors(&mut self, storage: &dyn Storage, parts: &[Range<u64>], sectors: &Range<u32>) -> Result<()> {
        let mut counts = vec![vec![0_u32; 1 << COARSE]; parts.len()];
        let place = |sector: u32| parts.iter().position(|part| part.contains(&u64::from(sector)));
        let (first, last) = (parts.iter().map(|part| part.start).min(), parts.iter().map(|part| part.end).max());
        let span = first.unwrap_or(0) as u32..u32::try_from(last.unwrap_or(0)).unwrap_or(u32::MAX);
        self.table.scan_in(storage, &(span.start.max(sectors.start)..span.end.min(sectors.end)), &mut |_, sector| {
            if let Some(part) = place(sector) {
                counts[part][(u64::from(sector) - parts[part].start) as usize] += 1;
            }
            true
        })?;
        for (part, counts) in parts.iter().zip(&counts) {
            let sectors = part.clone().map(|sector| sector..sector + 1).zip(counts.iter().copied());
            let crowded = self.group(sectors);
            self.windows.extend(crowded.into_iter().map(|sector| Window::One(sector.start as u32)));
        }
        Ok(())
    }

    /// How many blocks there are.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// Sorts the entries of a window; of one sector those from block `from` on, as many as fit. Returns where it goes on.
    fn load(&self, storage: &dyn Storage, window: usize, from: u32, into: &mut Vec<PlacedBlock>) -> Result<Option<u32>> {
        into.clear();
        into.reserve(self.together.min(self.table.blocks.len() as u64) as usize);
        let (sectors, most) = match &self.windows[window] {
            Window::Sectors(sectors) => (sectors.clone(), usize::MAX),
            Window::One(sector) => (*sector..sector + 1, self.together as usize),
        };
        let table = TablePart { blocks: from.max(self.table.blocks.start)..self.table.blocks.end, ..self.table.clone() };
        let mut next = None;
        table.scan_in(storage, &sectors, &mut |block, sector| {
            if into.len() == most {
                next = Some(block);
                return false;
            }
            into.push(PlacedBlock::new(sector, block));
            true
        })?;
        into.sort_unstable();
        Ok(next)
    }

    /// From the first sector on.
    pub(crate) fn ascending(&self) -> Cursor<'_> {
        self.cursor(true)
    }

    /// From the last sector back.
    pub(crate) fn descending(&self) -> Cursor<'_> {
        self.cursor(false)
    }

    fn cursor(&self, forward: bool) -> Cursor<'_> {
        Cursor { order: self, forward, windows: 0..self.windows.len(), rest: None, sorted: Arc::default(), at: 0, ahead: None }
    }
}

/// A walk over the blocks.
pub(crate) struct Cursor<'a> {
    order: &'a Order,
    forward: bool,
    /// Windows that were not begun.
    windows: Range<usize>,
    /// A window of one sector, and the block where it goes on.
    rest: Option<(usize, u32)>,
    sorted: Arc<Vec<PlacedBlock>>,
    at: usize,
    ahead: Option<PlacedBlock>,
}

impl Cursor<'_> {
    /// The next block.
    pub(crate) fn next(&mut self, storage: &dyn Storage) -> Result<Option<PlacedBlock>> {
        if let Some(ahead) = self.ahead.take() {
            return Ok(Some(ahead));
        }
        while self.at == self.sorted.len() {
            let (window, from) = match self.rest.take() {
                Some(rest) => rest,
                None => {
                    let next = if self.forward { self.windows.next() } else { self.windows.next_back() };
                    let Some(window) = next else { return Ok(None) };
                    (window, 0)
                }
            };
            self.at = 0;
            if let Some(all) = &self.order.all {
                self.sorted = Arc::clone(all);
                continue;
            }
            let mut sorted = std::mem::take(&mut self.sorted);
            let into = Arc::make_mut(&mut sorted);
            let next = self.order.load(storage, window, from, into)?;
            self.rest = next.map(|block| (window, block));
            self.sorted = sorted;
        }
        self.at += 1;
        let index = if self.forward { self.at - 1 } else { self.sorted.len() - self.at };
        Ok(Some(self.sorted[index]))
    }

    /// The next block, which comes again.
    pub(crate) fn peek(&mut self, storage: &dyn Storage) -> Result<Option<PlacedBlock>> {
        if self.ahead.is_none() {
            self.ahead = self.next(storage)?;
        }
        Ok(self.ahead)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::storage::MemoryStorage;

    fn walk(storage: &dyn Storage, mut cursor: Cursor<'_>) -> Vec<(u32, u32)> {
        let mut found = Vec::new();
        while let Some(ahead) = cursor.peek(storage).unwrap() {
            assert_eq!(cursor.next(storage).unwrap(), Some(ahead));
            found.push((ahead.sector(), ahead.block()));
        }
        assert_eq!(cursor.next(storage).unwrap(), None);
        found
    }

    fn sectors() -> impl Strategy<Value = u32> {
        prop_oneof![0..20_u32, 65_530..65_540_u32, any::<u32>(), Just(7), Just(BAT_UNUSED), Just(BAT_UNUSED - 1)]
    }

    proptest! {
        #[test]
        fn it_is_that_of_a_sort_however_few_fit_into_memory(
            entries in prop::collection::vec(sectors(), 0..200),
            together in 1..50_u64,
            from in sectors(),
            to in sectors(),
        ) {
            let mut bytes = vec![9; 12];
            bytes.extend(entries.iter().flat_map(|entry| entry.to_be_bytes()));
            let storage = MemoryStorage::new(bytes);
            // One that the file does not have.
            let table = TablePart { offset: 12, blocks: 3..entries.len() as u32 + 1 };
            let order = Order::with(&storage, table, from..to, together).unwrap();
            let blocks = (0_u32..).zip(&entries).skip(3).map(|(block, sector)| (*sector, block));
            let mut expected: Vec<_> = blocks.filter(|(sector, _)| (from..to).contains(sector)).collect();
            expected.sort_unstable();
            prop_assert_eq!(order.count(), expected.len() as u64);
            prop_assert_eq!(&walk(&storage, order.ascending()), &expected);
            let back = walk(&storage, order.descending());
            prop_assert!(back.windows(2).all(|pair| pair[0].0 >= pair[1].0));
            let mut back = back;
            back.sort_unstable();
            prop_assert_eq!(back, expected);
        }
    }
}
