//! Undo disks: what is written to an image goes to a differencing one beside it, until it is committed or discarded.
//!
//! A session is one or several images as one. Each of its undo disks names all others, so that a session of which one
//! is missing is known for what it is: started or discarded half way. A commit is a merge of all of them, with a record
//! of all beside each image. Which files are merged or removed the call says, and not what was found in one of them.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::merge::{self, MergeOptions, MergePlan};
use super::saved_state;
use crate::block::BlockDevice;
use crate::chain::{Chain, ChainOptions, ChildOptions, UndoMember, UndoSession, create_child, find_children, uuid_of_file};
use crate::error::{Error, ErrorKind, Result};
use crate::format::DynamicHeader;
use crate::image::{Footers, Image, OpenOptions};
use crate::intent::{self, Member, Merge};
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
    /// The undo disk's identifier.
    pub undo_uuid: Option<Uuid>,
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
            let uuid = member.undo_uuid.unwrap_or_else(Uuid::new_v4);
            let options = ChildOptions { session: Some(payload), ..ChildOptions::new(uuid.into_bytes()) };
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
        let image_uuid = uuid_of_file(&image)?.filter(|uuid| *uuid != [0; 16]).map(Uuid::from_bytes);
        members.push(UndoMember { image, undo, image_uuid, undo_uuid: Some(Uuid::new_v4()) });
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
    let mut states = images.iter().map(|image| status_of(image, dir, chain)).collect::<Result<Vec<_>>>()?;
    let here: HashSet<_> = states.iter().filter_map(|state| state.undo_uuid).collect();
    // Of a session that several images are of it is looked once.
    let mut known: HashMap<Uuid, Vec<PathBuf>> = HashMap::new();
    for state in &mut states {
        let (Some(session), Some(undo)) = (&state.session, &state.undo) else { continue };
        let missing = known.entry(session.id).or_insert_with(|| session.missing(folder_of(undo)));
        let is_named = |path: &PathBuf| {
            let member = session.members.iter().find(|member| member.undo == *path);
            member.and_then(|member| member.undo_uuid).is_some_and(|uuid| here.contains(&uuid))
        };
        state.missing = missing.iter().filter(|path| !is_named(path)).cloned().collect();
    }
    Ok(states)
}

fn status_of(image: &Path, dir: Option<&Path>, chain: &ChainOptions) -> Result<Status> {
    let image = real(image)?;
    let committing = commit_of(&image)?.is_some();
    let mut status = Status { undo: None, undo_uuid: None, session: None, missing: Vec::new(), changed: 0, committing, image };
    let undo = undo_of(&status.image, dir)?;
    if !undo.exists() {
        return Ok(status);
    }
    let opened = Chain::open_image(&undo, &read_only(chain))?;
    let Some(session) = UndoSession::of(&opened)? else {
        return Err(Error::new(ErrorKind::InvalidInput, "is no undo disk: it names no session").at(&undo));
    };
    status.undo_uuid = Some(Uuid::from_bytes(opened.footer().uuid()));
    let alone = Chain::of(crate::chain::Layer::Image(opened));
    alone.extents(0..alone.capabilities().size, &mut |extent| {
        if extent.state != crate::block::ExtentState::Absent {
            status.changed += extent.range.end - extent.range.start;
        }
        Ok(())
    })?;
    (status.session, status.undo) = (Some(session), Some(undo));
    Ok(status)
}

/// What a commit would do, for each image: the merges, or what is left of those that were begun.
///
/// # Errors
/// `InvalidInput` when an image has no undo disk, or the session has images that are not named; those of a merge.
pub fn plan_commit(images: &[PathBuf], dir: Option<&Path>, force: bool, chain: &ChainOptions) -> Result<Vec<MergePlan>> {
    let chain = &naming(images, chain)?;
    let options = |image: &Path| MergeOptions { into: Some(image.to_owned()), delete: true, force, ..MergeOptions::default() };
    if let Some(begun) = commit_of_any(images)? {
        refuse_unnamed(&begun, images)?;
        let plan_of = |image: &PathBuf| {
            let image = real(image)?;
            merge::plan_of_commit(&undo_of(&image, dir)?, &image, Some(&begun), &options(&image), chain)
        };
        return images.iter().map(plan_of).collect();
    }
    let plan_of = |member: &UndoMember| merge::plan_of_commit(&member.undo, &member.image, None, &options(&member.image), chain);
    named_members(images, dir, chain, false)?.iter().map(plan_of).collect()
}

