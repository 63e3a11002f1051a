//! Real tools that judge what we write.
//!
//! A missing tool is a loud skip on a developer's machine and a failure where
//! the environment says `CI=true`.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// How long a mount may take to appear or to go.
const MOUNT_PATIENCE: Duration = Duration::from_secs(60);

/// A tool found on PATH.
#[derive(Clone, Debug)]
pub struct Tool {
    name: String,
    path: PathBuf,
}

/// Finds a tool on PATH and logs its version, once per process.
///
/// `None` if it is missing, after saying so past the test harness, which hides
/// the output of tests that pass.
///
/// # Panics
/// If it is missing and the environment says `CI=true`.
#[must_use]
pub fn require(name: &str) -> Option<Tool> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file());
    let Some(path) = found else {
        let package = package_of(name);
        skip(&format!("needs {name} (package {package})"));
        return None;
    };
    let tool = Tool { name: name.to_owned(), path };
    tool.log_version();
    Some(tool)
}

fn package_of(name: &str) -> &str {
    match name {
        "qemu-img" | "qemu-io" => "qemu-utils",
        "vhdimount" | "vhdiinfo" => "libvhdi-utils",
        "fusermount3" => "fuse3",
        "nbdinfo" | "nbdcopy" | "nbdfuse" => "libnbd-bin",
        "qemu-system-x86_64" => "qemu-system-x86",
        "mkfs.ext4" | "mke2fs" | "debugfs" | "dumpe2fs" | "e2fsck" => "e2fsprogs",
        "mkfs.fat" | "fsck.fat" => "dosfstools",
        "mkfs.ntfs" | "ntfsinfo" | "ntfscp" | "ntfsfix" | "ntfs-3g" => "ntfs-3g",
        "losetup" => "mount",
        "mkswap" | "blkid" | "mkfs.minix" | "mkfs.bfs" | "mkfs.cramfs" => "util-linux",
        "cryptsetup" => "cryptsetup-bin",
        "make-bcache" => "bcache-tools",
        "pvcreate" => "lvm2",
        "drbdmeta" => "drbd-utils",
        "mkfs.btrfs" => "btrfs-progs",
        "mkfs.xfs" => "xfsprogs",
        "mkfs.f2fs" => "f2fs-tools",
        "mkfs.nilfs2" => "nilfs-tools",
        "mkfs.jfs" => "jfsutils",
        "mkfs.reiserfs" => "reiserfsprogs",
        "hformat" => "hfsutils",
        "mkfs.exfat" => "exfatprogs",
        "mkfs.udf" => "udftools",
        "mkfs.ocfs2" => "ocfs2-tools",
        "mkfs.erofs" => "erofs-utils",
        "mksquashfs" => "squashfs-tools",
        "zpool" => "zfs-fuse",
        "sgdisk" => "gdisk",
        "sfdisk" => "fdisk",
        other => other,
    }
}

/// Says past the test harness, which hides the output of tests that pass, that something was not tested.
///
/// # Panics
/// If the environment says `CI=true`: there everything is tested.
pub fn skip(why: &str) {
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI must test this: {why}");
    say(&format!("SKIPPED: {why}"));
}

// Past libtest's capture, which takes eprintln! but not this.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

impl Tool {
    /// Runs it and returns what it wrote to its standard output.
    ///
    /// # Errors
    /// The arguments, status and standard error if it failed.
    pub fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<String, String> {
        let mut command = Command::new(&self.path);
        command.args(args).stdin(Stdio::null());
        let output = command.output().map_err(|e| format!("{}: {e}", self.name))?;
        if !output.status.success() {
            return Err(format!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr)));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    // Only for tools of the families above; others have ways of their own.
    fn log_version(&self) {
        static LOGGED: Mutex<Vec<String>> = Mutex::new(Vec::new());
        let mut logged = LOGGED.lock().unwrap();
        if logged.contains(&self.name) {
            return;
        }
        logged.push(self.name.clone());
        let flag = if self.name.starts_with("vhdi") { "-V" } else { "--version" };
        let answer = self.run(&[flag]).unwrap_or_else(|e| e);
        say(&format!("tool: {} {}", self.path.display(), answer.lines().next().unwrap_or_default()));
    }
}

