//! A server that is killed loses nothing that was flushed (promise P5).
//!
//! Goal: SIGKILL at any moment leaves an image that checks clean, with all flushed data in it, and a file system on it
//! that its journal makes whole. Method: the real command on a real file system, under load, killed at random
//! moments, many times over the same image; after each kill the image is judged by a reader of our own.
//! `VHD_KILLS` sets how often (10 of each kind by default), `VHD_KILL_SEED` from which seed.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use support::mounts::{Cleanup, possible};
use support::{done, number, run, tagged_piece, vhd, vhd_in, wait_until};
use vhd_testkit::crash::Random;
use vhd_testkit::history::History;

const SIZE: u64 = 96 << 20;
const SECTORS: u64 = SIZE / 512;

/// A server in the foreground, over a folder; whatever happens, nothing of it is left.
struct Server {
    process: Child,
    target: PathBuf,
}

impl Server {
    fn start(folder: &Path, image: &str) -> Self {
        let target = folder.join("disk");
        fs::create_dir_all(&target).unwrap();
        let mut command = vhd_in(folder);
        command.args(["mount", image, "disk", "--foreground"]).stdout(Stdio::null());
        let server = Self { process: command.spawn().unwrap(), target };
        wait_until("the mount is there", || server.file().exists());
        server
    }

    fn file(&self) -> PathBuf {
        self.target.join("disk.raw")
    }

    fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        // Dropping it takes the dead mount away.
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        // As a user clears what a dead server leaves; what that can't is taken away all the same.
        let _ = vhd(self.target.parent().unwrap(), "unmount disk");
        drop(Cleanup(vec![self.target.clone()]));
    }
}

/// Writes and syncs until the file fails, which it does when the server is killed. What was done is noted.
fn load(file: &File, seed: u64, session: u32, clock: &mut usize, history: &mut History) {
    let mut random = Random::new(seed);
    for write in 1.. {
        let begun = *clock;
        *clock += 2;
        if random.below(8) == 0 {
            let done = file.sync_data().is_ok();
            history.flushed(begun, done.then_some(begun + 1));
            if !done {
                return;
            }
            continue;
        }
        let (lba, tags) = tagged_piece(&mut random, SECTORS, session, write);
        let done = file.write_all_at(&tags.concat(), lba * 512).is_ok();
        (lba..).zip(&tags).for_each(|(lba, tag)| history.wrote(lba, *tag, begun, done.then_some(begun + 1)));
        if !done {
            return;
        }
    }
}

fn kill_again_and_again(folder: &Path, image: &str) {
    let first = number("VHD_KILL_SEED", 1);
    let mut found = vec![0; SIZE as usize];
    for seed in first..first + number("VHD_KILLS", 10) {
        let server = Server::start(folder, image);
        let mut history = History::of(&found);
        let file = OpenOptions::new().read(true).write(true).open(server.file()).unwrap();
        let killer = std::thread::spawn(move || {
            sleep(Duration::from_millis(Random::new(seed).below(400)));
            server.kill();
        });
        load(&file, seed, u32::try_from(seed).unwrap(), &mut 0, &mut history);
        killer.join().unwrap();
        drop(file);
        found = support::content_of_sound(folder, image);
        history.judge_disk(&found, usize::MAX).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
}

#[test]
fn a_killed_server_loses_nothing_flushed_of_a_dynamic_disk() {
    if possible(&[]) {
        let folder = tempfile::tempdir().unwrap();
        done(folder.path(), &format!("create disk.vhd --size {SIZE}"));
        kill_again_and_again(folder.path(), "disk.vhd");
    }
}

#[test]
fn a_killed_server_loses_nothing_flushed_of_a_child() {
    if possible(&[]) {
        let folder = tempfile::tempdir().unwrap();
        done(folder.path(), &format!("create base.vhd --size {SIZE}"));
        done(folder.path(), "create child.vhd --parent base.vhd");
        let before = fs::read(folder.path().join("base.vhd")).unwrap();
        kill_again_and_again(folder.path(), "child.vhd");
        assert!(fs::read(folder.path().join("base.vhd")).unwrap() == before, "the parent was written");
    }
}

/// ext4 in a loop device over the mounted disk. What is mounted is taken away whatever happens.
struct Ext4 {
    device: String,
    files: PathBuf,
}

impl Ext4 {
    fn mount(folder: &Path, disk: &Path, format: bool) -> Self {
        let device = run("losetup", &["--find", "--show", disk.to_str().unwrap()]).trim().to_owned();
        let ext4 = Self { device, files: folder.join("files") };
        if format {
            run("mkfs.ext4", &["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", &ext4.device]);
        }
        fs::create_dir_all(&ext4.files).unwrap();
        run("mount", &["-t", "ext4", &ext4.device, ext4.files.to_str().unwrap()]);
        ext4
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        for command in [["umount", "--lazy", self.files.to_str().unwrap()], ["losetup", "--detach", &self.device]] {
            let _ = Command::new(command[0]).args(&command[1..]).stderr(Stdio::null()).status();
        }
    }
}

/// Makes files, each durable before the next, until the disk is gone. Returns how many were.
fn make_files(folder: &Path, session: u64) -> u64 {
    let write = |number: u64| -> std::io::Result<()> {
        let path = folder.join(format!("{session}-{number}"));
        fs::write(&path, content(session, number))?;
        File::open(&path)?.sync_all()?;
        File::open(folder)?.sync_all()
    };
    (0..).take_while(|number| write(*number).is_ok()).count() as u64
}

fn content(session: u64, number: u64) -> Vec<u8> {
    format!("{session} {number} ").repeat(1 + (number as usize * 97) % 3000).into_bytes()
}

#[test]
fn ext4_on_a_disk_whose_server_is_killed_is_whole_after_its_journal() {
    if !possible(&["mkfs.ext4"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path();
    done(place, &format!("create disk.vhd --size {SIZE}"));
    let mut durable: Vec<(u64, u64)> = Vec::new();
    for session in 0..number("VHD_KILLS", 10).div_ceil(2) {
        let server = Server::start(place, "disk.vhd");
        let ext4 = Ext4::mount(place, &server.file(), session == 0);
        for &(session, count) in &durable {
            for number in 0..count {
                let found = fs::read(ext4.files.join(format!("{session}-{number}"))).unwrap();
                assert!(found == content(session, number), "file {session}-{number} is not what was synced");
            }
        }
        let killer = std::thread::spawn(move || {
            sleep(Duration::from_millis(150 + Random::new(session + 1).below(500)));
            server.kill();
        });
        let count = make_files(&ext4.files, session);
        durable.push((session, count));
        killer.join().unwrap();
        drop(ext4);
        done(place, "check disk.vhd");
        // The journal is replayed, as at the next boot; then nothing is wrong.
        let server = Server::start(place, "disk.vhd");
        let disk = server.file();
        let replay = Command::new("e2fsck").args(["-p", disk.to_str().unwrap()]).output().unwrap();
        assert!(replay.status.code().is_some_and(|code| code <= 1), "{replay:?}");
        run("e2fsck", &["-f", "-n", disk.to_str().unwrap()]);
        drop(server);
    }
    println!("files synced before each kill: {durable:?}");
}
