//! A file with changes laid over it: what changes an image is tried there first.
//!
//! Most changes are sectors of metadata. They are kept in memory, and beyond [`MAX_IN_MEMORY`] in a file without a name. Of
//! blocks that are copied, and of ranges that become zeros, only where their bytes come from is kept.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Storage;
use crate::format::SECTOR;

/// Bytes that may be written over a file: the largest table that is put right, and as much again.
const MAX_WRITTEN: u64 = 128 << 20;
/// Of these, bytes that are kept in memory.
const MAX_IN_MEMORY: u64 = 8 << 20;
/// Sectors that are kept together.
const PAGE: u64 = 4096;
/// Bytes that are compared at once; whole sectors.
const CHUNK: u64 = 64 << 10;

type PageBytes = [u8; PAGE as usize];

/// Changes over a file that stays as it is.
#[derive(Debug)]
pub(crate) struct Overlay {
    base: Arc<dyn Storage>,
    changed: Mutex<Changed>,
}

/// Sectors that were written, a few at a time.
#[derive(Debug)]
struct Page {
    /// A bit for each sector that was written, the lowest for the first.
    written: u8,
    place: Place,
}

/// Where the bytes of a page are.
#[derive(Debug)]
enum Place {
    Memory(Box<PageBytes>),
    /// Offset in the file without a name.
    File(u64),
}

/// What a range shows that was not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shown {
    /// Bytes of the file below.
    Base(u64),
    Zeros,
}

impl Shown {
    /// What it shows so many bytes further on.
    fn from(self, bytes: u64) -> Self {
        match self {
            Self::Base(at) => Self::Base(at + bytes),
            Self::Zeros => Self::Zeros,
        }
    }
}

#[derive(Debug)]
struct Changed {
    base: Arc<dyn Storage>,
    pages: BTreeMap<u64, Page>,
    file: Option<File>,
    file_len: u64,
    /// The page of the file that was changed last, by its offset there: tables are changed entry by entry.
    last: Option<(u64, Box<PageBytes>)>,
    /// Ranges that show something else than the same bytes of the file below: first byte, end and what.
    ranges: BTreeMap<u64, (u64, Shown)>,
    len: u64,
    /// Bytes of the base that show: what lies beyond was cut off once.
    shown: u64,
}

impl Changed {
    fn bytes_of(&self, page: &Page) -> io::Result<PageBytes> {
        let mut bytes = [0; PAGE as usize];
        match (&page.place, &self.file) {
            (Place::Memory(kept), _) => bytes = **kept,
            (Place::File(at), _) if self.last.as_ref().is_some_and(|(last, _)| last == at) => {
                self.last.iter().for_each(|(_, last)| bytes = **last);
            }
            (Place::File(at), Some(file)) => file.read_exact_at(&mut bytes, *at)?,
            (Place::File(_), None) => return Err(io::ErrorKind::NotFound.into()),
        }
        Ok(bytes)
    }

    fn put_page(&mut self, number: u64, written: u8, bytes: &PageBytes) -> io::Result<()> {
        let kept = self.pages.len() as u64 * PAGE;
        if let Some(page) = self.pages.get_mut(&number) {
            page.written = written;
            match &mut page.place {
                Place::Memory(place) => **place = *bytes,
                Place::File(at) => {
                    let at = *at;
                    return self.write_back(at, bytes);
                }
            }
            return Ok(());
        }
        if kept >= MAX_WRITTEN {
            return Err(io::Error::new(io::ErrorKind::OutOfMemory, "too much changes"));
        }
        let place = if kept < MAX_IN_MEMORY {
            Place::Memory(Box::new(*bytes))
        } else {
            let file = match self.file.take() {
                Some(file) => file,
                None => tempfile::tempfile()?,
            };
            let at = self.file_len;
            file.write_all_at(bytes, at)?;
            self.file_len += PAGE;
            self.file = Some(file);
            Place::File(at)
        };
        self.pages.insert(number, Page { written, place });
        Ok(())
    }

