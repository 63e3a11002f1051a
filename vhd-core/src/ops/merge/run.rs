//! Doing a merge: the record, the target's new identifier, the data, then everything that refers to either.

use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::copy::copy_up;
use super::plan::{read_only, upper};
use super::{MergeOptions, MergePlan};
use crate::block::{BlockDevice, Disk};
use crate::chain::{Chain, ChainOptions, link_to};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Image, OpenOptions};
use crate::intent::{self, Intent, Member, Merge};
use crate::progress::Progress;
use crate::storage::{FileStorage, LockMode, folder_of};

/// Does what was planned. Interrupted at any point, it is finished by planning and doing it again.
///
/// # Errors
/// `Cancelled`; as the images can't be opened, read or written.
pub fn execute(plan: &MergePlan, options: &MergeOptions, chain: &ChainOptions, progress: &Progress) -> Result<()> {
    progress.set_total(plan.data);
    let merge = Merge { members: vec![plan.member.clone()], ..Merge::default() };
    run_all(plan.resumed.clone().unwrap_or(merge), plan.is_resumed(), options.force, chain, progress)
}

/// Does or finishes merges that are one. `begun` says that their record is durable already; with `force` the targets' protection
/// is lifted meanwhile.
pub(crate) fn run_all(mut merge: Merge, mut begun: bool, force: bool, chain: &ChainOptions, progress: &Progress) -> Result<()> {
    // That of all of them before the first is begun: where one can't be lifted nothing was changed.
    let lifted = merge.members.iter().filter(|_| force).map(|member| protection::Lifted::of(&member.target));
    let _writable: Vec<_> = lifted.collect::<Result<_>>()?;
    let Some(first) = merge.members.first().map(|member| member.target.clone()) else { return Ok(()) };
    if !merge.finishing {
        for member in &merge.members {
            if begun {
                // What an interruption left is no image until its footer is there.
                grow_fixed(member, chain)?;
            }
            let mut begin = || {
                if !begun {
                    record(&merge, chain)?;
                    begun = true;
                }
                Ok(())
            };
            move_data(member, &mut begin, chain, progress)?;
        }
        for member in &merge.members {
            relink_all(member, chain)?;
        }
        merge.finishing = true;
        if merge.members.iter().any(|member| member.delete) {
            put(&merge, &first, chain)?;
        }
    }
    for member in merge.members.iter().filter(|member| member.delete) {
        let mut folders = Vec::new();
        for path in std::iter::once(&member.leaf).chain(&member.between) {
            chain.host.remove(path)?;
            folders.push(folder_of(path));
        }
        folders.dedup();
        folders.into_iter().try_for_each(|folder| chain.host.sync_folder(folder))?;
    }
    for member in merge.members.iter().skip(1) {
        intent::remove(&*chain.host, &member.target)?;
    }
    intent::remove(&*chain.host, &first)
}

/// Makes the records durable, that of the first target last: with it the merges are decided.
fn record(merge: &Merge, chain: &ChainOptions) -> Result<()> {
    let Some((first, rest)) = merge.members.split_first() else { return Ok(()) };
    let decisive = intent::path_of(&first.target)?;
    for member in rest {
        let record = crate::chain::relative_to(&decisive, folder_of(&member.target));
        let part = Intent::PartOf { record, uuids: member.target_uuids() };
        intent::put(&*chain.host, &member.target, &part)?;
    }
    put(merge, &first.target, chain)
}

fn put(merge: &Merge, first: &Path, chain: &ChainOptions) -> Result<()> {
    intent::put(&*chain.host, first, &Intent::Merge(merge.relative_to(folder_of(first))))
}

