//! Signals that end a mount.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use vhd_core::{Error, Result};

/// SIGTERM, SIGINT and SIGHUP as something to wait for, instead of the end of the process.
pub struct StopSignals {
    signals: SignalFd,
}

impl StopSignals {
    /// Blocks the signals in this thread and all that it starts from now on: call it before there are others, or the
    /// others are ended by them.
    ///
    /// # Errors
    /// `Io`.
    pub fn block() -> Result<Self> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            set.add(signal);
        }
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = set.thread_block().and_then(|()| SignalFd::with_flags(&set, flags));
        Ok(Self { signals: signals.map_err(|error| Error::io(error.into(), "can't wait for signals"))? })
    }

    /// Lets SIGTERM and SIGINT end the process there and then, until what is returned is dropped: for work that may wait for ever, on a
    /// file system that hangs, and is safe to be killed at. Those that came before are forgotten.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn lethal(&self) -> Result<Lethal> {
        while self.take().is_some() {}
        let over = Arc::<AtomicBool>::default();
        let until = Arc::clone(&over);
        // A signal to the process goes to a thread that has not blocked it: to this one alone.
        let wait = move || {
            let mut set = SigSet::empty();
            set.add(Signal::SIGTERM);
            set.add(Signal::SIGINT);
            let _ = set.thread_unblock();
            while !until.load(Ordering::SeqCst) {
                thread::park();
            }
        };
        let thread = thread::Builder::new().name("vhd-signals".to_owned()).spawn(wait);
        let thread = thread.map_err(|error| Error::io(error, "can't wait for signals"))?;
        Ok(Lethal { over, thread: Some(thread) })
    }

    /// Takes a signal that came, if one did.
    pub(crate) fn take(&self) -> Option<Signal> {
        let signal = self.signals.read_signal().ok().flatten()?;
        i32::try_from(signal.ssi_signo).ok().and_then(|number| Signal::try_from(number).ok())
    }
}

/// While it is there, signals end the process.
pub struct Lethal {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Lethal {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

impl AsFd for StopSignals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// The signals that the threads of this name have blocked, as bits.
    fn blocked(name: &str) -> Vec<u64> {
        let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
        let named = tasks.filter(|task| fs::read_to_string(task.path().join("comm")).is_ok_and(|found| found.trim() == name));
        let status = named.map(|task| fs::read_to_string(task.path().join("status")).unwrap_or_default());
        status
            .filter_map(|status| {
                u64::from_str_radix(status.lines().find_map(|line| line.strip_prefix("SigBlk:"))?.trim(), 16).ok()
            })
            .collect()
    }

    /// A signal to a process ends it by a thread that has not blocked it.
    #[test]
    fn signals_end_the_process_by_one_thread_and_only_for_a_while() {
        let bit = |signal: Signal| 1_u64 << (signal as u32 - 1);
        let stop = StopSignals::block().unwrap();
        let lethal = stop.lethal().unwrap();
        let mut found = Vec::new();
        // It begins with what the others have.
        for _ in 0..1000 {
            found = blocked("vhd-signals");
            if found.iter().all(|set| set & bit(Signal::SIGTERM) == 0) && !found.is_empty() {
                break;
            }
            thread::sleep(std::time::Duration::from_millis(5));
        }
        assert_eq!(found.len(), 1);
        assert_eq!(found[0] & (bit(Signal::SIGTERM) | bit(Signal::SIGINT)), 0, "{found:x?}");
        assert_ne!(found[0] & bit(Signal::SIGHUP), 0, "a hang-up is waited for");
        drop(lethal);
        assert!(blocked("vhd-signals").is_empty(), "its thread is still there");
    }
}
