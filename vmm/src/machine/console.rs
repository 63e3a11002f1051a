//! The console that all lives of a machine write to.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use crate::devices::Console;

/// Bytes that are kept for a console which does not take them; what comes then is lost, as on a wire.
const KEPT: usize = 64 << 10;

/// A console that is handed from one life to the next. A cheap clone.
#[derive(Clone)]
pub struct SharedConsole(Arc<Mutex<Output>>);

struct Output {
    to: Box<dyn Write + Send>,
    /// What comes before the next bytes.
    kept: Vec<u8>,
}

impl SharedConsole {
    /// A console that writes there. A guest waits for it as long as the machine is to run: it must let itself be
    /// interrupted by signals (a buffered writer does not).
    #[must_use]
    pub fn new(to: impl Write + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(Output { to: Box::new(to), kept: Vec::new() })))
    }

    pub(super) fn writer(&self) -> Console {
        Box::new(self.clone())
    }
}

impl Write for SharedConsole {
    /// Writes all, or keeps what a signal has come in between for: the vCPU is to stop.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut output = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let room = KEPT.saturating_sub(output.kept.len());
        output.kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
        while !output.kept.is_empty() {
            let Output { to, kept } = &mut *output;
            match to.write(kept) {
                Ok(0) => break,
                Ok(len) => drop(kept.drain(..len)),
                Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => break,
                Err(error) => {
                    // Nobody will have it.
                    kept.clear();
                    return Err(error);
                }
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
