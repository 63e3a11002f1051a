//! What the end-to-end tests share: running the built command and other programs.

#![allow(dead_code, reason = "each test program uses a part of it")]

pub mod mounts;

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;
use vhd_core::Disk;
use vhd_core::chain::ChainOptions;
use vhd_testkit::crash::Random;
use vhd_testkit::tagged::Tag;

/// The folder of the project.
pub fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The built command, to be run in `folder`.
pub fn vhd_in(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhd"));
    command.current_dir(folder).stdin(Stdio::null()).env_remove("VHD_LOG");
    command
}

/// Runs the command; the arguments are one line, cut at blanks.
pub fn vhd(folder: &Path, line: &str) -> Output {
    vhd_in(folder).args(line.split_whitespace()).output().unwrap()
}

/// As [`vhd`], fed with `input`.
pub fn vhd_fed(folder: &Path, line: &str, input: &[u8]) -> Output {
    let mut command = vhd_in(folder);
    command.args(line.split_whitespace()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // A command that ends early closes the pipe: its output says why.
    let feeder = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap();
    output
}

/// Runs the command, which must succeed, and returns what it printed.
#[track_caller]
pub fn done(folder: &Path, line: &str) -> String {
    String::from_utf8(expect(vhd(folder, line), 0, line).stdout).unwrap()
}

/// Runs the command with `--json`, which must end with `status`, and returns the one document that it printed.
#[track_caller]
pub fn json(folder: &Path, line: &str, status: i32) -> Value {
    let output = expect(vhd(folder, &format!("{line} --json")), status, line);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("vhd {line}: {error}: {}", text(&output.stdout)))
}

/// Runs the command, which must fail with one line on stderr, and returns that.
#[track_caller]
pub fn refused(folder: &Path, line: &str) -> String {
    one_line(&expect(vhd(folder, line), 2, line), line)
}

/// The one line of an error.
#[track_caller]
pub fn one_line(output: &Output, line: &str) -> String {
    let said = text(&output.stderr);
    assert!(output.stdout.is_empty(), "vhd {line}: an error prints nothing on stdout");
    assert_eq!(said.lines().count(), 1, "vhd {line}: an error is one line, found {said:?}");
    assert!(said.starts_with("vhd: "), "vhd {line}: {said:?}");
    said
}

/// The output of a command that must end with `status`.
#[track_caller]
pub fn expect(output: Output, status: i32, line: &str) -> Output {
    let (out, err) = (text(&output.stdout[..output.stdout.len().min(2000)]), text(&output.stderr));
    assert_eq!(output.status.code(), Some(status), "vhd {line}: {out}{err}");
    output
}

/// What an image holds in which `vhd check` finds no error.
#[track_caller]
pub fn content_of_sound(folder: &Path, image: &str) -> Vec<u8> {
    let report = json(folder, &format!("check {image}"), 0);
    let worse = report["findings"].as_array().unwrap().iter().find(|finding| finding["severity"] == "error");
    assert!(worse.is_none(), "{image}: {worse:?}");
    let disk = Disk::open(&folder.join(image), &ChainOptions::default()).unwrap();
    let mut found = vec![0; disk.size() as usize];
    disk.read_at(&mut found, 0).unwrap();
    found
}

/// A piece to write to a disk of so many sectors, and where: near the beginning of one of a few blocks, so that blocks are
/// new, partly present, and overwritten. Its sectors say which write they are of.
pub fn tagged_piece(random: &mut Random, sectors: u64, image: u32, write: u64) -> (u64, Vec<[u8; 512]>) {
    let lba = random.below(sectors / 4096) * 4096 + random.below(64);
    let count = (1 + random.below(16)).min(sectors - lba);
    (lba, (lba..lba + count).map(|lba| Tag { image, lba, write }.sector()).collect())
}

/// A number that the environment sets.
pub fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Nothing that a test waits for takes longer, even on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Waits until something is so, but not for ever.
#[track_caller]
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < PATIENCE, "waited in vain: {what}");
        sleep(Duration::from_millis(10));
    }
}

/// Bytes as text.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs another program, which must succeed, and returns what it printed.
#[track_caller]
pub fn run<S: AsRef<OsStr>>(program: &str, arguments: &[S]) -> String {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).env("PATH", search_path());
    let output = command.output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{command:?}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// Where programs are looked for: mkfs and the like are not on every user's path.
pub fn search_path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

/// Names of the entries of a folder, in order.
pub fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The files below a folder whose names end with one of `suffixes`, build folders and hidden ones left out.
pub fn files_below(folder: &Path, suffixes: &[&str]) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() && !name.starts_with('.') && name != "target" {
                folders.push(path);
            } else if suffixes.iter().any(|suffix| name.ends_with(suffix)) {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}

/// Bytes that look like data, from a seed: a linear congruential generator.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    (0..len).map(|_| next()).collect()
}
