//! The transmission phase of a connection: one task reads requests, one writes replies, and the disk works in either
//! the reading task, where it answers from memory, or in other threads, where it does not. A client that asks more than
//! one thing at a time may have a thread in place of the reading task ([`place`]).
//!
//! Replies go out in any order. What a connection holds is bounded: long requests go in pieces, and the rest is counted
//! ([`Flight`]).

mod input;
mod outbox;
mod place;
mod socket;
mod work;

pub use socket::{Reader, Socket};

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use self::input::{Came, Input};
use self::outbox::{Body, Outbox, Segment};
use self::place::{Pause, Place};
use self::work::Work;
use crate::buffers::{PIECE, Pool};
use crate::client::Client;
use crate::codec::{Command, Errno, MAX_PAYLOAD, Request, command_flag, request_len};
use crate::export::Visit;
use crate::handshake::Session;
use crate::limits::{Budget, Flight, Limits, Ticket};
use crate::transmission::{Operation, Refusal, check, status_payload};

/// Replies, and bytes of them, that are collected before they are sent.
const BATCH: usize = 16;
const BATCH_BYTES: usize = PIECE;
/// Requests that are done in a row while others wait for the thread, a long one counting for several: some milliseconds. To let others
/// go first wakes another thread to look for them, so it must not be often.
const ROW: usize = 512;
const COUNTS_ONE_MORE: usize = 16 << 10;
/// Payloads up to this many bytes are looked for before the replies go that wait.
const SHORT: usize = 16 << 10;
/// Payload that is thrown away so as to go on after a bad request. More than that is no mistake.
const MAX_DISCARD: u64 = 1 << 32;
/// How long a client may take for its last replies after it has ended the session.
const LINGER: Duration = Duration::from_secs(30);

/// What the connections of a server share.
#[derive(Debug)]
pub struct Shared {
    /// What each may take.
    pub limits: Limits,
    /// What all may take.
    pub budget: Arc<Budget>,
    /// Where buffers come from.
    pub pool: Arc<Pool>,
    /// Threads for clients that ask so much that it is worth one.
    pub threads: Arc<Semaphore>,
}

/// A connection that has chosen its export.
#[derive(Debug)]
pub struct Connection<R> {
    input: Input<R>,
    work: Arc<Work>,
    flight: Arc<Flight>,
    client: Arc<Client>,
    pool: Arc<Pool>,
    batch: Vec<Segment>,
    batch_bytes: usize,
    /// Requests in a row.
    row: usize,
    /// Requests since the last one that was waited for, and whether the wait before brought several.
    came: usize,
    came_several: bool,
    place: Place,
    /// Requests that are not counted yet.
    asked: u64,
    extended: bool,
}

/// Serves a client until it ends the session, its stream ends, or the server does.
///
/// `ahead` came already. Replies go to `direct`, or to `stream` when there is no such thing.
///
/// # Errors
/// As the stream fails, or when the client is not understood.
pub async fn serve(
    shared: &Shared,
    client: Arc<Client>,
    session: Session,
    visit: Visit,
    (stream, ahead): (impl AsyncRead + Unpin + Send + 'static, &[u8]),
    (direct, writer): (Option<Arc<Socket>>, Option<impl AsyncWrite + Unpin + Send + 'static>),
) -> io::Result<()> {
    let flight = Flight::new(&shared.limits, Arc::clone(&shared.budget), Arc::clone(&client.share));
    let extended = session.extended();
    let work = Arc::new(Work::new(visit, session, Outbox::new(direct.clone(), Arc::clone(&client)), &client.share));
    let mut writing = Writing::start(&work, writer);
    let connection = Connection {
        input: Input::new(stream, ahead, client.phase()),
        work: Arc::clone(&work),
        flight: Arc::clone(&flight),
        client,
        pool: Arc::clone(&shared.pool),
        batch: Vec::with_capacity(BATCH),
        batch_bytes: 0,
        row: 0,
        came: 0,
        came_several: false,
        place: Place::new(direct, &shared.threads),
        asked: 0,
        extended,
    };
    let ended = connection.run_to_end().await;
    if ended.is_err() {
        // Nobody knows what the client understands.
        work.outbox.fail();
    } else if tokio::time::timeout(LINGER, flight.empty()).await.is_err() {
        work.outbox.fail();
    }
    work.outbox.finish();
    let _ = tokio::time::timeout(LINGER, &mut writing.task).await;
    // What was begun uses the disk; who closes it waits for that.
    flight.empty().await;
    ended
}

/// The writing task; it ends with this.
struct Writing {
    work: Arc<Work>,
    task: JoinHandle<()>,
}

impl Writing {
    fn start(work: &Arc<Work>, writer: Option<impl AsyncWrite + Unpin + Send + 'static>) -> Self {
        let (work, writing) = (Arc::clone(work), Arc::clone(work));
        Self { work, task: tokio::spawn(async move { writing.outbox.write(writer).await }) }
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        self.work.outbox.fail();
        self.task.abort();
    }
}

/// Ends a session of which a request failed in a way that nobody thought of: its client would wait for ever.
struct EndOnPanic(Arc<Work>);

impl Drop for EndOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.outbox.fail();
        }
    }
}

