//! Merging an image, and those between, into an image further down its chain.
//!
//! `plan` says what will be done and refuses what must not be; `resume` does the same for a merge that was begun; `hold` has the
//! files to itself; `run` does it, in the order that `docs/crash-consistency.md` gives; `copy` moves the data.

mod copy;
mod hold;
mod plan;
mod protection;
mod resume;
mod run;

use std::path::PathBuf;

pub(crate) use plan::plan_of_commit;
pub use plan::{MergePlan, plan};
pub use run::execute;
pub(crate) use run::run_all;

/// What is merged, and how.
#[derive(Clone, Debug, Default)]
pub struct MergeOptions {
    /// The image that takes what the child holds; its parent when `None`.
    pub into: Option<PathBuf>,
    /// Images between, and children of the child, that are in other folders.
    pub with: Vec<PathBuf>,
    /// Removes the child and the images between at the end.
    pub delete: bool,
    /// Goes on although other children are lost, an undo session too, the target is write-protected, or a saved state relies on
    /// it.
    pub force: bool,
}
