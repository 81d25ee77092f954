//! From the workload that was given away to its end here, over as many links as it takes.

use std::time::SystemTime;

use common::control::ControlError;
use common::exit::{Failure, SessionError};
use common::host;
use common::limits::MAX_HUGE_PIECE;
use common::lost::OnLost;
use common::operator;
use common::proto::control::{Abort, HugeAreas, Tally, ToDestination, ToSource};
use common::proto::version;
use common::record::unix_us;
use common::session::{Event, State};
use tokio::time::{Instant, sleep_until};

use super::Migration;
use crate::book::Book;
use crate::destination::{self, Acquaintance, Destination, Unsettled, unexpected};
use crate::frame;
use crate::framer::Form;
use crate::frozen::FrozenWorkload;
use crate::listen::Listen;
use crate::memory::PageSource;
use crate::pending::Run;
use crate::push::Push;
use crate::transfer::Transfer;

/// What ends a stretch of serving.
enum Served {
    /// Nothing is owed any more.
    Drained(Tally),
    /// The destination's copy is dead.
    CopyDead(Abort),
    /// The link was lost; the destination may have come again already.
    LinkLost(String, Option<Destination>),
}

/// What waiting for a lost destination ends with.
pub(super) enum Found {
    /// It came again, and is served over a new link.
    Again(Destination, Transfer),
    /// It came again to say that its copy is dead.
    CopyDead(Destination, Abort),
    /// It did not come within the operator's limit, and the original is to die too.
    GaveUp,
}

