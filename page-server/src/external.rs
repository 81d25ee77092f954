//! Serving dumps that somebody else made: a directory of images, to one or several destinations, or a foreign CRIU's
//! frozen tasks.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use common::exit::{Failure, SessionError};
use common::host;
use common::lost::LostPlan;
use common::proto::control::{Secret, SessionId};
use common::session::State;
use common::session_file::{
    Kept, Original, Remembered, SessionFile, Side, SourceSide, Task, boot_id,
};
use common::stop::StopSignal;
use nix::unistd::Pid;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinSet};

use crate::attach::ForeignDump;
use crate::destination::{Acquaintance, Caller, Destination, receive};
use crate::listen::{Call, Listen, ListenPlan};
use crate::offer::{Dumped, Offer, OfferError};
use crate::report::Record;
use crate::session::too_late;
use crate::visit::{Hold, House, Threads, Visit};

/// Time a foreign dump has to be complete.
const DUMP_TIMEOUT: Duration = Duration::from_secs(60);

/// Everything the operator decided.
#[derive(Clone, Debug)]
pub struct ExternalPlan {
    /// The images.
    pub images: PathBuf,
    /// The root of the tree a foreign CRIU has frozen; without it all pages are in the images.
    pub attach_to: Option<Pid>,
    /// What is known of the dump.
    pub dumped: Dumped,
    /// How many destinations to serve.
    pub fan_out: usize,
    /// The frozen tree runs on here in the end, whatever was made of it elsewhere.
    pub keep_original: bool,
    /// How to listen.
    pub listen: ListenPlan,
    /// How long to wait for the first destination; forever when not given.
    pub wait: Option<Duration>,
    /// One-time token that destinations must know.
    pub token: Option<Secret>,
    /// Where to put the skeleton.
    pub work_dir: Option<PathBuf>,
    /// Called when destinations may come.
    pub ready: fn(std::net::SocketAddr),
    /// What is done about a destination that does not come back.
    pub lost: LostPlan,
    /// What a restart must know besides.
    pub remembered: Remembered,
    /// Sessions of a killed program that are gone on with; then there are no others.
    pub left: Vec<SessionFile>,
}

impl ExternalPlan {
    /// The frozen tree becomes more than one: no destination decides about it alone.
    fn makes_clones(&self) -> bool {
        self.attach_to.is_some() && (self.fan_out > 1 || self.keep_original)
    }
}

/// Serves as many destinations as planned; the records of their visits, and the first error.
pub async fn run(plan: &ExternalPlan) -> (Vec<Record>, Result<(), SessionError>) {
    let mut records = Vec::new();
    let result = match Reception::open(plan).await {
        Ok(mut reception) => reception.serve(&mut records).await,
        Err(error) => Err(error),
    };
    (records, result)
}

fn failed(failure: Failure, error: impl std::fmt::Display) -> SessionError {
    SessionError::new(failure, State::Hello, error)
}

/// What one visit ends with.
type Ended = (SessionId, Record, Result<(), SessionError>);

/// A destination that is here, or may come again.
struct Guest {
    acquaintance: Acquaintance,
    returns: mpsc::Sender<Destination>,
}

struct Reception<'a> {
    plan: &'a ExternalPlan,
    listen: Listen,
    offer: Arc<Offer>,
    /// What keeps the memory until the first destination comes, or until all have gone when they are clones.
    hold: Option<Hold>,
    guests: HashMap<SessionId, Guest>,
    visits: JoinSet<Ended>,
    admitted: usize,
    /// CRIU is gone: the tasks stand still by themselves.
    is_lost: bool,
    signals: StopSignal,
    stop: watch::Sender<Option<&'static str>>,
}

impl<'a> Reception<'a> {
    async fn open(plan: &'a ExternalPlan) -> Result<Self, SessionError> {
        let mut signals =
            StopSignal::install().map_err(|error| failed(Failure::Internal, error))?;
        let hold = tokio::select! {
            hold = hold(plan) => hold?,
            name = signals.wait() => return Err(failed(Failure::Interrupted, format!("stopped by {name}"))),
        };
        let opened = offer(plan).map_err(|error| failed(Failure::BadInput, error));
        let listen = opened.and_then(|offer| {
            let listen =
                Listen::open(&plan.listen).map_err(|error| failed(Failure::BadInput, error))?;
            Ok((offer, listen))
        });
        let (offer, listen) = match listen {
            Ok(opened) => opened,
            // Tasks that were given away before are not ours to thaw.
            Err(error) if !plan.left.is_empty() => return Err(error),
            Err(error) => {
                hold.thaw().await;
                return Err(error);
            }
        };
        (plan.ready)(listen.fault.address());
        let mut reception = Reception {
            plan,
            listen,
            offer: Arc::new(offer),
            hold: Some(hold),
            guests: HashMap::new(),
            visits: JoinSet::new(),
            admitted: 0,
            is_lost: false,
            signals,
            stop: watch::channel(None).0,
        };
        for file in &plan.left {
            reception.begin_again(file)?;
        }
        Ok(reception)
    }

