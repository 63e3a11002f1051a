//! What a mount shows beside the disk, and how it is ended and asked.
//!
//! Goal: layers, texts and views tell the same as the commands and as another reader of VHDs; undo mounts keep, commit and
//! discard; fstab's helper mounts; a mount is snapshot under load; nothing that happens to its server or its image leaves a
//! user hanging. Method: the built command and real mounts; vhdimount judges the layers.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use support::mounts::{Place, turn, wait_until_free};
use support::{done, json, names_in, noise, number, refused, run, text, vhd, wait_until};
use vhd_core::{LiveDisk, chain::ChainOptions};
use vhd_service::control::{Request, call};
use vhd_testkit::crash::Random;
use vhd_testkit::fixture::{Verdict, catalogue};
use vhd_testkit::tools::VhdiMount;
use vhd_testkit::volume::Volume;

/// An image of 32 MiB, and where to mount it.
fn place(needed: &[&str]) -> Option<Place> {
    Place::with_image(needed, "32M")
}

/// Who serves a mount, as `vhd mount --json` tells.
fn pid_in(document: &Value) -> Pid {
    Pid::from_raw(document["pid"].as_i64().unwrap() as i32)
}

#[test]
fn the_layers_are_what_another_reader_finds_in_every_chain() {
    let (Some(judge), Some(place)) = (VhdiMount::find(), place(&[])) else { return };
    let folder = place.path();
    support::vhd_fed(folder, "write a.vhd --offset 0", &noise(1, 5 << 20));
    let mut leaf = "a.vhd".to_owned();
    for depth in 1..5_u64 {
        let child = format!("{depth}.vhd");
        done(folder, &format!("create {child} --parent {leaf}"));
        // In aligned runs of 4 KiB, which is what the judge can tell (see there).
        for run in 0..4 {
            let offset = depth * 65536 + run * (3 << 20);
            support::vhd_fed(folder, &format!("write {child} --offset {offset}"), &noise(depth, 40960));
        }
        leaf = child;
    }
    done(folder, &format!("mount --read-only {leaf} disk"));
    let judged = judge.mount(&folder.join(&leaf)).unwrap();
    let views = judged.views().unwrap();
    let layers = names_in(&folder.join("disk/layers"));
    assert_eq!(layers, ["0", "1", "2", "3", "4"]);
    assert_eq!(views.len(), layers.len());
    for (layer, view) in layers.iter().zip(views.iter().rev()) {
        let ours = fs::read(folder.join("disk/layers").join(layer)).unwrap();
        assert!(ours == fs::read(view).unwrap(), "layer {layer}");
    }
    let whole = fs::read(folder.join("disk/disk.raw")).unwrap();
    assert!(whole == fs::read(folder.join("disk/layers/0")).unwrap());
    drop(judged);
    done(folder, "unmount disk");
}

#[test]
fn the_layers_of_every_chain_fixture_are_what_its_makers_meant_and_what_another_reader_finds() {
    let Some(judge) = VhdiMount::find() else { return };
    let chains: Vec<_> = catalogue().into_iter().filter(|fixture| !fixture.parents.is_empty() && fixture.readable).collect();
    let (mut layers, mut judged_layers) = (0, 0);
    for fixture in &chains {
        let Some(place) = Place::new(&[]) else { return };
        let folder = place.path();
        let paths = fixture.write_into(folder).unwrap();
        done(folder, &format!("mount --read-only {}.vhd disk", fixture.name));
        let specs: Vec<_> = std::iter::once(&fixture.leaf).chain(fixture.parents.iter().map(|(_, spec)| spec)).collect();
        let names = names_in(&folder.join("disk/layers"));
        assert_eq!(names.len(), specs.len(), "{}", fixture.name);
        let ours: Vec<_> = names.iter().map(|name| fs::read(folder.join("disk/layers").join(name)).unwrap()).collect();
        for (depth, layer) in ours.iter().enumerate() {
            let meant = specs[depth..].iter().rev().fold(Vec::new(), |below, spec| spec.guest(&below));
            assert!(*layer == meant, "{}: layer {depth}", fixture.name);
        }
        layers += ours.len();
        // What it gets wrong of a leaf is recorded there; docs/interop.md says why.
        if fixture.readers.libvhdi == Verdict::Agrees {
            let judged = judge.mount(&paths[0]).unwrap();
            let views = judged.views().unwrap();
            assert_eq!(views.len(), ours.len(), "{}", fixture.name);
            for (depth, (layer, view)) in ours.iter().zip(views.iter().rev()).enumerate() {
                assert!(*layer == fs::read(view).unwrap(), "{}: layer {depth} as libvhdi has it", fixture.name);
            }
            judged_layers += ours.len();
        }
        done(folder, "unmount disk");
    }
    println!("{} chains, {layers} layers, {judged_layers} of them judged by libvhdi", chains.len());
    assert!(chains.len() >= 18 && judged_layers >= 30);
}

