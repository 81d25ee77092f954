//! Makes the frames of one bulk stream: shorter than the pages are, where the destination can read that.

use std::io;
use std::time::{Duration, Instant};

use common::proto::packed::{Body, PackedHeader};
use common::proto::version;

use crate::compression::{Compression, Mode, Paying, SentRun};
use crate::frame::{self, Buffers, Frame, Loaded};
use crate::memory::{MemoryError, PageSource};
use crate::packer::Packer;
use crate::pending::Run;
use crate::repeats::{Repeated, Repeats};

/// What decides in which form pages are pushed.
#[derive(Clone, Debug)]
pub struct Form {
    /// Whether to compress.
    pub compress: Mode,
    /// The version both ends speak.
    pub version: u16,
    /// There are several processes, which may share pages.
    pub related: bool,
    /// Learns whether compressing pays.
    pub paying: Paying,
    /// Nanoseconds that a byte is expected to take on the path, when that is known.
    pub expected: Option<f64>,
}

/// A frame of pushed pages, and what was saved.
#[derive(Debug)]
pub struct PushedFrame {
    /// The frame.
    pub frame: Frame,
    /// Bytes of its pages.
    pub page_bytes: u64,
    /// Its pages are compressed.
    pub compressed: bool,
    /// Pages that are only referred to.
    pub referred: u64,
}

/// Makes frames.
#[derive(Debug)]
pub struct Framer {
    /// `None` for a destination that does not know packed frames.
    packing: Option<Packing>,
    buffers: Buffers,
}

#[derive(Debug)]
struct Packing {
    repeats: Repeats,
    compression: Compression,
    paying: Paying,
    packer: Packer,
    compressing: Duration,
    last_sent: Option<Instant>,
}

impl Framer {
    /// Makes frames for a new stream.
    pub fn new(form: Form) -> io::Result<Self> {
        if form.version < version::V2 {
            return Ok(Framer {
                packing: None,
                buffers: Buffers::default(),
            });
        }
        let mut compression = Compression::new(form.compress);
        if let Some(nanoseconds) = form.expected {
            compression.expect(nanoseconds);
        }
        form.paying.say(compression.pays());
        let packing = Packing {
            repeats: Repeats::new(form.related),
            compression,
            paying: form.paying,
            packer: Packer::new()?,
            compressing: Duration::ZERO,
            last_sent: None,
        };
        Ok(Framer {
            packing: Some(packing),
            buffers: Buffers::default(),
        })
    }

    /// Reads `run` and frames it.
    pub fn frame(&mut self, source: &dyn PageSource, run: Run) -> Result<PushedFrame, MemoryError> {
        let Some(packing) = &mut self.packing else {
            let frame = frame::read(source, run)?;
            return Ok(PushedFrame::plain(frame, run));
        };
        let loaded = frame::load_into(self.buffers.take(), source, run)?;
        let repeated = packing.repeats.look(source, &loaded)?;
        let pushed = packing.pack(loaded, &repeated);
        if !pushed.compressed && pushed.referred == 0 {
            self.buffers.lend(&pushed.frame.bytes);
        }
        Ok(pushed)
    }

    /// A byte is expected to take so many nanoseconds on the path.
    pub fn expect(&mut self, nanoseconds: f64) {
        if let Some(packing) = &mut self.packing {
            packing.compression.expect(nanoseconds);
            packing.paying.say(packing.compression.pays());
        }
    }

    /// What comes next has to wait for something else than the path.
    pub fn paused(&mut self) {
        if let Some(packing) = &mut self.packing {
            packing.last_sent = None;
        }
    }

    /// The frame made last has been sent.
    pub fn sent(&mut self, frame: &PushedFrame) {
        let Some(packing) = &mut self.packing else {
            return;
        };
        let now = Instant::now();
        if let Some(last) = packing.last_sent.replace(now) {
            packing.compression.sent(SentRun {
                page_bytes: frame.page_bytes,
                compressing: packing.compressing,
                elapsed: now.saturating_duration_since(last),
            });
            packing.paying.say(packing.compression.pays());
        }
    }
}

