//! Extended headers, and what else no packaged client speaks.

use super::server::{Server, folder_with_disk};
use super::support::{done, noise, vhd_fed};
use super::wire::*;

#[test]
fn extended_headers_change_what_may_come_after_them() {
    let folder = folder_with_disk("8M");
    let server = Server::start(folder.path(), "disk.vhd");
    let mut wire = Wire::connect(&server.socket());
    wire.set_style(Style::Extended);
    assert_eq!(wire.option_kind(STRUCTURED, &[]), ERR_EXT);
    assert_eq!(wire.option_kind(EXTENDED, &[]), ACK, "twice changes nothing");
    assert_eq!(wire.option_kind(SET_META, &meta_data("", &["base:allocation"])), ACK);
    wire.go("");
    assert_eq!(wire.flags & 1 << 12, 1 << 12, "block status takes a payload");
    // A compact request is no request any more.
    wire.style = Style::Structured;
    wire.request(0, FLUSH, 1, 0, 0);
    wire.request(0, FLUSH, 2, 0, 0);
    assert!(wire.is_over());
    server.stop();
}

#[test]
fn all_replies_are_extended_and_repeat_the_offset() {
    let folder = folder_with_disk("64M");
    let server = Server::start(folder.path(), "disk.vhd");
    let mut wire = Wire::open(&server.socket(), "", Style::Extended);
    let data = noise(1, 3 << 20);
    assert_eq!(wire.write_error(FUA, 12_345, &data), 0);
    for flags in [0, DF] {
        assert_eq!(wire.read(flags, 12_345, data.len()), data);
    }
    for (flags, command, offset, len) in
        [(0, TRIM, 4096, 512), (0, FLUSH, 0, 0), (0, ZERO, 8192, 10), (0, CACHE, 7, 9), (0, 99, 5, 6)]
    {
        wire.request(flags, command, 0xABCD_EF01_2345_6789, offset, len);
        let reply = wire.reply(0);
        assert_eq!((reply.cookie, reply.offset, reply.done), (0xABCD_EF01_2345_6789, Some(offset), true), "command {command}");
    }
    server.stop();
}

#[test]
fn one_request_zeroes_or_describes_more_than_32_bits() {
    let folder = tempfile::tempdir().unwrap();
    done(folder.path(), "create disk.vhd --size 20G");
    assert!(vhd_fed(folder.path(), "write disk.vhd --offset 9G", &noise(2, 1 << 20)).status.success());
    let server = Server::start(folder.path(), "disk.vhd");
    let mut wire = Wire::open_with(&server.socket(), "", Style::Extended, &["base:allocation"]);
    let (gib, mib) = (1_u64 << 30, 1_u64 << 20);
    let status = |wire: &mut Wire, flags, offset, len| -> Vec<(u64, u64)> {
        wire.request(flags, STATUS, 5, offset, len);
        let reply = wire.reply(0);
        assert_eq!((reply.kind, reply.done, reply.offset), (Some(6), true, Some(offset)));
        let count = be32(&reply.payload, 4);
        let runs: Vec<_> = reply.payload[8..].chunks(16).map(|run| (be64(run, 0), be64(run, 8))).collect();
        assert_eq!(runs.len(), count as usize);
        runs
    };
    assert_eq!(
        status(&mut wire, 0, 0, 20 * gib),
        [(9 * gib, 3), (mib, 0), (mib, 2), (11 * gib - 2 * mib, 3)],
        "a block is 2 MiB"
    );
    assert_eq!(status(&mut wire, REQ_ONE, 0, 20 * gib), [(9 * gib, 3)]);
    assert_eq!(status(&mut wire, REQ_ONE, 100, 5 * gib), [(5 * gib, 3)], "not longer than the request");
    assert_eq!(wire.error_of(0, ZERO, 0, 20 * gib), 0);
    assert_eq!(status(&mut wire, 0, 0, 20 * gib).iter().map(|run| run.0).sum::<u64>(), 20 * gib);
    assert_eq!(wire.read(0, 9 * gib, 4096), vec![0; 4096]);
    server.stop();
}

#[test]
fn a_payload_chooses_among_the_contexts() {
    let folder = folder_with_disk("8M");
    let server = Server::start(folder.path(), "disk.vhd");
    let contexts = ["base:allocation", "qemu:allocation-depth"];
    let mut wire = Wire::open_with(&server.socket(), "", Style::Extended, &contexts);
    let ask = |wire: &mut Wire, len: u64, ids: &[u32]| {
        let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_be_bytes()).collect();
        let payload = [&len.to_be_bytes()[..], &ids].concat();
        wire.request(PAYLOAD, STATUS, 6, 0, payload.len() as u64);
        wire.send(&payload);
        wire.replies(0)
    };
    let ids = |replies: &[Reply]| -> Vec<u32> { replies.iter().map(|reply| be32(&reply.payload, 0)).collect() };
    assert_eq!(ids(&ask(&mut wire, 4096, &[2])), [2]);
    assert_eq!(ids(&ask(&mut wire, 4096, &[1, 2])), [1, 2]);
    for (len, wrong) in
        [(4096, vec![3]), (4096, vec![1, 1]), (4096, vec![]), (0, vec![1]), (u64::MAX, vec![1]), (4096, vec![1, 2, 3])]
    {
        assert_eq!(ask(&mut wire, len, &wrong)[0].error, EINVAL, "{len} {wrong:?}");
    }
    wire.request(0, STATUS, 6, 0, 4096);
    assert_eq!(ids(&wire.replies(0)), [1, 2], "without a payload all are told");
    server.stop();
}

