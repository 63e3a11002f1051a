//! JSON documents: their keys and types, and that there is exactly one. Notes and warnings.

use std::fs;
use std::os::unix::fs::MetadataExt;

use serde_json::Value;

use crate::support::{done, expect, json, names_in, refused, text, vhd, vhd_fed};

/// Keys and the types of their values; `?` allows null. More keys may come.
#[track_caller]
fn assert_shape(document: &Value, shape: &str) {
    for pair in shape.split_whitespace() {
        let (key, kind) = pair.split_once(':').unwrap();
        let value = document.get(key).unwrap_or_else(|| panic!("no key {key} in {document}"));
        let found = match value {
            Value::Null => "null",
            Value::Bool(_) => "bool",
            Value::Number(number) if number.is_u64() => "int",
            Value::Number(_) => "number",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        };
        let right = kind.trim_end_matches('?') == found || (kind.ends_with('?') && found == "null");
        assert!(right, "{key} is {found}, expected {kind} in {document}");
    }
}

const INFO: &str = "path:string type:string virtual_size:int original_size:int file_size:int file_allocated:int block_size:int? \
    blocks_total:int? blocks_allocated:int? uuid:string creator_app:string creator_version:string creator_os:string \
    created:string geometry:object geometry_size:int saved_state:bool parent:object? warnings:array";

#[test]
fn info_of_every_type() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create dynamic.vhd --size 40M --uuid 01234567-89ab-cdef-0123-456789abcdef");
    done(dir, "create fixed.vhd --size 4M --type fixed --creator tool");
    done(dir, "create child.vhd --parent dynamic.vhd");

    let dynamic = json(dir, "info dynamic.vhd", 0);
    assert_shape(&dynamic, INFO);
    assert_shape(&dynamic["geometry"], "cylinders:int heads:int sectors:int");
    assert_eq!(dynamic["type"], "dynamic");
    assert_eq!(dynamic["virtual_size"], 40 << 20);
    assert_eq!(dynamic["uuid"], "01234567-89ab-cdef-0123-456789abcdef");
    assert_eq!((&dynamic["block_size"], &dynamic["blocks_total"]), (&(2 << 20).into(), &20.into()));
    assert_eq!((&dynamic["blocks_allocated"], &dynamic["parent"]), (&0.into(), &Value::Null));
    assert_eq!((&dynamic["creator_app"], &dynamic["creator_version"]), (&"win".into(), &"10.0".into()));
    // 963 cylinders of 5 heads of 17 sectors: the format's rule for 40 MiB, which rounds down.
    assert_eq!(dynamic["geometry_size"], 41_909_760);
    assert_eq!(dynamic["warnings"], Value::Array(Vec::new()));
    let created = dynamic["created"].as_str().unwrap();
    assert!(created.len() == 20 && created.starts_with("20") && created.ends_with('Z'), "{created} is not RFC 3339");

    let fixed = json(dir, "info fixed.vhd", 0);
    assert_shape(&fixed, INFO);
    assert_eq!((&fixed["type"], &fixed["creator_app"]), (&"fixed".into(), &"tool".into()));
    assert_eq!((&fixed["block_size"], &fixed["file_size"]), (&Value::Null, &((4 << 20) + 512).into()));
    assert!(fixed["file_allocated"].as_u64().unwrap() < 64 << 10, "a fixed disk is sparse unless told otherwise");

    let child = json(dir, "info child.vhd", 0);
    assert_shape(&child, INFO);
    assert_shape(&child["parent"], "path:string uuid:string name:string locators:array");
    assert_eq!((&child["type"], &child["parent"]["path"]), (&"differencing".into(), &"dynamic.vhd".into()));
    assert_eq!((&child["parent"]["uuid"], &child["parent"]["name"]), (&dynamic["uuid"], &"dynamic.vhd".into()));
    let locators = child["parent"]["locators"].as_array().unwrap();
    let codes: Vec<_> = locators.iter().map(|locator| locator["code"].as_str().unwrap()).collect();
    assert_eq!(codes, ["W2ku", "W2ru", "MacX"]);
    assert_eq!(locators[1]["path"], r".\dynamic.vhd");

    let chain = json(dir, "info child.vhd --chain", 0);
    let types: Vec<_> = chain.as_array().unwrap().iter().map(|info| info["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["differencing", "dynamic"], "leaf first");
    chain.as_array().unwrap().iter().for_each(|info| assert_shape(info, INFO));
}

#[test]
fn info_tells_what_is_odd_and_succeeds() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create --quiet large.vhd --size 200G");
    let large = json(dir, "info large.vhd", 0);
    assert!(large["warnings"][0].as_str().unwrap().contains("127 GiB"), "{large}");
    assert!(done(dir, "info large.vhd").contains("127 GiB"));
    done(dir, "create exact.vhd --size 127G");
    assert_eq!(json(dir, "info exact.vhd", 0)["warnings"], Value::Array(Vec::new()));

    done(dir, "create parent.vhd --size 4M");
    done(dir, "create child.vhd --parent parent.vhd");
    fs::remove_file(dir.join("parent.vhd")).unwrap();
    let child = json(dir, "info child.vhd", 0);
    assert_eq!(child["parent"]["path"], Value::Null);
    assert!(child["warnings"][0].as_str().unwrap().contains("--parent-dir"), "{child}");
    refused(dir, "info child.vhd --chain");
}

