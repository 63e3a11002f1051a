//! What a mounted disk is to the programs that open it.
//!
//! Goal: `disk.raw` behaves as a file on a local file system does, but for its size, which is fixed as a block
//! device's is. Method: system calls on a mount of a disk in memory, and then a look into that memory.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::process::Command;
use std::sync::atomic::Ordering;
use std::thread;

use crate::support::{BLOCK, Memory, mount_memory, mount_size, pattern};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use nix::unistd::{Whence, lseek};
use vhd_fuse::MountOptions;

const SIZE: usize = 8 << 20;

fn open(path: &std::path::Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

fn os_error<T: std::fmt::Debug>(result: std::io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

#[test]
fn the_folder_shows_one_file_of_the_exact_size() {
    let Some(fixture) = mount_size(SIZE + 512) else { return };
    let names: Vec<_> = fs::read_dir(fixture.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["disk.raw"]);
    let metadata = fs::metadata(&fixture.file).unwrap();
    assert_eq!(metadata.len(), SIZE as u64 + 512);
    assert_eq!(metadata.mode() & 0o7777, 0o600);
    assert_eq!(metadata.uid(), nix::unistd::geteuid().as_raw());
    assert_eq!(fs::metadata(fixture.folder.path().join("other")).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(fs::write(fixture.folder.path().join("other"), b"").unwrap_err().raw_os_error(), Some(libc::EPERM));
    assert_eq!(os_error(fs::create_dir(fixture.folder.path().join("other"))), libc::EPERM);
    assert_eq!(os_error(fs::remove_file(&fixture.file)), libc::EPERM);
    assert_eq!(os_error(fs::rename(&fixture.file, fixture.folder.path().join("other"))), libc::EPERM);
    fixture.mounted.end().unwrap();
}

#[test]
fn bytes_at_odd_offsets_go_both_ways() {
    let Some(fixture) = mount_size(SIZE) else { return };
    let file = open(&fixture.file);
    let mut expected = vec![0; SIZE];
    for (offset, len) in [(0, 1), (511, 2), (4095, 4098), (65_537, 1 << 20), (3 << 20, 3_000_001), (SIZE - 1, 1)] {
        let data = pattern(len, offset as u64);
        file.write_all_at(&data, offset as u64).unwrap();
        expected[offset..offset + len].copy_from_slice(&data);
    }
    let mut found = vec![0; SIZE];
    file.read_exact_at(&mut found, 0).unwrap();
    assert!(found == expected);
    assert!(fixture.memory.contents() == expected);
    for (offset, len) in [(1, 7), (510, 1030), (1 << 20, 2_000_003)] {
        let mut part = vec![0; len];
        file.read_exact_at(&mut part, offset as u64).unwrap();
        assert!(part == expected[offset..offset + len]);
    }
    drop(file);
    fixture.mounted.end().unwrap();
}

#[test]
fn the_end_is_the_end() {
    let Some(fixture) = mount_size(SIZE) else { return };
    let file = open(&fixture.file);
    let (end, data) = (SIZE as u64, pattern(8192, 1));
    assert_eq!(file.write_at(&data, end - 4096).unwrap(), 4096);
    assert_eq!(os_error(file.write_at(&data, end)), libc::ENOSPC);
    assert_eq!(os_error(file.write_at(&data, end + (1 << 40))), libc::ENOSPC);
    let mut found = vec![0; 8192];
    assert_eq!(file.read_at(&mut found, end - 4096).unwrap(), 4096);
    assert_eq!(found[..4096], data[..4096]);
    assert_eq!(file.read_at(&mut found, end).unwrap(), 0);

    file.set_len(end).unwrap();
    assert_eq!(os_error(file.set_len(end - 1)), libc::EPERM);
    assert_eq!(os_error(file.set_len(end + 1)), libc::EFBIG);
    assert_eq!(os_error(file.set_len(0)), libc::EPERM);
    assert_eq!(nix::unistd::truncate(&fixture.file, 0), Err(Errno::EPERM));
    assert_eq!(fs::metadata(&fixture.file).unwrap().len(), end);
    drop(file);
    fixture.mounted.end().unwrap();
}

/// As a block device has it: whoever opens it to write it anew writes over what is there.
#[test]
fn an_open_that_truncates_cuts_nothing_off() {
    let Some(fixture) = mount_size(SIZE) else { return };
    let (old, new) = (pattern(SIZE, 1), pattern(1 << 20, 2));
    let before = open(&fixture.file);
    before.write_all_at(&old, 0).unwrap();
    let copy = fixture.folder.path().with_extension("raw");
    fs::write(&copy, &new).unwrap();
    let shell = |line: &str| {
        let run = Command::new("sh").args(["-ec", line]).arg("sh").arg(&copy).arg(&fixture.file).output().unwrap();
        assert!(run.status.success(), "{line}: {}", String::from_utf8_lossy(&run.stderr));
        let now = fs::read(&fixture.file).unwrap();
        assert_eq!((now.len(), fs::metadata(&fixture.file).unwrap().len()), (SIZE, SIZE as u64), "{line}");
        now
    };
    assert!(shell(": > \"$2\"") == old, "nothing was written");
    for line in ["cat \"$1\" > \"$2\"", "cp \"$1\" \"$2\"", "dd if=\"$1\" of=\"$2\" bs=64k 2>&1"] {
        before.write_all_at(&old, 0).unwrap();
        let now = shell(line);
        assert!(now[..1 << 20] == new && now[1 << 20..] == old[1 << 20..], "{line}");
        let mut seen = vec![0; SIZE];
        before.read_exact_at(&mut seen, 0).unwrap();
        assert!(seen == now, "{line}: who had it open before sees something else");
    }
    fs::remove_file(&copy).unwrap();
    drop(before);
    fixture.mounted.end().unwrap();
}

/// Each text that is open is a descriptor of the server, which needs some for others.
#[test]
fn texts_that_are_left_open_take_no_descriptors_without_end() {
    let folder = tempfile::tempdir().unwrap();
    let disk = vhd_core::Disk::new(crate::support::Shared(Memory::new(SIZE)));
    let produce = |out: &mut dyn std::io::Write| out.write_all(b"text").map_err(|error| vhd_core::Error::io(error, "is full"));
    let contents = vhd_fuse::Contents::from(disk).with_document("text", produce);
    let Ok(mounted) = vhd_fuse::mount(contents, folder.path(), &MountOptions::default()) else {
        assert!(mount_size(SIZE).is_none(), "a mount with a text");
        return;
    };
    let opened: Vec<_> = (0..200).map(|_| File::open(folder.path().join("text"))).collect();
    let (open, refused): (Vec<_>, Vec<_>) = opened.into_iter().partition(Result::is_ok);
    assert_eq!(open.len(), 32);
    assert!(refused.into_iter().all(|refused| os_error(refused) == libc::ENFILE));
    let mut text = String::new();
    open.into_iter().last().unwrap().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "text");
    // What was closed is given back, a little later.
    let again = (0..500).any(|_| {
        thread::sleep(std::time::Duration::from_millis(10));
        File::open(folder.path().join("text")).is_ok()
    });
    assert!(again);
    mounted.end().unwrap();
}

#[test]
fn direct_and_buffered_io_see_each_other() {
    let Some(fixture) = mount_size(SIZE) else { return };
    let buffered = open(&fixture.file);
    let direct = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&fixture.file).unwrap();
    let mut memory = vec![0; (2 << 20) + 4096];
    let start = memory.as_ptr().align_offset(4096);
    let page = &mut memory[start..start + (2 << 20)];

    let first = pattern(page.len(), 1);
    buffered.write_all_at(&first, 4096).unwrap();
    direct.read_exact_at(page, 4096).unwrap();
    assert!(page == first);

    let second = pattern(page.len(), 2);
    page.copy_from_slice(&second);
    direct.write_all_at(page, 4096).unwrap();
    let mut found = vec![0; second.len()];
    buffered.read_exact_at(&mut found, 4096).unwrap();
    assert!(found == second, "the page cache kept what a direct write replaced");
    assert!(fixture.memory.contents()[4096..][..second.len()] == second);
    drop((buffered, direct));
    fixture.mounted.end().unwrap();
}

#[test]
fn memory_maps_work_and_msync_reaches_the_disk() {
    let Some(fixture) = mount_size(SIZE) else { return };
    // Rust has no safe way to map a file.
    let script = r#"
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
m = mmap.mmap(fd, 0)
assert len(m) == 8 << 20
assert m[5000:5005] == b"hello", m[5000:5005]
m[70001:70008] = b"written"
m.flush()
os.pwrite(fd, b"beside", 70100)
assert m[70100:70106] == b"beside"
d = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
page = mmap.mmap(-1, 4096)
os.preadv(d, [page], 69632)
assert page[70001-69632:70008-69632] == b"written"
m[4 << 20] = 7
"#;
    fs::write(fixture.folder.path().join("disk.raw"), b"").unwrap();
    open(&fixture.file).write_all_at(b"hello", 5000).unwrap();
    let status = Command::new("python3").arg("-c").arg(script).arg(&fixture.file).status().unwrap();
    assert!(status.success());
    assert!(fixture.memory.flushes.load(Ordering::Relaxed) >= 1, "msync is a flush");
    let contents = fixture.memory.contents();
    assert_eq!(&contents[70_001..70_008], b"written");
    assert_eq!(contents[4 << 20], 7, "what was changed in a map is written when the map goes");
    fixture.mounted.end().unwrap();
}

#[test]
fn holes_are_seen_made_and_counted() {
    let Some(fixture) = mount_size(SIZE) else { return };
    let file = open(&fixture.file);
    let seek = |offset: u64, whence| lseek(&file, offset as i64, whence);
    assert_eq!(seek(0, Whence::SeekData), Err(Errno::ENXIO));
    assert_eq!(seek(5, Whence::SeekHole), Ok(5));

    file.write_all_at(&pattern(3 * BLOCK as usize, 1), BLOCK).unwrap();
    assert_eq!(seek(0, Whence::SeekData), Ok(BLOCK as i64));
    assert_eq!(seek(BLOCK + 7, Whence::SeekData), Ok(BLOCK as i64 + 7));
    assert_eq!(seek(BLOCK, Whence::SeekHole), Ok(4 * BLOCK as i64));
    assert_eq!(seek(4 * BLOCK, Whence::SeekData), Err(Errno::ENXIO));
    assert_eq!(seek(SIZE as u64, Whence::SeekHole), Err(Errno::ENXIO));

    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, punch, 2 * BLOCK as i64, BLOCK as i64).unwrap();
    assert_eq!(seek(BLOCK, Whence::SeekHole), Ok(2 * BLOCK as i64));
    let mut found = vec![1; BLOCK as usize];
    file.read_exact_at(&mut found, 2 * BLOCK).unwrap();
    assert!(found.iter().all(|byte| *byte == 0), "the page cache kept what was punched");
    assert_eq!(fixture.memory.blocks(), 2);

    fallocate(&file, FallocateFlags::FALLOC_FL_ZERO_RANGE, BLOCK as i64, BLOCK as i64).unwrap();
    file.read_exact_at(&mut found, BLOCK).unwrap();
    assert!(found.iter().all(|byte| *byte == 0));
    assert_eq!(fixture.memory.blocks(), 2, "zero range keeps the space");
    assert_eq!(file.metadata().unwrap().blocks(), 2 * BLOCK / 512);
    drop(file);
    fixture.mounted.end().unwrap();
}

