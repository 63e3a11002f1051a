//! A mounted disk against a plain file.
//!
//! Goal: whatever way a program has to read and write a file (calls, maps, past the page cache, holes), it finds in
//! `disk.raw` what it would find in a plain file. Method: random operations, the same ones on both, compared as they go and
//! after another mount; fio's and stress-ng's own verification; and the tools that people copy disks with.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::fs;
use std::process::Command;

use support::mounts::Place;
use support::{done, noise, run, text};

/// Random operations on two files: python3, because Rust has no safe way to map a file.
const OPERATIONS: &str = r#"
import ctypes, mmap, os, random, sys
disk, plain, seed, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rng = random.Random(seed)
libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
files = [(os.open(p, os.O_RDWR), os.open(p, os.O_RDWR | os.O_DIRECT)) for p in (disk, plain)]
size = os.fstat(files[1][0]).st_size
assert os.fstat(files[0][0]).st_size == size
maps = [mmap.mmap(buffered, size) for buffered, direct in files]
page = mmap.mmap(-1, 1 << 20)
def place(align=1):
    length = rng.choice([1, 512, 4096, 65536, 300000, 1 << 20])
    length = max(align, rng.randrange(1, length + 1) // align * align)
    return rng.randrange(0, size - length + 1) // align * align, length
def both(op, what):
    found = [op(i) for i in (0, 1)]
    assert found[0] == found[1], (what, step, offset, length)
def direct_read(i):
    view = memoryview(page)[:length]
    assert os.preadv(files[i][1], [view], offset) == length
    return bytes(view)
def falloc(mode):
    assert libc.fallocate(files[1][0], mode, offset, length) == 0
    assert libc.fallocate(files[0][0], mode, offset, length) == 0, ctypes.get_errno()
for step in range(count):
    kind = rng.randrange(10)
    offset, length = place(4096 if kind in (2, 3) else 1)
    data = rng.randbytes(length)
    if kind == 0: both(lambda i: os.pwrite(files[i][0], data, offset), "write")
    elif kind == 1: both(lambda i: os.pread(files[i][0], length, offset), "read")
    elif kind == 2:
        page[:length] = data
        both(lambda i: os.pwritev(files[i][1], [memoryview(page)[:length]], offset), "direct write")
    elif kind == 3: both(direct_read, "direct read")
    elif kind == 4:
        for m in maps: m[offset:offset + length] = data
        if rng.random() < 0.5:
            for m in maps: m.flush()
    elif kind == 5: both(lambda i: maps[i][offset:offset + length], "map")
    elif kind == 6: falloc(3)
    elif kind == 7: falloc(0x11)
    elif kind == 8: both(lambda i: os.fsync(files[i][0]), "fsync")
    else:
        # Where there is data, or a map has changes that are not written, a file may not say that there is a hole.
        for m in maps: m.flush()
        try: start = os.lseek(files[0][0], offset, os.SEEK_DATA)
        except OSError: start = size
        assert not any(os.pread(files[1][0], start - offset, offset)), ("hole", step)
for m in maps: m.flush(); m.close()
for buffered, direct in files: os.fsync(buffered)
"#;

#[test]
fn random_operations_find_what_a_plain_file_has() {
    let steps = std::env::var("VHD_ORACLE_STEPS").unwrap_or_else(|_| "1500".into());
    for (seed, make) in [("1", "create a.vhd --size 24M"), ("2", "create a.vhd --size 24M --block-size 512K"), ("3", "")] {
        let Some(place) = Place::new(&["python3"]) else { return };
        let folder = place.path();
        let plain = folder.join("plain");
        if make.is_empty() {
            done(folder, "create p.vhd --size 24M");
            support::vhd_fed(folder, "write p.vhd --offset 0", &noise(7, 24 << 20));
            done(folder, "create a.vhd --parent p.vhd");
            fs::write(&plain, noise(7, 24 << 20)).unwrap();
        } else {
            done(folder, make);
            fs::File::create(&plain).unwrap().set_len(24 << 20).unwrap();
        }
        done(folder, "mount a.vhd disk");
        let disk = folder.join("disk/disk.raw");
        run("python3", &["-c", OPERATIONS, disk.to_str().unwrap(), plain.to_str().unwrap(), seed, &steps]);
        done(folder, "unmount disk");
        done(folder, "compare a.vhd plain");
        done(folder, "check --deep --chain a.vhd");
    }
}

#[test]
fn fio_finds_what_it_wrote_by_every_engine() {
    let Some(place) = Place::with_image(&["fio"], "64M") else { return };
    let folder = place.path();
    done(folder, "mount a.vhd disk");
    let file = format!("--filename={}", folder.join("disk/disk.raw").display());
    // Parallel writers and readers, each in a part of its own; with maps one, for fio 3.33 finds several wrong on any file.
    let engines: [&[&str]; 4] = [
        &["--ioengine=psync", "--direct=0", "--numjobs=3"],
        &["--ioengine=mmap", "--numjobs=1"],
        &["--ioengine=libaio", "--direct=1", "--iodepth=16", "--numjobs=3"],
        &["--ioengine=io_uring", "--direct=1", "--iodepth=16", "--numjobs=3"],
    ];
    for engine in engines {
        let job = ["--name=v", &file, "--size=16M", "--rw=randwrite", "--bsrange=4k-64k", "--verify=crc32c", "--verify_fatal=1"];
        let jobs = [
            "--offset_increment=20M",
            "--do_verify=1",
            "--output-format=terse",
            "--allow_file_create=0",
            "--verify_state_save=0",
        ];
        run("fio", &[&job, &jobs[..], engine].concat());
    }
    done(folder, "unmount disk");
    done(folder, "check --deep a.vhd");
}

#[test]
fn stress_ng_verifies_a_file_system_on_it() {
    let Some(place) = Place::with_image(&["stress-ng", "mkfs.ext4"], "512M") else { return };
    let folder = place.path();
    fs::create_dir(folder.join("files")).unwrap();
    place.format();
    done(folder, "mount --fs a.vhd files");
    let mut command = Command::new("stress-ng");
    command.args(["--temp-path", folder.join("files").to_str().unwrap(), "--verify", "--timeout", "4", "--hdd", "1"]);
    command.args(["--hdd-bytes", "32M", "--fpunch", "1", "--fallocate", "1", "--fallocate-bytes", "32M", "--copy-file", "1"]);
    command.args(["--copy-file-bytes", "128M", "--seek", "1"]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    done(folder, "unmount files");
    done(folder, "mount --read-only a.vhd disk");
    run("e2fsck", &["-fn", folder.join("disk/disk.raw").to_str().unwrap()]);
    done(folder, "unmount disk");
    done(folder, "check --deep a.vhd");
}

#[test]
fn tools_that_copy_disks_copy_all_of_it() {
    let Some(place) = Place::with_image(&["rsync", "tar", "losetup"], "48M") else { return };
    let folder = place.path();
    support::vhd_fed(folder, "write a.vhd --offset 7000000", &noise(1, 9_000_000));
    done(folder, "mount a.vhd disk");
    let script = "
        sum() { sha256sum < $1; }
        want=$(sum disk/disk.raw)
        cp --sparse=auto disk/disk.raw copy; test \"$(sum copy)\" = \"$want\"; test $(stat -c %b copy) -lt 40000; rm copy
        cp --sparse=always --reflink=auto disk/disk.raw copy; test \"$(sum copy)\" = \"$want\"; rm copy
        dd if=disk/disk.raw of=copy bs=1M iflag=direct status=none; test \"$(sum copy)\" = \"$want\"; rm copy
        tar -C disk --sparse -cf t.tar disk.raw; tar -xf t.tar; test \"$(sum disk.raw)\" = \"$want\"; test $(stat -c %s t.tar) -lt 20000000
        rsync --inplace disk/disk.raw copy; test \"$(sum copy)\" = \"$want\"
        dd if=/dev/urandom of=copy bs=4096 seek=300 count=77 conv=notrunc status=none; rsync --inplace --no-whole-file copy disk/disk.raw
        cmp copy disk/disk.raw
        loop=$(losetup --find --show disk/disk.raw); cmp copy $loop; losetup --detach $loop
    ";
    let output =
        Command::new("sh").args(["-euc", script]).current_dir(folder).env("PATH", support::search_path()).output().unwrap();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    support::wait_until("nobody uses it", || support::vhd(folder, "unmount disk").status.success());
    done(folder, "compare a.vhd copy");
}
