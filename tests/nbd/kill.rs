//! A server that is killed loses nothing that was flushed (promise P5), on any of its connections.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use vhd_core::Disk;
use vhd_testkit::crash::Random;
use vhd_testkit::history::History;

use super::server::Server;
use super::support::{content_of_sound, done, number, tagged_piece};
use super::wire::*;

const SIZE: u64 = 64 << 20;
const SECTORS: u64 = SIZE / 512;

/// One request and its reply, or `None` when the server is gone.
fn ask(wire: &mut Wire, flags: u16, command: u16, offset: u64, data: &[u8]) -> Option<()> {
    use std::io::{Read, Write};
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend([flags.to_be_bytes(), command.to_be_bytes()].concat());
    bytes.extend([5_u64.to_be_bytes(), offset.to_be_bytes()].concat());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    wire.stream.write_all(&bytes).ok()?;
    let mut reply = [0; 16];
    wire.stream.read_exact(&mut reply).ok()?;
    assert_eq!(be32(&reply, 4), 0);
    Some(())
}

/// Writes on one connection, flushes on another, and sometimes with FUA, until the server is gone.
fn load(writer: &mut Wire, flusher: &mut Wire, seed: u64, history: &mut History) {
    let mut random = Random::new(seed);
    let session = u32::try_from(seed).unwrap();
    for write in 1.. {
        let begun = write as usize * 4;
        if random.below(8) == 0 {
            let done = ask(flusher, 0, FLUSH, 0, &[]).is_some();
            history.flushed(begun, done.then_some(begun + 1));
            if !done {
                return;
            }
            continue;
        }
        let (lba, tags) = tagged_piece(&mut random, SECTORS, session, write);
        let flags = if random.below(16) == 0 { FUA } else { 0 };
        let done = ask(writer, flags, WRITE, lba * 512, &tags.concat()).is_some();
        (lba..).zip(&tags).for_each(|(lba, tag)| history.wrote(lba, *tag, begun, done.then_some(begun + 1)));
        if flags == FUA {
            // It covers itself; that it covers more is how it is done here.
            history.flushed(begun + 2, done.then_some(begun + 3));
        }
        if !done {
            return;
        }
    }
}

fn kill_again_and_again(folder: &Path, image: &str) {
    let first = number("VHD_KILL_SEED", 1);
    let mut found = vec![0; SIZE as usize];
    for seed in first..first + number("VHD_KILLS", 8) {
        let server = Server::start(folder, image);
        let mut history = History::of(&found);
        let mut writer = Wire::open(&server.socket(), "", Style::Simple);
        let mut flusher = Wire::open(&server.socket(), "", Style::Simple);
        let killer = std::thread::spawn(move || {
            sleep(Duration::from_millis(Random::new(seed).below(400)));
            server.kill();
        });
        load(&mut writer, &mut flusher, seed, &mut history);
        killer.join().unwrap();
        found = content_of_sound(folder, image);
        history.judge_disk(&found, usize::MAX).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
}

#[test]
fn a_killed_server_loses_nothing_flushed_of_a_dynamic_disk() {
    let folder = tempfile::tempdir().unwrap();
    done(folder.path(), &format!("create disk.vhd --size {SIZE}"));
    kill_again_and_again(folder.path(), "disk.vhd");
}

#[test]
fn a_killed_server_loses_nothing_flushed_of_a_child() {
    let folder = tempfile::tempdir().unwrap();
    done(folder.path(), &format!("create base.vhd --size {SIZE}"));
    done(folder.path(), "create child.vhd --parent base.vhd");
    let before = fs::read(folder.path().join("base.vhd")).unwrap();
    kill_again_and_again(folder.path(), "child.vhd");
    assert!(fs::read(folder.path().join("base.vhd")).unwrap() == before, "the parent was written");
}

/// Each once, right before the kill. The parent's data would show through if it were not durable.
#[test]
fn one_write_or_zeroing_with_fua_survives_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    done(path, "create base.vhd --size 8M");
    assert!(super::support::vhd_fed(path, "write base.vhd --offset 0", &[7; 4 << 20]).status.success());
    done(path, "create child.vhd --parent base.vhd");
    for (command, flags, offset) in [(TRIM, FUA, 0), (ZERO, FUA, 1 << 20), (ZERO, FUA | NO_HOLE, 2 << 20), (WRITE, FUA, 3 << 20)]
    {
        let server = Server::start(path, "child.vhd");
        let mut wire = Wire::open(&server.socket(), "", Style::Simple);
        let error = match command {
            WRITE => wire.write_error(flags, offset, &[0; 64 << 10]),
            _ => wire.error_of(flags, command, offset, 64 << 10),
        };
        assert_eq!(error, 0);
        server.kill();
        let disk = Disk::open(&path.join("child.vhd"), &Default::default()).unwrap();
        let mut found = vec![9; 64 << 10];
        disk.read_at(&mut found, offset).unwrap();
        assert!(found.iter().all(|byte| *byte == 0), "command {command}, flags {flags}");
    }
}
