//! What the hot functions cost, in instructions and system calls: numbers that neither load nor clocks change.
//!
//! Goal: a change that makes a read, a write, an allocation, layout arithmetic, zero detection or a scan of the BAT dearer is
//! seen at once. Method: the same work is done N and 3N times under valgrind's callgrind (instructions) and under strace
//! (calls); the difference, by 2N, is what one costs. The bounds are what was counted, and a third more for other compilers and
//! C libraries. A bound that is too wide (the count is below half of it) fails too, so that what was gained is kept.

#![allow(missing_docs, clippy::unwrap_used)]

use std::process::Command;

use vhd_testkit::tools;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vhd-benches");

/// Runs a tool on the work done so many times; what it says.
fn told(tool: &[&str], name: &str, times: u64) -> String {
    let output = Command::new(tool[0]).args(&tool[1..]).args([PROGRAM, "--guard", name, &times.to_string()]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{name}: {text}");
    text
}

/// Instructions of all that a run did.
fn instructions(name: &str, times: u64) -> u64 {
    let text = told(&["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"], name, times);
    let line = text.lines().find_map(|line| line.split_once("Collected :")).unwrap_or_else(|| panic!("{text}"));
    line.1.trim().parse().unwrap()
}

fn cost(name: &str, times: u64) -> u64 {
    instructions(name, 3 * times).saturating_sub(instructions(name, times)) / (2 * times)
}

#[test]
fn hot_functions_cost_no_more_instructions_than_they_did() {
    if tools::require("valgrind").is_none() {
        return;
    }
    // Of a build as tests have it (`opt-level = 1`).
    let bounds = [
        ("read", 1000, 660),
        ("read-through-layers", 1000, 1_950),
        ("overwrite", 1000, 690),
        ("allocate", 100, 6_800),
        ("layout", 1000, 160),
        ("zero-detection", 20, 130_000),
        ("bat-scan", 4, 1_300_000),
    ];
    let mut wrong = Vec::new();
    for (name, times, bound) in bounds {
        let cost = cost(name, times);
        println!("{name}: {cost} instructions, at most {bound}");
        if cost > bound || cost * 2 < bound {
            wrong.push(format!("{name}: {cost} instructions, expected {} to {bound}", bound / 2));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("; "));
}

/// Calls of each kind that a run made.
fn calls(name: &str, times: u64, call: &str) -> u64 {
    let text = told(&["strace", "-f", "-c", "-e", &format!("trace={call}")], name, times);
    // Time, seconds, microseconds, calls, perhaps errors, and the name.
    let lines = text.lines().filter(|line| call.split(',').any(|call| line.ends_with(&format!(" {call}"))));
    lines.map(|line| line.split_whitespace().nth(3).unwrap().parse::<u64>().unwrap()).sum()
}

#[test]
fn one_request_is_one_system_call_and_an_allocation_two() {
    if tools::require("strace").is_none() {
        return;
    }
    let all = "pread64,preadv,pwrite64,pwritev,ftruncate,fallocate,fdatasync,lseek,futex";
    // A tenth of an allocation's calls are the file's growth: a length and a footer for each batch.
    for (name, times, most) in
        [("read", 500, 1.0), ("read-through-layers", 500, 1.0), ("overwrite", 500, 1.0), ("allocate", 100, 2.5)]
    {
        let count = |times| calls(name, times, all) as f64;
        let each = (count(3 * times) - count(times)) / (2 * times) as f64;
        println!("{name}: {each} calls");
        // The background flush of metadata may come in between.
        assert!((0.9..=most + 0.1).contains(&each), "{name}: {each} calls for each, expected {most}");
    }
}
