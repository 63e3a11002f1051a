//! A storage that remembers what was done to it, in order, and which barriers there were.

use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use vhd_core::storage::{FileStorage, MemoryStorage, Storage};

/// Bytes that the medium writes whole or not at all.
pub const SECTOR: u64 = 512;

/// What was done to a file, or what the client was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Whole sectors from this one on now hold these bytes. A write of a part of a sector is recorded with the rest
    /// of the sector as it was: that is what the page cache writes.
    Write {
        /// File.
        file: usize,
        /// First sector.
        sector: u64,
        /// Whole sectors.
        data: Vec<u8>,
    },
    /// The file has this length now.
    SetLen {
        /// File.
        file: usize,
        /// Bytes.
        len: u64,
    },
    /// Everything before is durable, for this file.
    Sync {
        /// File.
        file: usize,
    },
    /// A new file, empty.
    Create {
        /// File.
        file: usize,
        /// Its name.
        name: PathBuf,
    },
    /// A file has another name, and what had that name is gone.
    Rename {
        /// Old name.
        from: PathBuf,
        /// New name.
        to: PathBuf,
    },
    /// A name is gone.
    Remove {
        /// The name.
        name: PathBuf,
    },
    /// The names of this folder are durable.
    SyncFolder {
        /// Folder.
        folder: PathBuf,
    },
    /// Something that the client did or was told; the number means something to the test.
    Mark(u64),
}

/// All events of the files of one test, in one order.
#[derive(Clone, Debug, Default)]
pub struct Journal {
    events: Arc<Mutex<Vec<Event>>>,
    syncs: Arc<AtomicUsize>,
    searches: Arc<AtomicUsize>,
    /// The barrier that is left out, counted from 0 over all files; `usize::MAX` for none.
    dropped: Arc<AtomicUsize>,
    /// Events before the barrier that is left out.
    dropped_at: Arc<AtomicUsize>,
    /// What asked for each barrier, where that is wanted.
    places: Option<Arc<Mutex<Vec<String>>>>,
}

impl Journal {
    /// An empty journal.
    #[must_use]
    pub fn new() -> Self {
        let journal = Self::default();
        journal.dropped.store(usize::MAX, Ordering::SeqCst);
        journal
    }

    /// One whose n-th barrier is left out: the caller is told that it was done.
    #[must_use]
    pub fn without_barrier(n: usize) -> Self {
        let journal = Self::default();
        journal.dropped.store(n, Ordering::SeqCst);
        journal
    }

    /// One that notes which functions of the core ask for each barrier: see [`Journal::places`].
    #[must_use]
    pub fn naming_barriers() -> Self {
        Self { places: Some(Arc::default()), ..Self::new() }
    }

    /// What asked for each barrier so far: functions of the core, the innermost first. Empty but for a journal that names
    /// barriers.
    #[must_use]
    pub fn places(&self) -> Vec<String> {
        self.places.as_ref().map(|places| places.lock().unwrap().clone()).unwrap_or_default()
    }

    /// Notes something that the client did or was told. Returns the event's position.
    pub fn mark(&self, mark: u64) -> usize {
        let mut events = self.events.lock().unwrap();
        events.push(Event::Mark(mark));
        events.len() - 1
    }

    /// The events so far.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        self.events.lock().unwrap().clone()
    }

    /// Events so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.events.lock().unwrap().len()
    }

    /// True before the first event.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Barriers so far, those that were left out among them.
    #[must_use]
    pub fn syncs(&self) -> usize {
        self.syncs.load(Ordering::SeqCst)
    }

    /// Searches for data and holes so far.
    #[must_use]
    pub fn searches(&self) -> usize {
        self.searches.load(Ordering::SeqCst)
    }

    /// Events before the barrier that was left out: up to there all is as with it. 0 where none was.
    pub(crate) fn dropped_at(&self) -> usize {
        self.dropped_at.load(Ordering::SeqCst)
    }

    pub(crate) fn push(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }

    /// Counts a barrier, and notes it unless it is the one that is left out.
    pub(crate) fn barrier(&self, event: Event) {
        let n = self.syncs.fetch_add(1, Ordering::SeqCst);
        if let Some(places) = &self.places {
            places.lock().unwrap().push(place_of_call());
        }
        if n == self.dropped.load(Ordering::SeqCst) {
            self.dropped_at.store(self.len(), Ordering::SeqCst);
        } else {
            self.push(event);
        }
    }
}

