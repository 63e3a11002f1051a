//! `vhd compact`

use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use vhd_core::guestfs::{Place, free_space};
use vhd_core::ops::compact::{CompactOptions, Compacted, compact};
use vhd_core::{Disk, Error};

use super::ChainArgs;
use crate::output::{Answer, Context, ShownPath, goes_on};
use crate::sizes;

/// Arguments of `vhd compact`.
#[derive(Debug, Args)]
pub struct CompactArgs {
    /// The images: dynamic or differencing
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// Drop what the guest's file systems call free too: deleted files can't be recovered then
    #[arg(long)]
    free_space: bool,
    /// Move all blocks to where their data begins on a 4 KiB boundary
    #[arg(long)]
    realign: bool,
    /// Go on although a saved state relies on an image or it has children, which read the same but with --free-space
    #[arg(long)]
    force: bool,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    open: ChainArgs,
}

/// One entry of the JSON of `vhd compact`.
#[derive(Serialize)]
struct Document<'a> {
    path: ShownPath<'a>,
    file_size_before: u64,
    file_size: u64,
    blocks: u64,
    blocks_dropped: u64,
    sectors_cleared: u64,
    blocks_moved: u64,
    bytes_moved: u64,
    /// What --free-space found; null without it.
    free_space: Option<Vec<PlaceDocument>>,
    done: bool,
}

/// A partition, or the whole disk.
#[derive(Serialize)]
struct PlaceDocument {
    partition: Option<u32>,
    start: u64,
    length: u64,
    file_system: Option<&'static str>,
    /// Bytes of what the image held that are free; null where they are not known.
    free: Option<u64>,
    /// Why nothing is freed.
    reason: Option<String>,
}

/// An image, and what was done to it.
struct Done<'a> {
    image: &'a Path,
    compacted: Compacted,
    places: Option<Vec<Place>>,
}

impl CompactArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        let mut done = Vec::new();
        let result = self.images.iter().try_for_each(|image| {
            done.push(self.compact(image, context)?);
            Ok(())
        });
        let mut text: String = done.iter().map(|done| self.text(done)).collect();
        let documents: Vec<_> = done.iter().map(|done| self.document(done)).collect();
        let Err(error) = result else {
            context.print(&text, &documents)?;
            return Ok(Answer::Yes);
        };
        if self.images.len() > 1 {
            self.images[done.len()..].iter().for_each(|image| text.push_str(&format!("{}: not done\n", image.display())));
        }
        context.print_done(&text, &documents);
        Err(error)
    }

    fn compact<'a>(&self, image: &'a Path, context: &Context) -> Result<Done<'a>, Error> {
        let options =
            CompactOptions { realign: self.realign, free_space: self.free_space, force: self.force, dry_run: self.dry_run };
        let chain = self.open.options(false, self.force);
        let mut places = None;
        let mut unneeded = |disk: &Disk| {
            if !self.free_space {
                return Ok(Vec::new());
            }
            let free = free_space(disk)?;
            places = Some(free.places);
            Ok(free.ranges)
        };
        let compacted = context.with_progress("compact", |progress| compact(image, &options, &mut unneeded, &chain, progress));
        let compacted = compacted.map_err(|error| goes_on(error, image))?;
        Ok(Done { image, compacted, places })
    }

    fn document<'a>(&self, Done { image, compacted, places }: &Done<'a>) -> Document<'a> {
        Document {
            path: ShownPath(image),
            file_size_before: compacted.len_before,
            file_size: compacted.len_after,
            blocks: compacted.blocks,
            blocks_dropped: compacted.dropped,
            sectors_cleared: compacted.cleared,
            blocks_moved: compacted.moved,
            bytes_moved: compacted.bytes_moved,
            free_space: places.as_ref().map(|places| places.iter().map(place_document).collect()),
            done: !self.dry_run,
        }
    }

    fn text(&self, Done { image, compacted, places }: &Done<'_>) -> String {
        let Compacted { len_before, len_after, blocks, dropped, cleared, moved, bytes_moved } = *compacted;
        let would = if self.dry_run { "would be " } else { "" };
        let what = if places.is_some() { "the parent's or free" } else { "the parent's" };
        let cleared = if cleared > 0 { format!(", {cleared} sectors that are {what}") } else { String::new() };
        let mut text = format!(
            "{}: {would}{} instead of {}\n  {dropped} of {blocks} blocks dropped{cleared}; {moved} moved ({})\n",
            image.display(),
            sizes::show(len_after),
            sizes::show(len_before),
            sizes::show(bytes_moved),
        );
        places.iter().flatten().for_each(|place| place_text(place, &mut text));
        text
    }
}

fn place_text(place: &Place, text: &mut String) {
    let name = place.partition.map_or("the whole disk".to_owned(), |number| format!("partition {number}"));
    let file_system = place.file_system.map_or(String::new(), |file_system| format!("{file_system}, "));
    let _ = match &place.free {
        Ok(free) => writeln!(text, "  {name}: {file_system}{} of what the image held are free", sizes::show(*free)),
        Err(reason) => writeln!(text, "  {name}: {file_system}left as it is: {reason}"),
    };
}

fn place_document(place: &Place) -> PlaceDocument {
    PlaceDocument {
        partition: place.partition,
        start: place.range.start,
        length: place.range.end - place.range.start,
        file_system: place.file_system,
        free: place.free.as_ref().ok().copied(),
        reason: place.free.as_ref().err().cloned(),
    }
}
