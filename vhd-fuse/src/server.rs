//! The process that serves a mount, and how others find it: an extended attribute of the mount's root, which only
//! the server can answer. It names the process by number and start time, for numbers are given again.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use vhd_core::{Error, ErrorKind, Result};

/// The attribute. It is not listed, so that nobody copies it.
pub(crate) const ATTRIBUTE: &str = "user.vhd.server";

/// Its value in this process.
pub(crate) fn identity() -> io::Result<String> {
    let pid = std::process::id();
    Ok(format!("{pid} {}", start_time(pid)?))
}

/// A process that serves a mount.
pub(crate) struct Server {
    pub(crate) pid: u32,
    handle: OwnedFd,
}

impl Server {
    /// Asks for the server of a mount. `NotConnected` when it is gone; `None` when it is out of sight.
    pub(crate) fn of(target: &Path) -> io::Result<Option<Self>> {
        let mut value = [0; 64];
        let len = match rustix::fs::getxattr(target, ATTRIBUTE, &mut value[..]) {
            Ok(len) => len,
            Err(error) if error == rustix::io::Errno::NOTCONN => return Err(error.into()),
            // Most likely another user's mount, which the kernel hides from root too.
            Err(_) => return Ok(None),
        };
        let value = String::from_utf8_lossy(&value[..len]);
        Ok(value.split_once(' ').and_then(|(pid, start)| Self::open(pid.parse().ok()?, start)))
    }

    fn open(pid: u32, start: &str) -> Option<Self> {
        let handle = pidfd_open(Pid::from_raw(i32::try_from(pid).ok()?)?, PidfdFlags::empty()).ok()?;
        // Looked at after the handle was taken, so that both are of the same process.
        let same = start_time(pid).is_ok_and(|found| found == start);
        same.then_some(Self { pid, handle })
    }

    /// `Refused` when it is stopped, so that to wait for it would be for ever.
    pub(crate) fn check_runs(&self) -> Result<()> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        if !stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['T', 't'])) {
            return Ok(());
        }
        let pid = self.pid;
        let message = format!("process {pid}, which serves it, is stopped; let it go on with kill -CONT {pid}, then try again");
        Err(Error::new(ErrorKind::Refused, message))
    }

    /// Waits until it has ended; false when it has not within `timeout`.
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> io::Result<bool> {
        wait_readable(&[PollFd::new(&self.handle, PollFlags::IN)], timeout)
    }
}

/// Waits until one of `handles` has something to say; false when none has within `timeout`.
pub(crate) fn wait_readable(handles: &[PollFd<'_>], timeout: Option<Duration>) -> io::Result<bool> {
    let timeout = timeout.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
    loop {
        match poll(&mut handles.to_vec(), timeout.as_ref()) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Field 22 of `/proc/PID/stat`. The name before it may hold anything, but its closing bracket is the last.
fn start_time(pid: u32) -> io::Result<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let start = after_name.split(' ').nth(19);
    start.map(str::to_owned).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has no start time")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_by_its_identity_and_not_by_its_number_alone() {
        let identity = identity().unwrap();
        let (pid, start) = identity.split_once(' ').unwrap();
        let pid = pid.parse().unwrap();
        let server = Server::open(pid, start).unwrap();
        assert!(!server.wait(Some(Duration::from_millis(1))).unwrap());
        assert!(Server::open(pid, "1").is_none());
    }
}
