//! One migration, from the destination's side: the phases in order.
//!
//! Up to [`State::Listen`] whatever fails leaves nothing behind here, and the source lets the workload run on. From
//! [`State::Cutover`] on the workload is ours: nothing but its end, or every page being here, ends the session
//! (`session/postcopy.rs`).

mod cutover;
mod files;
mod postcopy;
mod resume;

pub(crate) use self::postcopy::{over, parts};

use std::path::{Path, PathBuf};
use std::time::Duration;

use common::address::{self, Door, MovingAddress, Shut};
use common::control::ControlError;
use common::criu::Criu;
use common::exit::{Failure, SessionError};
use common::host;
use common::limits::IDLE_TIMEOUT;
use common::lost::{Limit, LostPlan};
use common::operator::{self, Facts};
use common::proto::control::{Abort, ToDestination, ToSource, WorkloadFacts};
use common::proto::version::V3;
use common::record::Phases;
use common::session::{Event, Session, State};
use common::session_file::{Kept, Remembered};
use common::stop::StopSignal;
use nix::unistd::Pid;
use quinn::{RecvStream, SendStream};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

use crate::advise::{self, Checks, Leniency, Objection};
use crate::connect::{ConnectPlan, Source, Threads, connect};
use crate::engine::Engine;
use crate::files::{Brought, Files, Pass};
use crate::keeper::{Keeper, Setup};
use crate::outage::{Ending, Outage, Teller};
use crate::rehearsal::RehearsalPlan;
use crate::report::Record;
use crate::resident::images_directory;
use crate::restore::RestorePlan;
use crate::skeleton;

/// Everything the operator decided.
#[derive(Clone, Debug)]
pub struct MigratePlan {
    /// How to reach the source.
    pub connect: ConnectPlan,
    /// The CRIU to use; none when there is nothing to restore any more.
    pub criu: Option<Criu>,
    /// More arguments for `criu restore`.
    pub criu_args: Vec<String>,
    /// Who restores.
    pub engine: Engine,
    /// What is not compared.
    pub leniency: Leniency,
    /// Let the source push; else only what is touched comes.
    pub push: bool,
    /// Whether pages that were huge on the source are made huge again.
    pub huge_pages: bool,
    /// What to do with the order of first touches.
    pub rehearsal: RehearsalPlan,
    /// Directories that come along.
    pub files: Files,
    /// Service addresses that come along.
    pub addresses: Vec<MovingAddress>,
    /// Where to put the migration's directory.
    pub work_dir: Option<PathBuf>,
    /// Where to write the PID of the restored root.
    pub pidfile: Option<PathBuf>,
    /// Command for before the restore: the service address is free.
    pub before_restore: Option<String>,
    /// Command for when the workload runs.
    pub on_resumed: Option<String>,
    /// Command for when the migration failed here.
    pub on_aborted: Option<String>,
    /// How long the workload may stand still before the point of no return.
    pub freeze_limit: Limit,
    /// What is done about a source that cannot be reached.
    pub lost: LostPlan,
    /// What a restart must know besides.
    pub remembered: Remembered,
}

/// Performs one migration and fills `record` as far as it comes.
///
/// `keeper` was started while this process had one thread only.
pub async fn run(
    plan: &MigratePlan,
    keeper: Keeper,
    record: &mut Record,
) -> Result<(), SessionError> {
    let stop = StopSignal::install()
        .map_err(|error| SessionError::new(Failure::Internal, State::Hello, error))?;
    let mut migration = Migration {
        plan,
        engine: plan.engine.clone(),
        threads: Threads::start(plan.connect.path)?,
        session: Session::default(),
        phases: Phases::start(State::Hello),
        stop,
        record,
        copy_may_run: false,
        kept: Kept::nothing(plan.remembered.store.clone()),
        thaw_by: None,
        rolled_back: false,
        outage: None,
        door: None,
        brought: Brought::default(),
    };
    let result = migration.perform(keeper).await;
    migration.conclude(result)
}

pub use self::resume::resume;

struct Migration<'a> {
    plan: &'a MigratePlan,
    engine: Engine,
    threads: Threads,
    session: Session,
    phases: Phases,
    stop: StopSignal,
    record: &'a mut Record,
    /// The restored tasks were let run, and nothing says for certain that they did not.
    copy_may_run: bool,
    kept: Kept,
    /// When a workload that stands still must run again, as long as it has not been asked for.
    thaw_by: Option<Instant>,
    /// The source said instead of granting the cutover that it gives up: it has kept the workload.
    rolled_back: bool,
    /// Since the link was lost, until another one has proved to be good.
    outage: Option<Outage>,
    /// Keeps packets for the service addresses out as long as no socket is there to take them.
    door: Option<Door>,
    /// The files of the last pass.
    brought: Brought,
}

