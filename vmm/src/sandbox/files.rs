//! The files that a machine needs.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError,
    RulesetStatus, Scope,
};
use vhd_core::Error;
use vhd_core::storage::folder_of;

/// What the rules are written for; an older kernel keeps those that it knows.
const RULES: ABI = ABI::V6;

/// What may be done with a file, or with all that is in a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read.
    Read,
    /// Read, written, made, renamed and removed.
    Write,
    /// A device: read, written, and asked by `ioctl`.
    Device,
    /// A folder of sockets, which are made, renamed and removed.
    Sockets,
}

impl Access {
    fn rights(self) -> BitFlags<AccessFs> {
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        match self {
            Self::Read => read,
            Self::Write => read | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::MakeReg | AccessFs::RemoveFile,
            Self::Device => AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev,
            Self::Sockets => read | AccessFs::MakeSock | AccessFs::RemoveFile,
        }
    }
}

/// The files that a machine needs from now on; those that are open already need not be here.
#[derive(Clone, Debug, Default)]
pub struct Files(Vec<(PathBuf, Access)>);

impl Files {
    /// One more.
    pub fn add(&mut self, path: &Path, access: Access) {
        self.0.push((path.to_owned(), access));
    }

    /// An image of a disk: the folder of one that is written to, for its snapshots, undo disks and intents are there. A
    /// device has none of them.
    pub fn add_image(&mut self, image: &Path, writable: bool) {
        let real = image.canonicalize().unwrap_or_else(|_| image.to_owned());
        if !real.is_file() {
            self.add(&real, if writable { Access::Device } else { Access::Read });
        } else if writable {
            // It may be known by a link from elsewhere.
            self.add(folder_of(image), Access::Write);
            self.add(folder_of(&real), Access::Write);
        } else {
            self.add(&real, Access::Read);
        }
    }

    /// Closes all else to this thread and those that it starts. Returns whether the kernel could.
    pub(super) fn fence(&self) -> Result<bool, Error> {
        let failed = |error: RulesetError| {
            let error = std::io::Error::other(error);
            Error::io(error, "the sandbox can't be set up; --no-sandbox runs without it")
        };
        let rules = Ruleset::default()
            .handle_access(AccessFs::from_all(RULES))
            .and_then(|rules| rules.handle_access(AccessNet::from_all(RULES)))
            .and_then(|rules| rules.scope(Scope::from_all(RULES)))
            .and_then(Ruleset::create);
        let mut rules = rules.map_err(failed)?;
        // What is not there is missed by whoever wants it, and told better.
        for (path, access) in self.0.iter().filter(|(path, _)| path.exists()) {
            let unreachable = |error: landlock::PathFdError| Error::io(std::io::Error::other(error), "can't be reached").at(path);
            let rights = if path.is_dir() { access.rights() } else { access.rights() & AccessFs::from_file(RULES) };
            rules = rules.add_rule(PathBeneath::new(PathFd::new(path).map_err(unreachable)?, rights)).map_err(failed)?;
        }
        Ok(rules.restrict_self().map_err(failed)?.ruleset != RulesetStatus::NotEnforced)
    }
}
