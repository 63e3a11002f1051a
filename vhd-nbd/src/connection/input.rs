//! What comes from a client.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::watch;

use crate::client::Phase;

/// Bytes that are taken from the socket with one call: many requests.
const WINDOW: usize = 64 << 10;

/// A stream of requests, read ahead.
#[derive(Debug)]
pub struct Input<R> {
    stream: R,
    window: Vec<u8>,
    start: usize,
    end: usize,
    /// Payloads are long: reading ahead would only mean to copy them once more.
    long: bool,
    phase: watch::Receiver<Phase>,
}

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub enum Came {
    /// As much as was asked for.
    All,
    /// The end, or the word that the server ends.
    End,
    /// Nothing for so long that a thread should not wait for it any more.
    Silence,
}

impl<R: AsyncRead + Unpin> Input<R> {
    /// A stream of which `ahead` was read already.
    pub fn new(stream: R, ahead: &[u8], phase: watch::Receiver<Phase>) -> Self {
        let mut window = vec![0; WINDOW.max(ahead.len())];
        window[..ahead.len()].copy_from_slice(ahead);
        Self { stream, window, start: 0, end: ahead.len(), long: false, phase }
    }

    /// The next `len` bytes, where they are there already.
    pub fn peek(&self, len: usize) -> Option<&[u8]> {
        self.window[self.start..self.end].get(..len)
    }

    /// Goes past bytes that were looked at.
    pub fn skip(&mut self, len: usize) {
        self.start = (self.start + len).min(self.end);
    }

    /// Bytes that are there.
    pub fn ahead(&self) -> usize {
        self.end - self.start
    }

    /// Waits until `len` bytes, a few, can be looked at; where `in_system`, for as long as the system waits.
    ///
    /// # Errors
    /// As the stream fails, or ends in the middle of them.
    pub async fn wait(&mut self, len: usize, in_system: bool) -> io::Result<Came> {
        self.make_room();
        while self.end < len {
            let room = if self.long { len } else { self.window.len() };
            let read = self.stream.read(&mut self.window[self.end..room]);
            let count = tokio::select! {
                biased;
                count = read => count?,
                _ = self.phase.wait_for(|phase| *phase != Phase::Serving) => return Ok(Came::End),
                () = std::future::ready(()), if in_system => return Ok(Came::Silence),
            };
            match count {
                0 if self.end == 0 => return Ok(Came::End),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => self.end += count,
            }
        }
        Ok(Came::All)
    }

    fn make_room(&mut self) {
        if self.start > 0 {
            self.window.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
    }

    /// Takes what `read` has without waiting, where requests are read ahead. False when it has nothing.
    pub fn take(&mut self, read: impl FnOnce(&mut [u8]) -> usize) -> bool {
        if self.long {
            return false;
        }
        self.make_room();
        let count = read(&mut self.window[self.end..]);
        self.end += count;
        count > 0
    }

    /// True when a payload is there as a whole.
    pub fn has(&self, len: usize) -> bool {
        self.ahead() >= len
    }

    /// Fills `payload`.
    ///
    /// # Errors
    /// As the stream fails or ends.
    pub async fn read(&mut self, payload: &mut [u8]) -> io::Result<()> {
        let count = payload.len().min(self.ahead());
        payload[..count].copy_from_slice(&self.window[self.start..self.start + count]);
        self.skip(count);
        self.long = payload.len() > WINDOW / 4;
        if count < payload.len() {
            self.stream.read_exact(&mut payload[count..]).await?;
        }
        Ok(())
    }

    /// Throws bytes away.
    ///
    /// # Errors
    /// As the stream fails or ends.
    pub async fn discard(&mut self, mut len: u64) -> io::Result<()> {
        loop {
            let count = usize::try_from(len).unwrap_or(usize::MAX).min(self.ahead());
            self.skip(count);
            len -= count as u64;
            if len == 0 {
                return Ok(());
            }
            (self.start, self.end) = (0, self.stream.read(&mut self.window).await?);
            if self.end == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}
