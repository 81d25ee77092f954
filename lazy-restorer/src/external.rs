//! In the place of `criu lazy-pages`: somebody else runs `criu restore --lazy-pages`, and only memory is ours.
//!
//! CRIU is told nothing on its socket, so its tasks cannot be held back at the point of no return: they run the moment
//! after it said that they are restored. Therefore the source gives the workload away *before* the socket is bound. A
//! restore that fails gives it back: the tasks that were rebuilt are killed first, and never ran.

mod lost;
mod socket;
mod whole;

use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::control::ControlError;
use common::exit::{Failure, SessionError};
use common::host;
use common::images::{ImagesDigest, images_digest, read_processes};
use common::lost::LostPlan;
use common::operator::Facts;
use common::proto::control::{Abort, ToDestination, ToSource};
use common::proto::version::V3;
use common::record::Phases;
use common::session::{Event, Session, State};
use common::session_file::{
    DestinationSide, Kept, Remembered, SessionFile, Side, StoreError, Task, boot_id,
};
use common::stop::StopSignal;
use nix::unistd::Pid;
use quinn::SendStream;
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::advise::{Checks, Leniency};
use crate::connect::{ConnectPlan, Source, Threads, connect};
use crate::copy::Copy;
use crate::engine::Engine;
use crate::exits::{self, pidfd_kill, pidfd_open};
use crate::fetch::{Orders, TransferError};
use crate::files::Files;
use crate::handover::{Handover, HandoverError, Handovers};
use crate::keeper::{Keeper, Setup};
use crate::memory::{Memory, ProcessImage};
use crate::outage::Outage;
use crate::ready::Ready;
use crate::report::Record;
use crate::resident::{Credits, FAILURES, Link, reported};
use crate::{push, skeleton};
use socket::Socket;

/// Time in which the control stream may explain better why another stream broke.
const EXPLANATION: Duration = Duration::from_millis(500);

/// Everything the operator decided.
#[derive(Clone, Debug)]
pub struct ExternalPlan {
    /// How to reach the source.
    pub connect: ConnectPlan,
    /// Directory of the images that CRIU restores.
    pub images: PathBuf,
    /// CRIU's work directory, where it looks for the socket.
    pub work: PathBuf,
    /// Let the source push; else only what is touched comes.
    pub push: bool,
    /// Whom to tell when `criu restore` may begin.
    pub ready: Ready,
    /// What is done about a source that cannot be reached.
    pub lost: LostPlan,
    /// What a restart must know besides.
    pub remembered: Remembered,
}

/// Provides one restore with its memory, and fills `record` as far as it comes.
pub async fn run(
    plan: &ExternalPlan,
    keeper: Keeper,
    record: &mut Record,
) -> Result<(), SessionError> {
    let mut phases = Phases::start(State::Hello);
    let result = perform(plan, keeper, record, &mut phases).await;
    record.phases = phases.done().to_vec();
    record.total_us = phases.total_us();
    record.conclude(&result);
    result
}

async fn perform(
    plan: &ExternalPlan,
    keeper: Keeper,
    record: &mut Record,
    phases: &mut Phases,
) -> Result<(), SessionError> {
    let fail =
        |failure, error: &dyn std::fmt::Display| SessionError::new(failure, State::Hello, error);
    let mut stop = StopSignal::install().map_err(|error| fail(Failure::Internal, &error))?;
    let dump = Dump::read(&plan.images).map_err(|error| fail(Failure::BadInput, &error))?;
    let threads = Threads::start(plan.connect.path)?;
    let source = tokio::select! {
        source = connect(&plan.connect, &threads) => source?,
        name = stop.wait() => return Err(fail(Failure::Interrupted, &format!("stopped by {name}"))),
    };
    record.session = source.welcome.session.to_string();
    let mut external = External {
        plan,
        record,
        phases,
        stop,
        threads,
        session: Session::default(),
        source,
        copy_may_run: false,
        rolled_back: false,
        outage: None,
        keeper: Some(keeper),
        kept: Kept::nothing(plan.remembered.store.clone()),
    };
    let result = external.migrate(dump).await;
    // A workload whose memory is not whole is held, and this is not reached. What is lost is the source's to learn.
    if !matches!(&result, Err(error) if error.failure == Failure::Lost) {
        external.kept.end();
    }
    let last = match &result {
        // A source that gave up before the point of no return knows all there is to know.
        Err(error) if error.failure == Failure::Peer && error.state.source_may_thaw() => None,
        Err(error) => Some(ToSource::Abort(Abort {
            host: host::name(),
            state: error.state,
            text: error.text.clone(),
            copy_is_dead: !external.copy_may_run,
        })),
        Ok(()) => None,
    };
    external.source.close(last).await;
    result
}

