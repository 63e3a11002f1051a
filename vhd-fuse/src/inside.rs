//! Mounting the file system that is in a file: by the kernel through a loop device, else by a FUSE file system that is
//! installed.

use std::fs::{File, TryLockError};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use vhd_core::{Error, ErrorKind, Result};

use crate::options::users_may_allow_other;
use crate::unmount::one_line;
use crate::{DISK_FILE, mountinfo};

/// How long another mount from the same image may take.
const TURN: Duration = Duration::from_secs(60);

/// What mounts a kind of file system for everyone.
struct Helper {
    /// As `blkid` names it.
    kinds: &'static [&'static str],
    program: &'static str,
    /// Debian's package of it.
    package: &'static str,
    /// Words without which it would not write.
    to_write: &'static [&'static str],
    /// It must be told what to call what it mounts; others call it by the file.
    is_named: bool,
}

const HELPERS: &[Helper] = &[
    Helper { kinds: &["ext2", "ext3", "ext4"], program: "fuse2fs", package: "fuse2fs", to_write: &["rw"], is_named: true },
    Helper { kinds: &["ntfs"], program: "ntfs-3g", package: "ntfs-3g", to_write: &["rw"], is_named: false },
    Helper { kinds: &["vfat"], program: "fusefat", package: "fusefat", to_write: &["rw+"], is_named: true },
];

/// The mounts of file systems that are in files of this folder, with those files.
pub(crate) fn mounted_from(folder: &Path) -> std::io::Result<Vec<(PathBuf, PathBuf)>> {
    let mounts = mountinfo::all()?.into_iter();
    Ok(mounts
        .filter_map(|entry| Some((entry.target, file_of(&entry.source).filter(|file| file.parent() == Some(folder))?)))
        .collect())
}

/// Mounts what is in a file of a mount of ours on the folder `at`, and says what did it: `ext4 (kernel, /dev/loop0)`. Two file
/// systems over the same bytes would destroy each other, so there is one at a time that looks and then mounts.
pub(crate) fn mount(folder: &Path, name: &str, at: &Path, options: &[String], read_only: bool) -> Result<String> {
    let _turn = turn(folder)?;
    let mounted = mounted_from(folder).map_err(|error| Error::io(error, "can't see what is mounted").at(at))?;
    let overlaps = |file: &Path| file.file_name().is_none_or(|other| other == name || other == DISK_FILE || name == DISK_FILE);
    if let Some((other, file)) = mounted.iter().find(|(_, file)| overlaps(file)) {
        let part = file.file_name().unwrap_or_default().display();
        let message =
            format!("{part} of its image is mounted on {} already; mount --bind shows it in two places", other.display());
        return Err(Error::new(ErrorKind::Refused, message).at(at));
    }
    mount_file(&folder.join(name), at, options, read_only)
}

/// The right to mount what is in the files of a folder, until it is dropped.
fn turn(folder: &Path) -> Result<File> {
    let failed = |error| Error::io(error, "can't be locked to mount from it").at(folder);
    let file = File::open(folder).map_err(failed)?;
    let began = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if began.elapsed() < TURN => std::thread::sleep(Duration::from_millis(20)),
            Err(error) => return Err(failed(error.into())),
        }
    }
}

fn mount_file(file: &Path, at: &Path, options: &[String], read_only: bool) -> Result<String> {
    let kind = kind_of(file)?;
    let by_kernel = match nix::unistd::geteuid().is_root() {
        true => by_kernel(file, at, &kind, options, read_only),
        false => Err("only root may use loop devices".to_owned()),
    };
    let reason = match by_kernel {
        Ok(device) => return Ok(format!("{kind} (kernel, {device})")),
        Err(reason) => reason,
    };
    let Some(helper) = HELPERS.iter().find(|helper| helper.kinds.contains(&kind.as_str())) else {
        let message =
            format!("its {kind} file system can't be mounted by the kernel ({reason}), and no FUSE file system is known for it");
        return Err(Error::new(ErrorKind::Unsupported, message).at(file));
    };
    let access: &[&str] = if read_only { &["ro"] } else { helper.to_write };
    // What the mount is told to be of is how its file is found again.
    let words = access.iter().map(|word| (*word).to_owned()).chain(options.iter().cloned());
    let words: Vec<_> = words.chain(helper.is_named.then(|| format!("fsname={}", file.display()))).collect();
    let mut command = Command::new(helper.program);
    command.arg("-o").arg(words.join(",")).arg(file).arg(at);
    match run(&mut command) {
        Ok(_) => Ok(format!("{kind} ({})", helper.program)),
        Err(error) => {
            let (program, package) = (helper.program, helper.package);
            let is_shut_out = error.ends_with("Permission denied") && !users_may_allow_other();
            let hint = if is_shut_out { "; where that is set-uid, it needs user_allow_other in /etc/fuse.conf" } else { "" };
            let message = format!(
                "its {kind} file system can't be mounted, neither by the kernel ({reason}) nor by {program} of package {package} ({error}){hint}"
            );
            Err(Error::new(ErrorKind::Unsupported, message).at(file))
        }
    }
}

