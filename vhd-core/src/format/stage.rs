//! Marks of half-made files: what a file bears in place of a footer while an operation rebuilds it in stages.
//!
//! A mark is a footer whose cookie is another one, with a checksum over that. No reader of VHDs takes it for a footer, so the
//! file is no image to anyone, whatever its name, until the operation is done. All else that the footer says is kept: the mark
//! is taken back by writing the cookie.

use super::{FOOTER_LEN, Footer};

/// What is being done to a file that bears a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Its content moves to another file, which has the same identifier: a conversion in place.
    ConvertSource,
    /// It takes the content of another file: the other side of a conversion in place.
    ConvertTarget,
    /// It takes what an image above it holds: a merge.
    Merge,
    /// A fixed disk of so many bytes gets the size that its mark says.
    Resize {
        /// Bytes of the disk before.
        from: u64,
    },
}

impl Stage {
    /// The cookie of this mark.
    pub(super) fn cookie(self) -> [u8; 8] {
        match self {
            Self::ConvertSource => *b"vhd-from",
            Self::ConvertTarget => *b"vhd-into",
            Self::Merge => *b"vhd-take",
            Self::Resize { .. } => *b"vhd-size",
        }
    }

    /// The mark that this footer becomes.
    #[must_use]
    pub fn mark(self, footer: &Footer) -> [u8; FOOTER_LEN] {
        footer.marked(self)
    }

    /// The mark that these bytes are, and the footer that it was; `None` for what is none, or whose checksum is wrong.
    #[must_use]
    pub fn parse(bytes: &[u8; FOOTER_LEN]) -> Option<(Self, Footer)> {
        Footer::unmarked(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Creator, DiskType, NewFooter, Timestamp};
    use super::*;

    #[test]
    fn a_mark_keeps_the_footer_and_is_none_itself() {
        for disk_type in [DiskType::Fixed, DiskType::Dynamic, DiskType::Differencing] {
            let new =
                NewFooter { disk_type, size: 1 << 30, uuid: [7; 16], creator: Creator::WINDOWS_10, timestamp: Timestamp(5) };
            let footer = Footer::new(&new);
            for stage in [Stage::ConvertSource, Stage::ConvertTarget, Stage::Merge, Stage::Resize { from: 0x1234_5678_9ABC }] {
                let is_size = matches!(stage, Stage::Resize { .. });
                if is_size && disk_type != DiskType::Fixed {
                    continue;
                }
                let mark = stage.mark(&footer);
                assert!(Footer::parse(&mark).is_err() && Footer::parse_tolerant(&mark).is_err());
                let (found, kept) = Stage::parse(&mark).unwrap();
                assert_eq!((found, kept.to_bytes()), (stage, footer.to_bytes()));
                for byte in 0..FOOTER_LEN {
                    let mut damaged = mark;
                    damaged[byte] ^= 0x10;
                    assert!(Stage::parse(&damaged).is_none(), "byte {byte}");
                }
            }
            assert!(Stage::parse(&footer.to_bytes()).is_none());
        }
    }
}
