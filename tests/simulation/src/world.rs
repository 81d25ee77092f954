//! The clock, and everything that happens by it: deterministic from one seed.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{Arc, Mutex};

use common::images::ImagePid;
use common::page::PageRange;
use lazy_restorer::memory::descriptor::Descriptor;
use page_server::pending::Run;
use tests::random::Random;

use crate::destination::{Copy, Destination};
use crate::frozen::FrozenMemory;
use crate::invariants::Whole;
use crate::network::{Connection, Lane, LinkId, Message, Network, Time};
use crate::notes::Fuse;
use crate::source::Source;
use crate::trouble::{Fate, Record, Trouble, name};
use crate::uffd::{Frozen, Machine, SharedMachine, lock};
use crate::workload;

/// Events after which a run is stuck.
const MAX_EVENTS: u64 = 200_000;
/// Steps of the workload before it rests.
const WORKLOAD_STEPS: u64 = 60;
/// When connections are cut and programs killed: most migrations end within it.
const STRUCK_WITHIN: Time = 12_000;
/// By then most migrations have passed the cutover.
const PEACE: Time = 5_000;
/// How long it may take to notice a lost connection (`limits.rs`, `IDLE_TIMEOUT` and some).
const NOTICED_WITHIN: Time = 5_000_000;

/// One of the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// `page-server`.
    Source,
    /// `lazy-restorer`.
    Destination,
}

/// Something that happens.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Happening {
    /// The next message of a lane arrives.
    Arrive(LinkId, Lane),
    /// A connection is cut, unless the link is another's time.
    Cut(LinkId, Connection),
    /// An end notices.
    Notice(End, LinkId),
    /// The source's dump is complete.
    Dumped,
    /// The source's push has its turn.
    Push(LinkId),
    /// It has read what it took.
    Pushed(LinkId),
    /// The destination's tasks are rebuilt.
    Armed,
    /// The destination's fault thread carries orders out.
    CarryOut,
    /// The destination tries to reach the source.
    Connect,
    /// The destination has waited long enough for an answer on a new link.
    Unanswered(LinkId),
    /// The destination replaces its streams.
    Relink,
    /// The destination tries again what found no memory.
    Relieve,
    /// The workload does something.
    Workload,
    /// Somebody reads what waits on a descriptor, by its number.
    Drain(usize),
    /// The end of a process is noticed, by its descriptor's number.
    Exited(usize),
    /// The source kills the original, which nobody needs any more.
    Release,
    /// A program is killed.
    Kill(End),
    /// Somebody takes over what a killed program left.
    Succeed(End),
}

/// What an end sees of the world.
#[derive(Debug)]
pub struct Surroundings<'a> {
    now: Time,
    random: &'a mut Random,
    network: &'a mut Network,
    agenda: Vec<(Time, Happening)>,
    trouble: &'a mut Trouble,
    record: &'a mut Record,
    reachable_from: &'a mut Time,
}

