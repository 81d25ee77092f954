//! From the running workload to the whole one, over as many links as it takes.

use std::time::{Duration, SystemTime};

use common::container;
use common::exit::{Failure, SessionError};
use common::host;
use common::images::ImagePid;
use common::limits::MAX_PRESENT_WORDS;
use common::lost::OnLost;
use common::proto::control::{Abort, Present, ToDestination, ToSource, Welcome};
use common::proto::version::V3;
use common::record::unix_us;
use common::session::{Event, State};
use common::session_file::{SessionFile, Side, Whole};
use tokio::time::{Instant, interval, sleep, timeout};

use super::{
    EXPLANATION, Ending, Migration, Outage, TELLING, Teller, gave_up, lost, understood, unexpected,
};
use crate::connect::Source;
use crate::copy::SURVIVOR;
use crate::fetch::TransferError;
use crate::huge::Huge;
use crate::outage::{Silence, UNANSWERED};
use crate::progress::Progress;
use crate::resident::{Resident, ResidentError};

/// Time between two looks at how far the memory has come.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

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
            && self.copy_may_run
            && matches!(error.failure, Failure::Connection | Failure::Peer)
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
            Err(error) => {
                let welcome = source.welcome.clone();
                self.end_without(Some(source), &welcome, error, resident)
                    .await?;
            }
        }
        match announced {
            Some(announced) => announced
                .await
                .map_err(|error| self.fail(Failure::Internal, error)),
            None => Ok(()),
        }
    }

    /// The link is lost, or the source does not serve us: threads that touch a missing page wait while we try to reach it
    /// again, until `limit`, or for as long as anything is owed.
    pub(super) async fn recover(
        &mut self,
        source: &mut Source,
        resident: &mut Resident,
        error: &SessionError,
        limit: Option<Duration>,
    ) -> Result<(), SessionError> {
        if error.failure == Failure::Peer {
            // Its operator is to learn it, too; a source that gave up does not listen.
            let abort = self.abort(error);
            let _ = timeout(EXPLANATION, source.control.send(&abort)).await;
        }
        match &mut self.outage {
            Some(outage) => outage.say(&error.to_string()),
            None => {
                eprintln!(
                    "lazy-restorer: {error}; threads that touch a missing page wait, trying to reconnect"
                );
                self.outage = Some(Outage::begin(self.plan.lost.give_up_after));
            }
        }
        self.advance(Event::LinkLost)?;
        loop {
            *source = self.find_again(&source.welcome, resident, limit).await?;
            match self.go_on(source, resident).await {
                Err(error) if matches!(error.failure, Failure::Connection | Failure::Peer) => {
                    self.outage().say(&error.to_string());
                    self.advance(Event::LinkLost)?;
                }
                settled => return settled,
            }
        }
    }

    fn abort(&self, error: &SessionError) -> ToSource {
        ToSource::Abort(Abort {
            host: host::name(),
            state: error.state,
            text: error.text.clone(),
            copy_is_dead: !self.copy_may_run,
        })
    }

    fn outage(&mut self) -> &mut Outage {
        let patience = self.plan.lost.give_up_after;
        self.outage.get_or_insert_with(|| Outage::begin(patience))
    }

    /// The link has proved to be good.
    fn reunite(&mut self) {
        if self.outage.take().is_some() {
            eprintln!("lazy-restorer: reconnected");
        }
    }

    /// Tries to reach the source of a lost link, or of a session that another program began.
    pub(super) async fn find_again(
        &mut self,
        welcome: &Welcome,
        resident: &mut Resident,
        limit: Option<Duration>,
    ) -> Result<Source, SessionError> {
        let patience = self.plan.lost.give_up_after;
        loop {
            let outage = self.outage.get_or_insert_with(|| Outage::begin(patience));
            let owed = resident.memory.counts().owed;
            tokio::select! {
                () = sleep(outage.pause()) => {}
                name = self.stop.wait() => tracing::warn!(owed, "{name} ignored: the workload still needs the source"),
            }
            // Also when attempts are successful, and each time the source breaks off at once.
            let acknowledgement = patience
                .unwrap_or(Duration::MAX)
                .min(ACKNOWLEDGEMENT_TIMEOUT);
            let limit = limit.or((owed == 0).then_some(acknowledgement));
            if limit.is_some_and(|limit| outage.lasted() > limit) {
                return Err(self.fail(Failure::Lost, "the source cannot be reached"));
            }
            if limit.is_none() && outage.exhausts_patience() {
                self.give_up(welcome, resident).await?;
                continue;
            }
            let reached = outage.attempt(&self.plan.connect, &self.threads, welcome);
            if let Some(source) = reached.await {
                return Ok(source);
            }
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
        self.forget_container();
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
        while !resident.kill().await {
            tracing::error!("{SURVIVOR}");
        }
    }

    /// The copy is dead: its name is free again.
    fn forget_container(&self) {
        let side = self.kept.file().and_then(SessionFile::destination);
        if let Some(container) = side.and_then(|side| side.container.as_ref()) {
            container::forget(container);
        }
    }

    /// The copy is dead. Tries to tell the source, which then lets the original run, until it is told or `limit` is over.
    pub(super) async fn tell_dead(
        &mut self,
        welcome: &Welcome,
        limit: Option<Duration>,
    ) -> SessionError {
        let state = self.state();
        match self.tell(welcome, None, limit, Ending::Dead(state)).await {
            Ok(()) => self.fail(
                Failure::Peer,
                "the copy here is dead; the source was told to let the original run",
            ),
            Err(reason) => {
                let text = format!(
                    "{reason}; the source does not know yet that the copy is dead; `lazy-restorer resume` tells it"
                );
                self.fail(Failure::Lost, text)
            }
        }
    }

    async fn tell(
        &mut self,
        welcome: &Welcome,
        patience: Option<Duration>,
        limit: Option<Duration>,
        ending: Ending<'_>,
    ) -> Result<(), String> {
        let mut teller = Teller {
            connect: &self.plan.connect,
            threads: &self.threads,
            welcome,
            stop: &mut self.stop,
        };
        let mut outage = Outage::begin(patience);
        teller.tell(&mut outage, limit, ending).await
    }

    /// Every page is here, and the source cannot be told. The workload needs nobody: its memory is let go, and what is left
    /// to do is to tell.
    async fn end_whole(
        &mut self,
        welcome: &Welcome,
        resident: Resident,
    ) -> Result<(), SessionError> {
        let whole = resident.memory.whole();
        let noted = self.kept.change(|file| {
            if let Side::Destination(side) = &mut file.side {
                side.whole = Some(whole.clone());
            }
        });
        let _held = match noted {
            Ok(()) => {
                drop(resident.let_go());
                None
            }
            Err(error) => {
                tracing::warn!(%error, "the memory is held on: a restart would not know that it is whole");
                Some(resident)
            }
        };
        self.tell_whole(welcome, &whole).await
    }

    /// Tells the source that every page is here.
    pub(super) async fn tell_whole(
        &mut self,
        welcome: &Welcome,
        whole: &Whole,
    ) -> Result<(), SessionError> {
        eprintln!(
            "lazy-restorer: every page is here and the workload needs the source no more, but the source does not know \
             that; trying to tell it"
        );
        let patience = self.plan.lost.give_up_after;
        // Without a limit of the operator's it ends nevertheless: a source that has heard it may be gone.
        let limit = patience.is_none().then_some(TELLING);
        let told = self.tell(welcome, patience, limit, Ending::Whole(whole));
        if let Err(reason) = told.await {
            let text = format!(
                "{reason}; the workload is whole here, and the source does not know it: `lazy-restorer resume --session \
                 {0}` tells it, or `page-server release --session {0}` there ends the frozen original",
                welcome.session
            );
            return Err(self.fail(Failure::Lost, text));
        }
        for event in [
            Event::Reconnected,
            Event::Settled,
            Event::AllPresent,
            Event::Agreed,
        ] {
            self.advance(event)?;
        }
        Ok(())
    }

    fn give_link_up(&mut self) -> Result<(), SessionError> {
        match self.state() {
            State::Paused => Ok(()),
            _ => self.advance(Event::LinkLost),
        }
    }

    /// There is no way on with `source`.
    pub(super) async fn end_without(
        &mut self,
        source: Option<&mut Source>,
        welcome: &Welcome,
        error: SessionError,
        resident: Resident,
    ) -> Result<(), SessionError> {
        let of_link = matches!(
            error.failure,
            Failure::Connection | Failure::Peer | Failure::Lost
        );
        if of_link && resident.memory.counts().owed == 0 {
            self.give_link_up()?;
            return self.end_whole(welcome, resident).await;
        }
        Err(self.hold(source, error, resident).await)
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
        let mut silence = Silence::begin(&memory);
        let (began, owed) = (Instant::now(), memory.counts().owed);
        loop {
            tokio::select! {
                () = memory.settled() => break,
                _ = shown.tick() => {
                    progress.show(&memory);
                    self.note_announced(resident);
                    if memory.counts().owed < owed || began.elapsed() > EXPLANATION {
                        self.reunite();
                    }
                    if silence.is_too_long(&memory) {
                        return Err(self.fail(Failure::Connection, UNANSWERED));
                    }
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
        // So that the source knows that this was heard, and waits no longer for us to come and ask.
        source.control.finish();
        self.reunite();
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
            ResidentError::Transfer(error) if error.is_of_source() => {
                return self.fail(Failure::Peer, error);
            }
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
    ///
    /// The operator's limit ends it as it ends a lost link.
    pub(super) async fn hold(
        &mut self,
        source: Option<&mut Source>,
        error: SessionError,
        resident: Resident,
    ) -> SessionError {
        eprintln!(
            "lazy-restorer: error: destination host {}, {error}; the workload runs here, but threads that touch a \
             missing page wait; kill the workload to give it up",
            host::name()
        );
        let mut welcome = None;
        if let Some(source) = source {
            let abort = self.abort(&error);
            let _ = timeout(EXPLANATION, source.control.send(&abort)).await;
            welcome = Some(source.welcome.clone());
        }
        if let Err(error) = self.give_link_up() {
            tracing::warn!(%error, "holding");
        }
        let mut limit = self.plan.lost.give_up_after;
        loop {
            tokio::select! {
                _ = self.stop.wait() => tracing::warn!("still holding the memory of the workload"),
                () = over(limit) => {
                    limit = None;
                    if let Some(welcome) = &welcome
                        && let Err(error) = self.give_up(welcome, &resident).await
                    {
                        resident.abort().await;
                        return error;
                    }
                }
            }
        }
    }
}

/// Waits until the operator's limit has passed.
pub(crate) async fn over(limit: Option<Duration>) {
    match limit {
        Some(limit) => sleep(limit).await,
        None => std::future::pending().await,
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
