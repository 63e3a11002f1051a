//! What is no image, or a broken one: one line, status 2, and nothing is changed or left behind.

use std::fs;
use std::io::Write;

use crate::support::{done, expect, json, names_in, noise, refused, vhd, vhd_fed};

#[test]
fn what_is_no_image_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    fs::create_dir(dir.join("folder.vhd")).unwrap();
    fs::write(dir.join("empty.vhd"), b"").unwrap();
    fs::write(dir.join("short.vhd"), b"conectix").unwrap();
    fs::write(dir.join("noise.vhd"), noise(1, 10_000)).unwrap();
    done(dir, "create good.vhd --size 4M");
    let before = names_in(dir);
    for image in ["missing.vhd", "folder.vhd", "empty.vhd", "short.vhd", "noise.vhd"] {
        for line in [
            format!("info {image}"),
            format!("map {image}"),
            format!("read {image} --offset 0 --length 0"),
            format!("write {image} --offset 0"),
            format!("convert {image} out.raw"),
            format!("convert {image} out.vhd"),
            format!("compare good.vhd {image}"),
            format!("create child.vhd --parent {image}"),
            format!("mount {image} folder.vhd"),
        ] {
            let said = refused(dir, &line);
            assert!(said.contains(image), "the file is named: {said}");
        }
    }
    // Whether a VHD is damaged is a question with an answer; what is none has none.
    for image in ["missing.vhd", "folder.vhd", "empty.vhd", "noise.vhd"] {
        assert!(refused(dir, &format!("check {image}")).contains(image));
    }
    assert_eq!(json(dir, "check short.vhd", 1)["findings"][0]["code"], "no-valid-footer");
    assert_eq!(names_in(dir), before);
}

#[test]
fn an_undo_status_of_what_is_no_image_is_no_answer() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create good.vhd --size 4M");
    fs::write(dir.join("empty.vhd"), b"").unwrap();
    fs::write(dir.join("noise.vhd"), noise(1, 10_000)).unwrap();
    // Beside the undo disk of another image.
    fs::write(dir.join("good.txt"), b"a letter").unwrap();
    for started in [false, true] {
        for file in ["empty.vhd", "noise.vhd", "good.txt"] {
            for line in [format!("undo status {file}"), format!("undo status good.vhd {file}")] {
                let said = refused(dir, &line);
                assert!(said.starts_with(&format!("vhd: {file}: is no VHD")), "{line}: {said}");
            }
        }
        if !started {
            done(dir, "undo status good.vhd");
            done(dir, "undo start good.vhd");
        }
    }
    assert_eq!(json(dir, "undo status good.txt", 2)["error"]["kind"], "not-vhd");
    // Whether another program writes to it is another matter.
    let mut writer = crate::support::vhd_in(dir);
    let mut writer =
        writer.args(["write", "good.vhd", "--offset", "0", "--force"]).stdin(std::process::Stdio::piped()).spawn().unwrap();
    writer.stdin.as_mut().unwrap().write_all(&[1; 200 << 10]).unwrap();
    done(dir, "undo status good.vhd");
    drop(writer.stdin.take());
    assert!(writer.wait().unwrap().success());
}

#[test]
fn names_are_shown_safely_and_may_be_odd() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    for name in ["with blank.vhd", "üñí.vhd", "-dash.vhd", "a,b.vhd", "quote'\".vhd"] {
        let run = |arguments: &[&str]| crate::support::vhd_in(dir).args(arguments).output().unwrap();
        expect(run(&["create", "--size", "4M", "--", name]), 0, name);
        expect(run(&["create", "--parent", &format!("./{name}"), "--", &format!("child of {name}")]), 0, name);
        let info = expect(run(&["info", "--json", "--chain", "--", &format!("child of {name}")]), 0, name);
        let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
        assert_eq!(info[0]["parent"]["name"], name);
    }
}

#[test]
fn sizes_and_offsets_near_the_largest_number_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create disk.vhd --size 4M");
    fs::write(dir.join("disk.raw"), noise(1, 1 << 20)).unwrap();
    let before = names_in(dir);
    for number in [u64::MAX, u64::MAX - 1, u64::MAX - 511, u64::MAX - 512, 1 << 63] {
        for line in [
            format!("create new.vhd --size {number}"),
            format!("create new.vhd --size {number} --type fixed"),
            format!("create new.vhd --parent disk.vhd --size {number}"),
            format!("convert disk.raw new.vhd --size {number} --align 1M"),
            format!("convert disk.raw new.raw --size {number}"),
            format!("read disk.vhd --offset {number} --length {number}"),
            format!("read disk.vhd --offset 0 --length {number}"),
        ] {
            refused(dir, &line);
        }
        let written = expect(vhd_fed(dir, &format!("write disk.vhd --offset {number}"), b"some"), 2, "write");
        assert!(crate::support::text(&written.stderr).contains("disk.vhd"));
    }
    refused(dir, &format!("convert disk.raw new.vhd --align {}", u64::MAX - 511));
    assert_eq!(names_in(dir), before);
}

