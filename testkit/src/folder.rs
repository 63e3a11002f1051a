//! A folder of real files whose changes are remembered: what operations over several files are recorded with.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use vhd_core::Error;
use vhd_core::storage::{FileStorage, Host, LocalHost, Storage};

use crate::crash::{CrashState, Effort, Names, as_written, crash_states_from};
use crate::record::{Event, Journal, RecordingStorage};

/// Real files below a folder. Names in events are relative to it.
#[derive(Debug)]
pub struct RecordingHost {
    folder: PathBuf,
    journal: Journal,
    files: Vec<Vec<u8>>,
    names: Names,
    numbers: Mutex<HashMap<(u64, u64), usize>>,
}

impl RecordingHost {
    /// Takes the files below `folder` as they are now.
    ///
    /// # Panics
    /// When they can't be read.
    #[must_use]
    pub fn new(folder: &Path, journal: &Journal) -> Self {
        // Chains resolve links, and names must agree.
        let folder = folder.canonicalize().unwrap();
        let (mut files, mut names, mut numbers) = (Vec::new(), Names::new(), HashMap::new());
        for path in files_below(&folder) {
            names.insert(path.strip_prefix(&folder).unwrap().to_owned(), files.len());
            numbers.insert(FileStorage::open(&path, false).unwrap().identity().unwrap(), files.len());
            files.push(std::fs::read(&path).unwrap());
        }
        Self { folder, journal: journal.clone(), files, names, numbers: Mutex::new(numbers) }
    }

    /// Calls `visit` with each state that a power cut may leave of the folder; where a barrier was left out, those from
    /// there on, as the others are those of the run that has it.
    ///
    /// # Errors
    /// As there.
    pub fn crash_states(
        &self,
        effort: Effort,
        visit: &mut dyn FnMut(&CrashState) -> Result<(), String>,
    ) -> Result<usize, String> {
        let first = self.journal.dropped_at();
        crash_states_from(&self.files, &self.names, &self.journal.events(), first, effort, visit)
    }

    /// The folder as it was after so many events, for a process that is killed there: nothing is lost.
    #[must_use]
    pub fn killed_at(&self, cut: usize) -> CrashState {
        as_written(&self.files, &self.names, &self.journal.events(), cut)
    }

    fn name(&self, path: &Path) -> PathBuf {
        let folder = vhd_core::storage::folder_of(path).canonicalize().unwrap();
        folder.strip_prefix(&self.folder).unwrap().join(path.file_name().unwrap_or_default())
    }

    fn recorded(&self, file: Arc<FileStorage>, number: usize) -> Arc<dyn Storage> {
        Arc::new(RecordingStorage::over(file, number, &self.journal))
    }
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(files_below(&path)) } else { files.push(path) }
    }
    files.sort();
    files
}

impl Host for RecordingHost {
    fn adopt(&self, file: Arc<FileStorage>) -> Arc<dyn Storage> {
        let number = self.numbers.lock().unwrap().get(&file.identity().unwrap()).copied();
        let number = number.unwrap_or_else(|| panic!("{} was not there at the start", file.path().display()));
        self.recorded(file, number)
    }

    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>, Error> {
        drop(LocalHost.create(path)?);
        let file = FileStorage::open(path, true)?;
        let created = self.journal.events().iter().filter(|event| matches!(event, Event::Create { .. })).count();
        let number = self.files.len() + created;
        self.numbers.lock().unwrap().insert(file.identity()?, number);
        self.journal.push(Event::Create { file: number, name: self.name(path) });
        Ok(self.recorded(Arc::new(file), number))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), Error> {
        let event = Event::Rename { from: self.name(from), to: self.name(to) };
        LocalHost.rename(from, to)?;
        self.journal.push(event);
        Ok(())
    }

    fn rename_new(&self, from: &Path, to: &Path) -> Result<(), Error> {
        let event = Event::Rename { from: self.name(from), to: self.name(to) };
        LocalHost.rename_new(from, to)?;
        self.journal.push(event);
        Ok(())
    }

    fn remove(&self, path: &Path) -> Result<(), Error> {
        let existed = path.exists();
        LocalHost.remove(path)?;
        if existed {
            self.journal.push(Event::Remove { name: self.name(path) });
        }
        Ok(())
    }

    fn sync_folder(&self, folder: &Path) -> Result<(), Error> {
        let folder = folder.canonicalize().unwrap().strip_prefix(&self.folder).unwrap().to_owned();
        self.journal.barrier(Event::SyncFolder { folder });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use vhd_core::storage::put_file;

    /// What a file put at a name may be after a power cut, when the n-th barrier is left out.
    fn states(without: usize) -> HashSet<Option<Vec<u8>>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record");
        std::fs::write(&path, b"old").unwrap();
        let journal = Journal::without_barrier(without);
        let host = RecordingHost::new(folder.path(), &journal);
        put_file(&host, &path, b"new content", &vhd_core::storage::Access::Umask).unwrap();
        journal.mark(0);
        let mut states = HashSet::new();
        let mut visit = |state: &CrashState| {
            states.insert(state.names.get(Path::new("record")).map(|&file| state.files[file].clone()));
            Ok(())
        };
        host.crash_states(Effort::default(), &mut visit).unwrap();
        states
    }

    #[test]
    fn a_file_that_is_put_is_old_or_new() {
        let old_or_new = HashSet::from([Some(b"old".to_vec()), Some(b"new content".to_vec())]);
        assert_eq!(states(usize::MAX), old_or_new);
        assert_ne!(states(0), old_or_new, "the file's own barrier is needed");
    }
}
