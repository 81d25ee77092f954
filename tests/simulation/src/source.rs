//! The source's end: `page-server/src/session.rs` step by step, around the real book, frames and session table.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use common::images::{AddressSpaceLayout, DumpedProcess, ImagePid};
use common::lazy_map::LazyMap;
use common::page::{PageRange, VirtAddr};
use common::proto::control::{
    Abort, Hello, HugeAreas, MoreFacts, Present, Resume, Secret, SessionId, Tally, ToDestination,
    ToSource, Welcome, WorkloadFacts,
};
use common::proto::demand::{DEMAND_FRAME_BYTES, DemandFrame};
use common::proto::pages::DemandReply;
use common::proto::version;
use common::session::{Event, Session, State};
use page_server::book::Book;
use page_server::frame;
use page_server::pending::{Pending, Run, Said};

use crate::frozen::FrozenMemory;
use crate::network::{Lane, LinkId, Message, Time};
use crate::world::{End, Happening, Surroundings};

/// Where the workload's original stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Original {
    /// It runs.
    Running,
    /// It is frozen.
    Frozen,
    /// It was killed, for the copy lives.
    Released,
}

/// How an end ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The migration is complete.
    Complete,
    /// It was rolled back.
    Aborted,
    /// The destination is whole and does not know whether the source knows.
    Unacknowledged,
    /// The destination's copy is dead, and the source could not be told.
    Untold,
}

/// Longest time until somebody takes over what a killed program left.
pub const SUCCEEDED_WITHIN: Time = 5_000_000;

/// How long a destination is waited for that may not know that all is well.
const LAST_CALL: Time = 60_000_000;

/// Longest time for which another thread has the CPU.
const DESCHEDULED: Time = 300_000;

/// The source's end.
#[derive(Debug)]
pub struct Source {
    /// The session as this end sees it.
    pub session: Session,
    /// The workload's original.
    pub original: Original,
    /// How it ended, once it has.
    pub outcome: Option<Outcome>,
    /// What is owed, from the freeze on.
    pub book: Option<Arc<Book>>,
    /// The link it uses, until it notices its loss.
    pub link: Option<LinkId>,
    /// Both ends agree, which the session file says: the original is about to be released.
    pub agreed: bool,
    /// The original is released, and a destination that may not know why is waited for until then.
    pub parting_until: Option<Time>,
    /// The program was killed and nobody has taken over.
    pub down: bool,
    frozen: FrozenMemory,
    processes: Vec<(ImagePid, LazyMap)>,
    eager: Vec<Run>,
    secret: Secret,
    credit: u64,
    pushed: u64,
    eager_done: bool,
    /// What the push has taken and is reading. It is another thread: requests are answered meanwhile.
    reading: Option<(LinkId, Run)>,
    present: BTreeMap<ImagePid, Vec<u64>>,
    withheld: BTreeMap<ImagePid, Vec<u64>>,
    /// A destination that came again before anybody listened for it.
    waiting: Option<(LinkId, Resume)>,
    unread: Vec<[u8; DEMAND_FRAME_BYTES]>,
}

const SESSION: SessionId = SessionId([7; 16]);

impl Source {
    /// A source whose workload runs.
    pub fn new(frozen: FrozenMemory, processes: Vec<(ImagePid, LazyMap)>, eager: Vec<Run>) -> Self {
        Source {
            session: Session::default(),
            original: Original::Running,
            outcome: None,
            book: None,
            link: None,
            agreed: false,
            parting_until: None,
            down: false,
            frozen,
            processes,
            eager,
            secret: Secret([9; 32]),
            credit: 0,
            pushed: 0,
            eager_done: false,
            reading: None,
            present: BTreeMap::new(),
            withheld: BTreeMap::new(),
            waiting: None,
            unread: Vec::new(),
        }
    }

    /// The lazy pages of a process.
    pub fn lazy(&self, pid: ImagePid) -> &LazyMap {
        let mut processes = self.processes.iter();
        let found = processes.find(|(its_pid, _)| *its_pid == pid);
        &found.expect("it was dumped").1
    }

    fn advance(&mut self, event: Event) {
        self.session
            .apply(event)
            .expect("the source does nothing the table forbids");
    }

    fn say(&self, around: &mut Surroundings<'_>, message: ToDestination) {
        if let Some(link) = self.link {
            around.send(link, Lane::ControlDown, Message::ToDestination(message));
        }
    }