impl Migration<'_> {
    /// The workload is given away: from here on only the destination decides.
    pub(super) async fn postcopy(
        &mut self,
        listen: &mut Listen,
        destination: &mut Destination,
        workload: FrozenWorkload,
        transfer: Transfer,
    ) -> Result<(), SessionError> {
        let granted = destination
            .send(self.state(), &ToDestination::CutoverGranted)
            .await;
        self.advance(Event::CutoverGranted)?;
        let link = match granted {
            Ok(()) => Ok(transfer),
            Err(error) => Err((transfer, error.text, None)),
        };
        self.serve(listen, destination, workload, link).await
    }

    /// Serves the workload's memory until nothing is owed any more. `link` is what serves it, or what served a link
    /// that was lost.
    async fn serve(
        &mut self,
        listen: &mut Listen,
        destination: &mut Destination,
        workload: FrozenWorkload,
        mut link: Result<Transfer, (Transfer, String, Option<Destination>)>,
    ) -> Result<(), SessionError> {
        loop {
            let mut transfer = match link {
                Ok(transfer) => transfer,
                Err((old, text, came)) => {
                    // Nothing of the old link may be sent while it is settled what has come.
                    old.stop().await;
                    self.link_lost(&text)?;
                    let known = destination.acquaintance();
                    match self.find_again(listen, &known, &workload, came).await? {
                        Found::Again(again, transfer) => {
                            *destination = again;
                            transfer
                        }
                        Found::CopyDead(again, abort) => {
                            *destination = again;
                            return Err(self.copy_died(workload, destination, &abort).await);
                        }
                        Found::GaveUp => return Err(self.gave_up(workload).await),
                    }
                }
            };
            let served = self.until_drained(listen, destination, &workload, &mut transfer);
            link = match served.await? {
                Served::Drained(tally) => match self.agree(destination, &workload, tally).await? {
                    Ok(()) => return self.release(workload).await,
                    Err(text) => Err((transfer, text, None)),
                },
                Served::CopyDead(abort) => {
                    return Err(self.copy_died(workload, destination, &abort).await);
                }
                Served::LinkLost(text, came) => Err((transfer, text, came)),
            };
        }
    }

    /// Goes on with a destination that has been found again.
    pub(super) async fn serve_found(
        &mut self,
        listen: &mut Listen,
        workload: FrozenWorkload,
        found: Found,
    ) -> Result<(), SessionError> {
        match found {
            Found::Again(mut destination, transfer) => {
                let served = self.serve(listen, &mut destination, workload, Ok(transfer));
                let result = served.await;
                self.part(listen, destination).await;
                result
            }
            Found::CopyDead(destination, abort) => {
                let error = self.copy_died(workload, &destination, &abort).await;
                // It waits to hear that it was understood.
                destination.control.close().await;
                Err(error)
            }
            Found::GaveUp => Err(self.gave_up(workload).await),
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
                    return Ok(self.break_off(destination, error).await);
                }
                Some(call) = listen.fault.next() => {
                    // Only a destination that lost its link earlier than we did has a reason to come.
                    let known = destination.acquaintance();
                    match destination::let_back(listen, call, self.id, &known).await {
                        Some(again) => {
                            let text = String::from("the destination came again");
                            return Ok(Served::LinkLost(text, Some(again)));
                        }
                        None => continue,
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
                    return Ok(self.break_off(destination, error).await);
                }
                Ok(message) => {
                    let error = unexpected(self.state(), &message);
                    return Ok(self.break_off(destination, error).await);
                }
                Err(error) => return Ok(Served::LinkLost(error.to_string(), None)),
            }
        }
    }

    fn link_lost(&mut self, text: &str) -> Result<(), SessionError> {
        // A link that was broken off was spoken of already.
        if self.complaint.as_deref() != Some(text) {
            eprintln!(
                "page-server: link lost ({text}); the frozen memory is kept until the destination comes again"
            );
        }
        self.advance(Event::LinkLost)
    }

    /// The link is lost. Waits for the destination to come again, if it has not, and settles what is owed.
    pub(super) async fn find_again(
        &mut self,
        listen: &mut Listen,
        known: &Acquaintance,
        workload: &FrozenWorkload,
        mut came: Option<Destination>,
    ) -> Result<Found, SessionError> {
        let mut limit = self
            .plan
            .lost
            .give_up_after
            .map(|limit| Instant::now() + limit);
        loop {
            let mut destination = match came.take() {
                Some(destination) => destination,
                None => match self.await_destination(listen, known, limit).await {
                    Some(destination) => destination,
                    None if self.plan.lost.on_lost == OnLost::Kill => return Ok(Found::GaveUp),
                    None => {
                        limit = None;
                        self.stay();
                        continue;
                    }
                },
            };
            self.advance(Event::Reconnected)?;
            match settle(&mut destination, &workload.book, workload.source.as_ref()).await {
                Ok(()) if self.refusal.is_some() => {
                    let reason = self.refusal.clone().unwrap_or_default();
                    destination.dismiss(self.state(), &reason);
                    self.advance(Event::LinkLost)?;
                }
                Ok(()) => {
                    match self.complaint {
                        None => eprintln!("page-server: the destination is back"),
                        Some(_) => tracing::info!("the destination is back"),
                    }
                    self.advance(Event::Settled)?;
                    let form = self.form(&destination, workload);
                    let transfer = serve_again(listen, &mut destination, workload, form);
                    return Ok(Found::Again(destination, transfer));
                }
                Err(Unsettled::CopyDead(abort)) => return Ok(Found::CopyDead(destination, abort)),
                Err(Unsettled::Lost(reason)) => {
                    tracing::warn!(reason, "the destination is lost again");
                    destination.dismiss(self.state(), &reason);
                    self.advance(Event::LinkLost)?;
                }
            }
        }
    }

    /// `None` when the operator's limit has passed.
    async fn await_destination(
        &mut self,
        listen: &mut Listen,
        known: &Acquaintance,
        limit: Option<Instant>,
    ) -> Option<Destination> {
        loop {
            tokio::select! {
                Some(call) = listen.fault.next() => {
                    if let Some(again) = destination::let_back(listen, call, self.id, known).await {
                        return Some(again);
                    }
                }
                () = until(limit) => return None,
                name = self.stop.wait() => {
                    tracing::warn!("{name} ignored: the destination may be running the workload");
                }
            }
        }
    }

    fn stay(&self) {
        eprintln!(
            "page-server: error: source host {}, phase {}: the destination did not come back in time; it may be running \
             the workload, so the original stays frozen here; `page-server thaw --session {}` lets it run again",
            host::name(),
            self.state(),
            self.id
        );
    }

    /// The operator's limit has passed, and the original was to die then.
    async fn gave_up(&mut self, workload: FrozenWorkload) -> SessionError {
        let error = self.fail(
            Failure::Lost,
            "the destination did not come back in time; the frozen original was killed, as --on-lost says",
        );
        if let Err(error) = workload.release().await {
            tracing::warn!(%error, "the frozen original is killed nevertheless");
        }
        match self.advance(Event::GaveUp) {
            Ok(()) => error,
            Err(invalid) => invalid,
        }
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

    pub(super) async fn roll_back(&mut self, workload: FrozenWorkload, destination: &Destination) {
        let facts = self.facts(destination);
        let on_thawed = self.plan.on_thawed.as_deref();
        if let Err(error) = operator::run("--on-thawed", on_thawed, State::Aborted, &facts).await {
            tracing::error!(%error, "the workload is thawed nevertheless");
        }
        self.doors.clear();
        match workload.thaw().await {
            Ok(()) => {
                // Also past the point of no return, when it could not be told to the hook.
                self.kept.end();
                tracing::info!("the workload runs here as before");
            }
            Err(error) => tracing::error!(%error, "thawing"),
        }
    }

    /// There is no way on over this link, and both operators are to know why. The frozen workload is kept: it may be running
    /// on the destination, which may come again, if only to say that its copy is dead.
    async fn break_off(&mut self, destination: &mut Destination, error: SessionError) -> Served {
        if self.complaint.as_ref() != Some(&error.text) {
            eprintln!(
                "page-server: error: source host {}, {error}; the destination may be running the workload, so it stays \
                 frozen here; `page-server thaw --session {}` lets it run again",
                host::name(),
                self.id
            );
            self.complaint = Some(error.text.clone());
        }
        destination.tell_why(error.state, &error.text).await;
        Served::LinkLost(error.text, None)
    }

    /// Compares what both ends counted, and says so. The inner error is a link that was lost before it was said.
    async fn agree(
        &mut self,
        destination: &mut Destination,
        workload: &FrozenWorkload,
        theirs: Tally,
    ) -> Result<Result<(), String>, SessionError> {
        self.advance(Event::AllPresent)?;
        let ours = workload.book.tally();
        self.record.pages = workload.book.counts();
        self.record.push = workload.book.saved();
        if ours != theirs || workload.book.owed() > 0 {
            let text = format!(
                "the ends disagree (source {ours:?}, destination {theirs:?}); the frozen original is kept"
            );
            let error = self.fail(Failure::Lost, &text);
            self.break_off(destination, error).await;
            self.refusal = Some(text.clone());
            return Ok(Err(text));
        }
        self.agreed = Some(ours);
        // Written before it is said: a destination that heard it never comes again, and a restart must not wait for it.
        self.kept.enter(State::Complete);
        let told = tell_whole(destination, workload.source.as_ref()).await;
        Ok(told.map_err(|error| error.to_string()))
    }

    async fn release(&mut self, workload: FrozenWorkload) -> Result<(), SessionError> {
        self.advance(Event::Agreed)?;
        if let Err(error) = workload.release().await {
            tracing::warn!(%error, "the frozen original is killed nevertheless");
        }
        Ok(())
    }
}

