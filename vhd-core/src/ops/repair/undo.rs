//! Doing a repair, and taking it back: the journal first, then the image.

use std::ffi::OsString;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Repair;
use super::journal::{self, Draft, Journal, MAGIC};
use crate::chain::ChainOptions;
use crate::error::{Error, ErrorKind, Result};
use crate::intent::{self, InPlace, Intent, Work};
use crate::progress::Progress;
use crate::storage::{Access, Beneath, FileStorage, Host, LockMode, Overlay, Storage, folder_of, open_beneath};

const SUFFIX: &str = ".vhd-repair-undo";
/// Journals of one image at most; more is somebody's mistake.
const MAX_JOURNALS: usize = 100;

/// Where an image's journals are: with the file itself, whatever link leads to it.
fn path_of(image: &Path, number: usize) -> Result<PathBuf> {
    let real = std::fs::canonicalize(image).map_err(|error| Error::io(error, "can't be resolved").at(image))?;
    let mut name = OsString::from(real.file_name().unwrap_or_default());
    name.push(SUFFIX);
    if number > 1 {
        name.push(format!(".{number}"));
    }
    Ok(real.with_file_name(name))
}

/// The names that journals of an image have.
fn paths_of(image: &Path) -> Result<Vec<PathBuf>> {
    (1..=MAX_JOURNALS).map(|number| path_of(image, number)).collect()
}

/// A link that leads nowhere is something, too.
fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// The last journal of an image.
fn last_of(image: &Path) -> Result<Option<PathBuf>> {
    Ok(paths_of(image)?.into_iter().rev().find(|path| is_there(path)))
}

/// The journal that the record of a repair names. It must have one of the names that this program gives for the image.
fn named(image: &Path, name: &Path) -> Result<(PathBuf, Journal)> {
    let Some(path) = paths_of(image)?.into_iter().find(|path| path.file_name() == Some(name.as_os_str())) else {
        let message = format!("its intent record names the journal {name:?}, which is none of this image: it is not looked at");
        return Err(Error::new(ErrorKind::Refused, message).at(image));
    };
    let journal = journal::open(&path)?.ok_or_else(|| {
        let message = "is the journal of a repair that was interrupted, and is not there; put it back, or take the image as it is: vhd check --clear-record";
        Error::new(ErrorKind::Refused, message).at(&path)
    })?;
    Ok((path, journal))
}

/// Refuses what has the name of a journal and can be none: a folder, a FIFO, a link.
pub(super) fn refuse_irregular(image: &Path) -> Result<()> {
    paths_of(image)?.iter().filter(|path| is_there(path)).try_for_each(|path| {
        let name = Path::new(path.file_name().unwrap_or_default());
        open_beneath(folder_of(path), name, Beneath::NoLinks).map(drop)
    })
}

/// Puts back what an interrupted repair changed, from the journal that its record names.
pub(super) fn put_back(storage: &dyn Storage, image: &Path, name: &Path) -> Result<()> {
    let (path, journal) = named(image, name)?;
    journal.prove(storage).map_err(|error| error.at(&path))?;
    let found = || Ok(journal.compare(storage)?.other.or(journal.cuts_off(storage)?));
    if let Some(what) = found().map_err(|error: Error| error.at(image))? {
        let message = format!(
            "{what}: it was written since its repair was interrupted, or power failed meanwhile; vhd check --undo-repair --force \
             puts the old bytes back all the same"
        );
        return Err(Error::new(ErrorKind::Refused, message).at(image));
    }
    journal.put_back(storage, &Progress::default()).map_err(|error| error.at(image))
}

