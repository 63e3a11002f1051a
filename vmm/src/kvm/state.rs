//! The state of vCPUs and of KVM's own devices, to be saved and restored.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data, kvm_debugregs, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use serde::{Deserialize, Serialize};

use super::{KvmError, Vcpu, Vm, failed};

/// Registers by number that a guest relies on: system calls, segments, memory types, clocks.
const MSRS: [u32; 22] = [
    0x10,
    0x3B,
    0x174,
    0x175,
    0x176,
    0x1A0,
    0x277,
    0x2FF,
    0x6E0,
    0xC000_0080,
    0xC000_0081,
    0xC000_0082,
    0xC000_0083,
    0xC000_0084,
    0xC000_0100,
    0xC000_0101,
    0xC000_0102,
    0xC000_0103,
    0x4B56_4D00,
    0x4B56_4D01,
    0x4B56_4D02,
    0x4B56_4D04,
];

/// The interrupt controllers, but for those of the vCPUs.
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// A vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    running: kvm_mp_state,
    msrs: Vec<(u32, u64)>,
}

/// What KVM has beside vCPUs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmState {
    chips: Vec<kvm_irqchip>,
    timer: kvm_pit_state2,
    clock: kvm_clock_data,
}

impl Vcpu {
    /// Its state; it stands still and has settled.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn save(&self) -> Result<VcpuState, KvmError> {
        let save = |error| failed("save a vCPU")(error);
        let fd = self.fd();
        // One by one: which of them there are differs.
        let msrs = MSRS.iter().filter_map(|&index| {
            let mut one = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).ok()?;
            let found = fd.get_msrs(&mut one).ok()?;
            (found == 1).then(|| (index, one.as_slice()[0].data))
        });
        Ok(VcpuState {
            msrs: msrs.collect(),
            running: fd.get_mp_state().map_err(save)?,
            regs: fd.get_regs().map_err(save)?,
            sregs: fd.get_sregs().map_err(save)?,
            xsave: self.get_xsave()?,
            xcrs: fd.get_xcrs().unwrap_or_default(),
            debug: fd.get_debug_regs().map_err(save)?,
            lapic: fd.get_lapic().map_err(save)?,
            events: fd.get_vcpu_events().map_err(save)?,
        })
    }

    /// Takes a state; it has never run.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn restore(&self, state: &VcpuState) -> Result<(), KvmError> {
        let restore = |error| failed("restore a vCPU")(error);
        let fd = self.fd();
        fd.set_mp_state(state.running).map_err(restore)?;
        fd.set_sregs(&state.sregs).map_err(restore)?;
        fd.set_regs(&state.regs).map_err(restore)?;
        if state.xcrs.nr_xcrs > 0 {
            fd.set_xcrs(&state.xcrs).map_err(restore)?;
        }
        self.set_xsave(&state.xsave)?;
        fd.set_debug_regs(&state.debug).map_err(restore)?;
        fd.set_lapic(&state.lapic).map_err(restore)?;
        // The file may be a stranger's: no registers but those that are saved, and no more of them.
        for &(index, data) in state.msrs.iter().take(MSRS.len()).filter(|(index, _)| MSRS.contains(index)) {
            let one = Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }]);
            let set = one.ok().and_then(|one| fd.set_msrs(&one).ok());
            if set != Some(1) {
                tracing::debug!("vCPU {}: register {index:#x} can't be restored", self.number());
            }
        }
        fd.set_vcpu_events(&state.events).map_err(restore)
    }
}

impl Vm {
    /// The state of KVM's own devices; all vCPUs stand still.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn save(&self) -> Result<VmState, KvmError> {
        let save = |error| failed("save the interrupt controllers")(error);
        let chips = CHIPS.map(|chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.fd().get_irqchip(&mut chip).map(|()| chip)
        });
        let chips = chips.into_iter().collect::<Result<_, _>>().map_err(save)?;
        Ok(VmState { chips, timer: self.fd().get_pit2().map_err(save)?, clock: self.fd().get_clock().map_err(save)? })
    }

    /// Takes a state.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn restore(&self, state: &VmState) -> Result<(), KvmError> {
        let restore = |error| failed("restore the interrupt controllers")(error);
        for chip in state.chips.iter().take(CHIPS.len()) {
            self.fd().set_irqchip(chip).map_err(restore)?;
        }
        self.fd().set_pit2(&state.timer).map_err(restore)?;
        // What the flags say is of the host that saved it.
        let clock = kvm_clock_data { clock: state.clock.clock, ..Default::default() };
        self.fd().set_clock(&clock).map_err(restore)
    }
}
