//! A guest that goes into a file, and comes back out of it or is forgotten.
//!
//! The file and the notes in its disks' footers change in an order of which every cut leaves something that can be gone on
//! from, or be forgotten: the file is durable before the first note is made, and is gone only after the last one is.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vhd_core::chain::ChainOptions;
use vhd_core::image::{Image, OpenOptions};
use vhd_core::ops::saved_state;
use vhd_core::storage::FileStorage;
use vhd_core::{Error, ErrorKind};

use super::{Inner, MachineDisk, Shared, State, identity, start_error};
use crate::life::{Life, Reporter};
use crate::memory::Memory;
use crate::saved;

impl Shared {
    fn state_file(&self) -> Result<&Path, Error> {
        let missing =
            || Error::new(ErrorKind::InvalidInput, "has no place for a saved state").at(Path::new(&self.definition.name));
        self.definition.state_file.as_deref().ok_or_else(missing)
    }

    /// Puts the guest into a file. It goes on as it was where that fails.
    pub(super) fn save(&self, inner: &mut Inner) -> Result<(), Error> {
        let file = self.state_file()?;
        let Some(life) = &inner.life else { return Ok(()) };
        life.pause();
        let written = identity::settle(&self.definition.disks).and_then(|identities| life.save(file, identities));
        let noted = written.and_then(|written| note(&self.definition.disks, true).inspect_err(|_| self.forget(file, written)));
        if let Err(error) = noted {
            if inner.state == State::Running {
                life.resume();
            }
            return Err(error.at(file));
        }
        inner.life = None;
        inner.full = None;
        self.events.note("saved", &self.definition.name, format!("the guest is in {}", file.display()));
        self.set(inner, State::Saved);
        Ok(())
    }

    /// Takes back what a save that failed has done. The disks, which it closed, are opened again.
    fn forget(&self, file: &Path, written: saved::Identity) {
        for disk in &self.definition.disks {
            if let Err(error) = disk.live.set_saved_state(false) {
                tracing::warn!("{error}");
            }
        }
        if let Err(error) = saved::remove(file, written) {
            tracing::warn!("{error}");
        }
    }

    /// Goes on from the file, which is gone then. It stays where that fails.
    pub(super) fn restore(&self, inner: &mut Inner) -> Result<(), Error> {
        let file = self.state_file()?;
        let here = identity::settle(&self.definition.disks)?;
        let (state, memory, identity) = saved::read(file, |state| {
            identity::check(&state.identities, &here, &self.definition.disks)?;
            if state.memory != self.hardware.memory {
                let (was, is) = (state.memory, self.hardware.memory);
                let message = format!("is of a machine with {was} bytes of memory, and this one has {is}");
                return Err(Error::new(ErrorKind::InvalidInput, message).at(file));
            }
            Memory::new(state.memory).map_err(|error| Error::io(error, "has memory that can't be had").at(file))
        })?;
        inner.lives += 1;
        let reporter = Reporter { life: inner.lives, to: self.reports.clone() };
        let life = Life::restore(&self.hardware, &state, &memory, self.console.writer(), reporter);
        let life = life.map_err(|error| start_error(&error).at(file))?;
        note(&self.definition.disks, false)?;
        // A guest goes on once: with its disks written, the state would be another's.
        saved::remove(file, identity)?;
        life.resume();
        inner.life = Some(life);
        self.events.note("restored", &self.definition.name, "the guest goes on from where it was saved");
        self.set(inner, State::Running);
        Ok(())
    }

    pub(super) fn discard(&self, inner: &mut Inner) -> Result<(), Error> {
        let file = self.state_file()?;
        let head = own(file, &identity::leaves(&self.definition.disks)?)?;
        note(&self.definition.disks, false)?;
        saved::remove(file, head.file)?;
        self.events.note("discarded", &self.definition.name, "the saved guest is forgotten");
        self.set(inner, State::Off);
        Ok(())
    }
}

fn note(disks: &[MachineDisk], saved: bool) -> Result<(), Error> {
    disks.iter().try_for_each(|disk| disk.live.set_saved_state(saved))
}

/// What the saved state of a machine says whose disks have these leaves.
fn own(file: &Path, leaves: &[[u8; 16]]) -> Result<saved::Head, Error> {
    let missing = "there is no saved state; --force takes the notes of one off the disks all the same";
    let head = saved::look(file)?.ok_or_else(|| Error::new(ErrorKind::NotFound, missing).at(file))?;
    if !head.is_of(leaves) {
        let message = "is the saved state of another machine: none of its disks is this one's, so it is left; move it away";
        return Err(Error::new(ErrorKind::Refused, message).at(file));
    }
    Ok(head)
}

/// What became of a saved guest that is forgotten.
#[derive(Debug, Default)]
pub struct Discarded {
    /// The images that have no note any more.
    pub cleared: Vec<PathBuf>,
    /// What was left, and why.
    pub notes: Vec<Error>,
}

/// Forgets the saved guest of a machine that has no process, whose disks may have these leaves. One that is gone, or is not
/// one that the guest was saved with, is left alone; the answer says which and why.
///
/// # Errors
/// `NotFound` when there is no saved guest, `Refused` when it is another machine's, `Corrupt` when the file is no sound one: it
/// is left then. With `force` the notes in the disks' footers are taken away all the same. `Locked` when a disk is in use; as
/// the host fails.
pub fn discard_state(file: &Path, leaves: &[PathBuf], open: &ChainOptions, force: bool) -> Result<Discarded, Error> {
    let (mut done, mut found, mut gone) = (Discarded::default(), Vec::new(), Vec::new());
    for leaf in leaves {
        match look_at(leaf) {
            Ok((uuid, noted)) => found.push((leaf, uuid, noted)),
            Err(error) if error.kind() == ErrorKind::NotFound => gone.push(error),
            Err(error) => return Err(error),
        }
    }
    let head = match own(file, &found.iter().map(|(_, uuid, _)| *uuid).collect::<Vec<_>>()) {
        Err(error) if force => {
            // Of a file that is no sound one nobody knows which disks are its own: they are those that were named.
            done.notes.extend(Some(error).filter(|error| error.kind() != ErrorKind::NotFound));
            None
        }
        head => Some(head?),
    };
    for (leaf, uuid, noted) in &found {
        let is_own = head.as_ref().is_none_or(|head| head.leaves().any(|own| own == *uuid));
        if *noted && is_own {
            saved_state::set(leaf, false, open)?;
            done.cleared.push((*leaf).clone());
        } else if *noted {
            let message = "is another disk than the one that the guest was saved with, and left alone";
            done.notes.push(Error::new(ErrorKind::Refused, message).at(leaf));
        }
    }
    done.notes.extend(gone);
    if let Some(head) = head {
        for missing in head.leaves().filter(|own| found.iter().all(|(_, uuid, _)| uuid != own)) {
            let uuid = uuid::Uuid::from_bytes(missing);
            let message = format!(
                "the guest was saved with a disk of UUID {uuid} too, which is not among these; if it has the note, vhd vm \
                 discard-state --force --disk IMAGE takes it off"
            );
            done.notes.push(Error::new(ErrorKind::NotFound, message).at(file));
        }
        saved::remove(file, head.file)?;
    }
    Ok(done)
}

/// The identifier of a leaf, and whether it has the note.
fn look_at(leaf: &Path) -> Result<([u8; 16], bool), Error> {
    let image = Image::open(Arc::new(FileStorage::open(leaf, false)?), leaf, &OpenOptions::default())?;
    Ok((image.footer().uuid(), image.footer().saved_state()))
}
