//! A regular file or block device of the host.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::num::NonZeroU64;
use std::ops::{Deref, Range};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag, SpliceFFlags, fallocate, splice};
use nix::sys::uio::{pread, preadv, pwrite, pwritev};
use nix::unistd::{Whence, lseek};
use rustix::fs::{Access, Advice, AtFlags, CWD, accessat, fstatfs};
use rustix::io::{ReadWriteFlags, preadv2};

use super::direct::Direct;
use super::found::FoundData;
use super::{LockMode, SharedBytes, Storage, lock, write_zeros};
use crate::block::Spliced;
use crate::error::{Error, ErrorKind, Result};

/// `IOV_MAX` of Linux: more pieces in one call are refused.
const MAX_PIECES: usize = 1024;
/// Less than this is not worth a call of its own to begin with it.
const EARLY_MIN: u64 = 128 << 10;

/// What is known of a file's file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileSystem {
    /// On a disk of this machine; it punches holes and zeroes ranges by metadata.
    Disk,
    /// In memory (tmpfs); it punches holes.
    Memory,
    /// Another one, or none: it may be that of another machine.
    Other,
}

impl FileSystem {
    fn of(file: &File) -> Self {
        match fstatfs(file).map(|found| found.f_type) {
            // ext4, XFS, Btrfs, F2FS: see statfs(2).
            Ok(0xEF53 | 0x5846_5342 | 0x9123_683E | 0xF2F5_2010) => Self::Disk,
            Ok(0x0102_1994) => Self::Memory,
            _ => Self::Other,
        }
    }
}

/// A regular file or block device, opened once.
#[derive(Debug)]
pub struct FileStorage {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) is_device: bool,
    pub(super) locked: AtomicBool,
    pub(super) direct: Option<Direct>,
    /// What is written goes on to the medium at once, where it is large.
    early: AtomicBool,
    /// Reads can't be asked not to wait.
    always_waits: AtomicBool,
    file_system: FileSystem,
    found: FoundData,
}

impl FileStorage {
    /// Opens an existing regular file or block device.
    ///
    /// # Errors
    /// When it can't be opened, or is a folder, pipe or character device.
    pub fn open(path: &Path, writable: bool) -> Result<Self> {
        Self::open_as(path, writable, writable)
    }

    /// As [`Self::open`] for reading, but a device that is mounted or held by anybody is refused.
    ///
    /// # Errors
    /// As there; `Locked`.
    pub fn open_alone(path: &Path) -> Result<Self> {
        Self::open_as(path, false, true)
    }