#[test]
fn texts_tell_what_the_commands_tell() {
    let Some(place) = place(&[]) else { return };
    let folder = place.path();
    done(folder, "create b.vhd --parent a.vhd");
    support::vhd_fed(folder, "write b.vhd --offset 5000000", &noise(1, 5000));
    let image = folder.join("b.vhd");
    let (info, map) =
        (json(folder, &format!("info --chain {}", image.display()), 0), json(folder, &format!("map {}", image.display()), 0));
    done(folder, "mount --read-only b.vhd disk");
    let told = |name: &str| serde_json::from_slice::<Value>(&fs::read(folder.join("disk").join(name)).unwrap()).unwrap();
    assert_eq!(told("map.json"), map);
    assert_eq!(told("info.json"), info);
    // Many at once, in parts, and by programs that look at the size first.
    let copied = folder.join("copy");
    run("cp", &[folder.join("disk/map.json"), copied.clone()]);
    assert_eq!(serde_json::from_slice::<Value>(&fs::read(copied).unwrap()).unwrap(), map);
    OpenOptions::new().write(true).open(folder.join("disk/info.json")).unwrap_err();
    done(folder, "unmount disk");
}

#[test]
fn what_is_written_through_one_file_is_read_through_the_others() {
    let Some(place) = place(&["sfdisk"]) else { return };
    let folder = place.path();
    done(folder, "mount a.vhd disk");
    run("sh", &["-c", &format!("echo 2048,20480 | sfdisk -q {}", folder.join("disk/disk.raw").display())]);
    done(folder, "unmount disk");
    done(folder, "mount a.vhd disk");
    let read = |name: &str, offset: u64| {
        let mut found = [0; 6];
        fs::File::open(folder.join("disk").join(name)).unwrap().read_exact_at(&mut found, offset).unwrap();
        found
    };
    // All have read the place before, so that it is in the page cache of each.
    for (round, text) in [b"first ", b"second", b"third "].into_iter().enumerate() {
        let (written, offset) = if round == 1 { ("disk/disk.raw", 1 << 20) } else { ("disk/p1", 0) };
        place.write(written, offset, text);
        assert_eq!((&read("p1", 0), &read("disk.raw", 1 << 20), &read("layers/0", 1 << 20)), (text, text, text));
    }
    done(folder, "unmount disk");
}

#[test]
fn a_file_becomes_the_disk_and_a_link_leads_to_it() {
    let Some(place) = place(&["mkfs.ext4"]) else { return };
    let folder = place.path();
    fs::write(folder.join("file"), "was here").unwrap();
    symlink("file", folder.join("link")).unwrap();
    done(folder, "mount a.vhd file");
    assert_eq!(fs::metadata(folder.join("file")).unwrap().len(), 32 << 20);
    run("mkfs.ext4", &["-q", "-F", folder.join("file").to_str().unwrap()]);
    run("e2fsck", &["-fn", folder.join("link").to_str().unwrap()]);
    done(folder, "unmount link");
    assert_eq!(fs::read(folder.join("file")).unwrap(), b"was here");
    let said = refused(folder, "mount a.vhd a.vhd");
    assert!(said.contains("image itself"), "{said}");
    done(folder, "mount --fs a.vhd disk");
    assert!(folder.join("disk/lost+found").exists());
    done(folder, "unmount disk");
}

