//! Making an image as small as what it holds.
//!
//! First blocks are dropped that read the same without them, then blocks from the end of the file fill the gaps, then the
//! file is cut. What the disk reads is the same at every point, so that an interruption or a power cut leaves a valid image,
//! and the next run goes on.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::copy::is_zero;
use crate::block::Disk;
use crate::chain::{Chain, ChainOptions, Layer, find_children, uuid_of_file};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{DiskType, SECTOR};
use crate::image::{Below, Blocks, Image, OpenOptions, PlacedBlock};
use crate::layout::Layout;
use crate::progress::Progress;
use crate::storage::AlignedBuffer;

/// Bytes of a block that are looked at first: most that hold data show it here.
const FIRST_LOOK: usize = 64 << 10;
/// Bytes of a block that are looked at at once: blocks have up to 256 MiB.
const PIECE: u64 = 2 << 20;

/// How an image is compacted.
#[derive(Clone, Copy, Debug, Default)]
pub struct CompactOptions {
    /// Moves all blocks to where their data begins on a 4 KiB boundary.
    pub realign: bool,
    /// What the file systems inside call free is dropped: it is what `unneeded` finds.
    pub free_space: bool,
    /// Goes on although a saved state relies on the image or it has children.
    pub force: bool,
    /// Only says what would be done.
    pub dry_run: bool,
}

/// What compacting does, or did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compacted {
    /// Bytes of the file before.
    pub len_before: u64,
    /// Bytes of the file afterwards.
    pub len_after: u64,
    /// Blocks before.
    pub blocks: u64,
    /// Blocks that are dropped.
    pub dropped: u64,
    /// Sectors of the other blocks that show the parent's, as they are the same.
    pub cleared: u64,
    /// Blocks that are moved.
    pub moved: u64,
    /// Bytes that are written to move them.
    pub bytes_moved: u64,
}

/// Ranges of the disk whose content nobody needs, ascending and apart.
pub type Unneeded = [Range<u64>];

/// Compacts the image at `path`. `unneeded` finds ranges of the disk whose content may be lost; they are dropped too.
///
/// # Errors
/// `Unsupported` for a fixed disk, with how to convert it; `Refused` for one with children; `Cancelled`, when everything up
/// to there is done; those of [`Chain::open`].
pub fn compact(
    path: &Path,
    options: &CompactOptions,
    unneeded: &mut dyn FnMut(&Disk) -> Result<Vec<Range<u64>>>,
    chain: &ChainOptions,
    progress: &Progress,
) -> Result<Compacted> {
    if !options.force {
        refuse_parent(path, options)?;
    }
    let image = OpenOptions { writable: !options.dry_run, force: options.force, background_flush: None, ..chain.image.clone() };
    let chain = Chain::open(path, &ChainOptions { image, rehearsal: options.dry_run, ..chain.clone() })?;
    let Some(image) = chain.layers()[0].image().cloned() else {
        return Err(Error::new(ErrorKind::InvalidInput, "is no VHD").at(path));
    };
    if image.footer().disk_type() == DiskType::Fixed {
        let message = "is a fixed disk, which holds every sector; `vhd convert --to dynamic` makes one that can be compacted";
        return Err(Error::new(ErrorKind::Unsupported, message).at(path));
    }
    let ranges = unneeded(&Disk::new(Chain::over(Layer::Image(Arc::clone(&image)), chain.layers()[1..].to_vec())))?;
    run(&image, &chain, options, &ranges, progress).map_err(|error| error.at(path))
}

