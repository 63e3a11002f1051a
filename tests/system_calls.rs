//! What the kernel is asked for, and in which order, as strace sees it.
//!
//! Goal: a file that is made bears its name only when it is durable (assumption A7 in docs/crash-consistency.md), and we
//! sync less often than QEMU for the same writes (promise P4), a new file only once. Method: strace on the real commands;
//! orders and counts, never times.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::Command;

use support::{done, json};

/// The calls that a command makes, one line each; `None` where there is no strace. In CI there must be.
fn calls(folder: &Path, command: &[&str]) -> Option<Vec<String>> {
    vhd_testkit::tools::require("strace")?;
    let trace = folder.join("trace");
    let filter = "trace=openat,pwritev,pwrite64,pwritev2,fsync,fdatasync,fadvise64,rename,renameat,renameat2,linkat,link,unlink";
    let output = Command::new("strace")
        .current_dir(folder)
        .args(["-f", "-y", "-e", filter, "-o"])
        .arg(&trace)
        .args(command)
        .output()
        .unwrap();
    assert!(output.status.success(), "{command:?}: {}", support::text(&output.stderr));
    Some(std::fs::read_to_string(trace).unwrap().lines().map(str::to_owned).collect())
}

/// Position of the last line that holds all of `words`.
fn last(calls: &[String], words: &[&str]) -> usize {
    let found = calls.iter().rposition(|line| words.iter().all(|word| line.contains(word)));
    found.unwrap_or_else(|| panic!("no call with {words:?} in\n{}", calls.join("\n")))
}

#[test]
fn a_new_file_is_durable_before_it_has_its_name() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("source.raw"), vec![7; 5 << 20]).unwrap();
    let vhd = env!("CARGO_BIN_EXE_vhd");
    let commands = [
        vec![vhd, "create", "new.vhd", "--size", "10M"],
        vec![vhd, "create", "fixed.vhd", "--size", "10M", "--type", "fixed"],
        vec![vhd, "create", "child.vhd", "--parent", "new.vhd"],
        vec![vhd, "convert", "source.raw", "converted.vhd"],
        vec![vhd, "convert", "converted.vhd", "back.raw"],
    ];
    for command in commands {
        let Some(calls) = calls(folder.path(), &command) else { return };
        let written = last(&calls, &["pwrite", ".vhd-new"]);
        let synced = last(&calls, &["fdatasync", ".vhd-new"]);
        let named = calls.iter().rposition(|line| line.contains("rename") || line.contains("link(") || line.contains("linkat("));
        let named = named.unwrap_or_else(|| panic!("no rename in\n{}", calls.join("\n")));
        let folder_synced = calls.iter().rposition(|line| line.contains("fsync(") && !line.contains(".vhd-new")).unwrap();
        assert!(written < synced && synced < named && named < folder_synced, "{command:?}:\n{}", calls.join("\n"));
    }
}

#[test]
fn a_new_file_is_synced_once_and_goes_to_the_disk_while_it_is_made() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("source.raw"), vec![7; 9 << 20]).unwrap();
    let vhd = env!("CARGO_BIN_EXE_vhd");
    let kind = Command::new("stat").args(["-f", "-c", "%T"]).arg(folder.path()).output().unwrap();
    let is_memory = kind.stdout.starts_with(b"tmpfs");
    let commands = [
        vec![vhd, "convert", "source.raw", "dynamic.vhd"],
        vec![vhd, "convert", "source.raw", "fixed.vhd", "--to", "fixed"],
        vec![vhd, "convert", "dynamic.vhd", "back.raw"],
    ];
    for command in commands {
        let Some(calls) = calls(folder.path(), &command) else { return };
        let count = |call: &str| calls.iter().filter(|line| line.contains(call) && line.contains(".vhd-new")).count();
        let all = calls.join("\n");
        assert_eq!(count("fdatasync("), 1, "{command:?}:\n{all}");
        // A hint for each large write, and none where there is no disk.
        let large = if is_memory { 0 } else { 9 };
        assert_eq!(count("fadvise64("), large, "{command:?}:\n{all}");
    }
}

#[test]
fn we_sync_less_often_than_qemu_for_the_same_writes() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path();
    let syncs = |calls: &[String]| calls.iter().filter(|line| line.contains("fdatasync(") || line.contains("fsync(")).count();
    // Sixteen writes of 64 KiB, each to another block: new blocks first, then the same again in place.
    let offsets: Vec<u64> = (0..16).map(|block| block * (2 << 20) + (block % 3) * 65536).collect();
    done(place, "create theirs.vhd --size 64M");
    done(place, "create ours.vhd --size 64M");
    let image = place.join("theirs.vhd");
    let options = "driver=vpc,file.driver=file,file.filename=".to_owned() + image.to_str().unwrap();
    let commands: Vec<String> = offsets.iter().map(|offset| format!("write -P 7 {offset} 64k")).collect();
    let mut qemu = vec!["qemu-io", "--image-opts", &options];
    commands.iter().for_each(|command| qemu.extend(["-c", command]));
    qemu.extend(["-c", "flush"]);
    let ours = Path::new(env!("CARGO_BIN_EXE_vhd")).to_str().unwrap();
    // One command of ours per pass: the bytes from the first write's beginning to the last one's end.
    let input = place.join("input");
    std::fs::write(&input, vec![7; (offsets[15] + 65536) as usize]).unwrap();
    let shell = format!("{ours} write ours.vhd --offset 0 < input");
    for pass in ["new blocks", "overwrites"] {
        let (Some(theirs), Some(mine)) = (calls(place, &qemu), calls(place, &["sh", "-c", &shell])) else { return };
        let (theirs, mine) = (syncs(&theirs), syncs(&mine));
        println!("{pass}: qemu-io {theirs} syncs, vhd {mine}");
        // Opening and closing sync too; still it is a handful, not some for each block.
        assert!(mine <= 5 && theirs > mine, "{pass}: qemu-io {theirs} syncs, vhd {mine}");
    }
    assert_eq!(json(place, "check ours.vhd", 0)["ok"], true);
}
