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

/// The value of the attribute at a mount. `NotConnected` when the server is gone; `None` when it is out of sight.
pub(crate) fn identity_of(target: &Path) -> io::Result<Option<String>> {
    let mut value = [0; 64];
    match rustix::fs::getxattr(target, ATTRIBUTE, &mut value[..]) {
        Ok(len) => Ok(Some(String::from_utf8_lossy(&value[..len]).into_owned())),
        // The second when it dies while it is asked.
        Err(rustix::io::Errno::NOTCONN | rustix::io::Errno::CONNABORTED) => Err(io::ErrorKind::NotConnected.into()),
        // Most likely another user's mount, which the kernel hides from root too.
        Err(_) => Ok(None),
    }
}

/// A process that serves a mount.
#[derive(Debug)]
pub struct Server {
    pid: u32,
    handle: OwnedFd,
}

impl Server {
    /// The process that is meant by what [`unmount`](crate::unmount()) told; `None` when it is gone.
    #[must_use]
    pub fn find(identity: &str) -> Option<Self> {
        let (pid, start) = identity.split_once(' ')?;
        let pid = pid.parse().ok()?;
        let handle = pidfd_open(Pid::from_raw(i32::try_from(pid).ok()?)?, PidfdFlags::empty()).ok()?;
        // Looked at after the handle was taken, so that both are of the same process.
        let same = start_time(pid).is_ok_and(|found| found == start);
        same.then_some(Self { pid, handle })
    }

    /// Its number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// # Errors
    /// `Refused` when it is stopped, so that to wait for it would be for ever.
    pub fn check_runs(&self) -> Result<()> {
        // Where it has ended meanwhile, that was another process of its number.
        if !is_stopped(self.pid) || self.wait(Some(Duration::ZERO)).unwrap_or(true) {
            return Ok(());
        }
        Err(refused(self.pid))
    }

    /// Waits until it has ended; false when it has not within `timeout`.
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> io::Result<bool> {
        wait_readable(&[PollFd::new(&self.handle, PollFlags::IN)], timeout)
    }
}

/// For a mount that does not answer, so that nobody can say who serves it.
///
/// # Errors
/// `Refused` when a process is stopped that has the image open, and FUSE's device.
pub fn check_servers_run(image: &Path) -> Result<()> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let stopped = numbers.find(|pid| is_stopped(*pid) && has_open(*pid, &[image, Path::new("/dev/fuse")]));
    stopped.map_or(Ok(()), |pid| Err(refused(pid)))
}

fn refused(pid: u32) -> Error {
    let message = format!(
        "process {pid}, which serves it, is stopped; let it go on with kill -CONT {pid}, or give up what it has not written with \
         vhd unmount --force"
    );
    Error::new(ErrorKind::Refused, message)
}

fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['T', 't']))
}

fn has_open(pid: u32, files: &[&Path]) -> bool {
    let handles = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let open: Vec<_> = handles.filter_map(|handle| std::fs::read_link(handle.path()).ok()).collect();
    files.iter().all(|file| open.iter().any(|open| open == file))
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
        let server = Server::find(&identity).unwrap();
        assert!(!server.wait(Some(Duration::from_millis(1))).unwrap());
        assert!(Server::find(&format!("{} 1", server.pid())).is_none());
        assert!(Server::find("nobody").is_none());
    }
}
