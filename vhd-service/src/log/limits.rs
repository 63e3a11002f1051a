//! How much may be logged in a time: what clients do makes no log grow as they like.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

use tracing::Level;
use tracing::callsite::Identifier;

use super::line_of;

/// The time for which lines are counted.
const PERIOD: Duration = Duration::from_secs(10);
/// Lines that are alike in a period, and all lines of a level.
const MOST: Allowance = Allowance { alike: 10, all: 50 };
/// The same where the period before was too short for all that came: it goes on as it was.
const BUSY: Allowance = Allowance { alike: 1, all: 10 };
/// Who asks for details gets so many times more.
const DETAILS: u32 = 100;
/// Sorts of lines that are told apart at once.
const MAX_SORTS: usize = 256;
/// Bytes of a line that stands for those that were not logged.
const MAX_SAMPLE: usize = 200;

struct Allowance {
    alike: u32,
    all: u32,
}

/// Where in the program a line comes from.
#[derive(Clone, Debug)]
pub(super) struct Kind {
    pub(super) level: Level,
    pub(super) place: Identifier,
}

/// What was logged in this period.
#[derive(Debug, Default)]
pub(super) struct Limits {
    sorts: HashMap<u64, Sort>,
    levels: HashMap<Level, Period>,
}

/// Lines that are alike.
#[derive(Debug)]
struct Sort {
    period: Period,
    level: Level,
    sample: String,
}

#[derive(Debug)]
struct Period {
    began: Instant,
    left: u32,
    /// Lines that were not logged.
    over: u64,
}

impl Period {
    fn new(now: Instant, left: u32) -> Self {
        Self { began: now, left, over: 0 }
    }

    fn take(&mut self) -> bool {
        let taken = self.left > 0;
        if taken {
            self.left -= 1
        } else {
            self.over += 1
        }
        taken
    }

    fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.began) >= PERIOD
    }
}

impl Limits {
    /// Whether this line is logged, or counted.
    pub(super) fn admit(&mut self, kind: &Kind, line: &[u8], now: Instant) -> bool {
        let times = if kind.level > Level::INFO { DETAILS } else { 1 };
        let key = sort_of(kind, line);
        if self.sorts.len() < MAX_SORTS || self.sorts.contains_key(&key) {
            let new =
                || Sort { period: Period::new(now, MOST.alike * times), level: kind.level, sample: sample(kind.level, line) };
            if !self.sorts.entry(key).or_insert_with(new).period.take() {
                return false;
            }
        }
        self.levels.entry(kind.level).or_insert_with(|| Period::new(now, MOST.all * times)).take()
    }

    /// Ends the periods that are over, or all of them; what is to be said of lines that were not logged.
    pub(super) fn end_periods(&mut self, all: bool, now: Instant) -> Vec<Vec<u8>> {
        let mut said = Vec::new();
        self.sorts.retain(|_, sort| {
            let over = sort.period.over;
            if !all && !sort.period.is_over(now) {
                return true;
            }
            if over > 0 {
                said.push(line_of(sort.level, &format!("{over} more like this were not logged: {}", sort.sample)));
                sort.period = Period::new(now, BUSY.alike);
            }
            over > 0
        });
        self.levels.retain(|level, period| {
            let over = period.over;
            if !all && !period.is_over(now) {
                return true;
            }
            if over > 0 {
                said.push(line_of(*level, &format!("{over} more lines were not logged")));
                *period = Period::new(now, BUSY.all);
            }
            over > 0
        });
        said
    }

    /// How long until a period ends after which there is something to say, or to forget.
    pub(super) fn next_end(&self, now: Instant) -> Option<Duration> {
        let periods = self.sorts.values().map(|sort| &sort.period).chain(self.levels.values());
        periods.map(|period| (period.began + PERIOD).saturating_duration_since(now)).min()
    }
}

/// Lines are alike that come from one place in the program and differ in nothing but numbers.
fn sort_of(kind: &Kind, line: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    kind.place.hash(&mut hasher);
    line.iter().filter(|byte| !byte.is_ascii_hexdigit()).for_each(|byte| byte.hash(&mut hasher));
    hasher.finish()
}

