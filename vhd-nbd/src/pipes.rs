//! Pipes for data that is sent without being copied: what is in them are the pages of the host's page cache.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;
use vhd_core::Result;
use vhd_core::block::Spliced;

use crate::buffers::PIECE;

/// Pipes at once: each is two descriptors.
pub const MOST: usize = 64;
/// Pipes that are kept for the next who wants one.
const KEPT: usize = 16;
/// Room for the pages of a piece, which may begin and end inside one: the kernel rounds it up to a power of two.
const ROOM: usize = PIECE + 4096;

#[derive(Debug)]
struct Ends {
    read: OwnedFd,
    write: OwnedFd,
}

impl Ends {
    fn new() -> nix::Result<Self> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        fcntl(&write, FcntlArg::F_SETPIPE_SZ(ROOM as i32))?;
        Ok(Self { read, write })
    }
}

/// Where pipes come from and go back to.
#[derive(Debug)]
pub struct Pipes {
    kept: Mutex<Vec<Ends>>,
    out: AtomicUsize,
    most: AtomicUsize,
}

impl Default for Pipes {
    fn default() -> Self {
        Self { kept: Mutex::default(), out: AtomicUsize::new(0), most: AtomicUsize::new(MOST) }
    }
}

impl Pipes {
    /// There are no more than so many at once, from now on.
    pub fn limit(&self, most: usize) {
        self.most.store(most, Ordering::Relaxed);
    }

    /// An empty pipe with room for a piece. `None` where there are enough, or the system has none: then data is copied.
    pub fn take(self: &Arc<Self>) -> Option<Pipe> {
        // It counts itself out again.
        let mut pipe = Pipe { ends: None, content: Content::Nothing, pipes: Arc::clone(self) };
        if self.out.fetch_add(1, Ordering::Relaxed) >= self.most.load(Ordering::Relaxed) {
            return None;
        }
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).pop();
        pipe.ends = Some(kept.map_or_else(Ends::new, Ok).ok()?);
        Some(pipe)
    }
}

/// What a pipe holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Nothing,
    /// So many bytes at first, and so many that were not sent yet.
    Data {
        len: usize,
        left: usize,
    },
    Unknown,
}

/// A pipe with data, or without.
#[derive(Debug)]
pub struct Pipe {
    /// There until it is dropped.
    ends: Option<Ends>,
    content: Content,
    pipes: Arc<Pipes>,
}

impl Pipe {
    /// Has `put` fill it with `len` bytes.
    ///
    /// # Errors
    /// As `put` fails; the pipe is of no use then.
    pub fn fill(&mut self, len: usize, put: impl FnOnce(BorrowedFd<'_>) -> Result<Spliced>) -> Result<Spliced> {
        let Some(ends) = &self.ends else { return Ok(Spliced::No) };
        self.content = Content::Unknown;
        let spliced = put(ends.write.as_fd())?;
        self.content = if spliced == Spliced::All { Content::Data { len, left: len } } else { Content::Nothing };
        Ok(spliced)
    }

    /// Bytes that it was filled with.
    pub fn len(&self) -> usize {
        match self.content {
            Content::Data { len, .. } => len,
            _ => 0,
        }
    }

    /// Sends what the socket takes now; returns how many bytes.
    ///
    /// # Errors
    /// `WouldBlock`; as the client is gone.
    pub fn send(&mut self, socket: impl AsFd) -> io::Result<usize> {
        let (Some(ends), Content::Data { left, .. }) = (&self.ends, &mut self.content) else { return Ok(0) };
        let count = splice(&ends.read, None, socket, None, *left, SpliceFFlags::SPLICE_F_NONBLOCK)?;
        *left -= count;
        Ok(count)
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.pipes.out.fetch_sub(1, Ordering::Relaxed);
        let is_empty = matches!(self.content, Content::Nothing | Content::Data { left: 0, .. });
        let mut kept = self.pipes.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if is_empty && kept.len() < KEPT.min(self.pipes.most.load(Ordering::Relaxed)) {
            kept.extend(self.ends.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use nix::errno::Errno;
    use nix::unistd::{read, write};

    use super::*;

    fn fill(pipe: &mut Pipe, data: &[u8]) {
        let put = |end: BorrowedFd<'_>| {
            assert_eq!(write(end, data), Ok(data.len()));
            Ok(Spliced::All)
        };
        pipe.fill(data.len(), put).unwrap();
    }

    fn number(pipe: &Pipe) -> i32 {
        pipe.ends.as_ref().unwrap().read.as_raw_fd()
    }

    #[test]
    fn only_a_pipe_that_was_emptied_is_used_again() {
        let pipes = Arc::<Pipes>::default();
        let (socket, client) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut pipe = pipes.take().unwrap();
        let first = number(&pipe);
        fill(&mut pipe, b"some data");
        assert_eq!((pipe.send(&socket).unwrap(), pipe.len(), pipe.send(&socket).unwrap_or(0)), (9, 9, 0));
        drop(pipe);
        let mut pipe = pipes.take().unwrap();
        assert_eq!((number(&pipe), pipe.len()), (first, 0));
        fill(&mut pipe, b"never sent");
        drop(pipe);
        let mut pipe = pipes.take().unwrap();
        assert_eq!(read(&pipe.ends.as_ref().unwrap().read, &mut [0; 16]), Err(Errno::EAGAIN), "it is empty");
        let failed = pipe.fill(4, |end| {
            write(end, b"part").unwrap();
            Err(vhd_core::Error::new(vhd_core::ErrorKind::Io, "the rest can't be read"))
        });
        assert!(failed.is_err() && pipe.len() == 0);
        drop(pipe);
        assert_eq!(read(&pipes.take().unwrap().ends.as_ref().unwrap().read, &mut [0; 16]), Err(Errno::EAGAIN));
        drop((socket, client));
    }

    #[test]
    fn there_are_so_many_pipes_and_no_more_and_few_are_kept() {
        let pipes = Arc::<Pipes>::default();
        let all: Vec<_> = std::iter::from_fn(|| pipes.take()).collect();
        assert_eq!(all.len(), MOST);
        drop(all);
        assert_eq!(pipes.kept.lock().unwrap().len(), KEPT);
        assert!(pipes.take().is_some());
        pipes.limit(2);
        assert_eq!([pipes.take(), pipes.take(), pipes.take()].iter().flatten().count(), 2);
    }
}
