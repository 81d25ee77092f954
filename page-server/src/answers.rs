//! Makes the frames that answer requests of one demand stream.

use std::io;

use common::proto::packed::{Body, PackedHeader};
use common::proto::version;

use crate::compression::Paying;
use crate::frame::{self, Frame};
use crate::memory::{MemoryError, PageSource};
use crate::packer::Packer;
use crate::pending::Run;

/// Answers, compressed where the push found that this pays: pages that go together more often than one by itself, for
/// which a thread waits.
#[derive(Debug)]
pub struct Answers {
    /// `None` for a destination that takes pages only as they are.
    packer: Option<Packer>,
    paying: Paying,
}

impl Answers {
    /// For a destination that speaks `version`.
    pub fn new(version: u16, paying: Paying) -> io::Result<Self> {
        let packer = match version >= version::V3 {
            true => Some(Packer::new()?),
            false => None,
        };
        Ok(Answers { packer, paying })
    }

    /// Reads `run` and frames it.
    pub fn frame(&mut self, source: &dyn PageSource, run: Run) -> Result<Frame, MemoryError> {
        let pays = self.paying.is_so(run.pages.count);
        let Some(packer) = self.packer.as_mut().filter(|_| pays) else {
            return frame::read(source, run);
        };
        let loaded = frame::load(source, run)?;
        let mut header = PackedHeader {
            pid: run.pid,
            pages: run.pages,
            zero: loaded.contents.zero,
            referred: 0,
            kept: false,
            body: Body::Raw,
            payload: 0,
        };
        let body = packer.pack(&loaded, &mut header, true);
        if header.body == Body::Raw {
            return Ok(loaded.into_frame(&header.unpacked().encode()));
        }
        Ok(Frame {
            bytes: body.frame(&mut header, &[]).freeze(),
            contents: loaded.contents,
        })
    }
}

#[cfg(test)]
mod tests {
    use common::images::ImagePid;
    use common::page::{PageIndex, PageRange};
    use common::proto::pages::{DATA_HEADER_BYTES, DemandReply};

    use super::*;
    use crate::compression::Pays;

    /// Pages of one byte each; page 0 is zero, page 9 is noise.
    struct Simple;

    impl PageSource for Simple {
        fn read(
            &self,
            _: ImagePid,
            pages: PageRange,
            buffer: &mut [u8],
        ) -> Result<(), MemoryError> {
            let mut seed = 1_u32;
            for (index, page) in buffer.chunks_exact_mut(4096).enumerate() {
                let number = pages.start.forward(index as u64).0;
                page.fill(number as u8);
                if number == 9 {
                    page.fill_with(|| {
                        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                        (seed >> 24) as u8
                    });
                }
            }
            Ok(())
        }
    }

    fn reply(version: u16, pays: Pays, start: u64, count: u64) -> (DemandReply, usize) {
        let paying = Paying::default();
        paying.say(pays);
        let mut answers = Answers::new(version, paying).expect("memory");
        let run = Run {
            pid: ImagePid(1),
            pages: PageRange::new(PageIndex(start), count),
        };
        let frame = answers.frame(&Simple, run).expect("readable");
        let header = frame.bytes[..DATA_HEADER_BYTES]
            .try_into()
            .expect("a header");
        let reply = DemandReply::decode(header).expect("valid");
        (reply, frame.bytes.len())
    }

    #[test]
    fn answers_are_compressed_while_it_pays_and_is_understood() {
        let (packed, length) = reply(version::V3, Pays::Several, 0, 4);
        assert!(
            matches!(packed, DemandReply::Packed(header) if header.zero == 1 && header.stored_pages() == 3)
        );
        assert!(length < 4096, "{length}");
        for (version, pays) in [(version::V3, Pays::Nothing), (version::V2, Pays::Single)] {
            let (plain, length) = reply(version, pays, 0, 4);
            assert!(matches!(plain, DemandReply::Data(_)));
            assert_eq!(length, DATA_HEADER_BYTES + 3 * 4096);
        }
    }

    #[test]
    fn a_page_by_itself_is_compressed_where_that_pays() {
        for (pays, is_packed) in [(Pays::Several, false), (Pays::Single, true)] {
            let (reply, _) = reply(version::V3, pays, 1, 1);
            assert_eq!(matches!(reply, DemandReply::Packed(_)), is_packed);
        }
    }

    #[test]
    fn what_does_not_shrink_goes_as_it_is() {
        let (plain, length) = reply(version::V3, Pays::Single, 9, 1);
        assert!(matches!(plain, DemandReply::Data(_)));
        assert_eq!(length, DATA_HEADER_BYTES + 4096);
        let (zero, length) = reply(version::V3, Pays::Single, 0, 1);
        assert!(matches!(zero, DemandReply::Data(header) if header.is_zero(0)));
        assert_eq!(length, DATA_HEADER_BYTES);
    }
}
