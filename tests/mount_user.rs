//! What ordinary users have of mounts.
//!
//! Goal: who is not root mounts disks, files and file systems with what FUSE lets them have, is told what they can't have, and
//! others see of it what was allowed. Method: a user with an empty home, the real helpers, and the machine's settings changed
//! and put back.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::fs;

use support::mounts::{User, possible};
use support::{text, wait_until};

/// What every test here needs.
const TOOLS: &[&str] = &["fusermount3", "setpriv", "fuse2fs", "mkfs.ext4", "e2fsck", "fusefat", "mkfs.vfat", "ntfs-3g", "mkntfs"];

#[test]
fn a_disk_a_file_and_ext4() {
    if !possible(TOOLS) {
        return;
    }
    let user = User::new(false);
    user.does(
        "vhd create a.vhd --size 64M && vhd mount a.vhd disk && mkfs.ext4 -q -E root_owner=65534:65534 disk/disk.raw && vhd unmount disk",
    );
    let said = user.does("vhd mount --fs a.vhd files && cp -r /usr/share/doc/fuse3 files/ && ls files");
    assert!(said.contains("fuse2fs"), "{said}");
    // Root sees nothing of it, which is FUSE's rule.
    assert!(fs::read_dir(user.home().join("files")).is_err());
    user.does("diff -r /usr/share/doc/fuse3 files/fuse3 && vhd unmount files");
    user.does("vhd mount --read-only a.vhd disk && e2fsck -fn disk/disk.raw && vhd unmount disk");
    // A regular file of the user's own will do, too.
    let size = user.does("touch file && vhd mount a.vhd file && stat -c %s file && vhd unmount file && stat -c %s file");
    assert_eq!(size.split_whitespace().collect::<Vec<_>>(), ["67108864", "0"]);
}

#[test]
fn fat_is_read_and_written_and_is_sound() {
    if !possible(TOOLS) {
        return;
    }
    let user = User::new(false);
    user.does("vhd create a.vhd --size 64M && vhd mount a.vhd disk && mkfs.vfat disk/disk.raw && vhd unmount disk");
    let said = user.does("vhd mount --fs a.vhd files && cp -r /usr/share/doc/fuse3 files/ && cp /bin/sh files/sh");
    assert!(said.contains("vfat (fusefat)"), "{said}");
    user.does("cmp files/sh /bin/sh && vhd unmount files");
    user.does("vhd mount --fs --read-only a.vhd files && diff -r /usr/share/doc/fuse3 files/fuse3 && cmp files/sh /bin/sh");
    assert!(!user.tries("touch files/new").status.success());
    user.does("fusermount3 -u files && vhd unmount files 2> /dev/null || test ! -e files/sh");
    user.does("vhd mount --read-only a.vhd disk && fsck.vfat -n disk/disk.raw && vhd unmount disk");
}

#[test]
fn ntfs_needs_what_the_machine_must_allow() {
    if !possible(TOOLS) {
        return;
    }
    let make =
        "vhd create n.vhd --size 64M && vhd mount n.vhd disk && mkntfs -q -F -f disk/disk.raw 2> /dev/null && vhd unmount disk";
    let user = User::new(true);
    user.does(make);
    let said = user.does("vhd mount --fs n.vhd files && cp /bin/sh files/");
    assert!(said.contains("ntfs (ntfs-3g)"), "{said}");
    user.does("vhd unmount files && vhd mount --fs --read-only n.vhd files && cmp files/sh /bin/sh && vhd unmount files");
    drop(user);

    let user = User::new(false);
    user.does(make);
    let output = user.tries("vhd mount --fs n.vhd files");
    if !output.status.success() {
        // Where ntfs-3g is set-uid.
        let said = text(&output.stderr);
        assert!(said.lines().count() == 1 && said.contains("user_allow_other"), "{said}");
        user.does("test -z \"$(ls run/vhd)\"");
    }
}

#[test]
fn an_undo_mount_is_kept_committed_and_discarded() {
    if !possible(TOOLS) {
        return;
    }
    let user = User::new(false);
    user.does("vhd create a.vhd --size 64M && sha256sum a.vhd > before");
    let write = "printf changed | dd of=disk/disk.raw bs=1 seek=5000000 conv=notrunc status=none";
    let found = "test \"$(vhd read a.vhd --offset 5000000 --length 7)\" = changed";
    user.does(&format!("vhd mount --undo a.vhd disk && {write} && vhd unmount disk && sha256sum -c before && test -e a.vud"));
    user.does("vhd mount --undo a.vhd disk && vhd unmount disk --discard && sha256sum -c before && test ! -e a.vud");
    user.does(&format!("vhd mount --undo a.vhd disk && {write} && vhd unmount disk --commit && {found} && test ! -e a.vud"));
}

#[test]
fn others_see_what_is_allowed_and_root_unmounts_it() {
    if !possible(TOOLS) {
        return;
    }
    let user = User::new(false);
    user.does("vhd create a.vhd --size 64M && printf seen | vhd write a.vhd --offset 0");
    let output = user.tries("vhd mount -o allow_other a.vhd disk");
    let said = text(&output.stderr);
    assert!(!output.status.success() && said.contains("user_allow_other"), "{said}");
    user.does("vhd mount a.vhd disk");
    assert!(fs::read(user.home().join("disk/disk.raw")).is_err(), "it was allowed to nobody");
    user.does("vhd unmount disk");
    drop(user);

    let user = User::new(true);
    user.does("vhd create a.vhd --size 64M && printf seen | vhd write a.vhd --offset 0");
    user.does("vhd mount -o allow_other a.vhd disk");
    assert_eq!(&fs::read(user.home().join("disk/disk.raw")).unwrap()[..4], b"seen");
    support::done(&user.home(), "unmount disk");
    user.does("vhd check a.vhd && test -z \"$(ls disk)\"");
    // Root may also end what it may not see.
    user.does("vhd mount a.vhd disk");
    support::done(&user.home(), "unmount disk");
    user.does("test -z \"$(ls disk)\"");
}

#[test]
fn a_server_that_is_stopped_or_killed_is_named_given_up_and_cleared() {
    if !possible(TOOLS) {
        return;
    }
    let user = User::new(false);
    let pid = "pid=$(sed -n 's/.*\"pid\": \\([0-9]*\\).*/\\1/p' told)";
    user.does("vhd create a.vhd --size 64M && printf kept | vhd write a.vhd --offset 0");
    let mount = format!("vhd mount --json a.vhd disk > told && {pid}");
    user.does(&format!("{mount} && kill -KILL $pid && vhd unmount disk && test -z \"$(ls disk)\""));
    let output = user.tries(&format!("{mount} && kill -STOP $pid && vhd unmount disk"));
    let said = text(&output.stderr);
    let pid_said = user.does(&format!("{pid} && echo $pid"));
    assert!(!output.status.success() && said.contains(&format!("kill -CONT {}", pid_said.trim())), "{said}");
    user.does(&format!("{pid} && vhd unmount --force disk && kill -CONT $pid && test -z \"$(ls disk)\""));
    wait_until("the image is free", || user.tries("vhd write a.vhd --offset 0 < /dev/null").status.success());
    user.does("test \"$(vhd read a.vhd --offset 0 --length 4)\" = kept");
}