    /// Keeps a page of the file without a name in memory, in place of the one before.
    fn write_back(&mut self, at: u64, bytes: &PageBytes) -> io::Result<()> {
        match (&mut self.last, &self.file) {
            (Some((last, kept)), _) if *last == at => **kept = *bytes,
            (last, Some(file)) => {
                if let Some((before, kept)) = last {
                    file.write_all_at(&**kept, *before)?;
                }
                *last = Some((at, Box::new(*bytes)));
            }
            (_, None) => return Err(io::ErrorKind::NotFound.into()),
        }
        Ok(())
    }

    /// Reads the file below; zeros where it ends.
    fn read_base(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let there = (self.base.len()?.saturating_sub(at)).min(bytes.len() as u64) as usize;
        bytes[there..].fill(0);
        if there > 0 { self.base.read_at(&mut bytes[..there], at) } else { Ok(()) }
    }

    fn read(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let end = at.checked_add(bytes.len() as u64).filter(|end| *end <= self.len).ok_or(io::ErrorKind::UnexpectedEof)?;
        let shown = (self.shown.saturating_sub(at)).min(bytes.len() as u64) as usize;
        bytes[shown..].fill(0);
        self.read_base(&mut bytes[..shown], at)?;
        for (&start, &(stop, what)) in self.ranges.range(..end).rev().take_while(|(_, (stop, _))| *stop > at) {
            let (from, to) = (start.max(at), stop.min(end));
            let part = &mut bytes[(from - at) as usize..(to - at) as usize];
            match what.from(from - start) {
                Shown::Base(source) => self.read_base(part, source)?,
                Shown::Zeros => part.fill(0),
            }
        }
        for (&number, page) in self.pages.range(at / PAGE..end.div_ceil(PAGE)).filter(|(_, page)| page.written != 0) {
            let content = self.bytes_of(page)?;
            for start in (0..PAGE).step_by(SECTOR as usize).filter(|start| page.written >> (start / SECTOR) & 1 == 1) {
                let place = number * PAGE + start;
                let (from, to) = (place.max(at), (place + SECTOR).min(end));
                if from < to {
                    bytes[(from - at) as usize..(to - at) as usize]
                        .copy_from_slice(&content[(from - number * PAGE) as usize..(to - number * PAGE) as usize]);
                }
            }
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8], at: u64) -> io::Result<()> {
        let end = at.checked_add(bytes.len() as u64).ok_or(io::ErrorKind::FileTooLarge)?;
        for number in at / PAGE..end.div_ceil(PAGE) {
            let first = number * PAGE;
            let (mut written, mut content) = match self.pages.get(&number) {
                Some(page) => (page.written, self.bytes_of(page)?),
                None => (0, [0; PAGE as usize]),
            };
            for place in (first..first + PAGE).step_by(SECTOR as usize) {
                let (from, to) = (place.max(at), (place + SECTOR).min(end));
                if from >= to {
                    continue;
                }
                let (bit, within) = (1 << ((place - first) / SECTOR), (place - first) as usize);
                if to - from < SECTOR && written & bit == 0 {
                    // What is beyond the end is new.
                    let there = self.len.saturating_sub(place).min(SECTOR) as usize;
                    content[within..within + SECTOR as usize].fill(0);
                    if there > 0 {
                        self.read(&mut content[within..within + there], place)?;
                    }
                }
                content[(from - first) as usize..(to - first) as usize]
                    .copy_from_slice(&bytes[(from - at) as usize..(to - at) as usize]);
                written |= bit;
            }
            self.put_page(number, written, &content)?;
            self.len = self.len.max(end.min(first + PAGE));
        }
        Ok(())
    }

    /// Forgets what was changed of whole sectors.
    fn forget(&mut self, range: &Range<u64>) {
        for (&number, page) in self.pages.range_mut(range.start / PAGE..range.end.div_ceil(PAGE)) {
            for index in 0..PAGE / SECTOR {
                if range.contains(&(number * PAGE + index * SECTOR)) {
                    page.written &= !(1 << index);
                }
            }
        }
        let over: Vec<_> = self.ranges.range(..range.end).rev().take_while(|(_, (stop, _))| *stop > range.start).collect();
        let over: Vec<_> = over.into_iter().map(|(&start, &(stop, what))| (start, stop, what)).collect();
        for (start, stop, what) in over {
            self.ranges.remove(&start);
            if start < range.start {
                self.ranges.insert(start, (range.start, what));
            }
            if stop > range.end {
                self.ranges.insert(range.end, (stop, what.from(range.end - start)));
            }
        }
    }