impl Surroundings<'_> {
    /// The time.
    pub fn now(&self) -> Time {
        self.now
    }

    /// Sends a message, if the connection still carries it.
    pub fn send(&mut self, link: LinkId, lane: Lane, message: Message) {
        let fate = self.fate_of(&message);
        let (sender, receiver) = match lane.is_up() {
            true => (End::Destination, End::Source),
            false => (End::Source, End::Destination),
        };
        match fate {
            Some(Fate::Lost) => self.cut_both(link),
            Some(Fate::SenderDies) => self.within(1000, Happening::Kill(sender)),
            _ => {}
        }
        let due = self.now + 20 + self.random.below(400);
        let Some(due) = self.network.send(link, lane, message, due) else {
            return;
        };
        self.agenda.push((due, Happening::Arrive(link, lane)));
        match fate {
            Some(Fate::Delivered) => {
                for connection in [Connection::Fault, Connection::Bulk] {
                    self.agenda.push((due, Happening::Cut(link, connection)));
                }
            }
            Some(Fate::ReceiverDies) => self.agenda.push((due, Happening::Kill(receiver))),
            _ => {}
        }
    }

    /// What happens at this message, if it is one at which something does.
    fn fate_of(&mut self, message: &Message) -> Option<Fate> {
        let (kind, fate) = *self.trouble.at_messages.front()?;
        if name(message) != Some(kind) {
            return None;
        }
        self.trouble.at_messages.pop_front();
        self.record.messages += 1;
        Some(fate)
    }

    fn cut_both(&mut self, link: LinkId) {
        for connection in [Connection::Fault, Connection::Bulk] {
            self.cut(link, connection);
        }
    }

    fn cut(&mut self, link: LinkId, connection: Connection) {
        if !self.network.is_up(link, connection) {
            return;
        }
        self.network.cut(link, connection, self.now);
        self.record.cuts += 1;
        // Most outages are short; some outlast what an end is willing to wait.
        let longest = [200_000, 3_000_000, 90_000_000][self.random.index(3)];
        let down = self.now + self.random.below(longest);
        *self.reachable_from = down.max(*self.reachable_from);
        for end in [End::Source, End::Destination] {
            let noticed = self.now + self.random.below(NOTICED_WITHIN);
            self.agenda.push((noticed, Happening::Notice(end, link)));
        }
    }

    /// An end is done with a link: the other will notice.
    pub fn give_up(&mut self, end: End, link: LinkId) {
        for connection in [Connection::Fault, Connection::Bulk] {
            self.network.cut(link, connection, self.now);
        }
        let other = match end {
            End::Source => End::Destination,
            End::Destination => End::Source,
        };
        let noticed = self.now + self.random.below(NOTICED_WITHIN);
        self.agenda.push((noticed, Happening::Notice(other, link)));
    }

    /// A new link.
    pub fn open(&mut self) -> LinkId {
        self.network.open()
    }

    /// Something happens in a moment.
    pub fn soon(&mut self, happening: Happening) {
        let delay = self.random.below(1500);
        self.later(delay, happening);
    }

    /// Something happens some time within this.
    pub fn within(&mut self, longest: Time, happening: Happening) {
        let delay = self.random.below(longest);
        self.later(delay, happening);
    }

    /// Whether something rare is so this time.
    pub fn now_and_then(&mut self) -> bool {
        self.random.below(16) == 0
    }

    /// The last word was said again.
    pub fn told_again(&mut self) {
        self.record.told_again += 1;
    }

    /// A new link has replaced a lost one.
    pub fn recovered(&mut self) {
        self.record.recoveries += 1;
    }

    /// Something happens after a while.
    pub fn later(&mut self, delay: Time, happening: Happening) {
        self.agenda.push((self.now + delay, happening));
    }
}

/// One simulated migration.
#[derive(Debug)]
pub struct World {
    /// One end.
    pub source: Source,
    /// The other.
    pub destination: Destination,
    /// What went wrong so far.
    pub record: Record,
    /// Everything that happened, and when.
    pub trace: Vec<(Time, Happening)>,
    now: Time,
    random: Random,
    network: Network,
    queue: BinaryHeap<Reverse<(Time, u64, Happening)>>,
    events: u64,
    trouble: Trouble,
    /// The path carries new connections from then on.
    reachable_from: Time,
    workload_steps: u64,
}

impl World {
    /// The migration that follows from a seed and what goes wrong.
    pub fn new(seed: u64, trouble: Trouble) -> Self {
        let mut random = Random::new(seed);
        let memory = FrozenMemory { seed };
        let fuse = Fuse::default();
        let pids = 1 + random.below(2) as u32;
        let images: Vec<_> = (0..pids)
            .map(|number| workload::image(ImagePid(100 + number), &mut random))
            .collect();
        let machines: Vec<(ImagePid, SharedMachine)> = images
            .iter()
            .map(|image| {
                let pid = image.pid;
                let machine = Machine {
                    kernel: workload::restored(image),
                    frozen: Frozen { pid, memory },
                    disturbance: None,
                    fuse: fuse.clone(),
                };
                (pid, Arc::new(Mutex::new(machine)))
            })
            .collect();
        let lazy = images.iter().map(|image| (image.pid, image.lazy.clone()));
        let eager = images.iter().filter_map(|image| {
            let pages = PageRange {
                count: 3,
                ..image.lazy.ranges().next()?
            };
            Some(Run {
                pid: image.pid,
                pages,
            })
        });
        World {
            source: Source::new(memory, lazy.collect(), eager.collect()),
            destination: Destination::new(images, machines, fuse, trouble.copy_dies),
            record: Record::default(),
            trace: Vec::new(),
            now: 0,
            random,
            network: Network::default(),
            queue: BinaryHeap::new(),
            events: 0,
            trouble,
            reachable_from: 0,
            workload_steps: 0,
        }
    }