impl Packing {
    fn pack(&mut self, loaded: Loaded, repeated: &Repeated) -> PushedFrame {
        let run = loaded.contents.run;
        let mut header = PackedHeader {
            pid: run.pid,
            pages: run.pages,
            zero: loaded.contents.zero,
            referred: repeated.referred,
            kept: repeated.kept,
            body: Body::Raw,
            payload: 0,
        };
        self.compressing = Duration::ZERO;
        let compress = self.compression.compresses() && header.stored_pages() > 0;
        if header.referred == 0 && !compress {
            let plain = header.unpacked();
            header.payload = plain.payload;
            let header = match header.kept {
                true => header.encode(),
                false => plain.encode(),
            };
            return PushedFrame::plain(loaded.into_frame(&header), run);
        }
        let began = Instant::now();
        let body = self.packer.pack(&loaded, &mut header, compress);
        if compress {
            self.compressing = began.elapsed();
        }
        let bytes = body.frame(&mut header, &repeated.slots);
        PushedFrame {
            frame: Frame {
                bytes: bytes.freeze(),
                contents: loaded.contents,
            },
            page_bytes: run.pages.bytes(),
            compressed: header.body == Body::Zstd,
            referred: repeated.slots.len() as u64,
        }
    }
}

impl PushedFrame {
    fn plain(frame: Frame, run: Run) -> Self {
        PushedFrame {
            frame,
            page_bytes: run.pages.bytes(),
            compressed: false,
            referred: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use common::compression::Decompressor;
    use common::images::ImagePid;
    use common::page::{PAGE_SIZE, PageIndex, PageRange, is_zero};
    use common::proto::bulk::BulkHeader;
    use common::proto::packed::{REFERENCE_BYTES, references};
    use common::recent::RecentSlots;

    use super::*;

    /// Pages of a few processes whose content is a function of kind and number.
    #[derive(Default)]
    struct Processes(HashMap<(ImagePid, PageIndex), Vec<u8>>);

    fn noise(mut seed: u64) -> Vec<u8> {
        let step = || {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (seed >> 56) as u8
        };
        std::iter::repeat_with(step).take(PAGE_SIZE).collect()
    }

    fn text(seed: u64) -> Vec<u8> {
        let words = format!("{{\"name\": \"{seed}\", \"amount\": {}}}, ", seed * 7);
        words.bytes().cycle().take(PAGE_SIZE).collect()
    }

    impl PageSource for Processes {
        fn read(
            &self,
            pid: ImagePid,
            pages: PageRange,
            buffer: &mut [u8],
        ) -> Result<(), MemoryError> {
            for (index, page) in buffer.chunks_exact_mut(PAGE_SIZE).enumerate() {
                let at = (pid, pages.start.forward(index as u64));
                let content = self.0.get(&at).ok_or(MemoryError::UnknownProcess(pid))?;
                page.copy_from_slice(content);
            }
            Ok(())
        }
    }

    /// Reads frames back in the plainest way there is.
    struct Reader {
        slots: RecentSlots,
        recent: HashMap<usize, Vec<u8>>,
        decompressor: Decompressor,
    }

    impl Reader {
        fn new() -> Self {
            Reader {
                slots: RecentSlots::default(),
                recent: HashMap::new(),
                decompressor: Decompressor::new().expect("memory"),
            }
        }

        fn read(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
            let (header, payload) = bytes.split_first_chunk().expect("a header");
            let header = match BulkHeader::decode(header).expect("valid") {
                BulkHeader::Packed(header) => header,
                BulkHeader::Data(plain) => PackedHeader {
                    pid: plain.pid,
                    pages: plain.pages,
                    zero: plain.zero,
                    referred: 0,
                    kept: false,
                    body: Body::Raw,
                    payload: plain.payload,
                },
                other => panic!("{other:?}"),
            };
            assert_eq!(payload.len(), header.payload as usize);
            let (front, body) = payload.split_at(header.references() * REFERENCE_BYTES);
            let mut stored = vec![0; header.stored_pages() as usize * PAGE_SIZE];
            match header.body {
                Body::Raw => stored.copy_from_slice(body),
                Body::Zstd => self
                    .decompressor
                    .decompress(body, &mut stored)
                    .expect("ours"),
            }
            let mut slots = references(front).map(|slot| slot.expect("in range"));
            let mut pages = stored.chunks_exact(PAGE_SIZE);
            let read: Vec<Vec<u8>> = (0..header.pages.count as usize)
                .map(
                    |index| match (header.zero >> index & 1, header.is_referred(index)) {
                        (1, _) => vec![0; PAGE_SIZE],
                        (_, true) => self.recent[&slots.next().expect("one each")].clone(),
                        (_, false) => pages.next().expect("one each").to_vec(),
                    },
                )
                .collect();
            if header.kept {
                for page in stored.chunks_exact(PAGE_SIZE) {
                    self.recent.insert(self.slots.advance(), page.to_vec());
                }
            }
            read
        }
    }

    fn form(compress: Mode) -> Form {
        Form {
            compress,
            version: version::V2,
            related: true,
            paying: Paying::default(),
            expected: None,
        }
    }

    fn run(pid: u32, start: u64, count: u64) -> Run {
        Run {
            pid: ImagePid(pid),
            pages: PageRange::new(PageIndex(start), count),
        }
    }

    /// Two processes of 6000 pages that share most of them, with zeros, noise and text between; more than are recent.
    fn family() -> Processes {
        let mut processes = Processes::default();
        for number in 0..6000_u64 {
            let shared = match number % 7 {
                0 => vec![0; PAGE_SIZE],
                1..4 => noise(number),
                4 => noise(number / 100),
                _ => text(number),
            };
            let own = if number % 10 == 9 {
                noise(!number)
            } else {
                shared.clone()
            };
            processes.0.insert((ImagePid(1), PageIndex(number)), shared);
            processes.0.insert((ImagePid(2), PageIndex(number)), own);
        }
        processes
    }

    fn check(form: Form, runs: impl Iterator<Item = Run>) -> (u64, u64, u64) {
        let family = family();
        let mut framer = Framer::new(form).expect("memory");
        let mut reader = Reader::new();
        let (mut bytes, mut referred, mut compressed) = (0, 0, 0);
        for run in runs {
            let pushed = framer.frame(&family, run).expect("readable");
            for (index, page) in reader.read(&pushed.frame.bytes).iter().enumerate() {
                let at = (run.pid, run.pages.start.forward(index as u64));
                assert!(*page == family.0[&at], "page {at:?}");
            }
            framer.sent(&pushed);
            bytes += pushed.frame.bytes.len() as u64;
            referred += pushed.referred;
            compressed += u64::from(pushed.compressed);
        }
        (bytes, referred, compressed)
    }

    fn side_by_side() -> impl Iterator<Item = Run> {
        (0..6000)
            .step_by(16)
            .flat_map(|start| [1, 2].map(|pid| run(pid, start, 16.min(6000 - start))))
    }

    #[test]
    fn every_page_comes_back_and_shared_pages_go_once() {
        for mode in [Mode::Auto, Mode::Always, Mode::Never] {
            let (bytes, referred, compressed) = check(form(mode), side_by_side());
            let shared = 6000 * 6 / 7 * 9 / 10 - 20;
            assert!(referred > shared, "{referred} of {shared}");
            assert!(bytes < 6000 * 11 / 10 * PAGE_SIZE as u64, "{bytes}");
            match mode {
                Mode::Always => assert!(compressed > 0),
                Mode::Never => assert_eq!(compressed, 0),
                // That depends on the speed of this machine.
                Mode::Auto => {}
            }
        }
    }

    #[test]
    fn pages_far_apart_are_sent_again() {
        let runs = [1, 2]
            .into_iter()
            .flat_map(|pid| (0..6000).map(move |page| run(pid, page, 1)));
        let (bytes, _, _) = check(form(Mode::Never), runs);
        assert!(bytes > 6000 * 5 / 4 * PAGE_SIZE as u64, "{bytes}");
    }

    #[test]
    fn a_destination_of_version_1_gets_plain_frames() {
        let form = Form {
            version: version::V1,
            ..form(Mode::Always)
        };
        let (_, referred, compressed) = check(form, side_by_side());
        assert_eq!((referred, compressed), (0, 0));
    }

    #[test]
    fn pages_with_the_same_hash_are_compared() {
        let family = family();
        let mut repeats = Repeats::new(true);
        let first = frame::load(&family, run(1, 1, 1)).expect("readable");
        assert!(!is_zero(first.page(0)));
        assert!(repeats.look(&family, &first).expect("readable").kept);
        // The same hash at the same place, but the memory behind it holds something else.
        let mut other = Processes(family.0.clone());
        other.0.insert((ImagePid(1), PageIndex(1)), noise(99));
        let again = repeats.look(&other, &first).expect("readable");
        assert_eq!(again.referred, 0);
    }
}
