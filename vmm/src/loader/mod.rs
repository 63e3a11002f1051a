//! Puts a kernel into the guest's memory, and tells how it is entered.
//!
//! A kernel is an ELF file or a bzImage. One with a PVH note is entered by it, in 32-bit mode; else by the 64-bit entry
//! of Linux. The kernel inside a bzImage is unpacked here where its compression is known, which spares the guest that.

mod bzimage;
mod elf;
mod info;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::layout::{COMMAND_LINE, COMMAND_LINE_MAX, HIGH_START};
use crate::memory::{GAP, Memory};

pub use bzimage::unpack;

/// Bytes of a kernel, or of an initial RAM disk, at most: more is no such thing.
const MAX_FILE: u64 = 1 << 30;

/// What is started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Boot {
    /// The kernel's file.
    pub kernel: PathBuf,
    /// The initial RAM disk's file.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub command_line: String,
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
pub fn load(memory: &Memory, boot: &Boot, root: u64) -> Result<Entry, LoadError> {
    let kernel = read(&boot.kernel)?;
    load_bytes(memory, boot, &kernel, root)
}

fn load_bytes(memory: &Memory, boot: &Boot, kernel: &[u8], root: u64) -> Result<Entry, LoadError> {
    let wrong = |why: &dyn fmt::Display| LoadError::new(&boot.kernel, why);
    let (loaded, setup) = if elf::is_elf(kernel) {
        (elf::load(memory, kernel).map_err(|why| wrong(&why))?, None)
    } else if let Some(image) = bzimage::Image::parse(kernel) {
        match image.unpack() {
            Ok(inner) if elf::is_elf(&inner) => {
                (elf::load(memory, &inner).map_err(|why| wrong(&why))?, Some(image.setup().to_vec()))
            }
            // The guest can do it itself.
            _ => (image.load(memory).map_err(|why| wrong(&why))?, Some(image.setup().to_vec())),
        }
    } else {
        return Err(wrong(&"is neither an ELF file nor a bzImage, and those are the kernels that can be started"));
    };
    if boot.command_line.len() >= COMMAND_LINE_MAX || boot.command_line.contains('\0') {
        let len = boot.command_line.len();
        return Err(wrong(&format!("its command line has {len} bytes, more than {} or a zero", COMMAND_LINE_MAX - 1)));
    }
    let line = [boot.command_line.as_bytes(), b"\0"].concat();
    memory.write(COMMAND_LINE, &line).map_err(|why| wrong(&why))?;
    let initrd = boot.initrd.as_deref().map(|path| put_initrd(memory, path, loaded.end)).transpose()?;
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

fn read(path: &Path) -> Result<Vec<u8>, LoadError> {
    let whole = || {
        let len = std::fs::metadata(path)?.len();
        if len > MAX_FILE {
            return Err(io::Error::other(format!("has {len} bytes, more than {MAX_FILE}")));
        }
        std::fs::read(path)
    };
    whole().map_err(|error| LoadError::new(path, error))
}

/// Puts the initial RAM disk as high as it goes, below what a 32-bit address can't name.
fn put_initrd(memory: &Memory, path: &Path, kernel_end: u64) -> Result<(u64, u32), LoadError> {
    let bytes = read(path)?;
    let top = memory.size().min(GAP.start).min(0x7FFF_F000);
    let start = top.checked_sub(bytes.len() as u64).map(|start| start & !0xFFF);
    let start = start.filter(|&start| start >= kernel_end.max(HIGH_START));
    let start = start.ok_or_else(|| {
        let message = format!("has {} bytes, and there is no room for them behind the kernel; give more memory", bytes.len());
        LoadError::new(path, message)
    })?;
    memory.write(start, &bytes).map_err(|error| LoadError::new(path, error))?;
    Ok((start, bytes.len() as u32))
}
