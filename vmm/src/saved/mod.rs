//! Saved states (`.vsv`): a guest in a file, to go on from there in another process.
//!
//! A file is a magic number, a version and sections. A section has a tag, its length and a CRC over all of that; the
//! last one says how many there were. Nothing of a file is believed before its section's CRC is right, and no length
//! makes more memory than `MAX_SECTION` be asked for. A stranger can make all that right, too: what is read is held
//! against the machine, and has no more of anything than a machine has.

mod memory;

use std::fs::{File, Permissions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crc::{CRC_32_ISO_HDLC, Crc};
use serde::{Deserialize, Serialize};
use vhd_core::storage::{Beneath, Host, LocalHost, folder_of, open_beneath};
use vhd_core::{Error, ErrorKind};

use crate::devices::{Clock, SerialSaved};
use crate::kvm::{VcpuState, VmState};
use crate::memory::Memory;
use crate::virtio::mmio::DiskState;

const MAGIC: [u8; 8] = *b"VHDSAVED";
const VERSION: u32 = 2;
/// Bytes of a section's content at most.
const MAX_SECTION: u64 = 8 << 20;
const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISO_HDLC);

/// What a disk was when the guest was saved: it must be the same to go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskIdentity {
    /// Bytes of the disk.
    pub size: u64,
    /// Its layers, leaf first.
    pub layers: Vec<LayerIdentity>,
}

/// What a layer of a disk was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerIdentity {
    /// Its UUID.
    pub uuid: [u8; 16],
    /// CRC of its footer, header and BAT.
    pub metadata: u32,
    /// Bytes of its file.
    pub file_size: u64,
    /// When its file was last written, in nanoseconds since 1970.
    pub modified: u128,
}

/// Everything but memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedState {
    /// Bytes of memory.
    pub memory: u64,
    /// The disks' identities, in order.
    pub identities: Vec<DiskIdentity>,
    /// vCPUs.
    pub vcpus: Vec<VcpuState>,
    /// KVM's own devices.
    pub vm: VmState,
    /// The serial port.
    pub serial: SerialSaved,
    /// The real-time clock.
    pub clock: Clock,
    /// The disks' registers and queues, in order.
    pub disks: Vec<DiskState>,
}

fn crc_of(tag: [u8; 4], content: &[u8]) -> u32 {
    let mut digest = CRC.digest();
    digest.update(&tag);
    digest.update(&(content.len() as u64).to_le_bytes());
    digest.update(content);
    digest.finalize()
}

/// One section: its tag and its content.
type Section = ([u8; 4], Vec<u8>);

/// Writes what a file begins with.
///
/// # Errors
/// As `to` fails.
pub fn write_start(to: &mut impl Write) -> io::Result<()> {
    to.write_all(&MAGIC)?;
    to.write_all(&VERSION.to_le_bytes())
}

/// Writes a section.
///
/// # Errors
/// As `to` fails.
pub fn write_section(to: &mut impl Write, tag: [u8; 4], content: &[u8]) -> io::Result<()> {
    to.write_all(&tag)?;
    to.write_all(&(content.len() as u64).to_le_bytes())?;
    to.write_all(&crc_of(tag, content).to_le_bytes())?;
    to.write_all(content)
}

/// Which file it is, whatever its name: device and inode.
pub type Identity = (u64, u64);

fn identity_of(file: &File) -> io::Result<Identity> {
    let found = file.metadata()?;
    Ok((found.dev(), found.ino()))
}

/// What a saved state says of the machine that it is of.
#[derive(Clone, Debug)]
pub struct Head {
    /// Which file it is.
    pub file: Identity,
    /// The disks' identities, in order.
    pub identities: Vec<DiskIdentity>,
}

impl Head {
    /// Whether it is of a machine whose disks have these leaves: of one of them at least, as others may be gone.
    #[must_use]
    pub fn is_of(&self, leaves: &[[u8; 16]]) -> bool {
        self.leaves().any(|leaf| leaves.contains(&leaf)) || self.identities.is_empty() && leaves.is_empty()
    }

    /// The UUIDs of the leaves.
    pub fn leaves(&self) -> impl Iterator<Item = [u8; 16]> {
        self.identities.iter().filter_map(|disk| Some(disk.layers.first()?.uuid))
    }
}

