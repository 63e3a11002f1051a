//! Making another type of a disk without a second copy of its data.
//!
//! A raw file becomes a fixed disk by a footer (`raw`). Otherwise the content moves to a new file piece by piece: once a piece is
//! durable there, its space in the old file is given back; at the end the new file takes the old one's name.
//!
//! Both files bear marks meanwhile ([`Stage`](crate::format::Stage)), so that neither is an image to anyone, under whatever name. What is left to do
//! is seen from the files alone: what the old one still holds is to be moved, and a sector that is zero there never
//! overwrites one of the new file. The intent record is for those who look at the name.

mod pair;
mod raw;

use std::path::Path;

use self::pair::Pair;
use crate::chain::{ChainOptions, is_vhd_name};
use crate::command::Command;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{DEFAULT_BLOCK_SIZE, DiskType};
use crate::intent::{self, InPlace, Move, Work};
use crate::progress::Progress;

/// Bytes that are in both files at most.
const PIECE: u64 = 256 << 20;

/// How a disk is converted where it is.
#[derive(Clone, Debug)]
pub struct InPlaceOptions {
    /// What it becomes: fixed or dynamic.
    pub to: DiskType,
    /// Whether the file is raw; without it its name says so, unless it has a VHD's footer.
    pub from_raw: Option<bool>,
    /// Bytes of a block of a dynamic disk.
    pub block_size: u32,
    /// Goes on although a saved state relies on the image.
    pub force: bool,
    /// Only says what would be done.
    pub dry_run: bool,
    /// Bytes that are in both files at most.
    pub piece: u64,
}

impl InPlaceOptions {
    /// With blocks of 2 MiB.
    #[must_use]
    pub fn new(to: DiskType) -> Self {
        Self { to, from_raw: None, block_size: DEFAULT_BLOCK_SIZE, force: false, dry_run: false, piece: PIECE }
    }
}

/// What converting in place does, or did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConvertedInPlace {
    /// What it was: the type's name, or `raw`.
    pub from: &'static str,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes that have to be moved.
    pub data: u64,
    /// An interrupted conversion goes on.
    pub resumed: bool,
}

/// Makes another type of the image or raw file at `path`. Interrupted at any point, the same call goes on.
///
/// # Errors
/// `InvalidInput` for what it is already; `Unsupported` for a differencing disk and a device; `Cancelled`, when the same call
/// goes on; `Refused` where another conversion was begun; those of [`Chain::open`](crate::chain::Chain::open).
pub fn convert_in_place(
    path: &Path,
    options: &InPlaceOptions,
    chain: &ChainOptions,
    progress: &Progress,
) -> Result<ConvertedInPlace> {
    chain.refuse_ignoring(path)?;
    // Names are changed beside the file itself, not beside a link to it.
    let path = &path.canonicalize().map_err(|error| Error::io(error, "can't be opened").at(path))?;
    let begun = begun(path, options)?;
    if is_raw(path, begun.as_ref(), options)? && options.to == DiskType::Fixed {
        return raw::to_fixed(path, begun, options, chain);
    }
    let moving = begun.and_then(|begun| match begun.work {
        Work::Convert(moving) => Some(moving),
        _ => None,
    });
    let mut pair = Pair::open(path, moving, options, chain)?;
    let done = pair.planned()?;
    if !options.dry_run {
        pair.run(options, progress)?;
    }
    Ok(done)
}

/// Whether the file is a raw one: because the call or the record says so, or else because of its name.
fn is_raw(path: &Path, begun: Option<&InPlace>, options: &InPlaceOptions) -> Result<bool> {
    let is_raw = match begun {
        Some(begun) => begun.uuid.is_none(),
        None => options.from_raw.unwrap_or_else(|| !is_vhd_name(path)),
    };
    if is_raw && options.from_raw.is_none() && begun.is_none() && crate::chain::uuid_of_file(path)?.is_some() {
        // As when it was converted before: its footer and tables would become the disk's content.
        let message = "has the footer of a VHD, but no name of one: --from vhd takes it for one, --from raw for plain bytes";
        return Err(Error::new(ErrorKind::Refused, message).at(path));
    }
    Ok(is_raw)
}

/// The record of a conversion that was begun, as this call asks for it.
fn begun(path: &Path, options: &InPlaceOptions) -> Result<Option<InPlace>> {
    let Some(work) = intent::in_place_of(path, crate::chain::uuid_of_file(path)?)? else { return Ok(None) };
    let is_the_same = match &work.work {
        Work::Footer(_) => work.uuid.is_none() && options.to == DiskType::Fixed,
        Work::Convert(Move { to, block_size, .. }) => {
            *to == options.to.name() && block_size.is_none_or(|size| size == options.block_size || options.to == DiskType::Fixed)
        }
        Work::Repair(_) => false,
    };
    if !is_the_same {
        intent::refuse(path, work.uuid.map(uuid::Uuid::into_bytes), &[])?;
    }
    Ok(Some(work))
}

/// The command that makes this of the file at `path`.
pub(crate) fn command(path: &Path, to: &str, block_size: Option<u32>) -> Command {
    let command = Command::new(&["vhd", "convert"]).path(path).words(&["--in-place", "--to", to]);
    match block_size.filter(|size| *size != DEFAULT_BLOCK_SIZE) {
        Some(size) => command.words(&["--block-size", &size.to_string()]),
        None => command,
    }
}
