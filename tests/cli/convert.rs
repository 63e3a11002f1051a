//! Copies: between all formats, with holes as holes, and nothing made up about what a file is.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use tempfile::TempDir;
use vhd_testkit::tools::QemuImg;

use crate::support::{done, expect, json, noise, refused, text, vhd, vhd_fed};

const SIZE: u64 = (64 << 20) + 512;

/// `disk.raw`: data at its start, in its middle and in its last sector; holes and written zeros between.
fn source() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let file = File::create(folder.path().join("disk.raw")).unwrap();
    file.set_len(SIZE).unwrap();
    file.write_all_at(&noise(1, 100_000), 0).unwrap();
    file.write_all_at(&noise(2, 3 << 20), 33 << 20).unwrap();
    file.write_all_at(&vec![0; 4 << 20], 50 << 20).unwrap();
    file.write_all_at(&noise(3, 512), SIZE - 512).unwrap();
    folder
}

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn both_ways_with_holes_as_holes() {
    let folder = source();
    let dir = folder.path();
    let raw = fs::read(dir.join("disk.raw")).unwrap();
    done(dir, "convert disk.raw dynamic.vhd");
    done(dir, "convert disk.raw fixed.vhd --to fixed");
    done(dir, "convert disk.raw small-blocks.vhd --block-size 512K");
    done(dir, "convert dynamic.vhd from-dynamic.vhd --to fixed");
    done(dir, "convert fixed.vhd from-fixed.vhd");
    for image in ["dynamic.vhd", "fixed.vhd", "small-blocks.vhd", "from-dynamic.vhd", "from-fixed.vhd"] {
        let info = json(dir, &format!("info {image}"), 0);
        assert_eq!(info["virtual_size"], SIZE, "{image}");
        // 3.6 MiB are data; what was zero, written or not, takes no room.
        assert!(allocated(&dir.join(image)) < 5 << 20, "{image} takes {} bytes", allocated(&dir.join(image)));
        done(dir, &format!("check --deep {image}"));
        done(dir, &format!("convert {image} back.raw"));
        assert!(fs::read(dir.join("back.raw")).unwrap() == raw, "{image}");
        assert!(allocated(&dir.join("back.raw")) < 5 << 20);
        done(dir, &format!("compare {image} disk.raw"));
        fs::remove_file(dir.join("back.raw")).unwrap();
    }
    // Three places with data: in four blocks of 2 MiB.
    assert_eq!(json(dir, "info dynamic.vhd", 0)["blocks_allocated"], 4);
    assert_eq!(json(dir, "info dynamic.vhd", 0)["type"], "dynamic", "the default of a .vhd");
    assert_eq!(json(dir, "info fixed.vhd", 0)["file_size"], SIZE + 512);
}

#[test]
fn streams_both_ways() {
    let folder = source();
    let dir = folder.path();
    let raw = fs::read(dir.join("disk.raw")).unwrap();
    assert!(expect(vhd(dir, "convert disk.raw -"), 0, "convert").stdout == raw);
    for (line, image) in [
        (format!("convert - a.vhd --size {SIZE}"), "a.vhd"),
        (format!("convert - b.vhd --to fixed --size {SIZE}"), "b.vhd"),
        ("convert - c.raw".to_owned(), "c.raw"),
    ] {
        expect(vhd_fed(dir, &line, &raw), 0, &line);
        assert!(allocated(&dir.join(image)) < 5 << 20, "zeros of a stream are holes");
        assert!(expect(vhd(dir, &format!("convert {image} -")), 0, image).stdout == raw, "{image}");
    }
    refused(dir, "convert - d.vhd");
    refused(dir, "convert a.vhd - --to dynamic");
    refused(dir, "convert - -");
    // A stream that is shorter is filled up with zeros, one that is longer is refused.
    expect(vhd_fed(dir, "convert -q - short.vhd --size 1M", b"abc"), 0, "convert");
    assert_eq!(done(dir, "read short.vhd --offset 0 --length 4"), "abc\0");
    expect(vhd_fed(dir, "convert -q - long.vhd --size 512", &[1; 513]), 2, "convert");
    assert!(!dir.join("long.vhd").exists());
}

