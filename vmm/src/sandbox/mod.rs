//! What is left of the user's rights to a monitor whose guest got the better of it.
//!
//! Two fences. *Landlock* closes the host's file system but for what the machine needs ([`Files`]), for the process as a
//! whole. *Seccomp* closes the kernel's calls but for those that a thread needs ([`Kind`]): the threads that a guest
//! speaks to open nothing, connect to nothing and start no program. What is started for the user later, scripts at
//! events, is started by a process that was there before ([`crate::machine::run_at_events`]).
//!
//! A call that no thread of its kind makes ends the process, after a line that names it: it was made by someone else,
//! or a list in `calls.rs` has a gap.

mod calls;
mod files;
mod refused;

use std::io;

use vhd_core::Error;

pub use calls::Kind;
pub use files::{Access, Files};

/// Fences in this thread, and all that it starts.
///
/// # Errors
/// As the kernel has no seccomp.
pub fn enter(kind: Kind) -> io::Result<()> {
    let memory = refused::tell()?;
    for filter in calls::filters(kind, memory)? {
        seccompiler::apply_filter(&filter).map_err(io::Error::other)?;
    }
    Ok(())
}

/// Fences in the process: this thread, which is its only one as yet, and all that will be.
///
/// Returns what the host's kernel can't fence, as a sentence.
///
/// # Errors
/// As a file that is to be reached is not there, or the kernel refuses.
pub fn confine(files: &Files) -> Result<Option<&'static str>, Error> {
    let failed = |error| Error::io(error, "the sandbox can't be set up; --no-sandbox runs without it");
    // What it reads can't be opened from inside.
    refused::tell().map_err(failed)?;
    let fenced = files.fence()?;
    enter(Kind::Control).map_err(failed)?;
    Ok((!fenced).then_some("the kernel has no Landlock: the monitor can reach all files of its user"))
}
