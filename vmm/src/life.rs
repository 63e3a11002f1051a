//! One life of a virtual machine: from power-on, or a saved state, to its end. A reset is a new life.

mod bus;
mod vcpus;

use std::path::Path;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::bus::Devices;
use self::vcpus::Vcpus;
use crate::acpi;
use crate::devices::{Clock, Console, Ports, Request, SerialPort};
use crate::kvm::{KvmError, Vm};
use crate::layout::{MAX_DISKS, POWER_BUTTON_LINE, SERIAL_LINE, disk_line, disk_registers};
use crate::loader::{self, Boot, Kernel, LoadError};
use crate::memory::Memory;
use crate::saved::{self, DiskIdentity, SavedState};
use crate::virtio::block::{Block, Stall};
use crate::virtio::mmio::{NOTIFY, Registers};
use crate::virtio::workers::{StallObserver, Workers};

/// vCPUs at most.
pub const MAX_CPUS: u8 = 8;

/// What a machine is made of.
#[derive(Clone, Debug)]
pub struct Hardware {
    /// vCPUs, 1 to [`MAX_CPUS`].
    pub cpus: u8,
    /// Bytes of memory.
    pub memory: u64,
    /// Disks, [`MAX_DISKS`] at most.
    pub disks: Vec<Arc<Block>>,
    /// Whether the threads that the guest speaks to are fenced in: see [`crate::sandbox`].
    pub sandbox: bool,
}

/// Why there is no life.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// KVM fails.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The kernel can't be started.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// What was asked for is not possible.
    #[error("{0}")]
    Hardware(String),
}

/// What a guest, or a failure, does to its life.
#[derive(Debug)]
pub enum Incident {
    /// The guest asks for it.
    Asked(Request),
    /// The guest can't go on.
    Fault(String),
    /// A disk can't do what was asked of it.
    Stalled(usize, Stall),
    /// There is nothing more to be heard.
    Over,
}

/// Tells of incidents of one life; its number says of which.
#[derive(Clone, Debug)]
pub struct Reporter {
    /// The life.
    pub life: u64,
    /// Where to.
    pub to: Sender<(u64, Incident)>,
}

impl Reporter {
    fn tell(&self, incident: Incident) {
        // Nobody listens to a life that is over.
        let _ = self.to.send((self.life, incident));
    }
}

struct Stalls(Mutex<Reporter>);

impl StallObserver for Stalls {
    fn stalled(&self, disk: usize, stall: Stall) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).tell(Incident::Stalled(disk, stall));
    }
}

/// A machine that is on. It ends when this is dropped.
pub struct Life {
    // In this order: vCPUs end first, then the threads of disks.
    vcpus: Vcpus,
    devices: Arc<Devices>,
    vm: Arc<Vm>,
    chosen: Option<String>,
}

impl Life {
    /// Which kernel was chosen, where it was found on a disk.
    #[must_use]
    pub fn chosen(&self) -> Option<&str> {
        self.chosen.as_deref()
    }

    /// Turns a machine on; it stands still until [`Life::resume`].
    ///
    /// # Errors
    /// [`StartError`].
    pub fn boot(hardware: &Hardware, boot: &Boot, console: Console, reporter: Reporter) -> Result<Self, StartError> {
        let memory = check(hardware)?;
        let kernel = Kernel::read(boot, hardware.disks.first().map(|block| block.disk()))?;
        let outside = |error| StartError::Hardware(format!("the machine's tables do not fit: {error}"));
        let root = acpi::write_tables(&memory, hardware.cpus, hardware.disks.len()).map_err(outside)?;
        let entry = loader::load(&memory, &kernel, root)?;
        let vm = Arc::new(Vm::new(memory.clone())?);
        let serial = SerialPort::new(console).map_err(|error| KvmError::Failed("connect devices", error))?;
        let devices = Arc::new(attach(hardware, &vm, &memory, (serial, Clock::default()), &reporter)?);
        let vcpus = (0..hardware.cpus).map(|number| vm.vcpu(number)).collect::<Result<Vec<_>, _>>()?;
        vcpus[0].enter(&memory, entry)?;
        let vcpus =
            Vcpus::start(vcpus, &devices, &reporter, hardware.sandbox).map_err(|error| KvmError::Failed("start vCPUs", error))?;
        Ok(Self { vcpus, devices, vm, chosen: kernel.chosen })
    }

