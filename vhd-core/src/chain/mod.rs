//! A leaf and its parents, as one disk.

mod child;
mod find;
mod flat;
mod holes;
mod linked;
mod open;
mod raw;
mod session;

use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use child::{ChildOptions, create_child, link_to, refuse_replacing};
pub(crate) use child::{create_over_open, relative_to};
pub(crate) use find::{
    Lead, find_children, find_parent_of, follow_locator, is_child_of, locator_paths, uuid_of_file, windows_paths,
};
pub use find::{Locator, ParentPolicy, is_vhd_name, read_locators};
pub(crate) use linked::refuse_linked;
pub use linked::{LinkedDisk, create_link};
pub(crate) use open::open_file;
pub use open::{ChainOptions, MAX_DEPTH};
pub use raw::RawFile;
pub use session::{UndoMember, UndoSession};

use self::flat::{FlatCache, Visit};
use self::holes::DataRanges;
use crate::block::{BlockDevice, Capabilities, Extent, ExtentState, Found, Spliced, ZeroMode};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Below, Image, OpenOptions, Run, RunKind};
use crate::storage::{FileStorage, ReadBuffers, Room, SharedBytes, Storage};

/// Bytes of a run in which holes are worth looking for.
const COARSE_GRAIN: u64 = 64 << 10;

/// One file of a chain.
#[derive(Clone, Debug)]
pub enum Layer {
    /// A VHD.
    Image(Arc<Image>),
    /// A raw file or device: only ever the base.
    Raw(Arc<RawFile>),
}

impl Layer {
    /// Bytes of the disk as this layer has it.
    #[must_use]
    pub fn size(&self) -> u64 {
        match self {
            Self::Image(image) => image.size(),
            Self::Raw(raw) => raw.size(),
        }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Image(image) => image.path(),
            Self::Raw(raw) => raw.path(),
        }
    }

    /// The VHD, where it is one.
    #[must_use]
    pub fn image(&self) -> Option<&Arc<Image>> {
        match self {
            Self::Image(image) => Some(image),
            Self::Raw(_) => None,
        }
    }

    /// The open file of the host: what is to be known of it is asked there, as its name may lead elsewhere by now.
    #[must_use]
    pub fn file(&self) -> Option<&FileStorage> {
        self.storage().as_file()
    }

    /// The same file, read anew through its descriptor; `path` is its name now.
    pub(crate) fn read_again(&self, path: &Path, options: &OpenOptions) -> Result<Self> {
        let look = OpenOptions { writable: false, ..options.clone() };
        Ok(match self {
            Self::Image(image) => Self::Image(Image::open(Arc::clone(image.storage()), path, &look)?),
            Self::Raw(raw) => Self::Raw(Arc::new(raw.read_again(path)?)),
        })
    }

    fn is_read_only(&self) -> bool {
        match self {
            Self::Image(image) => image.is_read_only(),
            Self::Raw(raw) => raw.is_read_only(),
        }
    }

    fn storage(&self) -> &dyn Storage {
        match self {
            Self::Image(image) => &**image.storage(),
            Self::Raw(raw) => raw.storage(),
        }
    }

    fn map(&self, range: Range<u64>, visit: &mut dyn FnMut(Run) -> Result<()>) -> Result<()> {
        match self {
            Self::Image(image) => image.map(range, visit),
            Self::Raw(raw) => {
                let end = raw.len().clamp(range.start, range.end);
                let present = Run { range: range.start..end, kind: RunKind::Present(range.start) };
                // What a file lacks of its last sector is zero.
                let rest = Run { range: end..range.end, kind: RunKind::Zero };
                [present, rest].into_iter().filter(|run| !run.range.is_empty()).try_for_each(visit)
            }
        }
    }

    /// Reads bytes of the file that a map or an extent told.
    pub(crate) fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        self.read(&mut [IoSliceMut::new(bytes)], offset)
    }

    fn read(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        self.storage().read_vectored_at(bufs, offset).map_err(|error| self.read_error(error, offset))
    }

    fn read_shared(&self, to: &dyn SharedBytes, range: Range<u64>, offset: u64) -> Result<()> {
        self.storage().read_shared_at(to, range, offset).map_err(|error| self.read_error(error, offset))
    }

    /// As [`Self::read`], but where `wait` is not set only what the host has at hand.
    fn find(&self, bufs: &mut [IoSliceMut<'_>], offset: u64, wait: bool) -> Result<Found> {
        if wait {
            return self.read(bufs, offset).map(|()| Found::Data);
        }
        let is_there = self.storage().read_if_cached(bufs, offset).map_err(|error| self.read_error(error, offset))?;
        Ok(if is_there { Found::Data } else { Found::NotNow })
    }

    fn known_place(&self, range: &Range<u64>) -> Option<u64> {
        match self {
            Self::Image(image) => image.known_place(range),
            Self::Raw(raw) => (range.end <= raw.len()).then_some(range.start),
        }
    }

    fn keeps_places(&self) -> bool {
        match self {
            Self::Image(image) => image.keeps_places(),
            Self::Raw(_) => true,
        }
    }

    fn read_error(&self, error: io::Error, offset: u64) -> Error {
        match self {
            Self::Image(image) => image.read_error(error, offset),
            Self::Raw(raw) => raw.error(error, &format!("can't be read at {offset:#x}")),
        }
    }
}

