//! Goal: a configuration says what a machine is; what is wrong in one is said with its place; a change keeps all that it is
//! not about, byte for byte.
//!
//! Method: the documents' examples, a file as Virtual Server wrote them, and files that are wrong in each way.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test that can't go on fails here")]

use std::fs;
use std::path::{Path, PathBuf};

use vhd_vmm::config::{AtEnd, Config, ConfigFile, DiskConfig, Serial};
use vhd_vmm::virtio::block::Policy;

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/examples").join(name)
}

#[test]
fn the_examples_say_what_they_seem_to() {
    let folder = example("");
    let linux = ConfigFile::open(&example("linux.vmc")).unwrap().read().unwrap();
    assert_eq!((linux.memory, linux.cpus, linux.disks.len()), (Some(1 << 30), Some(2), 2));
    assert_eq!(linux.kernel, Some(folder.join("vmlinuz")));
    assert_eq!(linux.append.as_deref(), Some("console=ttyS0 root=/dev/vda1 ro"));
    let system = DiskConfig { image: folder.join("system.vhd"), queues: Some(2), ..DiskConfig::default() };
    assert_eq!(linux.disks[0], system);
    let data = &linux.disks[1];
    assert_eq!((data.position, data.image.as_path()), (1, Path::new("/srv/vhd/data.vhd")));
    assert_eq!((data.serial_number.as_deref(), data.on_error), (Some("DATA-0001"), Some(Policy::Pause)));
    let trial = ConfigFile::open(&example("trial.vmc")).unwrap().read().unwrap();
    assert_eq!((trial.undo, trial.at_end), (Some(true), Some(AtEnd::Discard)));
    assert_eq!(trial.disks[1].read_only, Some(true));
    let server = ConfigFile::open(&example("server.vmc")).unwrap().read().unwrap();
    assert_eq!(server.serial, Some(Serial::Unix("/run/vhd/server.serial".into())));
    assert_eq!(server.on_event.as_deref(), Some(Path::new("/usr/local/bin/machine-event")));
    assert_eq!((server.low_space, server.state_file), (Some(1 << 30), Some("/var/lib/vhd/server.vsv".into())));
    assert_eq!(server.disks[0].on_no_space, Some(Policy::Report));
}

