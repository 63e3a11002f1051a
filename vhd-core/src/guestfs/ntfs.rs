//! NTFS: one bitmap for all units, believed where Windows left the volume whole and does not sleep on it.
//!
//! The crate `ntfs` reads files; what is needed here is four records of system files, each bounded, and reasons to keep
//! off, for which it has no calls.

use std::ops::Range;

use super::ntfs_record::{DATA, INDEX_ALLOCATION, INDEX_ROOT, Record, Stream, VOLUME_INFORMATION, Value, put_back, text};
use super::{FileSystem, Found, Recognised, Volume, doubt, runs, u16_at, u32_at, u64_at};

/// Records of system files.
const MFT: u64 = 0;
const LOG_FILE: u64 = 2;
const VOLUME: u64 = 3;
const ROOT: u64 = 5;
const BITMAP: u64 = 6;
/// Flags of a volume that stand for nothing undone: upgrade when mounted, mounted by NT 4, changed by chkdsk.
const HARMLESS: u16 = 0x4 | 0x8 | 0x4000;
/// Bytes of the root folder's index at most: a hundred thousand names.
const MAX_INDEX: u64 = 32 << 20;
/// Bytes of a page of the log.
const LOG_PAGE: u64 = 4096;
/// What a system that sleeps is kept in.
const SLEEPER: &str = "hiberfil.sys";
/// Units whose bits are looked at at once.
const AT_ONCE: u64 = 1 << 20;

struct Ntfs {
    unit: u64,
    units: u64,
    record: u64,
    /// Bytes from the volume's start to the first file record.
    mft: u64,
    bitmap: Stream,
}

/// Recognises NTFS by its boot sector.
pub(super) fn recognise(volume: &Volume<'_>) -> Found<Option<Recognised>> {
    let boot = volume.read(0, 512)?;
    if boot[3..11] != *b"NTFS    " {
        return Ok(None);
    }
    let open = || -> Found<Box<dyn FileSystem>> {
        let mut ntfs = Ntfs::open(&boot, volume.len())?;
        ntfs.refuse_dirty(volume)?;
        if ntfs.is_asleep(volume, &boot)? {
            return doubt("a Windows that hibernates, or was shut down with fast startup, is in it; shut it down for good");
        }
        ntfs.read_bitmap(volume)?;
        Ok(Box::new(ntfs))
    };
    Ok(Some(Recognised::system("NTFS", open())))
}

/// True when a Windows sleeps in an NTFS.
pub(super) fn sleeps(volume: &Volume<'_>) -> Found<bool> {
    let boot = volume.read(0, 512)?;
    Ok(boot[3..11] == *b"NTFS    " && Ntfs::open(&boot, volume.len())?.is_asleep(volume, &boot)?)
}

/// A size that a boot sector has in units, or as a negative power of two in bytes.
fn size_of(code: u8, unit: u64) -> u64 {
    if code <= 0x80 { u64::from(code) * unit } else { 1_u64.checked_shl(256 - u32::from(code)).unwrap_or(0) }
}

impl Ntfs {
    fn open(boot: &[u8], room: u64) -> Found<Self> {
        let sector = u64::from(u16_at(boot, 11));
        let per_unit = size_of(boot[13], 1);
        let unit = sector * per_unit;
        let total = u64_at(boot, 40);
        let record = size_of(boot[64], unit);
        let sound = sector.is_power_of_two()
            && (512..=4096).contains(&sector)
            && per_unit.is_power_of_two()
            && unit <= 2 << 20
            && matches!(record, 1024 | 2048 | 4096)
            && boot[510..512] == [0x55, 0xAA];
        if !sound {
            return doubt("its boot sector contradicts itself; chkdsk puts it right");
        }
        let (Some(len), Some(mft)) = (total.checked_mul(sector), u64_at(boot, 48).checked_mul(unit)) else {
            return doubt("its boot sector contradicts itself; chkdsk puts it right");
        };
        if len > room {
            return doubt(format!("it has {len} bytes, the place it is in {room}"));
        }
        Ok(Self { unit, units: total / per_unit, record, mft, bitmap: Stream::default() })
    }

    /// One of the system files: their records are in the first run of the table.
    fn system_file(&self, volume: &Volume<'_>, number: u64) -> Found<Record> {
        let bytes = volume.read(self.mft.saturating_add(number * self.record), self.record)?;
        Record::parse(bytes, number)
    }

    fn data_of(&self, record: &Record, what: &str) -> Found<Stream> {
        match record.value(DATA, "")? {
            Some(Value::Stream(stream)) => Ok(stream),
            _ => doubt(format!("{what} has no content; chkdsk puts it right")),
        }
    }

    fn refuse_dirty(&self, volume: &Volume<'_>) -> Found<()> {
        let Some(Value::Resident(information)) = self.system_file(volume, VOLUME)?.value(VOLUME_INFORMATION, "")? else {
            return doubt("it does not say which state it is in; chkdsk puts it right");
        };
        if !matches!(information.get(8..10), Some([1 | 3, _])) {
            return doubt("its version is not known here");
        }
        let flags = u16_at(&information, 10);
        if flags & !HARMLESS != 0 {
            return doubt(format!("dirty: it was not unmounted, or chkdsk is due (flags {flags:#x})"));
        }
        let log = self.data_of(&self.system_file(volume, LOG_FILE)?, "its log")?;
        let pages = [0, LOG_PAGE].map(|at| log.read(volume, self.unit, at, LOG_PAGE));
        let [first, second] = pages;
        if is_log_clean(&[first?, second?]) {
            return Ok(());
        }
        doubt("dirty: changes wait in its log; let Windows, or a mount for writing, finish them")
    }

