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

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, IoSliceMut};
    use std::path::PathBuf;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use vhd_core::Result;
    use vhd_core::block::{BlockDevice, Capabilities, Extent, ZeroMode};

    use super::*;

    /// A disk that counts how often it is asked what it holds.
    struct Asked(Arc<AtomicU64>);

    impl BlockDevice for Asked {
        fn capabilities(&self) -> Capabilities {
            Capabilities { size: WINDOW_MIN * 3, read_only: true, discard_granularity: 4096, layers: 1 }
        }

        fn read_vectored_at(&self, _bufs: &mut [IoSliceMut<'_>], _offset: u64) -> Result<()> {
            Ok(())
        }

        fn write_vectored_at(&self, _bufs: &[IoSlice<'_>], _offset: u64) -> Result<()> {
            Ok(())
        }

        fn flush(&self) -> Result<()> {
            Ok(())
        }

        fn zero(&self, _range: Range<u64>, _mode: ZeroMode) -> Result<()> {
            Ok(())
        }

        fn extents(&self, range: Range<u64>, visit: &mut dyn FnMut(Extent) -> Result<()>) -> Result<()> {
            self.0.fetch_add(1, Ordering::SeqCst);
            let range = range.start..range.start + 4096;
            visit(Extent { range, state: ExtentState::Data, depth: 0, offset: Some(0) })
        }

        fn layer_path(&self, _depth: usize) -> Option<PathBuf> {
            None
        }

        fn close(&self) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_was_counted_is_counted_again_only_after_a_change() {
        let asked = Arc::default();
        let disk = Disk::new(Asked(Arc::clone(&asked)));
        let allocation = Allocation::new(disk.size());
        // One window is counted at least, whatever the time; the rest between looks is not what this is about.
        let look = |changes| {
            for _ in 0..3 {
                allocation.counts.lock().unwrap().rest_until = None;
                allocation.bytes(&disk, &(0..disk.size()), changes);
            }
            (allocation.bytes(&disk, &(0..disk.size()), changes), asked.load(Ordering::SeqCst))
        };
        assert_eq!([look(0), look(0), look(1), look(1)], [(3 * 4096, 3), (3 * 4096, 3), (3 * 4096, 6), (3 * 4096, 6)]);
    }
}
