//! A disk in memory, and a mount of it.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, RwLock};

use tempfile::TempDir;
use vhd_core::block::{BlockDevice, Capabilities, Extent, ExtentState, ZeroMode};
use vhd_core::{Disk, Error, ErrorKind, Result};
use vhd_fuse::{MountOptions, Mounted, mount};

/// Space is taken in units of this.
pub const BLOCK: u64 = 64 << 10;

/// Bytes in memory, what of them was ever written, and how often the disk was asked for what.
#[derive(Default)]
pub struct Memory {
    bytes: RwLock<Bytes>,
    pub read_only: bool,
    pub flushes: AtomicUsize,
    pub closes: AtomicUsize,
    /// Writes and flushes fail for want of room.
    pub full: AtomicBool,
    /// Closing fails.
    pub broken: AtomicBool,
    /// The medium fails at everything.
    pub sick: AtomicBool,
    pub reads: AtomicUsize,
    pub largest_read: AtomicUsize,
    pub largest_write: AtomicUsize,
}

#[derive(Default)]
struct Bytes {
    data: Vec<u8>,
    allocated: Vec<bool>,
}

impl Memory {
    pub fn new(size: usize) -> Arc<Self> {
        let allocated = vec![false; size.div_ceil(BLOCK as usize)];
        Arc::new(Self { bytes: RwLock::new(Bytes { data: vec![0; size], allocated }), ..Self::default() })
    }

    pub fn contents(&self) -> Vec<u8> {
        self.bytes.read().unwrap().data.clone()
    }

    pub fn blocks(&self) -> usize {
        self.bytes.read().unwrap().allocated.iter().filter(|allocated| **allocated).count()
    }
}

/// The disk proper: what the test keeps and what is mounted are the same memory.
pub struct Shared(pub Arc<Memory>);

fn inside(range: &Range<u64>, size: usize) -> Result<Range<usize>> {
    if range.start > range.end || range.end > size as u64 {
        return Err(Error::new(ErrorKind::OutOfRange, format!("{range:?} is not inside {size}")));
    }
    Ok(range.start as usize..range.end as usize)
}

impl Shared {
    fn check_health(&self) -> Result<()> {
        if self.0.sick.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Io, "the medium is sick"));
        }
        Ok(())
    }

    fn check_room(&self) -> Result<()> {
        self.check_health()?;
        if self.0.full.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::NoSpace, "no room on the host"));
        }
        Ok(())
    }
}

impl BlockDevice for Shared {
    fn capabilities(&self) -> Capabilities {
        let size = self.0.bytes.read().unwrap().data.len() as u64;
        Capabilities { size, read_only: self.0.read_only, discard_granularity: BLOCK, layers: 1 }
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        self.check_health()?;
        let bytes = self.0.bytes.read().unwrap();
        let len: usize = bufs.iter().map(|buf| buf.len()).sum();
        self.0.reads.fetch_add(1, Ordering::Relaxed);
        self.0.largest_read.fetch_max(len, Ordering::Relaxed);
        let mut rest = &bytes.data[inside(&(offset..offset + len as u64), bytes.data.len())?];
        for buf in bufs {
            let (head, tail) = rest.split_at(buf.len());
            buf.copy_from_slice(head);
            rest = tail;
        }
        Ok(())
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        self.check_room()?;
        let mut bytes = self.0.bytes.write().unwrap();
        let len: usize = bufs.iter().map(|buf| buf.len()).sum();
        self.0.largest_write.fetch_max(len, Ordering::Relaxed);
        let range = inside(&(offset..offset + len as u64), bytes.data.len())?;
        let mut start = range.start;
        for buf in bufs {
            bytes.data[start..start + buf.len()].copy_from_slice(buf);
            start += buf.len();
        }
        if len > 0 {
            let blocks = range.start / BLOCK as usize..range.end.div_ceil(BLOCK as usize);
            bytes.allocated[blocks].fill(true);
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.check_room()?;
        self.0.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Result<()> {
        self.check_health()?;
        let mut bytes = self.0.bytes.write().unwrap();
        let range = inside(&range, bytes.data.len())?;
        let size = bytes.data.len();
        bytes.data[range.clone()].fill(0);
        if matches!(mode, ZeroMode::Free) {
            let last = if range.end == size { size.div_ceil(BLOCK as usize) } else { range.end / BLOCK as usize };
            let whole = range.start.div_ceil(BLOCK as usize)..last;
            if !whole.is_empty() {
                bytes.allocated[whole].fill(false);
            }
        }
        Ok(())
    }

    fn extents(&self, range: Range<u64>, visit: &mut dyn FnMut(Extent) -> Result<()>) -> Result<()> {
        let bytes = self.0.bytes.read().unwrap();
        inside(&range, bytes.data.len())?;
        let mut pending: Option<Extent> = None;
        let mut start = range.start;
        while start < range.end {
            let end = ((start / BLOCK + 1) * BLOCK).min(range.end);
            let data = bytes.allocated[(start / BLOCK) as usize];
            let state = if data { ExtentState::Data } else { ExtentState::Absent };
            let next = Extent { range: start..end, state, depth: 0, offset: data.then_some(start) };
            if !pending.as_mut().is_some_and(|pending| pending.merge(&next)) {
                pending.replace(next).map_or(Ok(()), &mut *visit)?;
            }
            start = end;
        }
        pending.map_or(Ok(()), visit)
    }

    fn layer_path(&self, _depth: usize) -> Option<PathBuf> {
        None
    }

    fn close(&self) -> Result<()> {
        self.flush()?;
        if self.0.broken.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Io, "the disk is broken"));
        }
        self.0.closes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// A mounted disk, its memory and its folder.
pub struct Fixture {
    pub memory: Arc<Memory>,
    pub mounted: Mounted,
    pub file: PathBuf,
    pub folder: TempDir,
}

/// Mounts `memory`, or says why it can't be done here. In CI it must be possible.
pub fn mount_memory(memory: Arc<Memory>, options: &MountOptions) -> Option<Fixture> {
    if !Path::new("/dev/fuse").exists() {
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "no /dev/fuse, and CI must test mounts");
        eprintln!("SKIPPED: there is no /dev/fuse here, so NOTHING about mounts is tested");
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let mounted = mount(Disk::new(Shared(Arc::clone(&memory))), folder.path(), options).unwrap();
    let file = folder.path().join(vhd_fuse::DISK_FILE);
    Some(Fixture { memory, mounted, file, folder })
}

/// The same with everything as usual.
pub fn mount_size(size: usize) -> Option<Fixture> {
    mount_memory(Memory::new(size), &MountOptions::default())
}

/// Bytes that tell their place.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect()
}