/// Merges what was written into the images, all of them or none, and removes the undo disks. A commit that was
/// interrupted is finished.
///
/// # Errors
/// Those of [`plan_commit`] and of a merge; `Cancelled`, when the same call goes on.
pub fn commit(images: &[PathBuf], dir: Option<&Path>, force: bool, chain: &ChainOptions, progress: &Progress) -> Result<()> {
    let plans = plan_commit(images, dir, force, chain)?;
    progress.set_total(plans.iter().map(|plan| plan.data).sum());
    merge::run_all(plans, true, force, &naming(images, chain)?, progress)
}

/// The commit that was begun of any of the images: each has the record of all.
fn commit_of_any(images: &[PathBuf]) -> Result<Option<Merge>> {
    let mut found: Option<Merge> = None;
    for image in images {
        let begun = commit_of(&real(image)?)?;
        // Of one that is nearly done, some records say so and some may be gone.
        if begun.as_ref().is_some_and(|begun| found.is_none() || begun.finishing) {
            found = begun;
        }
    }
    Ok(found)
}

/// Refuses a call that does not name all images whose commit was begun.
fn refuse_unnamed(begun: &Merge, images: &[PathBuf]) -> Result<()> {
    let uuids = images.iter().map(|image| uuid_of_file(image)).collect::<Result<Vec<_>>>()?;
    let is_named = |member: &&Member| {
        let known = member.target_uuids();
        uuids.iter().any(|uuid| match uuid {
            Some(uuid) => known.contains(&Uuid::from_bytes(*uuid)),
            None => member.grow.is_some(),
        })
    };
    match begun.members.iter().find(|member| !is_named(member)) {
        None => Ok(()),
        Some(other) => {
            let message = format!(
                "its commit was begun together with {}; name all of its images: {}",
                other.target.display(),
                begun.command()
            );
            Err(Error::new(ErrorKind::InvalidInput, message).at(images.first().map_or(Path::new(""), PathBuf::as_path)))
        }
    }
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
/// `Locked` when one is in use; `Refused` when one has children, or a commit was begun; as [`commit`].
pub fn discard(images: &[PathBuf], dir: Option<&Path>, force: bool, chain: &ChainOptions) -> Result<Vec<PathBuf>> {
    let held = held(images, dir, force, LockMode::Write, chain)?;
    for image in images {
        // Of a commit that changed nothing yet.
        if commit_of(&real(image)?)?.is_some() {
            intent::remove(&*chain.host, image)?;
        }
    }
    // With any of them the session is discarded: the others of its folder can't be opened without it.
    held.iter().try_for_each(|(undo, _)| chain.host.remove(undo))?;
    let folders: BTreeSet<_> = held.iter().map(|(undo, _)| folder_of(undo)).collect();
    folders.into_iter().try_for_each(|folder| chain.host.sync_folder(folder))?;
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
        if commit_of(&image)?.is_some_and(|begun| has_begun(&image, &begun)) {
            let message = "a commit of its undo session was begun, so it can only be finished: vhd undo commit";
            return Err(Error::new(ErrorKind::Refused, message).at(&image));
        }
    }
    let members = named_members(images, dir, &naming(images, chain)?, true)?;
    let mut held = Vec::new();
    for member in members.iter().filter(|member| member.undo.exists()) {
        let file = match mode {
            LockMode::Read => FileStorage::rehearse(&member.undo)?,
            LockMode::Write => FileStorage::open(&member.undo, true)?,
        };
        file.lock(mode)?;
        file.refuse_renamed()?;
        let uuid = uuid_of_file(&member.undo)?.unwrap_or_default();
        if member.undo_uuid.is_none_or(|known| known.into_bytes() != uuid) {
            return Err(Error::new(ErrorKind::Locked, "was replaced while it was opened; try again").at(&member.undo));
        }
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

/// True when a commit changed its image, or may have: the mark or the new identifier says so.
fn has_begun(image: &Path, begun: &Merge) -> bool {
    let Ok(file) = FileStorage::open(image, false) else { return true };
    let Ok(footers) = Footers::read(&file) else { return true };
    let uuid = footers.authority(false).ok().map(|(footer, _)| Uuid::from_bytes(footer.uuid()));
    let is_as_before = |member: &Member| member.target_uuid.map(|(old, _)| old) == uuid;
    // A former version decided it by its record.
    begun.force.is_none() || !begun.members.iter().any(is_as_before)
}

/// The undo disks of these images, each proved to be one: a differencing image over that image which names its session. All images
/// of a session must be named; undo disks may be `missing`. The files are those that the call names.
fn named_members(images: &[PathBuf], dir: Option<&Path>, chain: &ChainOptions, missing: bool) -> Result<Vec<UndoMember>> {
    let named: BTreeSet<_> = images.iter().map(|image| real(image)).collect::<Result<_>>()?;
    let mut members: Vec<UndoMember> = Vec::new();
    let mut sessions: HashMap<Uuid, UndoSession> = HashMap::new();
    for image in &named {
        let undo = undo_of(image, dir)?;
        if !undo.exists() {
            // Of a session that was discarded half way, some have none any more.
            if missing {
                continue;
            }
            return Err(Error::new(ErrorKind::InvalidInput, "has no undo disk; vhd undo start makes one").at(image));
        }
        let opened = Chain::open_image(&undo, &read_only(chain))?;
        let session = prove_undo(&opened, image)?;
        members.push(UndoMember {
            image: image.clone(),
            image_uuid: uuid_of_file(image)?.map(Uuid::from_bytes),
            undo_uuid: Some(Uuid::from_bytes(opened.footer().uuid())),
            undo,
        });
        sessions.entry(session.id).or_insert(session);
    }
    if members.is_empty() {
        let image = images.first().map_or(Path::new(""), PathBuf::as_path);
        return Err(Error::new(ErrorKind::InvalidInput, "has no undo disk").at(image));
    }
    let known = |uuid: Option<Uuid>, all: &[Option<Uuid>]| uuid.is_some() && all.contains(&uuid);
    let image_uuids: Vec<_> = named.iter().map(|image| uuid_of_file(image).ok().flatten().map(Uuid::from_bytes)).collect();
    let undo_uuids: Vec<_> = members.iter().map(|member| member.undo_uuid).collect();
    for other in sessions.values().flat_map(|session| &session.members) {
        let is_named = named.contains(&other.image) || known(other.image_uuid, &image_uuids);
        let at = |kind, message: String| Err(Error::new(kind, message).at(&members[0].image));
        if !is_named {
            return at(
                ErrorKind::InvalidInput,
                format!("is in one undo session with {}: name all of its images", other.image.display()),
            );
        }
        let is_here = members.iter().any(|member| member.undo == other.undo) || known(other.undo_uuid, &undo_uuids);
        if !missing && !is_here {
            return at(
                ErrorKind::Refused,
                format!("its undo session lacks {}, so it can only be discarded", other.undo.display()),
            );
        }
    }
    Ok(members)
}

/// The session of an undo disk of the image at `image`.
fn prove_undo(undo: &Image, image: &Path) -> Result<UndoSession> {
    let Some(session) = UndoSession::of(undo)? else {
        return Err(Error::new(ErrorKind::InvalidInput, "is no undo disk: it names no session").at(undo.path()));
    };
    let parent = undo.header().map(DynamicHeader::parent_uuid).unwrap_or_default();
    if uuid_of_file(image)? != Some(parent) {
        let message = format!("is not the undo disk of {}: its parent is another image", image.display());
        return Err(Error::new(ErrorKind::Refused, message).at(undo.path()));
    }
    Ok(session)
}

/// The commit that was decided for an image and is not done.
fn commit_of(image: &Path) -> Result<Option<Merge>> {
    Ok(intent::merge_of(image, uuid_of_file(image)?)?.filter(|merge| merge.undo))
}

/// With the images among those that are taken for parents: undo disks may be elsewhere.
fn naming(images: &[PathBuf], chain: &ChainOptions) -> Result<ChainOptions> {
    let mut chain = chain.clone();
    for image in images {
        chain.refuse_ignoring(image)?;
        chain.parents.images.push(real(image)?);
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
/// `InvalidInput` for an image that is an undo disk itself; `Refused` for a device without `dir`; as the folder can't be found.
pub fn undo_of(image: &Path, dir: Option<&Path>) -> Result<PathBuf> {
    if dir.is_none() && std::fs::metadata(image).is_ok_and(|found| found.file_type().is_block_device()) {
        let message = "is a device, beside which no undo disk can be kept; --dir names a folder on a persistent volume";
        return Err(Error::new(ErrorKind::Refused, message).at(image));
    }
    let undo = image.with_extension("vud");
    if undo == image {
        return Err(Error::new(ErrorKind::InvalidInput, "is an undo disk itself; name the image that it belongs to").at(image));
    }
    match dir {
        None => Ok(undo),
        Some(dir) => Ok(real(dir)?.join(undo.file_name().unwrap_or_default())),
    }
}
