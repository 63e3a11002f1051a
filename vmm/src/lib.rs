//! Virtual machines on KVM whose disks are virtual hard disks.
//!
//! Bottom to top: [`memory`] is what the guest has for memory; [`virtio`] the disks as it sees them, without KVM.
//!
//! Nothing that a guest does makes the monitor panic, loop without end or use memory beyond a named limit.

pub mod acpi;
pub mod config;
pub mod devices;
pub mod installed;
pub mod kvm;
pub mod layout;
pub mod life;
pub mod loader;
pub mod machine;
pub mod memory;
pub mod sandbox;
pub mod saved;
pub mod virtio;
