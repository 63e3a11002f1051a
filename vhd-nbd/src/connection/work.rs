//! What requests do to the disk, and the replies that come of it.

use std::io::IoSliceMut;
use std::sync::Arc;

use vhd_core::block::{Found, Spliced};
use vhd_core::{Error, ErrorKind};

use super::outbox::{Body, Outbox, Segment};
use crate::buffers::{Buffer, PIECE, Pool};
use crate::codec::{Chunk, Errno, Request, Style, chunk, command_flag};
use crate::export::{Export, Visit};
use crate::handshake::Session;
use crate::limits::Ticket;
use crate::peer::{Lane, Share};
use crate::pipes::Pipe;
use crate::transmission::Operation;

/// Bytes of a long reply that are read in a row while others wait for the thread.
const ROW: u64 = 1 << 20;

/// Shorter reads are copied: to fill a pipe and to empty it is two calls more than that. See docs/performance.md.
const UNCOPIED_MIN: usize = 64 << 10;

/// A range that was not copied, or why not.
enum Uncopied {
    Pipe(Pipe),
    NotNow,
    No,
}

/// Why a request failed: the error, and a message.
pub type Failure = (Errno, String);

/// A session and its disk.
#[derive(Debug)]
pub struct Work {
    visit: Visit,
    session: Session,
    /// Where replies go.
    pub outbox: Outbox,
    /// The way to other threads.
    pub lane: Lane,
    /// Replies in pieces go one after the other.
    streaming: tokio::sync::Mutex<()>,
}

fn failure_of(error: &Error) -> Failure {
    match error.kind() {
        // The client did nothing wrong, so there should be a trace of it here.
        ErrorKind::NoSpace => tracing::warn!("{error}"),
        ErrorKind::ReadOnly | ErrorKind::OutOfRange | ErrorKind::InvalidInput => tracing::debug!("{error}"),
        _ => tracing::error!("{error}"),
    }
    (Errno::of(error.kind()), error.message())
}

impl Work {
    pub fn new(visit: Visit, session: Session, outbox: Outbox, peer: &Share) -> Self {
        let lane = peer.lane(visit.export().name(), &visit.export().gate);
        Self { visit, session, outbox, lane, streaming: tokio::sync::Mutex::default() }
    }

    pub fn session(&self) -> &Session {
        &self.session
    }

    fn style(&self) -> Style {
        self.session.style
    }

    pub fn export(&self) -> &Export {
        self.visit.export()
    }

    /// Does something with `len` bytes, and notes how the disk took it.
    fn timed<T>(&self, len: usize, work: impl FnOnce() -> T) -> T {
        let pace = &self.export().pace;
        let timed = pace.begin();
        let done = work();
        pace.end(&timed, len);
        done
    }

    /// The reply of a request that failed.
    pub fn failure(&self, request: &Request, error: Errno, message: &str, ticket: Option<Ticket>) -> Segment {
        let (head, rest) = self.style().failure(request, error, message, None);
        Segment { head, body: if rest.is_empty() { Body::Empty } else { Body::Bytes(rest) }, ticket }
    }

    /// The reply of a request that returns nothing.
    pub fn answer(&self, request: &Request, done: Result<(), Failure>, ticket: Ticket) -> Segment {
        match done {
            Ok(()) => Segment { head: self.style().success(request), body: Body::Empty, ticket: Some(ticket) },
            Err((error, message)) => self.failure(request, error, &message, Some(ticket)),
        }
    }

    /// Reads a range that fits into one piece.
    pub fn read(&self, request: &Request, pool: &Arc<Pool>, ticket: Ticket) -> Segment {
        let (body, found) = self.piece(request.offset, request.len as usize, pool, true);
        self.answer_read(request, found, body, ticket)
    }

    /// As [`Work::read`], where that needs no waiting.
    ///
    /// # Errors
    /// When it would have to wait.
    pub fn read_if_cached(&self, request: &Request, pool: &Arc<Pool>, ticket: Ticket) -> Result<Segment, Ticket> {
        match self.piece(request.offset, request.len as usize, pool, false) {
            (_, Ok(Found::NotNow)) => Err(ticket),
            (body, found) => Ok(self.answer_read(request, found, body, ticket)),
        }
    }

    /// Reads at most a piece, without copying it where that can be.
    fn piece(&self, at: u64, len: usize, pool: &Arc<Pool>, wait: bool) -> (Body, Result<Found, Failure>) {
        match self.uncopied(at, len, pool, wait) {
            Uncopied::Pipe(pipe) => return (Body::Pipe(pipe), Ok(Found::Data)),
            Uncopied::NotNow => return (Body::Empty, Ok(Found::NotNow)),
            Uncopied::No => {}
        }
        let mut buffer = pool.take(len);
        let found = self.find(&mut buffer, at, wait).map_err(|error| failure_of(&error));
        (Body::Buffer(buffer), found)
    }

