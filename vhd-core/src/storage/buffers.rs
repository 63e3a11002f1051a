//! Scattered buffers, handed out piece by piece.

use std::io::{IoSlice, IoSliceMut};

use smallvec::SmallVec;

/// Requests seldom have more pieces than this; the rest goes to the heap.
const INLINE: usize = 4;

/// The buffers of a read, consumed from the front as pieces of the disk are found.
#[derive(Debug)]
pub struct ReadBuffers<'a> {
    /// In reverse order, so that the front is popped from the end.
    rest: SmallVec<[&'a mut [u8]; INLINE]>,
}

impl<'a> ReadBuffers<'a> {
    /// Buffers that are filled one after the other.
    pub fn new<'b>(bufs: &'a mut [IoSliceMut<'b>]) -> Self
    where
        'b: 'a,
    {
        Self { rest: bufs.iter_mut().rev().map(|buf| &mut **buf).collect() }
    }

    /// Bytes that are left.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.rest.iter().map(|buf| buf.len() as u64).sum()
    }

    /// True when nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The next `len` bytes, or what is left.
    pub fn take(&mut self, mut len: u64) -> SmallVec<[IoSliceMut<'a>; INLINE]> {
        let mut taken = SmallVec::new();
        while len > 0 {
            let Some(buf) = self.rest.pop() else { break };
            let fits = usize::try_from(len).unwrap_or(usize::MAX).min(buf.len());
            let (head, tail) = buf.split_at_mut(fits);
            if !tail.is_empty() {
                self.rest.push(tail);
            }
            len -= fits as u64;
            if !head.is_empty() {
                taken.push(IoSliceMut::new(head));
            }
        }
        taken
    }

    /// Fills the next `len` bytes with zeros.
    pub fn fill_zero(&mut self, len: u64) {
        for mut buf in self.take(len) {
            buf.fill(0);
        }
    }
}

/// The buffers of a write, consumed from the front.
#[derive(Clone, Debug)]
pub struct WriteBuffers<'a> {
    /// In reverse order, as in [`ReadBuffers`].
    rest: SmallVec<[&'a [u8]; INLINE]>,
}

impl<'a> WriteBuffers<'a> {
    /// Buffers that are written one after the other.
    pub fn new<'b>(bufs: &'a [IoSlice<'b>]) -> Self
    where
        'b: 'a,
    {
        Self { rest: bufs.iter().rev().map(|buf| &**buf).collect() }
    }

    /// Bytes that are left.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.rest.iter().map(|buf| buf.len() as u64).sum()
    }

    /// True when nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The next `len` bytes, or what is left.
    pub fn take(&mut self, mut len: u64) -> SmallVec<[IoSlice<'a>; INLINE]> {
        let mut taken = SmallVec::new();
        while len > 0 {
            let Some(buf) = self.rest.pop() else { break };
            let fits = usize::try_from(len).unwrap_or(usize::MAX).min(buf.len());
            let (head, tail) = buf.split_at(fits);
            if !tail.is_empty() {
                self.rest.push(tail);
            }
            len -= fits as u64;
            if !head.is_empty() {
                taken.push(IoSlice::new(head));
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cross_buffers() {
        let (mut a, mut b, mut c) = ([0_u8; 3], [0_u8; 0], [0_u8; 5]);
        let mut bufs = [IoSliceMut::new(&mut a), IoSliceMut::new(&mut b), IoSliceMut::new(&mut c)];
        let mut rest = ReadBuffers::new(&mut bufs);
        assert_eq!(rest.len(), 8);
        let lens = |taken: SmallVec<[IoSliceMut<'_>; INLINE]>| taken.iter().map(|buf| buf.len()).collect::<Vec<_>>();
        assert_eq!(lens(rest.take(2)), [2]);
        assert_eq!(lens(rest.take(3)), [1, 2]);
        assert_eq!(lens(rest.take(100)), [3]);
        assert!(rest.is_empty());

        let bufs = [IoSlice::new(b"abc"), IoSlice::new(b"defgh")];
        let mut rest = WriteBuffers::new(&bufs);
        assert_eq!(&*rest.take(4)[1], b"d");
        assert_eq!(&*rest.take(9)[0], b"efgh");
    }
}
