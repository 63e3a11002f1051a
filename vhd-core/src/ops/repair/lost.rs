//! What a repair gives up: all of it is told, and of millions of blocks neighbours together.

use std::ops::Range;

/// Sentences about one block or two; what is given up of more is told of neighbours together.
const MOST_LINES: usize = 10_000;
/// Ranges of such blocks; beyond that they are told with blocks between them that nothing is wrong with.
const MOST_RANGES: usize = 10_000;

/// What becomes of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// Its BAT entry named a place where no block can be.
    Impossible,
    /// Its end is beyond the end of the file.
    Cut,
    /// The footer lay over it.
    OverFooter,
    /// It shares bytes with others.
    Shared,
    /// It shared bytes with others, which keep them.
    Dropped,
}

impl Fate {
    fn sentence(self) -> &'static str {
        match self {
            Self::Impossible => "their BAT entries named places where no block can be; they read as never written",
            Self::Cut => "their last bytes are beyond the end of the file, and read as zeros",
            Self::OverFooter => "the footer was over their bytes, which hold that now",
            Self::Shared => "each shares bytes with a neighbour in the file; what it reads there may be wrong",
            Self::Dropped => "they shared bytes with others, which keep them; they read as never written",
        }
    }
}

/// What was given up so far.
#[derive(Debug, Default)]
pub(super) struct Lost {
    lines: Vec<String>,
    /// Blocks of one fate, and how many of them.
    ranges: Vec<(Fate, Range<u32>, u64)>,
}

impl Lost {
    pub(super) fn is_empty(&self) -> bool {
        self.lines.is_empty() && self.ranges.is_empty()
    }

    /// What is not about single blocks.
    pub(super) fn note(&mut self, what: String) {
        self.lines.push(what);
    }

    /// What becomes of some blocks; `text` says it where there are not too many.
    pub(super) fn blocks(&mut self, fate: Fate, blocks: &[u32], text: impl FnOnce() -> String) {
        if self.lines.len() < MOST_LINES {
            return self.lines.push(text());
        }
        blocks.iter().for_each(|block| self.range(fate, *block..*block + 1));
    }

    /// What becomes of neighbours.
    pub(super) fn range(&mut self, fate: Fate, blocks: Range<u32>) {
        let count = u64::from(blocks.end - blocks.start);
        let is_full = self.ranges.len() >= MOST_RANGES;
        let same =
            self.ranges.iter_mut().rev().take(8).find(|(other, range, _)| {
                *other == fate && (is_full || (range.start <= blocks.end && blocks.start <= range.end))
            });
        match same {
            Some((_, range, _)) if range.start <= blocks.start && blocks.end <= range.end && !is_full => {}
            Some((_, range, counted)) => {
                *range = range.start.min(blocks.start)..range.end.max(blocks.end);
                *counted += count;
            }
            None => self.ranges.push((fate, blocks, count)),
        }
    }

    pub(super) fn into_list(self) -> Vec<String> {
        let mut list = self.lines;
        list.extend(self.ranges.into_iter().map(|(fate, blocks, count)| {
            let (first, last) = (blocks.start, blocks.end - 1);
            let of = if count < u64::from(blocks.end - blocks.start) { format!("{count} of the ") } else { String::new() };
            format!("{of}blocks {first} to {last}: {}", fate.sentence())
        }));
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_millions_of_blocks_each_is_told_and_the_list_stays_short() {
        let mut lost = Lost::default();
        (0..1_000_000).for_each(|block| lost.blocks(Fate::Cut, &[block], || format!("block {block}: cut")));
        let list = lost.into_list();
        assert_eq!(list.len(), MOST_LINES + 1);
        assert!(list[MOST_LINES].starts_with("blocks 10000 to 999999: their last bytes"), "{}", list[MOST_LINES]);
        let mut lost = Lost::default();
        (0..1_000_000).step_by(2).for_each(|block| lost.blocks(Fate::Dropped, &[block], || format!("block {block}: gone")));
        let list = lost.into_list();
        assert_eq!(list.len(), MOST_LINES + MOST_RANGES);
        assert!(list[list.len() - 1].contains(" of the blocks ") && list[list.len() - 1].contains(" to 999998: "));
    }
}
