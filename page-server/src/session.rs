//! One migration, from the source's side: the phases in order.
//!
//! Up to [`State::Listen`] every way out ends with the workload running here as before; from [`State::Cutover`] on
//! nothing but the destination's word that its copy is dead does.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use common::criu::Criu;
use common::exit::{Failure, SessionError};
use common::host;
use common::operator::{self, Facts};
use common::proto::control::{Abort, Secret, SessionId, Tally, ToDestination, ToSource};
use common::record::{Phases, unix_us};
use common::session::{Event, Session, State};
use common::stop::StopSignal;
use tokio::time::sleep;

use crate::destination::{self, Destination, abort, unexpected};
use crate::engine::Engine;
use crate::frame;
use crate::freeze::FreezePlan;
use crate::frozen::FrozenWorkload;
use crate::listen::{Listen, ListenPlan};
use crate::push::Push;
use crate::report::{Record, WireBytes};
use crate::transfer::Transfer;
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
    /// Where to put the migration's directory.
    pub work_dir: Option<PathBuf>,
    /// Command for when the workload is frozen and its skeleton complete.
    pub on_frozen: Option<String>,
    /// Command for a rollback, before the workload runs again.
    pub on_thawed: Option<String>,
}

/// Performs one migration and fills `record` as far as it comes.
pub async fn run(plan: &ServePlan, record: &mut Record) -> Result<(), SessionError> {
    let at_start =
        |failure, error: &dyn std::fmt::Display| SessionError::new(failure, State::Hello, error);
    let stop = StopSignal::install().map_err(|error| at_start(Failure::Internal, &error))?;
    let session = SessionId::random().map_err(|error| at_start(Failure::Internal, &error))?;
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
    };
    let result = migration.perform(&mut listen).await;
    migration.record.phases = migration.phases.done().to_vec();
    migration.record.total_us = migration.phases.total_us();
    migration.record.conclude(&result);
    result
}

struct Migration<'a> {
    plan: &'a ServePlan,
    id: SessionId,
    session: Session,
    phases: Phases,
    stop: StopSignal,
    record: &'a mut Record,
}

