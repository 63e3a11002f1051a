//! Saved states (`.vsv`): a guest in a file, to go on from there in another process.
//!
//! A file is a magic number, a version and sections. A section has a tag, its length and a CRC over all of that; the
//! last one says how many there were. Nothing of a file is believed before its section's CRC is right, and no length
//! makes more memory than `MAX_SECTION` be asked for.

mod memory;

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;

use crc::{CRC_32_ISO_HDLC, Crc};
use serde::{Deserialize, Serialize};
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

fn write_section(to: &mut impl Write, tag: [u8; 4], content: &[u8]) -> io::Result<()> {
    to.write_all(&tag)?;
    to.write_all(&(content.len() as u64).to_le_bytes())?;
    to.write_all(&crc_of(tag, content).to_le_bytes())?;
    to.write_all(content)
}

/// Writes a state to a new file, durable when it returns. A file that is there is replaced only then.
///
/// # Errors
/// As the host fails; no new file is left then.
pub fn write(path: &Path, state: &SavedState, memory: &Memory) -> Result<(), Error> {
    let failed = |error: io::Error| Error::io(error, "the state can't be written").at(path);
    let folder = vhd_core::storage::folder_of(path);
    // One name, so that what a killed process left is not there for ever.
    let passing = folder.join(format!(".{}.passing", path.file_name().unwrap_or_default().to_string_lossy()));
    let written = (|| {
        let mut file = BufWriter::new(File::create(&passing)?);
        file.write_all(&MAGIC)?;
        file.write_all(&VERSION.to_le_bytes())?;
        let content = postcard::to_stdvec(state).map_err(io::Error::other)?;
        write_section(&mut file, *b"stat", &content)?;
        let pieces = memory::save(memory, |content| write_section(&mut file, *b"memo", &content))?;
        write_section(&mut file, *b"end ", &(pieces + 1).to_le_bytes())?;
        file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        std::fs::rename(&passing, path)?;
        File::open(folder)?.sync_all()
    })();
    written.map_err(failed).inspect_err(|_| drop(std::fs::remove_file(&passing)))
}

/// Reads the machine's part of a state, and leaves the file where memory begins.
fn read_start(path: &Path) -> Result<(SavedState, BufReader<File>), Error> {
    let mut file = BufReader::new(File::open(path).map_err(|error| failed(path, error))?);
    let mut start = [0; 12];
    file.read_exact(&mut start).map_err(|error| failed(path, error))?;
    if start[..8] != MAGIC {
        return Err(corrupt(path, "is no saved state: it does not begin with VHDSAVED"));
    }
    if start[8..] != VERSION.to_le_bytes() {
        let message = format!("is a saved state of another version than {VERSION}, which is the one that is known here");
        return Err(Error::new(ErrorKind::Unsupported, message).at(path));
    }
    let (tag, content) = read_section(&mut file).map_err(|error| failed(path, error))?;
    if tag != *b"stat" {
        return Err(corrupt(path, "does not begin with the machine's state"));
    }
    let state = postcard::from_bytes(&content).map_err(|_| corrupt(path, "its machine's state is not understood"))?;
    Ok((state, file))
}

fn corrupt(path: &Path, what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("{what}; the saved state can't be gone on from")).at(path)
}

fn failed(path: &Path, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => corrupt(path, "ends too early"),
        io::ErrorKind::InvalidData => corrupt(path, &error.to_string()),
        _ => Error::io(error, "can't be read").at(path),
    }
}

/// Which disks a state is of.
///
/// # Errors
/// As [`read`].
pub fn disks_of(path: &Path) -> Result<Vec<DiskIdentity>, Error> {
    Ok(read_start(path)?.0.identities)
}

/// Reads a state; `memory_of` gives the memory to fill, once it is known how much.
///
/// # Errors
/// `Corrupt` where a section is cut or changed, `Unsupported` for another version; as `memory_of` fails.
pub fn read(path: &Path, memory_of: impl FnOnce(&SavedState) -> Result<Memory, Error>) -> Result<(SavedState, Memory), Error> {
    let (state, mut file) = read_start(path)?;
    let memory = memory_of(&state)?;
    let mut sections: u64 = 1;
    loop {
        let (tag, content) = read_section(&mut file).map_err(|error| failed(path, error))?;
        match &tag {
            b"memo" => memory::restore(&memory, &content).map_err(|error| failed(path, error))?,
            b"end " if content == sections.to_le_bytes() => break,
            _ => return Err(corrupt(path, "has a section that does not belong there")),
        }
        sections += 1;
    }
    if file.read(&mut [0]).map_err(|error| failed(path, error))? != 0 {
        return Err(corrupt(path, "goes on behind its end"));
    }
    Ok((state, memory))
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
