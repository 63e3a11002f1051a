//! `vhd info`

use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use uuid::Uuid;
use vhd_core::Error;
use vhd_core::chain::{Chain, Layer, LinkedDisk, read_locators};
use vhd_core::format::DiskType;
use vhd_core::image::Image;

use super::{ChainArgs, too_large_for_ide};
use crate::output::{Answer, Context, ShownPath, output_error};
use crate::sizes;

/// Arguments of `vhd info`.
#[derive(Debug, Args)]
pub struct InfoArgs {
    /// The image
    image: PathBuf,
    /// All images of the chain, leaf first
    #[arg(long)]
    chain: bool,
    #[command(flatten)]
    open: ChainArgs,
}

/// The JSON of `vhd info`: a contract.
#[derive(Serialize)]
struct Info<'a> {
    path: ShownPath<'a>,
    #[serde(rename = "type")]
    disk_type: &'static str,
    virtual_size: u64,
    original_size: u64,
    file_size: u64,
    file_allocated: u64,
    block_size: Option<u64>,
    blocks_total: Option<u32>,
    blocks_allocated: Option<u32>,
    uuid: String,
    creator_app: String,
    creator_version: String,
    creator_os: String,
    created: String,
    geometry: GeometryInfo,
    geometry_size: u64,
    saved_state: bool,
    parent: Option<ParentInfo<'a>>,
    /// What a linked disk is linked to.
    linked: Option<LinkedInfo>,
    warnings: Vec<String>,
}

#[derive(Serialize)]
struct LinkedInfo {
    path: String,
    size: u64,
    serial: Option<String>,
}

#[derive(Serialize)]
struct GeometryInfo {
    cylinders: u16,
    heads: u8,
    sectors: u8,
}

#[derive(Serialize)]
struct ParentInfo<'a> {
    /// Where it was found; null when it was not.
    path: Option<ShownPath<'a>>,
    uuid: String,
    name: String,
    locators: Vec<LocatorInfo>,
}

#[derive(Serialize)]
struct LocatorInfo {
    code: String,
    path: Option<String>,
}

impl InfoArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        let options = self.open.options(false, false);
        if self.chain {
            let chain = Chain::open(&self.image, &options)?;
            let infos = infos(&chain)?;
            let texts: Vec<_> = infos.iter().map(Info::text).collect();
            context.print(&texts.join("\n"), &infos)?;
            return Ok(Answer::Yes);
        }
        let image = Chain::open_image(&self.image, &options)?;
        // A parent that can't be found is worth a warning here, not a failure.
        let (parent, problem) = match image.footer().disk_type() {
            DiskType::Differencing => match Chain::open(&self.image, &options) {
                Ok(chain) => (chain.layers().get(1).map(|layer| layer.path().to_owned()), None),
                Err(error) => (None, Some(error.message())),
            },
            _ => (None, None),
        };
        let info = Info::new(&image, parent.as_deref(), problem)?;
        context.print(&info.text(), &info)?;
        Ok(Answer::Yes)
    }
}

fn infos(chain: &Chain) -> Result<Vec<Info<'_>>, Error> {
    let layers = chain.layers();
    let images = layers.iter().filter_map(Layer::image).enumerate();
    images.map(|(depth, image)| Info::new(image, layers.get(depth + 1).map(Layer::path), None)).collect()
}

/// The document of `vhd info --chain` for a chain that is open.
pub(super) fn write_document(chain: &Chain, out: &mut dyn io::Write) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(&infos(chain)?).map_err(|error| output_error(error.into()))?;
    writeln!(out, "{text}").map_err(output_error)
}

