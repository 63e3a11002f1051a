//! Shows a [`Disk`](vhd_core::Disk) as files of the host, with FUSE.
//!
//! [`mount()`] puts a folder with one file, `disk.raw`, on a target folder and serves it from threads of its own;
//! [`Mounted::wait`] ends when it is unmounted or a signal says so, and leaves the image flushed and closed.
//! [`unmount()`] is the other side: it ends a mount that any process serves, and waits for that process.
//!
//! Bottom to top: `view` is a range of a disk as a file's bytes; `tree` names views; `filesystem` answers the kernel;
//! `mounted` is the life of a mount. Only `filesystem` and `mounted` know fuser.

mod allocation;
mod buffer;
mod device;
mod filesystem;
mod gate;
mod mounted;
mod mountinfo;
mod options;
mod server;
mod signals;
mod tree;
mod unmount;
mod view;

pub use mounted::{Mounted, mount};
pub use options::MountOptions;
pub use signals::StopSignals;
pub use unmount::unmount;

/// The file that is the whole disk.
pub const DISK_FILE: &str = "disk.raw";

/// What the kernel calls our mounts: the type is `fuse.vhd`.
const SUBTYPE: &str = "vhd";