#[test]
fn fallocate_neither_grows_nor_moves() {
    let Some(fixture) = mount_size(SIZE) else { return };
    let file = open(&fixture.file);
    let (size, keep) = (SIZE as i64, FallocateFlags::FALLOC_FL_KEEP_SIZE);
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | keep;
    file.write_all_at(&pattern(8192, 1), SIZE as u64 - 8192).unwrap();
    fallocate(&file, FallocateFlags::empty(), 0, size).unwrap();
    fallocate(&file, keep, 0, size).unwrap();
    assert_eq!(fallocate(&file, FallocateFlags::empty(), 0, size + 1), Err(Errno::EFBIG));
    assert_eq!(fallocate(&file, FallocateFlags::FALLOC_FL_ZERO_RANGE, size - 1, 2), Err(Errno::EFBIG));
    fallocate(&file, punch, size, 4096).unwrap();
    fallocate(&file, punch, size - 4096, 1 << 40).unwrap();
    let mut found = vec![1; 4096];
    file.read_exact_at(&mut found, SIZE as u64 - 4096).unwrap();
    assert!(found.iter().all(|byte| *byte == 0));
    for mode in [FallocateFlags::FALLOC_FL_COLLAPSE_RANGE, FallocateFlags::FALLOC_FL_INSERT_RANGE] {
        assert_eq!(fallocate(&file, mode, 0, 4096), Err(Errno::EOPNOTSUPP));
    }
    assert_eq!(file.metadata().unwrap().len(), SIZE as u64);
    drop(file);
    fixture.mounted.end().unwrap();
}

