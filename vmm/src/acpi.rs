//! What the machine has, as ACPI tables: vCPUs, interrupt controllers, power, the serial port, disks.

use acpi_tables::aml::{
    self, Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use crate::layout::{
    ACPI, IO_APIC, LOCAL_APIC, POWER, POWER_BUTTON_LINE, SERIAL, SERIAL_LINE, disk_line, disk_registers, share_lines,
};
use crate::memory::{Memory, Outside};
use crate::virtio::mmio;

const OEM: [u8; 6] = *b"VHD   ";
const TABLE: [u8; 8] = *b"VHDVMM  ";
/// What the guest writes into the sleep control register's type to turn the machine off.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// What the guest writes into the reset register.
pub const RESET_VALUE: u8 = 1;

/// Writes the tables. Returns the address of their root.
///
/// # Errors
/// [`Outside`], for a guest of less than 1 MiB.
pub fn write_tables(memory: &Memory, cpus: u8, disks: usize) -> Result<u64, Outside> {
    let root = ACPI.start;
    let mut next = root + 0x40;
    let mut put = |bytes: Vec<u8>| {
        let at = next;
        next = (at + bytes.len() as u64).next_multiple_of(16);
        memory.write(at, &bytes).map(|()| at)
    };
    let dsdt = put(dsdt(disks).as_slice().to_vec())?;
    let fadt = put(bytes_of(&fadt(dsdt)))?;
    let madt = put(bytes_of(&madt(cpus)))?;
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(bytes_of(&xsdt))?;
    memory.write(root, &bytes_of(&Rsdp::new(OEM, xsdt)))?;
    Ok(root)
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Hardware-reduced ACPI: no system control interrupt, no timer, no power management but off and reset.
fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port));
    let mut fadt = FADTBuilder::new(OEM, TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.sleep_control_reg = port(POWER[0]);
    fadt.sleep_status_reg = port(POWER[1]);
    fadt.reset_reg = port(POWER[2]);
    fadt.reset_value = RESET_VALUE;
    // No VGA, and a keyboard controller only to reset with.
    fadt.iapc_boot_arch = (1 << 2).into();
    fadt.finalize()
}

fn madt(cpus: u8) -> MADT {
    let mut madt = MADT::new(OEM, TABLE, 1, LocalInterruptController::Address(LOCAL_APIC));
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    madt
}

fn dsdt(disks: usize) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, 1);
    let serial_id = EISAName::new("PNP0501");
    let serial_ports = IO::new(SERIAL.start, SERIAL.start, 1, SERIAL.len() as u8);
    let serial_line = Interrupt::new(true, true, false, false, SERIAL_LINE);
    let serial = Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &serial_id),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&serial_ports, &serial_line])),
        ],
    )
    .to_bytes();
    let mut devices = [serial, power_button()].concat();
    for disk in 0..disks {
        let registers = Memory32Fixed::new(true, disk_registers(disk) as u32, mmio::SIZE as u32);
        let line = Interrupt::new(true, true, false, share_lines(disks), disk_line(disk));
        // LNRO0005 is what Linux's virtio_mmio looks for.
        let id = Name::new("_HID".into(), &"LNRO0005");
        let number = Name::new("_UID".into(), &(disk as u8));
        let coherent = Name::new("_CCA".into(), &aml::ONE);
        let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&registers, &line]));
        let name = format!("VD{disk:02X}");
        let device = Device::new(name.as_str().into(), vec![&id, &number, &coherent, &resources]);
        devices.extend(device.to_bytes());
    }
    dsdt.append_slice(&Scope::raw("_SB_".into(), devices));
    Name::new("_S5_".into(), &Package::new(vec![&SLEEP_TYPE_OFF, &aml::ZERO])).to_aml_bytes(&mut dsdt);
    dsdt.update_checksum();
    dsdt
}

/// A button, and the device that says when it was pressed: with hardware-reduced ACPI there are no other events.
fn power_button() -> Vec<u8> {
    let id = EISAName::new("PNP0C0C");
    let button =
        Device::new("PWRB".into(), vec![&Name::new("_HID".into(), &id), &Name::new("_UID".into(), &aml::ZERO)]).to_bytes();
    let line = Interrupt::new(true, true, false, false, POWER_BUTTON_LINE);
    let (path, pressed) = (Path::new("PWRB"), 0x80_u8);
    let notify = Notify::new(&path, &pressed);
    let events = Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&line])),
            &Method::new("_EVT".into(), 1, true, vec![&notify]),
        ],
    )
    .to_bytes();
    [button, events].concat()
}

trait ToBytes: Aml {
    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.to_aml_bytes(&mut bytes as &mut dyn AmlSink);
        bytes
    }
}
impl<T: Aml> ToBytes for T {}
