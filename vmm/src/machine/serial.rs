//! The guest's serial port on a Unix socket: one client at a time, as one cable fits into a port.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use vhd_core::Error;
use vhd_service::socket::PrivateListener;

use super::Machine;

/// Bytes that are kept for a client that is slow, or not there yet; older ones are dropped.
const KEPT: usize = 64 << 10;
/// How long the end waits for a client that does not read.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// What the guest says goes here. A cheap clone.
#[derive(Clone, Debug, Default)]
pub struct SerialWriter(Arc<(Mutex<Wire>, Condvar)>);

#[derive(Debug, Default)]
struct Wire {
    kept: VecDeque<u8>,
    client: Option<Arc<UnixStream>>,
    is_over: bool,
}

impl SerialWriter {
    fn lock(&self) -> MutexGuard<'_, Wire> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the client what is kept, until the end.
    fn pass_on(&self) {
        let mut wire = self.lock();
        loop {
            let client = wire.client.clone().filter(|_| !wire.kept.is_empty());
            let Some(client) = client else {
                if wire.is_over {
                    return;
                }
                wire = self.0.1.wait(wire).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let bytes: Vec<u8> = wire.kept.drain(..).collect();
            drop(wire);
            // The guest goes on while the client takes its time.
            let taken = self.tell(&client, &bytes);
            wire = self.lock();
            if taken.is_err() {
                wire.leave(&client);
            }
        }
    }

    fn tell(&self, mut client: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
        client.set_write_timeout(Some(LAST_WORDS))?;
        while !bytes.is_empty() {
            match client.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(len) => bytes = &bytes[len..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && !self.lock().is_over => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Wire {
    fn leave(&mut self, client: &Arc<UnixStream>) {
        if self.client.as_ref().is_some_and(|now| Arc::ptr_eq(now, client)) {
            self.client = None;
        }
    }
}

impl Write for SerialWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut wire = self.lock();
        wire.kept.extend(bytes);
        let excess = wire.kept.len().saturating_sub(KEPT);
        wire.kept.drain(..excess);
        self.0.1.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A socket that is served until this is dropped.
#[derive(Debug)]
pub struct SerialSocket {
    listener: Arc<PrivateListener>,
    writer: SerialWriter,
    threads: Vec<JoinHandle<()>>,
}

impl SerialSocket {
    /// Serves the serial port of a machine, which writes to `writer`, at `path`. A socket that a dead process left there is
    /// replaced. Only the user and root may connect.
    ///
    /// # Errors
    /// `Exists` when someone serves it, or it is no socket; as the host fails.
    pub fn serve(path: &Path, machine: Machine, writer: SerialWriter) -> Result<Self, Error> {
        let failed = |error: io::Error| Error::io(error, "can't be made a serial port").at(path);
        let listener = Arc::new(PrivateListener::bind(path)?);
        let mut socket = Self { listener: Arc::clone(&listener), writer: writer.clone(), threads: Vec::new() };
        let (passing, accepting) = (writer.clone(), writer);
        let thread = || std::thread::Builder::new().name("serial".into());
        socket.threads.push(thread().spawn(move || passing.pass_on()).map_err(failed)?);
        socket.threads.push(thread().spawn(move || accept(&listener, &machine, &accepting)).map_err(failed)?);
        Ok(socket)
    }
}

impl Drop for SerialSocket {
    fn drop(&mut self) {
        let client = {
            let mut wire = self.writer.lock();
            wire.is_over = true;
            self.writer.0.1.notify_all();
            wire.client.clone()
        };
        // The last client hears the end after what was said.
        self.listener.end();
        if let Some(client) = client {
            let _ = client.shutdown(Shutdown::Read);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn accept(listener: &UnixListener, machine: &Machine, writer: &SerialWriter) {
    for client in listener.incoming() {
        let mut wire = writer.lock();
        if wire.is_over {
            return;
        }
        let Ok(client) = client.map(Arc::new) else { continue };
        wire.client = Some(Arc::clone(&client));
        writer.0.1.notify_all();
        drop(wire);
        let mut bytes = [0; 256];
        while let Ok(len @ 1..) = (&*client).read(&mut bytes) {
            machine.input(&bytes[..len]);
        }
        let mut wire = writer.lock();
        // What was said before the end is passed on first.
        if wire.is_over {
            return;
        }
        wire.leave(&client);
    }
}