#[test]
fn create_says_what_it_made_otherwise() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let notes = |line: &str| text(&expect(vhd(dir, line), 0, line).stderr);
    let odd = notes("create odd.vhd --size 4000001");
    assert!(odd.starts_with("vhd: note: odd.vhd: ") && odd.contains("rounded up") && odd.contains("4000256"), "{odd}");
    assert_eq!(json(dir, "info odd.vhd", 0)["virtual_size"], 4_000_256);
    assert!(notes("create small.vhd --size 1M").contains("3 MiB"));
    assert_eq!(notes("create least.vhd --size 3M"), "");
    assert!(notes("create large.vhd --size 128G").contains("127 GiB"));
    assert_eq!(notes("create silent.vhd --size 1 -q"), "");
    assert!(notes("create child.vhd --parent least.vhd --size 4M").contains("Windows refuses"));
    assert_eq!(json(dir, "info child.vhd", 0)["virtual_size"], 4 << 20);

    let document = json(dir, "create json.vhd --size 513", 0);
    assert_shape(&document, "path:string virtual_size:int uuid:string notes:array");
    assert_eq!((&document["virtual_size"], document["notes"].as_array().unwrap().len()), (&1024.into(), 2));
    assert_eq!(document["uuid"], json(dir, "info json.vhd", 0)["uuid"]);
}

#[test]
fn create_takes_sizes_and_kinds() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    for (size, bytes) in [("4194304", 4 << 20), ("4096K", 4 << 20), ("4m", 4 << 20), ("1G", 1_u64 << 30), ("1T", 1 << 40)] {
        done(dir, &format!("create -q --overwrite a.vhd --size {size}"));
        assert_eq!(json(dir, "info a.vhd", 0)["virtual_size"], bytes);
    }
    done(dir, "create b.vhd --size 4M --block-size 512K");
    assert_eq!(json(dir, "info b.vhd", 0)["block_size"], 512 << 10);
    done(dir, "create b-child.vhd --parent b.vhd");
    assert_eq!(json(dir, "info b-child.vhd", 0)["block_size"], 512 << 10, "the parent's");
    done(dir, "create full.vhd --size 8M --type fixed --preallocate full");
    assert!(fs::metadata(dir.join("full.vhd")).unwrap().blocks() * 512 >= 8 << 20);

    let made = names_in(dir);
    for line in [
        "create x.vhd --size 0",
        "create x.vhd --size 2041G",
        "create x.vhd --parent b.vhd --size 3M",
        "create x.vhd --size 4M --preallocate full",
        "create x.vhd --parent b.vhd --preallocate full",
        "create x.vhd --parent missing.vhd",
        "create missing/x.vhd --size 4M",
    ] {
        refused(dir, line);
    }
    for line in [
        "create x.vhd",
        "create x.vhd --size 4X",
        "create x.vhd --size -4",
        "create x.vhd --size 4M --block-size 1M",
        "create x.vhd --size 4M --uuid none",
        "create x.vhd --size 4M --creator fives",
        "create x.vhd --size 4M --type round",
        "create x.vhd --parent b.vhd --type fixed",
    ] {
        expect(vhd(dir, line), 2, line);
    }
    assert_eq!(names_in(dir), made, "what failed left nothing");
}

