//! A range of a disk as the bytes of a file, with the errors that a file gives.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::Errno;
use nix::fcntl::FallocateFlags;
use nix::libc;
use rustix::time::{ClockId, clock_gettime};
use vhd_core::block::{ExtentState, ZeroMode};
use vhd_core::{Disk, Error, ErrorKind};

use crate::allocation::Allocation;
use crate::changes::{Changes, OwnChanges};

/// Part of a disk, or all of it. Offsets below are from its start.
pub(crate) struct View {
    disk: Disk,
    range: Range<u64>,
    read_only: bool,
    allocation: Allocation,
    changes: OwnChanges,
    /// The others' changes when this was opened last. The kernel caches each view by itself, so what it has of one is out of
    /// date once another was written.
    seen_changes: AtomicU64,
    /// Nanoseconds since 1970 at the last change. Without a writeback cache it is the server who keeps this.
    modified: AtomicU64,
}

impl View {
    /// A range of a disk; read-only when it is asked for or the disk is. All views of a mount share `changes`.
    pub(crate) fn new(disk: &Disk, range: Range<u64>, read_only: bool, changes: &Arc<Changes>) -> Self {
        let modified = disk.layer_path(0).and_then(|path| path.metadata().ok()?.modified().ok()).unwrap_or_else(SystemTime::now);
        Self {
            allocation: Allocation::new(range.end - range.start),
            read_only: read_only || disk.capabilities().read_only,
            modified: AtomicU64::new(nanoseconds(modified)),
            changes: OwnChanges::new(changes),
            seen_changes: AtomicU64::new(0),
            range,
            disk: disk.clone(),
        }
    }

    /// Told of an open: true when what the kernel has of it since the last is still so.
    pub(crate) fn cache_is_current(&self) -> bool {
        let others = self.changes.look_at_others();
        self.seen_changes.swap(others, Ordering::SeqCst) == others
    }

    /// Bytes.
    pub(crate) fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// True when every change is refused.
    pub(crate) fn read_only(&self) -> bool {
        self.read_only
    }

    /// Bytes that take up space, roughly.
    pub(crate) fn allocated(&self) -> u64 {
        self.allocation.bytes(&self.disk, &self.range, self.changes.look())
    }

    /// When it was changed last.
    pub(crate) fn modified(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_nanos(self.modified.load(Ordering::Relaxed))
    }

