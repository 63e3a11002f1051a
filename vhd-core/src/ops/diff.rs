//! What changed between two images of one chain, from metadata alone.

use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::block::{BlockDevice, ExtentState};
use crate::chain::Chain;
use crate::error::{Error, ErrorKind, Result};

/// Calls `visit` with the ranges of the disk that images from `new` down to the one above `old` hold: sector-exact, ascending,
/// never adjacent. What lies beyond the end of a smaller `old`, or of a smaller image between, counts as changed.
///
/// A sector that was written with what it held already counts, too: nothing is read but metadata, and that of `old` is not.
///
/// # Errors
/// `InvalidInput` when `old` is not an image of the chain of `new`; as metadata can't be read; as `visit` fails.
pub fn diff(new: &Chain, old: &Path, visit: &mut dyn FnMut(Range<u64>) -> Result<()>) -> Result<()> {
    let depth = depth_of(new, old)?;
    // An image between that is smaller hides the rest of those below it, also from larger ones above.
    let shown = new.layers()[..=depth].iter().map(|layer| layer.size()).min().unwrap_or(0);
    let mut pending: Option<Range<u64>> = None;
    let mut push = |range: Range<u64>| match &mut pending {
        _ if range.is_empty() => Ok(()),
        Some(last) if last.end >= range.start => {
            last.end = last.end.max(range.end);
            Ok(())
        }
        _ => pending.replace(range).map_or(Ok(()), &mut *visit),
    };
    let size = new.capabilities().size;
    new.extents_above(depth, 0..size.min(shown), &mut |extent| match extent.state {
        ExtentState::Absent => Ok(()),
        _ => push(extent.range),
    })?;
    push(shown.min(size)..size)?;
    pending.map_or(Ok(()), visit)
}

/// The layer that is in the file at `path`.
pub(super) fn depth_of(chain: &Chain, path: &Path) -> Result<usize> {
    let identity = |path: &Path| {
        let metadata = std::fs::metadata(path).map_err(|error| Error::io(error, "can't be opened").at(path))?;
        Ok((metadata.dev(), metadata.ino()))
    };
    let wanted = identity(path)?;
    for (depth, layer) in chain.layers().iter().enumerate() {
        if identity(layer.path())? == wanted {
            return Ok(depth);
        }
    }
    let leaf = chain.layers().first().map_or(Path::new(""), |layer| layer.path());
    Err(Error::new(ErrorKind::InvalidInput, format!("is no image of the chain of {}", leaf.display())).at(path))
}