impl<'a> Info<'a> {
    fn new(image: &'a Image, parent: Option<&'a Path>, problem: Option<String>) -> Result<Self, Error> {
        let footer = image.footer();
        let storage = image.storage();
        let host = |error| Error::io(error, "can't be examined").at(image.path());
        let sparse = image.header().is_some();
        let warnings = image.warnings().iter().cloned().chain(problem).chain(too_large_for_ide(image.size())).collect();
        let linked = LinkedDisk::of(image)?;
        let (geometry, creator) = (footer.geometry(), footer.creator());
        let created = jiff::Timestamp::try_from(footer.timestamp().to_system_time());
        Ok(Self {
            path: ShownPath(image.path()),
            disk_type: if linked.is_some() { "linked" } else { footer.disk_type().name() },
            virtual_size: image.size(),
            original_size: footer.original_size(),
            file_size: storage.len().map_err(host)?,
            file_allocated: storage.allocated().map_err(host)?,
            block_size: image.layout().map(|layout| layout.block_size()),
            blocks_total: image.layout().map(|layout| layout.blocks()),
            blocks_allocated: if sparse { Some(image.count_allocated()?) } else { None },
            uuid: Uuid::from_bytes(footer.uuid()).to_string(),
            creator_app: text_of(&creator.app),
            creator_version: format!("{}.{}", creator.version >> 16, creator.version & 0xFFFF),
            creator_os: text_of(&creator.os),
            created: created.map(|time| time.to_string()).unwrap_or_default(),
            geometry: GeometryInfo { cylinders: geometry.cylinders, heads: geometry.heads, sectors: geometry.sectors },
            geometry_size: geometry.size(),
            saved_state: footer.saved_state(),
            parent: if linked.is_some() { None } else { parent_info(image, parent)? },
            linked: linked.map(|linked| LinkedInfo {
                path: linked.path.display().to_string(),
                size: linked.size,
                serial: linked.serial,
            }),
            warnings,
        })
    }

    fn text(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<14}{value}");
        };
        line("image", self.path.0.display().to_string());
        line("type", self.disk_type.to_owned());
        line("size", sizes::show(self.virtual_size));
        if self.original_size != self.virtual_size {
            line("created as", sizes::show(self.original_size));
        }
        line("file", format!("{}, {} allocated", sizes::show(self.file_size), sizes::show(self.file_allocated)));
        if let (Some(size), Some(total), Some(allocated)) = (self.block_size, self.blocks_total, self.blocks_allocated) {
            line("blocks", format!("{allocated} of {total} allocated, {} each", sizes::show(size)));
        }
        line("UUID", self.uuid.clone());
        line("creator", format!("{:?} {} on {:?}, {}", self.creator_app, self.creator_version, self.creator_os, self.created));
        let GeometryInfo { cylinders, heads, sectors } = self.geometry;
        line("geometry", format!("{cylinders}/{heads}/{sectors} (cylinders/heads/sectors), {} bytes", self.geometry_size));
        if self.saved_state {
            line("saved state", "yes: a virtual machine's saved state relies on this image".into());
        }
        if let Some(parent) = &self.parent {
            let place = parent.path.as_ref().map_or("not found".into(), |path| path.0.display().to_string());
            line("parent", place);
            line("", format!("UUID {}, name {:?}", parent.uuid, parent.name));
            for locator in &parent.locators {
                line(
                    "",
                    format!("{} {}", locator.code, locator.path.as_deref().map_or("(opaque)".into(), |path| format!("{path:?}"))),
                );
            }
        }
        if let Some(linked) = &self.linked {
            let serial = linked.serial.as_deref().unwrap_or("no serial number");
            line("linked to", format!("{}, {}, {serial}", linked.path, sizes::show(linked.size)));
        }
        for warning in &self.warnings {
            line("warning", warning.clone());
        }
        text
    }
}

/// Four characters without the padding; others than ASCII are escaped.
fn text_of(bytes: &[u8; 4]) -> String {
    let end = bytes.iter().rposition(|&byte| byte != 0 && byte != b' ').map_or(0, |last| last + 1);
    bytes[..end].escape_ascii().to_string()
}

fn parent_info<'a>(image: &Image, found: Option<&'a Path>) -> Result<Option<ParentInfo<'a>>, Error> {
    let Some(header) = image.header().filter(|_| image.footer().disk_type() == DiskType::Differencing) else {
        return Ok(None);
    };
    let locators = read_locators(&**image.storage(), header)?;
    let locators = locators.into_iter().map(|locator| LocatorInfo { code: locator.entry.code.name(), path: locator.path });
    Ok(Some(ParentInfo {
        path: found.map(ShownPath),
        uuid: Uuid::from_bytes(header.parent_uuid()).to_string(),
        name: header.parent_name(),
        locators: locators.collect(),
    }))
}
