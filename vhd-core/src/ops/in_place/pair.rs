//! The old file and the new one, and the content that moves from one to the other.

use std::ffi::OsString;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use super::raw::new_footer;
use super::{ConvertedInPlace, InPlaceOptions, command};
use crate::block::Disk;
use crate::chain::{Chain, ChainOptions, Layer, RawFile, refuse_linked};
use crate::error::{Error, ErrorKind, Result, fail};
use crate::format::{DiskType, Footer, NewFooter, SECTOR, Stage};
use crate::image::{CreateOptions, Footers, Image, NewKind, OpenOptions, Staged, create, refusal};
use crate::intent::{self, InPlace, Intent, Move, Work};
use crate::ops::copy::{copy_nonzero, is_zero};
use crate::progress::Progress;
use crate::storage::{Beneath, FileStorage, LockMode, Storage, folder_of, open_beneath};

/// What the new file's name ends with, until it has the old one's.
const SUFFIX: &str = ".vhd-converting";
/// Files of a folder that are looked at for the new file, where the old one was renamed.
const MAX_SEARCHED: usize = 10_000;
/// Bytes that are looked at in a file that may be one of ours.
const MAX_LOOKED_AT: u64 = 1 << 20;

/// A conversion: the file that is converted, and where its content goes.
pub(super) struct Pair<'a> {
    path: &'a Path,
    chain: &'a ChainOptions,
    /// The old file, locked.
    old: Arc<dyn Storage>,
    to: DiskType,
    kind: &'static str,
    /// Bytes of the raw file that it was, as far as that is known.
    raw_len: Option<u64>,
    state: State,
}

/// How far the files came.
enum State {
    /// The old file is what it was.
    New {
        /// Its footer; one that is made for a raw file.
        footer: Footer,
        /// Bytes of a raw file.
        raw_len: Option<u64>,
        disk: Disk,
    },
    /// The old file bears its mark, and its content moves to this one.
    Begun { footer: Footer, new: PathBuf },
    /// All is done but that the record is there.
    Done { size: u64 },
}

impl<'a> Pair<'a> {
    /// Opens the file at `path`, and finds out from it and its counterpart how far they came.
    pub(super) fn open(path: &'a Path, record: Option<Move>, options: &InPlaceOptions, chain: &'a ChainOptions) -> Result<Self> {
        let invalid = |kind, message: &str| Err(Error::new(kind, message).at(path));
        let file = Arc::new(FileStorage::open(path, true)?);
        file.lock(LockMode::Write)?;
        if !file.can_grow() {
            return invalid(
                ErrorKind::Unsupported,
                "is a device, beside which there is no room; vhd convert makes an image elsewhere",
            );
        }
        if std::fs::metadata(path).map_err(|error| Error::io(error, "can't be opened").at(path))?.nlink() > 1 {
            return invalid(ErrorKind::Unsupported, "has other names (hard links), which would keep the old content");
        }
        if path.file_name().is_some_and(|name| name.to_str().is_none()) {
            return invalid(
                ErrorKind::InvalidInput,
                "its name is not UTF-8, so the record of a conversion can't hold it; rename it",
            );
        }
        let old = chain.host.adopt(file);
        let footers = Footers::read(&*old).map_err(|error| Error::io(error, "can't be read").at(path))?;
        let raw_len = record.as_ref().and_then(|record| record.len);
        let begun = |kind, state| Ok(Self { path, chain, old: Arc::clone(&old), to: options.to, kind, raw_len, state });
        match footers.stage() {
            Some((Stage::ConvertSource, footer)) => {
                let kind = footer.disk_type().name();
                let new = counterpart(path, &footer, options.to)?;
                begun(kind, State::Begun { footer, new })
            }
            Some((stage, footer)) => Err(refusal(path, stage, &footer)),
            None => {
                let (kind, state) = unmarked(path, &old, record, options, chain)?;
                begun(kind, state)
            }
        }
    }

    /// What is to be done.
    pub(super) fn planned(&self) -> Result<ConvertedInPlace> {
        let (size, data, resumed) = match &self.state {
            State::New { disk, .. } => (disk.size(), data_of(disk)?, false),
            State::Begun { footer, .. } => {
                let source = self.source(footer)?;
                (source.size(), data_of(&source)?, true)
            }
            State::Done { size } => (*size, 0, true),
        };
        Ok(ConvertedInPlace { from: self.kind, size, data, resumed })
    }

