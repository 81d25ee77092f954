//! From the complete skeleton to the point of no return.

use common::address;
use common::exit::{Failure, SessionError};
use common::operator;
use common::proto::control::{ToDestination, ToSource};
use common::session::{Event, State};

use super::{Migration, interrupted, until};
use crate::destination::Destination;
use crate::framer::Form;
use crate::freeze::FreezeError;
use crate::frozen::FrozenWorkload;
use crate::listen::Listen;
use crate::push::Push;
use crate::transfer::Transfer;

impl Migration<'_> {
    /// From the complete skeleton to the point of no return. Whatever fails here is rolled back.
    pub(super) async fn hand_over(
        &mut self,
        listen: &Listen,
        destination: &mut Destination,
        workload: &mut FrozenWorkload,
    ) -> Result<Transfer, SessionError> {
        self.advance(Event::Dumped)?;
        let mut transfer = Transfer::default();
        let serving = destination.serve(workload.source.clone(), workload.book.clone());
        transfer.spawn(listen.fault.thread.handle(), serving);
        let mut push = self.send_skeleton(listen, destination, workload).await?;
        self.expect(destination, ToSource::Staged).await?;
        // The skeleton was the first to show what the path carries.
        if let Some(nanoseconds) = self.nanoseconds_for_a_byte() {
            push.expect(nanoseconds);
        }
        self.advance(Event::Staged)?;
        let credits = destination.take_credits();
        transfer.spawn(listen.bulk.thread.handle(), push.all(credits));
        self.await_restore(destination, workload, &mut transfer)
            .await?;
        self.advance(Event::CutoverAsked)?;
        // Told to the hook before it is told to the destination: from here on our death must not thaw the workload.
        let failed = |error: &dyn std::fmt::Display| {
            SessionError::new(Failure::Freeze, State::Listen, error)
        };
        if self.kept.file().map(|file| file.state) != Some(State::Cutover) {
            return Err(failed(&"the session file cannot be written"));
        }
        if let Some(frozen) = workload.ours() {
            frozen.commit().await.map_err(|error| failed(&error))?;
        }
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
        let (source, book) = (workload.source.clone(), workload.book.clone());
        let form = self.form(destination, workload);
        let push = Push::new(stream, source, book, form).map_err(|error| failed(&error))?;
        let images = workload.images();
        let sending = listen.bulk.thread.handle().spawn(async move {
            let push = push.skeleton(&images).await?;
            push.eager().await
        });
        self.take_addresses(workload)?;
        let facts = self.facts(destination);
        let command = self.plan.on_frozen.as_deref();
        tokio::select! {
            done = operator::run("--on-frozen", command, state, &facts) => {
                done.map_err(|error| failed(&error))?;
            }
            // The workload is frozen: whoever wants it back is not to wait for the command.
            name = self.stop.wait() => return Err(interrupted(state, name)),
        }
        // Nobody finds the way here any more.
        self.doors.clear();
        destination.send(state, &ToDestination::Frozen).await?;
        let sent = tokio::select! {
            sent = sending => sent,
            // It does not take what it is sent.
            () = until(self.thaw_by) => return Err(failed(&self.plan.freeze_limit.exceeded())),
            name = self.stop.wait() => return Err(interrupted(state, name)),
        };
        match sent {
            Ok(Ok(push)) => Ok(push),
            Ok(Err(error)) if error.is_of_link() => {
                Err(destination.explain(state, failed(&error)).await)
            }
            Ok(Err(error)) => Err(failed(&error)),
            Err(error) => Err(failed(&error)),
        }
    }

    /// From here on packets for the service addresses are nobody's here, and whoever lets the workload run puts them back.
    fn take_addresses(&mut self, workload: &FrozenWorkload) -> Result<(), SessionError> {
        if let Some(directory) = workload.images().parent() {
            let taken = address::take(&self.plan.addresses, directory);
            taken.map_err(|error| self.fail(Failure::Freeze, error))?;
        }
        Ok(())
    }

    /// In which form pages are pushed to this destination.
    pub(super) fn form(&self, destination: &Destination, workload: &FrozenWorkload) -> Form {
        Form {
            compress: self.plan.compress,
            version: destination.version,
            related: workload.book.is_of_many(),
            paying: destination.paying.clone(),
            expected: self.nanoseconds_for_a_byte(),
        }
    }

    fn nanoseconds_for_a_byte(&self) -> Option<f64> {
        self.gauge.bulk_rate().map(|rate| 1e9 / rate as f64)
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
            error = lost(workload) => Err(SessionError::new(Failure::Freeze, state, error)),
        }
    }
}

/// Resolves when CRIU ends although nobody told it to.
async fn lost(workload: &mut FrozenWorkload) -> FreezeError {
    match workload.ours() {
        Some(frozen) => frozen.lost().await,
        None => std::future::pending().await,
    }
}
