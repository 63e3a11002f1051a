//! Time stamps: seconds since 2000-01-01 00:00:00 UTC, in 32 bits.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Seconds from the Unix epoch to 2000-01-01 00:00:00 UTC.
const EPOCH_2000: u64 = 946_684_800;

/// Seconds since 2000-01-01 00:00:00 UTC, as footer and dynamic header count them. Wraps in 2136.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(pub u32);

impl Timestamp {
    /// The time now. Times before 2000 give 0.
    #[must_use]
    pub fn now() -> Self {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
        // The field wraps in 2136; the mask makes the cast exact.
        Self(u32::try_from(unix.saturating_sub(EPOCH_2000) & 0xFFFF_FFFF).unwrap_or(0))
    }

    /// The same moment as system time.
    #[must_use]
    pub fn to_system_time(self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(EPOCH_2000 + u64::from(self.0))
    }
}