    /// Does it.
    pub(super) fn run(&mut self, options: &InPlaceOptions, progress: &Progress) -> Result<()> {
        if let State::New { .. } = self.state {
            self.begin(options)?;
        }
        if let State::Begun { footer, new } = &self.state {
            self.fill(footer, new, options, progress)?;
            self.chain.host.rename(new, self.path)?;
            // While the record is there the same call still finds what a power cut left of it.
            self.chain.host.sync_folder(folder_of(self.path))?;
        }
        intent::remove(&*self.chain.host, self.path)
    }

    /// Makes the new file, empty, then the record; and marks both files.
    fn begin(&mut self, options: &InPlaceOptions) -> Result<()> {
        let State::New { footer, raw_len, .. } = &self.state else { return Ok(()) };
        let (mut footer, raw_len) = (footer.clone(), *raw_len);
        self.raw_len = raw_len;
        if footer.uuid() == [0; 16] {
            // The two files know each other by it.
            footer.set_uuid(Uuid::new_v4().into_bytes());
        }
        let new = passing_name(self.path);
        remove_left(&new, self.chain)?;
        self.make(&new, &footer, options)?;
        let moving = Move {
            to: options.to.name().into(),
            new: new.file_name().map(PathBuf::from).unwrap_or_default(),
            block_size: Some(options.block_size),
            len: raw_len,
            becomes: Some(Uuid::from_bytes(footer.uuid())),
            ..Move::default()
        };
        // The name of the new file is durable with that of the record.
        intent::put(&*self.chain.host, self.path, &record(&footer, &moving))?;
        let at = |error: Error| error.at(self.path);
        match raw_len {
            Some(_) => append_mark(&*self.old, &footer).map_err(at)?,
            None => {
                // Mended first: both footers must be sound when they are marked.
                let open =
                    OpenOptions { writable: true, force: options.force, background_flush: None, ..self.chain.image.clone() };
                Image::open(Arc::clone(&self.old), self.path, &open)?.close()?;
                Staged::mark(&*self.old, Stage::ConvertSource, |found| found.set_uuid(footer.uuid())).map_err(at)?;
            }
        }
        self.old.sync().map_err(|error| Error::io(error, "can't be synced").at(self.path))?;
        self.state = State::Begun { footer, new };
        Ok(())
    }

    /// Makes the new file, with its mark from the first byte on.
    fn make(&self, new: &Path, footer: &Footer, options: &InPlaceOptions) -> Result<()> {
        let kind = if options.to == DiskType::Fixed { NewKind::Fixed { preallocate: false } } else { NewKind::Dynamic };
        let make = CreateOptions {
            kind,
            size: footer.current_size(),
            block_size: options.block_size,
            // An image stays the same image: its children find it.
            uuid: footer.uuid(),
            creator: footer.creator(),
            timestamp: footer.timestamp(),
        };
        let file = self.chain.host.create(new)?;
        let permissions = std::fs::metadata(self.path).map(|found| found.permissions());
        let given = permissions.and_then(|permissions| std::fs::set_permissions(new, permissions));
        given.map_err(|error| Error::io(error, "can't be given the permissions of the old file").at(new))?;
        if options.to != DiskType::Fixed {
            // What is found of it after a power cut says from the first byte on whose it is.
            let new_footer = NewFooter {
                disk_type: options.to,
                size: make.size,
                uuid: make.uuid,
                creator: make.creator,
                timestamp: make.timestamp,
            };
            let marked = file.write_at(&Stage::ConvertTarget.mark(&Footer::new(&new_footer)), 0).and_then(|()| file.sync());
            marked.map_err(|error| Error::io(error, format!("can't be written at {:#x}", 0)).at(new))?;
        }
        let made = create(&*Staged::over(Arc::clone(&file), Stage::ConvertTarget, options.to), &make);
        made.map_err(|error| error.at(new))?;
        file.sync().map_err(|error| Error::io(error, "can't be synced").at(new))
    }

    fn tell(&self, footer: &Footer, moving: &Move) -> Result<()> {
        intent::tell(&*self.chain.host, self.path, &record(footer, moving))
    }

    /// The old file, which bears its mark, as a disk.
    fn source(&self, footer: &Footer) -> Result<Disk> {
        let staged = Staged::over(Arc::clone(&self.old), Stage::ConvertSource, footer.disk_type());
        let look = OpenOptions { writable: false, ..self.chain.image.clone() };
        Ok(Disk::new(Chain::of(Layer::Image(Image::open(staged, self.path, &look)?))))
    }