    /// Goes on from a saved state, whose memory this is; it stands still until [`Life::resume`].
    ///
    /// # Errors
    /// [`StartError`].
    pub fn restore(
        hardware: &Hardware,
        state: &SavedState,
        memory: &Memory,
        console: Console,
        reporter: Reporter,
    ) -> Result<Self, StartError> {
        if state.vcpus.len() != usize::from(hardware.cpus) || state.disks.len() != hardware.disks.len() {
            let (cpus, disks) = (state.vcpus.len(), state.disks.len());
            let message = format!("the saved state is of a machine of {cpus} CPUs and {disks} disks, and this is another one");
            return Err(StartError::Hardware(message));
        }
        let vm = Arc::new(Vm::new(memory.clone())?);
        let serial = SerialPort::restore(&state.serial, console).map_err(|error| KvmError::Failed("connect devices", error))?;
        let devices = Arc::new(attach(hardware, &vm, memory, (serial, state.clock), &reporter)?);
        let vcpus = (0..hardware.cpus).map(|number| vm.vcpu(number)).collect::<Result<Vec<_>, _>>()?;
        vm.restore(&state.vm)?;
        for (vcpu, state) in vcpus.iter().zip(&state.vcpus) {
            vcpu.restore(state)?;
        }
        for (disk, state) in devices.disks.iter().zip(&state.disks) {
            let mut registers = disk.lock().unwrap_or_else(PoisonError::into_inner);
            registers.restore(state).map_err(StartError::Hardware)?;
        }
        let vcpus =
            Vcpus::start(vcpus, &devices, &reporter, hardware.sandbox).map_err(|error| KvmError::Failed("start vCPUs", error))?;
        Ok(Self { vcpus, devices, vm, chosen: None })
    }

    /// Writes its state to a new file; it stands still. Returns which file that is.
    ///
    /// # Errors
    /// As [`saved::write`].
    pub fn save(&self, path: &Path, identities: Vec<DiskIdentity>) -> Result<saved::Identity, vhd_core::Error> {
        let failed = |error: KvmError| vhd_core::Error::new(vhd_core::ErrorKind::Io, error.to_string());
        let mut disks = Vec::new();
        self.devices.each_disk(|registers| disks.push(registers.save()));
        let state = SavedState {
            memory: self.vm.memory().size(),
            identities,
            vcpus: self.vcpus.save().map_err(failed)?,
            vm: self.vm.save().map_err(failed)?,
            serial: self.devices.ports.serial().lock().unwrap_or_else(PoisonError::into_inner).save(),
            clock: self.devices.ports.clock(),
            disks,
        };
        saved::write(path, &state, self.vm.memory())
    }

    /// Stops: when it returns no vCPU runs and no request is under way.
    pub fn pause(&self) {
        self.vcpus.park();
        self.devices.each_disk(Registers::pause);
    }

    /// Goes on, also with requests that were kept.
    pub fn resume(&self) {
        self.devices.each_disk(Registers::resume);
        self.vcpus.go();
    }

    /// Asks the guest to turn itself off.
    ///
    /// # Errors
    /// As the host fails.
    pub fn press_power_button(&self) -> std::io::Result<()> {
        self.devices.power_button.write(1)
    }

    /// The guest's serial port.
    pub fn serial(&self) -> Arc<Mutex<SerialPort>> {
        Arc::clone(self.devices.ports.serial())
    }
}

/// Memory, where the hardware is possible.
fn check(hardware: &Hardware) -> Result<Memory, StartError> {
    let wrong = |message: String| Err(StartError::Hardware(message));
    if !(1..=MAX_CPUS).contains(&hardware.cpus) {
        return wrong(format!("{} CPUs, and a machine has 1 to {MAX_CPUS}", hardware.cpus));
    }
    if hardware.disks.len() > MAX_DISKS {
        return wrong(format!("{} disks, and a machine has {MAX_DISKS} at most", hardware.disks.len()));
    }
    if hardware.memory < 2 << 20 || hardware.memory % 4096 != 0 {
        return wrong(format!("{} bytes of memory: it must be 2 MiB or more, a multiple of 4 KiB", hardware.memory));
    }
    Memory::new(hardware.memory)
        .map_err(|error| StartError::Hardware(format!("{} bytes of memory can't be had: {error}", hardware.memory)))
}

/// The serial port with its interrupt, and the clock.
type Ported = ((SerialPort, EventFd), Clock);

fn attach(hardware: &Hardware, vm: &Vm, memory: &Memory, ported: Ported, reporter: &Reporter) -> Result<Devices, StartError> {
    let host = |error| StartError::Kvm(KvmError::Failed("connect devices", error));
    let ((serial, line), clock) = ported;
    vm.interrupt_on(&line, SERIAL_LINE)?;
    let power_button = EventFd::new(EFD_NONBLOCK).map_err(host)?;
    vm.interrupt_on(&power_button, POWER_BUTTON_LINE)?;
    let stalls = Arc::new(Stalls(Mutex::new(reporter.clone())));
    let mut disks = Vec::new();
    for (number, block) in hardware.disks.iter().enumerate() {
        let (block, observer) = (Arc::clone(block), Arc::clone(&stalls) as _);
        let workers = Workers::start(number, block, memory.clone(), observer, hardware.sandbox).map_err(host)?;
        vm.interrupt_on(&workers.line().interrupt, disk_line(number))?;
        for queue in 0..workers.block().queues() {
            if let Some(kick) = workers.kick_of(usize::from(queue)) {
                vm.kick_on_write(kick, disk_registers(number) + NOTIFY, u32::from(queue))?;
            }
        }
        let registers = Registers::new(workers);
        // The machine stands still as yet.
        registers.pause();
        disks.push(Mutex::new(registers));
    }
    Ok(Devices { ports: Ports::new(Arc::new(Mutex::new(serial)), clock), disks, power_button })
}
