//! `vhd convert`

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};
use serde::Serialize;
use uuid::Uuid;
use vhd_core::block::ZeroMode;
use vhd_core::chain::{Chain, Layer, RawFile, is_vhd_name, refuse_replacing};
use vhd_core::format::{Creator, DEFAULT_BLOCK_SIZE, DiskType, Timestamp};
use vhd_core::image::{CreateOptions, Image, NewKind, OpenOptions, create};
use vhd_core::ops::copy::{copy, read_from, read_to_file, write_to};
use vhd_core::ops::in_place::InPlaceOptions;
use vhd_core::partition::move_gpt;
use vhd_core::storage::{Access, FileStorage, LocalHost, LockMode, Storage, rehearse_replace, replace_file};
use vhd_core::{Disk, Error, ErrorKind, Progress};

use super::compare::{SourceFormat, open_source};
use super::create::{is_lost, parse_block_size, refuse_block_size};
use super::{ChainArgs, named_otherwise};
use crate::input::{Input, Output};
use crate::output::{Answer, Context, ShownPath};
use crate::sizes;

/// Arguments of `vhd convert`.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// A VHD (with its chain), raw file, device, or nbd:// or nbd+unix:// URI; - for raw bytes on stdin
    source: PathBuf,
    /// The file or device to write; - for raw bytes on stdout
    #[arg(required_unless_present = "in_place")]
    target: Option<PathBuf>,
    /// Make another type of the source itself, without a second copy of its data
    #[arg(long, requires = "to", conflicts_with_all = ["target", "size", "align", "overwrite"])]
    in_place: bool,
    /// With --in-place: go on although a saved state relies on the image; with --overwrite: although children of the file that is
    /// replaced are lost
    #[arg(long)]
    force: bool,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// What the source is, where its name does not say
    #[arg(long, value_name = "FORMAT")]
    from: Option<SourceFormat>,
    /// What to make: dynamic for .vhd by default, raw for everything else
    #[arg(long, value_name = "FORMAT")]
    to: Option<TargetFormat>,
    /// Bytes of the new disk, the source's size or more; needed for a VHD from stdin
    #[arg(long, value_parser = sizes::parse)]
    size: Option<u64>,
    /// Round the size up to a multiple of this; 1M is what Azure wants
    #[arg(long, value_name = "SIZE", value_parser = sizes::parse)]
    align: Option<u64>,
    /// Bytes of a block of a dynamic disk: 2M or 512K
    #[arg(long, value_name = "SIZE", value_parser = parse_block_size)]
    block_size: Option<u32>,
    /// Replace an existing file; a raw file or device is written in place
    #[arg(long)]
    overwrite: bool,
    /// Give the content to an existing image: it keeps its type, its UUID and its layout
    #[arg(long, conflicts_with_all = ["to", "size", "align", "block_size", "overwrite", "in_place"])]
    into: bool,
    #[command(flatten)]
    open: ChainArgs,
}

/// What is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TargetFormat {
    Dynamic,
    Fixed,
    Raw,
}

/// The JSON of `vhd convert`, but when stdout takes the bytes.
#[derive(Serialize)]
struct Document<'a> {
    source: ShownPath<'a>,
    path: ShownPath<'a>,
    #[serde(rename = "type")]
    format: &'static str,
}

impl TargetFormat {
    fn name(self) -> &'static str {
        match self {
            Self::Dynamic => "dynamic",
            Self::Fixed => "fixed",
            Self::Raw => "raw",
        }
    }
}

