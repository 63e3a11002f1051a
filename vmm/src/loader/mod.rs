//! Puts a kernel into the guest's memory, and tells how it is entered.
//!
//! The kernel is a file of the host's, or one that is installed on the first disk ([`crate::installed`]).
//!
//! A kernel is an ELF file or a bzImage. One with a PVH note is entered by it, in 32-bit mode; else by the 64-bit entry
//! of Linux. The kernel inside a bzImage is unpacked here where its compression is known, which spares the guest that.

mod bzimage;
mod elf;
mod info;

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use vhd_core::Disk;

use crate::installed;
use crate::layout::{COMMAND_LINE, COMMAND_LINE_MAX, HIGH_START};
use crate::memory::{GAP, Memory};

pub use bzimage::unpack;

/// Bytes of a kernel, or of an initial RAM disk, at most: more is no such thing.
const MAX_FILE: u64 = 1 << 30;

/// What is started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Boot {
    /// The kernel's file; without one, the kernel that is installed on the first disk is started.
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk's file.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line. To that of an installed kernel it is added.
    pub command_line: String,
}

/// A kernel in the host's memory, with what belongs to it.
#[derive(Debug)]
pub struct Kernel {
    /// Its name, for errors.
    pub name: PathBuf,
    /// An ELF file or a bzImage.
    pub image: Vec<u8>,
    /// The initial RAM disk, with its name.
    pub initrd: Option<(PathBuf, Vec<u8>)>,
    /// The command line.
    pub command_line: String,
    /// What was chosen, where it was found on a disk.
    pub chosen: Option<String>,
}

impl Kernel {
    /// Reads what is to be started; `disk` is the first one.
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn read(boot: &Boot, disk: Option<&Disk>) -> Result<Self, LoadError> {
        let initrd = boot.initrd.as_ref().map(|path| Ok((path.clone(), read(path, INITRD)?))).transpose()?;
        if let Some(name) = &boot.kernel {
            let (name, image, command_line) = (name.clone(), read(name, KERNEL)?, boot.command_line.clone());
            return Ok(Self { name, image, initrd, command_line, chosen: None });
        }
        let disk = disk.ok_or_else(|| LoadError::new(Path::new("--kernel"), "there is no kernel, and no disk to find one on"))?;
        let on = disk.layer_path(0).unwrap_or_default();
        let found = installed::find(disk).map_err(|why| LoadError::new(&on, why))?;
        let within = |path: &str| PathBuf::from(format!("{}: {path}", on.display()));
        let own = found.initrd.map(|(path, bytes)| (within(&path), bytes));
        let lines = [found.command_line, boot.command_line.clone()];
        Ok(Self {
            name: within(&found.kernel.0),
            image: found.kernel.1,
            initrd: initrd.or(own),
            command_line: lines.join(" ").trim().to_owned(),
            chosen: Some(format!("starts {} of {}", found.title, on.display())),
        })
    }
}

/// How the first vCPU begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// In 64-bit mode; the zero page's address is in RSI.
    Long(u64),
    /// In 32-bit mode without paging; the start info's address is in EBX.
    Pvh(u64),
}

/// A kernel that can't be started: the file and why.
#[derive(Debug, thiserror::Error)]
#[error("{}: {why}", path.display())]
pub struct LoadError {
    /// The file.
    pub path: PathBuf,
    /// What was found, what was expected.
    pub why: String,
}

impl LoadError {
    fn new(path: &Path, why: impl fmt::Display) -> Self {
        Self { path: path.to_owned(), why: why.to_string() }
    }
}

/// Loads everything, and writes what the kernel is told. `root` is the address of the ACPI tables.
///
/// # Errors
/// [`LoadError`].
pub fn load(memory: &Memory, kernel: &Kernel, root: u64) -> Result<Entry, LoadError> {
    let wrong = |why: &dyn fmt::Display| LoadError::new(&kernel.name, why);
    let (loaded, setup) = if elf::is_elf(&kernel.image) {
        (elf::load(memory, &kernel.image).map_err(|why| wrong(&why))?, None)
    } else if let Some(image) = bzimage::Image::parse(&kernel.image) {
        let setup = Some(image.setup().to_vec());
        match image.unpack().map_err(|why| wrong(&why))? {
            Some(inner) if elf::is_elf(&inner) => (elf::load(memory, &inner).map_err(|why| wrong(&why))?, setup),
            Some(_) => return Err(wrong(&"is a bzImage, and what is packed in it is no ELF file")),
            // The guest can do it itself.
            None => (image.load(memory).map_err(|why| wrong(&why))?, setup),
        }
    } else {
        return Err(wrong(&"is neither an ELF file nor a bzImage, and those are the kernels that can be started"));
    };
    let line = &kernel.command_line;
    if line.len() >= COMMAND_LINE_MAX || line.contains('\0') {
        let len = line.len();
        return Err(wrong(&format!("its command line has {len} bytes, more than {} or a zero", COMMAND_LINE_MAX - 1)));
    }
    let line = [line.as_bytes(), b"\0"].concat();
    memory.write(COMMAND_LINE, &line).map_err(|why| wrong(&why))?;
    let initrd = kernel.initrd.as_ref().map(|(name, bytes)| put_initrd(memory, name, bytes, loaded.end)).transpose()?;
    let told = info::Told { setup: setup.as_deref(), initrd, root };
    info::write(memory, &loaded.entry, &told).map_err(|why| wrong(&why))?;
    Ok(loaded.entry)
}

/// A kernel in memory.
struct Loaded {
    entry: Entry,
    /// Where it ends.
    end: u64,
}

/// What a file of the host's is to be, and what to do where it is not.
type Wanted = [&'static str; 2];
const KERNEL: Wanted =
    ["kernel", "give an ELF file or a bzImage, or no kernel to start the one that the first disk's boot menu names"];
const INITRD: Wanted = ["initial RAM disk", "give the file that belongs to the kernel, or none"];

fn read(path: &Path, [what, instead]: Wanted) -> Result<Vec<u8>, LoadError> {
    let whole = || {
        let found = std::fs::metadata(path)?;
        // A pipe might be waited for without end, and has nothing more when the guest is reset.
        if !found.is_file() {
            return Err(io::Error::other(if found.is_dir() { "is a folder" } else { "is no regular file" }));
        }
        // It may have become one meanwhile.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        let len = file.metadata()?.len();
        if len > MAX_FILE {
            return Err(io::Error::other(format!("has {len} bytes, more than {MAX_FILE}")));
        }
        let mut bytes = Vec::with_capacity(len as usize);
        file.take(MAX_FILE).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    whole().map_err(|error| LoadError::new(path, format!("can't be read as the {what}: {error}; {instead}")))
}

/// Puts the initial RAM disk as high as it goes, below what a 32-bit address can't name.
fn put_initrd(memory: &Memory, name: &Path, bytes: &[u8], kernel_end: u64) -> Result<(u64, u32), LoadError> {
    let top = memory.size().min(GAP.start).min(0x7FFF_F000);
    let start = top.checked_sub(bytes.len() as u64).map(|start| start & !0xFFF);
    let start = start.filter(|&start| start >= kernel_end.max(HIGH_START));
    let start = start.ok_or_else(|| {
        let message = format!("has {} bytes, and there is no room for them behind the kernel; give more memory", bytes.len());
        LoadError::new(name, message)
    })?;
    memory.write(start, bytes).map_err(|error| LoadError::new(name, error))?;
    Ok((start, bytes.len() as u32))
}
