//! How signals end a command that runs a machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;
use vhd_core::Error;

/// A signal ends the command: at once while it opens, begins and waits for others, for which a cut is no harm, and in order
/// while the guest runs. A second one ends it at once, whatever it does.
#[derive(Debug)]
pub struct Stop {
    wanted: Arc<AtomicBool>,
    at_once: Arc<AtomicBool>,
}

impl Stop {
    /// Listens from now on.
    pub fn listen() -> Result<Self, Error> {
        let stop = Self { wanted: Arc::default(), at_once: Arc::new(true.into()) };
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            let status = 128 + signal;
            // In this order: the first signal sets the flag that the second one finds set.
            let heard = flag::register_conditional_shutdown(signal, status, Arc::clone(&stop.at_once))
                .and_then(|_| flag::register_conditional_shutdown(signal, status, Arc::clone(&stop.wanted)))
                .and_then(|_| flag::register(signal, Arc::clone(&stop.wanted)));
            heard.map_err(|error| Error::io(error, "signals can't be heard"))?;
        }
        Ok(stop)
    }

    /// Whether there is something to be ended in order now.
    pub fn in_order(&self, so: bool) {
        self.at_once.store(!so, Ordering::SeqCst);
    }

    /// Whether a signal came that wants an end.
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst)
    }
}