/// qemu-img, the judge of disks without a parent. It ignores sector bitmaps,
/// and reads a differencing disk as if its parent were zeros.
#[derive(Clone, Debug)]
pub struct QemuImg(Tool);

impl QemuImg {
    /// Finds it; see [`require`].
    #[must_use]
    pub fn find() -> Option<Self> {
        require("qemu-img").map(Self)
    }

    /// Runs it with any arguments; see [`Tool::run`].
    ///
    /// # Errors
    /// As for [`Tool::run`].
    pub fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<String, String> {
        self.0.run(args)
    }

    /// The whole disk as QEMU sees it, its size being the current size
    /// whatever the creator.
    ///
    /// # Errors
    /// What qemu-img said.
    pub fn to_raw(&self, image: &Path) -> Result<Vec<u8>, String> {
        let folder = TempDir::new().map_err(|e| e.to_string())?;
        let raw = folder.path().join("raw");
        self.convert_to_raw(image, &raw)?;
        fs::read(&raw).map_err(|e| e.to_string())
    }

    /// Like [`to_raw`](Self::to_raw), into a file (sparse where zero).
    ///
    /// # Errors
    /// What qemu-img said.
    pub fn convert_to_raw(&self, image: &Path, raw: &Path) -> Result<(), String> {
        let options = vpc_options(image);
        let args = ["convert", "--image-opts"].map(OsString::from);
        let rest = [options, "-O".into(), "raw".into(), raw.into()];
        self.run(&[&args[..], &rest[..]].concat()).map(drop)
    }
}

/// qemu-io, which reads and writes ranges through QEMU's driver.
#[derive(Clone, Debug)]
pub struct QemuIo(Tool);

impl QemuIo {
    /// Finds it; see [`require`].
    #[must_use]
    pub fn find() -> Option<Self> {
        require("qemu-io").map(Self)
    }

    /// Runs commands such as `write -P 0xaa 1M 512` on an image, its size
    /// being the current size, and returns what they printed.
    ///
    /// # Errors
    /// What qemu-io said. A pattern that doesn't match is such an error.
    pub fn run(&self, image: &Path, commands: &[&str]) -> Result<String, String> {
        let mut args = vec!["--image-opts".into(), vpc_options(image)];
        for command in commands {
            args.extend(["-c".into(), (*command).into()]);
        }
        let said = self.0.run(&args)?;
        if said.contains("failed") {
            return Err(said);
        }
        Ok(said)
    }
}

/// QEMU's `--image-opts` for a VHD file sized by its current size. A fixed VHD
/// must be named as `vpc` this way, or it is taken for a raw disk.
#[must_use]
pub fn vpc_options(image: &Path) -> OsString {
    let mut options = OsString::from("driver=vpc,force_size_calc=current_size,file.driver=file,file.filename=");
    // A comma within a value is written twice.
    for (at, part) in image.as_os_str().as_bytes().split(|b| *b == b',').enumerate() {
        if at > 0 {
            options.push(",,");
        }
        options.push(OsStr::from_bytes(part));
    }
    options
}

/// vhdimount (libvhdi), the judge of chains: it honours sector bitmaps and
/// finds a parent by the base name of the header's parent name, in the leaf's
/// folder, whatever the locators say.
///
/// Measured with 20210425, to be kept in mind:
/// - Once a bit is set in a byte of a sector bitmap, the later sectors of that
///   byte count as present too. It judges chains whose mixed bytes have their
///   set bits last, or data that is written in aligned runs of 4 KiB.
/// - Past a smaller parent's end it gives an I/O error or the base's content.
/// - It needs a trailing footer of 512 bytes and checks no checksum.
#[derive(Clone, Debug)]
pub struct VhdiMount {
    tool: Tool,
    unmount: Tool,
}

