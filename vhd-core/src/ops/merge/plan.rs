//! What a merge will do, and whether it may.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use super::copy::amount;
use super::{MergeOptions, protection, resume};
use crate::block::BlockDevice;
use crate::chain::{
    Chain, ChainOptions, Layer, UndoSession, find_children, is_child_of, refuse_linked, relative_to, uuid_of_file,
};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{DiskType, Stage};
use crate::image::{Footers, Image, OpenOptions};
use crate::intent::{self, FooterMove, Member, Merge, Named};
use crate::storage::{FileStorage, folder_of, may_change_names_beside};

/// What a merge will do.
#[derive(Clone, Debug)]
pub struct MergePlan {
    /// The images, as the intent record will have them.
    pub member: Member,
    /// Bytes that are moved.
    pub data: u64,
    /// Bytes that become zero.
    pub zeros: u64,
    /// The size that the target gets first, where it is smaller than the child.
    pub grow_to: Option<u64>,
    /// Images that can't be opened any more afterwards: other children of those that change, and the images between where they
    /// are not removed.
    pub lost: Vec<PathBuf>,
    /// What is left to do of it.
    pub(crate) step: Step,
}

/// How far a merge came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing is done.
    New,
    /// It was begun: all is moved again.
    Begun,
    /// The target holds all, which is proved before anything goes: what is left is to tell the children and to remove files.
    Moved,
}

impl MergePlan {
    /// True when an interrupted merge is finished.
    #[must_use]
    pub fn is_resumed(&self) -> bool {
        self.step != Step::New
    }
}

/// Plans a merge of the image at `leaf`. An interrupted one goes on where the call asks for the same.
///
/// # Errors
/// `InvalidInput` when there is nothing to merge into; `Refused` for what only `force` allows, and where another merge was begun;
/// as the images can't be read.
pub fn plan(leaf: &Path, options: &MergeOptions, chain: &ChainOptions) -> Result<MergePlan> {
    chain.refuse_ignoring(leaf)?;
    let chain = &naming(options, chain);
    if let Some(target) = &options.into
        && let Some(merge) = unfinished(target)?
    {
        return resume::plan(leaf, target, &merge, options, chain);
    }
    let look = ChainOptions { resuming: options.into.as_deref().is_some_and(is_marked), ..read_only(chain) };
    let opened = Chain::open(leaf, &look)?;
    let depth = depth_of_target(&opened, options.into.as_deref())?;
    let target = opened.layers()[depth].path().to_owned();
    match unfinished(&target)? {
        Some(merge) => {
            drop(opened);
            resume::plan(leaf, &target, &merge, options, chain)
        }
        None => plan_of(&opened, depth, options, false, chain),
    }
}

/// As [`plan`], of one image of an undo session whose commit merges them all. `merge` was begun.
///
/// # Errors
/// As there.
pub(crate) fn plan_of_commit(
    leaf: &Path,
    target: &Path,
    merge: Option<&Merge>,
    options: &MergeOptions,
    chain: &ChainOptions,
) -> Result<MergePlan> {
    if let Some(merge) = merge {
        return resume::plan(leaf, target, merge, options, chain);
    }
    let opened = Chain::open(leaf, &read_only(chain))?;
    let depth = depth_of_target(&opened, Some(target))?;
    plan_of(&opened, depth, options, true, chain)
}

/// True for a target that a merge marked, and whose record is not beside it any more: the merge begins anew.
fn is_marked(target: &Path) -> bool {
    let footers = FileStorage::open(target, false).and_then(|file| Footers::read(&file).map_err(|error| Error::io(error, "")));
    footers.is_ok_and(|footers| matches!(footers.stage(), Some((Stage::Merge, _))))
}

/// With the images that the call names among those that are taken for parents.
fn naming(options: &MergeOptions, chain: &ChainOptions) -> ChainOptions {
    let mut chain = chain.clone();
    chain.parents.images.extend(options.with.iter().cloned());
    chain
}

