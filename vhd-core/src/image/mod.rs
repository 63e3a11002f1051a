//! One VHD file: fixed, dynamic or differencing.
//!
//! What is where:
//! `open` reads footers and headers, `prepare` mends them for writing; `bat`, `bitmap` and `space` hold what is known of the blocks;
//! `order` walks them as they lie in the file, however many there are, and `blocks` moves them;
//! `read`, `write` and `zero` serve requests; `commit` makes them durable in the order that
//! `docs/crash-consistency.md` gives. Only `write` and `zero` change BAT entries in memory, only `commit` in the file.
//!
//! Locks, in the order in which they are taken: a block's stripe, the turn to flush, the metadata lock, a bitmap
//! shard. Data moves under none but the stripe, and that shared; of these, readers take the shard only, to look
//! a sector bitmap up.

mod background;
mod bat;
mod bitmap;
mod blocks;
mod commit;
mod create;
mod flushes;
mod footers;
mod grace;
mod open;
mod order;
mod prepare;
mod read;
mod relink;
mod resize;
mod space;
mod staged;
mod write;
mod zero;

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

pub(crate) use blocks::Blocks;
pub use create::{CreateOptions, Created, NewKind, ParentLink, create, create_file, create_file_on};
pub(crate) use create::{create_file_for, locator_texts};
pub use footers::{Authority, Footers};
pub use open::{OpenOptions, SizePolicy};
pub(crate) use order::{Entries, Order, PlacedBlock, TablePart};
pub use read::{Run, RunKind};
pub(crate) use staged::{Staged, refusal};
pub use zero::ZeroMode;

use self::bat::{Bat, Entry};
use self::bitmap::BitmapCache;
use self::commit::Meta;
use self::flushes::Flushes;
use self::grace::Grace;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Batmap, DynamicHeader, Footer};
use crate::layout::Layout;
use crate::sharded::{Sharded, ShardedCount};
use crate::storage::Storage;

/// Where loom needs a fence: it takes accesses that are `SeqCst` for weaker than they are.
fn loom_fence() {}

/// Stripes of block locks. Two blocks that share one wait for each other only while one of them is allocated.
const STRIPES: usize = 64;

/// What reads through the sectors that an image does not hold: the parent, or nothing but zeros.
pub trait Below: Send + Sync {
    /// Fills `buf` with what the parent holds at `offset`; zeros past its end.
    ///
    /// # Errors
    /// As reading the parent fails.
    fn read_below(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Cuts a range into pieces that are zero as far as metadata tells (`true`), and those that may not be.
    ///
    /// # Errors
    /// As mapping the parent fails.
    fn zero_runs(&self, range: Range<u64>, visit: &mut dyn FnMut(Range<u64>, bool) -> Result<()>) -> Result<()>;
}

/// No parent: zeros everywhere.
#[derive(Debug)]
pub struct Nothing;

impl Below for Nothing {
    fn read_below(&self, buf: &mut [u8], _offset: u64) -> Result<()> {
        buf.fill(0);
        Ok(())
    }

    fn zero_runs(&self, range: Range<u64>, visit: &mut dyn FnMut(Range<u64>, bool) -> Result<()>) -> Result<()> {
        visit(range, true)
    }
}

/// The parts of an image that have blocks; a fixed one has none of them.
struct Sparse {
    header: DynamicHeader,
    layout: Layout,
    bat: Bat,
    bitmaps: BitmapCache,
    batmap: Option<Batmap>,
    /// File ranges that no block may touch: headers, BAT, locators, batmap; ascending.
    metadata: Vec<Range<u64>>,
    /// Where the last of them ends.
    metadata_max: u64,
    differencing: bool,
    stripes: [RwLock<()>; STRIPES],
    grace: Grace,
}

/// One open VHD file.
///
/// All calls take `&self` and may come from many threads. A range must be inside the disk.
pub struct Image {
    storage: Arc<dyn Storage>,
    path: PathBuf,
    footer: Footer,
    size: u64,
    read_only: bool,
    warnings: Vec<String>,
    sparse: Option<Sparse>,
    /// What the file's metadata still has to learn; see `commit`.
    meta: Mutex<Meta>,
    /// The turn of the one flush that is under way.
    flushes: Flushes<Error>,
    /// Counts writes that were completed.
    completed: ShardedCount,
    /// The count of completed writes that is known to be durable.
    durable: AtomicU64,
    /// The first failure after which no write is taken.
    latch: OnceLock<(ErrorKind, String)>,
    background: OnceLock<background::Flusher>,
    /// Bytes of the file, as this process knows it.
    file_len: AtomicU64,
}

impl Image {
    /// Bytes of the disk.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The path it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The footer that counts.
    #[must_use]
    pub fn footer(&self) -> &Footer {
        &self.footer
    }

    /// The dynamic header, of all but fixed disks.
    #[must_use]
    pub fn header(&self) -> Option<&DynamicHeader> {
        self.sparse.as_ref().map(|sparse| &sparse.header)
    }

    /// Blocks and sectors, of all but fixed disks.
    #[must_use]
    pub fn layout(&self) -> Option<Layout> {
        self.sparse.as_ref().map(|sparse| sparse.layout)
    }

