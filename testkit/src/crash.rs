//! Every state that a power cut may leave.
//!
//! The medium: what was synced is there; of what was not, any part may be, in any order; a sector of 512 bytes is whole;
//! a file's length and its data persist apart; bytes that never reached the medium read as zeros. Names of files persist
//! apart from their content, each change of one whole or not at all, in any order until their folder was synced.

use std::collections::{BTreeMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use crate::record::{Event, SECTOR};

/// What may be left of the files when the power fails after `cut` events.
#[derive(Clone, Debug)]
pub struct CrashState {
    /// Content of each file.
    pub files: Vec<Vec<u8>>,
    /// The file that each name leads to.
    pub names: Names,
    /// Events before the cut.
    pub cut: usize,
    /// Which of the events that were not durable reached the medium.
    pub how: String,
}

/// The numbers of files by their names.
pub type Names = BTreeMap<PathBuf, usize>;

impl CrashState {
    /// Puts the files that have a name into a folder, which is emptied first.
    ///
    /// # Panics
    /// When they can't be written.
    pub fn put_into(&self, folder: &Path) {
        put_files(folder, &self.files, &self.names);
    }
}

/// Puts files into a folder, which is emptied first; folders in it stay.
///
/// # Panics
/// When they can't be written.
pub fn put_files(folder: &Path, files: &[Vec<u8>], names: &Names) {
    empty(folder);
    for (name, file) in names {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, &files[*file]).unwrap();
    }
}

fn empty(folder: &Path) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { empty(&path) } else { std::fs::remove_file(path).unwrap() }
    }
}

/// How many states are made.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Up to this many events that are not durable, every subset is made.
    pub exhaustive: usize,
    /// Beyond it, and for torn writes, this many random ones at each cut.
    pub samples: usize,
    /// Seed of the random ones.
    pub seed: u64,
}

impl Default for Effort {
    fn default() -> Self {
        Self { exhaustive: 6, samples: 12, seed: 1 }
    }
}

