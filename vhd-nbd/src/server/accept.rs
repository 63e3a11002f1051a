//! Where clients come from.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use listenfd::ListenFd;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, Stdin, Stdout};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use vhd_core::{Error, ErrorKind, Result};
use vhd_service::socket::{OwnName, is_served};

use super::Server;
use super::negotiate::Incoming;
use crate::peer::Peer;

/// Bytes that a Unix socket takes without a reader: a long reply, so that it need not wait. The system may allow less.
const SEND_BUFFER: usize = 1 << 20;
/// How long to wait when there are no descriptors left.
const PAUSE: Duration = Duration::from_millis(50);
/// A client whose machine is gone is noticed after a few minutes.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A Unix socket.
    Unix(PathBuf),
    /// `HOST:PORT`; port 0 is a free one.
    Tcp(String),
    /// One client on stdin and stdout.
    Stdio,
    /// The socket that systemd, or another who knows its convention, passed on.
    Activated,
}

/// A socket that clients come to.
pub(super) enum Listener {
    /// With its name, where that is to be removed at the end.
    Unix {
        socket: UnixListener,
        path: PathBuf,
        own: Option<OwnName>,
    },
    Tcp(TcpListener),
    Stdio,
}

impl Listener {
    pub(super) async fn bind(listen: &Listen) -> Result<Self> {
        match listen {
            Listen::Unix(path) => {
                let socket = bind_unix(path).map_err(|error| Error::io(error, "can't be listened on").at(path))?;
                Ok(Self::Unix { socket, path: path.clone(), own: Some(OwnName::of(path)) })
            }
            Listen::Tcp(address) => {
                let bound = TcpListener::bind(address).await;
                Ok(Self::Tcp(bound.map_err(|error| Error::io(error, format!("can't listen on {address}")))?))
            }
            Listen::Stdio => Ok(Self::Stdio),
            Listen::Activated => activated(),
        }
    }

    /// Where it is, for clients.
    pub(super) fn uri(&self, tls: bool) -> String {
        let scheme = if tls { "nbds" } else { "nbd" };
        match self {
            // Clients may be in another folder.
            Self::Unix { path, .. } => {
                let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
                format!("{scheme}+unix:///?socket={}", escaped(&path))
            }
            Self::Tcp(socket) => {
                let address = socket.local_addr().map_or_else(|_| "?".to_owned(), |address| address.to_string());
                format!("{scheme}://{address}")
            }
            Self::Stdio => "stdio".to_owned(),
        }
    }

    /// Takes clients for ever. On stdio there is one, and with it this ends.
    pub(super) async fn accept(&self, server: &Arc<Server>) {
        loop {
            server.room().await;
            let came = match self {
                Self::Unix { socket, .. } => socket.accept().await.map(|(stream, _)| (unix_peer(&stream), unix(stream))),
                Self::Tcp(socket) => {
                    socket.accept().await.map(|(stream, from)| ((Peer::at(from.ip()), from.to_string()), tcp(stream)))
                }
                Self::Stdio => {
                    if let Some(serving) = stdio().and_then(|stream| server.spawn(stream, Peer::Starter, "stdio".into())) {
                        let _ = serving.await;
                    }
                    return;
                }
            };
            match came {
                Ok(((peer, from), stream)) => drop(server.spawn(stream, peer, from)),
                Err(error) => {
                    tracing::warn!("a client can't be taken: {error}");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix { path, own: Some(own), .. } = self {
            own.remove(path);
        }
    }
}

/// A socket that a dead server left is replaced.
fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    if let Ok(found) = std::fs::symlink_metadata(path) {
        if !found.file_type().is_socket() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "exists already and is no socket"));
        }
        match is_served(path) {
            Ok(false) => std::fs::remove_file(path)?,
            _ => return Err(io::Error::new(io::ErrorKind::AddrInUse, "someone listens there already")),
        }
    }
    UnixListener::bind(path)
}

fn activated() -> Result<Listener> {
    let wrong = |error: io::Error| Error::io(error, "the socket that was passed on can't be used");
    let mut passed = ListenFd::from_env();
    if passed.len() != 1 {
        let message = format!("{} sockets were passed on (LISTEN_FDS), expected one", passed.len());
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    if let Ok(Some(socket)) = passed.take_unix_listener(0) {
        socket.set_nonblocking(true).map_err(wrong)?;
        let path = socket.local_addr().ok().and_then(|address| address.as_pathname().map(Path::to_owned)).unwrap_or_default();
        return Ok(Listener::Unix { socket: UnixListener::from_std(socket).map_err(wrong)?, path, own: None });
    }
    let socket = ListenFd::from_env().take_tcp_listener(0).map_err(wrong)?;
    let socket = socket.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "no socket was passed on"))?;
    socket.set_nonblocking(true).map_err(wrong)?;
    Ok(Listener::Tcp(TcpListener::from_std(socket).map_err(wrong)?))
}

fn tcp(stream: TcpStream) -> Incoming {
    // Replies are whole when they are sent: there is nothing to wait for.
    let set = stream.set_nodelay(true).and_then(|()| {
        SockRef::from(&stream).set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 4))
    });
    if let Err(error) = set {
        tracing::debug!("a socket's options can't be set: {error}");
    }
    Incoming::Tcp(stream)
}

fn unix(stream: UnixStream) -> Incoming {
    if let Err(error) = SockRef::from(&stream).set_send_buffer_size(SEND_BUFFER) {
        tracing::debug!("a socket's buffer stays as it is: {error}");
    }
    Incoming::Unix(stream)
}

fn unix_peer(stream: &UnixStream) -> (Peer, String) {
    match stream.peer_cred() {
        Ok(peer) => {
            let pid = peer.pid().map(|pid| format!(" pid={pid}")).unwrap_or_default();
            (Peer::User(peer.uid()), format!("unix uid={}{pid}", peer.uid()))
        }
        Err(_) => (Peer::User(u32::MAX), "unix".to_owned()),
    }
}

/// A path inside a URI.
fn escaped(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let bytes = path.as_os_str().as_bytes().iter();
    bytes.fold(String::new(), |mut text, byte| {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'_' | b'.' | b'~' => text.push(char::from(*byte)),
            _ => text.push_str(&format!("%{byte:02X}")),
        }
        text
    })
}

/// Who started the server holds the other end: often one socket for both directions, else two pipes.
fn stdio() -> Option<Incoming> {
    use std::os::fd::AsFd;
    let input = io::stdin().as_fd().try_clone_to_owned();
    if let Ok(input) = input {
        let socket = std::os::unix::net::UnixStream::from(input);
        if socket.local_addr().is_ok() && socket.set_nonblocking(true).is_ok() {
            return UnixStream::from_std(socket).ok().map(unix);
        }
    }
    Some(Incoming::Pipes(Pipes { input: tokio::io::stdin(), output: tokio::io::stdout() }))
}

/// Stdin and stdout as one stream.
pub(super) struct Pipes {
    input: Stdin,
    output: Stdout,
}

impl Pipes {
    pub(super) fn into_split(self) -> (Stdin, Stdout) {
        (self.input, self.output)
    }
}

impl AsyncRead for Pipes {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.input).poll_read(context, buf)
    }
}

impl AsyncWrite for Pipes {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.output).poll_write(context, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.output).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.output).poll_shutdown(context)
    }
}