    /// Opens for reading what [`Self::open`] would open for writing, and refuses what this user may not write: for a dry run.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn rehearse(path: &Path) -> Result<Self> {
        let allowed = accessat(CWD, path, Access::WRITE_OK, AtFlags::EACCESS);
        allowed.map_err(|error| open_error(error.into(), true).at(path))?;
        Self::open(path, false)
    }

    /// Nobody may have a device to himself already that is opened `alone`.
    fn open_as(path: &Path, writable: bool, alone: bool) -> Result<Self> {
        let is_device = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
        // A pipe that nobody writes to would be waited for, before it is known to be one.
        let flags = if alone && is_device { OFlag::O_NONBLOCK | OFlag::O_EXCL } else { OFlag::O_NONBLOCK };
        let open = |flags: OFlag| OpenOptions::new().read(true).write(writable).custom_flags(flags.bits()).open(path);
        // Evidence keeps its time of access, and each read costs less. Only the owner may ask for it.
        let file = match open(flags | OFlag::O_NOATIME) {
            Err(error) if error.raw_os_error() == Some(Errno::EPERM as i32) => open(flags),
            file => file,
        };
        Self::from_file(file.map_err(|error| open_error(error, writable).at(path))?, path)
    }

    /// Takes a file that is open already. `path` is for messages and for finding parents.
    ///
    /// # Errors
    /// When it is neither a regular file nor a block device.
    pub fn from_file(file: File, path: &Path) -> Result<Self> {
        let metadata = file.metadata().map_err(|error| Error::io(error, "can't be examined").at(path))?;
        let kind = metadata.file_type();
        if kind.is_dir() {
            return Err(Error::new(ErrorKind::InvalidInput, "is a folder, expected a file").at(path));
        }
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::new(ErrorKind::InvalidInput, "is neither a regular file nor a block device").at(path));
        }
        let is_device = kind.is_block_device();
        let file_system = if is_device { FileSystem::Other } else { FileSystem::of(&file) };
        Ok(Self {
            file,
            path: path.to_owned(),
            is_device,
            locked: AtomicBool::new(false),
            direct: None,
            early: AtomicBool::new(false),
            always_waits: AtomicBool::new(false),
            file_system,
            found: FoundData::default(),
        })
    }

    /// The same file, with requests past the host's page cache where they are aligned and the file system can. `writable`
    /// as it was opened.
    #[must_use]
    pub fn with_direct_io(mut self, writable: bool) -> Self {
        self.direct = Direct::of(&self.file, writable);
        if self.direct.is_none() {
            tracing::warn!("{}: its file system has no direct I/O, so it goes through the page cache", self.path.display());
        }
        self
    }

    /// The description that a request goes through.
    fn file_for<B: Deref<Target = [u8]>>(&self, bufs: &[B], offset: i64) -> &File {
        self.direct.as_ref().filter(|direct| direct.takes(bufs, offset)).map_or(&self.file, |direct| &direct.file)
    }

    fn file_for_shared(&self, bytes: &dyn SharedBytes, range: &Range<u64>, offset: u64) -> BorrowedFd<'_> {
        let direct = self.direct.as_ref().filter(|direct| direct.takes_shared(bytes, range, offset));
        direct.map_or(&self.file, |direct| &direct.file).as_fd()
    }

    /// The path it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode: the same for two paths that lead to one file.
    ///
    /// # Errors
    /// When the file can't be examined.
    pub fn identity(&self) -> Result<(u64, u64)> {
        Ok(identity_of(&self.metadata()?))
    }

    pub(super) fn metadata(&self) -> Result<Metadata> {
        self.file.metadata().map_err(|error| Error::io(error, "can't be examined").at(&self.path))
    }

    /// Refuses a file that no longer has the name it was opened by: another took it, or it was removed, before the lock was held.
    ///
    /// # Errors
    /// `Locked`.
    pub(crate) fn refuse_renamed(&self) -> Result<()> {
        if self.is_at(&self.path) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Locked, "was replaced while it was opened; try again").at(&self.path))
    }

    /// Locks the file against others, QEMU among them. The lock goes when the file is closed.
    ///
    /// # Errors
    /// `Locked` when someone holds it in a way that does not go together with `mode`.
    pub fn lock(&self, mode: LockMode) -> Result<()> {
        lock::acquire(&self.file, mode).map_err(|error| error.at(&self.path))?;
        self.locked.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Lets others read the file, and still keeps them from writing it: what was locked as [`LockMode::Write`] is locked
    /// as [`LockMode::Read`] now.
    pub fn share(&self) {
        lock::share(&self.file);
    }

    /// Tells the kernel to begin with the bytes that were just written, where they are to go early. (Its name speaks of dropping
    /// them from the page cache. What is still under way to the medium stays there, and the start is all that is wanted.)
    fn begin(&self, offset: u64, len: u64) {
        if self.early.load(Ordering::Relaxed)
            && let Some(len) = NonZeroU64::new(len).filter(|len| len.get() >= EARLY_MIN)
        {
            // A hint: who does not take it writes later.
            let _ = rustix::fs::fadvise(&self.file, offset, Some(len), Advice::DontNeed);
        }
    }

    /// Makes a range zero in a way that the host may know, or else by writing.
    fn make_zero(&self, flag: FallocateFlags, range: Range<u64>) -> io::Result<()> {
        let done = self.fallocate(flag | FallocateFlags::FALLOC_FL_KEEP_SIZE, &range);
        self.found.forget();
        match done {
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL | Errno::ENODEV) => write_zeros(self, range),
            done => Ok(done?),
        }
    }

    fn fallocate(&self, flags: FallocateFlags, range: &Range<u64>) -> nix::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let (offset, len) = (to_off(range.start)?, to_off(range.end - range.start)?);
        retry(|| fallocate(&self.file, flags, offset, len))
    }
}

/// A lock belongs to the open file, which a process that was just forked shares until it starts its program: closing
/// our side alone would leave it for that moment.
impl Drop for FileStorage {
    fn drop(&mut self) {
        if self.locked.load(Ordering::Relaxed) {
            lock::release(&self.file);
        }
    }
}

/// What tells one file from all others.
pub(super) fn identity_of(found: &Metadata) -> (u64, u64) {
    // Two nodes may name one device: the device number is what counts then.
    if found.file_type().is_block_device() { (0, found.rdev()) } else { (found.dev(), found.ino()) }
}

