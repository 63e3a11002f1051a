//! A disk that another NBD server has, to be read: a client, as small as that.
//!
//! It is synchronous and asks one thing at a time. Where the server tells what is allocated, holes stay holes.

mod patient;

use std::fmt;
use std::io::{self, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vhd_core::block::{BlockDevice, Capabilities, Extent, ExtentState, ZeroMode};
use vhd_core::{Disk, Error, ErrorKind, Result};

use self::patient::Patient;
use crate::codec::{
    Command, INIT_MAGIC, MAX_STRING, OPTION_MAGIC, OPTION_REPLY_MAGIC, Request, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
    chunk, handshake_flag, info, option, option_reply,
};

/// Bytes of a READ at most: all servers take that many.
const READ_AT_MOST: usize = 1 << 20;
/// Bytes of a BLOCK_STATUS at most.
const STATUS_AT_MOST: u64 = 1 << 30;
/// Data of a reply at most: extents of a long range.
const REPLY_AT_MOST: u32 = 16 << 20;
/// Chunks of a reply at most: one for each sector.
const CHUNKS_AT_MOST: usize = READ_AT_MOST / 512 + 8;
/// How long a server may say nothing while it is asked for data: its disk may have to begin to turn, or be busy.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same for who is to be connected to, and for the handshake.
const PATIENCE_AT_FIRST: Duration = Duration::from_secs(10);
const DEFAULT_PORT: u16 = 10809;
const ALLOCATION: &str = "base:allocation";

/// Where a disk is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Tcp(String),
    Unix(PathBuf),
}

/// True for what [`open`] takes: `nbd://…` and `nbd+unix://…`.
#[must_use]
pub fn is_uri(text: &str) -> bool {
    text.starts_with("nbd://") || text.starts_with("nbd+unix://")
}

/// Opens a disk that another server has, read-only: `nbd://HOST[:PORT]/NAME` or `nbd+unix:///NAME?socket=PATH`. Whatever is
/// waited for, here and when it is read, `stop` ends that.
///
/// # Errors
/// `InvalidInput` when the URI is none; `NotFound` when there is no such export; `Cancelled` once it is to stop; `Io` as the
/// server or the way to it fails.
pub fn open(uri: &str, stop: &Arc<AtomicBool>) -> Result<Disk> {
    let (place, name) = parse(uri)?;
    let connected = match &place {
        Place::Tcp(address) => Patient::tcp(address, PATIENCE_AT_FIRST, stop),
        Place::Unix(path) => Patient::unix(path, PATIENCE_AT_FIRST, stop),
    };
    let mut stream = Stream::new(connected.map_err(|error| told(uri, "when it was connected to", error))?);
    let (size, context) = handshake(&mut stream, &name).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::new(ErrorKind::NotFound, format!("{uri}: the server has no export {name:?}")),
        _ => told(uri, "in the handshake", error),
    })?;
    stream.set_patience(PATIENCE);
    if size % 512 != 0 {
        let message = format!("{uri}: has {size} bytes, which is no whole number of sectors");
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    Ok(Disk::new(Remote { uri: uri.to_owned(), size, context, stream: Mutex::new(stream) }))
}

/// What went wrong, and when.
fn told(uri: &str, when: &str, error: io::Error) -> Error {
    if patient::is_stopped(&error) {
        return Error::new(ErrorKind::Cancelled, "interrupted");
    }
    if error.kind() == io::ErrorKind::TimedOut {
        let advice = "see whether the server or its disk hangs, or the network is cut, then try again";
        return Error::new(ErrorKind::Io, format!("{uri}: the server failed {when}: {error}; {advice}"));
    }
    Error::io(error, format!("{uri}: the server failed {when}")).with_kind(ErrorKind::Io)
}

fn parse(uri: &str) -> Result<(Place, String)> {
    let wrong = || {
        let message = format!("{uri}: expected nbd://HOST[:PORT]/NAME or nbd+unix:///NAME?socket=PATH");
        Error::new(ErrorKind::InvalidInput, message)
    };
    if let Some(rest) = uri.strip_prefix("nbd+unix://") {
        let (name, query) = rest.split_once('?').ok_or_else(wrong)?;
        let socket = query.split('&').find_map(|pair| pair.strip_prefix("socket=")).ok_or_else(wrong)?;
        let name = unescaped(name.strip_prefix('/').unwrap_or(name)).ok_or_else(wrong)?;
        return Ok((Place::Unix(unescaped(socket).ok_or_else(wrong)?.into()), name));
    }
    let rest = uri.strip_prefix("nbd://").ok_or_else(wrong)?;
    let rest = rest.split_once('?').map_or(rest, |(rest, _)| rest);
    let (host, name) = rest.split_once('/').unwrap_or((rest, ""));
    if host.is_empty() {
        return Err(wrong());
    }
    // A colon inside of brackets is of an IPv6 address.
    let has_port = host.rsplit_once(':').is_some_and(|(_, port)| !port.contains(']'));
    let address = if has_port { host.to_owned() } else { format!("{host}:{DEFAULT_PORT}") };
    Ok((Place::Tcp(address), unescaped(name).ok_or_else(wrong)?))
}

