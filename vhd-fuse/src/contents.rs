//! What a mount shows of a disk.

use std::io::Write;
use std::ops::Range;
use std::sync::Arc;

use fuser::INodeNo;
use vhd_core::partition::PartitionTable;
use vhd_core::{Disk, Error, Result};

use crate::DISK_FILE;
use crate::changes::Changes;
use crate::document::{Document, Produce};
use crate::tree::{Content, Tree};
use crate::view::View;

/// The file that says what is wrong with the partition table. It is there when something is.
pub const PROBLEMS_FILE: &str = "partition-errors.txt";

/// The folder of the layers.
const LAYERS_FOLDER: &str = "layers";

/// A disk, and what else is shown beside it where it is mounted on a folder.
pub struct Contents {
    pub(crate) disk: Disk,
    partitions: Vec<(String, Range<u64>)>,
    layers: Vec<Disk>,
    documents: Vec<(String, Produce)>,
}

impl From<Disk> for Contents {
    fn from(disk: Disk) -> Self {
        Self { disk, partitions: Vec::new(), layers: Vec::new(), documents: Vec::new() }
    }
}

impl Contents {
    /// With each partition as a file `pN`, and what is wrong with the table in [`PROBLEMS_FILE`].
    #[must_use]
    pub fn with_partitions(mut self, table: &PartitionTable) -> Self {
        let parts = table.partitions.iter().map(|part| (format!("p{}", part.number), part.range.clone()));
        self.partitions = parts.collect();
        if table.problems.is_empty() {
            return self;
        }
        let text: String = table.problems.iter().map(|problem| format!("{problem}\n")).collect();
        self.with_document(PROBLEMS_FILE, move |out| write_text(out, &text))
    }

    /// With each of these, leaf first, as a read-only file `layers/N`.
    #[must_use]
    pub fn with_layers(mut self, layers: Vec<Disk>) -> Self {
        self.layers = layers;
        self
    }

    /// With a file whose text `produce` makes whenever it is opened.
    #[must_use]
    pub fn with_document(mut self, name: &str, produce: impl Fn(&mut dyn Write) -> Result<()> + Send + Sync + 'static) -> Self {
        self.documents.push((name.to_owned(), Box::new(produce)));
        self
    }

    /// As a tree: of the disk alone, or a folder of everything.
    pub(crate) fn into_tree(self, is_folder: bool, read_only: bool) -> Tree {
        let changes = Arc::<Changes>::default();
        let all = 0..self.disk.size();
        let view = |disk: &Disk, range, read_only| Content::File(View::new(disk, range, read_only, &changes));
        let whole = view(&self.disk, all, read_only);
        if !is_folder {
            return Tree::new(whole);
        }
        let mut tree = Tree::new(Content::Folder);
        tree.add(INodeNo::ROOT, DISK_FILE, whole);
        for (name, range) in self.partitions {
            tree.add(INodeNo::ROOT, name, view(&self.disk, range, read_only));
        }
        if !self.layers.is_empty() {
            let folder = tree.add(INodeNo::ROOT, LAYERS_FOLDER, Content::Folder);
            for (depth, layer) in self.layers.iter().enumerate() {
                tree.add(folder, depth.to_string(), view(layer, 0..layer.size(), true));
            }
        }
        for (name, produce) in self.documents {
            tree.add(INodeNo::ROOT, name, Content::Document(Document::new(produce)));
        }
        tree
    }
}

fn write_text(out: &mut dyn Write, text: &str) -> Result<()> {
    out.write_all(text.as_bytes()).map_err(|error| Error::io(error, "can't be told"))
}
