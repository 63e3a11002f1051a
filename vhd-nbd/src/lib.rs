//! Virtual hard disks over NBD.
//!
//! [`codec`] turns bytes into the protocol's structures and back; [`handshake`] and [`transmission`] are its two phases
//! without I/O; [`context`] what block status tells; [`export`] disks under names; [`server`] all of it over sockets.
//!
//! tokio lives in this crate alone. Disks are synchronous: a request is done in the task that read it where the disk
//! answers from memory, and in a thread of its own where it does not.

mod buffers;
mod client;
pub mod codec;
mod connection;
pub mod context;
pub mod export;
pub mod fuzz;
pub mod handshake;
mod limits;
mod pace;
mod peer;
mod pipes;
pub mod server;
pub mod source;
pub mod tls;
pub mod transmission;

pub use export::{Export, Table};
pub use limits::Limits;
pub use server::{Admin, Listen, Server, ServerOptions, Tls};
