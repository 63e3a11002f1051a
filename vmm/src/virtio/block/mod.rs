//! A virtual hard disk as a virtio block device.

mod config;
mod policy;
mod request;
mod serve;

use std::sync::atomic::AtomicBool;

use vhd_core::Disk;

pub use config::{Geometry, MAX_RANGE_SECTORS, MAX_RANGES, MAX_SEGMENTS, MAX_TRANSFER};
pub use policy::{Policies, Policy, Stall};
pub use request::{ID_LEN, Status};
pub use serve::{Broken, QueueOwner, Served};

/// Bytes of a sector: what a guest counts in.
pub const SECTOR: u64 = 512;

/// How a disk appears.
#[derive(Clone, Debug, Default)]
pub struct BlockOptions {
    /// What the guest takes for its serial number: 20 bytes at most, the rest is cut.
    pub serial: String,
    /// Queues, 1 at least.
    pub queues: u16,
    /// Refuse writes even where the disk takes them.
    pub read_only: bool,
    /// What old guests address it by.
    pub geometry: Option<Geometry>,
    /// What is done when the host can't do what the guest asks.
    pub policies: Policies,
}

/// A disk that answers requests. All calls may come from several threads, each with a queue of its own.
#[derive(Debug)]
pub struct Block {
    disk: Disk,
    read_only: bool,
    queues: u16,
    geometry: Option<Geometry>,
    serial: [u8; ID_LEN],
    policies: Policies,
    /// The driver does not flush, so every write is made durable before it is answered.
    write_through: AtomicBool,
}

impl Block {
    /// A device over a disk.
    #[must_use]
    pub fn new(disk: Disk, options: &BlockOptions) -> Self {
        let mut serial = [0; ID_LEN];
        let len = options.serial.len().min(ID_LEN);
        serial[..len].copy_from_slice(&options.serial.as_bytes()[..len]);
        Self {
            read_only: options.read_only || disk.capabilities().read_only,
            queues: options.queues.max(1),
            geometry: options.geometry,
            serial,
            policies: options.policies,
            write_through: AtomicBool::new(false),
            disk,
        }
    }

    /// Queues.
    #[must_use]
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// The disk behind it.
    #[must_use]
    pub fn disk(&self) -> &Disk {
        &self.disk
    }
}
