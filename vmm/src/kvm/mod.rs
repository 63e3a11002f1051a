//! KVM: the virtual machine as the host's kernel has it.
//!
//! One of the two modules with `unsafe`; what it gives is safe to use.

#![allow(unsafe_code, reason = "KVM is given the guest's memory, and what it reports of a failure is a union")]

mod start;
mod state;

use std::io;

pub use state::{VcpuState, VmState};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region, kvm_xsave};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuExit, VcpuFd, VmFd};
use nix::errno::Errno;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::Request;
use crate::layout::{KVM_IDENTITY_MAP, KVM_TSS};
use crate::loader::Entry;
use crate::memory::Memory;

/// KVM can't be used, or a call of it failed.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no device.
    #[error("/dev/kvm: does not exist; load the module kvm_intel or kvm_amd, and turn on virtualisation in the firmware")]
    Missing,
    /// The user may not open it.
    #[error("/dev/kvm: may not be opened by this user; add the user to the group kvm: usermod -a -G kvm USER")]
    Forbidden,
    /// Something is too old.
    #[error("/dev/kvm: has no {0}; a newer kernel is needed")]
    Lacks(&'static str),
    /// A call failed.
    #[error("/dev/kvm: can't {0}: {1}")]
    Failed(&'static str, io::Error),
}

/// For `map_err`: what was being done.
pub(crate) fn failed(doing: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError::Failed(doing, error.into())
}

/// A virtual machine without vCPUs.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    cpuid: CpuId,
    /// Kept mapped as long as the machine is there.
    memory: Memory,
}

impl Vm {
    /// A machine with this memory, and interrupt controllers and timers of the kernel's.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn new(memory: Memory) -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|error| match io::Error::from(error) {
            error if error.kind() == io::ErrorKind::NotFound => KvmError::Missing,
            error if error.kind() == io::ErrorKind::PermissionDenied => KvmError::Forbidden,
            error => KvmError::Failed("open it", error),
        })?;
        for (cap, name) in [
            (Cap::Irqchip, "interrupt controllers"),
            (Cap::Ioeventfd, "events for writes (ioeventfd)"),
            (Cap::Irqfd, "interrupts by events (irqfd)"),
            (Cap::ImmediateExit, "immediate exits"),
            (Cap::UserMemory, "memory of the user's"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(KvmError::Lacks(name));
            }
        }
        let fd = kvm.create_vm().map_err(failed("create a virtual machine"))?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("tell what vCPUs can do"))?;
        fd.set_identity_map_address(KVM_IDENTITY_MAP).map_err(failed("place the identity map"))?;
        fd.set_tss_address(KVM_TSS as usize).map_err(failed("place the task segment"))?;
        let vm = Self { fd, cpuid, memory };
        vm.map_memory()?;
        vm.fd.create_irq_chip().map_err(failed("make interrupt controllers"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.fd.create_pit2(pit).map_err(failed("make a timer"))?;
        Ok(vm)
    }

    fn map_memory(&self) -> Result<(), KvmError> {
        for (slot, range) in self.memory.ranges().into_iter().enumerate() {
            let host = self.memory.host_range(&range).map_err(|error| KvmError::Failed("map memory", io::Error::other(error)))?;
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                guest_phys_addr: range.start,
                memory_size: range.end - range.start,
                userspace_addr: host as u64,
                flags: 0,
            };
            // SAFETY: `host_range` found that many bytes of a mapping there. `self.memory` keeps it as long as the
            // machine, and so does each vCPU, whose descriptor keeps the kernel's machine; nobody else has a descriptor of
            // either. Slots are numbered, so none is mapped twice. No reference leads into the memory.
            unsafe { self.fd.set_user_memory_region(region) }.map_err(failed("map memory"))?;
        }
        Ok(())
    }

    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The calls of the machine itself. They are nobody else's: a vCPU made by them would run on without the memory.
    fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Has `event` kicked when the guest writes `value` at `address`.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn kick_on_write(&self, event: &EventFd, address: u64, value: u32) -> Result<(), KvmError> {
        let failed = failed("listen to a queue");
        self.fd.register_ioevent(event, &IoEventAddress::Mmio(address), value).map_err(failed)
    }

    /// Has `event` raise an interrupt line.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn interrupt_on(&self, event: &EventFd, line: u32) -> Result<(), KvmError> {
        self.fd.register_irqfd(event, line).map_err(failed("connect an interrupt"))
    }

    /// Makes the vCPU of this number, which does nothing yet: the first waits for [`Vcpu::enter`], the others for it.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn vcpu(&self, number: u8) -> Result<Vcpu, KvmError> {
        let fd = self.fd.create_vcpu(u64::from(number)).map_err(failed("make a vCPU"))?;
        let mut cpuid = self.cpuid.clone();
        start::number_cpu(&mut cpuid, number);
        fd.set_cpuid2(&cpuid).map_err(failed("set what a vCPU can do"))?;
        let wide_xsave = self.fd.check_extension_int(Cap::Xsave2) > 4096;
        let vcpu = Vcpu { fd, number, wide_xsave, _memory: self.memory.clone() };
        start::set_lines(&vcpu.fd)?;
        Ok(vcpu)
    }
}

