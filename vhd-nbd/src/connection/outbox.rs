//! What waits to be sent to a client.
//!
//! Whoever has a reply sends it at once where the socket takes it, several with one call. What the socket does not take
//! waits for the writing task. So most replies cost no change of tasks, and no reply waits for a reader.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use smallvec::SmallVec;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;

use super::socket::Socket;
use crate::buffers::Buffer;
use crate::client::{Client, Phase};
use crate::codec::Head;
use crate::limits::Ticket;
use crate::pipes::Pipe;

/// Replies that go out with one call.
const AT_ONCE: usize = 64;
/// Bytes that may wait. A piece that would be more is read when there is room: so it is sent out of the processor's cache.
const ENOUGH: usize = 256 << 10;

/// Data of a reply.
#[derive(Debug)]
pub enum Body {
    /// None.
    Empty,
    /// A few bytes.
    Bytes(Vec<u8>),
    /// Bytes of a disk.
    Buffer(Buffer),
    /// The same, not copied: only for direct sockets.
    Pipe(Pipe),
}

/// A reply, or a piece of one.
#[derive(Debug)]
pub struct Segment {
    /// First this.
    pub head: Head,
    /// Then this.
    pub body: Body,
    /// Given back when it is sent.
    #[expect(dead_code, reason = "held, not read")]
    pub ticket: Option<Ticket>,
}

impl Segment {
    fn body(&self) -> &[u8] {
        match &self.body {
            Body::Empty | Body::Pipe(_) => &[],
            Body::Bytes(bytes) => bytes,
            Body::Buffer(buffer) => buffer,
        }
    }

    fn len(&self) -> usize {
        let body = if let Body::Pipe(pipe) = &self.body { pipe.len() } else { self.body().len() };
        self.head.as_bytes().len() + body
    }

    /// The pipe that comes next when this much of the segment is sent.
    fn pipe_after(&mut self, sent: usize) -> Option<&mut Pipe> {
        match &mut self.body {
            Body::Pipe(pipe) if sent >= self.head.as_bytes().len() => Some(pipe),
            _ => None,
        }
    }
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Segment>,
    /// Bytes of the first segment that are sent.
    sent: usize,
    /// Bytes that wait.
    bytes: usize,
    /// A reply in pieces is under way: others wait here until it is complete.
    held: Option<Vec<Segment>>,
    finished: bool,
    failed: bool,
}

impl State {
    /// Takes `count` bytes out of the queue.
    fn advance(&mut self, count: usize) {
        self.bytes -= count;
        self.sent += count;
        while let Some(len) = self.queue.front().map(Segment::len).filter(|len| self.sent >= *len) {
            self.sent -= len;
            self.queue.pop_front();
        }
    }

    fn fail(&mut self) {
        *self = Self { failed: true, finished: self.finished, ..Self::default() };
    }
}

