//! Goal: without `--kernel`, the kernel that a disk's boot menu starts is found as its boot loader would find it, and a
//! disk that was made to mislead is refused with one clear error.
//!
//! Method: disks are made by mkfs.ext4, mtools and sfdisk, with menus as Debian's grub-mkconfig, extlinux and
//! systemd-boot have them, and what is found is compared with what was put there. Then every byte that may matter is
//! damaged, and menus are cut anywhere: an answer or an error must come, soon.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test that can't go on fails here")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::slice::from_ref;

use vhd_core::LiveDisk;
use vhd_testkit::fixture::Kind;
use vhd_testkit::tools::require;
use vhd_vmm::installed::{Installed, find};

use support::{make_disk, open};

const MIB: u64 = 1 << 20;

/// Files of a file system.
struct Files(tempfile::TempDir);

impl Files {
    fn new(files: &[(&str, &str)]) -> Self {
        let files_folder = Self(tempfile::tempdir().unwrap());
        files.iter().for_each(|(path, text)| files_folder.put(path, text.as_bytes()));
        files_folder
    }

    fn put(&self, path: &str, bytes: &[u8]) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn ext(&self, kind: &str, uuid: &str) -> Vec<u8> {
        let image = self.0.path().with_extension("img");
        let arguments = ["-q", "-F", "-t", kind, "-U", uuid, "-L", "system", "-d", self.0.path().to_str().unwrap()];
        let size = ["16M"];
        let mkfs = require("mkfs.ext4").unwrap();
        mkfs.run(&[&arguments[..], &[image.to_str().unwrap()], &size].concat()).unwrap();
        let bytes = fs::read(&image).unwrap();
        fs::remove_file(image).unwrap();
        bytes
    }

    /// FAT12, FAT16 or FAT32, as mtools make it for such a size.
    fn fat(&self, sectors: u32, options: &[&str]) -> Vec<u8> {
        let image = self.0.path().with_extension("img");
        let (name, sectors) = (image.to_str().unwrap(), sectors.to_string());
        let format = require("mformat").unwrap();
        let arguments = ["-C", "-i", name, "-T", &sectors, "-h", "16", "-s", "63", "-N", "1234ABCD", "-v", "ESP"];
        format.run(&[&arguments[..], options, &["::"]].concat()).unwrap();
        let copy = require("mcopy").unwrap();
        for entry in fs::read_dir(self.0.path()).unwrap() {
            copy.run(&["-i", name, "-s", entry.unwrap().path().to_str().unwrap(), "::/"]).unwrap();
        }
        let bytes = fs::read(&image).unwrap();
        fs::remove_file(image).unwrap();
        bytes
    }
}

/// Whether the tools are there.
fn tools() -> bool {
    ["mkfs.ext4", "mformat", "mcopy", "sfdisk"].into_iter().all(|tool| require(tool).is_some())
}

struct Made {
    _folder: tempfile::TempDir,
    path: PathBuf,
    live: LiveDisk,
}

impl Made {
    fn find(&self) -> Result<Installed, String> {
        find(&self.live.disk())
    }
}

fn disk_of(kind: Kind, bytes: &[u8]) -> Made {
    let folder = tempfile::tempdir().unwrap();
    let path = make_disk(folder.path(), "disk", kind, (bytes.len() as u64).next_multiple_of(MIB));
    let live = open(&path);
    live.disk().write_at(bytes, 0).unwrap();
    Made { _folder: folder, path, live }
}

fn whole(bytes: &[u8]) -> Made {
    disk_of(Kind::Dynamic, bytes)
}

/// A disk with a partition table, and partitions of these bytes from 1 MiB on.
fn partitioned(label: &str, partitions: &[Vec<u8>]) -> Made {
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("raw");
    let len: u64 = partitions.iter().map(|bytes| (bytes.len() as u64).next_multiple_of(MIB)).sum();
    fs::File::create(&raw).unwrap().set_len(len + 2 * MIB).unwrap();
    let mut script = format!("label: {label}\n");
    let (mut at, mut places) = (MIB, Vec::new());
    for bytes in partitions {
        script.push_str(&format!("start={}, size={}\n", at / 512, bytes.len() / 512));
        places.push(at);
        at += (bytes.len() as u64).next_multiple_of(MIB);
    }
    let table = folder.path().join("table");
    fs::write(&table, script).unwrap();
    let shell = require("sh").unwrap();
    shell.run(&["-c", &format!("sfdisk -q {} < {}", raw.display(), table.display())]).unwrap();
    let mut bytes = fs::read(&raw).unwrap();
    for (partition, at) in partitions.iter().zip(places) {
        bytes[at as usize..at as usize + partition.len()].copy_from_slice(partition);
    }
    whole(&bytes)
}

