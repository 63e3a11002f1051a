//! Changes of a disk in use that keep its leaf: what its files say is looked at again, another size, the note of a saved
//! state.
//!
//! Each works on the descriptor that is open and bears the lock. One that is refused, or fails before it changed the file,
//! leaves what was there. After one that fails in the middle the file is read anew through that descriptor, as at every point
//! it is whole: clients go on reading, and writing too, unless nobody knows what the medium holds (promise P7).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use super::{LiveDisk, Open};
use crate::block::{BlockDevice, Disk};
use crate::chain::{Chain, Layer};
use crate::error::{Error, ErrorKind, Result, fail};
use crate::format::DiskType;
use crate::image::Image;
use crate::intent;
use crate::ops::{resize, saved_state};

impl LiveDisk {
    /// Looks at all files again, through the descriptors that are open, and goes on with what they say: the size, and the
    /// names that lead to them now. Handles that are made from then on have the size. When it fails all is as it was.
    ///
    /// # Errors
    /// `Refused` when another file has the name of one of them; `NotFound` when one has no name any more; `Refused` when
    /// one became another image, or smaller: something heeded no lock. As the host fails.
    pub fn refresh(&self) -> Result<()> {
        let _turn = self.0.turn();
        let names = self.names()?;
        self.0.write().refresh(&names)
    }

    /// Makes the disk larger: `size` bytes, rounded up to a sector. New space reads as zeros, and the backup of a GPT moves
    /// to the new end. Handles that are made from then on have the size. When it fails, what clients wrote is read as before.
    ///
    /// # Errors
    /// `ReadOnly`; `InvalidInput` for sizes that can't be; `Refused` for a smaller size, when a larger parent would show, or
    /// as [`LiveDisk::refresh`]; `Unsupported` on a device; as the host fails.
    pub fn grow(&self, size: u64) -> Result<()> {
        let _turn = self.0.turn();
        let name = self.leaf_name()?;
        self.0.write().grow(&name, size).map_err(|error| error.at(&name))
    }

    /// Notes in the leaf that a virtual machine's saved state relies on it as it is, or does not any more; durable when it
    /// returns. A disk that is open read-only is left alone.
    ///
    /// # Errors
    /// As the host fails.
    pub fn set_saved_state(&self, saved: bool) -> Result<()> {
        let _turn = self.0.turn();
        self.0.write().set_saved_state(saved)
    }

    /// The names that lead to its files now, leaf first. The turn is taken, so they stay these files; requests go on.
    fn names(&self) -> Result<Vec<PathBuf>> {
        let layers = self.0.read().chain.layers().to_vec();
        layers.iter().map(name_of).collect()
    }

    /// The name that leads to its leaf now.
    pub(super) fn leaf_name(&self) -> Result<PathBuf> {
        let leaf = self.0.read().chain.layers()[0].clone();
        name_of(&leaf)
    }
}

/// The name that leads to a layer's file now. Where another file has the one that was known, nobody can mean both.
fn name_of(layer: &Layer) -> Result<PathBuf> {
    let known = layer.path();
    let Some(file) = layer.file() else { return Ok(known.to_owned()) };
    let now = file.name_now(known)?;
    if now != known && known.exists() {
        let message = format!(
            "is the name of another file now; the disk in use is {}, and stays that: move it back, or end its use and open the other",
            now.display()
        );
        return Err(Error::new(ErrorKind::Refused, message).at(known));
    }
    Ok(now)
}

impl Open {
    fn refresh(&mut self, names: &[PathBuf]) -> Result<()> {
        if let Some((kind, message)) = &self.lost {
            let why = Error::new(*kind, message.clone());
            self.look_again(&names[0], &why);
            return self.chain().map(drop);
        }
        self.chain.close()?;
        let mut layers = Vec::new();
        for (was, name) in self.chain.layers().iter().zip(names) {
            let is = was.read_again(name, &self.options.image)?;
            refuse_another(was, &is).map_err(|error| error.at(name))?;
            layers.push(is);
        }
        if let Some(leaf) = self.written() {
            layers[0] = Layer::Image(Image::open(Arc::clone(leaf.storage()), &names[0], &self.options.image)?);
        }
        let leaf = layers.remove(0);
        self.chain = Arc::new(Chain::over(leaf, layers));
        Ok(())
    }

