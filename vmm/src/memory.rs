//! The guest's memory, and disks' buffers in it.
//!
//! One of the two modules with `unsafe`: a disk reads and writes the guest's bytes in place.

#![allow(unsafe_code, reason = "buffers of a disk are made of the guest's memory")]

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Where memory leaves room for what is not memory: interrupt controllers, devices, firmware.
pub const GAP: Range<u64> = 0xC000_0000..0x1_0000_0000;

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
    pub fn new(size: u64) -> std::io::Result<Self> {
        let low = size.min(GAP.start);
        let ranges = [(0, low), (GAP.end, size - low)];
        let ranges = ranges.into_iter().filter(|(_, len)| *len > 0);
        let ranges: Vec<_> = ranges.map(|(start, len)| (GuestAddress(start), len as usize)).collect();
        let mapped = GuestMemoryMmap::from_ranges(&ranges).map_err(std::io::Error::other)?;
        Ok(Self(Arc::new(mapped)))
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

    /// Calls `fill` with buffers that are these segments, for a disk to put its bytes into, and which byte of them all is
    /// the first: in one call, or in one for each segment where two of them share bytes.
    ///
    /// # Errors
    /// [`Outside`]; `fill` was not called then. As `fill` fails.
    pub fn fill<E>(
        &self,
        segments: &[Segment],
        mut fill: impl FnMut(&mut [IoSliceMut<'_>], u64) -> Result<(), E>,
    ) -> Result<Result<(), E>, Outside> {
        let pieces = self.pieces(segments)?;
        // Two Rust buffers are never the same bytes.
        let at_once = if overlap(segments) { 1 } else { pieces.len().max(1) };
        let mut first = 0;
        for pieces in pieces.chunks(at_once) {
            if let Err(error) = fill(&mut self.buffers(pieces), first) {
                return Ok(Err(error));
            }
            first += pieces.iter().map(|(_, len)| *len as u64).sum::<u64>();
        }
        Ok(Ok(()))
    }

    /// Buffers that are these pieces of [`Self::pieces`], of which no two share a byte.
    fn buffers(&self, pieces: &[(*mut u8, usize)]) -> Vec<IoSliceMut<'_>> {
        let buffers = pieces.iter().map(|&(start, len)| {
            // SAFETY: `pieces` found `len` bytes of a mapping from `start` on, which `self` keeps mapped while `fill`
            // runs. No other buffer of this call has a byte of them. The guest, and other requests that it aims at
            // the same bytes, may change them meanwhile: they are plain bytes, that have no value which is invalid,
            // and nothing that decides anything is read through them; the kernel copies to or from them.
            IoSliceMut::new(unsafe { std::slice::from_raw_parts_mut(start, len) })
        });
        buffers.collect()
    }

    /// Calls `drain` with buffers that are these segments, for a disk to take its bytes from.
    ///
    /// # Errors
    /// [`Outside`]; `drain` was not called then.
    pub fn drain<T>(&self, segments: &[Segment], drain: impl FnOnce(&[IoSlice<'_>]) -> T) -> Result<T, Outside> {
        let buffers = self.pieces(segments)?.into_iter().map(|(start, len)| {
            // SAFETY: as in `fill`; shared buffers may overlap.
            IoSlice::new(unsafe { std::slice::from_raw_parts(start, len) })
        });
        Ok(drain(&buffers.collect::<Vec<_>>()))
    }

    /// Where each segment is in this process. A segment is never across the gap, so it is one piece.
    fn pieces(&self, segments: &[Segment]) -> Result<Vec<(*mut u8, usize)>, Outside> {
        let used = segments.iter().filter(|segment| segment.len > 0);
        let pieces = used.map(|segment| {
            let end = segment.address.checked_add(u64::from(segment.len));
            let end = end.ok_or(Outside { address: segment.address, len: u64::from(segment.len) })?;
            Ok((self.host_range(&(segment.address..end))?, segment.len as usize))
        });
        pieces.collect()
    }
}

/// Whether two of the segments share a byte.
fn overlap(segments: &[Segment]) -> bool {
    if segments.len() < 2 {
        return false;
    }
    let mut sorted: Vec<_> = segments.iter().filter(|segment| segment.len > 0).collect();
    sorted.sort_unstable_by_key(|segment| segment.address);
    sorted.windows(2).any(|pair| pair[0].address + u64::from(pair[0].len) > pair[1].address)
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
        assert!(memory.drain(&[segment(GAP.start - 1, 2)], |_| ()).is_err());
        assert!(memory.drain(&[segment(u64::MAX, 2)], |_| ()).is_err());
    }

    #[test]
    fn buffers_are_the_guests_bytes_in_order() {
        let memory = Memory::new(0x10000).unwrap();
        let segments = [segment(0x2000, 2), segment(0, 0), segment(0x1000, 3)];
        memory
            .fill(&segments, |buffers, first| {
                assert_eq!((buffers.len(), first), (2, 0));
                buffers[0].copy_from_slice(b"ab");
                buffers[1].copy_from_slice(b"cde");
                Ok::<(), Outside>(())
            })
            .unwrap()
            .unwrap();
        let taken = memory.drain(&segments, |buffers| buffers.iter().flat_map(|b| b.to_vec()).collect::<Vec<_>>()).unwrap();
        assert_eq!(taken, b"abcde");
    }

    #[test]
    fn segments_that_overlap_are_filled_in_order() {
        let memory = Memory::new(0x10000).unwrap();
        let mut firsts = Vec::new();
        memory
            .fill(&[segment(0x1000, 4), segment(0x1002, 4)], |buffers, first| {
                firsts.push(first);
                let content = if first == 0 { b"aaaa" } else { b"bbbb" };
                assert_eq!(buffers.len(), 1);
                buffers[0].copy_from_slice(content);
                Ok::<(), Outside>(())
            })
            .unwrap()
            .unwrap();
        assert_eq!(firsts, [0, 4]);
        let mut bytes = [0; 6];
        memory.read(0x1000, &mut bytes).unwrap();
        assert_eq!(&bytes, b"aabbbb");
    }
}
