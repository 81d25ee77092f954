//! One migration, from the destination's side: the phases in order.
//!
//! Up to [`State::Listen`] whatever fails leaves nothing behind here, and the source lets the workload run on. From
//! [`State::Cutover`] on the workload is ours: nothing but its end, or every page being here, ends the session.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use common::control::ControlError;
use common::criu::Criu;
use common::exit::{Failure, SessionError};
use common::host;
use common::limits::{IDLE_TIMEOUT, MAX_PRESENT_WORDS, RECONNECT_PAUSE};
use common::operator::{self, Facts};
use common::proto::control::{Abort, Present, ToDestination, ToSource, WorkloadFacts};
use common::record::{Phases, unix_us};
use common::session::{Event, Session, State};
use common::stop::StopSignal;
use nix::unistd::Pid;
use quinn::{RecvStream, SendStream};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

use crate::advise;
use crate::connect::{ConnectPlan, Source, Threads, connect, reconnect};
use crate::fetch::TransferError;
use crate::gate::Held;
use crate::report::Record;
use crate::resident::{Resident, ResidentError, Step, images_directory};
use crate::restore::{Prepared, RestorePlan};
use crate::skeleton;

/// Everything the operator decided.
#[derive(Clone, Debug)]
pub struct MigratePlan {
    /// How to reach the source.
    pub connect: ConnectPlan,
    /// The CRIU to use.
    pub criu: Criu,
    /// More arguments for `criu restore`.
    pub criu_args: Vec<String>,
    /// Restore into a PID namespace of its own.
    pub pid_namespace: bool,
    /// Do not compare CPU features.
    pub ignore_cpu_features: bool,
    /// Let the source push; else only what is touched comes.
    pub push: bool,
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
}

/// Performs one migration and fills `record` as far as it comes.
pub async fn run(plan: &MigratePlan, record: &mut Record) -> Result<(), SessionError> {
    let stop = StopSignal::install()
        .map_err(|error| SessionError::new(Failure::Internal, State::Hello, error))?;
    let mut migration = Migration {
        plan,
        threads: Threads::start()?,
        session: Session::default(),
        phases: Phases::start(State::Hello),
        stop,
        record,
    };
    let result = migration.perform().await;
    migration.record.phases = migration.phases.done().to_vec();
    migration.record.total_us = migration.phases.total_us();
    migration.record.conclude(&result);
    result
}

struct Migration<'a> {
    plan: &'a MigratePlan,
    threads: Threads,
    session: Session,
    phases: Phases,
    stop: StopSignal,
    record: &'a mut Record,
}

/// What the skeleton's phase ends with.
struct Staged {
    directory: TempDir,
    bulk: (SendStream, RecvStream),
}

