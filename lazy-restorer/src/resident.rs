//! The workload while it is restored and becomes whole: CRIU, the tasks' memory, and the streams that fill it.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::images::ImagePid;
use common::proto::control::HugeAreas;
use common::session_file::Task;
use nix::unistd::Pid;
use quinn::{RecvStream, SendStream};
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};

use crate::connect::{Source, Threads};
use crate::copy::Copy;
use crate::exits;
use crate::exits::{bury, has_ended, pidfd_open};
use crate::fetch::{self, Orders, TransferError};
use crate::gate::{Call, Gate, Held};
use crate::handover::{self, Handover, HandoverError};
use crate::huge::Huge;
use crate::keeper::Keeper;
use crate::memory::{Memory, MemoryError, Order};
use crate::push;
use crate::rehearsal::{Rehearsal, RehearsalPlan};
use crate::restore::{Anchor, Prepared, Restore, RestoreError};
use crate::skeleton;

/// Failures of transfer tasks that wait to be looked at.
pub(crate) const FAILURES: usize = 8;
/// A restoring or restored workload.
#[derive(Debug)]
pub struct Resident {
    /// Its memory.
    pub memory: Arc<Memory>,
    /// The operator's `--on-resumed` command, while it runs.
    pub announced: Option<JoinHandle<()>>,
    /// What failed while the tasks were let run, for whoever looks after them then.
    pub failure: Option<ResidentError>,
    /// CRIU, and its script; a successor has neither.
    restore: Option<Restore>,
    gate: Option<Gate>,
    keeper: Keeper,
    /// Whose tree the copy is, as long as that one is there for certain.
    anchor: Option<Anchor>,
    /// A descriptor of that one.
    restoring: Option<OwnedFd>,
    criu_ended: bool,
    handed_over: bool,
    handovers: mpsc::UnboundedReceiver<Result<Handover, HandoverError>>,
    failures: mpsc::Receiver<TransferError>,
    report: mpsc::Sender<TransferError>,
    requests: mpsc::UnboundedSender<SendStream>,
    credits: Option<Credits>,
    /// End with the link they belong to.
    link_tasks: JoinSet<()>,
    rehearsal: Rehearsal,
    root_image: Option<ImagePid>,
    root: Option<Pid>,
    copy: Copy,
    huge: Huge,
    directory: Directory,
}

/// The migration's directory, which goes away with the migration.
#[derive(Debug)]
pub enum Directory {
    /// Made by this program, which removes it however it ends.
    Ours(TempDir),
    /// Of a killed program; it stays for yet another successor unless all is well.
    Taken(PathBuf),
}

impl Directory {
    fn remove(self) {
        if let Directory::Taken(path) = self
            && let Err(error) = fs::remove_dir_all(&path)
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove");
        }
    }
}

