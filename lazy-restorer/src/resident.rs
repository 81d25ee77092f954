//! The workload while it is restored and becomes whole: CRIU, the tasks' memory, and the streams that fill it.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use nix::unistd::Pid;
use quinn::{RecvStream, SendStream};
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::connect::Source;
use crate::exits;
use crate::fetch::{self, Orders, TransferError};
use crate::gate::{Call, Gate, Held};
use crate::handover::{self, Handover, HandoverError};
use crate::keeper::{Keeper, KeeperHand};
use crate::memory::{Memory, MemoryError, Order};
use crate::push;
use crate::restore::{Prepared, Restore, RestoreError};
use crate::skeleton;

/// Failures of transfer tasks that wait to be looked at.
const FAILURES: usize = 8;

/// A restoring or restored workload.
#[derive(Debug)]
pub struct Resident {
    /// Its memory.
    pub memory: Arc<Memory>,
    /// CRIU.
    pub restore: Restore,
    /// The operator's `--on-resumed` command, while it runs.
    pub announced: Option<JoinHandle<()>>,
    keeper: Keeper,
    gate: Gate,
    criu_ended: bool,
    handed_over: bool,
    handovers: mpsc::UnboundedReceiver<Result<Handover, HandoverError>>,
    failures: mpsc::Receiver<TransferError>,
    report: mpsc::Sender<TransferError>,
    credits: Option<SendStream>,
    installed: watch::Receiver<u64>,
    tasks: Vec<Pid>,
    _directory: TempDir,
}

/// What happens to a restore.
#[derive(Debug)]
pub enum Step {
    /// All tasks are rebuilt; CRIU waits for the point of no return.
    Armed(Held),
    /// The tasks run.
    Resumed,
    /// CRIU has done its work and is gone.
    CriuEnded,
}

/// Why the workload does not become whole here.
#[derive(Debug, thiserror::Error)]
pub enum ResidentError {
    /// A directory or socket.
    #[error("cannot prepare the restore: {0}")]
    Prepare(#[from] std::io::Error),
    /// The images.
    #[error(transparent)]
    Images(#[from] common::images::ReadImagesError),
    /// The gate.
    #[error("CRIU's script cannot reach us any more")]
    Gate,
    /// The lazy-pages socket.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// CRIU.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The streams.
    #[error(transparent)]
    Transfer(#[from] TransferError),
}

impl Resident {
    /// Starts the restore of a staged skeleton and everything that resolves its faults.
    pub async fn start(
        prepared: Prepared,
        directory: TempDir,
        source: &Source,
        bulk: (SendStream, RecvStream),
    ) -> Result<Self, ResidentError> {
        let plan = prepared.plan();
        fs::create_dir_all(plan.work())?;
        let (memory, orders) = Memory::new(skeleton::processes(&plan.images())?);
        let handovers = handover::listen(&plan.work())?;
        let gate = Gate::bind(&plan.gate())?;
        let keeper = Keeper::start()?;
        let (report, failures) = mpsc::channel(FAILURES);
        let (credits, pages) = bulk;
        let installed = spawn_push(source, pages, &memory, &report);
        let hand = keeper.hand()?;
        spawn_fetch(source, (orders, hand), &memory, &report).await?;
        let restore = prepared.start().await?;
        Ok(Resident {
            memory,
            restore,
            announced: None,
            keeper,
            gate,
            criu_ended: false,
            handed_over: false,
            handovers,
            failures,
            report,
            credits: Some(credits),
            installed,
            tasks: Vec::new(),
            _directory: directory,
        })
    }

    /// What happens next to the restore. Descriptors are taken over on the way. May be cancelled without loss.
    pub async fn next(&mut self) -> Result<Step, ResidentError> {
        loop {
            tokio::select! {
                call = self.gate.next() => match call {
                    Some(Call::Armed(held)) => return Ok(Step::Armed(held)),
                    Some(Call::Resumed) => return Ok(Step::Resumed),
                    None => return Err(ResidentError::Gate),
                },
                handover = self.handovers.recv(), if !self.handed_over => self.take_over(handover)?,
                ended = self.restore.finished(), if !self.criu_ended => {
                    self.criu_ended = true;
                    ended?;
                    return Ok(Step::CriuEnded);
                }
                Some(error) = self.failures.recv() => return Err(error.into()),
            }
        }
    }

    fn take_over(
        &mut self,
        handover: Option<Result<Handover, HandoverError>>,
    ) -> Result<(), ResidentError> {
        match handover.transpose()? {
            Some(Handover::Process { image, pid, uffd }) => {
                let key = self.memory.attach(image, uffd)?;
                self.keeper.watch(pid)?;
                self.tasks.push(pid);
                exits::watch(pid, key, self.memory.clone());
                tracing::debug!(%image, %pid, "handed over");
            }
            Some(Handover::Finished) => {
                self.handed_over = true;
                self.memory.restored()?;
            }
            // CRIU failed; its exit says why.
            None => self.handed_over = true,
        }
        Ok(())
    }

    /// Lets the source push.
    pub fn begin_push(&mut self, source: &Source) {
        if let Some(credits) = self.credits.take() {
            let giving = push::give_credit(credits, source.bulk.clone(), self.installed.clone());
            spawn(source.bulk_thread.handle(), giving, &self.report);
        }
    }

    /// PID of the restored root as this host numbers it: the first task CRIU restores.
    pub fn root(&self) -> Option<Pid> {
        self.tasks.first().copied()
    }

    /// Kills CRIU and whatever it restored.
    pub async fn abort(self) {
        self.restore.abort().await;
        release(self.keeper);
    }

    /// The memory is whole: nothing of ours is needed any more.
    pub fn let_go(self) {
        release(self.keeper);
    }
}

fn release(keeper: Keeper) {
    if let Err(error) = keeper.release() {
        tracing::warn!(%error, "the keeper");
    }
}

fn spawn_push(
    source: &Source,
    pages: RecvStream,
    memory: &Arc<Memory>,
    report: &mpsc::Sender<TransferError>,
) -> watch::Receiver<u64> {
    let (count, installed) = watch::channel(0);
    let taking = push::take_in(pages, memory.clone(), count);
    spawn(source.bulk_thread.handle(), taking, report);
    installed
}

async fn spawn_fetch(
    source: &Source,
    (orders, keeper): (mpsc::UnboundedReceiver<Order>, KeeperHand),
    memory: &Arc<Memory>,
    report: &mpsc::Sender<TransferError>,
) -> Result<(), ResidentError> {
    let opened = source.control.connection().open_bi().await;
    let (requests, replies) = opened.map_err(|_| TransferError::Link)?;
    let fault = source.fault_thread.handle();
    let orders = Orders {
        orders,
        keeper,
        failures: report.clone(),
    };
    let asking = orders.carry_out(requests, memory.clone());
    spawn(fault, asking, report);
    spawn(fault, fetch::take_in(replies, memory.clone()), report);
    Ok(())
}

fn spawn(
    thread: &tokio::runtime::Handle,
    task: impl Future<Output = Result<(), TransferError>> + Send + 'static,
    report: &mpsc::Sender<TransferError>,
) {
    let report = report.clone();
    thread.spawn(async move {
        if let Err(error) = task.await {
            // Nobody listens when the session has ended.
            let _ = report.send(error).await;
        }
    });
}

/// Where a migration's images are staged.
pub fn images_directory(directory: &TempDir) -> std::io::Result<PathBuf> {
    let images = directory.path().join("images");
    fs::create_dir(&images)?;
    Ok(images)
}
