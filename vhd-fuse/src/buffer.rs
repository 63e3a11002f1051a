//! Page-aligned memory for reads, one piece per thread.
//!
//! Some processors copy at a quarter of the speed when source and destination differ by a few bytes modulo a page,
//! and large allocations begin 16 bytes into one. So the memory is one page longer than asked for, and used from
//! the first page boundary on.

use std::cell::RefCell;

const PAGE: usize = 4096;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with `len` bytes of this thread's memory. What they hold is left from an earlier call.
pub(crate) fn with<R>(len: usize, f: impl FnOnce(&mut [u8]) -> R) -> R {
    BUFFER.with_borrow_mut(|bytes| {
        let wanted = len.saturating_add(PAGE);
        if bytes.len() < wanted {
            // Not grown but replaced: there is nothing in it to keep.
            *bytes = vec![0; wanted.next_multiple_of(PAGE)];
        }
        let start = bytes.as_ptr().addr().wrapping_neg() % PAGE;
        f(&mut bytes[start..start + len])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_buffer_begins_on_a_page() {
        for len in [0, 1, 512, PAGE, PAGE + 1, 1 << 20, 3] {
            with(len, |buf| {
                assert_eq!(buf.len(), len);
                assert_eq!(buf.as_ptr().addr() % PAGE, 0);
            });
        }
    }
}
