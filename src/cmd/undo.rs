//! `vhd undo`

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, Subcommand};
use serde::Serialize;
use vhd_core::chain::{ChainOptions, UndoMember};
use vhd_core::image::{Image, OpenOptions};
use vhd_core::ops::undo::{self, Status};
use vhd_core::storage::FileStorage;
use vhd_core::{Error, ErrorKind};

use super::{ChainArgs, merge};
use crate::output::{Answer, Context, ShownPath, from_here, goes_on};

/// Arguments of `vhd undo`.
#[derive(Debug, Args)]
pub struct UndoArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make an undo disk for each image: from now on write to that
    Start(ChangeArgs),
    /// Say whether there are changes; exit status 1 when there are
    Status(SessionArgs),
    /// Move what was written into the images: into all of them, or none
    Commit(ChangeArgs),
    /// Throw what was written away: of all images, or none
    Discard(ChangeArgs),
}

#[derive(Debug, Args)]
struct SessionArgs {
    /// The images, which are one session
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// The folder of the undo disks: beside each image by default
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Go on although children of an image or of its undo disk are lost
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    open: ChainArgs,
}

#[derive(Debug, Args)]
struct ChangeArgs {
    #[command(flatten)]
    session: SessionArgs,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
}

/// One entry of the JSON of `vhd undo`.
#[derive(Serialize)]
struct Document<'a> {
    path: ShownPath<'a>,
    undo: Option<ShownPath<'a>>,
    session: Option<String>,
    /// Bytes of the disk that were written.
    changed: u64,
    /// Undo disks that the session lacks.
    missing: Vec<ShownPath<'a>>,
    committing: bool,
}

impl UndoArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        match &self.action {
            Action::Start(args) => args.start(context),
            Action::Status(args) => args.status(context),
            Action::Commit(args) => args.commit(context),
            Action::Discard(args) => args.discard(context),
        }
    }
}

impl SessionArgs {
    fn status(&self, context: &Context) -> Result<Answer, Error> {
        let states = undo::status(&self.images, self.dir.as_deref(), &self.open.options(false, false))?;
        // While a commit is under way the image may be none for a moment.
        let settled = self.images.iter().zip(&states).filter(|(_, state)| !state.committing);
        settled.map(|(image, _)| image).try_for_each(|image| refuse_other(image))?;
        let text: String = states.iter().map(text).collect();
        context.print(&text, &documents(&states))?;
        let pending = states.iter().any(|state| state.changed > 0 || state.committing || !state.missing.is_empty());
        Ok(if pending { Answer::No } else { Answer::Yes })
    }

    fn states(&self, chain: &ChainOptions) -> Result<Vec<Status>, Error> {
        undo::status(&self.images, self.dir.as_deref(), chain)
    }
}

impl ChangeArgs {
    fn start(&self, context: &Context) -> Result<Answer, Error> {
        let SessionArgs { images, dir, force, open } = &self.session;
        let (chain, dir) = (open.options(false, *force), dir.as_deref());
        if self.dry_run {
            let session = undo::plan_start(images, dir, &chain)?;
            let made = |member: &UndoMember| format!("would make {}\n", from_here(&member.undo));
            let mut states = self.session.states(&chain)?;
            for (state, member) in states.iter_mut().zip(&session.members) {
                state.undo = Some(member.undo.clone());
            }
            context.print(&session.members.iter().map(made).collect::<String>(), &documents(&states))?;
            return Ok(Answer::Yes);
        }
        let (session, notes) = undo::start(images, dir, &chain)?;
        notes.iter().for_each(|note| context.note(note));
        let text: String = session.members.iter().map(|member| format!("{}\n", from_here(&member.undo))).collect();
        context.print(&text, &documents(&self.session.states(&chain)?))?;
        Ok(Answer::Yes)
    }

    fn commit(&self, context: &Context) -> Result<Answer, Error> {
        let SessionArgs { images, dir, force, open } = &self.session;
        let (chain, dir) = (open.options(false, *force), dir.as_deref());
        if self.dry_run {
            let plans = undo::plan_commit(images, dir, *force, &chain)?;
            let text: String = plans.iter().map(|plan| merge::text(plan, false)).collect();
            let documents: Vec<_> = plans.iter().map(|plan| merge::document(plan, false)).collect();
            context.print(&text, &documents)?;
            return Ok(Answer::Yes);
        }
        let committed = context.with_progress("undo commit", |progress| undo::commit(images, dir, *force, &chain, progress));
        committed.map_err(|error| goes_on(error, &images[0]))?;
        context.print("", &documents(&self.session.states(&chain)?))?;
        Ok(Answer::Yes)
    }

    fn discard(&self, context: &Context) -> Result<Answer, Error> {
        let SessionArgs { images, dir, force, open } = &self.session;
        let (chain, dir) = (open.options(false, *force), dir.as_deref());
        if self.dry_run {
            let removed = undo::plan_discard(images, dir, *force, &chain)?;
            let states = self.session.states(&chain)?;
            let changed: u64 = states.iter().map(|state| state.changed).sum();
            let mut text: String = removed.iter().map(|undo| format!("would remove {}\n", from_here(undo))).collect();
            let _ = writeln!(text, "  {changed} changed bytes would be given up");
            context.print(&text, &documents(&states))?;
            return Ok(Answer::Yes);
        }
        undo::discard(images, dir, *force, &chain)?;
        context.print("", &documents(&self.session.states(&chain)?))?;
        Ok(Answer::Yes)
    }
}

/// Refuses what is no VHD: that it has no undo disk is no answer. A lock is not asked for, nor is a damaged image refused, for
/// this is about what is beside it.
fn refuse_other(image: &Path) -> Result<(), Error> {
    let look = OpenOptions { tolerant: true, ..OpenOptions::default() };
    match Image::open(Arc::new(FileStorage::open(image, false)?), image, &look) {
        Err(error) if error.kind() == ErrorKind::NotVhd => Err(error),
        _ => Ok(()),
    }
}

fn documents(states: &[Status]) -> Vec<Document<'_>> {
    fn document(state: &Status) -> Document<'_> {
        Document {
            path: ShownPath(&state.image),
            undo: state.undo.as_deref().map(ShownPath),
            session: state.session.as_ref().map(|session| session.id.to_string()),
            changed: state.changed,
            missing: state.missing.iter().map(|path| ShownPath(path)).collect(),
            committing: state.committing,
        }
    }
    states.iter().map(document).collect()
}

fn text(state: &Status) -> String {
    let image = from_here(&state.image);
    let mut text = String::new();
    let _ = match &state.undo {
        _ if state.committing => writeln!(text, "{image}: a commit was interrupted: finish it with vhd undo commit"),
        None => writeln!(text, "{image}: no undo disk"),
        Some(undo) if state.changed == 0 => writeln!(text, "{image}: nothing changed in {}", from_here(undo)),
        Some(undo) => writeln!(text, "{image}: {} bytes changed in {}", state.changed, from_here(undo)),
    };
    for missing in &state.missing {
        let _ = writeln!(text, "  its session lacks {}: it can only be discarded", from_here(missing));
    }
    text
}