/// Writes a state to a new file that only the user can read, durable when it returns. Returns which file that is.
///
/// # Errors
/// `Exists` when something is there; `Locked` when another process makes the same file; as the host fails. No new file is
/// left then.
pub fn write(path: &Path, state: &SavedState, memory: &Memory) -> Result<Identity, Error> {
    let failed = |error: io::Error| Error::io(error, "the state can't be written").at(path);
    // One name, so that what a killed process left is not there for ever.
    let name = format!(".{}.passing", path.file_name().unwrap_or_default().to_string_lossy());
    let passing = folder_of(path).join(name);
    let file = create(&passing, path)?;
    let written = (|| {
        let identity = identity_of(&file).map_err(failed)?;
        fill(&file, state, memory).map_err(failed)?;
        let in_the_way = "exists already, and a saved state replaces nothing; move it away, or give another place with --state";
        LocalHost.rename_new(&passing, path).map_err(|error| match error.kind() {
            ErrorKind::Exists => Error::new(ErrorKind::Exists, in_the_way).at(path),
            _ => error,
        })?;
        LocalHost.sync_folder(folder_of(path))?;
        Ok(identity)
    })();
    written.inspect_err(|_| drop(std::fs::remove_file(&passing)))
}

fn fill(file: &File, state: &SavedState, memory: &Memory) -> io::Result<()> {
    let mut file = BufWriter::new(file);
    write_start(&mut file)?;
    let content = postcard::to_stdvec(state).map_err(io::Error::other)?;
    write_section(&mut file, *b"stat", &content)?;
    let pieces = memory::save(memory, |content| write_section(&mut file, *b"memo", &content))?;
    write_section(&mut file, *b"end ", &(pieces + 1).to_le_bytes())?;
    file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

/// Makes the file under its passing name, locked as long as it is open: it will hold the guest's memory.
fn create(passing: &Path, path: &Path) -> Result<File, Error> {
    let failed = |error: io::Error| Error::io(error, "the state can't be written").at(path);
    let create = || File::options().write(true).create_new(true).mode(0o600).open(passing);
    let file = match create() {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            remove_left(passing)?;
            create()
        }
        file => file,
    };
    let file = file.map_err(failed)?;
    // A umask may have taken more away than it should.
    file.set_permissions(Permissions::from_mode(0o600)).map_err(failed)?;
    file.try_lock().map_err(|_| Error::new(ErrorKind::Locked, "is being written by another process").at(path))?;
    Ok(file)
}

/// Removes what a save left that was killed: a file of this name that begins as one, and that nobody writes to.
fn remove_left(passing: &Path) -> Result<(), Error> {
    let failed = |error: io::Error| Error::io(error, "is in the way of a saved state").at(passing);
    let Some(file) = open(passing)? else { return Ok(()) };
    file.try_lock().map_err(|_| Error::new(ErrorKind::Locked, "is being written by another process").at(passing))?;
    let mut start = Vec::new();
    (&file).take(MAGIC.len() as u64).read_to_end(&mut start).map_err(failed)?;
    if !MAGIC.starts_with(&start) {
        let message = "is in the way of a saved state, and is not the beginning of one that was left; move it away";
        return Err(Error::new(ErrorKind::Exists, message).at(passing));
    }
    std::fs::remove_file(passing).map_err(failed)
}

/// Opens a file that may be a saved state: a regular one, not through a link. `None` where there is none.
fn open(path: &Path) -> Result<Option<File>, Error> {
    open_beneath(folder_of(path), Path::new(path.file_name().unwrap_or_default()), Beneath::NoLinks)
}

/// Removes the file that was read, if it still has its name.
///
/// # Errors
/// `Refused` when another file has that name now; as the host fails.
pub fn remove(path: &Path, file: Identity) -> Result<(), Error> {
    let now = open(path)?.map(|now| identity_of(&now)).transpose();
    if now.map_err(|error| Error::io(error, "can't be examined").at(path))? != Some(file) {
        return Err(Error::new(ErrorKind::Refused, "is another file than the saved state that was read, and is left").at(path));
    }
    LocalHost.remove(path)?;
    LocalHost.sync_folder(folder_of(path))
}

/// Where a saved state is that the user names: a link is followed.
#[must_use]
pub fn named(path: &Path) -> PathBuf {
    let is_link = path.symlink_metadata().is_ok_and(|found| found.is_symlink());
    path.canonicalize().ok().filter(|_| is_link).unwrap_or_else(|| path.to_owned())
}