impl ConvertArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        if self.in_place {
            return self.in_place(context);
        }
        if self.source == self.target() && !is_stream(&self.source) {
            return Err(Error::new(ErrorKind::InvalidInput, "is source and target at once").at(&self.source));
        }
        if self.into {
            return self.over_image(context);
        }
        let format = self.to.unwrap_or(if is_vhd_name(self.target()) { TargetFormat::Dynamic } else { TargetFormat::Raw });
        if is_stream(self.target()) && format != TargetFormat::Raw {
            return Err(Error::new(ErrorKind::InvalidInput, "only raw bytes can be written to stdout: leave --to out"));
        }
        self.refuse_block_size(format)?;
        let source =
            if is_stream(&self.source) { None } else { Some(open_source(&self.source, self.from, &self.open, context)?) };
        if self.dry_run {
            return self.plan(context, format, source.as_ref());
        }
        let lost = self.refuse_replacing()?;
        context.with_progress("convert", |progress| match format {
            TargetFormat::Raw => self.to_raw(context, source.as_ref(), progress),
            TargetFormat::Dynamic => self.to_vhd(context, source.as_ref(), NewKind::Dynamic, progress),
            TargetFormat::Fixed => self.to_vhd(context, source.as_ref(), NewKind::Fixed { preallocate: false }, progress),
        })?;
        lost.iter().for_each(|lost| context.note(&is_lost(lost)));
        if context.json && !is_stream(self.target()) {
            context.print(
                "",
                &Document { source: ShownPath(&self.source), path: ShownPath(self.target()), format: format.name() },
            )?;
        }
        Ok(Answer::Yes)
    }

    /// Says what a conversion would read and write.
    fn plan(&self, context: &Context, format: TargetFormat, source: Option<&Disk>) -> Result<Answer, Error> {
        let Some((source, Some(size))) = source.map(|source| self.size(Some(source)).map(|size| (source, size))).transpose()?
        else {
            return Err(Error::new(ErrorKind::InvalidInput, "what comes from stdin is not known before: leave --dry-run out"));
        };
        if !is_stream(self.target()) {
            rehearse_replace(self.target(), self.overwrite)?;
            let lost = self.refuse_replacing()?;
            lost.iter().for_each(|lost| context.note(&format!("{}: would be lost", lost.display())));
        }
        let mut data = 0;
        source.extents(0..source.size(), &mut |extent| {
            data += if extent.state.reads_zero() { 0 } else { extent.range.end - extent.range.start };
            Ok(())
        })?;
        let text = format!(
            "{}: would become {} {}, of {}; {} of data copied at most\n",
            self.source.display(),
            format.name(),
            self.target().display(),
            sizes::show(size),
            sizes::show(data)
        );
        let document = serde_json::json!({
            "source": ShownPath(&self.source),
            "path": ShownPath(self.target()),
            "type": format.name(),
            "virtual_size": size,
            "data": data,
            "done": false,
        });
        context.print(&text, &document)?;
        Ok(Answer::Yes)
    }

    fn refuse_block_size(&self, format: TargetFormat) -> Result<(), Error> {
        let of = match format {
            TargetFormat::Dynamic => return Ok(()),
            TargetFormat::Fixed => "fixed disk",
            TargetFormat::Raw => "raw file",
        };
        let file = if self.in_place { &self.source } else { self.target() };
        refuse_block_size(self.block_size, of, "--to").map_err(|error| error.at(file))
    }

    /// What is written; never asked for with --in-place.
    fn target(&self) -> &Path {
        self.target.as_deref().unwrap_or(Path::new("-"))
    }

    /// Writes over the content of an image that is there. A larger one reads as zeros behind it.
    fn over_image(&self, context: &Context) -> Result<Answer, Error> {
        let source =
            if is_stream(&self.source) { None } else { Some(open_source(&self.source, self.from, &self.open, context)?) };
        let target = Disk::open(self.target(), &self.open.options(true, false))?;
        if let Some(source) = source.as_ref().filter(|source| source.size() > target.size()) {
            let message = format!("has {} bytes, the source {}: vhd resize makes it larger", target.size(), source.size());
            return Err(Error::new(ErrorKind::InvalidInput, message).at(self.target()));
        }
        context.with_progress("convert", |progress| {
            self.fill(source.as_ref(), &target, target.size(), false, progress)?;
            target.close()
        })?;
        let format = "image";
        context.print("", &Document { source: ShownPath(&self.source), path: ShownPath(self.target()), format })?;
        Ok(Answer::Yes)
    }

    fn in_place(&self, context: &Context) -> Result<Answer, Error> {
        let to = match self.to {
            Some(TargetFormat::Dynamic) => DiskType::Dynamic,
            Some(TargetFormat::Fixed) => DiskType::Fixed,
            Some(TargetFormat::Raw) | None => {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    "--in-place makes a fixed or dynamic disk: --to fixed, --to dynamic",
                ));
            }
        };
        self.to.map_or(Ok(()), |to| self.refuse_block_size(to))?;
        let options = InPlaceOptions {
            from_raw: self.from.map(|from| from == SourceFormat::Raw),
            block_size: self.block_size.unwrap_or(DEFAULT_BLOCK_SIZE),
            force: self.force,
            dry_run: self.dry_run,
            ..InPlaceOptions::new(to)
        };
        super::in_place::run(&self.source, &options, &self.open.options(false, self.force), context)
    }

    /// Bytes of the new disk.
    fn size(&self, source: Option<&Disk>) -> Result<Option<u64>, Error> {
        let Some(size) = self.size.or(source.map(Disk::size)) else { return Ok(None) };
        if let Some(source) = source.filter(|source| source.size() > size) {
            let message = format!("has {} bytes, more than --size {size}", source.size());
            return Err(Error::new(ErrorKind::InvalidInput, message).at(&self.source));
        }
        match self.align {
            Some(align) if align == 0 || align % 512 != 0 => {
                Err(Error::new(ErrorKind::InvalidInput, format!("--align {align} is not a multiple of 512")))
            }
            Some(align) => match size.checked_next_multiple_of(align) {
                None => {
                    Err(Error::new(ErrorKind::InvalidInput, format!("size {size} can't be rounded up to a multiple of {align}")))
                }
                rounded => Ok(rounded),
            },
            None => Ok(Some(size)),
        }
    }

    fn to_vhd(&self, context: &Context, source: Option<&Disk>, kind: NewKind, progress: &Progress) -> Result<(), Error> {
        let Some(size) = self.size(source)? else {
            return Err(Error::new(ErrorKind::InvalidInput, "a VHD from stdin needs --size"));
        };
        let options = CreateOptions {
            kind,
            size,
            block_size: self.block_size.unwrap_or(DEFAULT_BLOCK_SIZE),
            uuid: Uuid::new_v4().into_bytes(),
            creator: Creator::WINDOWS_10,
            timestamp: Timestamp::now(),
        };
        replace_file(&LocalHost, self.target(), self.overwrite, &access(source), |storage| {
            let is_new = storage.can_grow();
            for note in create(&**storage, &options)?.notes.into_iter().chain(named_otherwise(self.target())) {
                context.note(&format!("{}: {note}", self.target().display()));
            }
            let open = OpenOptions { writable: true, background_flush: None, ..OpenOptions::default() };
            let image = Image::open(Arc::clone(storage), self.target(), &open)?;
            let fixed = image.layout().is_none();
            let target = Disk::new(Chain::of(Layer::Image(image)));
            // A dynamic disk is new wherever it lies; a fixed one on a device shows what was there.
            self.fill(source, &target, target.size(), is_new || !fixed, progress)?;
            target.close()
        })
    }

    /// Refuses to replace what a chain needs, or returns what is lost.
    fn refuse_replacing(&self) -> Result<Vec<PathBuf>, Error> {
        if !self.overwrite || is_stream(self.target()) || !self.target().exists() {
            return Ok(Vec::new());
        }
        // That it can't be written at all comes first.
        rehearse_replace(self.target(), true)?;
        refuse_replacing(self.target(), self.force)
    }

    /// Fills the first `size` bytes of the target.
    fn fill(
        &self,
        source: Option<&Disk>,
        target: &Disk,
        size: u64,
        target_is_zero: bool,
        progress: &Progress,
    ) -> Result<(), Error> {
        let filled = match source {
            Some(source) => {
                copy(source, target, target_is_zero, progress)?;
                source.size()
            }
            None => read_from(&mut Input::new(progress)?, target, 0, target_is_zero, progress)?,
        };
        if !target_is_zero && filled < size {
            target.zero(filled..size, ZeroMode::Free)?;
        }
        if filled < size {
            // What ended the source belongs at the end of a larger disk.
            move_gpt(target, filled, size)?;
        }
        Ok(())
    }

    fn to_raw(&self, context: &Context, source: Option<&Disk>, progress: &Progress) -> Result<(), Error> {
        let size = self.size(source)?;
        if is_stream(self.target()) {
            return match source {
                Some(source) => write_to(source, 0..source.size(), &mut Output::new(progress)?, progress),
                None => Err(Error::new(ErrorKind::InvalidInput, "stdin to stdout: nothing to convert")),
            };
        }
        if self.overwrite && self.target().exists() {
            return self.over_raw(source, size, progress);
        }
        replace_file(&LocalHost, self.target(), false, &access(source), |storage| {
            let Some(size) = size else {
                let came = read_to_file(&mut Input::new(progress)?, &**storage, progress)?;
                if came % 512 != 0 {
                    context.note(&format!("{}: {came} bytes are no whole number of sectors", self.target().display()));
                }
                return Ok(());
            };
            storage.set_len(size).map_err(|error| Error::io(error, format!("can't grow to {size} bytes")))?;
            let target = raw_disk(storage, self.target())?;
            self.fill(source, &target, size, true, progress)?;
            target.close()
        })
    }

    /// Writes over an existing raw file or device: its inode stays, and who has it open sees the new content.
    fn over_raw(&self, source: Option<&Disk>, size: Option<u64>, progress: &Progress) -> Result<(), Error> {
        let storage = Arc::new(FileStorage::open(self.target(), true)?);
        storage.lock(LockMode::Write)?;
        let is_device = std::fs::metadata(self.target()).is_ok_and(|metadata| metadata.file_type().is_block_device());
        match size {
            Some(size) if !is_device => {
                storage
                    .set_len(size)
                    .map_err(|error| Error::io(error, format!("can't become {size} bytes long")).at(self.target()))?;
            }
            None if !is_device => {
                storage.set_len(0).map_err(|error| Error::io(error, "can't be emptied").at(self.target()))?;
                read_to_file(&mut Input::new(progress)?, &*storage, progress)?;
                return storage.sync().map_err(|error| Error::io(error, "can't be synced").at(self.target()));
            }
            _ => {}
        }
        let target = raw_disk(&(storage as _), self.target())?;
        match (source, size) {
            (Some(source), Some(size)) if target.size() < size => {
                let message = format!("has room for {} bytes, {} bytes are needed", target.size(), source.size());
                return Err(Error::new(ErrorKind::NoSpace, message).at(self.target()));
            }
            // Of a device, only as much is written as the disk has.
            _ => self.fill(source, &target, size.unwrap_or(target.size()), false, progress)?,
        }
        target.close()
    }
}

/// Who may read what comes from this source, or from stdin.
fn access(source: Option<&Disk>) -> Access {
    let layers = source.map_or(0, |source| source.capabilities().layers);
    let paths: Option<Vec<_>> = (0..layers).map(|depth| source.and_then(|source| source.layer_path(depth))).collect();
    Access::of_all(paths.iter().flatten().map(PathBuf::as_path))
}

fn is_stream(path: &Path) -> bool {
    path == Path::new("-")
}

fn raw_disk(storage: &Arc<dyn Storage>, path: &Path) -> Result<Disk, Error> {
    Ok(Disk::new(Chain::of(Layer::Raw(Arc::new(RawFile::new(Arc::clone(storage), path, false)?)))))
}
