//! The wrongs: what each scenario makes of a message that passes.

use std::fmt::Debug;

use common::images::ImagePid;
use common::limits::RECENT_PAGES;
use common::page::{PAGE_SIZE, PageIndex, PageRange};
use common::proto::bulk::BulkHeader;
use common::proto::control::{ToDestination, ToSource};
use common::proto::demand::DemandFrame;
use common::proto::packed::{Body, PackedHeader};
use common::proto::pages::{DataHeader, DemandReply};

use super::Scenario;

/// A process nobody dumps: PIDs are smaller.
const STRANGER: ImagePid = ImagePid(u32::MAX);
/// A page at the very end of what user space can map, where nothing lies.
const NOWHERE: PageIndex = PageIndex(0x7_ffff_fffe);
/// Requests of a flood.
const FLOOD: usize = 20_000;

/// The protocol version in which pages are pushed as they are, which the wrongs done to such a frame need.
const VERSION: u16 = 1;
/// The last of the recent pages: none has come yet when the workload begins to run.
const NEVER_CAME: u32 = RECENT_PAGES as u32 - 1;

/// A version that there never was.
const UNOFFERED_VERSION: u16 = 0;

/// A frame of the bulk stream.
#[derive(Debug, Clone)]
pub struct BulkFrame {
    /// Its header.
    pub header: BulkHeader,
    /// What follows: a file's name and content, or pages.
    pub body: Vec<u8>,
}

/// An answer on the demand stream.
#[derive(Debug, Clone)]
pub struct Answer {
    /// What it is.
    pub reply: DemandReply,
    /// Its pages.
    pub body: Vec<u8>,
}

/// What becomes of a message.
#[derive(Debug)]
pub enum Passage<T> {
    /// These go on in its place.
    Send(Vec<T>),
    /// It stays here, and so does everything behind it.
    Stall,
    /// It stays here until this program is told to let it go.
    Hold(T),
    /// The path is lost at once, or when this has gone on, and comes back.
    Lose(Option<T>),
    /// The peer is gone at once, without a word.
    Vanish,
}

/// One scenario at work.
#[derive(Debug)]
pub struct Mischief {
    scenario: Scenario,
    done: bool,
    /// No page passes for now.
    keeps_pages: bool,
    /// The source has given the workload away.
    granted: bool,
}

impl Mischief {
    /// About to do its wrong.
    pub fn new(scenario: Scenario) -> Self {
        Self {
            scenario,
            done: false,
            keeps_pages: false,
            granted: false,
        }
    }

    /// Whether now is the time for `scenario`; says so once.
    fn strikes(&mut self, scenario: Scenario) -> bool {
        if self.scenario != scenario || self.done {
            return false;
        }
        self.done = true;
        println!("guilty");
        true
    }

    /// What is done to control messages by their kind alone.
    fn by_kind<T: Debug>(&mut self, message: T) -> Passage<T> {
        let scenario = self.scenario;
        let kind = match scenario {
            Scenario::Holds(kind) | Scenario::LosesBefore(kind) | Scenario::LosesAfter(kind) => {
                kind
            }
            Scenario::LosesAtCutover(_) => super::Message::CUTOVER,
            _ => return Passage::Send(vec![message]),
        };
        if self.done && !matches!(scenario, Scenario::Holds(_)) {
            // The path is being lost.
            return Passage::Stall;
        }
        if !kind.is(&message) || !self.strikes(scenario) {
            return Passage::Send(vec![message]);
        }
        match scenario {
            Scenario::Holds(_) => Passage::Hold(message),
            Scenario::LosesBefore(_) => Passage::Lose(None),
            _ => Passage::Lose(Some(message)),
        }
    }

    /// Whether its wrong is done to pushed pages as they are.
    fn is_of_plain_pages(&self) -> bool {
        matches!(
            self.scenario,
            Scenario::Replays
                | Scenario::SendsUnaskedPages
                | Scenario::SendsPagesOutside
                | Scenario::SendsWrongLengths
                | Scenario::ChangesContent
        )
    }

    /// A message of the destination.
    pub fn upward(&mut self, mut message: ToSource) -> Passage<ToSource> {
        let plain = self.is_of_plain_pages();
        match &mut message {
            ToSource::Hello(hello) if plain => hello.versions.retain(|version| *version == VERSION),
            ToSource::Staged if self.strikes(Scenario::SpeaksOutOfTurn) => {
                return Passage::Send(vec![ToSource::Resumed]);
            }
            ToSource::CutoverRequest if self.strikes(Scenario::Vanishes) => {
                return Passage::Vanish;
            }
            ToSource::Resume(resume) if self.strikes(Scenario::ForgesTheSecret) => {
                resume.secret.0[0] ^= 1;
            }
            ToSource::Resume(_) => self.keeps_pages = false,
            ToSource::Drained(tally) if self.strikes(Scenario::CountsWrong) => tally.digest ^= 1,
            ToSource::Drained(tally) if self.strikes(Scenario::CountsMore) => tally.pages += 1,
            _ => {}
        }
        self.by_kind(message)
    }

    /// A message of the source.
    pub fn downward(&mut self, mut message: ToDestination) -> Passage<ToDestination> {
        self.granted |= message == ToDestination::CutoverGranted;
        match &mut message {
            // Nothing is pushed before that is heard: when the destination says that its tasks run all may have passed.
            ToDestination::CutoverGranted if self.strikes(Scenario::KeepsPages) => {
                self.keeps_pages = true;
            }
            ToDestination::Welcome(welcome) if self.strikes(Scenario::SpeaksAnotherVersion) => {
                welcome.version = UNOFFERED_VERSION;
            }
            ToDestination::Advise(facts) => {
                if let Scenario::Claims(claim) = self.scenario
                    && self.strikes(self.scenario)
                {
                    claim.make(facts);
                }
            }
            _ => {}
        }
        self.by_kind(message)
    }