/// What the images say.
struct Dump {
    digest: ImagesDigest,
    processes: Vec<ProcessImage>,
}

impl Dump {
    fn read(images: &Path) -> Result<Self, String> {
        let explain = |error| format!("{}: {error}", images.display());
        let processes = read_processes(images).map_err(explain)?;
        let digest = images_digest(images, &processes).map_err(explain)?;
        Ok(Dump {
            digest,
            processes: processes.into_iter().map(skeleton::memory_image).collect(),
        })
    }
}

struct External<'a> {
    plan: &'a ExternalPlan,
    record: &'a mut Record,
    phases: &'a mut Phases,
    stop: StopSignal,
    threads: Threads,
    session: Session,
    source: Source,
    /// CRIU may have let the tasks run.
    copy_may_run: bool,
    /// The source said instead of granting the cutover that it gives up: it has kept the workload.
    rolled_back: bool,
    /// Since the link was lost, until another one has proved to be good.
    outage: Option<Outage>,
    keeper: Option<Keeper>,
    kept: Kept,
}

/// The memory while it is filled.
struct Filling {
    memory: Arc<Memory>,
    keeper: Keeper,
    requests: mpsc::UnboundedSender<SendStream>,
    report: mpsc::Sender<TransferError>,
    failures: mpsc::Receiver<TransferError>,
    credits: Option<Credits>,
    /// End with the link they belong to.
    link_tasks: JoinSet<()>,
    /// The restored tasks.
    tasks: Vec<OwnedFd>,
    /// The same, for when they run.
    copy: Copy,
    /// For the keeper, which removes it, and for a successor.
    directory: TempDir,
}