#[test]
fn payloads_that_make_no_sense_are_gone_past() {
    let folder = folder_with_disk("8M");
    let server = Server::start(folder.path(), "disk.vhd");
    let mut wire = Wire::open(&server.socket(), "", Style::Extended);
    for command in [READ, FLUSH, TRIM, ZERO, CACHE, 99] {
        wire.request(PAYLOAD, command, 7, 0, 1000);
        wire.send(&[0x25; 1000]);
        assert_eq!(wire.replies(0)[0].error, EINVAL, "command {command}");
    }
    wire.request(0, WRITE, 7, 0, 512);
    assert_eq!(wire.reply(0).error, EINVAL, "a write without its flag has no payload");
    assert_eq!(wire.read(0, 0, 512), vec![0; 512]);
    // Nobody goes past so much.
    wire.request(PAYLOAD, WRITE, 7, 0, u64::MAX);
    let ended = wire.replies(0)[0].error == ENOSPC || wire.is_over();
    assert!(ended && wire.is_over());
    server.stop();
}

#[test]
fn replies_come_in_any_order_and_each_is_whole() {
    let folder = folder_with_disk("64M");
    let server = Server::start(folder.path(), "disk.vhd");
    for style in [Style::Simple, Style::Structured, Style::Extended] {
        let mut wire = Wire::open(&server.socket(), "", style);
        let data = noise(3, 8 << 20);
        assert_eq!(wire.write_error(0, 0, &data), 0);
        // A long read, and many short ones behind it, sent before anything is read.
        wire.request(0, READ, 1000, 0, 8 << 20);
        for cookie in 0..40 {
            wire.request(0, READ, cookie, cookie * 4096, 4096);
            wire.request(0, FLUSH, 100 + cookie, 0, 0);
        }
        let mut whole = vec![0; 8 << 20];
        let mut open = 81;
        while open > 0 {
            // What a simple reply has depends on its cookie, so its header is looked at by hand.
            let (cookie, payload) = if style == Style::Simple {
                let head = wire.take(16);
                assert_eq!(be32(&head, 4), 0);
                let cookie = be64(&head, 8);
                (
                    cookie,
                    wire.take(if cookie == 1000 {
                        8 << 20
                    } else if cookie < 100 {
                        4096
                    } else {
                        0
                    }),
                )
            } else {
                let reply = wire.reply(0);
                assert_eq!(reply.error, 0);
                open -= usize::from(reply.done);
                if reply.kind == Some(1) {
                    let at = be64(&reply.payload, 0) as usize;
                    if reply.cookie == 1000 {
                        whole[at..at + reply.payload.len() - 8].copy_from_slice(&reply.payload[8..]);
                    }
                    (reply.cookie, reply.payload[8..].to_vec())
                } else {
                    continue;
                }
            };
            if style == Style::Simple {
                open -= 1;
                if cookie == 1000 {
                    whole.copy_from_slice(&payload);
                }
            }
            if cookie < 100 {
                let at = cookie as usize * 4096;
                assert!(payload == data[at..at + 4096], "{style:?}: cookie {cookie}");
            }
        }
        assert!(whole == data, "{style:?}");
    }
    server.stop();
}

/// A client that sends before it reads is served as long as there is room, and never locks up.
#[test]
fn a_write_behind_a_long_read_that_nobody_takes_yet_is_done() {
    let folder = folder_with_disk("128M");
    let server = Server::start(folder.path(), "disk.vhd");
    let mut wire = Wire::open(&server.socket(), "", Style::Structured);
    wire.request(0, READ, 1, 0, 32 << 20);
    wire.write(0, 2, 64 << 20, &noise(4, 16 << 20));
    let mut other = Wire::open(&server.socket(), "", Style::Structured);
    let wanted = noise(4, 16 << 20);
    let deadline = std::time::Instant::now() + super::server::PATIENCE;
    while other.read(0, 72 << 20, 4096) != wanted[8 << 20..(8 << 20) + 4096] {
        assert!(std::time::Instant::now() < deadline, "the write waits for the read");
    }
    let mut done = 0;
    while done < 2 {
        done += usize::from(wire.reply(0).done);
    }
    server.stop();
}