#[test]
fn map_covers_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create base.vhd --size 16777728");
    expect(vhd_fed(dir, "write base.vhd --offset 3M", &[7; 5000]), 0, "write");
    done(dir, "create leaf.vhd --parent base.vhd");
    expect(vhd_fed(dir, "write leaf.vhd --offset 8M", &[9; 1024]), 0, "write");
    done(dir, "convert -q leaf.vhd fixed.vhd --to fixed");

    for image in ["base.vhd", "leaf.vhd", "fixed.vhd"] {
        let map = json(dir, &format!("map {image}"), 0);
        let entries = map.as_array().unwrap();
        let mut at = 0;
        for (index, entry) in entries.iter().enumerate() {
            assert_shape(entry, "start:int length:int state:string depth:int path:string offset:int?");
            assert_eq!(entry["start"], at, "contiguous and ascending");
            let (state, length) = (entry["state"].as_str().unwrap(), entry["length"].as_u64().unwrap());
            assert!(["data", "zero", "absent"].contains(&state) && length > 0, "{entry}");
            assert_eq!(state == "data", entry["offset"].is_u64(), "{entry}");
            if index > 0 && state != "data" {
                let before = &entries[index - 1];
                assert!(before["state"] != entry["state"] || before["depth"] != entry["depth"], "neighbours alike are one");
            }
            at += length;
        }
        assert_eq!(at, 16_777_728, "covers the disk");
    }

    let map = json(dir, "map leaf.vhd", 0);
    let at = |offset: u64| {
        let covers = |entry: &&Value| entry["start"].as_u64().unwrap() <= offset;
        map.as_array().unwrap().iter().rfind(covers).unwrap().clone()
    };
    assert_eq!((&at(0)["state"], &at(0)["depth"], &at(0)["path"]), (&"absent".into(), &1.into(), &"base.vhd".into()));
    let (own, below) = (at(8 << 20), at(3 << 20));
    assert_eq!((&own["state"], &own["depth"], &own["length"]), (&"data".into(), &0.into(), &1024.into()));
    assert_eq!((&below["state"], &below["depth"], &below["path"]), (&"data".into(), &1.into(), &"base.vhd".into()));
    // The offset is where the bytes are.
    let file = fs::read(dir.join("leaf.vhd")).unwrap();
    let offset = usize::try_from(own["offset"].as_u64().unwrap()).unwrap();
    assert_eq!(file[offset..offset + 1024], [9; 1024]);
}

