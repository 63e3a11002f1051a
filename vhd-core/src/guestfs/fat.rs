//! FAT12, FAT16 and FAT32: a unit is free where the table has zero for it.

use std::ops::Range;

use super::{FileSystem, Found, Recognised, Volume, doubt, runs, u16_at, u32_at};

/// Units of data from which on a file system is FAT16, and FAT32.
const FAT16_UNITS: u64 = 4085;
const FAT32_UNITS: u64 = 65525;
/// The first unit of data.
const FIRST_UNIT: u64 = 2;
/// Units whose table entries are looked at at once.
const AT_ONCE: u64 = 64 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Width {
    Fat12,
    Fat16,
    Fat32,
}

struct Fat {
    width: Width,
    /// Bytes from the volume's start to each table that counts.
    tables: Vec<u64>,
    /// Bytes of one.
    table_len: u64,
    /// Bytes from the volume's start to the first unit.
    data: u64,
    unit: u64,
    /// Units of data.
    units: u64,
}

/// Recognises FAT by its boot sector.
pub(super) fn recognise(volume: &Volume<'_>) -> Found<Option<Recognised>> {
    let boot = volume.read(0, 512)?;
    let sector = u64::from(u16_at(&boot, 11));
    let looks_like = matches!(boot[0], 0xEB | 0xE9)
        && boot[510..512] == [0x55, 0xAA]
        && matches!(sector, 512 | 1024 | 2048 | 4096)
        && boot[13].is_power_of_two()
        && matches!(boot[16], 1 | 2)
        && u16_at(&boot, 14) > 0
        && boot[21] >= 0xF0;
    if !looks_like {
        return Ok(None);
    }
    let fat = match Fat::open(volume, &boot, sector) {
        Ok(fat) => fat,
        Err(problem) => return Ok(Some(Recognised::system("FAT", Err(problem)))),
    };
    let name = match fat.width {
        Width::Fat12 => "FAT12",
        Width::Fat16 => "FAT16",
        Width::Fat32 => "FAT32",
    };
    let system = fat.clean(volume, &boot).map(|()| Box::new(fat) as Box<dyn FileSystem>);
    Ok(Some(Recognised::system(name, system)))
}

impl Fat {
    fn open(volume: &Volume<'_>, boot: &[u8], sector: u64) -> Found<Self> {
        let (short, long) = (|at| u64::from(u16_at(boot, at)), |at| u64::from(u32_at(boot, at)));
        let or_long = |short: u64, long: u64| if short > 0 { short } else { long };
        let (reserved, copies) = (short(14), u64::from(boot[16]));
        let table_sectors = or_long(short(22), long(36));
        let total = or_long(short(19), long(32));
        let root = (short(17) * 32).div_ceil(sector);
        let front = reserved + copies * table_sectors + root;
        let unit_sectors = u64::from(boot[13]);
        let Some(units) = total.checked_sub(front).map(|data| data / unit_sectors).filter(|units| *units > 0) else {
            return doubt(format!("it has {total} sectors, {front} of them before its data"));
        };
        if total * sector > volume.len() {
            return doubt(format!("it has {} bytes, the place it is in {}", total * sector, volume.len()));
        }
        let width = match units {
            0..FAT16_UNITS => Width::Fat12,
            FAT16_UNITS..FAT32_UNITS => Width::Fat16,
            _ => Width::Fat32,
        };
        if (width == Width::Fat32) != (short(22) == 0) || (width == Width::Fat32 && short(42) != 0) {
            return doubt(format!("its boot sector contradicts its {units} units"));
        }
        let table_len = table_sectors * sector;
        // Of FAT32 one table may be the only one that is kept up to date.
        let flags = if width == Width::Fat32 { short(40) } else { 0 };
        let kept = if flags & 0x80 == 0 { 0..copies } else { flags & 0xF..(flags & 0xF) + 1 };
        if kept.end > copies {
            return doubt(format!("table {} of {copies} is the one in use", kept.start));
        }
        let tables = kept.map(|copy| reserved * sector + copy * table_len).collect();
        let fat = Self { width, tables, table_len, data: front * sector, unit: unit_sectors * sector, units };
        if fat.entry_end(FIRST_UNIT + units) > table_len {
            return doubt(format!("its table of {table_len} bytes has no room for {units} units"));
        }
        Ok(fat)
    }

    /// Says why the file system is not in the state in which it was left by who unmounted it.
    fn clean(&self, volume: &Volume<'_>, boot: &[u8]) -> Found<()> {
        let state = if self.width == Width::Fat32 { boot[65] } else { boot[37] };
        let first = self.entries(volume, self.tables[0], 0..FIRST_UNIT)?;
        let unmounted = match self.width {
            Width::Fat12 => true,
            Width::Fat16 => first[1] & 0xC000 == 0xC000,
            Width::Fat32 => first[1] & 0x0C00_0000 == 0x0C00_0000,
        };
        if first[0] & 0xFF != u32::from(boot[21]) {
            return doubt("its table does not begin with its kind of medium");
        }
        match state & 3 == 0 && unmounted {
            true => Ok(()),
            false => doubt("dirty: it was not unmounted; let its system, or fsck.fat, put it right first"),
        }
    }

    /// The end of an entry in a table, in bytes.
    fn entry_end(&self, end: u64) -> u64 {
        match self.width {
            Width::Fat12 => (end * 3).div_ceil(2),
            Width::Fat16 => end * 2,
            Width::Fat32 => end * 4,
        }
    }

    fn entries(&self, volume: &Volume<'_>, table: u64, units: Range<u64>) -> Found<Vec<u32>> {
        let start = match self.width {
            Width::Fat12 => units.start * 3 / 2,
            _ => self.entry_end(units.start),
        };
        let end = self.entry_end(units.end).min(self.table_len);
        let bytes = volume.read(table + start, end - start)?;
        let entry = |unit: u64| match self.width {
            Width::Fat12 => {
                let pair = u16_at(&bytes, (unit * 3 / 2 - start) as usize);
                u32::from(if unit % 2 == 0 { pair & 0xFFF } else { pair >> 4 })
            }
            Width::Fat16 => u32::from(u16_at(&bytes, (unit * 2 - start) as usize)),
            Width::Fat32 => u32_at(&bytes, (unit * 4 - start) as usize) & 0x0FFF_FFFF,
        };
        Ok(units.map(entry).collect())
    }
}

impl FileSystem for Fat {
    fn free(&mut self, volume: &Volume<'_>, range: Range<u64>, push: &mut dyn FnMut(Range<u64>)) -> Found<()> {
        let unit_at = |at: u64| (at.saturating_sub(self.data) / self.unit).min(self.units) + FIRST_UNIT;
        let (mut at, end) = (unit_at(range.start), unit_at(range.end.next_multiple_of(self.unit).saturating_add(self.unit)));
        while at < end {
            let units = at..(at + AT_ONCE).min(end);
            let entries = self.entries(volume, self.tables[0], units.clone())?;
            for table in &self.tables[1..] {
                if self.entries(volume, *table, units.clone())? != entries {
                    return doubt("its two tables differ; let its system, or fsck.fat, put it right first");
                }
            }
            let place = |unit: u64| self.data + (unit - FIRST_UNIT) * self.unit;
            let is_free = |unit: u64| entries[(unit - units.start) as usize] == 0;
            runs(units.clone(), is_free, |run| push(place(run.start)..place(run.end)));
            at = units.end;
        }
        Ok(())
    }
}
