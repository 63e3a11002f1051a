//! Where things are in the guest's address space, and on which ports and interrupt lines.

use std::ops::Range;

/// The boot loader's global descriptor table.
pub const GDT: u64 = 0x500;
/// What a PVH kernel is told; its memory map and modules follow.
pub const PVH_INFO: u64 = 0x6000;
/// What a Linux kernel is told.
pub const ZERO_PAGE: u64 = 0x7000;
/// Page tables of the 64-bit entry: this page and those that follow.
pub const PAGE_TABLES: u64 = 0x9000;
/// The stack of the 64-bit entry grows down from here.
pub const STACK: u64 = 0x1_0000;
/// The kernel's command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Bytes of it at most, its zero included.
pub const COMMAND_LINE_MAX: usize = 2048;
/// Low memory that the guest may use ends here.
pub const LOW_END: u64 = 0x9_FC00;
/// ACPI tables; a guest looks for their root between here and 1 MiB.
pub const ACPI: Range<u64> = 0xE_0000..0x10_0000;
/// Where memory above the old holes begins, and kernels go.
pub const HIGH_START: u64 = 0x10_0000;

/// Registers of disks: one page for each.
pub const DISKS: u64 = 0xD000_0000;
/// Disks at most: four for each interrupt line.
pub const MAX_DISKS: usize = 64;
/// The interrupt lines of disks, which are all that nothing else has. They are edges, and a driver that is interrupted asks each
/// device of the line, so disks may share one: an edge that comes while another is handled is not lost.
const DISK_LINES: [u32; 16] = [5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21];
/// The interrupt controllers, inside the gap that memory leaves.
pub const IO_APIC: u32 = 0xFEC0_0000;
/// The local interrupt controller of each vCPU.
pub const LOCAL_APIC: u32 = 0xFEE0_0000;
/// Three pages that KVM needs on Intel, and one behind them.
pub const KVM_TSS: u64 = 0xFFFB_D000;
/// See [`KVM_TSS`].
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;

/// The serial port.
pub const SERIAL: Range<u16> = 0x3F8..0x400;
/// Its interrupt line.
pub const SERIAL_LINE: u32 = 4;
/// The interrupt line of the power button.
pub const POWER_BUTTON_LINE: u32 = 3;
/// The keyboard controller's data and command ports: all that it does is reset.
pub const KEYBOARD: [u16; 2] = [0x60, 0x64];
/// The real-time clock's index and data ports.
pub const CLOCK: [u16; 2] = [0x70, 0x71];
/// ACPI's sleep control register, sleep status register, and reset register.
pub const POWER: [u16; 3] = [0x600, 0x601, 0x602];

/// The interrupt line of a disk.
#[must_use]
pub fn disk_line(disk: usize) -> u32 {
    DISK_LINES[disk % DISK_LINES.len()]
}

/// Whether so many disks share interrupt lines.
#[must_use]
pub const fn share_lines(disks: usize) -> bool {
    disks > DISK_LINES.len()
}

/// The registers of a disk.
#[must_use]
pub fn disk_registers(disk: usize) -> u64 {
    DISKS + disk as u64 * crate::virtio::mmio::SIZE
}
