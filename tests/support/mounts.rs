//! What the tests of mounts share.

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

use super::{done, run, search_path, text, vhd, wait_until};

/// True where mounts can be tested; in CI they must be.
pub fn possible(needed: &[&str]) -> bool {
    let mut missing: Vec<_> = needed.iter().filter(|tool| !is_there(tool)).copied().collect();
    missing.extend((!nix::unistd::geteuid().is_root()).then_some("root"));
    missing.extend(["/dev/fuse", "/dev/loop-control"].into_iter().filter(|path| !Path::new(path).exists()));
    if missing.is_empty() {
        return true;
    }
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI must test mounts: missing {missing:?}");
    eprintln!("SKIPPED: missing {missing:?}, so this test shows NOTHING");
    false
}

fn is_there(tool: &str) -> bool {
    search_path().split(':').any(|folder| Path::new(folder).join(tool).exists())
}

/// Waits until nobody has an image open, for reading or writing: who writes nothing to it needs that.
#[track_caller]
pub fn wait_until_free(folder: &Path, image: &str) {
    wait_until("the image is free", || vhd(folder, &format!("write {image} --offset 0")).status.success());
}

/// A folder for a test, in which `disk` is one to mount on.
pub struct Place {
    // In this order: unmounted, then removed.
    _cleanup: Cleanup,
    folder: TempDir,
}

impl Place {
    /// `None` where mounts can't be tested: see [`possible`].
    pub fn new(needed: &[&str]) -> Option<Self> {
        if !possible(needed) {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("disk")).unwrap();
        Some(Self { _cleanup: Cleanup(["disk", "file", "files"].map(|name| folder.path().join(name)).into()), folder })
    }

    /// With an image of this size, `a.vhd`.
    pub fn with_image(needed: &[&str], size: &str) -> Option<Self> {
        let place = Self::new(needed)?;
        done(place.path(), &format!("create a.vhd --size {size}"));
        Some(place)
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Makes the disk of `a.vhd` an ext4.
    pub fn format(&self) {
        done(self.path(), "mount a.vhd disk");
        run("mkfs.ext4", &["-q", self.path().join("disk/disk.raw").to_str().unwrap()]);
        done(self.path(), "unmount disk");
    }

    /// Writes to a file of the folder, in the middle of it.
    pub fn write(&self, name: &str, offset: u64, data: &[u8]) {
        let file = OpenOptions::new().write(true).open(self.path().join(name)).unwrap();
        file.write_all_at(data, offset).unwrap();
    }

    /// What an image of the folder holds, by another way than the mount.
    pub fn in_image(&self, name: &str, offset: u64, length: usize) -> Vec<u8> {
        vhd(self.path(), &format!("read {name} --offset {offset} --length {length}")).stdout
    }
}

/// Unmounts what a failed test leaves at these places, last first.
pub struct Cleanup(pub Vec<PathBuf>);

impl Drop for Cleanup {
    fn drop(&mut self) {
        for place in self.0.iter().rev() {
            let mut command = Command::new("umount");
            let _ = command.args(["-q", "-l"]).arg(place).stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
    }
}

/// Who an ordinary user is here: nobody.
const ORDINARY: u32 = 65534;

/// An ordinary user with a home, on a machine that lets everyone use FUSE. What is changed of the machine for that is put
/// back at the end. Only one is there at a time, in all tests that run.
pub struct User {
    // In this order: unmounted, then put back, then the next one's turn.
    _cleanup: Cleanup,
    _changed: Changed,
    _turn: File,
    folder: TempDir,
}

/// What `/dev/fuse` and `/etc/fuse.conf` were.
struct Changed {
    mode: u32,
    configured: Option<Vec<u8>>,
}

const DEVICE: &str = "/dev/fuse";
const CONFIGURATION: &str = "/etc/fuse.conf";

/// One test at a time changes the machine's settings, whatever program it is in.
pub fn turn() -> File {
    let turn = File::open(DEVICE).unwrap();
    turn.lock().unwrap();
    turn
}

impl User {
    /// With `disk`, `files` and `run` in the home; `allow_other` says whether `/etc/fuse.conf` lets users allow it.
    pub fn new(allow_other: bool) -> Self {
        let turn = turn();
        let changed = Changed { mode: turn.metadata().unwrap().mode() & 0o7777, configured: fs::read(CONFIGURATION).ok() };
        fs::set_permissions(DEVICE, Permissions::from_mode(0o666)).unwrap();
        fs::write(CONFIGURATION, if allow_other { "user_allow_other\n" } else { "" }).unwrap();
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        fs::copy(env!("CARGO_BIN_EXE_vhd"), folder.path().join("vhd")).unwrap();
        for name in ["home", "home/disk", "home/files", "home/run"] {
            let path = folder.path().join(name);
            fs::create_dir(&path).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o700)).unwrap();
            chown(&path, Some(ORDINARY), Some(ORDINARY)).unwrap();
        }
        let home = folder.path().join("home");
        Self { _cleanup: Cleanup(vec![home.join("disk"), home.join("files")]), _changed: changed, _turn: turn, folder }
    }

    /// The home, which is the user's own and closed to others.
    pub fn home(&self) -> PathBuf {
        self.folder.path().join("home")
    }

    /// Runs a line in the home, as a shell does.
    pub fn tries(&self, line: &str) -> Output {
        let path = format!("{}:{}", self.folder.path().display(), search_path());
        let mut command = Command::new("setpriv");
        let id = ORDINARY.to_string();
        command.args(["--reuid", &id, "--regid", &id, "--clear-groups", "sh", "-ec", line]);
        command.current_dir(self.home()).env("XDG_RUNTIME_DIR", self.home().join("run")).env("PATH", path).output().unwrap()
    }

    /// The same for a line that must do; returns what it printed.
    #[track_caller]
    pub fn does(&self, line: &str) -> String {
        let output = self.tries(line);
        let said = text(&output.stdout) + &text(&output.stderr);
        assert!(output.status.success(), "{line}: {said}");
        said
    }
}

impl Drop for Changed {
    fn drop(&mut self) {
        let _ = fs::set_permissions(DEVICE, Permissions::from_mode(self.mode));
        let _ = match &self.configured {
            Some(before) => fs::write(CONFIGURATION, before),
            None => fs::remove_file(CONFIGURATION),
        };
    }
}
