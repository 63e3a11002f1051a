//! Target `block_rings`: what a hostile driver does to a disk's queue.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;

use vhd_core::Disk;
use vhd_core::chain::{Chain, Layer};
use vhd_core::image::{Image, OpenOptions};
use vhd_vmm::memory::Memory;
use vhd_vmm::virtio::block::{Block, BlockOptions, QueueOwner, Served};
use virtio_queue::{Queue, QueueT};

use super::bounded::Bounded;
use super::input::Input;
use crate::fixture::{FixtureSpec, Kind, Layout};
use crate::rings::{Descriptor, RING_BYTES, Ring, kind};

/// Bytes of the disk.
const DISK: u64 = 64 << 10;
/// Bytes of the guest's memory.
const MEMORY: u64 = 2 << 20;
const RING: u64 = 0x1000;
const STATUSES: u64 = 0x1F_0000;

/// Serves a bounded number of requests: a driver may go on for ever.
struct Owner {
    left: Cell<u32>,
}

impl QueueOwner for Owner {
    fn stopped(&self) -> bool {
        let left = self.left.get();
        self.left.set(left.saturating_sub(1));
        left == 0
    }

    fn used(&self) {}
}

/// Target `block_rings`: requests of any shape, and rings with any bytes.
///
/// # Panics
/// When an answered request has no status of the specification, a sound one is not done, or more requests are
/// answered than were made.
pub fn block_rings(data: &[u8]) {
    let mut input = Input(data);
    let spec = FixtureSpec { block_size: 4096, ..FixtureSpec::new(Kind::Dynamic, Layout::Windows8, DISK) };
    let storage = Arc::new(Bounded::new(spec.to_bytes().0));
    let open = OpenOptions { writable: true, background_flush: None, ..OpenOptions::default() };
    let image = Image::open(storage, Path::new("disk.vhd"), &open).unwrap();
    let disk = Disk::new(Chain::of(Layer::Image(image)));
    let choice = input.byte();
    let block = Block::new(disk, &BlockOptions { read_only: choice & 1 != 0, ..BlockOptions::default() });
    block.set_features(if choice & 2 == 0 { u64::MAX } else { 0 });
    let memory = Memory::new(MEMORY).unwrap();
    let mut ring = Ring::new(&memory, RING, 16);
    let mut queue = Queue::new(16).unwrap();
    queue.set_desc_table_address(Some(ring.descriptors() as u32), None);
    queue.set_avail_ring_address(Some(ring.available() as u32), None);
    queue.set_used_ring_address(Some(ring.used() as u32), None);
    queue.set_event_idx(choice & 4 != 0);
    queue.set_ready(true);
    let mut sound = true;
    for step in 0..48 {
        if input.is_empty() {
            break;
        }
        match input.byte() % 8 {
            // Any bytes anywhere in the ring.
            0 => {
                let at = RING + input.number(2) % RING_BYTES;
                let bytes = input.take(8);
                memory.write(at, bytes).unwrap();
                sound = false;
            }
            1 => {
                let next = u16::from(input.byte() % 20);
                let flags = u16::from(input.byte() % 8);
                let address = input.odd_number(MEMORY);
                let descriptor = Descriptor { address, len: input.odd_number(512) as u32, flags, next };
                ring.set(ring.descriptors(), u16::from(input.byte() % 16), descriptor);
                ring.offer(u16::from(input.byte() % 18));
                sound = false;
            }
            choice => {
                let status = STATUSES + step;
                memory.write(status, &[0xEE]).unwrap();
                let wanted = offer(&mut input, &mut ring, status, choice);
                let used = queue.next_used();
                let served = serve(&block, &memory, &mut queue);
                if sound {
                    assert!(served, "a sound driver broke the device");
                    assert_eq!(queue.next_used(), used.wrapping_add(1));
                    let answer = ring.get(status, 1)[0];
                    assert!(wanted.map_or(answer <= 2, |wanted| answer == wanted), "{answer}, not {wanted:?}");
                    ring.next_used();
                    continue;
                }
            }
        }
        if !serve(&block, &memory, &mut queue) {
            return;
        }
    }
}

/// False when the device is broken.
fn serve(block: &Block, memory: &Memory, queue: &mut Queue) -> bool {
    match block.serve(memory, queue, &Owner { left: Cell::new(64) }) {
        Ok(Served::Stalled(stall)) => panic!("nothing fails here: {stall:?}"),
        Ok(Served::Answered) => true,
        Err(_) => false,
    }
}

/// Makes a request whose parts may be odd. Returns the answer, where it is certain.
fn offer(input: &mut Input<'_>, ring: &mut Ring, status: u64, choice: u8) -> Option<u8> {
    let kinds = [kind::IN, kind::OUT, kind::FLUSH, kind::GET_ID, kind::DISCARD, kind::WRITE_ZEROES, 2];
    let kind = kinds[usize::from(input.byte()) % kinds.len()];
    let sector = input.odd_number(DISK / 512 - 1);
    let header = ring.header(kind, sector);
    let mut pieces = vec![(header, 16, false)];
    let mut whole = true;
    let mut total = 0_u64;
    for _ in 0..input.byte() % 4 {
        // A chain of more than 4 GiB is against the rules, and the other operations make those.
        let len = input.odd_number(512) as u32 % (1 << 28);
        let at = input.odd_number(0x18_0000);
        let write = kind == kind::IN || kind == kind::GET_ID;
        // What would write over the ring makes everything after it uncertain.
        let inside = at >= RING + RING_BYTES + (1 << 20) && at.checked_add(u64::from(len)).is_some_and(|end| end <= STATUSES);
        let at = if inside || !write { at } else { MEMORY };
        whole &= inside || len == 0;
        total += u64::from(len);
        pieces.push((at, len, write));
    }
    pieces.push((status, 1, true));
    let head = if choice % 2 == 0 { ring.chain(&pieces) } else { ring.indirect(&pieces) };
    ring.offer(head);
    let last = sector.checked_mul(512).and_then(|start| start.checked_add(total)).is_some_and(|end| end <= DISK);
    match kind {
        2 if total <= 1 << 20 => Some(2),
        kind::IN => Some(u8::from(!(whole && last && total > 0 && total % 512 == 0))),
        kind::FLUSH => Some(u8::from(pieces.len() > 2)),
        _ => None,
    }
}
