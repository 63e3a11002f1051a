//! Target `crash_ops`: a session from the fuzzer's bytes, and power cuts in it.

use std::sync::LazyLock;

use super::Input;
use crate::crash::Effort;
use crate::judge::{Depth, judge_run};
use crate::record::Journal;
use crate::session::{BLOCK, SECTORS, Setup, Step, run, setups};

/// Calls of a session at most: the states of a long one take too long.
const MAX_STEPS: usize = 10;

static SETUPS: LazyLock<Vec<Setup>> = LazyLock::new(setups);

fn step(input: &mut Input<'_>) -> Step {
    let kind = input.byte();
    let lba = input.number(1) % SECTORS;
    let longest = if kind & 0x80 == 0 { 4 } else { 2 * BLOCK };
    let count = (1 + input.number(1) % longest).min(SECTORS - lba);
    match kind % 8 {
        0..=2 => Step::Write { lba, count },
        3 => {
            let offset = lba * 512 + input.number(2) % 512;
            Step::WriteBytes { offset, len: (1 + input.number(2) % 1500).min(SECTORS * 512 - offset) }
        }
        4 => Step::Discard { lba, count },
        5 => Step::ZeroKeep { lba, count },
        6 if kind & 0x40 != 0 => Step::Reopen,
        _ => Step::Flush,
    }
}

/// Target `crash_ops`.
///
/// # Panics
/// When a state that a power cut may leave breaks a promise.
pub fn crash_ops(data: &[u8]) {
    let mut input = Input(data);
    let setup = &SETUPS[usize::from(input.byte()) % SETUPS.len()];
    let mut script = Vec::new();
    while !input.is_empty() && script.len() < MAX_STEPS {
        script.push(step(&mut input));
    }
    let run = run(setup, &script, &Journal::new(), 1);
    let effort = Effort { exhaustive: 3, samples: 2, seed: data.len() as u64 };
    let depth = Depth { recover_every: 10, second_crash_every: 10 };
    judge_run(setup, &run, effort, depth).unwrap_or_else(|error| panic!("{error}\n  script {script:?}"));
}
