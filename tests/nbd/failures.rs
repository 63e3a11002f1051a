//! Reads that fail, at once or when a part of the reply was sent already: each style has its way to say so.

use std::fs::File;

use super::server::Server;
use super::support::{done, noise, vhd_fed};
use super::wire::*;

const EIO: u32 = 5;
const SIZE: usize = 8 << 20;
/// What is left of the image's file; the disk's pieces of 256 KiB end elsewhere.
const LEFT: usize = (5 << 20) + 100_000;

/// A fixed disk of which the end is cut off while it is served, as a disk of the host with bad sectors would be.
fn with_cut_disk(test: impl FnOnce(&Server, &[u8])) {
    let folder = tempfile::tempdir().unwrap();
    done(folder.path(), "create disk.vhd --size 8M --type fixed");
    let data = noise(1, SIZE);
    assert!(vhd_fed(folder.path(), "write disk.vhd --offset 0", &data).status.success());
    let server = Server::start(folder.path(), "disk.vhd");
    let file = File::options().write(true).open(folder.path().join("disk.vhd")).unwrap();
    let whole = std::fs::read(folder.path().join("disk.vhd")).unwrap();
    file.set_len(LEFT as u64).unwrap();
    test(&server, &data);
    std::os::unix::fs::FileExt::write_all_at(&file, &whole[LEFT..], LEFT as u64).unwrap();
    server.stop();
}

#[test]
fn a_short_read_that_fails_is_told_and_the_session_goes_on() {
    with_cut_disk(|server, data| {
        for style in [Style::Simple, Style::Structured, Style::Extended] {
            let mut wire = Wire::open(&server.socket(), "", style);
            assert_eq!(wire.error_of(0, READ, 6 << 20, 4096), EIO, "{style:?}");
            assert_eq!(wire.error_of(0, READ, LEFT as u64 - 512, 1024), EIO);
            assert!(wire.read(0, 0, 4096) == data[..4096]);
        }
    });
}

/// In chunks: what was read is right, and what failed is named.
#[test]
fn a_long_read_that_fails_sends_what_it_has_and_then_the_error() {
    with_cut_disk(|server, data| {
        for style in [Style::Structured, Style::Extended] {
            let mut wire = Wire::open(&server.socket(), "", style);
            wire.request(0, READ, 5, 4096, SIZE as u64 - 4096);
            let replies = wire.replies(0);
            let (last, chunks) = replies.split_last().unwrap();
            let mut at = 4096;
            for chunk in chunks {
                assert_eq!((chunk.kind, be64(&chunk.payload, 0)), (Some(1), at as u64));
                let found = &chunk.payload[8..];
                assert!(found == &data[at..at + found.len()]);
                at += found.len();
            }
            assert!((4 << 20..LEFT).contains(&at), "{at}");
            assert_eq!((last.kind, last.error), (Some(0x8002), EIO));
            assert_eq!(be64(&last.payload, last.payload.len() - 8), at as u64, "where it failed");
            assert!(wire.read(0, 0, 4096) == data[..4096]);
        }
    });
}

/// As one chunk: its length was promised, so it is filled up, and the error comes behind it.
#[test]
fn one_chunk_that_fails_has_its_length_and_the_error_comes_behind_it() {
    with_cut_disk(|server, data| {
        for style in [Style::Structured, Style::Extended] {
            let mut wire = Wire::open(&server.socket(), "", style);
            wire.request(DF, READ, 5, 0, SIZE as u64);
            let replies = wire.replies(0);
            assert_eq!(replies.len(), 2, "{style:?}");
            assert_eq!((replies[0].kind, replies[0].done, replies[0].payload.len()), (Some(1), false, SIZE + 8));
            assert!(replies[0].payload[8..][..4 << 20] == data[..4 << 20]);
            assert_eq!((replies[1].kind, replies[1].error), (Some(0x8002), EIO));
            assert!(wire.read(DF, 0, 4096) == data[..4096]);
        }
    });
}

/// A simple reply that has begun can't say it any more: the session ends.
#[test]
fn a_simple_reply_that_fails_in_the_middle_ends_the_session() {
    with_cut_disk(|server, _| {
        let mut wire = Wire::open(&server.socket(), "", Style::Simple);
        wire.request(0, READ, 5, 0, SIZE as u64);
        let began = std::time::Instant::now();
        let rest = super::server::rest(&mut wire.stream);
        assert!(rest.len() < SIZE + 16, "{} bytes came", rest.len());
        assert!(began.elapsed() < std::time::Duration::from_secs(30), "the client is not left waiting");
        // One that fails at its beginning can.
        let mut wire = Wire::open(&server.socket(), "", Style::Simple);
        assert_eq!(wire.error_of(0, READ, 6 << 20, 2 << 20), EIO);
        assert_eq!(wire.error_of(0, READ, 0, 512), 0);
    });
}