#[test]
fn what_azure_accepts() {
    let folder = source();
    let dir = folder.path();
    done(dir, "convert disk.raw azure.vhd --to fixed --align 1M");
    let len = fs::metadata(dir.join("azure.vhd")).unwrap().len();
    assert_eq!((len - 512) % (1 << 20), 0);
    let info = json(dir, "info azure.vhd", 0);
    assert_eq!((&info["type"], &info["virtual_size"]), (&"fixed".into(), &(len - 512).into()));
    let mut footer = [0; 512];
    File::open(dir.join("azure.vhd")).unwrap().read_exact_at(&mut footer, len - 512).unwrap();
    assert!(footer.starts_with(b"conectix"));
    assert_eq!(footer[48..56], (len - 512).to_be_bytes(), "current size");
    // What was added is zero, the rest is what it was.
    assert_eq!(json(dir, "compare azure.vhd disk.raw", 1)["first_difference"], SIZE);
    // What is a multiple already stays so.
    done(dir, "convert azure.vhd again.vhd --to fixed --align 1M");
    done(dir, "compare azure.vhd again.vhd");
    refused(dir, "convert disk.raw bad.vhd --align 1000");
    refused(dir, "convert disk.raw bad.vhd --align 0");
}

#[test]
fn sizes_grow_and_never_shrink() {
    let folder = source();
    let dir = folder.path();
    done(dir, "convert disk.raw larger.vhd --size 100M");
    assert_eq!(json(dir, "info larger.vhd", 0)["virtual_size"], 100 << 20);
    assert_eq!(json(dir, "compare larger.vhd disk.raw", 1)["first_difference"], SIZE);
    refused(dir, "convert disk.raw smaller.vhd --size 1M");
    assert!(!dir.join("smaller.vhd").exists());
    // A raw file of no whole number of sectors.
    fs::write(dir.join("odd.raw"), [7; 1000]).unwrap();
    done(dir, "convert -q odd.raw odd.vhd");
    assert_eq!(json(dir, "info odd.vhd", 0)["virtual_size"], 1024);
    assert_eq!(done(dir, "read odd.vhd --offset 999 --length 2"), "\u{7}\0");
}

#[test]
fn a_chain_becomes_one_image() {
    let folder = source();
    let dir = folder.path();
    done(dir, "convert disk.raw base.vhd");
    done(dir, "create leaf.vhd --parent base.vhd");
    expect(vhd_fed(dir, "write leaf.vhd --offset 34M", &noise(9, 10_000)), 0, "write");
    done(dir, "convert leaf.vhd flat.vhd");
    assert_eq!(json(dir, "info flat.vhd", 0)["type"], "dynamic");
    done(dir, "compare leaf.vhd flat.vhd");
    assert_eq!(json(dir, "compare base.vhd flat.vhd", 1)["first_difference"], 34 << 20);
}

#[test]
fn a_footer_in_a_raw_file_proves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    // A guest can write this: a raw disk whose last sector is the footer of a smaller fixed disk.
    done(dir, "create planted.vhd --size 4M --type fixed");
    fs::rename(dir.join("planted.vhd"), dir.join("disk.img")).unwrap();
    let size = (4 << 20) + 512;
    done(dir, "convert disk.img raw.vhd");
    assert_eq!(json(dir, "info raw.vhd", 0)["virtual_size"], size, "footer and all");
    done(dir, "compare raw.vhd disk.img");
    done(dir, "convert disk.img copy.raw");
    assert_eq!(fs::metadata(dir.join("copy.raw")).unwrap().len(), size);
    // Unless the user says so.
    done(dir, "convert disk.img vhd.vhd --from vhd");
    assert_eq!(json(dir, "info vhd.vhd", 0)["virtual_size"], 4 << 20);
    // And a VHD's name can be overruled too.
    done(dir, "convert vhd.vhd bytes.raw --from raw");
    assert!(fs::read(dir.join("bytes.raw")).unwrap() == fs::read(dir.join("vhd.vhd")).unwrap());
    // The formats of names: .vud and .avhd are VHDs too, whatever their case.
    for name in ["a.VHD", "a.vud", "a.AVHD"] {
        done(dir, &format!("convert vhd.vhd {name}"));
        done(dir, &format!("check {name}"));
    }
}

#[test]
fn an_existing_raw_file_is_written_in_place() {
    let folder = source();
    let dir = folder.path();
    done(dir, "convert disk.raw disk.vhd");
    let target = dir.join("target.raw");
    fs::write(&target, noise(7, 70 << 20)).unwrap();
    let inode = fs::metadata(&target).unwrap().ino();
    done(dir, "convert disk.vhd target.raw --overwrite");
    assert_eq!(fs::metadata(&target).unwrap().ino(), inode);
    assert!(fs::read(&target).unwrap() == fs::read(dir.join("disk.raw")).unwrap());
}

