//! The test guest, built when it is first needed, and machines that run it.

#![allow(dead_code, missing_docs, reason = "each test program uses a part")]

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use vhd_core::LiveDisk;
use vhd_core::chain::{ChainOptions, ChildOptions, create_child};
use vhd_core::image::OpenOptions;
use vhd_service::events::Events;
use vhd_testkit::fixture::{FixtureSpec, Kind, Layout};
#[allow(unused_imports, reason = "each test program uses a part")]
pub use vhd_testkit::machine::kvm;
use vhd_vmm::loader::Boot;
use vhd_vmm::machine::{Definition, Machine, MachineDisk, SharedConsole, State};
use vhd_vmm::virtio::block::BlockOptions;

/// Nothing takes longer, even on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The test guest: an ELF file.
pub fn guest() -> &'static Path {
    vhd_testkit::machine::guest(Path::new(env!("CARGO_TARGET_TMPDIR")))
}

/// What a guest has said.
#[derive(Clone, Default)]
pub struct Said(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl Write for Said {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.0.lock().unwrap().extend_from_slice(bytes);
        self.0.1.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Said {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.0.lock().unwrap()).into_owned()
    }

    /// Waits until the guest has said this, `times` times.
    pub fn wait_for(&self, what: &str, times: usize) {
        let begin = Instant::now();
        let mut said = self.0.0.lock().unwrap();
        while String::from_utf8_lossy(&said).matches(what).count() < times {
            assert!(begin.elapsed() < PATIENCE, "{what:?} was not said: {}", String::from_utf8_lossy(&said));
            said = self.0.1.wait_timeout(said, Duration::from_millis(200)).unwrap().0;
        }
    }
}

/// The sorts of disks that machines are tried on.
pub const KINDS: [Kind; 3] = [Kind::Fixed, Kind::Dynamic, Kind::Differencing];

/// Makes a disk of this sort in a folder. Returns its file.
pub fn make_disk(folder: &Path, name: &str, kind: Kind, size: u64) -> PathBuf {
    let path = folder.join(format!("{name}.vhd"));
    let own = if kind == Kind::Differencing { Kind::Dynamic } else { kind };
    let base = if kind == Kind::Differencing { folder.join(format!("{name}-base.vhd")) } else { path.clone() };
    let uuid = uuid::Uuid::new_v4().into_bytes();
    FixtureSpec { uuid, ..FixtureSpec::new(own, Layout::Windows8, size) }.write_to(&base).unwrap();
    if kind == Kind::Differencing {
        let options = ChildOptions::new(uuid::Uuid::new_v4().into_bytes());
        create_child(&path, &base, &options, &ChainOptions::default()).unwrap();
    }
    path
}

/// Opens a disk as the machine's that a saved state may be of.
pub fn open(path: &Path) -> LiveDisk {
    let image = OpenOptions { writable: true, owns_saved_state: true, ..OpenOptions::default() };
    LiveDisk::open(path, &ChainOptions { image, ..ChainOptions::default() }).unwrap()
}

pub fn attached(path: &Path, options: BlockOptions) -> MachineDisk {
    MachineDisk { live: open(path), options }
}

pub fn definition(command_line: &str, disks: Vec<MachineDisk>) -> Definition {
    let boot = Boot { kernel: Some(guest().to_owned()), initrd: None, command_line: command_line.to_owned() };
    Definition {
        name: "tested".into(),
        cpus: 1,
        memory: 16 << 20,
        boot,
        disks,
        low_space: 0,
        state_file: None,
        config_file: None,
        registered: None,
        on_event: None,
        sandbox: true,
    }
}

/// A machine that is off, and what it says.
pub fn machine(definition: Definition) -> (Machine, Said, Events) {
    let (said, events) = (Said::default(), Events::default());
    let machine = Machine::new(definition, SharedConsole::new(said.clone()), events.clone()).unwrap();
    (machine, said, events)
}

/// Runs a machine until it is off. Returns what it said, in which nothing is wrong.
pub fn run(definition: Definition) -> String {
    let (machine, said, _) = machine(definition);
    machine.command(vhd_vmm::machine::Command::Start).unwrap();
    let state = machine.wait(PATIENCE, |state| *state != State::Running);
    let text = said.text();
    assert_eq!(state, State::Off, "{text}");
    assert!(text.ends_with("guest: done\n") && !text.contains("WRONG") && !text.contains("PANIC"), "{text}");
    text
}

/// Bytes that are left on the volume of this folder.
pub fn free_of(folder: &Path) -> u64 {
    let found = nix::sys::statvfs::statvfs(folder).unwrap();
    found.blocks_available() * found.fragment_size()
}