    /// A range of at most a piece as it is in the host's memory, where the disk and the socket can do that and it is long enough to
    /// be worth it. Whatever fails, fails again or does not when it is copied.
    fn uncopied(&self, at: u64, len: usize, pool: &Pool, wait: bool) -> Uncopied {
        if len < UNCOPIED_MIN || !self.outbox.takes_pipes() {
            return Uncopied::No;
        }
        let Some(mut pipe) = pool.pipe() else { return Uncopied::No };
        let range = at..at + len as u64;
        match pipe.fill(len, |end| self.timed(len, || self.export().disk().splice_at(end, range, wait))) {
            Ok(Spliced::All) => Uncopied::Pipe(pipe),
            Ok(Spliced::NotNow) => Uncopied::NotNow,
            Ok(Spliced::No) | Err(_) => Uncopied::No,
        }
    }

    fn find(&self, buffer: &mut Buffer, offset: u64, wait: bool) -> vhd_core::Result<Found> {
        let len = buffer.len();
        let mut bufs = [IoSliceMut::new(buffer)];
        self.timed(len, || self.export().disk().find_vectored_at(&mut bufs, offset, wait))
    }

    fn answer_read(&self, request: &Request, found: Result<Found, Failure>, body: Body, ticket: Ticket) -> Segment {
        match found {
            Ok(_) if request.len == 0 && self.style() != Style::Simple => {
                Segment { head: self.style().end(request), body: Body::Empty, ticket: Some(ticket) }
            }
            Ok(Found::Zeros) if self.style() != Style::Simple => {
                // It fits into a piece.
                let head = self.style().hole(request, request.offset, request.len as u32, true);
                Segment { head, body: Body::Empty, ticket: Some(ticket) }
            }
            Ok(_) => {
                let head = self.style().data(request, request.offset, request.len, true);
                Segment { head, body, ticket: Some(ticket) }
            }
            Err((error, message)) => self.failure(request, error, &message, Some(ticket)),
        }
    }

    /// Reads a range when there is room for it, and sends it in pieces where it is long: chunks of their own, or as one
    /// where that is wanted.
    pub async fn read_later(self: Arc<Self>, request: Request, one_chunk: bool, pool: Arc<Pool>, ticket: Ticket) {
        let _turn = self.streaming.lock().await;
        let (mut at, end) = (request.offset, request.offset + request.len);
        let mut stream = None;
        let mut failure = None;
        while at < end {
            // Up to a multiple of the piece, so that the pieces lie as the disk's blocks do.
            let len = (PIECE as u64 - at % PIECE as u64).min(end - at) as usize;
            let (body, done) = if failure.is_none() {
                self.outbox.has_room(len).await;
                self.read_piece(at, len, &pool).await
            } else {
                // The client was promised so many bytes.
                let mut padding = pool.take(len);
                padding.fill(0);
                (Body::Buffer(padding), Ok(Found::Data))
            };
            if let Err(error) = done {
                failure = Some((at, error));
                if !one_chunk || stream.is_none() {
                    break;
                }
                if self.style() == Style::Simple {
                    // Nothing can be said any more, but by ending.
                    self.outbox.fail();
                    return;
                }
                continue;
            }
            let last = at + len as u64 == end;
            let is_all = last && (!one_chunk || at == request.offset);
            let is_hole = done == Ok(Found::Zeros) && (is_all || !one_chunk) && self.style() != Style::Simple;
            let head = match (one_chunk, at == request.offset) {
                _ if is_hole => self.style().hole(&request, at, len as u32, last),
                // No error can be found any more once the last piece was read, unless others went before it.
                (true, true) => self.style().data(&request, at, request.len, last),
                (true, false) => crate::codec::Head::EMPTY,
                (false, _) => self.style().data(&request, at, len as u64, last),
            };
            let body = if is_hole { Body::Empty } else { body };
            at += len as u64;
            let segment = Segment { head, body, ticket: None };
            if at % ROW == 0 {
                tokio::task::yield_now().await;
            }
            if is_all {
                return self.outbox.push(&mut vec![Segment { ticket: Some(ticket), ..segment }]);
            }
            if !one_chunk {
                self.outbox.push(&mut vec![segment]);
            } else if !stream.get_or_insert_with(|| self.outbox.stream()).send(segment).await {
                return;
            }
        }
        drop(stream);
        self.end_in_pieces(&request, failure, ticket);
    }

    async fn read_piece(self: &Arc<Self>, at: u64, len: usize, pool: &Arc<Pool>) -> (Body, Result<Found, Failure>) {
        if self.export().reads_at_once() {
            let (body, found) = self.piece(at, len, pool, false);
            if found != Ok(Found::NotNow) {
                return (body, found);
            }
        }
        let (work, pool) = (Arc::clone(self), Arc::clone(pool));
        let _turn = self.lane.turn().await;
        let read = tokio::task::spawn_blocking(move || work.piece(at, len, &pool, true));
        read.await.unwrap_or_else(|_| (Body::Empty, Err((Errno::Io, "the server failed".to_owned()))))
    }

