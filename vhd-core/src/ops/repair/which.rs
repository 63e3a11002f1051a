//! Which footer counts, where more or less of each is left, and the size of the disk.

use uuid::Uuid;

use super::Repairer;
use crate::error::Result;
use crate::format::{
    Creator, DiskType, FOOTER_COOKIE, FOOTER_LEN, Footer, Geometry, MAX_DISK_SIZE, NewFooter, SECTOR, Timestamp,
};
use crate::image::{Authority, Footers};

use super::footers::USUAL_HEADER;

/// What a disk may have.
fn is_size(size: u64) -> bool {
    (SECTOR..=MAX_DISK_SIZE).contains(&size)
}

impl Repairer<'_> {
    /// The footer that counts: a valid one, one of which only bytes are wrong that do not matter, one whose fields can be put
    /// right, or one made of what the header says.
    pub(super) fn footer(&mut self, footers: &Footers) -> Result<Option<(Footer, Authority)>> {
        if let Ok((footer, authority)) = footers.authority(false) {
            return Ok(Some(self.instead_of_fixed(footers, &footer)?.unwrap_or((footer, authority))));
        }
        if let Ok((footer, authority)) = footers.authority(true)
            && is_beyond_doubt(&footer, footers)
        {
            return Ok(Some((footer, authority)));
        }
        if !self.may_lose() {
            return Ok(None);
        }
        match self.salvaged(footers)? {
            Some(found) => Ok(Some(found)),
            None => self.made_anew(),
        }
    }

    /// The copy, where the trailing footer says that the disk is fixed, and everything else that it is not.
    fn instead_of_fixed(&mut self, footers: &Footers, footer: &Footer) -> Result<Option<(Footer, Authority)>> {
        let is_short = footer.disk_type() == DiskType::Fixed && footer.current_size() > footers.trailing_at;
        let Some(copy) = footers.copy.as_ref().ok().filter(|copy| copy.disk_type() != DiskType::Fixed) else { return Ok(None) };
        if !self.may_lose() || !is_short || copy.uuid() != footer.uuid() || self.header_at(USUAL_HEADER)?.is_none() {
            return Ok(None);
        }
        self.lose(format!("the trailing footer, which calls the disk fixed; it is taken to be {}", copy.disk_type().name()));
        Ok(Some((copy.clone(), Authority::Copy)))
    }

    /// The better one of both footers, with fields put right that can't be.
    fn salvaged(&mut self, footers: &Footers) -> Result<Option<(Footer, Authority)>> {
        let header = self.header_at(USUAL_HEADER)?.map(|header| match header.parent_uuid() {
            [0, ..] if header.parent_uuid() == [0; 16] => DiskType::Dynamic,
            _ => DiskType::Differencing,
        });
        let both = [(footers.trailing_bytes(), Authority::Trailing), (footers.copy_bytes(), Authority::Copy)];
        let found = both.into_iter().filter_map(|(bytes, authority)| {
            let (footer, wrong) = Footer::salvage(bytes, header, footers.trailing_at)?;
            // The first sector of a fixed disk is a guest's.
            let is_footer = authority == Authority::Trailing || footer.disk_type() != DiskType::Fixed;
            is_footer.then_some((footer, authority, wrong))
        });
        // Of two alike the trailing one counts.
        let Some((footer, authority, wrong)) =
            found.min_by_key(|(footer, _, wrong)| wrong.len() + usize::from(!is_size(footer.current_size())))
        else {
            return Ok(None);
        };
        let place = if authority == Authority::Trailing { "trailing footer" } else { "footer copy at the start" };
        self.lose(format!("no footer is sound: what the {place} says is taken as it is"));
        wrong.into_iter().for_each(|wrong| self.lose(wrong));
        Ok(Some((footer, authority)))
    }

    /// A footer made of what the header says.
    fn made_anew(&mut self) -> Result<Option<(Footer, Authority)>> {
        let Some(header) = self.header_at(USUAL_HEADER)? else { return Ok(None) };
        let size = (u64::from(header.max_table_entries()) * u64::from(header.block_size())).min(MAX_DISK_SIZE);
        let disk_type = if header.parent_uuid() == [0; 16] { DiskType::Dynamic } else { DiskType::Differencing };
        let uuid = Uuid::new_v4();
        self.change(format!("both footers made anew: a {} disk of {size} bytes", disk_type.name()));
        self.lose(format!(
            "the image's UUID (now {uuid}, so children will not find it), its creator, and its exact size: {size} bytes is what its BAT has room for"
        ));
        let new =
            NewFooter { disk_type, size, uuid: uuid.into_bytes(), creator: Creator::WINDOWS_10, timestamp: Timestamp::now() };
        Ok(Some((Footer::new(&new), Authority::Copy)))
    }

    /// A size that can't be becomes what can.
    pub(super) fn right_size(&mut self, footers: &Footers, footer: &mut Footer) -> Result<()> {
        let (size, original) = (footer.current_size(), footer.original_size());
        let is_fixed = footer.disk_type() == DiskType::Fixed;
        let room = if is_fixed { Some(footers.trailing_at - footers.trailing_at % SECTOR) } else { self.room_of_table(footer)? };
        let fits = |size: u64| is_size(size) && size % SECTOR == 0 && room.is_none_or(|room| size <= room);
        // A file that was cut has the geometry of its disk still; a size that was damaged has not.
        let is_witnessed = size == original || footer.geometry() == Geometry::for_sectors(size / SECTOR);
        let is_nonsense = !is_size(size) || (is_fixed && room.is_some_and(|room| size > room) && !is_witnessed);
        let right = match room {
            _ if !is_nonsense => size - size % SECTOR,
            Some(room) if is_fixed => room,
            _ if fits(original) => original,
            Some(room) => room.min(MAX_DISK_SIZE),
            None => size.min(MAX_DISK_SIZE),
        };
        if right != size && is_size(right) {
            footer.set_size(right);
            self.change(format!("the size made {right} bytes"));
            self.lose(format!("the size was {size} bytes, of which {right} can be"));
        }
        Ok(())
    }

    /// Bytes that the BAT has entries for, where there is a header.
    fn room_of_table(&self, footer: &Footer) -> Result<Option<u64>> {
        let named = footer.header_offset().map_or(Ok(None), |at| self.header_at(at))?;
        let header = if named.is_some() { named } else { self.header_at(USUAL_HEADER)? };
        Ok(header.map(|header| u64::from(header.max_table_entries()) * u64::from(header.block_size())))
    }

    /// A fixed disk: all there is is its footer.
    pub(super) fn fixed(&mut self, footers: &Footers, footer: &Footer) -> Result<()> {
        let size = footer.current_size();
        let mut at = footers.trailing_at;
        if size > at {
            // On a device there is no more room; and a footer alone is no disk that was cut.
            if !self.may_lose() || !self.can_grow() || !is_size(size) || at == 0 {
                return Ok(());
            }
            self.fill(0, at..footers.file_len)?;
            self.lose(format!("the last {} bytes of the disk are beyond the end of the file, and read as zeros", size - at));
            self.change("the file made as long as the disk");
            at = size;
        }
        let mut found = vec![0; FOOTER_LEN];
        let there = self.len()?.saturating_sub(at).min(SECTOR) as usize;
        self.read(&mut found[..there], at)?;
        if found != footer.to_bytes() || at + SECTOR != self.len()? {
            if at + SECTOR != self.len()? {
                self.set_len(at + SECTOR)?;
            }
            self.write(&footer.to_bytes(), at)?;
            self.change("the trailing footer written");
        }
        Ok(())
    }
}

/// True when only bytes of a footer can be wrong that do not matter: what its size is, another field says too.
fn is_beyond_doubt(footer: &Footer, footers: &Footers) -> bool {
    let size = footer.current_size();
    let both = [footers.trailing_bytes(), footers.copy_bytes()];
    let says_the_same = |bytes: &&[u8; FOOTER_LEN]| {
        bytes.starts_with(&FOOTER_COOKIE)
            && Footer::parse_tolerant(bytes)
                .is_ok_and(|other| other.current_size() == size && other.header_offset() == footer.header_offset())
    };
    let is_witnessed = footer.original_size() == size
        || footer.geometry() == Geometry::for_sectors(size / SECTOR)
        || both.iter().filter(|bytes| says_the_same(bytes)).count() == 2;
    let fits = footer.disk_type() != DiskType::Fixed || size <= footers.trailing_at;
    is_size(size) && size % SECTOR == 0 && is_witnessed && fits
}