/// Moves what the images above the target hold into it, and makes it durable.
fn move_data(member: &Member, begin: &mut dyn FnMut() -> Result<()>, chain: &ChainOptions, progress: &Progress) -> Result<()> {
    let upper = upper(member, &read_only(chain))?;
    let image = OpenOptions { writable: true, force: true, background_flush: None, ..chain.image.clone() };
    let open = ChainOptions { image, resuming: true, ..chain.clone() };
    let size = upper.capabilities().size;
    let target = match member.target_uuid {
        None => {
            begin()?;
            grow_raw(&member.target, size, chain)?;
            Chain::open_raw_with(&member.target, &open)?
        }
        Some((old, new)) => Chain::open_after(&member.target, &open, &mut |storage| {
            // Mended first: both footers must be sound when one of them changes.
            let image = Image::open(Arc::clone(storage), &member.target, &open.image)?;
            let uuid = Uuid::from_bytes(image.footer().uuid());
            let is_smaller = image.size() < size;
            drop(image);
            if uuid != old && uuid != new {
                let message = format!("has UUID {uuid}, expected {old}: it is not the image that the merge was planned for");
                return Err(Error::new(ErrorKind::Parent, message));
            }
            begin()?;
            if let Some(grow) = &member.grow {
                return grow.write(&**storage);
            }
            if uuid == old {
                Image::write_uuid_of(&**storage, new.into_bytes())?;
            }
            if !is_smaller {
                return Ok(());
            }
            Image::set_size(storage, &member.target, size, &open.image, false, &mut |_| Ok(()))
        })?,
    };
    let target = Disk::new(target);
    copy_up(&upper, &target, progress)?;
    target.flush()?;
    target.close()
}

/// Gives a fixed target its new size and its footer, from whatever point that had come to. It is opened next, which begins
/// with a barrier.
fn grow_fixed(member: &Member, chain: &ChainOptions) -> Result<()> {
    let Some(grow) = &member.grow else { return Ok(()) };
    let file = Arc::new(FileStorage::open(&member.target, true)?);
    file.lock(LockMode::Write)?;
    grow.write(&*chain.host.adopt(file)).map_err(|error| error.at(&member.target))
}

fn grow_raw(target: &Path, size: u64, chain: &ChainOptions) -> Result<()> {
    let file = Arc::new(FileStorage::open(target, true)?);
    file.lock(LockMode::Write)?;
    let storage = chain.host.adopt(file);
    let failed = |error| Error::io(error, format!("can't grow to {size} bytes")).at(target);
    if storage.len().map_err(failed)? < size {
        storage.set_len(size).map_err(failed)?;
        storage.sync().map_err(failed)?;
    }
    Ok(())
}

/// Makes the child, and its own children where it goes, children of the target.
fn relink_all(member: &Member, chain: &ChainOptions) -> Result<()> {
    let uuid = member.target_uuid.map_or([0; 16], |(_, new)| new.into_bytes());
    if !member.delete {
        relink(&member.leaf, &member.target, uuid, chain)?;
    }
    member.children.iter().try_for_each(|child| relink(child, &member.target, uuid, chain))
}

/// Makes the image at `child` a child of the one at `target`, whose identifier is `uuid`.
fn relink(child: &Path, target: &Path, uuid: [u8; 16], chain: &ChainOptions) -> Result<()> {
    let file = Arc::new(FileStorage::open(child, true)?);
    file.lock(LockMode::Write)?;
    let link = link_to(child, target, uuid)?;
    let options = OpenOptions { force: true, ..chain.image.clone() };
    Image::set_parent(&chain.host.adopt(file), child, &link, &options).map_err(|error| error.at(child))
}

mod protection {
    //! A file that is write-protected, made writable for a while.

    use std::fs::{File, Permissions};
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

    use crate::error::{Error, Result};

    /// Protects the file again when it is dropped.
    pub(super) struct Lifted {
        file: File,
        permissions: Permissions,
        flags: Option<IFlags>,
    }

    impl Lifted {
        pub(super) fn of(path: &Path) -> Result<Self> {
            let failed = |error: std::io::Error| Error::io(error, "can't be made writable").at(path);
            let file = File::open(path).map_err(failed)?;
            let permissions = file.metadata().map_err(failed)?.permissions();
            let flags = ioctl_getflags(&file).ok().filter(|flags| flags.contains(IFlags::IMMUTABLE));
            if let Some(flags) = flags {
                ioctl_setflags(&file, flags - IFlags::IMMUTABLE).map_err(|error| failed(error.into()))?;
            }
            if permissions.readonly() {
                file.set_permissions(Permissions::from_mode(permissions.mode() | 0o200)).map_err(failed)?;
            }
            Ok(Self { file, permissions, flags })
        }
    }

    impl Drop for Lifted {
        fn drop(&mut self) {
            let _ = self.file.set_permissions(self.permissions.clone());
            if let Some(flags) = self.flags {
                let _ = ioctl_setflags(&self.file, flags);
            }
        }
    }
}