const ROOT_UUID: &str = "0b5d4c1e-7a9f-4f43-9a52-6f1f3c1d2e3f";
const BOOT_UUID: &str = "c0ffee00-1234-4321-8765-0123456789ab";

/// `grub.cfg` of Debian 12, from grub-mkconfig: files are at `below` in the file system with this UUID.
fn debian_grub(uuid: &str, below: &str) -> String {
    DEBIAN_GRUB.replace("@UUID@", uuid).replace("@BOOT@", below).replace("@ROOT@", ROOT_UUID)
}

const DEBIAN_GRUB: &str = r#"#
# DO NOT EDIT THIS FILE
#
# It is automatically generated by grub-mkconfig using templates
# from /etc/grub.d and settings from /etc/default/grub
#

### BEGIN /etc/grub.d/00_header ###
if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="0"
fi

if [ x"${feature_menuentry_id}" = xy ]; then
  menuentry_id_option="--id"
else
  menuentry_id_option=""
fi

export menuentry_id_option

if [ "${prev_saved_entry}" ]; then
  set saved_entry="${prev_saved_entry}"
  save_env saved_entry
  set prev_saved_entry=
  save_env prev_saved_entry
  set boot_once=true
fi

function savedefault {
  if [ -z "${boot_once}" ]; then
    saved_entry="${chosen}"
    save_env saved_entry
  fi
}
function load_video {
  if [ x$feature_all_video_module = xy ]; then
    insmod all_video
  else
    insmod efi_gop
    insmod efi_uga
    insmod ieee1275_fb
    insmod vbe
    insmod vga
    insmod video_bochs
    insmod video_cirrus
  fi
}

if [ x$feature_default_font_path = xy ] ; then
   font=unicode
else
insmod part_msdos
insmod ext2
set root='hd0,msdos1'
if [ x$feature_platform_search_hint = xy ]; then
  search --no-floppy --fs-uuid --set=root --hint-bios=hd0,msdos1 --hint-efi=hd0,msdos1 --hint-baremetal=ahci0,msdos1  @UUID@
else
  search --no-floppy --fs-uuid --set=root @UUID@
fi
    font="/usr/share/grub/unicode.pf2"
fi

if loadfont $font ; then
  set gfxmode=auto
  load_video
  insmod gfxterm
  set locale_dir=$prefix/locale
  set lang=en_US
  insmod gettext
fi
terminal_output gfxterm
if [ "${recordfail}" = 1 ] ; then
  set timeout=30
else
  if [ x$feature_timeout_style = xy ] ; then
    set timeout_style=menu
    set timeout=5
  # Fallback normal timeout code in case the timeout_style feature is
  # unavailable.
  else
    set timeout=5
  fi
fi
### END /etc/grub.d/00_header ###

### BEGIN /etc/grub.d/05_debian_theme ###
set menu_color_normal=cyan/blue
set menu_color_highlight=white/blue
### END /etc/grub.d/05_debian_theme ###

