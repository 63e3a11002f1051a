//! Goal: every form of kernel is entered as it expects, with its command line and initial RAM disk; what is no kernel,
//! or a broken one, is one clear error.
//!
//! Method: a kernel of a few instructions (`vmm/guest/entries.s`) says on KVM how it was entered and what it was told,
//! as an ELF file with a PVH note, as one without, and as bzImages, packed each way. Broken kernels are loaded without KVM.

#![allow(clippy::unwrap_used, clippy::little_endian_bytes, missing_docs, reason = "a test that can't go on fails here")]

mod support;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use vhd_testkit::tools::require;
use vhd_vmm::loader::{Boot, Kernel, load};
use vhd_vmm::machine::{Definition, State};
use vhd_vmm::memory::Memory;

use support::{PATIENCE, definition, guest, kvm, machine, run};

/// The small kernel: the ELF file, and its code alone, which begins with the 64-bit entry at 0x100200.
fn entries() -> (Vec<u8>, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/entries.s");
    let (elf, code) = (folder.path().join("elf"), folder.path().join("code"));
    let sh = |program: &str, arguments: &[&str], files: [&Path; 2]| {
        let output = Command::new(program).args(arguments).args(files).output().unwrap();
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let link = "-Wl,-N,-Ttext=0x100200,--build-id=none,--no-warn-rwx-segments";
    sh("cc", &["-nostdlib", "-static", "-no-pie", link, "-o"], [&elf, &source]);
    sh("objcopy", &["-O", "binary", "-j", ".text"], [&elf, &code]);
    (fs::read(elf).unwrap(), fs::read(code).unwrap())
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// A bzImage: one sector of setup behind the first, code, and what is packed.
fn bzimage(code: &[u8], packed: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 1024];
    bytes[0x1F1] = 1;
    put(&mut bytes, 0x201, &[0x6A]);
    put(&mut bytes, 0x202, b"HdrS");
    put(&mut bytes, 0x206, &0x020F_u16.to_le_bytes());
    put(&mut bytes, 0x236, &1_u16.to_le_bytes());
    let mut rest = vec![0xF4; 0x200];
    rest.extend(code);
    put(&mut bytes, 0x248, &(rest.len() as u32).to_le_bytes());
    put(&mut bytes, 0x24C, &(packed.len() as u32).to_le_bytes());
    put(&mut bytes, 0x258, &0x10_0000_u64.to_le_bytes());
    put(&mut bytes, 0x260, &0x1_0000_u32.to_le_bytes());
    rest.extend(packed);
    [bytes, rest].concat()
}

/// Packs as Linux's build does, with the length of the unpacked bytes behind.
fn pack(tool: &[&str], bytes: &[u8]) -> Option<Vec<u8>> {
    require(tool[0])?;
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    let output = Command::new(tool[0]).args(&tool[1..]).stdin(file.reopen().unwrap()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some([output.stdout, (bytes.len() as u32).to_le_bytes().to_vec()].concat())
}

const PACKERS: [&[&str]; 3] = [&["gzip", "-c"], &["zstd", "-19", "-c"], &["lz4", "-l", "-9", "-c"]];

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }
}

fn said(kernel: PathBuf, initrd: Option<PathBuf>, command_line: &str) -> String {
    let boot = Boot { kernel: Some(kernel), initrd, command_line: command_line.to_owned() };
    let (machine, said, _) = machine(Definition { boot, ..definition("", vec![]) });
    machine.command(vhd_vmm::machine::Command::Start).unwrap();
    let state = machine.wait(PATIENCE, |state| *state != State::Running);
    assert_eq!(state, State::Off, "{}", said.text());
    said.text()
}

