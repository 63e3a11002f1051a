//! A client of the protocol that shares no code with the server, and does what it is told, sensible or not.

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use socket2::{Domain, Socket, Type};

pub const ACK: u32 = 1;
pub const SERVER: u32 = 2;
pub const INFO: u32 = 3;
pub const META: u32 = 4;
pub const ERR_UNSUP: u32 = 0x8000_0001;
pub const ERR_POLICY: u32 = 0x8000_0002;
pub const ERR_INVALID: u32 = 0x8000_0003;
pub const ERR_TLS: u32 = 0x8000_0005;
pub const ERR_UNKNOWN: u32 = 0x8000_0006;
pub const ERR_TOO_BIG: u32 = 0x8000_0009;
pub const ERR_EXT: u32 = 0x8000_000a;

pub const EXPORT_NAME: u32 = 1;
pub const ABORT: u32 = 2;
pub const LIST: u32 = 3;
pub const STARTTLS: u32 = 5;
pub const OPT_INFO: u32 = 6;
pub const GO: u32 = 7;
pub const STRUCTURED: u32 = 8;
pub const LIST_META: u32 = 9;
pub const SET_META: u32 = 10;
pub const EXTENDED: u32 = 11;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const CACHE: u16 = 5;
pub const ZERO: u16 = 6;
pub const STATUS: u16 = 7;

pub const FUA: u16 = 1;
pub const NO_HOLE: u16 = 2;
pub const DF: u16 = 4;
pub const REQ_ONE: u16 = 8;
pub const FAST_ZERO: u16 = 16;
pub const PAYLOAD: u16 = 32;

pub const EPERM: u32 = 1;
pub const EINVAL: u32 = 22;
pub const ENOSPC: u32 = 28;
pub const ESHUTDOWN: u32 = 108;

/// A reply to an option: its kind, and its data.
pub type OptionReply = (u32, Vec<u8>);

/// A simple reply, or a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub cookie: u64,
    /// 0x8001 and the like for errors; `None` in a simple reply.
    pub kind: Option<u16>,
    pub done: bool,
    /// In extended style.
    pub offset: Option<u64>,
    pub error: u32,
    pub payload: Vec<u8>,
}

/// How replies look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    Simple,
    Structured,
    Extended,
}

pub struct Wire {
    pub stream: UnixStream,
    pub style: Style,
    pub size: u64,
    pub flags: u16,
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes[at..at + 2].try_into().unwrap())
}

pub fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// A string as options have them.
pub fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

/// The data of GO and INFO.
pub fn go_data(name: &str, infos: &[u16]) -> Vec<u8> {
    let infos: Vec<u8> = infos.iter().flat_map(|info| info.to_be_bytes()).collect();
    [string(name), (infos.len() as u16 / 2).to_be_bytes().to_vec(), infos].concat()
}

/// The data of LIST_META and SET_META.
pub fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let queries_data: Vec<u8> = queries.iter().flat_map(|query| string(query)).collect();
    [string(name), (queries.len() as u32).to_be_bytes().to_vec(), queries_data].concat()
}

/// A TCP connection from 127.0.0.`host`. It is called a Unix stream, which is a socket like any other to its methods.
pub fn tcp_from(host: u8, port: u16) -> UnixStream {
    let address = |host, port| SocketAddr::from(([127, 0, 0, host], port)).into();
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&address(host, 0)).unwrap();
    // A payload is sent after its header, and would wait for that to be acknowledged.
    socket.set_tcp_nodelay(true).unwrap();
    socket.connect(&address(1, port)).unwrap();
    OwnedFd::from(socket).into()
}

impl Wire {
    /// Connects and exchanges flags.
    pub fn connect(socket: &Path) -> Self {
        Self::connect_with(socket, 3)
    }

    /// As [`Wire::open`], in simple style, over TCP and from this address of the loopback network.
    pub fn open_from(host: u8, port: u16) -> Self {
        let mut wire = Self::greet(tcp_from(host, port), 3);
        wire.go("");
        wire
    }

