//! Undo disks: what is written to an image goes to a differencing one beside it, until it is committed or discarded.
//!
//! A session is one or several images as one. Each of its undo disks names all others, so that a session of which one
//! is missing is known for what it is: started or discarded half way. A commit is a merge of all of them under one
//! intent record.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::merge::{self, MergeOptions, MergePlan};
use super::saved_state;
use crate::block::BlockDevice;
use crate::chain::{Chain, ChainOptions, ChildOptions, UndoMember, UndoSession, create_child, find_children, uuid_of_file};
use crate::error::{Error, ErrorKind, Result};
use crate::image::OpenOptions;
use crate::intent::{self, Merge};
use crate::progress::Progress;
use crate::storage::{FileStorage, LockMode, folder_of};

const RELIED_ON: &str = "a saved state of a virtual machine relies on it; restore or discard that, or use --force";

/// What is known of the undo disk of one image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The image.
    pub image: PathBuf,
    /// Its undo disk, where it has one.
    pub undo: Option<PathBuf>,
    /// The session that it belongs to.
    pub session: Option<UndoSession>,
    /// Undo disks of the session that are missing.
    pub missing: Vec<PathBuf>,
    /// Bytes of the disk that were changed.
    pub changed: u64,
    /// True when a commit of the session was decided and is not done.
    pub committing: bool,
}

/// Starts a session over these images. Each gets an undo disk, beside it or in `dir`; where that is not possible for
/// all, none keeps one. Returns the session and notes.
///
/// # Errors
/// Those of [`plan_start`], and of [`create_child`].
pub fn start(images: &[PathBuf], dir: Option<&Path>, chain: &ChainOptions) -> Result<(UndoSession, Vec<String>)> {
    let session = plan_start(images, dir, chain)?;
    let mut notes = Vec::new();
    for (index, member) in session.members.iter().enumerate() {
        let made = session.to_bytes(folder_of(&member.undo)).and_then(|payload| {
            let options = ChildOptions { session: Some(payload), ..ChildOptions::new(Uuid::new_v4().into_bytes()) };
            create_child(&member.undo, &member.image, &options, chain)
        });
        match made {
            Ok(created) => notes.extend(created.notes),
            Err(error) => {
                // Of the last one only the folder's sync may have failed; what another made meanwhile is not ours.
                let made = &session.members[..if error.kind() == ErrorKind::Exists { index } else { index + 1 }];
                let is_left = |member: &&UndoMember| member.undo.exists() && chain.host.remove(&member.undo).is_err();
                let left: Vec<_> = made.iter().filter(is_left).collect();
                return Err(match left.first() {
                    None => error,
                    Some(left) => {
                        let message =
                            format!("{}; {} was made and can't be removed: do it", error.message(), left.undo.display());
                        Error::new(error.kind(), message).at(error.path().unwrap_or(&member.image))
                    }
                });
            }
        }
    }
    Ok((session, notes))
}

/// The session that [`start`] would make.
///
/// # Errors
/// `Exists` for an image that has an undo disk; `Refused` for one with other children, which a commit would make unusable, but
/// where the options force it; `InvalidInput`; as the images can't be read.
pub fn plan_start(images: &[PathBuf], dir: Option<&Path>, chain: &ChainOptions) -> Result<UndoSession> {
    let mut members = Vec::new();
    for image in images {
        let image = real(image)?;
        let undo = undo_of(&image, dir)?;
        if undo.exists() {
            return Err(Error::new(ErrorKind::Exists, "exists already: commit or discard that session first").at(&undo));
        }
        if members.iter().any(|other: &UndoMember| other.image == image) {
            return Err(Error::new(ErrorKind::InvalidInput, "is named twice").at(&image));
        }
        if members.iter().any(|other: &UndoMember| other.undo == undo) {
            return Err(Error::new(ErrorKind::InvalidInput, "would be the undo disk of two images").at(&undo));
        }
        // All that can be in the way of one is found before the first is made.
        let opened = Chain::open(&image, &read_only(chain))?;
        let noted = opened.layers()[0].image().is_some_and(|image| image.footer().saved_state());
        if noted && !chain.image.force {
            // With a child it could not be gone on from.
            return Err(Error::new(ErrorKind::Refused, RELIED_ON).at(&image));
        }
        let uuid = uuid_of_file(&image)?.filter(|uuid| *uuid != [0; 16] && !chain.image.force);
        if let Some(child) = uuid.and_then(|uuid| find_children(&image, uuid).into_iter().next()) {
            let message = format!(
                "is the parent of {} too, which could not be used after a commit; merge or convert that first, or use --force \
                 if it may be lost",
                child.display()
            );
            return Err(Error::new(ErrorKind::Refused, message).at(&image));
        }
        members.push(UndoMember { image, undo });
    }
    let session = UndoSession { id: Uuid::new_v4(), members };
    session.members.iter().try_for_each(|member| session.to_bytes(folder_of(&member.undo)).map(drop))?;
    Ok(session)
}