    /// A request of the destination.
    pub fn request(&mut self, frame: DemandFrame) -> Passage<DemandFrame> {
        let DemandFrame::Request(pid, pages) = frame else {
            return Passage::Send(vec![frame]);
        };
        let mut frames = vec![frame];
        if self.strikes(Scenario::AsksOutside) {
            frames.push(DemandFrame::Request(pid, PageRange::new(NOWHERE, 1)));
        } else if self.strikes(Scenario::Floods) {
            let again = DemandFrame::Request(pid, PageRange::new(pages.start, 1));
            frames.resize(FLOOD, again);
        }
        Passage::Send(frames)
    }

    /// An answer of the source.
    pub fn answer(&mut self, answer: Answer) -> Passage<Answer> {
        if self.keeps_pages {
            return Passage::Stall;
        }
        let DemandReply::Data(header) = &answer.reply else {
            return Passage::Send(vec![answer]);
        };
        if self.scenario == Scenario::AnswersTwice {
            self.strikes(Scenario::AnswersTwice);
            return Passage::Send(vec![answer.clone(), answer]);
        }
        if self.granted && self.strikes(Scenario::Withholds) {
            let reply = DemandReply::Withheld(header.pid, header.pages);
            let body = Vec::new();
            return Passage::Send(vec![Answer { reply, body }]);
        }
        Passage::Send(vec![answer])
    }

    /// What a source that lies once the workload runs there puts before a frame of pages.
    fn lie(&mut self, pid: ImagePid, pages: PageRange) -> Option<BulkFrame> {
        if !self.granted {
            return None;
        }
        let page = PageRange::new(pages.start, 1);
        if self.strikes(Scenario::SendsUnaskedPagesLate) {
            return Some(one_page(STRANGER, pages.start));
        }
        if self.strikes(Scenario::RefersToNothing) {
            return Some(packed(pid, page, 1, NEVER_CAME.to_le_bytes().to_vec()));
        }
        if self.strikes(Scenario::CompressesNonsense) {
            return Some(packed(pid, page, 0, vec![0xaa; 100]));
        }
        None
    }

    /// A frame of the bulk stream.
    pub fn bulk(&mut self, frame: BulkFrame) -> Passage<BulkFrame> {
        if self.keeps_pages {
            return Passage::Stall;
        }
        let said = match &frame.header {
            BulkHeader::Data(header) => Some((header.pid, header.pages)),
            BulkHeader::Packed(header) => Some((header.pid, header.pages)),
            _ => None,
        };
        if let Some(lie) = said.and_then(|(pid, pages)| self.lie(pid, pages)) {
            return Passage::Send(vec![lie, frame]);
        }
        match frame.header {
            BulkHeader::File { .. } => self.file(frame),
            BulkHeader::Data(header) => Passage::Send(self.pages(header, frame)),
            _ => Passage::Send(vec![frame]),
        }
    }

    fn file(&mut self, frame: BulkFrame) -> Passage<BulkFrame> {
        if self.strikes(Scenario::Stalls) {
            return Passage::Stall;
        }
        if self.strikes(Scenario::NamesAPath) {
            let name = b"../../core-1.img";
            let header = BulkHeader::File {
                name: name.len() as u8,
                offset: 0,
                payload: 0,
            };
            let body = name.to_vec();
            return Passage::Send(vec![BulkFrame { header, body }, frame]);
        }
        Passage::Send(vec![frame])
    }

    fn pages(&mut self, header: DataHeader, mut frame: BulkFrame) -> Vec<BulkFrame> {
        if self.scenario == Scenario::Replays {
            self.strikes(Scenario::Replays);
            return vec![frame.clone(), frame];
        }
        if self.strikes(Scenario::SendsUnaskedPages) {
            return vec![one_page(STRANGER, header.pages.start), frame];
        }
        if self.strikes(Scenario::SendsPagesOutside) {
            return vec![one_page(header.pid, NOWHERE), frame];
        }
        if self.scenario == Scenario::SendsWrongLengths
            && header.payload > 0
            && self.strikes(Scenario::SendsWrongLengths)
        {
            let payload = header.payload - 1;
            frame.header = BulkHeader::Data(DataHeader { payload, ..header });
        }
        if self.scenario == Scenario::ChangesContent
            && !frame.body.is_empty()
            && self.strikes(Scenario::ChangesContent)
        {
            // The last word of the last page: of the first ones that come few programs care for it.
            let last = frame.body.len() - 1;
            frame.body[last] ^= 1;
        }
        vec![frame]
    }
}

fn one_page(pid: ImagePid, page: PageIndex) -> BulkFrame {
    let header = DataHeader::raw(pid, PageRange::new(page, 1), 0);
    BulkFrame {
        header: BulkHeader::Data(header),
        body: vec![0xaa; PAGE_SIZE],
    }
}

/// One page that is referred to or compressed.
fn packed(pid: ImagePid, page: PageRange, referred: u64, body: Vec<u8>) -> BulkFrame {
    let header = PackedHeader {
        pid,
        pages: page,
        zero: 0,
        referred,
        kept: false,
        body: if referred == 0 { Body::Zstd } else { Body::Raw },
        payload: body.len() as u32,
    };
    BulkFrame {
        header: BulkHeader::Packed(header),
        body,
    }
}