#[test]
fn a_kernel_is_entered_as_it_says_and_told_its_command_line_and_initrd() {
    if !kvm() {
        return;
    }
    let (elf, code) = entries();
    let files = Files::new();
    let mut without_note = elf.clone();
    let note = elf.windows(4).position(|bytes| bytes == b"Xen\0").unwrap();
    put(&mut without_note, note, b"Not\0");
    // An initrd that is no multiple of a page, and none.
    let initrd: String = (0..5000).map(|n| char::from(b'a' + (n % 26) as u8)).collect();
    for (name, kernel, mode) in [
        ("pvh", elf, "32-bit"),
        ("elf", without_note, "64-bit"),
        // Nothing is packed: its own code is entered.
        ("bzimage", bzimage(&code, &[]), "64-bit"),
        // xz is left to that code, too.
        ("xz", bzimage(&code, b"\xFD7zXZ\0and so on"), "64-bit"),
    ] {
        let kernel = files.put(name, &kernel);
        let with = said(kernel.clone(), Some(files.put("initrd", initrd.as_bytes())), "root=/dev/vda quiet");
        assert_eq!(with, format!("{mode}: root=/dev/vda quiet; initrd: {initrd}"), "{name}");
        assert_eq!(said(kernel, None, ""), format!("{mode}: ; initrd: "), "{name}");
    }
}

#[test]
fn a_kernel_that_is_packed_in_a_bzimage_is_unpacked_by_the_host() {
    let elf = fs::read(guest()).unwrap();
    for tool in PACKERS {
        let Some(packed) = pack(tool, &elf) else { continue };
        // Code that would stop at once shows that it is not entered.
        let kernel = Files::new();
        let path = kernel.put("bzimage", &bzimage(&[0xF4; 64], &packed));
        if kvm() {
            let mut hello = definition("do=hello", vec![]);
            hello.boot.kernel = Some(path);
            assert_eq!(run(hello), "guest: do=hello\nguest: done\n", "{tool:?}");
        }
    }
}

/// Why a kernel is refused, in memory of 16 MiB.
fn refused(image: &[u8]) -> Option<String> {
    let kernel = Kernel { name: "kernel".into(), image: image.to_vec(), initrd: None, command_line: String::new(), chosen: None };
    let why = load(&Memory::new(16 << 20).unwrap(), &kernel, 0).err()?.to_string();
    assert!(why.starts_with("kernel: ") && !why.contains('\n'), "{why}");
    Some(why)
}

#[test]
fn an_elf_file_that_is_broken_is_refused_with_what_is_wrong() {
    let elf = fs::read(guest()).unwrap();
    assert_eq!(refused(&elf), None);
    let headers = u64::from_le_bytes(elf[32..40].try_into().unwrap()) as usize;
    let count = usize::from(elf[56]);
    let loaded: Vec<usize> = (0..count).map(|n| headers + n * 56).filter(|at| elf[*at] == 1 && elf[at + 4] & 1 != 0).collect();
    let first = loaded[0];
    let other = (0..count).map(|n| headers + n * 56).find(|at| elf[*at] == 1 && *at != first).unwrap();
    let changed = |at: usize, value: &[u8]| {
        let mut bytes = elf.clone();
        put(&mut bytes, at, value);
        refused(&bytes).unwrap()
    };
    for (at, value, wanted) in [
        (4, &[1][..], "is for machine 62, class 1"),
        (18, &[40], "is for machine 40"),
        (54, &[55], "has program headers of 55 bytes"),
        (32, &[0xFF; 8], "its program headers are past its end"),
        (56, &[0xFF, 0xFF], "is cut: "),
        (56, &[0, 0], "has nothing to load"),
        // A segment in low memory, past the end of memory, of a length that wraps, and more than there is.
        (first + 24, &[0, 0, 1, 0, 0, 0, 0, 0], "belongs at 0x10000 with"),
        (first + 24, &[0, 0, 0, 0x40, 0, 0, 0, 0], "belongs at 0x40000000 with"),
        (first + 24, &[0xFF; 8], "belongs at 0xffffffffffffffff"),
        (first + 40, &[0xFF; 8], "with 18446744073709551615 bytes"),
        (first + 40, &[0, 0, 0, 1, 0, 0, 0, 0], "with 16777216 bytes, which is not between"),
        (first + 8, &[0xFF; 8], "is cut: segment"),
        (other + 24, &elf[first + 24..first + 32], "has two segments for one place"),
    ] {
        let why = changed(at, value);
        assert!(why.contains(wanted), "{at}: {why}");
    }
    assert!(refused(&elf[..63]).unwrap().contains("ends within its ELF header"));
}