/// What answers when the guest reaches for what is not memory.
pub trait Bus {
    /// Bytes go to a port. The machine may be asked for something by that.
    fn port_write(&self, port: u16, bytes: &[u8]) -> Option<Request>;
    /// Bytes of a port are wanted.
    fn port_read(&self, port: u16, bytes: &mut [u8]);
    /// Bytes go to where there is no memory.
    fn write(&self, address: u64, bytes: &[u8]);
    /// Bytes are wanted from where there is no memory.
    fn read(&self, address: u64, bytes: &mut [u8]);
}

/// Why a vCPU stopped running the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It was interrupted, or has been answered.
    Nothing,
    /// The guest asks for something of the whole machine.
    Asked(Request),
    /// The guest can't go on: why.
    Fault(String),
}

/// A virtual CPU.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    number: u8,
    /// Its registers need more than the 4096 bytes of the older call.
    wide_xsave: bool,
    /// The kernel keeps the machine as long as a vCPU of it is open, and the guest runs in this memory.
    _memory: Memory,
}

impl Vcpu {
    /// Its number.
    #[must_use]
    pub fn number(&self) -> u8 {
        self.number
    }

    fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    fn get_xsave(&self) -> Result<kvm_xsave, KvmError> {
        self.fd.get_xsave().map_err(failed("save a vCPU"))
    }

    fn set_xsave(&self, xsave: &kvm_xsave) -> Result<(), KvmError> {
        if self.wide_xsave {
            return Err(KvmError::Lacks("way to restore registers of this size"));
        }
        // SAFETY: KVM reads 4096 bytes, which is what `kvm_xsave` has, where it has no wider registers: just checked.
        unsafe { self.fd.set_xsave(xsave) }.map_err(failed("restore a vCPU"))
    }

    /// Sets it up to enter a kernel.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn enter(&self, memory: &Memory, entry: Entry) -> Result<(), KvmError> {
        start::enter(&self.fd, memory, entry)
    }

    /// Runs the guest until it wants something of `bus`, which answers, or a signal comes.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn run(&mut self, bus: &dyn Bus) -> Result<Exit, KvmError> {
        let why = match self.fd.run() {
            Ok(VcpuExit::IoOut(port, bytes)) => return Ok(bus.port_write(port, bytes).map_or(Exit::Nothing, Exit::Asked)),
            Ok(VcpuExit::IoIn(port, bytes)) => {
                bus.port_read(port, bytes);
                return Ok(Exit::Nothing);
            }
            Ok(VcpuExit::MmioWrite(address, bytes)) => {
                bus.write(address, bytes);
                return Ok(Exit::Nothing);
            }
            Ok(VcpuExit::MmioRead(address, bytes)) => {
                bus.read(address, bytes);
                return Ok(Exit::Nothing);
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => return Ok(Exit::Nothing),
            Ok(VcpuExit::Shutdown) => Some("triple fault".to_owned()),
            Ok(VcpuExit::InternalError) => None,
            Ok(VcpuExit::FailEntry(reason, _)) => Some(format!("the processor refused to enter the guest, reason {reason:#x}")),
            Ok(other) => Some(format!("an exit that is not expected: {other:?}")),
            Err(error) if [Errno::EINTR, Errno::EAGAIN].contains(&Errno::from_raw(error.errno())) => return Ok(Exit::Nothing),
            Err(error) => return Err(KvmError::Failed("run the guest", error.into())),
        };
        let why = why.unwrap_or_else(|| self.internal_error());
        let place = self.fd.get_regs().map_or(String::new(), |regs| format!(" at {:#x}", regs.rip));
        Ok(Exit::Fault(format!("vCPU {}{place}: {why}", self.number)))
    }

    /// What KVM says of an error of its own: most often an instruction that it can't emulate.
    fn internal_error(&mut self) -> String {
        const EMULATION: u32 = 1;
        let run = self.fd.get_kvm_run();
        // SAFETY: the last exit was KVM_EXIT_INTERNAL_ERROR, for which KVM fills this member; all of it are numbers.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        if internal.suberror != EMULATION {
            return format!("an internal error of KVM, number {}", internal.suberror);
        }
        let words = &internal.data[..(internal.ndata as usize).min(internal.data.len())];
        let bytes: Vec<u8> = words.iter().skip(1).take(2).flat_map(|word| word.to_le_bytes()).collect();
        let code: Vec<_> = match bytes.split_first() {
            // The length stands in front of the bytes.
            Some((&len, code)) if usize::from(len) <= code.len() => code[..usize::from(len)].to_vec(),
            _ => Vec::new(),
        };
        let code: Vec<_> = code.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("an instruction that KVM can't emulate: {}", code.join(" "))
    }

    /// Lets what the guest last asked for take effect, without running it any further.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn settle(&mut self) -> Result<(), KvmError> {
        self.fd.set_kvm_immediate_exit(1);
        let result = self.fd.run().map(|_| ());
        self.fd.set_kvm_immediate_exit(0);
        match result {
            Err(error) if Errno::from_raw(error.errno()) != Errno::EINTR => Err(KvmError::Failed("settle a vCPU", error.into())),
            _ => Ok(()),
        }
    }
}
