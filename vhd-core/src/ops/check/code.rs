//! What a check may find: one code each, with its severity.

use std::fmt;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Worth knowing, and no fault.
    Note,
    /// A fault that costs no data here: something else may trip over it, or space is wasted.
    Warning,
    /// Data is lost or in danger, or the image does not open.
    Error,
}

impl Severity {
    /// The word for JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

macro_rules! codes {
    ($($(#[$doc:meta])+ $variant:ident $name:literal $severity:ident $repairable:literal,)+) => {
        /// What was found. The names are stable: scripts rely on them.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum Code {
            $($(#[$doc])+ $variant,)+
        }

        impl Code {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The name that JSON and text show.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// How bad it is.
            #[must_use]
            pub fn severity(self) -> Severity {
                match self { $(Self::$variant => Severity::$severity,)+ }
            }

            /// True when a repair that can lose nothing mends it.
            #[must_use]
            pub(super) fn repairable(self) -> bool {
                match self { $(Self::$variant => $repairable,)+ }
            }
        }
    };
}

codes! {
    /// Neither footer is valid. Repairable where only a checksum is wrong.
    NoValidFooter "no-valid-footer" Error false,
    /// The file does not end with a footer.
    TrailingFooterMissing "trailing-footer-missing" Warning true,
    /// The file grew, and its new end never got a footer: the old one stands where the file ended.
    StaleTrailingFooter "stale-trailing-footer" Warning true,
    /// tapdisk overwrote the trailing footer: it has the image open, or was killed.
    TrailingFooterTapdisk "trailing-footer-tapdisk" Warning true,
    /// The trailing footer has the 511 bytes of Virtual PC before 2004.
    FooterShort "footer-short" Note true,
    /// No footer at offset 0.
    HeaderCopyMissing "header-copy-missing" Warning true,
    /// Both footers are valid and say different things.
    FootersDisagree "footers-disagree" Warning true,
    /// A footer's checksum is wrong.
    FooterChecksum "footer-checksum" Warning true,
    /// The checksum of a footer leaves out tapdisk's hidden byte, as old versions of it do.
    FooterChecksumHidden "footer-checksum-hidden" Note true,
    /// A footer's format version is unknown.
    FooterVersion "footer-version" Warning true,
    /// A footer's disk type is none that is served.
    DiskTypeUnknown "disk-type-unknown" Warning true,
    /// A footer's data offset can't be that of a dynamic header.
    FooterDataOffset "footer-data-offset" Warning true,
    /// A fixed disk's data offset is not all ones.
    FixedDataOffset "fixed-data-offset" Note false,
    /// The feature bit that is always set is not.
    FeaturesReservedClear "features-reserved-clear" Warning false,
    /// Feature bits that nobody defined.
    FeaturesUnknown "features-unknown" Warning false,
    /// The image is marked as temporary.
    Temporary "temporary" Note false,
    /// The footer's reserved bytes are not zero.
    FooterReserved "footer-reserved" Note false,
    /// A time stamp lies in the future.
    TimestampFuture "timestamp-future" Note false,
    /// A virtual machine's saved state relies on the image.
    SavedState "saved-state" Note false,
    /// tapdisk's hidden byte: the image is there for its children.
    Hidden "hidden" Note false,
    /// The image has no identifier.
    UuidZero "uuid-zero" Note false,
    /// The file's length is not a whole number of sectors.
    FileUnaligned "file-unaligned" Note false,
    /// The disk has no bytes.
    SizeZero "size-zero" Error false,
    /// The disk is no whole number of sectors.
    SizeUnaligned "size-unaligned" Warning false,
    /// The disk is larger than a BAT can address.
    SizeTooLarge "size-too-large" Error false,
    /// The disk has a size that Windows refuses.
    SizeWindows "size-windows" Note false,
    /// The disk is larger than the IDE controllers of Virtual PC and Virtual Server show.
    SizeIdeLimit "size-ide-limit" Note false,
    /// The disk was resized.
    Resized "resized" Note false,
    /// The geometry is not the one of the specification for this size.
    GeometryMismatch "geometry-mismatch" Note false,
    /// A fixed disk's file is shorter than its disk.
    FixedDataShort "fixed-data-short" Error false,
    /// A fixed disk's file has room between data and footer.
    FixedTrailingRoom "fixed-trailing-room" Note false,
    /// The dynamic header lies outside the file.
    HeaderOutside "header-outside" Error false,
    /// There is no dynamic header where it should be.
    HeaderMissing "header-missing" Error false,
    /// The dynamic header's checksum is wrong.
    HeaderChecksum "header-checksum" Error true,
    /// The dynamic header's version is unknown.
    HeaderVersion "header-version" Error false,
    /// The dynamic header's next-structure offset is not all ones.
    HeaderNext "header-next" Note false,
    /// The dynamic header's reserved bytes are not zero.
    HeaderReserved "header-reserved" Note false,
    /// The block size is none that is served.
    BlockSize "block-size" Error false,
    /// The block size is none that Windows serves.
    BlockSizeUnusual "block-size-unusual" Note false,
    /// The BAT can't begin where the header says.
    BatOffset "bat-offset" Error false,
    /// The BAT does not lie inside the file as a whole.
    BatOutside "bat-outside" Error false,
    /// The BAT has fewer entries than the disk has blocks.
    BatTooSmall "bat-too-small" Error false,
    /// The BAT has many more entries than the disk has blocks.
    BatLarger "bat-larger" Note false,
    /// Entries past those of the disk's blocks are used.
    BatExtraUsed "bat-extra-used" Note false,
    /// Two of header, BAT, locators, batmap and footers share bytes of the file.
    MetadataOverlap "metadata-overlap" Error false,
    /// A BAT entry names a block beyond the end of the file.
    BlockOutside "block-outside" Error false,
    /// A block is cut by the end of the file.
    BlockCut "block-cut" Error false,
    /// A block lies over the trailing footer.
    BlockOverFooter "block-over-footer" Error false,
    /// A block lies over metadata.
    BlockOverMetadata "block-over-metadata" Error false,
    /// Two BAT entries name one block.
    BlockDuplicate "block-duplicate" Error false,
    /// Two blocks share bytes of the file.
    BlocksOverlap "blocks-overlap" Error false,
    /// Space in the file that could hold blocks and that nothing names. Not repairable while there are errors: it may
    /// hold the blocks that a damaged BAT lost.
    LeakedSpace "leaked-space" Warning true,
    /// Space in the file that waits for blocks and takes no room of the host: blocks were freed there, or the file grew.
    FreeSpace "free-space" Note false,
    /// tapdisk made the image, but its batmap is not there.
    BatmapMissing "batmap-missing" Note false,
    /// The batmap is not where a batmap can be, or too small for the disk.
    BatmapPlace "batmap-place" Warning false,
    /// The batmap's checksum is wrong.
    BatmapChecksum "batmap-checksum" Warning true,
    /// The batmap calls a block full that is not allocated.
    BatmapUnallocated "batmap-unallocated" Warning true,
    /// The batmap calls a block full whose bitmap is not.
    BatmapNotFull "batmap-not-full" Warning true,
    /// A locator's platform code is unknown.
    LocatorUnknown "locator-unknown" Warning false,
    /// Two locators have one platform code.
    LocatorDuplicate "locator-duplicate" Warning false,
    /// A locator's payload is not inside the file.
    LocatorOutside "locator-outside" Warning false,
    /// A locator has no payload.
    LocatorEmpty "locator-empty" Warning false,
    /// A locator's payload is longer than its room.
    LocatorSpace "locator-space" Warning false,
    /// The payloads of two locators share bytes.
    LocatorsOverlap "locators-overlap" Warning false,
    /// A locator's path can't be decoded.
    LocatorUndecodable "locator-undecodable" Warning false,
    /// A locator's path is followed by a NUL.
    LocatorNul "locator-nul" Note false,
    /// A locator leads to no file that may be opened.
    LocatorDead "locator-dead" Note false,
    /// A locator leads to another image than the parent.
    LocatorWrongParent "locator-wrong-parent" Warning false,
    /// A differencing disk names its parent by name only.
    LocatorNone "locator-none" Note false,
    /// An image without a parent names one.
    ParentUnexpected "parent-unexpected" Note false,
    /// The parent is a raw file or device.
    ParentRaw "parent-raw" Note false,
    /// The image is its own parent.
    ParentSelf "parent-self" Error false,
    /// The header has no parent name.
    ParentNameEmpty "parent-name-empty" Warning false,
    /// A locator's file name is not the header's.
    ParentNameDiffers "parent-name-differs" Note false,
    /// The parent was not found.
    ParentNotFound "parent-not-found" Error false,
    /// The parent's disk has another size.
    ParentSizeDiffers "parent-size-differs" Note false,
    /// The parent file changed after the child was made.
    ParentTimestamp "parent-timestamp" Note false,
    /// The chain of parents leads back into itself, or is too long.
    ChainLoop "chain-loop" Error false,
    /// An operation on the image was interrupted; its intent record is beside it.
    Interrupted "interrupted" Error false,
    /// The host can't read a part of the image.
    Unreadable "unreadable" Error false,
    /// Sectors that the bitmap calls unwritten hold data, which reads as zeros.
    BitmapClearOverData "bitmap-clear-over-data" Warning false,
    /// A footer inside a block: QEMU allocated the block over the old one.
    QemuDamage "qemu-damage" Warning false,
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