    /// A message came on a link.
    pub fn receive(
        &mut self,
        around: &mut Surroundings<'_>,
        (link, lane): (LinkId, Lane),
        message: Message,
    ) {
        if self.parting_until.is_some() {
            return self.tell_again(around, link, &message);
        }
        // Whoever waits only for the end of the original listens to nobody until then.
        if self.agreed
            && let Message::ToSource(ToSource::Resume(resume)) = message
        {
            self.waiting = Some((link, resume));
            return;
        }
        if self.outcome.is_some() || self.down || self.agreed {
            return;
        }
        match message {
            Message::ToSource(ToSource::Resume(resume)) => self.readmit(around, link, &resume),
            Message::ToSource(message) if self.session.state() == State::Hello => {
                self.control(around, link, message);
            }
            _ if self.link != Some(link) => {}
            Message::ToSource(message) => self.control(around, link, message),
            // Streams of a new link are read only when it is settled what has come.
            Message::Demand(frame) if self.session.state() == State::Recover => {
                self.unread.push(frame);
            }
            Message::Demand(frame) => self.demand(around, link, &frame),
            Message::Credit(credit) => {
                self.credit = credit;
                around.soon(Happening::Push(link));
            }
            other => panic!("{other:?} on {lane:?}"),
        }
    }

    fn control(&mut self, around: &mut Surroundings<'_>, link: LinkId, message: ToSource) {
        match (self.session.state(), message) {
            (State::Hello, ToSource::Hello(hello)) => self.welcome(around, link, &hello),
            (State::Advise, ToSource::Ready) => {
                self.advance(Event::Ready);
                self.say(around, ToDestination::Freezing);
                around.soon(Happening::Dumped);
            }
            (State::Skeleton, ToSource::Staged) => self.advance(Event::Staged),
            (State::Listen, ToSource::CutoverRequest) => {
                self.advance(Event::CutoverAsked);
                self.say(around, ToDestination::CutoverGranted);
                self.advance(Event::CutoverGranted);
                if let Some((link, resume)) = self.waiting.take() {
                    self.readmit(around, link, &resume);
                }
            }
            (State::Postcopy, ToSource::Resumed) => {}
            (State::Postcopy, ToSource::Drained(tally)) => self.complete(around, tally),
            (State::Recover, ToSource::Present(part)) => learn(&mut self.present, part),
            (State::Recover, ToSource::Withheld(part)) => learn(&mut self.withheld, part),
            (State::Recover, ToSource::PresentEnd) => self.settle(around, link),
            (state, ToSource::Abort(abort)) => self.gave_up(around, state, &abort),
            (state, message) => panic!("{message:?} in state {state}"),
        }
    }

    fn welcome(&mut self, around: &mut Surroundings<'_>, link: LinkId, hello: &Hello) {
        let version = version::select(&hello.versions).expect("both are of one release");
        self.link = Some(link);
        self.advance(Event::Welcomed);
        let welcome = Welcome {
            version,
            session: SESSION,
            secret: self.secret.clone(),
            bulk_port: 2,
            host: String::from("a"),
        };
        self.say(around, ToDestination::Welcome(welcome));
        self.say(around, ToDestination::Advise(facts()));
        self.say(around, ToDestination::AdviseMore(MoreFacts::default()));
    }

    /// The workload is frozen and its skeleton complete.
    pub fn dumped(&mut self, around: &mut Surroundings<'_>) {
        if self.session.state() != State::Freeze || self.outcome.is_some() {
            return;
        }
        self.original = Original::Frozen;
        self.advance(Event::Dumped);
        let pending = Pending::new(self.processes.iter().cloned());
        self.book = Some(Arc::new(Book::new(pending, &self.eager, &[])));
        let Some(link) = self.link else { return };
        around.send(link, Lane::BulkDown, Message::SkeletonEnd);
        self.say(around, ToDestination::Frozen);
        around.soon(Happening::Push(link));
    }

    /// Takes one run to push, if there is credit.
    pub fn push(&mut self, around: &mut Surroundings<'_>, link: LinkId) {
        let serving = self.session.state() != State::Recover && !self.agreed;
        let busy = self.reading.is_some() || self.outcome.is_some() || !serving;
        if self.link != Some(link) || busy {
            return;
        }
        let Some(book) = self.book.clone() else {
            return;
        };
        let eager = if self.eager_done {
            None
        } else {
            book.next_eager()
        };
        let run = match eager {
            Some(run) => Some(run),
            None => {
                self.eager_done = true;
                let allowed = self.pushed < self.credit;
                allowed.then(|| book.next()).flatten()
            }
        };
        let Some(run) = run else { return };
        self.reading = Some((link, run));
        match around.now_and_then() {
            true => around.within(DESCHEDULED, Happening::Pushed(link)),
            false => around.soon(Happening::Pushed(link)),
        }
    }

    /// Pushes what was taken.
    pub fn pushed(&mut self, around: &mut Surroundings<'_>, link: LinkId) {
        let Some((_, run)) = self.reading.take_if(|(its_link, _)| *its_link == link) else {
            return;
        };
        let bytes = self.read(run);
        self.pushed += if self.credit > 0 {
            bytes.len() as u64
        } else {
            0
        };
        around.send(link, Lane::BulkDown, Message::Frame(bytes));
        around.soon(Happening::Push(link));
    }

