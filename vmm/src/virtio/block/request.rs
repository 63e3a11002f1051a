//! One request: from a chain of descriptors to what is asked.

use std::ops::Range;

use virtio_bindings::virtio_blk as blk;
use virtio_queue::desc::split::Descriptor;
use vm_memory::Address;

use super::SECTOR;
use super::config::{MAX_RANGE_SECTORS, MAX_RANGES, MAX_SEGMENTS, MAX_TRANSFER};
use crate::memory::{Memory, Segment};

/// Bytes of the header: type, reserved, sector.
const HEADER: usize = 16;
/// Bytes of a range to discard or zero.
const RANGE: usize = 16;
/// Bytes of what identifies the disk.
pub const ID_LEN: usize = 20;

/// What a driver is told of its request; the numbers are those of the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok = blk::VIRTIO_BLK_S_OK as isize,
    /// It failed, or makes no sense.
    IoError = blk::VIRTIO_BLK_S_IOERR as isize,
    /// Nothing that this device does.
    Unsupported = blk::VIRTIO_BLK_S_UNSUPP as isize,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Fill the segments from this byte of the disk on.
    Read(u64),
    /// Write the segments from this byte on.
    Write(u64),
    /// Make all that was written before durable.
    Flush,
    /// Make these ranges read as zeros; true where their space may be given back.
    Zero(Vec<(Range<u64>, bool)>),
    /// Tell what identifies the disk.
    GetId,
    /// Nothing that can be done; this is the answer.
    Refuse(Status),
}

/// A request that can be answered.
#[derive(Clone, Debug)]
pub struct Request {
    /// What is asked.
    pub action: Action,
    /// Its data.
    pub data: Vec<Segment>,
    /// Where the status byte goes.
    pub status: u64,
}

/// The chain has no place for a status, so there is no way to answer: the driver is broken, and the device stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unanswerable(pub &'static str);

impl Request {
    /// Reads a request. `whole` is false when the chain ended in the middle.
    ///
    /// # Errors
    /// [`Unanswerable`].
    pub fn parse(memory: &Memory, chain: &[Descriptor], whole: bool) -> Result<Self, Unanswerable> {
        let is_write = |descriptor: &&Descriptor| descriptor.is_write_only();
        let segment = |it: &Descriptor| Segment { address: it.addr().raw_value(), len: it.len() };
        let mut writable: Vec<_> = chain.iter().filter(is_write).map(segment).collect();
        let readable: Vec<_> = chain.iter().filter(|it| !is_write(it)).map(segment).collect();
        // The last byte that the device may write is the status.
        while writable.last().is_some_and(|last| last.len == 0) {
            writable.pop();
        }
        let last = writable.last_mut().ok_or(Unanswerable("a request has no place for its status"))?;
        last.len -= 1;
        let status = last.address.checked_add(u64::from(last.len));
        let status = status.ok_or(Unanswerable("a request's status has no address"))?;
        if memory.read(status, &mut [0]).is_err() {
            return Err(Unanswerable("a request's status is not in memory"));
        }
        if last.len == 0 {
            writable.pop();
        }
        let refused = |answer| Self { action: Action::Refuse(answer), data: Vec::new(), status };
        // All that is read comes before all that is written.
        let ordered = chain.iter().is_sorted_by_key(|it| it.is_write_only());
        if !whole || !ordered || chain.len() as u64 > u64::from(MAX_SEGMENTS) + 2 {
            return Ok(refused(Status::IoError));
        }
        Ok(match Self::understand(memory, readable, writable) {
            Ok((action, data)) => Self { action, data, status },
            Err(answer) => refused(answer),
        })
    }