/// Writes the skeleton as it comes.
type Staging = JoinHandle<Result<RecvStream, skeleton::SkeletonError>>;

/// What the skeleton's phase ends with.
struct Staged {
    directory: TempDir,
    bulk: (SendStream, RecvStream),
    /// The source has said `Frozen` already.
    frozen: bool,
}

impl Migration<'_> {
    /// The program is about to end. What is left for a restart is only that the source is still to be told of its end.
    fn conclude(&mut self, result: Result<(), SessionError>) -> Result<(), SessionError> {
        self.record.phases = self.phases.done().to_vec();
        self.record.total_us = self.phases.total_us();
        self.record.conclude(&result);
        let untold = |error: &SessionError| {
            matches!(
                error.state,
                State::Cutover | State::Postcopy | State::Paused | State::Recover | State::Lost
            ) && matches!(error.failure, Failure::Connection | Failure::Lost)
        };
        if !result.as_ref().is_err_and(untold) {
            self.kept.end();
        }
        result
    }

    async fn perform(&mut self, keeper: Keeper) -> Result<(), SessionError> {
        let mut source = tokio::select! {
            source = connect(&self.plan.connect, &self.threads) => source?,
            name = self.stop.wait() => return Err(interrupted(State::Hello, name)),
        };
        self.record.session = source.welcome.session.to_string();
        self.advance(Event::Welcomed)?;
        let result = self.migrate(&mut source, keeper).await;
        let last = match &result {
            // Also to a source that broke the protocol: its operator is to learn why.
            Err(error) => Some(ToSource::Abort(Abort {
                host: host::name(),
                state: error.state,
                text: error.text.clone(),
                copy_is_dead: !self.copy_may_run,
            })),
            Ok(()) => None,
        };
        source.close(last).await;
        result
    }

    async fn migrate(
        &mut self,
        source: &mut Source,
        mut keeper: Keeper,
    ) -> Result<(), SessionError> {
        let facts = self.advise(source).await?;
        let directory = host::staging_directory(self.plan.work_dir.as_deref())
            .map_err(|error| self.fail(Failure::Restore, no_room(&error)))?;
        let set_up = keeper.set_up(self.keeper_setup(source, directory.path()));
        set_up.map_err(|error| self.fail(Failure::Internal, error))?;
        let prepared = self
            .restore_plan(&facts, &directory)?
            .prepare()
            .await
            .map_err(|error| self.fail(Failure::Restore, error))?;
        self.send(source, &ToSource::Ready).await?;
        self.advance(Event::Ready)?;
        self.expect(source, ToDestination::Freezing).await?;
        self.thaw_by = self.plan.freeze_limit.0.map(|limit| Instant::now() + limit);
        let staged = self.skeleton(source, directory).await?;
        self.bring_files(source, Pass::Last).await?;
        keeper
            .prepared()
            .map_err(|error| self.fail(Failure::Internal, error))?;
        let restored = self.restore(source, prepared, staged, keeper).await;
        match restored {
            Ok(resident) => self.postcopy(source, resident).await,
            Err(error) => {
                let error = self.explained_by_files(source, error).await;
                self.clean_up(source).await;
                Err(error)
            }
        }
    }

    fn keeper_setup(&self, source: &Source, directory: &Path) -> Setup {
        let id = source.welcome.session;
        let variables = self.facts(source, None).variables(State::Aborted);
        Setup {
            id: id.to_string(),
            directory: directory.to_owned(),
            on_aborted: self.plan.on_aborted.clone(),
            variables: variables
                .map(|(name, value)| (name.to_owned(), value))
                .to_vec(),
            socket: self.kept.store().socket(&id),
            session: self.kept.store().path(&id),
            addresses: self.plan.addresses.clone(),
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

    fn facts(&self, source: &Source, root: Option<Pid>) -> Facts {
        Facts {
            session: source.welcome.session,
            pid: root.map_or(0, |pid| pid.as_raw().unsigned_abs()),
            peer: source.control.peer().to_string(),
        }
    }

    /// The next message, unless the source gives up, is lost, or the operator stops us, or the workload has stood still for
    /// too long.
    async fn next(&mut self, source: &mut Source) -> Result<ToDestination, SessionError> {
        let (state, limit) = (self.state(), self.plan.freeze_limit);
        tokio::select! {
            message = source.control.next() => understood(state, message),
            () = until(self.thaw_by) => Err(SessionError::new(Failure::Restore, state, limit.exceeded())),
            name = self.stop.wait() => Err(interrupted(state, name)),
        }
    }

    async fn expect(
        &mut self,
        source: &mut Source,
        expected: ToDestination,
    ) -> Result<(), SessionError> {
        let message = self.next(source).await?;
        if message == expected {
            return Ok(());
        }
        Err(unexpected(self.state(), &message))
    }

    async fn send(&self, source: &mut Source, message: &ToSource) -> Result<(), SessionError> {
        let Err(error) = source.control.send(message).await else {
            return Ok(());
        };
        // A source that gave up said why before it closed.
        match timeout(EXPLANATION, source.control.next()).await {
            Ok(Ok(ToDestination::Abort(abort))) => Err(gave_up(self.state(), &abort)),
            _ => Err(lost(self.state(), &error)),
        }
    }

    async fn advise(&mut self, source: &mut Source) -> Result<WorkloadFacts, SessionError> {
        let mut facts = match self.next(source).await? {
            ToDestination::Advise(facts) => facts,
            message => return Err(unexpected(self.state(), &message)),
        };
        if source.welcome.version >= V3 {
            facts.more = match self.next(source).await? {
                ToDestination::AdviseMore(more) => more,
                message => return Err(unexpected(self.state(), &message)),
            };
        } else if !self.plan.files.is_empty() {
            let text = "the source's release sends no files; use the same release on both hosts";
            return Err(self.fail(Failure::Refused, text));
        }
        let plan = self.plan;
        let checks = Checks {
            files: &plan.files,
            leniency: plan.leniency,
        };
        self.check(&facts, checks)
            .map_err(|objection| self.fail(Failure::Restore, objection))?;
        // What is only here is deleted from now on.
        self.bring_files(source, Pass::First).await?;
        let checked = checks.of_files(&facts, &mut self.engine);
        checked.map_err(|objection| self.fail(Failure::Restore, objection))?;
        self.shut_door(source)?;
        Ok(facts)
    }

    /// What can be known before any file has come.
    fn check(&self, facts: &WorkloadFacts, checks: Checks<'_>) -> Result<(), Objection> {
        let plan = self.plan;
        if let Some(criu) = &plan.criu {
            advise::check_criu(&facts.criu, criu.version())?;
        }
        advise::compare_kernels(&facts.kernel, &host::kernel());
        advise::check_files(&facts.more.files, &plan.files)?;
        advise::check_addresses(&facts.more.addresses, &plan.addresses)?;
        checks.before_files(facts, &self.engine)
    }

    /// The service addresses are not here yet, so this harms nobody.
    fn shut_door(&mut self, source: &Source) -> Result<(), SessionError> {
        let addresses = &self.plan.addresses;
        if !addresses.is_empty() {
            let shut = Door::shut(&source.welcome.session.to_string(), addresses, Shut::Wholly);
            let shut = shut.map_err(|error| {
                self.fail(Failure::Restore, format!("the packet filter: {error}"))
            });
            self.door = Some(shut?);
        }
        Ok(())
    }

    fn restore_plan(
        &self,
        facts: &WorkloadFacts,
        directory: &TempDir,
    ) -> Result<RestorePlan, SessionError> {
        let criu = self.plan.criu.clone();
        let no_criu = || self.fail(Failure::Internal, "no CRIU");
        Ok(RestorePlan {
            criu: criu.ok_or_else(no_criu)?,
            directory: directory.path().to_owned(),
            criu_args: self.plan.criu_args.clone(),
            tcp_established: facts.tcp_established,
            shell_job: facts.shell_job,
            engine: self.engine.clone(),
        })
    }

    /// Stages the skeleton as the source sends it.
    async fn skeleton(
        &mut self,
        source: &mut Source,
        directory: TempDir,
    ) -> Result<Staged, SessionError> {
        let images = images_directory(&directory).and_then(skeleton::Folder::open);
        let images = images.map_err(|error| self.fail(Failure::Restore, no_room(&error)))?;
        let (credits, pages) = source
            .take_bulk_stream()
            .ok_or_else(|| self.fail(Failure::Internal, "the bulk stream is in use"))?;
        let mut staging = self
            .threads
            .bulk
            .handle()
            .spawn(skeleton::stage(pages, images));
        match self.until_staged(source, &mut staging).await {
            Ok((pages, frozen)) => Ok(Staged {
                directory,
                bulk: (credits, pages),
                frozen,
            }),
            Err(error) => {
                // A file it still makes would keep the directory, which goes away now.
                staging.abort();
                if !staging.is_finished() {
                    let _ = staging.await;
                }
                Err(error)
            }
        }
    }

    /// The rest of the bulk stream, and whether the source has said that nothing runs there any more.
    async fn until_staged(
        &mut self,
        source: &mut Source,
        staging: &mut Staging,
    ) -> Result<(RecvStream, bool), SessionError> {
        let mut frozen = false;
        loop {
            tokio::select! {
                staged = &mut *staging => return match staged {
                    Ok(Ok(pages)) => Ok((pages, frozen)),
                    Ok(Err(error)) => Err(self.staging_failed(source, error).await),
                    Err(error) => Err(self.fail(Failure::Internal, error)),
                },
                // Also when nothing is expected: the source, or the operator, may give up.
                message = self.next(source) => match message? {
                    ToDestination::Frozen if !frozen => frozen = true,
                    message => return Err(unexpected(self.state(), &message)),
                },
            }
        }
    }

    /// A broken stream is best explained by what the source says about it.
    async fn staging_failed(
        &mut self,
        source: &mut Source,
        error: skeleton::SkeletonError,
    ) -> SessionError {
        let of_link = matches!(error, skeleton::SkeletonError::Stream(_));
        let error = self.fail(Failure::Restore, error);
        if !of_link {
            return error;
        }
        let said = timeout(FINAL_WORD, self.next(source)).await;
        match said {
            Ok(Err(reason)) => reason,
            _ => error,
        }
    }

    /// The copy is dead: its addresses are nobody's here.
    fn withdraw(&self) {
        if let Err(error) = address::remove(&self.plan.addresses) {
            tracing::error!(%error, "cleaning up");
        }
    }

    async fn clean_up(&self, source: &Source) {
        self.withdraw();
        let facts = self.facts(source, None);
        let on_aborted = self.plan.on_aborted.as_deref();
        if let Err(error) = operator::run("--on-aborted", on_aborted, State::Aborted, &facts).await
        {
            tracing::error!(%error, "cleaning up");
        }
    }
}

/// Time to try to tell a source that our copy is dead, which never ran, or whole. Afterwards `resume` still can.
pub(crate) const TELLING: Duration = Duration::from_secs(600);

/// Time in which the control stream may explain better why another stream broke.
const EXPLANATION: Duration = Duration::from_millis(500);

/// Time the source has to say why the skeleton's stream broke; a lost link shows within it.
const FINAL_WORD: Duration = IDLE_TIMEOUT.saturating_add(Duration::from_secs(1));

/// Waits until then; for ever without a limit.
async fn until(limit: Option<Instant>) {
    match limit {
        Some(limit) => sleep_until(limit).await,
        None => std::future::pending().await,
    }
}

fn understood(
    state: State,
    message: Result<ToDestination, ControlError>,
) -> Result<ToDestination, SessionError> {
    match message {
        Ok(ToDestination::Abort(abort)) => Err(gave_up(state, &abort)),
        Ok(message) => Ok(message),
        Err(error) => Err(lost(state, &error)),
    }
}

fn no_room(error: &std::io::Error) -> String {
    format!("no place for the skeleton: {error}")
}

fn gave_up(state: State, abort: &Abort) -> SessionError {
    let text = format!(
        "source host {} gave up in phase {}: {}",
        abort.host, abort.state, abort.text
    );
    SessionError::new(Failure::Peer, state, text)
}

fn lost(state: State, error: &ControlError) -> SessionError {
    let text = format!("lost the source: {error}");
    SessionError::new(Failure::Connection, state, text)
}

fn unexpected(state: State, message: &ToDestination) -> SessionError {
    let text = format!("the source broke the protocol: unexpected {message:?}");
    SessionError::new(Failure::Peer, state, text)
}

fn interrupted(state: State, signal: &str) -> SessionError {
    SessionError::new(Failure::Interrupted, state, format!("stopped by {signal}"))
}
