//! Servers that say nothing, sockets that take nothing: what waits for them says so, and ends when it is told to.

use std::io::Read;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::server::{Server, folder_with_disk};
use super::support::{done, text, vhd_fed, vhd_in};

/// Ends a command by a signal, and says how long that took.
fn end(process: &mut Child, signal: Signal) -> (ExitStatus, Duration) {
    let began = Instant::now();
    kill(Pid::from_raw(process.id() as i32), signal).unwrap();
    loop {
        if let Some(status) = process.try_wait().unwrap() {
            return (status, began.elapsed());
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{signal} does not end it");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Between a client and a server: what the server says goes on for so many bytes, then nothing more.
fn cut_after(server: &Server, folder: &std::path::Path, bytes: u64) {
    let listener = UnixListener::bind(folder.join("between")).unwrap();
    let to = server.socket();
    thread::spawn(move || {
        let (client, _) = listener.accept().unwrap();
        let server = std::os::unix::net::UnixStream::connect(to).unwrap();
        let (mut from_client, mut to_server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        thread::spawn(move || std::io::copy(&mut from_client, &mut to_server));
        std::io::copy(&mut server.take(bytes), &mut &client).unwrap();
        thread::sleep(Duration::from_secs(300));
    });
}

#[test]
fn a_wait_for_a_silent_server_ends_by_a_signal_at_any_point() {
    let folder = folder_with_disk("64M");
    assert!(vhd_fed(folder.path(), "write disk.vhd --offset 0", &vec![7; 20 << 20]).status.success());
    let server = Server::start(folder.path(), "disk.vhd --read-only");
    // In the greeting, in the handshake, in what is allocated, in the data.
    for (bytes, signal) in [(0, Signal::SIGINT), (40, Signal::SIGTERM), (200, Signal::SIGINT), (8 << 20, Signal::SIGTERM)] {
        cut_after(&server, folder.path(), bytes);
        let uri = format!("nbd+unix:///?socket={}", folder.path().join("between").display());
        let mut command = vhd_in(folder.path());
        command.args(["convert", &uri, "copy.raw"]).stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        thread::sleep(Duration::from_millis(1500));
        assert!(process.try_wait().unwrap().is_none(), "it did not wait after {bytes} bytes");
        let (status, took) = end(&mut process, signal);
        assert!(took < Duration::from_secs(2) && !status.success(), "{bytes} bytes, {signal}: {took:?}");
        assert!(!folder.path().join("copy.raw").exists());
        std::fs::remove_file(folder.path().join("between")).unwrap();
    }
    let names = super::support::names_in(folder.path());
    assert!(names.iter().all(|name| ["c", "disk.vhd", "s"].contains(&name.as_str())), "{names:?}");
    let uri = server.uri_of("");
    assert!(vhd_in(folder.path()).args(["convert", &uri, "copy.raw"]).status().unwrap().success());
    server.stop();
}

#[test]
fn a_server_that_is_silent_is_told_as_that_and_soon() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("nbd://{}/", listener.local_addr().unwrap());
    let began = Instant::now();
    let output = vhd_in(folder.path()).args(["convert", &uri, "copy.raw"]).output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(
        said.starts_with(&format!("vhd: {uri}: the server failed in the handshake: no answer within 10 s; see whether")),
        "{said}"
    );
    assert!((Duration::from_secs(9)..Duration::from_secs(20)).contains(&began.elapsed()), "{:?}", began.elapsed());
}

/// Whoever reads its output, or does not.
#[test]
fn a_copy_to_a_pipe_that_nobody_reads_ends_by_a_signal() {
    let folder = folder_with_disk("8M");
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let (reader, writer) = std::io::pipe().unwrap();
        let mut process =
            vhd_in(folder.path()).args(["convert", "disk.vhd", "-"]).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        thread::sleep(Duration::from_millis(700));
        let (status, took) = end(&mut process, signal);
        assert!(took < Duration::from_secs(2) && status.code() == Some(2), "{signal}: {took:?}, {status}");
        drop(reader);
    }
    let line = format!("{} convert disk.vhd - | cat | cmp - <(head -c 8M /dev/zero)", env!("CARGO_BIN_EXE_vhd"));
    assert!(Command::new("bash").args(["-c", &line]).current_dir(folder.path()).status().unwrap().success());
}

#[test]
fn a_ready_fd_that_nobody_reads_is_an_error_and_no_wait() {
    let folder = folder_with_disk("8M");
    for pipe in ["exec 9> >(:); sleep 0.3", "mkfifo ready; exec 7<>ready 9>ready 7<&-"] {
        let vhd = env!("CARGO_BIN_EXE_vhd");
        let line = format!("{pipe}; timeout 20 {vhd} serve disk.vhd --listen unix:s --control c --ready-fd 9");
        let output = super::server::shell(folder.path(), &line);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{pipe}: {said}");
        assert!(said.contains("--ready-fd"), "{said}");
    }
}

/// Who is asked whether it listens takes nobody, and as many wait for that as may.
#[test]
fn a_stopped_server_is_no_reason_to_wait() {
    let folder = folder_with_disk("8M");
    let socket = || socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    let address = socket2::SockAddr::unix(folder.path().join("s")).unwrap();
    let stopped = socket();
    stopped.bind(&address).unwrap();
    stopped.listen(1).unwrap();
    let connect = || {
        let socket = socket();
        socket.set_nonblocking(true).unwrap();
        socket.connect(&address).is_ok().then_some(socket)
    };
    let held: Vec<_> = (0..100).map_while(|_| connect()).collect();
    assert!(held.len() < 100, "any number may wait");
    let mut command = Command::new("timeout");
    command.arg("20").arg(env!("CARGO_BIN_EXE_vhd")).args("serve disk.vhd --listen unix:s --control c".split(' '));
    let output = command.current_dir(folder.path()).stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("someone listens there already"), "{}", text(&output.stderr));
}

#[test]
fn a_pid_file_is_made_new_and_removed_while_it_is_ones_own() {
    use std::fs;
    use std::os::unix::fs::symlink;
    let folder = folder_with_disk("8M");
    let path = |name: &str| folder.path().join(name);
    let serve = "serve disk.vhd --listen unix:s --control c --pid-file";
    let precious = |what: &[u8]| fs::write(path("precious"), what).unwrap();
    // Nothing that is there already is touched: files, what links lead to, whatever else.
    fs::create_dir(path("folder")).unwrap();
    symlink("precious", path("link")).unwrap();
    symlink("nowhere", path("dangling")).unwrap();
    make_fifo(&path("fifo"));
    precious(b"text\n");
    fs::write(path("empty"), "").unwrap();
    // The number of a process that is gone.
    let mut child = Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    let gone = format!("{}\n", child.id());
    for (name, text) in
        [("no-end", gone.trim()), ("more", &format!("{gone}{gone}")), ("runs", "1\n"), ("sign", &format!("+{gone}"))]
    {
        fs::write(path(name), text).unwrap();
    }
    fs::write(path("two-names"), &gone).unwrap();
    fs::hard_link(path("two-names"), path("second-name")).unwrap();
    let others = ["precious", "folder", "link", "dangling", "fifo", "empty", "no-end", "more", "runs", "sign", "two-names"];
    for name in others {
        let before = fs::read(path("precious")).unwrap();
        let said = super::support::refused(folder.path(), &format!("{serve} {name}"));
        assert!(said.contains("--pid-file"), "{name}: {said}");
        assert_eq!(fs::read(path("precious")).unwrap(), before);
        assert!(path(name).symlink_metadata().is_ok() && !path("nowhere").exists(), "{name}");
    }
    // New, or that of a server that was killed.
    for left in [None, Some(gone.as_str())] {
        if let Some(left) = left {
            fs::write(path("pid"), left).unwrap();
        }
        let server = Server::start(folder.path(), "disk.vhd --pid-file pid");
        assert_eq!(fs::read_to_string(path("pid")).unwrap(), format!("{}\n", server.pid()));
        done(folder.path(), "create more.vhd --size 8M --overwrite");
        let second = "serve more.vhd --listen unix:t --control d --pid-file pid";
        assert!(super::support::refused(folder.path(), second).contains("a server that runs"));
        server.stop();
        assert!(!path("pid").exists());
    }
    let server = Server::start(folder.path(), "disk.vhd --pid-file pid");
    server.kill();
    Server::start(folder.path(), "disk.vhd --pid-file pid").stop();
    // What someone else put in its place stays.
    let server = Server::start(folder.path(), "disk.vhd --pid-file pid");
    fs::rename(path("pid"), path("moved")).unwrap();
    fs::write(path("pid"), "mine\n").unwrap();
    server.stop();
    assert_eq!(fs::read(path("pid")).unwrap(), b"mine\n");
    let server = Server::start(folder.path(), "disk.vhd --pid-file new");
    fs::write(path("new"), "mine\n").unwrap();
    server.stop();
    assert_eq!(fs::read(path("new")).unwrap(), b"mine\n", "it was written over");
}

fn make_fifo(path: &std::path::Path) {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
}

#[test]
fn a_progress_that_nobody_reads_holds_up_no_command() {
    let folder = folder_with_disk("64M");
    assert!(vhd_fed(folder.path(), "write disk.vhd --offset 0", &vec![7; 20 << 20]).status.success());
    let (reader, writer) = super::starve::full_pipe();
    let mut command = vhd_in(folder.path());
    let mut process = command.args(["convert", "disk.vhd", "copy.raw", "--progress"]).stderr(writer).spawn().unwrap();
    let began = Instant::now();
    let status = loop {
        if let Some(status) = process.try_wait().unwrap() {
            break status;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "it waits for ever");
        thread::sleep(Duration::from_millis(10));
    };
    assert!(status.success() && folder.path().join("copy.raw").exists());
    drop(reader);
}

/// A client that takes nothing is waited for, but not by who says it twice.
#[test]
fn a_second_signal_ends_the_wait_for_the_last_clients() {
    use super::wire::*;
    let folder = folder_with_disk("128M");
    let mut server = Server::start(folder.path(), "disk.vhd");
    let mut silent = Wire::open(&server.socket(), "", Style::Structured);
    assert_eq!(silent.write_error(FUA, 0, &[7; 64 << 10]), 0);
    silent.request(DF, READ, 1, 0, 64 << 20);
    silent.take(1 << 10);
    server.signal(Signal::SIGTERM);
    thread::sleep(Duration::from_millis(200));
    // Of the same cause as the first.
    server.signal(Signal::SIGINT);
    thread::sleep(Duration::from_secs(2));
    let began = Instant::now();
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait().code(), Some(128 + 15), "{}", server.log());
    assert!(began.elapsed() < Duration::from_secs(3) && server.log().contains("a second signal"), "{}", server.log());
    assert_eq!(super::support::json(folder.path(), "check disk.vhd", 0)["ok"], true);
}