/// A leaf and its parents, leaf first. Parents are never written.
#[derive(Debug)]
pub struct Chain {
    layers: Vec<Layer>,
    /// What is remembered of the layers that nobody writes, where there are several.
    flat: Option<FlatCache>,
    /// The first of these layers: the leaf, where it is only read, else its parent.
    flat_depth: usize,
}

impl Chain {
    /// A chain of one file.
    #[must_use]
    pub fn of(layer: Layer) -> Self {
        Self::over(layer, Vec::new())
    }

    /// A chain of files that were opened one by one: a leaf, and its parents from the nearest to the base.
    #[must_use]
    pub fn over(leaf: Layer, parents: Vec<Layer>) -> Self {
        let flat_depth = usize::from(!leaf.is_read_only());
        let mut layers = vec![leaf];
        layers.extend(parents);
        let flat = (layers.len() > 2).then(FlatCache::default);
        Self { layers, flat, flat_depth }
    }

    /// The files, leaf first.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// As [`BlockDevice::extents`], of all of the disk, for those who move data: holes within short runs are data, as asking
    /// the host for them costs more than moving zeros.
    pub(crate) fn coarse_extents(&self, visit: &mut dyn FnMut(Extent) -> Result<()>) -> Result<()> {
        Parents { flat: None, ..self.from(0) }.extents(0..self.leaf().size(), COARSE_GRAIN, visit)
    }

    fn leaf(&self) -> &Layer {
        &self.layers[0]
    }

