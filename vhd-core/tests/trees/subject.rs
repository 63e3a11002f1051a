//! The images of one sequence, and which operation comes next.

use std::path::PathBuf;

use vhd_core::Error;
use vhd_testkit::crash::Random;

use super::model::{Id, Refusal, Tree};

/// Images at most: with more, one that has no children is removed.
const MAX_IMAGES: usize = 8;

/// How large images are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Up to a few MiB, many blocks of few sectors.
    Small,
    /// From one sector to 2040 GiB.
    Any,
}

/// What was done. Tells it when a test fails.
#[derive(Debug)]
pub struct Log {
    scale: Scale,
    seed: u64,
    steps: Vec<String>,
    pub done: u64,
    pub refused: u64,
}

impl Log {
    pub fn say(&mut self, step: String) {
        self.steps.push(step);
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self { scale, seed, steps, .. } = self;
            println!("{}", steps.join("\n"));
            println!("replay: VHD_TREES_SEED={seed} VHD_TREES_RUNS=1 cargo test -p vhd-core --test trees    ({scale:?})");
        }
    }
}

pub struct Subject {
    pub log: Log,
    pub folder: tempfile::TempDir,
    pub tree: Tree,
    pub random: Random,
    pub scale: Scale,
    /// Images and writes so far.
    pub made: usize,
    pub writes: u64,
}

impl Subject {
    pub fn new(scale: Scale, seed: u64) -> Self {
        Self {
            log: Log { scale, seed, steps: Vec::new(), done: 0, refused: 0 },
            folder: tempfile::tempdir_in("/dev/shm").unwrap(),
            tree: Tree::default(),
            random: Random::new(seed),
            scale,
            made: 0,
            writes: 0,
        }
    }

    /// Does something, and looks at what it had to do with.
    pub fn step(&mut self) {
        if self.tree.nodes.len() > MAX_IMAGES {
            return self.remove();
        }
        let touched = match self.random.below(26) {
            _ if self.tree.nodes.is_empty() => self.create(),
            0 => self.create(),
            1..=8 => self.write(),
            9..=11 => self.child(),
            12..=14 => self.resize(),
            15..=17 => self.merge(),
            18 | 19 => self.compact(),
            20 => self.in_place(),
            21 => self.convert(),
            22 => self.move_parent(),
            23 => self.start_undo(),
            24 => self.end_undo(),
            _ => return self.remove(),
        };
        let mut looked_at: Vec<_> = touched.into_iter().flat_map(|id| self.tree.family(id)).collect();
        looked_at.sort_unstable();
        looked_at.dedup();
        looked_at.into_iter().for_each(|id| self.verify(id));
    }

    /// Looks at all images.
    pub fn finish(&mut self) {
        let all: Vec<_> = self.tree.nodes.keys().copied().collect();
        for id in all {
            self.verify(id);
            self.verify_otherwise(id);
        }
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        (!from.is_empty()).then(|| from[self.random.below(from.len() as u64) as usize])
    }

    pub fn chance(&mut self, of: u64) -> bool {
        self.random.below(of) == 0
    }

    /// Any image, or rather one without children: of the others most operations want nothing.
    pub fn any(&mut self) -> Id {
        let all: Vec<_> = self.tree.nodes.keys().copied().collect();
        let leaves: Vec<_> = all.iter().copied().filter(|id| self.tree.children(*id).is_empty()).collect();
        let from = if self.chance(8) { all } else { leaves };
        self.pick(&from).unwrap()
    }

    pub fn path(&self, id: Id) -> PathBuf {
        self.tree.nodes[&id].path.clone()
    }

    pub fn name(&self, id: Id) -> String {
        self.tree.nodes[&id].path.file_name().unwrap().to_string_lossy().into_owned()
    }

    /// Fails unless the operation was done, or refused as the model says; true when it was done.
    pub fn is_done<T>(&mut self, result: Result<T, Error>, refusal: Refusal) -> bool {
        match (result, refusal) {
            (Ok(_), None) => {
                self.log.done += 1;
                true
            }
            (Err(error), Some((kind, says))) if error.kind() == kind && error.to_string().contains(says) => {
                self.log.refused += 1;
                self.log.say(format!("  refused: {error}"));
                false
            }
            (Ok(_), Some(refusal)) => panic!("done, expected {refusal:?}"),
            (Err(error), refusal) => panic!("{:?}: {error}, expected {refusal:?}", error.kind()),
        }
    }
}