#[test]
fn qemu_sees_the_same_disk() {
    let Some(qemu) = QemuImg::find() else { return };
    let folder = source();
    let dir = folder.path();
    let raw = fs::read(dir.join("disk.raw")).unwrap();
    for to in ["dynamic", "fixed"] {
        let image = dir.join(format!("{to}.vhd"));
        done(dir, &format!("convert disk.raw {to}.vhd --to {to}"));
        assert!(qemu.to_raw(&image).unwrap() == raw, "{to}");
        // QEMU takes the current size of its own accord: our creator is one that it knows.
        let info = qemu.run(&["info", "-f", "vpc", "--output=json", image.to_str().unwrap()]).unwrap();
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["virtual-size"], SIZE, "{to}");
    }
    // And the other way: what qemu-img makes.
    let disk = dir.join("disk.raw");
    for subformat in ["dynamic", "fixed"] {
        let made = dir.join(format!("qemu-{subformat}.vhd"));
        let options = format!("subformat={subformat},force_size=on");
        let arguments = ["convert", "-f", "raw", "-O", "vpc", "-o", &options, disk.to_str().unwrap(), made.to_str().unwrap()];
        qemu.run(&arguments).unwrap();
        done(dir, &format!("compare qemu-{subformat}.vhd disk.raw"));
        done(dir, &format!("check --deep qemu-{subformat}.vhd"));
    }
}

#[test]
fn notes_name_the_new_image() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    fs::write(dir.join("a.raw"), [1; 512]).unwrap();
    let output = expect(vhd(dir, "convert a.raw a.vhd"), 0, "convert");
    assert_eq!(text(&output.stderr), "vhd: note: a.vhd: smaller than 3 MiB: Windows refuses it\n");
}

#[test]
fn in_place_and_back() {
    let folder = source();
    let dir = folder.path();
    let raw = fs::read(dir.join("disk.raw")).unwrap();
    fs::copy(dir.join("disk.raw"), dir.join("disk.vhd")).unwrap();
    done(dir, "convert disk.vhd --in-place --to fixed --from raw");
    done(dir, "check --deep disk.vhd");
    for (to, from) in [("dynamic", "fixed"), ("fixed", "dynamic")] {
        let planned = json(dir, &format!("convert --in-place --to {to} disk.vhd --dry-run"), 0);
        assert_eq!((planned["from"].as_str(), planned["done"].as_bool()), (Some(from), Some(false)));
        assert_eq!(json(dir, "info disk.vhd", 0)["type"], from);
        assert_eq!(json(dir, &format!("convert --in-place --to {to} disk.vhd"), 0)["done"], true);
        assert_eq!(json(dir, "info disk.vhd", 0)["type"], to);
        done(dir, "check --deep disk.vhd");
        done(dir, "compare disk.vhd disk.raw");
        assert!(allocated(&dir.join("disk.vhd")) < 6 << 20);
    }
    assert!(refused(dir, "convert --in-place --to fixed disk.vhd").contains("already"));
    assert!(refused(dir, "convert --in-place --to raw disk.vhd").contains("--to fixed"));
    // A file that is a VHD and not named so is not made the content of another one unasked, as by the same command again.
    fs::rename(dir.join("disk.vhd"), dir.join("disk.img")).unwrap();
    let before = fs::read(dir.join("disk.img")).unwrap();
    assert!(refused(dir, "convert --in-place --to fixed disk.img").contains("--from vhd"));
    assert!(refused(dir, "convert --in-place --to dynamic disk.img").contains("--from vhd"));
    assert!(fs::read(dir.join("disk.img")).unwrap() == before);
    assert_eq!(json(dir, "convert --in-place --to dynamic disk.img --from vhd", 0)["from"], "fixed");
    assert!(fs::read(dir.join("disk.raw")).unwrap() == raw);
}

#[test]
fn an_existing_image_takes_a_content_and_stays_itself() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    fs::write(dir.join("new.img"), noise(7, 3 << 20)).unwrap();
    done(dir, "create base.vhd --size 8M");
    expect(vhd_fed(dir, "write base.vhd --offset 6M", &noise(8, 1 << 20)), 0, "write");
    done(dir, "create leaf.vhd --parent base.vhd");
    let uuid = json(dir, "info leaf.vhd", 0)["uuid"].clone();
    done(dir, "convert --into new.img leaf.vhd");
    assert_eq!(json(dir, "info leaf.vhd", 0)["uuid"], uuid);
    // What the source has not is zero, whatever the parent holds.
    let mut expected = noise(7, 3 << 20);
    expected.resize(8 << 20, 0);
    assert!(vhd(dir, "read leaf.vhd --offset 0 --length 8M").stdout == expected);
    fs::write(dir.join("large.img"), [0; 512]).unwrap();
    File::options().write(true).open(dir.join("large.img")).unwrap().set_len(9 << 20).unwrap();
    assert!(refused(dir, "convert --into large.img leaf.vhd").contains("8388608"));
    assert!(vhd(dir, "read leaf.vhd --offset 0 --length 8M").stdout == expected);
    assert!(refused(dir, "convert --into new.img missing.vhd").contains("missing.vhd"));
}