/// Waits until then; for ever without a limit.
pub(crate) async fn until(limit: Option<Instant>) {
    match limit {
        Some(limit) => sleep_until(limit).await,
        None => std::future::pending().await,
    }
}

/// Serves demand and pushes over a new link.
fn serve_again(
    listen: &Listen,
    destination: &mut Destination,
    workload: &FrozenWorkload,
    form: Form,
) -> Transfer {
    let mut transfer = Transfer::default();
    let (source, book) = (workload.source.clone(), workload.book.clone());
    transfer.spawn(
        listen.fault.thread.handle(),
        destination.serve(source.clone(), book.clone()),
    );
    if let Some(stream) = destination.take_push() {
        let credits = destination.take_credits();
        transfer.spawn(listen.bulk.thread.handle(), async move {
            Push::new(stream, source, book, form)?.all(credits).await
        });
    }
    transfer
}

/// Says that nothing is owed any more, and before that what only matters then.
async fn tell_whole(
    destination: &mut Destination,
    source: &dyn PageSource,
) -> Result<(), ControlError> {
    if destination.version >= version::V3 {
        for (pid, areas) in source.huge_areas() {
            for piece in areas.chunks(MAX_HUGE_PIECE) {
                let areas = piece.iter().map(|pages| (pages.start.0, pages.count));
                let areas = areas.collect();
                let message = ToDestination::Huge(HugeAreas { pid, areas });
                destination.control.send(&message).await?;
            }
        }
    }
    destination.control.send(&ToDestination::Complete).await
}

/// Learns what the destination has, and owes it the rest.
pub(crate) async fn settle(
    destination: &mut Destination,
    book: &Book,
    source: &dyn PageSource,
) -> Result<(), Unsettled> {
    let nonsense = || Unsettled::Lost(String::from("it claims pages that it cannot have"));
    let present = destination.present(book.slots()).await?;
    let recovery = book.recovery(present.said).ok_or_else(nonsense)?;
    // Read before anything is changed: what cannot be read now is asked for again when the destination comes again.
    let lost = digest_of(source, &recovery.lost)?;
    let known = digest_of(source, &recovery.known)?;
    book.recover(recovery, lost, known);
    Ok(())
}

/// The sum of the hashes of pages, which are read for it.
fn digest_of(source: &dyn PageSource, runs: &[Run]) -> Result<u64, Unsettled> {
    let mut sum = 0_u64;
    for run in runs {
        let frame = frame::read(source, *run);
        let frame = frame.map_err(|error| Unsettled::Lost(error.to_string()))?;
        sum = sum.wrapping_add(frame.contents.whole_digest());
    }
    Ok(sum)
}