    /// True when it was not opened for writing.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// What is odd about the file but does not hinder: one sentence each.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The file itself.
    #[must_use]
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// Blocks that are allocated in the file: a scan of the whole BAT.
    ///
    /// # Errors
    /// When the BAT can't be read.
    pub fn count_allocated(&self) -> Result<u32> {
        let Some(sparse) = &self.sparse else { return Ok(0) };
        let mut count = 0;
        sparse.bat.scan(&*self.storage, |_, _| count += 1).map_err(|error| self.read_error(error, sparse.bat.offset()))?;
        Ok(count)
    }

    fn meta(&self) -> MutexGuard<'_, Meta> {
        self.meta.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses what an image can't take: out of range, read-only, latched.
    fn check_write(&self, range: &Range<u64>) -> Result<()> {
        self.check_range(range)?;
        if self.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "is open read-only").at(&self.path));
        }
        self.check_latch()
    }

    fn check_range(&self, range: &Range<u64>) -> Result<()> {
        if range.start > range.end || range.end > self.size { Err(self.out_of_range(range)) } else { Ok(()) }
    }

    #[cold]
    fn out_of_range(&self, range: &Range<u64>) -> Error {
        let message = format!("bytes {} to {} are not inside the disk of {} bytes", range.start, range.end, self.size);
        Error::new(ErrorKind::OutOfRange, message).at(&self.path)
    }

    fn check_latch(&self) -> Result<()> {
        match self.latch.get() {
            None => Ok(()),
            Some((_, first)) => Err(Error::new(
                ErrorKind::Latched,
                format!("takes no more writes after a failure ({first}); close it and look after the host's disk"),
            )
            .at(&self.path)),
        }
    }

    /// Takes no more writes, for this reason.
    pub(crate) fn latch_for(&self, why: &Error) {
        let _ = self.latch.set((why.kind(), why.message()));
    }

    /// Tells a failed write or sync. Lack of space harms nothing; after anything else nobody knows what the medium
    /// holds, so the image is latched.
    #[cold]
    fn write_error(&self, error: io::Error, doing: impl FnOnce() -> String) -> Error {
        let mut error = Error::io(error, doing()).at(&self.path);
        // A file size limit is lack of space to the one who writes.
        if error.raw_os_error() == Some(nix::libc::EFBIG) {
            error = error.with_kind(ErrorKind::NoSpace);
        }
        if error.kind() != ErrorKind::NoSpace {
            self.latch_for(&error);
        }
        error
    }

    #[cold]
    pub(crate) fn read_error(&self, error: io::Error, offset: u64) -> Error {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            let len = self.file_len.load(Ordering::Relaxed);
            let message =
                format!("ends at {len:#x}, but what is asked for lies at {offset:#x}; it was cut short: see `vhd check`");
            return Error::new(ErrorKind::Corrupt, message).at(&self.path);
        }
        Error::io(error, format!("can't be read at {offset:#x}")).at(&self.path)
    }

    /// Refuses a range of the file that it does not have, as a read does: beyond its end is no hole, what was there is lost.
    pub(crate) fn check_inside(&self, range: Range<u64>) -> Result<()> {
        let is_inside = range.end <= self.file_len.load(Ordering::Relaxed);
        if is_inside { Ok(()) } else { Err(self.read_error(io::ErrorKind::UnexpectedEof.into(), range.start)) }
    }

    /// Counts a completed write, so that the next flush knows of it.
    fn note_completed(&self) {
        self.completed.add_one();
    }
}

impl Sparse {
    fn stripe(&self, block: u32) -> &RwLock<()> {
        &self.stripes[block as usize % STRIPES]
    }

    /// Refuses an entry that can't be that of a block, before anything trusts it.
    fn check_entry(&self, image: &Image, block: u32, sector: u32) -> Result<()> {
        let slot = self.layout.slot(sector);
        let len = image.file_len.load(Ordering::Relaxed);
        if slot.start >= len {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "BAT entry {block} names sector {sector:#x}, beyond the end of the file ({len:#x} bytes); see `vhd check`"
                ),
            )
            .at(&image.path));
        }
        // Blocks follow the metadata in every file; only a wrong entry gets past the first comparison.
        if slot.start < self.metadata_max
            && let Some(part) = self.metadata.iter().find(|part| slot.start < part.end && part.start < slot.end)
        {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("BAT entry {block} names sector {sector:#x}, inside the metadata at {:#x}; see `vhd check`", part.start),
            )
            .at(&image.path));
        }
        Ok(())
    }

    fn entry(&self, image: &Image, block: u32) -> Result<Entry> {
        let entry = self.bat.get(&*image.storage, block).map_err(|error| image.read_error(error, self.bat.offset()))?;
        if let Some(sector) = entry.sector()
            && !entry.is_full()
        {
            self.check_entry(image, block, sector)?;
        }
        Ok(entry)
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image").field("path", &self.path).field("footer", &self.footer).finish_non_exhaustive()
    }
}

impl Drop for Image {
    /// Closes it as well as it can; [`Image::close`] says when that fails.
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::error!("{error}");
        }
    }
}
