//! Going on with the session of a `lazy-restorer` that was killed after the point of no return: the copy may run, and
//! threads that miss a page wait.

use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;

use common::exit::{Failure, SessionError};
use common::proto::control::Welcome;
use common::record::Phases;
use common::session::{Session, State};
use common::session_file::{DestinationSide, Kept, SessionFile, Side, Task};
use common::stop::StopSignal;
use nix::unistd::Pid;
use procfs::process::all_processes;
use tokio::time::{Instant, sleep};

use super::cutover::announce;
use super::{MigratePlan, Migration};
use crate::connect::Threads;
use crate::copy::Copy;
use crate::files::Brought;
use crate::keeper::{Inheritance, Keeper, Setup, inherit};
use crate::memory::{Left, Memory};
use crate::report::Record;
use crate::resident::{Resident, Successor};
use crate::restore::Anchor;
use crate::skeleton;

/// Time the first program's CRIU has to let the tasks run, and its keeper to undo what never ran.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause between looks at them.
const PAUSE: Duration = Duration::from_millis(20);

/// Takes the copy over from the keeper, reaches the source again, and fills the memory to the end. `keeper` is our own.
pub async fn resume(
    plan: &MigratePlan,
    file: SessionFile,
    keeper: Keeper,
    record: &mut Record,
) -> Result<(), SessionError> {
    let fail =
        |failure, error: &dyn std::fmt::Display| SessionError::new(failure, State::Paused, error);
    let stop = StopSignal::install().map_err(|error| fail(Failure::Internal, &error))?;
    let side = file.destination().cloned();
    let side =
        side.ok_or_else(|| fail(Failure::BadInput, &"this is no session of a destination"))?;
    record.session = file.id.to_string();
    let welcome = Welcome {
        version: side.version,
        session: file.id,
        secret: file.secret.clone(),
        bulk_port: side.bulk_port,
        host: file.peer_host.clone(),
    };
    let mut migration = Migration {
        plan,
        engine: plan.engine.clone(),
        threads: Threads::start(plan.connect.path)?,
        session: Session::orphaned(),
        phases: Phases::start(State::Paused),
        stop,
        record,
        copy_may_run: side.may_run,
        kept: Kept::taken_over(plan.remembered.store.clone(), file),
        thaw_by: None,
        rolled_back: false,
        outage: None,
        door: None,
        brought: Brought::default(),
    };
    let result = match (&side.whole, side.may_run) {
        (Some(whole), _) => migration.tell_whole(&welcome, whole).await,
        (None, true) => migration.take_over(&side, &welcome, keeper).await,
        (None, false) => Err(migration.never_ran(&side, &welcome).await),
    };
    migration.conclude(result)
}

