//! The one error type of the crate.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What sort of failure an [`Error`] is: what a caller can act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The host failed to read, write or sync.
    Io,
    /// The host has no room. The image is unharmed and goes on when there is room again.
    NoSpace,
    /// The file is not a VHD.
    NotVhd,
    /// The image contradicts itself or the format.
    Corrupt,
    /// Legal, but nothing that is served here.
    Unsupported,
    /// The parent could not be found, is another image or may not be opened.
    Parent,
    /// The image is in use by someone else.
    Locked,
    /// Refused to protect data; an option overrides it.
    Refused,
    /// The image or device was opened read-only.
    ReadOnly,
    /// The range is not inside the disk.
    OutOfRange,
    /// An earlier write failed, so the image takes no more of them.
    Latched,
    /// The file does not exist.
    NotFound,
    /// The file exists already.
    Exists,
    /// What was asked for makes no sense.
    InvalidInput,
    /// The user stopped it.
    Cancelled,
}

impl ErrorKind {
    const ALL: [Self; 15] = [
        Self::Io,
        Self::NoSpace,
        Self::NotVhd,
        Self::Corrupt,
        Self::Unsupported,
        Self::Parent,
        Self::Locked,
        Self::Refused,
        Self::ReadOnly,
        Self::OutOfRange,
        Self::Latched,
        Self::NotFound,
        Self::Exists,
        Self::InvalidInput,
        Self::Cancelled,
    ];

    /// The kind that has this word.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// The word for this kind in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Io => "io",
            Self::NoSpace => "no-space",
            Self::NotVhd => "not-vhd",
            Self::Corrupt => "corrupt",
            Self::Unsupported => "unsupported",
            Self::Parent => "parent",
            Self::Locked => "locked",
            Self::Refused => "refused",
            Self::ReadOnly => "read-only",
            Self::OutOfRange => "out-of-range",
            Self::Latched => "latched",
            Self::NotFound => "not-found",
            Self::Exists => "exists",
            Self::InvalidInput => "invalid-input",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What went wrong with which file: what was found, what was expected, what to do.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    path: Option<PathBuf>,
    message: String,
    source: Option<io::Error>,
}

impl Error {
    /// An error of `kind` with a message of one line.
    #[must_use]
    #[cold]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, path: None, message: message.into(), source: None }))
    }

    /// A failure of the host, `doing` what: "can't read 512 bytes at offset 0".
    #[must_use]
    #[cold]
    pub fn io(source: io::Error, doing: impl Into<String>) -> Self {
        use io::ErrorKind as Io;
        let kind = match source.kind() {
            Io::StorageFull | Io::QuotaExceeded => ErrorKind::NoSpace,
            Io::NotFound => ErrorKind::NotFound,
            Io::AlreadyExists => ErrorKind::Exists,
            Io::ReadOnlyFilesystem => ErrorKind::ReadOnly,
            _ => ErrorKind::Io,
        };
        Self(Box::new(Inner { kind, path: None, message: doing.into(), source: Some(source) }))
    }

    /// Names the file, unless a layer below already did.
    #[must_use]
    pub fn at(mut self, path: &Path) -> Self {
        self.0.path.get_or_insert_with(|| path.to_owned());
        self
    }

    /// Names this file instead of the one that a layer below knew.
    #[must_use]
    pub fn about(mut self, path: &Path) -> Self {
        self.0.path = Some(path.to_owned());
        self
    }

    /// The same failure as another kind.
    #[must_use]
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.0.kind = kind;
        self
    }

    /// What sort of failure this is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The file that it is about.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// What is wrong, without the file's name.
    #[must_use]
    pub fn message(&self) -> String {
        let message = visible(&self.0.message);
        match &self.0.source {
            Some(source) => format!("{message}: {source}"),
            None => message,
        }
    }

    /// The number that the host gave, where it was the host.
    #[must_use]
    pub fn raw_os_error(&self) -> Option<i32> {
        self.0.source.as_ref().and_then(io::Error::raw_os_error)
    }
}

/// For all who waited for what failed. Of a failure of the host that has no number the text is kept.
impl Clone for Error {
    fn clone(&self) -> Self {
        let Inner { kind, path, message, source } = &*self.0;
        let (message, source) = match (source, self.raw_os_error()) {
            (Some(source), None) => (format!("{message}: {source}"), None),
            (_, code) => (message.clone(), code.map(io::Error::from_raw_os_error)),
        };
        Self(Box::new(Inner { kind: *kind, path: path.clone(), message, source }))
    }
}

/// Text as one line that does nothing to a terminal: paths come from images, too.
fn visible(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { char::REPLACEMENT_CHARACTER } else { letter }).collect()
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = self.path() {
            write!(f, "{}: ", visible(&path.display().to_string()))?;
        }
        f.write_str(&self.message())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}({self})", self.0.kind)
    }
}

impl std::error::Error for Error {}

/// Shorthand for `Err(Error::new(kind, format!(…)))`.
macro_rules! fail {
    ($kind:ident, $($message:tt)+) => {
        return Err($crate::Error::new($crate::ErrorKind::$kind, format!($($message)+)))
    };
}
pub(crate) use fail;
