//! What one client or one reader takes leaves the others theirs: the log, descriptors, metrics and control.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::server::{Server, folder_with_disk};
use super::support::{done, json, refused, text, vhd, vhd_in};
use super::wire::*;

const EIO: u32 = 5;

/// A folder with a fixed disk that is cut off after its first 4 MiB once it is served: reads behind that fail.
fn folder_with_cut_disk() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    done(folder.path(), "create disk.vhd --size 8M --type fixed");
    folder
}

fn cut(folder: &Path) {
    File::options().write(true).open(folder.join("disk.vhd")).unwrap().set_len(4 << 20).unwrap();
}

fn failed_reads(socket: &Path, count: usize) {
    let mut wire = Wire::open(socket, "", Style::Structured);
    for _ in 0..count {
        assert_eq!(wire.error_of(0, READ, 6 << 20, 512), EIO);
    }
    assert_eq!(wire.read(0, 0, 512).len(), 512);
}

/// A pipe that takes nothing more, and the end that nobody reads.
pub fn full_pipe() -> (std::io::PipeReader, OwnedFd) {
    let (reader, writer) = std::io::pipe().unwrap();
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    while (&writer).write(&[b'x'; 4096]).is_ok() {}
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    (reader, writer.into())
}

/// A server whose stdout is read up to its first line, or all of its document.
fn started(folder: &Path, line: &str, stderr: impl Into<Stdio>, end: &str) -> (Child, String) {
    let mut command = vhd_in(folder);
    command.arg("serve").args(line.split_whitespace()).stdout(Stdio::piped()).stderr(stderr);
    let mut process = command.spawn().unwrap();
    let mut said = BufReader::new(process.stdout.take().unwrap());
    let mut lines = String::new();
    while !lines.ends_with(end) && said.read_line(&mut lines).unwrap() > 0 {}
    (process, lines)
}

