//! Other people's clients, each against a chain with data, zeros and holes.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::Value;
use tempfile::TempDir;

use super::server::{Server, has, sh, shell};
use super::support::{done, noise, text, vhd_fed};

const MIB: usize = 1 << 20;

/// A child over a base, and what they hold.
fn chain() -> (TempDir, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    done(folder.path(), "create base.vhd --size 64M");
    let (old, new) = (noise(1, 6 * MIB), noise(2, 3 * MIB));
    assert!(vhd_fed(folder.path(), "write base.vhd --offset 2M", &old).status.success());
    done(folder.path(), "create leaf.vhd --parent base.vhd");
    assert!(vhd_fed(folder.path(), "write leaf.vhd --offset 5242880", &new).status.success());
    let mut content = vec![0; 64 * MIB];
    content[2 * MIB..8 * MIB].copy_from_slice(&old);
    content[5 * MIB..8 * MIB].copy_from_slice(&new);
    (folder, content)
}

fn content_of(folder: &Path, image: &str) -> Vec<u8> {
    done(folder, &format!("convert {image} check.raw --overwrite --to raw"));
    fs::read(folder.join("check.raw")).unwrap()
}

#[test]
fn nbdinfo_sees_the_export_as_it_is() {
    if !has("nbdinfo") {
        return;
    }
    let (folder, _) = chain();
    let server = Server::start(folder.path(), "leaf.vhd");
    let uri = server.uri_of("");
    let info: Value = serde_json::from_str(&sh(folder.path(), &format!("nbdinfo --json '{uri}'"))).unwrap();
    let export = &info["exports"][0];
    assert_eq!((&info["protocol"], &info["structured"]), (&"newstyle-fixed".into(), &true.into()));
    assert_eq!((&export["export-name"], &export["export-size"]), (&"leaf".into(), &(64 * MIB).into()));
    for can in ["cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"] {
        assert_eq!(export[format!("can_{can}")], true, "{can}");
        assert!(shell(folder.path(), &format!("nbdinfo --can {} '{uri}'", can.replace('_', "-"))).status.success(), "{can}");
    }
    for what in ["--can connect", "--can read", "--can write", "--can structured-reply"] {
        assert!(shell(folder.path(), &format!("nbdinfo {what} '{uri}'")).status.success(), "{what}");
    }
    for what in ["--is read-only", "--is rotational", "--is tls"] {
        assert_eq!(shell(folder.path(), &format!("nbdinfo {what} '{uri}'")).status.code(), Some(2), "{what}");
    }
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation", "qemu:allocation-depth", "vhd:dirty:base.vhd"]));
    assert!(sh(folder.path(), &format!("nbdinfo --list '{uri}'")).contains("export=\"leaf\":"));
    let map: Value = serde_json::from_str(&sh(folder.path(), &format!("nbdinfo --map --json '{uri}'"))).unwrap();
    let runs: Vec<_> =
        map.as_array().unwrap().iter().map(|run| (run["offset"].as_u64().unwrap(), run["type"].as_u64().unwrap())).collect();
    assert_eq!(runs, [(0, 3), (2 << 20, 0), (8 << 20, 3)]);
    server.stop();
}

#[test]
fn nbdcopy_copies_in_both_directions_with_several_connections() {
    if !has("nbdcopy") {
        return;
    }
    let (folder, content) = chain();
    done(folder.path(), "create new.vhd --size 64M");
    for (connections, size) in [(1, 4096), (4, 65_536), (4, 1 << 20), (2, 32 << 20)] {
        let server = Server::start(folder.path(), "leaf.vhd new.vhd");
        let options = format!("--connections={connections} --request-size={size} --flush");
        sh(folder.path(), &format!("nbdcopy {options} '{}' out.raw", server.uri_of("leaf")));
        assert!(fs::read(folder.path().join("out.raw")).unwrap() == content, "{options}");
        sh(folder.path(), &format!("nbdcopy {options} out.raw '{}'", server.uri_of("new")));
        // Within one server, too.
        sh(folder.path(), &format!("nbdcopy {options} '{}' '{}'", server.uri_of("leaf"), server.uri_of("new")));
        server.stop();
        assert!(content_of(folder.path(), "new.vhd") == content, "{options}");
        done(folder.path(), "check new.vhd");
    }
    let info = super::support::json(folder.path(), "info new.vhd", 0);
    assert!(info["file_size"].as_u64().unwrap() < 16 << 20, "holes stay holes: {info}");
}