    /// What is shown at a place where nothing was written, and where that ends.
    fn shown_at(&self, at: u64) -> (Shown, u64) {
        if let Some((&start, &(stop, what))) = self.ranges.range(..=at).next_back().filter(|(_, (stop, _))| *stop > at) {
            return (what.from(at - start), stop);
        }
        let next = self.ranges.range(at..).next().map_or(u64::MAX, |(start, _)| *start);
        if at < self.shown { (Shown::Base(at), self.shown.min(next)) } else { (Shown::Zeros, next) }
    }

    /// Makes whole sectors show what others do.
    fn copy(&mut self, from: Range<u64>, to: u64) -> io::Result<()> {
        let len = from.end - from.start;
        let mut pieces = Vec::new();
        let mut at = from.start;
        while at < from.end {
            let (what, until) = self.shown_at(at);
            pieces.push((at - from.start, until.min(from.end) - from.start, what));
            at = until.min(from.end);
        }
        let mut written = Vec::new();
        for (&number, page) in self.pages.range(from.start / PAGE..from.end.div_ceil(PAGE)) {
            let sectors = (0..PAGE / SECTOR).filter(|index| page.written >> index & 1 == 1);
            written.extend(sectors.map(|index| number * PAGE + index * SECTOR).filter(|place| from.contains(place)));
        }
        self.forget(&(to..to + len));
        for (start, end, what) in pieces {
            self.ranges.insert(to + start, (to + end, what));
        }
        self.len = self.len.max(to + len);
        for place in written {
            let mut sector = [0; SECTOR as usize];
            self.read(&mut sector, place)?;
            self.write(&sector, to + place - from.start)?;
        }
        Ok(())
    }

    fn set_len(&mut self, len: u64) -> io::Result<()> {
        // Of a sector that is cut the rest is gone.
        let cut = len - len % SECTOR;
        if cut < len && len < self.len && self.pages.get(&(cut / PAGE)).is_some_and(|page| page.written != 0) {
            let mut sector = [0; SECTOR as usize];
            self.read(&mut sector[..(len - cut) as usize], cut)?;
            self.write(&sector, cut)?;
        }
        if len < self.len {
            self.forget(&(len.next_multiple_of(SECTOR)..u64::MAX - PAGE));
            let last = self.ranges.range(..len).next_back().map(|(start, (stop, what))| (*start, *stop, *what));
            if let Some((start, stop, what)) = last {
                self.ranges.insert(start, (stop.min(len), what));
            }
            self.ranges.split_off(&len);
            self.pages.split_off(&len.div_ceil(PAGE));
        }
        self.shown = self.shown.min(len);
        self.len = len;
        Ok(())
    }

    /// Ranges of whole sectors of which something may be changed, ascending and apart.
    fn touched(&self) -> io::Result<Vec<Range<u64>>> {
        let mut touched: Vec<Range<u64>> = Vec::new();
        for (&number, page) in &self.pages {
            let written = (0..PAGE / SECTOR).filter(|index| page.written >> index & 1 == 1);
            for start in written.map(|index| number * PAGE + index * SECTOR) {
                match touched.last_mut() {
                    Some(last) if last.end == start => last.end = start + SECTOR,
                    _ => touched.push(start..start + SECTOR),
                }
            }
        }
        touched.extend(self.ranges.iter().map(|(start, (stop, _))| *start..stop.next_multiple_of(SECTOR)));
        // What was cut off, and is zeros where the file became longer again.
        let (cut, end) = (self.shown - self.shown % SECTOR, self.len.min(self.base.len()?));
        touched.extend((cut < end && self.shown < end).then_some(cut..end.next_multiple_of(SECTOR)));
        touched.sort_unstable_by_key(|range| range.start);
        let mut apart: Vec<Range<u64>> = Vec::with_capacity(touched.len());
        for range in touched {
            match apart.last_mut() {
                Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
                _ => apart.push(range),
            }
        }
        Ok(apart)
    }
}