fn ends_in_order(mut process: Child) {
    let began = Instant::now();
    kill(Pid::from_raw(process.id() as i32), Signal::SIGTERM).unwrap();
    while process.try_wait().unwrap().is_none() {
        assert!(began.elapsed() < Duration::from_secs(30), "the server does not end");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(process.wait().unwrap().success());
}

#[test]
fn a_log_that_nobody_reads_stops_nobody() {
    let folder = folder_with_cut_disk();
    let (mut reader, writer) = full_pipe();
    let (process, _) = started(folder.path(), "disk.vhd --listen unix:s --control c", writer, "\n");
    cut(folder.path());
    let began = Instant::now();
    failed_reads(&folder.path().join("s"), 2000);
    assert_eq!(json(folder.path(), "ctl ./c list", 0)["exports"][0]["name"], "disk");
    ends_in_order(process);
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    let mut said = String::new();
    reader.read_to_string(&mut said).unwrap();
    assert!(!said.contains("disk.vhd"), "the pipe was not full: this shows nothing");
}

#[test]
fn a_client_makes_the_log_no_longer_than_a_few_lines() {
    let folder = folder_with_cut_disk();
    let server = Server::start(folder.path(), "disk.vhd");
    cut(folder.path());
    failed_reads(&server.socket(), 5000);
    let log = server.log();
    assert!(log.lines().count() <= 20 && log.contains("ERROR"), "{log}");
    let mut server = server;
    server.signal(Signal::SIGTERM);
    assert!(server.wait().success());
    // The last words come out, too: how much was left out.
    let log = server.log();
    let left_out: u64 = log
        .lines()
        .filter_map(|line| {
            line.split_once(" more like this were not logged: ")?.0.trim_start_matches("ERROR ").parse::<u64>().ok()
        })
        .sum();
    let logged = log.lines().filter(|line| line.starts_with("ERROR") && !line.contains("not logged")).count() as u64;
    assert_eq!(left_out + logged, 5000, "{log}");
}

/// What is served with so few open files.
fn with_few_files(line: &str) -> String {
    format!("ulimit -n 200; exec {} {line}", env!("CARGO_BIN_EXE_vhd"))
}

#[test]
fn clients_of_all_sorts_leave_descriptors_for_the_others() {
    let folder = folder_with_disk("8M");
    done(folder.path(), "create more.vhd --size 8M");
    let mut command = std::process::Command::new("bash");
    let line = with_few_files("serve disk.vhd --listen unix:s --control c --metrics 127.0.0.1:0 --json");
    command.args(["-c", &line]).current_dir(folder.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = command.spawn().unwrap();
    let mut said = BufReader::new(process.stdout.take().unwrap());
    let mut lines = String::new();
    while !lines.ends_with("}\n") && said.read_line(&mut lines).unwrap() > 0 {}
    let document: serde_json::Value = serde_json::from_str(&lines).unwrap();
    let metrics = document["metrics"].as_str().unwrap().trim_start_matches("http://").trim_end_matches("/metrics").to_owned();
    let socket = folder.path().join("s");

    let mut served: Vec<_> = (0..10).map(|_| Wire::open(&socket, "", Style::Structured)).collect();
    // Connections are held by those who ask nothing, who ask something, and who went no further than the handshake.
    let idle: Vec<_> = (0..300).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let scrapers: Vec<_> = (0..300).map(|_| TcpStream::connect(&metrics).unwrap()).collect();
    let administrators: Vec<_> = (0..100).map(|_| UnixStream::connect(folder.path().join("c")).unwrap()).collect();
    served.iter_mut().for_each(|wire| assert_eq!(wire.read(0, 0, 4096).len(), 4096));
    let few = std::fs::read_dir(format!("/proc/{}/fd", process.id())).unwrap().count();
    assert!(few < 190, "{few} of 200");

    let list = json(folder.path(), "ctl ./c list", 0);
    assert!(list["clients"].as_array().unwrap().len() >= 20, "{list}");
    done(folder.path(), "ctl ./c add more.vhd");
    done(folder.path(), "ctl ./c snapshot disk leaf.vhd");
    let mut scrape = TcpStream::connect(&metrics).unwrap();
    scrape.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    assert!(text(&super::server::rest(&mut scrape)).contains("vhd_requests_total"));
    assert_eq!(Wire::open(&socket, "more", Style::Simple).read(0, 0, 512).len(), 512);
    served.iter_mut().for_each(|wire| assert_eq!(wire.read(0, 0, 4096).len(), 4096));
    drop((idle, scrapers, administrators));
    let mut stderr = process.stderr.take().unwrap();
    ends_in_order(process);
    let mut log = String::new();
    stderr.read_to_string(&mut log).unwrap();
    assert!(log.starts_with("vhd: note: ") && log.contains("may have 200 open files"), "{log}");
    assert!(!log.contains("Too many open files"), "{log}");
}

#[test]
fn connections_that_are_asked_for_are_there_or_refused() {
    let folder = folder_with_disk("8M");
    let shell = |line: &str| super::server::shell(folder.path(), &with_few_files(line));
    let refusal = shell("serve disk.vhd --listen unix:s --control c --max-connections 150");
    assert_eq!(refusal.status.code(), Some(2));
    let said = text(&refusal.stderr);
    assert!(said.contains("150 connections need 450 open files") && said.contains("ulimit -n"), "{said}");
    assert!(refused(folder.path(), "serve disk.vhd --listen unix:s --control c --max-connections 2000000000").contains("ulimit"));
    let said = text(&shell("serve disk.vhd --listen unix:s --control c --max-connections 12 & sleep 1; kill $!; wait $!").stderr);
    assert!(!said.contains("12 connections"), "{said}");
    let server = Server::start(folder.path(), "disk.vhd --max-connections 12");
    let _ten: Vec<_> = (0..12).map(|_| Wire::open(&server.socket(), "", Style::Simple)).collect();
    assert!(vhd(folder.path(), "ctl ./c list").status.success());
    server.stop();
}
