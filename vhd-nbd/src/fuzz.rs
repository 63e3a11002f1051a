//! What the fuzz target `nbd_session` does: bytes as a whole session of a client, without a socket.

use crate::codec::{Command, Errno, OPTION_REPLY_MAGIC, Request, Style, command_flag, request_len, transmission_flag};
use crate::handshake::{Catalog, ExportInfo, Handshake, Session, Step, TlsPolicy};
use crate::transmission::{Operation, check, status_payload};

/// Bytes that a server sends first.
const GREETING: usize = 18;

/// Two exports, one of them read-only.
struct Exports;

impl Catalog for Exports {
    fn list(&self) -> Vec<ExportInfo> {
        [("disk", 1 << 30, 0), ("other", 4096, transmission_flag::READ_ONLY)]
            .map(|(name, size, flags)| ExportInfo {
                name: name.into(),
                description: "of a test".into(),
                size,
                flags,
                ancestors: vec!["base.vhd".into()],
            })
            .into()
    }

    fn find(&self, name: &str) -> Option<ExportInfo> {
        self.list().into_iter().find(|export| name.is_empty() || export.name == name)
    }
}

/// Takes `data` as what a client sends: first byte how the server is, the rest on the wire.
///
/// # Panics
/// When a handshake ends differently if its bytes come in pieces, what is sent is no sequence of replies, or a request is
/// let through that touches what it must not.
pub fn nbd_session(data: &[u8]) {
    let Some((how, wire)) = data.split_first() else { return };
    let policy = [TlsPolicy::Off, TlsPolicy::Offered, TlsPolicy::Required][usize::from(how % 3)];
    let wire = &wire[..wire.len().min(1 << 16)];
    let (whole, sent, rest) = handshake(policy, wire, usize::MAX);
    let (pieces, sent_in_pieces, rest_of_pieces) = handshake(policy, wire, usize::from(how / 3) + 1);
    assert_eq!((&whole, &sent, rest), (&pieces, &sent_in_pieces, rest_of_pieces), "how bytes come makes no difference");
    if let Step::Done(session) = whole {
        requests(&session, rest);
    } else {
        assert_replies(&sent[GREETING..]);
    }
}

/// Feeds a handshake, so many bytes at once. Returns how it ended, what was sent, and the bytes behind it.
fn handshake(policy: TlsPolicy, wire: &[u8], at_once: usize) -> (Step, Vec<u8>, &[u8]) {
    let mut out = Vec::new();
    let mut handshake = Handshake::new(policy, &mut out);
    let (mut given, mut start) = (0, 0);
    loop {
        let mut input = &wire[start..given];
        let before = input.len();
        // What is sent goes away each time, as it does on a socket.
        let mut sent = Vec::new();
        let step = handshake.feed(&mut input, &Exports, &mut sent);
        out.append(&mut sent);
        let taken = before - input.len();
        start += taken;
        match step {
            Step::More if taken > 0 => {}
            Step::More if given < wire.len() => given = wire.len().min(given.saturating_add(at_once)),
            Step::More => return (step, out, &[]),
            Step::StartTls => {
                // As if the rest came encrypted.
                handshake.encrypted();
            }
            Step::Done(_) | Step::End => return (step, out, &wire[start..]),
        }
    }
}

fn assert_replies(mut sent: &[u8]) {
    while let Some((head, rest)) = sent.split_first_chunk::<20>() {
        assert_eq!(head[..8], OPTION_REPLY_MAGIC.to_be_bytes());
        let len = u32::from_be_bytes([head[16], head[17], head[18], head[19]]) as usize;
        assert!(len <= 70_000 && len <= rest.len(), "a reply of {len} bytes");
        sent = &rest[len..];
    }
    assert!(sent.is_empty(), "{} bytes are no reply", sent.len());
}

fn requests(session: &Session, mut wire: &[u8]) {
    let header = request_len(session.extended());
    let mut ids: Vec<_> = session.contexts.iter().map(|(id, _)| *id).collect();
    ids.dedup();
    assert!(ids.len() == session.contexts.len() && !ids.contains(&0), "contexts have numbers of their own");
    while let Some((bytes, rest)) = wire.split_at_checked(header) {
        let Some(request) = Request::parse(bytes, session.extended()) else { return };
        assert_eq!(request.to_bytes(session.extended()).as_deref(), Some(bytes));
        wire = rest;
        if request.command == Command::Disconnect {
            return;
        }
        let payload = usize::try_from(request.payload(session.extended())).unwrap_or(usize::MAX).min(wire.len());
        assert_sound(&request, session, &wire[..payload]);
        wire = &wire[payload..];
    }
}

fn assert_sound(request: &Request, session: &Session, payload: &[u8]) {
    let size = session.export.size;
    match check(request, session) {
        // The range comes with the payload, also where that is empty.
        Ok(Operation::Status { .. }) if request.has(command_flag::PAYLOAD_LEN) => {
            if let Ok((len, wanted)) = status_payload(request, payload, session) {
                assert!(len > 0 && request.offset + len <= size && !wanted.is_empty());
            }
        }
        Ok(operation) => {
            assert!(request.end().is_some_and(|end| end <= size), "{request:?}");
            let writes = matches!(operation, Operation::Write | Operation::Trim | Operation::Zero { .. });
            assert!(!writes || session.export.flags & transmission_flag::READ_ONLY == 0, "{request:?}");
        }
        Err((error, message)) => assert_failure(request, session.style, error, message),
    }
}

fn assert_failure(request: &Request, style: Style, error: Errno, message: &str) {
    let (head, rest) = style.failure(request, error, message, None);
    let wanted = match style {
        Style::Simple => (16, 0),
        Style::Structured => (20, 6 + message.len()),
        Style::Extended => (32, 6 + message.len()),
    };
    assert_eq!((head.as_bytes().len(), rest.len()), wanted);
}