    /// What the push has taken and not sent yet.
    pub fn reading(&self) -> Option<Run> {
        self.reading.map(|(_, run)| run)
    }

    fn read(&self, run: Run) -> Bytes {
        let frame = frame::read(&self.frozen, run).expect("frozen memory can be read");
        if let Some(book) = &self.book {
            book.sent(&frame.contents);
        }
        frame.bytes
    }

    /// The push over a lost link ends when it has read what it took.
    fn stop_pushing(&mut self) {
        if let Some((_, run)) = self.reading.take() {
            self.read(run);
        }
    }

    fn demand(
        &mut self,
        around: &mut Surroundings<'_>,
        link: LinkId,
        frame: &[u8; DEMAND_FRAME_BYTES],
    ) {
        let Some(book) = self.book.clone() else {
            panic!("a request before the freeze")
        };
        match DemandFrame::decode(frame).expect("a frame of ours") {
            DemandFrame::Request(pid, pages) => {
                book.demand(pid, pages).expect("nobody asks for more");
                let bytes = self.read(Run { pid, pages });
                around.send(link, Lane::DemandDown, Message::Frame(bytes));
            }
            DemandFrame::Discard(pid, pages) => {
                for withheld in book.discard(pid, pages).expect("nobody discards more") {
                    let reply = DemandReply::Withheld(pid, withheld).encode();
                    let reply = Bytes::copy_from_slice(&reply);
                    around.send(link, Lane::DemandDown, Message::Frame(reply));
                }
            }
        }
    }

    fn complete(&mut self, around: &mut Surroundings<'_>, theirs: Tally) {
        let Some(book) = &self.book else { return };
        self.session
            .apply(Event::AllPresent)
            .expect("it is allowed here");
        assert_eq!(
            (book.tally(), book.owed()),
            (theirs, 0),
            "the ends disagree"
        );
        // Written before it is said: a destination that heard it never comes again.
        self.agreed = true;
        for (pid, lazy) in &self.processes {
            let areas = lazy.ranges().take(1).map(|area| (area.start.0, area.count));
            let areas = areas.collect();
            self.say(around, ToDestination::Huge(HugeAreas { pid: *pid, areas }));
        }
        self.say(around, ToDestination::Complete);
        around.soon(Happening::Release);
    }

    /// The frozen original is killed. Who has agreed waits a while longer for a destination that may not know it.
    pub fn release(&mut self, around: &mut Surroundings<'_>) {
        if self.outcome.is_some() || self.down {
            return;
        }
        self.advance(Event::Agreed);
        self.succeeded();
        self.parting_until = Some(around.now() + LAST_CALL);
        if let Some((link, resume)) = self.waiting.take() {
            let message = Message::ToSource(ToSource::Resume(resume));
            self.tell_again(around, link, &message);
        }
    }

    /// The original is not needed any more.
    fn succeeded(&mut self) {
        self.original = Original::Released;
        self.end(Outcome::Complete);
    }

    /// A destination that missed the last word asks for it.
    fn tell_again(&mut self, around: &mut Surroundings<'_>, link: LinkId, message: &Message) {
        match message {
            Message::ToSource(ToSource::Resume(_)) => {
                if let Some(old) = self.link.replace(link).filter(|old| *old != link) {
                    around.give_up(End::Source, old);
                }
                self.say(around, ToDestination::WelcomeBack { bulk_port: 2 });
            }
            Message::ToSource(ToSource::Drained(tally)) if self.link == Some(link) => {
                let book = self.book.as_ref().expect("both have agreed on it");
                assert_eq!(book.tally(), *tally, "the ends disagree afterwards");
                self.say(around, ToDestination::Complete);
                around.told_again();
            }
            _ => {}
        }
    }

    /// Whether a destination that comes is heard.
    pub fn listens(&self, now: Time) -> bool {
        let waits = self.parting_until.is_some_and(|until| now < until);
        !self.down && (self.outcome.is_none() || waits)
    }

    /// The program is killed. Before the point of no return its guard and CRIU's script let the workload run again.
    /// Returns whether there was anything to kill.
    pub fn die(&mut self, around: &mut Surroundings<'_>) -> bool {
        if self.outcome.is_some() || self.down {
            return false;
        }
        if let Some(link) = self.link.take() {
            around.give_up(End::Source, link);
        }
        self.waiting = None;
        self.reading = None;
        if self.session.state().source_may_thaw() {
            self.roll_back();
            return true;
        }
        self.down = true;
        around.within(SUCCEEDED_WITHIN, Happening::Succeed(End::Source));
        true
    }

