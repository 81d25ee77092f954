//! Writes the frames whose pages are compressed or only referred to. Owns the buffers that takes.

use std::io;

use bytes::{BufMut, BytesMut};
use common::compression::Compressor;
use common::limits::MAX_FRAME_BYTES;
use common::proto::packed::{Body, PackedHeader, REFERENCE_BYTES};
use common::proto::pages::DATA_HEADER_BYTES;

use crate::frame::Loaded;

/// Packs frames, one after the other.
#[derive(Debug)]
pub struct Packer {
    compressor: Compressor,
    /// Pages to compress, together.
    stored: Vec<u8>,
    compressed: Box<[u8]>,
}

impl Packer {
    /// Allocates the buffers.
    pub fn new() -> io::Result<Self> {
        Ok(Packer {
            compressor: Compressor::new()?,
            stored: Vec::with_capacity(MAX_FRAME_BYTES),
            compressed: vec![0; MAX_FRAME_BYTES].into(),
        })
    }

    /// Makes the body of a frame of the pages that are neither zero nor referred to: compressed, where that is wanted
    /// and saves enough. Says which in the header.
    pub fn pack(
        &mut self,
        loaded: &Loaded,
        header: &mut PackedHeader,
        compress: bool,
    ) -> Packed<'_> {
        self.stored.clear();
        for index in loaded.pages_besides(header.zero | header.referred) {
            self.stored.extend_from_slice(loaded.page(index));
        }
        header.body = Body::Raw;
        if !compress || self.stored.is_empty() {
            return Packed(&self.stored);
        }
        let room = &mut self.compressed[..worth_sending(self.stored.len())];
        match self.compressor.compress(&self.stored, room) {
            Some(length) => {
                header.body = Body::Zstd;
                Packed(&self.compressed[..length])
            }
            None => Packed(&self.stored),
        }
    }
}

/// The body of a frame.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a>(&'a [u8]);

impl Packed<'_> {
    /// The whole frame, behind `header`, which learns how long it is. `slots` are the pages it refers to.
    pub fn frame(self, header: &mut PackedHeader, slots: &[usize]) -> BytesMut {
        let references = slots.len() * REFERENCE_BYTES;
        header.payload = (references + self.0.len()) as u32;
        // No larger than what is in it: many of these may wait for the link.
        let mut bytes = BytesMut::with_capacity(DATA_HEADER_BYTES + references + self.0.len());
        bytes.put_slice(&header.encode());
        for slot in slots {
            bytes.put_u32_le(*slot as u32);
        }
        bytes.put_slice(self.0);
        bytes
    }
}

/// Most bytes that are worth decompressing instead of `stored` bytes of pages: an eighth less.
fn worth_sending(stored: usize) -> usize {
    stored - stored / 8
}
