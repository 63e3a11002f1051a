//! GRUB's menu: `grub.cfg` as `grub-mkconfig` and others write it.
//!
//! Its assignments and conditions are followed, so that the default entry is GRUB's; what draws, loads modules or waits
//! is passed over.

mod script;

use std::collections::HashMap;

use self::script::{Piece, Statement, Word};
use super::entries::{self, Described};
use super::volume::Volume;
use super::{Entry, Place, menu};

const PLACES: [&str; 4] = ["/boot/grub/grub.cfg", "/grub/grub.cfg", "/boot/grub2/grub.cfg", "/grub2/grub.cfg"];
/// Bytes of a variable, and so of a word.
const MAX_VALUE: usize = 16 << 10;
/// Variables.
const MAX_VARIABLES: usize = 1024;

/// The default entry of the first such menu that has entries.
pub fn find(volumes: &[Volume], index: usize) -> Result<Option<Entry>, String> {
    for path in PLACES {
        let Some(text) = menu(&volumes[index], path)? else { continue };
        let wrong = |why: String| format!("{path}: {why}");
        let statements = script::parse(&text).map_err(wrong)?;
        let mut grub = Grub::new(volumes, index, path);
        grub.run(&statements).map_err(wrong)?;
        // A file that only leads to another, as on EFI system partitions, has none.
        if !grub.items.is_empty() {
            return grub.choose().map(Some).map_err(wrong);
        }
    }
    Ok(None)
}

#[derive(Clone)]
enum Does {
    Entry(Vec<Statement>),
    Submenu(Vec<Statement>),
    Described(Described),
}

#[derive(Clone)]
struct Item {
    title: String,
    id: String,
    does: Does,
}

struct Grub<'a> {
    volumes: &'a [Volume],
    /// The file system of the menu.
    home: usize,
    variables: HashMap<String, String>,
    items: Vec<Item>,
    kernel: Option<(Place, String)>,
    initrds: Vec<Place>,
}

impl<'a> Grub<'a> {
    fn new(volumes: &'a [Volume], home: usize, path: &str) -> Self {
        let folder = &path[..path.rfind('/').unwrap_or(0)];
        let variables = [
            ("prefix", folder),
            ("grub_platform", "pc"),
            ("grub_cpu", "i386"),
            ("feature_platform_search_hint", "y"),
            ("feature_default_font_path", "y"),
            ("feature_menuentry_id", "y"),
            ("feature_menuentry_options", "y"),
        ];
        let variables = variables.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Self { volumes, home, variables, items: Vec::new(), kernel: None, initrds: Vec::new() }
    }

    /// Runs statements; the answer is that of the last command, as a condition has it.
    fn run(&mut self, statements: &[Statement]) -> Result<bool, String> {
        let mut answer = true;
        for statement in statements {
            match statement {
                Statement::Command(words) => {
                    let words = self.expand(words)?;
                    answer = self.command(&words)?;
                }
                Statement::If(arms) => {
                    for (condition, body) in arms {
                        if self.run(condition)? {
                            answer = self.run(body)?;
                            break;
                        }
                    }
                }
                Statement::Item { submenu, words, body } => {
                    let words = self.expand(words)?;
                    let value_of = |name: &str| {
                        let at = words.iter().position(|word| word == name)?;
                        words.get(at + 1).cloned()
                    };
                    let id = words.iter().find_map(|word| word.strip_prefix("--id=").map(str::to_owned));
                    let id = id.or_else(|| value_of("--id")).unwrap_or_default();
                    let does = if *submenu { Does::Submenu(body.clone()) } else { Does::Entry(body.clone()) };
                    self.items.push(Item { title: words.first().cloned().unwrap_or_default(), id, does });
                }
            }
        }
        Ok(answer)
    }

    fn expand(&self, words: &[Word]) -> Result<Vec<String>, String> {
        let mut expanded = Vec::new();
        for word in words {
            let mut text = String::new();
            for piece in &word.pieces {
                match piece {
                    Piece::Text(piece) => text.push_str(piece),
                    // How Debian's menus say `--id`.
                    Piece::Variable(name) if name == "menuentry_id_option" => text.push_str("--id"),
                    Piece::Variable(name) => text.push_str(self.value(name)),
                }
                if text.len() > MAX_VALUE {
                    return Err(format!("has a word of more than {MAX_VALUE} bytes"));
                }
            }
            if word.quoted || !text.is_empty() {
                expanded.push(text);
            }
        }
        Ok(expanded)
    }

    fn value(&self, name: &str) -> &str {
        self.variables.get(name).map_or("", String::as_str)
    }

