//! Who answers when the guest reaches for what is not memory.

use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::devices::{Ports, Request};
use crate::kvm::Bus;
use crate::layout::DISKS;
use crate::virtio::mmio::{self, Registers};

/// All devices of a machine.
pub struct Devices {
    pub ports: Ports,
    pub disks: Vec<Mutex<Registers>>,
    /// The line on which it is told that it was pressed.
    pub power_button: EventFd,
}

impl Devices {
    /// Does something to each disk.
    pub fn each_disk(&self, mut act: impl FnMut(&Registers)) {
        for disk in &self.disks {
            act(&disk.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// The disk whose registers are there, and which of them.
    fn disk(&self, address: u64) -> Option<(&Mutex<Registers>, u64)> {
        let offset = address.checked_sub(DISKS)?;
        let disk = self.disks.get(usize::try_from(offset / mmio::SIZE).ok()?)?;
        Some((disk, offset % mmio::SIZE))
    }
}

impl Bus for Devices {
    fn port_write(&self, port: u16, bytes: &[u8]) -> Option<Request> {
        self.ports.write(port, bytes)
    }

    fn port_read(&self, port: u16, bytes: &mut [u8]) {
        self.ports.read(port, bytes);
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        if let Some((disk, offset)) = self.disk(address) {
            disk.lock().unwrap_or_else(PoisonError::into_inner).write(offset, bytes);
        }
    }

    fn read(&self, address: u64, bytes: &mut [u8]) {
        match self.disk(address) {
            Some((disk, offset)) => disk.lock().unwrap_or_else(PoisonError::into_inner).read(offset, bytes),
            // Nobody drives the wires.
            None => bytes.fill(0xFF),
        }
    }
}
