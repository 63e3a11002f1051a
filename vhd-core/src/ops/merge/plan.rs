//! What a merge will do, and whether it may.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::io::Errno;
use uuid::Uuid;

use super::MergeOptions;
use super::copy::amount;
use crate::block::BlockDevice;
use crate::chain::{Chain, ChainOptions, Layer, UndoSession, find_children, refuse_linked, relative_to};
use crate::error::{Error, ErrorKind, Result};
use crate::format::DiskType;
use crate::image::{Image, OpenOptions};
use crate::intent::{self, FooterMove, Member, Merge};
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
    /// Children of the images that change which are lost: they refuse to open afterwards.
    pub lost: Vec<PathBuf>,
    /// What an interrupted merge recorded, which is finished.
    pub(crate) resumed: Option<Merge>,
}

impl MergePlan {
    /// True when an interrupted merge is finished.
    #[must_use]
    pub fn is_resumed(&self) -> bool {
        self.resumed.is_some()
    }
}

/// Plans a merge of the image at `leaf`. An interrupted one is planned as it was begun.
///
/// # Errors
/// `InvalidInput` when there is nothing to merge into; `Refused` for what only `force` allows; as the images can't be
/// read.
pub fn plan(leaf: &Path, options: &MergeOptions, chain: &ChainOptions) -> Result<MergePlan> {
    plan_for(leaf, options, false, chain)
}

/// As [`plan`], of one image of an undo session whose commit merges them all.
///
/// # Errors
/// As there.
pub(crate) fn plan_of_commit(leaf: &Path, options: &MergeOptions, chain: &ChainOptions) -> Result<MergePlan> {
    plan_for(leaf, options, true, chain)
}

fn plan_for(leaf: &Path, options: &MergeOptions, is_commit: bool, chain: &ChainOptions) -> Result<MergePlan> {
    if let Some(target) = &options.into
        && let Some(merge) = unfinished(target, leaf)?
    {
        return resumed(merge, chain);
    }
    let look = read_only(chain);
    let opened = Chain::open(leaf, &look)?;
    let depth = depth_of_target(&opened, options.into.as_deref())?;
    let layers = opened.layers();
    layers[..depth].iter().filter_map(Layer::image).try_for_each(|image| refuse_linked(image, "is only read"))?;
    let target = &layers[depth];
    if let Some(merge) = unfinished(target.path(), leaf)? {
        return resumed(merge, chain);
    }
    let uuid = layers[0].image().map(|image| image.footer().uuid()).unwrap_or_default();
    let lost = lost_by(layers, depth);
    let children = if uuid == [0; 16] { Vec::new() } else { find_children(leaf, uuid) };
    if !options.force {
        refuse_unforced(layers, depth, &lost)?;
        if !is_commit {
            refuse_parting(&layers[..depth], &children, &look)?;
        }
    }
    let real = |path: &Path| path.canonicalize().map_err(|error| Error::io(error, "can't be resolved").at(path));
    let upper = Chain::over(layers[0].clone(), layers[1..depth].to_vec());
    let size = upper.capabilities().size;
    let grow_to = (target.size() < size).then_some(size);
    if grow_to.is_some() && layers.get(depth + 1).is_some_and(|below| below.size() > target.size()) {
        let message = format!("has to grow to {size} bytes, where its own parent, which is larger, would show; convert it first");
        return Err(Error::new(ErrorKind::Refused, message).at(target.path()));
    }
    let new_uuid = Uuid::new_v4();
    let grow =
        target.image().zip(grow_to).and_then(|(image, size)| fixed_growth(image, size, new_uuid).transpose()).transpose()?;
    let member = Member {
        target: real(target.path())?,
        target_uuid: target.image().map(|image| (Uuid::from_bytes(image.footer().uuid()), new_uuid)),
        leaf: real(leaf)?,
        leaf_uuid: Uuid::from_bytes(uuid),
        between: layers[1..depth].iter().map(|layer| real(layer.path())).collect::<Result<_>>()?,
        children: children.iter().map(|child| real(child)).collect::<Result<_>>()?,
        delete: options.delete,
        grow,
    };
    let amount = amount(&upper, target.size())?;
    refuse_larger_children(&member, size, target.size(), chain)?;
    refuse_unrecordable(&member)?;
    refuse_unwritable(target, &member, options.force, chain)?;
    Ok(MergePlan { member, data: amount.data, zeros: amount.zeros, grow_to, lost, resumed: None })
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
    for child in member.children.iter().filter(|_| target > size) {
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
    let mut named = [&member.target, &member.leaf].into_iter().chain(&member.between).chain(&member.children);
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
    let lifted = force && is_protected(target.path());
    let file = if lifted { FileStorage::open(target.path(), false)? } else { FileStorage::rehearse(target.path())? };
    if target.image().is_some() {
        Image::rehearse(&file, target.path(), &options)?;
    }
    let leaf = (!member.delete).then_some(member.leaf.as_path());
    let mut relinked = leaf.into_iter().chain(member.children.iter().map(PathBuf::as_path));
    relinked.try_for_each(|path| Image::rehearse(&FileStorage::rehearse(path)?, path, &options))?;
    let removed = std::iter::once(&member.leaf).chain(&member.between).filter(|_| member.delete);
    removed.into_iter().try_for_each(|path| refuse_unremovable(path))
}

/// True for a file that nobody may write, whoever asks.
fn is_protected(path: &Path) -> bool {
    is_read_only(path) || is_immutable(path)
}

fn is_read_only(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.permissions().readonly())
}

