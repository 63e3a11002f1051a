//! A text that is made when it is opened, such as `info.json`.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::sync::atomic::{AtomicU64, Ordering};

use vhd_core::Result;

/// What makes the text.
pub(crate) type Produce = Box<dyn Fn(&mut dyn Write) -> Result<()> + Send + Sync>;

/// A text that tells how things are at the moment when it is opened. Like the files of `/proc` it has no size before.
pub(crate) struct Document {
    produce: Produce,
    /// Bytes when it was opened last.
    len: AtomicU64,
}

impl Document {
    pub(crate) fn new(produce: Produce) -> Self {
        Self { produce, len: AtomicU64::new(0) }
    }

    /// Bytes when it was opened last.
    pub(crate) fn len(&self) -> u64 {
        self.len.load(Ordering::Relaxed)
    }

    /// The text as it is now, in a file without a name: that of a large disk has no room in memory.
    pub(crate) fn open(&self) -> io::Result<File> {
        let mut out = BufWriter::with_capacity(64 << 10, tempfile::tempfile()?);
        (self.produce)(&mut out).map_err(io::Error::other)?;
        let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
        self.len.store(file.metadata()?.len(), Ordering::Relaxed);
        Ok(file)
    }
}
