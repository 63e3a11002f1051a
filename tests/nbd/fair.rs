//! Shares: one peer, however many connections it has, leaves others what they need.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::server::{Server, folder_with_disk, has, sh, shell};
use super::support::{done, json, noise, vhd_in, wait_until};
use super::wire::*;

/// Two peers of a server that listens on TCP.
const GREEDY: u8 = 1;
const MODEST: u8 = 2;

fn many_files() {
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, 4096, 4096).unwrap();
}

fn serve_tcp(folder: &std::path::Path, options: &str) -> Server {
    Server::start_at(folder, &format!("disk.vhd --control c --listen tcp:127.0.0.1:0 {options}"))
}

/// Connections by the address that they come from.
fn connections(server: &Server, host: u8) -> usize {
    let list = json(&server.folder, "ctl ./c list", 0);
    let from = format!("127.0.0.{host}:");
    list["clients"].as_array().unwrap().iter().filter(|client| client["peer"].as_str().unwrap().starts_with(&from)).count()
}

fn is_served(wire: &mut Wire, at: u64) {
    let data = noise(at, 4096);
    assert_eq!(wire.write_error(0, at * 4096, &data), 0);
    assert_eq!(wire.read(0, at * 4096, 4096), data);
}

#[test]
fn a_thousand_connections_of_one_machine_leave_places_for_another() {
    many_files();
    let folder = folder_with_disk("64M");
    let server = serve_tcp(folder.path(), "");
    let mut greedy: Vec<_> = (0..1000).map(|_| Wire::open_from(GREEDY, server.port())).collect();
    let half_open: Vec<_> = (0..24).map(|_| tcp_from(GREEDY, server.port())).collect();
    wait_until("all places are taken", || connections(&server, GREEDY) == 1024);
    // Its own half-open ones make room for its next.
    greedy.push(Wire::open_from(GREEDY, server.port()));
    // Another machine's connections, while the first goes on to ask for more.
    let stop = AtomicBool::new(false);
    let mut modest = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let mut stream = tcp_from(GREEDY, server.port());
                let _ = stream.write_all(b"\0\0\0\x03IHAVEOPT");
            }
        });
        let modest: Vec<_> = (0..100)
            .map(|at| {
                let mut wire = Wire::open_from(MODEST, server.port());
                is_served(&mut wire, at);
                wire
            })
            .collect();
        stop.store(true, Ordering::Relaxed);
        modest
    });
    assert_eq!(connections(&server, MODEST), modest.len(), "none of them is let go");
    modest.iter_mut().enumerate().for_each(|(at, wire)| is_served(wire, at as u64));
    drop(half_open);
    let left = connections(&server, GREEDY);
    assert!((900..=1024 - modest.len()).contains(&left), "{left} connections of the first are left");
    // Those that were silent longest went.
    assert!(greedy[0].is_over());
    is_served(greedy.last_mut().unwrap(), 1);
    drop((greedy, modest));
    wait_until("all are gone", || connections(&server, GREEDY) + connections(&server, MODEST) == 0);
    server.stop();
}

#[test]
fn sessions_of_one_user_leave_places_for_another() {
    if !nix::unistd::geteuid().is_root() || !has("nbdinfo") {
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI must test several users: not root");
        eprintln!("SKIPPED: another user needs root");
        return;
    }
    let folder = folder_with_disk("8M");
    let server = Server::start(folder.path(), "disk.vhd --max-connections 20");
    for path in [folder.path().to_owned(), server.socket()] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o777)).unwrap();
    }
    let mut sessions: Vec<_> = (0..20).map(|_| Wire::open(&server.socket(), "", Style::Simple)).collect();
    let another = format!("setpriv --reuid=65534 --regid=65534 --clear-groups nbdinfo --size '{}'", server.uri_of(""));
    assert_eq!(sh(folder.path(), &another).trim(), (8 << 20).to_string());
    assert!(sessions[0].is_over());
    is_served(&mut sessions[19], 1);
    // It is the first user's turn to be refused: nobody has more.
    sessions.push(Wire::open(&server.socket(), "", Style::Simple));
    let refused = shell(folder.path(), &format!("nbdinfo --size '{}'", server.uri_of("")));
    assert!(!refused.status.success());
    server.stop();
}