impl<R: AsyncRead + Unpin> Connection<R> {
    /// Serves requests for as long as this is the place for it.
    async fn run(&mut self) -> io::Result<Pause> {
        let header = request_len(self.extended);
        loop {
            if !self.input.has(header) {
                if self.take_meanwhile() {
                    continue;
                }
                self.send_batch();
                if let Some(pause) = self.place.look(self.came_several) {
                    return Ok(pause);
                }
                match self.input.wait(header, self.place.is_thread()).await? {
                    Came::All => {}
                    Came::End => return Ok(Pause::End),
                    Came::Silence => return Ok(Pause::Task),
                }
            }
            let request = self.input.peek(header).and_then(|bytes| Request::parse(bytes, self.extended));
            let request = request.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "what came is no request"))?;
            self.input.skip(header);
            if request.command == Command::Disconnect {
                return Ok(Pause::End);
            }
            self.asked += 1;
            self.came += 1;
            self.request(&request).await?;
            if self.batch.len() >= BATCH || self.batch_bytes >= BATCH_BYTES {
                self.send_batch();
            }
            self.row += 1 + usize::try_from(request.len).unwrap_or(usize::MAX).min(PIECE) / COUNTS_ONE_MORE;
            if self.row >= ROW {
                self.send_batch();
                self.row = 0;
                tokio::task::yield_now().await;
            }
            if self.work.outbox.has_failed() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
        }
    }

    /// Takes requests that came while others were done, so that their replies go together. Who asks one thing at a time has
    /// nothing more to say before the reply, and is not looked for.
    fn take_meanwhile(&mut self) -> bool {
        let several = self.came > 1;
        if !self.batch.is_empty() && (several || self.came_several) && self.look_for_more() {
            return true;
        }
        (self.came, self.came_several) = (0, several);
        false
    }

    fn look_for_more(&mut self) -> bool {
        let outbox = &self.work.outbox;
        self.input.take(|window| outbox.read_meanwhile(window))
    }

    async fn request(&mut self, request: &Request) -> io::Result<()> {
        let held = usize::try_from(request.len).unwrap_or(usize::MAX).min(PIECE);
        let ticket = match self.flight.try_admit(held) {
            Some(ticket) => ticket,
            None => {
                self.send_batch();
                self.flight.admit(held).await
            }
        };
        let checked = match check(request, self.work.session()) {
            Ok(_) if self.client.is_ending() => Err((Errno::Shutdown, "the server ends")),
            checked => checked,
        };
        match checked {
            Err(refusal) => self.refuse(request, refusal, ticket).await,
            Ok(Operation::Read { one_chunk }) => {
                self.read(request, one_chunk, ticket).await;
                Ok(())
            }
            Ok(Operation::Write) => self.write(request, ticket).await,
            Ok(Operation::Status { one_extent }) => self.status(request, one_extent, ticket).await,
            Ok(operation) => {
                let (work, request, pool) = (Arc::clone(&self.work), *request, Arc::clone(&self.pool));
                self.in_pool(ticket, move |ticket| work.plain(&request, operation, &pool, ticket)).await;
                Ok(())
            }
        }
    }

    /// Sends the replies that were collected.
    fn send_batch(&mut self) {
        if self.asked > 0 {
            self.client.asked(std::mem::take(&mut self.asked));
        }
        if !self.batch.is_empty() {
            self.work.outbox.push(&mut self.batch);
            self.batch_bytes = 0;
        }
    }

    fn reply(&mut self, segment: Segment) {
        self.batch_bytes += match &segment.body {
            Body::Buffer(buffer) => buffer.len(),
            Body::Pipe(pipe) => pipe.len(),
            Body::Empty | Body::Bytes(_) => 0,
        };
        self.batch.push(segment);
    }

    /// Has a thread do something, when it is this peer's turn.
    async fn in_pool(&mut self, ticket: Ticket, job: impl FnOnce(Ticket) + Send + 'static) {
        let guard = EndOnPanic(Arc::clone(&self.work));
        let turn = match self.work.lane.try_turn() {
            Some(turn) => turn,
            None => {
                self.send_batch();
                self.work.lane.turn().await
            }
        };
        tokio::task::spawn_blocking(move || {
            let _guard = guard;
            job(ticket);
            drop(turn);
        });
    }

    /// Says no, and goes past the payload.
    async fn refuse(&mut self, request: &Request, (error, message): Refusal, ticket: Ticket) -> io::Result<()> {
        let segment = self.work.failure(request, error, message, Some(ticket));
        self.reply(segment);
        self.discard(request.payload(self.extended)).await
    }

    async fn discard(&mut self, len: u64) -> io::Result<()> {
        if len > self.input.ahead() as u64 {
            self.send_batch();
        }
        if len > MAX_DISCARD {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a payload of {len} bytes can't be meant")));
        }
        self.input.discard(len).await
    }

    async fn read(&mut self, request: &Request, one_chunk: bool, ticket: Ticket) {
        let len = usize::try_from(request.len).unwrap_or(usize::MAX);
        // What the client does not take yet need not be read yet: it would only be pushed out of the processor's cache.
        if len > PIECE || len > 0 && self.work.outbox.is_full(len) {
            let (work, request, pool) = (Arc::clone(&self.work), *request, Arc::clone(&self.pool));
            tokio::spawn(async move { work.read_later(request, one_chunk, pool, ticket).await });
        } else {
            let at_once = self.work.export().reads_at_once();
            let tried = if at_once { self.work.read_if_cached(request, &self.pool, ticket) } else { Err(ticket) };
            let ticket = match tried {
                Ok(segment) => return self.reply(segment),
                Err(ticket) => ticket,
            };
            let (work, request, pool) = (Arc::clone(&self.work), *request, Arc::clone(&self.pool));
            self.in_pool(ticket, move |ticket| {
                let segment = work.read(&request, &pool, ticket);
                work.outbox.push(&mut vec![segment]);
            })
            .await;
        }
    }

    async fn write(&mut self, request: &Request, ticket: Ticket) -> io::Result<()> {
        let len = usize::try_from(request.len).unwrap_or(usize::MAX);
        if len > PIECE {
            return self.write_long(request, ticket).await;
        }
        let mut buffer = self.pool.take(len);
        // Most clients send it right after the header, with another call.
        if !self.input.has(len) && len <= SHORT {
            self.look_for_more();
        }
        if !self.input.has(len) {
            self.send_batch();
        }
        self.input.read(&mut buffer).await?;
        if self.work.export().writes_at_once() && !request.has(command_flag::FUA) {
            let done = self.work.write(request, request.offset, &buffer);
            let segment = self.work.answer(request, done, ticket);
            self.reply(segment);
        } else {
            let (work, request) = (Arc::clone(&self.work), *request);
            self.in_pool(ticket, move |ticket| {
                let done = work.write(&request, request.offset, &buffer);
                work.outbox.push(&mut vec![work.answer(&request, done, ticket)]);
            })
            .await;
        }
        Ok(())
    }

    /// Takes a long payload piece by piece, each written before the next is taken. After a failure the rest is thrown away.
    async fn write_long(&mut self, request: &Request, ticket: Ticket) -> io::Result<()> {
        self.send_batch();
        let mut left = request.len;
        let mut done = Ok(());
        while left > 0 && done.is_ok() {
            // Up to a multiple of the piece, so that the pieces lie as the disk's blocks do.
            let at = request.offset + (request.len - left);
            let len = (PIECE as u64 - at % PIECE as u64).min(left);
            let mut buffer = self.pool.take(len as usize);
            self.input.read(&mut buffer).await?;
            left -= len;
            let (work, request) = (Arc::clone(&self.work), *request);
            let last = left == 0;
            let _turn = self.work.lane.turn().await;
            let written = tokio::task::spawn_blocking(move || {
                // Durable is what was asked for as a whole.
                let request = if last { request } else { Request { flags: 0, ..request } };
                work.write(&request, at, &buffer)
            });
            done = written.await.unwrap_or_else(|_| Err((Errno::Io, "the server failed".into())));
        }
        let segment = self.work.answer(request, done, ticket);
        self.reply(segment);
        self.discard(left).await
    }

    async fn status(&mut self, request: &Request, one_extent: bool, ticket: Ticket) -> io::Result<()> {
        let mut range = request.len;
        let mut wanted: Vec<_> = self.work.session().contexts.iter().map(|(id, _)| *id).collect();
        if request.has(command_flag::PAYLOAD_LEN) {
            // A number for each context and one more: what is longer is not read.
            let most = 8 + 4 * wanted.len() as u64;
            if request.len > most.min(u64::from(MAX_PAYLOAD)) {
                return self.refuse(request, (Errno::Inval, "the payload is longer than a list of contexts"), ticket).await;
            }
            let mut payload = vec![0; request.len as usize];
            self.send_batch();
            self.input.read(&mut payload).await?;
            match status_payload(request, &payload, self.work.session()) {
                Ok(choice) => (range, wanted) = choice,
                Err((error, message)) => {
                    let segment = self.work.failure(request, error, message, Some(ticket));
                    self.reply(segment);
                    return Ok(());
                }
            }
        }
        let (work, request) = (Arc::clone(&self.work), *request);
        self.in_pool(ticket, move |ticket| work.status(&request, range, &wanted, one_extent, ticket)).await;
        Ok(())
    }
}
