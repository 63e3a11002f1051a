//! The handshake, without I/O: bytes of a client in, bytes for it out, and in the end what was agreed on.
//!
//! Nothing that a client sends is kept but the data of one option, which is limited; what is longer is skipped and
//! refused. An unknown or malformed option is answered and the handshake goes on; only what the protocol can't answer
//! ends it.

mod data;
mod options;

use zerocopy::FromBytes;
use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use crate::codec::{
    INIT_MAGIC, MAX_OPTION, OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionHeader, OptionReply, Style, handshake_flag, option,
    option_reply,
};
use crate::context::Context;

/// What the handshake tells of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// The name that it has, whatever it was asked for by.
    pub name: String,
    /// A text for people.
    pub description: String,
    /// Bytes.
    pub size: u64,
    /// [Flags](crate::codec::transmission_flag), those that depend on the session left out.
    pub flags: u16,
    /// What images below the leaf are called.
    pub ancestors: Vec<String>,
}

/// The exports that there are.
pub trait Catalog {
    /// All, the default first.
    fn list(&self) -> Vec<ExportInfo>;
    /// One by its name; the empty name is the default.
    fn find(&self, name: &str) -> Option<ExportInfo>;
}

/// What a server wants of TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsPolicy {
    /// There is none.
    Off,
    /// It is offered.
    Offered,
    /// Nothing goes without.
    Required,
}

/// What was agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// The export as it was told.
    pub export: ExportInfo,
    /// How replies look.
    pub style: Style,
    /// What block status tells, each with its number.
    pub contexts: Vec<(u32, Context)>,
}

impl Session {
    /// True when requests have 64 bits of length.
    #[must_use]
    pub fn extended(&self) -> bool {
        self.style == Style::Extended
    }
}

/// What is to be done after some bytes of a client were taken.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// More bytes are needed.
    More,
    /// Send what is to be sent, drop all bytes that came after, do a TLS handshake, and go on.
    StartTls,
    /// The handshake is done.
    Done(Box<Session>),
    /// Send what is to be sent, and end.
    End,
}

#[derive(Debug)]
enum State {
    /// The client's flags come first.
    Flags,
    /// An option's header.
    Header,
    /// So many bytes of an option that is too long, to be thrown away.
    Skip { option: u32, left: u64 },
    /// An option's data.
    Data { option: u32, len: usize },
    /// Nothing more is taken.
    Over,
}

/// A handshake under way.
#[derive(Debug)]
pub struct Handshake {
    state: State,
    tls: TlsPolicy,
    encrypted: bool,
    shutdown: bool,
    no_zeroes: bool,
    style: Style,
    /// The export that contexts were chosen for, and those.
    chosen: Option<(String, Vec<(u32, Context)>)>,
}