impl Migration<'_> {
    async fn perform(&mut self) -> Result<(), SessionError> {
        let mut source = tokio::select! {
            source = connect(&self.plan.connect, &self.threads) => source?,
            name = self.stop.wait() => return Err(interrupted(State::Hello, name)),
        };
        self.record.session = source.welcome.session.to_string();
        self.advance(Event::Welcomed)?;
        let result = self.migrate(&mut source).await;
        let last = match &result {
            Err(error) if error.failure != Failure::Peer => Some(ToSource::Abort(Abort {
                host: host::name(),
                state: error.state,
                text: error.text.clone(),
                copy_is_dead: error.state.source_may_thaw() || error.failure == Failure::Restore,
            })),
            _ => None,
        };
        source.close(last).await;
        result
    }

    async fn migrate(&mut self, source: &mut Source) -> Result<(), SessionError> {
        let facts = self.advise(source).await?;
        let directory = host::staging_directory(self.plan.work_dir.as_deref())
            .map_err(|error| self.fail(Failure::Restore, no_room(&error)))?;
        let prepared = self
            .restore_plan(&facts, &directory)
            .prepare()
            .await
            .map_err(|error| self.fail(Failure::Restore, error))?;
        self.send(source, &ToSource::Ready).await?;
        self.advance(Event::Ready)?;
        self.expect(source, ToDestination::Freezing).await?;
        let staged = self.skeleton(source, directory).await?;
        let operator_facts = self.facts(source, None);
        let before = self.plan.before_restore.as_deref();
        let address_taken =
            operator::run("--before-restore", before, self.state(), &operator_facts).await;
        let restored = match address_taken {
            Ok(()) => self.restore(source, prepared, staged).await,
            Err(error) => Err(self.fail(Failure::Restore, error)),
        };
        match restored {
            Ok(resident) => self.postcopy(source, resident).await,
            Err(error) => {
                self.clean_up(source).await;
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

    /// The next message, unless the source gives up, is lost, or the operator stops us.
    async fn next(&mut self, source: &mut Source) -> Result<ToDestination, SessionError> {
        let state = self.state();
        tokio::select! {
            message = source.control.next() => understood(state, message),
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
        let facts = match self.next(source).await? {
            ToDestination::Advise(facts) => facts,
            message => return Err(unexpected(self.state(), &message)),
        };
        let checked = advise::check_workload(
            &facts,
            self.plan.pid_namespace,
            self.plan.ignore_cpu_features,
        );
        checked.map_err(|objection| self.fail(Failure::Restore, objection))?;
        Ok(facts)
    }

    fn restore_plan(&self, facts: &WorkloadFacts, directory: &TempDir) -> RestorePlan {
        RestorePlan {
            criu: self.plan.criu.clone(),
            directory: directory.path().to_owned(),
            criu_args: self.plan.criu_args.clone(),
            tcp_established: facts.tcp_established,
            shell_job: facts.shell_job,
            pid_namespace: self.plan.pid_namespace,
        }
    }

    /// Stages the skeleton while the source dumps, and waits until the service address is free.
    async fn skeleton(
        &mut self,
        source: &mut Source,
        directory: TempDir,
    ) -> Result<Staged, SessionError> {
        let images = images_directory(&directory)
            .map_err(|error| self.fail(Failure::Restore, no_room(&error)))?;
        let (credits, pages) = source
            .take_bulk_stream()
            .ok_or_else(|| self.fail(Failure::Internal, "the bulk stream is in use"))?;
        let mut staging = self
            .threads
            .bulk
            .handle()
            .spawn(skeleton::stage(pages, images));
        let mut frozen = false;
        let pages = loop {
            tokio::select! {
                staged = &mut staging => match staged {
                    Ok(Ok(pages)) => break pages,
                    Ok(Err(error)) => return Err(self.staging_failed(source, error).await),
                    Err(error) => return Err(self.fail(Failure::Internal, error)),
                },
                message = self.next(source), if !frozen => match message? {
                    ToDestination::Frozen => frozen = true,
                    message => return Err(unexpected(self.state(), &message)),
                },
            }
        };
        if !frozen {
            self.expect(source, ToDestination::Frozen).await?;
        }
        self.advance(Event::Dumped)?;
        self.send(source, &ToSource::Staged).await?;
        Ok(Staged {
            directory,
            bulk: (credits, pages),
        })
    }

    /// A broken stream is best explained by what the source says about it.
    async fn staging_failed(
        &mut self,
        source: &mut Source,
        error: skeleton::SkeletonError,
    ) -> SessionError {
        let error = self.fail(Failure::Restore, error);
        let said = timeout(FINAL_WORD, self.next(source)).await;
        match said {
            Ok(Err(reason)) => reason,
            _ => error,
        }
    }

    /// From the staged skeleton to the running workload.
    async fn restore(
        &mut self,
        source: &mut Source,
        prepared: Prepared,
        staged: Staged,
    ) -> Result<Resident, SessionError> {
        self.advance(Event::Staged)?;
        let started = Resident::start(
            prepared,
            staged.directory,
            source,
            staged.bulk,
            &self.threads,
        )
        .await;
        let mut resident = started.map_err(|error| self.fail(Failure::Restore, error))?;
        let opened = match self.until_armed(source, &mut resident).await {
            Ok(held) => self.cut_over(source, &mut resident, held).await,
            Err(error) => Err(error),
        };
        match opened {
            Ok(()) => Ok(resident),
            Err(error) => {
                resident.abort().await;
                Err(error)
            }
        }
    }

    /// Waits until CRIU has rebuilt all tasks and waits at the gate.
    async fn until_armed(
        &mut self,
        source: &mut Source,
        resident: &mut Resident,
    ) -> Result<Held, SessionError> {
        let state = self.state();
        tokio::select! {
            step = resident.next() => match step {
                Ok(Step::Armed(held)) => Ok(held),
                Ok(Step::CriuEnded) => Err(self.fail(Failure::Restore, "CRIU restored nothing")),
                Ok(Step::Resumed) => Err(self.fail(Failure::Restore, "CRIU did not wait at the gate")),
                Err(error) => Err(self.resident_failed(source, error).await),
            },
            message = self.next(source) => Err(unexpected(state, &message?)),
        }
    }

    /// Passes the point of no return, and the workload through the gate.
    async fn cut_over(
        &mut self,
        source: &mut Source,
        resident: &mut Resident,
        held: Held,
    ) -> Result<(), SessionError> {
        self.send(source, &ToSource::CutoverRequest).await?;
        self.advance(Event::CutoverAsked)?;
        match source.control.next().await {
            Ok(ToDestination::CutoverGranted) => {}
            // Nothing has run yet, so whatever the source says or fails to say, our copy can be killed. The source
            // however may have given the workload away: it is told that the copy is dead.
            message => {
                let message = understood(State::Cutover, message)?;
                return Err(unexpected(State::Cutover, &message));
            }
        }
        let failed = |error: &dyn std::fmt::Display| {
            SessionError::new(Failure::Restore, State::Cutover, error)
        };
        held.open().await.map_err(|error| failed(&error))?;
        self.advance(Event::CutoverGranted)?;
        // The sockets exist, and CRIU unlocks their network now: announcing takes about as long as it needs to let the
        // tasks run. The memory must not wait for the command either.
        let facts = self.facts(source, resident.root());
        resident.announced = Some(tokio::spawn(announce(self.plan.clone(), facts)));
        loop {
            match resident.next().await.map_err(|error| failed(&error))? {
                Step::Resumed => return Ok(()),
                Step::CriuEnded => {}
                Step::Armed(_) => return Err(failed(&"CRIU waits at the gate again")),
            }
        }
    }

    /// The workload runs. Waits until it is whole.
    async fn postcopy(
        &mut self,
        source: &mut Source,
        mut resident: Resident,
    ) -> Result<(), SessionError> {
        self.record.resumed_at_unix_us = unix_us(SystemTime::now());
        let mut whole = match source.control.send(&ToSource::Resumed).await {
            Ok(()) => self.until_whole(source, &mut resident).await,
            Err(error) => Err(lost(self.state(), &error)),
        };
        while let Err(error) = &whole
            && error.failure == Failure::Connection
        {
            whole = match self.recover(source, &mut resident, error).await {
                Ok(()) => self.until_whole(source, &mut resident).await,
                Err(error) => Err(error),
            };
        }
        self.record.count(&resident.memory);
        let announced = resident.announced.take();
        if let Err(error) = whole {
            return Err(self.hold(error, resident).await);
        }
        resident.let_go();
        match announced {
            Some(announced) => announced
                .await
                .map_err(|error| self.fail(Failure::Internal, error)),
            None => Ok(()),
        }
    }

    /// The link is lost: threads that touch a missing page wait while we try to reach the source again.
    async fn recover(
        &mut self,
        source: &mut Source,
        resident: &mut Resident,
        error: &SessionError,
    ) -> Result<(), SessionError> {
        eprintln!(
            "lazy-restorer: {error}; the workload runs on as far as its memory is here, trying to reconnect"
        );
        self.advance(Event::LinkLost)?;
        let mut pause = RECONNECT_PAUSE.0;
        let whole_since = Instant::now();
        *source = loop {
            match reconnect(&self.plan.connect, &self.threads, &source.welcome).await {
                Ok(source) => break source,
                Err(error) if error.failure != Failure::Connection => {
                    return Err(self.fail(Failure::Lost, error.text));
                }
                Err(error) => tracing::info!(%error, "not yet"),
            }
            let owed = resident.memory.counts().owed;
            if owed == 0 && whole_since.elapsed() > ACKNOWLEDGEMENT_TIMEOUT {
                return Err(self.fail(
                    Failure::Lost,
                    "the source cannot be told that every page is here",
                ));
            }
            tokio::select! {
                () = sleep(pause) => {}
                name = self.stop.wait() => tracing::warn!(owed, "{name} ignored: the workload still needs the source"),
            }
            pause = (pause * 2).min(RECONNECT_PAUSE.1);
        };
        self.advance(Event::Reconnected)?;
        self.tell_present(source, resident).await?;
        let resumed = resident.reconnect(source, &self.threads).await;
        resumed.map_err(|error| self.fail(Failure::Connection, error))?;
        eprintln!("lazy-restorer: reconnected");
        self.advance(Event::Settled).map(drop)
    }

    /// Tells the source which pages have come.
    async fn tell_present(
        &mut self,
        source: &mut Source,
        resident: &Resident,
    ) -> Result<(), SessionError> {
        for (pid, words) in resident.memory.received() {
            for (index, words) in words.chunks(MAX_PRESENT_WORDS).enumerate() {
                let present = Present {
                    pid,
                    first_word: (index * MAX_PRESENT_WORDS) as u64,
                    words: words.to_vec(),
                };
                self.send(source, &ToSource::Present(present)).await?;
            }
        }
        self.send(source, &ToSource::PresentEnd).await
    }

    async fn until_whole(
        &mut self,
        source: &mut Source,
        resident: &mut Resident,
    ) -> Result<(), SessionError> {
        if self.plan.push {
            resident.begin_push(source, &self.threads);
        }
        let memory = resident.memory.clone();
        loop {
            tokio::select! {
                () = memory.settled() => break,
                step = resident.next() => if let Err(error) = step {
                    return Err(self.resident_failed(source, error).await);
                },
                message = source.control.next() => {
                    let message = understood(self.state(), message)?;
                    return Err(unexpected(self.state(), &message));
                }
                name = self.stop.wait() => {
                    let counts = memory.counts();
                    tracing::warn!(?counts, "{name} ignored: the workload needs pages that are still on the source");
                }
            }
        }
        self.advance(Event::AllPresent)?;
        self.send(source, &ToSource::Drained(memory.tally()))
            .await?;
        let message = understood(self.state(), source.control.next().await)?;
        if message != ToDestination::Complete {
            return Err(unexpected(self.state(), &message));
        }
        self.advance(Event::Agreed)
    }

    /// The restore or a stream failed: of the link, which the control stream explains better, or for good.
    async fn resident_failed(&mut self, source: &mut Source, error: ResidentError) -> SessionError {
        match error {
            ResidentError::Transfer(TransferError::Link) => {}
            ResidentError::Transfer(error) => return self.fail(Failure::Peer, error),
            error => return self.fail(Failure::Restore, error),
        }
        match timeout(EXPLANATION, source.control.next()).await {
            Ok(Err(error)) => lost(self.state(), &error),
            Ok(Ok(ToDestination::Abort(abort))) => gave_up(self.state(), &abort),
            Ok(Ok(message)) => unexpected(self.state(), &message),
            Err(_) => self.fail(
                Failure::Peer,
                "the source ended a stream of pages too early",
            ),
        }
    }

    /// There is no way on. Holds the workload's memory: threads that touch a missing page wait, and never read zeros.
    async fn hold(&mut self, error: SessionError, resident: Resident) -> SessionError {
        if resident.memory.counts().owed == 0 {
            // Whole, only not acknowledged: the workload needs nothing from anyone any more.
            resident.let_go();
            return error;
        }
        eprintln!(
            "lazy-restorer: error: destination host {}, {error}; the workload runs here, but threads that touch a \
             missing page wait; kill the workload to give it up",
            host::name()
        );
        loop {
            self.stop.wait().await;
            tracing::warn!("still holding the memory of the workload");
        }
    }

    async fn clean_up(&self, source: &Source) {
        let facts = self.facts(source, None);
        let on_aborted = self.plan.on_aborted.as_deref();
        if let Err(error) = operator::run("--on-aborted", on_aborted, State::Aborted, &facts).await
        {
            tracing::error!(%error, "cleaning up");
        }
    }
}

/// Tells the operator's world that the workload is here.
async fn announce(plan: MigratePlan, facts: Facts) {
    if let Some(path) = &plan.pidfile
        && let Err(error) = fs::write(path, format!("{}\n", facts.pid))
    {
        tracing::error!(path = %path.display(), %error, "cannot write the PID file");
    }
    let on_resumed = plan.on_resumed.as_deref();
    if let Err(error) = operator::run("--on-resumed", on_resumed, State::Postcopy, &facts).await {
        tracing::error!(%error, "the migration goes on");
    }
}

/// Time to try to tell the source that every page is here; the workload does not need it any more.
const ACKNOWLEDGEMENT_TIMEOUT: Duration = Duration::from_secs(20);

/// Time in which the control stream may explain better why another stream broke.
const EXPLANATION: Duration = Duration::from_millis(500);

/// Time the source has to say why the skeleton's stream broke; a lost link shows within it.
const FINAL_WORD: Duration = IDLE_TIMEOUT.saturating_add(Duration::from_secs(1));

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
