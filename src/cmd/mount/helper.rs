//! `mount.vhd`: what mount(8) runs for `mount -t vhd` and lines of fstab. Its words become those of `vhd mount`.

use std::ffi::{OsStr, OsString};
use std::path::Path;

/// The name by which this program is called as a helper of mount(8).
const NAME: &str = "mount.vhd";

/// What was asked for.
#[derive(Debug, PartialEq, Eq)]
pub enum Helped {
    /// These arguments of `vhd`.
    Run(Vec<OsString>),
    /// Nothing is to be done: `mount --fake`.
    Fake,
}

/// Translates the arguments when this program was called as the helper; `None` when it was not.
pub fn translate(arguments: &[OsString]) -> Option<Helped> {
    let (program, rest) = arguments.split_first()?;
    if Path::new(program).file_name() != Some(OsStr::new(NAME)) {
        return None;
    }
    let mut places = Vec::new();
    let mut words = Vec::new();
    let mut arguments = rest.iter();
    while let Some(argument) = arguments.next() {
        match argument.to_str() {
            Some("-o") => {
                words.extend(arguments.next().and_then(|list| list.to_str()).into_iter().flat_map(|list| list.split(',')))
            }
            // The kind of file system, and a namespace that mount(8) has entered already.
            Some("-t" | "-N") => drop(arguments.next()),
            Some("-f") => return Some(Helped::Fake),
            Some(flag) if flag.len() > 1 && flag.starts_with('-') => {}
            _ => places.push(argument.clone()),
        }
    }
    let mut command: Vec<OsString> = vec!["vhd".into(), "mount".into()];
    let mut options = Vec::new();
    for word in words {
        match word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value))) {
            ("fs", None) => command.push("--fs".into()),
            ("fs", Some(part)) => {
                command.push("--fs".into());
                if let Some(image) = places.first_mut() {
                    image.push(format!(":{part}"));
                }
            }
            ("undo" | "any_parent" | "tolerant" | "direct" | "force", None) => command.push(option(word)),
            ("undo_dir" | "parent_dir" | "raw_parent" | "force_size" | "low_space", Some(value)) => {
                command.extend([option(word.split('=').next().unwrap_or_default()), value.into()]);
            }
            _ => options.push(word),
        }
    }
    if !options.is_empty() {
        command.extend(["-o".into(), options.join(",").into()]);
    }
    command.push("--".into());
    command.extend(places);
    Some(Helped::Run(command))
}

/// An option of the command by its word in fstab.
fn option(word: &str) -> OsString {
    format!("--{}", word.replace('_', "-")).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translated(line: &str) -> Option<Helped> {
        translate(&line.split(' ').map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn words_of_fstab_become_options() {
        let expected = |line: &str| Some(Helped::Run(line.split(' ').map(OsString::from).collect()));
        assert_eq!(translated("/sbin/mount.vhd /a.vhd /mnt -o rw"), expected("vhd mount -o rw -- /a.vhd /mnt"));
        assert_eq!(
            translated("mount.vhd /a.vhd /mnt -n -v -t vhd -o ro,fs=p1,nofail,parent_dir=/b"),
            expected("vhd mount --fs --parent-dir /b -o ro,nofail -- /a.vhd:p1 /mnt")
        );
        assert_eq!(translated("mount.vhd /a.vhd /mnt -s -o undo"), expected("vhd mount --undo -- /a.vhd /mnt"));
        assert_eq!(translated("mount.vhd -f /a.vhd /mnt"), Some(Helped::Fake));
        assert_eq!(translated("vhd mount a b"), None);
    }
}
