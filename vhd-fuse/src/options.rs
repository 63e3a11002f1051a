//! How a disk is mounted, and the words of `-o` for it.

use vhd_core::{Error, ErrorKind, Result};

/// How a disk is mounted.
#[derive(Clone, Debug, Default)]
pub struct MountOptions {
    /// Nothing can be written, even when the disk could be.
    pub read_only: bool,
    /// Other users may look too, as the files' modes allow them.
    pub allow_other: bool,
    /// Every write is durable when it returns.
    pub sync: bool,
    /// The owner of the files; the user who mounts where it is not given.
    pub uid: Option<u32>,
    /// The group of the files; that of the user who mounts where it is not given.
    pub gid: Option<u32>,
    /// Mode bits that the files don't have. Where it is not given, only the owner has any.
    pub umask: Option<u16>,
    /// Threads that serve; as many as suit the machine where it is not given.
    pub threads: Option<usize>,
}

/// True where ordinary users may give others a look at what they mount: `user_allow_other` in `/etc/fuse.conf`.
#[must_use]
pub fn users_may_allow_other() -> bool {
    let configured = std::fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
    configured.lines().any(|line| line.trim() == "user_allow_other")
}

/// Words of mount(8), fstab and systemd that no file system sees.
const FOR_MOUNT: &[&str] = &[
    "defaults",
    "auto",
    "noauto",
    "nofail",
    "user",
    "nouser",
    "users",
    "owner",
    "group",
    "_netdev",
    "loop",
    "default_permissions",
];

/// Words that change nothing for files like these.
const IGNORED: &[&str] = &[
    "dev",
    "nodev",
    "suid",
    "nosuid",
    "exec",
    "noexec",
    "atime",
    "noatime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "diratime",
    "nodiratime",
    "lazytime",
    "nolazytime",
    "iversion",
    "noiversion",
    "silent",
    "loud",
    "mand",
    "nomand",
    "async",
    "dirsync",
    "nosymfollow",
    "symfollow",
];

impl MountOptions {
    /// Takes on the words of a list like `ro,allow_other,x-systemd.automount`.
    ///
    /// # Errors
    /// `InvalidInput` for a word that nobody knows, or a value that makes no sense.
    pub fn apply(&mut self, list: &str) -> Result<()> {
        self.apply_all(list, &mut |word| {
            let message = format!(
                "unknown mount option '{word}'; known are ro, rw, allow_other, sync, uid=, gid=, umask= and those of mount(8)"
            );
            Err(Error::new(ErrorKind::InvalidInput, message))
        })
    }

    /// As [`Self::apply`], but takes only `ro` and `rw`, and returns those of the others that a file system on the disk is
    /// to be mounted with.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn apply_for_inside(&mut self, list: &str) -> Result<Vec<String>> {
        let mut others = Vec::new();
        for word in words(list) {
            match word {
                "ro" | "rw" => self.apply(word)?,
                _ if FOR_MOUNT.contains(&word) || is_comment(word) => {}
                _ => others.push(word.to_owned()),
            }
        }
        Ok(others)
    }

    fn apply_all(&mut self, list: &str, unknown: &mut dyn FnMut(&str) -> Result<()>) -> Result<()> {
        words(list).try_for_each(|word| if self.apply_word(word)? { Ok(()) } else { unknown(word) })
    }

    /// False for a word that nobody knows.
    fn apply_word(&mut self, word: &str) -> Result<bool> {
        let (name, value) = word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)));
        match (name, value) {
            ("ro", None) => self.read_only = true,
            ("rw", None) => self.read_only = false,
            ("allow_other", None) => self.allow_other = true,
            ("sync", None) => self.sync = true,
            ("uid", Some(value)) => self.uid = Some(number(word, value, 10)?),
            ("gid", Some(value)) => self.gid = Some(number(word, value, 10)?),
            ("umask", Some(value)) => {
                let umask = number(word, value, 8)?;
                self.umask = Some(u16::try_from(umask).ok().filter(|umask| *umask <= 0o777).ok_or_else(|| bad(word))?);
            }
            _ if is_comment(word) => {}
            (_, None) if FOR_MOUNT.contains(&name) || IGNORED.contains(&name) => {}
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Mode bits of a file.
    pub(crate) fn file_mode(&self, read_only: bool) -> u16 {
        let all = if read_only { 0o444 } else { 0o666 };
        all & !self.umask.unwrap_or(0o077)
    }

    /// Mode bits of a folder: nothing is ever made in one.
    pub(crate) fn folder_mode(&self) -> u16 {
        0o555 & !self.umask.unwrap_or(0)
    }
}

fn words(list: &str) -> impl Iterator<Item = &str> {
    list.split(',').filter(|word| !word.is_empty())
}

fn is_comment(word: &str) -> bool {
    word.starts_with("x-") || word.starts_with("X-") || word.starts_with("comment=")
}

fn number(word: &str, value: &str, radix: u32) -> Result<u32> {
    u32::from_str_radix(value, radix).map_err(|_| bad(word))
}

fn bad(word: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("mount option '{word}': the value is not a number that it can have"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_counts_and_others_words_are_let_pass() {
        let mut options = MountOptions::default();
        options.apply("ro,defaults,noauto,nofail,_netdev,x-systemd.automount,comment=mine,,rw,allow_other").unwrap();
        assert!(!options.read_only);
        assert!(options.allow_other);
        options.apply("uid=12,gid=13,umask=022,ro").unwrap();
        assert_eq!((options.uid, options.gid, options.umask), (Some(12), Some(13), Some(0o022)));
        assert_eq!((options.file_mode(true), options.file_mode(false)), (0o444, 0o644));
    }

    #[test]
    fn an_unknown_word_is_an_error_that_names_it() {
        for word in ["frobnicate", "ro=1", "uid=me", "umask=9", "umask=1777", "uid"] {
            let error = MountOptions::default().apply(word).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn only_the_owner_sees_a_file_unless_told() {
        let options = MountOptions::default();
        assert_eq!((options.file_mode(true), options.file_mode(false)), (0o400, 0o600));
    }
}
