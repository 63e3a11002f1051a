//! Who may read and write a new file that holds a guest's data: nobody who may not read where the data comes from.

use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::Path;

use nix::fcntl::OFlag;

use crate::error::{Error, Result};

/// The owner's bits that every new file has.
const OWNER: u32 = 0o600;
/// Bits of a mode that a new file may have: reading and writing.
const READ_WRITE: u32 = 0o666;
const GROUP: u32 = 0o060;

/// What decides who may read a new file.
#[derive(Clone, Debug)]
pub enum Access {
    /// It holds nothing of anyone: the user's umask.
    Umask,
    /// It holds what other files do: what their modes all allow, as far as the umask does, too.
    Like {
        /// Bits of the mode.
        mode: u32,
        /// The group of all of them; none where they differ.
        group: Option<u32>,
    },
    /// What it holds comes from no file: its owner alone.
    Owner,
}

impl Access {
    /// For what comes from the file at `path`: the owner alone where that is no regular file.
    #[must_use]
    pub fn of(path: &Path) -> Self {
        Self::of_all([path])
    }

    /// As [`Access::of`], of a file that holds what several do.
    #[must_use]
    pub fn of_all<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Self {
        let mut access: Option<(u32, Option<u32>)> = None;
        for path in paths {
            let Some(found) = std::fs::metadata(path).ok().filter(Metadata::is_file) else { return Self::Owner };
            let (mode, group) = (found.mode(), Some(found.gid()));
            access = Some(access.map_or((mode, group), |(all, known)| (all & mode, known.filter(|known| Some(*known) == group))));
        }
        access.map_or(Self::Owner, |(mode, group)| Self::Like { mode, group })
    }

    /// Gives the new file at `path`, which only its owner may read so far, its mode.
    pub(crate) fn give(&self, path: &Path) -> Result<()> {
        self.try_give(path).map_err(|error| Error::io(error, "can't be given its permissions").at(path))
    }

    fn try_give(&self, path: &Path) -> io::Result<()> {
        let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        let mode = match self {
            Self::Owner => OWNER,
            Self::Umask => READ_WRITE & !umask(),
            Self::Like { mode, group } => {
                let allowed = mode & READ_WRITE & !umask();
                let is_kept = group.map_or(Ok(false), |group| is_of_group(&file, group))?;
                if is_kept { allowed } else { allowed & !GROUP }
            }
        };
        let mode = mode | OWNER;
        // A file system without modes takes none, and has not to.
        if file.metadata()?.mode() & 0o777 == mode { Ok(()) } else { file.set_permissions(Permissions::from_mode(mode)) }
    }
}

/// Whether the file belongs to this group, or can be given to it.
fn is_of_group(file: &File, group: u32) -> io::Result<bool> {
    Ok(file.metadata()?.gid() == group || fchown(file, None, Some(group)).is_ok())
}

/// The process's umask, read without changing it for a moment; the strictest where it can't be read.
fn umask() -> u32 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let found = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    found.and_then(|mask| u32::from_str_radix(mask.trim(), 8).ok()).unwrap_or(0o077)
}
