//! Kernels that are ELF files.

use std::io::Cursor;
use std::ops::Range;

use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::{Entry, Loaded};
use crate::layout::HIGH_START;
use crate::memory::{GAP, Memory};

#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    ident: [u8; 16],
    kind: U16,
    machine: U16,
    version: U32,
    entry: U64,
    program_headers: U64,
    section_headers: U64,
    flags: U32,
    size: U16,
    program_header_size: U16,
    program_header_count: U16,
    rest: [U16; 3],
}
const _: () = assert!(size_of::<Header>() == 64);

#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ProgramHeader {
    kind: U32,
    flags: U32,
    offset: U64,
    virtual_address: U64,
    physical_address: U64,
    file_size: U64,
    memory_size: U64,
    alignment: U64,
}
const _: () = assert!(size_of::<ProgramHeader>() == 56);

const LOAD: u32 = 1;
const X86_64: u16 = 62;

/// Whether a file says that it is ELF.
pub fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7FELF")
}

/// Loads a kernel where it says that it belongs.
pub fn load(memory: &Memory, bytes: &[u8]) -> Result<Loaded, String> {
    let (entry, end) = examine(memory, bytes)?;
    let result = Elf::load(memory.as_mapped(), None, &mut Cursor::new(bytes), None);
    let result = result.map_err(|error| format!("is no kernel that can be loaded: {error}"))?;
    let entry = match result.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(address) => Entry::Pvh(address.0),
        _ => Entry::Long(entry),
    };
    Ok(Loaded { entry, end })
}

/// Checks what the loader takes for granted: a kernel may come out of a guest's disk. Returns the entry and the end.
fn examine(memory: &Memory, bytes: &[u8]) -> Result<(u64, u64), String> {
    let (header, _) = Header::read_from_prefix(bytes).map_err(|_| "is cut: it ends within its ELF header".to_owned())?;
    if header.ident[4] != 2 || header.machine.get() != X86_64 {
        return Err(format!("is for machine {}, class {}; x86-64 is 62, class 2", header.machine, header.ident[4]));
    }
    if usize::from(header.program_header_size.get()) != size_of::<ProgramHeader>() {
        return Err(format!("has program headers of {} bytes instead of 56", header.program_header_size));
    }
    let start = usize::try_from(header.program_headers.get()).ok().and_then(|start| bytes.get(start..));
    let mut rest = start.ok_or_else(|| "is cut: its program headers are past its end".to_owned())?;
    let mut taken: Vec<Range<u64>> = Vec::new();
    for number in 0..header.program_header_count.get() {
        let (segment, behind) =
            ProgramHeader::read_from_prefix(rest).map_err(|_| format!("is cut: it has no program header {number}"))?;
        rest = behind;
        let file_end = segment.offset.get().checked_add(segment.file_size.get());
        if file_end.is_none_or(|end| end > bytes.len() as u64) {
            return Err(format!("is cut: segment {number} is past its end"));
        }
        if segment.kind != LOAD {
            continue;
        }
        let size = segment.memory_size.get().max(segment.file_size.get());
        let start = segment.physical_address.get();
        let segment_end = start.checked_add(size).filter(|&end| end <= memory.size().min(GAP.start));
        if start < HIGH_START && size > 0 || segment_end.is_none() {
            let memory = memory.size();
            return Err(format!(
                "belongs at {start:#x} with {size} bytes, which is not between {HIGH_START:#x} and the end of {memory} bytes of memory"
            ));
        }
        taken.push(start..segment_end.unwrap_or(start));
    }
    taken.retain(|range| !range.is_empty());
    taken.sort_unstable_by_key(|range| range.start);
    if let Some(pair) = taken.windows(2).find(|pair| pair[0].end > pair[1].start) {
        return Err(format!("has two segments for one place, {:#x}", pair[1].start));
    }
    let end = taken.last().ok_or("has nothing to load")?.end;
    Ok((header.entry.get(), end))
}