#[test]
fn what_is_no_size_is_said_so() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create disk.vhd --size 4M");
    for word in ["frob", "much", "M"] {
        let said = refused(dir, &format!("resize disk.vhd {word}"));
        assert!(said.contains("expected a whole number") && !said.contains("suffix"), "{said}");
    }
    assert!(refused(dir, "resize disk.vhd 4xb").contains("unknown suffix \"xb\""));
}

#[test]
fn a_size_of_blocks_for_what_has_none_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create disk.vhd --size 4M");
    fs::write(dir.join("disk.raw"), noise(1, 1 << 20)).unwrap();
    let before = names_in(dir);
    for (line, says) in [
        ("create new.vhd --type fixed --size 4M", "new.vhd: a fixed disk has no blocks"),
        ("convert disk.vhd new.vhd --to fixed", "new.vhd: a fixed disk has no blocks"),
        ("convert disk.vhd new.vhd --to fixed --dry-run", "new.vhd: a fixed disk has no blocks"),
        ("convert disk.vhd --in-place --to fixed", "disk.vhd: a fixed disk has no blocks"),
        ("convert disk.raw --in-place --to fixed", "disk.raw: a fixed disk has no blocks"),
        ("convert disk.vhd new.raw", "new.raw: a raw file has no blocks"),
        ("convert disk.vhd -", "a raw file has no blocks"),
    ] {
        let said = refused(dir, &format!("{line} --block-size 512K"));
        assert!(said.contains(says) && said.contains("leave --block-size out"), "{line}: {said}");
    }
    assert_eq!(names_in(dir), before);
    assert_eq!(json(dir, "info disk.vhd", 0)["type"], "dynamic");
    done(dir, "convert disk.raw --in-place --to dynamic --block-size 512K");
}

#[test]
fn a_new_vhd_whose_name_does_not_say_so_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    fs::write(dir.join("disk.raw"), noise(1, 4 << 20)).unwrap();
    for (line, told) in [
        ("create disk.img --size 4M", true),
        ("create disk.vhd --size 4M", false),
        ("convert disk.raw copy.img --to fixed", true),
        ("convert disk.raw copy.vhd", false),
        ("convert disk.raw raw.img", false),
    ] {
        let output = expect(vhd(dir, line), 0, line);
        assert_eq!(crate::support::text(&output.stderr).contains("--from vhd"), told, "{line}");
    }
    done(dir, "compare copy.img disk.raw --from-a vhd");
}

#[test]
fn names_that_are_not_utf_8_are_told_in_json_too() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let name = std::ffi::OsStr::from_bytes(b"odd \xff.vhd");
    let shown = "odd \u{FFFD}.vhd";
    let run = |words: &[&str], status: i32| {
        let mut command = crate::support::vhd_in(dir);
        let (first, rest) = words.split_first().unwrap();
        let output = expect(command.arg(first).arg("--json").arg(name).args(rest).output().unwrap(), status, first);
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    assert_eq!(run(&["info"], 2)["error"]["file"], shown, "one that is missing");
    assert_eq!(run(&["create", "--size", "4M"], 0)["path"], shown);
    assert_eq!(run(&["info"], 0)["path"], shown);
    assert_eq!(run(&["check"], 0)["path"], shown);
    assert_eq!(run(&["map"], 0)[0]["path"], shown);
    assert_eq!(run(&["write", "--offset", "0"], 0)["path"], shown);
    assert_eq!(run(&["convert", "copy.raw"], 0)["source"], shown);
}

#[test]
fn words_that_are_not_utf_8_are_refused_in_one_line() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    let odd = std::ffi::OsStr::from_bytes(b"\xff\xfe");
    for (first, help) in [("frob", "see vhd --help"), ("undo", "see vhd undo --help")] {
        let output = crate::support::vhd_in(folder.path()).arg(first).arg(odd).output().unwrap();
        let output = expect(output, 2, first);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.lines().count() == 1 && said.starts_with("vhd: ") && said.contains(help), "{said}");
    }
}

#[test]
fn what_replaces_a_private_file_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create disk.vhd --size 4M");
    let mode = || fs::metadata(dir.join("disk.vhd")).unwrap().permissions().mode() & 0o7777;
    for private in [0o600, 0o640] {
        fs::set_permissions(dir.join("disk.vhd"), fs::Permissions::from_mode(private)).unwrap();
        done(dir, "create disk.vhd --size 5M --overwrite");
        assert_eq!(mode(), private);
    }
}