#[test]
fn every_example_is_understood_whole_and_stays_as_it_is() {
    let examples: Vec<_> = fs::read_dir(example("")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(examples.len() >= 3);
    for path in examples {
        let mut file = ConfigFile::open(&path).unwrap();
        assert_eq!(file.unknown(), Vec::<String>::new());
        let folder = tempfile::tempdir().unwrap();
        let copy = folder.path().join("copy.vmc");
        fs::copy(&path, &copy).unwrap();
        file = ConfigFile::open(&copy).unwrap();
        file.write(&file.read().unwrap()).unwrap();
        file.save(false).unwrap();
        assert!(fs::read(&copy).unwrap() == fs::read(&path).unwrap(), "{}", path.display());
    }
}

/// As Virtual Server wrote them: UTF-16 with a mark, tabs, and much that this monitor does not have.
const FOREIGN: &str = "<?xml version=\"1.0\" encoding=\"UTF-16\"?>\r\n<!-- Microsoft Virtual Machine Options and Settings -->\r\n\
    <preferences>\r\n\t<version type=\"string\">2.0</version>\r\n\t<alerts>\r\n\t\t<notifications>\r\n\t\t\t\
    <no_boot type=\"boolean\">true</no_boot>\r\n\t\t</notifications>\r\n\t</alerts>\r\n\t<hardware>\r\n\t\t<memory>\r\n\t\t\t\
    <ram_size type=\"integer\">256</ram_size>\r\n\t\t</memory>\r\n\t\t<pci_bus>\r\n\t\t\t<ide_adapter>\r\n\t\t\t\t\
    <ide_controller id=\"0\">\r\n\t\t\t\t\t<location id=\"0\">\r\n\t\t\t\t\t\t<pathname>\r\n\t\t\t\t\t\t\t\
    <absolute type=\"string\">C:\\a &amp; b.vhd</absolute>\r\n\t\t\t\t\t\t</pathname>\r\n\t\t\t\t\t</location>\r\n\t\t\t\t\
    </ide_controller>\r\n\t\t\t</ide_adapter>\r\n\t\t</pci_bus>\r\n\t</hardware>\r\n\t<settings>\r\n\t\t<undo_drives>\r\n\t\t\t\
    <enabled type=\"boolean\">false</enabled>\r\n\t\t</undo_drives>\r\n\t</settings>\r\n</preferences>\r\n";

fn utf16(text: &str) -> Vec<u8> {
    let units = std::iter::once(0xFEFF).chain(text.encode_utf16());
    units.flat_map(|unit| [unit as u8, (unit >> 8) as u8]).collect()
}

#[test]
fn a_change_keeps_what_it_is_not_about() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("old.vmc");
    fs::write(&path, utf16(FOREIGN)).unwrap();
    let mut file = ConfigFile::open(&path).unwrap();
    let mut config = file.read().unwrap();
    assert_eq!((config.memory, config.undo, config.disks.len()), (Some(256 << 20), Some(false), 0));
    config.memory = Some(384 << 20);
    config.undo = Some(true);
    file.write(&config).unwrap();
    file.save(false).unwrap();
    let changed = FOREIGN.replace(">256<", ">384<").replace("\"boolean\">false<", "\"boolean\">true<");
    assert!(fs::read(&path).unwrap() == utf16(&changed), "more than was asked for has changed");
    // A disk comes and goes.
    let image = folder.path().join("disk.vhd");
    config.add(DiskConfig { image: image.clone(), queues: Some(4), ..DiskConfig::default() }).unwrap();
    config.cpus = Some(2);
    file.write(&config).unwrap();
    file.save(false).unwrap();
    let read = ConfigFile::open(&path).unwrap().read().unwrap();
    assert_eq!(read, config);
    assert!(read.disks[0].image == image && String::from_utf8_lossy(&fs::read(&path).unwrap()).len() > changed.len());
    config.remove(0).unwrap();
    config.cpus = None;
    file.write(&config).unwrap();
    assert_eq!(file.read().unwrap(), config);
    file.save(false).unwrap();
    for kept in ["<!-- Microsoft", "C:\\a &amp; b.vhd", "<no_boot type=\"boolean\">true</no_boot>"] {
        let units: Vec<_> =
            fs::read(&path).unwrap()[2..].chunks(2).map(|unit| u16::from(unit[0]) | u16::from(unit[1]) << 8).collect();
        assert!(String::from_utf16(&units).unwrap().contains(kept), "{kept}");
    }
}

#[test]
fn all_that_can_be_said_is_read_as_it_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("all.vmc");
    let mut config = Config {
        memory: Some(3 << 30),
        cpus: Some(8),
        kernel: Some(folder.path().join("a <kernel> & \"more\"")),
        initrd: Some("/boot/initrd".into()),
        append: Some("a='b' c=<d>&e".into()),
        serial: Some(Serial::Unix(folder.path().join("port"))),
        undo: Some(true),
        at_end: Some(AtEnd::Keep),
        low_space: Some(0),
        state_file: Some(folder.path().join("below/it.vsv")),
        on_event: Some("/bin/true".into()),
        disks: Vec::new(),
    };
    for number in 0..64 {
        let image = if number % 2 == 0 { folder.path().join(format!("{number}.vhd")) } else { format!("/{number}.vhd").into() };
        let policy = if number % 3 == 0 { Policy::Pause } else { Policy::Report };
        config
            .add(DiskConfig {
                position: 0,
                image,
                serial_number: Some(format!("N{number}")),
                queues: Some(number % 16 + 1),
                read_only: Some(number % 2 == 0),
                on_error: Some(policy),
                on_no_space: Some(policy),
            })
            .unwrap();
    }
    let error = config.add(DiskConfig { image: "65.vhd".into(), ..DiskConfig::default() }).unwrap_err().to_string();
    assert!(error.contains("65.vhd: ") && error.contains("64 at most"), "{error}");
    let mut file = ConfigFile::new(&path).unwrap();
    file.write(&config).unwrap();
    file.save(true).unwrap();
    assert_eq!(ConfigFile::open(&path).unwrap().read().unwrap(), config);
    assert!(file.save(true).is_err(), "a file that is there was replaced");
    // All of it can be taken back.
    file.write(&Config::default()).unwrap();
    assert_eq!(file.read().unwrap(), Config::default());
}

