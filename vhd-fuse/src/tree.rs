//! The names that a mount shows: a few nodes, made before it is mounted and never changed.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use fuser::INodeNo;

use crate::document::Document;
use crate::view::View;

/// What a node is.
pub(crate) enum Content {
    /// A folder.
    Folder,
    /// A range of a disk.
    File(View),
    /// A text.
    Document(Document),
}

/// A name in a folder.
pub(crate) struct Node {
    /// The folder that it is in; the root is in itself.
    pub(crate) parent: INodeNo,
    /// The name; the root's is empty.
    pub(crate) name: OsString,
    /// What it is.
    pub(crate) content: Content,
}

/// All nodes. A node's number is its place here, counted from 1, which is the root.
pub(crate) struct Tree {
    nodes: Vec<Node>,
}

impl Tree {
    /// A root and nothing in it.
    pub(crate) fn new(content: Content) -> Self {
        let root = Node { parent: INodeNo::ROOT, name: OsString::new(), content };
        Self { nodes: vec![root] }
    }

    /// Adds a node to a folder.
    pub(crate) fn add(&mut self, parent: INodeNo, name: impl Into<OsString>, content: Content) -> INodeNo {
        self.nodes.push(Node { parent, name: name.into(), content });
        INodeNo(self.nodes.len() as u64)
    }

    /// The node with a number.
    pub(crate) fn get(&self, number: INodeNo) -> Option<&Node> {
        self.nodes.get(usize::try_from(number.0).ok()?.checked_sub(1)?)
    }

    /// The nodes in a folder, in the order in which they were added.
    pub(crate) fn children(&self, parent: INodeNo) -> impl Iterator<Item = (INodeNo, &Node)> {
        let numbered = (1..).map(INodeNo).zip(&self.nodes);
        numbered.filter(move |(number, node)| node.parent == parent && *number != INodeNo::ROOT)
    }

    /// The node of a name in a folder.
    pub(crate) fn lookup(&self, parent: INodeNo, name: &OsStr) -> Option<INodeNo> {
        self.children(parent).find(|(_, node)| node.name == name).map(|(number, _)| number)
    }

    /// How many nodes there are.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Every range of a disk.
    pub(crate) fn files(&self) -> impl Iterator<Item = &View> {
        self.nodes.iter().filter_map(|node| match &node.content {
            Content::File(view) => Some(view),
            Content::Folder | Content::Document(_) => None,
        })
    }

    /// The path of every range of a disk, from the root.
    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        let files = self.nodes.iter().filter(|node| matches!(node.content, Content::File(_)));
        files.map(|node| self.path(node)).collect()
    }

    fn path(&self, node: &Node) -> PathBuf {
        match self.get(node.parent) {
            Some(parent) if !node.name.is_empty() => self.path(parent).join(&node.name),
            _ => PathBuf::new(),
        }
    }
}