    /// `page-server resume`: what was sent is not known any more. Returns whether somebody was to be succeeded.
    pub fn succeed(&mut self) -> bool {
        if !self.down {
            return false;
        }
        self.down = false;
        if self.agreed {
            // Without a word to anybody.
            self.succeeded();
            return true;
        }
        self.session = Session::orphaned();
        let dumped: Vec<DumpedProcess> = self.processes.iter().map(dumped).collect();
        self.book = Some(Arc::new(Book::of_left(&dumped)));
        true
    }

    fn end(&mut self, outcome: Outcome) {
        self.outcome = Some(outcome);
    }

    fn gave_up(&mut self, around: &mut Surroundings<'_>, state: State, abort: &Abort) {
        if state.source_may_thaw() {
            return self.roll_back();
        }
        assert!(abort.copy_is_dead, "no copy that may run is given up here");
        self.advance(Event::CopyDead);
        self.original = Original::Running;
        self.end(Outcome::Aborted);
        // It waits to hear that it was understood.
        if let Some(link) = self.link {
            around.send(link, Lane::ControlDown, Message::Closed);
        }
    }

    fn roll_back(&mut self) {
        self.advance(Event::Failed);
        self.original = Original::Running;
        self.end(Outcome::Aborted);
    }

    /// Notices that its link is lost.
    pub fn notice_loss(&mut self, around: &mut Surroundings<'_>, link: LinkId) {
        if self.link != Some(link) || self.outcome.is_some() || self.agreed {
            return;
        }
        self.link = None;
        self.stop_pushing();
        around.give_up(End::Source, link);
        match self.session.state() {
            state if state.source_may_thaw() => self.roll_back(),
            State::Paused => {}
            _ => self.advance(Event::LinkLost),
        }
    }

    fn readmit(&mut self, around: &mut Surroundings<'_>, link: LinkId, resume: &Resume) {
        let known = resume.session == SESSION && resume.secret.matches(&self.secret);
        assert!(known, "it is the same destination");
        let state = self.session.state();
        if state.source_may_thaw() {
            // Before the point of no return nobody listens for one that comes again; it waits for its turn.
            self.waiting = Some((link, resume.clone()));
            return;
        }
        self.stop_pushing();
        if let Some(old) = self.link {
            around.give_up(End::Source, old);
        }
        if state != State::Paused {
            self.advance(Event::LinkLost);
        }
        self.advance(Event::Reconnected);
        self.link = Some(link);
        self.present.clear();
        self.withheld.clear();
        self.unread.clear();
        self.credit = 0;
        self.pushed = 0;
        self.eager_done = true;
        self.say(around, ToDestination::WelcomeBack { bulk_port: 2 });
    }

    fn settle(&mut self, around: &mut Surroundings<'_>, link: LinkId) {
        let Some(book) = self.book.clone() else {
            return;
        };
        let said = Said {
            received: std::mem::take(&mut self.present).into_iter().collect(),
            withheld: std::mem::take(&mut self.withheld).into_iter().collect(),
        };
        let recovery = book.recovery(said).expect("it claims only what is so");
        let lost = self.digest_of(&recovery.lost);
        let known = self.digest_of(&recovery.known);
        book.recover(recovery, lost, known);
        self.advance(Event::Settled);
        for frame in std::mem::take(&mut self.unread) {
            self.demand(around, link, &frame);
        }
        around.soon(Happening::Push(link));
    }

    fn digest_of(&self, runs: &[Run]) -> u64 {
        let digests = runs.iter().map(|run| {
            let frame = frame::read(&self.frozen, *run).expect("readable");
            frame.contents.whole_digest()
        });
        digests.fold(0, u64::wrapping_add)
    }
}

/// The images of a process, as far as a successor's book needs them.
fn dumped((pid, lazy): &(ImagePid, LazyMap)) -> DumpedProcess {
    DumpedProcess {
        pid: *pid,
        lazy: lazy.clone(),
        layout: AddressSpaceLayout {
            vmas: Vec::new(),
            arguments: [PageRange::default(); 2],
            stack_start: VirtAddr(0),
            heap_end: VirtAddr(0),
        },
        threads: Vec::new(),
    }
}

/// What would move. Nothing here depends on it.
fn facts() -> WorkloadFacts {
    WorkloadFacts {
        architecture: String::new(),
        kernel: String::new(),
        page_size: 4096,
        criu: String::new(),
        cpu_features: Vec::new(),
        pids: Vec::new(),
        name: String::new(),
        resident_pages: 0,
        tcp_established: false,
        shell_job: false,
        more: MoreFacts::default(),
    }
}

fn learn(maps: &mut BTreeMap<ImagePid, Vec<u64>>, part: Present) {
    let map = maps.entry(part.pid).or_default();
    assert_eq!(part.first_word, map.len() as u64);
    map.extend(part.words);
}
