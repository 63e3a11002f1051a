//! Measuring: a case is one piece of work, done in turn by a reference and by those that are compared with it.
//!
//! The machine is small and shared, so only what was measured in the same round is compared: a ratio is taken in each
//! round, and the median of the ratios counts. Where the rounds can't tell on which side of its goal a median is, there are
//! more of them; that asks the same of those above as of those below.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// What one run of one subject gave.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct Sample {
    /// Seconds, or things a second: as the case has it.
    pub value: f64,
    /// Processor seconds, where they are known.
    pub cpu: Option<f64>,
    /// Bytes of memory at most, where they are known.
    pub memory: Option<u64>,
}

impl Sample {
    /// A value alone.
    pub fn of(value: f64) -> Self {
        Self { value, ..Self::default() }
    }
}

/// What the value of a case is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// Less is better.
    Seconds,
    /// More is better.
    PerSecond,
}

/// What should be reached.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Goal {
    /// The ratio to the reference: at least, or for times at most.
    Ratio(f64),
    /// The ratio of processor time, at most.
    Cpu(f64),
    /// The value itself: at least, or for times at most.
    Value(f64),
    /// Bytes of memory, at most.
    Memory(u64),
}

/// Whether it is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It is.
    Met,
    /// It is not.
    Missed,
    /// It is not, and a floor in the same table misses it too: what that reaches.
    Limit(f64),
}

/// One of those that do the work.
pub struct Subject<'a> {
    name: String,
    goals: Vec<Goal>,
    against: usize,
    is_floor: bool,
    run: Box<dyn FnMut() -> Result<Sample> + 'a>,
}

impl<'a> Subject<'a> {
    /// Someone who is compared, or the reference.
    pub fn new(name: &str, run: impl FnMut() -> Result<Sample> + 'a) -> Self {
        Self { name: name.into(), goals: Vec::new(), against: 0, is_floor: false, run: Box::new(run) }
    }

    /// With the ratio to the reference that it should reach.
    pub fn with_target(self, ratio: f64) -> Self {
        self.with(Goal::Ratio(ratio))
    }

    /// With something that it should reach.
    pub fn with(mut self, goal: Goal) -> Self {
        self.goals.push(goal);
        self
    }

    /// The same work with nothing of ours in it: where this misses a goal too, the kernel is the limit.
    pub fn being_floor(mut self) -> Self {
        self.is_floor = true;
        self
    }

    /// Compared with the subject of this index, not with the first.
    pub fn against(mut self, index: usize) -> Self {
        self.against = index;
        self
    }
}

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was done.
    pub case: String,
    /// By whom.
    pub subject: String,
    /// What the values are.
    pub unit: Unit,
    /// Median, least and most of the values.
    pub value: [f64; 3],
    /// Median of the ratios to the reference in the same round, and its [`interval`].
    pub ratio: [f64; 3],
    /// Median of the processor seconds, and of their ratios.
    pub cpu: Option<[f64; 2]>,
    /// Bytes of memory, at most.
    pub memory: Option<u64>,
    /// How often it was measured.
    pub rounds: usize,
    /// This shows what the kernel can do.
    pub is_floor: bool,
    /// What should be reached, and whether it is.
    pub goals: Vec<(Goal, Verdict)>,
}

impl Row {
    /// How far it is from the goal's kind of thing, and whether less is better.
    fn reached(&self, goal: Goal) -> (f64, f64, bool) {
        let is_time = self.unit == Unit::Seconds;
        match goal {
            Goal::Ratio(wanted) => (self.ratio[0], wanted, is_time),
            Goal::Cpu(wanted) => (self.cpu.map_or(f64::NAN, |cpu| cpu[1]), wanted, true),
            Goal::Value(wanted) => (self.value[0], wanted, is_time),
            Goal::Memory(most) => (self.memory.map_or(f64::NAN, |bytes| bytes as f64), most as f64, true),
        }
    }

    fn meets(&self, goal: Goal) -> bool {
        let (reached, wanted, less_is_better) = self.reached(goal);
        if less_is_better { reached <= wanted } else { reached >= wanted }
    }

    fn judge(&self, goal: Goal, floor: Option<&Self>) -> Verdict {
        match floor {
            _ if self.meets(goal) => Verdict::Met,
            Some(floor) if !floor.meets(goal) && !floor.reached(goal).0.is_nan() => Verdict::Limit(floor.reached(goal).0),
            _ => Verdict::Missed,
        }
    }
}

/// So many times the rounds at most, where a goal is near.
pub const MORE: usize = 6;

/// What was measured of a subject, and of the one that it is compared with, by rounds.
struct Measured<'a> {
    own: &'a [Sample],
    reference: &'a [Sample],
}

