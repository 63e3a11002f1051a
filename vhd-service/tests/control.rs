//! Goal: a control socket answers whoever may ask, whatever others do to it.
//!
//! Method: real sockets; clients that speak nonsense, stay silent, are too many or go away.
//! It would fail if one client could stop the others, a dead process's socket were in the way, or an error lost its kind.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use serde_json::{Value, json};
use vhd_core::{Error, ErrorKind, Result};
use vhd_service::control::{Control, MAX_CLIENTS, Request, call};
use vhd_service::socket::is_served;

fn echo(request: &Request) -> Result<Value> {
    match request.command.as_str() {
        "echo" => Ok(json!({ "said": request.text("text")?, "loud": request.flag("loud")? })),
        "fail" => Err(Error::new(ErrorKind::NoSpace, "has no room").at(Path::new("disk.vhd"))),
        _ => Err(request.unknown(&["echo", "fail"])),
    }
}

fn serve(path: &Path) -> Control {
    Control::bind(path, Arc::new(echo)).unwrap()
}

#[test]
fn requests_are_answered_and_errors_keep_their_kind() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.ctl");
    let control = serve(&path);
    assert_eq!(control.path().metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let answer = call(&path, &Request::new("echo").with("text", "hello").with("loud", true)).unwrap();
    assert_eq!(answer, json!({ "said": "hello", "loud": true }));
    let error = call(&path, &Request::new("fail")).unwrap_err();
    assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::NoSpace, "disk.vhd: has no room"));
    for (request, says) in [
        (Request::new("echo"), "\"text\""),
        (Request::new("echo").with("text", 5), "no text"),
        (Request::new("echo").with("text", "x").with("loud", 1), "neither true nor false"),
        (Request::new("dance"), "expected one of: echo fail"),
    ] {
        let error = call(&path, &request).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains(says), "{error}");
    }
}

#[test]
fn what_dead_processes_leave_is_replaced_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.ctl");
    drop(UnixListener::bind(&path).unwrap());
    let error = call(&path, &Request::new("echo")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    let control = serve(&path);
    assert_eq!(Control::bind(&path, Arc::new(echo)).unwrap_err().kind(), ErrorKind::Exists);
    assert!(call(&path, &Request::new("echo").with("text", "x")).is_ok(), "who failed to bind broke who serves");
    drop(control);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "a socket was left");
    std::fs::write(&path, "a file").unwrap();
    assert_eq!(Control::bind(&path, Arc::new(echo)).unwrap_err().kind(), ErrorKind::Exists);
    assert_eq!(std::fs::read(&path).unwrap(), b"a file");
    let missing = Control::bind(&folder.path().join("missing/a.ctl"), Arc::new(echo)).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
}

#[test]
fn bad_clients_do_not_hinder_others() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.ctl");
    let _control = serve(&path);
    // Some say nothing, some half of something, some nonsense again and again.
    let mut bad: Vec<_> = (0..20).map(|_| UnixStream::connect(&path).unwrap()).collect();
    bad[0].write_all(b"{\"command\":").unwrap();
    bad[1].write_all(b"nonsense\n{}\n\xFF\n").unwrap();
    let mut answers = BufReader::new(bad[1].try_clone().unwrap());
    for _ in 0..3 {
        let mut line = String::new();
        answers.read_line(&mut line).unwrap();
        assert!(line.contains("is not understood"), "{line}");
    }
    assert!(call(&path, &Request::new("echo").with("text", "x")).is_ok());
}

#[test]
fn clients_that_ask_nothing_make_room_for_those_that_do() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.ctl");
    let _control = serve(&path);
    let idle: Vec<_> = (0..200)
        .map(|_| {
            let client = UnixStream::connect(&path).unwrap();
            assert!(call(&path, &Request::new("echo").with("text", "x")).is_ok());
            client
        })
        .collect();
    let is_over = |client: &UnixStream| {
        client.set_nonblocking(true).unwrap();
        (&*client).read(&mut [0]).is_ok_and(|count| count == 0)
    };
    let (old, new) = idle.split_at(200 - MAX_CLIENTS);
    assert!(old.iter().all(is_over), "there are more than so many places, or others go first");
    assert!(new.iter().filter(|client| !is_over(client)).count() >= MAX_CLIENTS - 2);
}

#[test]
fn clients_whose_requests_are_under_way_keep_their_places() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.ctl");
    let (go_on, wait) = std::sync::mpsc::channel::<()>();
    let wait = Mutex::new(wait);
    let handler = move |_: &Request| Ok(json!(wait.lock().unwrap().recv().is_err()));
    let _control = Control::bind(&path, Arc::new(handler)).unwrap();
    let asking: Vec<_> = (0..MAX_CLIENTS)
        .map(|_| {
            let path = path.clone();
            std::thread::spawn(move || call(&path, &Request::new("wait")))
        })
        .collect();
    // Who comes until all of them are at work may take a place; it asks nothing, and gives it back.
    let refused = (0..1000).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(10));
        let mut one_more = UnixStream::connect(&path).unwrap();
        one_more.set_read_timeout(Some(std::time::Duration::from_millis(50))).unwrap();
        let mut answer = [0; 1024];
        one_more.read(&mut answer).is_ok_and(|count| String::from_utf8_lossy(&answer[..count]).contains("try again later"))
    });
    assert!(refused, "any number of requests is done at once");
    drop(go_on);
    let answers = asking.into_iter().map(|asking| asking.join().unwrap()).filter(Result::is_ok).count();
    assert_eq!(answers, MAX_CLIENTS);
    assert!(call(&path, &Request::new("wait")).is_ok(), "clients that left still count");
}

/// A request that has no end takes no memory without end, and who replaced the socket keeps theirs.
#[test]
fn a_request_has_an_end_and_a_name_is_removed_while_it_is_ones_own() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.ctl");
    let control = serve(&path);
    let mut endless = UnixStream::connect(&path).unwrap();
    let ended = (0..1000).any(|_| endless.write_all(&[b'x'; 1024]).is_err());
    assert!(ended, "1 MB of a request was taken");
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "someone else's").unwrap();
    drop(control);
    assert_eq!(std::fs::read(&path).unwrap(), b"someone else's");
}

/// A server that is stopped takes no clients, and a socket has room for so many that wait.
#[test]
fn whether_someone_listens_is_told_without_waiting() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.ctl");
    let stopped = UnixListener::bind(&path).unwrap();
    let waiting: Vec<_> = (0..100_000)
        .map_while(|_| {
            let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_NONBLOCK, None).unwrap();
            connect(socket.as_raw_fd(), &UnixAddr::new(&path).unwrap()).is_ok().then_some(socket)
        })
        .collect();
    assert!(is_served(&path).unwrap(), "after {} that wait", waiting.len());
    assert_eq!(Control::bind(&path, Arc::new(echo)).unwrap_err().kind(), ErrorKind::Exists);
    drop((stopped, waiting));
    assert!(!is_served(&path).unwrap());
    assert!(is_served(&folder.path().join("none")).is_err());
}

#[test]
fn a_control_ends_with_clients_connected() {
    let folder = tempfile::tempdir().unwrap();
    let control = serve(&folder.path().join("a.ctl"));
    let client = UnixStream::connect(control.path()).unwrap();
    drop(control);
    let mut line = String::new();
    assert_eq!(BufReader::new(client).read_line(&mut line).unwrap_or(0), 0, "{line}");
}
