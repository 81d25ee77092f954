//! One destination that comes for a dump somebody else made: the same phases as in [`session`](crate::session), without
//! a freeze of ours.

use std::sync::Arc;
use std::time::SystemTime;

use common::exit::{Failure, SessionError};
use common::host;
use common::lost::{LostPlan, OnLost};
use common::proto::control::{SessionId, Tally, ToDestination, ToSource};
use common::record::{Phases, unix_us};
use common::session::{Event, Session, State};
use common::session_file::{Kept, SessionFile};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::attach::{AttachError, ForeignDump};
use crate::book::Book;
use crate::compression::Mode;
use crate::destination::{Destination, Unsettled, abort, unexpected};
use crate::framer::Form;
use crate::offer::Offer;
use crate::parting;
use crate::push::Push;
use crate::report::{Record, WireBytes};
use crate::session::{interrupted, settle, until};
use crate::transfer::Transfer;

/// What keeps the offered memory as it is.
#[derive(Debug)]
pub enum Hold {
    /// It lies in files.
    Files,
    /// A CRIU that somebody else started.
    Dump(ForeignDump),
}

impl Hold {
    /// The memory stays as it is even if its keeper should die.
    pub fn commit(&self) {
        if let Hold::Dump(dump) = self {
            dump.commit();
        }
    }

    /// Nobody needs the memory any more.
    pub async fn release(self) -> Result<(), AttachError> {
        match self {
            Hold::Files => Ok(()),
            Hold::Dump(dump) => dump.release().await,
        }
    }

    /// Lets the workload run on here, if there is one.
    pub async fn thaw(self) {
        if let Hold::Dump(dump) = self
            && let Err(error) = dump.thaw().await
        {
            tracing::error!(%error, "thawing");
        }
    }

    /// Resolves when the memory is not held any more. May be cancelled.
    pub async fn lost(&self) -> AttachError {
        match self {
            Hold::Files => std::future::pending().await,
            Hold::Dump(dump) => dump.lost().await,
        }
    }
}

/// The threads that drive the connections.
#[derive(Clone, Debug)]
pub struct Threads {
    /// Of the fault connections.
    pub fault: Handle,
    /// Of the bulk connections.
    pub bulk: Handle,
}

/// What all visits have in common.
#[derive(Clone, Debug)]
pub struct House {
    /// What destinations come for.
    pub offer: Arc<Offer>,
    /// Who drives their connections.
    pub threads: Threads,
    /// The signal that asks us to stop.
    pub stop: watch::Receiver<Option<&'static str>>,
    /// What is done about a destination that does not come back.
    pub lost: LostPlan,
}

/// A destination's visit.
#[derive(Debug)]
pub struct Visit {
    /// Its session.
    pub id: SessionId,
    /// The destination.
    pub destination: Destination,
    /// The same destination when it comes again.
    pub returns: mpsc::Receiver<Destination>,
    /// What it comes for.
    pub offer: Arc<Offer>,
    /// Who drives its connections.
    pub threads: Threads,
    /// The signal that asks us to stop.
    pub stop: watch::Receiver<Option<&'static str>>,
    lost: LostPlan,
    session: Session,
    phases: Phases,
    book: Arc<Book>,
    record: Record,
    /// Why the destination is not served any more, whatever it says, unless it says that its copy is dead.
    refusal: Option<String>,
    /// What both ends have counted, once they agree.
    agreed: Option<Tally>,
    /// What the operator was told last.
    complaint: Option<String>,
    /// What a restart must know, when there is something to restart.
    file: SessionFile,
    kept: Kept,
}

/// What ends a stretch of serving.
enum Served {
    Drained(Tally),
    CopyDead(SessionError),
    LinkLost(String),
}

impl Visit {
    /// The visit of a destination that was welcomed. `file` is what a restart must know of it.
    pub fn new(
        caller: (SessionId, Destination),
        returns: mpsc::Receiver<Destination>,
        house: House,
        file: SessionFile,
        kept: Kept,
    ) -> Self {
        let book = house.offer.book();
        Self::begin(caller, returns, house, (file, kept), book)
    }

