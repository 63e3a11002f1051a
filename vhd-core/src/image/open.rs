//! Opening an image: what its footers and header say, what can be mended, where its free space is.

use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use super::background::Flusher;
use super::bat::Bat;
use super::bitmap::BitmapCache;
use super::commit::Meta;
use super::flushes::Flushes;
use super::footers::{Authority, Footers};
use super::prepare::{Mended, check_metadata, footer_place, mend, mend_fixed, scan_blocks};
use super::staged::refusal;
use super::{Image, Sparse};
use crate::error::{Error, ErrorKind, Result, fail};
use crate::format::{
    BAT_ENTRY_LEN, Batmap, DiskType, DynamicHeader, FOOTER_LEN, Footer, FooterError, Geometry, HEADER_LEN, HeaderError,
    MAX_DISK_SIZE, SECTOR,
};
use crate::layout::Layout;
use crate::sharded::ShardedCount;
use crate::storage::Storage;

/// Which of the two sizes in a footer is the disk's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SizePolicy {
    /// The current size, as Windows and everyone but Virtual PC and old QEMU do.
    #[default]
    Current,
    /// What the geometry addresses, as Virtual PC and old QEMU do.
    Geometry,
}

/// How an image is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// For writing too. Mends footers, clears tapdisk's batmap, and refuses images whose blocks overlap.
    pub writable: bool,
    /// Wrong checksums are warnings. Only for reading.
    pub tolerant: bool,
    /// Which size counts.
    pub size: SizePolicy,
    /// Opens for writing what a saved state relies on.
    pub force: bool,
    /// The saved state that relies on it, if there is one, is the caller's own: no reason to refuse.
    pub owns_saved_state: bool,
    /// How long deferred metadata may wait for the background flush; `None` leaves it to the callers' flushes.
    pub background_flush: Option<Duration>,
}

impl Default for OpenOptions {
    /// Read-only, strict; when writable, a background flush that keeps promise P5: three seconds, so that with the
    /// flush itself five are not exceeded.
    fn default() -> Self {
        Self {
            writable: false,
            tolerant: false,
            size: SizePolicy::Current,
            force: false,
            owns_saved_state: false,
            background_flush: Some(Duration::from_secs(3)),
        }
    }
}

impl Image {
    /// Opens the image in `storage`. `path` is for messages and for finding parents. Locks are the caller's.
    ///
    /// # Errors
    /// `NotVhd`, `Corrupt`, `Unsupported`, `Refused`; as the host fails. The file is as it was then.
    pub fn open(storage: Arc<dyn Storage>, path: &Path, options: &OpenOptions) -> Result<Arc<Self>> {
        let (image, mended) = open(storage, path, options).map_err(|error| error.at(path))?;
        // Opening for writing is all that the user asked for: what else it did must be said.
        mended.iter().for_each(|note| tracing::warn!("{}: {note}", path.display()));
        Ok(Self::opened(image, options))
    }

    /// As [`Self::open`], where the file is only seen as changed: what is mended there is not told.
    pub(crate) fn open_changed(storage: Arc<dyn Storage>, path: &Path, options: &OpenOptions) -> Result<Arc<Self>> {
        let (image, _) = open(storage, path, options).map_err(|error| error.at(path))?;
        Ok(Self::opened(image, options))
    }

    fn opened(image: Self, options: &OpenOptions) -> Arc<Self> {
        let image = Arc::new(image);
        if let (true, Some(interval)) = (options.writable, options.background_flush) {
            let _ = image.background.set(Flusher::new(Arc::downgrade(&image), interval));
        }
        image
    }

    /// Opens for reading what was open for writing until a change of it failed, so that nobody knows what the medium holds:
    /// every write fails, and tells of `why`.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(crate) fn open_latched(storage: Arc<dyn Storage>, path: &Path, options: &OpenOptions, why: &Error) -> Result<Arc<Self>> {
        let look = OpenOptions { writable: false, ..options.clone() };
        let (mut image, _) = open(storage, path, &look).map_err(|error| error.at(path))?;
        image.read_only = false;
        image.latch_for(why);
        Ok(Arc::new(image))
    }

    /// Refuses what [`Self::open`] for writing would, and changes nothing.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn rehearse(storage: &dyn Storage, path: &Path, options: &OpenOptions) -> Result<()> {
        let options = OpenOptions { writable: true, ..options.clone() };
        let rehearsed = examine(storage, path, &options).and_then(|(found, sparse)| {
            refuse_writing(&found, sparse.as_ref(), &options)?;
            sparse.map_or(Ok(()), |sparse| scan_blocks(storage, &sparse, &found).map(drop))
        });
        rehearsed.map_err(|error| error.at(path))
    }
}