#[test]
fn a_truncated_image_gives_no_half_made_output() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create whole.vhd --size 16M");
    expect(vhd_fed(dir, "write whole.vhd --offset 0", &noise(5, 16 << 20)), 0, "write");
    // Cut within a block in the middle: footer copy, header and BAT are whole.
    let mut bytes = fs::read(dir.join("whole.vhd")).unwrap();
    bytes.truncate(9 << 20);
    fs::write(dir.join("cut.vhd"), &bytes).unwrap();
    fs::write(dir.join("old.vhd"), b"this was here").unwrap();
    fs::write(dir.join("old.raw"), b"this was here").unwrap();
    let before = names_in(dir);
    for line in [
        "convert cut.vhd out.vhd",
        "convert cut.vhd out.raw",
        "convert cut.vhd out.vhd --to fixed",
        "convert cut.vhd old.vhd --overwrite",
        "compare cut.vhd whole.vhd --from-a vhd",
    ] {
        let said = refused(dir, line);
        assert!(said.contains("cut.vhd") && said.contains("vhd check"), "says what to do: {said}");
    }
    let output = expect(vhd(dir, "convert cut.vhd -"), 2, "convert to stdout");
    assert!(output.stdout.len() < 16 << 20);
    assert_eq!(names_in(dir), before, "no half-made output, no temporary file");
    assert_eq!(fs::read(dir.join("old.vhd")).unwrap(), b"this was here");
    assert_eq!(fs::read(dir.join("cut.vhd")).unwrap(), bytes, "the input is as it was");
    assert_eq!(json(dir, "check cut.vhd", 1)["ok"], false);
}

#[test]
fn a_file_that_can_not_be_made_is_named_as_the_user_named_it() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create source.vhd --size 4M");
    fs::write(dir.join("file"), b"no folder").unwrap();
    for (line, name) in [
        ("convert source.vhd file/out.vhd", "file/out.vhd"),
        ("convert source.vhd missing/out.raw", "missing/out.raw"),
        ("create file/out.vhd --size 4M", "file/out.vhd"),
    ] {
        let said = refused(dir, line);
        assert!(said.starts_with(&format!("vhd: {name}: can't be created: ")), "{said}");
    }
}

#[test]
fn existing_files_are_not_replaced_unless_told() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create source.vhd --size 4M");
    for name in ["here.vhd", "here.raw"] {
        fs::write(dir.join(name), b"precious").unwrap();
        let mut lines = vec![format!("convert source.vhd {name}")];
        if name.ends_with("vhd") {
            lines.push(format!("create {name} --size 4M"));
            lines.push(format!("create {name} --parent source.vhd"));
            lines.push(format!("convert source.vhd {name} --to fixed"));
        }
        for line in lines {
            assert!(refused(dir, &line).contains("--overwrite"));
            assert_eq!(fs::read(dir.join(name)).unwrap(), b"precious", "{line}");
            done(dir, &format!("{line} --overwrite"));
            done(dir, &format!("compare source.vhd {name}"));
            fs::write(dir.join(name), b"precious").unwrap();
        }
    }
    for line in [
        "convert source.vhd source.vhd",
        "convert source.vhd source.vhd --overwrite",
        "convert source.vhd ./source.vhd --overwrite",
    ] {
        expect(vhd(dir, line), 2, line);
        done(dir, "check source.vhd");
    }
}

#[test]
fn ranges_outside_the_disk_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create a.vhd --size 4M");
    for range in [
        "--offset 4M --length 1",
        "--offset 0 --length 4194305",
        "--offset 16T --length 1",
        "--offset 1 --length 18446744073709551615",
    ] {
        assert_eq!(json(dir, &format!("read a.vhd {range}"), 2)["error"]["kind"], "out-of-range");
    }
    assert_eq!(done(dir, "read a.vhd --offset 4M --length 0"), "");
    // What fits is written and kept, and the rest is an error.
    let output = vhd_fed(dir, "write a.vhd --offset 4194300", b"12345678");
    expect(output, 2, "write");
    assert_eq!(done(dir, "read a.vhd --offset 4194300 --length 4"), "1234");
    expect(vhd_fed(dir, "write a.vhd --offset 5M", b"x"), 2, "write");
    expect(vhd_fed(dir, "write a.vhd --offset 5M", b""), 0, "nothing fits anywhere");
}