    /// The visit of a destination that another program served before us, and that has come again.
    pub fn succeed(
        caller: (SessionId, Destination),
        returns: mpsc::Receiver<Destination>,
        house: House,
        file: SessionFile,
        kept: Kept,
    ) -> Self {
        let book = house.offer.book_of_left();
        Visit {
            session: Session::orphaned(),
            phases: Phases::start(State::Paused),
            ..Self::begin(caller, returns, house, (file, kept), book)
        }
    }

    fn begin(
        (id, destination): (SessionId, Destination),
        returns: mpsc::Receiver<Destination>,
        house: House,
        (file, kept): (SessionFile, Kept),
        book: Book,
    ) -> Self {
        let record = Record {
            session: id.to_string(),
            ..Record::default()
        };
        Visit {
            id,
            destination,
            returns,
            book: Arc::new(book),
            offer: house.offer,
            threads: house.threads,
            stop: house.stop,
            lost: house.lost,
            session: Session::default(),
            phases: Phases::start(State::Hello),
            record,
            refusal: None,
            agreed: None,
            complaint: None,
            file,
            kept,
        }
    }

    /// Serves the destination until its workload is whole.
    pub async fn perform(mut self, hold: Hold) -> (Record, Result<(), SessionError>) {
        let result = self.migrate(hold).await;
        self.conclude(result).await
    }

    /// The same for a visit that another program began.
    pub async fn perform_again(mut self, hold: Hold) -> (Record, Result<(), SessionError>) {
        let result = match self.settle().await {
            Ok(Ok(transfer)) => self.serve(hold, Ok(()), transfer).await,
            Ok(Err(dead)) => Err(self.copy_died(hold, dead).await),
            Err(error) if self.state() == State::Lost => Err(gave_up(hold, error).await),
            Err(error) => Err(keep(&hold, error).await),
        };
        self.conclude(result).await
    }

    async fn conclude(
        mut self,
        result: Result<(), SessionError>,
    ) -> (Record, Result<(), SessionError>) {
        // Frozen tasks whose end is not decided are kept, and this is not reached.
        self.kept.end();
        self.record.wire_bytes = WireBytes::of(
            self.destination.control.connection(),
            &self.destination.bulk,
        );
        self.record.phases = self.phases.done().to_vec();
        self.record.total_us = self.phases.total_us();
        self.record.pages = self.book.counts();
        self.record.conclude(&result);
        let mut stop = self.stop;
        match (&result, self.agreed) {
            (Ok(()), Some(agreed)) => {
                let stopped = stopped(&mut stop);
                parting::part(self.destination, agreed, self.returns, stopped).await;
            }
            (Err(error), _) if error.failure != Failure::Peer => {
                let abort = ToDestination::Abort(abort(error.state, &error.text));
                self.destination.control.farewell(&abort).await;
            }
            _ => self.destination.control.close().await,
        }
        (self.record, result)
    }

