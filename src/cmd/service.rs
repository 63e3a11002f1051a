//! What a server and a mount have in common.

use std::path::Path;

use vhd_core::Result;
use vhd_service::events::Events;
use vhd_service::space::{Change, Watch};

use crate::sizes;

/// The name of an image's disk where the user gave none: its file's, without the ending.
pub fn name_of(image: &Path) -> String {
    image.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// Tells of it when a volume has fewer than `low` bytes free, and when it has room again.
pub fn watch(low: u64, events: &Events) -> Result<Watch> {
    let events = events.clone();
    Watch::start(low, move |path, change, space| {
        let (subject, room) = (path.to_string_lossy(), sizes::show(space.free));
        match change {
            Change::Low => events.warn("low-space", subject, format!("its volume has {room} left; writes fail when it is full")),
            Change::Back => events.note("space-back", subject, format!("its volume has {room} again")),
        }
    })
}
