//! Goal: a block that is freed is not given to another place while someone who looked it up before still reads it.
//!
//! Method: a storage that holds one read back until it is let go, with a discard, a flush and an allocation meanwhile.

use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex};

use vhd_core::block::ZeroMode;
use vhd_core::storage::{MemoryStorage, Storage};

use vhd_testkit::session::{BLOCK, setups};
use vhd_testkit::session::{open, writable};

#[derive(Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Open,
    /// The next read of a whole block waits.
    Armed,
    Waiting,
}

#[derive(Debug)]
struct Gate {
    inner: MemoryStorage,
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    fn set(&self, state: State) {
        *self.state.lock().unwrap() = state;
        self.changed.notify_all();
    }

    fn wait_until(&self, state: &State) {
        drop(self.changed.wait_while(self.state.lock().unwrap(), |now| now != state).unwrap());
    }
}

impl Storage for Gate {
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()> {
        let is_block = bufs.iter().map(|buf| buf.len() as u64).sum::<u64>() == BLOCK * 512;
        if is_block && *self.state.lock().unwrap() == State::Armed {
            self.set(State::Waiting);
            self.wait_until(&State::Open);
        }
        self.inner.read_vectored_at(bufs, offset)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        self.inner.write_vectored_at(bufs, offset)
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.inner.punch_hole(range)
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        self.inner.zero_range(range)
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        self.inner.allocate(range)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.inner.next_data(offset)
    }

    fn can_grow(&self) -> bool {
        self.inner.can_grow()
    }

    fn allocated(&self) -> io::Result<u64> {
        self.inner.allocated()
    }
}

#[test]
fn a_freed_block_is_not_reused_while_it_is_read() {
    let setup = setups().into_iter().find(|setup| setup.name == "dynamic").unwrap();
    let gate =
        Arc::new(Gate { inner: MemoryStorage::new(setup.image.clone()), state: Mutex::default(), changed: Condvar::new() });
    let disk = open(Arc::clone(&gate) as _, &setup, &writable()).unwrap();
    let block = (BLOCK * 512) as usize;
    disk.write_at(&vec![0xAA; block], 0).unwrap();
    disk.flush().unwrap();
    gate.set(State::Armed);
    let reader = {
        let disk = disk.clone();
        std::thread::spawn(move || {
            let mut found = vec![0; block];
            disk.read_at(&mut found, 0).unwrap();
            found
        })
    };
    gate.wait_until(&State::Waiting);
    // Nobody waits for the reader: not the discard, not the flush, not the write to another block.
    disk.zero(0..block as u64, ZeroMode::Free).unwrap();
    disk.flush().unwrap();
    disk.write_at(&vec![0xBB; block], block as u64).unwrap();
    gate.set(State::Open);
    let found = reader.join().unwrap();
    assert!(found.iter().all(|&byte| byte == 0xAA) || found.iter().all(|&byte| byte == 0), "read another block: {:#x}", found[0]);
    // Afterwards the space is used again.
    disk.flush().unwrap();
    let length = gate.len().unwrap();
    disk.write_at(&vec![0xCC; block], 2 * block as u64).unwrap();
    assert_eq!(gate.len().unwrap(), length);
}