impl External<'_> {
    fn state(&self) -> State {
        self.session.state()
    }

    fn advance(&mut self, event: Event) -> Result<(), SessionError> {
        let next = self
            .session
            .apply(event)
            .map_err(|error| self.fail(Failure::Internal, error))?;
        self.phases.enter(next);
        self.kept.enter(next);
        Ok(())
    }

    fn fail(&self, failure: Failure, text: impl std::fmt::Display) -> SessionError {
        SessionError::new(failure, self.state(), text)
    }

    fn understood(
        &self,
        message: Result<ToDestination, ControlError>,
    ) -> Result<ToDestination, SessionError> {
        match message {
            Ok(ToDestination::Abort(abort)) => {
                let text = format!(
                    "source host {} gave up in phase {}: {}",
                    abort.host, abort.state, abort.text
                );
                Err(self.fail(Failure::Peer, text))
            }
            Ok(message) => Ok(message),
            Err(error) => Err(self.fail(Failure::Connection, format!("lost the source: {error}"))),
        }
    }

    async fn next(&mut self) -> Result<ToDestination, SessionError> {
        let state = self.state();
        tokio::select! {
            message = self.source.control.next() => self.understood(message),
            name = self.stop.wait() => Err(interrupted(state, name)),
        }
    }

    async fn expect(&mut self, expected: &ToDestination) -> Result<(), SessionError> {
        match self.next().await? {
            message if message == *expected => Ok(()),
            message => Err(self.unexpected(&message)),
        }
    }

    fn unexpected(&self, message: &ToDestination) -> SessionError {
        let text = format!("the source broke the protocol: unexpected {message:?}");
        self.fail(Failure::Peer, text)
    }

    async fn send(&mut self, message: ToSource) -> Result<(), SessionError> {
        let Err(error) = self.source.control.send(&message).await else {
            return Ok(());
        };
        // A source that gave up said why before it closed.
        match timeout(EXPLANATION, self.source.control.next()).await {
            Ok(said) => match self.understood(said) {
                Err(reason) if reason.failure == Failure::Peer => Err(reason),
                _ => self.understood(Err(error)).map(drop),
            },
            Err(_) => self.understood(Err(error)).map(drop),
        }
    }

    async fn migrate(&mut self, dump: Dump) -> Result<(), SessionError> {
        self.advance(Event::Welcomed)?;
        let mut facts = match self.next().await? {
            ToDestination::Advise(facts) => facts,
            message => return Err(self.unexpected(&message)),
        };
        if self.source.welcome.version < V3 {
            let text =
                "the source's release sends its images always; use the same release on both hosts";
            return Err(self.fail(Failure::Refused, text));
        }
        facts.more = match self.next().await? {
            ToDestination::AdviseMore(more) => more,
            message => return Err(self.unexpected(&message)),
        };
        // Who restores looks after PIDs, and after files: only they know where they will be.
        let checks = Checks {
            files: &Files::default(),
            leniency: Leniency {
                programs: true,
                open_files: true,
                ..Leniency::default()
            },
        };
        checks
            .before_files(&facts, &Engine::Nursery)
            .map_err(|objection| self.fail(Failure::Restore, objection))?;
        self.send(ToSource::ReadyWithImages(dump.digest)).await?;
        self.advance(Event::Ready)?;
        self.expect(&ToDestination::Freezing).await?;
        let mut filling = self.begin(dump.processes).await?;
        self.expect(&ToDestination::Frozen).await?;
        self.advance(Event::Dumped)?;
        self.send(ToSource::Staged).await?;
        self.advance(Event::Staged)?;
        self.remember(&filling)?;
        self.advance(Event::CutoverAsked)?;
        if let Err(error) = self.ask(&mut filling).await {
            release(filling.keeper);
            return Err(self.take_back(error).await);
        }
        // CRIU waits for nobody, so its tasks may run from the moment it finds the socket.
        let noted = self.note(|side| side.may_run = true);
        let provided = match noted {
            Ok(()) => self.provide(&mut filling).await,
            Err(error) => Err(error),
        };
        if let Err(error) = provided {
            // No task has run, and those there were are killed: there is nothing to keep.
            release(filling.keeper);
            if let Err(error) = self.note(|side| side.may_run = false) {
                tracing::warn!(%error, "a restart does not know that the copy is dead");
            }
            return Err(self.take_back(error).await);
        }
        let counted = self.until_whole(&mut filling).await;
        self.record.count(&filling.memory);
        match counted {
            Ok(()) => {
                release(filling.keeper);
                Ok(())
            }
            Err(error) if !self.copy_may_run => {
                release(filling.keeper);
                Err(self.take_back(error).await)
            }
            // Whole, only not acknowledged: the workload needs nothing from anyone any more.
            Err(error)
                if filling.memory.counts().owed == 0
                    && (is_of_link(&error) || error.failure == Failure::Lost) =>
            {
                self.end_whole(filling).await
            }
            Err(error) => Err(self.hold(error, filling).await),
        }
    }

    /// Asks for the workload. A source that takes us back after the link was lost has given it away.
    async fn ask(&mut self, filling: &mut Filling) -> Result<(), SessionError> {
        self.send(ToSource::CutoverRequest).await?;
        let granted = self.source.control.next().await;
        match self.understood(granted) {
            Ok(ToDestination::CutoverGranted) => self.advance(Event::CutoverGranted),
            Ok(message) => Err(self.unexpected(&message)),
            Err(error) if error.failure == Failure::Connection => {
                self.recover(filling, &error.text, true).await
            }
            Err(error) => {
                self.rolled_back = error.failure == Failure::Peer;
                Err(error)
            }
        }
    }

    /// Opens the streams that fill the memory of `processes`.
    async fn begin(&mut self, processes: Vec<ProcessImage>) -> Result<Filling, SessionError> {
        let internal = |error: &dyn std::fmt::Display| {
            SessionError::new(Failure::Internal, State::Freeze, error)
        };
        let directory = host::staging_directory(None).map_err(|error| internal(&error))?;
        let facts = Facts {
            session: self.source.welcome.session,
            pid: 0,
            peer: self.source.control.peer().to_string(),
        };
        let keeper = self.keeper.take();
        let mut keeper = keeper.ok_or_else(|| internal(&"the keeper is in use"))?;
        let variables = facts.variables(State::Aborted);
        let set_up = keeper.set_up(Setup {
            id: facts.session.to_string(),
            directory: directory.path().to_owned(),
            on_aborted: None,
            variables: variables
                .map(|(name, value)| (name.to_owned(), value))
                .to_vec(),
            socket: self.kept.store().socket(&facts.session),
            session: self.kept.store().path(&facts.session),
            // Whoever started CRIU moves addresses.
            addresses: Vec::new(),
        });
        set_up.map_err(|error| internal(&error))?;
        // Where a successor looks for them.
        std::path::absolute(&self.plan.images)
            .and_then(|images| symlink(images, directory.path().join("images")))
            .map_err(|error| internal(&error))?;
        let (memory, orders) = Memory::new(processes);
        memory.keep_journals().map_err(|error| internal(&error))?;
        let (report, failures) = mpsc::channel(FAILURES);
        let (requests, links) = mpsc::unbounded_channel();
        let orders = Orders {
            orders,
            links,
            failures: report.clone(),
            recorder: None,
        };
        let carrying_out = reported(orders.carry_out(memory.clone()), &report);
        self.threads.fault.handle().spawn(carrying_out);
        let (credits, pages) = self
            .source
            .take_bulk_stream()
            .ok_or_else(|| internal(&"the bulk stream is in use"))?;
        let pages = self
            .threads
            .bulk
            .handle()
            .spawn(skeleton::expect_none(pages));
        let pages = match pages.await {
            Ok(Ok(pages)) => pages,
            Ok(Err(error)) => {
                // The source says better why it ended the stream.
                self.next().await?;
                return Err(self.fail(Failure::Peer, error));
            }
            Err(error) => return Err(internal(&error)),
        };
        let bulk = (credits, pages);
        let link = Link::open(&self.source, bulk, &memory, &report, &self.threads)
            .await
            .map_err(|error| self.fail(Failure::Connection, error))?;
        // The task that receives it was just started.
        let _ = requests.send(link.requests);
        Ok(Filling {
            memory,
            keeper,
            requests,
            report,
            failures,
            credits: Some(link.credits),
            link_tasks: link.tasks,
            tasks: Vec::new(),
            copy: Copy::default(),
            directory,
        })
    }

    /// Writes down what a restart must know, before there is anything to restart.
    fn remember(&mut self, filling: &Filling) -> Result<(), SessionError> {
        let gone = || self.fail(Failure::Internal, "the keeper is gone");
        let (welcome, connect) = (&self.source.welcome, &self.plan.connect);
        let keeper = Task::find(filling.keeper.pid().as_raw()).ok_or_else(gone)?;
        let file = SessionFile {
            id: welcome.session,
            // Before it is asked for: who was killed having asked may have been granted it.
            state: State::Cutover,
            boot: boot_id().unwrap_or_default(),
            program: Task::ourselves().ok_or_else(gone)?,
            directory: filling.directory.path().display().to_string(),
            identity: self.plan.remembered.identity.display().to_string(),
            accept: self.plan.remembered.accept.clone(),
            mtu: connect.path.mtu,
            secret: welcome.secret.clone(),
            peer_host: welcome.host.clone(),
            side: Side::Destination(DestinationSide {
                source: connect.source,
                bulk_port: welcome.bulk_port,
                version: welcome.version,
                keeper,
                // Whoever started CRIU looks after its tree.
                anchor: None,
                anchor_puts_away: false,
                may_run: false,
                root: None,
                tasks: Vec::new(),
                pidfile: None,
                addresses: Vec::new(),
                on_resumed: None,
                container: None,
                whole: None,
            }),
        };
        let written = self.kept.begin(file);
        written.map_err(|error| self.no_file(&error))
    }

    /// Changes what a restart knows.
    fn note(&mut self, change: impl FnOnce(&mut DestinationSide)) -> Result<(), SessionError> {
        let written = self.kept.change(|file| {
            if let Side::Destination(side) = &mut file.side {
                change(side);
            }
        });
        written.map_err(|error| self.no_file(&error))
    }

    fn no_file(&self, error: &StoreError) -> SessionError {
        let text = format!("session file: {error}; see --state-dir");
        self.fail(Failure::Restore, text)
    }

    /// Waits for CRIU, and serves it until all its tasks are restored.
    async fn provide(&mut self, filling: &mut Filling) -> Result<(), SessionError> {
        let socket =
            Socket::bind(&self.plan.work).map_err(|error| self.fail(Failure::BadInput, error))?;
        self.plan
            .ready
            .say()
            .map_err(|error| self.fail(Failure::BadInput, error))?;
        let handovers = loop {
            let waiting = self.wait(filling, socket.accept()).await?;
            match waiting {
                Ok(handovers) => break handovers,
                Err(text) => self.recover(filling, &text, false).await?,
            }
        };
        drop(socket);
        let handovers = handovers.map_err(|error| self.fail(Failure::Restore, error))?;
        // Threads of a restored task must never read zeros, whatever becomes of us.
        filling
            .keeper
            .commit(None)
            .map_err(|error| self.fail(Failure::Internal, error))?;
        match self.take_over_all(filling, handovers).await {
            Ok(()) => Ok(()),
            Err(error) => {
                // Nothing of it has run, and nothing shall.
                filling.tasks.iter().for_each(pidfd_kill);
                Err(error)
            }
        }
    }

    /// Waits for `event` before there are any tasks, unless the operator stops us; a lost link is an error text.
    async fn wait<T>(
        &mut self,
        filling: &mut Filling,
        event: impl Future<Output = T>,
    ) -> Result<Result<T, String>, SessionError> {
        let state = self.state();
        tokio::select! {
            event = event => Ok(Ok(event)),
            message = self.source.control.next() => {
                let error = match self.understood(message) {
                    Ok(message) => self.unexpected(&message),
                    Err(error) => error,
                };
                match error.failure {
                    Failure::Connection => Ok(Err(error.text)),
                    _ => Err(error),
                }
            }
            Some(error) = filling.failures.recv() => match error {
                TransferError::Link => Ok(Err(error.to_string())),
                error => Err(self.fail(Failure::Peer, error)),
            },
            name = self.stop.wait() => Err(interrupted(state, name)),
        }
    }

    async fn take_over_all(
        &mut self,
        filling: &mut Filling,
        mut handovers: Handovers,
    ) -> Result<(), SessionError> {
        loop {
            let step = tokio::select! {
                handover = handovers.recv() => Step::Handover(handover),
                message = self.source.control.next() => Step::Message(Box::new(message)),
                Some(error) = filling.failures.recv() => Step::Failure(error),
                name = self.stop.wait() => {
                    tracing::warn!("{name} ignored: `criu restore` has begun; end that to give up");
                    continue;
                }
            };
            match step {
                Step::Handover(Some(Ok(Handover::Finished))) => {
                    self.copy_may_run = true;
                    filling
                        .memory
                        .restored()
                        .map_err(|error| self.fail(Failure::Restore, error))?;
                    let named = filling.copy.tasks().to_vec();
                    if let Err(error) = self.note(|side| side.tasks = named) {
                        tracing::warn!(%error, "a restart does not know the tasks");
                    }
                    return Ok(());
                }
                Step::Handover(Some(Ok(Handover::Process { image, pid, uffd }))) => {
                    self.take_over(filling, image, pid, uffd)
                        .map_err(|error| self.fail(Failure::Restore, error))?;
                }
                Step::Handover(Some(Err(error))) => return Err(self.fail(Failure::Restore, error)),
                Step::Handover(None) => {
                    let text = "CRIU ended before it had restored all tasks; its own log says why";
                    return Err(self.fail(Failure::Restore, text));
                }
                Step::Message(message) => {
                    let error = match self.understood(*message) {
                        Ok(message) => self.unexpected(&message),
                        Err(error) => error,
                    };
                    match error.failure {
                        Failure::Connection => self.recover(filling, &error.text, true).await?,
                        _ => return Err(error),
                    }
                }
                Step::Failure(TransferError::Link) => {}
                Step::Failure(error) => return Err(self.fail(Failure::Restore, error)),
            }
        }
    }

    fn take_over(
        &mut self,
        filling: &mut Filling,
        image: common::images::ImagePid,
        pid: Pid,
        uffd: crate::uffd::UserFault,
    ) -> Result<(), String> {
        // One that has ended already needs no end.
        filling.tasks.extend(pidfd_open(pid).ok());
        if let Some(task) = Task::find(pid.as_raw()) {
            filling.copy.add(task);
        }
        let key = filling.memory.attach(image, uffd);
        let key = key.map_err(|error| error.to_string())?;
        filling
            .keeper
            .watch(pid)
            .map_err(|error| error.to_string())?;
        exits::watch(pid, key, filling.memory.clone());
        tracing::debug!(%image, %pid, "handed over");
        Ok(())
    }
}