    pub(crate) fn below(&self) -> impl Below + '_ {
        self.parents()
    }

    fn parents(&self) -> Parents<'_> {
        self.from(1)
    }

    /// The layers from this depth on.
    fn from(&self, depth: usize) -> Parents<'_> {
        let flat = self.flat.as_ref().filter(|_| depth <= self.flat_depth);
        Parents { layers: &self.layers, depth, flat, flat_depth: self.flat_depth }
    }

    /// Fills all of `bufs` with what the disk would hold if the layer at `depth` were its leaf.
    ///
    /// # Errors
    /// `OutOfRange`; as a layer can't be read.
    pub fn read_layer(&self, depth: usize, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        self.find(depth, bufs, offset, true).map(drop)
    }

    fn find(&self, depth: usize, bufs: &mut [IoSliceMut<'_>], offset: u64, wait: bool) -> Result<Found> {
        let range = self.range_of(depth, offset, bufs.iter().map(|buf| buf.len() as u64).sum())?;
        let _held = self.leaf().image().map(|image| image.hold());
        // Layers above others are seldom full, and of those that nobody writes more is remembered.
        if let ([buf], Some(base)) = (&mut *bufs, self.layers.get(depth).filter(|_| depth + 1 == self.layers.len()))
            && !range.is_empty()
            && let Some(place) = base.known_place(&range)
        {
            return base.find(&mut [IoSliceMut::new(buf)], place, wait);
        }
        self.from(depth).read(&mut ReadBuffers::new(bufs), range, wait)
    }

    /// As [`BlockDevice::splice_at`], of the disk that the layer at `depth` would be the leaf of.
    pub(crate) fn splice_layer(&self, depth: usize, pipe: BorrowedFd<'_>, range: Range<u64>, wait: bool) -> Result<Spliced> {
        let range = self.range_of(depth, range.start, range.end.saturating_sub(range.start))?;
        let _held = self.leaf().image().map(|image| image.hold());
        let Some((depth, offset)) = self.from(depth).one_place(&range)? else { return Ok(Spliced::No) };
        let layer = &self.layers[depth];
        if !layer.keeps_places() {
            return Ok(Spliced::No);
        }
        let place = offset..offset + (range.end - range.start);
        layer.storage().splice_at(pipe, place, wait).map_err(|error| layer.read_error(error, offset))
    }

    /// True when writes are known to wait for no other machine.
    #[must_use]
    pub fn is_local(&self) -> bool {
        self.leaf().storage().is_local()
    }

    /// True when the leaf's host is known to zero a range by metadata, whatever is there.
    #[must_use]
    pub fn zeroes_fast(&self, mode: ZeroMode) -> bool {
        self.leaf().storage().zeroes_fast(mode == ZeroMode::Keep)
    }

    /// The extents of the disk that the layer at `depth` would be the leaf of. Depths are those of this chain.
    ///
    /// # Errors
    /// As [`BlockDevice::extents`].
    pub fn layer_extents(&self, depth: usize, range: Range<u64>, visit: &mut dyn FnMut(Extent) -> Result<()>) -> Result<()> {
        let range = self.range_of(depth, range.start, range.end.saturating_sub(range.start))?;
        let _held = self.leaf().image().map(|image| image.hold());
        // A long look at metadata is not worth remembering, and would cost memory by the size of the disk.
        Parents { flat: None, ..self.from(depth) }.extents(range, 0, visit)
    }

    /// The extents of what the layers above the one at `depth` hold; what they do not is absent.
    pub(crate) fn extents_above(
        &self,
        depth: usize,
        range: Range<u64>,
        visit: &mut dyn FnMut(Extent) -> Result<()>,
    ) -> Result<()> {
        if depth == 0 || range.is_empty() {
            return Ok(());
        }
        let _held = self.leaf().image().map(|image| image.hold());
        Parents { layers: &self.layers[..depth], flat: None, ..self.from(0) }.extents(range, 0, visit)
    }

    fn range(&self, offset: u64, len: u64) -> Result<Range<u64>> {
        self.range_of(0, offset, len)
    }

    fn range_of(&self, depth: usize, offset: u64, len: u64) -> Result<Range<u64>> {
        let size = self.layers.get(depth).map_or(0, Layer::size);
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(offset..end),
            _ => Err(self.out_of_range(offset, len, size)),
        }
    }

    #[cold]
    fn out_of_range(&self, offset: u64, len: u64, size: u64) -> Error {
        let message = format!("{len} bytes at {offset} are not inside the disk of {size} bytes");
        Error::new(ErrorKind::OutOfRange, message).at(self.leaf().path())
    }
}

/// The layers of a chain from some depth on.
struct Parents<'a> {
    layers: &'a [Layer],
    depth: usize,
    flat: Option<&'a FlatCache>,
    flat_depth: usize,
}