    pub fn connect_with(socket: &Path, flags: u32) -> Self {
        Self::greet(UnixStream::connect(socket).unwrap(), flags)
    }

    fn greet(stream: UnixStream, flags: u32) -> Self {
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut wire = Self { stream, style: Style::Simple, size: 0, flags: 0 };
        assert_eq!(wire.take(18), b"NBDMAGICIHAVEOPT\0\x03");
        wire.send(&flags.to_be_bytes());
        wire
    }

    /// Connects and chooses an export.
    pub fn open(socket: &Path, name: &str, style: Style) -> Self {
        let mut wire = Self::connect(socket);
        wire.set_style(style);
        wire.go(name);
        wire
    }

    /// As [`Wire::open`], with metadata contexts.
    pub fn open_with(socket: &Path, name: &str, style: Style, contexts: &[&str]) -> Self {
        let mut wire = Self::connect(socket);
        wire.set_style(style);
        let replies = wire.option(SET_META, &meta_data(name, contexts));
        assert_eq!(replies.len(), contexts.len() + 1, "{replies:?}");
        wire.go(name);
        wire
    }

    pub fn set_style(&mut self, style: Style) {
        match style {
            Style::Simple => {}
            Style::Structured => assert_eq!(self.option(STRUCTURED, &[]), [(ACK, vec![])]),
            Style::Extended => assert_eq!(self.option(EXTENDED, &[]), [(ACK, vec![])]),
        }
        self.style = style;
    }

    pub fn go(&mut self, name: &str) {
        let replies = self.option(GO, &go_data(name, &[]));
        assert_eq!(replies.last().unwrap().0, ACK, "{replies:?}");
        let export = replies.iter().find(|(kind, data)| *kind == INFO && be16(data, 0) == 0).unwrap();
        (self.size, self.flags) = (be64(&export.1, 2), be16(&export.1, 10));
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// True when the server ended the session, with nothing more to say.
    pub fn is_over(&mut self) -> bool {
        match self.stream.read(&mut [0]) {
            Ok(count) => count == 0,
            Err(error) => matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe),
        }
    }

    pub fn option_header(&mut self, option: u32, len: u32) {
        self.send(&[&b"IHAVEOPT"[..], &option.to_be_bytes(), &len.to_be_bytes()].concat());
    }

    /// Sends an option and returns its replies, the last being an acknowledgement or an error.
    pub fn option(&mut self, option: u32, data: &[u8]) -> Vec<OptionReply> {
        self.option_header(option, data.len() as u32);
        self.send(data);
        self.option_replies(option)
    }

    pub fn option_replies(&mut self, option: u32) -> Vec<OptionReply> {
        let mut replies = Vec::new();
        loop {
            let head = self.take(20);
            assert_eq!(be64(&head, 0), 0x0003_e889_0455_65a9);
            assert_eq!(be32(&head, 8), option);
            let (kind, len) = (be32(&head, 12), be32(&head, 16));
            let data = self.take(len as usize);
            replies.push((kind, data));
            if kind == ACK || kind >> 31 == 1 {
                return replies;
            }
        }
    }

    /// The kind of an option's last reply.
    pub fn option_kind(&mut self, option: u32, data: &[u8]) -> u32 {
        self.option(option, data).last().unwrap().0
    }

    /// Sends a request's header.
    pub fn request(&mut self, flags: u16, command: u16, cookie: u64, offset: u64, len: u64) {
        let bytes = self.request_bytes(flags, command, cookie, offset, len);
        self.send(&bytes);
    }

    /// A request's header.
    pub fn request_bytes(&self, flags: u16, command: u16, cookie: u64, offset: u64, len: u64) -> Vec<u8> {
        let extended = self.style == Style::Extended;
        let magic: u32 = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend([flags.to_be_bytes(), command.to_be_bytes()].concat());
        bytes.extend([cookie.to_be_bytes(), offset.to_be_bytes()].concat());
        match extended {
            true => bytes.extend(len.to_be_bytes()),
            false => bytes.extend((len as u32).to_be_bytes()),
        }
        bytes
    }

