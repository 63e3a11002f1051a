//! Where the requests of a connection are served: in a task, or in a thread that waits for nothing else.

use std::io;
use std::sync::{Arc, mpsc};
use std::thread;

use tokio::io::AsyncRead;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::socket::Socket;
use super::{Connection, EndOnPanic};

/// A client with this score gets a thread, and keeps it until it has none.
const BUSY: usize = 32;
/// What a wait counts that found the client ahead of its replies, against 1 for one that did not. Who asks one thing at a
/// time is never ahead.
const AHEAD: usize = 4;

/// Why requests are not gone on with where they were served.
pub enum Pause {
    /// The session ends.
    End,
    /// A thread is to go on.
    Thread(OwnedSemaphorePermit),
    /// A task is to go on.
    Task,
}

/// Where a connection is, and whether it should be there.
#[derive(Debug)]
pub struct Place {
    /// Where there is none, no thread can wait for it.
    socket: Option<Arc<Socket>>,
    /// Rights to a thread. There are as many as processors: more would only wait for each other, and tasks for them all.
    threads: Arc<Semaphore>,
    in_thread: bool,
    score: usize,
}

impl Place {
    /// A task.
    pub fn new(socket: Option<Arc<Socket>>, threads: &Arc<Semaphore>) -> Self {
        Self { socket, threads: Arc::clone(threads), in_thread: false, score: 0 }
    }

    /// True in a thread.
    pub fn is_thread(&self) -> bool {
        self.in_thread
    }

    /// Where the next requests are to be waited for, if that is not here. Several came at once last time, or did not.
    pub fn look(&mut self, came_several: bool) -> Option<Pause> {
        let socket = self.socket.as_ref()?;
        let ahead = came_several || self.in_thread && !socket.had_to_wait();
        self.score = if ahead { BUSY.min(self.score + AHEAD) } else { self.score.saturating_sub(1) };
        match (self.in_thread, self.score) {
            (true, 0) => Some(Pause::Task),
            (false, BUSY) => Arc::clone(&self.threads).try_acquire_owned().ok().map(Pause::Thread),
            _ => None,
        }
    }

    fn set_thread(&mut self, yes: bool) {
        self.in_thread = yes;
        if let Some(socket) = &self.socket {
            socket.wait_in_system(yes);
        }
    }
}

impl<R: AsyncRead + Unpin + Send + 'static> Connection<R> {
    /// Serves requests, now here, now there, to the end of the session.
    ///
    /// # Errors
    /// As the stream fails, or when the client is not understood.
    pub(super) async fn run_to_end(mut self) -> io::Result<()> {
        let mut paused = self.run().await;
        let ended = loop {
            match paused {
                Ok(Pause::End) => break Ok(()),
                Ok(Pause::Task) => paused = self.run().await,
                Ok(Pause::Thread(permit)) => (self, paused) = self.run_in_thread(permit).await?,
                Err(error) => break Err(error),
            }
        };
        self.send_batch();
        ended
    }

    /// The thread is none of those that wait for disks: they may all hang, and this client's disk need not.
    async fn run_in_thread(mut self, permit: OwnedSemaphorePermit) -> io::Result<(Self, io::Result<Pause>)> {
        let (guard, client, runtime) = (EndOnPanic(Arc::clone(&self.work)), Arc::clone(&self.client), Handle::current());
        let (give, given) = mpsc::channel::<Self>();
        let (done, back) = oneshot::channel();
        let run = move || {
            let (_guard, _permit) = (guard, permit);
            let Ok(mut connection) = given.recv() else { return };
            connection.place.set_thread(true);
            // Who waits for this thread may have given up on it, and on the client.
            let paused = runtime.block_on(async {
                tokio::select! {
                    paused = connection.run() => paused,
                    () = client.given_up() => Ok(Pause::End),
                }
            });
            connection.place.set_thread(false);
            drop(done.send((connection, paused)));
        };
        if let Err(error) = thread::Builder::new().name("vhd-nbd-client".into()).spawn(run) {
            tracing::debug!("a client gets no thread: {error}");
            self.place.score = 0;
            return Ok((self, Ok(Pause::Task)));
        }
        drop(give.send(self));
        back.await.map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::limits::Live;

    fn place(threads: &Arc<Semaphore>) -> (Place, Arc<Socket>, UnixStream) {
        let (client, socket) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        let socket = Arc::new(Socket::new(socket.into(), Live::default()));
        (Place::new(Some(Arc::clone(&socket)), threads), socket, client)
    }

    fn becomes_busy(place: &mut Place) -> Option<OwnedSemaphorePermit> {
        (0..BUSY).find_map(|_| match place.look(true) {
            Some(Pause::Thread(permit)) => Some(permit),
            _ => None,
        })
    }

    #[test]
    fn who_asks_one_thing_at_a_time_gets_no_thread_and_who_asks_more_does_while_there_are_some() {
        let threads = Arc::new(Semaphore::new(1));
        let (mut one_by_one, ..) = place(&threads);
        assert!((0..10 * BUSY).all(|_| one_by_one.look(false).is_none()));
        let [(mut first, ..), (mut second, ..)] = [place(&threads), place(&threads)];
        let permit = becomes_busy(&mut first).unwrap();
        assert!(becomes_busy(&mut second).is_none());
        drop(permit);
        assert!(becomes_busy(&mut second).is_some());
        assert!(becomes_busy(&mut Place::new(None, &threads)).is_none(), "nobody can wait for it");
    }

    #[test]
    fn a_thread_is_kept_by_who_is_ahead_of_it_and_lost_by_who_has_to_be_waited_for() {
        let (mut place, socket, mut client) = place(&Arc::new(Semaphore::new(1)));
        let _permit = becomes_busy(&mut place).unwrap();
        place.set_thread(true);
        for _ in 0..10 * BUSY {
            client.write_all(b"x").unwrap();
            assert_eq!(socket.read_or_wait(&mut [0; 8]).unwrap(), Some(1));
            assert!(place.look(false).is_none());
        }
        assert_eq!(socket.read_or_wait(&mut [0; 8]).unwrap(), None);
        let lost = (0..BUSY).position(|_| matches!(place.look(false), Some(Pause::Task)));
        assert_eq!(lost, Some(BUSY - 1));
    }
}