#[test]
fn undo_mounts_keep_commit_and_discard() {
    let Some(place) = place(&[]) else { return };
    let folder = place.path();
    support::vhd_fed(folder, "write a.vhd --offset 0", b"old");
    let before = fs::read(folder.join("a.vhd")).unwrap();
    done(folder, "mount --undo a.vhd disk");
    place.write("disk/disk.raw", 0, b"new");
    done(folder, "unmount disk");
    assert!(fs::read(folder.join("a.vhd")).unwrap() == before, "nothing is in the image until it is committed");
    // It goes on, and is given up.
    done(folder, "mount --undo a.vhd disk");
    assert_eq!(&fs::read(folder.join("disk/disk.raw")).unwrap()[..3], b"new");
    done(folder, "unmount disk --discard");
    assert_eq!(names_in(folder), ["a.vhd", "disk"]);
    assert!(fs::read(folder.join("a.vhd")).unwrap() == before);

    done(folder, "mount --undo a.vhd disk");
    place.write("disk/disk.raw", 3 << 20, b"kept");
    done(folder, "unmount disk --commit");
    assert_eq!(place.in_image("a.vhd", 3 << 20, 4), b"kept");
    assert_eq!(names_in(folder), ["a.vhd", "disk"]);

    done(folder, "mount a.vhd disk");
    let said = refused(folder, "unmount disk --commit");
    assert!(said.contains("--undo"), "{said}");
    done(folder, "unmount disk");
}

#[test]
fn mount_runs_the_helper_with_the_words_of_fstab() {
    let Some(place) = place(&["mkfs.ext4"]) else { return };
    let _turn = turn();
    let folder = place.path();
    let helper = Path::new("/sbin/mount.vhd");
    if helper.exists() {
        eprintln!("SKIPPED: there is a {} already", helper.display());
        return;
    }
    symlink(env!("CARGO_BIN_EXE_vhd"), helper).unwrap();
    let work = || {
        let table = folder.join("fstab");
        let [image, at] = [folder.join("a.vhd"), folder.join("disk")].map(|path| path.display().to_string());
        fs::write(&table, format!("{image} {at} vhd rw,noauto,nofail,x-systemd.automount,umask=022,parent_dir=/srv 0 0\n"))
            .unwrap();
        run("mount", &["-T", table.to_str().unwrap(), &at]);
        place.write("disk/disk.raw", 0, b"by fstab");
        run("umount", &[&at]);
        wait_until_free(folder, "a.vhd");
        run("mount", &["-t", "vhd", "-o", "ro", &image, &at]);
        assert!(OpenOptions::new().write(true).open(folder.join("disk/disk.raw")).is_err());
        assert_eq!(&fs::read(folder.join("disk/disk.raw")).unwrap()[..8], b"by fstab");
        done(folder, "unmount disk");
        let output = Command::new("mount").args(["-t", "vhd", "-o", "frobnicate", &image, &at]).output().unwrap();
        assert!(!output.status.success() && text(&output.stderr).contains("frobnicate"), "{output:?}");

        // A file system, by all that are marked, with every word that people have in such lines.
        place.format();
        let words = "defaults,auto,nofail,user,exec,_netdev,noatime,x-gvfs-show,comment=mine,fs,low_space=1M";
        fs::write(&table, format!("{image} {at} vhd {words} 0 2\n")).unwrap();
        run("mount", &["-a", "-T", table.to_str().unwrap()]);
        fs::write(folder.join("disk/kept"), "kept").unwrap();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mount = mounts.lines().find(|line| line.split(' ').nth(1) == Some(&at)).unwrap();
        assert!(mount.contains(" ext4 rw,nosuid,nodev,noatime"), "{mount}");
        done(folder, "unmount disk");
        run("mount", &["-T", table.to_str().unwrap(), "-o", "ro", &at]);
        assert_eq!(fs::read(folder.join("disk/kept")).unwrap(), b"kept");
        run("umount", &[&at]);
        wait_until_free(folder, "a.vhd");
    };
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    fs::remove_file(helper).unwrap();
    result.unwrap();
}

