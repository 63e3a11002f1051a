//! The console that all lives of a machine write to.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use crate::devices::Console;

/// A console that is handed from one life to the next. A cheap clone.
#[derive(Clone)]
pub struct SharedConsole(Arc<Mutex<dyn Write + Send>>);

impl SharedConsole {
    /// A console that writes there.
    #[must_use]
    pub fn new(to: impl Write + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(to)))
    }

    pub(super) fn writer(&self) -> Console {
        Box::new(self.clone())
    }
}

impl Write for SharedConsole {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).flush()
    }
}
