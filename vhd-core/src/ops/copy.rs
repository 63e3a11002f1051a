//! Copying and comparing the contents of disks, as a guest sees them.

use std::io::{Read, Write};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::share::{BATCH, CHUNK, MAX_PIECES, share};
use crate::block::{Disk, ZeroMode};
use crate::error::{Error, Result, fail};
use crate::format::SECTOR;
use crate::progress::Progress;
use crate::storage::{AlignedBuffer, PAGE, Storage};

/// Runs of zeros shorter than this are copied like data: skipping them costs more than it saves.
const ZERO_GRAIN: usize = 4096;

/// True when all bytes are zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // Chunks of a fixed size let the compiler use vector instructions.
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|chunk| chunk.iter().fold(0, |or, &byte| or | byte) == 0) && rest.iter().all(|&byte| byte == 0)
}

/// Calls `visit` with the runs of `bytes` that are not zero, in whole grains of so many bytes.
fn data_runs(bytes: &[u8], grain_len: usize, mut visit: impl FnMut(Range<usize>) -> Result<()>) -> Result<()> {
    let mut run: Option<Range<usize>> = None;
    for (index, grain) in bytes.chunks(grain_len).enumerate() {
        let at = index * grain_len;
        if is_zero(grain) {
            run.take().map_or(Ok(()), &mut visit)?;
        } else {
            run.get_or_insert(at..at).end = at + grain.len();
        }
    }
    run.map_or(Ok(()), visit)
}

/// Copies `source` to the beginning of `target`, which has room for it. What is zero stays or becomes a hole;
/// `target_is_zero` says that it reads as zeros already, as a new image does.
///
/// # Errors
/// `InvalidInput` when `target` is too small; `Cancelled`; as either disk fails.
pub fn copy(source: &Disk, target: &Disk, target_is_zero: bool, progress: &Progress) -> Result<()> {
    if target.size() < source.size() {
        fail!(InvalidInput, "target has {} bytes, the source {}", target.size(), source.size());
    }
    progress.set_total(source.size());
    copy_range(source, target, 0..source.size(), target_is_zero, progress)
}

/// As [`copy`], a range of both.
pub(super) fn copy_range(
    source: &Disk,
    target: &Disk,
    range: Range<u64>,
    target_is_zero: bool,
    progress: &Progress,
) -> Result<()> {
    let mover = Mover { source, target, target_is_zero, grain: ZERO_GRAIN, writing: Mutex::new(()), progress };
    share(|send| find(source, range, send), |buffer, batch| mover.move_batch(batch, buffer))
}

/// Copies the sectors of a range that are not zero, and writes no other: what `target` has where `source` is zero stays.
pub(super) fn copy_nonzero(source: &Disk, target: &Disk, range: Range<u64>, progress: &Progress) -> Result<()> {
    let mover = Mover { source, target, target_is_zero: true, grain: SECTOR as usize, writing: Mutex::new(()), progress };
    share(|send| find(source, range, send), |buffer, batch| mover.move_batch(batch, buffer))
}

/// A piece of the disk, and whether it reads as zeros.
type Piece = (Range<u64>, bool);

/// Sends the pieces of a range. Data of one block is in one batch.
fn find(source: &Disk, range: Range<u64>, send: &dyn Fn(Vec<Piece>) -> Result<()>) -> Result<()> {
    let mut batch = Vec::new();
    source.extents(range, &mut |extent| {
        let is_zero = extent.state.reads_zero();
        let mut at = extent.range.start;
        while at < extent.range.end {
            let end = if is_zero { extent.range.end } else { extent.range.end.min((at / BATCH + 1) * BATCH) };
            batch.push((at..end, is_zero));
            // An extent that ends inside a block leaves the rest of it to the same batch.
            if end / BATCH > at / BATCH || batch.len() >= MAX_PIECES {
                send(std::mem::take(&mut batch))?;
            }
            at = end;
        }
        Ok(())
    })?;
    send(batch)
}

