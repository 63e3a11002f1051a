//! Virtio devices (version 1), apart from how a guest reaches them.
//!
//! A *device* answers the requests of its queues. A *transport* ([`mmio`]) is the registers through which a driver
//! sets the queues up, and what carries notifications either way.

pub mod block;
pub mod mmio;
pub mod workers;

/// Bits of the device's status.
pub mod status {
    /// The driver has seen the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// It knows how to drive it.
    pub const DRIVER: u32 = 2;
    /// It is ready.
    pub const DRIVER_OK: u32 = 4;
    /// Features are agreed upon.
    pub const FEATURES_OK: u32 = 8;
    /// The device has failed and does nothing more before it is reset.
    pub const NEEDS_RESET: u32 = 64;
    /// The driver gave up.
    pub const FAILED: u32 = 128;
}

/// Entries of a queue at most.
pub const QUEUE_SIZE: u16 = 256;