#[test]
fn a_snapshot_under_load_splits_what_was_written() {
    let Some(place) = place(&[]) else { return };
    let folder = place.path();
    let mounted = json(folder, "mount a.vhd disk", 0);
    let socket = PathBuf::from(mounted["control"].as_str().unwrap());
    let ask = |request: &Request| call(&socket, request).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(folder.join("disk/disk.raw")).unwrap();
    // A counter at every place: no write is lost, and none goes back.
    let writing = thread::spawn(move || {
        for round in 1..=2000_u32 {
            file.write_all_at(&round.to_be_bytes(), u64::from(round % 50) * 300_000).unwrap();
        }
        file.sync_all().unwrap();
    });
    for index in 0..3 {
        thread::sleep(Duration::from_millis(20));
        let path = folder.join(format!("leaf{index}.vhd"));
        ask(&Request::new("snapshot").with("name", "a").with("path", path.to_str().unwrap()));
    }
    writing.join().unwrap();
    let listed = ask(&Request::new("list"));
    assert!(listed["exports"][0]["image"].as_str().unwrap().ends_with("leaf2.vhd"), "{listed}");
    let metrics = ask(&Request::new("metrics"));
    assert!(metrics.as_str().unwrap().contains("vhd_requests_total"), "{metrics}");
    done(folder, "unmount disk");
    for place_of in 0..50_u32 {
        let last = u32::from_be_bytes(place.in_image("leaf2.vhd", u64::from(place_of) * 300_000, 4).try_into().unwrap());
        assert_eq!(last, if place_of == 0 { 2000 } else { 1950 + place_of });
    }
    done(folder, "check --chain --deep leaf2.vhd");
}

#[test]
fn ctl_asks_a_mount_what_it_asks_a_server() {
    let Some(place) = place(&[]) else { return };
    let folder = place.path();
    let mounted = json(folder, "mount a.vhd disk", 0);
    let socket = mounted["control"].as_str().unwrap();
    let listed = done(folder, &format!("ctl {socket} list"));
    assert!(listed.starts_with("a  a.vhd  32 MiB (33554432 bytes)  read-write"), "{listed}");
    place.write("disk/disk.raw", 0, b"below");
    done(folder, &format!("ctl {socket} snapshot a leaf.vhd"));
    place.write("disk/disk.raw", 0, b"above");
    let listed = done(folder, &format!("ctl {socket} list"));
    assert!(listed.contains("leaf.vhd") && listed.contains("\nsnapshot  a  "), "{listed}");
    let said = refused(folder, &format!("ctl {socket} snapshot b other.vhd"));
    assert!(said.contains("\"b\"") && said.contains("\"a\""), "{said}");
    let said = refused(folder, &format!("ctl {socket} refresh a"));
    assert!(said.contains("unmount, resize"), "{said}");
    let metrics = done(folder, &format!("ctl {socket} metrics"));
    assert!(metrics.contains("vhd_requests_total") && metrics.contains("a"), "{metrics}");
    done(folder, "unmount disk");
    assert_eq!((place.in_image("a.vhd", 0, 5), place.in_image("leaf.vhd", 0, 5)), (b"below".to_vec(), b"above".to_vec()));
    let said = refused(folder, &format!("ctl {socket} list"));
    assert!(said.contains(socket), "{said}");
}

/// Stops a process, and waits until all its threads have.
fn stop(pid: Pid) {
    kill(pid, Signal::SIGSTOP).unwrap();
    let stopped = |stat: PathBuf| fs::read_to_string(stat).unwrap().contains(") T ");
    let threads = || fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|thread| thread.unwrap().path().join("stat"));
    wait_until("it is stopped", || threads().all(stopped));
}