    fn set(&mut self, name: &str, value: &str) {
        if self.variables.len() < MAX_VARIABLES || self.variables.contains_key(name) {
            self.variables.insert(name.to_owned(), value.to_owned());
        }
    }

    fn command(&mut self, words: &[String]) -> Result<bool, String> {
        let negations = words.iter().take_while(|word| *word == "!").count();
        let answer = self.plain_command(&words[negations..])?;
        Ok(answer != (negations % 2 == 1))
    }

    fn plain_command(&mut self, words: &[String]) -> Result<bool, String> {
        let Some((name, rest)) = words.split_first() else { return Ok(true) };
        match name.as_str() {
            "[" | "test" => {
                let end = rest.len() - usize::from(rest.last().is_some_and(|word| word == "]"));
                self.test(&rest[..end])
            }
            "set" => {
                if let Some((name, value)) = rest.first().and_then(|word| word.split_once('=')) {
                    self.set(name, value);
                }
                Ok(true)
            }
            "load_env" => self.load_env(rest),
            "blscfg" => self.described(),
            "linux" | "linux16" | "linuxefi" => {
                let path = rest.first().ok_or("has a 'linux' without a path")?;
                self.kernel = Some((self.place(path)?, rest[1..].join(" ")));
                Ok(true)
            }
            "initrd" | "initrd16" | "initrdefi" => {
                self.initrds = rest.iter().map(|path| self.place(path)).collect::<Result<_, _>>()?;
                Ok(true)
            }
            "search" => Ok(self.search(rest)),
            "search.fs_uuid" | "search.fs_label" | "search.file" => {
                let by = name.trim_start_matches("search.").replace('_', "-");
                let mut words = vec![format!("--{by}")];
                words.extend(rest.first().cloned());
                words.push(format!("--set={}", rest.get(1).map_or("root", String::as_str)));
                Ok(self.search(&words))
            }
            "true" | "insmod" | "export" | "echo" | "terminal_output" | "terminal_input" => Ok(true),
            _ => Ok(false),
        }
    }

