//! I/O past the host's page cache, for the requests that allow it.

use std::fs::{File, OpenOptions};
use std::ops::{Deref, Range};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use nix::fcntl::OFlag;
use rustix::fs::{AtFlags, OFlags, StatxFlags, fcntl_getfl, statx};

use super::SharedBytes;

/// A second description of a file, opened with `O_DIRECT`, and what the file system wants of its requests.
///
/// The kernel keeps both views of a file in step: a direct write drops what the cache has of its range, a direct read
/// writes that out first. So requests that are not aligned, and all metadata, go through the cache as always.
#[derive(Debug)]
pub(super) struct Direct {
    pub(super) file: File,
    /// Offsets and lengths are multiples of this.
    offset_align: usize,
    /// Addresses are.
    memory_align: usize,
}

impl Direct {
    /// `None` where the file system has no such thing (tmpfs, for one).
    pub(super) fn of(file: &File, writable: bool) -> Option<Self> {
        let found = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
        let align = |align: u32| usize::try_from(align).ok().filter(|align| align.is_power_of_two());
        // Kernels before 6.1 don't tell: a page goes everywhere.
        let told = found.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
        let (offset_align, memory_align) =
            if told { (align(found.stx_dio_offset_align)?, align(found.stx_dio_mem_align)?) } else { (4096, 4096) };
        // The same file, whatever its path leads to now.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let leaves_times = fcntl_getfl(file).is_ok_and(|flags| flags.contains(OFlags::NOATIME));
        let flags = if leaves_times { OFlag::O_DIRECT | OFlag::O_NOATIME } else { OFlag::O_DIRECT };
        let file = OpenOptions::new().read(true).write(writable).custom_flags(flags.bits()).open(path).ok()?;
        Some(Self { file, offset_align, memory_align })
    }

    /// As [`Self::takes`], of memory that others use too.
    pub(super) fn takes_shared(&self, bytes: &dyn SharedBytes, range: &Range<u64>, offset: u64) -> bool {
        let is_aligned = usize::try_from(offset).is_ok_and(|offset| offset % self.offset_align == 0);
        is_aligned && bytes.is_aligned(range.clone(), self.offset_align, self.memory_align)
    }

    /// Whether a request may go this way.
    pub(super) fn takes<B: Deref<Target = [u8]>>(&self, bufs: &[B], offset: i64) -> bool {
        let offset = usize::try_from(offset).unwrap_or(1);
        let is_aligned =
            |buf: &B| buf.len() % self.offset_align == 0 && buf.as_ptr().addr() % self.memory_align == 0 && !buf.is_empty();
        offset % self.offset_align == 0 && bufs.iter().all(is_aligned)
    }
}
