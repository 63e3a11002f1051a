//! Buffers for data, used again and again: to get one from the system would cost more than to fill it.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use vhd_core::storage::AlignedBuffer;

use crate::pipes::{Pipe, Pipes};

/// Bytes that are moved at once; longer requests go in pieces, so that no client makes the server hold more.
pub const PIECE: usize = 256 << 10;

/// The sizes that buffers have.
const SIZES: [usize; 3] = [4 << 10, 32 << 10, PIECE];
/// Bytes of unused buffers that are kept of each size.
const KEPT: usize = 8 << 20;

/// Where buffers come from and go back to.
#[derive(Debug, Default)]
pub struct Pool {
    kept: [Mutex<Vec<AlignedBuffer>>; SIZES.len()],
    pipes: Arc<Pipes>,
}

impl Pool {
    /// A buffer of `len` bytes, [`PIECE`] at most, that hold anything.
    pub fn take(self: &Arc<Self>, len: usize) -> Buffer {
        let class = SIZES.iter().position(|size| len <= *size).unwrap_or(SIZES.len() - 1);
        let kept = self.kept[class].lock().unwrap_or_else(PoisonError::into_inner).pop();
        let bytes = kept.unwrap_or_else(|| AlignedBuffer::new(SIZES[class]));
        Buffer { bytes: Some(bytes), len: len.min(SIZES[class]), class, pool: Arc::clone(self) }
    }

    /// There are no more pipes than that at once.
    pub fn limit_pipes(&self, most: usize) {
        self.pipes.limit(most);
    }

    /// A pipe in place of a buffer, as [`Pipes::take`] has it.
    pub fn pipe(&self) -> Option<Pipe> {
        self.pipes.take()
    }
}

/// Bytes that begin on a page.
#[derive(Debug)]
pub struct Buffer {
    /// There until it is dropped.
    bytes: Option<AlignedBuffer>,
    len: usize,
    class: usize,
    pool: Arc<Pool>,
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.as_ref().map_or(&[], |bytes| &bytes[..self.len])
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.bytes {
            Some(bytes) => &mut bytes[..self.len],
            None => &mut [],
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut kept = self.pool.kept[self.class].lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT / SIZES[self.class] {
            kept.extend(self.bytes.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_and_few_are_kept() {
        let pool = Arc::<Pool>::default();
        let address = pool.take(4096).as_ptr().addr();
        assert_eq!(pool.take(1).as_ptr().addr(), address);
        assert_eq!(address % 4096, 0);
        drop((0..100).map(|_| pool.take(PIECE)).collect::<Vec<_>>());
        assert_eq!(pool.kept[2].lock().unwrap().len(), KEPT / PIECE);
    }
}
