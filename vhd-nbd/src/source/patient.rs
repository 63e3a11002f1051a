//! A socket that is waited for so long and no longer, and not at all once the user wants to stop.

use std::io::{self, Read, Write};
use std::net::ToSocketAddrs;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use socket2::{Domain, SockAddr, Socket, Type};

/// How often it is looked whether the user wants to stop, in milliseconds.
const LOOK_EVERY: u8 = 100;
/// How long to wait until it is tried again to connect to a Unix socket where many wait already.
const PAUSE: Duration = Duration::from_millis(50);

/// A connected socket.
#[derive(Clone, Debug)]
pub(super) struct Patient {
    socket: Arc<Socket>,
    pub(super) patience: Duration,
    stop: Arc<AtomicBool>,
}

/// What reads and writes end with once the user wants to stop.
fn stopped() -> io::Error {
    Errno::ECANCELED.into()
}

/// Whether the user wanted to stop.
pub(super) fn is_stopped(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::ECANCELED as i32)
}

fn check(stop: &AtomicBool) -> io::Result<()> {
    if stop.load(Ordering::Relaxed) { Err(stopped()) } else { Ok(()) }
}

/// Time is up.
fn silent(patience: Duration) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", patience.as_secs()))
}

impl Patient {
    /// Connects to `HOST:PORT`.
    pub(super) fn tcp(address: &str, patience: Duration, stop: &Arc<AtomicBool>) -> io::Result<Self> {
        let until = Instant::now() + patience;
        // Who asks for an address can't be told to stop.
        let (tell, told) = mpsc::channel();
        let asked = address.to_owned();
        thread::Builder::new()
            .name("vhd-resolve".into())
            .spawn(move || drop(tell.send(asked.to_socket_addrs().map(Iterator::collect::<Vec<_>>))))?;
        let found = loop {
            check(stop)?;
            match told.recv_timeout(Duration::from_millis(LOOK_EVERY.into())) {
                Ok(found) => break found?,
                Err(_) if Instant::now() < until => {}
                Err(_) => return Err(silent(patience)),
            }
        };
        let mut failed = io::Error::new(io::ErrorKind::NotFound, "its name has no address");
        for address in found {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
            let client = Self {
                socket: Arc::new(socket),
                patience: until.saturating_duration_since(Instant::now()),
                stop: Arc::clone(stop),
            };
            match client.connect(&address.into()) {
                Ok(()) => {
                    client.socket.set_tcp_nodelay(true)?;
                    return Ok(Self { patience, ..client });
                }
                Err(error) if is_stopped(&error) => return Err(error),
                Err(error) if error.kind() == io::ErrorKind::TimedOut => return Err(silent(patience)),
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    /// Connects to a Unix socket.
    pub(super) fn unix(path: &Path, patience: Duration, stop: &Arc<AtomicBool>) -> io::Result<Self> {
        let client = Self { socket: Arc::new(Socket::new(Domain::UNIX, Type::STREAM, None)?), patience, stop: Arc::clone(stop) };
        client.connect(&SockAddr::unix(path)?)?;
        Ok(client)
    }

    fn connect(&self, to: &SockAddr) -> io::Result<()> {
        self.socket.set_nonblocking(true)?;
        let until = Instant::now() + self.patience;
        loop {
            check(&self.stop)?;
            match self.socket.connect(to) {
                Ok(()) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(Errno::EINPROGRESS as i32) => {
                    self.wait(PollFlags::POLLOUT)?;
                    return self.socket.take_error()?.map_or(Ok(()), Err);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => thread::sleep(PAUSE),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(silent(self.patience)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn wait(&self, what: PollFlags) -> io::Result<()> {
        let until = Instant::now() + self.patience;
        loop {
            check(&self.stop)?;
            match poll(&mut [PollFd::new(self.socket.as_fd(), what)], LOOK_EVERY) {
                Ok(0) | Err(Errno::EINTR) if Instant::now() < until => {}
                Ok(0) | Err(Errno::EINTR) => return Err(silent(self.patience)),
                Ok(_) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Does what the socket is not ready for yet when it is.
    fn retry<T>(&self, what: PollFlags, mut call: impl FnMut(&Socket) -> io::Result<T>) -> io::Result<T> {
        loop {
            check(&self.stop)?;
            match call(&self.socket) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(what)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return done,
            }
        }
    }
}

impl Read for Patient {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.retry(PollFlags::POLLIN, |mut socket| socket.read(buf))
    }
}

impl Write for Patient {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.retry(PollFlags::POLLOUT, |mut socket| socket.write(buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