/// Writes the changes of a repair to the image, its journal first. Returns where that is; nothing when nothing changes.
pub(super) fn execute(
    overlay: &Arc<Overlay>,
    image: &Path,
    repair: &Repair,
    host: &dyn Host,
    progress: &Progress,
) -> Result<Option<PathBuf>> {
    let base = &**overlay.base();
    let failed = |error| Error::io(error, "can't be repaired").at(image);
    let (before, after) = (base.len().map_err(failed)?, overlay.len().map_err(failed)?);
    let changes = overlay.changes().map_err(failed)?;
    if changes.is_empty() && before == after {
        return Ok(None);
    }
    // Read once for the journal, written once.
    progress.set_total(changes.iter().map(|range| (range.end - range.start) * 2).sum());
    remove_unused(base, image, host)?;
    let path = paths_of(image)?.into_iter().find(|path| !is_there(path)).ok_or_else(|| {
        Error::new(ErrorKind::Exists, "has a hundred undo journals of repairs beside it; remove those that nobody needs")
            .at(image)
    })?;
    let draft = Draft { images: [base, &**overlay], written: &changes, changes: &repair.changes };
    let begin = || {
        put(host, &path, image, &|file| draft.write(file, progress))?;
        let name = path.file_name().map(PathBuf::from).unwrap_or_default();
        let begun = intent::put(host, image, &Intent::InPlace(InPlace { uuid: None, work: Work::Repair(name) }));
        // The record may have its name already, and must not outlive the journal.
        begun.inspect_err(|_| drop(intent::remove(host, image).and_then(|()| host.remove(&path))))
    };
    match begin() {
        // Zeros that it cuts off are the same as holes: the host gets their room first, and that is enough for what is kept.
        Err(error) if error.kind() == ErrorKind::NoSpace && after < before => {
            give_back_zeros(base, after..before).map_err(|error| error.at(image))?;
            begin().map_err(|error| no_room(error, image, &changes, before - after))?;
        }
        begun => begun.map_err(|error| no_room(error, image, &changes, 0))?,
    }
    if after != before {
        base.set_len(after).map_err(failed)?;
    }
    // From the end: blocks are copied to behind where they are, so each is read before anything is written over it.
    let mut buffer = Vec::new();
    for (at, len) in changes.iter().rev().flat_map(|range| journal::chunks(range).rev()) {
        buffer.resize(len, 0);
        overlay.read_at(&mut buffer, at).map_err(failed)?;
        let written = base.write_at(&buffer, at);
        written.map_err(|error| Error::io(error, format!("can't be repaired at {at:#x}")).at(image))?;
        progress.advance(len as u64)?;
    }
    base.sync().map_err(failed)?;
    intent::remove(host, image)?;
    Ok(Some(path))
}

/// Gives the host back the room of zeros in a range: what it reads stays the same.
fn give_back_zeros(base: &dyn Storage, range: Range<u64>) -> Result<()> {
    let (mut zeros_from, mut failure) = (range.start, Ok(()));
    let punch = |zeros: Range<u64>| if zeros.is_empty() { Ok(()) } else { base.punch_hole(zeros) };
    journal::for_data(base, range.clone(), &mut |at, bytes| {
        failure = punch(zeros_from..at);
        zeros_from = at + bytes.len() as u64;
        failure.is_ok()
    })?;
    let done = failure.and_then(|()| punch(zeros_from..range.end));
    done.map_err(|error| Error::io(error, "can't give back space that nothing names"))
}

/// Says what room is missing, where that is why a repair is not done.
fn no_room(error: Error, image: &Path, changes: &[Range<u64>], cut: u64) -> Error {
    if error.kind() != ErrorKind::NoSpace {
        return error;
    }
    let needed: u64 = changes.iter().map(|range| range.end - range.start).sum::<u64>() + cut;
    let advice = if cut > 0 { "; vhd compact gives space back without keeping what was there" } else { "" };
    let message =
        format!("can't be repaired: what it changes is kept beside it first, up to {needed} bytes, and there is no room{advice}");
    Error::new(ErrorKind::NoSpace, message).at(image)
}

/// Puts a new journal at `path` for good. It holds what the image does, so nobody may read it who may not read that.
fn put(host: &dyn Host, path: &Path, image: &Path, write: &dyn Fn(&dyn Storage) -> Result<()>) -> Result<()> {
    let mut passing = path.file_name().unwrap_or_default().to_owned();
    passing.push(".new");
    let passing = path.with_file_name(passing);
    remove_abandoned(host, &passing)?;
    let made = || {
        let file = host.create(&passing)?;
        write(&*file)?;
        file.sync().map_err(|error| Error::io(error, "can't be written"))?;
        Access::of(image).give(&passing)?;
        host.rename_new(&passing, path)?;
        host.sync_folder(folder_of(path))
    };
    made().map_err(|error| error.about(path)).inspect_err(|_| drop(host.remove(&passing)))
}