/// Plans the merge of a chain's leaf into the image at `depth`.
pub(super) fn plan_of(
    opened: &Chain,
    depth: usize,
    options: &MergeOptions,
    is_commit: bool,
    chain: &ChainOptions,
) -> Result<MergePlan> {
    let layers = opened.layers();
    let leaf = layers[0].path();
    layers[..depth].iter().filter_map(Layer::image).try_for_each(|image| refuse_linked(image, "is only read"))?;
    let target = &layers[depth];
    let uuid = layers[0].image().map(|image| image.footer().uuid()).unwrap_or_default();
    let mut lost = lost_by(layers, depth);
    let children = children_of(leaf, uuid, &options.with)?;
    if !options.force {
        refuse_unforced(layers, depth, &lost)?;
        if !is_commit {
            refuse_parting(&layers[..depth], &children, &read_only(chain))?;
        }
    }
    let upper = Chain::over(layers[0].clone(), layers[1..depth].to_vec());
    let size = upper.capabilities().size;
    let grow_to = (target.size() < size).then_some(size);
    if grow_to.is_some() && layers.get(depth + 1).is_some_and(|below| below.size() > target.size()) {
        let message = format!("has to grow to {size} bytes, where its own parent, which is larger, would show; convert it first");
        return Err(Error::new(ErrorKind::Refused, message).at(target.path()));
    }
    let known = |path: &Path, uuid| Ok(Named { path: real(path)?, uuid: Some(uuid) });
    let between = layers[1..depth].iter().filter_map(Layer::image);
    let member = Member {
        target: real(target.path())?,
        target_uuid: target.image().map(|image| (uuid_of(image), Uuid::new_v4())),
        leaf: real(leaf)?,
        leaf_uuid: Uuid::from_bytes(uuid),
        between: between.map(|image| known(image.path(), uuid_of(image))).collect::<Result<_>>()?,
        children: children.iter().map(|child| known(child, child_uuid(child)?)).collect::<Result<_>>()?,
        delete: options.delete,
        protection: None,
        grow: target.image().zip(grow_to).map_or(Ok(None), |(image, size)| growth(image, size))?,
    };
    if !options.delete {
        lost.extend(member.between.iter().map(|named| named.path.clone()));
    }
    let amount = amount(&upper, target.size())?;
    refuse_larger_children(&member, size, target.size(), chain)?;
    refuse_unrecordable(&member)?;
    refuse_unwritable(target, &member, options.force, chain)?;
    let protection = options.force.then(|| protection::of(target.path())).flatten();
    let member = Member { protection, ..member };
    Ok(MergePlan { member, data: amount.data, zeros: amount.zeros, grow_to, lost, step: Step::New })
}

/// How a fixed target becomes `size` bytes large: what a power cut may leave has no footer.
fn growth(target: &Image, size: u64) -> Result<Option<FooterMove>> {
    if target.footer().disk_type() != DiskType::Fixed {
        return Ok(None);
    }
    let end = target.storage().len().map_err(|error| target.read_error(error, 0))?;
    let mut footer = target.footer().clone();
    footer.set_size(size);
    Ok(Some(FooterMove::new(target.size(), end, size, &footer)))
}

pub(super) fn real(path: &Path) -> Result<PathBuf> {
    path.canonicalize().map_err(|error| Error::io(error, "can't be resolved").at(path))
}

fn uuid_of(image: &Arc<Image>) -> Uuid {
    Uuid::from_bytes(image.footer().uuid())
}

fn child_uuid(child: &Path) -> Result<Uuid> {
    Ok(Uuid::from_bytes(uuid_of_file(child)?.unwrap_or_default()))
}

/// The leaf's own children: those beside it, and those that the call names.
pub(super) fn children_of(leaf: &Path, uuid: [u8; 16], with: &[PathBuf]) -> Result<Vec<PathBuf>> {
    if uuid == [0; 16] {
        return Ok(Vec::new());
    }
    let mut children = find_children(leaf, uuid);
    let identity = |path: &Path| FileStorage::open(path, false)?.identity();
    let mut known: Vec<_> = children.iter().filter_map(|child| identity(child).ok()).collect();
    for named in with {
        if is_child_of(named, uuid)? && !known.contains(&identity(named)?) {
            known.push(identity(named)?);
            children.push(named.clone());
        }
    }
    Ok(children)
}

/// Refuses what would take a part out of an undo session: one of several undo disks, without which the others could only be
/// discarded, or the image of one, without which that could be neither committed nor discarded.
fn refuse_parting(merged: &[Layer], children: &[PathBuf], look: &ChainOptions) -> Result<()> {
    for image in merged.iter().filter_map(Layer::image) {
        if UndoSession::of(image)?.is_some_and(|session| session.members.len() > 1) {
            let message = "is one of several undo disks of a session, and without it the others could only be discarded; `vhd undo \
                           commit` merges them all, --force this one alone";
            return Err(Error::new(ErrorKind::Refused, message).at(image.path()));
        }
    }
    let Some(leaf) = merged.first().map(Layer::path) else { return Ok(()) };
    let real = leaf.canonicalize().ok();
    for child in children {
        let session = UndoSession::of(&*Chain::open_image(child, look)?)?;
        let mut members = session.iter().flat_map(|session| &session.members);
        if members.any(|member| member.image.canonicalize().ok() == real) {
            let message = format!(
                "has the undo disk {}, whose session could not be ended without it; commit or discard that first, or use --force",
                child.display()
            );
            return Err(Error::new(ErrorKind::Refused, message).at(leaf));
        }
    }
    Ok(())
}

/// Refuses a leaf of `size` bytes with a child that is larger, over a target that is: what lies there beyond the leaf's end
/// would show in the child.
fn refuse_larger_children(member: &Member, size: u64, target: u64, chain: &ChainOptions) -> Result<()> {
    for child in member.children.iter().map(|named| &named.path).filter(|_| target > size) {
        if Chain::open_image(child, chain)?.size() > size {
            let (child, target) = (child.display(), member.target.display());
            let message = format!(
                "its child {child} is larger and would show what {target} holds beyond its end; merge {child} into that one"
            );
            return Err(Error::new(ErrorKind::Refused, message).at(&member.leaf));
        }
    }
    Ok(())
}

