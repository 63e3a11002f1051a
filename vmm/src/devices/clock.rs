//! The real-time clock (MC146818): the time of day, in UTC, and memory that nobody uses.

use std::time::{SystemTime, UNIX_EPOCH};

/// Bytes of the clock's memory.
const BYTES: u8 = 128;

/// The clock. Time is the host's; setting it has no effect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Clock {
    index: u8,
}

impl Clock {
    /// Chooses a register. (The high bit masks interrupts that there are none of.)
    pub fn select(&mut self, index: u8) {
        self.index = index % BYTES;
    }

    /// Reads the chosen register.
    #[must_use]
    pub fn read(self) -> u8 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        self.read_at(now)
    }

    fn read_at(self, seconds: u64) -> u8 {
        let (year, month, day) = date(seconds / 86400);
        let number = match self.index {
            0x00 => seconds % 60,
            0x02 => seconds / 60 % 60,
            0x04 => seconds / 3600 % 24,
            // 1970 began on a Thursday, and Sunday is 1.
            0x06 => (seconds / 86400 + 4) % 7 + 1,
            0x07 => day,
            0x08 => month,
            0x09 => year % 100,
            0x32 => year / 100,
            // 32768 Hz, no update in progress.
            0x0A => return 0x26,
            // 24 hours, binary-coded decimal.
            0x0B => return 0x02,
            // The battery is good.
            0x0D => return 0x80,
            _ => return 0,
        };
        (number / 10 * 16 + number % 10) as u8
    }
}

/// Year, month and day of so many days since 1970.
fn date(mut days: u64) -> (u64, u64, u64) {
    // Whole cycles of 400 years first, so that the loops below are short.
    let cycles = days / 146_097;
    days %= 146_097;
    let is_leap = |year: u64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let mut year = 1970;
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    (year + cycles * 400, month as u64 + 1, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_is_told_in_binary_coded_decimal() {
        // 2024-02-29 23:59:58, a Thursday.
        let at = 1_709_251_198;
        let read = |index| Clock { index }.read_at(at);
        assert_eq!([0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32].map(read), [0x58, 0x59, 0x23, 5, 0x29, 0x02, 0x24, 0x20]);
        assert_eq!(date(u64::MAX / 86400).1, date(u64::MAX / 86400 % 146_097).1);
    }
}
