//! Signals that end a mount.

use std::os::fd::{AsFd, BorrowedFd};

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

    /// Takes a signal that came, if one did.
    pub(crate) fn take(&self) -> Option<Signal> {
        let signal = self.signals.read_signal().ok().flatten()?;
        i32::try_from(signal.ssi_signo).ok().and_then(|number| Signal::try_from(number).ok())
    }
}

impl AsFd for StopSignals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }
}
