//! A fuzzer's bytes as numbers.

use vhd_core::format::SECTOR;

/// Numbers and slices from a fuzzer's bytes; zeros when they have ended.
#[derive(Clone, Debug)]
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// True when all bytes were taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next `len` bytes, or what is left.
    pub fn take(&mut self, len: usize) -> &'a [u8] {
        let (head, tail) = self.0.split_at(len.min(self.0.len()));
        self.0 = tail;
        head
    }

    /// A number of so many bytes, at most eight.
    pub fn number(&mut self, bytes: usize) -> u64 {
        self.take(bytes).iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
    }

    /// One byte.
    pub fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    /// A number that is likely to matter: near a limit, near `usual`, or any.
    pub fn odd_number(&mut self, usual: u64) -> u64 {
        let near = i64::from(self.byte().cast_signed() % 3);
        let base = match self.byte() % 12 {
            0 => 0,
            1 => usual,
            2 => u64::from(u32::MAX),
            3 => u64::MAX,
            4 => i64::MAX as u64,
            5 => 1 << (self.byte() % 64),
            6 => usual.wrapping_add(SECTOR),
            7 => usual.wrapping_sub(SECTOR),
            8 => usual ^ 1 << (self.byte() % 64),
            9 => self.number(2),
            10 => self.number(4),
            _ => self.number(8),
        };
        base.wrapping_add_signed(near)
    }
}
