//! What a kernel is told of the machine: the memory map, the command line, the initial RAM disk, the ACPI tables.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::Entry;
use super::bzimage::SETUP;
use crate::layout::{ACPI, COMMAND_LINE, HIGH_START, LOW_END, PVH_INFO, ZERO_PAGE};
use crate::memory::{Memory, Outside};

/// What is told beside memory.
pub struct Told<'a> {
    /// The bzImage's own header.
    pub setup: Option<&'a [u8]>,
    /// Address and length of the initial RAM disk.
    pub initrd: Option<(u64, u32)>,
    /// Address of the ACPI tables' root.
    pub root: u64,
}

const RAM: u32 = 1;
const RESERVED: u32 = 2;
const BOOT_FLAG: u16 = 0xAA55;
const SETUP_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// No known boot loader.
const LOADER: u8 = 0xFF;
const PVH_MAGIC: u32 = 0x336E_C578;

/// Address, bytes and type of each part.
fn map(memory: &Memory) -> Vec<(u64, u64, u32)> {
    let mut map = vec![(0, LOW_END, RAM), (ACPI.start, ACPI.end - ACPI.start, RESERVED)];
    for range in memory.ranges() {
        let start = range.start.max(HIGH_START);
        if start < range.end {
            map.push((start, range.end - start, RAM));
        }
    }
    map
}

/// Writes it where the entry looks for it.
pub fn write(memory: &Memory, entry: &Entry, told: &Told<'_>) -> Result<(), Outside> {
    match entry {
        Entry::Long(_) => write_zero_page(memory, told),
        Entry::Pvh(_) => write_start_info(memory, told),
    }
}

fn write_zero_page(memory: &Memory, told: &Told<'_>) -> Result<(), Outside> {
    let mut params = boot_params::default();
    if let Some(setup) = told.setup {
        let bytes = params.as_mut_slice();
        bytes[SETUP..SETUP + setup.len()].copy_from_slice(setup);
    }
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = SETUP_MAGIC;
    params.hdr.type_of_loader = LOADER;
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    if params.hdr.kernel_alignment == 0 {
        params.hdr.kernel_alignment = 0x100_0000;
    }
    if let Some((start, len)) = told.initrd {
        params.hdr.ramdisk_image = start as u32;
        params.hdr.ramdisk_size = len;
    }
    params.acpi_rsdp_addr = told.root;
    let map = map(memory);
    for (slot, &(addr, size, type_)) in params.e820_table.iter_mut().zip(&map) {
        *slot = boot_e820_entry { addr, size, r#type: type_ };
    }
    params.e820_entries = map.len() as u8;
    put(memory, ZERO_PAGE, params)
}

fn write_start_info(memory: &Memory, told: &Told<'_>) -> Result<(), Outside> {
    let info_len = size_of::<hvm_start_info>() as u64;
    let modules = PVH_INFO + info_len.next_multiple_of(16);
    let entries = modules + size_of::<hvm_modlist_entry>() as u64;
    let map = map(memory);
    for (index, &(addr, size, type_)) in map.iter().enumerate() {
        let at = entries + (index * size_of::<hvm_memmap_table_entry>()) as u64;
        put(memory, at, hvm_memmap_table_entry { addr, size, type_, reserved: 0 })?;
    }
    if let Some((paddr, size)) = told.initrd {
        put(memory, modules, hvm_modlist_entry { paddr, size: u64::from(size), ..Default::default() })?;
    }
    let info = hvm_start_info {
        magic: PVH_MAGIC,
        version: 1,
        nr_modules: told.initrd.map_or(0, |_| 1),
        modlist_paddr: modules,
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: told.root,
        memmap_paddr: entries,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    put(memory, PVH_INFO, info)
}

fn put(memory: &Memory, address: u64, value: impl ByteValued) -> Result<(), Outside> {
    let len = size_of_val(&value) as u64;
    memory.as_mapped().write_obj(value, GuestAddress(address)).map_err(|_| Outside { address, len })
}
