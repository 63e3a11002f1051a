//! A storage whose calls fail when they are told to.

use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use vhd_core::storage::{MemoryStorage, Storage};

/// What a call says when it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The medium failed; of a write, half arrived.
    Eio,
    /// No space: writes that would take space fail, and nothing else does.
    Enospc,
    /// No space for any write, as on a host that copies on write.
    EnospcAnywhere,
    /// The sync failed, and what was not synced is gone; the next sync succeeds. (What Linux does.)
    SyncDrops,
}

/// Which calls fail.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// How they fail.
    pub fault: Fault,
    /// The first call that fails, counted from 1 over those that this fault concerns.
    pub at: usize,
    /// All later ones fail too.
    pub for_ever: bool,
}

/// A file in memory whose calls fail by plan. It knows what was durable.
#[derive(Debug)]
pub struct FaultStorage {
    live: MemoryStorage,
    durable: Mutex<Vec<u8>>,
    plan: Mutex<Option<Plan>>,
    calls: AtomicUsize,
    failed: AtomicUsize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Call {
    Read,
    Write,
    Sync,
}

impl FaultStorage {
    /// A file with this content.
    #[must_use]
    pub fn new(bytes: Vec<u8>, plan: Option<Plan>) -> Self {
        Self {
            durable: Mutex::new(bytes.clone()),
            live: MemoryStorage::new(bytes),
            plan: Mutex::new(plan),
            calls: AtomicUsize::new(0),
            failed: AtomicUsize::new(0),
        }
    }

    /// From now on, calls fail by this plan.
    pub fn plan(&self, plan: Plan) {
        self.calls.store(0, Ordering::SeqCst);
        *self.plan.lock().unwrap() = Some(plan);
    }

    /// No call fails any more: the disk was replaced, there is room again.
    pub fn heal(&self) {
        *self.plan.lock().unwrap() = None;
    }

    /// Calls that failed so far.
    #[must_use]
    pub fn failed(&self) -> usize {
        self.failed.load(Ordering::SeqCst)
    }

    /// What a process that opens the file now reads.
    #[must_use]
    pub fn live(&self) -> Vec<u8> {
        self.live.to_vec()
    }

    /// What is there after a power cut that loses everything that was not synced.
    #[must_use]
    pub fn durable(&self) -> Vec<u8> {
        self.durable.lock().unwrap().clone()
    }

    /// The fault that this call meets.
    fn meets(&self, call: Call, takes_space: bool) -> Option<Fault> {
        let plan = (*self.plan.lock().unwrap())?;
        let concerned = match plan.fault {
            Fault::Eio => true,
            Fault::Enospc => takes_space,
            Fault::EnospcAnywhere => call == Call::Write,
            Fault::SyncDrops => call == Call::Sync,
        };
        if !concerned {
            return None;
        }
        let number = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let fails = number == plan.at || (plan.for_ever && number > plan.at);
        if fails {
            self.failed.fetch_add(1, Ordering::SeqCst);
        }
        fails.then_some(plan.fault)
    }

    fn fail(&self, call: Call, takes_space: bool) -> io::Result<()> {
        match self.meets(call, takes_space) {
            None => Ok(()),
            Some(Fault::Eio) => Err(io::Error::from_raw_os_error(5)),
            Some(Fault::Enospc | Fault::EnospcAnywhere) => Err(io::Error::from_raw_os_error(28)),
            Some(Fault::SyncDrops) => {
                // The pages are gone; the length, which is the kernel's own, is not.
                let mut durable = self.durable();
                let len = self.live.len()?;
                durable.resize(len as usize, 0);
                self.live.write_at(&durable, 0)?;
                Err(io::Error::from_raw_os_error(5))
            }
        }
    }

    /// True when the range is zero: writing to it takes space, as far as a file in memory can tell.
    fn is_hole(&self, range: Range<u64>) -> bool {
        let bytes = self.live.to_vec();
        let end = (range.end as usize).min(bytes.len());
        let start = (range.start as usize).min(end);
        range.end as usize > bytes.len() || bytes[start..end].iter().all(|&byte| byte == 0)
    }
}

impl Storage for FaultStorage {
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()> {
        self.fail(Call::Read, false)?;
        self.live.read_vectored_at(bufs, offset)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        let len = bufs.iter().map(|buf| buf.len() as u64).sum::<u64>();
        if let Err(error) = self.fail(Call::Write, self.is_hole(offset..offset + len)) {
            // A part of it arrived, in whole sectors.
            if let Some(first) = bufs.first() {
                let end = (offset + first.len() as u64 / 2) / 512 * 512;
                self.live.write_at(&first[..end.saturating_sub(offset) as usize], offset)?;
            }
            return Err(error);
        }
        self.live.write_vectored_at(bufs, offset)
    }

    fn len(&self) -> io::Result<u64> {
        self.live.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.fail(Call::Write, false)?;
        self.live.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.fail(Call::Sync, false)?;
        *self.durable.lock().unwrap() = self.live.to_vec();
        Ok(())
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.fail(Call::Write, false)?;
        self.live.punch_hole(range)
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        self.fail(Call::Write, true)?;
        self.live.zero_range(range)
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        self.fail(Call::Write, true)?;
        self.live.allocate(range)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.live.next_data(offset)
    }

    fn can_grow(&self) -> bool {
        true
    }

    fn allocated(&self) -> io::Result<u64> {
        self.live.allocated()
    }
}