/// Text with `%20` and its like taken for what they mean.
fn unescaped(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let (digits, tail) = rest.split_at_checked(2)?;
        bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
        rest = tail;
    }
    String::from_utf8(bytes).ok()
}

/// A connection, one direction at a time.
struct Stream {
    reader: BufReader<Patient>,
    writer: Patient,
    /// It failed: nobody knows where in its stream a reply begins.
    lost: bool,
}

fn invalid(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message.to_owned())
}

impl Stream {
    fn new(client: Patient) -> Self {
        Self { reader: BufReader::new(client.clone()), writer: client, lost: false }
    }

    fn set_patience(&mut self, patience: Duration) {
        self.reader.get_mut().patience = patience;
        self.writer.patience = patience;
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u16(&mut self) -> io::Result<u16> {
        self.take().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> io::Result<u32> {
        self.take().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> io::Result<u64> {
        self.take().map(u64::from_be_bytes)
    }

    fn bytes(&mut self, len: u32) -> io::Result<Vec<u8>> {
        if len > REPLY_AT_MOST {
            return Err(invalid("a reply is too long"));
        }
        let mut bytes = vec![0; len as usize];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Sends an option and calls `look` with each reply before the last. Returns the last one's kind.
    fn option(&mut self, option: u32, data: &[u8], mut look: impl FnMut(u32, &[u8])) -> io::Result<u32> {
        let head = [&OPTION_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data];
        self.writer.write_all(&head.concat())?;
        // A server that never ends is none.
        for _ in 0..1000 {
            if (self.u64()?, self.u32()?) != (OPTION_REPLY_MAGIC, option) {
                return Err(invalid("a reply to an option is not understood"));
            }
            let (kind, len) = (self.u32()?, self.u32()?);
            let data = self.bytes(len)?;
            if kind == option_reply::ACK || kind & option_reply::ERROR != 0 {
                return Ok(kind);
            }
            look(kind, &data);
        }
        Err(invalid("an option has replies without end"))
    }
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

/// Chooses an export. Returns its size, and the number of the context that tells what is allocated, where there is one.
fn handshake(stream: &mut Stream, name: &str) -> io::Result<(u64, Option<u32>)> {
    if name.len() > MAX_STRING || (stream.u64()?, stream.u64()?) != (INIT_MAGIC, OPTION_MAGIC) {
        return Err(invalid("it speaks no NBD that is known here"));
    }
    if stream.u16()? & handshake_flag::FIXED_NEWSTYLE == 0 {
        return Err(invalid("it is older than the fixed newstyle handshake"));
    }
    stream.writer.write_all(&u32::from(handshake_flag::FIXED_NEWSTYLE).to_be_bytes())?;
    let mut context = None;
    if stream.option(option::STRUCTURED_REPLY, &[], |_, _| {})? == option_reply::ACK {
        let data = [string(name), 1_u32.to_be_bytes().to_vec(), string(ALLOCATION)].concat();
        stream.option(option::SET_META_CONTEXT, &data, |kind, data| {
            if let (option_reply::META_CONTEXT, Some((id, rest))) = (kind, data.split_first_chunk::<4>())
                && rest == ALLOCATION.as_bytes()
            {
                context = Some(u32::from_be_bytes(*id));
            }
        })?;
    }
    let mut size = None;
    let ended = stream.option(option::GO, &[&string(name)[..], &[0, 0]].concat(), |kind, data| {
        if let (option_reply::INFO, Some((what, rest))) = (kind, data.split_first_chunk::<2>())
            && u16::from_be_bytes(*what) == info::EXPORT
        {
            size = rest.first_chunk::<8>().map(|size| u64::from_be_bytes(*size));
        }
    })?;
    match (ended, size) {
        (option_reply::ACK, Some(size)) => Ok((size, context)),
        (option_reply::ERR_UNKNOWN, _) => Err(io::ErrorKind::NotFound.into()),
        (option_reply::ERR_TLS_REQD, _) => Err(invalid("it takes TLS only, which is not spoken here")),
        _ => Err(invalid("it refuses the export")),
    }
}

/// A disk of another server.
struct Remote {
    uri: String,
    size: u64,
    context: Option<u32>,
    stream: Mutex<Stream>,
}

impl Remote {
    fn check(&self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(Error::new(ErrorKind::OutOfRange, format!("{}: {len} bytes at {offset} are not inside the disk", self.uri))),
        }
    }

    /// Does something with the connection, if it did not fail before; `when` says what, should it fail.
    fn with<T>(&self, when: impl FnOnce() -> String, ask: impl FnOnce(&mut Stream) -> io::Result<T>) -> Result<T> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let done = if stream.lost { Err(invalid("the connection failed before")) } else { ask(&mut stream) };
        stream.lost = done.is_err();
        done.map_err(|error| told(&self.uri, &when(), error))
    }

    fn read(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        while !buf.is_empty() {
            let len = buf.len().min(READ_AT_MOST);
            let (now, later) = buf.split_at_mut(len);
            let when = || format!("when it was to read {len} bytes at {offset}");
            self.with(when, |stream| read(stream, now, offset))?;
            offset += now.len() as u64;
            buf = later;
        }
        Ok(())
    }
}

fn send(stream: &mut Stream, command: Command, offset: u64, len: u64) -> io::Result<()> {
    let request = Request { flags: 0, command, cookie: offset, offset, len };
    let bytes = request.to_bytes(false).ok_or_else(|| invalid("a request is too long"))?;
    stream.writer.write_all(&bytes)
}

fn failed(error: u32) -> io::Error {
    io::Error::from_raw_os_error(i32::try_from(error).unwrap_or(nix::libc::EIO))
}

/// Takes a reply, chunk by chunk: `take` gets the kind of each and its bytes' number, and takes them from the stream. An
/// error that the server tells is returned.
fn reply(
    stream: &mut Stream,
    cookie: u64,
    mut simple: impl FnMut(&mut Stream) -> io::Result<()>,
    mut take: impl FnMut(&mut Stream, u16, u32) -> io::Result<()>,
) -> io::Result<()> {
    let mut told = Ok(());
    for _ in 0..CHUNKS_AT_MOST {
        let magic = stream.u32()?;
        if magic == SIMPLE_REPLY_MAGIC {
            let (error, found) = (stream.u32()?, stream.u64()?);
            return match error {
                _ if found != cookie => Err(invalid("a reply is for another request")),
                0 => simple(stream),
                error => Err(failed(error)),
            };
        }
        if magic != STRUCTURED_REPLY_MAGIC {
            return Err(invalid("a reply is not understood"));
        }
        let (flags, kind, found, len) = (stream.u16()?, stream.u16()?, stream.u64()?, stream.u32()?);
        if found != cookie {
            return Err(invalid("a reply is for another request"));
        }
        match kind {
            chunk::NONE => drop(stream.bytes(len)?),
            kind if kind & chunk::IS_ERROR != 0 => {
                let payload = stream.bytes(len)?;
                let error = payload.first_chunk::<4>().map_or(0, |error| u32::from_be_bytes(*error));
                told = Err(failed(error));
            }
            kind => take(stream, kind, len)?,
        }
        if flags & chunk::DONE != 0 {
            return told;
        }
    }
    Err(invalid("a reply has chunks without end"))
}

fn read(stream: &mut Stream, buf: &mut [u8], offset: u64) -> io::Result<()> {
    send(stream, Command::Read, offset, buf.len() as u64)?;
    let buf = std::cell::RefCell::new(buf);
    let mut filled = 0;
    let outside = || invalid("a chunk lies outside of what was asked for");
    let whole = |stream: &mut Stream| stream.reader.read_exact(&mut buf.borrow_mut());
    let mut is_simple = false;
    let simple = |stream: &mut Stream| {
        is_simple = true;
        whole(stream)
    };
    reply(stream, offset, simple, |stream, kind, len| {
        let at = usize::try_from(stream.u64()?.wrapping_sub(offset)).map_err(|_| outside())?;
        let mut buf = buf.borrow_mut();
        let len = match kind {
            chunk::OFFSET_HOLE if len == 12 => stream.u32()? as usize,
            chunk::OFFSET_DATA if len > 8 => len as usize - 8,
            _ => return Err(invalid("a chunk of a READ is not understood")),
        };
        let part = at.checked_add(len).and_then(|end| buf.get_mut(at..end)).ok_or_else(outside)?;
        filled += len;
        if kind == chunk::OFFSET_HOLE {
            part.fill(0);
            return Ok(());
        }
        stream.reader.read_exact(part)
    })?;
    if is_simple || filled == buf.borrow().len() { Ok(()) } else { Err(invalid("a reply lacks a part of the data")) }
}

/// Asks what a range is: lengths and states, from its start on, one at least.
fn status(stream: &mut Stream, range: &Range<u64>, context: u32) -> io::Result<Vec<(u64, u32)>> {
    let len = (range.end - range.start).min(STATUS_AT_MOST);
    send(stream, Command::BlockStatus, range.start, len)?;
    let mut runs = Vec::new();
    let simple = |_: &mut Stream| Err(invalid("block status has no simple reply"));
    reply(stream, range.start, simple, |stream, kind, len| {
        let payload = stream.bytes(len)?;
        let Some((id, rest)) = payload.split_first_chunk::<4>().filter(|_| kind == chunk::BLOCK_STATUS) else {
            return Err(invalid("a chunk of a BLOCK_STATUS is not understood"));
        };
        if u32::from_be_bytes(*id) == context {
            let numbers = rest.as_chunks::<4>().0.iter().map(|number| u32::from_be_bytes(*number)).collect::<Vec<_>>();
            runs.extend(numbers.as_chunks::<2>().0.iter().map(|[len, state]| (u64::from(*len), *state)));
        }
        Ok(())
    })?;
    let moves = runs.first().is_some_and(|(len, _)| *len > 0);
    if moves { Ok(runs) } else { Err(invalid("block status tells nothing")) }
}

impl BlockDevice for Remote {
    fn capabilities(&self) -> Capabilities {
        Capabilities { size: self.size, read_only: true, discard_granularity: 512, layers: 1 }
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        self.check(offset, bufs.iter().map(|buf| buf.len() as u64).sum())?;
        let mut at = offset;
        bufs.iter_mut().try_for_each(|buf| {
            let len = buf.len() as u64;
            self.read(buf, at)?;
            at += len;
            Ok(())
        })
    }

    fn write_vectored_at(&self, _: &[IoSlice<'_>], _: u64) -> Result<()> {
        Err(Error::new(ErrorKind::ReadOnly, format!("{}: is only read", self.uri)))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn zero(&self, _: Range<u64>, _: ZeroMode) -> Result<()> {
        self.write_vectored_at(&[], 0)
    }

    fn extents(&self, range: Range<u64>, visit: &mut dyn FnMut(Extent) -> Result<()>) -> Result<()> {
        self.check(range.start, range.end.saturating_sub(range.start))?;
        let mut at = range.start;
        let mut open: Option<Extent> = None;
        while at < range.end {
            let runs = match self.context {
                Some(context) => {
                    let when = || format!("when it was to say what is allocated at {at}");
                    self.with(when, |stream| status(stream, &(at..range.end), context))?
                }
                None => vec![(range.end - at, 0)],
            };
            for (len, state) in runs {
                let end = at.saturating_add(len).min(range.end);
                if end == at {
                    break;
                }
                // Zero is what counts; a hole alone may hold anything.
                let zero = state & 2 != 0;
                let offset = (!zero).then_some(at);
                let state = if zero { ExtentState::Absent } else { ExtentState::Data };
                let next = Extent { range: at..end, state, depth: 0, offset };
                at = end;
                if open.as_mut().is_some_and(|open| open.merge(&next)) {
                    continue;
                }
                open.replace(next).map_or(Ok(()), &mut *visit)?;
            }
        }
        open.map_or(Ok(()), visit)
    }

    fn layer_path(&self, _: usize) -> Option<PathBuf> {
        None
    }

    fn close(&self) -> Result<()> {
        self.with(|| "at the end".to_owned(), |stream| send(stream, Command::Disconnect, 0, 0))
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Remote").field(&self.uri).field(&self.size).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_name_a_place_and_an_export() {
        let unix = |path: &str, name: &str| (Place::Unix(path.into()), name.to_owned());
        let tcp = |address: &str, name: &str| (Place::Tcp(address.into()), name.to_owned());
        assert_eq!(parse("nbd+unix:///?socket=/a%20b").unwrap(), unix("/a b", ""));
        assert_eq!(parse("nbd+unix:///x/y?a=b&socket=s").unwrap(), unix("s", "x/y"));
        assert_eq!(parse("nbd://host").unwrap(), tcp("host:10809", ""));
        assert_eq!(parse("nbd://[::1]/x").unwrap(), tcp("[::1]:10809", "x"));
        assert_eq!(parse("nbd://[::1]:7/x").unwrap(), tcp("[::1]:7", "x"));
        for wrong in ["nbd://", "nbd+unix:///x", "nbd+unix:///x?socket=%2", "nbd+unix:///%ff?socket=s", "nbds://x"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