#[test]
fn every_fsync_is_one_flush_and_closing_a_file_is_none() {
    let Some(fixture) = mount_size(SIZE) else { return };
    let file = open(&fixture.file);
    let flushes = || fixture.memory.flushes.load(Ordering::Relaxed);
    file.write_all_at(b"x", 0).unwrap();
    file.sync_all().unwrap();
    file.sync_data().unwrap();
    assert_eq!(flushes(), 2);
    drop(file);
    drop(File::open(&fixture.file).unwrap());
    assert_eq!(flushes(), 2);
    fixture.mounted.end().unwrap();
}

#[test]
fn a_read_only_disk_says_so() {
    let options = MountOptions { read_only: true, ..MountOptions::default() };
    let Some(fixture) = mount_memory(Memory::new(SIZE), &options) else { return };
    assert_eq!(fs::metadata(&fixture.file).unwrap().mode() & 0o7777, 0o400);
    assert_eq!(os_error(OpenOptions::new().write(true).open(&fixture.file)), libc::EROFS);
    let mut found = Vec::new();
    File::open(&fixture.file).unwrap().read_to_end(&mut found).unwrap();
    assert!(found == vec![0; SIZE]);
    fixture.mounted.end().unwrap();
}

#[test]
fn owner_group_and_mode_are_as_told() {
    let options = MountOptions { uid: Some(1234), gid: Some(4321), umask: Some(0o027), ..MountOptions::default() };
    let Some(fixture) = mount_memory(Memory::new(SIZE), &options) else { return };
    let metadata = fs::metadata(&fixture.file).unwrap();
    assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o7777), (1234, 4321, 0o640));
    fixture.mounted.end().unwrap();
}

