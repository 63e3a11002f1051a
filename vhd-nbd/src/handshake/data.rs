//! Reading the data of options.

use crate::codec::MAX_STRING;

/// Data that is read from the front, number by number.
pub(super) struct Data<'a>(&'a [u8]);

/// What may be wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed(pub(super) &'static str);

type Result<T> = std::result::Result<T, Malformed>;

const SHORT: Malformed = Malformed("the option's data is too short for what it announces");

impl<'a> Data<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        super::take(&mut self.0, len).ok_or(SHORT)
    }

    pub(super) fn u16(&mut self) -> Result<u16> {
        self.take(2)?.try_into().map(u16::from_be_bytes).map_err(|_| SHORT)
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        self.take(4)?.try_into().map(u32::from_be_bytes).map_err(|_| SHORT)
    }

    /// A string with its length before it.
    pub(super) fn string(&mut self) -> Result<&'a str> {
        let len = self.u32()?;
        text(self.take(usize::try_from(len).map_err(|_| SHORT)?)?)
    }

    /// Nothing may be left.
    pub(super) fn end(&self) -> Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed("the option has more data than it announces")) }
    }
}

/// A string as the protocol has them.
pub(super) fn text(bytes: &[u8]) -> Result<&str> {
    if bytes.len() > MAX_STRING {
        return Err(Malformed("a string is longer than 4096 bytes"));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| Malformed("a string is not UTF-8"))?;
    if text.contains('\0') { Err(Malformed("a string has a NUL inside")) } else { Ok(text) }
}
