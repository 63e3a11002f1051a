//! Operations that are killed or interrupted at any moment are finished by the same command (promise P6).
//!
//! Goal: SIGKILL and SIGINT of merge, compact, resize, convert --in-place, repair and undo commit on real files lose nothing.
//! Method: the real command on images of random content, sent the signal after a random time, again and again until it comes
//! to its end; after each the image reads the same, or refuses with the command that goes on. An interrupted command says so,
//! with exit status 2.
//! `VHD_KILLS` sets how often each operation is done (3 by default), `VHD_KILL_SEED` from which seed.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::Stdio;
use std::thread::sleep;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::{done, expect, noise, number, refused, vhd, vhd_fed, vhd_in};
use vhd_testkit::crash::Random;

/// What an operation is stopped with, and when.
struct Stops {
    signal: Signal,
    random: Random,
}

/// Runs a command until it comes to its end; it is stopped sooner the first times. `look` sees what each stop left, and
/// says whether the operation was done and only its process had not ended yet. Returns how often it was stopped.
fn until_done(dir: &Path, line: &str, stops: &mut Stops, look: &dyn Fn() -> bool) -> u32 {
    let mut most = 25;
    for kills in 0.. {
        let mut command = vhd_in(dir);
        let process = command.args(line.split(' ')).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        sleep(Duration::from_millis(stops.random.below(most)));
        // One that has ended is not waited for yet, so its number is nobody else's.
        kill(Pid::from_raw(process.id().cast_signed()), stops.signal).unwrap();
        let ended = process.wait_with_output().unwrap();
        if ended.status.success() {
            return kills;
        }
        let said = String::from_utf8_lossy(&ended.stderr);
        // A signal that comes before the operation has begun ends the process as any other.
        let is_told = stops.signal == Signal::SIGINT && ended.status.code() == Some(2) && said.contains("interrupted");
        assert!(is_told || ended.status.code().is_none(), "{line}: {said}");
        if look() {
            return kills + 1;
        }
        most += most / 2;
    }
    unreachable!("it ends, or never")
}

/// Writes noise to some places of an image, and zeros over some of it.
fn scribble(dir: &Path, image: &str, random: &mut Random) {
    for at in 0..24 {
        if random.below(3) > 0 {
            let bytes = if random.below(5) == 0 { vec![0; 1 << 20] } else { noise(random.below(1 << 40), 1 << 20) };
            let at = (at << 21) + (random.below(256) << 12);
            expect(vhd_fed(dir, &format!("write {image} --offset {at}"), &bytes), 0, "write");
        }
    }
}

/// Keeps the content of an image as `expected.img`.
fn keep(dir: &Path, image: &str) {
    done(dir, &format!("convert {image} expected.img --overwrite"));
}

/// Fails unless the image reads the same, or says which command goes on.
fn same_or_refused(dir: &Path, image: &str, advice: &str) {
    let compared = vhd(dir, &format!("compare {image} expected.img"));
    if compared.status.code() == Some(2) {
        let said = String::from_utf8_lossy(&compared.stderr).into_owned();
        assert!(!advice.is_empty() && said.contains(advice), "{image}: {said}");
        return;
    }
    assert_eq!(compared.status.code(), Some(0), "{image}: {}", String::from_utf8_lossy(&compared.stdout));
}

/// True when no operation is under way.
fn has_no_record(dir: &Path) -> bool {
    !support::names_in(dir).iter().any(|name| name.contains("intent"))
}

fn each(what: &str, operation: &dyn Fn(&Path, &mut Stops) -> u32) {
    let first = number("VHD_KILL_SEED", 1);
    for signal in [Signal::SIGKILL, Signal::SIGINT] {
        let mut kills = 0;
        for seed in first..first + number("VHD_KILLS", 3) {
            let folder = tempfile::tempdir().unwrap();
            kills += operation(folder.path(), &mut Stops { signal, random: Random::new(seed) });
            let left = support::names_in(folder.path());
            let is_left = left.iter().any(|name| name.contains("intent") || name.contains("converting"));
            assert!(!is_left, "{what}, {signal}, seed {seed}: {left:?}");
        }
        println!("{what}: survived {signal} {kills} times");
    }
}

#[test]
fn a_killed_merge_is_finished_by_the_same_command() {
    each("merge", &|dir, stops| {
        done(dir, "create base.vhd --size 64M");
        scribble(dir, "base.vhd", &mut stops.random);
        done(dir, "create mid.vhd --parent base.vhd");
        scribble(dir, "mid.vhd", &mut stops.random);
        done(dir, "create leaf.vhd --parent mid.vhd");
        scribble(dir, "leaf.vhd", &mut stops.random);
        keep(dir, "leaf.vhd");
        let kills = until_done(dir, "merge leaf.vhd --into base.vhd --delete", stops, &|| {
            if dir.join("leaf.vhd").exists() {
                same_or_refused(dir, "leaf.vhd", "vhd merge");
            }
            !dir.join("leaf.vhd").exists() && has_no_record(dir)
        });
        same_or_refused(dir, "base.vhd", "");
        assert!(!dir.join("leaf.vhd").exists() && !dir.join("mid.vhd").exists());
        done(dir, "check base.vhd");
        kills
    });
}

