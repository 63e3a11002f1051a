//! What a differencing image says of its parent, and whether that leads there.

use std::ffi::OsStr;
use std::path::Path;

use uuid::Uuid;

use super::footer::Basis;
use super::header::Header;
use super::{Check, Code, Region, be32, be64, quoted};
use crate::chain::{Lead, LinkedDisk, Locator, ParentPolicy, find_parent_of, follow_locator, locator_paths, windows_paths};
use crate::error::{ErrorKind, Result};
use crate::format::{DiskType, LOCATOR_SLOTS, LocatorEntry, PlatformCode};
use crate::image::Footers;
use crate::storage::FileStorage;

/// The longest payload that is read: the longest path of Windows, 32,767 UTF-16 units.
const MAX_PAYLOAD: u32 = 64 << 10;
const PARENT: &str = "parent";

impl Check<'_> {
    /// Checks locators and parent fields; adds the payloads to the metadata.
    pub(super) fn locators(&mut self, basis: &Basis, header: &Header, regions: &mut Vec<Region>) -> Result<()> {
        let mut locators: Vec<(usize, Locator)> = Vec::new();
        for slot in 0..LOCATOR_SLOTS {
            let entry = slot_entry(&header.bytes, slot);
            if !entry.is_used() {
                continue;
            }
            let place = format!("locator {slot}");
            if locators.iter().any(|(_, other)| other.entry.code == entry.code) {
                let message = format!("has code {}, as another locator does", entry.code.name());
                self.add(Code::LocatorDuplicate, &*place, message);
            }
            let path = match self.locator_place(&entry, &place, regions) {
                true => self.locator_text(&entry, &place)?,
                false => None,
            };
            locators.push((slot, Locator { entry, path }));
        }
        if basis.disk_type == DiskType::Differencing {
            self.parent_fields(basis, header, &locators);
            if let Some(policy) = self.options.parents {
                self.look_for_parent(basis, header, &locators, policy)?;
            }
        } else if !locators.is_empty() || header.parsed.parent_uuid() != [0; 16] {
            let kind = basis.disk_type.name();
            let message = format!("names one (UUID {}), but the disk is {kind}", Uuid::from_bytes(header.parsed.parent_uuid()));
            self.add(Code::ParentUnexpected, PARENT, message);
        }
        Ok(())
    }

    /// The table's entry; true when its payload can be read.
    fn locator_place(&mut self, entry: &LocatorEntry, place: &str, regions: &mut Vec<Region>) -> bool {
        let ours = [PlatformCode::UNDO_SESSION, PlatformCode::LINKED_DISK];
        if matches!(entry.code, PlatformCode::Other(_)) && !ours.contains(&entry.code) {
            let message = format!("has code \"{}\", expected W2ru, W2ku, MacX, Mac, Wi2r or Wi2k", entry.code.name());
            self.add(Code::LocatorUnknown, place, message);
        }
        let (start, len) = (entry.data_offset, u64::from(entry.data_length));
        if len == 0 {
            self.add(Code::LocatorEmpty, place, format!("{} has a payload of 0 bytes", entry.code.name()));
            return false;
        }
        let end = start.saturating_add(len);
        if end > self.file_len {
            let message =
                format!("payload lies at {start:#x} to {end:#x}, beyond the end of the file ({:#x} bytes)", self.file_len);
            self.add(Code::LocatorOutside, place, message);
            return false;
        }
        // The specification counts sectors, nearly everyone bytes: only what fits neither is wrong.
        let space = u64::from(entry.data_space);
        if len > space && len > space.saturating_mul(512) {
            let message = format!("payload has {len} bytes, its room only {space} (bytes or sectors)");
            self.add(Code::LocatorSpace, place, message);
        }
        let reserved_end = start.saturating_add(entry.reserved_len());
        regions.push(Region { range: start..end, name: place.to_owned(), reserved_end });
        true
    }

    /// The path in a payload, where the code holds one.
    fn locator_text(&mut self, entry: &LocatorEntry, place: &str) -> Result<Option<String>> {
        let code = entry.code.name();
        if entry.data_length > MAX_PAYLOAD {
            let message = format!("{code} has a payload of {} bytes, expected a path of 64 KiB at most", entry.data_length);
            self.add(Code::LocatorUndecodable, place, message);
            return Ok(None);
        }
        let mut payload = vec![0; entry.data_length as usize];
        self.read(&mut payload, entry.data_offset)?;
        let Some(text) = entry.code.decode(&payload) else { return Ok(None) };
        let is_wide = matches!(entry.code, PlatformCode::W2ru | PlatformCode::W2ku);
        let has_nul = match is_wide {
            true => payload.as_chunks::<2>().0.contains(&[0, 0]),
            false => payload.contains(&0),
        };
        // Wi2r and Wi2k hold some 8-bit code page: what is not ASCII there is no fault.
        let is_lossy = matches!(entry.code, PlatformCode::W2ru | PlatformCode::W2ku | PlatformCode::MacX)
            && text.contains(char::REPLACEMENT_CHARACTER);
        if text.is_empty() {
            self.add(Code::LocatorEmpty, place, format!("{code} has an empty path"));
        } else if is_lossy || (is_wide && !payload.len().is_multiple_of(2)) {
            let message = format!("{code} holds {}, which is no {}", quoted(&text), if is_wide { "UTF-16" } else { "UTF-8" });
            self.add(Code::LocatorUndecodable, place, message);
        } else if has_nul {
            let message = format!("{code} holds a NUL within its length of {} bytes, expected the path alone", payload.len());
            self.add(Code::LocatorNul, place, message);
        }
        Ok(Some(text))
    }

    fn parent_fields(&mut self, basis: &Basis, header: &Header, locators: &[(usize, Locator)]) {
        let (uuid, name) = (header.parsed.parent_uuid(), header.parsed.parent_name());
        if linked_of(locators).is_some() {
            self.add(Code::ParentRaw, PARENT, "is the device or raw file that the image is linked to");
        } else if uuid == [0; 16] {
            let message = "UUID is all zero: it is a raw file or device, opened only with --raw-parent";
            self.add(Code::ParentRaw, PARENT, message);
        } else if uuid == basis.uuid {
            let message = format!("UUID is {}, the image's own", Uuid::from_bytes(uuid));
            self.add(Code::ParentSelf, PARENT, message);
        }
        if name.is_empty() {
            self.add(Code::ParentNameEmpty, PARENT, "has no name in the dynamic header");
        }
        if locators.is_empty() {
            self.add(Code::LocatorNone, PARENT, "has no locator: only its name in the dynamic header says where it is");
        }
        let expected = windows_paths(&name).first().and_then(|path| path.file_name()).map(|name| name.to_os_string());
        for (slot, locator) in locators {
            let paths = locator_paths(locator);
            let mut names = paths.iter().filter_map(|path| path.file_name()).peekable();
            if let (Some(expected), Some(&first)) = (&expected, names.peek())
                && !names.any(|name| name.eq_ignore_ascii_case(expected))
            {
                let message = {
                    let quoted = |name: &OsStr| quoted(&name.to_string_lossy());
                    format!("names {}, the dynamic header {}", quoted(first), quoted(expected))
                };
                self.add(Code::ParentNameDiffers, format!("locator {slot}"), message);
            }
        }
    }

    /// Follows each locator, then looks for the parent as opening does.
    fn look_for_parent(
        &mut self,
        basis: &Basis,
        header: &Header,
        locators: &[(usize, Locator)],
        policy: &ParentPolicy,
    ) -> Result<()> {
        let expected = header.parsed.parent_uuid();
        if let Some(entry) = linked_of(locators) {
            match LinkedDisk::read(self.storage, entry).and_then(|linked| linked.verify()) {
                Ok(()) => {}
                Err(error) => self.add(Code::ParentNotFound, PARENT, error.to_string()),
            }
            return Ok(());
        }
        if expected == [0; 16] || expected == basis.uuid {
            return Ok(());
        }
        for (slot, locator) in locators.iter().filter(|(_, locator)| locator.path.as_ref().is_some_and(|path| !path.is_empty())) {
            let place = format!("locator {slot}");
            let text = format!("{} {}", locator.entry.code.name(), quoted(locator.path.as_deref().unwrap_or_default()));
            match follow_locator(self.path, locator, policy) {
                Lead::Vhd(_, uuid) if uuid == expected => {}
                Lead::Vhd(path, uuid) => {
                    let (found, expected) = (Uuid::from_bytes(uuid), Uuid::from_bytes(expected));
                    let message = format!("{text} leads to {} with UUID {found}, expected {expected}", path.display());
                    self.add(Code::LocatorWrongParent, place, message);
                }
                Lead::Outside(path) => {
                    let message = format!("{text} leads to {}, outside the folders that parents may be in", path.display());
                    self.add(Code::LocatorDead, place, message);
                }
                Lead::Nowhere => self.add(Code::LocatorDead, place, format!("{text} leads to no VHD on this host")),
            }
        }
        match find_parent_of(self.storage, self.path, &header.parsed, policy) {
            Ok(storage) => self.parent_itself(basis, header, &storage),
            Err(error) if error.kind() == ErrorKind::Parent => {
                self.add(Code::ParentNotFound, PARENT, error.message());
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn parent_itself(&mut self, basis: &Basis, header: &Header, storage: &FileStorage) {
        let path = storage.path();
        self.parent = Some(path.to_owned());
        let size =
            Footers::read(storage).ok().and_then(|footers| footers.authority(true).ok()).map(|(footer, _)| footer.current_size());
        if let (Some(parent), Some(child)) = (size, basis.size)
            && parent != child
        {
            let message = format!("{} has a disk of {parent} bytes, the child of {child}", path.display());
            self.add(Code::ParentSizeDiffers, PARENT, message);
        }
        if let Some(seconds) = changed_after(path, header) {
            let message = format!(
                "{} was modified {seconds} s after its child recorded it: copied, or written to, which spoils the child",
                path.display()
            );
            self.add(Code::ParentTimestamp, PARENT, message);
        }
    }
}

/// The locator that names what a linked disk is linked to.
fn linked_of(locators: &[(usize, Locator)]) -> Option<&LocatorEntry> {
    locators.iter().map(|(_, locator)| &locator.entry).find(|entry| entry.code == PlatformCode::LINKED_DISK)
}

/// Seconds by which a parent's file is younger than the child says; `None` when it says nothing.
fn changed_after(path: &Path, header: &Header) -> Option<u64> {
    let recorded = header.parsed.parent_timestamp();
    let modified = std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok()?;
    let apart = modified.duration_since(recorded.to_system_time()).ok()?.as_secs();
    (recorded.0 != 0 && apart > 1).then_some(apart)
}

fn slot_entry(header: &[u8], slot: usize) -> LocatorEntry {
    let at = 576 + slot * 24;
    LocatorEntry {
        code: PlatformCode::from_bytes(be32(header, at).to_be_bytes()),
        data_space: be32(header, at + 4),
        data_length: be32(header, at + 8),
        data_offset: be64(header, at + 16),
    }
}