impl Measured<'_> {
    fn pairs<'a>(&'a self, of: impl Fn(&Sample) -> Option<f64> + 'a) -> impl Iterator<Item = f64> + 'a {
        self.own.iter().zip(self.reference).filter_map(move |(own, other)| Some(of(own)? / of(other)?))
    }

    fn values(&self) -> Vec<f64> {
        self.own.iter().map(|sample| sample.value).collect()
    }

    fn ratios(&self) -> Vec<f64> {
        self.pairs(|sample| Some(sample.value)).collect()
    }

    fn cpu_ratios(&self) -> Vec<f64> {
        self.pairs(|sample| sample.cpu).collect()
    }

    /// True when more rounds may move the median to the other side of the goal.
    fn is_open(&self, goal: Goal) -> bool {
        let (series, wanted) = match goal {
            Goal::Ratio(wanted) => (self.ratios(), wanted),
            Goal::Cpu(wanted) => (self.cpu_ratios(), wanted),
            Goal::Value(wanted) => (self.values(), wanted),
            Goal::Memory(_) => return false,
        };
        let [_, low, high] = interval(&series);
        low < wanted && wanted < high
    }

    fn row(&self, case: &str, unit: Unit, subject: &Subject<'_>) -> Row {
        let cpu: Option<Vec<f64>> = self.own.iter().map(|sample| sample.cpu).collect();
        Row {
            case: case.into(),
            subject: subject.name.clone(),
            unit,
            value: spread(&self.values()),
            ratio: interval(&self.ratios()),
            cpu: cpu.map(|cpu| [spread(&cpu)[0], spread(&self.cpu_ratios())[0]]),
            memory: self.own.iter().filter_map(|sample| sample.memory).max(),
            rounds: self.own.len(),
            is_floor: subject.is_floor,
            goals: Vec::new(),
        }
    }
}

fn measured<'a>(subjects: &'a [Subject<'_>], samples: &'a [Vec<Sample>]) -> impl Iterator<Item = Measured<'a>> {
    subjects.iter().zip(samples).map(|(subject, own)| Measured { own, reference: &samples[subject.against] })
}

/// Runs all subjects in turn, so many rounds after one that does not count, and up to [`MORE`] times as many while a goal is near
/// (but for those who are only shown: without a goal, and nothing that others are judged by). The first subject is the reference.
pub fn alternate(case: &str, unit: Unit, rounds: usize, subjects: &mut [Subject<'_>]) -> Result<Vec<Row>> {
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); subjects.len()];
    let references: Vec<usize> = subjects.iter().map(|subject| subject.against).collect();
    for round in 0..=rounds * MORE {
        if round > rounds && round % rounds == 1 % rounds {
            let is_open =
                |(subject, measured): (&Subject<'_>, Measured<'_>)| subject.goals.iter().any(|&goal| measured.is_open(goal));
            if !subjects.iter().zip(measured(subjects, &samples)).any(is_open) {
                break;
            }
        }
        for turn in 0..subjects.len() {
            // Everyone is first as often as the others, and comes after each neighbour.
            let turn = if round % 2 == 0 { turn } else { subjects.len() - 1 - turn };
            let index = (turn + round) % subjects.len();
            let subject = &mut subjects[index];
            let is_shown_only = subject.goals.is_empty() && !subject.is_floor && !references.contains(&index);
            if is_shown_only && round > rounds {
                continue;
            }
            let sample = (subject.run)().with_context(|| format!("{case}: {}", subject.name))?;
            if round > 0 {
                samples[index].push(sample);
            }
        }
    }
    let all = subjects.iter().zip(measured(subjects, &samples));
    let mut rows: Vec<Row> = all.map(|(subject, measured)| measured.row(case, unit, subject)).collect();
    let floor = rows.iter().find(|row| row.is_floor).cloned();
    for (row, subject) in rows.iter_mut().zip(subjects.iter()) {
        row.goals = subject.goals.iter().map(|&goal| (goal, row.judge(goal, floor.as_ref()))).collect();
    }
    Ok(rows)
}

/// The median, and between what values that of ever more rounds lies with a probability of 95 in a hundred, whatever their distribution: so
/// many of them are on either side of it as of tosses of a coin. Of 5 values, the least and the most.
fn interval(values: &[f64]) -> [f64; 3] {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let count = sorted.len();
    // 1.96 deviations of the number of values below the median.
    let skipped = (count as f64 / 2.0 - 0.98 * (count as f64).sqrt()).floor().max(0.0) as usize;
    let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
    [spread(values)[0], at(skipped), at(count.saturating_sub(1 + skipped))]
}