/// The text of a line, without its level and colours.
fn sample(level: Level, line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let text = text.split_once(level.as_str()).map_or(&*text, |(_, text)| text);
    text.trim_start_matches("\x1b[0m").trim().chars().take(MAX_SAMPLE).collect()
}

#[cfg(test)]
mod tests {
    use tracing::callsite::{Callsite, Identifier};
    use tracing::{Metadata, subscriber::Interest};

    use super::*;

    struct Place(u8);

    impl Callsite for Place {
        fn set_interest(&self, _: Interest) {
            assert!(self.0 < 2);
        }

        fn metadata(&self) -> &Metadata<'_> {
            unreachable!("nobody asks")
        }
    }

    static PLACES: [Place; 2] = [Place(0), Place(1)];

    fn kind(level: Level, place: usize) -> Kind {
        Kind { level, place: Identifier(&PLACES[place]) }
    }

    fn said(limits: &mut Limits, now: Instant) -> Vec<String> {
        limits.end_periods(false, now).into_iter().map(|line| String::from_utf8(line).unwrap()).collect()
    }

    #[test]
    fn of_lines_alike_a_few_are_logged_in_a_period_and_the_rest_is_counted() {
        let (mut limits, mut now) = (Limits::default(), Instant::now());
        let error = kind(Level::ERROR, 0);
        let flood = |limits: &mut Limits, now| {
            let line = |n: u32| format!("ERROR a.vhd: can't be read at {n:#x}: Input/output error\n").into_bytes();
            (0..1000).filter(|n| limits.admit(&error, &line(*n), now)).count()
        };
        assert_eq!(flood(&mut limits, now), 10);
        assert!(limits.admit(&kind(Level::ERROR, 0), b"ERROR other.vhd: is full\n", now), "another is logged");
        assert!(limits.admit(&kind(Level::ERROR, 1), b"ERROR a.vhd: can't be read at 1\n", now), "from another place, too");
        assert!(said(&mut limits, now).is_empty());
        assert_eq!(limits.next_end(now), Some(PERIOD));
        now += PERIOD;
        let expected = "ERROR 990 more like this were not logged: a.vhd: can't be read at 0x0: Input/output error\n";
        assert_eq!(said(&mut limits, now), [expected]);
        // Who goes on has one line in the next period; who was silent for one has them all.
        assert_eq!(flood(&mut limits, now), 1);
        now += PERIOD;
        assert_eq!(said(&mut limits, now).len(), 1);
        now += PERIOD;
        assert!(said(&mut limits, now).is_empty() && limits.next_end(now).is_none(), "nothing is kept");
        assert_eq!(flood(&mut limits, now), 10);
    }

    #[test]
    fn lines_that_all_differ_have_an_end_too_and_take_no_memory() {
        let (mut limits, now) = (Limits::default(), Instant::now());
        let letter = |n: u32| char::from(b'g' + (n % 20) as u8);
        let line = |n: u32| [letter(n), letter(n / 20), letter(n / 400)].iter().collect::<String>().into_bytes();
        let logged = |limits: &mut Limits, level| (0..8000).filter(|n| limits.admit(&kind(level, 0), &line(*n), now)).count();
        assert_eq!(logged(&mut limits, Level::INFO), 50);
        assert_eq!(limits.sorts.len(), MAX_SORTS);
        assert!(limits.admit(&kind(Level::ERROR, 0), b"is told", now), "each level has its own");
        assert_eq!(said(&mut limits, now + PERIOD), [" INFO 7950 more lines were not logged\n"]);
        assert_eq!(logged(&mut limits, Level::DEBUG), 5000, "who asks for details gets them");
    }

    #[test]
    fn colours_are_no_part_of_a_sample() {
        assert_eq!(sample(Level::WARN, b"\x1b[33m WARN\x1b[0m a.vhd: is full\n"), "a.vhd: is full");
        assert_eq!(sample(Level::WARN, b" WARN a.vhd: is full\n"), "a.vhd: is full");
    }
}