fn is_immutable(path: &Path) -> bool {
    accessat(CWD, path, Access::WRITE_OK, AtFlags::EACCESS) == Err(Errno::PERM)
}

/// Refuses an image that could not be removed at the end. One that was protected because it has children is immutable.
fn refuse_unremovable(path: &Path) -> Result<()> {
    let failed = |error| Error::io(error, "can't be removed from its folder, as it would be once it is merged").at(path);
    may_change_names_beside(path).map_err(failed)?;
    if is_immutable(path) {
        let message = "is immutable, so it can't be removed once it is merged; `chattr -i` ends that";
        return Err(Error::new(ErrorKind::ReadOnly, message).at(path));
    }
    Ok(())
}

/// How a fixed target becomes `size` bytes large.
fn fixed_growth(target: &Image, size: u64, uuid: Uuid) -> Result<Option<FooterMove>> {
    if target.footer().disk_type() != DiskType::Fixed {
        return Ok(None);
    }
    let end = target.storage().len().map_err(|error| target.read_error(error, 0))?;
    let mut footer = target.footer().clone();
    footer.set_uuid(uuid.into_bytes());
    footer.set_size(size);
    Ok(Some(FooterMove::new(target.size(), end, size, &footer)))
}

pub(super) fn read_only(chain: &ChainOptions) -> ChainOptions {
    ChainOptions { image: OpenOptions { writable: false, ..chain.image.clone() }, ..chain.clone() }
}

/// The unfinished merge of `leaf` into `target`.
fn unfinished(target: &Path, leaf: &Path) -> Result<Option<Merge>> {
    let uuid = crate::chain::uuid_of_file(target)?;
    let Some(merge) = intent::merge_of(target, uuid)? else { return Ok(None) };
    if merge.undo {
        intent::refuse(target, uuid, &[])?;
    }
    // The child may be removed already, so names are all there is to compare.
    let is_leaf = |member: &Member| leaf.file_name() == member.leaf.file_name();
    if merge.members.iter().any(is_leaf) { Ok(Some(merge)) } else { intent::refuse(target, uuid, &[]).map(|()| None) }
}

/// What is left to do of merges that were begun as one. How much they move is not counted again.
pub(crate) fn plans_of(merge: &Merge) -> Vec<MergePlan> {
    let plan = |member: &Member| MergePlan {
        member: member.clone(),
        data: 0,
        zeros: 0,
        grow_to: None,
        lost: Vec::new(),
        resumed: Some(merge.clone()),
    };
    merge.members.iter().map(plan).collect()
}

/// The plan of a merge that was begun.
fn resumed(merge: Merge, chain: &ChainOptions) -> Result<MergePlan> {
    let Some(member) = merge.members.first().cloned() else {
        return Err(Error::new(ErrorKind::Corrupt, "the intent record names no image"));
    };
    let mut plan = MergePlan { member, data: 0, zeros: 0, grow_to: None, lost: Vec::new(), resumed: None };
    if !merge.finishing {
        let upper = upper(&plan.member, &read_only(chain))?;
        let amount = amount(&upper, upper.capabilities().size)?;
        (plan.data, plan.zeros) = (amount.data, amount.zeros);
    }
    plan.resumed = Some(merge);
    Ok(plan)
}

/// The images above the target, without what is below them.
pub(super) fn upper(member: &Member, look: &ChainOptions) -> Result<Chain> {
    let open = |path: &PathBuf| Ok(Layer::Image(Arc::clone(&Chain::open_image(path, look)?)));
    let between = member.between.iter().map(open).collect::<Result<Vec<_>>>()?;
    Ok(Chain::over(open(&member.leaf)?, between))
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
    if is_read_only(target) {
        let message = "is write-protected; --force writes to it all the same";
        return Err(Error::new(ErrorKind::Refused, message).at(target));
    }
    Ok(())
}
