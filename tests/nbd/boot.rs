//! A guest whose root file system is on an export: it boots, writes, and powers off; then the file system is clean.
//!
//! QEMU without KVM, so that it runs anywhere: a Debian kernel, an initial RAM disk with busybox and the few modules
//! that a virtio disk and ext4 need, and a root file system with busybox as its init.

use std::fs;
use std::path::{Path, PathBuf};

use super::server::{Server, has, sh};
use super::support::done;

/// A kernel of this machine with its modules.
fn kernel() -> Option<(PathBuf, PathBuf)> {
    let mut found: Vec<_> = fs::read_dir("/boot").ok()?.flatten().map(|entry| entry.path()).collect();
    found.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")));
    found.sort();
    let kernel = found.pop()?;
    let release = kernel.file_name()?.to_str()?.strip_prefix("vmlinuz-")?.to_owned();
    Some((kernel, Path::new("/lib/modules").join(release)))
}

fn needs_boot() -> Option<(PathBuf, PathBuf)> {
    let found = kernel().filter(|_| Path::new("/bin/busybox").exists() || Path::new("/usr/bin/busybox").exists());
    if found.is_none() {
        assert!(
            std::env::var_os("CI").is_none_or(|ci| ci != "true"),
            "CI must boot a guest: busybox-static, linux-image-cloud-amd64"
        );
        eprintln!("SKIPPED: booting a guest needs busybox-static and a Debian kernel in /boot");
    }
    found.filter(|_| has("qemu-system-x86_64"))
}

/// What the initial RAM disk does: load modules, mount the root, and go there.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
for module in $(/bin/busybox cat /modules); do /bin/busybox insmod /lib/$module; done
for n in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/vda ] && break; /bin/busybox sleep 1; done
/bin/busybox mount -t ext4 /dev/vda /root || echo "no root"
exec /bin/busybox switch_root /root /sbin/init
"#;

/// What the guest does: look at a file, write others, and power off.
const GUEST: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
echo "guest: $(/bin/busybox cat /greeting)"
i=0
while [ $i -lt 40 ]; do
    /bin/busybox dd if=/dev/urandom of=/data/file$i bs=64k count=4 2>/dev/null
    i=$((i + 1))
done
(cd /data && /bin/busybox md5sum file* > /sums)
/bin/busybox sync
/bin/busybox mount -o remount,ro /
echo "guest: done"
/bin/busybox poweroff -f
"#;

/// Makes `root.vhd` and `initrd` in the folder.
fn make(folder: &Path, modules: &Path) {
    let script = format!(
        r#"set -e
        mkdir -p i/bin i/lib i/dev i/root r/bin r/sbin r/dev r/data
        cp $(command -v busybox) i/bin/busybox; cp $(command -v busybox) r/bin/busybox
        echo hello from the image > r/greeting
        chmod +x i/init r/sbin/init 2>/dev/null || true
        for wanted in virtio_pci virtio_blk ext4; do
            modprobe -S {release} --show-depends $wanted
        done | awk '$1 == "insmod" {{ print $2 }}' | awk '!seen[$0]++' | while read module; do
            name=$(basename $module); name=${{name%.xz}}
            case $module in *.xz) xz -dc $module > i/lib/$name;; *) cp $module i/lib/$name;; esac
            echo $name >> i/modules
        done
        touch i/modules
        (cd i && find . | cpio -o -H newc --quiet) > initrd
        mke2fs -q -t ext4 -d r root.raw 96M
        "#,
        release = modules.file_name().unwrap().to_str().unwrap()
    );
    fs::create_dir_all(folder.join("i")).unwrap();
    fs::create_dir_all(folder.join("r/sbin")).unwrap();
    for (path, text) in [("i/init", INIT), ("r/sbin/init", GUEST)] {
        fs::write(folder.join(path), text).unwrap();
    }
    sh(folder, &script);
    done(folder, "convert root.raw root.vhd");
}

#[test]
fn a_guest_boots_from_an_export_writes_and_leaves_a_clean_file_system() {
    let Some((kernel, modules)) = needs_boot() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    make(path, &modules);
    done(path, "create child.vhd --parent root.vhd");
    let server = Server::start(path, "child.vhd");
    let said = sh(
        path,
        &format!(
            "timeout 300 qemu-system-x86_64 -accel tcg,thread=multi -m 256 -display none -no-reboot -nodefaults -serial stdio \
             -kernel {} -initrd initrd -append 'console=ttyS0 quiet panic=-1' \
             -drive file='{}',format=raw,if=virtio,cache=writeback,discard=unmap",
            kernel.display(),
            server.uri_of("child")
        ),
    );
    assert!(said.contains("guest: hello from the image") && said.contains("guest: done"), "{said}");
    server.stop();
    done(path, "check child.vhd --chain --deep");
    done(path, "convert child.vhd after.raw");
    sh(path, "e2fsck -fn after.raw");
    // What the guest wrote is what is there, read by another program.
    let sums = sh(path, "debugfs -R 'cat /sums' after.raw 2>/dev/null");
    assert_eq!(sums.lines().count(), 40, "{sums}");
    sh(
        path,
        "mkdir out && debugfs -R 'rdump /data out' after.raw && debugfs -R 'cat /sums' after.raw 2>/dev/null > out/data/sums && cd out/data && md5sum -c sums",
    );
}
