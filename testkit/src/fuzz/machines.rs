//! Target `machine_files`: configurations and saved states of machines, as a stranger sends them.

use std::path::Path;

use vhd_vmm::config::ConfigFile;
use vhd_vmm::memory::Memory;
use vhd_vmm::saved;

use super::input::Input;

/// Bytes of the guest's memory.
const MEMORY: u64 = 8 << 20;
/// Pieces of memory that a state can have at most.
const MAX_PIECES: usize = 2;

/// Target `machine_files`: the first byte says what the rest is: a configuration, a saved state, or the content of its sections,
/// which get right checksums.
///
/// # Panics
/// When what a configuration says is not what it is written as, or a state has more memory than the machine.
pub fn machine_files(data: &[u8]) {
    let Some((choice, data)) = data.split_first() else { return };
    match choice % 4 {
        0 => configuration(data),
        1 => drop(state(data)),
        2 => drop(state(&file(&[(*b"stat", data)]))),
        _ => {
            let (mut input, mut sections) = (Input(data), Vec::new());
            while !input.is_empty() {
                let len = input.number(2) as usize;
                // Places are multiples of 4 MiB, which is little-endian, too.
                let place = (u64::from(input.byte()) << 22).swap_bytes().to_be_bytes();
                sections.push([&place, input.take(len)].concat());
            }
            let sections: Vec<_> = sections.iter().map(|content| (*b"memo", content.as_slice())).collect();
            let bytes = file(&sections);
            if memory(&bytes[12..]) {
                assert!(sections.len() <= MAX_PIECES, "{} pieces", sections.len());
            }
        }
    }
}

fn configuration(data: &[u8]) {
    let path = Path::new("fuzzed.vmc");
    let Ok(mut file) = ConfigFile::parse(path, data) else { return };
    let _ = file.unknown();
    let Ok(config) = file.read() else { return };
    assert!(config.disks.len() <= 64 && config.reaches().len() <= 64 + 5);
    let before = file.clone();
    // Some of what can be read can't be written, as a path with spaces around.
    if file.write(&config).is_ok() {
        assert!(file.is_same(&before), "what was not changed is written otherwise");
    }
}

/// A file of these sections, with right checksums and its end.
fn file(sections: &[([u8; 4], &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    saved::write_start(&mut bytes).expect("a vector takes all");
    for (tag, content) in sections {
        saved::write_section(&mut bytes, *tag, content).expect("a vector takes all");
    }
    let count = (sections.len() as u64 + 1).swap_bytes().to_be_bytes();
    saved::write_section(&mut bytes, *b"end ", &count).expect("a vector takes all");
    bytes
}

/// Whether it is one.
fn state(mut data: &[u8]) -> bool {
    saved::read_head(&mut data).is_ok() && memory(data)
}

fn memory(mut data: &[u8]) -> bool {
    let memory = Memory::new(MEMORY).expect("memory");
    saved::read_memory(&mut data, &memory).is_ok()
}
