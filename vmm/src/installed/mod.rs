//! The kernel that is installed on a disk: what its boot loader's menu would start, as pygrub found it for Xen.
//!
//! GRUB's, extlinux's or syslinux's menus, and entries of the Boot Loader Specification (systemd-boot), in ext2, ext3,
//! ext4 and FAT, on partitions or a whole disk. Nothing of the disk is run but the menu's assignments and conditions.

mod entries;
mod grub;
mod syslinux;
mod volume;

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use vhd_core::Disk;

use self::volume::Volume;

/// Bytes of a menu at most.
const MAX_MENU: u64 = 1 << 20;
/// Bytes of a kernel, or of an initial RAM disk, at most.
const MAX_FILE: u64 = 512 << 20;
/// Initial RAM disks of one entry at most.
const MAX_INITRDS: usize = 8;
/// A disk that takes longer to read than this has a file system that leads nowhere.
const PATIENCE: Duration = Duration::from_secs(120);

/// A kernel that is installed on a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installed {
    /// What was chosen: the menu's entry, and where it is.
    pub title: String,
    /// The kernel's path and bytes.
    pub kernel: (String, Vec<u8>),
    /// The path and the bytes of the initial RAM disk; of several, the first one's path.
    pub initrd: Option<(String, Vec<u8>)>,
    /// The kernel's command line.
    pub command_line: String,
}

/// A file of one of the disk's file systems.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    volume: usize,
    path: String,
}

/// What an entry of a menu starts.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    title: String,
    kernel: Place,
    initrds: Vec<Place>,
    options: String,
}

/// Finds the kernel that the disk's boot menu starts by default.
///
/// # Errors
/// Why there is none, and what to do: what of the disk was looked at.
pub fn find(disk: &Disk) -> Result<Installed, String> {
    let (sender, receiver) = channel();
    let disk = disk.clone();
    // A thread, since no limit on sizes covers all that a made-up file system can do to who reads it.
    let reading = move || drop(sender.send(search(&disk)));
    let thread = std::thread::Builder::new().name("installed".into()).spawn(reading);
    let _detached = thread.map_err(|error| format!("a thread can't be started: {error}"))?;
    match receiver.recv_timeout(PATIENCE) {
        Ok(found) => found,
        Err(RecvTimeoutError::Timeout) => Err("takes too long to find a kernel on; give one with --kernel".to_owned()),
        Err(RecvTimeoutError::Disconnected) => {
            Err("has a file system that can't be read; give a kernel with --kernel".to_owned())
        }
    }
}

fn search(disk: &Disk) -> Result<Installed, String> {
    let (volumes, mut seen) = volume::volumes(disk)?;
    for (index, volume) in volumes.iter().enumerate() {
        for find in [grub::find, entries::find, syslinux::find] {
            match find(&volumes, index) {
                Ok(Some(entry)) => return load(&volumes, entry),
                Ok(None) => {}
                Err(why) => return Err(format!("{}{why}; give a kernel with --kernel", on(volume))),
            }
        }
        seen.push(format!("{}no boot menu", on(volume)));
    }
    Err(format!("has no kernel that its boot menu starts ({}); give one with --kernel", seen.join("; ")))
}

fn on(volume: &Volume) -> String {
    volume.partition.map_or_else(String::new, |number| format!("partition {number}: "))
}

fn load(volumes: &[Volume], entry: Entry) -> Result<Installed, String> {
    let read = |place: &Place| {
        let volume = &volumes[place.volume];
        let bytes =
            volume.read(&place.path, MAX_FILE).and_then(|found| found.ok_or_else(|| format!("{}: is not there", place.path)));
        bytes.map_err(|why| {
            format!("{}{why}; the menu's entry '{}' starts it; give a kernel with --kernel", on(volume), entry.title)
        })
    };
    let kernel = read(&entry.kernel)?;
    if entry.initrds.len() > MAX_INITRDS {
        return Err(format!(
            "has an entry '{}' with {} initial RAM disks, more than {MAX_INITRDS}",
            entry.title,
            entry.initrds.len()
        ));
    }
    let mut initrd: Option<(String, Vec<u8>)> = None;
    for place in &entry.initrds {
        let bytes = read(place)?;
        match &mut initrd {
            // Several are one behind the other, each on a boundary of four bytes.
            Some((_, all)) if all.len() as u64 + bytes.len() as u64 <= MAX_FILE => {
                all.resize(all.len().next_multiple_of(4), 0);
                all.extend(bytes);
            }
            Some(_) => {
                return Err(format!("has an entry '{}' with initial RAM disks of more than {MAX_FILE} bytes", entry.title));
            }
            None => initrd = Some((place.path.clone(), bytes)),
        }
    }
    let place = volumes[entry.kernel.volume].partition.map_or_else(String::new, |number| format!(", partition {number}"));
    let title = format!("'{}' ({}{place})", entry.title, entry.kernel.path);
    Ok(Installed { title, kernel: (entry.kernel.path, kernel), initrd, command_line: entry.options })
}

/// A menu's text; nothing where there is none.
fn menu(volume: &Volume, path: &str) -> Result<Option<String>, String> {
    let bytes = volume.read(path, MAX_MENU)?;
    Ok(bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
}