    /// Moves what is left, and makes an image of the new file.
    fn fill(&self, footer: &Footer, new: &Path, options: &InPlaceOptions, progress: &Progress) -> Result<()> {
        let source = self.source(footer)?;
        let file = Arc::new(FileStorage::open(new, true)?);
        file.lock(LockMode::Write)?;
        let file = self.chain.host.adopt(file);
        let footers = Footers::read(&*file).map_err(|error| Error::io(error, "can't be read").at(new))?;
        if footers.stage().is_none() {
            // It was finished, but for its name. What the old file still holds, it has; that is seen again.
            Staged::mark(&*file, Stage::ConvertTarget, |_| ()).map_err(|error| error.at(new))?;
        }
        let open = OpenOptions { writable: true, background_flush: None, ..OpenOptions::default() };
        let staged = Staged::over(Arc::clone(&file), Stage::ConvertTarget, self.to);
        let target = Disk::new(Chain::of(Layer::Image(Image::open(staged, new, &open)?)));
        if target.size() != source.size() {
            let message = format!("has a disk of {} bytes, the image whose content it takes {}", target.size(), source.size());
            return Err(Error::new(ErrorKind::Refused, message).at(new));
        }
        let mut moving = Move {
            to: self.to.name().into(),
            new: new.file_name().map(PathBuf::from).unwrap_or_default(),
            block_size: Some(options.block_size),
            len: self.raw_len,
            becomes: Some(Uuid::from_bytes(footer.uuid())),
            ..Move::default()
        };
        progress.set_total(source.size());
        while moving.done < source.size() {
            let range = moving.done..(moving.done + options.piece).min(source.size());
            copy_nonzero(&source, &target, range.clone(), progress)?;
            target.flush()?;
            moving.done = range.end;
            self.tell(footer, &moving)?;
            self.give_back(&source, range)?;
        }
        target.close()?;
        moving.finishing = true;
        self.tell(footer, &moving)?;
        Staged::finish(&*file, |_| ()).map_err(|error| error.at(new))
    }

    /// Gives the space of a range back to the host.
    fn give_back(&self, source: &Disk, range: Range<u64>) -> Result<()> {
        for extent in source.extents_in(range)? {
            if let Some(offset) = extent.offset {
                let emptied = self.old.punch_hole(offset..offset + (extent.range.end - extent.range.start));
                emptied.map_err(|error| Error::io(error, format!("can't be emptied at {offset:#x}")).at(self.path))?;
            }
        }
        Ok(())
    }
}

fn record(footer: &Footer, moving: &Move) -> Intent {
    let uuid = moving.len.is_none().then(|| Uuid::from_bytes(footer.uuid()));
    Intent::InPlace(InPlace { uuid, work: Work::Convert(moving.clone()) })
}

/// What a file without a mark is: one that nothing was done to, one that a former version has in hand, or one that is done.
fn unmarked(
    path: &Path,
    old: &Arc<dyn Storage>,
    record: Option<Move>,
    options: &InPlaceOptions,
    chain: &ChainOptions,
) -> Result<(&'static str, State)> {
    let invalid = |kind, message: String| Err(Error::new(kind, message).at(path));
    let footers = Footers::read(&**old).map_err(|error| Error::io(error, "can't be read").at(path))?;
    if let (Some(becomes), Ok((footer, _))) = (record.as_ref().and_then(|record| record.becomes), footers.authority(false))
        && footer.uuid() == becomes.into_bytes()
        && footer.disk_type() == options.to
    {
        return Ok(("another type", State::Done { size: footer.current_size() }));
    }
    let is_raw = super::is_raw(path, super::begun(path, options)?.as_ref(), options)?;
    if is_raw {
        let raw_len = raw_len(path, old, record.as_ref())?;
        let footer = new_footer(path, raw_len)?;
        if let Some(new) = former(path, record.as_ref(), None, options.to)? {
            let footer = with_uuid_of(&new, footer)?;
            append_mark(&**old, &footer).and_then(|()| sync(&**old)).map_err(|error| error.at(path))?;
            return Ok(("raw", State::Begun { footer, new }));
        }
        let raw = Arc::new(RawFile::new(Arc::clone(old), path, true)?);
        let disk = Disk::new(Chain::of(Layer::Raw(raw)));
        return Ok(("raw", State::New { footer, raw_len: Some(raw_len), disk }));
    }
    let look = OpenOptions { writable: false, ..chain.image.clone() };
    let image = Image::open(Arc::clone(old), path, &look).map_err(|error| intent::explain(path, error))?;
    let (footer, kind) = (image.footer().clone(), image.footer().disk_type());
    refuse_linked(&image, "is only read")?;
    if kind == DiskType::Differencing {
        let message = "has a parent, so another file must take both: vhd convert without --in-place, or vhd merge";
        return invalid(ErrorKind::Unsupported, message.into());
    }
    if kind == options.to {
        if record.is_some() {
            return Ok(("another type", State::Done { size: image.size() }));
        }
        return invalid(ErrorKind::InvalidInput, format!("is a {} disk already", kind.name()));
    }
    if footer.saved_state() && !options.force {
        let message = "a virtual machine's saved state relies on it; restore or discard that, or use --force";
        return invalid(ErrorKind::Refused, message.into());
    }
    if let Some(new) = former(path, record.as_ref(), Some(footer.uuid()), options.to)? {
        drop(image);
        Staged::mark(&**old, Stage::ConvertSource, |_| ()).and_then(|()| sync(&**old)).map_err(|error| error.at(path))?;
        return Ok((kind.name(), State::Begun { footer, new }));
    }
    let disk = Disk::new(Chain::of(Layer::Image(image)));
    Ok((kind.name(), State::New { footer, raw_len: None, disk }))
}

