//! The destination's end: `lazy-restorer/src/session.rs` step by step, around the real memory, pacing and session table.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::images::ImagePid;
use common::limits::MAX_PRESENT_WORDS;
use common::proto::control::{Abort, Hello, Present, Resume, ToDestination, ToSource, Welcome};
use common::proto::pages::{DATA_HEADER_BYTES, DataHeader, DemandReply};
use common::proto::version;
use common::session::{Event, Session, State};
use lazy_restorer::memory::{Arrival, MemberKey, Memory, Order, ProcessImage};
use lazy_restorer::pacing::Pacing;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::network::{Lane, LinkId, Message, Time};
use crate::notes::{Fuse, Notes, Shelf};
use crate::source::{Outcome, SUCCEEDED_WITHIN};
use crate::trouble::CopyDies;
use crate::uffd::{SharedMachine, Uffd, passed_on};
use crate::world::{End, Happening, Surroundings};

/// Time to try to learn whether the source has given the workload away (`session.rs`).
const GRANT_TIMEOUT: Time = 60_000_000;
/// Time to try to tell the source that every page is here (`session/postcopy.rs`).
const ACKNOWLEDGEMENT_TIMEOUT: Time = 20_000_000;
/// Time to try to tell the source that the copy is dead (`session.rs`); who resumes does it until the operator stops it.
const TELLING: Time = 600_000_000;
/// Time the source has to take it back (`connect.rs`).
const ANSWER_TIMEOUT: Time = 30_000_000;
/// Longest pause between two attempts to reach the source, and the first one.
const PAUSE: (Time, Time) = (100_000, 2_000_000);
/// Pause before what found no memory is tried again (`fetch.rs`).
const NO_MEMORY_PAUSE: Time = 20_000;
/// Credit is renewed when this part of the window has been used (`push.rs`).
const RENEWALS_PER_WINDOW: u64 = 8;

/// Where the workload's copy stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copy {
    /// There is none.
    None,
    /// It is rebuilt or being so, and has not run.
    Gated,
    /// It runs.
    Running,
    /// It was killed.
    Dead,
}

/// The destination's end.
#[derive(Debug)]
pub struct Destination {
    /// The session as this end sees it.
    pub session: Session,
    /// The workload's copy.
    pub copy: Copy,
    /// How it ended, once it has.
    pub outcome: Option<Outcome>,
    /// The copy's memory.
    pub memory: Arc<Memory<Uffd>>,
    /// The link it uses, until it notices its loss.
    pub link: Option<LinkId>,
    /// The link whose streams of pages are read; an old one may still bring something.
    pub pages_from: Option<LinkId>,
    /// The link that requests are written to.
    pub requests_to: Option<LinkId>,
    /// Descriptors that are watched; those of a program that was killed are not any more.
    pub watched: Vec<Option<(MemberKey, Arc<Uffd>)>>,
    /// Kills the program in the middle of what it does.
    pub fuse: Fuse,
    /// The program was killed and nobody has taken over.
    pub down: bool,
    images: Vec<ProcessImage>,
    shelves: BTreeMap<ImagePid, Shelf>,
    copy_dies: Option<CopyDies>,
    orders: UnboundedReceiver<Order<Uffd>>,
    machines: Vec<(ImagePid, SharedMachine)>,
    welcome: Option<Welcome>,
    skeleton_is_here: bool,
    frozen_is_said: bool,
    lost_at: Time,
    pause: Time,
    credit: Option<Credit>,
    installed: u64,
}

/// Credit on one link.
#[derive(Debug)]
struct Credit {
    pacing: Pacing,
    granted: u64,
    before: u64,
}

