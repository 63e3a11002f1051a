//! What an undo disk says of its session: which other undo disks belong to it. They are kept or given up as one.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::child::relative_to;
use crate::error::{Error, ErrorKind, Result};
use crate::format::PlatformCode;
use crate::image::{Image, OpenOptions};
use crate::storage::{FileStorage, folder_of, resolve};

/// Bytes of a session's text that are read.
const MAX_LEN: u32 = 1 << 20;

/// An undo session: images, each with the differencing image that takes its changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UndoSession {
    /// The same in all its undo disks.
    pub id: Uuid,
    /// Its disks, in the order in which they are dealt with.
    pub members: Vec<UndoMember>,
}

/// One disk of an undo session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UndoMember {
    /// The image that is not written meanwhile.
    pub image: PathBuf,
    /// The undo disk: what is written meanwhile.
    pub undo: PathBuf,
}

impl UndoSession {
    /// The session that an image is an undo disk of, with paths that lead somewhere; `None` for other images.
    ///
    /// # Errors
    /// `Corrupt` when what it says is not understood; as the host fails.
    pub fn of(image: &Image) -> Result<Option<Self>> {
        let corrupt = |what: String| Error::new(ErrorKind::Corrupt, format!("its undo session {what}")).at(image.path());
        let locators = image.header().into_iter().flat_map(|header| header.locators().collect::<Vec<_>>());
        let Some(entry) = locators.into_iter().find(|entry| entry.code == PlatformCode::UNDO_SESSION) else { return Ok(None) };
        if entry.data_length > MAX_LEN {
            return Err(corrupt(format!("has {} bytes", entry.data_length)));
        }
        let mut bytes = vec![0; entry.data_length as usize];
        image.storage().read_at(&mut bytes, entry.data_offset).map_err(|error| image.read_error(error, entry.data_offset))?;
        let session: Self = serde_json::from_slice(&bytes).map_err(|error| corrupt(format!("is not understood: {error}")))?;
        Ok(Some(session.map_paths(|path| resolve(&folder_of(image.path()).join(path)))))
    }

    /// As an undo disk in `folder` has it: files that are moved together stay together.
    pub(crate) fn to_bytes(&self, folder: &Path) -> Result<Vec<u8>> {
        let relative = self.map_paths(|path| relative_to(path, folder));
        let mut named = relative.members.iter().flat_map(|member| [&member.image, &member.undo]);
        if let Some(odd) = named.find(|path| path.to_str().is_none()) {
            let message = "its name is not UTF-8, so an undo disk can't record it; rename it";
            return Err(Error::new(ErrorKind::InvalidInput, message).at(&folder.join(odd)));
        }
        serde_json::to_vec(&relative)
            .ok()
            .filter(|bytes| bytes.len() <= MAX_LEN as usize)
            .ok_or_else(|| Error::new(ErrorKind::InvalidInput, "the images of the session have names that can't be recorded"))
    }

    fn map_paths(&self, map: impl Fn(&Path) -> PathBuf) -> Self {
        let members = self.members.iter();
        let members = members.map(|member| UndoMember { image: map(&member.image), undo: map(&member.undo) }).collect();
        Self { id: self.id, members }
    }

    /// The undo disks that are gone or belong to another session: then this one was started or discarded half way.
    #[must_use]
    pub fn missing(&self) -> Vec<PathBuf> {
        let is_here = |undo: &Path| {
            let image = FileStorage::open(undo, false)
                .and_then(|storage| Image::open(std::sync::Arc::new(storage), undo, &OpenOptions::default()));
            image.and_then(|image| Self::of(&image)).is_ok_and(|session| session.is_some_and(|session| session.id == self.id))
        };
        self.members.iter().map(|member| &member.undo).filter(|undo| !is_here(undo)).cloned().collect()
    }
}

/// Refuses an undo disk of a session that is not whole: all its disks are kept, or none.
pub(super) fn refuse_incomplete(image: &Image) -> Result<()> {
    let Some(session) = UndoSession::of(image)? else { return Ok(()) };
    if session.members.len() < 2 {
        return Ok(());
    }
    match session.missing().first() {
        None => Ok(()),
        Some(missing) => {
            let message = format!(
                "belongs to an undo session of which {} is missing: it was started or discarded half way; `vhd undo discard` ends it",
                missing.display()
            );
            Err(Error::new(ErrorKind::Refused, message).at(image.path()))
        }
    }
}
