//! How vCPUs are when they begin.

use kvm_bindings::{CpuId, kvm_dtable, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use super::{KvmError, failed};
use crate::layout::{GDT, PAGE_TABLES, PVH_INFO, STACK, ZERO_PAGE};
use crate::loader::Entry;
use crate::memory::Memory;

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;
/// Always set in the flags.
const FLAGS: u64 = 2;

/// Says which vCPU it is, where CPUID tells.
pub fn number_cpu(cpuid: &mut CpuId, number: u8) {
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => entry.ebx = entry.ebx & 0x00FF_FFFF | u32::from(number) << 24,
            0xB | 0x1F => entry.edx = u32::from(number),
            _ => {}
        }
    }
}

/// The local interrupt lines: the old interrupt controller's on the first, non-maskable ones on the second.
pub fn set_lines(fd: &VcpuFd) -> Result<(), KvmError> {
    const LINES: [(usize, i8); 2] = [(0x350, 7), (0x360, 4)];
    let mut lapic = fd.get_lapic().map_err(failed("read a local interrupt controller"))?;
    for (register, mode) in LINES {
        // Bits 8 to 10 are the delivery mode.
        lapic.regs[register + 1] = lapic.regs[register + 1] & !7 | mode;
    }
    fd.set_lapic(&lapic).map_err(failed("set a local interrupt controller"))
}

/// A segment over all memory, with its place in the descriptor table.
fn segment(index: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xFFFF_FFFF,
        selector: index * 8,
        type_: kind,
        present: 1,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// The same as the eight bytes of the table.
fn descriptor(segment: &kvm_segment) -> u64 {
    let access = u64::from(segment.type_) | u64::from(segment.s) << 4 | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    0xFFFF | access << 40 | 0xF << 48 | flags << 52
}

pub fn enter(fd: &VcpuFd, memory: &Memory, entry: Entry) -> Result<(), KvmError> {
    let (code, data) = match entry {
        Entry::Long(_) => (segment(2, 0xB, true), segment(3, 0x3, false)),
        Entry::Pvh(_) => (segment(2, 0xB, false), segment(3, 0x3, false)),
    };
    // A busy task segment is needed to enter at all.
    let task = kvm_segment { limit: 0x67, selector: 0x20, type_: 0xB, present: 1, ..Default::default() };
    let table = [0, 0, descriptor(&code), descriptor(&data)];
    let mut bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    bytes.resize(64, 0);
    let put = |address, bytes: &[u8]| {
        memory.write(address, bytes).map_err(|error| KvmError::Failed("set up the first vCPU", std::io::Error::other(error)))
    };
    put(GDT, &bytes)?;
    let mut sregs = fd.get_sregs().map_err(failed("read a vCPU"))?;
    sregs.gdt = kvm_dtable { base: GDT, limit: bytes.len() as u16 - 1, ..Default::default() };
    sregs.idt = kvm_dtable::default();
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task;
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
    let mut regs = kvm_regs { rflags: FLAGS, ..Default::default() };
    match entry {
        Entry::Long(address) => {
            for (at, page) in page_tables() {
                put(at, &page)?;
            }
            sregs.cr0 |= CR0_PAGING;
            sregs.cr3 = PAGE_TABLES;
            sregs.cr4 = CR4_PHYSICAL_ADDRESS_EXTENSION;
            sregs.efer = EFER_LONG_MODE;
            (regs.rip, regs.rsi, regs.rsp, regs.rbp) = (address, ZERO_PAGE, STACK, STACK);
        }
        Entry::Pvh(address) => (regs.rip, regs.rbx) = (address, PVH_INFO),
    }
    fd.set_sregs(&sregs).map_err(failed("set up the first vCPU"))?;
    fd.set_regs(&regs).map_err(failed("set up the first vCPU"))
}

/// The first 4 GiB, each address to itself, in pages of 2 MiB.
fn page_tables() -> Vec<(u64, Vec<u8>)> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    const PAGE: u64 = 0x1000;
    let bytes = |entries: Vec<u64>| -> Vec<u8> { entries.iter().flat_map(|entry| entry.to_le_bytes()).collect() };
    let directory = |number: u64| PAGE_TABLES + PAGE * (2 + number);
    let mut pages = vec![
        (PAGE_TABLES, bytes(vec![(PAGE_TABLES + PAGE) | PRESENT_WRITABLE])),
        (PAGE_TABLES + PAGE, bytes((0..4).map(|number| directory(number) | PRESENT_WRITABLE).collect())),
    ];
    for number in 0..4 {
        let entries = (0..512).map(|entry| (number << 30 | entry << 21) | PRESENT_WRITABLE | LARGE);
        pages.push((directory(number), bytes(entries.collect())));
    }
    pages
}