    async fn migrate(&mut self, hold: Hold) -> Result<(), SessionError> {
        match self.hand_over(&hold).await {
            Ok(transfer) => self.postcopy(hold, transfer).await,
            Err(error) => {
                hold.thaw().await;
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

    /// The next message, unless the operator stops us or the memory is lost.
    async fn next(&mut self, hold: &Hold) -> Result<ToSource, SessionError> {
        let state = self.state();
        tokio::select! {
            message = self.destination.next(state) => message,
            name = stopped(&mut self.stop) => Err(interrupted(state, name)),
            error = hold.lost() => Err(SessionError::new(Failure::Freeze, state, error)),
        }
    }

    async fn expect(&mut self, hold: &Hold, expected: ToSource) -> Result<(), SessionError> {
        match self.next(hold).await? {
            message if message == expected => Ok(()),
            message => Err(unexpected(self.state(), &message)),
        }
    }

    async fn send(&mut self, message: ToDestination) -> Result<(), SessionError> {
        let state = self.state();
        self.destination.send(state, &message).await
    }

    /// From the welcome to the point of no return.
    async fn hand_over(&mut self, hold: &Hold) -> Result<Transfer, SessionError> {
        self.advance(Event::Welcomed)?;
        let facts = self.offer.facts.clone();
        self.destination.advise(self.state(), facts).await?;
        let skeleton = match self.next(hold).await? {
            ToSource::Ready => self.offer.skeleton(),
            ToSource::ReadyWithImages(theirs) if theirs == self.offer.digest => {
                self.offer.nothing()
            }
            ToSource::ReadyWithImages(_) => {
                let text = "the destination has the images of another dump; give it this dump's";
                return Err(self.fail(Failure::Refused, text));
            }
            message => return Err(unexpected(self.state(), &message)),
        };
        self.advance(Event::Ready)?;
        self.record.frozen_at_unix_us = unix_us(SystemTime::now());
        self.send(ToDestination::Freezing).await?;
        self.advance(Event::Dumped)?;
        let mut transfer = Transfer::default();
        let serving = self
            .destination
            .serve(self.offer.source.clone(), self.book.clone());
        transfer.spawn(&self.threads.fault, serving);
        let push = self.send_skeleton(skeleton).await?;
        self.expect(hold, ToSource::Staged).await?;
        self.advance(Event::Staged)?;
        let credits = self.destination.take_credits();
        transfer.spawn(&self.threads.bulk, push.all(credits));
        let state = self.state();
        tokio::select! {
            error = transfer.failed() => return Err(SessionError::new(Failure::Freeze, state, error)),
            asked = self.expect(hold, ToSource::CutoverRequest) => asked?,
        }
        let noted = self.kept.begin(self.file.clone());
        let no_file = "session file: ";
        noted.map_err(|error| {
            self.fail(
                Failure::Freeze,
                format!("{no_file}{error}; see --state-dir"),
            )
        })?;
        self.advance(Event::CutoverAsked)?;
        if self.kept.file().map(|file| file.state) != Some(State::Cutover) {
            return Err(self.fail(Failure::Freeze, format!("{no_file}it cannot be written")));
        }
        hold.commit();
        Ok(transfer)
    }

    async fn send_skeleton(&mut self, images: std::path::PathBuf) -> Result<Push, SessionError> {
        let stream = self
            .destination
            .take_push()
            .ok_or_else(|| self.fail(Failure::Internal, "the bulk stream is in use"))?;
        let (source, book) = (self.offer.source.clone(), self.book.clone());
        let push = Push::new(stream, source, book, self.form());
        let push = push.map_err(|error| self.fail(Failure::Internal, error))?;
        let sending = self.threads.bulk.spawn(async move {
            let push = push.skeleton(&images).await?;
            push.eager().await
        });
        self.send(ToDestination::Frozen).await?;
        match sending.await {
            Ok(Ok(push)) => Ok(push),
            Ok(Err(error)) => {
                let of_link = error.is_of_link();
                let error = self.fail(Failure::Freeze, error);
                match of_link {
                    true => Err(self.destination.explain(self.state(), error).await),
                    false => Err(error),
                }
            }
            Err(error) => Err(self.fail(Failure::Internal, error)),
        }
    }

    /// The workload is given away: only the destination decides from here on.
    async fn postcopy(&mut self, hold: Hold, transfer: Transfer) -> Result<(), SessionError> {
        let granted = self.send(ToDestination::CutoverGranted).await;
        self.advance(Event::CutoverGranted)?;
        let link = granted.map_err(|error| error.text);
        self.serve(hold, link, transfer).await
    }

    /// Serves until nothing is owed any more, over as many links as it takes. An error in `link` is one that was lost.
    async fn serve(
        &mut self,
        hold: Hold,
        mut link: Result<(), String>,
        mut transfer: Transfer,
    ) -> Result<(), SessionError> {
        loop {
            if let Err(text) = link {
                // Nothing of the old link may be sent while it is settled what has come.
                transfer.stop().await;
                transfer = match self.recover(&text).await {
                    Ok(Ok(transfer)) => transfer,
                    Ok(Err(dead)) => return Err(self.copy_died(hold, dead).await),
                    Err(error) if self.state() == State::Lost => {
                        return Err(gave_up(hold, error).await);
                    }
                    Err(error) => return Err(error),
                };
            }
            link = match self.until_drained(&hold, &mut transfer).await {
                Ok(Served::Drained(tally)) => match self.agree(tally) {
                    Ok(()) => return self.complete(hold).await,
                    Err(error) => {
                        self.refusal = Some(error.text.clone());
                        Err(self.break_off(&hold, error).await?)
                    }
                },
                Ok(Served::CopyDead(dead)) => return Err(self.copy_died(hold, dead).await),
                Ok(Served::LinkLost(text)) => Err(text),
                Err(error) => Err(self.break_off(&hold, error).await?),
            };
        }
    }

    /// There is no way on over this link, and both operators are to know why. Frozen tasks are kept: they may be running on
    /// the destination, which may come again. Images need nobody to decide about them: the error ends the visit.
    async fn break_off(
        &mut self,
        hold: &Hold,
        error: SessionError,
    ) -> Result<String, SessionError> {
        let Hold::Dump(_) = hold else {
            return Err(error);
        };
        if self.complaint.as_ref() != Some(&error.text) {
            complain(&error);
            self.complaint = Some(error.text.clone());
        }
        self.destination.tell_why(error.state, &error.text).await;
        Ok(error.text)
    }

    async fn copy_died(&mut self, hold: Hold, error: SessionError) -> SessionError {
        hold.thaw().await;
        match self.advance(Event::CopyDead) {
            Ok(()) => error,
            Err(invalid) => invalid,
        }
    }

    async fn until_drained(
        &mut self,
        hold: &Hold,
        transfer: &mut Transfer,
    ) -> Result<Served, SessionError> {
        let mut held = true;
        loop {
            let message = tokio::select! {
                message = self.destination.control.next() => message,
                error = transfer.failed() => return Err(self.fail(Failure::Lost, error)),
                Some(again) = self.returns.recv() => {
                    // It lost the link earlier than we did.
                    self.destination = again;
                    return Ok(Served::LinkLost(String::from("the destination came again")));
                }
                error = hold.lost(), if held => {
                    held = false;
                    tracing::warn!(%error, "the frozen tasks stay stopped, and are served on");
                    continue;
                }
            };
            match message {
                Ok(ToSource::Resumed) => {
                    let now = unix_us(SystemTime::now());
                    self.record.resumed_at_unix_us = now;
                    self.record.cutover_us = now.saturating_sub(self.record.frozen_at_unix_us);
                }
                Ok(ToSource::Drained(tally)) => return Ok(Served::Drained(tally)),
                Ok(ToSource::Abort(abort)) => {
                    let error = self.destination.gave_up(self.state(), &abort);
                    return match abort.copy_is_dead {
                        true => Ok(Served::CopyDead(error)),
                        false => Err(error),
                    };
                }
                Ok(message) => return Err(unexpected(self.state(), &message)),
                Err(error) => return Ok(Served::LinkLost(error.to_string())),
            }
        }
    }

    /// The link is lost. Waits for the destination to come again, and settles what is owed.
    ///
    /// The inner error is a copy that is dead.
    async fn recover(
        &mut self,
        text: &str,
    ) -> Result<Result<Transfer, SessionError>, SessionError> {
        eprintln!(
            "page-server: link lost ({text}); the memory is kept until the destination comes again"
        );
        self.advance(Event::LinkLost)?;
        self.settle().await
    }

    /// Waits for the destination to come again, if it has not, and settles what is owed.
    async fn settle(&mut self) -> Result<Result<Transfer, SessionError>, SessionError> {
        let mut limit = self.lost.give_up_after.map(|limit| Instant::now() + limit);
        loop {
            while !self.destination.is_new() {
                tokio::select! {
                    again = self.returns.recv() => match again {
                        Some(again) => self.destination = again,
                        None => return Err(self.fail(Failure::Lost, "the listener ended")),
                    },
                    () = until(limit) => {
                        limit = None;
                        self.give_up()?;
                    }
                }
            }
            self.advance(Event::Reconnected)?;
            let source = self.offer.source.clone();
            match settle(&mut self.destination, &self.book, source.as_ref()).await {
                Ok(()) => match self.refusal.clone() {
                    None => break,
                    Some(reason) => {
                        self.destination
                            .tell_why(self.session.state(), &reason)
                            .await;
                        self.destination.take_push();
                        self.advance(Event::LinkLost)?;
                    }
                },
                Err(Unsettled::CopyDead(abort)) => {
                    return Ok(Err(self.destination.gave_up(self.state(), &abort)));
                }
                Err(Unsettled::Lost(reason)) => {
                    tracing::warn!(reason, "the destination is lost again");
                    self.destination
                        .tell_why(self.session.state(), &reason)
                        .await;
                    self.destination.take_push();
                    self.advance(Event::LinkLost)?;
                }
            }
        }
        eprintln!("page-server: the destination is back");
        self.advance(Event::Settled)?;
        Ok(Ok(self.serve_again()))
    }

    /// The operator's limit has passed. An error when that is the end.
    fn give_up(&mut self) -> Result<(), SessionError> {
        let text = "the destination did not come back in time";
        if self.lost.on_lost != OnLost::Kill {
            let error = self.fail(Failure::Lost, text);
            eprintln!(
                "page-server: error: source host {}, {error}; still waiting for it",
                host::name()
            );
            return Ok(());
        }
        let error = self.fail(
            Failure::Lost,
            format!("{text}; its memory is given up, as --on-lost says"),
        );
        self.advance(Event::GaveUp)?;
        Err(error)
    }

    fn form(&self) -> Form {
        Form {
            compress: Mode::Auto,
            version: self.destination.version,
            related: self.book.is_of_many(),
            paying: self.destination.paying.clone(),
            expected: None,
        }
    }

    fn serve_again(&mut self) -> Transfer {
        let mut transfer = Transfer::default();
        let (source, book) = (self.offer.source.clone(), self.book.clone());
        let serving = self.destination.serve(source.clone(), book.clone());
        transfer.spawn(&self.threads.fault, serving);
        if let Some(stream) = self.destination.take_push() {
            let (form, credits) = (self.form(), self.destination.take_credits());
            transfer.spawn(&self.threads.bulk, async move {
                Push::new(stream, source, book, form)?.all(credits).await
            });
        }
        transfer
    }

    fn agree(&mut self, theirs: Tally) -> Result<(), SessionError> {
        self.advance(Event::AllPresent)?;
        let ours = self.book.tally();
        if ours != theirs || self.book.owed() > 0 {
            let text = format!("the ends disagree (source {ours:?}, destination {theirs:?})");
            return Err(self.fail(Failure::Lost, text));
        }
        self.agreed = Some(ours);
        Ok(())
    }

    async fn complete(&mut self, hold: Hold) -> Result<(), SessionError> {
        self.advance(Event::Agreed)?;
        // A destination that misses this word has all pages nevertheless, and is told again when we part.
        if let Err(error) = self.send(ToDestination::Complete).await {
            tracing::warn!(%error, "the destination is not told");
        }
        if let Err(error) = hold.release().await {
            tracing::warn!(%error, "the frozen original is killed nevertheless");
        }
        Ok(())
    }
}

/// The signal that asks us to stop.
async fn stopped(stop: &mut watch::Receiver<Option<&'static str>>) -> &'static str {
    let signal = match stop.wait_for(Option::is_some).await {
        Ok(signal) => *signal,
        Err(_) => None,
    };
    match signal {
        Some(name) => name,
        None => std::future::pending().await,
    }
}

/// The operator's limit has passed, and what is frozen was to die then.
async fn gave_up(hold: Hold, error: SessionError) -> SessionError {
    if let Err(error) = hold.release().await {
        tracing::warn!(%error, "the frozen original is killed nevertheless");
    }
    error
}

/// There is no way on. Frozen tasks are kept until the operator comes: they may be running on the destination.
async fn keep(hold: &Hold, error: SessionError) -> SessionError {
    let Hold::Dump(_) = hold else { return error };
    complain(&error);
    std::future::pending().await
}

fn complain(error: &SessionError) {
    eprintln!(
        "page-server: error: source host {}, {error}; the destination may be running the workload, so it stays \
         frozen here; kill this program only after deciding which copy shall live",
        host::name()
    );
}