#[test]
fn a_killed_compact_changes_nothing_and_is_finished() {
    each("compact", &|dir, stops| {
        done(dir, "create disk.vhd --size 64M");
        scribble(dir, "disk.vhd", &mut stops.random);
        scribble(dir, "disk.vhd", &mut stops.random);
        keep(dir, "disk.vhd");
        let kills = until_done(dir, "compact disk.vhd --realign", stops, &|| {
            same_or_refused(dir, "disk.vhd", "");
            done(dir, "check disk.vhd");
            false
        });
        same_or_refused(dir, "disk.vhd", "");
        done(dir, "check --deep disk.vhd");
        kills
    });
}

#[test]
fn a_killed_resize_leaves_the_old_size_or_the_new() {
    for kind in ["dynamic", "fixed"] {
        each(&format!("resize, {kind}"), &|dir, stops| {
            done(dir, &format!("create disk.vhd --size 64M --type {kind}"));
            scribble(dir, "disk.vhd", &mut stops.random);
            keep(dir, "disk.vhd");
            let mut kills = 0;
            // The table of 2 TiB is where the first blocks are.
            for size in if kind == "dynamic" { ["2000G", "64M"] } else { ["90G", "64M"] } {
                kills += until_done(dir, &format!("resize disk.vhd {size} --shrink"), stops, &|| {
                    let read = vhd(dir, "read disk.vhd --offset 0 --length 64M");
                    if read.status.success() {
                        assert!(read.stdout == std::fs::read(dir.join("expected.img")).unwrap());
                    } else {
                        assert!(refused(dir, "read disk.vhd --offset 0 --length 1").contains("vhd resize"));
                    }
                    false
                });
            }
            same_or_refused(dir, "disk.vhd", "");
            done(dir, "check disk.vhd");
            kills
        });
    }
}

#[test]
fn a_killed_conversion_in_place_is_finished_by_the_same_command() {
    for (from, to) in [("dynamic", "fixed"), ("fixed", "dynamic")] {
        each(&format!("convert --in-place, {from} to {to}"), &|dir, stops| {
            done(dir, &format!("create disk.vhd --size 64M --type {from}"));
            scribble(dir, "disk.vhd", &mut stops.random);
            keep(dir, "disk.vhd");
            let kills = until_done(dir, &format!("convert --in-place --to {to} disk.vhd"), stops, &|| {
                same_or_refused(dir, "disk.vhd", "--in-place");
                has_no_record(dir) && done(dir, "info disk.vhd").contains(&format!("type          {to}"))
            });
            same_or_refused(dir, "disk.vhd", "");
            done(dir, "check --deep disk.vhd");
            kills
        });
    }
}

#[test]
fn a_killed_undo_commit_is_all_or_nothing() {
    each("undo commit", &|dir, stops| {
        for image in ["a", "b"] {
            done(dir, &format!("create {image}.vhd --size 64M"));
            scribble(dir, &format!("{image}.vhd"), &mut stops.random);
        }
        done(dir, "undo start a.vhd b.vhd");
        for image in ["a", "b"] {
            scribble(dir, &format!("{image}.vud"), &mut stops.random);
            done(dir, &format!("convert {image}.vud {image}.img"));
        }
        let kills = until_done(dir, "undo commit a.vhd b.vhd", stops, &|| !dir.join("a.vud").exists() && has_no_record(dir));
        for image in ["a", "b"] {
            done(dir, &format!("compare {image}.vhd {image}.img"));
            done(dir, &format!("check {image}.vhd"));
        }
        kills
    });
}

/// Lets all blocks of an image claim the place of the first: a repair gives each a copy.
fn entangle(path: &Path) -> Vec<u8> {
    let mut bytes = std::fs::read(path).unwrap();
    let bat = u64::from_be_bytes(bytes[512 + 16..][..8].try_into().unwrap()) as usize;
    let first = bytes[bat..].chunks(4).find(|entry| *entry != [0xFF; 4]).unwrap().to_vec();
    for block in 0..32 {
        bytes[bat + 4 * block..][..4].copy_from_slice(&first);
    }
    std::fs::write(path, &bytes).unwrap();
    bytes
}

#[test]
fn a_killed_repair_begins_again_and_can_be_taken_back() {
    each("repair", &|dir, stops| {
        done(dir, "create disk.vhd --size 64M");
        scribble(dir, "disk.vhd", &mut stops.random);
        let damaged = entangle(&dir.join("disk.vhd"));
        let kills = until_done(dir, "check disk.vhd --repair=all", stops, &|| {
            let found = vhd(dir, "read disk.vhd --offset 0 --length 1");
            let untouched = std::fs::read(dir.join("disk.vhd")).unwrap() == damaged;
            let said = String::from_utf8_lossy(&found.stderr).into_owned();
            assert!(untouched || found.status.success() || said.contains("--repair"), "{said}");
            found.status.success() && !untouched
        });
        done(dir, "check disk.vhd");
        let kills = kills
            + until_done(dir, "check disk.vhd --undo-repair", stops, &|| {
                has_no_record(dir) && !dir.join("disk.vhd.vhd-repair-undo").exists()
            });
        assert!(std::fs::read(dir.join("disk.vhd")).unwrap() == damaged);
        kills
    });
}
