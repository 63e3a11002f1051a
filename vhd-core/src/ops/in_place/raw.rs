//! A raw file becomes a fixed disk: a footer is put behind it.

use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::{ConvertedInPlace, InPlaceOptions};
use crate::chain::ChainOptions;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Creator, DiskType, Footer, MAX_CREATE_SIZE, NewFooter, SECTOR, Timestamp};
use crate::intent::{self, FooterMove, InPlace, Intent, Work};
use crate::storage::{FileStorage, LockMode};

/// The footer of a fixed disk that holds these bytes.
pub(super) fn new_footer(path: &Path, len: u64) -> Result<Footer> {
    let size = len.next_multiple_of(SECTOR);
    if size == 0 || size > MAX_CREATE_SIZE {
        let message = format!("has {len} bytes, expected a file of 1 byte to 2040 GiB");
        return Err(Error::new(ErrorKind::InvalidInput, message).at(path));
    }
    let new = NewFooter {
        disk_type: DiskType::Fixed,
        size,
        uuid: Uuid::new_v4().into_bytes(),
        creator: Creator::WINDOWS_10,
        timestamp: Timestamp::now(),
    };
    Ok(Footer::new(&new))
}

/// Puts a footer behind a raw file. What is there meanwhile is the same raw file, with a sector of zeros at most.
pub(super) fn to_fixed(
    path: &Path,
    begun: Option<InPlace>,
    options: &InPlaceOptions,
    chain: &ChainOptions,
) -> Result<ConvertedInPlace> {
    let file = Arc::new(FileStorage::open(path, true)?);
    file.lock(LockMode::Write)?;
    let storage = chain.host.adopt(file);
    let resumed = begun.is_some();
    let work = match begun {
        Some(InPlace { work: Work::Footer(work), .. }) => work,
        _ => {
            intent::refuse(path, None, &[])?;
            let len = storage.len().map_err(|error| Error::io(error, "can't be examined").at(path))?;
            if !storage.can_grow() {
                let message = "is a device, which has no room for more; vhd convert makes an image of it elsewhere";
                return Err(Error::new(ErrorKind::Unsupported, message).at(path));
            }
            let footer = new_footer(path, len)?;
            FooterMove::new(len, len, footer.current_size(), &footer)
        }
    };
    let done = ConvertedInPlace { from: "raw", size: work.to, data: 0, resumed };
    if options.dry_run {
        return Ok(done);
    }
    let record = InPlace { uuid: None, work: Work::Footer(work.clone()) };
    if !resumed {
        intent::put(&*chain.host, path, &Intent::InPlace(record))?;
    }
    work.append(&*storage).map_err(|error| error.at(path))?;
    intent::remove(&*chain.host, path)?;
    Ok(done)
}
