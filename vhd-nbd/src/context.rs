//! Metadata contexts: what block status can tell of a disk.

use vhd_core::block::{Extent, ExtentState};

const ALLOCATION: &str = "base:allocation";
const DEPTH: &str = "qemu:allocation-depth";
const DIRTY: &str = "vhd:dirty:";

/// In `base:allocation`: nothing is stored there.
const STATE_HOLE: u32 = 1;
/// In `base:allocation`: it reads as zeros.
const STATE_ZERO: u32 = 2;
/// In `vhd:dirty:…`: it changed.
const STATE_DIRTY: u32 = 1;

/// Something that block status tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Context {
    /// `base:allocation`: whether there is data, zeros or nothing.
    Allocation,
    /// `qemu:allocation-depth`: which image holds it; 1 is the leaf, 0 none.
    Depth,
    /// `vhd:dirty:NAME`: whether an image above this ancestor holds it, that is, what changed since then.
    Dirty(String),
}

impl Context {
    /// The name on the wire.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Allocation => ALLOCATION.into(),
            Self::Depth => DEPTH.into(),
            Self::Dirty(ancestor) => format!("{DIRTY}{ancestor}"),
        }
    }

    /// All that a disk with these ancestors has.
    #[must_use]
    pub fn all(ancestors: &[String]) -> Vec<Self> {
        [Self::Allocation, Self::Depth].into_iter().chain(ancestors.iter().cloned().map(Self::Dirty)).collect()
    }

    /// Those that a query means. Only a listing knows `base:` and its like, which mean all of a namespace.
    #[must_use]
    pub fn matching(query: &str, listing: bool, ancestors: &[String]) -> Vec<Self> {
        let means = |name: &str| query == name || listing && query.ends_with(':') && name.starts_with(query);
        Self::all(ancestors).into_iter().filter(|context| means(&context.name())).collect()
    }

    /// What this context says of an extent. `ancestor` is the depth of the image that a dirty context is about.
    #[must_use]
    pub fn state(&self, extent: &Extent, ancestor: usize) -> u32 {
        match (self, extent.state) {
            (Self::Allocation, ExtentState::Data) => 0,
            (Self::Allocation, ExtentState::Zero) => STATE_ZERO,
            (Self::Allocation, ExtentState::Absent) => STATE_HOLE | STATE_ZERO,
            (Self::Depth | Self::Dirty(_), ExtentState::Absent) => 0,
            (Self::Depth, _) => u32::try_from(extent.depth + 1).unwrap_or(u32::MAX),
            (Self::Dirty(_), _) if extent.depth < ancestor => STATE_DIRTY,
            (Self::Dirty(_), _) => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_means_all_of_it_to_a_listing_only() {
        let ancestors = ["base.vhd".to_owned(), "middle.vhd".to_owned()];
        let names =
            |query, listing| -> Vec<_> { Context::matching(query, listing, &ancestors).iter().map(Context::name).collect() };
        assert_eq!(names("base:", true), ["base:allocation"]);
        assert!(names("base:", false).is_empty());
        assert_eq!(names("vhd:", true), ["vhd:dirty:base.vhd", "vhd:dirty:middle.vhd"]);
        assert_eq!(names("vhd:dirty:", true).len(), 2);
        assert_eq!(names("vhd:dirty:base.vhd", false), ["vhd:dirty:base.vhd"]);
        assert!(names("", true).is_empty() && names("other:x", true).is_empty() && names("base", true).is_empty());
    }
}