impl Migration<'_> {
    /// The copy was never let run; its keeper has killed it, or is about to.
    async fn never_ran(&mut self, side: &DestinationSide, welcome: &Welcome) -> SessionError {
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        while side.keeper.is_alive() {
            if Instant::now() > deadline {
                return self.fail(Failure::Lost, "the keeper of the killed copy does not end");
            }
            sleep(PAUSE).await;
        }
        self.tell_dead(welcome, None).await
    }

    async fn take_over(
        &mut self,
        side: &DestinationSide,
        welcome: &Welcome,
        keeper: Keeper,
    ) -> Result<(), SessionError> {
        self.until_criu_is_gone(side.anchor).await?;
        let inheritance = self.ask_keeper(side).await?;
        let successor = self.inherit(side, inheritance, keeper)?;
        let mut resident = Resident::succeed(successor, &self.threads);
        if self.plan.on_resumed.is_some() || !self.plan.addresses.is_empty() {
            let facts = common::operator::Facts {
                session: welcome.session,
                pid: resident.root().map_or(0, |pid| pid.as_raw().unsigned_abs()),
                peer: side.source.to_string(),
            };
            resident.announced = Some(tokio::spawn(announce(self.plan.clone(), facts)));
        }
        eprintln!("lazy-restorer: the copy is ours; trying to reach the source");
        let mut source = match self.find_again(welcome, &mut resident, None).await {
            Ok(source) => source,
            Err(error) if !self.copy_may_run => {
                resident.abort().await;
                return Err(error);
            }
            Err(error) => return self.end_without(None, welcome, error, resident).await,
        };
        let result = match self.go_on(&mut source, &mut resident).await {
            Ok(()) => self.postcopy(&mut source, resident).await,
            Err(error) => self.postcopy_after(&mut source, resident, error).await,
        };
        source.close(None).await;
        result
    }

    /// Asks the keeper of the killed program, which may only just have noticed that it was.
    async fn ask_keeper(&self, side: &DestinationSide) -> Result<Inheritance, SessionError> {
        let file = self.kept.file();
        let file = file.ok_or_else(|| self.fail(Failure::Lost, "no session file"))?;
        let socket = self.kept.store().socket(&file.id);
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        loop {
            let error = match inherit(&socket) {
                Ok(inheritance) => return Ok(inheritance),
                Err(error) => error,
            };
            let is_early = matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::ConnectionRefused
            );
            if !is_early || !side.keeper.is_alive() || Instant::now() > deadline {
                let text = format!("the keeper does not answer: {error}");
                return Err(self.fail(Failure::Lost, text));
            }
            sleep(PAUSE).await;
        }
    }

    /// Everything the keeper of the killed program holds becomes ours and our keeper's.
    fn inherit(
        &mut self,
        side: &DestinationSide,
        mut inheritance: Inheritance,
        mut keeper: Keeper,
    ) -> Result<Successor, SessionError> {
        let fail =
            |error: &dyn std::fmt::Display| SessionError::new(Failure::Lost, State::Paused, error);
        let file = self.kept.file().ok_or_else(|| fail(&"no session file"))?;
        let directory = PathBuf::from(&file.directory);
        let socket = self.kept.store().socket(&file.id);
        let session = self.kept.store().path(&file.id);
        let images = skeleton::processes(&directory.join("images"));
        let images = images.map_err(|error| fail(&error))?;
        let left = Left {
            journals: std::mem::take(&mut inheritance.journals),
            uffds: &mut inheritance.uffds,
        };
        let (memory, orders) = Memory::succeed(images, left).map_err(|error| fail(&error))?;
        // What is left belonged to processes that have ended.
        inheritance.uffds = HashMap::new();
        let setup = Setup {
            id: file.id.to_string(),
            directory: directory.clone(),
            on_aborted: None,
            variables: Vec::new(),
            socket,
            session,
            addresses: side.addresses.clone(),
        };
        let pid = keeper.pid().as_raw();
        let written = self.kept.change(|file| {
            file.state = State::Paused;
            file.program = Task::ourselves().unwrap_or(file.program);
            if let Side::Destination(side) = &mut file.side {
                side.keeper = Task::find(pid).unwrap_or(side.keeper);
            }
        });
        written.map_err(|error| fail(&error))?;
        let pid_of = |task: Task| Pid::from_raw(task.pid);
        let anchor = side.anchor.filter(|task| task.is_alive());
        let anchor = anchor.map(|task| Anchor {
            pid: pid_of(task),
            puts_away: side.anchor_puts_away,
        });
        // The first of all: a keeper that was not told so would kill the copy.
        let told = keeper.commit(None).and_then(|()| keeper.set_up(setup));
        let told = told.and_then(|()| anchor.map_or(Ok(()), |anchor| keeper.anchor(anchor)));
        told.map_err(|error| fail(&error))?;
        if let Err(error) = inheritance.taken() {
            tracing::warn!(%error, "the keeper before ours");
        }
        let mut copy = Copy::default();
        side.tasks.iter().for_each(|task| copy.add(*task));
        // Of a CRIU that restored, only the init it restored under is left by now.
        side.anchor
            .into_iter()
            .for_each(|init| copy.are_below(init));
        Ok(Successor {
            memory,
            orders,
            root: side.root.filter(|task| task.is_alive()).map(pid_of),
            copy,
            directory,
            keeper,
        })
    }

    /// A CRIU that still restores lets the tasks run without us, or kills them.
    async fn until_criu_is_gone(&self, anchor: Option<Task>) -> Result<(), SessionError> {
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        while anchor.is_some_and(is_restoring) {
            if Instant::now() > deadline {
                return Err(self.fail(Failure::Lost, "CRIU does not finish its work"));
            }
            sleep(PAUSE).await;
        }
        Ok(())
    }
}

/// Whether CRIU still is what `anchor` names, or a child of it.
fn is_restoring(anchor: Task) -> bool {
    if !anchor.is_alive() {
        return false;
    }
    let is_criu = |pid: i32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm"));
        name.is_ok_and(|name| name.trim() == "criu")
    };
    let processes = all_processes().into_iter().flatten().flatten();
    let mut stats = processes.filter_map(|process| process.stat().ok());
    is_criu(anchor.pid) || stats.any(|stat| stat.ppid == anchor.pid && is_criu(stat.pid))
}
