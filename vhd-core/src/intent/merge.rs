//! What a merge intends.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::FooterMove;
use crate::storage::resolve;

/// Merges that are one: all done, or all still to do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Merge {
    /// Each child and the image that takes what it holds. The record is beside the first one's target.
    pub members: Vec<Member>,
    /// True for the commit of an undo session.
    pub undo: bool,
    /// True once all data is durable in the targets: what is left is to remove the children.
    pub finishing: bool,
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
    pub between: Vec<PathBuf>,
    /// The child's own children, which become the target's.
    pub children: Vec<PathBuf>,
    /// The child and the images between are removed at the end.
    pub delete: bool,
    /// How a fixed target that is smaller than the child becomes as large.
    #[serde(default)]
    pub grow: Option<FooterMove>,
}

impl Member {
    /// The identifiers that the target may have meanwhile.
    pub(crate) fn target_uuids(&self) -> Vec<Uuid> {
        self.target_uuid.into_iter().flat_map(|(old, new)| [old, new]).collect()
    }

    pub(super) fn names_target(&self, image: &Path) -> bool {
        same_file(&self.target, image)
    }

    /// True when the child is among the images with these identifiers.
    pub(super) fn is_merged_through(&self, above: &[[u8; 16]]) -> bool {
        above.contains(self.leaf_uuid.as_bytes())
    }

    fn map_paths(&self, map: impl Fn(&Path) -> PathBuf) -> Self {
        let all = |paths: &[PathBuf]| paths.iter().map(|path| map(path)).collect();
        let (between, children) = (all(&self.between), all(&self.children));
        Self { target: map(&self.target), leaf: map(&self.leaf), between, children, ..self.clone() }
    }
}

impl Merge {
    /// With paths from `folder` on, as a record there has them: files that are moved together stay together.
    #[must_use]
    pub fn relative_to(&self, folder: &Path) -> Self {
        self.map_paths(|path| crate::chain::relative_to(path, folder))
    }

    /// With paths that lead somewhere, of a record in `folder`.
    pub(super) fn resolved(&self, folder: &Path) -> Self {
        self.map_paths(|path| resolve(&folder.join(path)))
    }

    pub(super) fn names_target(&self, image: &Path) -> bool {
        self.members.iter().any(|member| member.names_target(image))
    }

    fn map_paths(&self, map: impl Fn(&Path) -> PathBuf) -> Self {
        Self { members: self.members.iter().map(|member| member.map_paths(&map)).collect(), ..self.clone() }
    }

    /// The command that finishes it.
    pub(super) fn command(&self) -> String {
        let shown = |path: &Path| path.display().to_string();
        if self.undo {
            let targets: Vec<_> = self.members.iter().map(|member| shown(&member.target)).collect();
            return format!("vhd undo commit {}", targets.join(" "));
        }
        let member = self.members.first();
        let (leaf, target) = member.map(|member| (shown(&member.leaf), shown(&member.target))).unwrap_or_default();
        format!("vhd merge {leaf} --into {target}")
    }
}

fn same_file(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let identity = |path: &Path| std::fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
    identity(a).is_some_and(|found| identity(b) == Some(found))
}
