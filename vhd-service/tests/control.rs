//! Goal: a control socket answers whoever may ask, whatever others do to it.
//!
//! Method: real sockets; clients that speak nonsense, stay silent, are too many or go away.
//! It would fail if one client could stop the others, a dead process's socket were in the way, or an error lost its kind.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use vhd_core::{Error, ErrorKind, Result};
use vhd_service::control::{Control, Request, call};

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
    // Too many are told so; when they leave others get in.
    let many: Vec<_> = (0..40).map(|_| UnixStream::connect(&path).unwrap()).collect();
    let refused = (0..200).any(|_| call(&path, &Request::new("echo").with("text", "x")).is_err());
    assert!(refused, "any number of clients was served");
    drop((bad, many, answers));
    let again = (0..500).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(10));
        call(&path, &Request::new("echo").with("text", "x")).is_ok()
    });
    assert!(again, "clients that left still count");
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