/// Says how it stands with each image.
///
/// # Errors
/// As the images can't be read.
pub fn status(images: &[PathBuf], dir: Option<&Path>, chain: &ChainOptions) -> Result<Vec<Status>> {
    images.iter().map(|image| status_of(image, dir, chain)).collect()
}

fn status_of(image: &Path, dir: Option<&Path>, chain: &ChainOptions) -> Result<Status> {
    let image = real(image)?;
    let mut status =
        Status { undo: None, session: None, missing: Vec::new(), changed: 0, committing: commit_of(&image)?.is_some(), image };
    let undo = undo_of(&status.image, dir)?;
    if !undo.exists() {
        return Ok(status);
    }
    let opened = Chain::open_image(&undo, &read_only(chain))?;
    let Some(session) = UndoSession::of(&opened)? else {
        return Err(Error::new(ErrorKind::InvalidInput, "is no undo disk: it names no session").at(&undo));
    };
    let alone = Chain::of(crate::chain::Layer::Image(opened));
    alone.extents(0..alone.capabilities().size, &mut |extent| {
        if extent.state != crate::block::ExtentState::Absent {
            status.changed += extent.range.end - extent.range.start;
        }
        Ok(())
    })?;
    status.missing = session.missing();
    (status.session, status.undo) = (Some(session), Some(undo));
    Ok(status)
}

/// What a commit would do, for each image: the merges, or those that are finished.
///
/// # Errors
/// `InvalidInput` when an image has no undo disk, or the session has images that are not named; those of a merge.
pub fn plan_commit(images: &[PathBuf], dir: Option<&Path>, force: bool, chain: &ChainOptions) -> Result<Vec<MergePlan>> {
    let chain = &beside(images, chain)?;
    for image in images {
        if let Some(merge) = commit_of(&real(image)?)? {
            return Ok(merge::plans_of(&merge));
        }
    }
    let plan_of = |member: &UndoMember| {
        let options = MergeOptions { into: Some(member.image.clone()), delete: true, force };
        merge::plan_of_commit(&member.undo, &options, chain)
    };
    named_members(images, dir, chain, false)?.iter().map(plan_of).collect()
}

/// Merges what was written into the images, all of them or none, and removes the undo disks. A commit that was
/// interrupted is finished.
///
/// # Errors
/// Those of [`plan_commit`] and of a merge; `Cancelled`, when the same call goes on.
pub fn commit(images: &[PathBuf], dir: Option<&Path>, force: bool, chain: &ChainOptions, progress: &Progress) -> Result<()> {
    let plans = plan_commit(images, dir, force, chain)?;
    let chain = &beside(images, chain)?;
    progress.set_total(plans.iter().map(|plan| plan.data).sum());
    if let Some(begun) = plans.iter().find_map(|plan| plan.resumed.clone()) {
        return merge::run_all(begun, true, force, chain, progress);
    }
    let members = plans.into_iter().map(|plan| plan.member).collect();
    merge::run_all(Merge { undo: true, members, ..Merge::default() }, false, force, chain, progress)
}

/// The undo disks that a discard would remove.
///
/// # Errors
/// As [`discard`].
pub fn plan_discard(images: &[PathBuf], dir: Option<&Path>, force: bool, chain: &ChainOptions) -> Result<Vec<PathBuf>> {
    Ok(held(images, dir, force, LockMode::Read, chain)?.into_iter().map(|(undo, _)| undo).collect())
}

/// Removes the undo disks and what was written to them: all, or none. Returns them.
///
/// # Errors
/// `Locked` when one is in use; `Refused` when one has children, or a commit was decided; as [`commit`].
pub fn discard(images: &[PathBuf], dir: Option<&Path>, force: bool, chain: &ChainOptions) -> Result<Vec<PathBuf>> {
    let held = held(images, dir, force, LockMode::Write, chain)?;
    // With the first the session is discarded: the others can't be opened without it. So it is gone before the next.
    for (undo, _) in &held {
        chain.host.remove(undo)?;
        chain.host.sync_folder(folder_of(undo))?;
    }
    Ok(held.into_iter().map(|(undo, _)| undo).collect())
}