/// What was found about a file before an [`Image`] is made of it.
pub(super) struct Found {
    pub(super) footers: Footers,
    pub(super) footer: Footer,
    pub(super) authority: Authority,
    pub(super) size: u64,
    warnings: Vec<String>,
}

/// The image, and what was mended.
fn open(storage: Arc<dyn Storage>, path: &Path, options: &OpenOptions) -> Result<(Image, Vec<String>)> {
    let (found, sparse) = examine(&*storage, path, options)?;
    let mut file_len = found.footers.file_len;
    let (mut meta, mut notes) = (Meta::default(), Vec::new());
    if options.writable {
        refuse_writing(&found, sparse.as_ref(), options)?;
        // What a killed process wrote is in the page cache only: what we read and build upon must not change
        // if the power fails.
        storage.sync().map_err(|error| Error::io(error, "can't be synced"))?;
        if let Some(sparse) = &sparse {
            let scanned = scan_blocks(&*storage, sparse, &found)?;
            let end = scanned.end.max(sparse.metadata_end(found.footers.file_len));
            let place = footer_place(scanned.are_aligned, &found.footers, end);
            meta = Meta::new(scanned.blocks, scanned.free, place);
            Mended { file_len, notes } = mend(&*storage, sparse, &found, end)?;
        } else {
            Mended { file_len, notes } = mend_fixed(&*storage, &found)?;
        }
    }
    let image = Image {
        storage,
        path: path.to_owned(),
        footer: found.footer,
        size: found.size,
        read_only: !options.writable,
        warnings: found.warnings,
        sparse,
        meta: Mutex::new(meta),
        flushes: Flushes::new(),
        completed: ShardedCount::default(),
        durable: AtomicU64::new(0),
        latch: OnceLock::new(),
        background: OnceLock::new(),
        file_len: AtomicU64::new(file_len),
    };
    Ok((image, notes))
}

/// Reads what says what the image is.
fn examine(storage: &dyn Storage, path: &Path, options: &OpenOptions) -> Result<(Found, Option<Sparse>)> {
    if options.writable && options.tolerant {
        fail!(InvalidInput, "tolerant opening is for reading only");
    }
    let mut found = find(storage, path, options)?;
    let sparse = match found.footer.disk_type() {
        DiskType::Fixed => None,
        _ => Some(open_sparse(storage, &mut found, options)?),
    };
    if sparse.is_none() {
        check_fixed(&mut found, options)?;
    }
    Ok((found, sparse))
}

/// Refuses what is not opened for writing, as far as its headers tell.
fn refuse_writing(found: &Found, sparse: Option<&Sparse>, options: &OpenOptions) -> Result<()> {
    if found.footer.saved_state() && !options.force && !options.owns_saved_state {
        fail!(
            Refused,
            "a virtual machine's saved state relies on it, so it is not opened for writing; discard that state, or use --force"
        );
    }
    sparse.map_or(Ok(()), |sparse| check_metadata(sparse, found))
}

/// Reads the footers and settles which counts and how large the disk is.
fn find(storage: &dyn Storage, path: &Path, options: &OpenOptions) -> Result<Found> {
    let footers = Footers::read(storage).map_err(|error| Error::io(error, "can't be read"))?;
    if let Some((stage, footer)) = footers.stage() {
        return Err(refusal(path, stage, &footer));
    }
    let (footer, authority) = footers.authority(options.tolerant).map_err(|error| footer_error(&footers, &error))?;
    let mut warnings = Vec::new();
    match (&footers.trailing, authority) {
        (Err(_), Authority::Copy) if footers.is_marked_by_tapdisk() => {
            warnings.push(
                "tapdisk marked the trailing footer: the image is in use there, or was not closed; the copy at its start is used"
                    .into(),
            );
        }
        (Err(error), Authority::Copy) => {
            warnings.push(format!("trailing footer is not valid ({error}); the copy at the start is used"))
        }
        (Err(error), Authority::Trailing) => warnings.push(error.to_string()),
        (Ok(_), _) => {}
    }
    if authority == Authority::Trailing && footer.disk_type() != DiskType::Fixed {
        match &footers.copy {
            Ok(copy) if *copy == footer => {}
            Ok(_) => warnings.push("the footer copy at the start differs from the trailing footer, which counts".into()),
            Err(error) => warnings.push(format!("the footer copy at the start is not valid ({error})")),
        }
    }
    if footers.trailing_is_short {
        warnings.push("the trailing footer has 511 bytes, as Virtual PC wrote before 2004".into());
    }
    let size = disk_size(&footer, options.size, &mut warnings)?;
    Ok(Found { footers, footer, authority, size, warnings })
}