impl Destination {
    /// A destination that will restore these processes. Its program uses their descriptors until `fuse` has burnt.
    pub fn new(
        images: Vec<ProcessImage>,
        machines: Vec<(ImagePid, SharedMachine)>,
        fuse: Fuse,
        copy_dies: Option<CopyDies>,
    ) -> Self {
        let (memory, orders) = Memory::new(images.clone());
        let mut destination = Destination {
            session: Session::default(),
            copy: Copy::None,
            outcome: None,
            memory,
            link: None,
            pages_from: None,
            requests_to: None,
            watched: Vec::new(),
            fuse,
            down: false,
            images,
            shelves: BTreeMap::new(),
            copy_dies,
            orders,
            machines,
            welcome: None,
            skeleton_is_here: false,
            frozen_is_said: false,
            lost_at: 0,
            pause: PAUSE.0,
            credit: None,
            installed: 0,
        };
        destination.keep_notes();
        destination
    }

    fn keep_notes(&mut self) {
        let fresh = self
            .images
            .iter()
            .map(|image| (image.pid, Shelf::default()));
        self.shelves = fresh.collect();
        let notes = |pid| Ok(Notes::on(&self.shelves[&pid], &self.fuse));
        self.memory.keep_notes(notes).expect("there is room");
    }

    /// Its processes' machines.
    pub fn machines(&self) -> &[(ImagePid, SharedMachine)] {
        &self.machines
    }

    fn advance(&mut self, event: Event) {
        self.session
            .apply(event)
            .expect("the destination does nothing the table forbids");
    }

    fn say(&self, around: &mut Surroundings<'_>, message: ToSource) {
        if let Some(link) = self.link
            && !self.fuse.has_burnt()
        {
            around.send(link, Lane::ControlUp, Message::ToSource(message));
        }
    }

    /// Connects for the first time.
    pub fn begin(&mut self, around: &mut Surroundings<'_>) {
        let link = around.open();
        self.link = Some(link);
        self.pages_from = Some(link);
        let hello = Hello {
            versions: version::SUPPORTED.to_vec(),
            token: None,
            host: String::from("b"),
        };
        self.say(around, ToSource::Hello(hello));
    }

    /// A message came on a link.
    pub fn receive(
        &mut self,
        around: &mut Surroundings<'_>,
        (link, lane): (LinkId, Lane),
        message: Message,
    ) {
        if self.outcome.is_some() {
            return;
        }
        match message {
            Message::ToDestination(message) if self.link == Some(link) => {
                self.control(around, message);
            }
            Message::Frame(frame) if self.pages_from == Some(link) => {
                self.pages(around, lane, &frame);
            }
            Message::SkeletonEnd if self.pages_from == Some(link) => {
                self.skeleton_is_here = true;
                self.stage(around);
            }
            // It knows that the copy is dead.
            Message::Closed if self.link == Some(link) && self.copy == Copy::Dead => {
                self.outcome = Some(Outcome::Aborted);
            }
            _ => {}
        }
        self.look(around);
    }

    fn control(&mut self, around: &mut Surroundings<'_>, message: ToDestination) {
        match (self.session.state(), message) {
            (State::Hello, ToDestination::Welcome(welcome)) => {
                self.welcome = Some(welcome);
                self.advance(Event::Welcomed);
            }
            (State::Advise, ToDestination::Advise(_)) => {}
            (State::Advise, ToDestination::AdviseMore(_)) => {
                self.say(around, ToSource::Ready);
                self.advance(Event::Ready);
            }
            (State::Freeze, ToDestination::Freezing) => {}
            (State::Freeze, ToDestination::Frozen) => {
                self.frozen_is_said = true;
                self.stage(around);
            }
            (State::Cutover, ToDestination::CutoverGranted) => {
                self.advance(Event::CutoverGranted);
                self.let_run(around);
            }
            (State::Paused, ToDestination::WelcomeBack { .. }) if self.copy == Copy::Dead => {
                self.tell_dead(around);
            }
            (State::Paused, ToDestination::WelcomeBack { .. }) => self.tell_present(around),
            (State::Drained, ToDestination::Huge(_)) => {}
            (State::Drained, ToDestination::Complete) => {
                self.advance(Event::Agreed);
                self.outcome = Some(Outcome::Complete);
            }
            (state, message) => panic!("{message:?} in state {state}"),
        }
    }

