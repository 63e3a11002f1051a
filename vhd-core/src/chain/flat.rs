//! Who holds what in the layers that nobody writes, found once and remembered: so that a read through many layers costs what
//! one through a few does.
//!
//! Parents do not change while a chain is open, nor does a leaf that was opened for reading, so what was found stays true. A
//! stretch of the disk is remembered when it is asked for the second time: random reads over a disk that is far larger than
//! the memory for this gain nothing from looking at whole stretches.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;
use smallvec::SmallVec;

use crate::error::Result;
use crate::format::SECTOR;
use crate::image::RunKind;

/// Bytes of a stretch: few enough that where every page is another layer's the runs take two lines of a processor's cache, as
/// waiting for those is most of what a look costs.
const STRETCH: u64 = 64 << 10;
/// Stretches that are remembered and forgotten together. A few thousand lists for a disk are found in cache, where one for
/// each stretch would not be.
const REGION: u64 = 128;
/// Runs that are remembered for one chain: of 8 bytes each, so 32 MiB.
const CAPACITY: usize = 4 << 20;
const SHARDS: usize = 16;
/// What a region costs besides its runs, in runs.
const OVERHEAD: usize = REGION as usize / 2 + 8;

/// A run that ends where the next one begins, in one word, as many are looked through: from the top the first sector
/// from the stretch's beginning, the depth, the kind, and for what is present the sector in the layer's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FlatRun(u64);

const PRESENT: u64 = 0;
const ZERO: u64 = 1;
const ABSENT: u64 = 2;

impl FlatRun {
    /// `None` for what begins inside a sector, lies beyond 2 TiB or deeper than chains are: that is found anew each time.
    fn new(start: u64, depth: usize, kind: RunKind) -> Option<Self> {
        let (kind, offset) = match kind {
            RunKind::Present(offset) => (PRESENT, offset),
            RunKind::Zero => (ZERO, 0),
            RunKind::Absent => (ABSENT, 0),
        };
        let sector = u64::from(u32::try_from(offset / SECTOR).ok()?);
        let depth = u64::try_from(depth).ok().filter(|depth| *depth < 1 << 12)?;
        let is_whole = start % SECTOR == 0 && offset % SECTOR == 0;
        is_whole.then_some(Self((start / SECTOR) << 48 | depth << 36 | kind << 34 | sector))
    }

    /// From the stretch's beginning, in bytes.
    fn start(self) -> u64 {
        (self.0 >> 48) * SECTOR
    }

    fn depth(self) -> usize {
        (self.0 >> 36 & 0xFFF) as usize
    }

    /// Who holds what is `within` bytes from its start.
    fn kind(self, within: u64) -> RunKind {
        match self.0 >> 34 & 3 {
            PRESENT => RunKind::Present((self.0 & 0xFFFF_FFFF) * SECTOR + within),
            ZERO => RunKind::Zero,
            _ => RunKind::Absent,
        }
    }

    /// True when `next` goes on where this one ends.
    fn goes_on(self, next: Self) -> bool {
        self.depth() == next.depth() && self.kind(next.start() - self.start()) == next.kind(0)
    }
}

/// What is remembered of neighbouring stretches.
#[derive(Debug)]
struct Region {
    stretches: [Stretch; REGION as usize],
    /// Those of all stretches, in the order in which they became known, each stretch's in the order of the disk.
    runs: Vec<FlatRun>,
}

/// What is known of a stretch, in four bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stretch {
    New,
    SeenOnce,
    /// Its first run, and how many: no stretch has more than sectors, so a region no more than 2^14 runs.
    Known {
        first: u16,
        count: u8,
    },
}

impl Region {
    fn new() -> Box<Self> {
        Box::new(Self { stretches: [Stretch::New; REGION as usize], runs: Vec::new() })
    }

    fn runs(&self, first: u16, count: u8) -> &[FlatRun] {
        self.runs.get(usize::from(first)..usize::from(first) + usize::from(count)).unwrap_or_default()
    }

    /// Notes the runs of a stretch, if someone else has not done so meanwhile.
    fn keep(&mut self, index: usize, runs: &[FlatRun]) {
        let (Ok(first), Ok(count)) = (u16::try_from(self.runs.len()), u8::try_from(runs.len())) else { return };
        if !matches!(self.stretches[index], Stretch::Known { .. }) {
            self.runs.extend_from_slice(runs);
            self.stretches[index] = Stretch::Known { first, count };
        }
    }

    fn cost(&self) -> usize {
        OVERHEAD + self.runs.capacity()
    }
}

#[derive(Debug, Default)]
struct Shard {
    regions: FxHashMap<u64, Box<Region>>,
    cost: usize,
}

