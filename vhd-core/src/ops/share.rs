//! Work that several threads share: one finds it, the others do it.

use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;

use crate::error::{Error, ErrorKind, Result};
use crate::storage::AlignedBuffer;

/// Bytes that are moved at once: large enough that neither system calls count nor what a file system does for each write
/// (ext4 keeps large writes in large pieces), small enough to stay in a processor's caches between reading and writing.
pub(super) const CHUNK: usize = 1 << 20;
/// Bytes that one thread moves before it asks for more: whole ordinary blocks, so that only one of them allocates one, and
/// some of them, so that waking each other does not count.
pub(super) const BATCH: u64 = 8 << 20;
/// Pieces that are sent together at most.
pub(super) const MAX_PIECES: usize = 1024;
/// Threads that move data: memory and most disks are busy with two, and small machines have no more processors.
const MOVERS: usize = 2;

/// Calls `find`, which sends batches of pieces, and `work` with each batch, in any order, in other threads. Each of them has
/// a buffer of [`CHUNK`] bytes. After the first failure nothing more is begun, and `find` is told.
pub(super) fn share<P: Send>(
    find: impl FnOnce(&dyn Fn(Vec<P>) -> Result<()>) -> Result<()>,
    work: impl Fn(&mut AlignedBuffer, Vec<P>) -> Result<()> + Sync,
) -> Result<()> {
    let (sender, receiver) = mpsc::sync_channel::<Vec<P>>(MOVERS * 2);
    let (batches, failure) = (Mutex::new(receiver), Mutex::new(None::<Error>));
    let has_failed = || failure.lock().unwrap_or_else(PoisonError::into_inner).is_some();
    let run = || {
        let mut buffer = AlignedBuffer::new(CHUNK);
        loop {
            let batch = batches.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(batch) = batch else { return };
            // What is sent is taken, whatever failed: nobody waits for room that does not come.
            if !has_failed()
                && let Err(error) = work(&mut buffer, batch)
            {
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        }
    };
    let found = thread::scope(|scope| {
        for _ in 0..MOVERS {
            scope.spawn(run);
        }
        let found = find(&|batch| {
            let _ = sender.send(batch);
            if has_failed() { Err(Error::new(ErrorKind::Cancelled, "interrupted")) } else { Ok(()) }
        });
        drop(sender);
        found
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => found,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn send_all(count: u32, send: &dyn Fn(Vec<u32>) -> Result<()>) -> Result<()> {
        (0..count).try_for_each(|n| send(vec![n]))
    }

    #[test]
    fn all_that_is_found_is_done() {
        let sum = AtomicU32::new(0);
        share(
            |send| send_all(1000, send),
            |_, batch| {
                sum.fetch_add(batch.iter().sum(), Ordering::SeqCst);
                Ok(())
            },
        )
        .unwrap();
        assert_eq!(sum.load(Ordering::SeqCst), 499_500);
    }

    #[test]
    fn the_first_failure_ends_it_and_is_told() {
        let done = AtomicU32::new(0);
        let error = share(
            |send| send_all(1_000_000, send),
            |_, batch| {
                done.fetch_add(1, Ordering::SeqCst);
                if batch[0] < 5 { Ok(()) } else { Err(Error::new(ErrorKind::NoSpace, "is full")) }
            },
        );
        assert_eq!(error.unwrap_err().kind(), ErrorKind::NoSpace);
        assert!(done.load(Ordering::SeqCst) < 20, "it went on");
        // A failure to find is told, too.
        let error = share(|_| Err(Error::new(ErrorKind::Corrupt, "lies")), |_, _: Vec<u32>| Ok(()));
        assert_eq!(error.unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
