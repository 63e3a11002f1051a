//! What an undo disk says of its session: which other undo disks belong to it. They are kept or given up as one.
//!
//! It is a stranger's word, as all that lies beside an image: it says when images are missing in a call, and never which files
//! are written or removed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::child::relative_to;
use crate::error::{Error, ErrorKind, Result};
use crate::format::PlatformCode;
use crate::image::{Image, OpenOptions};
use crate::intent::lexically;
use crate::storage::{Beneath, FileStorage, folder_of, open_beneath};

/// Bytes of a session's text that are read.
const MAX_LEN: u32 = 1 << 20;
/// Disks of a session at most: more than any machine has, and few enough to look at each when one is opened.
const MAX_MEMBERS: usize = 256;

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
    /// The image's identifier; unknown of sessions of a former version.
    #[serde(default)]
    pub image_uuid: Option<Uuid>,
    /// The undo disk's identifier.
    #[serde(default)]
    pub undo_uuid: Option<Uuid>,
}

impl UndoSession {
    /// The session that an image is an undo disk of, with the paths that it means; `None` for other images. No other file is
    /// looked at.
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
        if session.members.len() > MAX_MEMBERS {
            return Err(corrupt(format!("has {} disks, {MAX_MEMBERS} at most", session.members.len())));
        }
        let folder = folder_of(image.path());
        let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
        Ok(Some(session.map_paths(|path| lexically(&folder.join(path)))))
    }

    /// As an undo disk in `folder` has it: files that are moved together stay together.
    pub(crate) fn to_bytes(&self, folder: &Path) -> Result<Vec<u8>> {
        if self.members.len() > MAX_MEMBERS {
            let message = format!("{} images for one undo session, {MAX_MEMBERS} at most", self.members.len());
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
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
        let members =
            members.map(|member| UndoMember { image: map(&member.image), undo: map(&member.undo), ..member.clone() }).collect();
        Self { id: self.id, members }
    }

    /// The undo disks that are gone or belong to another session: then this one was started or discarded half way. Only those
    /// in `folder`, or below, are looked for: who opens an image has not named other folders.
    #[must_use]
    pub fn missing(&self, folder: &Path) -> Vec<PathBuf> {
        let Ok(folder) = folder.canonicalize() else { return Vec::new() };
        let is_missing = |member: &&UndoMember| match member.undo.strip_prefix(&folder) {
            Ok(name) => !self.is_here(&folder, name, member),
            Err(_) => false,
        };
        self.members.iter().filter(is_missing).map(|member| member.undo.clone()).collect()
    }

    fn is_here(&self, folder: &Path, name: &Path, member: &UndoMember) -> bool {
        let Ok(Some(file)) = open_beneath(folder, name, Beneath::Links) else { return false };
        let image = FileStorage::from_file(file, &member.undo)
            .and_then(|storage| Image::open(Arc::new(storage), &member.undo, &OpenOptions::default()));
        // A merge into an undo disk gives it another identifier.
        image.is_ok_and(|image| {
            member.undo_uuid.is_some_and(|uuid| image.footer().uuid() == uuid.into_bytes())
                || Self::of(&image).is_ok_and(|session| session.is_some_and(|session| session.id == self.id))
        })
    }
}

/// Refuses an undo disk of a session that is not whole: all its disks are kept, or none.
pub(super) fn refuse_incomplete(image: &Image) -> Result<()> {
    let Some(session) = UndoSession::of(image)? else { return Ok(()) };
    if session.members.len() < 2 {
        return Ok(());
    }
    match session.missing(folder_of(image.path())).first() {
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
