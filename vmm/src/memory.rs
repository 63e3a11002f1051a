//! The guest's memory, and disks' buffers in it.
//!
//! One of the two modules with `unsafe`: the kernel copies between files and the guest's bytes, which are named to it by their
//! addresses. Nowhere is a Rust reference to them: they are the guest's, who changes them as it likes.

#![allow(unsafe_code, reason = "the kernel is told addresses in the guest's memory")]

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use vhd_core::block::SharedBytes;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Where memory leaves room for what is not memory: interrupt controllers, devices, firmware.
pub const GAP: Range<u64> = 0xC000_0000..0x1_0000_0000;

/// `IOV_MAX` of Linux: more pieces in one call are refused.
const MAX_VECTORS: usize = 1024;

/// A range of the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The address as the guest knows it.
    pub address: u64,
    /// Bytes.
    pub len: u32,
}

/// It is not all memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at {address:#x} are not all memory of the guest")]
pub struct Outside {
    /// Where.
    pub address: u64,
    /// Bytes.
    pub len: u64,
}

/// The guest's memory: a cheap clone. Pages that were never touched take none of the host's.
#[derive(Clone, Debug)]
pub struct Memory(Arc<GuestMemoryMmap>);

impl Memory {
    /// `size` bytes from address 0 on, continued above [`GAP`].
    ///
    /// # Errors
    /// As the host has no room for the mapping.
    pub fn new(size: u64) -> io::Result<Self> {
        let low = size.min(GAP.start);
        let ranges = [(0, low), (GAP.end, size - low)];
        let ranges = ranges.into_iter().filter(|(_, len)| *len > 0);
        let ranges: Vec<_> = ranges.map(|(start, len)| (GuestAddress(start), len as usize)).collect();
        let mapped = GuestMemoryMmap::from_ranges(&ranges).map_err(io::Error::other)?;
        let memory = Self(Arc::new(mapped));
        memory.keep_out_of_dumps()?;
        Ok(memory)
    }

    /// What a guest has in memory is no part of what is left of a monitor that died.
    fn keep_out_of_dumps(&self) -> io::Result<()> {
        for range in self.ranges() {
            let start = self.host_range(&range).map_err(io::Error::other)?;
            // SAFETY: `host_range` found that many bytes of a mapping from `start` on. The advice changes no byte of them, and
            // nothing that is read through any pointer.
            let result = unsafe { libc::madvise(start.cast(), (range.end - range.start) as usize, libc::MADV_DONTDUMP) };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    /// For crates that take the memory as it is.
    #[must_use]
    pub fn as_mapped(&self) -> &GuestMemoryMmap {
        &self.0
    }

    /// The ranges that are memory, ascending.
    #[must_use]
    pub fn ranges(&self) -> Vec<Range<u64>> {
        self.0.iter().map(|region| region.start_addr().0..region.start_addr().0 + region.len()).collect()
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.0.iter().map(GuestMemoryRegion::len).sum()
    }

    /// Copies from the guest.
    ///
    /// # Errors
    /// [`Outside`].
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Outside> {
        let outside = Outside { address, len: bytes.len() as u64 };
        self.0.read_slice(bytes, GuestAddress(address)).map_err(|_| outside)
    }

    /// Copies to the guest.
    ///
    /// # Errors
    /// [`Outside`]; a part may have been written then.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Outside> {
        let outside = Outside { address, len: bytes.len() as u64 };
        self.0.write_slice(bytes, GuestAddress(address)).map_err(|_| outside)
    }

    /// The host's address of a range that is all in one piece.
    pub(crate) fn host_range(&self, range: &Range<u64>) -> Result<*mut u8, Outside> {
        let (address, len) = (range.start, range.end - range.start);
        let slice = self.0.get_slice(GuestAddress(address), len as usize).map_err(|_| Outside { address, len })?;
        Ok(slice.ptr_guard_mut().as_ptr())
    }

    /// These segments as one run of bytes, for a disk to put its bytes into or to take them from.
    ///
    /// # Errors
    /// [`Outside`].
    pub fn run_of(&self, segments: &[Segment]) -> Result<Run<'_>, Outside> {
        let used = segments.iter().filter(|segment| segment.len > 0);
        let mut len = 0;
        let pieces = used.map(|segment| {
            let end = segment.address.checked_add(u64::from(segment.len));
            let end = end.ok_or(Outside { address: segment.address, len: u64::from(segment.len) })?;
            // A segment is never across the gap, so it is one piece.
            let host = self.host_range(&(segment.address..end))?;
            len += u64::from(segment.len);
            Ok(Piece { host, address: segment.address, len: segment.len as usize })
        });
        Ok(Run { pieces: pieces.collect::<Result<_, Outside>>()?, len, memory: self })
    }
}

