//! `vhd create`

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::Serialize;
use uuid::Uuid;
use vhd_core::chain::{ChildOptions, create_child, create_link, refuse_replacing};
use vhd_core::format::{Creator, DEFAULT_BLOCK_SIZE, Timestamp};
use vhd_core::image::{CreateOptions, NewKind, create_file};
use vhd_core::{Error, ErrorKind};

use super::{ChainArgs, named_otherwise, too_large_for_ide};
use crate::output::{Answer, Context, ShownPath, from_here};
use crate::sizes;

/// Arguments of `vhd create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// The image to make
    image: PathBuf,
    /// Bytes of the disk (K, M, G, T); the parent's for a differencing disk
    #[arg(long, value_parser = sizes::parse, required_unless_present_any = ["parent", "link"])]
    size: Option<u64>,
    /// Kind of disk
    #[arg(long = "type", value_name = "TYPE", default_value = "dynamic", conflicts_with_all = ["parent", "link"])]
    disk_type: DiskTypeArg,
    /// Make a differencing disk over this image, or over a raw file (a name without .vhd, .vud or .avhd)
    #[arg(long)]
    parent: Option<PathBuf>,
    /// Make a linked disk: it stands for this whole device or raw file, and is read to convert it
    #[arg(long, value_name = "DEVICE", conflicts_with_all = ["parent", "size", "block_size", "creator", "preallocate"])]
    link: Option<PathBuf>,
    /// Make the parent read-only, and immutable where that is allowed
    #[arg(long, requires = "parent")]
    protect_parent: bool,
    /// Bytes of a block: 2M or 512K, what Windows knows; not of a fixed disk, which has none
    #[arg(long, value_name = "SIZE", value_parser = parse_block_size)]
    block_size: Option<u32>,
    /// How much space of a fixed disk the host gives now
    #[arg(long, value_name = "HOW", default_value = "off")]
    preallocate: Preallocate,
    /// Identifier; random by default
    #[arg(long)]
    uuid: Option<Uuid>,
    /// The creator that the image names: up to four characters
    #[arg(long, value_name = "APP", value_parser = parse_creator)]
    creator: Option<[u8; 4]>,
    /// Replace an existing file
    #[arg(long)]
    overwrite: bool,
    /// With --overwrite: although children of the file that is replaced are lost
    #[arg(long, requires = "overwrite")]
    force: bool,
    #[command(flatten)]
    chain: ChainArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DiskTypeArg {
    Dynamic,
    Fixed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Preallocate {
    Off,
    Full,
}

pub(super) fn parse_block_size(text: &str) -> Result<u32, String> {
    match sizes::parse(text)? {
        0x20_0000 => Ok(0x20_0000),
        0x8_0000 => Ok(0x8_0000),
        other => Err(format!("block size {other}: only 2M and 512K are known to Windows")),
    }
}

fn parse_creator(text: &str) -> Result<[u8; 4], String> {
    let bytes = text.as_bytes();
    if bytes.is_empty() || bytes.len() > 4 || !bytes.iter().all(|byte| (b' '..0x7F).contains(byte)) {
        return Err("expected one to four ASCII characters".into());
    }
    let mut app = [b' '; 4];
    app[..bytes.len()].copy_from_slice(bytes);
    Ok(app)
}

/// The JSON of `vhd create`.
#[derive(Serialize)]
struct Document<'a> {
    path: ShownPath<'a>,
    virtual_size: u64,
    uuid: String,
    notes: Vec<String>,
}

impl CreateArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        let uuid = self.uuid.unwrap_or_else(Uuid::new_v4);
        let lost = if self.overwrite { refuse_replacing(&self.image, self.force)? } else { Vec::new() };
        let mut created = match (&self.parent, &self.link) {
            (None, Some(device)) => create_link(&self.image, device, uuid.into_bytes(), self.overwrite),
            (Some(parent), _) => {
                if self.preallocate == Preallocate::Full {
                    return Err(only_fixed().at(&self.image));
                }
                let options = ChildOptions {
                    size: self.size,
                    block_size: self.block_size,
                    creator: self.creator(),
                    overwrite: self.overwrite,
                    protect_parent: self.protect_parent,
                    ..ChildOptions::new(uuid.into_bytes())
                };
                create_child(&self.image, parent, &options, &self.chain.options(false, false))
            }
            (None, None) => create_file(&self.image, &self.new_options(uuid)?, self.overwrite),
        }
        .map_err(|error| error.at(&self.image))?;
        lost.iter().for_each(|lost| context.note(&is_lost(lost)));
        created.notes.extend(too_large_for_ide(created.size));
        created.notes.extend(named_otherwise(&self.image));
        for note in &created.notes {
            context.note(&format!("{}: {note}", self.image.display()));
        }
        if context.json {
            let document = Document {
                path: ShownPath(&self.image),
                virtual_size: created.size,
                uuid: uuid.to_string(),
                notes: created.notes,
            };
            context.print("", &document)?;
        }
        Ok(Answer::Yes)
    }

    fn creator(&self) -> Creator {
        match self.creator {
            Some(app) => Creator { app, ..Creator::WINDOWS_10 },
            None => Creator::WINDOWS_10,
        }
    }

    fn new_options(&self, uuid: Uuid) -> Result<CreateOptions, Error> {
        let preallocate = self.preallocate == Preallocate::Full;
        if self.disk_type == DiskTypeArg::Fixed {
            refuse_block_size(self.block_size, "fixed disk", "--type").map_err(|error| error.at(&self.image))?;
        }
        let kind = match self.disk_type {
            DiskTypeArg::Fixed => NewKind::Fixed { preallocate },
            DiskTypeArg::Dynamic if preallocate => return Err(only_fixed().at(&self.image)),
            DiskTypeArg::Dynamic => NewKind::Dynamic,
        };
        Ok(CreateOptions {
            kind,
            size: self.size.unwrap_or(0),
            block_size: self.block_size.unwrap_or(DEFAULT_BLOCK_SIZE),
            uuid: uuid.into_bytes(),
            creator: self.creator(),
            timestamp: Timestamp::now(),
        })
    }
}

/// What to say of an image whose parent was replaced.
pub(super) fn is_lost(image: &Path) -> String {
    format!("{}: is lost: it can't be opened any more", from_here(image))
}

/// Refuses a size of blocks for what has none: it would be ignored, and the user not told.
pub(super) fn refuse_block_size(size: Option<u32>, of: &str, option: &str) -> Result<(), Error> {
    let message = format!("a {of} has no blocks: leave --block-size out, or take {option} dynamic");
    size.map_or(Ok(()), |_| Err(Error::new(ErrorKind::InvalidInput, message)))
}

fn only_fixed() -> Error {
    Error::new(ErrorKind::InvalidInput, "--preallocate full is for fixed disks: add --type fixed")
}
