//! What clients get wrong: each misuse has its own answer, and the session goes on.

use super::server::{Server, folder_with_disk, has, sh};
use super::support::done;
use super::wire::*;

const MIB: u64 = 1 << 20;

/// Options: the answer, and that the next option is understood.
#[test]
fn a_bad_option_is_answered_and_the_handshake_goes_on() {
    let folder = folder_with_disk("8M");
    let server = Server::start(folder.path(), "disk.vhd");
    let mut wire = Wire::connect(&server.socket());
    let long = "x".repeat(4097);
    let with_nul = string("a\0b");
    let not_utf8 = [&2_u32.to_be_bytes()[..], &[0xFF, 0xFE, 0, 0]].concat();
    let too_long_inside = [&100_u32.to_be_bytes()[..], b"abc\0\0"].concat();
    let more_than_announced = [go_data("", &[]), vec![0; 2]].concat();
    for (option, data, wanted) in [
        (4, vec![1, 2, 3], ERR_UNSUP),
        (99, vec![0; 5000], ERR_UNSUP),
        (LIST, vec![0], ERR_INVALID),
        (STRUCTURED, vec![0; 4], ERR_INVALID),
        (EXTENDED, vec![0; 4], ERR_INVALID),
        (STARTTLS, vec![0], ERR_INVALID),
        (STARTTLS, vec![], ERR_POLICY),
        (GO, go_data("no such", &[]), ERR_UNKNOWN),
        (OPT_INFO, go_data("no such", &[]), ERR_UNKNOWN),
        (GO, go_data(&long, &[]), ERR_INVALID),
        (GO, [with_nul, vec![0; 2]].concat(), ERR_INVALID),
        (GO, not_utf8, ERR_INVALID),
        (GO, vec![], ERR_INVALID),
        (GO, too_long_inside, ERR_INVALID),
        (GO, more_than_announced, ERR_INVALID),
        (SET_META, meta_data("", &["base:allocation"]), ERR_INVALID),
        (LIST_META, meta_data("", &[]), ERR_INVALID),
        (99, vec![7; 70_000], ERR_TOO_BIG),
    ] {
        assert_eq!(wire.option_kind(option, &data), wanted, "option {option}, {} bytes", data.len());
    }
    wire.set_style(Style::Structured);
    for (data, wanted) in [
        (meta_data("no such", &["base:allocation"]), ERR_UNKNOWN),
        (vec![0; 3], ERR_INVALID),
        ([string(""), 5_u32.to_be_bytes().to_vec()].concat(), ERR_INVALID),
        ([meta_data("", &["base:allocation"]), vec![1]].concat(), ERR_INVALID),
        ([string(""), u32::MAX.to_be_bytes().to_vec()].concat(), ERR_INVALID),
    ] {
        assert_eq!(wire.option_kind(SET_META, &data), wanted);
    }
    // Twice GO: the first failed, so the second may come.
    wire.go("");
    assert_eq!(wire.size, 8 * MIB);
    assert_eq!(wire.read(0, 0, 512), vec![0; 512]);
    server.stop();
}

#[test]
fn info_is_told_as_it_is_asked_for() {
    let folder = folder_with_disk("8M");
    let server = Server::start(folder.path(), "disk.vhd");
    let mut wire = Wire::connect(&server.socket());
    let replies = wire.option(OPT_INFO, &go_data("", &[1, 2, 3, 77]));
    let kinds: Vec<_> = replies.iter().map(|(kind, data)| (*kind, data.get(1).copied())).collect();
    assert_eq!(kinds, [(INFO, Some(0)), (INFO, Some(1)), (INFO, Some(2)), (INFO, Some(3)), (ACK, None)]);
    assert_eq!(&replies[1].1[2..], b"disk");
    assert_eq!((be32(&replies[3].1, 2), be32(&replies[3].1, 6), be32(&replies[3].1, 10)), (1, 4096, 64 << 20));
    assert_eq!(wire.option(OPT_INFO, &go_data("disk", &[])).len(), 2, "what is not asked for is not told");
    let listed = wire.option(LIST, &[]);
    assert_eq!((listed[0].0, &listed[0].1[4..8], listed.len()), (SERVER, &b"disk"[..], 2));
    assert_eq!(wire.option_kind(ABORT, &[]), ACK);
    assert!(wire.is_over());
    server.stop();
}

/// The old option: its failure can only be told by ending, and its reply is padded unless the client said no.
#[test]
fn export_name_works_and_fails_as_it_always_did() {
    let folder = folder_with_disk("8M");
    // Not its patience is to end them.
    let server = Server::start(folder.path(), "disk.vhd --handshake-timeout 300");
    for (flags, padding) in [(3, 0), (1, 124)] {
        let mut wire = Wire::connect_with(&server.socket(), flags);
        wire.option_header(EXPORT_NAME, 4);
        wire.send(b"disk");
        let reply = wire.take(10 + padding);
        assert_eq!(be64(&reply, 0), 8 * MIB);
        assert!(reply[10..].iter().all(|byte| *byte == 0));
        assert_eq!(wire.error_of(0, READ, 0, 512), 0);
    }
    // The newer option has no padding, whatever the client said.
    let mut wire = Wire::connect_with(&server.socket(), 1);
    wire.go("disk");
    wire.request(0, READ, 1, 0, 512);
    assert_eq!(wire.reply(512).payload, [0; 512]);
    for (name, extended) in [(&b"none"[..], false), (&[0xFF; 4], false), (b"disk", true)] {
        let mut wire = Wire::connect(&server.socket());
        if extended {
            wire.set_style(Style::Extended);
        }
        wire.option_header(EXPORT_NAME, 4);
        wire.send(name);
        assert!(wire.is_over(), "{name:?}");
    }
    // Flags of a client that nobody knows, and one that can't take replies to options.
    for flags in [4, 7, 0x8000_0003, 0, 2] {
        assert!(Wire::connect_with(&server.socket(), flags).is_over(), "client flags {flags}");
    }
    let mut wire = Wire::connect(&server.socket());
    wire.send(b"IHAVEOPX\0\0\0\x03\0\0\0\0");
    assert!(wire.is_over(), "no option has another magic");
    server.stop();
}