/// A piece of the guest's memory, and where this process has it.
#[derive(Clone, Copy, Debug)]
struct Piece {
    host: *mut u8,
    address: u64,
    len: usize,
}

/// Segments of the guest's memory as one run of bytes.
///
/// There is no reference to any of them, here or elsewhere: the guest, and whoever serves another request that it aims at the
/// same bytes, may change them at any time. The kernel copies them to and from files by their addresses; what else is done is a
/// copy by `vm-memory`, whose accesses are volatile.
#[derive(Debug)]
pub struct Run<'a> {
    pieces: Vec<Piece>,
    len: u64,
    memory: &'a Memory,
}

impl Run<'_> {
    /// The pieces of a range, cut to it.
    fn within(&self, range: Range<u64>) -> io::Result<impl Iterator<Item = Piece>> {
        if range.start > range.end || range.end > self.len {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut start = 0;
        Ok(self.pieces.iter().filter_map(move |piece| {
            let (first, end) = (start, start + piece.len as u64);
            start = end;
            let (from, to) = (range.start.max(first), range.end.min(end));
            let skipped = from.checked_sub(first).filter(|_| from < to)?;
            let (address, len) = (piece.address + skipped, (to - from) as usize);
            Some(Piece { host: piece.host.wrapping_add(skipped as usize), address, len })
        }))
    }

    /// Calls `transfer` with the vectors of a range and a file offset until all of it is done, however little each call does.
    fn transfer(
        &self,
        range: Range<u64>,
        mut offset: u64,
        none: io::ErrorKind,
        mut transfer: impl FnMut(&[libc::iovec], i64) -> isize,
    ) -> io::Result<()> {
        let vector = |piece: Piece| libc::iovec { iov_base: piece.host.cast(), iov_len: piece.len };
        let mut vectors: Vec<_> = self.within(range)?.map(vector).collect();
        let mut rest = &mut vectors[..];
        while !rest.is_empty() {
            let at = i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
            let mut done = match transfer(&rest[..rest.len().min(MAX_VECTORS)], at) {
                0 => return Err(none.into()),
                done => match usize::try_from(done) {
                    Ok(done) => done,
                    Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) => return Err(io::Error::last_os_error()),
                },
            };
            offset += done as u64;
            while let Some(first) = rest.first_mut() {
                if done < first.iov_len {
                    first.iov_base = first.iov_base.cast::<u8>().wrapping_add(done).cast();
                    first.iov_len -= done;
                    break;
                }
                done -= first.iov_len;
                rest = &mut rest[1..];
            }
        }
        Ok(())
    }
}

