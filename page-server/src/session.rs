//! One migration, from the source's side: the phases in order.
//!
//! Up to [`State::Listen`] every way out ends with the workload running here as before; from [`State::Cutover`] on
//! nothing but the destination's word that its copy is dead does (`session/postcopy.rs`). A killed program's session is
//! gone on with from there (`session/resume.rs`).

mod cutover;
mod postcopy;
mod resume;

use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use common::address::{Door, Doorway, MovingAddress, Shut};
use common::criu::Criu;
use common::exit::{Failure, SessionError};
use common::host;
use common::lost::{Limit, LostPlan};
use common::operator::Facts;
use common::proto::control::{Secret, SessionId, Tally, ToDestination, ToSource};
use common::proto::version::V3;
use common::quic::FaultGauge;
use common::record::{Phases, unix_us};
use common::session::{Event, Session, State};
use common::session_file::{
    AtRest, FrozenTasks, Kept, Original, Remembered, SessionFile, Side, SourceSide, Task, boot_id,
};
use common::stop::StopSignal;
use nix::unistd::Pid;
use tokio::time::{Instant, sleep};

use crate::backlog;
use crate::compression::Mode;
use crate::destination::{self, ComingBack, Destination, abort, unexpected};
use crate::engine::Engine;
use crate::files::Files;
use crate::freeze::FreezePlan;
use crate::frozen::FrozenWorkload;
use crate::ghosts::ghost_limit;
use crate::guard::note_session;
use crate::listen::{Listen, ListenPlan};
use crate::parting;
use crate::report::{Record, WireBytes};
use crate::skeleton;
use crate::workload::Workload;

/// Everything the operator decided.
#[derive(Clone, Debug)]
pub struct ServePlan {
    /// Who freezes.
    pub engine: Engine,
    /// Whom to move.
    pub workload: Workload,
    /// How to listen.
    pub listen: ListenPlan,
    /// The CRIU to use.
    pub criu: Criu,
    /// More arguments for `criu dump`.
    pub criu_args: Vec<String>,
    /// Established TCP connections move too.
    pub tcp_established: bool,
    /// The workload belongs to a shell's session.
    pub shell_job: bool,
    /// How long to wait for the destination; forever when not given.
    pub wait: Option<Duration>,
    /// One-time token that the destination must know.
    pub token: Option<Secret>,
    /// Whether to compress pushed pages.
    pub compress: Mode,
    /// Files that move along.
    pub files: Arc<Files>,
    /// Service addresses that move along.
    pub addresses: Vec<MovingAddress>,
    /// Where to put the migration's directory.
    pub work_dir: Option<PathBuf>,
    /// Command for when the workload is frozen and its skeleton complete.
    pub on_frozen: Option<String>,
    /// Command for a rollback, before the workload runs again.
    pub on_thawed: Option<String>,
    /// How long the workload may stand still before the point of no return.
    pub freeze_limit: Limit,
    /// What is done about a destination that does not come back.
    pub lost: LostPlan,
    /// What a restart must know besides.
    pub remembered: Remembered,
}

/// Performs one migration and fills `record` as far as it comes.
pub async fn run(plan: &ServePlan, record: &mut Record) -> Result<(), SessionError> {
    let at_start =
        |failure, error: &dyn std::fmt::Display| SessionError::new(failure, State::Hello, error);
    let stop = StopSignal::install().map_err(|error| at_start(Failure::Internal, &error))?;
    let session = SessionId::random().map_err(|error| at_start(Failure::Internal, &error))?;
    // While other namespaces may be entered.
    let doorway = doorway(plan);
    let mut listen =
        Listen::open(&plan.listen).map_err(|error| at_start(Failure::BadInput, &error))?;
    println!("listening on {}", listen.fault.address());
    record.session = session.to_string();
    let mut migration = Migration {
        plan,
        id: session,
        session: Session::default(),
        phases: Phases::start(State::Hello),
        stop,
        record,
        kept: Kept::nothing(plan.remembered.store.clone()),
        thaw_by: None,
        refusal: None,
        agreed: None,
        gauge: listen.gauge.clone(),
        complaint: None,
        doorway,
        doors: Vec::new(),
    };
    let result = migration.perform(&mut listen).await;
    migration.conclude(result)
}

pub(crate) use self::postcopy::{settle, until};
pub use self::resume::resume;

/// CRIU drops connections that nobody has accepted, in place of refusing to dump.
const SKIP_IN_FLIGHT: &str = "--skip-in-flight";

