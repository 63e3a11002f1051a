//! Gets a mount, and the device on which the kernel asks for its files.
//!
//! Not left to fuser: 0.18 unmounts its target once more after it was unmounted, which takes away whatever else is
//! mounted there, and it applies its own idea of who may send requests.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType, recvmsg, socketpair,
};

use crate::SUBTYPE;
use crate::filesystem::MAX_TRANSFER;
use crate::options::MountOptions;
use crate::unmount::one_line;

/// Mounts on `target`, a folder or a regular file, as `source` in the mount table: by itself where the process may, else with the
/// helper for ordinary users.
pub(crate) fn attach(target: &Path, source: &str, options: &MountOptions, read_only: bool) -> io::Result<OwnedFd> {
    // The kernel checks owners and modes. What is not given here is decided by the helper or the kernel.
    let mut words = vec!["default_permissions".to_owned(), format!("max_read={MAX_TRANSFER}")];
    words.extend(options.allow_other.then(|| "allow_other".to_owned()));
    match attach_directly(target, source, &words, options.sync, read_only) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            words.extend(options.sync.then(|| "sync".to_owned()));
            words.push(if read_only { "ro" } else { "rw" }.to_owned());
            attach_with_helper(target, source, words)
        }
        result => result,
    }
}

fn attach_directly(target: &Path, source: &str, words: &[String], sync: bool, read_only: bool) -> io::Result<OwnedFd> {
    let opened = File::options().read(true).write(true).open("/dev/fuse");
    let device = opened.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => io::Error::other("there is no /dev/fuse; load the kernel module fuse"),
        _ => error,
    })?;
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    // What is seen there is of the kind of what it is seen on: a folder, or a regular file.
    let root = if target.is_dir() { "40000" } else { "100000" };
    let numbers = format!("fd={},rootmode={root},user_id={uid},group_id={gid}", device.as_raw_fd());
    let data = format!("{numbers},{}", words.join(","));
    let mut flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    flags.set(MsFlags::MS_RDONLY, read_only);
    flags.set(MsFlags::MS_SYNCHRONOUS, sync);
    let kind = format!("fuse.{SUBTYPE}");
    match mount(Some(source), target, Some(kind.as_str()), flags, Some(data.as_str())) {
        Ok(()) => Ok(device.into()),
        // The one refusal that the helper can do better.
        Err(Errno::EPERM) => Err(io::ErrorKind::PermissionDenied.into()),
        Err(error) => Err(error.into()),
    }
}

/// fusermount3 sends the device through a socket, whose number it is told in its environment.
fn attach_with_helper(target: &Path, source: &str, mut words: Vec<String>) -> io::Result<OwnedFd> {
    // Commas separate words.
    let source = source.replace('\\', r"\\").replace(',', r"\,");
    words.extend([format!("fsname={source}"), format!("subtype={SUBTYPE}")]);
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    let mut helper = Command::new("fusermount3");
    helper.arg("-o").arg(words.join(",")).arg("--").arg(target).env("_FUSE_COMMFD", "0").stdin(Stdio::from(theirs));
    let output = helper.output().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => io::Error::other("only root may mount here without fusermount3; install fuse3"),
        _ => error,
    })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(one_line(&said).to_owned()));
    }
    // It has ended, so what it sent is there.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(&ours, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC)?;
    let device = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut devices) => devices.next(),
        _ => None,
    });
    device.ok_or_else(|| io::Error::other("fusermount3 mounted it, but sent no device"))
}