impl SharedBytes for Run<'_> {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_from(&self, file: BorrowedFd<'_>, offset: u64, range: Range<u64>) -> io::Result<()> {
        self.transfer(range, offset, io::ErrorKind::UnexpectedEof, |vectors, at| {
            // SAFETY: `run_of` found the bytes of each vector in a mapping, which `self.memory` keeps. The kernel alone writes
            // to them, and no reference to them exists that could be told otherwise.
            unsafe { libc::preadv(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32, at) }
        })
    }

    fn write_to(&self, file: BorrowedFd<'_>, offset: u64, range: Range<u64>) -> io::Result<()> {
        self.transfer(range, offset, io::ErrorKind::WriteZero, |vectors, at| {
            // SAFETY: as in `read_from`; here the kernel reads them.
            unsafe { libc::pwritev(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32, at) }
        })
    }

    fn put(&self, at: u64, mut bytes: &[u8]) -> io::Result<()> {
        for piece in self.within(at..at.saturating_add(bytes.len() as u64))? {
            let (head, rest) = bytes.split_at(piece.len);
            self.memory.write(piece.address, head).map_err(io::Error::other)?;
            bytes = rest;
        }
        Ok(())
    }

    fn get(&self, at: u64, mut bytes: &mut [u8]) -> io::Result<()> {
        for piece in self.within(at..at.saturating_add(bytes.len() as u64))? {
            let (head, rest) = bytes.split_at_mut(piece.len);
            self.memory.read(piece.address, head).map_err(io::Error::other)?;
            bytes = rest;
        }
        Ok(())
    }

    fn is_aligned(&self, range: Range<u64>, lengths: usize, addresses: usize) -> bool {
        let is_aligned = |piece: Piece| piece.len.is_multiple_of(lengths) && piece.host.addr().is_multiple_of(addresses);
        self.within(range).is_ok_and(|mut pieces| pieces.all(is_aligned))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(address: u64, len: u32) -> Segment {
        Segment { address, len }
    }

    #[test]
    fn memory_continues_above_the_gap() {
        let memory = Memory::new(GAP.start + 0x10_0000).unwrap();
        assert_eq!(memory.ranges(), [0..GAP.start, GAP.end..GAP.end + 0x10_0000]);
        memory.write(GAP.end + 1, b"above").unwrap();
        let mut bytes = [0; 5];
        memory.read(GAP.end + 1, &mut bytes).unwrap();
        assert_eq!(&bytes, b"above");
        assert!(memory.read(GAP.start - 2, &mut bytes).is_err());
        assert!(memory.write(u64::MAX - 1, &bytes).is_err());
        assert!(memory.run_of(&[segment(GAP.start - 1, 2)]).is_err());
        assert!(memory.run_of(&[segment(u64::MAX, 2)]).is_err());
    }

    #[test]
    fn a_run_is_the_guests_bytes_in_order() {
        let memory = Memory::new(0x10000).unwrap();
        let run = memory.run_of(&[segment(0x2000, 2), segment(0, 0), segment(0x1000, 3)]).unwrap();
        assert_eq!((run.len(), run.is_empty()), (5, false));
        run.put(0, b"abcde").unwrap();
        let mut bytes = [0; 3];
        memory.read(0x1000, &mut bytes).unwrap();
        assert_eq!(&bytes, b"cde");
        run.get(1, &mut bytes).unwrap();
        assert_eq!(&bytes, b"bcd");
        run.put_zeros(1..4).unwrap();
        run.get(1, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 3]);
        assert!(run.put(3, b"xyz").is_err() && run.get(u64::MAX, &mut bytes).is_err() && run.put_zeros(5..6).is_err());
        assert!(run.is_aligned(0..5, 1, 4096) && !run.is_aligned(0..5, 2, 1) && !run.is_aligned(1..2, 1, 4096));
    }

    #[test]
    fn files_are_read_and_written_in_place_whole() {
        use std::os::fd::AsFd;
        use std::os::unix::fs::FileExt;
        let file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..3000_u32).map(|number| number as u8).collect();
        file.write_all_at(&content, 100).unwrap();
        let memory = Memory::new(0x10000).unwrap();
        // More pieces than one call takes, and some that share bytes: what comes later counts.
        let segments: Vec<_> = (0..1500).map(|number| segment(0x1000 + number * 2, 2)).collect();
        let run = memory.run_of(&segments).unwrap();
        run.read_from(file.as_fd(), 100, 0..3000).unwrap();
        let mut bytes = vec![0; 3000];
        memory.read(0x1000, &mut bytes).unwrap();
        assert!(bytes == content);
        run.write_to(file.as_fd(), 5000, 1..2999).unwrap();
        file.read_exact_at(&mut bytes[..2998], 5000).unwrap();
        assert!(bytes[..2998] == content[1..2999]);
        let shared = memory.run_of(&[segment(0x3000, 4), segment(0x3002, 4)]).unwrap();
        shared.read_from(file.as_fd(), 100, 0..8).unwrap();
        memory.read(0x3000, &mut bytes[..6]).unwrap();
        assert_eq!(bytes[..6], [0, 1, 4, 5, 6, 7]);
        assert_eq!(run.read_from(file.as_fd(), 7990, 0..100).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