#[test]
fn a_disk_in_use_is_locked() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create a.vhd --size 4M");
    // A writer that waits for its input holds the image.
    let mut command = crate::support::vhd_in(dir);
    command.args(["write", "a.vhd", "--offset", "0"]).stdin(std::process::Stdio::piped());
    let mut writer = command.spawn().unwrap();
    // More than a pipe holds: once it is written, the writer has begun to read, and it opens the image before.
    writer.stdin.as_mut().unwrap().write_all(&[1; 200 << 10]).unwrap();
    for line in ["map a.vhd", "write a.vhd --offset 0", "convert a.vhd new.raw", "create child.vhd --parent a.vhd"] {
        assert_eq!(json(dir, line, 2)["error"]["kind"], "locked", "{line}");
    }
    drop(writer.stdin.take());
    assert!(writer.wait().unwrap().success());
    done(dir, "map a.vhd");
}

#[test]
fn what_a_conversion_can_not_make_is_refused_before_it_begins_and_by_its_dry_run() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create source.vhd --size 4M");
    done(dir, "create small.vhd --size 3M");
    fs::create_dir(dir.join("folder.vhd")).unwrap();
    nix::unistd::mkfifo(&dir.join("pipe.vhd"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for link in ["nowhere.vhd", "nowhere.raw"] {
        std::os::unix::fs::symlink("missing", dir.join(link)).unwrap();
    }
    std::os::unix::fs::symlink("source.vhd", dir.join("same.vhd")).unwrap();
    let before = names_in(dir);
    for (line, says) in [
        ("folder.vhd --overwrite", "folder.vhd: is a folder, expected a file"),
        ("folder.vhd/ --overwrite", "folder.vhd/: is the name of a folder, expected a file"),
        ("new.vhd/", "new.vhd/: is the name of a folder, expected a file"),
        ("new/", "new/: is the name of a folder, expected a file"),
        ("pipe.vhd --overwrite", "pipe.vhd: is neither a regular file nor a block device"),
        ("missing/new.vhd", "missing/new.vhd: can't be created: No such file"),
        ("small.vhd/new.vhd", "small.vhd/new.vhd: can't be created: Not a directory"),
        ("nowhere.vhd", "nowhere.vhd: exists already"),
        ("nowhere.raw", "nowhere.raw: exists already"),
        ("same.vhd --overwrite", "same.vhd: is in use elsewhere"),
    ] {
        for line in [format!("convert source.vhd {line} --dry-run"), format!("convert source.vhd {line}")] {
            let said = refused(dir, &line);
            assert!(said.starts_with(&format!("vhd: {says}")), "{line}: {said}");
        }
    }
    assert!(refused(dir, "create new.vhd/ --size 4M").contains("new.vhd/: is the name of a folder"));
    let said = refused(dir, "convert source.vhd small.vhd --into");
    assert!(said.starts_with("vhd: small.vhd: has 3145728 bytes, the source 4194304: vhd resize"), "{said}");
    fs::write(dir.join("nothing"), b"").unwrap();
    assert!(refused(dir, "create new.vhd --link nothing").starts_with("vhd: nothing: is empty"));
    fs::remove_file(dir.join("nothing")).unwrap();
    assert_eq!(names_in(dir), before);
}

#[test]
fn names_that_no_record_can_hold_are_refused_before_anything_is_changed() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let odd = std::ffi::OsStr::from_bytes(b"odd \xff.vhd");
    let run = |words: &[&str], status: i32| {
        let words = words.iter().map(|word| if *word == "ODD" { odd } else { word.as_ref() });
        expect(crate::support::vhd_in(dir).args(words).output().unwrap(), status, "an odd name")
    };
    done(dir, "create base.vhd --size 4M");
    run(&["create", "ODD", "--parent", "base.vhd"], 0);
    let before = (fs::read(dir.join("base.vhd")).unwrap(), fs::read_dir(dir).unwrap().count());
    let check = |lines: &[&[&str]]| {
        for line in lines {
            for line in [[*line, &["--dry-run"]].concat(), line.to_vec()] {
                let said = crate::support::one_line(&run(&line, 2), "an odd name");
                assert!(
                    said.contains("odd \u{FFFD}.vhd: its name is not UTF-8") && said.contains("rename it"),
                    "{line:?}: {said}"
                );
            }
        }
        assert!((fs::read(dir.join("base.vhd")).unwrap(), fs::read_dir(dir).unwrap().count()) == before, "{lines:?}");
    };
    check(&[&["merge", "ODD"], &["merge", "ODD", "--delete"], &["undo", "start", "ODD"]]);
    run(&["create", "ODD", "--size", "4M", "--overwrite"], 0);
    check(&[&["convert", "ODD", "--in-place", "--to", "fixed"]]);
}