/// The undo disks of the sessions, locked, where they may be removed.
fn held(
    images: &[PathBuf],
    dir: Option<&Path>,
    force: bool,
    mode: LockMode,
    chain: &ChainOptions,
) -> Result<Vec<(PathBuf, FileStorage)>> {
    for image in images {
        let image = real(image)?;
        if commit_of(&image)?.is_some() {
            let message = "a commit of its undo session was begun, so it can only be finished: vhd undo commit";
            return Err(Error::new(ErrorKind::Refused, message).at(&image));
        }
    }
    let members = named_members(images, dir, chain, true)?;
    let mut held = Vec::new();
    for member in members.iter().filter(|member| member.undo.exists()) {
        let file = match mode {
            LockMode::Read => FileStorage::rehearse(&member.undo)?,
            LockMode::Write => FileStorage::open(&member.undo, true)?,
        };
        file.lock(mode)?;
        let uuid = uuid_of_file(&member.undo)?.unwrap_or_default();
        if let Some(child) = find_children(&member.undo, uuid).first().filter(|_| !force) {
            let message = format!("is the parent of {}: use --force if that may be lost", child.display());
            return Err(Error::new(ErrorKind::Refused, message).at(&member.undo));
        }
        if !force && matches!(saved_state::of(&member.undo, chain), Ok(true)) {
            return Err(Error::new(ErrorKind::Refused, RELIED_ON).at(&member.undo));
        }
        held.push((member.undo.clone(), file));
    }
    Ok(held)
}

/// The members of the sessions of these images. All images of a session must be named; undo disks may be `missing`.
fn named_members(images: &[PathBuf], dir: Option<&Path>, chain: &ChainOptions, missing: bool) -> Result<Vec<UndoMember>> {
    let named: BTreeSet<_> = images.iter().map(|image| real(image)).collect::<Result<_>>()?;
    let mut members: Vec<UndoMember> = Vec::new();
    for image in &named {
        let status = status_of(image, dir, chain)?;
        let Some(session) = status.session else {
            // Of a session that was discarded half way, some have none any more.
            if missing {
                continue;
            }
            return Err(Error::new(ErrorKind::InvalidInput, "has no undo disk; vhd undo start makes one").at(image));
        };
        if let Some(other) = session.members.iter().find(|member| !named.contains(&member.image)) {
            let message = format!("is in one undo session with {}: name all of its images", other.image.display());
            return Err(Error::new(ErrorKind::InvalidInput, message).at(image));
        }
        if let Some(gone) = status.missing.first().filter(|_| !missing) {
            let message = format!("its undo session lacks {}, so it can only be discarded", gone.display());
            return Err(Error::new(ErrorKind::Refused, message).at(image));
        }
        for member in session.members {
            if !members.contains(&member) {
                members.push(member);
            }
        }
    }
    if members.is_empty() {
        let image = images.first().map_or(Path::new(""), PathBuf::as_path);
        return Err(Error::new(ErrorKind::InvalidInput, "has no undo disk").at(image));
    }
    Ok(members)
}

/// The commit that was decided for an image and is not done.
fn commit_of(image: &Path) -> Result<Option<Merge>> {
    Ok(intent::merge_of(image, uuid_of_file(image)?)?.filter(|merge| merge.undo))
}

/// With the images' folders among those where parents are looked for: undo disks may be elsewhere.
fn beside(images: &[PathBuf], chain: &ChainOptions) -> Result<ChainOptions> {
    let mut chain = chain.clone();
    for image in images {
        chain.parents.parent_dirs.push(folder_of(&real(image)?).to_owned());
    }
    Ok(chain)
}

fn read_only(chain: &ChainOptions) -> ChainOptions {
    ChainOptions { image: OpenOptions { writable: false, ..chain.image.clone() }, ..chain.clone() }
}

fn real(image: &Path) -> Result<PathBuf> {
    image.canonicalize().map_err(|error| Error::io(error, "can't be opened").at(image))
}

/// Where the undo disk of an image is.
///
/// # Errors
/// `InvalidInput` for an image that is an undo disk itself; as the folder can't be found.
pub fn undo_of(image: &Path, dir: Option<&Path>) -> Result<PathBuf> {
    let undo = image.with_extension("vud");
    if undo == image {
        return Err(Error::new(ErrorKind::InvalidInput, "is an undo disk itself; name the image that it belongs to").at(image));
    }
    match dir {
        None => Ok(undo),
        Some(dir) => Ok(real(dir)?.join(undo.file_name().unwrap_or_default())),
    }
}
