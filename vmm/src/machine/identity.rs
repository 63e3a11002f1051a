//! Which disks a saved guest belongs to: by what they are, not by their paths.

use std::time::UNIX_EPOCH;

use crc::{CRC_32_ISO_HDLC, Crc};
use vhd_core::chain::Layer;
use vhd_core::format::DiskType;
use vhd_core::storage::Storage;
use vhd_core::{Error, ErrorKind};

use super::MachineDisk;
use crate::saved::{DiskIdentity, LayerIdentity};

/// Bytes at the start of a leaf that hold its footer's copy, its header and most of its BAT.
const METADATA: u64 = 4 << 20;
/// Where a footer has the note that a saved state relies on it, which comes and goes with that, and its checksum.
const SAVED_STATE: usize = 84;
const CHECKSUM: std::ops::Range<usize> = 64..68;

/// Makes everything durable that was written, and tells what each disk is then.
pub fn settle(disks: &[MachineDisk]) -> Result<Vec<DiskIdentity>, Error> {
    disks.iter().map(identity_of).collect()
}

/// The UUID of each disk's leaf.
pub fn leaves(disks: &[MachineDisk]) -> Result<Vec<[u8; 16]>, Error> {
    let uuid = |layer: &Layer| layer.image().map_or([0; 16], |image| image.footer().uuid());
    disks.iter().map(|disk| disk.live.with_chain(|chain| Ok(chain.layers().first().map_or([0; 16], uuid)))).collect()
}

fn identity_of(disk: &MachineDisk) -> Result<DiskIdentity, Error> {
    let handle = disk.live.disk();
    handle.close()?;
    let layers = disk.live.with_chain(|chain| chain.layers().iter().map(layer_of).collect::<Result<Vec<_>, _>>())?;
    Ok(DiskIdentity { size: handle.size(), layers })
}

fn layer_of(layer: &Layer) -> Result<LayerIdentity, Error> {
    let (path, footer) = (layer.path(), layer.image().map(|image| image.footer()));
    let failed = |error| Error::io(error, "can't be examined").at(path);
    // The file that is open, whatever its name leads to by now.
    let Some(file) = layer.file() else {
        return Err(Error::new(ErrorKind::Unsupported, "is no file of this host, so no saved state can rely on it").at(path));
    };
    let modified = file.modified()?.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    // A fixed disk has no metadata at its start; its footer is where the file ends.
    let is_sparse = footer.is_some_and(|footer| footer.disk_type() != DiskType::Fixed);
    let end = file.len().map_err(failed)?;
    // Of two footers one is enough.
    let range = if is_sparse { 0..METADATA.min(end.saturating_sub(512)) } else { end.saturating_sub(512)..end };
    let mut bytes = vec![0; (range.end - range.start) as usize];
    file.read_at(&mut bytes, range.start).map_err(failed)?;
    if bytes.starts_with(b"conectix") && bytes.len() > SAVED_STATE {
        bytes[CHECKSUM].fill(0);
        bytes[SAVED_STATE] = 0;
    }
    Ok(LayerIdentity {
        uuid: footer.map_or([0; 16], |footer| footer.uuid()),
        metadata: Crc::<u32>::new(&CRC_32_ISO_HDLC).checksum(&bytes),
        file_size: end,
        modified,
    })
}

/// Refuses disks that are not those that the guest was saved with, as they were.
pub fn check(saved: &[DiskIdentity], here: &[DiskIdentity], disks: &[MachineDisk]) -> Result<(), Error> {
    if saved.len() != here.len() {
        let message = format!("the guest was saved with {} disks, and here are {}", saved.len(), here.len());
        return Err(Error::new(ErrorKind::Refused, message));
    }
    for ((was, is), disk) in saved.iter().zip(here).zip(disks) {
        let leaf = |identity: &DiskIdentity| identity.layers.first().map(|layer| layer.uuid);
        let what = if leaf(was) != leaf(is) || was.size != is.size {
            "is another disk than the one that the guest was saved with"
        } else if was != is {
            "was changed since the guest was saved, or a parent of it"
        } else {
            continue;
        };
        let message = format!("{what}: going on would destroy what is on it; discard the saved state, or bring the disk back");
        return Err(Error::new(ErrorKind::Refused, message).at(&disk.live.leaf()));
    }
    Ok(())
}