/// Bytes of a raw file. What an interrupted call put behind it for its mark is cut off.
fn raw_len(path: &Path, old: &Arc<dyn Storage>, record: Option<&Move>) -> Result<u64> {
    let failed = |error| Error::io(error, "can't be read").at(path);
    let len = old.len().map_err(failed)?;
    let Some(before) = record.and_then(|record| record.len) else { return Ok(len) };
    if len <= before || len > before.next_multiple_of(SECTOR) + SECTOR {
        return Ok(len);
    }
    let mut added = vec![0; (len - before) as usize];
    old.read_at(&mut added, before).map_err(failed)?;
    if !is_zero(&added) {
        return Ok(len);
    }
    old.set_len(before).map_err(failed)?;
    Ok(before)
}

fn sync(file: &dyn Storage) -> Result<()> {
    file.sync().map_err(|error| Error::io(error, "can't be synced"))
}

/// Puts a mark behind a raw file: to this operation it is a fixed disk from then on.
fn append_mark(file: &dyn Storage, footer: &Footer) -> Result<()> {
    let at = footer.current_size();
    let written = file.write_at(&Stage::ConvertSource.mark(footer), at);
    written.map_err(|error| Error::io(error, format!("can't be written at {at:#x}")))
}

/// The new file of a conversion that a former version of this program began, which marked neither file: it moved what the
/// record says, and left both as images.
fn former(path: &Path, record: Option<&Move>, uuid: Option<[u8; 16]>, to: DiskType) -> Result<Option<PathBuf>> {
    let Some(record) = record.filter(|record| record.done > 0 || record.finishing) else { return Ok(None) };
    let new = passing_name(path);
    if new.file_name() != Some(record.new.as_os_str()) {
        return Ok(None);
    }
    let Some(footers) = footers_of(&new)? else { return Ok(None) };
    let is_it = |footer: &Footer| uuid.is_none_or(|uuid| footer.uuid() == uuid) && footer.disk_type() == to;
    Ok(footers.authority(false).is_ok_and(|(footer, _)| is_it(&footer)).then_some(new))
}

fn with_uuid_of(new: &Path, mut footer: Footer) -> Result<Footer> {
    if let Some(uuid) = crate::chain::uuid_of_file(new)? {
        footer.set_uuid(uuid);
    }
    Ok(footer)
}

/// The footers of a regular file beside the image; `None` where there is no file.
fn footers_of(path: &Path) -> Result<Option<Footers>> {
    let name = Path::new(path.file_name().unwrap_or_default());
    let Some(file) = open_beneath(folder_of(path), name, Beneath::NoLinks)? else { return Ok(None) };
    let footers = Footers::read(&FileStorage::from_file(file, path)?);
    footers.map(Some).map_err(|error| Error::io(error, "can't be read").at(path))
}