    /// Reads as much of `buf` as there is, and says how much that was.
    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) -> Result<usize, Errno> {
        let len = self.room(offset, buf.len());
        if len > 0 {
            self.disk.read_at(&mut buf[..len], self.range.start + offset).map_err(|error| errno(&error))?;
        }
        Ok(len)
    }

    /// Writes as much of `data` as there is room for, and says how much that was. Where there is none it is `ENOSPC`,
    /// as on a block device.
    pub(crate) fn write(&self, data: &[u8], offset: u64) -> Result<usize, Errno> {
        self.check_writable()?;
        let len = self.room(offset, data.len());
        if len == 0 && !data.is_empty() {
            return Err(Errno::ENOSPC);
        }
        self.disk.write_at(&data[..len], self.range.start + offset).map_err(|error| errno(&error))?;
        self.touch();
        Ok(len)
    }

    /// Makes what was written durable.
    pub(crate) fn flush(&self) -> Result<(), Errno> {
        self.disk.flush().map_err(|error| errno(&error))
    }

    /// `fallocate(2)`. What would change the size is `EFBIG`; to take up space ahead of writing is no promise that a
    /// disk can keep, and asked for inside of it is granted, as thin storage does.
    pub(crate) fn allocate(&self, offset: u64, len: u64, mode: i32) -> Result<(), Errno> {
        self.check_writable()?;
        let mode = FallocateFlags::from_bits(mode).ok_or(Errno::EOPNOTSUPP)?;
        let keep_size = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let what = mode - keep_size;
        let end = offset.checked_add(len).ok_or(Errno::EFBIG)?;
        if end > self.len() && (what.is_empty() || !mode.contains(keep_size)) {
            return Err(Errno::EFBIG);
        }
        let how = match what {
            FallocateFlags::FALLOC_FL_PUNCH_HOLE => ZeroMode::Free,
            FallocateFlags::FALLOC_FL_ZERO_RANGE => ZeroMode::Keep,
            _ if what.is_empty() => return Ok(()),
            _ => return Err(Errno::EOPNOTSUPP),
        };
        let end = end.min(self.len());
        if offset < end {
            let range = self.range.start + offset..self.range.start + end;
            self.disk.zero(range, how).map_err(|error| errno(&error))?;
            self.touch();
        }
        Ok(())
    }

    /// `SEEK_DATA` and `SEEK_HOLE` of `lseek(2)`.
    pub(crate) fn seek(&self, offset: i64, whence: i32) -> Result<i64, Errno> {
        let offset = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
        if offset >= self.len() {
            return Err(Errno::ENXIO);
        }
        let found = match whence {
            libc::SEEK_DATA => self.first(offset, |state| !state.reads_zero())?.ok_or(Errno::ENXIO)?,
            libc::SEEK_HOLE => self.first(offset, ExtentState::reads_zero)?.unwrap_or(self.len()),
            _ => return Err(Errno::EINVAL),
        };
        i64::try_from(found).map_err(|_| Errno::EOVERFLOW)
    }

    /// Where the first run that is `wanted` begins, at or after `offset`.
    fn first(&self, offset: u64, wanted: impl Fn(ExtentState) -> bool) -> Result<Option<u64>, Errno> {
        let mut found = None;
        let walked = self.disk.extents(self.range.start + offset..self.range.end, &mut |extent| {
            if wanted(extent.state) {
                found = Some(extent.range.start - self.range.start);
                // The way to end a walk early.
                return Err(Error::new(ErrorKind::InvalidInput, "found"));
            }
            Ok(())
        });
        match (found, walked) {
            (Some(start), _) => Ok(Some(start)),
            (None, Ok(())) => Ok(None),
            (None, Err(error)) => Err(errno(&error)),
        }
    }

    /// How much of `wanted` bytes at `offset` is inside.
    fn room(&self, offset: u64, wanted: usize) -> usize {
        let room = self.len().saturating_sub(offset);
        usize::try_from(room).map_or(wanted, |room| room.min(wanted))
    }

    fn check_writable(&self) -> Result<(), Errno> {
        if self.read_only { Err(Errno::EROFS) } else { Ok(()) }
    }

    /// Notes a change, after it was made.
    fn touch(&self) {
        self.changes.note();
        // As the kernel's own file systems do it: the time of the last tick, which costs nothing to look at.
        let now = clock_gettime(ClockId::RealtimeCoarse);
        let nanoseconds = now.tv_sec.saturating_mul(1_000_000_000).saturating_add(now.tv_nsec);
        let nanoseconds = u64::try_from(nanoseconds).unwrap_or(0);
        // Many requests come within a tick: only one of them touches what others touch.
        if self.modified.load(Ordering::Relaxed) != nanoseconds {
            self.modified.store(nanoseconds, Ordering::Relaxed);
        }
    }
}

/// Nanoseconds since 1970, for any time that a file has.
fn nanoseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The number that a process gets for an error. What is not the caller's doing is put on record too, because the
/// number says so little.
fn errno(error: &Error) -> Errno {
    match error.kind() {
        // A quota and a file size limit have numbers of their own.
        ErrorKind::NoSpace => {
            tracing::warn!("{error}");
            Errno::from_i32(error.raw_os_error().unwrap_or(libc::ENOSPC))
        }
        ErrorKind::ReadOnly => Errno::EROFS,
        ErrorKind::OutOfRange | ErrorKind::InvalidInput => Errno::EINVAL,
        ErrorKind::Unsupported => Errno::EOPNOTSUPP,
        _ => {
            tracing::error!("{error}");
            Errno::EIO
        }
    }
}