#[test]
fn check_answers_and_never_writes() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create good.vhd --size 8M");
    expect(vhd_fed(dir, "write good.vhd --offset 0", &[1; 512]), 0, "write");
    let good = json(dir, "check good.vhd --deep", 0);
    assert_shape(&good, "path:string ok:bool findings:array");
    assert_eq!((&good["ok"], &good["path"]), (&true.into(), &"good.vhd".into()));

    let mut bytes = fs::read(dir.join("good.vhd")).unwrap();
    // The first entry of the BAT at 0x600 leads far away.
    bytes[0x600..0x604].copy_from_slice(&0x00FF_0000_u32.to_be_bytes());
    fs::write(dir.join("bad.vhd"), &bytes).unwrap();
    let bad = json(dir, "check bad.vhd", 1);
    assert_eq!(bad["ok"], false);
    let findings = bad["findings"].as_array().unwrap();
    findings.iter().for_each(|finding| {
        assert_shape(finding, "severity:string code:string where:string message:string repairable:bool");
    });
    let found = findings.iter().find(|finding| finding["code"] == "block-outside").unwrap();
    assert_eq!(found["severity"], "error");
    assert_eq!(fs::read(dir.join("bad.vhd")).unwrap(), bytes, "check never writes");
    expect(vhd(dir, "check bad.vhd"), 1, "check");

    // A warning is no error.
    let mut bytes = fs::read(dir.join("good.vhd")).unwrap();
    let end = bytes.len();
    bytes[end - 512..].fill(0);
    fs::write(dir.join("torn.vhd"), &bytes).unwrap();
    let torn = json(dir, "check torn.vhd", 0);
    assert_eq!((&torn["ok"], &torn["findings"][0]["severity"]), (&true.into(), &"warning".into()));

    done(dir, "create child.vhd --parent good.vhd");
    let chain = json(dir, "check child.vhd --chain", 0);
    let paths: Vec<_> = chain.as_array().unwrap().iter().map(|report| report["path"].as_str().unwrap()).collect();
    assert_eq!(paths, ["child.vhd", "good.vhd"]);
}

#[test]
fn compare_answers_yes_or_no() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create a.vhd --size 8M");
    done(dir, "create b.vhd --size 8M --type fixed");
    let same = json(dir, "compare a.vhd b.vhd", 0);
    assert_shape(&same, "equal:bool size_a:int size_b:int first_difference:int?");
    assert_eq!((&same["equal"], &same["first_difference"]), (&true.into(), &Value::Null));
    assert_eq!(done(dir, "compare a.vhd b.vhd"), "equal\n");

    expect(vhd_fed(dir, "write b.vhd --offset 5000001", b"x"), 0, "write");
    let other = json(dir, "compare a.vhd b.vhd", 1);
    assert_eq!((&other["equal"], &other["first_difference"]), (&false.into(), &5_000_001.into()));
    done(dir, "create longer.vhd --size 9M");
    assert_eq!(json(dir, "compare a.vhd longer.vhd", 1)["first_difference"], 8 << 20);
    refused(dir, "compare a.vhd missing.vhd");

    // A raw file by its name, or because the user says so.
    done(dir, "convert b.vhd b.raw");
    done(dir, "compare b.vhd b.raw");
    fs::rename(dir.join("b.raw"), dir.join("odd.vhd")).unwrap();
    refused(dir, "compare b.vhd odd.vhd");
    done(dir, "compare b.vhd odd.vhd --from-b raw");
}

#[test]
fn diff_lists_what_changed() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create old.vhd --size 16M");
    done(dir, "create middle.vhd --parent old.vhd");
    done(dir, "create new.vhd --parent middle.vhd");
    assert_eq!(json(dir, "diff old.vhd new.vhd", 0), Value::Array(Vec::new()));
    expect(vhd_fed(dir, "write middle.vhd --force --offset 1M", &[1; 1024]), 0, "write");
    expect(vhd_fed(dir, "write new.vhd --offset 9M", &[2; 512]), 0, "write");
    let changed = json(dir, "diff old.vhd new.vhd", 1);
    changed.as_array().unwrap().iter().for_each(|entry| assert_shape(entry, "start:int length:int"));
    let covers = |changed: &Value, at: u64| {
        let mut entries = changed.as_array().unwrap().iter();
        entries.any(|entry| (0..entry["length"].as_u64().unwrap()).contains(&at.wrapping_sub(entry["start"].as_u64().unwrap())))
    };
    assert!(covers(&changed, 1 << 20) && covers(&changed, 9 << 20) && !covers(&changed, 5 << 20), "{changed}");
    let changed = json(dir, "diff middle.vhd new.vhd", 1);
    assert!(!covers(&changed, 1 << 20) && covers(&changed, 9 << 20), "{changed}");
    done(dir, "create other.vhd --size 16M");
    refused(dir, "diff other.vhd new.vhd");
    assert!(refused(dir, "diff new.vhd middle.vhd").starts_with("vhd: new.vhd: came after middle.vhd"));
}