fn misuse(wire: &mut Wire, read_only: bool) {
    let size = wire.size;
    let (changes, beyond) = if read_only { (EPERM, EPERM) } else { (0, ENOSPC) };
    let chunked = if wire.style == Style::Simple { EINVAL } else { 0 };
    for (flags, command, offset, len, wanted) in [
        (0, READ, size - 512, 1024, EINVAL),
        (0, READ, u64::MAX, 512, EINVAL),
        (0, READ, 0, (64 << 20) + 1, EINVAL),
        (FUA, READ, 0, 512, 0),
        (DF, READ, 0, 512, chunked),
        (NO_HOLE, READ, 0, 512, EINVAL),
        (0, READ, 0, 0, 0),
        (0, READ, size, 0, 0),
        (0, READ, size + 1, 0, EINVAL),
        (0, FLUSH, 0, 0, 0),
        (FUA, FLUSH, 0, 0, 0),
        (0, FLUSH, 512, 0, EINVAL),
        (0, TRIM, size, 512, if read_only { EPERM } else { EINVAL }),
        (FUA, TRIM, 0, 512, changes),
        (NO_HOLE, TRIM, 0, 512, EINVAL),
        (0, ZERO, size, 512, beyond),
        (NO_HOLE | FUA, ZERO, 0, 512, changes),
        (DF, ZERO, 0, 512, EINVAL),
        (0, CACHE, 0, 4096, 0),
        (0, CACHE, size, 1, EINVAL),
        (0, STATUS, 0, 512, EINVAL),
        (0, 8, 0, 0, EINVAL),
        (0, 500, 0, 0, EINVAL),
        (0x8000, READ, 0, 512, EINVAL),
        (0x40, FLUSH, 0, 0, EINVAL),
        (0, ZERO, 0, size, changes),
        (0, TRIM, 0, size, changes),
    ] {
        let what = format!("{:?}: command {command}, flags {flags}, {len} bytes at {offset}", wire.style);
        assert_eq!(wire.error_of(flags, command, offset, len), wanted, "{what}");
    }
    for (flags, offset, len, wanted) in
        [(FUA, 0, 512, changes), (0, size - 512, 1024, beyond), (NO_HOLE, 0, 512, EINVAL), (0, u64::MAX, 700_000, beyond)]
    {
        assert_eq!(wire.write_error(flags, offset, &vec![7; len]), wanted, "write with flags {flags} at {offset}");
    }
    // All payloads were gone past.
    assert_eq!(wire.error_of(0, READ, 0, 512), 0);
}

#[test]
fn each_illegal_request_has_its_error_and_the_session_goes_on() {
    let folder = folder_with_disk("8M");
    for read_only in [false, true] {
        let server = Server::start(folder.path(), if read_only { "disk.vhd --read-only" } else { "disk.vhd" });
        for style in [Style::Simple, Style::Structured, Style::Extended] {
            let mut wire = Wire::open(&server.socket(), "", style);
            assert_eq!(wire.flags & 2 != 0, read_only);
            assert_eq!(wire.flags & 0x80 != 0, style != Style::Simple, "DF is for chunks");
            misuse(&mut wire, read_only);
        }
        server.stop();
    }
    done(folder.path(), "check disk.vhd");
}

/// Longer than any payload, but gone past, as the stream would be lost otherwise.
#[test]
fn a_payload_beyond_the_limit_is_gone_past() {
    let folder = folder_with_disk("128M");
    let server = Server::start(folder.path(), "disk.vhd");
    let mut wire = Wire::open(&server.socket(), "", Style::Structured);
    assert_eq!(wire.write_error(0, 0, &vec![7; (64 << 20) + 1]), EINVAL);
    assert_eq!(wire.write_error(0, 4096, &vec![9; 64 << 20]), 0, "the limit itself is taken");
    assert_eq!(wire.read(DF, 4096, 64 << 20), vec![9; 64 << 20]);
    assert!(server.memory().1 < 200 << 20, "long requests go in pieces: {:?}", server.memory());
    server.stop();
}

#[test]
fn what_is_no_request_ends_the_session() {
    let folder = folder_with_disk("8M");
    let server = Server::start(folder.path(), "disk.vhd");
    for style in [Style::Simple, Style::Structured, Style::Extended] {
        let mut wire = Wire::open(&server.socket(), "", style);
        wire.send(&[0x55; 64]);
        assert!(wire.is_over(), "{style:?}");
        let mut wire = Wire::open(&server.socket(), "", style);
        wire.request(FUA, DISC, 1, 5, 5);
        assert!(wire.is_over(), "{style:?}: disconnected");
    }
    server.stop();
}

/// The same through libnbd, without what it checks itself.
#[test]
fn libnbd_with_strict_mode_off_gets_the_protocols_errors() {
    if !has("nbdinfo") {
        return;
    }
    let folder = folder_with_disk("8M");
    let server = Server::start(folder.path(), "disk.vhd");
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nbd/illegal.py");
    let said = sh(folder.path(), &format!("/usr/bin/python3 {} '{}'", script.display(), server.uri_of("")));
    assert!(said.ends_with("all as expected\n"), "{said}");
    server.stop();
}
