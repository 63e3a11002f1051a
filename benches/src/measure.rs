//! Measuring: a case is one piece of work, done in turn by a reference and by those that are compared with it.
//!
//! The machine is small and shared, so only what was measured in the same round is compared: a ratio is taken in each
//! round, and the median of the ratios counts.

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
    /// The same of the ratios to the reference in the same round.
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

/// Counted rounds of those who are only shown: without a goal, and nothing that others are judged by.
const SHOWN_ROUNDS: usize = 5;

/// Runs all subjects in turn, so many rounds after one that does not count. The first subject is the reference.
pub fn alternate(case: &str, unit: Unit, rounds: usize, subjects: &mut [Subject<'_>]) -> Result<Vec<Row>> {
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); subjects.len()];
    let references: Vec<usize> = subjects.iter().map(|subject| subject.against).collect();
    for round in 0..=rounds {
        for turn in 0..subjects.len() {
            // Everyone is first as often as the others, and comes after each neighbour.
            let turn = if round % 2 == 0 { turn } else { subjects.len() - 1 - turn };
            let index = (turn + round) % subjects.len();
            let subject = &mut subjects[index];
            let is_shown_only = subject.goals.is_empty() && !subject.is_floor && !references.contains(&index);
            if is_shown_only && round > SHOWN_ROUNDS {
                continue;
            }
            let sample = (subject.run)().with_context(|| format!("{case}: {}", subject.name))?;
            if round > 0 {
                samples[index].push(sample);
            }
        }
    }
    let row = |(subject, own): (&Subject<'_>, &Vec<Sample>)| {
        let reference = &samples[subject.against];
        let values: Vec<f64> = own.iter().map(|sample| sample.value).collect();
        let ratios: Vec<f64> = own.iter().zip(reference).map(|(own, other)| own.value / other.value).collect();
        let cpu: Option<Vec<f64>> = own.iter().map(|sample| sample.cpu).collect();
        let cpu_ratios: Option<Vec<f64>> = own.iter().zip(reference).map(|(own, other)| Some(own.cpu? / other.cpu?)).collect();
        Row {
            case: case.into(),
            subject: subject.name.clone(),
            unit,
            value: spread(&values),
            ratio: spread(&ratios),
            cpu: cpu.map(|cpu| [spread(&cpu)[0], cpu_ratios.map_or(f64::NAN, |ratios| spread(&ratios)[0])]),
            memory: own.iter().filter_map(|sample| sample.memory).max(),
            rounds: own.len(),
            is_floor: subject.is_floor,
            goals: Vec::new(),
        }
    };
    let mut rows: Vec<Row> = subjects.iter().zip(&samples).map(row).collect();
    let floor = rows.iter().find(|row| row.is_floor).cloned();
    for (row, subject) in rows.iter_mut().zip(subjects.iter()) {
        row.goals = subject.goals.iter().map(|&goal| (goal, row.judge(goal, floor.as_ref()))).collect();
    }
    Ok(rows)
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
    fn who_is_only_shown_is_measured_less_often_in_the_same_rounds() {
        let mut subjects = [rising("reference", 1.0), rising("own", 2.0).with_target(2.0), rising("peer", 3.0)];
        let rows = alternate("case", Unit::Seconds, 9, &mut subjects).unwrap();
        assert_eq!(rows.iter().map(|row| row.rounds).collect::<Vec<_>>(), [9, 9, SHOWN_ROUNDS]);
        assert_eq!((rows[1].ratio, rows[2].ratio), ([2.0; 3], [3.0; 3]));
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
