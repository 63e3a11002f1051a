//! Which requests make sense, and what is wrong with the others: no I/O.

use crate::codec::{Command, Errno, MAX_PAYLOAD, Request, Style, command_flag, transmission_flag};
use crate::handshake::Session;

/// A request that makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Send a range. `one_chunk`: as one piece.
    Read {
        /// No chunk but one.
        one_chunk: bool,
    },
    /// Take a range.
    Write,
    /// Make durable what was written.
    Flush,
    /// Make a range zero, whatever becomes of its space.
    Trim,
    /// Make a range zero.
    Zero {
        /// Its space is kept.
        keep: bool,
    },
    /// Read a range ahead.
    Cache,
    /// Say what a range is.
    Status {
        /// With one extent per context.
        one_extent: bool,
    },
}

/// Flags that each command takes, FUA left out, which all take.
fn allowed_flags(command: Command, style: Style) -> u16 {
    let chunked = |flag| if style == Style::Simple { 0 } else { flag };
    let extended = |flag| if style == Style::Extended { flag } else { 0 };
    match command {
        Command::Read => chunked(command_flag::DF),
        Command::Write => extended(command_flag::PAYLOAD_LEN),
        Command::WriteZeroes => command_flag::NO_HOLE | command_flag::FAST_ZERO,
        Command::BlockStatus => command_flag::REQ_ONE | extended(command_flag::PAYLOAD_LEN),
        _ => 0,
    }
}

/// Why a request is refused: the error, and a message.
pub type Refusal = (Errno, &'static str);

/// Whether a request makes sense in a session.
///
/// # Errors
/// The error that the protocol has for this misuse.
pub fn check(request: &Request, session: &Session) -> Result<Operation, Refusal> {
    let flags = session.export.flags;
    if request.flags & !(allowed_flags(request.command, session.style) | command_flag::FUA) != 0 {
        return Err((Errno::Inval, "a flag is not known, or not for this command"));
    }
    let operation = match request.command {
        Command::Read => Operation::Read { one_chunk: session.style == Style::Simple || request.has(command_flag::DF) },
        Command::Write => Operation::Write,
        Command::Flush => Operation::Flush,
        Command::Trim => Operation::Trim,
        Command::Cache => Operation::Cache,
        Command::WriteZeroes => Operation::Zero { keep: request.has(command_flag::NO_HOLE) },
        Command::BlockStatus => Operation::Status { one_extent: request.has(command_flag::REQ_ONE) },
        Command::Disconnect | Command::Unknown(_) => return Err((Errno::Inval, "the command is not known")),
    };
    let writes = matches!(operation, Operation::Write | Operation::Trim | Operation::Zero { .. });
    if writes && flags & transmission_flag::READ_ONLY != 0 {
        return Err((Errno::Perm, "the export is read-only"));
    }
    match operation {
        Operation::Flush if (request.offset, request.len) != (0, 0) => {
            return Err((Errno::Inval, "a flush has no range"));
        }
        Operation::Status { .. } if session.contexts.is_empty() => {
            return Err((Errno::Inval, "no metadata context was chosen"));
        }
        // The range comes with the payload, and is checked there.
        Operation::Status { .. } if request.has(command_flag::PAYLOAD_LEN) => return Ok(operation),
        Operation::Status { .. } if request.len == 0 => {
            return Err((Errno::Inval, "nothing can be said of an empty range"));
        }
        Operation::Write if session.extended() && !request.has(command_flag::PAYLOAD_LEN) => {
            return Err((Errno::Inval, "a write with an extended header has a payload"));
        }
        Operation::Read { .. } | Operation::Write if request.len > u64::from(MAX_PAYLOAD) => {
            return Err((Errno::Inval, "the payload is longer than this server takes"));
        }
        _ => {}
    }
    if request.end().is_none_or(|end| end > session.export.size) {
        let grows = matches!(operation, Operation::Write | Operation::Zero { .. });
        let error = if grows { Errno::NoSpc } else { Errno::Inval };
        return Err((error, "the range is not inside the disk"));
    }
    Ok(operation)
}

/// The payload of a BLOCK_STATUS: the length of the range, and the contexts that are wanted.
///
/// # Errors
/// `Inval` when it is malformed, names a context that was not chosen, or the range is not inside the disk.
pub fn status_payload(request: &Request, payload: &[u8], session: &Session) -> Result<(u64, Vec<u32>), Refusal> {
    let malformed = (Errno::Inval, "the payload is no length and list of contexts");
    let (len, ids) = payload.split_first_chunk::<8>().ok_or(malformed)?;
    let (ids, rest) = ids.as_chunks::<4>();
    if !rest.is_empty() || ids.is_empty() {
        return Err(malformed);
    }
    let len = u64::from_be_bytes(*len);
    let mut wanted: Vec<_> = ids.iter().map(|id| u32::from_be_bytes(*id)).collect();
    wanted.sort_unstable();
    if wanted.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err((Errno::Inval, "a context is named twice"));
    }
    if wanted.iter().any(|id| session.contexts.iter().all(|(chosen, _)| chosen != id)) {
        return Err((Errno::Inval, "a context was not chosen"));
    }
    match request.offset.checked_add(len) {
        Some(end) if end <= session.export.size && len > 0 => Ok((len, wanted)),
        _ => Err((Errno::Inval, "the range is empty or not inside the disk")),
    }
}