#[test]
fn a_stopped_server_is_named_and_can_be_given_up() {
    let Some(place) = place(&[]) else { return };
    let folder = place.path();
    let mounted = json(folder, "mount a.vhd disk", 0);
    place.write("disk/disk.raw", 0, b"before");
    stop(pid_in(&mounted));
    let began = Instant::now();
    let said = refused(folder, "unmount disk");
    assert!(said.contains(&format!("kill -CONT {}", pid_in(&mounted))) && began.elapsed() < Duration::from_secs(60), "{said}");
    kill(pid_in(&mounted), Signal::SIGCONT).unwrap();
    done(folder, "unmount disk");
    assert_eq!(place.in_image("a.vhd", 0, 6), b"before");

    let mounted = json(folder, "mount a.vhd disk", 0);
    stop(pid_in(&mounted));
    let hanging = {
        let file = folder.join("disk/disk.raw");
        thread::spawn(move || fs::read(file))
    };
    thread::sleep(Duration::from_millis(200));
    done(folder, "unmount disk --force");
    hanging.join().unwrap().unwrap_err();
    assert!(names_in(&folder.join("disk")).is_empty());
    kill(pid_in(&mounted), Signal::SIGCONT).unwrap();
    wait_until_free(folder, "a.vhd");
}

/// Lets a process go on, whatever becomes of the test.
struct GoesOn(Pid);

