//! The files of a merge, held by it alone from before the first change until the last: nobody makes a child of an image that
//! goes, and nothing takes a file's name meanwhile.

use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::MergePlan;
use super::copy::first_difference;
use super::plan::{Step, children_of};
use crate::block::Disk;
use crate::chain::{Chain, ChainOptions, Layer, uuid_of_file};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Image, OpenOptions};
use crate::intent::Named;
use crate::storage::{FileStorage, LockMode};

/// One merge, its files open and locked.
pub(super) struct Held {
    pub(super) plan: MergePlan,
    pub(super) target: Arc<FileStorage>,
    /// Gone where it was removed before an interruption.
    pub(super) leaf: Option<Arc<FileStorage>>,
    between: Vec<Arc<FileStorage>>,
    pub(super) children: Vec<Arc<FileStorage>>,
}

impl Held {
    /// Takes the files of `plan`, and refuses where they are no longer what it was made of.
    pub(super) fn new(plan: MergePlan, chain: &ChainOptions) -> Result<Self> {
        let member = &plan.member;
        let is_here = member.leaf.exists();
        // What is removed is only read, but by nobody else.
        let leaf = if is_here { Some(take(&member.leaf, !member.delete, LockMode::Write, chain)?) } else { None };
        let mode = if member.delete { LockMode::Write } else { LockMode::Read };
        let all = |named: &[Named], writable, mode| {
            named.iter().map(|named| take(&named.path, writable, mode, chain)).collect::<Result<Vec<_>>>()
        };
        let between = all(&member.between, false, mode)?;
        let children = all(&member.children, true, LockMode::Write)?;
        let target = take(&member.target, true, LockMode::Write, chain)?;
        let held = Self { target, leaf, between, children, plan };
        held.refuse_others()?;
        Ok(held)
    }

    /// Refuses files that were replaced since the plan was made, and children that came.
    fn refuse_others(&self) -> Result<()> {
        let member = &self.plan.member;
        let leaf = [Named { path: member.leaf.clone(), uuid: Some(member.leaf_uuid) }];
        let leaf = if self.leaf.is_some() { &leaf[..] } else { &[] };
        for named in leaf.iter().chain(&member.between).chain(&member.children) {
            let found = uuid_of_file(&named.path)?.map(Uuid::from_bytes);
            if named.uuid.is_some() && found != named.uuid {
                return Err(Error::new(ErrorKind::Refused, "was replaced by another image meanwhile; try again").at(&named.path));
            }
        }
        if self.leaf.is_none() || self.plan.step == Step::Moved {
            return Ok(());
        }
        let known = |child: &Path| member.children.iter().any(|named| named.path == child);
        let found = children_of(&member.leaf, member.leaf_uuid.into_bytes(), &[])?;
        match found.iter().find(|child| child.canonicalize().is_ok_and(|child| !known(&child))) {
            Some(new) => {
                let message = format!("got a child meanwhile, {}; try again", new.display());
                Err(Error::new(ErrorKind::Refused, message).at(&member.leaf))
            }
            None => Ok(()),
        }
    }

    /// The images above the target, without what is below them; `None` where the child is gone.
    pub(super) fn upper(&self, chain: &ChainOptions) -> Result<Option<Chain>> {
        let look = OpenOptions { writable: false, ..chain.image.clone() };
        let open = |file: &Arc<FileStorage>| Ok(Layer::Image(Image::open(Arc::clone(file) as _, file.path(), &look)?));
        let Some(leaf) = &self.leaf else { return Ok(None) };
        let between = self.between.iter().map(open).collect::<Result<Vec<_>>>()?;
        Ok(Some(Chain::over(open(leaf)?, between)))
    }

    /// Refuses a target that does not hold all that the images above it do: they are not removed then.
    pub(super) fn prove(&self, chain: &ChainOptions) -> Result<()> {
        let Some(upper) = self.upper(chain)? else { return Ok(()) };
        let member = &self.plan.member;
        let image = OpenOptions { writable: false, ..chain.image.clone() };
        let look = ChainOptions { image, resuming: true, ..chain.clone() };
        let target = match member.target_uuid {
            Some(_) => Chain::open_held(&member.target, &self.target, Arc::clone(&self.target) as _, &look)?,
            None => Chain::raw_held(&member.target, Arc::clone(&self.target) as _, true)?,
        };
        match first_difference(&upper, &Disk::new(target))? {
            None => Ok(()),
            Some(at) => {
                let message = format!(
                    "does not hold what {} does at byte {at}: one of them was changed since their merge was interrupted; nothing was \
                     removed. `vhd check --clear-record` gives the merge up",
                    member.leaf.display()
                );
                Err(Error::new(ErrorKind::Refused, message).at(&member.target))
            }
        }
    }
}

/// Opens and locks a file, and makes sure that it still has its name.
fn take(path: &Path, writable: bool, mode: LockMode, chain: &ChainOptions) -> Result<Arc<FileStorage>> {
    let file = crate::chain::open_file(path, writable, chain)?;
    file.lock(mode)?;
    file.refuse_renamed()?;
    Ok(file)
}