#[test]
fn qemu_reads_writes_maps_and_converts() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let (folder, content) = chain();
    let server = Server::start(folder.path(), "leaf.vhd");
    let uri = server.uri_of("leaf");
    fs::write(folder.path().join("wanted.raw"), &content).unwrap();
    sh(folder.path(), &format!("qemu-img compare -f raw -F raw '{uri}' wanted.raw"));
    sh(folder.path(), &format!("qemu-img convert -f raw -O qcow2 '{uri}' out.qcow2 && qemu-img compare out.qcow2 wanted.raw"));
    let socket = server.socket();
    let options = format!("driver=nbd,server.type=unix,server.path={},export=leaf", socket.display());
    let map: Value =
        serde_json::from_str(&sh(folder.path(), &format!("qemu-img map --output=json --image-opts {options}"))).unwrap();
    let data: Vec<_> = map.as_array().unwrap().iter().filter(|run| run["data"] == true).collect();
    assert_eq!((data.len(), &data[0]["start"], &data[0]["length"]), (1, &(2 * MIB).into(), &(6 * MIB).into()));
    // QEMU knows which image of a chain holds what.
    let depth = format!("{options},x-dirty-bitmap=qemu:allocation-depth");
    let map: Value =
        serde_json::from_str(&sh(folder.path(), &format!("qemu-img map --output=json --image-opts {depth}"))).unwrap();
    assert!(map.as_array().unwrap().len() > 1, "{map}");
    let commands = [
        "write -P 0x11 0 64k",
        "write -P 0x22 -f 10M 1M",
        "write -z 3M 1M",
        "write -z -u 6M 2M",
        "discard 20M 4M",
        "flush",
        "read -P 0x11 0 64k",
        "read -P 0x22 10M 1M",
        "read -P 0 3M 1M",
        "read -P 0 6M 2M",
        "aio_write -P 0x33 12M 512k",
        "aio_write -P 0x44 13M 512k",
        "aio_flush",
        "read -P 0x33 12M 512k",
        "read -P 0x44 13M 512k",
    ];
    let commands: String = commands.iter().map(|command| format!(" -c '{command}'")).collect();
    let said = sh(folder.path(), &format!("qemu-io -f raw {commands} '{uri}'"));
    assert!(!said.contains("failed"), "{said}");
    server.stop();
    let now = content_of(folder.path(), "leaf.vhd");
    assert!(now[..65_536].iter().all(|byte| *byte == 0x11) && now[6 * MIB..8 * MIB].iter().all(|byte| *byte == 0));
    done(folder.path(), "check leaf.vhd --chain");
}

#[test]
fn nbdkit_finds_that_what_it_writes_is_there_already() {
    if !has("nbdkit") {
        return;
    }
    let (folder, content) = chain();
    fs::write(folder.path().join("wanted.raw"), content).unwrap();
    let server = Server::start(folder.path(), "leaf.vhd --read-only");
    // The filter compares each write with what the server has, and refuses one that differs.
    let uri = server.uri_of("");
    sh(
        folder.path(),
        &format!(
            "nbdkit -U - --filter=checkwrite nbd uri='{uri}' --run 'nbdcopy --destination-is-zero wanted.raw $uri || nbdcopy wanted.raw $uri'"
        ),
    );
    fs::File::options().write(true).open(folder.path().join("wanted.raw")).unwrap().write_all(b"x").unwrap();
    let differs =
        shell(folder.path(), &format!("nbdkit -U - --filter=checkwrite nbd uri='{uri}' --run 'nbdcopy wanted.raw $uri'"));
    assert!(!differs.status.success(), "a difference is found: {}", text(&differs.stderr));
    server.stop();
}