/// Removes what a killed repair left under the name that its journal bears until it is complete.
fn remove_abandoned(host: &dyn Host, passing: &Path) -> Result<()> {
    let name = Path::new(passing.file_name().unwrap_or_default());
    let Some(file) = open_beneath(folder_of(passing), name, Beneath::NoLinks)? else { return Ok(()) };
    let file = FileStorage::from_file(file, passing)?;
    let failed = |error| Error::io(error, "can't be read").at(passing);
    let mut start = vec![0; file.len().map_err(failed)?.min(MAGIC.len() as u64) as usize];
    file.read_at(&mut start, 0).map_err(failed)?;
    // The first line is written last.
    if start != MAGIC.as_bytes() && start.iter().any(|byte| *byte != 0) {
        let message = "is in the way of the journal of a repair, and not what an interrupted one left; move it away";
        return Err(Error::new(ErrorKind::Exists, message).at(passing));
    }
    host.remove(passing)
}

/// Removes the last journal where it holds what the image has: its repair never began, or was put back already.
fn remove_unused(storage: &dyn Storage, image: &Path, host: &dyn Host) -> Result<()> {
    let Some(path) = last_of(image)? else { return Ok(()) };
    // One that can't be read is left to its owner.
    let Some(journal) = journal::open(&path).ok().flatten() else { return Ok(()) };
    if journal.prove(storage).is_err() || !journal.is_put_back(storage).map_err(|error| error.at(image))? {
        return Ok(());
    }
    // Should a power cut bring it back, it is as unused as it was; once the new one is durable so is this.
    host.remove(&path)
}

/// Undoes the last repair of the image at `path`: the original bytes are put back, and the journal is removed. Returns what the
/// repair had changed.
///
/// # Errors
/// `InvalidInput` without a journal; `Refused` when the image is another, or was changed since, the latter but with `force`; as the
/// host fails; `Cancelled`, when the same call goes on.
pub fn undo_repair(path: &Path, force: bool, chain: &ChainOptions, progress: &Progress) -> Result<Vec<String>> {
    let file = Arc::new(FileStorage::open(path, true)?);
    file.lock(LockMode::Write)?;
    let storage = chain.host.adopt(file);
    let host = &*chain.host;
    let (journal_path, journal, has_record) = match intent::find(path)? {
        // Of a repair under way, the one that it names.
        Some(Intent::InPlace(InPlace { work: Work::Repair(name), .. })) => {
            let (journal_path, journal) = named(path, &name)?;
            (journal_path, journal, true)
        }
        Some(_) => {
            return Err(intent::explain(path, Error::new(ErrorKind::Refused, "is in the hands of another operation").at(path)));
        }
        None => {
            let found = last_of(path)?.map(|found| Ok((journal::open(&found)?, found))).transpose()?;
            let Some((Some(journal), journal_path)) = found else {
                return Err(Error::new(ErrorKind::InvalidInput, "has no undo journal of a repair beside it").at(path));
            };
            (journal_path, journal, false)
        }
    };
    journal.prove(&*storage).map_err(|error| error.at(&journal_path))?;
    let is_put_back = journal.is_put_back(&*storage).map_err(|error| error.at(path))?;
    if !is_put_back && !force {
        refuse_changed(&journal, &*storage, path)?;
    }
    // An undo that was interrupted came this far.
    if !has_record && !is_put_back {
        let name = journal_path.file_name().map(PathBuf::from).unwrap_or_default();
        intent::put(host, path, &Intent::InPlace(InPlace { uuid: None, work: Work::Repair(name) }))?;
    }
    progress.set_total(journal.kept_len());
    journal.put_back(&*storage, progress).map_err(|error| error.at(path))?;
    intent::remove(host, path)?;
    host.remove(&journal_path)?;
    host.sync_folder(folder_of(&journal_path))?;
    Ok(journal.changes().to_vec())
}

fn refuse_changed(journal: &Journal, storage: &dyn Storage, image: &Path) -> Result<()> {
    let found = || Ok(journal.compare(storage)?.other.or(journal.cuts_off(storage)?));
    let Some(what) = found().map_err(|error: Error| error.at(image))? else { return Ok(()) };
    let message = format!("{what}: it was written since, which would be lost; --force puts the old bytes back all the same");
    Err(Error::new(ErrorKind::Refused, message).at(image))
}
