//! Doing a merge: the record, the target's mark, the data, the target's new identifier, then everything that refers to either.

use std::path::Path;
use std::sync::Arc;

use super::copy::copy_up;
use super::hold::Held;
use super::plan::Step;
use super::{MergeOptions, MergePlan, protection};
use crate::block::{BlockDevice, Disk};
use crate::chain::{Chain, ChainOptions, link_to};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{DiskType, Footer, Stage};
use crate::image::{Footers, Image, OpenOptions, Staged};
use crate::intent::{self, Intent, Member, Merge, finish_resize, resize_fixed};
use crate::progress::Progress;
use crate::storage::{FileStorage, Storage, folder_of};

/// Does what was planned. Interrupted at any point, it is finished by planning and doing it again.
///
/// # Errors
/// `Cancelled`; `Refused` where the images are no longer what the plan was made of; as they can't be opened, read or written.
pub fn execute(plan: &MergePlan, options: &MergeOptions, chain: &ChainOptions, progress: &Progress) -> Result<()> {
    progress.set_total(plan.data);
    let mut chain = chain.clone();
    chain.parents.images.extend(options.with.iter().cloned());
    run_all(vec![plan.clone()], false, options.force, &chain, progress)
}

/// Does or finishes merges that are one.
pub(crate) fn run_all(plans: Vec<MergePlan>, undo: bool, force: bool, chain: &ChainOptions, progress: &Progress) -> Result<()> {
    let members = plans.iter().map(|plan| plan.member.clone()).collect();
    let begun = plans.iter().any(MergePlan::is_resumed);
    let mut run =
        Run { merge: Merge { members, undo, finishing: false, force: Some(force) }, begun, changed: begun, chain, progress };
    let protected: Vec<_> =
        run.merge.members.iter().filter_map(|member| Some((member.target.clone(), member.protection?))).collect();
    if !protected.is_empty() {
        // What is lifted is recorded first: whoever goes on protects it again.
        run.record()?;
    }
    let lifted = protected.iter().try_for_each(|(target, _)| protection::lift(target));
    let done = lifted.and_then(|()| run.run(plans));
    let restored = protected.iter().try_for_each(|(target, found)| protection::restore(target, *found));
    if done.is_err() && !run.changed {
        let _ = run.remove_records();
    }
    done.and(restored)?;
    run.remove_records()
}

/// Merges under way.
struct Run<'a> {
    merge: Merge,
    /// Their records are durable.
    begun: bool,
    /// Something was changed that only going on makes whole.
    changed: bool,
    chain: &'a ChainOptions,
    progress: &'a Progress,
}

