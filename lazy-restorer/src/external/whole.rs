//! From the moment the tasks run to the moment both ends agree that their memory is whole.

use std::time::{Duration, Instant, SystemTime};

use common::exit::{Failure, SessionError};
use common::proto::control::{ToDestination, ToSource};
use common::record::unix_us;
use common::session::Event;
use tokio::time::{interval, timeout};

use super::{EXPLANATION, External, Filling, Step, is_of_link};
use crate::fetch::TransferError;
use crate::memory::Memory;
use crate::outage::{Silence, UNANSWERED};
use crate::progress::Progress;
use crate::session::parts;

/// Time between two looks at how far the memory has come.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

impl External<'_> {
    /// The tasks run. Waits until their memory is whole, over as many links as it takes.
    pub(super) async fn until_whole(&mut self, filling: &mut Filling) -> Result<(), SessionError> {
        self.record.resumed_at_unix_us = unix_us(SystemTime::now());
        let mut whole = match self.send(ToSource::Resumed).await {
            Ok(()) => self.until_agreed(filling).await,
            Err(error) => Err(error),
        };
        while let Err(error) = &whole
            && is_of_link(error)
        {
            if error.failure == Failure::Peer {
                // Its operator is to learn it, too; a source that gave up does not listen.
                let abort = self.abort(error);
                let _ = timeout(EXPLANATION, self.source.control.send(&abort)).await;
            }
            let text = error.text.clone();
            whole = match self.recover(filling, &text, true).await {
                Ok(()) => self.until_agreed(filling).await,
                Err(error) => Err(error),
            };
        }
        whole
    }

    async fn until_agreed(&mut self, filling: &mut Filling) -> Result<(), SessionError> {
        self.until_settled(filling).await?;
        self.advance(Event::AllPresent)?;
        self.send(ToSource::Drained(filling.memory.tally())).await?;
        let answer = self.source.control.next().await;
        match self.understood(answer)? {
            ToDestination::Complete => {
                // So that the source knows that this was heard.
                self.source.control.finish();
                self.reunite();
                self.advance(Event::Agreed)
            }
            message => Err(self.unexpected(&message)),
        }
    }

    async fn until_settled(&mut self, filling: &mut Filling) -> Result<(), SessionError> {
        if self.plan.push {
            filling.begin_push(&self.source, &self.threads);
        }
        let memory = filling.memory.clone();
        let progress = Progress::start(&memory);
        let mut shown = interval(PROGRESS_INTERVAL);
        let mut silence = Silence::begin(&memory);
        let (began, owed) = (Instant::now(), memory.counts().owed);
        loop {
            let step = tokio::select! {
                () = memory.settled() => return Ok(()),
                _ = shown.tick() => {
                    progress.show(&memory);
                    if memory.counts().owed < owed || began.elapsed() > EXPLANATION {
                        self.reunite();
                    }
                    if silence.is_too_long(&memory) {
                        return Err(self.fail(Failure::Connection, UNANSWERED));
                    }
                    continue;
                }
                message = self.source.control.next() => Step::Message(Box::new(message)),
                Some(error) = filling.failures.recv() => Step::Failure(error),
                name = self.stop.wait() => {
                    let counts = memory.counts();
                    tracing::warn!(?counts, "{name} ignored: the workload needs pages that are still on the source");
                    continue;
                }
            };
            match step {
                Step::Failure(TransferError::Link) => {
                    let said = timeout(EXPLANATION, self.source.control.next()).await;
                    if let Ok(said) = said {
                        self.understood(said)?;
                    }
                    return Err(self.fail(Failure::Connection, "a stream of pages broke"));
                }
                Step::Failure(error) if error.is_of_source() => {
                    return Err(self.fail(Failure::Peer, error));
                }
                Step::Failure(error) => return Err(self.fail(Failure::Restore, error)),
                Step::Message(message) => {
                    let message = self.understood(*message)?;
                    return Err(self.unexpected(&message));
                }
                Step::Handover(_) => {}
            }
        }
    }

    /// Tells the source which pages have come.
    pub(super) async fn tell_present(&mut self, memory: &Memory) -> Result<(), SessionError> {
        for (pid, map) in memory.present_map() {
            for part in parts(pid, &map.received) {
                self.send(ToSource::Present(part)).await?;
            }
            for part in parts(pid, &map.withheld) {
                self.send(ToSource::Withheld(part)).await?;
            }
        }
        self.send(ToSource::PresentEnd).await
    }
}
