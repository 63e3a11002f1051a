//! One layer of a live disk.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use super::LiveDisk;
use crate::block::{BlockDevice, Capabilities, Extent, Spliced, ZeroMode};
use crate::chain::{Chain, Layer};
use crate::error::{Error, ErrorKind, Result};

/// A layer, counted from the base: leaves that come later don't change which one it is.
pub(super) struct LiveLayer {
    disk: LiveDisk,
    above_base: usize,
}

impl LiveLayer {
    pub(super) fn new(disk: LiveDisk, above_base: usize) -> Self {
        Self { disk, above_base }
    }

    /// Looks at the chain, and the depth at which the layer is in it now.
    fn with<T>(&self, look: impl FnOnce(&Chain, usize) -> Result<T>) -> Result<T> {
        self.disk.with_chain(|chain| match chain.layers().len().checked_sub(self.above_base + 1) {
            Some(depth) => look(chain, depth),
            None => Err(Error::new(ErrorKind::Io, "has fewer layers than it had").at(chain.layers()[0].path())),
        })
    }

    fn read_only<T>(&self) -> Result<T> {
        let error = Error::new(ErrorKind::ReadOnly, "is shown read-only as a layer of a chain");
        Err(match self.layer_path(0) {
            Some(path) => error.at(&path),
            None => error,
        })
    }
}

impl BlockDevice for LiveLayer {
    fn capabilities(&self) -> Capabilities {
        let (size, layers) = self.with(|chain, depth| Ok((chain.layers()[depth].size(), self.above_base + 1))).unwrap_or((0, 1));
        Capabilities { size, read_only: true, discard_granularity: 4096, layers }
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        self.with(|chain, depth| chain.read_layer(depth, bufs, offset))
    }

    fn splice_at(&self, pipe: BorrowedFd<'_>, range: Range<u64>, wait: bool) -> Result<Spliced> {
        self.with(|chain, depth| chain.splice_layer(depth, pipe, range, wait))
    }

    fn write_vectored_at(&self, _bufs: &[IoSlice<'_>], _offset: u64) -> Result<()> {
        self.read_only()
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn zero(&self, _range: Range<u64>, _mode: ZeroMode) -> Result<()> {
        self.read_only()
    }

    fn extents(&self, range: Range<u64>, visit: &mut dyn FnMut(Extent) -> Result<()>) -> Result<()> {
        self.with(|chain, first| {
            chain.layer_extents(first, range, &mut |extent| visit(Extent { depth: extent.depth - first, ..extent }))
        })
    }

    fn layer_path(&self, depth: usize) -> Option<PathBuf> {
        self.with(|chain, first| Ok(chain.layers().get(first + depth).map(Layer::path).map(PathBuf::from))).ok().flatten()
    }

    fn close(&self) -> Result<()> {
        Ok(())
    }
}
