//! The data range of a file that was found last.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// To find where a data range ends costs the host a walk to it: tmpfs looks at each page. Who asks for a map in parts would have it
/// walk through the same pages again and again. That a range may hold data stays true whatever is written to it.
#[derive(Debug, Default)]
pub(super) struct FoundData(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    range: Range<u64>,
    /// Times that data may have become a hole.
    forgotten: u64,
}

impl FoundData {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The rest of the range from `offset` on, or else what `find` finds. Nothing is locked while it looks.
    pub(super) fn or_find<E>(
        &self,
        offset: u64,
        find: impl FnOnce() -> Result<Option<Range<u64>>, E>,
    ) -> Result<Option<Range<u64>>, E> {
        let forgotten = {
            let state = self.lock();
            if state.range.contains(&offset) {
                return Ok(Some(offset..state.range.end));
            }
            state.forgotten
        };
        let found = find()?;
        if let Some(range) = &found {
            let mut state = self.lock();
            // What was found before a hole came may be the hole.
            if state.forgotten == forgotten {
                state.range = range.clone();
            }
        }
        Ok(found)
    }

    /// Data became a hole, or the file shorter.
    pub(super) fn forget(&self) {
        let mut state = self.lock();
        *state = State { range: 0..0, forgotten: state.forgotten.wrapping_add(1) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_while_a_hole_came_is_not_remembered() {
        let found = FoundData::default();
        let asked = found.or_find(10, || {
            found.forget();
            Ok::<_, ()>(Some(10..100))
        });
        assert_eq!(asked, Ok(Some(10..100)));
        assert_eq!(found.or_find(10, || Ok::<_, ()>(Some(50..100))), Ok(Some(50..100)));
        assert_eq!(found.or_find(60, || Err(())), Ok(Some(60..100)));
        assert_eq!((found.or_find(49, || Err(())), found.or_find(100, || Err(()))), (Err(()), Err(())));
    }
}