fn footer_error(footers: &Footers, error: &FooterError) -> Error {
    let (kind, message) = match error {
        _ if footers.file_len < SECTOR && !footers.trailing_is_short => {
            (ErrorKind::NotVhd, format!("is no VHD: it has {} bytes, a footer alone has 512", footers.file_len))
        }
        FooterError::Cookie(found) => (
            ErrorKind::NotVhd,
            format!(
                "is no VHD: expected a footer that begins with \"conectix\" in the last 512 bytes or the first, found \"{}\"",
                found.escape_ascii()
            ),
        ),
        FooterError::Checksum { .. } => {
            (ErrorKind::Corrupt, format!("{error}; --tolerant reads it all the same, `vhd check` says more"))
        }
        FooterError::DiskType(_) | FooterError::Version(_) => (ErrorKind::Unsupported, error.to_string()),
        FooterError::DataOffset(_) => (ErrorKind::Corrupt, error.to_string()),
        FooterError::Marked(_) => (ErrorKind::Refused, error.to_string()),
    };
    Error::new(kind, message)
}

fn disk_size(footer: &Footer, policy: SizePolicy, warnings: &mut Vec<String>) -> Result<u64> {
    let (current, geometry) = (footer.current_size(), footer.geometry().size());
    // Geometry rounds down, so it is nearly always a little less: worth a word where someone goes by it.
    let goes_by_geometry = matches!(&footer.creator().app, b"vpc " | b"qemu");
    let is_usual = footer.geometry() == Geometry::for_sectors(current / SECTOR);
    if current != geometry && (goes_by_geometry || !is_usual) {
        warnings.push(format!(
            "current size is {current}, the geometry addresses {geometry} bytes, which is what Virtual PC and old QEMU show; --force-size chooses"
        ));
    }
    let size = match policy {
        SizePolicy::Current => current,
        SizePolicy::Geometry => geometry,
    };
    if size % SECTOR != 0 {
        warnings.push(format!("size {size} is not a multiple of 512; the last {} bytes are left out", size % SECTOR));
    }
    let size = size - size % SECTOR;
    if size == 0 || size > MAX_DISK_SIZE {
        fail!(Corrupt, "disk size is {size} bytes, expected 512 to {MAX_DISK_SIZE}");
    }
    Ok(size)
}

fn check_fixed(found: &mut Found, options: &OpenOptions) -> Result<()> {
    let room = found.footers.trailing_at;
    if found.size <= room {
        return Ok(());
    }
    let message = format!("fixed disk of {} bytes has only {room} before its footer; it was cut short", found.size);
    if room < SECTOR {
        fail!(Corrupt, "{message}");
    }
    if !options.tolerant {
        fail!(Corrupt, "{message}; --tolerant reads what is there");
    }
    found.warnings.push(message);
    found.size = room - room % SECTOR;
    Ok(())
}

fn open_sparse(storage: &dyn Storage, found: &mut Found, options: &OpenOptions) -> Result<Sparse> {
    let file_len = found.footers.file_len;
    let header_at = found.footer.header_offset().unwrap_or(0);
    let header = read_header(storage, header_at, found, options)?;
    let layout = Layout::new(found.size, header.block_size());
    if layout.blocks() > header.max_table_entries() {
        fail!(
            Corrupt,
            "BAT has {} entries, a disk of {} bytes needs {}",
            header.max_table_entries(),
            found.size,
            layout.blocks()
        );
    }
    let bat_end = header.bat_offset().saturating_add(u64::from(layout.blocks()) * BAT_ENTRY_LEN);
    if bat_end > file_len {
        fail!(Corrupt, "BAT ends at {bat_end:#x}, beyond the end of the file ({file_len:#x} bytes); it was cut short");
    }
    let batmap = read_batmap(storage, &found.footer, &header, file_len, options.writable)?;
    let mut metadata = vec![0..FOOTER_LEN as u64, header_at..header_at + HEADER_LEN as u64, header.bat_offset()..bat_end];
    // A payload of which only the length is known: the space around it may be sectors or bytes.
    let payloads = header.locators().filter(|locator| locator.is_used() && locator.data_length > 0);
    metadata.extend(payloads.filter_map(|locator| {
        let end = locator.data_offset.checked_add(u64::from(locator.data_length))?;
        (end <= file_len).then_some(locator.data_offset..end)
    }));
    if let Some(batmap) = &batmap {
        metadata.push(Batmap::header_offset(header.bat_offset(), header.max_table_entries())..batmap.offset() + batmap.len());
    }
    metadata.sort_by_key(|range| range.start);
    let metadata_max = metadata.iter().map(|range| range.end).max().unwrap_or(0);
    Ok(Sparse {
        bat: Bat::new(header.bat_offset(), layout.blocks()),
        bitmaps: BitmapCache::new(&layout),
        differencing: found.footer.disk_type() == DiskType::Differencing,
        header,
        layout,
        batmap,
        metadata,
        metadata_max,
        stripes: std::array::from_fn(|_| std::sync::RwLock::default()),
        grace: super::Grace::default(),
    })
}