    async fn serve(&mut self, records: &mut Vec<Record>) -> Result<(), SessionError> {
        let mut result = Ok(());
        let late = too_late(self.plan.wait);
        tokio::pin!(late);
        while records.len() < self.plan.fan_out {
            tokio::select! {
                Some(call) = self.listen.fault.next() => self.receive(call).await,
                Some(ended) = self.visits.join_next() => {
                    let ended = self.farewell(ended, records);
                    result = result.and(ended);
                }
                error = &mut late, if self.admitted == 0 => return Err(self.give_up(error).await),
                error = lost(self.hold.as_ref()), if !self.is_lost => {
                    if self.admitted == 0 {
                        return Err(error);
                    }
                    self.is_lost = true;
                    tracing::warn!(%error, "the frozen tasks stay stopped, and are served on");
                }
                name = self.signals.wait() => {
                    let _ = self.stop.send(Some(name));
                    if self.visits.is_empty() {
                        let error = failed(Failure::Interrupted, format!("stopped by {name}"));
                        return Err(self.give_up(error).await);
                    }
                    tracing::warn!(visits = self.visits.len(), "{name}: destinations that run the workload are served on");
                }
            }
            if self.stop.borrow().is_some() && self.visits.is_empty() {
                break;
            }
        }
        self.end_original(result.is_ok() && records.len() == self.plan.fan_out)
            .await;
        result
    }

    /// Its clones are made: the original dies when all of them are whole, and else runs on.
    async fn end_original(&mut self, all_are_whole: bool) {
        let Some(hold) = self.hold.take() else {
            return;
        };
        if self.plan.keep_original || !all_are_whole {
            hold.thaw().await;
        } else if let Err(error) = hold.release().await {
            tracing::warn!(%error, "the frozen original is killed nevertheless");
        }
    }

    /// Nobody came: the workload runs on.
    async fn give_up(&mut self, error: SessionError) -> SessionError {
        if let Some(hold) = self.hold.take() {
            hold.thaw().await;
        }
        error
    }

    async fn receive(&mut self, call: Call) {
        let peer = call.control.peer();
        if let Err(reason) = self.admit(call).await {
            tracing::warn!(%peer, reason, "refused a destination");
        }
    }

    async fn admit(&mut self, call: Call) -> Result<(), String> {
        let is_open = self.admitted < self.plan.fan_out && self.stop.borrow().is_none();
        let session = is_open
            .then(SessionId::random)
            .transpose()
            .map_err(|error| error.to_string())?;
        let known = self.guests.iter();
        let known = known.map(|(id, guest)| (*id, guest.acquaintance.clone()));
        let token = self.plan.token.as_ref();
        match receive(&mut self.listen, call, session, token, &known.collect()).await? {
            Caller::New(id, destination) => self.begin(id, destination)?,
            Caller::Back(id, destination) => {
                if let Some(guest) = self.guests.get(&id) {
                    // A visit that has ended needs it no more.
                    let _ = guest.returns.try_send(destination);
                }
            }
        }
        Ok(())
    }

    fn begin(&mut self, id: SessionId, destination: Destination) -> Result<(), String> {
        let file = self.note(id, &destination);
        let file = file.ok_or_else(|| String::from("the frozen workload is gone"))?;
        self.admitted += 1;
        let returns = self.expect_back(id, destination.acquaintance());
        tracing::info!(session = %id, host = destination.host, "a destination has come");
        let kept = Kept::nothing(self.plan.remembered.store.clone());
        let visit = Visit::new((id, destination), returns, self.house(), file, kept);
        let hold = self.hold_for_visit();
        self.visits.spawn(async move {
            let (record, result) = visit.perform(hold).await;
            (id, record, result)
        });
        Ok(())
    }

