//! Going on with a merge that was begun: what the call names, proved to be what the record says, and how far the images came.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::plan::{Step, plan_of, read_only, real};
use super::{MergeOptions, MergePlan};
use crate::chain::{Chain, ChainOptions, is_child_of, relative_to, uuid_of_file};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Stage;
use crate::image::Footers;
use crate::intent::{Member, Merge, Named};
use crate::storage::{Beneath, FileStorage, folder_of, open_beneath};

/// Plans what is left of a merge into `target`, as the call asks for it.
pub(super) fn plan(leaf: &Path, target: &Path, merge: &Merge, options: &MergeOptions, chain: &ChainOptions) -> Result<MergePlan> {
    let uuid = uuid_of_file(target)?.map(Uuid::from_bytes);
    let is_it = |member: &&Member| match (member.target_uuid, uuid) {
        (Some((old, new)), Some(uuid)) => uuid == old || uuid == new,
        // A fixed disk that grows may have lost its footer in a power cut.
        (Some(_), None) => member.grow.is_some(),
        (None, uuid) => uuid.is_none(),
    };
    let Some(member) = merge.members.iter().find(is_it) else {
        return Err(Error::new(ErrorKind::Refused, "is not the image that its intent record is about").at(target));
    };
    let found = if leaf.exists() { uuid_of_file(leaf)?.map(Uuid::from_bytes) } else { None };
    if leaf.exists() && found != Some(member.leaf_uuid) {
        let found = found.map_or("no footer of a VHD".into(), |uuid| format!("UUID {uuid}"));
        let message = format!(
            "has {found}, expected {}: it is not the image whose merge into {} was begun",
            member.leaf_uuid,
            target.display()
        );
        return Err(Error::new(ErrorKind::Refused, message).at(leaf));
    }
    refuse_other_options(leaf, merge, member, options)?;
    let stage = stage_of(target)?;
    let is_moved = match member.target_uuid {
        // Of a former version the new identifier came first.
        Some((_, new)) => uuid == Some(new) && merge.force.is_some() && stage.is_none(),
        None => merge.finishing,
    };
    if is_moved || !leaf.exists() {
        return moved(leaf, target, merge, member, options);
    }
    let is_growing = matches!(stage, Some(Stage::Resize { .. })) || (uuid.is_none() && member.target_uuid.is_some());
    if is_growing {
        return growing(leaf, target, member, options);
    }
    let look = ChainOptions { resuming: true, ..read_only(chain) };
    let opened = Chain::open(leaf, &look)?;
    let depth = crate::ops::diff::depth_of(&opened, target)?;
    let mut plan = plan_of(&opened, depth, &MergeOptions { force: true, ..options.clone() }, true, &look)?;
    let is_same =
        |a: &[Named], b: &[Named]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.uuid.is_none() || a.uuid == b.uuid);
    if !is_same(&member.between, &plan.member.between) {
        let message = format!("the images between it and {} are not those with which its merge was begun", target.display());
        return Err(Error::new(ErrorKind::Refused, message).at(leaf));
    }
    // Children that were told already have the new identifier.
    for child in children(leaf, target, member, options)? {
        if !plan.member.children.iter().any(|known| known.path == child.path) {
            plan.member.children.push(child);
        }
    }
    plan.member.target_uuid = member.target_uuid;
    plan.member.protection = member.protection.or(plan.member.protection);
    plan.member.grow = member.grow.clone();
    plan.step = Step::Begun;
    Ok(plan)
}

/// A target without a footer can't be opened before it has one again: the plan is the record's, its files proved.
fn growing(leaf: &Path, target: &Path, member: &Member, options: &MergeOptions) -> Result<MergePlan> {
    let located = |named: &Named| {
        let missing = || Error::new(ErrorKind::NotFound, "is an image between that is missing; bring it back").at(&named.path);
        locate(named, leaf, target, options)?.ok_or_else(missing)
    };
    let between = member.between.iter().map(located).collect::<Result<Vec<_>>>()?;
    prove_chain(leaf, &between, member)?;
    let children = children(leaf, target, member, options)?;
    let grow_to = member.grow.as_ref().map(|grow| grow.to);
    let member = Member { target: real(target)?, leaf: real(leaf)?, between, children, ..member.clone() };
    Ok(MergePlan { member, data: 0, zeros: 0, grow_to, lost: Vec::new(), step: Step::Begun })
}

/// Refuses images that are no chain down to the target, whatever the record says: each is the parent of the one before, as the images
/// themselves have it. The lowest may be gone already.
fn prove_chain(leaf: &Path, between: &[Named], member: &Member) -> Result<()> {
    let images: Vec<&Path> = std::iter::once(leaf).chain(between.iter().map(|named| &*named.path)).collect();
    let uuids = images.iter().map(|path| uuid_of_file(path)).collect::<Result<Vec<_>>>()?;
    let (old, new) = member.target_uuid.map_or(([0; 16], [0; 16]), |(old, new)| (old.into_bytes(), new.into_bytes()));
    // What is below the last that is there: an image that was removed, or the target.
    let below = member.between.get(between.len()).map_or(Some(old), |named| named.uuid.map(Uuid::into_bytes));
    for (index, image) in images.iter().enumerate() {
        let parent = uuids.get(index + 1).copied().flatten().or(below);
        let is_told = index == 0 && !member.delete && is_child_of(image, new)?;
        if !is_told && !parent.map_or(Ok(false), |parent| is_child_of(image, parent))? {
            let message = format!(
                "is no child of what the record of its merge into {} has below it, so the merge can't be finished; \
                 `vhd check --clear-record` shows what was recorded",
                member.target.display()
            );
            return Err(Error::new(ErrorKind::Refused, message).at(image));
        }
    }
    Ok(())
}