/// What is remembered of the parents of one chain.
#[derive(Debug, Default)]
pub(super) struct FlatCache {
    shards: Box<[Mutex<Shard>; SHARDS]>,
}

/// Calls of this kind tell the runs of a range: bytes of the disk, depth, who holds them.
pub(super) type Visit<'a> = &'a mut dyn FnMut(Range<u64>, usize, RunKind) -> Result<()>;

impl FlatCache {
    /// Calls `visit` with the runs of `range`. `resolve` finds those that are not remembered, of any range.
    pub(super) fn resolve(
        &self,
        range: Range<u64>,
        resolve: &dyn Fn(Range<u64>, Visit<'_>) -> Result<()>,
        visit: Visit<'_>,
    ) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let number = at / STRETCH;
            let whole = number * STRETCH..(number + 1) * STRETCH;
            let part = at..range.end.min(whole.end);
            at = part.end;
            let (from, to) = (part.start - whole.start, part.end - whole.start);
            let runs = match self.find(number, from..to) {
                Found::Known(runs) => runs,
                Found::New => {
                    resolve(part, visit)?;
                    continue;
                }
                Found::SeenOnce => {
                    let Some(runs) = flatten(&whole, resolve)? else {
                        resolve(part, visit)?;
                        continue;
                    };
                    let few = runs_of(&runs, from..to);
                    self.keep(number, &runs);
                    few
                }
            };
            visit_part(&runs, &whole, part, visit)?;
        }
        Ok(())
    }

    fn shard(&self, region: u64) -> MutexGuard<'_, Shard> {
        self.shards[(region % SHARDS as u64) as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is remembered of `part` of a stretch. It is copied: data is moved under no lock.
    fn find(&self, number: u64, part: Range<u64>) -> Found {
        let (region, index) = (number / REGION, (number % REGION) as usize);
        let mut shard = self.shard(region);
        let Some(region) = shard.regions.get_mut(&region) else {
            shard.change(region, |region| region.stretches[index] = Stretch::SeenOnce);
            return Found::New;
        };
        match region.stretches[index] {
            Stretch::Known { first, count } => Found::Known(runs_of(region.runs(first, count), part)),
            Stretch::SeenOnce => Found::SeenOnce,
            Stretch::New => {
                region.stretches[index] = Stretch::SeenOnce;
                Found::New
            }
        }
    }

    fn keep(&self, number: u64, runs: &[FlatRun]) {
        let (region, index) = (number / REGION, (number % REGION) as usize);
        self.shard(region).change(region, |region| region.keep(index, runs));
    }
}

/// As many as a stretch has of pages.
type FewRuns = SmallVec<[FlatRun; 16]>;

enum Found {
    New,
    SeenOnce,
    Known(FewRuns),
}

/// The runs of a stretch that a part of it touches, and the next one, which says where the last of them ends.
fn runs_of(runs: &[FlatRun], part: Range<u64>) -> FewRuns {
    let first = runs.partition_point(|run| run.start() <= part.start).saturating_sub(1);
    let rest = runs.get(first..).unwrap_or_default();
    let count = rest.iter().position(|run| run.start() >= part.end).map_or(rest.len(), |index| index + 1);
    SmallVec::from_slice(&rest[..count])
}

impl Shard {
    /// Changes a region, which is made where there is none.
    fn change(&mut self, number: u64, change: impl FnOnce(&mut Region)) {
        let region = self.regions.entry(number).or_insert_with(|| {
            self.cost += OVERHEAD;
            Region::new()
        });
        let before = region.cost();
        change(region);
        self.cost += region.cost() - before;
        self.make_room();
    }

    /// Forgets a quarter, whichever, once there is too much.
    fn make_room(&mut self) {
        let most = CAPACITY / SHARDS;
        if self.cost <= most {
            return;
        }
        let over = self.cost - most * 3 / 4;
        let mut freed = 0;
        self.regions.retain(|_, region| {
            let stays = freed >= over;
            freed += if stays { 0 } else { region.cost() };
            stays
        });
        self.cost -= freed;
    }
}