/// The file that takes the content of the image at `path`, whose mark was made of `footer`: by its name, or else the one file
/// of its folder that has such a name and the image's identifier.
fn counterpart(path: &Path, footer: &Footer, to: DiskType) -> Result<PathBuf> {
    let uuid = footer.uuid();
    let expected = passing_name(path);
    let mut found = Vec::new();
    if is_counterpart(&expected, uuid) {
        found.push(expected.clone());
    } else {
        let entries =
            std::fs::read_dir(folder_of(path)).map_err(|error| Error::io(error, "can't be listed").at(folder_of(path)))?;
        for (count, entry) in entries.enumerate() {
            if count == MAX_SEARCHED {
                fail!(Refused, "the folder has more than {MAX_SEARCHED} files, too many to look for the file with its content");
            }
            let name = entry.map_err(|error| Error::io(error, "can't be listed").at(folder_of(path)))?.file_name();
            let other = path.with_file_name(&name);
            if name.as_encoded_bytes().ends_with(SUFFIX.as_bytes()) && is_counterpart(&other, uuid) {
                found.push(other);
            }
        }
    }
    let is_here = match &found[..] {
        [only] => only.clone(),
        [] => {
            let message = format!(
                "a part of its content was moved to {}, which is not in this folder; bring the two together again",
                expected.display()
            );
            return Err(Error::new(ErrorKind::Refused, message).at(path));
        }
        [first, second, ..] => {
            let message = format!("two files say that they hold its content: {} and {}", first.display(), second.display());
            return Err(Error::new(ErrorKind::Refused, message).at(path));
        }
    };
    let footers = footers_of(&is_here)?;
    let becomes = footers.and_then(|footers| as_target(&footers)).map(|footer| footer.disk_type());
    if becomes != Some(to) {
        let becomes = becomes.map_or("another type", DiskType::name);
        let message =
            format!("is being converted to {becomes}, not to {}; finish that first: {}", to.name(), command(path, becomes, None));
        return Err(Error::new(ErrorKind::Refused, message).at(path));
    }
    Ok(is_here)
}

fn is_counterpart(path: &Path, uuid: [u8; 16]) -> bool {
    let footer = footers_of(path).ok().flatten().and_then(|footers| as_target(&footers));
    footer.is_some_and(|footer| footer.uuid() == uuid)
}

/// The footer of a file that is, or will be, the result of a conversion.
fn as_target(footers: &Footers) -> Option<Footer> {
    match footers.stage() {
        Some((stage, footer)) => (stage == Stage::ConvertTarget).then_some(footer),
        None => footers.authority(false).ok().map(|(footer, _)| footer),
    }
}

/// The name that the new file bears until it is complete.
fn passing_name(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(SUFFIX);
    path.with_file_name(name)
}

/// Removes what a killed call made that never came to anything: a file of this name with the mark of one, or of zeros alone.
fn remove_left(new: &Path, chain: &ChainOptions) -> Result<()> {
    let name = Path::new(new.file_name().unwrap_or_default());
    let Some(file) = open_beneath(folder_of(new), name, Beneath::NoLinks)? else { return Ok(()) };
    let file = FileStorage::from_file(file, new)?;
    let failed = |error| Error::io(error, "can't be read").at(new);
    let footers = Footers::read(&file).map_err(failed)?;
    let is_ours = matches!(footers.stage(), Some((Stage::ConvertTarget, _))) || is_empty(&file).map_err(failed)?;
    if !is_ours {
        let message = "is in the way of a conversion in place, and was not made by one; move it away";
        return Err(Error::new(ErrorKind::Refused, message).at(new));
    }
    chain.host.remove(new)
}

/// Whether a file holds nothing but zeros; one with much to look at counts as one that does not.
fn is_empty(file: &FileStorage) -> std::io::Result<bool> {
    let (mut at, mut looked_at) = (0, 0);
    let mut buffer = vec![0; 64 << 10];
    while let Some(data) = file.next_data(at)? {
        let len = (data.end - data.start).min(buffer.len() as u64) as usize;
        file.read_at(&mut buffer[..len], data.start)?;
        looked_at += len as u64;
        if !is_zero(&buffer[..len]) || looked_at > MAX_LOOKED_AT {
            return Ok(false);
        }
        at = data.start + len as u64;
    }
    Ok(true)
}

fn data_of(disk: &Disk) -> Result<u64> {
    let extents = disk.extents_in(0..disk.size())?;
    let data = extents.iter().filter(|extent| !extent.state.reads_zero());
    Ok(data.map(|extent| extent.range.end - extent.range.start).sum())
}
