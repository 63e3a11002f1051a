//! What some sectors of an image hold: runs of them, so that a terabyte of zeros is one entry.

use std::collections::BTreeMap;
use std::ops::Range;

use vhd_testkit::tagged::Tag;

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    Zeros,
    /// Its own tag, of this write.
    Tag(u64),
}

impl Held {
    pub fn sector(self, lba: u64) -> [u8; 512] {
        match self {
            Self::Zeros => [0; 512],
            Self::Tag(write) => Tag { image: 1, lba, write }.sector(),
        }
    }
}

/// Runs of sectors by their first one, with the end of each.
#[derive(Clone, Debug, Default)]
pub struct Sectors(BTreeMap<u64, (u64, Held)>);

impl Sectors {
    pub fn get(&self, lba: u64) -> Option<Held> {
        let (_, (end, held)) = self.0.range(..=lba).next_back()?;
        (lba < *end).then_some(*held)
    }

    pub fn runs(&self) -> impl DoubleEndedIterator<Item = (Range<u64>, Held)> {
        self.0.iter().map(|(start, (end, held))| (*start..*end, *held))
    }

    pub fn put(&mut self, range: Range<u64>, held: Held) {
        if range.is_empty() {
            return;
        }
        self.part_at(range.start);
        self.part_at(range.end);
        let behind = self.0.split_off(&range.end);
        self.0.split_off(&range.start);
        self.0.extend(behind);
        self.0.insert(range.start, (range.end, held));
    }

    /// Forgets what is from `end` on.
    pub fn cut(&mut self, end: u64) {
        self.part_at(end);
        self.0.split_off(&end);
    }

    /// Puts all that `upper` holds over it.
    pub fn lay(&mut self, upper: &Self) {
        upper.runs().for_each(|(range, held)| self.put(range, held));
    }

    /// Makes two runs of one that goes past a sector.
    fn part_at(&mut self, lba: u64) {
        if let Some((_, (end, held))) = self.0.range_mut(..lba).next_back()
            && *end > lba
        {
            let rest = (*end, *held);
            *end = lba;
            self.0.insert(lba, rest);
        }
    }
}

#[test]
fn runs_say_what_single_sectors_would() {
    const END: u64 = 60;
    let mut random = vhd_testkit::crash::Random::new(1);
    let (mut runs, mut plain) = (Sectors::default(), vec![None; END as usize]);
    for write in 0..20_000 {
        let start = random.below(END);
        let end = start + random.below(END - start + 1);
        let held = if random.below(3) == 0 { Held::Zeros } else { Held::Tag(write) };
        match random.below(10) {
            0 => {
                runs.cut(start);
                plain[start as usize..].fill(None);
            }
            1 => {
                let mut upper = Sectors::default();
                upper.put(start..end, held);
                upper.put(start / 2..end / 2, Held::Zeros);
                runs.lay(&upper);
                plain[start as usize..end as usize].fill(Some(held));
                plain[start as usize / 2..end as usize / 2].fill(Some(Held::Zeros));
            }
            _ => {
                runs.put(start..end, held);
                plain[start as usize..end as usize].fill(Some(held));
            }
        }
        assert!((0..END).all(|lba| runs.get(lba) == plain[lba as usize]), "{runs:?}");
    }
}