impl Run<'_> {
    fn run(&mut self, plans: Vec<MergePlan>) -> Result<()> {
        let held = plans.into_iter().map(|plan| Held::new(plan, self.chain)).collect::<Result<Vec<_>>>()?;
        for held in &held {
            match held.plan.step {
                Step::Moved => held.prove(self.chain)?,
                Step::New | Step::Begun => self.move_data(held)?,
            }
        }
        held.iter().try_for_each(|held| relink_all(held, self.chain))?;
        if !held.iter().any(|held| held.plan.member.delete) {
            return Ok(());
        }
        self.merge.finishing = true;
        self.put()?;
        held.iter().filter(|held| held.plan.member.delete).try_for_each(|held| self.remove_merged(&held.plan.member))
    }

    /// Removes the images between, from the lowest on, and then the child: what is left is always read as it was.
    fn remove_merged(&self, member: &Member) -> Result<()> {
        let between = member.between.iter().rev().map(|named| &named.path);
        between.chain([&member.leaf]).try_for_each(|path| {
            self.chain.host.remove(path)?;
            self.chain.host.sync_folder(folder_of(path))
        })
    }

    /// Makes the records durable, once: the first change of a target comes after all of them.
    fn record(&mut self) -> Result<()> {
        if !self.begun {
            self.put()?;
            self.begun = true;
        }
        Ok(())
    }

    fn put(&self) -> Result<()> {
        self.merge.members.iter().try_for_each(|member| {
            let record = Intent::Merge(self.merge.relative_to(folder_of(&member.target)));
            intent::put(&*self.chain.host, &member.target, &record)
        })
    }

    fn remove_records(&self) -> Result<()> {
        self.merge.members.iter().try_for_each(|member| intent::remove(&*self.chain.host, &member.target))
    }

    /// Moves what the images above the target hold into it, and makes it durable.
    fn move_data(&mut self, held: &Held) -> Result<()> {
        let (path, member) = (&held.plan.member.target, &held.plan.member);
        let Some(upper) = held.upper(self.chain)? else {
            return Err(Error::new(ErrorKind::NotFound, "is missing, so its merge can't be finished").at(&member.leaf));
        };
        let size = upper.capabilities().size;
        let storage = self.chain.host.adopt(Arc::clone(&held.target));
        if let Some((old, new)) = member.target_uuid {
            if let Some(growth) = member.grow.as_ref().filter(|_| held.plan.step == Step::Begun) {
                growth.finish_growth(&*storage).map_err(|error| error.at(path))?;
            }
            self.mend(&storage, path, &[old.into_bytes(), new.into_bytes()])?;
        }
        self.record()?;
        self.changed = true;
        let Some((_, new)) = member.target_uuid else {
            grow_raw(&*storage, path, size)?;
            return copy_into(&upper, Chain::raw_held(path, storage, false)?, self.progress);
        };
        let footer = self.mark(&storage, path, size)?;
        let open = ChainOptions { image: self.writing(), resuming: true, ..self.chain.clone() };
        let staged = Staged::over(Arc::clone(&storage), Stage::Merge, footer.disk_type());
        // Opening it begins with a barrier: the mark is durable before any data is.
        copy_into(&upper, Chain::open_held(path, &held.target, staged, &open)?, self.progress)?;
        // Whoever knew it by its old identifier must not take it for what it was.
        Staged::finish(&*storage, |footer| footer.set_uuid(new.into_bytes())).map_err(|error| error.at(path))
    }

    fn writing(&self) -> OpenOptions {
        OpenOptions { writable: true, force: true, background_flush: None, ..self.chain.image.clone() }
    }

    /// Makes the footers of a target sound, as they must be when one of them changes, and refuses another image.
    fn mend(&self, storage: &Arc<dyn Storage>, path: &Path, expected: &[[u8; 16]]) -> Result<()> {
        if merge_mark(&**storage, path)?.is_some() {
            return Ok(());
        }
        finish_resize(&**storage).map_err(|error| error.at(path))?;
        let image = Image::open(Arc::clone(storage), path, &self.writing())?;
        if !expected.contains(&image.footer().uuid()) {
            let message = "is not the image that the merge was planned for: its identifier is another one";
            return Err(Error::new(ErrorKind::Parent, message).at(path));
        }
        image.close()
    }

    /// Gives a target the size of the child, and then its mark. Returns the footer that it will have but for its identifier.
    fn mark(&self, storage: &Arc<dyn Storage>, path: &Path, size: u64) -> Result<Footer> {
        let at = |error: Error| error.at(path);
        if let Some(footer) = merge_mark(&**storage, path)? {
            return Ok(footer);
        }
        let look = OpenOptions { writable: false, ..self.writing() };
        let image = Image::open(Arc::clone(storage), path, &look)?;
        let (mut footer, found) = (image.footer().clone(), image.size());
        drop(image);
        if found < size && footer.disk_type() == DiskType::Fixed {
            footer.set_size(size);
            resize_fixed(&**storage, found, &footer).map_err(at)?;
        } else if found < size {
            Image::set_size(storage, path, size, &self.writing(), false, &mut |_| Ok(())).map_err(at)?;
        }
        Staged::mark(&**storage, Stage::Merge, |_| ()).map_err(at)?;
        Ok(footer)
    }
}

/// The footer of a target that bears the mark of a merge already.
fn merge_mark(storage: &dyn Storage, path: &Path) -> Result<Option<Footer>> {
    let footers = Footers::read(storage).map_err(|error| Error::io(error, "can't be read").at(path))?;
    Ok(match footers.stage() {
        Some((Stage::Merge, footer)) => Some(footer),
        _ => None,
    })
}

fn copy_into(upper: &Chain, target: Chain, progress: &Progress) -> Result<()> {
    let target = Disk::new(target);
    copy_up(upper, &target, progress)?;
    target.flush()?;
    target.close()
}

fn grow_raw(storage: &dyn Storage, path: &Path, size: u64) -> Result<()> {
    let failed = |error| Error::io(error, format!("can't grow to {size} bytes")).at(path);
    if storage.len().map_err(failed)? < size {
        storage.set_len(size).map_err(failed)?;
        storage.sync().map_err(failed)?;
    }
    Ok(())
}

/// Makes the child, where it stays, and its own children where it goes, children of the target.
fn relink_all(held: &Held, chain: &ChainOptions) -> Result<()> {
    let member = &held.plan.member;
    let uuid = member.target_uuid.map_or([0; 16], |(_, new)| new.into_bytes());
    if let Some(leaf) = held.leaf.as_ref().filter(|_| !member.delete) {
        relink(leaf, &member.target, uuid, chain)?;
    }
    held.children.iter().try_for_each(|child| relink(child, &member.target, uuid, chain))
}

/// Makes an image a child of the one at `target`, whose identifier is `uuid`.
fn relink(child: &Arc<FileStorage>, target: &Path, uuid: [u8; 16], chain: &ChainOptions) -> Result<()> {
    let path = child.path();
    let link = link_to(path, target, uuid)?;
    let options = OpenOptions { force: true, ..chain.image.clone() };
    Image::set_parent(&chain.host.adopt(Arc::clone(child)), path, &link, &options).map_err(|error| error.at(path))
}
