//! Linux swap areas: but for the header all of one is free. One with a hibernated system in it has another signature.

use std::ops::Range;

use super::{FileSystem, Found, Recognised, Volume, doubt, u32_at};

/// Sizes of a page on the machines that Linux runs on. The signature ends the first page.
const PAGES: [u64; 5] = [4096, 8192, 16384, 32768, 65536];
const SIGNATURE_LEN: u64 = 10;
const SIGNATURE: &[u8] = b"SWAPSPACE2";
/// Where the header begins.
const HEADER: u64 = 1024;

struct Swap {
    free: Range<u64>,
}

/// Recognises a swap area.
pub(super) fn recognise(volume: &Volume<'_>) -> Found<Option<Recognised>> {
    for page in PAGES.into_iter().filter(|page| *page <= volume.len()) {
        let signature = volume.read(page - SIGNATURE_LEN, SIGNATURE_LEN)?;
        if signature == SIGNATURE {
            let system = open(volume, page).map(|swap| Box::new(swap) as Box<dyn FileSystem>);
            return Ok(Some(Recognised::system("swap", system)));
        }
    }
    Ok(None)
}

fn open(volume: &Volume<'_>, page: u64) -> Found<Swap> {
    let header = volume.read(HEADER, 8)?;
    let (version, last_page) = (u32_at(&header, 0), u64::from(u32_at(&header, 4)));
    if version != 1 {
        return doubt(format!("its header has version {version}, expected 1"));
    }
    let end = (last_page + 1) * page;
    if end > volume.len() {
        return doubt(format!("it ends at byte {end}, beyond the {} bytes it has", volume.len()));
    }
    Ok(Swap { free: page..end })
}

impl FileSystem for Swap {
    fn free(&mut self, _: &Volume<'_>, range: Range<u64>, push: &mut dyn FnMut(Range<u64>)) -> Found<()> {
        push(range.start.max(self.free.start)..range.end.min(self.free.end).max(range.start.max(self.free.start)));
        Ok(())
    }
}
