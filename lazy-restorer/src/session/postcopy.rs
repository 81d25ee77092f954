//! From the running workload to the whole one, over as many links as it takes.

use std::time::{Duration, Instant, SystemTime};

use common::exit::{Failure, SessionError};
use common::host;
use common::images::ImagePid;
use common::limits::{MAX_PRESENT_WORDS, RECONNECT_PAUSE};
use common::lost::OnLost;
use common::proto::control::{Abort, Present, ToDestination, ToSource, Welcome};
use common::proto::version::V3;
use common::record::unix_us;
use common::session::Event;
use common::session_file::Side;
use tokio::time::{interval, sleep, timeout};

use super::{EXPLANATION, Migration, gave_up, lost, understood, unexpected};
use crate::connect::{Source, reconnect};
use crate::fetch::TransferError;
use crate::huge::Huge;
use crate::progress::Progress;
use crate::resident::{Resident, ResidentError};

/// Time between two looks at how far the memory has come.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// Time the source has to let the original run, with the operator's command before that, and to say so.
const HEARING: Duration = Duration::from_secs(60);

/// Time to try to tell the source that every page is here; the workload does not need it any more.
const ACKNOWLEDGEMENT_TIMEOUT: Duration = Duration::from_secs(20);

impl Migration<'_> {
    /// The workload runs. Waits until it is whole.
    pub(super) async fn postcopy(
        &mut self,
        source: &mut Source,
        mut resident: Resident,
    ) -> Result<(), SessionError> {
        self.record.resumed_at_unix_us = unix_us(SystemTime::now());
        let whole = match source.control.send(&ToSource::Resumed).await {
            Ok(()) => self.until_whole(source, &mut resident).await,
            Err(error) => Err(lost(self.state(), &error)),
        };
        self.complete(source, resident, whole).await
    }

    /// As [`postcopy`](Self::postcopy), from a link that was lost at once.
    pub(super) async fn postcopy_after(
        &mut self,
        source: &mut Source,
        resident: Resident,
        error: SessionError,
    ) -> Result<(), SessionError> {
        self.complete(source, resident, Err(error)).await
    }

    async fn complete(
        &mut self,
        source: &mut Source,
        mut resident: Resident,
        mut whole: Result<(), SessionError>,
    ) -> Result<(), SessionError> {
        while let Err(error) = &whole
            && error.failure == Failure::Connection
        {
            whole = match self.recover(source, &mut resident, error, None).await {
                Ok(()) => self.until_whole(source, &mut resident).await,
                Err(error) => Err(error),
            };
        }
        self.record.count(&resident.memory);
        let announced = resident.announced.take();
        match whole {
            Ok(()) => {
                let huge = resident.let_go();
                self.make_huge(huge).await;
            }
            Err(error) if !self.copy_may_run => {
                resident.abort().await;
                self.withdraw();
                return Err(error);
            }
            Err(error) => return Err(self.hold(error, resident).await),
        }
        match announced {
            Some(announced) => announced
                .await
                .map_err(|error| self.fail(Failure::Internal, error)),
            None => Ok(()),
        }
    }

    /// The link is lost: threads that touch a missing page wait while we try to reach the source again, for at most
    /// `limit`, or for as long as anything is owed.
    pub(super) async fn recover(
        &mut self,
        source: &mut Source,
        resident: &mut Resident,
        error: &SessionError,
        limit: Option<Duration>,
    ) -> Result<(), SessionError> {
        eprintln!(
            "lazy-restorer: {error}; threads that touch a missing page wait, trying to reconnect"
        );
        self.advance(Event::LinkLost)?;
        *source = self.find_again(&source.welcome, resident, limit).await?;
        self.go_on(source, resident).await
    }

    /// Tries to reach the source of a lost link, or of a session that another program began.
    pub(super) async fn find_again(
        &mut self,
        welcome: &Welcome,
        resident: &mut Resident,
        limit: Option<Duration>,
    ) -> Result<Source, SessionError> {
        let mut pause = RECONNECT_PAUSE.0;
        let lost_since = Instant::now();
        let mut operators = self.plan.lost.give_up_after;
        loop {
            match reconnect(&self.plan.connect, &self.threads, welcome).await {
                Ok(source) => return Ok(source),
                Err(error) if error.failure != Failure::Connection => {
                    return Err(self.fail(Failure::Lost, error.text));
                }
                Err(error) => tracing::info!(%error, "not yet"),
            }
            let owed = resident.memory.counts().owed;
            let limit = limit.or((owed == 0).then_some(ACKNOWLEDGEMENT_TIMEOUT));
            if limit.is_some_and(|limit| lost_since.elapsed() > limit) {
                return Err(self.fail(
                    Failure::Lost,
                    "the source cannot be reached; should page-server still wait there, the workload is frozen there",
                ));
            }
            if operators.is_some_and(|limit| lost_since.elapsed() > limit) {
                operators = None;
                self.give_up(welcome, resident).await?;
            }
            tokio::select! {
                () = sleep(pause) => {}
                name = self.stop.wait() => tracing::warn!(owed, "{name} ignored: the workload still needs the source"),
            }
            pause = (pause * 2).min(RECONNECT_PAUSE.1);
        }
    }

    /// The operator's limit has passed. An error when the copy was killed for it.
    async fn give_up(
        &mut self,
        welcome: &Welcome,
        resident: &Resident,
    ) -> Result<(), SessionError> {
        let what = self.plan.lost.on_lost;
        if what == OnLost::KeepPaused {
            eprintln!(
                "lazy-restorer: error: destination host {}, phase {}: the source did not come back in time; the workload \
                 runs here, but threads that touch a missing page wait",
                host::name(),
                self.state()
            );
            return Ok(());
        }
        self.kill_copy(resident).await;
        self.copy_may_run = false;
        self.withdraw();
        let noted = self.kept.change(|file| {
            if let Side::Destination(side) = &mut file.side {
                side.may_run = false;
            }
        });
        if let Err(error) = noted {
            tracing::warn!(%error, "a restart does not know that the copy is dead");
        }
        if what == OnLost::ThawSource {
            return Err(self.tell_dead(welcome, None).await);
        }
        self.advance(Event::GaveUp)?;
        Err(self.fail(
            Failure::Lost,
            "the source did not come back in time; the copy was killed, as --on-lost says",
        ))
    }

    /// Kills the copy. The source may let the original run as soon as it is told, so this goes on until all of it is dead.
    async fn kill_copy(&self, resident: &Resident) {
        let mut said = false;
        while !resident.kill().await {
            if !said {
                eprintln!(
                    "lazy-restorer: error: destination host {}, phase {}: a process of the copy that was forked here, and \
                     whose parents have ended, is still there; kill it",
                    host::name(),
                    self.state()
                );
            }
            said = true;
        }
    }

    /// Says that the copy is dead, and waits until the source has heard it: it lets the original run, and ends.
    async fn is_told(&self, mut source: Source) -> bool {
        let abort = ToSource::Abort(Abort {
            host: host::name(),
            state: self.state(),
            text: String::from("the copy is dead"),
            copy_is_dead: true,
        });
        if source.control.send(&abort).await.is_err() {
            return false;
        }
        let answered = match timeout(HEARING, source.control.next()).await {
            Ok(Err(error)) => !error.is_link_lost(),
            Ok(Ok(_)) => true,
            Err(_) => false,
        };
        source.close(None).await;
        answered
    }

    /// The copy is dead. Tries to tell the source, which then lets the original run, until it is told or `limit` is over.
    pub(super) async fn tell_dead(
        &mut self,
        welcome: &Welcome,
        limit: Option<Duration>,
    ) -> SessionError {
        let began = Instant::now();
        let error = self.fail(
            Failure::Peer,
            "the copy here is dead; the source was told to let the original run",
        );
        let mut pause = RECONNECT_PAUSE.0;
        loop {
            match reconnect(&self.plan.connect, &self.threads, welcome).await {
                Ok(source) => {
                    if self.is_told(source).await {
                        return error;
                    }
                }
                Err(error) if error.failure != Failure::Connection => {
                    return self.fail(Failure::Peer, error.text);
                }
                Err(error) => tracing::info!(%error, "not yet"),
            }
            if limit.is_some_and(|limit| began.elapsed() > limit) {
                let text = "the source does not know yet that the copy is dead; `lazy-restorer resume` tells it";
                return self.fail(Failure::Lost, text);
            }
            tokio::select! {
                () = sleep(pause) => {}
                name = self.stop.wait() => {
                    let text = format!("stopped by {name}; the source does not know yet that the copy is dead");
                    return self.fail(Failure::Lost, text);
                }
            }
            pause = (pause * 2).min(RECONNECT_PAUSE.1);
        }
    }

    /// The source is there again: settles with it what has come, and goes on.
    pub(super) async fn go_on(
        &mut self,
        source: &mut Source,
        resident: &mut Resident,
    ) -> Result<(), SessionError> {
        self.advance(Event::Reconnected)?;
        resident.unlink().await;
        self.tell_present(source, resident).await?;
        let resumed = resident.reconnect(source, &self.threads).await;
        resumed.map_err(|error| self.fail(Failure::Connection, error))?;
        eprintln!("lazy-restorer: reconnected");
        self.advance(Event::Settled)
    }

    /// Tells the source which pages have come.
    async fn tell_present(
        &mut self,
        source: &mut Source,
        resident: &Resident,
    ) -> Result<(), SessionError> {
        for (pid, map) in resident.memory.present_map() {
            for part in parts(pid, &map.received) {
                self.send(source, &ToSource::Present(part)).await?;
            }
            // An older source keeps that in mind itself; it knows no successors.
            let withheld: &[u64] = match source.welcome.version {
                V3.. => &map.withheld,
                _ => &[],
            };
            for part in parts(pid, withheld) {
                self.send(source, &ToSource::Withheld(part)).await?;
            }
        }
        self.send(source, &ToSource::PresentEnd).await
    }

    async fn until_whole(
        &mut self,
        source: &mut Source,
        resident: &mut Resident,
    ) -> Result<(), SessionError> {
        if self.plan.push {
            resident.begin_push(source, &self.threads);
        }
        if let Some(error) = resident.failure.take() {
            return Err(self.resident_failed(source, error).await);
        }
        let memory = resident.memory.clone();
        let progress = Progress::start(&memory);
        let mut shown = interval(PROGRESS_INTERVAL);
        loop {
            tokio::select! {
                () = memory.settled() => break,
                _ = shown.tick() => {
                    progress.show(&memory);
                    self.note_announced(resident);
                }
                step = resident.next() => if let Err(error) = step {
                    return Err(self.resident_failed(source, error).await);
                },
                message = source.control.next() => {
                    let message = understood(self.state(), message)?;
                    return Err(unexpected(self.state(), &message));
                }
                name = self.stop.wait() => {
                    let counts = memory.counts();
                    tracing::warn!(?counts, "{name} ignored: the workload needs pages that are still on the source");
                }
            }
        }
        drop(progress);
        self.advance(Event::AllPresent)?;
        self.send(source, &ToSource::Drained(memory.tally()))
            .await?;
        loop {
            match understood(self.state(), source.control.next().await)? {
                ToDestination::Complete => break,
                ToDestination::Huge(areas) if resident.note_huge(&areas) => {}
                message => return Err(unexpected(self.state(), &message)),
            }
        }
        self.advance(Event::Agreed)
    }

    /// The migration is complete; pages that were huge become it again while the workload runs.
    async fn make_huge(&mut self, huge: Huge) {
        if !self.plan.huge_pages {
            return;
        }
        tokio::select! {
            counts = huge.make() => {
                if counts.wanted > 0 {
                    tracing::info!(?counts, "huge pages");
                }
                self.record.huge_pages = counts;
            }
            name = self.stop.wait() => tracing::warn!("stopped by {name}; some pages stay small"),
        }
    }

    /// A restart need not run the operator's command again.
    fn note_announced(&mut self, resident: &Resident) {
        let is_done = resident
            .announced
            .as_ref()
            .is_some_and(|task| task.is_finished());
        let noted = self.kept.change(|file| {
            if let Side::Destination(side) = &mut file.side
                && is_done
            {
                side.on_resumed = None;
            }
        });
        if let Err(error) = noted {
            tracing::warn!(%error, "a restart would run --on-resumed again");
        }
    }

    /// The restore or a stream failed: of the link, which the control stream explains better, or for good.
    pub(super) async fn resident_failed(
        &mut self,
        source: &mut Source,
        error: ResidentError,
    ) -> SessionError {
        match error {
            ResidentError::Transfer(TransferError::Link) => {}
            ResidentError::Transfer(error) => return self.fail(Failure::Peer, error),
            error => return self.fail(Failure::Restore, error),
        }
        match timeout(EXPLANATION, source.control.next()).await {
            Ok(Err(error)) => lost(self.state(), &error),
            Ok(Ok(ToDestination::Abort(abort))) => gave_up(self.state(), &abort),
            Ok(Ok(message)) => unexpected(self.state(), &message),
            // The bulk connection may be lost alone: both are given up together, and made anew.
            Err(_) => self.fail(
                Failure::Connection,
                "a stream of pages broke while the control stream stands",
            ),
        }
    }

    /// There is no way on. Holds the workload's memory: threads that touch a missing page wait, and never read zeros.
    pub(super) async fn hold(&mut self, error: SessionError, resident: Resident) -> SessionError {
        if resident.memory.counts().owed == 0 {
            // Whole, only not acknowledged: the workload needs nothing from anyone any more, and nobody is to go on.
            drop(resident.let_go());
            self.kept.end();
            return error;
        }
        eprintln!(
            "lazy-restorer: error: destination host {}, {error}; the workload runs here, but threads that touch a \
             missing page wait; kill the workload to give it up",
            host::name()
        );
        loop {
            self.stop.wait().await;
            tracing::warn!("still holding the memory of the workload");
        }
    }
}

/// The words of a bitmap, in as many messages as it needs.
pub(crate) fn parts(pid: ImagePid, words: &[u64]) -> impl Iterator<Item = Present> {
    let chunks = words.chunks(MAX_PRESENT_WORDS).enumerate();
    chunks.map(move |(index, words)| Present {
        pid,
        first_word: (index * MAX_PRESENT_WORDS) as u64,
        words: words.to_vec(),
    })
}