#[test]
fn a_bzimage_that_is_broken_is_refused_with_what_is_wrong() {
    let elf = fs::read(guest()).unwrap();
    for tool in PACKERS {
        let Some(packed) = pack(tool, &elf) else { continue };
        let image = bzimage(&[0xF4; 64], &packed);
        assert_eq!(refused(&image), None, "{tool:?}");
        let why = refused(&image[..image.len() - 1]).unwrap();
        assert!(why.contains("is cut: it ends within the packed kernel"), "{tool:?}: {why}");
        // What was packed is cut, though the header says that it is whole.
        let why = refused(&bzimage(&[0xF4; 64], &packed[..packed.len() / 2])).unwrap();
        assert!(why.contains("can't be unpacked") || why.contains("is cut"), "{tool:?}: {why}");
        let why = refused(&bzimage(&[0xF4; 64], &pack(tool, b"no kernel").unwrap())).unwrap();
        assert!(why.contains("what is packed in it is no ELF file"), "{tool:?}: {why}");
    }
    let why = refused(&bzimage(&[0xF4; 64], b"PK\x03\x04...")).unwrap();
    assert!(why.contains("is packed in a way that is not known here ([50, 4b, 03, 04"), "{why}");
    let mut wants_more = bzimage(&[0xF4; 64], &[]);
    put(&mut wants_more, 0x260, &0x1000_0000_u32.to_le_bytes());
    assert!(refused(&wants_more).unwrap().contains("give more memory"));
    // Without a 64-bit entry, and nothing at all.
    let mut old = bzimage(&[0xF4; 64], &[]);
    old[0x236] = 0;
    for none in [&old[..], b"", b"MZ", &[0; 4096]] {
        assert!(refused(none).unwrap().contains("is neither an ELF file nor a bzImage"));
    }
}

#[test]
fn no_damage_to_a_kernel_does_more_than_refuse_it() {
    let elf = fs::read(guest()).unwrap();
    let mut images = vec![elf.clone()];
    images.extend(PACKERS.iter().filter_map(|tool| Some(bzimage(&[0xF4; 64], &pack(tool, &elf)?))));
    let mut state = 3_u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for image in images {
        for run in 0..400 {
            let mut damaged = image.clone();
            let end = if run % 2 == 0 { image.len().min(2048) } else { image.len() };
            for _ in 0..=random(3) {
                damaged[random(end)] = [0, 0xFF, random(256) as u8][random(3)];
            }
            if run % 5 == 0 {
                damaged.truncate(random(image.len()));
            }
            let _ = refused(&damaged);
        }
    }
}

#[test]
fn an_initrd_or_a_command_line_that_has_no_room_is_refused() {
    let memory = Memory::new(16 << 20).unwrap();
    let kernel = |initrd: usize, line: String| Kernel {
        name: "kernel".into(),
        image: fs::read(guest()).unwrap(),
        initrd: Some(("initrd".into(), vec![0; initrd])),
        command_line: line,
        chosen: None,
    };
    load(&memory, &kernel(8 << 20, "x".repeat(2047)), 0).unwrap();
    let why = load(&memory, &kernel(15 << 20, String::new()), 0).unwrap_err().to_string();
    assert!(why.starts_with("initrd: has 15728640 bytes, and there is no room"), "{why}");
    for line in ["x".repeat(2048), "a\0b".to_owned()] {
        let why = load(&memory, &kernel(1, line), 0).unwrap_err().to_string();
        assert!(why.contains("its command line has"), "{why}");
    }
    let missing = Boot { kernel: Some("missing".into()), ..Boot::default() };
    assert!(
        Kernel::read(&missing, None).unwrap_err().to_string().starts_with("missing: can't be read as the kernel: No such file")
    );
    let why = Kernel::read(&Boot::default(), None).unwrap_err().to_string();
    assert!(why.contains("no disk to find one on"), "{why}");
}