    /// Sends a WRITE.
    pub fn write(&mut self, flags: u16, cookie: u64, offset: u64, data: &[u8]) {
        let flags = if self.style == Style::Extended { flags | PAYLOAD } else { flags };
        self.request(flags, WRITE, cookie, offset, data.len() as u64);
        self.send(data);
    }

    /// Takes a reply or chunk. `expected` is the data of a simple reply to a READ.
    pub fn reply(&mut self, expected: usize) -> Reply {
        let magic = be32(&self.take(4), 0);
        if magic == 0x6744_6698 {
            assert_ne!(self.style, Style::Extended, "a simple reply with extended headers");
            let head = self.take(12);
            let (error, cookie) = (be32(&head, 0), be64(&head, 4));
            let payload = if error == 0 { self.take(expected) } else { Vec::new() };
            return Reply { cookie, kind: None, done: true, offset: None, error, payload };
        }
        let (len, offset, head) = if self.style == Style::Extended {
            assert_eq!(magic, 0x6e8a_278c);
            let head = self.take(28);
            (be64(&head, 20), Some(be64(&head, 12)), head)
        } else {
            assert_eq!((magic, self.style), (0x668e_33ef, Style::Structured));
            let head = self.take(16);
            (u64::from(be32(&head, 12)), None, head)
        };
        let (flags, kind, cookie) = (be16(&head, 0), be16(&head, 2), be64(&head, 4));
        assert!(flags <= 1 && len <= 65 << 20, "flags {flags}, {len} bytes");
        let payload = self.take(len as usize);
        let error = if kind >> 15 == 1 { be32(&payload, 0) } else { 0 };
        if kind >> 15 == 1 {
            let message = usize::from(be16(&payload, 4));
            assert_eq!(payload.len(), 6 + message + if kind == 0x8002 { 8 } else { 0 });
            std::str::from_utf8(&payload[6..6 + message]).unwrap();
        }
        Reply { cookie, kind: Some(kind), done: flags == 1, offset, error, payload }
    }

    /// Takes a whole reply: all of its chunks.
    pub fn replies(&mut self, expected: usize) -> Vec<Reply> {
        let mut replies = vec![self.reply(expected)];
        while !replies.last().unwrap().done {
            replies.push(self.reply(0));
        }
        replies
    }

    /// Sends a request without payload and returns the error of its reply.
    pub fn error_of(&mut self, flags: u16, command: u16, offset: u64, len: u64) -> u32 {
        self.request(flags, command, 77, offset, len);
        let replies = self.replies(if command == READ { len as usize } else { 0 });
        assert!(replies.iter().all(|reply| reply.cookie == 77));
        assert!(command != READ || self.style == Style::Simple || replies.iter().all(|reply| reply.kind.is_some()));
        replies.iter().map(|reply| reply.error).max().unwrap()
    }

    /// Writes, and returns the error.
    pub fn write_error(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        self.write(flags, 78, offset, data);
        self.reply(0).error
    }

    /// Reads a range in whatever chunks it comes.
    pub fn read(&mut self, flags: u16, offset: u64, len: usize) -> Vec<u8> {
        self.request(flags, READ, 79, offset, len as u64);
        let mut bytes = vec![0xEE; len];
        let mut filled = 0;
        for reply in self.replies(len) {
            assert_eq!((reply.cookie, reply.error), (79, 0));
            let (at, data) = match reply.kind {
                None => (0, &reply.payload[..]),
                Some(0) => continue,
                Some(1) => ((be64(&reply.payload, 0) - offset) as usize, &reply.payload[8..]),
                Some(2) => ((be64(&reply.payload, 0) - offset) as usize, &[][..]),
                Some(kind) => panic!("chunk of kind {kind}"),
            };
            assert!(reply.offset.is_none_or(|found| found == offset), "the reply repeats the request's offset");
            let data = if reply.kind == Some(2) { &vec![0; be32(&reply.payload, 8) as usize] } else { data };
            bytes[at..at + data.len()].copy_from_slice(data);
            filled += data.len();
        }
        assert_eq!(filled, len, "chunks cover the range once");
        bytes
    }
}
