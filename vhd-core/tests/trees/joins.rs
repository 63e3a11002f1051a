//! What is done to several images at once: merges and undo sessions.

use vhd_core::chain::ChainOptions;
use vhd_core::ops::merge::{self, MergeOptions};
use vhd_core::ops::undo;
use vhd_core::{Disk, ErrorKind, Progress};

use super::model::{Id, Node, PARENT, Refusal};
use super::subject::Subject;
use super::support::options;

impl Subject {
    /// Merges an image into any of those below it.
    pub fn merge(&mut self) -> Vec<Id> {
        let children: Vec<_> = self.tree.nodes.iter().filter(|(_, node)| node.parent.is_some()).map(|(id, _)| *id).collect();
        let Some(leaf) = self.pick(&children) else { return Vec::new() };
        let chain = self.tree.chain(leaf);
        let target = self.pick(&chain[1..]).unwrap();
        let delete = !self.chance(3);
        let force = self.chance(4) && !self.tree.spoils_a_session(leaf, target);
        let names = (self.name(leaf), self.name(target));
        self.log.say(format!("merge {} into {}, delete: {delete}, force: {force}", names.0, names.1));
        let refusal = self.tree.may_merge(leaf, target, force, false);
        let how = MergeOptions { into: Some(self.path(target)), delete, force, ..MergeOptions::default() };
        let chain = options(false);
        let merged = merge::plan(&self.path(leaf), &how, &chain)
            .and_then(|plan| merge::execute(&plan, &how, &chain, &Progress::default()));
        if !self.is_done(merged, refusal) {
            return vec![target];
        }
        let before: Vec<_> = self.tree.nodes.values().cloned().collect();
        let lost = self.tree.merge(leaf, target, delete);
        self.assert_lost(&lost);
        let left: Vec<_> = self.tree.nodes.values().map(|node| &node.path).collect();
        for node in before.iter().filter(|node| !left.contains(&&node.path)) {
            assert!(!node.path.exists(), "{} is left", node.path.display());
        }
        vec![target]
    }

    /// What a merge made useless says so: it refuses to open. It is removed then.
    fn assert_lost(&self, lost: &[Node]) {
        for node in lost {
            let error = Disk::open(&node.path, &options(false)).map(drop).expect_err("should not find its parent");
            assert!([ErrorKind::Parent, ErrorKind::Refused].contains(&error.kind()), "{error}");
        }
        lost.iter().for_each(|node| std::fs::remove_file(&node.path).unwrap());
    }

    pub fn start_undo(&mut self) -> Vec<Id> {
        let named = self.tree.nodes.iter().filter(|(_, node)| node.path.extension().is_some_and(|name| name == "vhd"));
        let images: Vec<_> = named.map(|(id, _)| *id).collect();
        let mut chosen: Vec<_> = (0..=self.random.below(2)).filter_map(|_| self.pick(&images)).collect();
        chosen.sort_unstable();
        chosen.dedup();
        let names: Vec<_> = chosen.iter().map(|id| self.name(*id)).collect();
        self.log.say(format!("undo start {names:?}"));
        let has_undo = |id: &Id| self.path(*id).with_extension("vud").exists();
        let refusals = chosen.iter().filter_map(|id| match () {
            () if has_undo(id) => Some((ErrorKind::Exists, "exists already")),
            () if !self.tree.children(*id).is_empty() => PARENT,
            () => None,
        });
        let refusal: Refusal = refusals.collect::<Vec<_>>().first().copied();
        let paths: Vec<_> = chosen.iter().map(|id| self.path(*id)).collect();
        let started = undo::start(&paths, None, &options(false));
        if self.is_done(started, refusal) {
            let session = chosen.iter().map(|id| (*id, self.add_undo(*id))).collect();
            self.tree.sessions.push(session);
        }
        chosen
    }

    pub fn end_undo(&mut self) -> Vec<Id> {
        let sessions: Vec<_> = (0..self.tree.sessions.len()).collect();
        let Some(index) = self.pick(&sessions) else { return Vec::new() };
        let session = self.tree.sessions[index].clone();
        let paths: Vec<_> = session.iter().map(|(image, _)| self.path(*image)).collect();
        let (commit, chain) = (!self.chance(3), options(false));
        let names: Vec<_> = session.iter().map(|(image, _)| self.name(*image)).collect();
        self.log.say(format!("undo {} {names:?}", if commit { "commit" } else { "discard" }));
        let images = session.iter().map(|(image, _)| *image).collect();
        match commit {
            true => self.commit(&session, &paths, &chain),
            false => {
                let has_children = session.iter().any(|(_, undo)| !self.tree.children(*undo).is_empty());
                let refusal = if has_children { PARENT } else { None };
                let discarded = undo::discard(&paths, None, false, &chain);
                if self.is_done(discarded, refusal) {
                    session.iter().for_each(|(_, undo)| drop(self.tree.nodes.remove(undo)));
                    self.tree.forget_sessions();
                }
            }
        }
        images
    }

    fn commit(&mut self, session: &[(Id, Id)], paths: &[std::path::PathBuf], chain: &ChainOptions) {
        let refusals: Vec<_> =
            session.iter().filter_map(|(image, undo)| self.tree.may_merge(*undo, *image, false, true)).collect();
        let committed = undo::commit(paths, None, false, chain, &Progress::default());
        if self.is_done(committed, refusals.first().copied()) {
            for (image, undo) in session {
                self.tree.merge(*undo, *image, true);
            }
            self.tree.forget_sessions();
        }
    }
}
