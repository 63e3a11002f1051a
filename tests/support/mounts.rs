//! What the tests of mounts share.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::search_path;

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

/// Waits, but not for ever.
#[track_caller]
pub fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < Duration::from_secs(20), "waited in vain until {what}");
        sleep(Duration::from_millis(20));
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