/// A copy under way.
struct Mover<'a> {
    source: &'a Disk,
    target: &'a Disk,
    target_is_zero: bool,
    /// Bytes that are written together or left out together.
    grain: usize,
    /// Held while data is written: the kernel lets one writer at a time into a file, and the other would wait for it with its
    /// processor busy. Meanwhile that one reads.
    writing: Mutex<()>,
    progress: &'a Progress,
}

impl Mover<'_> {
    fn move_batch(&self, batch: Vec<Piece>, buffer: &mut AlignedBuffer) -> Result<()> {
        // What was read, and where in the buffer it is: short pieces are read together and written together, so that movers
        // change places as rarely as with long ones.
        let mut held = Vec::new();
        let mut used = 0;
        for (range, is_zero) in batch {
            if is_zero {
                if !self.target_is_zero {
                    self.target.zero(range.clone(), ZeroMode::Free)?;
                }
                self.progress.advance(range.end - range.start)?;
                continue;
            }
            let mut at = range.start;
            while at < range.end {
                // Up to a multiple of the chunk: so both sides stay aligned.
                let len = (CHUNK - at as usize % CHUNK).min((range.end - at) as usize);
                if used + len > CHUNK {
                    self.write(&mut held, buffer)?;
                    used = 0;
                }
                self.source.read_at(&mut buffer[used..used + len], at)?;
                held.push((used..used + len, at));
                used = (used + len).next_multiple_of(PAGE);
                at += len as u64;
            }
        }
        self.write(&mut held, buffer)
    }

    /// Writes what is held, and holds it no longer.
    fn write(&self, held: &mut Vec<(Range<usize>, u64)>, buffer: &AlignedBuffer) -> Result<()> {
        let one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        for (place, at) in &*held {
            write_chunk(self.target, &buffer[place.clone()], *at, self.target_is_zero, self.grain)?;
        }
        drop(one);
        held.drain(..).try_for_each(|(place, _)| self.progress.advance(place.len() as u64))
    }
}

fn write_chunk(target: &Disk, bytes: &[u8], at: u64, target_is_zero: bool, grain: usize) -> Result<()> {
    let mut done = 0;
    data_runs(bytes, grain, |run| {
        if !target_is_zero && done < run.start {
            target.zero(at + done as u64..at + run.start as u64, ZeroMode::Free)?;
        }
        done = run.end;
        target.write_at(&bytes[run.clone()], at + run.start as u64)
    })?;
    if !target_is_zero && done < bytes.len() {
        target.zero(at + done as u64..at + bytes.len() as u64, ZeroMode::Free)?;
    }
    Ok(())
}

/// Writes a range of a disk to a stream.
///
/// # Errors
/// `OutOfRange`; `Cancelled`; as the disk or the stream fails.
pub fn write_to(source: &Disk, range: Range<u64>, stream: &mut dyn Write, progress: &Progress) -> Result<()> {
    progress.set_total(range.end.saturating_sub(range.start));
    let mut buffer = AlignedBuffer::new(CHUNK);
    let mut at = range.start;
    while at < range.end {
        let len = (CHUNK - at as usize % CHUNK).min((range.end - at) as usize);
        source.read_at(&mut buffer[..len], at)?;
        stream.write_all(&buffer[..len]).map_err(|error| Error::io(error, "output can't be written"))?;
        at += len as u64;
        progress.advance(len as u64)?;
    }
    Ok(())
}

/// Writes a stream to a disk from `offset` on, until it ends. Returns the bytes that came.
///
/// # Errors
/// `OutOfRange` when more comes than the disk holds, after as much as fits was written; `Cancelled`; as either fails.
pub fn read_from(stream: &mut dyn Read, target: &Disk, offset: u64, skip_zeros: bool, progress: &Progress) -> Result<u64> {
    let mut buffer = AlignedBuffer::new(CHUNK);
    let mut at = offset;
    loop {
        let len = (CHUNK - at as usize % CHUNK).min(CHUNK);
        let count = read_full(stream, &mut buffer[..len])?;
        if count == 0 {
            return Ok(at - offset);
        }
        let room = target.size().saturating_sub(at);
        if count as u64 > room {
            let fits = room as usize;
            target.write_at(&buffer[..fits], at)?;
            fail!(OutOfRange, "input goes beyond the end of the disk of {} bytes", target.size());
        }
        if skip_zeros {
            write_chunk(target, &buffer[..count], at, true, ZERO_GRAIN)?;
        } else {
            target.write_at(&buffer[..count], at)?;
        }
        at += count as u64;
        progress.advance(count as u64)?;
    }
}