/// The way to the packet filter of the workload's network. A network that CRIU dumps would be dumped with our rules, so
/// they are made in the host's and in those of containers only, which were joined by path and are not dumped.
fn doorway(plan: &ServePlan) -> Option<Doorway> {
    let network = |pid: &dyn std::fmt::Display| File::open(format!("/proc/{pid}/ns/net")).ok();
    let inode = |file: &File| file.metadata().map(|metadata| metadata.ino()).ok();
    let theirs = network(&plan.workload.root())?;
    let is_left_alone = matches!(plan.engine, Engine::Runc(_))
        || inode(&theirs) == network(&"self").as_ref().and_then(inode);
    if !is_left_alone {
        return None;
    }
    let found = Doorway::find(&theirs);
    if let Err(error) = &found {
        tracing::warn!(%error, "new connections cannot be kept out while the workload is frozen");
    }
    found.ok()
}

struct Migration<'a> {
    plan: &'a ServePlan,
    id: SessionId,
    session: Session,
    phases: Phases,
    stop: StopSignal,
    record: &'a mut Record,
    kept: Kept,
    /// When a workload that stands still must run again, as long as it has not been given away.
    thaw_by: Option<Instant>,
    /// Why the destination is not served any more, whatever it says, unless it says that its copy is dead.
    refusal: Option<String>,
    /// What both ends have counted, once they agree.
    agreed: Option<Tally>,
    /// What the connections show of the path.
    gauge: FaultGauge,
    /// What the operator was told last.
    complaint: Option<String>,
    /// To where the workload's connections are.
    doorway: Option<Doorway>,
    /// Keep new connections out: one that was made while the workload is frozen would be lost.
    doors: Vec<Door>,
}