impl Overlay {
    pub(crate) fn new(base: Arc<dyn Storage>) -> io::Result<Self> {
        let len = base.len()?;
        let below = Arc::clone(&base);
        let (pages, ranges) = (BTreeMap::new(), BTreeMap::new());
        let changed = Changed { base: below, pages, file: None, file_len: 0, last: None, ranges, len, shown: len };
        Ok(Self { base, changed: Mutex::new(changed) })
    }

    /// The file below.
    pub(crate) fn base(&self) -> &Arc<dyn Storage> {
        &self.base
    }

    /// Ranges that hold something else than the file below; ascending and apart, each of whole sectors but at the end.
    pub(crate) fn changes(&self) -> io::Result<Vec<Range<u64>>> {
        let changed = self.changed();
        let base_len = self.base.len()?;
        let mut runs: Vec<Range<u64>> = Vec::new();
        let (mut now, mut below) = (vec![0; CHUNK as usize], vec![0; CHUNK as usize]);
        for range in changed.touched()? {
            let end = range.end.min(changed.len);
            let mut at = range.start;
            while at < end {
                let len = (end - at).min(CHUNK) as usize;
                changed.read(&mut now[..len], at)?;
                changed.read_base(&mut below[..len], at)?;
                let sectors = now[..len].chunks(SECTOR as usize).zip(below[..len].chunks(SECTOR as usize));
                for ((now, below), start) in sectors.zip((at..).step_by(SECTOR as usize)) {
                    let stop = start + now.len() as u64;
                    if now == below && stop <= base_len {
                        continue;
                    }
                    match runs.last_mut() {
                        Some(last) if last.end == start => last.end = stop,
                        _ => runs.push(start..stop),
                    }
                }
                at += len as u64;
            }
        }
        Ok(runs)
    }

    /// Makes whole sectors hold what others do. Only where they are is kept.
    pub(crate) fn copy(&self, from: Range<u64>, to: u64) -> io::Result<()> {
        self.changed().copy(from, to)
    }

    fn changed(&self) -> MutexGuard<'_, Changed> {
        self.changed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        let mut changed = self.changed();
        let range = range.start..range.end.min(changed.len);
        if range.is_empty() {
            return Ok(());
        }
        let from = range.start.next_multiple_of(SECTOR).min(range.end);
        let to = (range.end - range.end % SECTOR).max(from);
        for edge in [range.start..from, to..range.end] {
            changed.write(&[0; SECTOR as usize][..(edge.end - edge.start) as usize], edge.start)?;
        }
        if from < to {
            changed.forget(&(from..to));
            changed.ranges.insert(from, (to, Shown::Zeros));
        }
        Ok(())
    }
}

