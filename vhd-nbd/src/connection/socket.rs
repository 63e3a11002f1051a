//! The socket of a client.
//!
//! The runtime hears of what comes by a call of its own, wakes the connection's task, and that reads it. A thread that has
//! nothing else to do needs none of it, and its client, which goes on meanwhile, has asked the next by then. So a client that
//! asks much at a time gets such a thread, and the runtime forgets its socket ([`Socket::wait_in_system`]).

use std::io::{self, IoSlice, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as AnyStream;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use nix::errno::Errno;
use nix::libc::MSG_MORE;
use nix::poll::{PollFd, PollFlags, poll};
use socket2::SockRef;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::UnixStream;

use crate::limits::Live;

/// Milliseconds for which a thread waits for what comes; a client that is silent for longer needs none.
const PATIENCE: u8 = 20;

/// A socket that whoever has something to send writes to, and one task or thread reads from.
#[derive(Debug)]
pub struct Socket {
    /// It never waits.
    fd: OwnedFd,
    _live: Live,
    in_system: AtomicBool,
    had_to_wait: AtomicBool,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Socket {
    /// A socket whose calls do not wait.
    pub fn new(fd: OwnedFd, live: Live) -> Self {
        Self { fd, _live: live, in_system: AtomicBool::new(false), had_to_wait: AtomicBool::new(false) }
    }

    /// Who reads is a thread of its own, or is not any more.
    pub fn wait_in_system(&self, yes: bool) {
        self.in_system.store(yes, Ordering::Relaxed);
    }

    /// Whether the thread slept before something came.
    pub fn had_to_wait(&self) -> bool {
        self.had_to_wait.load(Ordering::Relaxed)
    }

    /// The same socket as the runtime knows it. As far as waiting goes, all sockets are alike.
    fn watched(&self) -> io::Result<UnixStream> {
        UnixStream::from_std(AnyStream::from(self.fd.try_clone()?))
    }

    /// Sends what there is room for. Where there is `more` to come at once, it may wait for that.
    ///
    /// # Errors
    /// `WouldBlock` where there is none; as the client is gone.
    pub fn try_write(&self, slices: &[IoSlice<'_>], more: bool) -> io::Result<usize> {
        let flags = if more { MSG_MORE } else { 0 };
        SockRef::from(self).send_vectored_with_flags(slices, flags)
    }

    /// Bytes that came, where there are some already.
    ///
    /// # Errors
    /// `WouldBlock` where there are none; as the client is gone.
    pub fn try_read(&self, buf: &mut [u8]) -> io::Result<usize> {
        (&*SockRef::from(self)).read(buf)
    }

    /// Waits until there is room.
    ///
    /// # Errors
    /// As the system refuses.
    pub async fn writable(&self) -> io::Result<()> {
        self.watched()?.writable().await
    }

    /// Reads, and waits a moment for what it reads. `None` when nothing came.
    ///
    /// # Errors
    /// As the client is gone.
    pub fn read_or_wait(&self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        self.had_to_wait.store(false, Ordering::Relaxed);
        loop {
            match self.try_read(buf) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.had_to_wait.store(true, Ordering::Relaxed);
                    let mut sockets = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
                    match poll(&mut sockets, PATIENCE) {
                        Ok(0) => return Ok(None),
                        Ok(_) | Err(Errno::EINTR) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                done => return done.map(Some),
            }
        }
    }
}

/// What comes from a socket.
#[derive(Debug)]
pub struct Reader {
    socket: Arc<Socket>,
    /// As the runtime knows it, where that is to wait.
    watched: Option<UnixStream>,
}

impl Reader {
    /// The reading side.
    pub fn new(socket: Arc<Socket>) -> Self {
        Self { socket, watched: None }
    }
}

impl AsyncRead for Reader {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { socket, watched } = &mut *self;
        if socket.in_system.load(Ordering::Relaxed) {
            *watched = None;
            match socket.read_or_wait(buf.initialize_unfilled()) {
                Ok(Some(count)) => {
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(None) => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        let watched = match watched {
            Some(watched) => watched,
            none => none.insert(socket.watched()?),
        };
        Pin::new(watched).poll_read(context, buf)
    }
}
