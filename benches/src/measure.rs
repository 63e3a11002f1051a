//! Measuring: a case is one piece of work, done in turn by a reference and by those that are compared with it.
//!
//! The machine is small and shared, so only what was measured in the same round is compared: a ratio is taken in each
//! round, and the median of the ratios counts.

use anyhow::{Context, Result};
use serde::Serialize;

/// What one run of one subject gave.
#[derive(Clone, Copy, Debug, Default)]
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

/// One of those that do the work.
pub struct Subject<'a> {
    name: String,
    target: Option<f64>,
    run: Box<dyn FnMut() -> Result<Sample> + 'a>,
}

impl<'a> Subject<'a> {
    /// Someone who is compared, or the reference.
    pub fn new(name: &str, run: impl FnMut() -> Result<Sample> + 'a) -> Self {
        Self { name: name.into(), target: None, run: Box::new(run) }
    }

    /// With the ratio to the reference that it should reach.
    pub fn with_target(mut self, ratio: f64) -> Self {
        self.target = Some(ratio);
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
    /// The ratio that should be reached.
    pub target: Option<f64>,
    /// Median of the processor seconds, and of their ratios.
    pub cpu: Option<[f64; 2]>,
    /// Bytes of memory, at most.
    pub memory: Option<u64>,
}

impl Row {
    /// Whether the target is reached; `None` without one.
    pub fn is_met(&self) -> Option<bool> {
        let target = self.target?;
        Some(match self.unit {
            Unit::Seconds => self.ratio[0] <= target,
            Unit::PerSecond => self.ratio[0] >= target,
        })
    }
}

/// Runs all subjects in turn, so many rounds after one that does not count. The first subject is the reference.
pub fn alternate(case: &str, unit: Unit, rounds: usize, subjects: &mut [Subject<'_>]) -> Result<Vec<Row>> {
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); subjects.len()];
    for round in 0..=rounds {
        for turn in 0..subjects.len() {
            // Everyone is first as often as the others.
            let index = (turn + round) % subjects.len();
            let subject = &mut subjects[index];
            let sample = (subject.run)().with_context(|| format!("{case}: {}", subject.name))?;
            if round > 0 {
                samples[index].push(sample);
            }
        }
    }
    let reference = samples[0].clone();
    let row = |(subject, samples): (&Subject<'_>, &Vec<Sample>)| {
        let values: Vec<f64> = samples.iter().map(|sample| sample.value).collect();
        let ratios: Vec<f64> = samples.iter().zip(&reference).map(|(own, other)| own.value / other.value).collect();
        let cpu: Option<Vec<f64>> = samples.iter().map(|sample| sample.cpu).collect();
        let cpu_ratios: Option<Vec<f64>> =
            samples.iter().zip(&reference).map(|(own, other)| Some(own.cpu? / other.cpu?)).collect();
        Row {
            case: case.into(),
            subject: subject.name.clone(),
            unit,
            value: spread(&values),
            ratio: spread(&ratios),
            target: subject.target,
            cpu: cpu.map(|cpu| [spread(&cpu)[0], cpu_ratios.map_or(f64::NAN, |ratios| spread(&ratios)[0])]),
            memory: samples.iter().filter_map(|sample| sample.memory).max(),
        }
    };
    Ok(subjects.iter().zip(&samples).map(row).collect())
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

    #[test]
    fn ratios_are_of_the_same_round() {
        let (mut a, mut b) = (0.0, 0.0);
        let mut subjects = [
            Subject::new("reference", || {
                a += 1.0;
                Ok(Sample::of(a))
            }),
            Subject::new("twice", || {
                b += 1.0;
                Ok(Sample { value: 2.0 * b, cpu: Some(1.0), memory: Some(7) })
            })
            .with_target(2.0),
        ];
        let rows = alternate("case", Unit::Seconds, 5, &mut subjects).unwrap();
        assert_eq!((rows[1].ratio, rows[1].is_met(), rows[1].memory), ([2.0; 3], Some(true), Some(7)));
        assert_eq!((rows[0].value, rows[0].is_met()), ([4.0, 2.0, 6.0], None));
        assert_eq!(spread(&[3.0, 1.0]), [2.0, 1.0, 3.0]);
    }
}
