//! What stands where in a configuration.

use std::path::{Path, PathBuf};

use vhd_core::{Error, ErrorKind};

use super::document::{Document, Element, Problem, Step};
use super::{AtEnd, Config, DiskConfig, Serial};
use crate::layout::MAX_DISKS;
use crate::virtio::block::{ID_LEN, Policy};

/// The outermost element, as Virtual Server called it.
pub const ROOT: &str = "preferences";
const MEMORY: [&str; 3] = ["hardware", "memory", "ram_size"];
const CPUS: [&str; 2] = ["hardware", "cpus"];
const SERIAL: [&str; 2] = ["hardware", "serial"];
const BUS: [&str; 2] = ["hardware", "virtio_bus"];
const LOCATION: &str = "location";
const KERNEL: [&str; 2] = ["boot", "kernel"];
const INITRD: [&str; 2] = ["boot", "initrd"];
const APPEND: [&str; 2] = ["boot", "append"];
const UNDO: [&str; 3] = ["settings", "undo_drives", "enabled"];
const AT_END: [&str; 3] = ["settings", "undo_drives", "default_action"];
const LOW_SPACE: [&str; 2] = ["settings", "low_space"];
const STATE: [&str; 2] = ["settings", "saved_state"];
const ON_EVENT: [&str; 3] = ["settings", "scripts", "on_event"];
/// What a location may have inside, its path aside.
const OF_DISK: [&str; 5] = ["serial_number", "queues", "read_only", "on_error", "on_no_space"];

/// A field: where it is, and its `type`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    pub way: Vec<(String, Option<u8>)>,
    pub kind: &'static str,
}

type Read<T> = Result<Option<T>, Problem>;

fn find<'a>(from: &'a Element, way: &[&str]) -> Read<&'a Element> {
    from.find(&way.iter().map(|name| (*name, None)).collect::<Vec<Step<'_>>>())
}

/// The value of an element, where it is there and says something.
fn value<T>(from: &Element, way: &[&str], expected: &str, read: impl Fn(&str) -> Option<T>) -> Read<T> {
    let Some(found) = find(from, way)?.filter(|found| !found.text.is_empty()) else { return Ok(None) };
    let wrong = || Problem { at: found.whole.start, what: format!("<{}> is {:?}, expected {expected}", found.name, found.text) };
    read(&found.text).map(Some).ok_or_else(wrong)
}

fn number(from: &Element, way: &[&str], range: std::ops::RangeInclusive<u64>) -> Read<u64> {
    let expected = format!("a number from {} to {}", range.start(), range.end());
    value(from, way, &expected, |text| text.parse().ok().filter(|number| range.contains(number)))
}

fn truth(from: &Element, way: &[&str]) -> Read<bool> {
    value(from, way, "true or false", |text| text.to_ascii_lowercase().parse().ok())
}

fn policy(from: &Element, name: &str) -> Read<Policy> {
    value(from, &[name], "report or pause", |text| match text {
        "report" => Some(Policy::Report),
        "pause" => Some(Policy::Pause),
        _ => None,
    })
}

/// Without control characters: paths are shown, and may be a stranger's.
fn path(from: &Element, way: &[&str], folder: &Path) -> Read<PathBuf> {
    value(from, way, "a path", |text| is_plain(text).then(|| inside(folder, text)))
}

fn is_plain(text: &str) -> bool {
    !text.contains(char::is_control)
}

/// A path from a folder on, as one would type it.
fn inside(folder: &Path, text: &str) -> PathBuf {
    if folder == Path::new(".") { text.into() } else { folder.join(text) }
}

/// What a document says; its paths begin at `folder`.
pub fn read(root: &Element, folder: &Path) -> Result<Config, Problem> {
    let at_end = value(root, &AT_END, "commit, discard or keep", |text| match text {
        "commit" => Some(AtEnd::Commit),
        "discard" => Some(AtEnd::Discard),
        "keep" => Some(AtEnd::Keep),
        _ => None,
    })?;
    Ok(Config {
        memory: number(root, &MEMORY, 1..=1 << 24)?.map(|mebibytes| mebibytes << 20),
        cpus: number(root, &CPUS, 1..=u64::from(crate::life::MAX_CPUS))?.map(|cpus| cpus as u8),
        kernel: path(root, &KERNEL, folder)?,
        initrd: path(root, &INITRD, folder)?,
        append: value(root, &APPEND, "text", |text| Some(text.to_owned()))?,
        serial: value(root, &SERIAL, "stdio, none or unix:PATH", |text| {
            is_plain(text).then(|| Serial::from_text(text, folder))?
        })?,
        undo: truth(root, &UNDO)?,
        at_end,
        low_space: number(root, &LOW_SPACE, 0..=u64::MAX)?,
        state_file: path(root, &STATE, folder)?,
        on_event: path(root, &ON_EVENT, folder)?,
        disks: disks(root, folder)?,
    })
}

