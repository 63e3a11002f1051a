//! Memory in a saved state: pieces of 4 MiB, without their pages of zeros.

use std::io;

use rayon::prelude::*;

use crate::memory::Memory;

const PIECE: u64 = 4 << 20;
const PAGE: usize = 4096;
/// Bits that say which pages of a piece are there.
const MAP: usize = PIECE as usize / PAGE / 8;
/// Pieces that are read at once.
const BATCH: usize = 8;

/// Gives the content of each piece that is not all zeros to `write`, in order. Returns how many there were.
pub fn save(memory: &Memory, mut write: impl FnMut(Vec<u8>) -> io::Result<()>) -> io::Result<u64> {
    let pieces = memory.ranges().into_iter().flat_map(|range| {
        let len = range.end - range.start;
        (0..len.div_ceil(PIECE)).map(move |piece| (range.start + piece * PIECE, PIECE.min(len - piece * PIECE)))
    });
    let pieces: Vec<_> = pieces.collect();
    let mut written = 0;
    for batch in pieces.chunks(BATCH) {
        let contents: Vec<_> = batch.par_iter().map(|&(start, len)| content_of(memory, start, len)).collect();
        for content in contents {
            if let Some(content) = content? {
                write(content)?;
                written += 1;
            }
        }
    }
    Ok(written)
}

fn content_of(memory: &Memory, start: u64, len: u64) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; len as usize];
    memory.read(start, &mut bytes).map_err(io::Error::other)?;
    let mut content = [&start.to_le_bytes()[..], &[0; MAP]].concat();
    for (number, page) in bytes.chunks(PAGE).enumerate().filter(|(_, page)| page.iter().any(|byte| *byte != 0)) {
        content[8 + number / 8] |= 1 << (number % 8);
        content.extend_from_slice(page);
    }
    Ok((content.len() > 8 + MAP).then_some(content))
}

/// Puts a piece into memory that is all zeros. Returns where it begins.
pub fn restore(memory: &Memory, content: &[u8]) -> io::Result<u64> {
    let wrong = |what| io::Error::new(io::ErrorKind::InvalidData, what);
    let (start, rest) = content.split_first_chunk::<8>().ok_or_else(|| wrong("has a piece of memory without a place"))?;
    let (map, pages) = rest.split_at_checked(MAP).ok_or_else(|| wrong("has a piece of memory that is cut"))?;
    let start = u64::from_le_bytes(*start);
    // So there are no more pieces than memory has room for.
    if !start.is_multiple_of(PIECE) || pages.is_empty() {
        return Err(wrong("has a piece of memory that no save makes"));
    }
    let mut pages = pages.chunks(PAGE);
    let set = (0..MAP * 8).filter(|number| map[number / 8] & 1 << (number % 8) != 0);
    for number in set {
        let page = pages.next().ok_or_else(|| wrong("has a piece of memory that is cut"))?;
        let address = start.checked_add((number * PAGE) as u64);
        let written = address.is_some_and(|address| memory.write(address, page).is_ok());
        if !written {
            return Err(wrong("has memory that the machine has not"));
        }
    }
    if pages.next().is_some() {
        return Err(wrong("has a piece of memory that is too long"));
    }
    Ok(start)
}