/// Reads the machine's part of a state, and leaves the file where memory begins. `None` where there is no file.
fn read_start(path: &Path) -> Result<Option<(SavedState, Identity, BufReader<File>)>, Error> {
    let Some(file) = open(path)? else { return Ok(None) };
    let identity = identity_of(&file).map_err(|error| failed(error).at(path))?;
    let mut file = BufReader::new(file);
    let state = read_head(&mut file).map_err(|error| error.at(path))?;
    Ok(Some((state, identity, file)))
}

/// Reads the machine's part of a state, and leaves `file` where memory begins.
///
/// # Errors
/// `Corrupt` where it is cut or changed, `Unsupported` for another version; as `file` fails.
pub fn read_head(file: &mut impl Read) -> Result<SavedState, Error> {
    let mut start = [0; 12];
    file.read_exact(&mut start).map_err(failed)?;
    if start[..8] != MAGIC {
        return Err(corrupt("is no saved state: it does not begin with VHDSAVED"));
    }
    if start[8..] != VERSION.to_le_bytes() {
        let message = format!("is a saved state of another version than {VERSION}, which is the one that is known here");
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let (tag, content) = read_section(file).map_err(failed)?;
    if tag != *b"stat" {
        return Err(corrupt("does not begin with the machine's state"));
    }
    postcard::from_bytes(&content).map_err(|_| corrupt("its machine's state is not understood"))
}

fn corrupt(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("{what}, so it can't be gone on from; move it away, or bring the saved state back"))
}

fn failed(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => corrupt("ends too early"),
        io::ErrorKind::InvalidData => corrupt(&error.to_string()),
        _ => Error::io(error, "can't be read"),
    }
}

/// What a saved state says of its machine; `None` where there is no file.
///
/// # Errors
/// As [`read`].
pub fn look(path: &Path) -> Result<Option<Head>, Error> {
    Ok(read_start(path)?.map(|(state, file, _)| Head { file, identities: state.identities }))
}

/// Reads a state; `memory_of` gives the memory to fill, once it is known how much. Returns which file it was, too.
///
/// # Errors
/// `NotFound`; `Refused` for what is no regular file; `Corrupt` where a section is cut or changed, `Unsupported` for another
/// version; as `memory_of` fails.
pub fn read(
    path: &Path,
    memory_of: impl FnOnce(&SavedState) -> Result<Memory, Error>,
) -> Result<(SavedState, Memory, Identity), Error> {
    let missing = || Error::new(ErrorKind::NotFound, "does not exist").at(path);
    let (state, identity, mut file) = read_start(path)?.ok_or_else(missing)?;
    let memory = memory_of(&state)?;
    read_memory(&mut file, &memory).map_err(|error| error.at(path))?;
    Ok((state, memory, identity))
}

/// Reads the rest of a state: each piece of memory at most once, in order.
///
/// # Errors
/// `Corrupt`; as `file` fails.
pub fn read_memory(file: &mut impl Read, memory: &Memory) -> Result<(), Error> {
    let (mut sections, mut last): (u64, _) = (1, None);
    loop {
        let (tag, content) = read_section(file).map_err(failed)?;
        match &tag {
            b"memo" => {
                let start = memory::restore(memory, &content).map_err(failed)?;
                if last.replace(start).is_some_and(|last| last >= start) {
                    return Err(corrupt("has pieces of memory out of order"));
                }
            }
            b"end " if content == sections.to_le_bytes() => break,
            _ => return Err(corrupt("has a section that does not belong there")),
        }
        sections += 1;
    }
    if file.read(&mut [0]).map_err(failed)? != 0 {
        return Err(corrupt("goes on behind its end"));
    }
    Ok(())
}

fn read_section(file: &mut impl Read) -> io::Result<Section> {
    let mut head = [0; 16];
    file.read_exact(&mut head)?;
    let [t0, t1, t2, t3, len @ .., c0, c1, c2, c3] = head;
    let (tag, len, crc) = ([t0, t1, t2, t3], u64::from_le_bytes(len), u32::from_le_bytes([c0, c1, c2, c3]));
    if len > MAX_SECTION {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("has a section of {len} bytes, more than {MAX_SECTION}")));
    }
    let mut content = Vec::new();
    file.take(len).read_to_end(&mut content)?;
    if content.len() as u64 != len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if crc != crc_of(tag, &content) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "has a section whose checksum is wrong"));
    }
    Ok((tag, content))
}