impl Drop for GoesOn {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

/// `VHD_STOPS` sets how often.
#[test]
fn an_unmount_ends_at_whatever_moment_its_server_is_stopped() {
    let Some(place) = place(&["mkfs.ext4"]) else { return };
    let folder = place.path();
    place.format();
    let stops = number("VHD_STOPS", 6);
    let mut refusals = 0;
    for round in 0..stops {
        let (how, file) = if round % 2 == 0 { ("", "disk/disk.raw") } else { ("--fs", "disk/file") };
        let mounted = json(folder, &format!("mount {how} a.vhd disk"), 0);
        let pid = pid_in(&mounted);
        if round % 2 == 1 {
            fs::write(folder.join(file), []).unwrap();
        }
        // Not of the file system's own: it begins at 1024, and the boot sector is nobody's.
        place.write(file, 0, &noise(round, 1000));
        let goes_on = GoesOn(pid);
        let (tell, told) = std::sync::mpsc::channel();
        let at = folder.to_owned();
        thread::spawn(move || drop(tell.send(vhd(&at, "unmount disk"))));
        thread::sleep(Duration::from_micros(Random::new(round).below(40_000)));
        let _ = kill(pid, Signal::SIGSTOP);
        let output = told.recv_timeout(Duration::from_secs(60)).expect("the unmount ends though its server is stopped");
        let said = text(&output.stderr);
        refusals += u64::from(!output.status.success());
        assert!(output.status.success() || said.contains("kill -CONT"), "round {round}: {said}");
        drop(goes_on);
        let closed = || vhd(folder, "write a.vhd --offset 0").status.success();
        wait_until("it is closed", || closed() || vhd(folder, "unmount disk").status.success() && closed());
        assert!(names_in(&folder.join("disk")).is_empty());
        if round % 2 == 0 {
            assert!(place.in_image("a.vhd", 0, 1000) == noise(round, 1000), "round {round}");
        } else {
            done(folder, "mount --fs --read-only a.vhd disk");
            assert!(fs::read(folder.join(file)).unwrap() == noise(round, 1000), "round {round}");
            done(folder, "unmount disk");
        }
    }
    println!("{refusals} of {stops} were refused");
    done(folder, "check --deep a.vhd");
}

#[test]
fn a_killed_server_below_a_file_system_leaves_nothing_behind() {
    let Some(place) = place(&["mkfs.ext4", "e2fsck"]) else { return };
    let folder = place.path();
    place.format();
    let mounted = json(folder, "mount --fs a.vhd disk", 0);
    fs::write(folder.join("disk/kept"), noise(1, 100_000)).unwrap();
    run("sync", &["-f", folder.join("disk/kept").to_str().unwrap()]);
    kill(pid_in(&mounted), Signal::SIGKILL).unwrap();
    wait_until("it is gone", || fs::write(folder.join("disk/lost"), "x").and_then(|()| sync(&folder.join("disk/lost"))).is_err());
    done(folder, "unmount disk");
    assert!(!Path::new(mounted["file"].as_str().unwrap()).parent().unwrap().exists());
    done(folder, "mount --fs a.vhd disk");
    assert!(fs::read(folder.join("disk/kept")).unwrap() == noise(1, 100_000));
    done(folder, "unmount disk");
    done(folder, "check --deep a.vhd");
}

fn sync(path: &Path) -> std::io::Result<()> {
    fs::File::open(path)?.sync_all()
}

#[test]
fn a_signal_unmounts_the_file_system_first() {
    let Some(place) = place(&["mkfs.ext4", "e2fsck"]) else { return };
    let folder = place.path();
    place.format();
    let mounted = json(folder, "mount --fs a.vhd disk", 0);
    fs::write(folder.join("disk/unsynced"), noise(1, 3 << 20)).unwrap();
    kill(pid_in(&mounted), Signal::SIGTERM).unwrap();
    wait_until_free(folder, "a.vhd");
    assert!(names_in(&folder.join("disk")).is_empty());
    done(folder, "mount --fs a.vhd disk");
    assert!(fs::read(folder.join("disk/unsynced")).unwrap() == noise(1, 3 << 20));
    done(folder, "unmount disk");
}

#[test]
fn a_full_host_is_told_to_who_writes_and_to_who_asks() {
    let Some(place) = place(&[]) else { return };
    let folder = place.path();
    let Some(small) = Volume::new("12M") else { return };
    let image = small.path().join("b.vhd").display().to_string();
    done(folder, &format!("create {image} --size 64M"));
    let mounted = json(folder, &format!("mount {image} disk --low-space 6M"), 0);
    let file = OpenOptions::new().read(true).write(true).open(folder.join("disk/disk.raw")).unwrap();
    file.write_all_at(&noise(1, 4 << 20), 0).unwrap();
    file.sync_all().unwrap();
    let full = (4..64).map(|at| file.write_all_at(&noise(2, 1 << 20), at << 20)).find_map(Result::err).unwrap();
    assert_eq!(full.raw_os_error(), Some(nix::libc::ENOSPC));
    let socket = PathBuf::from(mounted["control"].as_str().unwrap());
    wait_until("it is told", || {
        let listed = call(&socket, &Request::new("list")).unwrap();
        listed["events"].as_array().unwrap().iter().any(|event| event["kind"] == "low-space")
    });
    let listed = done(folder, &format!("ctl {} list", socket.display()));
    assert!(listed.lines().any(|line| line.starts_with("low-space  ") && line.contains("b.vhd")), "{listed}");
    let mut found = vec![0; 4 << 20];
    file.read_exact_at(&mut found, 0).unwrap();
    assert!(found == noise(1, 4 << 20));
    small.remount("size=80M");
    file.write_all_at(&noise(2, 1 << 20), 20 << 20).unwrap();
    drop(file);
    done(folder, "unmount disk");
    done(folder, &format!("check --deep {image}"));
}

#[test]
fn parents_elsewhere_stay_closed_unless_allowed_and_one_that_is_removed_is_read_on() {
    let Some(place) = place(&[]) else { return };
    let folder = place.path();
    support::vhd_fed(folder, "write a.vhd --offset 0", b"parent");
    fs::create_dir(folder.join("children")).unwrap();
    done(folder, "create children/c.vhd --parent a.vhd");
    let said = refused(folder, "mount children/c.vhd disk");
    assert!(said.contains("--any-parent") || said.contains("--parent-dir"), "{said}");
    done(folder, "mount --any-parent children/c.vhd disk");
    fs::remove_file(folder.join("a.vhd")).unwrap();
    assert_eq!(&fs::read(folder.join("disk/disk.raw")).unwrap()[..6], b"parent");
    assert_eq!(&fs::read(folder.join("disk/layers/1")).unwrap()[..6], b"parent");
    place.write("disk/disk.raw", 0, b"child");
    done(folder, "unmount disk");
    assert!(LiveDisk::open(&folder.join("children/c.vhd"), &ChainOptions::default()).is_err());
}