fn open_error(error: io::Error, writable: bool) -> Error {
    match error.raw_os_error() {
        Some(libc_code) if libc_code == Errno::EISDIR as i32 => {
            Error::new(ErrorKind::InvalidInput, "is a folder, expected a file")
        }
        Some(code) if code == Errno::EBUSY as i32 => {
            Error::new(ErrorKind::Locked, "is in use: mounted, or held by another device or program")
        }
        // EPERM is what an immutable file gives.
        Some(code) if writable && [Errno::EACCES, Errno::EROFS, Errno::EPERM].iter().any(|errno| *errno as i32 == code) => {
            Error::io(error, "can't be opened for writing").with_kind(ErrorKind::ReadOnly)
        }
        _ => Error::io(error, "can't be opened"),
    }
}

fn to_off(value: u64) -> nix::Result<i64> {
    i64::try_from(value).map_err(|_| Errno::EFBIG)
}

/// Repeats a call that a signal interrupted.
fn retry<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// Most requests are of one piece, and a call that need not look for others does all of it. What it did not do, or a signal
/// interrupted, is done from the start.
fn is_done(result: nix::Result<usize>, len: usize) -> io::Result<bool> {
    match result {
        Err(Errno::EINTR) => Ok(false),
        result => Ok(result? == len),
    }
}