    fn grow(&mut self, name: &Path, size: u64) -> Result<()> {
        let chain = self.chain()?;
        let Some(leaf) = self.written().map(Arc::clone) else {
            fail!(ReadOnly, "is open read-only, so it is not made larger");
        };
        let (from, to) = (leaf.size(), resize::whole_size(size)?);
        if to < from {
            fail!(
                Refused,
                "has {from} bytes, more than {to}: a disk in use is only made larger, as clients rely on what they found"
            );
        }
        resize::refuse_larger_parent(from, to, chain.layers().get(1).map(Layer::size))?;
        if to == from {
            return Ok(());
        }
        if !leaf.storage().can_grow() {
            fail!(Unsupported, "is on a device: another size needs room that it does not have; convert it to a file first");
        }
        leaf.close()?;
        if leaf.footer().disk_type() == DiskType::Fixed {
            self.move_footer(&leaf, name, to)?;
        } else if let Err(error) =
            Image::set_size(leaf.storage(), name, to, &self.options.image, false, &mut |_| Ok(())).map_err(|error| error.at(name))
        {
            self.look_again(name, &error);
            return Err(error);
        }
        self.open_leaf_again(name)?;
        // Whichever of its headers is whole counts at each point.
        crate::partition::move_gpt(&Disk::of(Arc::clone(&self.chain) as Arc<dyn BlockDevice>), from, to).map(drop)
    }

    /// Makes a fixed disk larger. Its data stay where they are, so when this fails the leaf as it is open is right still.
    fn move_footer(&self, leaf: &Image, name: &Path, to: u64) -> Result<()> {
        let Err(error) = resize::set_fixed_size(leaf.storage(), name, to, &self.options) else { return Ok(()) };
        // The other way, which ends with the file as it was.
        let back = intent::undo_growth(&**leaf.storage(), leaf.footer());
        let back = back.and_then(|()| intent::remove(&*self.options.host, name));
        if let Err(other) = &back {
            tracing::warn!("{}: its footer is to be put right by vhd resize, when it is closed: {other}", name.display());
        }
        if back.is_err() || is_in_doubt(&error) {
            leaf.latch_for(&error);
        }
        Err(error)
    }

    fn set_saved_state(&mut self, saved: bool) -> Result<()> {
        self.chain()?;
        let Some(leaf) = self.written().map(Arc::clone) else { return Ok(()) };
        leaf.close()?;
        let name = leaf.path();
        let noted = saved_state::set_of(leaf.storage(), &self.file, name, saved, &self.options.image);
        // One that was half made is this disk's own, too.
        self.options.image.owns_saved_state = saved || noted.is_err();
        if let Err(error) = noted {
            self.look_again(name, &error);
            return Err(error);
        }
        self.open_leaf_again(name)
    }

    /// Opens the leaf anew, after a change that is done.
    fn open_leaf_again(&mut self, name: &Path) -> Result<()> {
        let opened = self.storage().and_then(|storage| Image::open(storage, name, &self.options.image));
        match opened {
            Ok(leaf) => self.put_leaf(leaf),
            Err(error) => {
                self.look_again(name, &error);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Opens the leaf anew, after a change that failed for this reason.
    fn look_again(&mut self, name: &Path, why: &Error) {
        let open = |latched: bool| {
            let storage = self.storage()?;
            match latched {
                false => Image::open(storage, name, &self.options.image),
                true => Image::open_latched(storage, name, &self.options.image, why),
            }
        };
        let opened = if is_in_doubt(why) || self.lost.is_some() { open(true) } else { open(false).or_else(|_| open(true)) };
        match opened {
            Ok(leaf) => {
                self.put_leaf(leaf);
                self.lost = None;
            }
            Err(error) => {
                let message = format!("can't be read after a change of it failed ({}): {}", why.message(), error.message());
                self.lost.get_or_insert((error.kind(), message));
            }
        }
    }

    fn storage(&self) -> Result<Arc<dyn crate::storage::Storage>> {
        match self.chain.layers()[0].image() {
            Some(leaf) => Ok(Arc::clone(leaf.storage())),
            None => fail!(Unsupported, "is no image"),
        }
    }

    fn put_leaf(&mut self, leaf: Arc<Image>) {
        self.chain = Arc::new(Chain::over(Layer::Image(leaf), self.chain.layers()[1..].to_vec()));
    }
}

/// Whether nobody knows what the medium holds, after this failure.
fn is_in_doubt(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Io | ErrorKind::Latched)
}

/// Refuses what is not the image that is in use, or holds less. While it is locked only what heeds no lock can do that.
fn refuse_another(was: &Layer, is: &Layer) -> Result<()> {
    if let (Some(was), Some(is)) = (was.image(), is.image()) {
        let parent = |image: &Image| image.header().map(|header| Uuid::from_bytes(header.parent_uuid()));
        let uuid = |image: &Image| Uuid::from_bytes(image.footer().uuid());
        // It may have been given one for a snapshot that failed.
        let (had, has) = (uuid(was), uuid(is));
        if had != has && !had.is_nil() {
            fail!(Refused, "has UUID {has} now, expected {had}: something that heeds no lock changed it while it was in use");
        }
        if was.footer().disk_type() != is.footer().disk_type() || parent(was) != parent(is) {
            fail!(Refused, "has another type or parent now: something that heeds no lock changed it while it was in use");
        }
    }
    if is.size() < was.size() {
        fail!(Refused, "has {} bytes now, expected {} or more, on which clients rely", is.size(), was.size());
    }
    Ok(())
}