### BEGIN /etc/grub.d/10_linux ###
function gfxmode {
	set gfxpayload="${1}"
}
set linux_gfx_mode=
export linux_gfx_mode
menuentry 'Debian GNU/Linux' --class debian --class gnu-linux --class gnu --class os $menuentry_id_option 'gnulinux-simple-@ROOT@' {
	load_video
	insmod gzio
	if [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
	insmod part_msdos
	insmod ext2
	set root='hd0,msdos1'
	if [ x$feature_platform_search_hint = xy ]; then
	  search --no-floppy --fs-uuid --set=root --hint-bios=hd0,msdos1 --hint-efi=hd0,msdos1 --hint-baremetal=ahci0,msdos1  @UUID@
	else
	  search --no-floppy --fs-uuid --set=root @UUID@
	fi
	echo	'Loading Linux 6.1.0-42-amd64 ...'
	linux	@BOOT@/vmlinuz-6.1.0-42-amd64 root=UUID=@ROOT@ ro  quiet
	echo	'Loading initial ramdisk ...'
	initrd	@BOOT@/initrd.img-6.1.0-42-amd64
}
submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option 'gnulinux-advanced-@ROOT@' {
	menuentry 'Debian GNU/Linux, with Linux 6.1.0-42-amd64' --class debian --class gnu-linux --class gnu --class os $menuentry_id_option 'gnulinux-6.1.0-42-amd64-advanced-@ROOT@' {
		set root='hd0,msdos1'
		search --no-floppy --fs-uuid --set=root @UUID@
		linux	@BOOT@/vmlinuz-6.1.0-42-amd64 root=UUID=@ROOT@ ro  quiet
		initrd	@BOOT@/initrd.img-6.1.0-42-amd64
	}
	menuentry 'Debian GNU/Linux, with Linux 6.1.0-41-amd64 (recovery mode)' --class debian --class gnu-linux --class gnu --class os $menuentry_id_option 'gnulinux-6.1.0-41-amd64-recovery-@ROOT@' {
		set root='hd0,msdos1'
		search --no-floppy --fs-uuid --set=root @UUID@
		linux	@BOOT@/vmlinuz-6.1.0-41-amd64 root=UUID=@ROOT@ ro single
		initrd	@BOOT@/early.img @BOOT@/initrd.img-6.1.0-41-amd64
	}
}

### END /etc/grub.d/10_linux ###

### BEGIN /etc/grub.d/30_uefi-firmware ###
if [ "$grub_platform" = "efi" ]; then
	fwsetup --is-supported
	if [ "$?" = 0 ]; then
		menuentry 'UEFI Firmware Settings' $menuentry_id_option 'uefi-firmware' {
			fwsetup
		}
	fi
fi
### END /etc/grub.d/30_uefi-firmware ###

### BEGIN /etc/grub.d/41_custom ###
if [ -f  ${config_directory}/custom.cfg ]; then
  source ${config_directory}/custom.cfg
elif [ -z "${config_directory}" -a -f  $prefix/custom.cfg ]; then
  source $prefix/custom.cfg
fi
### END /etc/grub.d/41_custom ###
"#;

/// A root file system with two kernels below `boot`.
fn debian(below: &str) -> Files {
    let files = Files::new(&[]);
    for version in ["41", "42"] {
        files.put(&format!("{below}vmlinuz-6.1.0-{version}-amd64"), format!("kernel {version}").as_bytes());
        files.put(&format!("{below}initrd.img-6.1.0-{version}-amd64"), format!("initrd {version}").as_bytes());
    }
    files.put(&format!("{below}early.img"), b"early");
    files
}

fn expect(found: &Installed, kernel: &str, initrd: &str, line: &str) {
    assert_eq!(String::from_utf8_lossy(&found.kernel.1), kernel);
    assert_eq!(String::from_utf8_lossy(&found.initrd.as_ref().unwrap().1), initrd);
    assert_eq!(found.command_line, line);
}

#[test]
fn debians_grub_menu_is_followed_on_whole_disks_and_on_both_partition_tables() {
    if !tools() {
        return;
    }
    let files = debian("boot/");
    files.put("boot/grub/grub.cfg", debian_grub(ROOT_UUID, "/boot").as_bytes());
    let line = format!("root=UUID={ROOT_UUID} ro quiet");
    for kind in ["ext2", "ext3", "ext4"] {
        let system = files.ext(kind, ROOT_UUID);
        for made in [whole(&system), partitioned("dos", from_ref(&system)), partitioned("gpt", from_ref(&system))] {
            let found = made.find().unwrap();
            expect(&found, "kernel 42", "initrd 42", &line);
            assert!(found.title.starts_with("'Debian GNU/Linux' (/boot/vmlinuz-6.1.0-42-amd64"), "{}", found.title);
        }
    }
}

#[test]
fn a_boot_partition_of_its_own_and_an_efi_system_partition_are_searched_by_uuid() {
    if !tools() {
        return;
    }
    let esp = Files::new(&[(
        "EFI/debian/grub.cfg",
        &format!("search.fs_uuid {BOOT_UUID} root hd0,gpt2\nset prefix=($root)'/grub'\nconfigfile $prefix/grub.cfg\n"),
    )]);
    // The same, where firmware's GRUB looks first: it only leads to another.
    esp.put("grub/grub.cfg", format!("search.fs_uuid {BOOT_UUID} root hd0,gpt2\nconfigfile ($root)/grub/grub.cfg\n").as_bytes());
    let boot = debian("");
    boot.put("grub/grub.cfg", debian_grub(BOOT_UUID, "").as_bytes());
    let root = Files::new(&[("etc/hostname", "debian\n")]);
    // With a FAT32 as it is on disks, 33 MiB at least, and the smaller ones.
    for esp in [esp.fat(20 << 11, &[]), esp.fat(4 << 11, &[]), esp.fat(40 << 11, &["-F"])] {
        let made = partitioned("gpt", &[esp, boot.ext("ext2", BOOT_UUID), root.ext("ext4", ROOT_UUID)]);
        let found = made.find().unwrap();
        expect(&found, "kernel 42", "initrd 42", &format!("root=UUID={ROOT_UUID} ro quiet"));
        assert!(found.title.ends_with("partition 2)"), "{}", found.title);
    }
}

#[test]
fn the_entry_that_was_chosen_last_is_the_default() {
    if !tools() {
        return;
    }
    let wanted = "gnulinux-advanced-@>gnulinux-6.1.0-41-amd64-recovery-@".replace('@', ROOT_UUID);
    for (default, environment) in [
        ("\"${saved_entry}\"", format!("# GRUB Environment Block\nsaved_entry={wanted}\n####")),
        ("\"0\"", format!("# GRUB Environment Block\nnext_entry={wanted}\n####")),
        ("\"1>1\"", String::new()),
        ("saved", "saved_entry=1>1\n".to_owned()),
        ("'Advanced options for Debian GNU/Linux>1'", String::new()),
    ] {
        let files = debian("boot/");
        let menu = debian_grub(ROOT_UUID, "/boot").replace("set default=\"0\"", &format!("set default={default}"));
        files.put("boot/grub/grub.cfg", menu.as_bytes());
        files.put("boot/grub/grubenv", environment.as_bytes());
        let found = whole(&files.ext("ext4", ROOT_UUID)).find().unwrap();
        // Several initial RAM disks are one behind the other, on boundaries of four bytes.
        expect(&found, "kernel 41", "early\0\0\0initrd 41", &format!("root=UUID={ROOT_UUID} ro single"));
        assert!(found.title.contains("recovery mode"), "{}", found.title);
    }
}

#[test]
fn grub_menus_with_entries_of_the_boot_loader_specification_are_followed() {
    if !tools() {
        return;
    }
    // As Fedora has them.
    let files = Files::new(&[
        ("vmlinuz-6.9", "kernel 6.9"),
        ("initramfs-6.9.img", "initrd 6.9"),
        (
            "grub2/grub.cfg",
            "load_env\nset default=\"${saved_entry}\"\nif [ -z \"${kernelopts}\" ]; then\n set kernelopts=\"root=/dev/vda2 ro \"\nfi\ninsmod blscfg\nblscfg\n",
        ),
        ("grub2/grubenv", "# GRUB Environment Block\nsaved_entry=abc-6.9\n"),
        (
            "loader/entries/abc-6.9.conf",
            "title Fedora (6.9)\nversion 6.9\nlinux /vmlinuz-6.9\ninitrd /initramfs-6.9.img $tuned_initrd\noptions $kernelopts rhgb quiet\n",
        ),
        ("loader/entries/abc-6.10.conf", "title Fedora (6.10)\nversion 6.10\nlinux /vmlinuz-6.10\noptions $kernelopts\n"),
    ]);
    let files_without_variables = fs::read_to_string(files.0.path().join("loader/entries/abc-6.9.conf")).unwrap();
    files.put("loader/entries/abc-6.9.conf", files_without_variables.replace(" $tuned_initrd", "").as_bytes());
    let found = partitioned("gpt", &[files.ext("ext4", BOOT_UUID)]).find().unwrap();
    expect(&found, "kernel 6.9", "initrd 6.9", "root=/dev/vda2 ro rhgb quiet");
}

#[test]
fn extlinux_and_syslinux_menus_are_followed() {
    if !tools() {
        return;
    }
    let text = "# generated\nDEFAULT linux\nPROMPT 0\nTIMEOUT 50\nLABEL old\n  KERNEL ../vmlinuz.old\n  APPEND root=/dev/vda1\n\
        LABEL linux\n  MENU LABEL ^Alpine Linux\n  LINUX ../vmlinuz\n  INITRD ../initrd.img\n  APPEND root=/dev/vda1 rw console=tty0\n";
    let files = Files::new(&[("boot/extlinux/extlinux.conf", text), ("boot/vmlinuz", "kernel"), ("boot/initrd.img", "initrd")]);
    let found = whole(&files.ext("ext4", ROOT_UUID)).find().unwrap();
    expect(&found, "kernel", "initrd", "root=/dev/vda1 rw console=tty0");
    assert!(found.title.starts_with("'Alpine Linux'"), "{}", found.title);

    let text = "append quiet\ninclude more.cfg\n";
    let more = "label one\nkernel /a\nlabel two\nmenu default\nkernel /VMLINUZ\nappend initrd=/long-named-initrd.img ro\n";
    let files =
        Files::new(&[("syslinux.cfg", text), ("more.cfg", more), ("vmlinuz", "fat kernel"), ("long-named-initrd.img", "initrd")]);
    for made in [whole(&files.fat(4 << 11, &[])), partitioned("dos", &[files.fat(40 << 11, &["-F"])])] {
        expect(&made.find().unwrap(), "fat kernel", "initrd", "ro");
    }
}

#[test]
fn entries_of_systemd_boot_are_chosen_by_its_settings_or_by_version() {
    if !tools() {
        return;
    }
    let entry = |version: &str| {
        format!(
            "title\tDebian\nversion\t{version}\nlinux\t/deb/{version}/linux\ninitrd\t/deb/{version}/initrd\noptions\troot=/dev/vda2 v={version}\n"
        )
    };
    let files = Files::new(&[
        ("loader/loader.conf", "timeout 3\nconsole-mode keep\n"),
        ("loader/entries/uki.conf", "title x\nefi /x.efi\n"),
    ]);
    for version in ["6.9", "6.10", "6.8"] {
        files.put(&format!("loader/entries/deb-{version}.conf"), entry(version).as_bytes());
        files.put(&format!("deb/{version}/linux"), format!("kernel {version}").as_bytes());
        files.put(&format!("deb/{version}/initrd"), format!("initrd {version}").as_bytes());
    }
    let esp = |files: &Files| partitioned("gpt", &[files.fat(40 << 11, &["-F"])]);
    expect(&esp(&files).find().unwrap(), "kernel 6.10", "initrd 6.10", "root=/dev/vda2 v=6.10");
    files.put("loader/loader.conf", b"default deb-6.9*\n");
    expect(&esp(&files).find().unwrap(), "kernel 6.9", "initrd 6.9", "root=/dev/vda2 v=6.9");
    files.put("loader/loader.conf", b"default nothing\n");
    // One that has failed as often as it may comes last.
    fs::rename(files.0.path().join("loader/entries/deb-6.10.conf"), files.0.path().join("loader/entries/deb-6.10+0-3.conf"))
        .unwrap();
    expect(&esp(&files).find().unwrap(), "kernel 6.9", "initrd 6.9", "root=/dev/vda2 v=6.9");
}

#[test]
fn symbolic_links_lead_to_kernels_and_loops_to_errors() {
    if !tools() {
        return;
    }
    let files = Files::new(&[("boot/vmlinuz-6.1", "kernel"), ("boot/extlinux/extlinux.conf", "label a\nkernel /vmlinuz\n")]);
    std::os::unix::fs::symlink("boot/vmlinuz", files.0.path().join("vmlinuz")).unwrap();
    std::os::unix::fs::symlink("vmlinuz-6.1", files.0.path().join("boot/vmlinuz")).unwrap();
    let found = whole(&files.ext("ext4", ROOT_UUID)).find().unwrap();
    assert_eq!(found.kernel.1, b"kernel");
    fs::remove_file(files.0.path().join("boot/vmlinuz")).unwrap();
    std::os::unix::fs::symlink("/vmlinuz", files.0.path().join("boot/vmlinuz")).unwrap();
    let error = whole(&files.ext("ext4", ROOT_UUID)).find().unwrap_err();
    assert!(error.contains("/vmlinuz") && error.contains("--kernel"), "{error}");
}

#[test]
fn what_has_no_kernel_is_refused_with_what_was_looked_at() {
    if !tools() {
        return;
    }
    let empty = whole(&vec![0; MIB as usize]).find().unwrap_err();
    assert_eq!(
        empty,
        "has no kernel that its boot menu starts (the disk as a whole has neither an ext nor a FAT file system); give one with --kernel"
    );
    let data = Files::new(&[("data", "x")]);
    let error = partitioned("gpt", &[data.ext("ext4", ROOT_UUID), vec![0; MIB as usize]]).find().unwrap_err();
    assert!(error.contains("partition 1: no boot menu") && error.contains("partition 2 has neither"), "{error}");
    assert!(error.contains("--kernel") && !error.contains('\n'), "{error}");
    // A menu whose kernel is gone, is too large, or is on something that can't be read.
    for (menu, wanted) in [
        ("menuentry A {\n linux /vmlinuz\n}", "/vmlinuz: is not there; the menu's entry 'A' starts it"),
        ("menuentry A {\n linux /huge\n}", "/huge: has 1073741824 bytes, more than 536870912"),
        ("set root='lvm/vg-root'\nmenuentry A {\n linux /a\n}", "(lvm/vg-root)"),
        ("menuentry A {\n chainloader +1\n}", "'A' starts no Linux"),
        ("menuentry A {\n linux /a", "ends where '}' is missing"),
        ("if true; then\n menuentry A { linux /a\n }", "'if' without 'fi'"),
    ] {
        let files = Files::new(&[("boot/grub/grub.cfg", menu)]);
        fs::File::create(files.0.path().join("huge")).unwrap().set_len(1 << 30).unwrap();
        let error = whole(&files.ext("ext4", ROOT_UUID)).find().unwrap_err();
        assert!(error.contains(wanted) && error.contains("--kernel") && !error.contains('\n'), "{menu}: {error}");
    }
}

#[test]
fn damaged_file_systems_are_answered_soon() {
    if !tools() {
        return;
    }
    let files = debian("boot/");
    files.put("boot/grub/grub.cfg", debian_grub(ROOT_UUID, "/boot").as_bytes());
    let ext = files.ext("ext4", ROOT_UUID);
    let fat = Files::new(&[("syslinux.cfg", "label a\nkernel vmlinuz\n"), ("vmlinuz", "k")]).fat(4 << 11, &[]);
    let mut state = 1_u64;
    let mut random = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let runs = std::env::var("VHD_DAMAGES").map_or(300, |runs| runs.parse().unwrap());
    for (image, front) in [(&ext, 4096), (&fat, 16 << 10)] {
        let made = whole(image);
        let disk = made.live.disk();
        for run in 0..runs {
            // Half of the damage is where the numbers are that everything else is computed from.
            let end = if run % 2 == 0 { front } else { image.len() as u64 };
            let mut undo = Vec::new();
            for _ in 0..=random(4) {
                let at = random(end);
                let byte = [0, 1, 0xFF, random(256) as u8][random(4) as usize];
                undo.push((at, image[at as usize]));
                disk.write_at(&[byte], at).unwrap();
            }
            if let Err(error) = made.find() {
                assert!(error.contains("--kernel") && !error.contains('\n'), "{error}");
            }
            undo.into_iter().for_each(|(at, byte)| disk.write_at(&[byte], at).unwrap());
        }
        made.find().unwrap();
        assert!(Path::new(&made.path).exists());
    }
}
