//! Shows a [`Disk`](vhd_core::Disk) as files of the host, with FUSE.
//!
//! [`mount()`] puts [`Contents`] (a disk, its partitions, its layers, texts) on a target and serves them from threads of its own;
//! [`Mounted::wait`] ends when it is unmounted or a signal says so, and leaves the image flushed and closed.
//! [`unmount()`] is the other side: it ends a mount that any process serves, and waits for that process.
//!
//! Bottom to top: `view` is a range of a disk as a file's bytes, `document` a text that is made when it is opened; `tree`
//! names them, `contents` says which there are; `filesystem` answers the kernel; `mounted` is the life of a mount, `inside`
//! the file system that may be mounted on one of its files. Only `filesystem`, `mounted` and `tree` know fuser.

mod allocation;
mod buffer;
mod changes;
mod contents;
mod device;
mod document;
mod filesystem;
mod gate;
mod inside;
mod mounted;
mod mountinfo;
mod opens;
mod options;
mod server;
mod shared;
mod signals;
mod tree;
mod unmount;
mod view;

pub use contents::{Contents, PROBLEMS_FILE};
pub use mounted::{Mounted, mount};
pub use options::{MountOptions, users_may_allow_other};
pub use server::{Server, check_servers_run};
pub use shared::SharedMount;
pub use signals::{Lethal, StopSignals};
pub use unmount::{Told, Unmounted, image_at, unmount};

/// The file that is the whole disk.
pub const DISK_FILE: &str = "disk.raw";

/// What the kernel calls our mounts: the type is `fuse.vhd`.
const SUBTYPE: &str = "vhd";
