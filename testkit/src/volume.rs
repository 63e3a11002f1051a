//! Small volumes of the host, to be filled up.

use std::path::Path;
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::tools::skip;

/// A tmpfs, which goes when this is dropped.
#[derive(Debug)]
pub struct Volume(TempDir);

impl Volume {
    /// With so much room (`40M`). `None` where this user may mount nothing, which is said.
    ///
    /// # Panics
    /// If the environment says `CI=true` and there can be none.
    #[must_use]
    pub fn new(size: &str) -> Option<Self> {
        let volume = Self(TempDir::new().unwrap());
        if volume.mount(&format!("size={size},mode=777")) {
            return Some(volume);
        }
        skip("no tmpfs can be mounted, which needs root");
        None
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Changes an option: `ro`, `size=80M`.
    ///
    /// # Panics
    /// When that fails.
    pub fn remount(&self, option: &str) {
        assert!(self.mount(&format!("remount,{option}")), "{option}");
    }

    fn mount(&self, options: &str) -> bool {
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", options, "vhd-test"]).arg(self.path()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-q", "-l"]).arg(self.path()).stderr(Stdio::null()).status();
    }
}
