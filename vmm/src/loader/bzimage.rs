//! Kernels that are a bzImage: a header, code that unpacks, and the packed kernel.

use std::io::Read;

use super::{Entry, Loaded};
use crate::memory::{GAP, Memory};

/// Where the setup header is, in the file and in the zero page.
pub const SETUP: usize = 0x1F1;
/// The entry in 64-bit mode, from the start of the protected-mode code.
const ENTRY_64: u64 = 0x200;
/// Bytes of an unpacked kernel at most.
const MAX_UNPACKED: u64 = 512 << 20;
/// Where the protected-mode code goes.
const LOAD_AT: u64 = 0x10_0000;

/// A bzImage.
pub struct Image<'a> {
    bytes: &'a [u8],
    code: usize,
}

impl<'a> Image<'a> {
    /// A file, if it is a bzImage of boot protocol 2.12 or later, with a 64-bit entry.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let image = Self { bytes, code: (usize::from(*bytes.get(SETUP)?).max(1) + 1) * 512 };
        let sound = bytes.get(0x202..0x206)? == b"HdrS"
            && image.number::<2>(0x206)? >= 0x020C
            && image.number::<2>(0x236)? & 1 != 0
            && bytes.len() > image.code + ENTRY_64 as usize;
        sound.then_some(image)
    }

    fn number<const N: usize>(&self, at: usize) -> Option<u64> {
        let bytes = self.bytes.get(at..at + N)?;
        Some(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    /// The setup header, for the zero page.
    pub fn setup(&self) -> &'a [u8] {
        // Its length is the operand of the jump in front of its magic.
        let end = 0x202 + usize::from(self.bytes[0x201]);
        &self.bytes[SETUP..end.clamp(0x202, 0x290).min(self.bytes.len())]
    }

    /// The packed kernel, unpacked; nothing where the guest must do it.
    pub fn unpack(&self) -> Result<Option<Vec<u8>>, String> {
        let offset = self.number::<4>(0x248).unwrap_or(0) as usize;
        let len = self.number::<4>(0x24C).unwrap_or(0) as usize;
        if len == 0 {
            return Ok(None);
        }
        let packed = self.bytes.get(self.code..).and_then(|code| code.get(offset..)).and_then(|rest| rest.get(..len));
        unpack(packed.ok_or_else(|| "is cut: it ends within the packed kernel".to_owned())?)
    }

    /// Loads the code that unpacks.
    pub fn load(&self, memory: &Memory) -> Result<Loaded, String> {
        let code = &self.bytes[self.code..];
        memory.write(LOAD_AT, code).map_err(|error| error.to_string())?;
        // It unpacks where it prefers to be, and needs so many bytes there.
        let prefers = self.number::<8>(0x258).unwrap_or(0);
        let needs = self.number::<4>(0x260).unwrap_or(0);
        let end = prefers.checked_add(needs).filter(|end| *end <= memory.size().min(GAP.start));
        let end = end.ok_or_else(|| format!("needs {needs} bytes at {prefers:#x}; give more memory"))?;
        Ok(Loaded { entry: Entry::Long(LOAD_AT + ENTRY_64), end: end.max(LOAD_AT + code.len() as u64) })
    }
}

/// How files begin that gzip's and lz4's kin packed which are not unpacked here: bzip2, lzma, xz, lzo.
const LEFT_TO_GUEST: [&[u8]; 4] = [b"BZh", &[0x5D, 0, 0], &[0xFD, b'7', b'z', b'X', b'Z'], &[0x89, b'L', b'Z', b'O']];

/// Unpacks what gzip, zstd or lz4 (the form that Linux uses) packed. Nothing, for what a kernel can only unpack itself.
///
/// # Errors
/// What is wrong with the packed bytes.
pub fn unpack(packed: &[u8]) -> Result<Option<Vec<u8>>, String> {
    let mut unpacked = Vec::new();
    let result = match packed {
        [0x1F, 0x8B, ..] => flate2::read::GzDecoder::new(packed).take(MAX_UNPACKED).read_to_end(&mut unpacked),
        [0x28, 0xB5, 0x2F, 0xFD, ..] => ruzstd::decoding::StreamingDecoder::new(packed)
            .map_err(|error| format!("can't be unpacked: {error}"))?
            .take(MAX_UNPACKED)
            .read_to_end(&mut unpacked),
        [0x02, 0x21, 0x4C, 0x18, rest @ ..] => return unpack_lz4(rest).map(Some),
        _ if LEFT_TO_GUEST.iter().any(|magic| packed.starts_with(magic)) => return Ok(None),
        _ => return Err(format!("is packed in a way that is not known here ({:02x?})", &packed[..packed.len().min(6)])),
    };
    match result {
        Ok(_) if (unpacked.len() as u64) < MAX_UNPACKED => Ok(Some(unpacked)),
        Ok(_) => Err(format!("is more than {MAX_UNPACKED} bytes unpacked")),
        Err(error) => Err(format!("can't be unpacked: {error}")),
    }
}

/// The old frame of lz4: pieces of 8 MiB, each with the length of its packed bytes before it; behind them, in a bzImage,
/// the length of what was packed.
fn unpack_lz4(mut rest: &[u8]) -> Result<Vec<u8>, String> {
    const PIECE: usize = 8 << 20;
    let mut unpacked = Vec::new();
    while let Some((len, behind)) = rest.split_first_chunk::<4>() {
        let len = u32::from_le_bytes(*len) as usize;
        if behind.is_empty() && len == unpacked.len() {
            break;
        }
        let piece = behind.get(..len).ok_or("can't be unpacked: it is cut")?;
        unpacked.extend(lz4_flex::block::decompress(piece, PIECE).map_err(|error| format!("can't be unpacked: {error}"))?);
        if unpacked.len() as u64 > MAX_UNPACKED {
            return Err(format!("is more than {MAX_UNPACKED} bytes unpacked"));
        }
        rest = &behind[len..];
    }
    Ok(unpacked)
}