/// Refuses an image that has children. They read the same when it is smaller, but its file has another time of modification,
/// which a child may have recorded and other programs compare. What is free in its own file systems may be in use in
/// those of a child, whose sectors of the same content were dropped because the parent has them.
fn refuse_parent(path: &Path, options: &CompactOptions) -> Result<()> {
    let uuid = uuid_of_file(path)?.filter(|uuid| *uuid != [0; 16]);
    let Some(child) = uuid.and_then(|uuid| find_children(path, uuid).into_iter().next()) else { return Ok(()) };
    let child = child.display();
    let message = if options.free_space {
        format!(
            "is the parent of {child}, which may need what --free-space drops; use --force without --free-space, or with it if \
             that image may be lost"
        )
    } else {
        format!(
            "is the parent of {child}: children read the same afterwards, but one may have noted when its parent was last \
             changed, and programs that go by that refuse it then; use --force to compact it all the same"
        )
    };
    Err(Error::new(ErrorKind::Refused, message).at(path))
}

fn run(image: &Image, chain: &Chain, options: &CompactOptions, unneeded: &Unneeded, progress: &Progress) -> Result<Compacted> {
    let Some(layout) = image.layout() else { return Ok(Compacted::default()) };
    let mut blocks = Blocks::of(image, options.dry_run)?;
    let (storage, order) = (blocks.storage(), blocks.order()?);
    let mut done = Compacted { len_before: blocks.file_len(), blocks: order.count(), ..Compacted::default() };
    progress.set_total(done.blocks * layout.block_size());
    let parent = (image.footer().disk_type() == DiskType::Differencing).then(|| chain.below());
    let parent = parent.as_ref().map(|parent| parent as &dyn Below);
    let piece = layout.block_size().min(PIECE) as usize;
    let mut survey = Survey { layout, parent, unneeded, ours: Vec::new(), theirs: AlignedBuffer::new(piece) };
    let mut buffer = AlignedBuffer::new(piece);
    let mut cursor = order.ascending();
    while let Some(placed) = cursor.next(&*storage)? {
        match survey.judge(&mut blocks, placed, &mut buffer)? {
            Verdict::Keep => {}
            Verdict::Drop => {
                blocks.free(placed.block())?;
                done.dropped += 1;
            }
            Verdict::Clear(bitmap, sectors) => {
                blocks.set_bitmap(placed.sector(), &bitmap)?;
                done.cleared += sectors;
            }
        }
        progress.advance(layout.block_size())?;
    }
    let mut advance = |bytes: u64| {
        progress.set_total(progress.total() + bytes);
        progress.advance(bytes)
    };
    if options.realign {
        done.moved += blocks.align(&mut advance)?;
    }
    done.moved += blocks.fill_gaps(options.realign, &mut advance)?;
    blocks.cut()?;
    done.bytes_moved = done.moved * layout.slot_len();
    done.len_after = blocks.file_len();
    Ok(done)
}

/// What becomes of a block.
enum Verdict {
    Keep,
    /// It reads the same without it.
    Drop,
    /// It reads the same with this sector bitmap, in which as many bits are cleared.
    Clear(Vec<u8>, u64),
}

/// Looks at blocks one by one.
struct Survey<'a> {
    layout: Layout,
    parent: Option<&'a dyn Below>,
    unneeded: &'a Unneeded,
    ours: Vec<Range<u64>>,
    theirs: AlignedBuffer,
}