impl Storage for Overlay {
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()> {
        let mut at = offset;
        for buf in bufs {
            self.changed().read(buf, at)?;
            at += buf.len() as u64;
        }
        Ok(())
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        let mut at = offset;
        for buf in bufs {
            self.changed().write(buf, at)?;
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
        self.changed().set_len(len)
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
        let changed = self.changed();
        let mut found = Vec::new();
        if offset < changed.shown {
            found.extend(self.base.next_data(offset)?.map(|data| data.start..data.end.min(changed.shown)));
        }
        let page = changed.pages.range(offset / PAGE..).find(|(_, page)| page.written != 0);
        found.extend(page.map(|(number, _)| number * PAGE..(number + 1) * PAGE));
        let before = changed.ranges.range(..offset).next_back();
        let ranges = before.into_iter().chain(changed.ranges.range(offset..)).filter(|(_, (stop, _))| *stop > offset);
        let copied = ranges.into_iter().find(|(_, (_, what))| *what != Shown::Zeros);
        found.extend(copied.map(|(start, (stop, _))| *start..*stop));
        let inside = found.into_iter().map(|data| data.start.max(offset)..data.end.min(changed.len));
        Ok(inside.filter(|data| data.start < data.end).min_by_key(|data| data.start))
    }

    fn can_grow(&self) -> bool {
        self.base.can_grow()
    }

    fn allocated(&self) -> io::Result<u64> {
        // How much the host had for what is cut off nobody knows.
        let is_cut = self.changed().shown < self.base.len()?;
        if is_cut { Ok(0) } else { self.base.allocated() }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::storage::MemoryStorage;

    /// One change: which, where, how long, and a byte.
    type Change = (u8, u64, u64, u8);

    /// Does it to both; what is copied is copied by bytes in the plain one.
    fn apply(overlay: &Overlay, plain: &MemoryStorage, (which, at, len, byte): Change) {
        let end = plain.len().unwrap();
        match which {
            0 => {
                overlay.write_at(&vec![byte; len as usize], at).unwrap();
                plain.write_at(&vec![byte; len as usize], at).unwrap();
            }
            1 => [overlay as &dyn Storage, plain].iter().for_each(|storage| storage.set_len(at).unwrap()),
            2 => {
                let range = at.min(end)..(at + len).min(end);
                [overlay as &dyn Storage, plain].iter().for_each(|storage| storage.zero_range(range.clone()).unwrap());
            }
            _ => {
                // From the file to behind it, as blocks are.
                let from = at / SECTOR * SECTOR..(at + len) / SECTOR * SECTOR;
                if from.end > end || from.is_empty() {
                    return;
                }
                let to = end.next_multiple_of(SECTOR);
                let mut bytes = vec![0; (from.end - from.start) as usize];
                plain.read_at(&mut bytes, from.start).unwrap();
                plain.write_at(&bytes, to).unwrap();
                overlay.copy(from, to).unwrap();
            }
        }
    }

    fn judge(changes: &[Change]) {
        let base = Arc::new(MemoryStorage::new((0..20_000_u32).map(|index| (index % 251) as u8 + 1).collect()));
        let before = base.to_vec();
        let overlay = Overlay::new(Arc::clone(&base) as _).unwrap();
        let plain = MemoryStorage::new(base.to_vec());
        for change in changes {
            apply(&overlay, &plain, *change);
        }
        let expected = plain.to_vec();
        let mut found = vec![9; overlay.len().unwrap() as usize];
        overlay.read_at(&mut found, 0).unwrap();
        assert!(found == expected);
        assert!(base.to_vec() == before, "the file below was changed");
        // What is said to be changed, written over the file below, makes it the same.
        let mut again = before;
        again.resize(expected.len(), 0);
        for run in overlay.changes().unwrap() {
            again[run.start as usize..run.end as usize].copy_from_slice(&expected[run.start as usize..run.end as usize]);
        }
        assert!(again == expected);
        // No data is taken for a hole.
        let (mut at, mut holes) = (0, vec![true; expected.len()]);
        while let Some(data) = overlay.next_data(at).unwrap() {
            holes[data.start as usize..data.end as usize].fill(false);
            at = data.end;
        }
        assert!(holes.iter().zip(&expected).all(|(is_hole, byte)| !is_hole || *byte == 0));
    }

    proptest! {
        #[test]
        fn it_reads_as_the_file_would(changes in prop::collection::vec((0..4_u8, 0..30_000_u64, 1..9_000_u64, any::<u8>()), 0..12)) {
            judge(&changes);
        }
    }

    #[test]
    fn what_does_not_fit_into_memory_is_kept_in_a_file_and_too_much_is_refused() {
        let base = Arc::new(MemoryStorage::new(vec![7; 512]));
        let overlay = Overlay::new(base as _).unwrap();
        for page in 0..4 * MAX_IN_MEMORY / PAGE {
            overlay.write_at(&page.to_be_bytes(), page * PAGE).unwrap();
        }
        for page in 0..4 * MAX_IN_MEMORY / PAGE {
            let mut found = [0; 8];
            overlay.read_at(&mut found, page * PAGE).unwrap();
            assert_eq!(u64::from_be_bytes(found), page);
        }
        let in_memory = overlay.changed().pages.values().filter(|page| matches!(page.place, Place::Memory(_))).count() as u64;
        assert_eq!(in_memory * PAGE, MAX_IN_MEMORY);
        let failed = (0..).find(|page| overlay.write_at(&[1], page * PAGE).is_err()).unwrap();
        assert_eq!(failed * PAGE, MAX_WRITTEN);
    }
}