/// A small generator, so that a seed gives the same states everywhere.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Starts from a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// The next 64 bits (xorshift*).
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number below `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        (self.number() >> 11) % bound
    }
}

/// A file on the medium.
#[derive(Clone, Debug)]
struct Medium {
    bytes: Vec<u8>,
}

impl Medium {
    /// Applies an event, of which only the sectors that `mask` picks arrived.
    fn apply(&mut self, event: &Event, mask: impl Fn(usize) -> bool) {
        match event {
            Event::Write { sector, data, .. } => {
                for (index, content) in data.chunks_exact(SECTOR as usize).enumerate().filter(|(index, _)| mask(*index)) {
                    let at = (*sector as usize + index) * SECTOR as usize;
                    // What lies beyond the length that arrived is lost with it.
                    let Some(room) = self.bytes.len().checked_sub(at) else { continue };
                    let len = room.min(content.len());
                    self.bytes[at..at + len].copy_from_slice(&content[..len]);
                }
            }
            Event::SetLen { len, .. } => self.bytes.resize(*len as usize, 0),
            _ => {}
        }
    }
}

/// Applies a change of a name, where there is still what it changes.
fn rename(names: &mut Names, event: &Event) {
    match event {
        Event::Create { file, name } => drop(names.insert(name.clone(), *file)),
        Event::Rename { from, to } => {
            if let Some(file) = names.remove(from) {
                names.insert(to.clone(), file);
            }
        }
        Event::Remove { name } => drop(names.remove(name)),
        _ => {}
    }
}

/// The folder whose names an event changes.
fn folder_of(event: &Event) -> Option<&Path> {
    match event {
        Event::Create { name, .. } | Event::Remove { name } | Event::Rename { to: name, .. } => name.parent(),
        _ => None,
    }
}

/// The events that are not durable at a cut.
type Loose<'a> = Vec<(usize, &'a Event)>;

/// Calls `visit` with each state that a power cut after any event may leave, each state once as long as the client was
/// told the same. Returns how many there were.
///
/// # Errors
/// The first error of `visit`, with the state's description in front.
pub fn crash_states(
    initial: &[Vec<u8>],
    events: &[Event],
    effort: Effort,
    visit: &mut dyn FnMut(&CrashState) -> Result<(), String>,
) -> Result<usize, String> {
    crash_states_from(initial, &Names::new(), events, 0, effort, visit)
}

/// The files as a process sees them after so many events.
#[must_use]
pub fn as_written(initial: &[Vec<u8>], names: &Names, events: &[Event], cut: usize) -> CrashState {
    let mut all = Durable::new(initial, names, events);
    events[..cut].iter().for_each(|event| all.apply(event, |_| true));
    let files = all.files.into_iter().map(|file| file.bytes).collect();
    CrashState { files, names: all.names, cut, how: "all of it arrived".into() }
}

/// As [`crash_states`], of files that have names, for cuts from that event on.
///
/// # Errors
/// As there.
pub fn crash_states_from(
    initial: &[Vec<u8>],
    names: &Names,
    events: &[Event],
    first: usize,
    effort: Effort,
    visit: &mut dyn FnMut(&CrashState) -> Result<(), String>,
) -> Result<usize, String> {
    let mut durable = Durable::new(initial, names, events);
    let mut loose: Loose<'_> = Vec::new();
    let mut random = Random::new(effort.seed);
    let mut seen = HashSet::new();
    let mut count = 0;
    for cut in 0..=events.len() {
        if let Some(event) = cut.checked_sub(1).map(|last| &events[last]) {
            match event {
                Event::Sync { .. } | Event::SyncFolder { .. } => durable.sync(event, &mut loose),
                // What was told changes what is permitted: the same bytes are judged again.
                Event::Mark(_) => seen.clear(),
                _ => loose.push((cut - 1, event)),
            }
        }
        if cut < first {
            continue;
        }
        for choice in choices(&loose, effort, &mut random) {
            let state = build(&durable, &loose, &choice, cut);
            let mut hasher = DefaultHasher::new();
            (&state.files, &state.names).hash(&mut hasher);
            if seen.insert(hasher.finish()) {
                count += 1;
                visit(&state)
                    .map_err(|error| format!("power cut after event {cut} of {} ({}): {error}", events.len(), state.how))?;
            }
        }
    }
    Ok(count)
}

/// What is on the medium for certain.
#[derive(Clone, Debug)]
struct Durable {
    files: Vec<Medium>,
    names: Names,
}

impl Durable {
    fn new(initial: &[Vec<u8>], names: &Names, events: &[Event]) -> Self {
        let mut files: Vec<_> = initial.iter().map(|bytes| Medium { bytes: bytes.clone() }).collect();
        let created = events.iter().filter(|event| matches!(event, Event::Create { .. })).count();
        files.resize(initial.len() + created, Medium { bytes: Vec::new() });
        Self { files, names: names.clone() }
    }

    fn apply(&mut self, event: &Event, mask: impl Fn(usize) -> bool) {
        match event {
            Event::Write { file, .. } | Event::SetLen { file, .. } => self.files[*file].apply(event, mask),
            _ => rename(&mut self.names, event),
        }
    }

    /// A barrier: what it covers is no longer loose.
    fn sync(&mut self, barrier: &Event, loose: &mut Loose<'_>) {
        loose.retain(|(_, event)| {
            let covered = match (barrier, event) {
                (Event::Sync { file }, Event::Write { file: other, .. } | Event::SetLen { file: other, .. }) => file == other,
                (Event::SyncFolder { folder }, _) => folder_of(event) == Some(folder),
                _ => false,
            };
            if covered {
                self.apply(event, |_| true);
            }
            !covered
        });
    }
}

/// Which events arrive; for torn ones, which sectors.
#[derive(Clone, Debug)]
enum Choice {
    /// Whole events, by bit.
    Whole(u64),
    /// Each sector of each event by chance.
    Torn(u64),
    /// Of this event the first sector arrived, or all but it; of the others all or nothing.
    Cut {
        /// The event.
        event: usize,
        /// The first sector arrived.
        first: bool,
        /// So did the others.
        others: bool,
    },
    /// All but one event.
    AllBut(usize),
    /// One event alone.
    Only(usize),
    /// Each event by chance.
    Some(u64),
}

fn choices(loose: &Loose<'_>, effort: Effort, random: &mut Random) -> Vec<Choice> {
    let n = loose.len();
    let mut choices = Vec::new();
    if n <= effort.exhaustive {
        choices.extend((0..1_u64 << n).map(Choice::Whole));
    } else {
        choices.extend([Choice::AllBut(usize::MAX), Choice::Only(usize::MAX)]);
        choices.extend((0..n).flat_map(|index| [Choice::AllBut(index), Choice::Only(index)]));
        choices.extend((0..effort.samples).map(|_| Choice::Some(random.number())));
    }
    let can_tear = loose.iter().any(|(_, event)| is_long(event));
    if can_tear {
        choices.extend((0..effort.samples).map(|_| Choice::Torn(random.number())));
        // What was written last is torn in each way; what was before it had its turn.
        if let Some(event) = loose.iter().rposition(|(_, event)| is_long(event)) {
            let ways = [(true, true), (true, false), (false, true), (false, false)];
            choices.extend(ways.map(|(first, others)| Choice::Cut { event, first, others }));
        }
    }
    choices
}

fn is_long(event: &Event) -> bool {
    matches!(event, Event::Write { data, .. } if data.len() as u64 > SECTOR)
}

fn build(durable: &Durable, loose: &Loose<'_>, choice: &Choice, cut: usize) -> CrashState {
    let mut medium = durable.clone();
    let mut arrived = Vec::new();
    let mut chance = match choice {
        Choice::Torn(seed) | Choice::Some(seed) => Random::new(*seed),
        _ => Random::new(0),
    };
    for (index, &(number, event)) in loose.iter().enumerate() {
        let whole = match choice {
            Choice::Whole(bits) => bits >> index & 1 == 1,
            Choice::AllBut(left_out) => index != *left_out,
            Choice::Only(one) => index == *one,
            Choice::Some(_) => chance.below(2) == 1,
            Choice::Cut { event: torn, first, others } => {
                if index == *torn {
                    medium.apply(event, |sector| (sector == 0) == *first);
                    arrived.push(format!("{number}*"));
                }
                index != *torn && *others
            }
            Choice::Torn(_) => {
                let sectors: Vec<bool> = match event {
                    Event::Write { data, .. } => (0..data.len() as u64 / SECTOR).map(|_| chance.below(2) == 1).collect(),
                    _ => vec![chance.below(2) == 1],
                };
                if sectors[0] || matches!(event, Event::Write { .. }) {
                    medium.apply(event, |sector| sectors[sector]);
                }
                arrived.push(format!("{number}*"));
                false
            }
        };
        if whole {
            medium.apply(event, |_| true);
            arrived.push(number.to_string());
        }
    }
    let how = format!("of {} loose events arrived: {}", loose.len(), arrived.join(" "));
    CrashState { files: medium.files.into_iter().map(|file| file.bytes).collect(), names: medium.names, cut, how }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(sector: u64, byte: u8) -> Event {
        Event::Write { file: 0, sector, data: vec![byte; 512] }
    }

    fn states(events: &[Event]) -> HashSet<Vec<u8>> {
        let mut states = HashSet::new();
        let mut visit = |state: &CrashState| {
            states.insert(state.files[0].chunks(512).map(|sector| sector[0]).collect());
            Ok(())
        };
        crash_states(&[vec![0; 1024]], events, Effort::default(), &mut visit).unwrap();
        states
    }

    #[test]
    fn without_a_barrier_any_order() {
        assert_eq!(states(&[write(0, 1), write(1, 2)]), HashSet::from([vec![0, 0], vec![1, 0], vec![0, 2], vec![1, 2]]));
    }

    #[test]
    fn a_barrier_orders() {
        let states = states(&[write(0, 1), Event::Sync { file: 0 }, write(1, 2)]);
        assert_eq!(states, HashSet::from([vec![0, 0], vec![1, 0], vec![1, 2]]));
    }

    #[test]
    fn length_and_data_persist_apart() {
        let states = states(&[Event::SetLen { file: 0, len: 1536 }, write(2, 3)]);
        assert_eq!(states, HashSet::from([vec![0, 0], vec![0, 0, 0], vec![0, 0, 3]]));
    }
}
