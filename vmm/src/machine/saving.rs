//! A guest that goes into a file, and comes back out of it or is forgotten.
//!
//! The file and the notes in its disks' footers change in an order of which every cut leaves something that can be gone on
//! from, or be forgotten: the file is durable before the first note is made, and is gone only after the last one is.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vhd_core::chain::ChainOptions;
use vhd_core::image::{Image, OpenOptions};
use vhd_core::ops::saved_state;
use vhd_core::storage::{FileStorage, folder_of};
use vhd_core::{Error, ErrorKind};

use super::{Inner, MachineDisk, Shared, State, identity, start_error};
use crate::life::{Life, Reporter};
use crate::memory::Memory;
use crate::saved::{self, DiskIdentity};

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
        if let Err(error) = written.and_then(|()| note(&self.definition.disks, true)) {
            self.forget(file);
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
    fn forget(&self, file: &Path) {
        for disk in &self.definition.disks {
            if let Err(error) = disk.live.set_saved_state(false) {
                tracing::warn!("{error}");
            }
        }
        match remove(file) {
            Err(error) if error.kind() != ErrorKind::NotFound => tracing::warn!("{error}"),
            _ => {}
        }
    }

    /// Goes on from the file, which is gone then. It stays where that fails.
    pub(super) fn restore(&self, inner: &mut Inner) -> Result<(), Error> {
        let file = self.state_file()?;
        let here = identity::settle(&self.definition.disks)?;
        let (state, memory) = saved::read(file, |state| {
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
        remove(file)?;
        life.resume();
        inner.life = Some(life);
        self.events.note("restored", &self.definition.name, "the guest goes on from where it was saved");
        self.set(inner, State::Running);
        Ok(())
    }

    pub(super) fn discard(&self, inner: &mut Inner) -> Result<(), Error> {
        note(&self.definition.disks, false)?;
        remove(self.state_file()?)?;
        self.events.note("discarded", &self.definition.name, "the saved guest is forgotten");
        self.set(inner, State::Off);
        Ok(())
    }
}

fn note(disks: &[MachineDisk], saved: bool) -> Result<(), Error> {
    disks.iter().try_for_each(|disk| disk.live.set_saved_state(saved))
}

fn remove(file: &Path) -> Result<(), Error> {
    let removed = fs::remove_file(file).and_then(|()| File::open(folder_of(file))?.sync_all());
    removed.map_err(|error| Error::io(error, "can't be removed").at(file))
}

/// Forgets the saved guest of a machine that has no process, whose disks have these leaves. A disk that is gone, or
/// is not one that the guest was saved with, is left alone; the answer says which and why.
///
/// # Errors
/// `NotFound` when there is no saved guest; with `force` only the notes in the disks' footers are taken away then.
/// `Locked` when a disk is in use; as the host fails.
pub fn discard_state(file: &Path, leaves: &[PathBuf], open: &ChainOptions, force: bool) -> Result<Vec<Error>, Error> {
    let there = file.exists();
    if !there && !force {
        let message = "there is no saved state; --force takes the notes of one off the disks all the same";
        return Err(Error::new(ErrorKind::NotFound, message).at(file));
    }
    // Of a file that can't be read nobody knows which disks are its own: then they are those that were named.
    let identities = saved::disks_of(file).ok();
    let mut notes = Vec::new();
    for leaf in leaves {
        let uuid = match noted(leaf) {
            Ok(None) => continue,
            Ok(Some(uuid)) => uuid,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                notes.push(error);
                continue;
            }
            Err(error) => return Err(error),
        };
        let is_of = |disk: &DiskIdentity| disk.layers.first().is_some_and(|layer| layer.uuid == uuid);
        if identities.as_ref().is_none_or(|all| all.iter().any(is_of)) {
            saved_state::set(leaf, false, open)?;
        } else {
            let message = "is another disk than the one that the guest was saved with, and left alone";
            notes.push(Error::new(ErrorKind::Refused, message).at(leaf));
        }
    }
    if there {
        remove(file)?;
    }
    Ok(notes)
}

/// The identifier of a leaf that has the note.
fn noted(leaf: &Path) -> Result<Option<[u8; 16]>, Error> {
    let image = Image::open(Arc::new(FileStorage::open(leaf, false)?), leaf, &OpenOptions::default())?;
    Ok(image.footer().saved_state().then(|| image.footer().uuid()))
}
