//! What is mounted where, as `/proc/self/mountinfo` tells it.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// A mount.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MountEntry {
    /// Where it is.
    pub(crate) target: PathBuf,
    /// The kind of file system, with its subtype: `fuse.vhd`.
    pub(crate) kind: String,
    /// What is mounted: for a mount of ours, the image.
    pub(crate) source: PathBuf,
}

/// The mount that is seen at a path: of several, the last.
pub(crate) fn at(target: &Path) -> io::Result<Option<MountEntry>> {
    Ok(all()?.into_iter().rfind(|entry| entry.target == target))
}

/// All mounts, in order.
pub(crate) fn all() -> io::Result<Vec<MountEntry>> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    Ok(table.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

/// Waits until no mount is one of these.
pub(crate) fn wait_until_none(is_one: impl Fn(&MountEntry) -> bool) -> io::Result<()> {
    let table = File::open("/proc/self/mountinfo")?;
    while all()?.iter().any(&is_one) {
        // A change is told as an error and an exceptional state. Time runs out too: between the look and the wait the
        // table may have changed.
        let second = Timespec { tv_sec: 1, tv_nsec: 0 };
        match poll(&mut [PollFd::new(&table, PollFlags::PRI)], Some(&second)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// `ID PARENT MAJOR:MINOR ROOT TARGET OPTIONS [FIELD...] - KIND SOURCE OPTIONS`
fn parse(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let target = unescape(fields.by_ref().nth(4)?);
    fields.by_ref().find(|field| *field == b"-")?;
    let kind = String::from_utf8_lossy(fields.next()?).into_owned();
    let [target, source] = [target, unescape(fields.next()?)].map(|path| PathBuf::from(OsString::from_vec(path)));
    Some(MountEntry { target, kind, source })
}

/// Blanks and the like are written `\040`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let octal = (first == b'\\').then(|| after.get(..3)).flatten();
        let escaped = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(escaped.unwrap_or(first));
        rest = if escaped.is_some() { &after[3..] } else { after };
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_understood_with_odd_names_and_without_optional_fields() {
        let line = br"41 28 0:38 / /mnt/a\040b\134c rw,nosuid shared:7 master:1 - fuse.vhd /img\040x.vhd rw";
        let entry = parse(line).unwrap();
        assert_eq!(entry.target, Path::new(r"/mnt/a b\c"));
        assert_eq!(entry.kind, "fuse.vhd");
        assert_eq!(entry.source, Path::new("/img x.vhd"));
        assert_eq!(parse(b"1 0 8:1 / / rw - ext4 /dev/sda1 rw").unwrap().kind, "ext4");
        assert_eq!(parse(b""), None);
        assert_eq!(parse(b"1 0 8:1 / /"), None);
        assert_eq!(unescape(br"\04"), br"\04");
    }

    #[test]
    fn the_root_is_mounted_and_a_name_that_nobody_made_is_not() {
        assert!(at(Path::new("/")).unwrap().is_some());
        assert_eq!(at(Path::new("/no/such/place")).unwrap(), None);
    }
}