    /// Goes on with a session whose program was killed: its destination will come again.
    fn begin_again(&mut self, file: &SessionFile) -> Result<(), SessionError> {
        self.admitted += 1;
        let known = Acquaintance {
            secret: file.secret.clone(),
            host: file.peer_host.clone(),
            version: file.source().map_or(0, |source| source.version),
        };
        let id = file.id;
        let mut returns = self.expect_back(id, known);
        let mut kept = Kept::taken_over(self.plan.remembered.store.clone(), file.clone());
        let ours = Task::ourselves();
        let taken = kept.change(|file| {
            file.state = State::Paused;
            file.program = ours.unwrap_or(file.program);
        });
        taken.map_err(|error| failed(Failure::Internal, error))?;
        let (house, file) = (self.house(), file.clone());
        let hold = self.hold_for_visit();
        self.visits.spawn(async move {
            let Some(destination) = returns.recv().await else {
                let error = failed(Failure::Internal, "the listener ended");
                return (id, Record::default(), Err(error));
            };
            let visit = Visit::succeed((id, destination), returns, house, file, kept);
            let (record, result) = visit.perform_again(hold).await;
            (id, record, result)
        });
        Ok(())
    }

    /// What a visit decides about: the frozen tasks, unless they become more than one.
    fn hold_for_visit(&mut self) -> Hold {
        match &self.hold {
            Some(original) if self.plan.makes_clones() => {
                // It stands still now whoever dies.
                original.commit();
                Hold::Files
            }
            _ => self.hold.take().unwrap_or(Hold::Files),
        }
    }

    fn expect_back(
        &mut self,
        id: SessionId,
        acquaintance: Acquaintance,
    ) -> mpsc::Receiver<Destination> {
        let (returns, receiver) = mpsc::channel(1);
        let guest = Guest {
            acquaintance,
            returns,
        };
        self.guests.insert(id, guest);
        receiver
    }

    fn house(&self) -> House {
        House {
            offer: self.offer.clone(),
            threads: Threads {
                fault: self.listen.fault.thread.handle().clone(),
                bulk: self.listen.bulk.thread.handle().clone(),
            },
            stop: self.stop.subscribe(),
            lost: self.plan.lost,
        }
    }

    /// What a restart must know of a session; `None` when there is nothing left to serve.
    fn note(&self, id: SessionId, destination: &Destination) -> Option<SessionFile> {
        let images = std::path::absolute(&self.plan.images).ok()?;
        let images = images.display().to_string();
        let original = match &self.hold {
            Some(Hold::Dump(dump)) => Original::Foreign(dump.noted()?, images.clone()),
            _ => Original::Images(images.clone()),
        };
        let acquaintance = destination.acquaintance();
        Some(SessionFile {
            id,
            state: State::Listen,
            boot: boot_id().unwrap_or_default(),
            program: Task::ourselves()?,
            directory: images,
            identity: self.plan.remembered.identity.display().to_string(),
            accept: self.plan.remembered.accept.clone(),
            mtu: self.plan.listen.path.mtu,
            secret: acquaintance.secret,
            peer_host: acquaintance.host,
            side: Side::Source(SourceSide {
                original,
                version: acquaintance.version,
                criu_program: String::new(),
                fault: self.listen.fault.address(),
                bulk: self.listen.bulk.address(),
                on_thawed: None,
                makes_clones: self.plan.makes_clones(),
            }),
        })
    }

    fn farewell(
        &mut self,
        ended: Result<Ended, JoinError>,
        records: &mut Vec<Record>,
    ) -> Result<(), SessionError> {
        let (id, record, result) = ended.map_err(|error| failed(Failure::Internal, error))?;
        self.guests.remove(&id);
        records.push(record);
        if let Err(error) = &result
            && self.plan.fan_out > 1
        {
            eprintln!(
                "page-server: source host {}, session {id}: {error}",
                host::name()
            );
        }
        result
    }
}

/// Takes hold of the foreign dump, if there is to be one.
async fn hold(plan: &ExternalPlan) -> Result<Hold, SessionError> {
    let Some(root) = plan.attach_to else {
        return Ok(Hold::Files);
    };
    let left = plan.left.first().and_then(SessionFile::source);
    let found = match left.and_then(|source| source.original.frozen()) {
        Some(frozen) => ForeignDump::find_whole(frozen, &plan.images).await,
        None => ForeignDump::find(root, &plan.images, DUMP_TIMEOUT).await,
    };
    found
        .map(Hold::Dump)
        .map_err(|error| failed(Failure::Freeze, error))
}

fn offer(plan: &ExternalPlan) -> Result<Offer, OfferError> {
    let work_dir = plan.work_dir.as_deref();
    match plan.attach_to {
        Some(root) => Offer::of_frozen(&plan.images, root, plan.dumped, work_dir),
        None => Offer::of_images(&plan.images, plan.dumped, work_dir),
    }
}

/// Resolves when memory that nobody has come for yet is not held any more. May be cancelled.
async fn lost(hold: Option<&Hold>) -> SessionError {
    match hold {
        Some(hold) => failed(Failure::Freeze, hold.lost().await),
        None => std::future::pending().await,
    }
}