impl Survey<'_> {
    fn judge(&mut self, blocks: &mut Blocks, placed: PlacedBlock, buffer: &mut AlignedBuffer) -> Result<Verdict> {
        self.needed(placed.block());
        if self.ours.is_empty() {
            return Ok(Verdict::Drop);
        }
        match self.parent {
            None => self.judge_dynamic(blocks, placed.sector(), buffer),
            Some(parent) => self.judge_differencing(blocks, placed, parent, buffer),
        }
    }

    /// The ranges of a block, from its first byte on, that are needed.
    fn needed(&mut self, block: u32) {
        let start = self.layout.block_start(block);
        let end = start + self.layout.block_len(block);
        self.ours.clear();
        let mut at = start;
        let first = self.unneeded.partition_point(|range| range.end <= start);
        for range in self.unneeded[first..].iter().take_while(|range| range.start < end) {
            // Whole sectors only: a bit is about one.
            let from = range.start.next_multiple_of(SECTOR).clamp(at, end);
            let to = (range.end / SECTOR * SECTOR).clamp(from, end);
            if at < from && to > from {
                self.ours.push(at - start..from - start);
            }
            if to > from {
                at = to;
            }
        }
        if at < end {
            self.ours.push(at - start..end - start);
        }
    }

    fn judge_dynamic(&self, blocks: &mut Blocks, sector: u32, buffer: &mut AlignedBuffer) -> Result<Verdict> {
        if blocks.is_hole(sector)? {
            return Ok(Verdict::Drop);
        }
        let bitmap = blocks.bitmap(sector)?;
        let all_present = bitmap.iter().all(|byte| *byte == 0xFF);
        for range in &self.ours {
            let mut at = range.start;
            while at < range.end {
                let most = if at == range.start { FIRST_LOOK } else { buffer.len() };
                let len = most.min((range.end - at) as usize);
                blocks.read_data(sector, at, &mut buffer[..len])?;
                // A clear bit is zero whatever lies under it.
                let is_data = |bytes: &[u8], first: u64| {
                    let mut sectors = bytes.chunks(SECTOR as usize).zip(first..);
                    sectors.any(|(bytes, sector)| is_present(&bitmap, sector) && !is_zero(bytes))
                };
                if !is_zero(&buffer[..len]) && (all_present || is_data(&buffer[..len], at / SECTOR)) {
                    return Ok(Verdict::Keep);
                }
                at += len as u64;
            }
        }
        Ok(Verdict::Drop)
    }

    fn judge_differencing(
        &mut self,
        blocks: &Blocks,
        placed: PlacedBlock,
        parent: &dyn Below,
        buffer: &mut AlignedBuffer,
    ) -> Result<Verdict> {
        let block = placed.block();
        let mut bitmap = blocks.bitmap(placed.sector())?;
        if is_zero(&bitmap) {
            return Ok(Verdict::Drop);
        }
        let sectors = self.layout.block_len(block).div_ceil(SECTOR);
        let before = (0..sectors).filter(|sector| is_present(&bitmap, *sector)).count() as u64;
        // Bits beyond the disk's end are nobody's.
        let needed = |sector: u64| self.ours.iter().any(|range| range.contains(&(sector * SECTOR)));
        (0..sectors).filter(|sector| !needed(*sector)).for_each(|sector| clear(&mut bitmap, sector));
        let mut sector = 0;
        while sector < sectors {
            let first = sector;
            let present = is_present(&bitmap, first);
            // No more at once than the buffers hold.
            let most = first + self.theirs.len() as u64 / SECTOR;
            while sector < sectors.min(most) && is_present(&bitmap, sector) == present {
                sector += 1;
            }
            if !present {
                continue;
            }
            let range = first * SECTOR..(sector * SECTOR).min(self.layout.block_len(block));
            let len = (range.end - range.start) as usize;
            blocks.read_data(placed.sector(), range.start, &mut buffer[..len])?;
            parent.read_below(&mut self.theirs[..len], self.layout.block_start(block) + range.start)?;
            let pairs = buffer[..len].chunks(SECTOR as usize).zip(self.theirs[..len].chunks(SECTOR as usize));
            let same = pairs.zip(first..).filter(|((ours, theirs), _)| ours == theirs).map(|(_, sector)| sector);
            same.for_each(|sector| clear(&mut bitmap, sector));
        }
        let after = (0..sectors).filter(|sector| is_present(&bitmap, *sector)).count() as u64;
        Ok(match (before - after, after) {
            (_, 0) => Verdict::Drop,
            (0, _) => Verdict::Keep,
            (cleared, _) => Verdict::Clear(bitmap, cleared),
        })
    }
}

fn is_present(bitmap: &[u8], sector: u64) -> bool {
    bitmap[(sector / 8) as usize] & 0x80 >> (sector % 8) != 0
}

fn clear(bitmap: &mut [u8], sector: u64) {
    bitmap[(sector / 8) as usize] &= !(0x80 >> (sector % 8));
}
