//! The registers of a virtio device in the guest's address space (virtio 1, section "Virtio Over MMIO").

use std::sync::atomic::Ordering;

use virtio_queue::QueueT;

use super::workers::Workers;
use super::{QUEUE_SIZE, status};

/// Bytes of the address space that one device takes.
pub const SIZE: u64 = 0x1000;
/// Where a driver says which queue has requests.
pub const NOTIFY: u64 = 0x50;
/// Where the device's own registers begin.
const CONFIG: u64 = 0x100;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const BLOCK_DEVICE: u32 = 2;
/// Nobody's number of those that PCI vendors have: only Linux prints it.
const VENDOR: u32 = u32::from_le_bytes(*b"vhd ");

/// A disk's registers.
pub struct Registers {
    workers: Workers,
    features_page: u32,
    driver_features_page: u32,
    driver_features: u64,
    queue: usize,
}

/// A disk's registers and queues in a saved state.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DiskState {
    features_page: u32,
    driver_features_page: u32,
    driver_features: u64,
    queue: u32,
    status: u32,
    pending: u32,
    queues: Vec<QueueSaved>,
}

/// A queue in a saved state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct QueueSaved {
    size: u16,
    ready: bool,
    event_index: bool,
    next_avail: u16,
    next_used: u16,
    descriptors: u64,
    available: u64,
    used: u64,
}

/// The registers as numbers that a driver reads and writes.
mod register {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE: u64 = 0x08;
    pub const VENDOR: u64 = 0x0C;
    pub const FEATURES: u64 = 0x10;
    pub const FEATURES_PAGE: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_PAGE: u64 = 0x24;
    pub const QUEUE: u64 = 0x30;
    pub const QUEUE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const INTERRUPT: u64 = 0x60;
    pub const ACKNOWLEDGE: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const DESCRIPTORS: u64 = 0x80;
    pub const DESCRIPTORS_HIGH: u64 = 0x84;
    pub const AVAILABLE: u64 = 0x90;
    pub const AVAILABLE_HIGH: u64 = 0x94;
    pub const USED: u64 = 0xA0;
    pub const USED_HIGH: u64 = 0xA4;
    pub const GENERATION: u64 = 0xFC;
}

impl Registers {
    /// The registers of a disk whose queues are these.
    #[must_use]
    pub fn new(workers: Workers) -> Self {
        Self { workers, features_page: 0, driver_features_page: 0, driver_features: 0, queue: 0 }
    }

    /// The queues.
    #[must_use]
    pub fn workers(&self) -> &Workers {
        &self.workers
    }