/// The kind of file system, as `blkid` of util-linux names it.
fn kind_of(file: &Path) -> Result<String> {
    let found_none = |why: &str| {
        let place = match file.file_name() {
            Some(name) if name != DISK_FILE => format!("in its partition {}", name.display()),
            _ => "on the disk as a whole".to_owned(),
        };
        let message = format!("no file system is found {place} ({why}); without --fs, vhd mount shows its bytes");
        Error::new(ErrorKind::Unsupported, message).at(file)
    };
    let mut command = Command::new("blkid");
    command.args(["-p", "-o", "value", "-s", "TYPE"]).arg(file);
    let output = output(&mut command).map_err(|why| found_none(&why))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let kind = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    // Where it finds nothing it fails without a word.
    match (output.status.success(), said.trim().is_empty()) {
        (true, _) if !kind.is_empty() => Ok(kind),
        (true, _) | (false, true) => Err(found_none("blkid knows none")),
        (false, false) => Err(found_none(one_line(&said))),
    }
}

/// Through a loop device, which goes by itself with the mount.
fn by_kernel(file: &Path, at: &Path, kind: &str, options: &[String], read_only: bool) -> std::result::Result<String, String> {
    let loops = |direct: bool| {
        let mut command = Command::new("losetup");
        command.args(["--find", "--show"]).args(read_only.then_some("--read-only"));
        // What the file system keeps in memory need not be there twice.
        command.args(direct.then_some("--direct-io=on")).arg(file);
        run(&mut command)
    };
    let device = loops(true).or_else(|_| loops(false))?;
    let access = if read_only { "ro" } else { "rw" };
    // A guest made it: what it says of rights and devices does not count on the host unless asked for.
    let words: Vec<_> = [access, "nosuid", "nodev"].into_iter().chain(options.iter().map(String::as_str)).collect();
    let mut command = Command::new("mount");
    command.args(["-n", "-i", "-t", kind, "-o", &words.join(",")]).arg(&device).arg(at);
    let mounted = run(&mut command);
    // It stays while it is in use.
    let released = run(Command::new("losetup").arg("--detach").arg(&device));
    if let Err(error) = released {
        tracing::warn!("{device}: {error}");
    }
    mounted.map(|_| device)
}

/// What a program printed; or why it failed, in one line.
fn run(command: &mut Command) -> std::result::Result<String, String> {
    let output = output(command)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    Err(one_line(&String::from_utf8_lossy(&output.stderr)).to_owned())
}

/// What came of a program, where it can be started.
fn output(command: &mut Command) -> std::result::Result<Output, String> {
    // mount(8) gives its helpers no path at all, and losetup and the like are not on every user's.
    const SYSTEM: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
    let path = match std::env::var("PATH") {
        // Nothing before a colon would be the current folder.
        Ok(path) if !path.is_empty() => format!("{path}:{SYSTEM}"),
        _ => SYSTEM.to_owned(),
    };
    let output = command.env("PATH", path).env("LC_ALL", "C").output();
    output.map_err(|error| format!("{}: {error}", command.get_program().to_string_lossy()))
}

/// The file that a mounted file system is in, by what is told to be mounted: itself, or a loop device over it.
pub(crate) fn file_of(source: &Path) -> Option<PathBuf> {
    let Some(device) = source.to_str().and_then(|source| source.strip_prefix("/dev/loop")) else {
        return source.is_absolute().then(|| source.to_owned());
    };
    let named = std::fs::read(format!("/sys/block/loop{device}/loop/backing_file")).ok()?;
    let named = named.strip_suffix(b"\n").unwrap_or(&named);
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(named)))
}