    fn understand(memory: &Memory, mut readable: Vec<Segment>, writable: Vec<Segment>) -> Result<(Action, Vec<Segment>), Status> {
        let header: [u8; HEADER] = take(memory, &mut readable)?;
        let kind = u32::from_le_bytes(array(&header[0..4]));
        let sector = u64::from_le_bytes(array(&header[8..16]));
        let offset = || sector.checked_mul(SECTOR).ok_or(Status::IoError);
        if length(&readable) > MAX_TRANSFER || length(&writable) > MAX_TRANSFER {
            return Err(Status::IoError);
        }
        let whole_sectors = |data: &[Segment]| length(data) > 0 && length(data) % SECTOR == 0;
        match kind {
            blk::VIRTIO_BLK_T_IN if readable.is_empty() && whole_sectors(&writable) => Ok((Action::Read(offset()?), writable)),
            blk::VIRTIO_BLK_T_OUT if writable.is_empty() && whole_sectors(&readable) => Ok((Action::Write(offset()?), readable)),
            blk::VIRTIO_BLK_T_FLUSH if readable.is_empty() && writable.is_empty() => Ok((Action::Flush, Vec::new())),
            blk::VIRTIO_BLK_T_GET_ID if readable.is_empty() && length(&writable) >= ID_LEN as u64 => {
                Ok((Action::GetId, writable))
            }
            blk::VIRTIO_BLK_T_DISCARD | blk::VIRTIO_BLK_T_WRITE_ZEROES if writable.is_empty() => {
                let discard = kind == blk::VIRTIO_BLK_T_DISCARD;
                Ok((Action::Zero(ranges(memory, &mut readable, discard)?), Vec::new()))
            }
            blk::VIRTIO_BLK_T_IN
            | blk::VIRTIO_BLK_T_OUT
            | blk::VIRTIO_BLK_T_FLUSH
            | blk::VIRTIO_BLK_T_GET_ID
            | blk::VIRTIO_BLK_T_DISCARD
            | blk::VIRTIO_BLK_T_WRITE_ZEROES => Err(Status::IoError),
            _ => Err(Status::Unsupported),
        }
    }
}

/// The ranges of a discard or write-zeroes request, all looked at before any is acted on.
fn ranges(memory: &Memory, readable: &mut Vec<Segment>, discard: bool) -> Result<Vec<(Range<u64>, bool)>, Status> {
    let len = length(readable);
    if len == 0 || len % RANGE as u64 != 0 || len / RANGE as u64 > u64::from(MAX_RANGES) {
        return Err(Status::IoError);
    }
    let mut ranges = Vec::new();
    while !readable.is_empty() {
        let bytes: [u8; RANGE] = take(memory, readable)?;
        let sector = u64::from_le_bytes(array(&bytes[0..8]));
        let sectors = u32::from_le_bytes(array(&bytes[8..12]));
        let flags = u32::from_le_bytes(array(&bytes[12..16]));
        // Discards have no flags; zeroing has one.
        let known = if discard { 0 } else { blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
        if flags & !known != 0 {
            return Err(Status::Unsupported);
        }
        if sectors > MAX_RANGE_SECTORS {
            return Err(Status::IoError);
        }
        let start = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
        let end = start.checked_add(u64::from(sectors) * SECTOR).ok_or(Status::IoError)?;
        ranges.push((start..end, discard || flags != 0));
    }
    Ok(ranges)
}

/// Bytes of the segments.
fn length(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.len)).sum()
}

/// Takes `N` bytes from the front, wherever the driver has split them.
fn take<const N: usize>(memory: &Memory, segments: &mut Vec<Segment>) -> Result<[u8; N], Status> {
    let mut bytes = [0; N];
    let mut have = 0;
    while have < N {
        let Some(first) = segments.first_mut() else { return Err(Status::IoError) };
        let len = (N - have).min(first.len as usize);
        memory.read(first.address, &mut bytes[have..have + len]).map_err(|_| Status::IoError)?;
        have += len;
        first.len -= len as u32;
        first.address = first.address.wrapping_add(len as u64);
        if first.len == 0 {
            segments.remove(0);
        }
    }
    Ok(bytes)
}

/// A slice whose length is known as an array.
fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(bytes);
    array
}
