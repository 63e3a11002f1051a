//! What each sector may read after a power cut, from what the client did and was told.
//!
//! A sector may hold what any write gave it, unless a later write that a flush made durable came between: promises
//! P1 and P2 in one rule. A discard is a write of zeros.

use std::collections::BTreeMap;

/// Where in the journal a client's call began and ended: indexes of its marks.
#[derive(Clone, Copy, Debug)]
struct Span {
    begun: usize,
    /// `None` while it is under way.
    done: Option<usize>,
}

#[derive(Clone, Debug)]
struct Version {
    span: Span,
    content: [u8; 512],
}

/// The calls of a client, with the journal positions at which they began and ended.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// What the disk held before; zeros where nothing is said.
    initial: Vec<u8>,
    versions: BTreeMap<u64, Vec<Version>>,
    flushes: Vec<Span>,
}

impl History {
    /// Of a disk that held this before the first call.
    #[must_use]
    pub fn of(content: &[u8]) -> Self {
        Self { initial: content.to_vec(), ..Self::default() }
    }

    /// A call that changed a sector: the journal positions of its beginning and, if it was answered, its end.
    pub fn wrote(&mut self, lba: u64, content: [u8; 512], begun: usize, done: Option<usize>) {
        self.versions.entry(lba).or_default().push(Version { span: Span { begun, done }, content });
    }

    /// A flush.
    pub fn flushed(&mut self, begun: usize, done: Option<usize>) {
        self.flushes.push(Span { begun, done });
    }

    /// Says why a sector must not hold `found` when the journal is cut after `cut` events.
    ///
    /// # Errors
    /// One line that names what was permitted.
    pub fn judge(&self, lba: u64, found: &[u8; 512], cut: usize) -> Result<(), String> {
        let permitted = self.permitted(lba, cut);
        if permitted.contains(&found) {
            return Ok(());
        }
        let names: Vec<_> = permitted.iter().map(|content| crate::tagged::describe(&content[..])).collect();
        Err(format!("sector {lba} holds {}, permitted: {}", crate::tagged::describe(found), names.join(" | ")))
    }

    /// As [`History::judge`] for all of a disk.
    ///
    /// # Errors
    /// The first sector that is wrong.
    pub fn judge_disk(&self, found: &[u8], cut: usize) -> Result<(), String> {
        (0..).zip(found.as_chunks::<512>().0).try_for_each(|(lba, sector)| self.judge(lba, sector, cut))
    }

    fn permitted(&self, lba: u64, cut: usize) -> Vec<&[u8; 512]> {
        const ZERO: [u8; 512] = [0; 512];
        let versions = self.versions.get(&lba).map_or(&[][..], Vec::as_slice);
        let before_cut = |position: usize| position < cut;
        // Journal position up to which answered calls are durable.
        let durable = self.flushes.iter().filter(|flush| flush.done.is_some_and(before_cut)).map(|flush| flush.begun).max();
        let is_durable = |version: &&Version| match (version.span.done, durable) {
            (Some(done), Some(durable)) => done < durable,
            _ => false,
        };
        // A version is past once another one began after it ended and is durable.
        let last_durable_begin = versions.iter().filter(is_durable).map(|version| version.span.begun).max();
        let is_past = |done: Option<usize>| matches!((done, last_durable_begin), (Some(done), Some(begin)) if done < begin);
        let mut permitted: Vec<_> = versions
            .iter()
            .filter(|version| before_cut(version.span.begun) && !is_past(version.span.done))
            .map(|version| &version.content)
            .collect();
        if last_durable_begin.is_none() {
            permitted.push(self.initial.as_chunks().0.get(lba as usize).unwrap_or(&ZERO));
        }
        permitted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_disk_held_is_permitted_until_a_flush_and_nothing_else_is() {
        let before = [[1; 512], [2; 512]].concat();
        let mut history = History::of(&before);
        assert!(history.judge_disk(&before, 0).is_ok());
        assert!(history.judge_disk(&[[1; 512], [3; 512]].concat(), 0).is_err());
        history.wrote(1, [3; 512], 0, Some(1));
        history.flushed(2, Some(3));
        assert!(history.judge_disk(&before, 3).is_ok() && history.judge_disk(&before, 4).is_err());
    }

    #[test]
    fn flushed_writes_stay_and_later_ones_may() {
        let (a, b) = ([1; 512], [2; 512]);
        let mut history = History::default();
        history.wrote(7, a, 0, Some(2));
        history.flushed(3, Some(5));
        history.wrote(7, b, 6, Some(8));
        // Before the flush ended: nothing, or the write.
        assert!(history.judge(7, &[0; 512], 5).is_ok() && history.judge(7, &a, 5).is_ok());
        // After: the write must be there; what came later may be.
        assert!(history.judge(7, &[0; 512], 6).is_err() && history.judge(7, &a, 6).is_ok());
        assert!(history.judge(7, &b, 6).is_err() && history.judge(7, &b, 7).is_ok());
    }
}