/// Writes a stream to a new file, zeros as holes, until it ends. Returns the bytes that came.
///
/// # Errors
/// `Cancelled`; as either fails.
pub fn read_to_file(stream: &mut dyn Read, file: &dyn Storage, progress: &Progress) -> Result<u64> {
    let mut buffer = AlignedBuffer::new(CHUNK);
    let mut at = 0;
    loop {
        let count = read_full(stream, &mut buffer)?;
        if count == 0 {
            file.set_len(at).map_err(|error| Error::io(error, format!("can't grow to {at} bytes")))?;
            return Ok(at);
        }
        data_runs(&buffer[..count], ZERO_GRAIN, |run| {
            let written = file.write_at(&buffer[run.clone()], at + run.start as u64);
            written.map_err(|error| Error::io(error, format!("can't be written at {at:#x}")))
        })?;
        at += count as u64;
        progress.advance(count as u64)?;
    }
}

fn read_full(stream: &mut dyn Read, buffer: &mut [u8]) -> Result<usize> {
    let mut count = 0;
    while count < buffer.len() {
        match stream.read(&mut buffer[count..]) {
            Ok(0) => break,
            Ok(more) => count += more,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io(error, "input can't be read")),
        }
    }
    Ok(count)
}

/// The first byte at which two disks differ within what both have; `None` when there is none.
///
/// # Errors
/// `Cancelled`; as either disk fails.
pub fn compare(a: &Disk, b: &Disk, progress: &Progress) -> Result<Option<u64>> {
    let size = a.size().min(b.size());
    progress.set_total(size);
    let (mut left, mut right) = (AlignedBuffer::new(CHUNK), AlignedBuffer::new(CHUNK));
    let zeros_of = |disk: &Disk| -> Result<Vec<Range<u64>>> {
        let mut zeros = Vec::new();
        disk.extents(0..size, &mut |extent| {
            // Short ones are read: a list of all of them could be long.
            if extent.state.reads_zero() && extent.range.end - extent.range.start >= CHUNK as u64 {
                zeros.push(extent.range);
            }
            Ok(())
        })?;
        Ok(zeros)
    };
    let (zeros_a, zeros_b) = (zeros_of(a)?, zeros_of(b)?);
    let end_of_zeros = |zeros: &[Range<u64>], at: u64| {
        let index = zeros.partition_point(|range| range.end <= at);
        zeros.get(index).filter(|range| range.start <= at).map_or(at, |range| range.end)
    };
    let mut at = 0;
    while at < size {
        let skip = end_of_zeros(&zeros_a, at).min(end_of_zeros(&zeros_b, at)).min(size);
        if skip > at {
            progress.advance(skip - at)?;
            at = skip;
            continue;
        }
        let len = (CHUNK - at as usize % CHUNK).min((size - at) as usize);
        a.read_at(&mut left[..len], at)?;
        b.read_at(&mut right[..len], at)?;
        if left[..len] != right[..len] {
            let index = left[..len].iter().zip(&right[..len]).position(|(a, b)| a != b).unwrap_or(0);
            return Ok(Some(at + index as u64));
        }
        at += len as u64;
        progress.advance(len as u64)?;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_data() {
        let mut bytes = vec![0; 5 * ZERO_GRAIN + 10];
        (bytes[ZERO_GRAIN], bytes[2 * ZERO_GRAIN + 7], bytes[5 * ZERO_GRAIN + 9]) = (1, 1, 1);
        let mut runs = Vec::new();
        data_runs(&bytes, ZERO_GRAIN, |run| {
            runs.push(run);
            Ok(())
        })
        .unwrap();
        assert_eq!(runs, [ZERO_GRAIN..3 * ZERO_GRAIN, 5 * ZERO_GRAIN..5 * ZERO_GRAIN + 10]);
        assert!(is_zero(&[]) && is_zero(&[0; 65]) && !is_zero(&bytes));
    }
}
