//! Running servers.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::{NamedTempFile, TempDir};
use vhd_testkit::tools::require;

use crate::support::{done, search_path, text, vhd_in};

/// How long a test waits for what should come soon.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A server in its folder; whatever happens, nothing of it is left.
pub struct Server {
    pub folder: PathBuf,
    process: Child,
    pub uri: String,
    /// What it says goes elsewhere: the folder may be full.
    log: NamedTempFile,
}

impl Server {
    /// Serves on the socket `s` in the folder. The arguments are one line, cut at blanks.
    pub fn start(folder: &Path, line: &str) -> Self {
        Self::start_at(folder, &format!("{line} --listen unix:s --control c"))
    }

    /// Serves where the line says, and waits until it does.
    pub fn start_at(folder: &Path, line: &str) -> Self {
        Self::start_logging(folder, line, NamedTempFile::new().unwrap())
    }

    /// As [`Server::start_at`], with its stderr in this file.
    pub fn start_logging(folder: &Path, line: &str, log: NamedTempFile) -> Self {
        let mut command = vhd_in(folder);
        command.arg("serve").args(line.split_whitespace()).stdout(Stdio::piped());
        command.stderr(log.reopen().unwrap());
        let mut process = command.spawn().unwrap();
        let mut uri = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut uri).unwrap();
        let server = Self { folder: folder.to_owned(), process, uri: uri.trim().to_owned(), log };
        assert!(server.uri.starts_with("nbd"), "vhd serve {line}: {}", server.log());
        server
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.join("s")
    }

    /// The URI of an export, for clients in any folder.
    pub fn uri_of(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket().display())
    }

    /// The port, where it listens on TCP.
    pub fn port(&self) -> u16 {
        self.uri.rsplit_once(':').unwrap().1.parse().unwrap()
    }

    /// What it said on stderr so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log.path()).unwrap()
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.process.id().try_into().unwrap())
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Ends it in order; that must succeed.
    #[track_caller]
    pub fn stop(mut self) {
        self.signal(Signal::SIGTERM);
        let status = self.wait();
        assert!(status.success(), "{status}: {}", self.log());
        let log = self.log();
        assert!(!log.contains("panicked"), "{log}");
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the server does not end: {}", self.log());
            sleep(Duration::from_millis(5));
        }
    }

    /// Kills it.
    pub fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Memory in use, and at most so far, in bytes.
    pub fn memory(&self) -> (u64, u64) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
        };
        (field("VmRSS:"), field("VmHWM:"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("server said: {}", self.log());
        }
    }
}

/// A folder with a dynamic disk `disk.vhd`.
pub fn folder_with_disk(size: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    done(folder.path(), &format!("create disk.vhd --size {size}"));
    folder
}

/// True when a program of another project is there; see [`require`].
pub fn has(program: &str) -> bool {
    require(program).is_some()
}

/// Runs a line of the shell in a folder.
pub fn shell(folder: &Path, line: &str) -> Output {
    let mut command = Command::new("bash");
    command.args(["-c", line]).current_dir(folder).stdin(Stdio::null()).env("PATH", search_path());
    command.output().unwrap()
}

/// Runs a line of the shell, which must succeed, and returns what it printed.
#[track_caller]
pub fn sh(folder: &Path, line: &str) -> String {
    let output = shell(folder, line);
    assert!(output.status.success(), "{line}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// All that a stream still gives.
pub fn rest(stream: &mut impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    // A reset is an end, too.
    let _ = stream.read_to_end(&mut bytes);
    bytes
}