fn read_header(storage: &dyn Storage, at: u64, found: &mut Found, options: &OpenOptions) -> Result<DynamicHeader> {
    let kind = found.footer.disk_type().name();
    let file_len = found.footers.file_len;
    if at.saturating_add(HEADER_LEN as u64) > file_len {
        fail!(Corrupt, "{kind} disk's header should be at {at:#x}, beyond the end of the file ({file_len:#x} bytes)");
    }
    let mut bytes = [0; HEADER_LEN];
    storage.read_at(&mut bytes, at).map_err(|error| Error::io(error, format!("can't be read at {at:#x}")))?;
    match DynamicHeader::parse(&bytes) {
        Err(error @ HeaderError::Checksum { .. }) if options.tolerant => {
            found.warnings.push(error.to_string());
            DynamicHeader::parse_tolerant(&bytes)
        }
        result => result,
    }
    .map_err(|error| match error {
        HeaderError::Checksum { .. } => {
            Error::new(ErrorKind::Corrupt, format!("{error}; --tolerant reads it all the same, `vhd check` says more"))
        }
        HeaderError::BlockSize(_) | HeaderError::Version(_) => Error::new(ErrorKind::Unsupported, error.to_string()),
        _ => Error::new(ErrorKind::Corrupt, format!("at {at:#x}: {error}")),
    })
}

/// tapdisk's batmap, where tapdisk made the image: elsewhere the sector after the BAT may be the bitmap of a block, and
/// what it holds is up to the guest.
fn read_batmap(
    storage: &dyn Storage,
    footer: &Footer,
    header: &DynamicHeader,
    file_len: u64,
    writable: bool,
) -> Result<Option<Batmap>> {
    let at = Batmap::header_offset(header.bat_offset(), header.max_table_entries());
    if footer.creator().app != *b"tap\0" || at.saturating_add(SECTOR) > file_len {
        return Ok(None);
    }
    let mut sector = [0; 512];
    storage.read_at(&mut sector, at).map_err(|error| Error::io(error, format!("can't be read at {at:#x}")))?;
    let batmap = Batmap::parse(&sector);
    let is_inside = |batmap: &Batmap| batmap.offset() >= at + SECTOR && batmap.offset() + batmap.len() <= file_len;
    // It can't be cleared, and when the file grows blocks would come to lie over it.
    if let Some(batmap) = batmap.as_ref().filter(|batmap| writable && !is_inside(batmap)) {
        fail!(
            Corrupt,
            "batmap of {} bytes at {:#x} is not between BAT and end of the file ({file_len:#x} bytes), so it is not opened for \
             writing; `vhd check` says more",
            batmap.len(),
            batmap.offset()
        );
    }
    Ok(batmap.filter(is_inside))
}

impl Sparse {
    /// First byte after all metadata, locators with the space that they reserve among them: no new block begins
    /// before it. What is claimed beyond the end of the file holds nothing, however far it reaches.
    pub(super) fn metadata_end(&self, file_len: u64) -> u64 {
        let bat = Batmap::header_offset(self.header.bat_offset(), self.header.max_table_entries());
        let locators = self.header.locators().filter(super::super::format::LocatorEntry::is_used);
        let locators = locators.map(|locator| locator.data_offset.saturating_add(locator.reserved_len()));
        self.metadata.iter().map(|range| range.end).chain(locators).chain([bat]).max().unwrap_or(bat).min(file_len)
    }
}
