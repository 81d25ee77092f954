//! Frame of an image file: two magic numbers, then messages with a 32-bit length before each.

use prost::Message;

use super::ImageError;
use crate::limits::MAX_IMAGE_MESSAGE_BYTES;

/// First word of every image but the inventory (`IMG_COMMON_MAGIC`).
const COMMON_MAGIC: u32 = 0x5456_4319;

/// The messages of one image file, in order.
pub(super) struct Messages<'a> {
    rest: &'a [u8],
    offset: usize,
}

impl<'a> Messages<'a> {
    /// Checks the magic numbers of a file of the kind `magic`.
    pub(super) fn open(file: &'a [u8], magic: u32) -> Result<Self, ImageError> {
        let mut messages = Messages {
            rest: file,
            offset: 0,
        };
        let found = [messages.word()?, messages.word()?];
        let expected = [COMMON_MAGIC, magic];
        if found != expected {
            return Err(ImageError::Magic { found, expected });
        }
        Ok(messages)
    }

    /// Decodes the next message, or returns `None` at the end of the file.
    pub(super) fn next<M: Message + Default>(&mut self) -> Result<Option<M>, ImageError> {
        match self.next_bytes()? {
            Some(message) => Ok(Some(M::decode(message)?)),
            None => Ok(None),
        }
    }

    /// The bytes of the next message, or `None` at the end of the file.
    pub(super) fn next_bytes(&mut self) -> Result<Option<&'a [u8]>, ImageError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let length = self.word()? as usize;
        if length > MAX_IMAGE_MESSAGE_BYTES {
            return Err(ImageError::TooLong(length));
        }
        self.take(length).map(Some)
    }

    fn word(&mut self) -> Result<u32, ImageError> {
        let bytes = self.take(size_of::<u32>())?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], ImageError> {
        let (head, rest) = self
            .rest
            .split_at_checked(length)
            .ok_or(ImageError::Truncated(self.offset))?;
        self.rest = rest;
        self.offset += length;
        Ok(head)
    }
}

/// The beginning of a file of the kind `magic`.
pub(super) fn header(magic: u32) -> Vec<u8> {
    [COMMON_MAGIC.to_le_bytes(), magic.to_le_bytes()].concat()
}

/// Appends a message, given in parts, to a file.
pub(super) fn append(file: &mut Vec<u8>, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    file.extend((length as u32).to_le_bytes());
    parts.iter().for_each(|part| file.extend(*part));
}

/// Writes image files for tests of the parsers.
#[cfg(test)]
pub(super) fn write<M: Message>(magic: u32, messages: &[M]) -> Vec<u8> {
    let mut file = header(magic);
    for message in messages {
        append(&mut file, &[&message.encode_to_vec()]);
    }
    file
}