/// What is left of a restore when there is nothing to restore any more.
#[derive(Debug)]
pub struct Successor {
    /// The memory of the copy.
    pub memory: Arc<Memory>,
    /// Its orders.
    pub orders: mpsc::UnboundedReceiver<Order>,
    /// Its root.
    pub root: Option<Pid>,
    /// Its processes when it was let run.
    pub copy: Copy,
    /// Its directory.
    pub directory: PathBuf,
    /// Our keeper, which has been told everything.
    pub keeper: Keeper,
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
        threads: &Threads,
        mut keeper: Keeper,
        rehearsal: &RehearsalPlan,
    ) -> Result<Self, ResidentError> {
        let plan = prepared.plan();
        fs::create_dir_all(plan.work())?;
        let processes = skeleton::processes(&plan.images())?;
        // Parents come before children.
        let root_image = processes.first().map(|process| process.pid);
        let pids: Vec<ImagePid> = processes.iter().map(|process| process.pid).collect();
        let rehearsal = Rehearsal::new(rehearsal, &pids);
        let (memory, orders) = Memory::new(processes);
        if rehearsal.recorder().is_some() {
            memory.fetch_singly();
        }
        memory.keep_journals()?;
        let handovers = handover::listen(&plan.work())?;
        let gate = Gate::bind(&plan.gate())?;
        let (report, failures) = mpsc::channel(FAILURES);
        let (requests, links) = mpsc::unbounded_channel();
        let orders = Orders {
            orders,
            links,
            recorder: rehearsal.recorder(),
            failures: report.clone(),
        };
        let carrying_out = reported(orders.carry_out(memory.clone()), &report);
        threads.fault.handle().spawn(carrying_out);
        let link = Link::open(source, bulk, &memory, &report, threads).await?;
        // The task that receives it was just started.
        let _ = requests.send(link.requests);
        let restore = prepared.start().await?;
        let anchor = restore.anchor();
        let mut copy = Copy::default();
        if let Some(anchor) = anchor {
            keeper.anchor(anchor)?;
        }
        if let Some(init) = restore.init() {
            copy.are_below(init);
        }
        Ok(Resident {
            memory,
            restore: Some(restore),
            announced: None,
            failure: None,
            keeper,
            gate: Some(gate),
            anchor,
            restoring: anchor.and_then(|anchor| pidfd_open(anchor.pid).ok()),
            criu_ended: false,
            handed_over: false,
            handovers,
            failures,
            report,
            requests,
            credits: Some(link.credits),
            link_tasks: link.tasks,
            rehearsal,
            root_image,
            root: None,
            copy,
            huge: Huge::default(),
            directory: Directory::Ours(directory),
        })
    }

    /// A copy that runs already, whose `lazy-restorer` was killed.
    pub fn succeed(left: Successor, threads: &Threads) -> Self {
        let (report, failures) = mpsc::channel(FAILURES);
        let (requests, links) = mpsc::unbounded_channel();
        let orders = Orders {
            orders: left.orders,
            links,
            recorder: None,
            failures: report.clone(),
        };
        let carrying_out = reported(orders.carry_out(left.memory.clone()), &report);
        threads.fault.handle().spawn(carrying_out);
        left.memory.begin_again();
        let (_, handovers) = mpsc::unbounded_channel();
        Resident {
            memory: left.memory,
            restore: None,
            announced: None,
            failure: None,
            keeper: left.keeper,
            gate: None,
            anchor: None,
            restoring: None,
            criu_ended: true,
            handed_over: true,
            handovers,
            failures,
            report,
            requests,
            credits: None,
            link_tasks: JoinSet::new(),
            rehearsal: Rehearsal::new(&RehearsalPlan::default(), &[]),
            root_image: None,
            root: left.root,
            copy: left.copy,
            // Whose memory is whose is not known any more: what was huge becomes it when the kernel sees fit.
            huge: Huge::default(),
            directory: Directory::Taken(left.directory),
        }
    }

    /// Lets CRIU make tasks: addresses their sockets need are here.
    pub fn begin_tasks(&self) {
        if let Some(gate) = &self.gate {
            gate.let_begin();
        }
    }

    /// What happens next to the restore. Descriptors are taken over on the way. May be cancelled without loss.
    pub async fn next(&mut self) -> Result<Step, ResidentError> {
        loop {
            tokio::select! {
                call = next_call(&mut self.gate) => match call {
                    Some(Call::Armed(held)) => return Ok(Step::Armed(held)),
                    Some(Call::Resumed) => return Ok(Step::Resumed),
                    None => return Err(ResidentError::Gate),
                },
                handover = self.handovers.recv(), if !self.handed_over => self.take_over(handover)?,
                ended = finished(&mut self.restore), if !self.criu_ended => {
                    self.criu_ended = true;
                    // A program that has ended anchors nothing: its PID is anybody's now.
                    self.anchor = self.restore.as_ref().and_then(Restore::anchor);
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
                if let Some(task) = Task::find(pid.as_raw()) {
                    self.huge.restored(image, task);
                    self.copy.add(task);
                }
                if self.root_image == Some(image) {
                    self.root = Some(pid);
                }
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
    pub fn begin_push(&mut self, source: &Source, threads: &Threads) {
        if let Some(credits) = self.credits.take() {
            let prelude = self.rehearsal.prelude(source.welcome.version);
            let connection = source.bulk.clone();
            let giving = async move {
                let stream = push::begin(credits.stream, prelude).await?;
                push::give_credit(stream, connection, credits.installed).await
            };
            self.link_tasks
                .spawn_on(reported(giving, &self.report), threads.bulk.handle());
        }
    }

    /// Takes no more from the link that is lost: what has come by now is what the source is told.
    pub async fn unlink(&mut self) {
        self.link_tasks.shutdown().await;
        // What its tasks did not report yet is of no interest any more.
        while self.failures.try_recv().is_ok() {}
    }

    /// Goes on over a new link, after the source knows what is here.
    pub async fn reconnect(
        &mut self,
        source: &mut Source,
        threads: &Threads,
    ) -> Result<(), ResidentError> {
        let bulk = source.take_bulk_stream().ok_or(TransferError::Link)?;
        let link = Link::open(source, bulk, &self.memory, &self.report, threads).await?;
        self.link_tasks = link.tasks;
        // Without a receiver the session has failed already, and says so.
        let _ = self.requests.send(link.requests);
        self.credits = Some(link.credits);
        self.memory.reconnect();
        Ok(())
    }

    /// PID of the restored root as this host numbers it.
    pub fn root(&self) -> Option<Pid> {
        self.root
    }

    /// The restored processes.
    pub fn tasks(&self) -> &[Task] {
        self.copy.tasks()
    }

    /// Kills the running copy, and waits until nothing is left of it. False when somebody lives on whom we do not find.
    pub async fn kill(&self) -> bool {
        self.copy.kill_all(&self.memory).await
    }

    /// Whose tree the copy is.
    pub fn anchor(&self) -> Option<Anchor> {
        self.anchor
    }

    /// The migration's directory.
    pub fn directory(&self) -> &Path {
        match &self.directory {
            Directory::Ours(directory) => directory.path(),
            Directory::Taken(path) => path,
        }
    }

    /// The process that holds everything with us.
    pub fn keeper(&mut self) -> &mut Keeper {
        &mut self.keeper
    }

    /// The PID of the process that acts should we be killed.
    pub fn keeper_pid(&self) -> Pid {
        self.keeper.pid()
    }

    /// Whether CRIU, or what it restores under, has ended without being told anything.
    pub fn has_lost_criu(&self) -> bool {
        self.restoring.as_ref().is_none_or(has_ended)
    }

    /// The copy is about to run: by us, or by the keeper with `gate` should we be killed.
    pub fn commit(&mut self, gate: OwnedFd) -> std::io::Result<()> {
        self.keeper.commit(Some(gate))
    }

    /// Kills CRIU and whatever it restored.
    pub async fn abort(self) {
        match self.restore {
            Some(restore) => restore.abort().await,
            None => bury(self.copy.kill()).await,
        }
        release(self.keeper);
        self.directory.remove();
    }

    /// These pages were huge on the source. False when a source cannot say that.
    pub fn note_huge(&mut self, areas: &HugeAreas) -> bool {
        self.huge.note(areas)
    }

    /// The memory is whole: nothing of ours is needed any more. What is left to do is to make pages huge again.
    pub fn let_go(self) -> Huge {
        self.rehearsal.finish();
        release(self.keeper);
        self.directory.remove();
        self.huge
    }
}

async fn next_call(gate: &mut Option<Gate>) -> Option<Call> {
    match gate {
        Some(gate) => gate.next().await,
        None => std::future::pending().await,
    }
}

async fn finished(restore: &mut Option<Restore>) -> Result<(), RestoreError> {
    match restore {
        Some(restore) => restore.finished().await,
        None => Ok(()),
    }
}

fn release(keeper: Keeper) {
    if let Err(error) = keeper.release() {
        tracing::warn!(%error, "the keeper");
    }
}

/// Our ends of the streams of one link.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) requests: SendStream,
    pub(crate) credits: Credits,
    pub(crate) tasks: JoinSet<()>,
}

/// What is needed to give credit.
#[derive(Debug)]
pub(crate) struct Credits {
    pub(crate) stream: SendStream,
    pub(crate) installed: watch::Receiver<u64>,
}

impl Link {
    /// Opens the demand stream and takes in what comes on both.
    pub(crate) async fn open(
        source: &Source,
        (credits, pages): (SendStream, RecvStream),
        memory: &Arc<Memory>,
        report: &mpsc::Sender<TransferError>,
        threads: &Threads,
    ) -> Result<Self, ResidentError> {
        let (count, installed) = watch::channel(0);
        let pushed = push::take_in(pages, memory.clone(), count);
        let mut tasks = JoinSet::new();
        tasks.spawn_on(reported(pushed, report), threads.bulk.handle());
        let opened = source.control.connection().open_bi().await;
        let (requests, replies) = opened.map_err(|_| TransferError::Link)?;
        let demanded = fetch::take_in(replies, memory.clone());
        tasks.spawn_on(reported(demanded, report), threads.fault.handle());
        Ok(Link {
            requests,
            tasks,
            credits: Credits {
                stream: credits,
                installed,
            },
        })
    }
}

/// A task whose failure goes to `report`.
pub(crate) fn reported(
    task: impl Future<Output = Result<(), TransferError>> + Send + 'static,
    report: &mpsc::Sender<TransferError>,
) -> impl Future<Output = ()> + Send + 'static {
    let report = report.clone();
    async move {
        if let Err(error) = task.await {
            // Nobody listens when the session has ended.
            let _ = report.send(error).await;
        }
    }
}

/// Where a migration's images are staged.
pub fn images_directory(directory: &TempDir) -> std::io::Result<PathBuf> {
    let images = directory.path().join("images");
    fs::create_dir(&images)?;
    Ok(images)
}