#[test]
fn what_is_wrong_is_said_with_file_line_and_column() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wrong.vmc");
    let disk =
        |inside: &str| format!("<preferences>\n<hardware><virtio_bus>\n {inside}\n</virtio_bus></hardware>\n</preferences>");
    let cases = [
        ("<preferences>\n\t<hardware>\n</preferences>".to_owned(), "line 3, column 1: "),
        ("<machine/>".to_owned(), "line 1, column 1: the outermost element is <machine>, expected <preferences>"),
        (
            "<preferences>\n <hardware><cpus>9</cpus></hardware>\n</preferences>".to_owned(),
            "line 2, column 12: <cpus> is \"9\", expected a number from 1 to 8",
        ),
        (
            "<preferences><settings><undo_drives><enabled>maybe</enabled></undo_drives></settings></preferences>".to_owned(),
            "<enabled> is \"maybe\", expected true or false",
        ),
        (
            disk("<location id=\"64\"><pathname><relative>a</relative></pathname></location>"),
            "line 3, column 2: <location> has the id",
        ),
        (disk("<location id=\"0\"/>"), "line 3, column 2: <location> has neither"),
        (
            disk("<location id=\"0\"><pathname><relative>a</relative></pathname><on_error>stop</on_error></location>"),
            "<on_error> is \"stop\", expected report or pause",
        ),
        (
            disk(&"<location id=\"1\"><pathname><relative>a</relative></pathname></location>\n".repeat(2)),
            "line 4, column 1: there is a disk at position 1 already",
        ),
        ("<!DOCTYPE x [<!ENTITY a \"b\">]>\n<preferences/>".to_owned(), "line 1, column 1: a document type"),
        ("<preferences>".to_owned() + &"<a>".repeat(64), "more than 32 elements inside each other"),
        ("<preferences>".to_owned() + &" ".repeat(300_000), "has more than 262144 bytes"),
        ("\u{0}".to_owned(), "line 1, column 1: "),
    ];
    for (text, expected) in cases {
        fs::write(&path, &text).unwrap();
        let error = ConfigFile::open(&path).and_then(|file| file.read()).unwrap_err().to_string();
        assert!(error.contains("wrong.vmc: ") && error.contains(expected), "{text:.80}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    let slip = disk("<location id=\"0\"><pathname><relative>a</relative></pathname><on_eror>pause</on_eror></location>");
    fs::write(&path, slip).unwrap();
    let unknown = ConfigFile::open(&path).unwrap().unknown();
    assert!(unknown.len() == 1 && unknown[0].contains("line 3") && unknown[0].contains("<on_eror> in <location>"), "{unknown:?}");
}

#[test]
fn no_bytes_make_it_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hostile.vmc");
    let samples = [fs::read(example("linux.vmc")).unwrap(), utf16(FOREIGN)];
    let mut state: u64 = 0x9E37_79B9_7F4A_7C15;
    let mut next = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    for round in 0..2000 {
        let mut bytes = samples[round % 2].clone();
        for _ in 0..1 + next(4) {
            let at = next(bytes.len().max(1));
            if bytes.is_empty() {
                break;
            }
            match next(4) {
                0 => bytes[at] = next(256) as u8,
                1 => drop(bytes.drain(at..(at + 1 + next(40)).min(bytes.len()))),
                2 => bytes.insert(at, b"<>&\"/! -?\0"[next(10)]),
                _ => bytes.truncate(at.max(1)),
            }
        }
        fs::write(&path, &bytes).unwrap();
        // What is understood can be changed and is still understood.
        let Ok(mut file) = ConfigFile::open(&path) else { continue };
        let Ok(mut config) = file.read() else { continue };
        config.cpus = Some(3);
        let added = config.add(DiskConfig { image: "/new.vhd".into(), ..DiskConfig::default() });
        if added.is_ok() && file.write(&config).is_ok() {
            let read = file.read().unwrap();
            assert_eq!((read.cpus, read.disks.len()), (Some(3), config.disks.len()), "{}", String::from_utf8_lossy(&bytes));
        }
    }
}
