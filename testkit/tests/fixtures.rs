//! Every fixture of the catalogue, read four ways: from its spec, by the
//! reference reader, by qemu-img and by vhdimount.

#![allow(clippy::unwrap_used, reason = "a test that cannot make its own input has nothing better to do than panic")]

use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;
use vhd_testkit::fixture::{Fixture, FixtureSpec, Kind, Layout, Trailing, Verdict, catalogue, put_u32, refresh_checksums};
use vhd_testkit::model::ModelDisk;
use vhd_testkit::reference::ReferenceChain;
use vhd_testkit::tagged::compare;
use vhd_testkit::tools::{QemuImg, QemuIo, VhdiMount};

#[test]
fn names_are_unique() {
    let mut names: Vec<_> = catalogue().iter().map(|f| f.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), catalogue().len());
}

#[test]
fn sparse_files_hold_the_same_bytes_as_memory() {
    let folder = TempDir::new().unwrap();
    for fixture in catalogue() {
        let path = folder.path().join("image");
        let placed = fixture.leaf.write_to(&path).unwrap();
        let (bytes, in_memory) = fixture.leaf.to_bytes();
        assert_eq!(placed, in_memory, "{}", fixture.name);
        assert!(fs::read(&path).unwrap() == bytes, "{}", fixture.name);
    }
}

#[test]
fn the_reference_reads_what_the_specs_say() {
    judge(|fixture, paths| {
        let read = ReferenceChain::open_paths(paths).and_then(|chain| chain.read_all());
        let verdict = if fixture.readable { Verdict::Agrees } else { Verdict::Refuses("damaged beyond recovery") };
        (read, verdict)
    });
}

#[test]
fn qemu_reads_what_is_recorded() {
    if let Some(qemu) = QemuImg::find() {
        judge(|fixture, paths| (qemu.to_raw(paths[0].as_ref()), fixture.readers.qemu));
    }
}

#[test]
fn libvhdi_reads_what_is_recorded() {
    if let Some(vhdimount) = VhdiMount::find() {
        judge(|fixture, paths| (vhdimount.to_raw(paths[0].as_ref()), fixture.readers.libvhdi));
    }
}

#[test]
fn libvhdi_serves_each_depth_of_a_chain() {
    let Some(vhdimount) = VhdiMount::find() else {
        return;
    };
    let fixture = catalogue().into_iter().find(|f| f.name == "chain-three").unwrap();
    let folder = TempDir::new().unwrap();
    let paths = fixture.write_into(folder.path()).unwrap();
    let mounted = vhdimount.mount(&paths[0]).unwrap();
    let views = mounted.views().unwrap();
    assert_eq!(views.len(), 3);
    for (depth, view) in views.iter().rev().enumerate() {
        let want = ReferenceChain::open_paths(&paths[depth..]).unwrap();
        compare(&fs::read(view).unwrap(), &want.read_all().unwrap(), 0).unwrap();
    }
}

#[test]
fn the_reference_reads_what_qemu_wrote() {
    let Some(qemu) = QemuIo::find() else {
        return;
    };
    let folder = TempDir::new().unwrap();
    let image = folder.path().join("image.vhd");
    // Only of the classic layout: QEMU puts new blocks over others' gaps.
    let spec = FixtureSpec::new(Kind::Dynamic, Layout::Classic, 8 << 20);
    spec.write_to(&image).unwrap();
    let commands = ["write -P 0xaa 1M 512", "write -P 0xbb 4193792 1024"];
    qemu.run(&image, &commands).unwrap();

    let mut model = ModelDisk::new(spec.size);
    model.write(1 << 20, &[0xAA; 512]);
    model.write(4_193_792, &[0xBB; 1024]);
    let read = ReferenceChain::open_paths(&[&image]).unwrap().read_all();
    compare(&read.unwrap(), &model.read(0..spec.size), 0).unwrap();
    assert!(qemu.run(&image, &["read -P 0xcc 1M 512"]).is_err());
}

#[test]
fn refreshed_checksums_are_good_ones() {
    for spec in
        [FixtureSpec::new(Kind::Dynamic, Layout::Windows8, 8 << 20), FixtureSpec::new(Kind::Fixed, Layout::Classic, 1 << 20)]
    {
        for trailing in [Trailing::Footer, Trailing::Short511] {
            let (mut bytes, placed) = FixtureSpec { trailing, ..spec.clone() }.to_bytes();
            let good = bytes.clone();
            let mut fields = vec![placed.footer + 64];
            if spec.kind == Kind::Dynamic {
                fields.extend([placed.footer_copy + 64, placed.header + 36]);
            }
            for field in fields {
                put_u32(&mut bytes, usize::try_from(field).unwrap(), 0xDEAD_BEEF);
            }
            assert!(ReferenceChain::open(vec![Box::new(bytes.clone())]).is_err());
            refresh_checksums(&mut bytes);
            assert!(bytes == good);
        }
    }
}

// Reads every fixture one way and collects all that differs from what the
// catalogue says, so that one run shows the whole picture.
fn judge(read: impl Fn(&Fixture, &[PathBuf]) -> (Result<Vec<u8>, String>, Verdict)) {
    let mut wrong = Vec::new();
    for fixture in catalogue() {
        let folder = TempDir::new().unwrap();
        let paths = fixture.write_into(folder.path()).unwrap();
        let (got, verdict) = read(&fixture, &paths);
        let got = got.map(|bytes| compare(&bytes, &fixture.guest(), 0));
        let right = matches!(
            (&got, verdict),
            (Ok(Ok(())), Verdict::Agrees) | (Ok(Err(_)), Verdict::Differs(_)) | (Err(_), Verdict::Refuses(_))
        );
        if !right {
            wrong.push(format!("{}: recorded {verdict:?}, got {got:?}", fixture.name));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