    /// `[ ... ]`.
    fn test(&self, words: &[String]) -> Result<bool, String> {
        for either in words.split(|word| word == "-o") {
            let mut all = true;
            for part in either.split(|word| word == "-a") {
                let negations = part.iter().take_while(|word| *word == "!").count();
                all &= self.test_one(&part[negations..])? != (negations % 2 == 1);
            }
            if all {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn test_one(&self, words: &[String]) -> Result<bool, String> {
        let numbers = |a: &str, b: &str| Some((a.parse::<i64>().ok()?, b.parse::<i64>().ok()?));
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        Ok(match words[..] {
            ["-n", word] => !word.is_empty(),
            ["-z", word] => word.is_empty(),
            ["-s", path] => self.file(path)?.is_some_and(|text| !text.is_empty()),
            ["-f" | "-e", path] => self.place(path).is_ok_and(|place| exists(&self.volumes[place.volume], &place.path)),
            ["-d", path] => self.place(path).is_ok_and(|place| !self.volumes[place.volume].list(&place.path).is_empty()),
            [a, "=" | "==", b] => a == b,
            [a, "!=", b] => a != b,
            [a, "-eq", b] => numbers(a, b).is_some_and(|(a, b)| a == b),
            [a, "-ne", b] => numbers(a, b).is_some_and(|(a, b)| a != b),
            [a, "-lt", b] => numbers(a, b).is_some_and(|(a, b)| a < b),
            [a, "-le", b] => numbers(a, b).is_some_and(|(a, b)| a <= b),
            [a, "-gt", b] => numbers(a, b).is_some_and(|(a, b)| a > b),
            [a, "-ge", b] => numbers(a, b).is_some_and(|(a, b)| a >= b),
            [word] => !word.is_empty(),
            _ => false,
        })
    }

    fn file(&self, path: &str) -> Result<Option<String>, String> {
        // What is on a device that is not there is not there.
        self.place(path).map_or(Ok(None), |place| menu(&self.volumes[place.volume], &place.path))
    }

    /// Variables that are kept in a file: the entry that was chosen last.
    fn load_env(&mut self, words: &[String]) -> Result<bool, String> {
        let named = words.iter().position(|word| word == "-f" || word == "--file").and_then(|at| words.get(at + 1));
        let path = named.cloned().unwrap_or_else(|| format!("{}/grubenv", self.value("prefix")));
        let Some(text) = self.file(&path)? else { return Ok(false) };
        for (name, value) in text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once('=')) {
            self.set(name, &value[..value.floor_char_boundary(MAX_VALUE)]);
        }
        Ok(true)
    }

    /// Entries of the Boot Loader Specification, which some menus take in.
    fn described(&mut self) -> Result<bool, String> {
        let volume = self.place("/")?.volume;
        for folder in ["/loader/entries", "/boot/loader/entries"] {
            let entries = entries::list(&self.volumes[volume], folder)?;
            let items = entries.into_iter().map(|entry| Item {
                title: entry.title.clone(),
                id: entry.id.clone(),
                does: Does::Described(entry),
            });
            self.items.extend(items);
        }
        Ok(true)
    }

    /// Sets a variable to the device that has a file system with such a UUID, name or file.
    fn search(&mut self, words: &[String]) -> bool {
        let (mut by, mut to, mut what) = ("file", None, None);
        let mut words = words.iter().map(String::as_str);
        while let Some(word) = words.next() {
            match word {
                "--fs-uuid" | "-u" => by = "uuid",
                "--label" | "-l" | "--fs-label" => by = "label",
                "--file" | "-f" => by = "file",
                "--set" | "-s" => to = Some(words.next().unwrap_or("root")),
                "--hint" => drop(words.next()),
                _ if word.starts_with("--set=") => to = Some(&word[6..]),
                _ if word.starts_with('-') => {}
                _ => what = what.or(Some(word)),
            }
        }
        let Some(what) = what else { return false };
        let found = self.volumes.iter().find(|volume| match by {
            "uuid" => volume.uuid.eq_ignore_ascii_case(what),
            "label" => volume.label == what,
            _ => exists(volume, what),
        });
        let Some(device) = found.map(device_of) else { return false };
        if let Some(name) = to {
            self.set(name, &device);
        }
        true
    }

    /// A path with its device, as `(hd0,gpt2)/vmlinuz`, or on the root.
    fn place(&self, path: &str) -> Result<Place, String> {
        let (device, path) = match path.strip_prefix('(').and_then(|rest| rest.split_once(')')) {
            Some((device, path)) => (device, path),
            None => (self.value("root"), path),
        };
        if device.is_empty() {
            return Ok(Place { volume: self.home, path: path.to_owned() });
        }
        let partition = match device.strip_prefix("hd0") {
            Some("") => Some(None),
            Some(rest) => rest.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().ok().map(Some),
            None => None,
        };
        let volume = partition.and_then(|number: Option<u32>| self.volumes.iter().position(|volume| volume.partition == number));
        let volume =
            volume.ok_or_else(|| format!("starts what is on ({device}), which is no file system that can be read here"))?;
        Ok(Place { volume, path: path.to_owned() })
    }

    /// The default entry.
    fn choose(mut self) -> Result<Entry, String> {
        let mut wanted = self.value("default").to_owned();
        if wanted == "saved" {
            wanted = self.value("saved_entry").to_owned();
        }
        let mut path = wanted.split('>');
        let mut item = pick(&self.items, path.next().unwrap_or(""))?;
        loop {
            match item.does {
                Does::Submenu(body) => {
                    self.items.clear();
                    self.run(&body)?;
                    item = pick(&self.items, path.next().unwrap_or("0"))?;
                }
                Does::Described(entry) => {
                    let volume = self.place("/")?.volume;
                    let mut entry = entry;
                    entry.options = self.with_values(&entry.options)?;
                    return Ok(entry.place(&self.volumes[volume], volume));
                }
                Does::Entry(body) => {
                    self.run(&body)?;
                    let (kernel, options) = self.kernel.ok_or_else(|| format!("its entry '{}' starts no Linux", item.title))?;
                    return Ok(Entry { title: item.title, kernel, initrds: self.initrds, options });
                }
            }
        }
    }

    /// A line with variables, as entries of Fedora's have them.
    fn with_values(&self, line: &str) -> Result<String, String> {
        let quoted = format!("\"{}\"", line.replace('\\', "\\\\").replace('"', "\\\""));
        match &script::parse(&quoted)?[..] {
            [Statement::Command(words)] => Ok(self.expand(words)?.join(" ").split_whitespace().collect::<Vec<_>>().join(" ")),
            _ => Ok(line.to_owned()),
        }
    }
}

/// The item of this number, title or id; else the first.
fn pick(items: &[Item], wanted: &str) -> Result<Item, String> {
    let number = wanted.parse().ok().and_then(|number: usize| items.get(number));
    let named = || items.iter().find(|item| item.id == wanted || item.title == wanted);
    let found = number.or_else(named).or(items.first());
    found.cloned().ok_or_else(|| "has a menu without entries".to_owned())
}

/// Whether there is such a file; one that is too large for a menu is one.
fn exists(volume: &Volume, path: &str) -> bool {
    !matches!(menu(volume, path), Ok(None))
}

fn device_of(volume: &Volume) -> String {
    volume.partition.map_or_else(|| "hd0".to_owned(), |number| format!("hd0,{number}"))
}
