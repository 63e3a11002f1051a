//! Moving what images hold into one below them.

use std::ops::Range;

use super::super::share::{BATCH, CHUNK, MAX_PIECES, share};
use crate::block::{Disk, Extent, ExtentState, ZeroMode};
use crate::chain::{Chain, Layer};
use crate::error::Result;
use crate::progress::Progress;
use crate::storage::AlignedBuffer;

/// Bytes that a merge moves, and those it makes zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Amount {
    pub(super) data: u64,
    pub(super) zeros: u64,
}

/// Calls `visit` with what the images of `upper` hold. Behind the end of one that is smaller than the leaf there is nothing,
/// whatever lies deeper: that is zero, as far as a target of `size` bytes could show through.
fn extents(upper: &Chain, size: u64, visit: &mut dyn FnMut(Extent) -> Result<()>) -> Result<()> {
    let shown = upper.layers().iter().map(Layer::size).min().unwrap_or(0);
    upper.coarse_extents(&mut |extent| {
        let Range { start, end } = extent.range;
        if extent.state != ExtentState::Absent || end.min(size) <= shown {
            return visit(extent);
        }
        let from = shown.clamp(start, end);
        let to = size.clamp(from, end);
        let parts = [(start..from, ExtentState::Absent), (from..to, ExtentState::Zero), (to..end, ExtentState::Absent)];
        let mut parts = parts.into_iter().filter(|(range, _)| !range.is_empty());
        parts.try_for_each(|(range, state)| visit(Extent { range, state, ..extent.clone() }))
    })
}

/// Counts what the images of `upper` hold that a target of `size` bytes is to get.
pub(super) fn amount(upper: &Chain, size: u64) -> Result<Amount> {
    let mut amount = Amount::default();
    extents(upper, size, &mut |extent| {
        let len = extent.range.end - extent.range.start;
        match extent.state {
            ExtentState::Data => amount.data += len,
            ExtentState::Zero => amount.zeros += len,
            ExtentState::Absent => {}
        }
        Ok(())
    })?;
    Ok(amount)
}

/// Writes what the images of `upper` hold to `target`, each sector once: that of the highest image that holds it.
pub(super) fn copy_up(upper: &Chain, target: &Disk, progress: &Progress) -> Result<()> {
    share(
        |send| find(upper, target.size(), send),
        |buffer, batch| {
            let mut pending = Pending { buffer, len: 0, at: 0 };
            for extent in batch {
                match extent.offset {
                    None => target.zero(extent.range, ZeroMode::Free)?,
                    Some(offset) => {
                        let layer = &upper.layers()[extent.depth];
                        let read = |bytes: &mut [u8], at: u64| layer.read_at(bytes, offset + (at - extent.range.start));
                        pending.add(&read, target, extent.range.clone(), progress)?;
                    }
                }
            }
            pending.write(target)
        },
    )
}

/// The first byte at which the images of `upper` hold something else than `target` has; `None` when it has it all.
pub(super) fn first_difference(upper: &Chain, target: &Disk) -> Result<Option<u64>> {
    let (mut found, mut left, mut right) = (None, AlignedBuffer::new(CHUNK), AlignedBuffer::new(CHUNK));
    extents(upper, target.size(), &mut |extent| {
        if extent.state == ExtentState::Absent || found.is_some() {
            return Ok(());
        }
        let mut at = extent.range.start;
        while at < extent.range.end && found.is_none() {
            let len = CHUNK.min((extent.range.end - at) as usize);
            match extent.offset.filter(|_| extent.state == ExtentState::Data) {
                Some(offset) => {
                    upper.layers()[extent.depth].read_at(&mut left[..len], offset + (at - extent.range.start))?;
                }
                None => left[..len].fill(0),
            }
            target.read_at(&mut right[..len], at)?;
            found = left[..len].iter().zip(&right[..len]).position(|(a, b)| a != b).map(|index| at + index as u64);
            at += len as u64;
        }
        Ok(())
    })?;
    Ok(found)
}

/// Sends what is to be written. What is in one block is in one batch.
fn find(upper: &Chain, size: u64, send: &dyn Fn(Vec<Extent>) -> Result<()>) -> Result<()> {
    let mut batch = Vec::new();
    extents(upper, size, &mut |extent| {
        let mut at = extent.range.start;
        while at < extent.range.end {
            // Zeros are told at once: a whole block is freed, however many there are.
            let is_data = extent.state == ExtentState::Data;
            let end = if is_data { extent.range.end.min((at / BATCH + 1) * BATCH) } else { extent.range.end };
            if extent.state != ExtentState::Absent {
                let offset = extent.offset.filter(|_| is_data).map(|offset| offset + (at - extent.range.start));
                batch.push(Extent { range: at..end, offset, ..extent });
            }
            if (end / BATCH > at / BATCH || batch.len() >= MAX_PIECES) && !batch.is_empty() {
                send(std::mem::take(&mut batch))?;
            }
            at = end;
        }
        Ok(())
    })?;
    send(batch)
}

/// Data that was read and is to be written: neighbours of different images go together.
struct Pending<'a> {
    buffer: &'a mut AlignedBuffer,
    len: usize,
    at: u64,
}

impl Pending<'_> {
    fn add(
        &mut self,
        read: &dyn Fn(&mut [u8], u64) -> Result<()>,
        target: &Disk,
        range: Range<u64>,
        progress: &Progress,
    ) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            if self.at + self.len as u64 != at || self.len == CHUNK {
                self.write(target)?;
                self.at = at;
            }
            let len = (CHUNK - self.len).min((range.end - at) as usize);
            read(&mut self.buffer[self.len..self.len + len], at)?;
            self.len += len;
            at += len as u64;
            progress.advance(len as u64)?;
        }
        Ok(())
    }

    fn write(&mut self, target: &Disk) -> Result<()> {
        let len = std::mem::take(&mut self.len);
        if len == 0 { Ok(()) } else { target.write_at(&self.buffer[..len], self.at) }
    }
}
