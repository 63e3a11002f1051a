//! `vhd reparent`

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use uuid::Uuid;
use vhd_core::Error;
use vhd_core::ops::reparent::{find_parent, reparent};

use super::ChainArgs;
use crate::output::{Answer, Context, ShownPath, from_here};

/// Arguments of `vhd reparent`.
#[derive(Debug, Args)]
pub struct ReparentArgs {
    /// The image whose parent is elsewhere now
    child: PathBuf,
    /// The parent: a VHD, or a raw file. Without it that is looked for by its UUID, beside the child and in --parent-dir
    parent: Option<PathBuf>,
    /// Take a parent with another UUID or a larger size: the child then shows another content
    #[arg(long)]
    force: bool,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    open: ChainArgs,
}

/// The JSON of `vhd reparent`.
#[derive(Serialize)]
struct Document<'a> {
    path: ShownPath<'a>,
    parent: ShownPath<'a>,
    parent_uuid_before: String,
    parent_uuid: String,
    locators: Vec<LocatorDocument<'a>>,
    notes: &'a [String],
    done: bool,
}

#[derive(Serialize)]
struct LocatorDocument<'a> {
    code: &'a str,
    path: &'a str,
}

impl ReparentArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        let chain = self.open.options(false, self.force);
        let parent = self.parent.clone().map_or_else(|| find_parent(&self.child, &chain), Ok)?;
        let reparented = reparent(&self.child, &parent, self.force, self.dry_run, &chain)?;
        for note in &reparented.notes {
            context.note(&format!("{}: {note}", self.child.display()));
        }
        let [before, now] = reparented.uuids.map(|uuid| Uuid::from_bytes(uuid).to_string());
        let (child, parent) = (self.child.display(), from_here(&reparented.parent));
        let mut text = format!("{child}: would become a child of {parent}; only its header and locators change\n");
        if before != now {
            let _ = writeln!(text, "  parent's UUID {now} instead of {before}");
        }
        for (code, path) in &reparented.locators {
            let _ = writeln!(text, "  {code} {path}");
        }
        let locators = reparented.locators.iter().map(|(code, path)| LocatorDocument { code, path }).collect();
        let document = Document {
            path: ShownPath(&self.child),
            parent: ShownPath(&reparented.parent),
            parent_uuid_before: before,
            parent_uuid: now,
            locators,
            notes: &reparented.notes,
            done: !self.dry_run,
        };
        context.print(if self.dry_run { &text } else { "" }, &document)?;
        Ok(Answer::Yes)
    }
}
