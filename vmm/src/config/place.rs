//! Where configurations are: a file by its path, or a name in the user's folder of machines.

use std::path::{Path, PathBuf};

use vhd_core::{Error, ErrorKind};

/// The ending of configurations.
pub const EXTENSION: &str = "vmc";

/// The folder of this user's machines: `vhd/machines` in `$XDG_CONFIG_HOME`, else in `~/.config`.
fn folder() -> Result<PathBuf, Error> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config")));
    let base = base.ok_or_else(|| {
        Error::new(ErrorKind::NotFound, "there is no folder for configurations: set HOME or XDG_CONFIG_HOME, or name a .vmc file")
    })?;
    Ok(base.join("vhd/machines"))
}

/// The file of a machine: of `FILE.vmc` itself, of a name the one in the user's folder, whether it is there or not.
///
/// # Errors
/// `InvalidInput` for what can't be a name; `NotFound` without a home.
pub fn file_of(machine: &str) -> Result<PathBuf, Error> {
    let path = Path::new(machine);
    if path.extension().is_some_and(|extension| extension == EXTENSION) {
        crate::machine::socket_of(&name_of(path))?;
        return Ok(path.to_owned());
    }
    crate::machine::socket_of(machine)?;
    Ok(folder()?.join(format!("{machine}.{EXTENSION}")))
}

/// The name of the machine of a configuration, which is that of its file.
#[must_use]
pub fn name_of(file: &Path) -> String {
    file.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// The configurations in the user's folder, by name.
///
/// # Errors
/// As the folder can't be read.
pub fn configured() -> Result<Vec<PathBuf>, Error> {
    let Ok(folder) = folder() else { return Ok(Vec::new()) };
    let entries = match std::fs::read_dir(&folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|error| Error::io(error, "can't be listed").at(&folder))?,
    };
    let files = entries.flatten().map(|entry| entry.path());
    let mut files: Vec<_> = files.filter(|path| path.extension().is_some_and(|extension| extension == EXTENSION)).collect();
    files.sort();
    Ok(files)
}
