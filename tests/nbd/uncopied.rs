//! Long reads whose data is sent without being copied, as it is in the host's memory.

use std::fs;
use std::os::fd::AsRawFd;

use nix::sys::socket::{MsgFlags, recv};
use vhd_testkit::fixture::{BlockFill, FixtureSpec, Kind, Layout};

use super::server::Server;
use super::support::{done, noise, vhd_fed};
use super::wire::*;

const MIB: usize = 1 << 20;

/// Pipes that the server has open.
fn pipes(server: &Server) -> usize {
    let fds = fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap();
    fds.filter(|fd| fs::read_link(fd.as_ref().unwrap().path()).is_ok_and(|to| to.to_string_lossy().starts_with("pipe:"))).count()
}

/// Offsets and lengths on both sides of those from which on, and up to which, nothing is copied.
fn ranges(size: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut state = 17_u64;
    let mut below = move |bound: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 20) % bound
    };
    let lens = [512, 64 << 10, (64 << 10) - 1, 100_000, 256 << 10, (256 << 10) - 3, 3 << 20, 5 << 20];
    (0..160).map(move |n| {
        let len = lens[n % lens.len()];
        let at = below(size - len);
        (if n % 3 == 0 { at / 4096 * 4096 } else { at }, len)
    })
}

#[test]
fn long_reads_of_what_nobody_writes_are_right_and_not_copied() {
    let folder = tempfile::tempdir().unwrap();
    done(folder.path(), "create base.vhd --size 32M");
    let mut wanted = vec![0; 32 * MIB];
    let mut write = |image: &str, at: usize, seed: u64, len: usize| {
        let data = noise(seed, len);
        assert!(vhd_fed(folder.path(), &format!("write {image} --offset {at}"), &data).status.success());
        wanted[at..at + len].copy_from_slice(&data);
    };
    write("base.vhd", 0, 1, 9 * MIB + 777);
    write("base.vhd", 15 * MIB, 2, 10 * MIB);
    done(folder.path(), "create child.vhd --parent base.vhd");
    write("child.vhd", 4 * MIB + 1000, 3, 300_000);
    write("child.vhd", 20 * MIB, 4, 3 * MIB);
    // A leaf that is written lies over a parent that is not.
    for options in ["--read-only", ""] {
        let server = Server::start(folder.path(), &format!("{options} child.vhd"));
        let before = pipes(&server);
        for (style, flags) in [(Style::Simple, 0), (Style::Structured, 0), (Style::Structured, DF), (Style::Extended, 0)] {
            let mut wire = Wire::open(&server.socket(), "", style);
            for (at, len) in ranges(wanted.len() as u64) {
                let (at, len) = (at as usize, len as usize);
                assert!(wire.read(flags, at as u64, len) == wanted[at..at + len], "{options} {style:?} {flags}: {len} at {at}");
            }
        }
        assert!(pipes(&server) >= before + 2, "nothing was sent through pipes");
        server.stop();
    }
}

#[test]
fn over_tcp_too() {
    let folder = tempfile::tempdir().unwrap();
    done(folder.path(), "create disk.vhd --size 32M --type fixed");
    let wanted = noise(11, 32 * MIB);
    assert!(vhd_fed(folder.path(), "write disk.vhd --offset 0", &wanted).status.success());
    let server = Server::start_at(folder.path(), "disk.vhd --listen tcp:127.0.0.1:0");
    let before = pipes(&server);
    let mut wire = Wire::open_from(1, server.port());
    for (at, len) in ranges(wanted.len() as u64) {
        assert!(wire.read(0, at, len as usize) == wanted[at as usize..(at + len) as usize], "{len} at {at}");
    }
    assert!(pipes(&server) >= before + 2, "nothing was sent through pipes");
    server.stop();
}

/// Many at once, long and short ones, and the client takes none until all are asked for: each reply is whole.
#[test]
fn uncopied_replies_wait_for_their_client_among_others() {
    let folder = tempfile::tempdir().unwrap();
    done(folder.path(), "create disk.vhd --size 32M");
    let wanted = noise(9, 32 * MIB);
    assert!(vhd_fed(folder.path(), "write disk.vhd --offset 0", &wanted).status.success());
    let server = Server::start(folder.path(), "--read-only disk.vhd");
    let mut wires: Vec<Wire> = (0..4).map(|_| Wire::open(&server.socket(), "", Style::Extended)).collect();
    let asked: Vec<(u64, u64)> = ranges(wanted.len() as u64).collect();
    for wire in &mut wires {
        for (cookie, (at, len)) in asked.iter().enumerate() {
            wire.request(0, READ, cookie as u64, *at, *len);
        }
    }
    for wire in &mut wires {
        let mut missing: Vec<u64> = asked.iter().map(|(_, len)| *len).collect();
        let mut open = asked.len();
        while open > 0 {
            let reply = wire.reply(0);
            assert_eq!(reply.error, 0);
            if reply.kind == Some(1) {
                let (at, data) = (be64(&reply.payload, 0) as usize, &reply.payload[8..]);
                assert!(data == &wanted[at..at + data.len()], "{} bytes at {at}", data.len());
                missing[reply.cookie as usize] -= data.len() as u64;
            }
            open -= usize::from(reply.done);
        }
        assert!(missing.iter().all(|bytes| *bytes == 0));
    }
    // A client that goes away with replies under way leaves nothing behind that the next would get.
    for (at, len) in &asked {
        wires[0].request(0, READ, 1, *at, *len);
    }
    drop(wires);
    let mut wire = Wire::open(&server.socket(), "", Style::Structured);
    for (at, len) in asked {
        assert!(wire.read(0, at, len as usize) == wanted[at as usize..(at + len) as usize]);
    }
    server.stop();
}

/// A reply that waits in the socket has what was there or zeros, and never what another block put in the same place since. The block ends
/// inside a page of the host, which it shares with the next.
#[test]
fn a_reply_that_waits_never_shows_another_block() {
    let folder = tempfile::tempdir().unwrap();
    let block = 512 << 10;
    let mut spec = FixtureSpec { block_size: block as u32, ..FixtureSpec::new(Kind::Dynamic, Layout::Classic, 8 << 20) };
    for number in 0..4 {
        spec = spec.block(number, BlockFill::tags(1, u64::from(number)));
    }
    spec.write_to(&folder.path().join("disk.vhd")).unwrap();
    let server = Server::start(folder.path(), "disk.vhd");
    let mut reader = Wire::open(&server.socket(), "", Style::Simple);
    let mut other = Wire::open(&server.socket(), "", Style::Simple);
    let len = 128 << 10;
    for number in 0..4_u64 {
        let end = (number + 1) * block;
        let old = other.read(0, end - len, len as usize);
        reader.request(0, READ, 5, end - len, len);
        // Its answer waits in the socket.
        let socket = reader.stream.as_raw_fd();
        assert_eq!(recv(socket, &mut [0], MsgFlags::MSG_PEEK), Ok(1));
        assert_eq!(other.error_of(0, TRIM, number * block, block), 0);
        // Freed space is given out when the flush after the one that noted it is done.
        for _ in 0..4 {
            assert_eq!(other.error_of(0, FLUSH, 0, 0), 0);
        }
        let new = vec![0xAB; block as usize];
        assert_eq!(other.write_error(FUA, (8 + number) * block, &new), 0);
        let found = reader.reply(len as usize).payload;
        for (sector, bytes) in found.chunks(512).enumerate() {
            assert!(
                bytes == &old[sector * 512..][..512] || bytes.iter().all(|byte| *byte == 0),
                "block {number}: sector {sector}"
            );
        }
    }
    server.stop();
}
