//! Menus of extlinux and syslinux: a line for each setting, labels.

use super::volume::Volume;
use super::{Entry, Place, menu};

const PLACES: [&str; 8] = [
    "/boot/extlinux/extlinux.conf",
    "/extlinux/extlinux.conf",
    "/extlinux.conf",
    "/boot/syslinux/extlinux.conf",
    "/boot/syslinux/syslinux.cfg",
    "/syslinux/syslinux.cfg",
    "/syslinux.cfg",
    "/EFI/syslinux/syslinux.cfg",
];
/// How deep a menu may include others.
const MAX_DEPTH: usize = 4;
/// Files that one menu may include, in all.
const MAX_INCLUDED: usize = 32;

#[derive(Default)]
struct Label {
    name: String,
    title: String,
    kernel: String,
    initrds: Vec<String>,
    append: Option<String>,
}

#[derive(Default)]
struct Menu {
    default: Option<String>,
    /// The label that says that it is the default.
    marked: Option<usize>,
    /// What is appended for labels that say nothing.
    append: String,
    labels: Vec<Label>,
    included: usize,
}

/// The default entry of the first such menu.
pub fn find(volumes: &[Volume], index: usize) -> Result<Option<Entry>, String> {
    let volume = &volumes[index];
    for path in PLACES {
        let Some(text) = menu(volume, path)? else { continue };
        let folder = &path[..path.rfind('/').unwrap_or(0)];
        let mut found = Menu::default();
        found.read(volume, folder, &text, 0)?;
        return found.choose(index, folder).map(Some).map_err(|why| format!("{path}: {why}"));
    }
    Ok(None)
}

impl Menu {
    fn read(&mut self, volume: &Volume, folder: &str, text: &str, depth: usize) -> Result<(), String> {
        for line in text.lines() {
            let (word, rest) = split(line);
            let (second, title) = split(rest);
            let include = word == "include" || (word == "menu" && second.eq_ignore_ascii_case("include"));
            if include && depth < MAX_DEPTH && self.included < MAX_INCLUDED {
                self.included += 1;
                let name = if word == "include" { rest } else { title };
                if let Some(text) = menu(volume, &within(folder, name.split_whitespace().next().unwrap_or("")))? {
                    self.read(volume, folder, &text, depth + 1)?;
                }
                continue;
            }
            self.set(&word, rest);
        }
        Ok(())
    }

    fn set(&mut self, word: &str, rest: &str) {
        match (word, self.labels.last_mut()) {
            ("label", _) => self.labels.push(Label { name: rest.to_owned(), ..Label::default() }),
            ("default", _) => self.default = Some(rest.to_owned()),
            ("append", None) => self.append = rest.to_owned(),
            ("append", Some(label)) => label.append = Some(rest.to_owned()),
            ("kernel" | "linux", Some(label)) => label.kernel = rest.to_owned(),
            ("initrd", Some(label)) => label.initrds = rest.split(',').map(|name| name.trim().to_owned()).collect(),
            ("menu", Some(label)) => match split(rest) {
                (second, title) if second == "label" => label.title = title.replace('^', ""),
                (second, _) if second == "default" => self.marked = Some(self.labels.len() - 1),
                _ => {}
            },
            _ => {}
        }
    }

    fn choose(mut self, volume: usize, folder: &str) -> Result<Entry, String> {
        let wanted = self.default.as_deref().and_then(|name| {
            let name = name.split_whitespace().next()?;
            self.labels.iter().position(|label| label.name.eq_ignore_ascii_case(name))
        });
        let number = self.marked.or(wanted).unwrap_or(0);
        if number >= self.labels.len() {
            return Err("has no label".to_owned());
        }
        let label = self.labels.swap_remove(number);
        if label.kernel.is_empty() {
            return Err(format!("label '{}' has no kernel", label.name));
        }
        let append = match label.append {
            Some(none) if none == "-" => String::new(),
            own => own.unwrap_or(self.append),
        };
        let place = |path: &str| Place { volume, path: within(folder, path) };
        let mut initrds = label.initrds;
        let mut options = Vec::new();
        for word in append.split_whitespace() {
            match word.strip_prefix("initrd=") {
                Some(names) if initrds.is_empty() => initrds.extend(names.split(',').map(str::to_owned)),
                Some(_) => {}
                None => options.push(word),
            }
        }
        let title = if label.title.is_empty() { label.name } else { label.title };
        let initrds = initrds.iter().filter(|name| !name.is_empty()).map(|name| place(name)).collect();
        Ok(Entry { title, kernel: place(&label.kernel), initrds, options: options.join(" ") })
    }
}

/// The first word, in small letters, and what follows it.
fn split(line: &str) -> (String, &str) {
    let line = line.trim();
    let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    (word.to_ascii_lowercase(), rest.trim())
}

/// A path as the menu means it: from its own folder.
fn within(folder: &str, path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("{folder}/{path}") }
}