/// Whether another link may do better.
fn is_of_link(error: &SessionError) -> bool {
    matches!(error.failure, Failure::Connection | Failure::Peer)
}

/// What may happen while CRIU restores, or the memory is filled.
enum Step {
    Handover(Option<Result<Handover, HandoverError>>),
    Message(Box<Result<ToDestination, ControlError>>),
    Failure(TransferError),
}

impl Filling {
    /// Lets the source push.
    fn begin_push(&mut self, source: &Source, threads: &Threads) {
        if let Some(credits) = self.credits.take() {
            let giving = push::give_credit(credits.stream, source.bulk.clone(), credits.installed);
            self.link_tasks
                .spawn_on(reported(giving, &self.report), threads.bulk.handle());
        }
    }

    /// Takes no more from the link that is lost: what has come by now is what the source is told.
    async fn unlink(&mut self) {
        self.link_tasks.shutdown().await;
        // What its tasks did not report yet is of no interest any more.
        while self.failures.try_recv().is_ok() {}
    }

    /// Goes on over a new link, after the source knows what is here.
    async fn reconnect(
        &mut self,
        source: &mut Source,
        threads: &Threads,
    ) -> Result<(), crate::resident::ResidentError> {
        let bulk = source.take_bulk_stream().ok_or(TransferError::Link)?;
        let link = Link::open(source, bulk, &self.memory, &self.report, threads).await?;
        self.link_tasks = link.tasks;
        // Without a receiver the session has failed already, and says so.
        let _ = self.requests.send(link.requests);
        self.credits = Some(link.credits);
        self.memory.reconnect();
        Ok(())
    }
}

fn release(keeper: Keeper) {
    if let Err(error) = keeper.release() {
        tracing::warn!(%error, "the keeper");
    }
}

fn interrupted(state: State, signal: &str) -> SessionError {
    SessionError::new(Failure::Interrupted, state, format!("stopped by {signal}"))
}