#[test]
fn a_full_host_is_enospc_and_passes() {
    let Some(fixture) = mount_size(SIZE) else { return };
    let file = open(&fixture.file);
    fixture.memory.full.store(true, Ordering::Relaxed);
    assert_eq!(os_error(file.write_at(&[1; 100], 0)), libc::ENOSPC);
    assert_eq!(os_error(file.sync_all()), libc::ENOSPC);
    fixture.memory.full.store(false, Ordering::Relaxed);
    file.write_all_at(&[1; 100], 0).unwrap();
    file.sync_all().unwrap();
    drop(file);
    fixture.mounted.end().unwrap();
}

#[test]
fn a_fault_of_the_medium_is_eio_and_what_is_cached_stays() {
    let Some(fixture) = mount_size(SIZE) else { return };
    let file = open(&fixture.file);
    file.write_all_at(b"known", 0).unwrap();
    fixture.memory.sick.store(true, Ordering::Relaxed);
    let mut found = [0; 5];
    assert_eq!(os_error(file.read_at(&mut found, 4 << 20)), libc::EIO);
    assert_eq!(os_error(file.write_at(&[1; 100], 4 << 20)), libc::EIO);
    assert_eq!(os_error(file.sync_all()), libc::EIO);
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    assert_eq!(fallocate(&file, punch, 1 << 20, 4096), Err(Errno::EIO));
    fixture.memory.sick.store(false, Ordering::Relaxed);
    file.read_exact_at(&mut found, 0).unwrap();
    assert_eq!(&found, b"known");
    drop(file);
    fixture.mounted.end().unwrap();
}