fn disks(root: &Element, folder: &Path) -> Result<Vec<DiskConfig>, Problem> {
    let mut disks: Vec<DiskConfig> = Vec::new();
    let Some(bus) = find(root, &BUS)? else { return Ok(disks) };
    for location in bus.children.iter().filter(|child| child.name == LOCATION) {
        let at = location.whole.start;
        let disk = disk(location, folder)?;
        if disks.iter().any(|other| other.position == disk.position) {
            return Err(Problem { at, what: format!("there is a disk at position {} already", disk.position) });
        }
        disks.push(disk);
    }
    disks.sort_by_key(|disk| disk.position);
    Ok(disks)
}

fn disk(location: &Element, folder: &Path) -> Result<DiskConfig, Problem> {
    let wrong = |what: String| Problem { at: location.whole.start, what };
    let id = location.attribute("id").unwrap_or_default();
    let position = id.trim().parse().ok().filter(|id| usize::from(*id) < MAX_DISKS);
    let expected = || wrong(format!("<location> has the id {id:?}, expected one from 0 to {}", MAX_DISKS - 1));
    let position: u8 = position.ok_or_else(expected)?;
    let image = match path(location, &["pathname", "relative"], folder)? {
        Some(image) => Some(image),
        None => path(location, &["pathname", "absolute"], folder)?,
    };
    let missing = || wrong("<location> has neither pathname/relative nor pathname/absolute, so it has no disk".into());
    let fits = |text: &str| Some(text.to_owned()).filter(|text| text.len() <= ID_LEN);
    Ok(DiskConfig {
        position,
        image: image.ok_or_else(missing)?,
        serial_number: value(location, &["serial_number"], &format!("{ID_LEN} bytes at most"), fits)?,
        queues: number(location, &["queues"], 1..=16)?.map(|queues| queues as u16),
        read_only: truth(location, &["read_only"])?,
        on_error: policy(location, "on_error")?,
        on_no_space: policy(location, "on_no_space")?,
    })
}

/// Elements of this monitor's own parts that it does not know: a slip of the pen would pass unseen there.
pub fn unknown(root: &Element) -> Vec<Problem> {
    let mut found = Vec::new();
    let mut look = |parent: &Element, known: &[&str]| {
        for child in parent.children.iter().filter(|child| !known.contains(&child.name.as_str())) {
            let what = format!("<{}> in <{}> is not known here and counts for nothing", child.name, parent.name);
            found.push(Problem { at: child.whole.start, what });
        }
    };
    if let Ok(Some(boot)) = find(root, &["boot"]) {
        look(boot, &["kernel", "initrd", "append"]);
    }
    if let Ok(Some(bus)) = find(root, &BUS) {
        look(bus, &[LOCATION]);
        for location in bus.children.iter().filter(|child| child.name == LOCATION) {
            look(location, &[&OF_DISK[..], &["pathname"]].concat());
        }
    }
    found
}

/// Locations of a document that a configuration has no more, each removed as a whole.
pub fn gone(document: &Document, config: &Config) -> Vec<Vec<(String, Option<u8>)>> {
    let there = (0..MAX_DISKS as u8).filter(|id| config.disks.iter().all(|disk| disk.position != *id));
    there.map(location).filter(|way| matches!(document.root().find(&super::steps(way)), Ok(Some(_)))).collect()
}

fn location(position: u8) -> Vec<(String, Option<u8>)> {
    way(&BUS).into_iter().chain([(LOCATION.to_owned(), Some(position))]).collect()
}

fn way(names: &[&str]) -> Vec<(String, Option<u8>)> {
    names.iter().map(|name| ((*name).to_owned(), None)).collect()
}

