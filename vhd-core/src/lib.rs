//! Virtual hard disks: the VHD (`conectix`) format of Virtual PC, Virtual Server, Hyper-V, Azure and Xen.
//!
//! Layers, bottom to top: [`storage`] is the bytes of one host file; [`mod@format`] turns bytes into validated
//! structures and back; [`layout`] is arithmetic; [`image`] is one VHD file; [`chain`] a leaf and its parents;
//! [`block`] what everything else consumes: a [`block::Disk`].
//!
//! The crate is synchronous and positional, and every call takes `&self`. It does not know tokio, sockets, FUSE or
//! KVM. No input file makes it panic, loop without end or use memory beyond a small multiple of the file.

pub mod block;
pub mod chain;
mod command;
pub mod error;
pub mod format;
pub mod guestfs;
pub mod image;
pub mod intent;
pub mod layout;
pub mod live;
pub mod ops;
pub mod partition;
pub mod progress;
pub mod sharded;
pub mod storage;

pub use block::Disk;
pub use error::{Error, ErrorKind, Result};
pub use live::LiveDisk;
pub use progress::Progress;