/// Median, least and most.
fn spread(values: &[f64]) -> [f64; 3] {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let median = match sorted.as_slice() {
        [] => f64::NAN,
        sorted if sorted.len() % 2 == 1 => sorted[middle],
        sorted => f64::midpoint(sorted[middle - 1], sorted[middle]),
    };
    [median, sorted.first().copied().unwrap_or(f64::NAN), sorted.last().copied().unwrap_or(f64::NAN)]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A subject that gives `factor` times the number of the round.
    fn rising<'a>(name: &str, factor: f64) -> Subject<'a> {
        let mut round = 0.0;
        Subject::new(name, move || {
            round += 1.0;
            Ok(Sample { value: factor * round, cpu: Some(factor), memory: Some(7) })
        })
    }

    #[test]
    fn ratios_are_of_the_same_round() {
        let mut subjects = [rising("reference", 1.0), rising("twice", 2.0).with_target(2.0).with(Goal::Memory(6))];
        let rows = alternate("case", Unit::Seconds, 5, &mut subjects).unwrap();
        assert_eq!((rows[1].ratio, rows[1].memory), ([2.0; 3], Some(7)));
        assert_eq!(rows[1].goals, [(Goal::Ratio(2.0), Verdict::Met), (Goal::Memory(6), Verdict::Missed)]);
        assert_eq!((rows[0].value, rows[0].goals.len()), ([4.0, 2.0, 6.0], 0));
        assert_eq!(spread(&[3.0, 1.0]), [2.0, 1.0, 3.0]);
    }

    #[test]
    fn a_goal_that_the_rounds_leave_open_has_more_of_them_until_it_is_not() {
        let after = |open: usize| {
            let mut round = 0;
            // On both sides of the goal, and then always above it.
            let values = move || {
                round += 1;
                Ok(Sample::of(if round > open { 1.02 } else { [0.9, 1.1][round % 2] }))
            };
            let peer = rising("peer", 3.0);
            let mut subjects =
                [Subject::new("reference", || Ok(Sample::of(1.0))), Subject::new("own", values).with_target(1.0), peer];
            let rows = alternate("case", Unit::PerSecond, 5, &mut subjects).unwrap();
            assert_eq!((rows[0].rounds, rows[2].rounds), (rows[1].rounds, 5));
            (rows[1].rounds, rows[1].goals[0].1)
        };
        assert_eq!(after(0), (5, Verdict::Met));
        assert_eq!(after(6), (15, Verdict::Met), "5 of 15 are on both sides");
        assert_eq!(after(1000).0, 5 * MORE);
        let mut below = [rising("reference", 1.0), rising("own", 0.9).with_target(1.0).with(Goal::Cpu(0.9))];
        let rows = alternate("case", Unit::PerSecond, 5, &mut below).unwrap();
        assert_eq!((rows[1].rounds, rows[1].goals[0].1, rows[1].goals[1].1), (5, Verdict::Missed, Verdict::Met));
    }

    #[test]
    fn the_interval_of_a_median_is_that_of_its_ranks() {
        let values = |count: u32| (1..=count).rev().map(f64::from).collect::<Vec<_>>();
        assert_eq!(interval(&values(5)), [3.0, 1.0, 5.0]);
        // A table of such intervals has 14 to 27 for 40 values, and 10 to 21 for 30.
        assert_eq!(interval(&values(40)), [20.5, 14.0, 27.0]);
        assert_eq!(interval(&values(30)), [15.5, 10.0, 21.0]);
        assert!(interval(&[]).iter().all(|value| value.is_nan()));
    }

    #[test]
    fn a_goal_that_the_floor_misses_too_is_a_limit() {
        let mut subjects = [
            rising("1 thread", 1.0),
            rising("2 threads", 1.1).with_target(1.8).with(Goal::Cpu(1.0)),
            rising("bare, 1 thread", 4.0),
            rising("bare, 2 threads", 5.0).against(2).being_floor(),
        ];
        let rows = alternate("case", Unit::PerSecond, 3, &mut subjects).unwrap();
        assert_eq!(rows[3].ratio[0], 1.25);
        let verdicts: Vec<Verdict> = rows[1].goals.iter().map(|goal| goal.1).collect();
        assert_eq!(verdicts, [Verdict::Limit(1.25), Verdict::Limit(1.25)]);
        let mut subjects = [rising("raw", 1.0), rising("own", 1.5).with_target(1.8), rising("bare", 2.0).being_floor()];
        let rows = alternate("case", Unit::PerSecond, 3, &mut subjects).unwrap();
        assert_eq!(rows[1].goals[0].1, Verdict::Missed);
    }
}
