//! What changed between two images of one chain, from metadata alone.

use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::block::{BlockDevice, ExtentState};
use crate::chain::Chain;
use crate::error::{Error, ErrorKind, Result};

/// The ranges of the disk that images from `new` down to the one above `old` hold: sector-exact, ascending, never
/// adjacent. What lies beyond the end of a smaller `old`, or of a smaller image between, counts as changed.
///
/// A sector that was written with what it held already counts, too: nothing is read but metadata.
///
/// # Errors
/// `InvalidInput` when `old` is not an image of the chain of `new`; as metadata can't be read.
pub fn diff(new: &Chain, old: &Path) -> Result<Vec<Range<u64>>> {
    let depth = depth_of(new, old)?;
    // An image between that is smaller hides the rest of those below it, also from larger ones above.
    let shown = new.layers()[..=depth].iter().map(|layer| layer.size()).min().unwrap_or(0);
    let mut changed: Vec<Range<u64>> = Vec::new();
    let mut push = |range: Range<u64>| match changed.last_mut() {
        Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
        _ if range.is_empty() => {}
        _ => changed.push(range),
    };
    let size = new.capabilities().size;
    new.extents(0..size.min(shown), &mut |extent| {
        if extent.depth < depth && extent.state != ExtentState::Absent {
            push(extent.range);
        }
        Ok(())
    })?;
    push(shown.min(size)..size);
    Ok(changed)
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