impl Migration<'_> {
    /// The program is about to end: nothing is left that a restart could go on with.
    fn conclude(&mut self, result: Result<(), SessionError>) -> Result<(), SessionError> {
        // What comes after both agree is not part of the migration's time.
        if self.record.total_us == 0 {
            self.note_times();
        }
        self.record.last_look = self.plan.files.last_look();
        self.record.conclude(&result);
        let state = self.state();
        if state.source_may_thaw() || matches!(state, State::Complete | State::Lost) {
            self.kept.end();
        }
        result
    }

    async fn perform(&mut self, listen: &mut Listen) -> Result<(), SessionError> {
        let mut destination = self.hello(listen).await?;
        self.advance(Event::Welcomed)?;
        let result = self.migrate(listen, &mut destination).await;
        self.record.wire_bytes = WireBytes::of(destination.control.connection(), &destination.bulk);
        match &result {
            // Also to a destination that broke the protocol: its operator is to learn why.
            Err(error) => {
                let abort = abort(error.state, &error.text);
                destination
                    .control
                    .farewell(&ToDestination::Abort(abort))
                    .await;
            }
            Ok(()) => self.part(listen, destination).await,
        }
        result
    }

    fn note_times(&mut self) {
        self.record.phases = self.phases.done().to_vec();
        self.record.total_us = self.phases.total_us();
    }

    /// The workload needs us no more; the destination may still have to hear that.
    async fn part(&mut self, listen: &mut Listen, destination: Destination) {
        let Some(agreed) = self.agreed else {
            return destination.control.close().await;
        };
        self.note_times();
        // The original is released: nothing is left that a restart could go on with, should we be killed while we wait.
        self.kept.end();
        let returns = ComingBack {
            listen,
            session: self.id,
            known: destination.acquaintance(),
        };
        parting::part(destination, agreed, returns, self.stop.wait()).await;
    }

    async fn migrate(
        &mut self,
        listen: &mut Listen,
        destination: &mut Destination,
    ) -> Result<(), SessionError> {
        let bulk = destination.bulk.clone();
        // Not on the connection's thread: rsync needs what this thread may do.
        let _files = self.plan.files.serve(bulk);
        self.advise(destination).await?;
        self.advance(Event::Ready)?;
        self.watch_files().await?;
        self.shut_door().await?;
        let mut workload = self.freeze(destination).await?;
        let remembered = self.remember(listen, destination, &mut workload);
        let handed_over = match remembered {
            Ok(()) => self.hand_over(listen, destination, &mut workload).await,
            Err(error) => Err(error),
        };
        match handed_over {
            Ok(transfer) => self.postcopy(listen, destination, workload, transfer).await,
            Err(error) => {
                self.roll_back(workload, destination).await;
                Err(error)
            }
        }
    }

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

    fn facts(&self, destination: &Destination) -> Facts {
        Facts {
            session: self.id,
            pid: self.plan.workload.root().as_raw().unsigned_abs(),
            peer: destination.control.peer().to_string(),
        }
    }

    async fn hello(&mut self, listen: &mut Listen) -> Result<Destination, SessionError> {
        let admitted = destination::admit(listen, self.id, self.plan.token.as_ref());
        tokio::select! {
            destination = admitted => destination,
            error = too_late(self.plan.wait) => Err(error),
            name = self.stop.wait() => Err(interrupted(State::Hello, name)),
        }
    }

    /// The next message, unless the operator stops us first, or the workload has stood still for too long.
    async fn next(&mut self, destination: &mut Destination) -> Result<ToSource, SessionError> {
        let (state, limit) = (self.state(), self.plan.freeze_limit);
        tokio::select! {
            message = destination.next(state) => message,
            () = until(self.thaw_by) => Err(SessionError::new(Failure::Freeze, state, limit.exceeded())),
            name = self.stop.wait() => Err(interrupted(state, name)),
        }
    }

    async fn expect(
        &mut self,
        destination: &mut Destination,
        expected: ToSource,
    ) -> Result<(), SessionError> {
        let message = self.next(destination).await?;
        if message == expected {
            return Ok(());
        }
        Err(unexpected(self.state(), &message))
    }

    async fn advise(&mut self, destination: &mut Destination) -> Result<(), SessionError> {
        let mut facts = self.plan.workload.facts(
            self.plan.criu.version(),
            self.plan.tcp_established,
            self.plan.shell_job,
        );
        if let Engine::Runc(container) = &self.plan.engine {
            let checked = container.check();
            checked.map_err(|error| self.fail(Failure::Freeze, error))?;
            if destination.version < V3 {
                let text = "the destination's release knows no containers; use the same release on both hosts";
                return Err(self.fail(Failure::Refused, text));
            }
            facts.more.container = Some(Box::new(container.facts().clone()));
        }
        let addresses = self.plan.addresses.iter().map(|address| address.ip);
        facts.more.addresses = addresses.collect();
        if !facts.more.addresses.is_empty() && destination.version < V3 {
            let text =
                "the destination's release moves no addresses; use the same release on both hosts";
            return Err(self.fail(Failure::Refused, text));
        }
        facts.more.files = self.plan.files.facts();
        if !facts.more.files.sync.is_empty() && destination.version < V3 {
            let text =
                "the destination's release brings no files; use the same release on both hosts";
            return Err(self.fail(Failure::Refused, text));
        }
        destination.advise(self.state(), facts).await?;
        self.expect(destination, ToSource::Ready).await
    }

    /// Before the door is shut: it takes a look at every file.
    async fn watch_files(&mut self) -> Result<(), SessionError> {
        let state = self.state();
        tokio::select! {
            () = self.plan.files.watch() => Ok(()),
            name = self.stop.wait() => Err(interrupted(state, name)),
        }
    }

    /// Nobody comes in any more, and who waits at the door is let in: CRIU can move only connections that were accepted.
    async fn shut_door(&mut self) -> Result<(), SessionError> {
        let (addresses, plan) = (&self.plan.addresses, self.plan);
        if !addresses.is_empty() {
            let shut = Door::shut(&self.id.to_string(), addresses, Shut::ToNewConnections);
            let shut = shut
                .map_err(|error| self.fail(Failure::Freeze, format!("the packet filter: {error}")));
            self.doors.push(shut?);
        }
        let skips = plan.criu_args.iter().any(|arg| arg == SKIP_IN_FLIGHT);
        if plan.tcp_established && !skips {
            let tasks = plan.workload.pids();
            self.shut_ports(&tasks);
            let drained = backlog::drain(&tasks).await;
            drained.map_err(|error| self.fail(Failure::Freeze, error))?;
        }
        Ok(())
    }

    /// At whatever address: an operator's command knows which of them move.
    fn shut_ports(&mut self, tasks: &[Pid]) {
        let listeners: Vec<SocketAddr> = backlog::listeners(tasks).into_iter().collect();
        if listeners.is_empty() {
            return;
        }
        let name = format!("{}-ports", self.id);
        let shut = self.doorway.take();
        match shut.map(|doorway| doorway.shut(&name, &listeners)) {
            Some(Ok(door)) => self.doors.push(door),
            // Then one that comes at the wrong moment makes CRIU refuse.
            Some(Err(error)) => tracing::warn!(%error, "new connections are not kept out"),
            None => {}
        }
    }

    async fn freeze(
        &mut self,
        destination: &mut Destination,
    ) -> Result<FrozenWorkload, SessionError> {
        destination
            .send(self.state(), &ToDestination::Freezing)
            .await?;
        let directory = host::staging_directory(self.plan.work_dir.as_deref())
            .map_err(|error| self.fail(Failure::Freeze, format!("no place for images: {error}")))?;
        let limit = self.plan.freeze_limit;
        self.thaw_by = limit.0.map(|limit| Instant::now() + limit);
        let plan = FreezePlan {
            limit,
            engine: self.plan.engine.clone(),
            criu: self.plan.criu.clone(),
            workload: self.plan.workload.clone(),
            directory: directory.path().to_owned(),
            tcp_established: self.plan.tcp_established,
            shell_job: self.plan.shell_job,
            ghost_limit: ghost_limit(&self.plan.workload.pids()),
            criu_args: self.plan.criu_args.clone(),
            on_thawed: self.plan.on_thawed.clone(),
        };
        let mut workload = FrozenWorkload::take(plan, directory)
            .await
            .map_err(|error| self.fail(Failure::Freeze, error))?;
        if let Some(frozen) = workload.ours() {
            self.record.frozen_at_unix_us = unix_us(frozen.frozen_at());
            self.record.skeleton_bytes = skeleton::bytes(&frozen.plan().images());
            self.record.shared_bytes = skeleton::shared_bytes(&frozen.plan().images());
        }
        Ok(workload)
    }

    /// Writes down what a restart must know, before there is anything to restart.
    fn remember(
        &mut self,
        listen: &Listen,
        destination: &Destination,
        workload: &mut FrozenWorkload,
    ) -> Result<(), SessionError> {
        let state = self.state();
        let fail = |text: String| SessionError::new(Failure::Freeze, state, text);
        let gone = || fail(String::from("a frozen process is gone"));
        let frozen = workload.ours().ok_or_else(gone)?;
        let find = |pid: Pid| Task::find(pid.as_raw()).ok_or_else(gone);
        let directory = frozen.plan().directory.clone();
        let acquaintance = destination.acquaintance();
        // Of a zombie nothing is frozen.
        let tasks: Vec<Task> = frozen
            .tasks()
            .iter()
            .filter_map(|pid| Task::find(pid.as_raw()))
            .collect();
        let file = SessionFile {
            id: self.id,
            state,
            boot: boot_id().unwrap_or_default(),
            program: find(Pid::this())?,
            directory: directory.display().to_string(),
            identity: self.plan.remembered.identity.display().to_string(),
            accept: self.plan.remembered.accept.clone(),
            mtu: self.plan.listen.path.mtu,
            secret: acquaintance.secret,
            peer_host: acquaintance.host,
            side: Side::Source(SourceSide {
                original: Original::Frozen(FrozenTasks {
                    root: find(self.plan.workload.root())?,
                    // The images are complete: CRIU does nothing to them any more.
                    at_rest: tasks.iter().copied().filter_map(AtRest::look).collect(),
                    tasks,
                    criu: find(frozen.criu().ok_or_else(gone)?)?,
                    container: self.plan.engine.container_name(),
                }),
                version: destination.version,
                criu_program: self.plan.criu.program().display().to_string(),
                fault: listen.fault.address(),
                bulk: listen.bulk.address(),
                on_thawed: self.plan.on_thawed.clone(),
                makes_clones: false,
            }),
        };
        let path = self.kept.store().path(&self.id);
        note_session(&directory, &path).map_err(|error| fail(format!("session file: {error}")))?;
        let written = self.kept.begin(file);
        written.map_err(|error| fail(format!("session file: {error}; see --state-dir")))
    }
}

/// The error for a destination that does not come in time; without a limit it never comes to that.
pub(crate) async fn too_late(limit: Option<Duration>) -> SessionError {
    let Some(limit) = limit else {
        return std::future::pending().await;
    };
    sleep(limit).await;
    let text = format!(
        "no destination came within {} s; start lazy-restorer there, and check that it can reach both UDP ports",
        limit.as_secs()
    );
    SessionError::new(Failure::Connection, State::Hello, text)
}

pub(crate) fn interrupted(state: State, signal: &str) -> SessionError {
    SessionError::new(Failure::Interrupted, state, format!("stopped by {signal}"))
}
