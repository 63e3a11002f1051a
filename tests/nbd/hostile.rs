//! Clients that mean harm: others go on, and memory stays bounded.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vhd_testkit::crash::Random;

use super::server::{Server, folder_with_disk, rest};
use super::support::{done, noise, number, wait_until};
use super::wire::*;

/// A well-behaved client still gets what it asks for, soon.
fn others_go_on(server: &Server) {
    let began = Instant::now();
    let mut wire = Wire::open(&server.socket(), "", Style::Structured);
    for at in 0..20 {
        let data = noise(at, 4096);
        assert_eq!(wire.write_error(0, at * 4096, &data), 0);
        assert_eq!(wire.read(0, at * 4096, 4096), data);
    }
    assert!(began.elapsed() < Duration::from_secs(10), "others wait: {:?}", began.elapsed());
}

#[test]
fn a_thousand_connections_leave_room_for_others() {
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, 4096, 4096).unwrap();
    let folder = folder_with_disk("64M");
    let server = Server::start(folder.path(), "disk.vhd");
    let mut served: Vec<_> = (0..1000).map(|_| Wire::open(&server.socket(), "", Style::Simple)).collect();
    others_go_on(&server);
    for (index, wire) in served.iter_mut().enumerate() {
        assert_eq!(wire.read(0, 4096 * (index as u64 % 20), 512).len(), 512);
    }
    let (now, _) = server.memory();
    assert!(now < 250 << 20, "{now} bytes for a thousand clients");
    // More than the limit: those that have chosen an export stay.
    let more: Vec<_> = (0..60).map(|_| UnixStream::connect(server.socket()).unwrap()).collect();
    assert_eq!(served[0].read(0, 0, 512).len(), 512);
    assert_eq!(served[999].read(0, 0, 512).len(), 512);
    drop((served, more));
    wait_until("all are gone", || Wire::connect(&server.socket()).option_kind(LIST, &[]) == ACK);
    server.stop();
}

/// Half a handshake on each: the oldest of them make room.
#[test]
fn clients_that_stay_in_the_handshake_are_pushed_out_and_timed_out() {
    let folder = folder_with_disk("64M");
    let server = Server::start(folder.path(), "disk.vhd --max-connections 50 --handshake-timeout 5");
    let mut kept = Wire::open(&server.socket(), "", Style::Simple);
    let mut half_open: Vec<_> = (0..200)
        .map(|_| {
            let mut stream = UnixStream::connect(server.socket()).unwrap();
            let _ = stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\xff");
            stream
        })
        .collect();
    others_go_on(&server);
    assert_eq!(kept.read(0, 0, 512).len(), 512, "one that is served is not pushed out");
    let began = Instant::now();
    half_open.iter_mut().for_each(|stream| drop(rest(stream)));
    assert!(began.elapsed() < Duration::from_secs(20));
    assert_eq!(kept.read(0, 0, 512).len(), 512, "the time is for the handshake only");
    server.stop();
}

#[test]
fn clients_that_never_read_hold_up_nobody() {
    let folder = folder_with_disk("256M");
    let server = Server::start(folder.path(), "disk.vhd");
    let mut silent: Vec<_> = (0..60)
        .map(|index| {
            let style = [Style::Simple, Style::Structured, Style::Extended][index % 3];
            let mut wire = Wire::open(&server.socket(), "", style);
            // As much as can be asked for: long reads, short ones, zeroes to be answered.
            wire.stream.set_nonblocking(true).unwrap();
            wire.style = Style::Structured;
            let magic: u32 = if style == Style::Extended { 0x21e4_1c71 } else { 0x2560_9513 };
            let request = |len: u64| {
                // As one chunk, so that the zeros are sent.
                let flags = if style == Style::Simple { 0 } else { DF };
                let mut bytes = [&magic.to_be_bytes()[..], &flags.to_be_bytes(), &[0; 2], &[1; 8], &[0; 8]].concat();
                if style == Style::Extended {
                    bytes.extend(len.to_be_bytes())
                } else {
                    bytes.extend((len as u32).to_be_bytes())
                }
                bytes
            };
            for len in (0..2000).map(|n| if n % 4 == 0 { 64 << 20 } else { 128 << 10 }) {
                if wire.stream.write_all(&request(len)).is_err() {
                    break;
                }
            }
            wire
        })
        .collect();
    (0..5).for_each(|_| others_go_on(&server));
    let (_, most) = server.memory();
    assert!(most < 500 << 20, "{most} bytes at most");
    // One of them reads after all, and gets all that it asked for first.
    let first = &mut silent[1];
    first.stream.set_nonblocking(false).unwrap();
    let mut got = 0;
    while got < 64 << 20 {
        got += first.reply(0).payload.len();
    }
    drop(silent);
    others_go_on(&server);
    server.stop();
    done(folder.path(), "check disk.vhd");
}

#[test]
fn an_idle_client_is_let_go_where_that_was_asked_for() {
    let folder = folder_with_disk("8M");
    let server = Server::start(folder.path(), "disk.vhd --idle-timeout 1");
    let mut idle = Wire::open(&server.socket(), "", Style::Simple);
    let mut busy = Wire::open(&server.socket(), "", Style::Simple);
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        busy.read(0, 0, 512);
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(idle.is_over());
    server.stop();
}

/// Bytes that are almost a session: the server lives, and says so to the next client.
#[test]
fn sessions_with_random_bytes_in_them_end_and_nothing_else() {
    let folder = folder_with_disk("8M");
    let server = Server::start(folder.path(), "disk.vhd");
    let seed = number("VHD_NBD_SEED", 1);
    let count = number("VHD_NBD_SESSIONS", 300);
    for seed in seed..seed + count {
        let mut random = Random::new(seed);
        let mut bytes = 3_u32.to_be_bytes().to_vec();
        for _ in 0..random.below(6) {
            let option = random.below(13) as u32;
            let data = noise(random.below(1 << 30), random.below(40) as usize);
            bytes.extend([&b"IHAVEOPT"[..], &option.to_be_bytes(), &(data.len() as u32).to_be_bytes(), &data].concat());
        }
        if random.below(3) > 0 {
            bytes.extend([&b"IHAVEOPT"[..], &GO.to_be_bytes(), &6_u32.to_be_bytes(), &[0; 6]].concat());
            for _ in 0..random.below(20) {
                let header = [&0x2560_9513_u32.to_be_bytes()[..], &noise(random.below(1 << 30), 4)].concat();
                let len = (random.below(9000) as u32).to_be_bytes();
                let command = (random.below(9) as u16).to_be_bytes();
                let offset = (random.below(10 << 20)).to_be_bytes();
                bytes.extend([&header[..6], &command, &[9; 8], &offset, &len].concat());
                bytes.extend(noise(random.below(1 << 30), random.below(9000) as usize));
            }
        }
        for _ in 0..random.below(3) {
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << random.below(8);
        }
        let mut stream = UnixStream::connect(server.socket()).unwrap();
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let began = Instant::now();
        rest(&mut stream);
        assert!(began.elapsed() < Duration::from_secs(30), "seed {seed}: the session does not end");
    }
    others_go_on(&server);
    server.stop();
    done(folder.path(), "check disk.vhd");
}