/// Refuses what the merge was not begun with.
fn refuse_other_options(leaf: &Path, merge: &Merge, member: &Member, options: &MergeOptions) -> Result<()> {
    let differs = [("--delete", member.delete, options.delete), ("--force", merge.force.unwrap_or(options.force), options.force)];
    let Some((name, was, _)) = differs.into_iter().find(|(_, was, is)| was != is) else { return Ok(()) };
    let message = format!(
        "its merge was begun {} {name}, and can only be finished so: {}",
        if was { "with" } else { "without" },
        merge.command()
    );
    Err(Error::new(ErrorKind::Refused, message).at(leaf))
}

/// The mark that a target bears.
fn stage_of(target: &Path) -> Result<Option<Stage>> {
    let footers =
        Footers::read(&FileStorage::open(target, false)?).map_err(|error| Error::io(error, "can't be read").at(target))?;
    Ok(footers.stage().map(|(stage, _)| stage))
}

/// What is left when the target holds everything. Files that went already were removed by the merge, from the lowest on.
fn moved(leaf: &Path, target: &Path, merge: &Merge, member: &Member, options: &MergeOptions) -> Result<MergePlan> {
    let refused = |path: &Path, message: String| Err(Error::new(ErrorKind::Refused, message).at(path));
    let is_here = leaf.exists();
    let mut between = Vec::new();
    for named in &member.between {
        match locate(named, leaf, target, options)? {
            Some(found) if is_here || !member.delete => between.push(found),
            // A former version removed the leaf first.
            Some(found) => {
                let message = format!(
                    "was to be removed with {}, without which nothing shows that {} holds what it does; remove it, and the same \
                     command ends the merge",
                    leaf.display(),
                    target.display()
                );
                return refused(&found.path, message);
            }
            None if member.delete => {}
            None => {
                return refused(
                    &named.path,
                    "is an image between that is missing, which a merge without --delete does not remove".into(),
                );
            }
        }
    }
    let may_be_gone = member.delete && merge.finishing;
    if !is_here && !may_be_gone {
        let message = format!("is missing, so its merge into {} can't be finished; bring it back", target.display());
        return Err(Error::new(ErrorKind::NotFound, message).at(leaf));
    }
    if is_here {
        prove_chain(leaf, &between, member)?;
    }
    let children = children(leaf, target, member, options)?;
    let leaf = if is_here { real(leaf)? } else { leaf.to_owned() };
    let member = Member { target: real(target)?, leaf, between, children, ..member.clone() };
    Ok(MergePlan { member, data: 0, zeros: 0, grow_to: None, lost: Vec::new(), step: Step::Moved })
}

/// The recorded children that are to be told, or were told already. What is gone, or no child of either any more, is left alone.
fn children(leaf: &Path, target: &Path, member: &Member, options: &MergeOptions) -> Result<Vec<Named>> {
    let new = member.target_uuid.map_or([0; 16], |(_, new)| new.into_bytes());
    let mut found = Vec::new();
    for named in &member.children {
        if let Some(child) = locate(named, leaf, target, options)?
            && (is_child_of(&child.path, member.leaf_uuid.into_bytes())? || is_child_of(&child.path, new)?)
        {
            found.push(child);
        }
    }
    Ok(found)
}

/// The file that a record names: beside the leaf or the target, or below, or where the call names it; and only the one that has
/// the identifier. `None` where there is none.
fn locate(named: &Named, leaf: &Path, target: &Path, options: &MergeOptions) -> Result<Option<Named>> {
    let is_it = |path: &Path| -> Result<bool> {
        Ok(named.uuid.is_none_or(|uuid| uuid_of_file(path).ok().flatten() == Some(uuid.into_bytes())))
    };
    if named.uuid.is_some() {
        for path in &options.with {
            if is_it(path)? {
                return Ok(Some(Named { path: real(path)?, uuid: named.uuid }));
            }
        }
    }
    for image in [leaf, target] {
        let folder = real(folder_of(image))?;
        let Ok(below) = named.path.strip_prefix(&folder) else { continue };
        if open_beneath(&folder, below, Beneath::NoLinks)?.is_none() {
            return Ok(None);
        }
        if !is_it(&named.path)? {
            let message = "is not the image that the record of the merge names: its identifier is another one; move it away, or \
                           bring the right one back";
            return Err(Error::new(ErrorKind::Refused, message).at(&named.path));
        }
        return Ok(Some(named.clone()));
    }
    let message = format!(
        "is in another folder than {} and {}, and part of their merge; --with names it",
        leaf.display(),
        target.display()
    );
    let shown: PathBuf = if named.path.is_absolute() { named.path.clone() } else { relative_to(&named.path, folder_of(target)) };
    Err(Error::new(ErrorKind::Refused, message).at(&shown))
}