/// The functions of the core that led here, the innermost first, by their names alone: not all debug information has more.
fn place_of_call() -> String {
    let trace = std::backtrace::Backtrace::force_capture().to_string();
    let mut functions: Vec<String> = Vec::new();
    let mut last = "";
    for line in trace.lines().map(str::trim_start) {
        let Some(file) = line.strip_prefix("at ") else {
            last = line.split_once(": ").map_or("", |(_, function)| function);
            continue;
        };
        if !(file.starts_with("./src/") || file.contains("vhd-core/src/")) {
            continue;
        }
        let name = name_of(last);
        // Closures are part of what calls them; the others stand between for all operations alike.
        let is_between = name.starts_with('{') || ["sync", "open_with_file", "open_after", "execute"].contains(&&*name);
        if !is_between && functions.last() != Some(&name) {
            functions.push(name);
        }
    }
    functions.join(" < ")
}

/// The last part of a function's path, without what is generic about it.
fn name_of(function: &str) -> String {
    let mut depth = 0_u32;
    let mut before = ' ';
    let mut plain = String::new();
    for character in function.chars() {
        match character {
            '<' => depth += 1,
            '>' if before != '-' => depth = depth.saturating_sub(1),
            _ if depth == 0 => plain.push(character),
            _ => {}
        }
        before = character;
    }
    plain.rsplit("::").next().unwrap_or_default().to_owned()
}

/// A file whose changes go to a [`Journal`].
#[derive(Debug)]
pub struct RecordingStorage {
    live: Arc<dyn Storage>,
    file: usize,
    journal: Journal,
}

impl RecordingStorage {
    /// File number `file` of the journal, in memory, with this content.
    #[must_use]
    pub fn new(bytes: Vec<u8>, file: usize, journal: &Journal) -> Self {
        Self::over(Arc::new(MemoryStorage::new(bytes)), file, journal)
    }

    /// File number `file` of the journal.
    #[must_use]
    pub fn over(live: Arc<dyn Storage>, file: usize, journal: &Journal) -> Self {
        Self { live, file, journal: journal.clone() }
    }

    /// The content as the running process sees it.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.live.len().unwrap() as usize];
        self.live.read_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// Records the sectors of a range as they are now; the last may be cut short by the end of the file.
    fn record(&self, events: &mut Vec<Event>, range: Range<u64>) -> io::Result<()> {
        let len = self.live.len()?;
        let (first, last) = (range.start / SECTOR, range.end.div_ceil(SECTOR));
        let mut data = vec![0; ((last - first) * SECTOR) as usize];
        let there = (len - first * SECTOR).min(data.len() as u64) as usize;
        self.live.read_at(&mut data[..there], first * SECTOR)?;
        events.push(Event::Write { file: self.file, sector: first, data });
        Ok(())
    }
}

impl Storage for RecordingStorage {
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()> {
        self.live.read_vectored_at(bufs, offset)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        // Under the journal's lock, so that the order of events is that of the changes.
        let mut events = self.journal.events.lock().unwrap();
        let before = self.live.len()?;
        self.live.write_vectored_at(bufs, offset)?;
        let len = self.live.len()?;
        if len != before {
            events.push(Event::SetLen { file: self.file, len });
        }
        let end = offset + bufs.iter().map(|buf| buf.len() as u64).sum::<u64>();
        if end > offset { self.record(&mut events, offset..end) } else { Ok(()) }
    }

    fn len(&self) -> io::Result<u64> {
        self.live.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut events = self.journal.events.lock().unwrap();
        self.live.set_len(len)?;
        events.push(Event::SetLen { file: self.file, len });
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.journal.barrier(Event::Sync { file: self.file });
        Ok(())
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        let mut events = self.journal.events.lock().unwrap();
        self.live.punch_hole(range.clone())?;
        if range.is_empty() { Ok(()) } else { self.record(&mut events, range) }
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        self.punch_hole(range)
    }

    fn allocate(&self, _range: Range<u64>) -> io::Result<()> {
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.journal.searches.fetch_add(1, Ordering::SeqCst);
        self.live.next_data(offset)
    }

    fn can_grow(&self) -> bool {
        true
    }

    fn allocated(&self) -> io::Result<u64> {
        self.live.allocated()
    }

    fn as_file(&self) -> Option<&FileStorage> {
        self.live.as_file()
    }
}

#[cfg(test)]
mod tests {
    use super::name_of;

    #[test]
    fn a_functions_name_is_the_last_part_of_its_path() {
        for (path, name) in [
            ("vhd_core::image::open::<impl vhd_core::image::Image>::open", "open"),
            ("<vhd_core::storage::LocalHost as vhd_core::storage::Host>::create", "create"),
            ("replace_file<vhd_core::image::create::{closure_env#0}>", "replace_file"),
            ("vhd_core::ops::map<fn() -> u32>::{{closure}}", "{{closure}}"),
            ("publish", "publish"),
        ] {
            assert_eq!(name_of(path), name, "{path}");
        }
    }
}
