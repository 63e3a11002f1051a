//! Lines that wait to be written.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow};
use tracing::Level;

use super::limits::{Kind, Limits};
use super::line_of;

/// Bytes that wait at most: what comes when there are so many is lost.
const MAX_BYTES: usize = 256 << 10;
/// How long the end waits for a reader that takes nothing.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long the end waits at all.
const LONGEST: Duration = Duration::from_secs(5);

/// Lines, in order, and the thread that writes them. A cheap clone.
#[derive(Clone, Debug)]
pub(super) struct Queue(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Lines that had no room.
    lost: u64,
    /// Lines that were written, and whether one is being written.
    written: u64,
    is_writing: bool,
    limits: Limits,
}

impl State {
    fn push(&mut self, line: Vec<u8>) {
        if self.bytes + line.len() > MAX_BYTES {
            self.lost += 1;
            return;
        }
        self.bytes += line.len();
        self.lines.push_back(line);
    }

    fn end_periods(&mut self, all: bool) {
        for line in self.limits.end_periods(all, Instant::now()) {
            self.push(line);
        }
    }

    fn take(&mut self) -> Option<Vec<u8>> {
        let line = self.lines.pop_front();
        self.bytes -= line.as_ref().map_or(0, Vec::len);
        // Told when nothing waits any more: until then more may be lost.
        line.or_else(|| match std::mem::take(&mut self.lost) {
            0 => None,
            lost => Some(line_of(Level::WARN, &format!("{lost} lines were lost: what reads the log did not take them"))),
        })
    }
}

impl Queue {
    /// An empty one.
    pub(super) fn new(limits: Limits) -> Self {
        let state = State { lines: VecDeque::new(), bytes: 0, lost: 0, written: 0, is_writing: false, limits };
        Self(Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() }))
    }

    /// Writes what comes, from a thread that no signal is for.
    ///
    /// # Errors
    /// When there can be no thread.
    pub(super) fn start(&self, to: impl AsFd + Send + 'static) -> io::Result<()> {
        let queue = self.clone();
        let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
        let started = thread::Builder::new().name("vhd-log".into()).spawn(move || queue.run(&to));
        mask.thread_set_mask()?;
        started.map(drop)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A line to be written, where there is room.
    pub(super) fn push(&self, line: Vec<u8>) {
        self.lock().push(line);
        self.0.changed.notify_all();
    }

    /// A line to be written, where there is room and there were not too many.
    pub(super) fn log(&self, kind: &Kind, line: &[u8]) {
        let mut state = self.lock();
        if state.limits.admit(kind, line, Instant::now()) {
            state.push(line.to_vec());
            drop(state);
            self.0.changed.notify_all();
        }
    }

    fn run(&self, to: &impl AsFd) {
        let mut state = self.lock();
        loop {
            state.end_periods(false);
            if let Some(line) = state.take() {
                state.is_writing = true;
                drop(state);
                // A log that can't be written, as on a full volume, is no reason to fail.
                let _ = write(to, &line);
                state = self.lock();
                (state.is_writing, state.written) = (false, state.written + 1);
                self.0.changed.notify_all();
                continue;
            }
            let changed = &self.0.changed;
            state = match state.limits.next_end(Instant::now()) {
                Some(time) => changed.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0,
                None => changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Waits until all is written, for as long as someone takes it.
    pub(super) fn flush(&self) {
        let began = Instant::now();
        let mut state = self.lock();
        state.end_periods(true);
        self.0.changed.notify_all();
        let waits = |state: &State| state.is_writing || !state.lines.is_empty() || state.lost > 0;
        while waits(&state) && began.elapsed() < LONGEST {
            let before = state.written;
            let same = |state: &mut State| state.written == before && waits(state);
            let (now, time) = self.0.changed.wait_timeout_while(state, PATIENCE, same).unwrap_or_else(PoisonError::into_inner);
            state = now;
            if time.timed_out() {
                return;
            }
        }
    }
}

/// Writes a line, however long that takes. Not with the lock of the standard library's stderr: others might wait for it.
fn write(to: &impl AsFd, mut line: &[u8]) -> nix::Result<()> {
    while !line.is_empty() {
        match nix::unistd::write(to, line) {
            Ok(count) => line = &line[count..],
            Err(Errno::EINTR) => {}
            // Someone else who has it said that it must not wait.
            Err(Errno::EAGAIN) => drop(poll(&mut [PollFd::new(to.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE)?),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn numbered(n: usize) -> Vec<u8> {
        format!("{n:0999}\n").into_bytes()
    }

    #[test]
    fn who_reads_nothing_holds_up_neither_those_who_log_nor_the_end() {
        let (mut reader, writer) = io::pipe().unwrap();
        let queue = Queue::new(Limits::default());
        queue.start(writer).unwrap();
        let began = Instant::now();
        (0..1000).for_each(|n| queue.push(numbered(n)));
        assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
        queue.flush();
        assert!((PATIENCE..LONGEST).contains(&began.elapsed()), "{:?}", began.elapsed());
        assert!(queue.lock().bytes <= MAX_BYTES);
        // Who begins to read then has all that was kept, in order, and is told of the rest.
        let mut text = String::new();
        while !text.contains("lines were lost") {
            let mut part = [0; 4096];
            let count = reader.read(&mut part).unwrap();
            text.push_str(std::str::from_utf8(&part[..count]).unwrap());
        }
        let kept = text.lines().take_while(|line| line.len() == 999).count();
        assert!((256..400).contains(&kept), "{kept}");
        let numbers: Vec<usize> = text.lines().take(kept).map(|line| line.parse().unwrap()).collect();
        assert!(numbers.is_sorted_by(|one, next| one < next) && numbers[..256] == (0..256).collect::<Vec<_>>());
        assert!(text.contains(&format!(" WARN {} lines were lost", 1000 - kept)), "{}", &text[kept * 1000..]);
    }

    #[test]
    fn the_end_waits_for_the_last_line() {
        let (mut reader, writer) = io::pipe().unwrap();
        let queue = Queue::new(Limits::default());
        queue.start(writer).unwrap();
        (0..200).for_each(|n| queue.push(numbered(n)));
        let slow = thread::spawn(move || {
            let mut text = vec![0; 200_000];
            for part in text.chunks_mut(10_000) {
                thread::sleep(Duration::from_millis(20));
                reader.read_exact(part).unwrap();
            }
            text
        });
        queue.flush();
        assert!(queue.lock().lines.is_empty() && !queue.lock().is_writing);
        assert!(slow.join().unwrap().ends_with(&numbered(199)));
    }
}
