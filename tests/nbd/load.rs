//! Load that verifies what it reads, and snapshots under it.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use super::server::{Server, has, sh, shell};
use super::support::{done, json, text};

fn fio(uri: &str, jobs: usize, extra: &str) -> String {
    format!(
        "fio --name=load --ioengine=nbd --uri='{uri}' --thread --numjobs={jobs} --offset_increment=16m --size=16m \
         --rw=randwrite --bsrange=4k-64k --iodepth=8 --verify=crc32c --do_verify=1 --verify_fatal=1 --verify_backlog=64 \
         --group_reporting --output-format=terse {extra}"
    )
}

#[test]
fn fio_reads_what_it_wrote_over_several_connections() {
    if !has("fio") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    done(folder.path(), "create disk.vhd --size 64M");
    done(folder.path(), "create child.vhd --parent disk.vhd");
    let server = Server::start(folder.path(), "child.vhd");
    sh(folder.path(), &fio(&server.uri_of(""), 4, "--fsync=32"));
    server.stop();
    done(folder.path(), "check child.vhd --chain --deep");
}

fn content(folder: &Path, image: &str) -> Vec<u8> {
    done(folder, &format!("convert {image} content.raw --overwrite --to raw"));
    std::fs::read(folder.join("content.raw")).unwrap()
}

/// Clients go on, every image is sound, and a parent does not change after its snapshot.
#[test]
fn snapshots_are_taken_under_load_and_freeze_the_parent() {
    if !has("fio") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    done(path, "create s0.vhd --size 64M");
    let server = Server::start(path, "s0.vhd");
    let mut load = std::process::Command::new("bash");
    let line = fio(&server.uri_of(""), 4, "--time_based --runtime=4 --loops=1000");
    let load = load.args(["-c", &line]).current_dir(path).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut frozen = Vec::new();
    for number in 1..=3 {
        std::thread::sleep(Duration::from_millis(800));
        done(path, &format!("ctl ./c snapshot s0 s{number}.vhd"));
        // What was answered before is in the parent, which opens by itself while the leaf is written.
        let parent = format!("s{}.vhd", number - 1);
        frozen.push((parent.clone(), content(path, &parent)));
    }
    let ended = load.wait_with_output().unwrap();
    assert!(ended.status.success(), "{}{}", text(&ended.stdout), text(&ended.stderr));
    assert!(shell(path, &format!("nbdinfo --size '{}'", server.uri_of("s0"))).status.success());
    server.stop();
    for (image, before) in frozen {
        assert!(content(path, &image) == before, "{image} changed after its snapshot");
    }
    done(path, "check s3.vhd --chain --deep");
    let chain = json(path, "info s3.vhd --chain", 0);
    assert_eq!(chain.as_array().unwrap().len(), 4);
}
