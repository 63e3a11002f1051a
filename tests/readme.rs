//! The README says what is so, and the images beside it are what they should be.
//!
//! Goal: what a newcomer types gives what the page shows. Method: the page's examples are run, in order, in a copy of
//! testdata/, and their output compared, but for what differs each time (identifiers, times, room on the host's disk).
//! With `README_UPDATE=1` the page is written anew instead. The images of testdata/ are hashed and read.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use support::{done, mounts, project, run, search_path, text};
use vhd_testkit::tools::require;

/// The examples of a page, each a list of commands with the output that the page shows.
fn examples(page: &str) -> Vec<Vec<(String, String)>> {
    let blocks = page.split("```console\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let parse = |block: &str| {
        let mut commands: Vec<(String, String)> = Vec::new();
        for line in block.lines() {
            match line.strip_prefix("$ ") {
                Some(command) => commands.push((command.to_owned(), String::new())),
                None => commands.last_mut().unwrap().1.push_str(&format!("{line}\n")),
            }
        }
        commands
    };
    blocks.map(parse).collect()
}

/// Output without what differs each time.
fn lasting(output: &str) -> String {
    let words = |line: &str| {
        let line = line.split_once(" bytes), ").filter(|_| line.starts_with("file ")).map_or(line, |(before, _)| before);
        let words = line.split(' ').map(|word| {
            let is_uuid = word.len() == 36 && word.matches('-').count() == 4;
            let is_time = word.len() == 20 && word.starts_with("20") && word.ends_with('Z');
            if is_uuid || is_time { "..." } else { word }
        });
        words.collect::<Vec<_>>().join(" ")
    };
    output.lines().map(words).collect::<Vec<_>>().join("\n")
}

/// Runs a line as a shell would, and returns all that it said.
fn shell(folder: &Path, line: &str) -> String {
    let bin = Path::new(env!("CARGO_BIN_EXE_vhd")).parent().unwrap().display().to_string();
    let mut command = Command::new("bash");
    command.args(["-c", &format!("exec 2>&1; {line}")]).current_dir(folder);
    let output = command
        .env("PATH", format!("{bin}:{}", search_path()))
        .env("LC_ALL", "C.UTF-8")
        .env("XDG_STATE_HOME", folder.join(".state"))
        .output()
        .unwrap();
    text(&output.stdout)
}

/// Whether what an example needs is there; in CI it must be.
fn can_run(example: &[(String, String)]) -> bool {
    let has = |wanted: &str| example.iter().any(|(command, _)| command.split_whitespace().any(|word| word == wanted));
    let tools = ["nbdcopy", "nbdinfo"].into_iter().filter(|tool| has(tool));
    (!has("mount") || mounts::possible(&[])) && tools.map(require).all(|tool| tool.is_some())
}

/// What an example that failed in the middle may have left mounted.
struct Unmount<'a>(&'a Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        shell(self.0, "umount -q -l files; vhd unmount disk || umount -q -l disk");
    }
}

#[test]
fn the_examples_print_what_the_page_shows() {
    let path = project().join("README.md");
    let mut page = fs::read_to_string(&path).unwrap();
    let folder = tempfile::tempdir().unwrap();
    copy_images(folder.path());
    let _unmount = Unmount(folder.path());
    let mut wrong = Vec::new();
    for example in examples(&page.clone()) {
        if !can_run(&example) {
            continue;
        }
        for (command, shown) in example {
            let said = shell(folder.path(), &command);
            if lasting(&said) != lasting(&shown) {
                page = page.replacen(&format!("$ {command}\n{shown}"), &format!("$ {command}\n{said}"), 1);
                wrong.push(format!("$ {command}\nshown:\n{shown}found:\n{said}"));
            }
        }
    }
    if std::env::var_os("README_UPDATE").is_some() {
        fs::write(&path, page).unwrap();
        return;
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn its_two_commands_are_there() {
    let page = fs::read_to_string(project().join("README.md")).unwrap();
    let commands: Vec<_> = page.split("```sh\n").skip(1).map(|rest| rest.lines().next().unwrap()).collect();
    assert_eq!(commands, ["./demo", "./test"]);
    for command in commands.into_iter().chain([".ci/run", ".ci/install", "testdata/make"]) {
        run("bash", &["-n", project().join(command).to_str().unwrap()]);
        run("test", &["-x", project().join(command).to_str().unwrap()]);
    }
}

const IMAGES: [&str; 4] = ["dynamic.vhd", "child.vhd", "fixed.vhd", "qemu.vhd"];

fn copy_images(folder: &Path) {
    for image in IMAGES {
        fs::copy(project().join("testdata").join(image), folder.join(image)).unwrap();
    }
}

#[test]
fn the_images_are_those_that_were_made() {
    let testdata = project().join("testdata");
    run("bash", &["-c", "cd \"$0\" && sha256sum --check --strict SHA256SUMS", testdata.to_str().unwrap()]);
    let folder = tempfile::tempdir().unwrap();
    copy_images(folder.path());
    for line in fs::read_to_string(testdata.join("SHA256SUMS.disks")).unwrap().lines() {
        let (hash, image) = line.split_once("  ").unwrap();
        done(folder.path(), &format!("check --deep {image}"));
        done(folder.path(), &format!("convert --overwrite {image} disk.raw"));
        let found = run("sha256sum", &[folder.path().join("disk.raw").to_str().unwrap()]);
        assert!(found.starts_with(hash), "{image} holds another disk: {found}");
    }
}

#[test]
fn the_images_hold_their_files() {
    let folder = tempfile::tempdir().unwrap();
    let testdata = project().join("testdata");
    copy_images(folder.path());
    for (image, offset, changed) in
        [("dynamic.vhd", 32768, None), ("child.vhd", 32768, Some("child-tree")), ("fixed.vhd", 0, None), ("qemu.vhd", 0, None)]
    {
        let expected = tempfile::tempdir().unwrap();
        for tree in ["tree"].into_iter().chain(changed) {
            let from = format!("{}/.", testdata.join(tree).display());
            run("cp", &["-R", &from, expected.path().to_str().unwrap()]);
        }
        if changed.is_some() {
            fs::remove_file(expected.path().join("latest-letter")).unwrap();
            std::os::unix::fs::symlink("letters/2000-01-03.txt", expected.path().join("latest-letter")).unwrap();
        }
        done(folder.path(), &format!("convert --overwrite {image} disk.raw"));
        let files = tempfile::tempdir().unwrap();
        let disk = format!("{}?offset={offset}", folder.path().join("disk.raw").display());
        run("debugfs", &["-R", &format!("rdump / {}", files.path().display()), &disk]);
        let trees = [expected.path().to_str().unwrap(), files.path().to_str().unwrap()];
        run("diff", &[&["--recursive", "--no-dereference", "--exclude=lost+found"], &trees[..]].concat());
    }
}
