//! What the images of a tree should hold, and what may be done to them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use vhd_core::ErrorKind;

use super::sectors::{Held, Sectors};

pub type Id = usize;

/// Why an operation is refused: the kind, and what the message says.
pub type Refusal = Option<(ErrorKind, &'static str)>;

pub const PARENT: Refusal = Some((ErrorKind::Refused, "is the parent of"));

/// One image.
#[derive(Clone, Debug)]
pub struct Node {
    pub path: PathBuf,
    pub parent: Option<Id>,
    /// Sectors of the disk.
    pub size: u64,
    pub fixed: bool,
    /// Sectors of a block.
    pub block: u64,
    /// What it holds itself.
    pub own: Sectors,
    /// It takes the changes of its parent in an undo session.
    pub undo: bool,
}

/// All images.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    pub nodes: BTreeMap<Id, Node>,
    /// Undo sessions: each image with its undo disk.
    pub sessions: Vec<Vec<(Id, Id)>>,
}

impl Tree {
    pub fn children(&self, id: Id) -> Vec<Id> {
        self.nodes.iter().filter(|(_, node)| node.parent == Some(id)).map(|(id, _)| *id).collect()
    }

    /// An image and all that are over it.
    pub fn family(&self, id: Id) -> Vec<Id> {
        let above = self.children(id).into_iter().flat_map(|child| self.family(child));
        std::iter::once(id).chain(above).collect()
    }

    /// An image and its parents.
    pub fn chain(&self, id: Id) -> Vec<Id> {
        std::iter::successors(Some(id), |id| self.nodes[id].parent).collect()
    }

    /// What is seen through an image; zeros where nothing is said.
    pub fn view(&self, id: Id) -> Sectors {
        let node = &self.nodes[&id];
        let mut view = node.parent.map(|parent| self.view(parent)).unwrap_or_default();
        view.cut(node.size);
        view.lay(&node.own);
        view
    }

    /// The last sector that is not zero from `start` on.
    pub fn last_data(&self, id: Id, start: u64) -> Option<u64> {
        let view = self.view(id);
        let last = view.runs().rev().find(|(range, held)| *held != Held::Zeros && range.end > start);
        last.map(|(range, _)| range.end - 1)
    }

    pub fn resize(&mut self, id: Id, size: u64) {
        let node = self.nodes.get_mut(&id).unwrap();
        node.own.cut(size);
        node.size = size;
    }

    pub fn may_resize(&self, id: Id, size: u64, discard: bool) -> Refusal {
        let node = &self.nodes[&id];
        if !self.children(id).is_empty() {
            return PARENT;
        }
        if size > node.size && node.parent.is_some_and(|parent| self.nodes[&parent].size > node.size) {
            return Some((ErrorKind::Refused, "its parent is larger"));
        }
        let is_lost = !discard && self.last_data(id, size).is_some();
        is_lost.then_some((ErrorKind::Refused, "--discard-data"))
    }

    /// Images that a merge makes useless: other children of the target and of the images between.
    pub fn lost(&self, leaf: Id, target: Id) -> Vec<Id> {
        let chain = self.chain(leaf);
        let depth = chain.iter().position(|id| *id == target).unwrap();
        let children = (1..=depth).flat_map(|index| self.children(chain[index]));
        children.filter(|child| !chain.contains(child)).collect()
    }

    /// Why a merge would take a part out of an undo session: it is one of several undo disks, or the image of one.
    pub fn parting(&self, leaf: Id, target: Id) -> Refusal {
        let chain = self.chain(leaf);
        let merged: Vec<_> = chain.into_iter().take_while(|id| *id != target).collect();
        let mut sessions = self.sessions.iter();
        let several = sessions.any(|session| session.len() > 1 && session.iter().any(|(_, undo)| merged.contains(undo)));
        let has_undo = self.sessions.iter().flatten().any(|(image, _)| *image == leaf);
        match () {
            () if several => Some((ErrorKind::Refused, "vhd undo commit")),
            () if has_undo => Some((ErrorKind::Refused, "has the undo disk")),
            () => None,
        }
    }

    /// True when a merge with force would leave undo disks that could only be discarded.
    pub fn spoils_a_session(&self, leaf: Id, target: Id) -> bool {
        let lost: Vec<_> = self.lost(leaf, target).into_iter().flat_map(|id| self.family(id)).collect();
        let is_spoilt = |session: &Vec<(Id, Id)>| session.iter().any(|(_, undo)| lost.contains(undo));
        self.parting(leaf, target).is_some() || self.sessions.iter().any(is_spoilt)
    }

    /// `commits` when the merge is that of an undo session.
    pub fn may_merge(&self, leaf: Id, target: Id, force: bool, commits: bool) -> Refusal {
        let [size, target_size] = [leaf, target].map(|id| self.nodes[&id].size);
        let is_lost = !force && !self.lost(leaf, target).is_empty();
        let below = self.nodes[&target].parent.map_or(0, |parent| self.nodes[&parent].size);
        let children = self.children(leaf);
        let parting = if force || commits { None } else { self.parting(leaf, target) };
        match () {
            () if is_lost => Some((ErrorKind::Refused, "could not be used afterwards")),
            () if parting.is_some() => parting,
            () if target_size < size && below > target_size => Some((ErrorKind::Refused, "has to grow")),
            // They would show what the target holds beyond the leaf's end.
            () if target_size > size && children.iter().any(|child| self.nodes[child].size > size) => {
                Some((ErrorKind::Refused, "is larger and would show"))
            }
            () => None,
        }
    }

    /// The target shows what the leaf did, and beyond its end what it did itself. Returns the images that are lost by it: those
    /// above them too.
    pub fn merge(&mut self, leaf: Id, target: Id, delete: bool) -> Vec<Node> {
        let view = self.view(leaf);
        let size = self.nodes[&leaf].size;
        let mut gone: Vec<Id> = self.lost(leaf, target).into_iter().flat_map(|id| self.family(id)).collect();
        let chain = self.chain(leaf);
        let between: Vec<_> = chain.iter().skip(1).copied().take_while(|id| *id != target).collect();
        let merged = self.nodes.get_mut(&target).unwrap();
        merged.own.put(0..size, Held::Zeros);
        merged.own.lay(&view);
        merged.size = merged.size.max(size);
        for child in self.children(leaf) {
            self.nodes.get_mut(&child).unwrap().parent = Some(target);
        }
        if delete {
            [leaf].iter().chain(&between).for_each(|id| drop(self.nodes.remove(id)));
        } else {
            self.nodes.get_mut(&leaf).unwrap().parent = Some(target);
            gone.extend(between);
        }
        let lost: Vec<Node> = gone.iter().filter_map(|id| self.nodes.remove(id)).collect();
        self.forget_sessions();
        lost
    }

    /// Without its image or one of its undo disks a session is none: its undo disks are images as any.
    pub fn forget_sessions(&mut self) {
        let nodes = &mut self.nodes;
        self.sessions.retain(|session| {
            let is_whole = session.iter().all(|(image, undo)| nodes.get(undo).is_some_and(|node| node.parent == Some(*image)));
            for (_, undo) in session.iter().filter(|_| !is_whole) {
                if let Some(node) = nodes.get_mut(undo) {
                    node.undo = false;
                }
            }
            is_whole
        });
    }
}