impl Parents<'_> {
    /// Calls `visit` with runs of what these layers hold: the layer, and where in its file; no layer for zeros
    /// that none of them holds.
    fn resolve(&self, range: Range<u64>, visit: Visit<'_>) -> Result<()> {
        match self.flat {
            Some(flat) if self.depth == self.flat_depth => {
                flat.resolve(range, &|range, visit| self.resolve_by_layer(range, visit), visit)
            }
            _ => self.resolve_by_layer(range, visit),
        }
    }

    fn resolve_by_layer(&self, range: Range<u64>, visit: Visit<'_>) -> Result<()> {
        let Some(layer) = self.layers.get(self.depth) else {
            let base = self.layers.len() - 1;
            return if range.is_empty() { Ok(()) } else { visit(range, base, RunKind::Absent) };
        };
        let inside = range.start.min(layer.size())..range.end.min(layer.size());
        let beyond = inside.end.max(range.start)..range.end;
        let deeper = Parents { depth: self.depth + 1, ..*self };
        layer.map(inside, &mut |run| match run.kind {
            RunKind::Absent => deeper.resolve(run.range, visit),
            kind => visit(run.range, self.depth, kind),
        })?;
        // Past the end of a parent that is smaller than its child there is nothing, whatever lies deeper.
        if beyond.is_empty() { Ok(()) } else { visit(beyond, self.layers.len() - 1, RunKind::Absent) }
    }

    /// The layer that holds all of a range in one piece, and where in its file.
    fn one_place(&self, range: &Range<u64>) -> Result<Option<(usize, u64)>> {
        let (mut place, mut is_one) = (None, true);
        self.resolve(range.clone(), &mut |run, depth, kind| {
            let RunKind::Present(offset) = kind else {
                is_one = false;
                return Ok(());
            };
            // Where the range would begin, were all of it in this piece.
            let start = offset.checked_sub(run.start - range.start).map(|start| (depth, start));
            is_one &= start.is_some() && *place.get_or_insert(start) == start;
            Ok(())
        })?;
        Ok(place.flatten().filter(|_| is_one))
    }

    fn read(&self, bufs: &mut ReadBuffers<'_>, range: Range<u64>, wait: bool) -> Result<Found> {
        let mut found = Found::Zeros;
        self.resolve(range, &mut |run, depth, kind| {
            let len = run.end - run.start;
            match kind {
                // Whoever comes back for it begins from the start.
                _ if found == Found::NotNow => {}
                RunKind::Present(offset) => found = self.layers[depth].find(&mut bufs.take(len), offset, wait)?,
                RunKind::Zero | RunKind::Absent => bufs.fill_zero(len),
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// As [`Self::resolve`], in terms of extents: holes of the host's files are zero. In runs of less than `grain` bytes they
    /// are not looked for.
    fn extents(&self, range: Range<u64>, grain: u64, visit: &mut dyn FnMut(Extent) -> Result<()>) -> Result<()> {
        let mut pending: Option<Extent> = None;
        let mut data_ranges = DataRanges::default();
        let mut push = |extent: Extent| {
            if pending.as_mut().is_some_and(|last| last.merge(&extent)) {
                return Ok(());
            }
            pending.replace(extent).map_or(Ok(()), &mut *visit)
        };
        self.resolve(range, &mut |run, depth, kind| {
            let simple = |state| Extent { range: run.clone(), state, depth, offset: None };
            match kind {
                RunKind::Absent => push(simple(ExtentState::Absent)),
                RunKind::Zero => push(simple(ExtentState::Zero)),
                RunKind::Present(offset) if run.end - run.start < grain => {
                    push(Extent { range: run, state: ExtentState::Data, depth, offset: Some(offset) })
                }
                RunKind::Present(offset) => self.present_extents(run, depth, offset, &mut data_ranges, &mut push),
            }
        })?;
        pending.map_or(Ok(()), visit)
    }

    fn present_extents(
        &self,
        run: Range<u64>,
        depth: usize,
        offset: u64,
        data_ranges: &mut DataRanges,
        push: &mut dyn FnMut(Extent) -> Result<()>,
    ) -> Result<()> {
        let layer = &self.layers[depth];
        if let Layer::Image(image) = layer {
            image.check_inside(offset..offset + (run.end - run.start))?;
        }
        let mut at = run.start;
        while at < run.end {
            let file_at = offset + (at - run.start);
            let data = data_ranges.next(depth, layer, file_at)?;
            let to_disk = |file: u64| (run.start + file.saturating_sub(offset)).clamp(at, run.end);
            let data = data.map_or(run.end..run.end, |data| to_disk(data.start)..to_disk(data.end));
            if at < data.start {
                push(Extent { range: at..data.start, state: ExtentState::Zero, depth, offset: None })?;
            }
            if !data.is_empty() {
                let file_offset = offset + (data.start - run.start);
                push(Extent { range: data.clone(), state: ExtentState::Data, depth, offset: Some(file_offset) })?;
            }
            at = data.end;
        }
        Ok(())
    }
}

impl Below for Parents<'_> {
    fn read_below(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let range = offset..offset + buf.len() as u64;
        self.read(&mut ReadBuffers::new(&mut [IoSliceMut::new(buf)]), range, true).map(drop)
    }

    fn zero_runs(&self, range: Range<u64>, visit: &mut dyn FnMut(Range<u64>, bool) -> Result<()>) -> Result<()> {
        self.resolve(range, &mut |run, _, kind| visit(run, !matches!(kind, RunKind::Present(_))))
    }
}

impl BlockDevice for Chain {
    fn capabilities(&self) -> Capabilities {
        let discard_granularity = match self.leaf() {
            Layer::Image(image) => image.layout().map_or(4096, |layout| layout.block_size()),
            Layer::Raw(_) => 4096,
        };
        Capabilities {
            size: self.leaf().size(),
            read_only: self.leaf().is_read_only(),
            discard_granularity,
            layers: self.layers.len(),
        }
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        self.read_layer(0, bufs, offset)
    }

    fn find_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64, wait: bool) -> Result<Found> {
        self.find(0, bufs, offset, wait)
    }

    fn splice_at(&self, pipe: BorrowedFd<'_>, range: Range<u64>, wait: bool) -> Result<Spliced> {
        self.splice_layer(0, pipe, range, wait)
    }

    fn read_shared_at(&self, to: &dyn SharedBytes, offset: u64) -> Result<()> {
        let range = self.range(offset, to.len())?;
        let _held = self.leaf().image().map(|image| image.hold());
        if let ([base], false) = (&self.layers[..], range.is_empty())
            && let Some(place) = base.known_place(&range)
        {
            return base.read_shared(to, 0..to.len(), place);
        }
        let memory = |error| Error::io(error, "memory can't be reached");
        self.from(0).resolve(range, &mut |run, depth, kind| {
            let bytes = run.start - offset..run.end - offset;
            match kind {
                RunKind::Present(place) => self.layers[depth].read_shared(to, bytes, place),
                RunKind::Zero | RunKind::Absent => to.put_zeros(bytes).map_err(memory),
            }
        })
    }

    fn write_shared_at(&self, from: &dyn SharedBytes, offset: u64) -> Result<()> {
        self.range(offset, from.len())?;
        match self.leaf() {
            Layer::Image(image) => image.write_shared(from, offset, &self.parents()),
            Layer::Raw(raw) => raw.write_shared(from, offset),
        }
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        self.range(offset, bufs.iter().map(|buf| buf.len() as u64).sum())?;
        match self.leaf() {
            Layer::Image(image) => image.write(bufs, offset, &self.parents()),
            Layer::Raw(raw) => raw.write(bufs, offset),
        }
    }

    fn flush(&self) -> Result<()> {
        match self.leaf() {
            Layer::Image(image) => image.flush(),
            Layer::Raw(raw) => raw.flush(),
        }
    }

    fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Result<()> {
        let range = self.range(range.start, range.end.saturating_sub(range.start))?;
        match self.leaf() {
            Layer::Image(image) => image.zero(range, mode, &self.parents()),
            Layer::Raw(raw) => raw.zero(range, mode),
        }
    }

    fn extents(&self, range: Range<u64>, visit: &mut dyn FnMut(Extent) -> Result<()>) -> Result<()> {
        self.layer_extents(0, range, visit)
    }

    fn layer_path(&self, depth: usize) -> Option<PathBuf> {
        self.layers.get(depth).map(|layer| layer.path().to_owned())
    }

    fn room(&self) -> Option<Room> {
        self.leaf().file()?.room().ok()
    }

    fn close(&self) -> Result<()> {
        match self.leaf() {
            Layer::Image(image) => image.close(),
            Layer::Raw(raw) => raw.flush(),
        }
    }
}
