//! Oracles, fixtures and outside tools that judge `vhd`.
//!
//! What judges shares no code with `vhd-core`: a mistake made in one cannot hide the same mistake in the other. Only
//! [`session`], [`judge`] and [`fuzz`] drive the core, and ask the others; the storages implement its trait.
//!
//! - [`fixture`] writes VHD files of every layout, byte by byte.
//! - [`reference`](mod@reference) reads a chain the slow and obvious way.
//! - [`tagged`] makes sectors that say who wrote them, where and when.
//! - [`model`] is what a chain of disks should hold, in memory.
//! - [`record`], [`folder`] and [`fault`] are storages and folders that remember, and that fail.
//! - [`crash`] makes every state that a power cut may leave, and [`history`] says what each may read.
//! - [`session`] is what a client does while it is recorded, and [`judge`] what must hold of each state after a cut.
//! - [`fuzz`] is what the fuzz targets do with their bytes.
//! - [`rings`] is the driver's side of a virtio queue.
//! - [`tools`] runs qemu-img, qemu-io and vhdimount.
//! - [`machine`] says whether there is KVM, and builds the test guest; [`volume`] makes volumes that are soon full.

#![allow(clippy::unwrap_used, reason = "a test that cannot make its own input has nothing better to do than panic")]

pub mod crash;
pub mod fault;
pub mod fault_host;
pub mod fixture;
pub mod folder;
pub mod foreign;
pub mod fuzz;
pub mod history;
pub mod judge;
pub mod machine;
pub mod model;
pub mod record;
pub mod reference;
pub mod rings;
pub mod session;
pub mod tagged;
pub mod tools;
pub mod volume;
