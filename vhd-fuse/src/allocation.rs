//! How much of a range of a disk holds data, known well enough for `st_blocks` and at a bounded cost.
//!
//! To count exactly, the whole map must be walked, and a 2 TiB chain has a million blocks in each layer. So the range
//! is cut into windows that are counted in turn: one look spends at most [`BUDGET`], and all looks together at most a
//! fiftieth of the time. A window that was never counted is taken to be full, which is what makes a tool careful. Once all
//! are counted they stay so until something changes.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use vhd_core::Disk;
use vhd_core::block::ExtentState;

/// A look goes on for no longer than this, and then to the end of its window.
const BUDGET: Duration = Duration::from_millis(20);

/// After a look this many times its length passes before the next.
const REST: u32 = 50;

/// No window is smaller than this: 32 blocks of the usual size.
const WINDOW_MIN: u64 = 64 << 20;

/// No range is cut into more windows than this.
const WINDOWS_MAX: u64 = 1024;

/// The data in one range of a disk.
pub(crate) struct Allocation {
    window: u64,
    counts: Mutex<Counts>,
}

struct Counts {
    /// Bytes of data in each window.
    windows: Vec<u64>,
    /// Their sum.
    total: u64,
    /// The window to count next.
    next: usize,
    /// Nothing is counted before this.
    rest_until: Option<Instant>,
    /// What told of changes when the last look began.
    changes: u64,
    /// Windows that were counted one after the other since anything changed.
    current: usize,
}

impl Allocation {
    /// Nothing is counted yet.
    pub(crate) fn new(len: u64) -> Self {
        let window = WINDOW_MIN.max(len.div_ceil(WINDOWS_MAX));
        let windows: Vec<u64> = (0..len.div_ceil(window)).map(|index| window.min(len - index * window)).collect();
        Self { window, counts: Mutex::new(Counts { windows, total: len, next: 0, rest_until: None, changes: 0, current: 0 }) }
    }

    /// Bytes of data in `range`, the range that this was made for. `changes` is another number whenever the disk was written
    /// since the last call.
    pub(crate) fn bytes(&self, disk: &Disk, range: &Range<u64>, changes: u64) -> u64 {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let started = Instant::now();
        if counts.rest_until.is_some_and(|until| started < until) {
            return counts.total;
        }
        if counts.changes != changes {
            counts.changes = changes;
            counts.current = 0;
        }
        for _ in counts.current..counts.windows.len() {
            let index = counts.next;
            counts.next = (index + 1) % counts.windows.len();
            let start = range.start + index as u64 * self.window;
            // What can't be read stays as it was: the reader of those bytes gets the error, not who asks for a size.
            if let Ok(found) = data_in(disk, start..range.end.min(start + self.window)) {
                counts.total = counts.total - counts.windows[index] + found;
                counts.windows[index] = found;
                counts.current += 1;
            } else {
                counts.current = 0;
            }
            if started.elapsed() > BUDGET {
                break;
            }
        }
        counts.rest_until = Some(Instant::now() + started.elapsed() * REST);
        counts.total
    }
}

fn data_in(disk: &Disk, range: Range<u64>) -> vhd_core::Result<u64> {
    let mut bytes = 0;
    disk.extents(range, &mut |extent| {
        if extent.state == ExtentState::Data {
            bytes += extent.range.end - extent.range.start;
        }
        Ok(())
    })?;
    Ok(bytes)
}