impl Migration<'_> {
    async fn perform(&mut self, listen: &mut Listen) -> Result<(), SessionError> {
        let mut destination = self.hello(listen).await?;
        self.advance(Event::Welcomed)?;
        let result = self.migrate(listen, &mut destination).await;
        self.record.wire_bytes = WireBytes::of(destination.control.connection(), &destination.bulk);
        match &result {
            Err(error) if error.failure != Failure::Peer => {
                let abort = abort(error.state, &error.text);
                destination
                    .control
                    .farewell(&ToDestination::Abort(abort))
                    .await;
            }
            _ => destination.control.close().await,
        }
        result
    }

    async fn migrate(
        &mut self,
        listen: &mut Listen,
        destination: &mut Destination,
    ) -> Result<(), SessionError> {
        self.advise(destination).await?;
        self.advance(Event::Ready)?;
        let mut workload = self.freeze(destination).await?;
        match self.hand_over(listen, destination, &mut workload).await {
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

    /// The next message, unless the operator stops us first.
    async fn next(&mut self, destination: &mut Destination) -> Result<ToSource, SessionError> {
        let state = self.state();
        tokio::select! {
            message = destination.next(state) => message,
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
            facts.container = Some(container.facts().clone());
        }
        let advise = ToDestination::Advise(facts);
        destination.send(self.state(), &advise).await?;
        self.expect(destination, ToSource::Ready).await
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
        let plan = FreezePlan {
            engine: self.plan.engine.clone(),
            criu: self.plan.criu.clone(),
            workload: self.plan.workload.clone(),
            directory: directory.path().to_owned(),
            tcp_established: self.plan.tcp_established,
            shell_job: self.plan.shell_job,
            criu_args: self.plan.criu_args.clone(),
            on_thawed: self.plan.on_thawed.clone(),
        };
        let workload = FrozenWorkload::take(plan, directory)
            .await
            .map_err(|error| self.fail(Failure::Freeze, error))?;
        self.record.frozen_at_unix_us = unix_us(workload.frozen.frozen_at());
        Ok(workload)
    }

    /// From the complete skeleton to the point of no return. Whatever fails here is rolled back.
    async fn hand_over(
        &mut self,
        listen: &Listen,
        destination: &mut Destination,
        workload: &mut FrozenWorkload,
    ) -> Result<Transfer, SessionError> {
        self.advance(Event::Dumped)?;
        let mut transfer = Transfer::default();
        let serving = destination.serve(workload.source.clone(), workload.book.clone());
        transfer.spawn(listen.fault.thread.handle(), serving);
        let push = self.send_skeleton(listen, destination, workload).await?;
        self.expect(destination, ToSource::Staged).await?;
        self.advance(Event::Staged)?;
        let credits = destination.take_credits();
        transfer.spawn(listen.bulk.thread.handle(), push.all(credits));
        self.await_restore(destination, workload, &mut transfer)
            .await?;
        self.advance(Event::CutoverAsked)?;
        // Told to the hook before it is told to the destination: from here on our death must not thaw the workload.
        let committed = workload.frozen.commit().await;
        committed.map_err(|error| SessionError::new(Failure::Freeze, State::Listen, error))?;
        Ok(transfer)
    }

    /// Sends the skeleton and the eager pages while the operator's command runs.
    async fn send_skeleton(
        &mut self,
        listen: &Listen,
        destination: &mut Destination,
        workload: &FrozenWorkload,
    ) -> Result<Push, SessionError> {
        let state = self.state();
        let failed =
            |error: &dyn std::fmt::Display| SessionError::new(Failure::Freeze, state, error);
        let stream = destination
            .take_push()
            .ok_or_else(|| failed(&"the bulk stream is in use"))?;
        let push = Push::new(stream, workload.source.clone(), workload.book.clone());
        let images = workload.images();
        let sending = listen.bulk.thread.handle().spawn(async move {
            let push = push.skeleton(&images).await?;
            push.eager().await
        });
        let facts = self.facts(destination);
        let command = self.plan.on_frozen.as_deref();
        tokio::select! {
            done = operator::run("--on-frozen", command, state, &facts) => {
                done.map_err(|error| failed(&error))?;
            }
            // The workload is frozen: whoever wants it back is not to wait for the command.
            name = self.stop.wait() => return Err(interrupted(state, name)),
        }
        destination.send(state, &ToDestination::Frozen).await?;
        match sending.await {
            Ok(Ok(push)) => Ok(push),
            Ok(Err(error)) if error.is_of_link() => {
                Err(destination.explain(state, failed(&error)).await)
            }
            Ok(Err(error)) => Err(failed(&error)),
            Err(error) => Err(failed(&error)),
        }
    }

    /// Waits until the destination's tasks stand ready, as long as CRIU holds ours.
    async fn await_restore(
        &mut self,
        destination: &mut Destination,
        workload: &mut FrozenWorkload,
        transfer: &mut Transfer,
    ) -> Result<(), SessionError> {
        let state = self.state();
        tokio::select! {
            error = transfer.failed() => Err(SessionError::new(Failure::Freeze, state, error)),
            asked = self.expect(destination, ToSource::CutoverRequest) => asked,
            error = workload.frozen.lost() => Err(SessionError::new(Failure::Freeze, state, error)),
        }
    }

    async fn roll_back(&mut self, workload: FrozenWorkload, destination: &Destination) {
        let facts = self.facts(destination);
        let on_thawed = self.plan.on_thawed.as_deref();
        if let Err(error) = operator::run("--on-thawed", on_thawed, State::Aborted, &facts).await {
            tracing::error!(%error, "the workload is thawed nevertheless");
        }
        match workload.thaw().await {
            Ok(()) => tracing::info!("the workload runs here as before"),
            Err(error) => tracing::error!(%error, "thawing"),
        }
    }

    /// The workload is given away: from here on only the destination decides.
    async fn postcopy(
        &mut self,
        listen: &mut Listen,
        destination: &mut Destination,
        workload: FrozenWorkload,
        mut transfer: Transfer,
    ) -> Result<(), SessionError> {
        let granted = destination
            .send(self.state(), &ToDestination::CutoverGranted)
            .await;
        self.advance(Event::CutoverGranted)?;
        let mut link = granted.map_err(|error| error.text);
        loop {
            if let Err(text) = link {
                // Nothing of the old link may be sent while it is settled what has come.
                transfer.stop().await;
                transfer = self.recover(listen, destination, &workload, &text).await?;
            }
            link = match self
                .until_drained(listen, destination, &workload, &mut transfer)
                .await?
            {
                Served::Drained(tally) => {
                    return self.complete(destination, workload, tally).await;
                }
                Served::CopyDead(abort) => {
                    return Err(self.copy_died(workload, destination, &abort).await);
                }
                Served::LinkLost(text) => Err(text),
            };
        }
    }

    /// Serves until something decisive happens. An error has been waited out by the operator.
    async fn until_drained(
        &mut self,
        listen: &mut Listen,
        destination: &mut Destination,
        workload: &FrozenWorkload,
        transfer: &mut Transfer,
    ) -> Result<Served, SessionError> {
        loop {
            let message = tokio::select! {
                message = destination.control.next() => message,
                error = transfer.failed() => {
                    let error = self.fail(Failure::Lost, error);
                    return Err(self.hold(error).await);
                }
                Some(connection) = listen.fault.next() => {
                    // Only a destination that lost its link earlier than we did has a reason to come.
                    match self.readmit(listen, connection, destination).await {
                        true => return Ok(Served::LinkLost(String::from("the destination came again"))),
                        false => continue,
                    }
                }
                name = self.stop.wait() => {
                    let owed = workload.book.owed();
                    tracing::warn!(owed, "{name} ignored: the workload runs on the destination and needs this memory");
                    continue;
                }
            };
            match message {
                Ok(ToSource::Resumed) => self.resumed(),
                Ok(ToSource::Drained(tally)) => return Ok(Served::Drained(tally)),
                Ok(ToSource::Abort(abort)) if abort.copy_is_dead => {
                    return Ok(Served::CopyDead(abort));
                }
                Ok(ToSource::Abort(abort)) => {
                    let error = destination.gave_up(self.state(), &abort);
                    return Err(self.hold(error).await);
                }
                Ok(message) => {
                    let error = unexpected(self.state(), &message);
                    return Err(self.hold(error).await);
                }
                Err(error) => return Ok(Served::LinkLost(error.to_string())),
            }
        }
    }

    /// Replaces a destination by itself on a new connection, if that is who called.
    async fn readmit(
        &self,
        listen: &mut Listen,
        connection: quinn::Connection,
        destination: &mut Destination,
    ) -> bool {
        let peer = connection.remote_address();
        match destination::readmit(listen, connection, self.id, destination).await {
            Ok(again) => {
                *destination = again;
                true
            }
            Err(reason) => {
                tracing::warn!(%peer, reason, "refused a destination");
                false
            }
        }
    }

    /// The link is lost. Waits for the destination to come again, and settles what is owed.
    async fn recover(
        &mut self,
        listen: &mut Listen,
        destination: &mut Destination,
        workload: &FrozenWorkload,
        text: &str,
    ) -> Result<Transfer, SessionError> {
        eprintln!(
            "page-server: link lost ({text}); the frozen memory is kept until the destination comes again"
        );
        self.advance(Event::LinkLost)?;
        loop {
            // A destination that came while the old link still stood has been let in already.
            while !destination.is_new() {
                tokio::select! {
                    Some(connection) = listen.fault.next() => {
                        self.readmit(listen, connection, destination).await;
                    }
                    name = self.stop.wait() => {
                        tracing::warn!("{name} ignored: the destination may be running the workload");
                    }
                }
            }
            self.advance(Event::Reconnected)?;
            match settle(destination, workload).await {
                Ok(()) => break,
                Err(reason) => {
                    tracing::warn!(reason, "the destination is lost again");
                    destination.take_push();
                    self.advance(Event::LinkLost)?;
                }
            }
        }
        eprintln!("page-server: the destination is back");
        self.advance(Event::Settled)?;
        Ok(self.serve_again(listen, destination, workload))
    }

    /// Serves demand and pushes over a new link.
    fn serve_again(
        &self,
        listen: &Listen,
        destination: &mut Destination,
        workload: &FrozenWorkload,
    ) -> Transfer {
        let mut transfer = Transfer::default();
        let (source, book) = (workload.source.clone(), workload.book.clone());
        transfer.spawn(
            listen.fault.thread.handle(),
            destination.serve(source.clone(), book.clone()),
        );
        if let Some(stream) = destination.take_push() {
            let push = Push::new(stream, source, book);
            transfer.spawn(
                listen.bulk.thread.handle(),
                push.all(destination.take_credits()),
            );
        }
        transfer
    }

    fn resumed(&mut self) {
        let now = unix_us(SystemTime::now());
        self.record.resumed_at_unix_us = now;
        self.record.cutover_us = now.saturating_sub(self.record.frozen_at_unix_us);
    }

    async fn copy_died(
        &mut self,
        workload: FrozenWorkload,
        destination: &Destination,
        abort: &Abort,
    ) -> SessionError {
        let error = destination.gave_up(self.state(), abort);
        self.roll_back(workload, destination).await;
        match self.advance(Event::CopyDead) {
            Ok(()) => error,
            Err(invalid) => invalid,
        }
    }

    /// There is no way on. Holds the frozen workload until the operator comes: it may be running on the destination.
    async fn hold(&mut self, error: SessionError) -> SessionError {
        eprintln!(
            "page-server: error: source host {}, {error}; the destination may be running the workload, so it stays \
             frozen here; kill this program only after deciding which copy shall live",
            host::name()
        );
        loop {
            self.stop.wait().await;
            tracing::warn!("still holding the frozen workload");
        }
    }

    async fn complete(
        &mut self,
        destination: &mut Destination,
        workload: FrozenWorkload,
        theirs: Tally,
    ) -> Result<(), SessionError> {
        self.advance(Event::AllPresent)?;
        let ours = workload.book.tally();
        self.record.pages = workload.book.counts();
        if ours != theirs || workload.book.owed() > 0 {
            let text = format!(
                "the ends disagree (source {ours:?}, destination {theirs:?}); the frozen original is kept"
            );
            let error = self.fail(Failure::Lost, text);
            return Err(self.hold(error).await);
        }
        destination
            .send(self.state(), &ToDestination::Complete)
            .await?;
        self.advance(Event::Agreed)?;
        if let Err(error) = workload.release().await {
            tracing::warn!(%error, "the frozen original is killed nevertheless");
        }
        Ok(())
    }
}

/// What ends a stretch of serving.
enum Served {
    /// Nothing is owed any more.
    Drained(Tally),
    /// The destination's copy died before it ran.
    CopyDead(Abort),
    /// The link was lost.
    LinkLost(String),
}

/// Learns what the destination has, and owes it the rest.
async fn settle(destination: &mut Destination, workload: &FrozenWorkload) -> Result<(), String> {
    let book = &workload.book;
    let mut lost_digest = 0_u64;
    for (pid, words) in destination.present().await? {
        let lost = book
            .recover(pid, words)
            .ok_or("it claims pages that it cannot have")?;
        for run in lost {
            let all = (1 << run.pages.count) - 1;
            let frame = frame::read(workload.source.as_ref(), run, all);
            let frame = frame.map_err(|error| error.to_string())?;
            lost_digest = lost_digest.wrapping_add(frame.digest);
        }
    }
    book.begin_anew(lost_digest);
    Ok(())
}

/// The error for a destination that does not come in time; without a limit it never comes to that.
async fn too_late(limit: Option<Duration>) -> SessionError {
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

fn interrupted(state: State, signal: &str) -> SessionError {
    SessionError::new(Failure::Interrupted, state, format!("stopped by {signal}"))
}