impl Handshake {
    /// Begins one, with the bytes that the server sends first.
    #[must_use]
    pub fn new(tls: TlsPolicy, out: &mut Vec<u8>) -> Self {
        out.extend_from_slice(&INIT_MAGIC.to_be_bytes());
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES).to_be_bytes());
        Self { state: State::Flags, tls, encrypted: false, shutdown: false, no_zeroes: false, style: Style::Simple, chosen: None }
    }

    /// From now on all options are refused, because the server ends.
    pub fn shut_down(&mut self) {
        self.shutdown = true;
    }

    /// The stream is encrypted from now on. What was agreed on before counts no more.
    pub fn encrypted(&mut self) {
        self.encrypted = true;
        self.style = Style::Simple;
        self.chosen = None;
    }

    /// Takes what it can use of `input`, and removes it there; what is to be sent goes to `out`. Called again with the
    /// rest until it is [`Step::More`] that it says.
    pub fn feed(&mut self, input: &mut &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) -> Step {
        loop {
            match self.state {
                State::Over => return Step::End,
                State::Flags => {
                    let Some(bytes) = take(input, 4) else { return Step::More };
                    if !self.client_flags(bytes) {
                        return self.end();
                    }
                }
                State::Header => {
                    let Some(bytes) = take(input, size_of::<OptionHeader>()) else { return Step::More };
                    if !self.header(bytes) {
                        return self.end();
                    }
                }
                State::Skip { option, left } => {
                    let skipped = usize::try_from(left).unwrap_or(usize::MAX).min(input.len());
                    *input = &input[skipped..];
                    let left = left - skipped as u64;
                    if left > 0 {
                        self.state = State::Skip { option, left };
                        return Step::More;
                    }
                    if option == option::EXPORT_NAME {
                        return self.end();
                    }
                    self.state = State::Header;
                    error(out, option, option_reply::ERR_TOO_BIG, "the option has more data than is taken");
                }
                State::Data { option, len } => {
                    let Some(bytes) = take(input, len) else { return Step::More };
                    self.state = State::Header;
                    let step = self.option(option, bytes, catalog, out);
                    match step {
                        Step::More => {}
                        Step::StartTls => return step,
                        Step::Done(_) | Step::End => {
                            self.state = State::Over;
                            return step;
                        }
                    }
                    // What is to be sent does not pile up.
                    if out.len() > MAX_OPTION as usize {
                        return Step::More;
                    }
                }
            }
        }
    }

    /// True when bytes that are there already may be taken without more of them.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.state, State::Over)
    }

    fn end(&mut self) -> Step {
        self.state = State::Over;
        Step::End
    }

    /// False when the client is not understood.
    fn client_flags(&mut self, bytes: &[u8]) -> bool {
        let flags = U32::read_from_bytes(bytes).map_or(u32::MAX, U32::get);
        let (fixed, no_zeroes) = (u32::from(handshake_flag::FIXED_NEWSTYLE), u32::from(handshake_flag::NO_ZEROES));
        self.no_zeroes = flags & no_zeroes != 0;
        self.state = State::Header;
        // A client without the first of them can't take replies to options; none has been made for years.
        flags & !(fixed | no_zeroes) == 0 && flags & fixed != 0
    }

    fn header(&mut self, bytes: &[u8]) -> bool {
        let Ok(header) = OptionHeader::ref_from_bytes(bytes) else { return false };
        let (option, len) = (header.option.get(), header.len.get());
        self.state = match usize::try_from(len) {
            Ok(len) if header.len.get() <= MAX_OPTION => State::Data { option, len },
            _ => State::Skip { option, left: len.into() },
        };
        header.magic.get() == OPTION_MAGIC
    }
}

/// The first `len` bytes, removed.
fn take<'a>(input: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (taken, rest) = input.split_at_checked(len)?;
    *input = rest;
    Some(taken)
}

/// Answers an option.
fn reply(out: &mut Vec<u8>, option: u32, kind: u32, parts: &[&[u8]]) {
    let len = parts.iter().map(|part| part.len()).sum::<usize>() as u32;
    let magic = U64::new(OPTION_REPLY_MAGIC);
    out.extend_from_slice(OptionReply { magic, option: U32::new(option), kind: U32::new(kind), len: U32::new(len) }.as_bytes());
    parts.iter().for_each(|part| out.extend_from_slice(part));
}

/// Refuses an option.
fn error(out: &mut Vec<u8>, option: u32, kind: u32, message: &str) {
    reply(out, option, kind, &[message.as_bytes()]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::Table;

    #[test]
    fn at_the_end_options_are_told_so_and_abort_is_understood() {
        let (mut out, mut sent) = (Vec::new(), Vec::new());
        let mut handshake = Handshake::new(TlsPolicy::Off, &mut out);
        handshake.shut_down();
        let option = |option: u32| [&b"IHAVEOPT"[..], &option.to_be_bytes(), &[0; 4]].concat();
        let mut wire = [3_u32.to_be_bytes().to_vec(), option(option::LIST), option(99), option(option::ABORT)].concat();
        wire.extend(option(option::LIST));
        assert_eq!(handshake.feed(&mut wire.as_slice(), &Table::default(), &mut sent), Step::End);
        let kinds = sent.windows(8).enumerate().filter(|(_, bytes)| **bytes == OPTION_REPLY_MAGIC.to_be_bytes());
        let kinds: Vec<_> = kinds.map(|(at, _)| u32::from_be_bytes(sent[at + 12..at + 16].try_into().unwrap())).collect();
        assert_eq!(kinds, [option_reply::ERR_SHUTDOWN, option_reply::ERR_SHUTDOWN, option_reply::ACK]);
    }
}
