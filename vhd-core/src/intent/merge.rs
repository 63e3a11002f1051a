//! What a merge intends.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::FooterMove;
use crate::command::Command;
use crate::storage::folder_of;

/// Merges that are one: all done, or all still to do. The record lies beside each target, and each says all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Merge {
    /// Each child and the image that takes what it holds.
    pub members: Vec<Member>,
    /// True for the commit of an undo session.
    pub undo: bool,
    /// True once all data is durable in the targets: what is left is to remove the children. Told to people; what is done is
    /// seen from the images.
    pub finishing: bool,
    /// It was begun with `--force`; unknown of records of a former version.
    #[serde(default)]
    pub force: Option<bool>,
}

/// One child, and the image that takes what it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The image that is written.
    pub target: PathBuf,
    /// Its identifier before, and from the merge on; none for a raw file or device.
    pub target_uuid: Option<(Uuid, Uuid)>,
    /// The child.
    pub leaf: PathBuf,
    /// The child's identifier.
    pub leaf_uuid: Uuid,
    /// The images between them, the child's parent first.
    pub between: Vec<Named>,
    /// The child's own children, which become the target's.
    pub children: Vec<Named>,
    /// The child and the images between are removed at the end.
    pub delete: bool,
    /// How the target was protected, where that is lifted meanwhile.
    #[serde(default)]
    pub protection: Option<Protection>,
    /// How a fixed target that is smaller than the child becomes as large.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grow: Option<FooterMove>,
}

/// A file that a record names, and the identifier by which it is known again; records of a former version have the name alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Form", into = "Form")]
pub struct Named {
    /// Where it is.
    pub path: PathBuf,
    /// Its identifier.
    pub uuid: Option<Uuid>,
}

/// How it is written.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Form {
    Known { path: PathBuf, uuid: Uuid },
    Path(PathBuf),
}

impl From<Form> for Named {
    fn from(form: Form) -> Self {
        match form {
            Form::Known { path, uuid } => Self { path, uuid: Some(uuid) },
            Form::Path(path) => Self { path, uuid: None },
        }
    }
}

impl From<Named> for Form {
    fn from(named: Named) -> Self {
        match named.uuid {
            Some(uuid) => Self::Known { path: named.path, uuid },
            None => Self::Path(named.path),
        }
    }
}

/// How a file was protected from being written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Protection {
    /// Nobody may write it.
    pub read_only: bool,
    /// It has the immutable flag.
    pub immutable: bool,
}

impl Member {
    /// The identifiers that the target may have meanwhile.
    pub(crate) fn target_uuids(&self) -> Vec<Uuid> {
        self.target_uuid.into_iter().flat_map(|(old, new)| [old, new]).collect()
    }

    /// True when the child is among the images with these identifiers.
    pub(super) fn is_merged_through(&self, above: &[[u8; 16]]) -> bool {
        above.contains(self.leaf_uuid.as_bytes())
    }

    fn map_paths(&self, map: &impl Fn(&Path) -> PathBuf) -> Self {
        let all = |named: &[Named]| named.iter().map(|named| Named { path: map(&named.path), uuid: named.uuid }).collect();
        let (between, children) = (all(&self.between), all(&self.children));
        Self { target: map(&self.target), leaf: map(&self.leaf), between, children, ..self.clone() }
    }

    /// The command that finishes it, all its files named that are not beside the child or the target.
    fn command(&self, force: bool) -> Command {
        let folders = [folder_of(&self.leaf), folder_of(&self.target)];
        let others = self.between.iter().chain(&self.children).map(|named| &*named.path);
        let others = others.filter(|path| !folders.iter().any(|folder| path.starts_with(folder)));
        let command = Command::new(&["vhd", "merge"]).path(&self.leaf).words(&["--into"]).path(&self.target);
        command.paths("--with", others).flag("--delete", self.delete).flag("--force", force)
    }
}

impl Merge {
    /// With paths from `folder` on, as a record there has them: files that are moved together stay together.
    #[must_use]
    pub fn relative_to(&self, folder: &Path) -> Self {
        self.map_paths(&|path| crate::chain::relative_to(path, folder))
    }

    /// With the paths that a record in `folder` means. Nothing is looked up.
    pub(super) fn resolved(&self, folder: &Path) -> Self {
        self.map_paths(&|path| lexically(&folder.join(path)))
    }

    fn map_paths(&self, map: &impl Fn(&Path) -> PathBuf) -> Self {
        Self { members: self.members.iter().map(|member| member.map_paths(map)).collect(), ..self.clone() }
    }

    /// The command that finishes it.
    pub(crate) fn command(&self) -> Command {
        let force = self.force == Some(true);
        if !self.undo {
            return self.members.first().map_or_else(|| Command::new(&["vhd", "merge"]), |member| member.command(force));
        }
        let command = Command::new(&["vhd", "undo", "commit"]);
        let command = self.members.iter().fold(command, |command, member| command.path(&member.target));
        // Undo disks that are elsewhere are all in one folder.
        let elsewhere = self.members.iter().find(|member| folder_of(&member.leaf) != folder_of(&member.target));
        command.paths("--dir", elsewhere.map(|member| folder_of(&member.leaf))).flag("--force", force)
    }
}

/// A path without `.` and `..`, as far as its text tells.
pub(crate) fn lexically(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir if plain.parent().is_some() => drop(plain.pop()),
            part => plain.push(part),
        }
    }
    plain
}
