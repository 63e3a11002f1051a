//! Holes of the host's files, found once.

use std::collections::BTreeMap;
use std::ops::Range;

use super::Layer;
use crate::error::Result;

/// Data ranges of the files of a chain, as far as one walk over the disk has met them. Finding the end of a data range
/// costs the host a walk to it: asked again for each block of one long range, that would be quadratic.
#[derive(Debug, Default)]
pub(super) struct DataRanges {
    /// End by depth and start.
    known: BTreeMap<(usize, u64), u64>,
    /// The hole that was found last, by depth; what is known begins where it ends.
    holes: BTreeMap<usize, Range<u64>>,
}

impl DataRanges {
    /// The first range of a layer's file at or after `at` that may hold anything but zeros.
    pub(super) fn next(&mut self, depth: usize, layer: &Layer, at: u64) -> Result<Option<Range<u64>>> {
        let before = self.known.range((depth, 0)..=(depth, at)).next_back();
        if let Some((_, &end)) = before.filter(|(_, end)| **end > at) {
            return Ok(Some(at..end));
        }
        if let Some(hole) = self.holes.get(&depth).filter(|hole| hole.contains(&at)) {
            return Ok(self.known.get(&(depth, hole.end)).map(|&end| hole.end..end));
        }
        let found = layer.storage().next_data(at).map_err(|error| match layer {
            Layer::Image(image) => image.read_error(error, at),
            Layer::Raw(raw) => raw.error(error, "can't be searched for holes"),
        })?;
        self.holes.insert(depth, at..found.as_ref().map_or(u64::MAX, |range| range.start));
        if let Some(range) = &found {
            self.known.insert((depth, range.start), range.end);
        }
        Ok(found)
    }
}
