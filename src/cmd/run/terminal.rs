//! The user's terminal as the guest's: each key goes to it at once.

use std::io::{self, IsTerminal, Read};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use vhd_core::Error;
use vhd_vmm::machine::Machine;

/// Control and `]`, as in telnet and virsh: the user wants to leave.
const ESCAPE: u8 = 0x1D;
const LOOK_EVERY_MS: u8 = 100;

/// Standard input as the guest's serial input. A terminal is as it was when this is dropped.
pub struct Terminal {
    before: Option<Termios>,
    stop: Arc<AtomicBool>,
    wants_to_end: Arc<AtomicBool>,
}

impl Terminal {
    /// Takes standard input.
    pub fn attach(machine: Machine) -> Result<Self, Error> {
        let failed = |errno: nix::Error| Error::io(errno.into(), "the terminal can't be used");
        let stdin = io::stdin();
        let mut before = None;
        if stdin.is_terminal() {
            let now = tcgetattr(stdin.as_fd()).map_err(failed)?;
            let mut raw = now.clone();
            cfmakeraw(&mut raw);
            tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw).map_err(failed)?;
            before = Some(now);
            eprint!("Control-] ends the machine.\r\n");
        }
        let terminal = Self { before, stop: Arc::default(), wants_to_end: Arc::default() };
        let (stop, wants_to_end, is_terminal) =
            (Arc::clone(&terminal.stop), Arc::clone(&terminal.wants_to_end), terminal.before.is_some());
        let reading = move || read(&machine, &stop, is_terminal.then_some(&*wants_to_end));
        let thread = thread::Builder::new().name("terminal".into()).spawn(reading);
        thread.map_err(|error| Error::io(error, "the terminal can't be read"))?;
        Ok(terminal)
    }

    /// Whether the user wants to leave.
    pub fn wants_to_end(&self) -> bool {
        self.wants_to_end.load(Ordering::SeqCst)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(before) = &self.before {
            let _ = tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, before);
        }
    }
}

fn read(machine: &Machine, stop: &AtomicBool, wants_to_end: Option<&AtomicBool>) {
    let mut stdin = io::stdin();
    let mut bytes = [0; 256];
    while !stop.load(Ordering::SeqCst) {
        let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut fds, PollTimeout::from(LOOK_EVERY_MS)), Ok(1..)) {
            continue;
        }
        // The end of the input, not of the machine.
        let Ok(len @ 1..) = stdin.read(&mut bytes) else { return };
        if let Some(wants_to_end) = wants_to_end.filter(|_| bytes[..len].contains(&ESCAPE)) {
            wants_to_end.store(true, Ordering::SeqCst);
            return;
        }
        machine.input(&bytes[..len]);
    }
}