    /// The skeleton is complete once it is here and the source has said so.
    fn stage(&mut self, around: &mut Surroundings<'_>) {
        if !self.skeleton_is_here || !self.frozen_is_said || self.copy != Copy::None {
            return;
        }
        self.advance(Event::Dumped);
        self.say(around, ToSource::Staged);
        self.advance(Event::Staged);
        self.copy = Copy::Gated;
        self.requests_to = self.link;
        for (pid, machine) in &self.machines {
            let attached = self.memory.attach(*pid, Uffd::new(machine, 0));
            attached.expect("each process hands over once");
        }
        around.soon(Happening::CarryOut);
        around.soon(Happening::Armed);
    }

    /// CRIU has rebuilt the tasks, which wait at the gate.
    pub fn armed(&mut self, around: &mut Surroundings<'_>) {
        if self.session.state() != State::Listen || self.outcome.is_some() {
            return;
        }
        if self.copy_dies == Some(CopyDies::Armed) {
            self.tell_dead(around);
            return self.give_up_copy(around);
        }
        self.say(around, ToSource::CutoverRequest);
        self.advance(Event::CutoverAsked);
    }

    fn tell_dead(&self, around: &mut Surroundings<'_>) {
        let abort = Abort {
            host: String::from("b"),
            state: self.session.state(),
            text: String::new(),
            copy_is_dead: true,
        };
        self.say(around, ToSource::Abort(abort));
    }

    fn let_run(&mut self, around: &mut Surroundings<'_>) {
        if self.copy_dies == Some(CopyDies::AtTheGate) {
            // CRIU was killed: nobody got the word that lets the tasks run. Said over this link, and over others when it is
            // lost before the answer.
            self.copy = Copy::Dead;
            return self.tell_dead(around);
        }
        self.copy = Copy::Running;
        self.memory.restored().expect("early pages fit");
        self.say(around, ToSource::Resumed);
        self.begin_push(around);
        around.soon(Happening::Workload);
    }

    fn begin_push(&mut self, around: &mut Surroundings<'_>) {
        let pacing = Pacing::default();
        let granted = pacing.window();
        self.credit = Some(Credit {
            pacing,
            granted,
            before: self.installed,
        });
        if let Some(link) = self.pages_from {
            around.send(link, Lane::CreditUp, Message::Credit(granted));
        }
    }

    fn pages(&mut self, around: &mut Surroundings<'_>, lane: Lane, frame: &Bytes) {
        let (header, payload) = frame.split_at(DATA_HEADER_BYTES);
        let header = header.try_into().expect("a whole header");
        if lane == Lane::BulkDown {
            let header = DataHeader::decode(header).expect("a frame of ours");
            self.install(&header, payload, Arrival::Pushed);
            self.installed += frame.len() as u64;
            return self.renew_credit(around);
        }
        match DemandReply::decode(header).expect("a frame of ours") {
            DemandReply::Data(header) => self.install(&header, payload, Arrival::Demanded),
            DemandReply::Packed(_) => panic!("the simulated source compresses nothing"),
            DemandReply::Withheld(pid, pages) => {
                let confirmed = self.memory.withheld(pid, pages);
                confirmed.expect("the source confirms what was discarded");
            }
        }
    }

    fn install(&self, header: &DataHeader, payload: &[u8], arrival: Arrival) {
        let received = self.memory.receive(header, payload, arrival);
        received.expect("the source sends what it owes");
    }

    fn renew_credit(&mut self, around: &mut Surroundings<'_>) {
        let (Some(credit), Some(link)) = (&mut self.credit, self.pages_from) else {
            return;
        };
        let installed = self.installed - credit.before;
        let now = Duration::from_micros(around.now());
        credit
            .pacing
            .observe(now, installed, Duration::from_millis(1));
        let window = credit.pacing.window();
        let total = installed + window;
        if total >= credit.granted + window / RENEWALS_PER_WINDOW {
            credit.granted = total;
            around.send(link, Lane::CreditUp, Message::Credit(total));
        }
    }