/// Resolves a whole stretch. Neighbours that are one run become one.
fn flatten(whole: &Range<u64>, resolve: &dyn Fn(Range<u64>, Visit<'_>) -> Result<()>) -> Result<Option<Vec<FlatRun>>> {
    let mut runs: Option<Vec<FlatRun>> = Some(Vec::new());
    resolve(whole.clone(), &mut |range, depth, kind| {
        match (FlatRun::new(range.start - whole.start, depth, kind), &mut runs) {
            (Some(run), Some(runs)) if !runs.last().is_some_and(|last| last.goes_on(run)) => runs.push(run),
            (None, runs) => *runs = None,
            _ => {}
        }
        Ok(())
    })?;
    Ok(runs)
}

/// Calls `visit` with what `runs` say of a part; they are those of [`runs_of`].
fn visit_part(runs: &[FlatRun], whole: &Range<u64>, part: Range<u64>, visit: Visit<'_>) -> Result<()> {
    for (index, run) in runs.iter().enumerate() {
        let start = whole.start + run.start();
        let end = runs.get(index + 1).map_or(whole.end, |next| whole.start + next.start());
        let piece = start.max(part.start)..end.min(part.end);
        if piece.is_empty() {
            break;
        }
        let kind = run.kind(piece.start - start);
        visit(piece, run.depth(), kind)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    type Runs = Vec<(Range<u64>, usize, RunKind)>;

    /// Every 1024 bytes another layer, as far as it goes.
    fn striped(range: Range<u64>, visit: Visit<'_>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let end = (at / 1024 * 1024 + 1024).min(range.end);
            let kind = match at / 1024 % 3 {
                0 => RunKind::Present(at + 512),
                1 => RunKind::Zero,
                _ => RunKind::Absent,
            };
            visit(at..end, (at / 3072 % 5) as usize, kind)?;
            at = end;
        }
        Ok(())
    }

    fn runs(cache: &FlatCache, range: Range<u64>, resolve: &dyn Fn(Range<u64>, Visit<'_>) -> Result<()>) -> Runs {
        let mut runs = Runs::new();
        let mut visit = |range, depth, kind| {
            runs.push((range, depth, kind));
            Ok(())
        };
        cache.resolve(range, resolve, &mut visit).unwrap();
        runs
    }

    #[test]
    fn what_is_remembered_is_what_was_found() {
        let cache = FlatCache::default();
        let size = 3 * STRETCH + 12_800;
        // Stretch by stretch, as runs are cut where stretches meet.
        let expected = |range: Range<u64>| {
            let mut all = Runs::new();
            let mut at = range.start;
            while at < range.end {
                let end = range.end.min((at / STRETCH + 1) * STRETCH);
                striped(at..end, &mut |range, depth, kind| {
                    all.push((range, depth, kind));
                    Ok(())
                })
                .unwrap();
                at = end;
            }
            all
        };
        for turn in 0..4 {
            for start in [0, 1, 999, 1000, STRETCH - 1, STRETCH, 2 * STRETCH + 500, size - 1] {
                for len in [1, 512, 4096, STRETCH + 3, size] {
                    let range = start..size.min(start + len);
                    assert_eq!(runs(&cache, range.clone(), &striped), expected(range), "turn {turn}");
                }
            }
        }
    }

    #[test]
    fn a_stretch_is_resolved_whole_the_second_time_and_never_again() {
        let (cache, asked) = (FlatCache::default(), Cell::new(0));
        let resolve = |range: Range<u64>, visit: Visit<'_>| {
            asked.set(asked.get() + (range.end - range.start));
            striped(range, visit)
        };
        for expected in [512, 512 + STRETCH, 512 + STRETCH] {
            runs(&cache, 4096..4608, &resolve);
            assert_eq!(asked.get(), expected);
        }
    }

    #[test]
    fn what_begins_inside_a_sector_is_found_each_time() {
        let cache = FlatCache::default();
        let odd = |range: Range<u64>, visit: Visit<'_>| {
            let end = range.end.min(700).max(range.start);
            visit(range.start..end, 1, RunKind::Present(range.start))?;
            visit(end..range.end, 1, RunKind::Zero)
        };
        for _ in 0..3 {
            let expected = [(600..700, 1, RunKind::Present(600)), (700..900, 1, RunKind::Zero)];
            assert_eq!(runs(&cache, 600..900, &odd), expected);
        }
    }

    #[test]
    fn memory_is_bounded() {
        let cache = FlatCache::default();
        // Every sector another run: the most that a stretch can have.
        let worst = |range: Range<u64>, visit: Visit<'_>| {
            (range.start / 512..range.end / 512).try_for_each(|n| visit(n * 512..n * 512 + 512, n as usize % 7, RunKind::Zero))
        };
        for number in 0..40_000 {
            for _ in 0..2 {
                runs(&cache, number * STRETCH..number * STRETCH + 512, &worst);
            }
        }
        for shard in &*cache.shards {
            let shard = shard.lock().unwrap();
            assert!(shard.cost <= CAPACITY / SHARDS);
            assert_eq!(shard.cost, shard.regions.values().map(|region| region.cost()).sum::<usize>());
        }
    }
}
