//! Entries of the Boot Loader Specification: a file for each, as systemd-boot reads them.

use std::cmp::Ordering;

use super::volume::Volume;
use super::{Entry, Place, menu};

/// Entries that are looked at.
const MAX_ENTRIES: usize = 256;

/// An entry as its file has it.
#[derive(Clone, Debug, Default)]
pub struct Described {
    /// The file's name, without its end.
    pub id: String,
    /// What people know it by.
    pub title: String,
    sort_key: String,
    machine: String,
    version: String,
    linux: String,
    initrds: Vec<String>,
    /// The command line.
    pub options: String,
    /// Attempts to start it are used up.
    bad: bool,
}

/// The default entry.
pub fn find(volumes: &[Volume], index: usize) -> Result<Option<Entry>, String> {
    let volume = &volumes[index];
    for folder in ["/loader", "/boot/loader", "/boot/efi/loader", "/efi/loader"] {
        let entries = list(volume, &format!("{folder}/entries"))?;
        if entries.is_empty() {
            continue;
        }
        let settings = menu(volume, &format!("{folder}/loader.conf"))?.unwrap_or_default();
        let pattern = settings.lines().filter_map(|line| line.trim().strip_prefix("default")).next_back().map(str::trim);
        let wanted = pattern.and_then(|pattern| {
            entries.iter().find(|entry| matches(pattern, &entry.id) || matches(pattern, &format!("{}.conf", entry.id)))
        });
        return Ok(wanted.or(entries.first()).map(|entry| entry.place(volume, index)));
    }
    Ok(None)
}

/// The entries of a folder that start Linux, the one that is chosen by default first.
pub fn list(volume: &Volume, folder: &str) -> Result<Vec<Described>, String> {
    let mut entries = Vec::new();
    for name in volume.list(folder).iter().filter(|name| name.ends_with(".conf")).take(MAX_ENTRIES) {
        let text = menu(volume, &format!("{folder}/{name}"))?.unwrap_or_default();
        let entry = parse(name.trim_end_matches(".conf"), &text);
        if !entry.linux.is_empty() {
            entries.push(entry);
        }
    }
    entries.sort_by(|a, b| {
        let order = a.bad.cmp(&b.bad).then_with(|| a.sort_key.is_empty().cmp(&b.sort_key.is_empty()));
        let keyed = || a.sort_key.cmp(&b.sort_key).then_with(|| a.machine.cmp(&b.machine));
        // The newest first.
        let order = order.then_with(|| if a.sort_key.is_empty() { Ordering::Equal } else { keyed() });
        order.then_with(|| compare(&b.version, &a.version)).then_with(|| compare(&b.id, &a.id))
    });
    Ok(entries)
}

fn parse(id: &str, text: &str) -> Described {
    let mut entry = Described { id: id.to_owned(), ..Described::default() };
    // NAME+LEFT-DONE counts attempts.
    if let Some((name, count)) = id.rsplit_once('+') {
        entry.bad = count.split('-').next().is_some_and(|left| !left.is_empty() && left.bytes().all(|digit| digit == b'0'));
        entry.id = name.to_owned();
    }
    for line in text.lines() {
        let Some((key, value)) = line.trim().split_once(char::is_whitespace) else { continue };
        let value = value.trim();
        match key {
            "title" => entry.title = value.to_owned(),
            "sort-key" => entry.sort_key = value.to_owned(),
            "machine-id" => entry.machine = value.to_owned(),
            "version" => entry.version = value.to_owned(),
            "linux" => entry.linux = value.to_owned(),
            "initrd" => entry.initrds.extend(value.split_whitespace().map(str::to_owned)),
            "options" => entry.options = format!("{} {value}", entry.options).trim().to_owned(),
            _ => {}
        }
    }
    if entry.title.is_empty() {
        entry.title.clone_from(&entry.id);
    }
    entry
}

impl Described {
    /// Where its files are. Paths begin at the file system's root; where `/boot` is no file system of its own, some leave it out.
    pub(super) fn place(&self, volume: &Volume, index: usize) -> Entry {
        let there = |path: &str| {
            let (name, folder) = path.rsplit_once('/').map_or((path, ""), |(folder, name)| (name, folder));
            volume.list(folder).iter().any(|found| found.eq_ignore_ascii_case(name))
        };
        let place = |path: &String| {
            let below = format!("/boot/{}", path.trim_start_matches('/'));
            let path = if !there(path) && there(&below) { below } else { path.clone() };
            Place { volume: index, path }
        };
        let initrds = self.initrds.iter().map(place).collect();
        Entry { title: self.title.clone(), kernel: place(&self.linux), initrds, options: self.options.clone() }
    }
}

/// Whether a name is as a pattern with `*` and `?` says.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => (star, p) = (Some((p, n)), p + 1),
            Some(&c) if c == '?' || c == name[n] => (p, n) = (p + 1, n + 1),
            // What the last star stands for gets longer.
            _ => match star {
                Some((at, from)) => (star, p, n) = (Some((at, from + 1)), at + 1, from + 1),
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

/// Compares versions: numbers as numbers.
fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    loop {
        let (first, second) = (piece(&mut a), piece(&mut b));
        let order = match (first.as_bytes().first(), second.as_bytes().first()) {
            (None, None) => return Ordering::Equal,
            (Some(x), Some(y)) if x.is_ascii_digit() && y.is_ascii_digit() => {
                let (x, y) = (first.trim_start_matches('0'), second.trim_start_matches('0'));
                x.len().cmp(&y.len()).then_with(|| x.cmp(y))
            }
            _ => first.cmp(second),
        };
        if order != Ordering::Equal {
            return order;
        }
    }
}

/// Takes what is all digits, or all none, from the front.
fn piece<'a>(rest: &mut &'a str) -> &'a str {
    let digits = rest.starts_with(|c: char| c.is_ascii_digit());
    let end = rest.find(|c: char| c.is_ascii_digit() != digits).unwrap_or(rest.len());
    let (piece, behind) = rest.split_at(end);
    *rest = behind;
    piece
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_their_numbers() {
        assert_eq!(compare("6.1.0-9", "6.1.0-10"), Ordering::Less);
        assert_eq!(compare("6.10", "6.9"), Ordering::Greater);
        assert_eq!(compare("6.1", "6.1"), Ordering::Equal);
        assert_eq!(compare("", "6.1"), Ordering::Less);
    }

    #[test]
    fn patterns_are_those_of_file_names() {
        assert!(matches("debian-*.conf", "debian-6.1.conf") && matches("*", "") && matches("a?c", "abc"));
        assert!(!matches("debian-*.conf", "arch.conf") && !matches("a", "ab") && !matches("", "a"));
        assert!(!matches(&"*a".repeat(20), &"a".repeat(19)));
    }

    #[test]
    fn an_entry_whose_attempts_are_used_up_is_known() {
        assert!(parse("a+0-3", "").bad && parse("a+0", "").bad);
        assert!(!parse("a+3", "").bad && !parse("a+10-1", "").bad && !parse("a", "").bad);
        assert_eq!(parse("a+3-1", "").id, "a");
    }
}