    /// Whether everything has come; then the source is told.
    pub fn look(&mut self, around: &mut Surroundings<'_>) {
        let whole = self.session.state() == State::Postcopy && self.memory.counts().owed == 0;
        // A link that is being replaced tells nothing.
        let linked = self.link.is_some() && self.link == self.pages_from;
        if whole && linked && self.outcome.is_none() && !self.fuse.has_burnt() {
            self.advance(Event::AllPresent);
            self.say(around, ToSource::Drained(self.memory.tally()));
        }
    }

    /// Does what the memory has ordered: watches descriptors, writes requests to whatever link there is.
    pub fn carry_out(&mut self, around: &mut Surroundings<'_>) {
        if self.down {
            return;
        }
        while let Ok(order) = self.orders.try_recv() {
            match order {
                Order::Demand(frame) => {
                    if let Some(link) = self.requests_to {
                        around.send(link, Lane::DemandUp, Message::Demand(frame.encode()));
                    }
                }
                Order::Watch(key, uffd) => self.watched.push(Some((key, uffd))),
                Order::Relieve => around.soon(Happening::Relieve),
            }
        }
    }

    /// Tries again what found no memory.
    pub fn relieve(&mut self, around: &mut Surroundings<'_>) {
        let relieved = self.memory.relieve();
        if !relieved.expect("the model kernel refuses nothing") {
            around.later(NO_MEMORY_PAUSE, Happening::Relieve);
        }
    }

    /// Notices that a connection of its link is lost.
    pub fn notice_loss(&mut self, around: &mut Surroundings<'_>, link: LinkId) {
        if self.link != Some(link) || self.outcome.is_some() {
            return;
        }
        self.link = None;
        match self.session.state() {
            state if state.source_may_thaw() => {
                around.give_up(End::Destination, link);
                self.give_up_copy(around);
            }
            State::Paused => self.try_again(around),
            _ => {
                self.advance(Event::LinkLost);
                self.lost_at = around.now();
                self.pause = PAUSE.0;
                around.soon(Happening::Connect);
            }
        }
    }

    /// Kills the copy, which never ran. Past the point of no return the source waits to hear it.
    fn give_up_copy(&mut self, around: &mut Surroundings<'_>) {
        if self.copy != Copy::None {
            self.copy = Copy::Dead;
        }
        if self.session.state().source_may_thaw() {
            self.advance(Event::Failed);
            self.outcome = Some(Outcome::Aborted);
            return;
        }
        self.lost_at = around.now();
        self.pause = PAUSE.0;
        around.soon(Happening::Connect);
    }

    /// The program is killed. Its keeper kills a copy that was never let run, and holds the memory of one that was.
    /// Returns whether there was anything to kill.
    pub fn die(&mut self, around: &mut Surroundings<'_>) -> bool {
        if self.outcome.is_some() || self.down {
            return false;
        }
        let links = [self.link.take(), self.pages_from.take()];
        for link in links.into_iter().flatten() {
            around.give_up(End::Destination, link);
        }
        self.requests_to = None;
        self.watched.fill(None);
        self.credit = None;
        if self.copy == Copy::Gated {
            self.copy = Copy::Dead;
        }
        if self.session.state().source_may_thaw() {
            self.advance(Event::Failed);
            self.outcome = Some(Outcome::Aborted);
            return true;
        }
        self.down = true;
        around.within(SUCCEEDED_WITHIN, Happening::Succeed(End::Destination));
        true
    }

    /// `lazy-restorer resume`. Returns whether somebody was to be succeeded.
    pub fn succeed(&mut self, around: &mut Surroundings<'_>) -> bool {
        if !self.down {
            return false;
        }
        self.down = false;
        self.fuse.renew();
        self.session = Session::orphaned();
        self.lost_at = around.now();
        self.pause = PAUSE.0;
        if self.copy == Copy::Running {
            self.take_over();
            around.soon(Happening::CarryOut);
        }
        around.soon(Happening::Connect);
        true
    }