    /// Runs to the end and checks the invariants after every step.
    pub fn run(&mut self) {
        self.with(|_, destination, around| destination.begin(around));
        // Half of the runs are left in peace until the workload runs there.
        let peace = self.random.below(2) * PEACE;
        for _ in 0..self.trouble.cuts {
            let at = peace + self.random.below(STRUCK_WITHIN);
            let connection = match self.random.below(2) {
                0 => Connection::Fault,
                _ => Connection::Bulk,
            };
            // Which link that will be, time tells: the newest one.
            self.push(at, Happening::Cut(LinkId::MAX, connection));
        }
        for _ in 0..self.trouble.kills {
            let at = peace + self.random.below(STRUCK_WITHIN);
            let end = match self.random.below(2) {
                0 => End::Source,
                _ => End::Destination,
            };
            self.push(at, Happening::Kill(end));
        }
        while let Some(Reverse((time, _, happening))) = self.queue.pop() {
            self.trace.push((time, happening));
            self.now = time;
            self.events += 1;
            let last = &self.trace[self.trace.len().saturating_sub(20)..];
            assert!(
                self.events < MAX_EVENTS,
                "the migration does not end: {last:?}"
            );
            self.happen(happening);
            self.look_for_death();
            self.whole().check();
        }
        self.whole().check_end();
    }