    fn end_in_pieces(&self, request: &Request, failure: Option<(u64, Failure)>, ticket: Ticket) {
        let ticket = Some(ticket);
        let segment = match (failure, self.style()) {
            (Some((_, (error, message))), Style::Simple) => self.failure(request, error, &message, ticket),
            (Some((at, (error, message))), style) => {
                let (head, rest) = style.failure(request, error, &message, Some(at));
                Segment { head, body: Body::Bytes(rest), ticket }
            }
            // Its one piece was the reply, and is on its way.
            (None, Style::Simple) => return drop(ticket),
            (None, style) => Segment { head: style.end(request), body: Body::Empty, ticket },
        };
        self.outbox.push(&mut vec![segment]);
    }

    /// Writes data, durable where the request wants that.
    ///
    /// # Errors
    /// As the disk fails.
    pub fn write(&self, request: &Request, offset: u64, data: &[u8]) -> Result<(), Failure> {
        self.timed(data.len(), || self.export().disk().write_at(data, offset)).map_err(|error| failure_of(&error))?;
        self.make_durable(request)
    }

    fn make_durable(&self, request: &Request) -> Result<(), Failure> {
        if !request.has(command_flag::FUA) || self.export().is_read_only() {
            return Ok(());
        }
        self.export().disk().flush().map_err(|error| failure_of(&error))
    }

    /// Requests that move no data.
    pub fn plain(&self, request: &Request, operation: Operation, pool: &Arc<Pool>, ticket: Ticket) {
        let export = self.export();
        let range = request.offset..request.offset + request.len;
        if let Operation::Zero { keep } = operation
            && request.has(command_flag::FAST_ZERO)
            && !export.zeroes_fast(keep)
        {
            let message = "the host would have to write the zeros";
            return self.outbox.push(&mut vec![self.failure(request, Errno::NotSup, message, Some(ticket))]);
        }
        let done = match operation {
            Operation::Flush if export.is_read_only() => Ok(()),
            Operation::Flush => export.disk().flush(),
            Operation::Trim => export.zero(range, false),
            Operation::Zero { keep } => export.zero(range, keep),
            Operation::Cache => export.cache(range, &mut pool.take(PIECE)),
            Operation::Read { .. } | Operation::Write | Operation::Status { .. } => Ok(()),
        };
        let done = done.map_err(|error| failure_of(&error));
        let done = match operation {
            Operation::Trim | Operation::Zero { .. } => done.and_then(|()| self.make_durable(request)),
            _ => done,
        };
        self.outbox.push(&mut vec![self.answer(request, done, ticket)]);
    }

    /// Says what a range is, in a chunk for each context that is wanted.
    pub fn status(&self, request: &Request, len: u64, wanted: &[u32], one_extent: bool, ticket: Ticket) {
        let chosen: Vec<_> = self.session.contexts.iter().filter(|(id, _)| wanted.contains(id)).collect();
        let contexts: Vec<_> = chosen.iter().map(|(_, context)| context).collect();
        let runs = match self.export().status(request.offset..request.offset + len, &contexts, one_extent) {
            Ok(runs) => runs,
            Err(error) => {
                let (error, message) = failure_of(&error);
                return self.outbox.push(&mut vec![self.failure(request, error, &message, Some(ticket))]);
            }
        };
        let mut ticket = Some(ticket);
        let last = chosen.len() - 1;
        let mut batch: Vec<_> = chosen
            .iter()
            .zip(&runs)
            .enumerate()
            .map(|(index, ((id, _), runs))| {
                let payload = self.status_payload(*id, runs);
                let kind = if self.session.extended() { chunk::BLOCK_STATUS_EXT } else { chunk::BLOCK_STATUS };
                let what = Chunk { kind, done: index == last, len: payload.len() as u64 };
                let ticket = if index == last { ticket.take() } else { None };
                Segment { head: self.style().chunk(request, what), body: Body::Bytes(payload), ticket }
            })
            .collect();
        self.outbox.push(&mut batch);
    }

    fn status_payload(&self, id: u32, runs: &[(u64, u32)]) -> Vec<u8> {
        let mut payload = id.to_be_bytes().to_vec();
        if self.session.extended() {
            payload.extend_from_slice(&u32::try_from(runs.len()).unwrap_or(u32::MAX).to_be_bytes());
        }
        for (len, state) in runs {
            if self.session.extended() {
                payload.extend_from_slice(&len.to_be_bytes());
                payload.extend_from_slice(&u64::from(*state).to_be_bytes());
            } else {
                // The range had 32 bits of length, so its runs have.
                payload.extend_from_slice(&u32::try_from(*len).unwrap_or(u32::MAX).to_be_bytes());
                payload.extend_from_slice(&state.to_be_bytes());
            }
        }
        payload
    }
}