    fn take_over(&mut self) {
        let notes = |pid: ImagePid| Ok(self.shelves[&pid].recovered());
        let uffd = |number| passed_on(&self.machines, number);
        let left = Memory::of_notes(self.images.clone(), notes, uffd);
        let (memory, orders) = left.expect("the notes fit the images");
        self.memory = Arc::new(memory);
        self.orders = orders;
        self.keep_notes();
        self.memory.begin_again();
    }

    /// Tries to reach the source again. `reachable` says whether anybody answers.
    pub fn connect(&mut self, around: &mut Surroundings<'_>, reachable: bool) {
        let tries = matches!(self.session.state(), State::Paused) && !self.down;
        if !tries || self.link.is_some() || self.outcome.is_some() {
            return;
        }
        if !reachable {
            return self.try_again(around);
        }
        let welcome = self.welcome.clone().expect("it was welcomed once");
        self.link = Some(around.open());
        let resume = Resume {
            version: welcome.version,
            session: welcome.session,
            secret: welcome.secret,
        };
        self.say(around, ToSource::Resume(resume));
        if let Some(link) = self.link {
            around.later(ANSWER_TIMEOUT, Happening::Unanswered(link));
        }
    }

    /// The source did not answer in time.
    pub fn unanswered(&mut self, around: &mut Surroundings<'_>, link: LinkId) {
        if self.session.state() == State::Paused
            && self.link == Some(link)
            && self.outcome.is_none()
        {
            self.link = None;
            around.give_up(End::Destination, link);
            self.try_again(around);
        }
    }

    fn try_again(&mut self, around: &mut Surroundings<'_>) {
        let lost_for = around.now() - self.lost_at;
        let owed = self.memory.counts().owed;
        if self.copy == Copy::Dead && lost_for > TELLING {
            self.outcome = Some(Outcome::Untold);
            return;
        }
        if self.copy == Copy::Gated && lost_for > GRANT_TIMEOUT {
            return self.give_up_copy(around);
        }
        if self.copy == Copy::Running && owed == 0 && lost_for > ACKNOWLEDGEMENT_TIMEOUT {
            self.outcome = Some(Outcome::Unacknowledged);
            return;
        }
        around.later(self.pause, Happening::Connect);
        self.pause = (self.pause * 2).min(PAUSE.1);
    }

    /// The source takes it back: says what has come.
    fn tell_present(&mut self, around: &mut Surroundings<'_>) {
        self.advance(Event::Reconnected);
        // What came by now is what the source is told, so nothing more is read of the old streams.
        if let Some(old) = self.pages_from.take() {
            around.give_up(End::Destination, old);
        }
        for (pid, map) in self.memory.present_map() {
            for part in parts(pid, &map.received) {
                self.say(around, ToSource::Present(part));
            }
            for part in parts(pid, &map.withheld) {
                self.say(around, ToSource::Withheld(part));
            }
        }
        self.say(around, ToSource::PresentEnd);
        around.soon(Happening::Relink);
    }

    /// The new link's streams replace the old one's.
    pub fn relink(&mut self, around: &mut Surroundings<'_>) {
        let Some(link) = self.link else { return };
        if self.session.state() != State::Recover || self.outcome.is_some() {
            return;
        }
        self.pages_from = Some(link);
        self.requests_to = Some(link);
        self.memory.reconnect();
        around.soon(Happening::CarryOut);
        self.advance(Event::Settled);
        around.recovered();
        match self.copy {
            Copy::Gated => self.let_run(around),
            _ => self.begin_push(around),
        }
        self.look(around);
    }
}

/// The words of a bitmap, in as many messages as it needs.
fn parts(pid: ImagePid, words: &[u64]) -> impl Iterator<Item = Present> {
    let chunks = words.chunks(MAX_PRESENT_WORDS).enumerate();
    chunks.map(move |(index, words)| Present {
        pid,
        first_word: (index * MAX_PRESENT_WORDS) as u64,
        words: words.to_vec(),
    })
}