    /// A driver reads.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) {
        if offset >= CONFIG {
            self.workers.block().read_config(offset - CONFIG, bytes);
            return;
        }
        bytes.fill(0);
        // Registers are read whole or not at all.
        if bytes.len() == 4 {
            bytes.copy_from_slice(&self.register(offset).to_le_bytes());
        }
    }

    fn register(&self, offset: u64) -> u32 {
        let line = self.workers.line();
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE => BLOCK_DEVICE,
            register::VENDOR => VENDOR,
            register::FEATURES => half(self.workers.block().features(), self.features_page),
            register::QUEUE_MAX if self.queue < usize::from(self.workers.block().queues()) => u32::from(QUEUE_SIZE),
            register::QUEUE_READY => self.workers.queue(self.queue).map_or(0, |queue| u32::from(queue.ready())),
            register::INTERRUPT => line.pending.load(Ordering::SeqCst),
            register::STATUS => line.status.load(Ordering::SeqCst),
            // The configuration never changes.
            register::GENERATION => 0,
            _ => 0,
        }
    }

    /// A driver writes.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(bytes) else { return };
        let value = u32::from_le_bytes(bytes);
        match offset {
            register::FEATURES_PAGE => self.features_page = value,
            register::DRIVER_FEATURES_PAGE => self.driver_features_page = value,
            register::DRIVER_FEATURES if !self.has(status::FEATURES_OK) => self.take_features(value),
            register::QUEUE => self.queue = value as usize,
            NOTIFY => self.workers.kick(value as usize),
            register::ACKNOWLEDGE => {
                self.workers.line().pending.fetch_and(!value, Ordering::SeqCst);
            }
            register::STATUS => self.set_status(value),
            // A queue in use is not changed: only a reset is.
            _ if !self.has(status::DRIVER_OK) => self.set_up_queue(offset, value),
            _ => {}
        }
    }

    fn has(&self, bit: u32) -> bool {
        self.workers.line().status.load(Ordering::SeqCst) & bit != 0
    }

    fn take_features(&mut self, value: u32) {
        let shift = match self.driver_features_page {
            0 => 0,
            1 => 32,
            _ => return,
        };
        self.driver_features = self.driver_features & !(0xFFFF_FFFF << shift) | u64::from(value) << shift;
    }

    fn set_up_queue(&self, offset: u64, value: u32) {
        let Some(mut queue) = self.workers.queue(self.queue) else { return };
        match offset {
            register::QUEUE_SIZE => queue.set_size(u16::try_from(value).unwrap_or(0)),
            register::QUEUE_READY => queue.set_ready(value == 1),
            register::DESCRIPTORS => queue.set_desc_table_address(Some(value), None),
            register::DESCRIPTORS_HIGH => queue.set_desc_table_address(None, Some(value)),
            register::AVAILABLE => queue.set_avail_ring_address(Some(value), None),
            register::AVAILABLE_HIGH => queue.set_avail_ring_address(None, Some(value)),
            register::USED => queue.set_used_ring_address(Some(value), None),
            register::USED_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) {
        let line = self.workers.line();
        if value == 0 {
            self.workers.reset();
            (self.features_page, self.driver_features_page, self.driver_features, self.queue) = (0, 0, 0, 0);
            return;
        }
        let offered = self.workers.block().features();
        let version_1 = 1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
        let agreed = self.driver_features & !offered == 0 && self.driver_features & version_1 != 0;
        let was = line.status.load(Ordering::SeqCst);
        // Bits are only added by a driver, the device's own one is not its affair, and what was not offered can't be
        // agreed upon.
        let mut now = was | value & !status::NEEDS_RESET;
        if !agreed {
            now &= !(status::FEATURES_OK | status::DRIVER_OK);
        }
        if now & status::FEATURES_OK == 0 {
            now &= !status::DRIVER_OK;
        }
        line.status.fetch_or(now, Ordering::SeqCst);
        if now & status::DRIVER_OK != 0 && was & status::DRIVER_OK == 0 {
            self.start();
        }
    }

    /// The driver is ready.
    fn start(&self) {
        self.workers.block().set_features(self.driver_features);
        let event_index = self.driver_features & 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX != 0;
        for queue in 0..usize::from(self.workers.block().queues()) {
            if let Some(mut queue) = self.workers.queue(queue) {
                queue.set_event_idx(event_index);
            }
        }
        self.workers.run();
    }

    /// What is to be saved; no request is under way, and those that are kept are still in their queue.
    #[must_use]
    pub fn save(&self) -> DiskState {
        let line = self.workers.line();
        let queues = (0..usize::from(self.workers.block().queues())).filter_map(|number| {
            let state = self.workers.queue(number)?.state();
            Some(QueueSaved {
                size: state.size,
                ready: state.ready,
                event_index: state.event_idx_enabled,
                next_avail: state.next_avail,
                next_used: state.next_used,
                descriptors: state.desc_table,
                available: state.avail_ring,
                used: state.used_ring,
            })
        });
        DiskState {
            features_page: self.features_page,
            driver_features_page: self.driver_features_page,
            driver_features: self.driver_features,
            queue: self.queue as u32,
            status: line.status.load(Ordering::SeqCst),
            pending: line.pending.load(Ordering::SeqCst),
            queues: queues.collect(),
        }
    }

    /// Takes a saved state.
    ///
    /// # Errors
    /// What in it is impossible.
    pub fn restore(&mut self, state: &DiskState) -> Result<(), String> {
        if state.queues.len() != usize::from(self.workers.block().queues()) {
            return Err(format!("a disk had {} queues and now has {}", state.queues.len(), self.workers.block().queues()));
        }
        if state.driver_features & !self.workers.block().features() != 0 {
            return Err("a disk can no longer do what its driver was promised".to_owned());
        }
        for (number, saved) in state.queues.iter().enumerate() {
            let restored = virtio_queue::QueueState {
                max_size: QUEUE_SIZE,
                next_avail: saved.next_avail,
                next_used: saved.next_used,
                event_idx_enabled: saved.event_index,
                size: saved.size,
                ready: saved.ready,
                desc_table: saved.descriptors,
                avail_ring: saved.available,
                used_ring: saved.used,
            };
            let restored = virtio_queue::Queue::try_from(restored).map_err(|error| format!("a queue of a disk: {error}"))?;
            if let Some(mut queue) = self.workers.queue(number) {
                *queue = restored;
            }
        }
        (self.features_page, self.driver_features_page) = (state.features_page, state.driver_features_page);
        (self.driver_features, self.queue) = (state.driver_features, state.queue as usize);
        let line = self.workers.line();
        line.status.store(state.status, Ordering::SeqCst);
        line.pending.store(state.pending, Ordering::SeqCst);
        if state.status & status::DRIVER_OK != 0 && state.status & status::NEEDS_RESET == 0 {
            self.workers.block().set_features(self.driver_features);
            self.workers.run();
        }
        // An interrupt that was on its way is sent once more: a driver that has seen it finds nothing to do.
        if state.pending != 0 {
            let _ = line.interrupt.write(1);
        }
        Ok(())
    }

    /// Forgets everything, as at power-on.
    pub fn reset(&mut self) {
        self.set_status(0);
    }

    /// Stops serving; when it returns no request is under way.
    pub fn pause(&self) {
        self.workers.pause();
    }

    /// Goes on, also with requests that were kept.
    pub fn resume(&self) {
        self.workers.resume();
    }
}

/// One half of a number that is read in two.
fn half(number: u64, page: u32) -> u32 {
    match page {
        0 => number as u32,
        1 => (number >> 32) as u32,
        _ => 0,
    }
}
