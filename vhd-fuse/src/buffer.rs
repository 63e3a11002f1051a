//! Page-aligned memory for reads, one piece per thread.

use std::cell::RefCell;

use vhd_core::storage::AlignedBuffer;

thread_local! {
    static BUFFER: RefCell<Option<AlignedBuffer>> = const { RefCell::new(None) };
}

/// Calls `f` with `len` bytes of this thread's memory. What they hold is left from an earlier call.
pub(crate) fn with<R>(len: usize, f: impl FnOnce(&mut [u8]) -> R) -> R {
    BUFFER.with_borrow_mut(|buffer| {
        // Not grown but replaced where it is too small: there is nothing in it to keep.
        let fits = buffer.take().filter(|bytes| bytes.len() >= len);
        let bytes = buffer.insert(fits.unwrap_or_else(|| AlignedBuffer::new(len)));
        f(&mut bytes[..len])
    })
}
