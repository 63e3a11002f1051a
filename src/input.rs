//! Standard input and output that can be interrupted.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhd_core::{Error, Progress};

use crate::output::output_error;

/// How long a read waits before it looks whether the user stopped the operation.
const LOOK_EVERY_MS: u8 = 200;

/// Standard input; a read ends with an error soon after the operation was cancelled, even if nothing comes.
pub struct Input<'a> {
    file: File,
    progress: &'a Progress,
}

impl<'a> Input<'a> {
    /// Takes standard input.
    pub fn new(progress: &'a Progress) -> Result<Self, Error> {
        let file = io::stdin().as_fd().try_clone_to_owned().map_err(|error| Error::io(error, "input can't be read"))?;
        Ok(Self { file: file.into(), progress })
    }
}

impl Read for Input<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        wait(&self.file, PollFlags::POLLIN, self.progress)?;
        self.file.read(buf)
    }
}

/// Standard output; a write ends with an error soon after the operation was cancelled, even if nobody takes it.
pub struct Output<'a> {
    file: File,
    progress: &'a Progress,
}

impl<'a> Output<'a> {
    /// Takes standard output.
    pub fn new(progress: &'a Progress) -> Result<Self, Error> {
        // A pipe that was opened once more does not wait, and still does for others who have it. What can't be opened again, such as
        // a socket, is written as it is.
        let again =
            OpenOptions::new().write(true).custom_flags(nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY).open("/proc/self/fd/1");
        let is_pipe =
            |file: &File| nix::sys::stat::fstat(file).is_ok_and(|found| found.st_mode & nix::libc::S_IFMT == nix::libc::S_IFIFO);
        let file = again.ok().filter(is_pipe);
        let plain = || io::stdout().as_fd().try_clone_to_owned().map(File::from).map_err(output_error);
        Ok(Self { file: file.map_or_else(plain, Ok)?, progress })
    }
}

impl Write for Output<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        loop {
            wait(&self.file, PollFlags::POLLOUT, self.progress)?;
            match self.file.write(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits until a file is ready, or the operation was cancelled.
fn wait(file: &File, what: PollFlags, progress: &Progress) -> io::Result<()> {
    loop {
        let ready = match poll(&mut [PollFd::new(file.as_fd(), what)], PollTimeout::from(LOOK_EVERY_MS)) {
            Err(nix::errno::Errno::EINTR) => false,
            ready => ready? > 0,
        };
        if progress.is_cancelled() {
            return Err(io::Error::other("interrupted"));
        }
        if ready {
            return Ok(());
        }
    }
}