/// All that a configuration says, as a document has it.
pub fn texts(config: &Config, folder: &Path) -> Result<Vec<(Field, String)>, Error> {
    let mut texts = Vec::new();
    let mut say = |names: &[&str], kind: &'static str, text: Option<String>| {
        texts.extend(text.map(|text| (Field { way: way(names), kind }, text)));
    };
    let memory = config.memory.map(whole_mebibytes).transpose()?;
    say(&MEMORY, "integer", memory);
    say(&CPUS, "integer", config.cpus.map(|cpus| cpus.to_string()));
    say(&SERIAL, "string", config.serial.as_ref().map(|serial| serial.text(folder)).transpose()?);
    say(&KERNEL, "string", config.kernel.as_deref().map(|path| path_text(path, folder)).transpose()?);
    say(&INITRD, "string", config.initrd.as_deref().map(|path| path_text(path, folder)).transpose()?);
    say(&APPEND, "string", config.append.clone());
    say(&UNDO, "boolean", config.undo.map(|undo| undo.to_string()));
    say(&AT_END, "string", config.at_end.map(|at_end| at_end.name().to_owned()));
    say(&LOW_SPACE, "integer", config.low_space.map(|bytes| bytes.to_string()));
    say(&STATE, "string", config.state_file.as_deref().map(|path| path_text(path, folder)).transpose()?);
    say(&ON_EVENT, "string", config.on_event.as_deref().map(|path| path_text(path, folder)).transpose()?);
    for disk in &config.disks {
        texts.extend(disk_texts(disk, folder)?);
    }
    Ok(texts)
}

fn disk_texts(disk: &DiskConfig, folder: &Path) -> Result<Vec<(Field, String)>, Error> {
    let image = path_text(&disk.image, folder)?;
    let kind_of_path = if Path::new(&image).is_absolute() { "absolute" } else { "relative" };
    let said: [(&[&str], &'static str, Option<String>); 6] = [
        (&["pathname", kind_of_path], "string", Some(image)),
        (&["serial_number"], "string", disk.serial_number.clone()),
        (&["queues"], "integer", disk.queues.map(|queues| queues.to_string())),
        (&["read_only"], "boolean", disk.read_only.map(|read_only| read_only.to_string())),
        (&["on_error"], "string", disk.on_error.map(|policy| policy.name().to_owned())),
        (&["on_no_space"], "string", disk.on_no_space.map(|policy| policy.name().to_owned())),
    ];
    let fields = said.into_iter().filter_map(|(names, kind, text)| {
        let way = location(disk.position).into_iter().chain(way(names)).collect();
        Some((Field { way, kind }, text?))
    });
    Ok(fields.collect())
}

fn whole_mebibytes(bytes: u64) -> Result<String, Error> {
    if bytes % (1 << 20) != 0 {
        let message = format!("{bytes} bytes of memory: a configuration counts in whole MiB");
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    Ok((bytes >> 20).to_string())
}

/// A path as a document has it: from its folder on where it is in there, else from the root on.
fn path_text(path: &Path, folder: &Path) -> Result<String, Error> {
    let failed = |error: std::io::Error| Error::io(error, "can't be told by its whole path").at(path);
    let (whole, folder) = (std::path::absolute(path).map_err(failed)?, std::path::absolute(folder).map_err(failed)?);
    let told = whole.strip_prefix(&folder).unwrap_or(&whole);
    let text = told.to_str().filter(|text| !text.contains(char::is_control) && text.trim() == *text);
    let wrong = || {
        let message = "its path can't be told in XML: it is not UTF-8, has control characters, or begins or ends with a space";
        Error::new(ErrorKind::InvalidInput, message).at(path)
    };
    text.map(str::to_owned).ok_or_else(wrong)
}

impl AtEnd {
    fn name(self) -> &'static str {
        match self {
            Self::Commit => "commit",
            Self::Discard => "discard",
            Self::Keep => "keep",
        }
    }
}

impl Serial {
    /// What a word says; a socket's path begins at `folder`.
    #[must_use]
    pub fn from_text(text: &str, folder: &Path) -> Option<Self> {
        match text {
            "stdio" => Some(Self::Stdio),
            "none" => Some(Self::None),
            _ => text.strip_prefix("unix:").filter(|path| !path.is_empty()).map(|path| Self::Unix(inside(folder, path))),
        }
    }

    fn text(&self, folder: &Path) -> Result<String, Error> {
        Ok(match self {
            Self::Stdio => "stdio".to_owned(),
            Self::None => "none".to_owned(),
            Self::Unix(path) => format!("unix:{}", path_text(path, folder)?),
        })
    }
}
