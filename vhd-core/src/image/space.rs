//! Space in the file that no block holds.
//!
//! It comes in two kinds, and the type says which, because they ask for different care:
//! *fresh* space was grown by this process since it opened the image and never used, so it reads as zeros and will
//! after a power cut; *recycled* space is everything else that no BAT entry names, and may hold another place's bytes
//! until it is zeroed and a barrier made that durable.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::format::SECTOR;
use crate::layout::Layout;

/// Room for one block, and what is known of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    /// Reads as zeros, also after a power cut. A BAT entry may name it once the file's length is durable.
    Fresh(u32),
    /// Holds anything. It must be zeroed or fully overwritten, and made durable, before a BAT entry names it.
    Recycled(u32),
}

impl Slot {
    /// First sector of the slot: its BAT entry.
    pub(super) fn sector(self) -> u32 {
        match self {
            Self::Fresh(sector) | Self::Recycled(sector) => sector,
        }
    }
}

/// All free space of an image.
#[derive(Debug, Default)]
pub(super) struct Space {
    /// Recycled ranges, start to end, never adjacent.
    recycled: BTreeMap<u64, u64>,
    /// What is left of the space that this process grew.
    fresh: Range<u64>,
}

impl Space {
    /// Adds a recycled range.
    pub(super) fn recycle(&mut self, mut range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        if let Some((&start, &end)) = self.recycled.range(..range.start).next_back()
            && end >= range.start
        {
            range = start..end.max(range.end);
        }
        while let Some((&start, &end)) = self.recycled.range(range.start..).next()
            && start <= range.end
        {
            range.end = range.end.max(end);
            self.recycled.remove(&start);
        }
        self.recycled.insert(range.start, range.end);
    }

    /// Replaces the fresh range. What was left of the old one is recycled: it is zeros, but nobody will remember.
    pub(super) fn set_fresh(&mut self, fresh: Range<u64>) {
        let old = std::mem::replace(&mut self.fresh, fresh);
        self.recycle(old);
    }

    /// A slot, recycled before fresh; `None` when the file must grow.
    pub(super) fn take(&mut self, layout: &Layout) -> Option<Slot> {
        self.take_recycled(layout).map(Slot::Recycled).or_else(|| self.take_fresh(layout).map(Slot::Fresh))
    }

    fn take_recycled(&mut self, layout: &Layout) -> Option<u32> {
        let fits = |start: u64, end: u64| start + layout.slot_len() <= end;
        let (start, end, slot) = self.recycled.iter().find_map(|(&start, &end)| {
            // A slot that an older layout freed may have no room for alignment: then it is used as it is.
            let aligned = layout.aligned_slot_start(start);
            let slot = if fits(aligned, end) { aligned } else { start.next_multiple_of(SECTOR) };
            fits(slot, end).then_some((start, end, slot))
        })?;
        let sector = to_sector(slot)?;
        self.recycled.remove(&start);
        // Rests that hold no slot are forgotten: millions of them would make every search slow.
        for rest in [start..slot, slot + layout.slot_len()..end] {
            if rest.start + layout.slot_len() <= rest.end {
                self.recycled.insert(rest.start, rest.end);
            }
        }
        Some(sector)
    }

    fn take_fresh(&mut self, layout: &Layout) -> Option<u32> {
        let slot = layout.aligned_slot_start(self.fresh.start);
        let end = slot + layout.slot_len();
        if self.fresh.is_empty() || end > self.fresh.end {
            return None;
        }
        let sector = to_sector(slot)?;
        self.fresh.start = end;
        Some(sector)
    }

    /// Forgets all space from `end` on: the file was cut there.
    pub(super) fn cut(&mut self, end: u64) {
        self.fresh = 0..0;
        self.recycled.split_off(&end);
        if let Some((_, last)) = self.recycled.iter_mut().next_back() {
            *last = end.min(*last);
        }
    }

    /// Where the free space at the end of the file begins, when the file ends at `end`.
    pub(super) fn tail_start(&self, end: u64) -> u64 {
        let mut tail = if self.fresh.is_empty() { end } else { self.fresh.start };
        // Alignment leaves gaps of less than a page between a block and the next.
        while let Some((&start, &gap_end)) = self.recycled.range(..tail).next_back()
            && gap_end + crate::layout::DATA_ALIGNMENT >= tail
        {
            tail = start;
        }
        tail
    }
}

/// The sector at a byte, where a BAT entry can name it.
fn to_sector(offset: u64) -> Option<u32> {
    u32::try_from(offset / SECTOR).ok().filter(|&sector| sector != crate::format::BAT_UNUSED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_become_one() {
        let mut space = Space::default();
        space.recycle(10..20);
        space.recycle(30..40);
        space.recycle(20..30);
        space.recycle(5..12);
        assert_eq!(space.recycled, BTreeMap::from([(5, 40)]));
    }

    #[test]
    fn recycled_space_is_used_first_and_never_called_fresh() {
        let layout = Layout::new(1 << 30, 4096);
        let mut space = Space::default();
        space.set_fresh(1 << 20..(1 << 20) + 3 * 8192);
        space.recycle(4096..4096 + 8192);
        assert_eq!(space.take(&layout), Some(Slot::Recycled((8192 - 512) / 512)));
        let Some(Slot::Fresh(first)) = space.take(&layout) else { panic!("no fresh slot") };
        assert_eq!(layout.data_offset(first) % 4096, 0);
        assert!(matches!(space.take(&layout), Some(Slot::Fresh(_))));
        assert!(matches!(space.take(&layout), Some(Slot::Fresh(_))));
        assert_eq!(space.take(&layout), None);
    }

    #[test]
    fn a_packed_slot_is_reused_in_place() {
        let layout = Layout::new(1 << 30, 2 << 20);
        let mut space = Space::default();
        space.recycle(2048..2048 + layout.slot_len());
        assert_eq!(space.take(&layout), Some(Slot::Recycled(4)));
        assert!(space.recycled.is_empty());
    }
}
