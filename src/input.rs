//! Standard input that can be interrupted.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhd_core::{Error, Progress};

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
        loop {
            let mut stdin = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)];
            let ready = match poll(&mut stdin, PollTimeout::from(LOOK_EVERY_MS)) {
                Err(nix::errno::Errno::EINTR) => false,
                ready => ready? > 0,
            };
            if self.progress.is_cancelled() {
                return Err(io::Error::other("interrupted"));
            }
            if ready {
                return self.file.read(buf);
            }
        }
    }
}
