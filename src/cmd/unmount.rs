//! `vhd unmount`

use std::path::{Path, PathBuf};

use clap::Args;
use vhd_core::chain::{Chain, UndoSession};
use vhd_core::ops::undo;
use vhd_core::{Error, ErrorKind};

use super::ChainArgs;
use crate::output::{Answer, Context, ShownPath};

/// Arguments of `vhd unmount`.
#[derive(Debug, Args)]
pub struct UnmountArgs {
    /// The folder or file that was given to vhd mount
    target: PathBuf,
    /// Then move what was written with --undo into the image
    #[arg(long, conflicts_with = "discard")]
    commit: bool,
    /// Then throw away what was written with --undo
    #[arg(long)]
    discard: bool,
    /// Do not ask the process that serves it: what that has not written is lost
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    open: ChainArgs,
}

impl UnmountArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        let ends_session = self.commit || self.discard;
        if ends_session {
            let shown = vhd_fuse::image_at(&self.target)?;
            if shown.extension().is_none_or(|extension| extension != "vud") {
                let message = "was not mounted with --undo, so there is nothing to commit or discard";
                return Err(Error::new(ErrorKind::InvalidInput, message).at(&self.target));
            }
        }
        let unmounted = vhd_fuse::unmount(&self.target, self.force, &mut |note| context.note(note))?;
        if ends_session {
            self.end_session(&unmounted.image, context)?;
        }
        context.print("", &serde_json::json!({ "target": ShownPath(&self.target), "image": ShownPath(&unmounted.image) }))?;
        Ok(Answer::Yes)
    }

    fn end_session(&self, undo_disk: &Path, context: &Context) -> Result<(), Error> {
        let chain = self.open.options(false, false);
        let session = UndoSession::of(&*Chain::open_image(undo_disk, &chain)?)?;
        let Some(session) = session else {
            return Err(Error::new(ErrorKind::InvalidInput, "is no undo disk: it names no session").at(undo_disk));
        };
        let images: Vec<_> = session.members.iter().map(|member| member.image.clone()).collect();
        let dir = undo_disk.parent();
        if self.discard {
            undo::discard(&images, dir, false, &chain)?;
            return Ok(());
        }
        context.with_progress("undo commit", |progress| undo::commit(&images, dir, false, &chain, progress))
    }
}