    fn whole(&self) -> Whole<'_> {
        Whole {
            source: &self.source,
            destination: &self.destination,
            network: &self.network,
        }
    }

    fn push(&mut self, time: Time, happening: Happening) {
        // Same time, any order: the second key is random.
        let order = self.random.next();
        self.queue.push(Reverse((time, order, happening)));
    }

    fn with(&mut self, act: impl FnOnce(&mut Source, &mut Destination, &mut Surroundings<'_>)) {
        let mut around = Surroundings {
            now: self.now,
            random: &mut self.random,
            network: &mut self.network,
            agenda: Vec::new(),
            trouble: &mut self.trouble,
            record: &mut self.record,
            reachable_from: &mut self.reachable_from,
        };
        act(&mut self.source, &mut self.destination, &mut around);
        for (time, happening) in around.agenda {
            self.push(time, happening);
        }
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Arrive(link, lane) => self.arrive(link, lane),
            Happening::Cut(link, connection) => self.cut(link, connection),
            Happening::Notice(end, link) => self.with(|source, destination, around| match end {
                End::Source => source.notice_loss(around, link),
                End::Destination => destination.notice_loss(around, link),
            }),
            Happening::Dumped => self.with(|source, _, around| source.dumped(around)),
            Happening::Push(link) => self.with(|source, _, around| source.push(around, link)),
            Happening::Pushed(link) => self.with(|source, _, around| source.pushed(around, link)),
            Happening::Armed => self.with(|_, destination, around| destination.armed(around)),
            Happening::CarryOut => self.carry_out(),
            Happening::Connect => self.connect(),
            Happening::Unanswered(link) => {
                self.with(|_, destination, around| destination.unanswered(around, link));
            }
            Happening::Relink => self.with(|_, destination, around| destination.relink(around)),
            Happening::Relieve => self.relieve(),
            Happening::Workload => self.work(),
            Happening::Drain(number) => self.drain(number),
            Happening::Exited(number) => {
                if let Some((key, _)) = self.destination.watched[number].clone() {
                    self.destination.memory.exited(key);
                    self.after_memory();
                }
            }
            Happening::Release => self.with(|source, _, around| source.release(around)),
            Happening::Kill(end) => self.strike(end),
            Happening::Succeed(end) => self.succeed(end),
        }
    }

    /// The destination may have been killed in the middle of what just happened.
    fn look_for_death(&mut self) {
        let fuse = &self.destination.fuse;
        if !fuse.has_burnt() || self.destination.down {
            return;
        }
        if self.destination.outcome.is_some() {
            // It had ended before.
            fuse.renew();
        }
        self.kill(End::Destination);
    }

    /// Kills a program now, or in the middle of what it does next.
    fn strike(&mut self, end: End) {
        let busy = self.destination.copy == Copy::Running && !self.destination.down;
        if end == End::Destination && busy && self.random.below(2) == 0 {
            return self.destination.fuse.light(1 + self.random.below(40));
        }
        self.kill(end);
    }

    fn kill(&mut self, end: End) {
        let mut killed = false;
        self.with(|source, destination, around| {
            killed = match end {
                End::Source => source.die(around),
                End::Destination => destination.die(around),
            };
            // Also a link that nobody has spoken on yet.
            if let Some(link) = destination.link.filter(|_| killed) {
                around.give_up(end, link);
            }
        });
        self.record.kills[end as usize] += u64::from(killed);
    }

    fn succeed(&mut self, end: End) {
        let mut succeeded = false;
        self.with(|source, destination, around| {
            succeeded = match end {
                End::Source => source.succeed(),
                End::Destination => destination.succeed(around),
            };
        });
        self.record.successions[end as usize] += u64::from(succeeded);
    }

    fn cut(&mut self, link: LinkId, connection: Connection) {
        let newest = self.destination.link.or(self.source.link);
        let link = if link == LinkId::MAX {
            newest
        } else {
            Some(link)
        };
        if let Some(link) = link {
            self.with(|_, _, around| around.cut(link, connection));
        }
    }

    fn arrive(&mut self, link: LinkId, lane: Lane) {
        let Some(message) = self.network.arrived(link, lane, self.now) else {
            return;
        };
        if lane.is_up() {
            return self.with(|source, _, around| source.receive(around, (link, lane), message));
        }
        self.disturb();
        self.with(|_, destination, around| destination.receive(around, (link, lane), message));
        self.after_memory();
    }

    /// The next install is struck by a change of the address space after some pages.
    fn disturb(&mut self) {
        let may = self.destination.copy == Copy::Running && !self.is_resting();
        for (_, machine) in self.destination.machines() {
            let mut machine = lock(machine);
            let strikes = may && self.random.below(3) == 0;
            machine.kernel.interrupt = strikes.then(|| self.random.index(6));
            machine.disturbance = strikes.then(|| workload::change(&mut self.random));
            // It lasts until somebody tries again, at least.
            if may && machine.kernel.memory.is_none() && self.random.below(20) == 0 {
                machine.kernel.memory = Some(self.random.index(8));
            }
        }
    }

    fn relieve(&mut self) {
        for (_, machine) in self.destination.machines() {
            if self.is_resting() || self.random.below(3) == 0 {
                lock(machine).kernel.memory = None;
            }
        }
        self.with(|_, destination, around| destination.relieve(around));
        self.after_memory();
    }

    /// Whether the workload does nothing any more.
    fn is_resting(&self) -> bool {
        self.workload_steps >= WORKLOAD_STEPS
    }

    /// The source answers when the path carries packets and its program still runs.
    fn connect(&mut self) {
        let there = self.source.listens(self.now);
        let reachable = self.now >= self.reachable_from && there;
        self.with(|_, destination, around| destination.connect(around, reachable));
    }

    fn drain(&mut self, number: usize) {
        let Some((key, uffd)) = self.destination.watched[number].clone() else {
            return;
        };
        let drained = self.destination.memory.drain(key);
        drained.expect("the model kernel refuses nothing");
        let machine = self.machine(key.pid);
        let quiet = {
            let process = &lock(&machine).kernel.processes[uffd.process()];
            process.is_quiet() && process.faults.is_empty()
        };
        if !quiet {
            let threads = &mut lock(&machine).kernel.processes[uffd.process()];
            threads.release(0);
        }
        self.after_memory();
        if !quiet {
            let delay = self.random.below(500);
            self.push(self.now + delay, Happening::Drain(number));
        }
    }

    fn machine(&self, pid: ImagePid) -> SharedMachine {
        let mut machines = self.destination.machines().iter();
        let found = machines.find(|(its_pid, _)| *its_pid == pid);
        found.expect("every family has one").1.clone()
    }

    /// The memory was used: orders may wait, and everything may be here.
    fn after_memory(&mut self) {
        let delay = self.random.below(300);
        self.push(self.now + delay, Happening::CarryOut);
        self.with(|_, destination, around| destination.look(around));
    }

    fn carry_out(&mut self) {
        let before = self.destination.watched.len();
        self.with(|_, destination, around| destination.carry_out(around));
        for number in before..self.destination.watched.len() {
            self.push(self.now, Happening::Drain(number));
            let watched = self.destination.watched[number].as_ref();
            if watched.is_some_and(|(_, uffd)| uffd.is_gone()) {
                self.push(self.now, Happening::Exited(number));
            }
        }
    }

    /// A step of the workload, and whoever watches notices in a while.
    fn work(&mut self) {
        if self.destination.copy != Copy::Running {
            return;
        }
        let machines = self.destination.machines().to_vec();
        let (pid, machine) = &machines[self.random.index(machines.len())];
        let mut ended = None;
        {
            let mut machine = lock(machine);
            if let Some(process) = workload::living(&machine.kernel, &mut self.random) {
                let over = workload::step(&mut machine.kernel, process, &mut self.random);
                ended = over.then_some(process);
            }
        }
        for number in 0..self.destination.watched.len() {
            let watched = self.destination.watched[number].as_ref();
            let Some((_, uffd)) = watched.filter(|(key, _)| key.pid == *pid) else {
                continue;
            };
            let happening = match ended {
                Some(process) if uffd.process() == process => Happening::Exited(number),
                _ => Happening::Drain(number),
            };
            let delay = self.random.below(2000);
            self.push(self.now + delay, happening);
        }
        self.workload_steps += 1;
        if !self.is_resting() {
            let delay = self.random.below(3000);
            self.push(self.now + delay, Happening::Workload);
        }
    }
}