impl VhdiMount {
    /// Finds it, and what unmounts it; see [`require`].
    #[must_use]
    pub fn find() -> Option<Self> {
        Some(Self { tool: require("vhdimount")?, unmount: require("fusermount3")? })
    }

    /// Mounts a leaf and its parents.
    ///
    /// # Errors
    /// What vhdimount said.
    pub fn mount(&self, leaf: &Path) -> Result<Mounted, String> {
        let folder = TempDir::new().map_err(|e| e.to_string())?;
        let point = folder.path().join("mount");
        fs::create_dir(&point).map_err(|e| e.to_string())?;
        // It becomes a daemon that keeps its output open, so that waiting for
        // the end of a pipe would be waiting for the unmount.
        let log_path = folder.path().join("log");
        let log = fs::File::create(&log_path).map_err(|e| e.to_string())?;
        let errors = log.try_clone().map_err(|e| e.to_string())?;
        let status = Command::new(&self.tool.path)
            .arg(leaf)
            .arg(&point)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .status()
            .map_err(|e| e.to_string())?;
        let mounted = Mounted { unmount: self.unmount.clone(), point, _folder: folder };
        if !status.success() || !wait_for(|| mounted.is_mounted()) {
            let said = fs::read_to_string(&log_path).unwrap_or_default();
            return Err(format!("vhdimount {}: {status}: {said}", leaf.display()));
        }
        Ok(mounted)
    }

    /// The whole disk as libvhdi sees it through the leaf.
    ///
    /// # Errors
    /// What vhdimount said, or the error of reading.
    pub fn to_raw(&self, leaf: &Path) -> Result<Vec<u8>, String> {
        let mounted = self.mount(leaf)?;
        fs::read(mounted.leaf()?).map_err(|e| format!("reading through vhdimount: {e}"))
    }
}

/// A chain that vhdimount serves; unmounted when dropped.
#[derive(Debug)]
pub struct Mounted {
    unmount: Tool,
    point: PathBuf,
    _folder: TempDir,
}

impl Mounted {
    /// The views of the chain, base first, leaf last.
    ///
    /// # Errors
    /// When the folder can't be read.
    pub fn views(&self) -> Result<Vec<PathBuf>, String> {
        let count = fs::read_dir(&self.point).map_err(|e| e.to_string())?.count();
        Ok((1..=count).map(|n| self.point.join(format!("vhdi{n}"))).collect())
    }

    /// The raw disk as seen through the leaf.
    ///
    /// # Errors
    /// When there is none.
    pub fn leaf(&self) -> Result<PathBuf, String> {
        let last = self.views()?.pop();
        last.ok_or_else(|| "vhdimount serves nothing".to_owned())
    }

    fn is_mounted(&self) -> bool {
        let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let point = self.point.to_string_lossy();
        table.lines().any(|line| line.split(' ').nth(1) == Some(&point))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A file just closed may be busy for a moment more.
        let gone = wait_for(|| {
            if self.is_mounted() {
                let _ = self.unmount.run(&[OsStr::new("-u"), self.point.as_os_str()]);
            }
            !self.is_mounted()
        });
        if !gone {
            say(&format!("still mounted: {}", self.point.display()));
        }
    }
}

fn wait_for(done: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    while !done() {
        if start.elapsed() > MOUNT_PATIENCE {
            return false;
        }
        sleep(Duration::from_millis(20));
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_in_a_path_are_doubled() {
        let options = vpc_options(Path::new("/a,b/c"));
        assert!(options.to_str().unwrap().ends_with("file.filename=/a,,b/c"));
    }

    #[test]
    fn a_failed_tool_says_why() {
        if let Some(qemu) = QemuImg::find() {
            let said = qemu.to_raw(Path::new("/no/such,image")).unwrap_err();
            assert!(said.contains("No such file"), "{said}");
        }
    }
}