/// Refuses names that the record of a merge can't hold, which is text.
fn refuse_unrecordable(member: &Member) -> Result<()> {
    let folder = folder_of(&member.target);
    let others = member.between.iter().chain(&member.children).map(|named| &named.path);
    let mut named = [&member.target, &member.leaf].into_iter().chain(others);
    match named.find(|path| relative_to(path, folder).to_str().is_none()) {
        Some(odd) => {
            let message = "its name is not UTF-8, so the record of a merge can't hold it; rename it";
            Err(Error::new(ErrorKind::InvalidInput, message).at(odd))
        }
        None => Ok(()),
    }
}

/// Refuses a merge that could not write all that it has to: it would be begun, and could not be finished.
fn refuse_unwritable(target: &Layer, member: &Member, force: bool, chain: &ChainOptions) -> Result<()> {
    let options = OpenOptions { force: true, ..chain.image.clone() };
    // With force the target's protection is lifted; that it is another user's is not.
    let lifted = force && protection::is_protected(target.path());
    let file = if lifted { FileStorage::open(target.path(), false)? } else { FileStorage::rehearse(target.path())? };
    if target.image().is_some() && Footers::read(&file).is_ok_and(|footers| footers.stage().is_none()) {
        Image::rehearse(&file, target.path(), &options)?;
    }
    let leaf = (!member.delete).then_some(member.leaf.as_path());
    let mut relinked = leaf.into_iter().chain(member.children.iter().map(|named| &*named.path));
    relinked.try_for_each(|path| Image::rehearse(&FileStorage::rehearse(path)?, path, &options))?;
    let between = member.between.iter().map(|named| &named.path);
    let removed = std::iter::once(&member.leaf).chain(between).filter(|_| member.delete);
    removed.into_iter().try_for_each(|path| refuse_unremovable(path))
}

/// Refuses an image that could not be removed at the end. One that was protected because it has children is immutable.
fn refuse_unremovable(path: &Path) -> Result<()> {
    let failed = |error| Error::io(error, "can't be removed from its folder, as it would be once it is merged").at(path);
    may_change_names_beside(path).map_err(failed)?;
    if protection::is_immutable(path) {
        let message = "is immutable, so it can't be removed once it is merged; `chattr -i` ends that";
        return Err(Error::new(ErrorKind::ReadOnly, message).at(path));
    }
    Ok(())
}

pub(super) fn read_only(chain: &ChainOptions) -> ChainOptions {
    ChainOptions { image: OpenOptions { writable: false, ..chain.image.clone() }, ..chain.clone() }
}

/// The merge that was begun into the image at `target`, as its record says.
fn unfinished(target: &Path) -> Result<Option<Merge>> {
    intent::merge_of(target, uuid_of_file(target)?)
}

fn depth_of_target(chain: &Chain, into: Option<&Path>) -> Result<usize> {
    let leaf = chain.layers()[0].path();
    let depth = match into {
        None => 1,
        Some(into) => crate::ops::diff::depth_of(chain, into)?,
    };
    let message = match chain.layers().get(depth) {
        Some(_) if depth > 0 => return Ok(depth),
        Some(_) => "can't be merged into itself; --into takes its parent, or one of that one's",
        None => "has no parent to merge into",
    };
    Err(Error::new(ErrorKind::InvalidInput, message).at(leaf))
}

/// Children of the target and of the images between that are not part of the merge.
fn lost_by(layers: &[Layer], depth: usize) -> Vec<PathBuf> {
    let mut lost = Vec::new();
    for index in 1..=depth {
        let Some(image) = layers[index].image() else { continue };
        let uuid = image.footer().uuid();
        if uuid == [0; 16] {
            continue;
        }
        let part = layers[index - 1].path().canonicalize().ok();
        lost.extend(find_children(image.path(), uuid).into_iter().filter(|child| child.canonicalize().ok() != part));
    }
    lost
}

fn refuse_unforced(layers: &[Layer], depth: usize, lost: &[PathBuf]) -> Result<()> {
    let target = layers[depth].path();
    if let Some(child) = lost.first() {
        let more = if lost.len() > 1 { format!(" and {} more", lost.len() - 1) } else { String::new() };
        let message = format!(
            "the merge changes what {}{more} is based on, so it could not be used afterwards; merge or convert it first, or \
             use --force if it may be lost",
            child.display()
        );
        return Err(Error::new(ErrorKind::Refused, message).at(target));
    }
    for image in layers[..=depth].iter().filter_map(Layer::image) {
        if image.footer().saved_state() {
            let message = "a saved state of a virtual machine relies on it; restore or discard that, or use --force";
            return Err(Error::new(ErrorKind::Refused, message).at(image.path()));
        }
    }
    if protection::is_read_only(target) {
        let message = "is write-protected; --force writes to it all the same";
        return Err(Error::new(ErrorKind::Refused, message).at(target));
    }
    Ok(())
}
