//! How a server begins, lives and ends.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tempfile::NamedTempFile;
use vhd_core::Disk;
use vhd_testkit::volume::Volume;

use super::server::{Server, folder_with_disk, has, sh};
use super::support::{done, json, noise, refused, text, vhd, vhd_in, wait_until};
use super::wire::*;

fn read_image(path: &Path, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    Disk::open(path, &Default::default()).unwrap().read_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn what_was_begun_is_finished_and_what_comes_later_is_told_of_the_end() {
    let folder = folder_with_disk("128M");
    let server = Server::start(folder.path(), "disk.vhd");
    let mut busy = Wire::open(&server.socket(), "", Style::Structured);
    let mut idle = Wire::open(&server.socket(), "", Style::Structured);
    let half_open = UnixStream::connect(server.socket()).unwrap();
    // A long write of which a part has come, when the word to end comes.
    let data = noise(1, 32 << 20);
    busy.request(0, WRITE, 1, 0, data.len() as u64);
    busy.send(&data[..20 << 20]);
    server.signal(Signal::SIGTERM);
    assert!(idle.is_over(), "an idle client is let go at once");
    let last = data.len() - 100;
    busy.send(&data[20 << 20..last]);
    // What comes later comes with the end of the write: when that is done the session ends.
    busy.send(&[&data[last..], &busy.request_bytes(0, READ, 2, 0, 512)].concat());
    let replies: Vec<_> = (0..2).map(|_| busy.reply(0)).collect();
    assert_eq!((replies[0].cookie, replies[0].error), (1, 0));
    assert_eq!((replies[1].cookie, replies[1].error), (2, ESHUTDOWN));
    assert!(busy.is_over());
    drop(half_open);
    let mut server = server;
    assert!(server.wait().success(), "{}", server.log());
    assert!(read_image(&folder.path().join("disk.vhd"), 0, data.len()) == data, "what was answered is there");
    assert!(!folder.path().join("s").exists() && !folder.path().join("c").exists(), "its sockets are gone");
    done(folder.path(), "check disk.vhd");
}

#[test]
fn a_client_that_takes_nothing_does_not_hold_up_the_end_for_long() {
    let folder = folder_with_disk("128M");
    let server = Server::start(folder.path(), "disk.vhd");
    let mut silent = Wire::open(&server.socket(), "", Style::Structured);
    silent.request(DF, READ, 1, 0, 64 << 20);
    silent.take(1 << 20);
    // One that has a thread of its own, as it asked much at a time, and then stops in the middle of a write.
    let mut busy = Wire::open(&server.socket(), "", Style::Structured);
    for _ in 0..200 {
        let requests: Vec<_> = (0..8).flat_map(|cookie| busy.request_bytes(0, READ, cookie, 4096 * cookie, 4096)).collect();
        busy.send(&requests);
        (0..8).for_each(|_| drop(busy.replies(4096)));
    }
    busy.request(0, WRITE, 1, 0, 4096);
    busy.send(&[1; 1000]);
    let began = Instant::now();
    server.stop();
    assert!(began.elapsed() < Duration::from_secs(40), "{:?}", began.elapsed());
}

#[test]
fn once_means_until_the_last_client_is_gone() {
    let folder = folder_with_disk("8M");
    let mut server = Server::start(folder.path(), "disk.vhd --once --pid-file pid");
    assert_eq!(fs::read_to_string(folder.path().join("pid")).unwrap(), format!("{}\n", server.pid()));
    // One that only looks at the list is no client yet.
    let mut looks = Wire::connect(&server.socket());
    assert_eq!(looks.option_kind(LIST, &[]), ACK);
    assert_eq!(looks.option_kind(ABORT, &[]), ACK);
    assert!(looks.is_over());
    let (mut first, second) = (Wire::open(&server.socket(), "", Style::Simple), Wire::open(&server.socket(), "", Style::Simple));
    drop(second);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(first.write_error(0, 0, &[9; 512]), 0);
    first.request(0, DISC, 1, 0, 0);
    assert!(server.wait().success());
    assert!(!folder.path().join("pid").exists());
    assert_eq!(read_image(&folder.path().join("disk.vhd"), 0, 512), [9; 512]);
}

#[test]
fn ready_fd_gets_the_uri_when_clients_may_come() {
    let folder = folder_with_disk("8M");
    let uri = sh(
        folder.path(),
        &format!(
            "mkfifo ready; {} serve disk.vhd --listen unix:s --control c --once --ready-fd 7 7>ready >out & \
             read uri < ready; echo $uri; nbdinfo --size \"$uri\" >&2; wait",
            env!("CARGO_BIN_EXE_vhd")
        ),
    );
    assert!(uri.starts_with("nbd+unix:///?socket=/"), "a client in another folder could not use {uri}");
    let reply = refused(folder.path(), "serve disk.vhd --listen unix:s --control c --ready-fd 99");
    assert!(reply.contains("--ready-fd"), "{reply}");
}

#[test]
fn libnbd_runs_it_on_stdio_and_by_socket_activation() {
    if !has("nbdinfo") || !has("nbdcopy") {
        return;
    }
    let folder = folder_with_disk("8M");
    fs::write(folder.path().join("in.raw"), noise(5, 8 << 20)).unwrap();
    let program = env!("CARGO_BIN_EXE_vhd");
    // Square brackets mean socket activation to these two.
    sh(folder.path(), &format!("nbdcopy -- in.raw [ {program} serve disk.vhd --control c ]"));
    sh(
        folder.path(),
        &format!("nbdcopy -- [ {program} serve disk.vhd --listen systemd --control c ] out.raw && cmp in.raw out.raw"),
    );
    let script = format!(
        "import nbd; h = nbd.NBD(); h.connect_command(['{program}', 'serve', 'disk.vhd', '--listen', 'stdio']); \
         h.pwrite(b'stdio', 4096); h.flush(); print(bytes(h.pread(5, 4096))); h.shutdown()"
    );
    assert_eq!(sh(folder.path(), &format!("/usr/bin/python3 -c \"{script}\"")), "b'stdio'\n");
    wait_until("the image is closed", || vhd(folder.path(), "check disk.vhd").status.success());
    assert_eq!(read_image(&folder.path().join("disk.vhd"), 4096, 5), b"stdio");
}

/// Two pipes instead of a socket.
#[test]
fn pipes_will_do_for_stdio() {
    let folder = folder_with_disk("8M");
    let mut command = vhd_in(folder.path());
    command
        .args(["serve", "disk.vhd", "--listen", "stdio"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped());
    let mut server = command.spawn().unwrap();
    use std::io::Write;
    let mut input = server.stdin.take().unwrap();
    let go = go_data("", &[]);
    input
        .write_all(&[&3_u32.to_be_bytes()[..], b"IHAVEOPT", &GO.to_be_bytes(), &(go.len() as u32).to_be_bytes(), &go].concat())
        .unwrap();
    input
        .write_all(&[&0x2560_9513_u32.to_be_bytes()[..], &[0, 0, 0, 0], &[1; 8], &[0; 8], &512_u32.to_be_bytes()].concat())
        .unwrap();
    input.write_all(&[&0x2560_9513_u32.to_be_bytes()[..], &[0, 0, 0, 2], &[2; 8], &[0; 8], &[0; 4]].concat()).unwrap();
    drop(input);
    let mut said = Vec::new();
    server.stdout.take().unwrap().read_to_end(&mut said).unwrap();
    assert!(server.wait().unwrap().success());
    assert_eq!(&said[said.len() - 528..said.len() - 512], [&0x6744_6698_u32.to_be_bytes()[..], &[0; 4], &[1; 8]].concat());
}

#[test]
fn names_are_the_files_or_the_users_and_never_two_alike() {
    let folder = folder_with_disk("8M");
    done(folder.path(), "create other.vhd --size 16M");
    fs::create_dir(folder.path().join("sub")).unwrap();
    done(folder.path(), "create sub/disk.vhd --size 8M");
    let alike = refused(folder.path(), "serve disk.vhd sub/disk.vhd --listen unix:s --control c");
    assert!(alike.contains("\"disk\"") && alike.contains("sub/disk.vhd"), "{alike}");
    assert!(refused(folder.path(), "serve disk.vhd --name noimage --listen unix:s --control c").contains("NAME=IMAGE"));
    let server = Server::start(folder.path(), "disk.vhd other.vhd --name third=sub/disk.vhd");
    for (name, size) in [("", 8 << 20), ("disk", 8 << 20), ("other", 16 << 20), ("third", 8 << 20)] {
        assert_eq!(Wire::open(&server.socket(), name, Style::Simple).size, size, "{name}");
    }
    let in_use = refused(folder.path(), "serve other.vhd --listen unix:t --control d");
    assert!(in_use.contains("other.vhd"), "{in_use}");
    done(folder.path(), "create free.vhd --size 8M");
    assert!(refused(folder.path(), "serve free.vhd --read-only --listen unix:sub/disk.vhd --control d").contains("no socket"));
    server.stop();
}

#[test]
fn exports_come_and_go_while_others_are_served() {
    let folder = folder_with_disk("8M");
    done(folder.path(), "create other.vhd --size 16M");
    let server = Server::start(folder.path(), "disk.vhd");
    let mut client = Wire::open(&server.socket(), "disk", Style::Simple);
    assert_eq!(json(folder.path(), "ctl ./c add other.vhd --name more --read-only", 0)["name"], "more");
    let mut added = Wire::open(&server.socket(), "more", Style::Simple);
    assert_eq!((added.size, added.flags & 2), (16 << 20, 2));
    assert!(refused(folder.path(), "ctl ./c add other.vhd --name disk").contains("disk"));
    let list = json(folder.path(), "ctl ./c list", 0);
    assert_eq!((list["exports"].as_array().unwrap().len(), list["clients"].as_array().unwrap().len()), (2, 2));
    assert!(text(&vhd(folder.path(), "ctl ./c list").stdout).contains("more  other.vhd  16 MiB"));
    assert!(refused(folder.path(), "ctl ./c remove more").contains("--force"));
    done(folder.path(), "ctl ./c remove more --force");
    assert!(added.is_over());
    assert_eq!(Wire::connect(&server.socket()).option_kind(GO, &go_data("more", &[])), ERR_UNKNOWN);
    done(folder.path(), "resize other.vhd 24M");
    assert_eq!(client.read(0, 0, 512), [0; 512]);
    assert!(refused(folder.path(), "ctl ./c remove none").contains("none"));
    server.stop();
    assert!(refused(folder.path(), "ctl ./c list").contains("c"));
}

#[test]
fn a_refreshed_disk_has_its_new_size_for_new_clients() {
    let folder = folder_with_disk("8M");
    let server = Server::start(folder.path(), "disk.vhd");
    let mut old = Wire::open(&server.socket(), "", Style::Simple);
    assert_eq!(old.write_error(0, 0, &[7; 4096]), 0);
    assert_eq!(json(folder.path(), "ctl ./c refresh disk --size 32M", 0)["size"], 32 << 20);
    let mut new = Wire::open(&server.socket(), "", Style::Simple);
    assert_eq!((new.size, new.write_error(0, 31 << 20, &[8; 4096])), (32 << 20, 0));
    assert_eq!(old.write_error(0, 31 << 20, &[8; 4096]), ENOSPC, "a session has the size that it was told");
    assert_eq!(old.read(0, 0, 4096), [7; 4096]);
    server.stop();
    done(folder.path(), "check disk.vhd");
}

#[test]
fn an_image_that_is_served_read_only_is_opened_again_but_never_resized() {
    let folder = folder_with_disk("8M");
    let server = Server::start(folder.path(), "--read-only disk.vhd");
    let said = refused(folder.path(), "ctl ./c refresh disk --size 32M");
    assert!(said.contains("disk.vhd: is served read-only, so it is not made larger"), "{said}");
    assert_eq!(json(folder.path(), "ctl ./c refresh disk", 0)["size"], 8 << 20);
    server.stop();
}

#[test]
fn a_refresh_takes_no_other_image_and_keeps_lock_and_file() {
    let folder = folder_with_disk("8M");
    let path = |name: &str| folder.path().join(name);
    done(folder.path(), "create other.vhd --size 8M");
    let other = fs::read(path("other.vhd")).unwrap();
    let server = Server::start(folder.path(), "disk.vhd");
    let mut client = Wire::open(&server.socket(), "", Style::Simple);
    assert_eq!(client.write_error(0, 0, &[7; 4096]), 0);
    fs::rename(path("disk.vhd"), path("moved.vhd")).unwrap();
    fs::rename(path("other.vhd"), path("disk.vhd")).unwrap();
    for command in ["refresh disk", "refresh disk --size 32M", "snapshot disk new.vhd"] {
        let said = refused(folder.path(), &format!("ctl ./c {command}"));
        assert!(said.contains("disk.vhd: is the name of another file now") && said.contains("moved.vhd"), "{command}: {said}");
        assert_eq!((client.read(0, 0, 4096), client.write_error(0, 4096, &[8; 4096])), (vec![7; 4096], 0), "{command}");
        for line in ["read moved.vhd --offset 0 --length 512", "compact moved.vhd"] {
            let said = refused(folder.path(), line);
            assert!(said.contains("elsewhere"), "{command}: it is not locked any more: {said}");
        }
    }
    assert!(fs::read(path("disk.vhd")).unwrap() == other, "the other image was touched");
    // Where nothing else has its name, it goes on under the new one.
    fs::rename(path("disk.vhd"), path("other.vhd")).unwrap();
    let shown = json(folder.path(), "ctl ./c refresh disk --size 16M", 0);
    assert_eq!(shown["size"], 16 << 20);
    assert!(shown["image"].as_str().unwrap().ends_with("/moved.vhd"), "{shown}");
    let shown = json(folder.path(), "ctl ./c snapshot disk new.vhd", 0);
    assert!(shown["parent"].as_str().unwrap().ends_with("/moved.vhd"), "{shown}");
    assert_eq!((client.read(0, 0, 4096), client.read(0, 4096, 4096)), (vec![7; 4096], vec![8; 4096]));
    server.stop();
    done(folder.path(), "check --chain new.vhd");
    assert_eq!(read_image(&path("new.vhd"), 4096, 4096), [8; 4096]);
}

#[test]
fn a_refresh_neither_opens_closes_nor_unlocks_the_image() {
    if vhd_testkit::tools::require("strace").is_none() {
        return;
    }
    let folder = folder_with_disk("8M");
    let server = Server::start(folder.path(), "disk.vhd");
    let trace = folder.path().join("trace");
    let mut strace = std::process::Command::new("strace");
    strace.args(["-f", "-y", "-e", "trace=open,openat,openat2,close,fcntl,ftruncate", "-o"]).arg(&trace);
    let mut strace = strace.arg("-p").arg(server.pid().to_string()).stderr(std::process::Stdio::null()).spawn().unwrap();
    let status = || fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let tracer = format!("TracerPid:\t{}\n", strace.id());
    wait_until("it is traced", || status().contains(&tracer));
    let traced_too = |task: fs::DirEntry| fs::read_to_string(task.path().join("status")).is_ok_and(|text| text.contains(&tracer));
    let tasks = format!("/proc/{}/task", server.pid());
    wait_until("all threads are", || fs::read_dir(&tasks).unwrap().flatten().all(traced_too));
    done(folder.path(), "ctl ./c refresh disk");
    assert_eq!(json(folder.path(), "ctl ./c refresh disk --size 32M", 0)["size"], 32 << 20);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(strace.id().try_into().unwrap()), Signal::SIGINT).unwrap();
    strace.wait().unwrap();
    let calls = fs::read_to_string(&trace).unwrap();
    let of_image: Vec<_> = calls.lines().filter(|line| line.contains("disk.vhd")).collect();
    assert!(of_image.iter().any(|line| line.contains("ftruncate(")), "the change itself is not seen:\n{calls}");
    let gives_up = |line: &&&str| ["open", "close(", "F_UNLCK"].iter().any(|word| line.contains(word));
    assert_eq!(of_image.iter().find(gives_up), None);
    server.stop();
    done(folder.path(), "check disk.vhd");
}

#[test]
fn an_image_is_written_by_one_export_whatever_its_name() {
    let folder = folder_with_disk("8M");
    done(folder.path(), "create child.vhd --parent disk.vhd");
    fs::hard_link(folder.path().join("child.vhd"), folder.path().join("linked.vhd")).unwrap();
    std::os::unix::fs::symlink("child.vhd", folder.path().join("symlink.vhd")).unwrap();
    let server = Server::start(folder.path(), "child.vhd");
    for image in ["child.vhd", "linked.vhd", "symlink.vhd", "linked.vhd --read-only", "disk.vhd"] {
        let said = refused(folder.path(), &format!("ctl ./c add {image} --name more"));
        assert!(said.contains("is an image of the export \"child\" already"), "{image}: {said}");
    }
    // Its parent may be read by others, too, and what is only read by any number.
    done(folder.path(), "ctl ./c add disk.vhd --read-only");
    done(folder.path(), "ctl ./c add disk.vhd --name again --read-only");
    done(folder.path(), "ctl ./c remove child");
    done(folder.path(), "ctl ./c add linked.vhd --name more --read-only");
    done(folder.path(), "ctl ./c add symlink.vhd --name most --read-only");
    assert_eq!(json(folder.path(), "ctl ./c list", 0)["exports"].as_array().unwrap().len(), 4);
    server.stop();
}

#[test]
fn a_snapshot_replaces_no_file() {
    let folder = folder_with_disk("8M");
    done(folder.path(), "create child.vhd --parent disk.vhd");
    fs::write(folder.path().join("file"), b"mine").unwrap();
    std::os::unix::fs::symlink("nowhere", folder.path().join("link.vhd")).unwrap();
    let server = Server::start(folder.path(), "child.vhd");
    for name in ["child.vhd", "disk.vhd", "file", "link.vhd"] {
        assert!(refused(folder.path(), &format!("ctl ./c snapshot child {name}")).contains("exists already"), "{name}");
    }
    assert_eq!(fs::read(folder.path().join("file")).unwrap(), b"mine");
    done(folder.path(), "ctl ./c snapshot child new.vhd");
    server.stop();
    done(folder.path(), "check --chain new.vhd");
}

#[test]
fn metrics_count_what_clients_do() {
    let folder = folder_with_disk("8M");
    // The port is said in the document of the beginning.
    let mut command = vhd_in(folder.path());
    command.args(["serve", "disk.vhd", "--listen", "unix:s", "--control", "c", "--metrics", "127.0.0.1:0", "--json"]);
    command.stdout(std::process::Stdio::piped());
    let mut process = command.spawn().unwrap();
    let mut said = std::io::BufReader::new(process.stdout.take().unwrap());
    let mut lines = String::new();
    while !lines.ends_with("}\n") {
        std::io::BufRead::read_line(&mut said, &mut lines).unwrap();
    }
    let document: serde_json::Value = serde_json::from_str(&lines).unwrap();
    let mut wire = Wire::open(&folder.path().join("s"), "", Style::Simple);
    assert_eq!(wire.write_error(0, 0, &[1; 4096]), 0);
    let address = document["metrics"].as_str().unwrap().trim_start_matches("http://").trim_end_matches("/metrics").to_owned();
    let mut scrape = std::net::TcpStream::connect(address).unwrap();
    std::io::Write::write_all(&mut scrape, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let text = String::from_utf8(super::server::rest(&mut scrape)).unwrap();
    for line in [
        "vhd_requests_total{disk=\"disk\",kind=\"write\"} 1",
        "kind=\"write\"} 4096",
        "vhd_volume_free_bytes{disk=\"disk\"}",
        "vhd_allocated_bytes",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    assert!(done(folder.path(), "ctl ./c metrics").contains("vhd_requests_total"));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(process.id() as i32), Signal::SIGTERM).unwrap();
    assert!(process.wait().unwrap().success());
}

fn fill_and_go_on(log_on_the_volume: bool) {
    let Some(volume) = Volume::new("24M") else { return };
    let folder = volume.path();
    done(folder, "create disk.vhd --size 64M");
    let log = if log_on_the_volume { NamedTempFile::new_in(folder) } else { NamedTempFile::new() }.unwrap();
    let server = Server::start_logging(folder, "disk.vhd --low-space 8M --listen unix:s --control c", log);
    fs::write(folder.join("ballast"), vec![1; 8 << 20]).unwrap();
    let mut wire = Wire::open(&server.socket(), "", Style::Structured);
    let block = |at: u64| noise(at + 1, 1 << 20);
    let written = (0..64).take_while(|at| wire.write_error(FUA, at << 20, &block(*at)) == 0).count() as u64;
    assert!((4..24).contains(&written), "{written} MiB were written");
    assert_eq!(wire.write_error(0, 60 << 20, &block(60)), ENOSPC, "again");
    for at in 0..written {
        assert!(wire.read(0, at << 20, 1 << 20) == block(at), "what was written before is there");
    }
    assert_eq!(wire.write_error(0, 0, &block(99)), 0, "what has its room is written");
    wait_until("a warning", || log_on_the_volume || server.log().contains("[low-space]"));
    assert!(!server.log().contains('\x1b'), "colours are for terminals: {}", server.log());
    fs::remove_file(folder.join("ballast")).unwrap();
    assert_eq!(wire.write_error(FUA, 60 << 20, &block(60)), 0, "it goes on when there is room");
    server.stop();
    done(folder, "check disk.vhd");
    assert!(read_image(&folder.join("disk.vhd"), 60 << 20, 1 << 20) == block(60));
    assert!(read_image(&folder.join("disk.vhd"), 1 << 20, 1 << 20) == block(1));
}

#[test]
fn a_full_volume_is_told_and_writing_goes_on_when_there_is_room() {
    fill_and_go_on(false);
}

/// What can't be logged is no reason to fail.
#[test]
fn a_log_that_takes_no_more_changes_nothing() {
    fill_and_go_on(true);
}

#[test]
fn without_listen_it_is_in_the_users_runtime_folder() {
    let folder = folder_with_disk("8M");
    let program = env!("CARGO_BIN_EXE_vhd");
    let said = sh(
        folder.path(),
        &format!(
            "export XDG_RUNTIME_DIR=$PWD; {program} serve disk.vhd > out & for n in $(seq 500); do [ -s out ] && break; sleep 0.02; done; \
             cat out; {program} ctl list; kill -TERM $!; wait $!"
        ),
    );
    let mut lines = said.lines();
    assert!(lines.next().unwrap().ends_with("/vhd/disk.sock"), "{said}");
    assert_eq!(lines.next().unwrap(), "disk  disk.vhd  8 MiB (8388608 bytes)  read-write  0 clients");
}
