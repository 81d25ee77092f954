//! From the staged skeleton to the running workload: the restore, and the point of no return within it.

use std::fs;
use std::time::Duration;

use common::address;
use common::exit::{Failure, SessionError};
use common::operator::{self, Facts};
use common::proto::control::{ToDestination, ToSource};
use common::session::{Event, State};
use common::session_file::{DestinationSide, SessionFile, Side, Task, boot_id};
use nix::unistd::Pid;
use tokio::time::{sleep, timeout};

use super::{MigratePlan, Migration, Staged, TELLING, understood, unexpected};
use crate::connect::Source;
use crate::gate::Held;
use crate::keeper::Keeper;
use crate::outage::say_dead;
use crate::resident::{Resident, ResidentError, Step};
use crate::restore::Prepared;

/// Nobody got the word that lets the tasks run.
const LOST_CRIU: &str = "CRIU was lost before the cutover was granted";

/// Time after which the addresses are announced once more.
const SECOND_ANNOUNCEMENT: Duration = Duration::from_millis(200);

/// Time to try to learn whether the source has given the workload away; killing our copy, which never ran, is safe.
const GRANT_TIMEOUT: Duration = Duration::from_secs(60);

/// Time we have to take descriptors that CRIU has sent already.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(10);
impl Migration<'_> {
    /// Waits until the service address is free and the operator has made room for it here. CRIU, which has started
    /// meanwhile, makes no process before.
    async fn make_room(&mut self, source: &mut Source, frozen: bool) -> Result<(), SessionError> {
        if !frozen {
            self.expect(source, ToDestination::Frozen).await?;
        }
        self.advance(Event::Dumped)?;
        self.send(source, &ToSource::Staged).await?;
        self.before_restore(source).await?;
        self.advance(Event::Staged)
    }

    /// Runs the operator's command, unless the source or the operator gives up meanwhile: the workload is frozen.
    async fn before_restore(&mut self, source: &mut Source) -> Result<(), SessionError> {
        let state = self.state();
        let added = address::add(&self.plan.addresses);
        added.map_err(|error| self.fail(Failure::Restore, error))?;
        let facts = self.facts(source, None);
        let command = self.plan.before_restore.as_deref();
        tokio::select! {
            done = operator::run("--before-restore", command, state, &facts) => {
                done.map_err(|error| self.fail(Failure::Restore, error))
            }
            message = self.next(source) => Err(unexpected(state, &message?)),
        }
    }

    /// From the staged skeleton to the running workload.
    pub(super) async fn restore(
        &mut self,
        source: &mut Source,
        prepared: Prepared,
        staged: Staged,
        keeper: Keeper,
    ) -> Result<Resident, SessionError> {
        let started = Resident::start(
            prepared,
            staged.directory,
            source,
            staged.bulk,
            &self.threads,
            keeper,
            &self.plan.rehearsal,
        )
        .await;
        let mut resident = started.map_err(|error| self.fail(Failure::Restore, error))?;
        let armed = match self.make_room(source, staged.frozen).await {
            Ok(()) => self.until_armed(source, &mut resident).await,
            Err(error) => Err(error),
        };
        let opened = match armed {
            Ok(held) => self.cut_over(source, &mut resident, held).await,
            Err(error) => Err(error),
        };
        match opened {
            Ok(()) => Ok(resident),
            Err(error) if self.copy_may_run => Err(self.hold(Some(source), error, resident).await),
            Err(error) => {
                resident.abort().await;
                Err(self.take_back(source, error).await)
            }
        }
    }

    /// The copy never ran and is dead. A source that may have given the workload away would wait for us.
    async fn take_back(&mut self, source: &mut Source, error: SessionError) -> SessionError {
        if error.state.source_may_thaw() || self.rolled_back {
            return error;
        }
        let lost = matches!(error.failure, Failure::Connection | Failure::Lost);
        if !lost && say_dead(source, error.state).await.is_ok() {
            return error;
        }
        eprintln!(
            "lazy-restorer: {error}; the copy never ran and is dead, trying to tell the source"
        );
        let welcome = source.welcome.clone();
        let told = self.tell_dead(&welcome, Some(TELLING)).await;
        // What it failed of is more than that it could be told.
        match told.failure {
            Failure::Peer if !lost => error,
            _ => told,
        }
    }

    /// Lets CRIU make the tasks and waits until all are rebuilt and it waits at the gate.
    async fn until_armed(
        &mut self,
        source: &mut Source,
        resident: &mut Resident,
    ) -> Result<Held, SessionError> {
        resident.begin_tasks();
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
        self.until_attached(resident).await?;
        self.settle_files(source).await?;
        self.remember(source, resident)?;
        self.send(source, &ToSource::CutoverRequest).await?;
        self.advance(Event::CutoverAsked)?;
        let state = self.state();
        match understood(state, source.control.next().await) {
            Ok(ToDestination::CutoverGranted) => self.advance(Event::CutoverGranted)?,
            Ok(message) => return Err(unexpected(state, &message)),
            // The source may have given the workload away; one that takes us back has.
            Err(error) if error.failure == Failure::Connection => {
                self.recover(source, resident, &error, Some(GRANT_TIMEOUT))
                    .await?;
            }
            Err(error) => {
                self.rolled_back = error.failure == Failure::Peer;
                return Err(error);
            }
        }
        if held.has_lost_criu() || resident.has_lost_criu() {
            return Err(self.fail(Failure::Restore, LOST_CRIU));
        }
        // Written before it can happen: a restart must not take a copy for dead that runs. Should we be killed before the
        // keeper knows it too, the keeper kills the copy, and then takes this back.
        let may_run = self.kept.change(|file| {
            if let Side::Destination(side) = &mut file.side {
                side.may_run = true;
            }
        });
        may_run.map_err(|error| self.fail(Failure::Internal, error))?;
        let gate = held.copy();
        let committed = gate.and_then(|gate| resident.commit(gate));
        committed.map_err(|error| self.fail(Failure::Internal, error))?;
        self.copy_may_run = true;
        self.open_door();
        if let Err(error) = held.open().await {
            // CRIU or its script was killed while we asked: nobody got the word that lets the tasks run.
            self.copy_may_run = false;
            return Err(self.fail(Failure::Restore, format!("{LOST_CRIU}: {error}")));
        }
        let told = resident.keeper().opened();
        told.map_err(|error| self.fail(Failure::Internal, error))?;
        address::announce(&self.plan.addresses);
        // The sockets exist, and CRIU unlocks their network now: announcing takes about as long as it needs to let the
        // tasks run. The memory must not wait for the command either.
        let facts = self.facts(source, resident.root());
        resident.announced = Some(tokio::spawn(announce(self.plan.clone(), facts)));
        self.until_resumed(resident).await
    }

    /// CRIU has handed every process's memory over, but we may not have taken it all yet.
    async fn until_attached(&mut self, resident: &mut Resident) -> Result<(), SessionError> {
        let memory = resident.memory.clone();
        let attached = async {
            while !memory.is_attached() {
                resident.next().await?;
            }
            Ok::<(), ResidentError>(())
        };
        match timeout(ATTACH_TIMEOUT, attached).await {
            Ok(attached) => attached.map_err(|error| self.fail(Failure::Restore, error)),
            Err(_) => Err(self.fail(Failure::Restore, "CRIU did not hand all memory over")),
        }
    }

    /// Writes down what a restart must know, before there is anything to restart.
    fn remember(&mut self, source: &Source, resident: &Resident) -> Result<(), SessionError> {
        let internal = |text: String| self.fail(Failure::Internal, text);
        let find = |pid: Pid| Task::find(pid.as_raw());
        let gone = || internal(String::from("the keeper is gone"));
        let program = Task::ourselves().ok_or_else(gone)?;
        let keeper = find(resident.keeper_pid()).ok_or_else(gone)?;
        let welcome = &source.welcome;
        let connect = &self.plan.connect;
        let file = SessionFile {
            id: welcome.session,
            // Before it is asked for: who was killed having asked may have been granted it.
            state: State::Cutover,
            boot: boot_id().unwrap_or_default(),
            program,
            directory: resident.directory().display().to_string(),
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
                anchor: resident.anchor().and_then(|anchor| find(anchor.pid)),
                anchor_puts_away: resident.anchor().is_some_and(|anchor| anchor.puts_away),
                may_run: false,
                root: resident.root().and_then(find),
                tasks: resident.tasks().to_vec(),
                addresses: self.plan.addresses.clone(),
                pidfile: self
                    .plan
                    .pidfile
                    .as_ref()
                    .map(|path| path.display().to_string()),
                on_resumed: self.plan.on_resumed.clone(),
                container: self.engine.container_name(),
                whole: None,
            }),
        };
        let written = self.kept.begin(file);
        written.map_err(|error| {
            self.fail(
                Failure::Restore,
                format!("session file: {error}; see --state-dir"),
            )
        })
    }

    /// Waits until CRIU has let the tasks run. An error means that it killed them instead; of a CRIU that was killed itself
    /// nobody knows that.
    async fn until_resumed(&mut self, resident: &mut Resident) -> Result<(), SessionError> {
        loop {
            match resident.next().await {
                Ok(Step::Resumed) => return Ok(()),
                Ok(Step::CriuEnded | Step::Armed(_)) => {}
                Err(ResidentError::Restore(error)) if error.is_certain() => {
                    // CRIU lets tasks run in its very last step; failing before, it has killed them.
                    self.copy_may_run = false;
                    return Err(self.fail(Failure::Restore, error));
                }
                Err(error) => {
                    resident.failure = Some(error);
                    return Ok(());
                }
            }
        }
    }

    /// All sockets exist: packets may come.
    fn open_door(&mut self) {
        if let Some(Err(error)) = self.door.take().map(|mut door| door.open()) {
            tracing::error!(%error, "the packet filter");
        }
    }
}

/// Tells the operator's world that the workload is here.
pub(super) async fn announce(plan: MigratePlan, facts: Facts) {
    if let Some(path) = &plan.pidfile
        && let Err(error) = fs::write(path, format!("{}\n", facts.pid))
    {
        tracing::error!(path = %path.display(), %error, "cannot write the PID file");
    }
    let on_resumed = plan.on_resumed.as_deref();
    if let Err(error) = operator::run("--on-resumed", on_resumed, State::Postcopy, &facts).await {
        tracing::error!(%error, "the migration goes on");
    }
    // Neighbours may have missed the first word.
    if !plan.addresses.is_empty() {
        sleep(SECOND_ANNOUNCEMENT).await;
        address::announce(&plan.addresses);
    }
}