    /// A system that sleeps has the state of its file systems in memory, which the disk knows nothing of.
    fn is_asleep(&self, volume: &Volume<'_>, boot: &[u8]) -> Found<bool> {
        let root = self.system_file(volume, ROOT)?;
        let index_len = size_of(boot[68], self.unit);
        let Some(number) = self.find_sleeper(volume, &root, index_len)? else { return Ok(false) };
        let table = self.data_of(&self.system_file(volume, MFT)?, "its table of files")?;
        let record = table.read(volume, self.unit, number.saturating_mul(self.record), self.record)?;
        let start = match Record::parse(record, number)?.value(DATA, "")? {
            Some(Value::Stream(stream)) if stream.len >= 4 => stream.read(volume, self.unit, 0, 4)?,
            Some(Value::Resident(value)) => value,
            _ => return Ok(false),
        };
        Ok(!start.iter().take(4).all(|byte| *byte == 0) && !start.to_ascii_lowercase().starts_with(b"wake"))
    }

    /// The number of the record that hibernation goes to, wherever the root folder's index has it.
    fn find_sleeper(&self, volume: &Volume<'_>, root: &Record, index_len: u64) -> Found<Option<u64>> {
        let Some(Value::Resident(node)) = root.value(INDEX_ROOT, "$I30")? else {
            return doubt("its root folder has no index; chkdsk puts it right");
        };
        if let Some(number) = find_in_node(&node, 16)? {
            return Ok(Some(number));
        }
        let Some(Value::Stream(stream)) = root.value(INDEX_ALLOCATION, "$I30")? else { return Ok(None) };
        if stream.len > MAX_INDEX || !matches!(index_len, 512..=65536) || index_len % 512 != 0 {
            return doubt(format!("the index of its root folder has {} bytes, more than is read here", stream.len));
        }
        for at in (0..stream.len / index_len).map(|block| block * index_len) {
            let mut node = stream.read(volume, self.unit, at, index_len)?;
            // Those that are not in use may be anything.
            if node.starts_with(b"INDX")
                && put_back(&mut node)
                && let Some(number) = find_in_node(&node, 24)?
            {
                return Ok(Some(number));
            }
        }
        Ok(None)
    }

    fn read_bitmap(&mut self, volume: &Volume<'_>) -> Found<()> {
        self.bitmap = self.data_of(&self.system_file(volume, BITMAP)?, "its bitmap")?;
        if self.bitmap.len < self.units.div_ceil(8) {
            return doubt(format!("its bitmap has {} bytes for {} units; chkdsk puts it right", self.bitmap.len, self.units));
        }
        // What it must say of itself, of the table of files, and of the boot sector.
        let own: Vec<u64> = self.bitmap.first_units().chain([0, self.mft / self.unit]).collect();
        for unit in own {
            let bits = self.bitmap.read(volume, self.unit, unit / 8, 1)?;
            if bits[0] >> (unit % 8) & 1 == 0 {
                return doubt(format!("its bitmap says that unit {unit} is free, which it is not; chkdsk puts it right"));
            }
        }
        Ok(())
    }
}

/// Looks for the file of hibernation in an index node, whose header is at `header`.
fn find_in_node(node: &[u8], header: usize) -> Found<Option<u64>> {
    let mut at = header.saturating_add(u32_at(node, header) as usize);
    while let Some(entry) = node.get(at..).filter(|rest| rest.len() >= 16) {
        let (len, key_len, is_last) = (usize::from(u16_at(entry, 8)), usize::from(u16_at(entry, 10)), entry[12] & 2 != 0);
        if is_last {
            return Ok(None);
        }
        if len < 16 {
            break;
        }
        let key = entry.get(16..16 + key_len).unwrap_or_default();
        let name_len = usize::from(key.get(64).copied().unwrap_or(0)) * 2;
        if key.get(66..66 + name_len).is_some_and(|name| text(name).eq_ignore_ascii_case(SLEEPER)) {
            return Ok(Some(u64_at(entry, 0) & 0xFFFF_FFFF_FFFF));
        }
        at += len;
    }
    doubt("the index of its root folder contradicts itself; chkdsk puts it right")
}

/// Whether the log says that nothing is left to do. Its first two pages each say how far it came; the later one counts.
fn is_log_clean(pages: &[Vec<u8>; 2]) -> bool {
    // Empty, as a driver other than Windows' own leaves it.
    if pages.iter().flatten().all(|byte| *byte == 0xFF) {
        return true;
    }
    let areas = pages.iter().filter(|page| page.starts_with(b"RSTR") || page.starts_with(b"CHKD")).filter_map(|page| {
        let at = usize::from(u16_at(page, 24));
        page.get(at..at + 48).map(|area| (u64_at(area, 0), u16_at(area, 12), u16_at(area, 14)))
    });
    // No client in it, or left on purpose.
    areas.max_by_key(|(number, ..)| *number).is_some_and(|(_, client, flags)| client == 0xFFFF || flags & 2 != 0)
}

impl FileSystem for Ntfs {
    fn free(&mut self, volume: &Volume<'_>, range: Range<u64>, push: &mut dyn FnMut(Range<u64>)) -> Found<()> {
        let (mut at, end) = (range.start / self.unit / 8 * 8, range.end.div_ceil(self.unit).min(self.units));
        while at < end {
            let units = at..(at + AT_ONCE).min(end);
            let bits = self.bitmap.read(volume, self.unit, units.start / 8, (units.end - units.start).div_ceil(8))?;
            let is_free = |unit: u64| {
                let bit = unit - units.start;
                bits[(bit / 8) as usize] >> (bit % 8) & 1 == 0
            };
            runs(units.clone(), is_free, |run| push(run.start * self.unit..run.end * self.unit));
            at = units.end;
        }
        Ok(())
    }
}