/// Calls `write` with the bytes that come first, up to those in a pipe, and whether there are such.
fn with_slices<T>(queue: &VecDeque<Segment>, sent: usize, write: impl FnOnce(&[IoSlice<'_>], bool) -> T) -> T {
    let mut slices: SmallVec<[IoSlice<'_>; 2 * AT_ONCE]> = SmallVec::new();
    let mut ends_at_pipe = false;
    for segment in queue.iter().take(AT_ONCE) {
        let parts = [segment.head.as_bytes(), segment.body()];
        slices.extend(parts.into_iter().filter(|part| !part.is_empty()).map(IoSlice::new));
        ends_at_pipe = matches!(segment.body, Body::Pipe(_));
        if ends_at_pipe {
            break;
        }
    }
    let mut rest = &mut slices[..];
    IoSlice::advance_slices(&mut rest, sent);
    write(rest, ends_at_pipe)
}

/// What waits to be sent.
#[derive(Debug)]
pub struct Outbox {
    state: Mutex<State>,
    direct: Option<Arc<Socket>>,
    /// Who is to end when it takes nothing any more.
    client: Arc<Client>,
    wake: Notify,
    /// Something was sent.
    moved: Notify,
}

/// What the writing task does next.
enum Next {
    Write,
    Wait,
    End,
}

/// The right to send a reply in pieces, with no other between.
#[derive(Debug)]
pub struct Stream<'a>(&'a Outbox);

impl Outbox {
    /// Nothing waits.
    pub fn new(direct: Option<Arc<Socket>>, client: Arc<Client>) -> Self {
        Self { state: Mutex::default(), direct, client, wake: Notify::new(), moved: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True when a pipe can be sent.
    pub fn takes_pipes(&self) -> bool {
        self.direct.is_some()
    }

    /// What came meanwhile by the socket that replies go to; nothing where it would have to be waited for. The end and errors
    /// of the socket are found by the next who waits.
    pub fn read_meanwhile(&self, buf: &mut [u8]) -> usize {
        self.direct.as_ref().and_then(|direct| direct.try_read(buf).ok()).unwrap_or(0)
    }

    /// Sends replies, or puts them to those that wait.
    pub fn push(&self, batch: &mut Vec<Segment>) {
        let mut state = self.lock();
        match &mut state.held {
            Some(held) => held.append(batch),
            None => self.enqueue(&mut state, batch.drain(..)),
        }
    }

    fn enqueue(&self, state: &mut State, segments: impl Iterator<Item = Segment>) {
        if state.failed {
            segments.for_each(drop);
            return;
        }
        for segment in segments {
            state.bytes += segment.len();
            state.queue.push_back(segment);
        }
        // Nobody else is about to write: with a direct socket all do so under the lock.
        match &self.direct {
            Some(direct) if matches!(write_some(state, direct), Ok(0)) => {}
            _ => self.wake.notify_one(),
        }
    }

    /// Begins a reply in pieces. One task of a connection may do that at a time.
    pub fn stream(&self) -> Stream<'_> {
        self.lock().held.get_or_insert_default();
        Stream(self)
    }

    /// Waits until there is room for `len` more bytes.
    pub async fn has_room(&self, len: usize) {
        loop {
            let mut moved = pin!(self.moved.notified());
            // From here on it misses nothing.
            moved.as_mut().enable();
            if !self.is_full(len) {
                return;
            }
            moved.await;
        }
    }

    /// True when so much waits that `len` more bytes should wait elsewhere. Alone they never do, however many.
    pub fn is_full(&self, len: usize) -> bool {
        let state = self.lock();
        !state.failed && state.bytes > 0 && state.bytes.saturating_add(len) > ENOUGH
    }

    /// The writing task ends when all is sent.
    pub fn finish(&self) {
        self.lock().finished = true;
        self.wake.notify_one();
    }

    /// True when the client takes nothing any more.
    pub fn has_failed(&self) -> bool {
        self.lock().failed
    }

    /// Drops all that waits; the connection can't go on, and ends though its client may be silent.
    pub fn fail(&self) {
        self.lock().fail();
        self.client.end(Phase::Ended);
        self.wake.notify_one();
        self.moved.notify_waiters();
    }

    /// The writing task. `stream` is where it goes when there is no direct socket.
    pub async fn write(&self, mut stream: Option<impl AsyncWrite + Unpin>) {
        loop {
            let done = match (&self.direct, &mut stream) {
                (Some(direct), _) => self.write_direct(direct).await,
                (None, Some(stream)) => self.write_stream(stream).await,
                (None, None) => Ok(()),
            };
            if let Err(error) = done {
                tracing::debug!("a client takes no more: {error}");
                self.fail();
            }
            self.moved.notify_waiters();
            match self.next() {
                Next::End => return,
                Next::Write => {}
                Next::Wait => self.wake.notified().await,
            }
        }
    }

    fn next(&self) -> Next {
        let state = self.lock();
        match state.queue.is_empty() {
            _ if state.failed => Next::End,
            true if state.finished && state.held.is_none() => Next::End,
            true => Next::Wait,
            false => Next::Write,
        }
    }

    async fn write_direct(&self, direct: &Socket) -> io::Result<()> {
        loop {
            let left = write_some(&mut self.lock(), direct)?;
            self.moved.notify_waiters();
            if left == 0 {
                return Ok(());
            }
            direct.writable().await?;
        }
    }

    async fn write_stream(&self, stream: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        let mut queue = std::mem::take(&mut self.lock().queue);
        if queue.is_empty() {
            return Ok(());
        }
        let mut sent = 0;
        while !queue.is_empty() {
            let count = std::future::poll_fn(|context| {
                with_slices(&queue, sent, |slices, _| Pin::new(&mut *stream).poll_write_vectored(context, slices))
            });
            let count = count.await?;
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            let mut state = State { queue, sent, bytes: usize::MAX, ..State::default() };
            state.advance(count);
            (queue, sent) = (state.queue, state.sent);
            let mut shared = self.lock();
            shared.bytes = shared.bytes.saturating_sub(count);
            drop(shared);
            self.moved.notify_waiters();
        }
        stream.flush().await
    }
}

/// Writes what the socket takes now; returns the bytes that are left.
fn write_some(state: &mut State, direct: &Socket) -> io::Result<usize> {
    while let Some(first) = state.queue.front_mut() {
        let written = match first.pipe_after(state.sent) {
            Some(pipe) => pipe.send(direct),
            None => with_slices(&state.queue, state.sent, |slices, more| direct.try_write(slices, more)),
        };
        match written {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => state.advance(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(state.bytes)
}

impl Stream<'_> {
    /// Sends a piece when there is room for it. False when the client takes nothing any more.
    pub async fn send(&self, segment: Segment) -> bool {
        self.0.has_room(segment.len()).await;
        let mut state = self.0.lock();
        self.0.enqueue(&mut state, std::iter::once(segment));
        !state.failed
    }
}

impl Drop for Stream<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        let held = state.held.take().unwrap_or_default();
        self.0.enqueue(&mut state, held.into_iter());
        if state.finished {
            self.0.wake.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Clients;
    use crate::peer::Peer;

    fn segment(len: usize) -> Segment {
        Segment { head: Head::EMPTY, body: Body::Bytes(vec![0; len]), ticket: None }
    }

    #[test]
    fn a_piece_waits_behind_another_but_never_for_itself_nor_for_a_client_that_is_gone() {
        let client = Clients::default().add(Peer::Starter, "a test".into(), 1).unwrap();
        let outbox = Outbox::new(None, client);
        assert!(!outbox.is_full(ENOUGH) && !outbox.is_full(usize::MAX));
        outbox.push(&mut vec![segment(1)]);
        assert!(outbox.is_full(ENOUGH) && !outbox.is_full(ENOUGH - 1), "the short ones that fit need not wait");
        outbox.push(&mut vec![segment(ENOUGH - 1)]);
        assert!(outbox.is_full(1));
        outbox.fail();
        assert!(!outbox.is_full(1), "who waits for room would wait for ever");
    }
}
