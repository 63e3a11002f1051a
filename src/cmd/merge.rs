//! `vhd merge`

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use vhd_core::Error;
use vhd_core::intent::Named;
use vhd_core::ops::merge::{MergeOptions, MergePlan, execute, plan};

use super::ChainArgs;
use crate::output::{Answer, Context, ShownPath, from_here, goes_on};

/// Arguments of `vhd merge`.
#[derive(Debug, Args)]
pub struct MergeArgs {
    /// The image whose content goes into one below it
    child: PathBuf,
    /// The image that takes it, and that of all images between: the parent by default
    #[arg(long, value_name = "ANCESTOR")]
    into: Option<PathBuf>,
    /// An image between, or a child of the child, that is in another folder; may be given more than once
    #[arg(long, value_name = "IMAGE")]
    with: Vec<PathBuf>,
    /// Remove the child and the images between when it is done
    #[arg(long)]
    delete: bool,
    /// Go on although other children are lost, the ancestor is write-protected or a saved state relies on it
    #[arg(long)]
    force: bool,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    open: ChainArgs,
}

/// The JSON of `vhd merge`.
#[derive(Serialize)]
pub(super) struct Document<'a> {
    child: ShownPath<'a>,
    into: ShownPath<'a>,
    between: Vec<ShownPath<'a>>,
    /// The child's own children, which become the ancestor's.
    reparented: Vec<ShownPath<'a>>,
    /// Other children, and images between that stay, which can't be opened afterwards.
    lost: Vec<ShownPath<'a>>,
    /// Bytes that are moved.
    data: u64,
    /// Bytes that become zero.
    zeros: u64,
    /// The size that the ancestor's disk gets, where it is smaller than the child's.
    grow_to: Option<u64>,
    delete: bool,
    /// An interrupted merge is finished.
    resumed: bool,
    done: bool,
}

impl MergeArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        let chain = self.open.options(false, false);
        let options = MergeOptions { into: self.into.clone(), with: self.with.clone(), delete: self.delete, force: self.force };
        let plan = plan(&self.child, &options, &chain)?;
        if !self.dry_run {
            let merged = context.with_progress("merge", |progress| execute(&plan, &options, &chain, progress));
            merged.map_err(|error| goes_on(error, &self.child))?;
        }
        context.print(&text(&plan, !self.dry_run), &document(&plan, !self.dry_run))?;
        Ok(Answer::Yes)
    }
}

pub(super) fn document(plan: &MergePlan, done: bool) -> Document<'_> {
    let member = &plan.member;
    Document {
        child: ShownPath(&member.leaf),
        into: ShownPath(&member.target),
        between: member.between.iter().map(|named| ShownPath(&named.path)).collect(),
        reparented: member.children.iter().map(|named| ShownPath(&named.path)).collect(),
        lost: plan.lost.iter().map(|path| ShownPath(path)).collect(),
        data: plan.data,
        zeros: plan.zeros,
        grow_to: plan.grow_to,
        delete: member.delete,
        resumed: plan.is_resumed(),
        done,
    }
}

pub(super) fn text(plan: &MergePlan, done: bool) -> String {
    let member = &plan.member;
    let mut text = String::new();
    let [verb, removed, reparented, lost] = if done {
        ["merged", "removed", "is its child now", "is lost: it can't be opened any more"]
    } else {
        ["would merge", "would be removed", "would become its child", "would be lost: it could not be opened any more"]
    };
    let resumed = if plan.is_resumed() { ", going on where it was interrupted" } else { "" };
    let (leaf, target) = (from_here(&member.leaf), from_here(&member.target));
    let _ = writeln!(text, "{verb} {leaf} into {target}{resumed}");
    let _ = writeln!(text, "  {} bytes of data, {} bytes that are zero", plan.data, plan.zeros);
    if let Some(size) = plan.grow_to {
        let grows = if done { "has" } else { "would grow to" };
        let _ = writeln!(text, "  {target} {grows} {size} bytes{}", if done { " now" } else { "" });
    }
    for Named { path, .. } in &member.between {
        let _ = writeln!(text, "  with {}", from_here(path));
    }
    for Named { path, .. } in &member.children {
        let _ = writeln!(text, "  {} {reparented}", from_here(path));
    }
    for path in &plan.lost {
        let _ = writeln!(text, "  {} {lost}", from_here(path));
    }
    if member.delete {
        let between = member.between.iter().map(|named| &named.path);
        for path in std::iter::once(&member.leaf).chain(between) {
            let _ = writeln!(text, "  {} {removed}", from_here(path));
        }
    }
    text
}