#[test]
fn sendfile_sends_the_disk() {
    let Some(fixture) = mount_size(SIZE) else { return };
    let data = pattern(3 << 20, 5);
    let file = open(&fixture.file);
    file.write_all_at(&data, 12_345).unwrap();
    let other = tempfile::tempfile().unwrap();
    let mut offset = 12_345;
    while offset < 12_345 + data.len() as u64 {
        let rest = 12_345 + data.len() - offset as usize;
        assert!(rustix::fs::sendfile(&other, &file, Some(&mut offset), rest).unwrap() > 0);
    }
    let mut found = vec![0; data.len()];
    other.read_exact_at(&mut found, 0).unwrap();
    assert!(found == data);
    drop(file);
    fixture.mounted.end().unwrap();
}

#[test]
fn small_reads_in_a_row_are_read_ahead_and_large_ones_are_not_cut_small() {
    let Some(fixture) = mount_size(SIZE) else { return };
    let mut file = open(&fixture.file);
    let mut page = [0; 4096];
    for _ in 0..SIZE / page.len() {
        file.read_exact(&mut page).unwrap();
    }
    let reads = fixture.memory.reads.load(Ordering::Relaxed);
    assert!(reads <= SIZE / (64 << 10), "{reads} reads of the disk for {} of the file", SIZE / page.len());
    let direct = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&fixture.file).unwrap();
    let mut large = vec![0; 4 << 20];
    direct.read_exact_at(&mut large, 0).unwrap();
    direct.write_all_at(&large, 0).unwrap();
    // All but the pages at the ends: the memory is not aligned to them.
    let most = |count: &std::sync::atomic::AtomicUsize| count.load(Ordering::Relaxed);
    let found = (most(&fixture.memory.largest_read), most(&fixture.memory.largest_write));
    assert!(found.0 >= 512 << 10 && found.1 >= 512 << 10, "{found:?}");
    drop((file, direct));
    fixture.mounted.end().unwrap();
}

#[test]
fn direct_io_that_is_not_aligned_is_right_or_refused() {
    let Some(fixture) = mount_size(SIZE) else { return };
    let direct = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&fixture.file).unwrap();
    let expected = pattern(SIZE, 6);
    open(&fixture.file).write_all_at(&expected, 0).unwrap();
    let mut memory = vec![0; 70_000];
    for (offset, len, skew) in [(1_u64, 100, 1), (511, 513, 3), (4096, 4096, 7), (4095, 65_537, 0), (512, 512, 512)] {
        match direct.read_at(&mut memory[skew..skew + len], offset) {
            Ok(read) => assert!(read > 0 && memory[skew..skew + read] == expected[offset as usize..][..read], "{offset} {len}"),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EINVAL)),
        }
        match direct.write_at(&pattern(len, offset), offset + (1 << 20)) {
            Ok(written) => {
                let contents = fixture.memory.contents();
                assert!(contents[offset as usize + (1 << 20)..][..written] == pattern(len, offset)[..written]);
            }
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EINVAL)),
        }
    }
    drop(direct);
    fixture.mounted.end().unwrap();
}

#[test]
fn statfs_tells_size_and_room() {
    let Some(fixture) = mount_size(SIZE) else { return };
    let found = nix::sys::statvfs::statvfs(fixture.folder.path()).unwrap();
    assert_eq!(found.blocks() * found.fragment_size(), SIZE as u64);
    assert!(found.blocks_free() <= found.blocks());
    fixture.mounted.end().unwrap();
}

#[test]
fn threads_write_and_read_beside_each_other() {
    let Some(fixture) = mount_size(SIZE) else { return };
    let part = SIZE / 8;
    thread::scope(|scope| {
        for index in 0..8 {
            let path = &fixture.file;
            scope.spawn(move || {
                let file = open(path);
                for round in 0..10 {
                    let data = pattern(part, (index * 100 + round) as u64);
                    file.write_all_at(&data, (index * part) as u64).unwrap();
                    let mut found = vec![0; part];
                    file.read_exact_at(&mut found, (index * part) as u64).unwrap();
                    assert!(found == data);
                }
            });
        }
    });
    let contents = fixture.memory.contents();
    for index in 0..8 {
        assert!(contents[index * part..][..part] == pattern(part, (index * 100 + 9) as u64));
    }
    fixture.mounted.end().unwrap();
}