/// Requests that wait for the disk wait behind those of their own peer, and none waits for more than two flushes: on a disk, and
/// in memory, where a sync takes no time and all is a matter of whose turn it is.
#[test]
fn a_flood_of_durable_writes_leaves_another_machine_served() {
    const CONNECTIONS: usize = 60;
    const EACH: usize = 60;
    for place in [std::env::temp_dir(), "/dev/shm".into()] {
        let Ok(folder) = tempfile::tempdir_in(&place) else { continue };
        done(folder.path(), "create disk.vhd --size 64M");
        let server = serve_tcp(folder.path(), "");
        let mut greedy: Vec<_> = (0..CONNECTIONS).map(|_| Wire::open_from(GREEDY, server.port())).collect();
        let mut modest = Wire::open_from(MODEST, server.port());
        // All of the flood is there when it begins.
        server.signal(Signal::SIGSTOP);
        for (number, wire) in greedy.iter_mut().enumerate() {
            (0..EACH).for_each(|at| wire.write(FUA, 1, (number * EACH + at) as u64 * 4096, &[7; 512]));
        }
        server.signal(Signal::SIGCONT);
        for at in 0..8 {
            assert_eq!(modest.write_error(FUA, at * 4096, &[9; 512]), 0);
        }
        let mut answered = 0;
        for wire in &mut greedy {
            wire.stream.set_nonblocking(true).unwrap();
            let mut replies = [0; EACH * 16];
            answered += wire.stream.read(&mut replies).unwrap_or(0) / 16;
        }
        println!("{}: {answered} of the other's requests went first", place.display());
        // Of each flush it shares one with up to 48 of theirs, and may wait for another.
        assert!(answered < CONNECTIONS * EACH * 3 / 4, "{}: {answered} of the other's requests went first", place.display());
        drop(greedy);
        server.stop();
        done(folder.path(), "check disk.vhd");
    }
}

/// A process that may be stopped, and is not when this goes.
struct Stopped(Child);

impl Stopped {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().try_into().unwrap()), signal).unwrap();
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.signal(Signal::SIGCONT);
        self.signal(Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

/// One image lies on a file system that hangs: a FUSE one, whose server is stopped.
#[test]
fn a_disk_that_hangs_holds_up_no_other() {
    if !std::path::Path::new("/dev/fuse").exists() {
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI must test hanging disks: no /dev/fuse");
        return;
    }
    let folder = folder_with_disk("64M");
    let path = folder.path();
    done(path, "create inner.vhd --size 16M --type fixed");
    done(path, "convert inner.vhd outer.vhd --from raw");
    std::fs::write(path.join("hangs.vhd"), "").unwrap();
    let mut mount = vhd_in(path);
    mount.args(["mount", "outer.vhd", "hangs.vhd", "--foreground"]).stdout(Stdio::null());
    let mount = Stopped(mount.spawn().unwrap());
    wait_until("it is mounted", || path.join("hangs.vhd").metadata().is_ok_and(|found| found.len() > 16 << 20));
    let server = Server::start(path, "disk.vhd hangs.vhd");
    let mut hanging: Vec<_> = (0..4).map(|_| Wire::open(&server.socket(), "hangs", Style::Simple)).collect();
    mount.signal(Signal::SIGSTOP);
    for (number, wire) in (0..).zip(&mut hanging) {
        (0..10).for_each(|at| wire.request(0, READ, 1, (number * 16 + at) << 16, 4096));
        (0..10).for_each(|at| wire.write(0, 2, (number * 16 + at) << 16, &[5; 4096]));
    }
    let began = Instant::now();
    let mut wire = Wire::open(&server.socket(), "disk", Style::Structured);
    (0..50).for_each(|at| is_served(&mut wire, at));
    assert!(began.elapsed() < Duration::from_secs(30), "others wait: {:?}", began.elapsed());
    mount.signal(Signal::SIGCONT);
    for wire in &mut hanging {
        // All are answered after all, in whatever order.
        wire.take(10 * (16 + 4096) + 10 * 16);
    }
    drop(hanging);
    server.stop();
    done(path, "unmount hangs.vhd");
    drop(mount);
}