#[test]
fn json_is_one_document() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    // The helper parses all of stdout, so more than one document fails.
    json(dir, "create a.vhd --size 1M", 0);
    json(dir, "info a.vhd", 0);
    json(dir, "map a.vhd", 0);
    json(dir, "check a.vhd", 0);
    json(dir, "compare a.vhd a.vhd --progress", 0);
    assert_eq!(json(dir, "convert a.vhd b.vhd --progress", 0)["type"], "dynamic");
    assert_shape(&json(dir, "convert a.vhd a.raw", 0), "source:string path:string type:string");
    assert_shape(&json(dir, "write a.vhd --offset 0", 0), "path:string offset:int length:int");
    // But bytes are bytes.
    assert_eq!(done(dir, "read a.vhd --offset 0 --length 3 --json"), "\0\0\0");
    assert_eq!(done(dir, "convert a.vhd - --json").len(), 1 << 20);
    for line in ["info missing.vhd", "create a.vhd --size 1M", "read a.vhd --offset 2M --length 1", "convert a.vhd b.vhd"] {
        let document = json(dir, line, 2);
        assert_shape(&document["error"], "kind:string message:string file:string?");
    }
    assert_eq!(json(dir, "info missing.vhd", 2)["error"]["kind"], "not-found");
    assert_eq!(json(dir, "create a.vhd --size 1M", 2)["error"]["kind"], "exists");
    assert_eq!(json(dir, "frobnicate", 2)["error"]["kind"], "usage");
    // Without it the reason is one line.
    for line in ["frobnicate", "info", "info a b", "info --bogus a", "create a.vhd", "create a.vhd --size 3Q", "undo start"] {
        let said = refused(dir, line);
        assert!(said.contains("; see vhd") && said.ends_with("--help\n"), "{said}");
    }
    assert!(refused(dir, "convert a.vhd c.vhd --to qcow2").ends_with("; see vhd convert --help\n"), "the command's own help");
    assert!(refused(dir, "undo start a.vhd a.vhd").starts_with("vhd: a.vhd: is named twice"), "a path as it was given");
    assert_eq!(refused(dir, "frobnicate"), "vhd: unrecognized subcommand 'frobnicate'; see vhd --help\n");
    let incomplete = json(dir, "info", 2);
    assert!(incomplete["error"]["message"].as_str().unwrap().contains("IMAGE"), "says what is missing: {incomplete}");
}

#[test]
fn ctl_says_what_commands_there_are_where_it_is_told_none() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    fs::write(dir.join("text"), "none").unwrap();
    let commands = "commands are list, add, remove, snapshot, refresh, metrics";
    for line in ["ctl frob", "ctl remov disk", "ctl lst --verbose"] {
        let word = line.split(' ').nth(1).unwrap();
        let said = refused(dir, line);
        assert!(said.starts_with(&format!("vhd: {word}: is neither a command nor a socket; {commands}")), "{said}");
    }
    assert!(json(dir, "ctl frob", 2)["error"]["message"].as_str().unwrap().contains(commands));
    assert!(json(dir, "ctl", 2)["error"]["message"].as_str().unwrap().contains(commands));
    assert!(refused(dir, "ctl ./frob list").contains("frob: no such socket; leave it out"));
    for line in ["ctl text list", "ctl . list", "ctl text"] {
        assert!(refused(dir, line).contains("is no socket"));
    }
    // One that a dead process left there.
    drop(std::os::unix::net::UnixListener::bind(dir.join("old.ctl")).unwrap());
    assert!(refused(dir, "ctl old.ctl list").contains("process is gone"));
    assert!(refused(dir, "ctl old.ctl frob").contains(&format!("frob is no command; {commands}")));
    assert!(refused(dir, "ctl old.ctl").contains(commands));
}