/// Calls `read` until all of `bufs` is filled, however little each call brings and whatever interrupts it.
fn read_fully(
    mut bufs: &mut [IoSliceMut<'_>],
    mut offset: u64,
    mut read: impl FnMut(&mut [IoSliceMut<'_>], i64) -> nix::Result<usize>,
) -> io::Result<()> {
    IoSliceMut::advance_slices(&mut bufs, 0);
    while !bufs.is_empty() {
        let pieces = bufs.len().min(MAX_PIECES);
        let at = to_off(offset)?;
        let count = retry(|| read(&mut bufs[..pieces], at))?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        IoSliceMut::advance_slices(&mut bufs, count);
        offset += count as u64;
    }
    Ok(())
}

/// Calls `write` until all of `bufs` is written.
fn write_fully(
    bufs: &[IoSlice<'_>],
    mut offset: u64,
    mut write: impl FnMut(&[IoSlice<'_>], i64) -> nix::Result<usize>,
) -> io::Result<()> {
    // What is written is cut off a copy.
    let mut copy: smallvec::SmallVec<[IoSlice<'_>; 8]> = bufs.iter().map(|buf| IoSlice::new(buf)).collect();
    let mut bufs = &mut copy[..];
    IoSlice::advance_slices(&mut bufs, 0);
    while !bufs.is_empty() {
        let pieces = bufs.len().min(MAX_PIECES);
        let at = to_off(offset)?;
        let count = retry(|| write(&bufs[..pieces], at))?;
        if count == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        IoSlice::advance_slices(&mut bufs, count);
        offset += count as u64;
    }
    Ok(())
}

impl Storage for FileStorage {
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()> {
        if let [buf] = bufs {
            let at = to_off(offset)?;
            if is_done(pread(self.file_for(&[&**buf], at), buf, at), buf.len())? {
                return Ok(());
            }
        }
        read_fully(bufs, offset, |bufs, offset| preadv(self.file_for(bufs, offset), bufs, offset))
    }

    fn read_if_cached(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<bool> {
        if self.direct.as_ref().is_some_and(|direct| i64::try_from(offset).is_ok_and(|at| direct.takes(bufs, at))) {
            return Ok(false);
        }
        if self.file_system == FileSystem::Memory {
            return self.read_vectored_at(bufs, offset).map(|()| true);
        }
        if self.always_waits.load(Ordering::Relaxed) || bufs.len() > MAX_PIECES {
            return Ok(false);
        }
        let wanted: usize = bufs.iter().map(|buf| buf.len()).sum();
        match preadv2(&self.file, bufs, offset, ReadWriteFlags::NOWAIT) {
            // What is missing may be on the medium, or behind the end of the file: whoever waits for it finds out.
            Ok(count) => Ok(count == wanted),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(false),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS | rustix::io::Errno::INVAL) => {
                self.always_waits.store(true, Ordering::Relaxed);
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn splice_at(&self, pipe: BorrowedFd<'_>, range: Range<u64>, wait: bool) -> io::Result<Spliced> {
        // What goes past the page cache has no pages there.
        if self.direct.is_some() {
            return Ok(Spliced::No);
        }
        // The kernel can't be asked to leave out what is not in memory.
        if !wait && self.file_system != FileSystem::Memory {
            return Ok(Spliced::NotNow);
        }
        let mut at = to_off(range.start)?;
        let mut left = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        while left > 0 {
            match retry(|| splice(&self.file, Some(&mut at), pipe, None, left, SpliceFFlags::SPLICE_F_NONBLOCK)) {
                // Not every file system can.
                Err(Errno::EINVAL) if at.unsigned_abs() == range.start => return Ok(Spliced::No),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => left -= count?,
            }
        }
        Ok(Spliced::All)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        let at = to_off(offset)?;
        let is_done = match bufs {
            [buf] => is_done(pwrite(self.file_for(&[&**buf], at), buf, at), buf.len())?,
            _ => false,
        };
        if !is_done {
            write_fully(bufs, offset, |bufs, offset| pwritev(self.file_for(bufs, offset), bufs, offset))?;
        }
        if self.early.load(Ordering::Relaxed) {
            self.begin(offset, bufs.iter().map(|buf| buf.len() as u64).sum());
        }
        Ok(())
    }

    fn read_shared_at(&self, to: &dyn SharedBytes, range: Range<u64>, offset: u64) -> io::Result<()> {
        to.read_from(self.file_for_shared(to, &range, offset), offset, range)
    }

    fn write_shared_at(&self, from: &dyn SharedBytes, range: Range<u64>, offset: u64) -> io::Result<()> {
        let len = range.end - range.start;
        from.write_to(self.file_for_shared(from, &range, offset), offset, range)?;
        self.begin(offset, len);
        Ok(())
    }

    fn write_early(&self) {
        // Memory has no medium, and looking for pages to write costs time.
        self.early.store(self.file_system != FileSystem::Memory, Ordering::Relaxed);
    }

    fn len(&self) -> io::Result<u64> {
        if self.is_device {
            return Ok(u64::try_from(retry(|| lseek(&self.file, 0, Whence::SeekEnd))?).unwrap_or(0));
        }
        Ok(self.file.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let done = self.file.set_len(len);
        self.found.forget();
        done
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.make_zero(FallocateFlags::FALLOC_FL_PUNCH_HOLE, range)
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        self.make_zero(FallocateFlags::FALLOC_FL_ZERO_RANGE, range)
    }

    fn zeroes_fast(&self, keep: bool) -> bool {
        self.file_system == FileSystem::Disk || self.file_system == FileSystem::Memory && !keep
    }

    fn is_local(&self) -> bool {
        self.file_system != FileSystem::Other
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        if self.is_device {
            return Ok(());
        }
        match self.fallocate(FallocateFlags::FALLOC_FL_KEEP_SIZE, &range) {
            // A file system that can't reserve (tmpfs can) finds out when it is written.
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(()),
            result => Ok(result?),
        }
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let rest = || -> io::Result<Option<Range<u64>>> {
            let len = self.len()?;
            Ok((offset < len).then_some(offset..len))
        };
        if self.is_device {
            return rest();
        }
        let seek = |from: u64, whence| retry(|| lseek(&self.file, to_off(from)?, whence));
        self.found.or_find(offset, || match seek(offset, Whence::SeekData) {
            Err(Errno::ENXIO) => Ok(None),
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => rest(),
            Err(error) => Err(error.into()),
            Ok(start) => {
                let start = u64::try_from(start).unwrap_or(offset);
                let end = u64::try_from(seek(start, Whence::SeekHole)?).unwrap_or(start);
                Ok(Some(start..end))
            }
        })
    }

    fn can_grow(&self) -> bool {
        !self.is_device
    }

    fn as_file(&self) -> Option<&FileStorage> {
        Some(self)
    }

    fn allocated(&self) -> io::Result<u64> {
        if self.is_device { self.len() } else { Ok(self.file.metadata()?.blocks() * 512) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two bytes at a time, with an interruption before each.
    fn interrupted(calls: &mut usize) -> nix::Result<()> {
        *calls += 1;
        if *calls % 2 == 1 { Err(Errno::EINTR) } else { Ok(()) }
    }

    #[test]
    fn short_and_interrupted_calls_are_gone_on_with() {
        let file = b"0123456789";
        let (mut a, mut b, mut calls) = ([0; 3], [0; 4], 0);
        let read = |bufs: &mut [IoSliceMut<'_>], at: i64| {
            interrupted(&mut calls)?;
            let from = &file[at as usize..];
            let count = bufs[0].len().min(2).min(from.len());
            bufs[0][..count].copy_from_slice(&from[..count]);
            Ok(count)
        };
        read_fully(&mut [IoSliceMut::new(&mut a), IoSliceMut::new(&mut b)], 2, read).unwrap();
        assert_eq!((&a, &b), (b"234", b"5678"));

        let (mut written, mut calls) = (vec![b'.'; 9], 0);
        let write = |bufs: &[IoSlice<'_>], at: i64| {
            interrupted(&mut calls)?;
            let count = bufs[0].len().min(2);
            written[at as usize..][..count].copy_from_slice(&bufs[0][..count]);
            Ok(count)
        };
        write_fully(&[IoSlice::new(b"abc"), IoSlice::new(b"defg")], 1, write).unwrap();
        assert_eq!(written, b".abcdefg.");
    }

    #[test]
    fn a_call_that_did_not_do_all_is_not_done_and_its_failure_is_told() {
        assert!(is_done(Ok(3), 3).unwrap() && !is_done(Ok(2), 3).unwrap() && !is_done(Err(Errno::EINTR), 3).unwrap());
        assert_eq!(is_done(Err(Errno::EIO), 3).unwrap_err().raw_os_error(), Some(Errno::EIO as i32));
    }

    #[test]
    fn an_end_that_comes_early_is_told() {
        let mut buf = [0; 3];
        let error = read_fully(&mut [IoSliceMut::new(&mut buf)], 0, |_, _| Ok(0)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let error = write_fully(&[IoSlice::new(&buf)], 0, |_, _| Ok(0)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WriteZero);
    }

    #[test]
    fn the_end_of_data_is_looked_for_once_and_again_when_a_hole_came() {
        const MIB: u64 = 1 << 20;
        type Hole = fn(&FileStorage, Range<u64>) -> io::Result<()>;
        let holes: [Hole; 3] = [
            |storage, range| storage.punch_hole(range),
            |storage, range| {
                // Where the host has no such call, the zeros that are written are no hole.
                storage.zero_range(range.clone())?;
                if storage.zeroes_fast(true) { Ok(()) } else { storage.punch_hole(range) }
            },
            |storage, range| {
                storage.set_len(range.start)?;
                storage.set_len(4 * MIB)
            },
        ];
        for hole in holes {
            let file = tempfile::NamedTempFile::new().unwrap();
            let storage = FileStorage::open(file.path(), true).unwrap();
            storage.write_at(&vec![7; 4 << 20], 0).unwrap();
            storage.sync().unwrap();
            assert_eq!(storage.next_data(0).unwrap(), Some(0..4 * MIB));
            let other = FileStorage::open(file.path(), true).unwrap();
            hole(&other, MIB..2 * MIB).unwrap();
            assert_eq!(storage.next_data(MIB).unwrap(), Some(MIB..4 * MIB), "what it found itself is not looked for again");
            assert_eq!(other.next_data(0).unwrap(), Some(0..MIB));
            hole(&storage, MIB..2 * MIB).unwrap();
            assert_eq!(storage.next_data(0).unwrap(), Some(0..MIB));
            assert_ne!(storage.next_data(MIB).unwrap().map(|range| range.start), Some(MIB));
        }
    }

    #[test]
    fn reading_leaves_the_time_of_access() {
        use std::time::{Duration, SystemTime};
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        // So old that even where a time is kept once a day it would change.
        let old = SystemTime::now() - Duration::from_secs(30 * 24 * 3600);
        file.as_file().set_times(std::fs::FileTimes::new().set_accessed(old)).unwrap();
        for writable in [false, true] {
            let storage = FileStorage::open(file.path(), writable).unwrap();
            storage.read_vectored_at(&mut [IoSliceMut::new(&mut [0; 512])], 0).unwrap();
        }
        assert_eq!(file.as_file().metadata().unwrap().accessed().unwrap(), old);
    }

    #[test]
    fn what_is_not_in_memory_is_not_waited_for() {
        use std::io::Write;
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 1 << 20]).unwrap();
        let storage = FileStorage::open(file.path(), true).unwrap();
        storage.sync().unwrap();
        let mut buf = [0; 4096];
        assert!(storage.read_if_cached(&mut [IoSliceMut::new(&mut buf)], 4096).unwrap() || !storage.is_local());
        let drops = || {
            nix::fcntl::posix_fadvise(&storage.file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
            !storage.read_if_cached(&mut [IoSliceMut::new(&mut [0; 4096])], 512 << 10).unwrap()
        };
        // The kernel keeps what someone else looks at just now.
        assert!(storage.file_system == FileSystem::Memory || (0..100).any(|_| drops()));
        storage.read_vectored_at(&mut [IoSliceMut::new(&mut buf)], 512 << 10).unwrap();
        let mut again = [0; 4096];
        assert!(storage.read_if_cached(&mut [IoSliceMut::new(&mut again)], 512 << 10).unwrap() || !storage.is_local());
        assert_eq!((buf, again), ([7; 4096], [7; 4096]));
        let mut beyond = [0; 4096];
        let past_the_end = storage.read_if_cached(&mut [IoSliceMut::new(&mut beyond)], (1 << 20) - 512);
        assert!(!matches!(past_the_end, Ok(true)), "half of it is not there");
    }
}
