//! What is done when the host can't do what the guest asks.

use vhd_core::{Error, ErrorKind};

/// What becomes of a request that the host failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// The guest sees an error.
    Report,
    /// The request is kept, and the machine stops until it is told to go on; then it is tried again.
    Pause,
}

impl Policy {
    /// Its word.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Pause => "pause",
        }
    }
}

/// One policy for each sort of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policies {
    /// The host's disk is broken.
    pub on_error: Policy,
    /// The host's disk is full.
    pub on_no_space: Policy,
}

impl Default for Policies {
    fn default() -> Self {
        Self { on_error: Policy::Report, on_no_space: Policy::Pause }
    }
}

/// Why a queue does not go on.
#[derive(Debug)]
pub struct Stall(pub Error);

impl Policies {
    /// What to do about a failure. A guest that asks for what is not there is told so, whatever the policy.
    pub(super) fn of(self, error: &Error) -> Policy {
        match error.kind() {
            ErrorKind::NoSpace => self.on_no_space,
            ErrorKind::OutOfRange | ErrorKind::ReadOnly => Policy::Report,
            _ => self.on_error,
        }
    }
}