#[test]
fn nbdfuse_makes_a_file_of_it() {
    if !has("nbdfuse") || !Path::new("/dev/fuse").exists() {
        return;
    }
    let (folder, content) = chain();
    let server = Server::start(folder.path(), "leaf.vhd");
    fs::create_dir(folder.path().join("m")).unwrap();
    sh(
        folder.path(),
        &format!(
            "nbdfuse m/disk '{}' & fuse=$!; for n in $(seq 500); do [ -e m/disk ] && break; sleep 0.02; done; \
             cp m/disk out.raw && printf written | dd of=m/disk conv=notrunc bs=1 seek=4096 status=none; \
             r=$?; fusermount3 -u m || fusermount -u m; wait $fuse; exit $r",
            server.uri_of("")
        ),
    );
    assert!(fs::read(folder.path().join("out.raw")).unwrap() == content);
    server.stop();
    assert_eq!(&content_of(folder.path(), "leaf.vhd")[4096..4103], b"written");
}

/// A client that someone else wrote in Rust, old style and all.
#[test]
fn the_nbd_crates_client_reads_and_writes() {
    let (folder, content) = chain();
    let server = Server::start(folder.path(), "leaf.vhd");
    let mut stream = UnixStream::connect(server.socket()).unwrap();
    let export = nbd::client::handshake(&mut stream, b"leaf").unwrap();
    assert_eq!(export.size, 64 << 20);
    let mut client = nbd::client::NbdClient::new(&mut stream, &export);
    let mut found = vec![0; 3 * MIB];
    client.seek(SeekFrom::Start(MIB as u64)).unwrap();
    client.read_exact(&mut found).unwrap();
    assert!(found == content[MIB..4 * MIB]);
    client.seek(SeekFrom::Start(100)).unwrap();
    client.write_all(b"from another client").unwrap();
    drop(stream);
    server.stop();
    assert_eq!(&content_of(folder.path(), "leaf.vhd")[100..119], b"from another client");
}

/// `convert` and `compare` are clients, too: of this server, and of one that knows less.
#[test]
fn convert_and_compare_take_what_a_server_has_and_holes_stay_holes() {
    let (folder, content) = chain();
    fs::write(folder.path().join("wanted.raw"), &content).unwrap();
    let server = Server::start(folder.path(), "leaf.vhd");
    let uri = server.uri_of("leaf");
    done(folder.path(), &format!("convert {uri} copy.vhd"));
    done(folder.path(), "compare copy.vhd wanted.raw");
    done(folder.path(), &format!("compare {uri} copy.vhd"));
    let info = super::support::json(folder.path(), "info copy.vhd", 0);
    assert_eq!(info["blocks_allocated"], 3, "holes stay holes");
    let no_export = super::support::refused(folder.path(), &format!("convert {} other.vhd", server.uri_of("none")));
    assert!(no_export.contains("no export \"none\""), "{no_export}");
    assert!(!folder.path().join("other.vhd").exists());
    server.stop();
    super::support::refused(folder.path(), &format!("convert {uri} other.vhd"));
    super::support::refused(folder.path(), "convert nbd+unix:///x other.vhd");
    if has("nbdkit") {
        for options in ["", "--no-sr"] {
            let convert = format!("{} convert --overwrite \"$uri\" copy.vhd", env!("CARGO_BIN_EXE_vhd"));
            sh(folder.path(), &format!("nbdkit {options} -U - file wanted.raw --run '{convert}'"));
            done(folder.path(), "compare copy.vhd wanted.raw");
        }
    }
}
