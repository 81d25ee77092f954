//! What becomes of a restore by somebody else whose source is lost, or serves no more.

use std::time::Duration;

use common::exit::{Failure, SessionError};
use common::host;
use common::lost::OnLost;
use common::proto::control::{Abort, ToSource};
use common::session::Event;
use tokio::time::{sleep, timeout};

use super::{EXPLANATION, External, Filling, interrupted, is_of_link, release};
use crate::connect::Source;
use crate::copy::SURVIVOR;
use crate::outage::{Ending, Outage, Teller, say_dead};
use crate::session::{TELLING, over};

/// Time to try to reach a source again that nobody here needs.
const RETURN_TIMEOUT: Duration = Duration::from_secs(20);

impl External<'_> {
    /// The link is lost, or the source does not serve us. Tries to reach it again and to settle what has come: for as long
    /// as anyone here needs it, else for a while.
    pub(super) async fn recover(
        &mut self,
        filling: &mut Filling,
        text: &str,
        needed: bool,
    ) -> Result<(), SessionError> {
        match &mut self.outage {
            Some(outage) => outage.say(text),
            None => eprintln!(
                "lazy-restorer: {text}; threads that touch a missing page wait, trying to reconnect"
            ),
        }
        self.advance(Event::LinkLost)?;
        loop {
            self.source = self.find_again(filling, needed).await?;
            self.advance(Event::Reconnected)?;
            match self.settle(filling).await {
                Err(error) if is_of_link(&error) => {
                    self.outage().say(&error.to_string());
                    self.advance(Event::LinkLost)?;
                }
                settled => return settled,
            }
        }
    }

    fn outage(&mut self) -> &mut Outage {
        let patience = self.plan.lost.give_up_after;
        self.outage.get_or_insert_with(|| Outage::begin(patience))
    }

    /// The link has proved to be good.
    pub(super) fn reunite(&mut self) {
        if self.outage.take().is_some() {
            eprintln!("lazy-restorer: reconnected");
        }
    }

    async fn find_again(
        &mut self,
        filling: &mut Filling,
        needed: bool,
    ) -> Result<Source, SessionError> {
        let (plan, welcome) = (self.plan, self.source.welcome.clone());
        let patience = plan.lost.give_up_after;
        loop {
            let needed = needed && filling.memory.counts().owed > 0;
            let outage = self.outage.get_or_insert_with(|| Outage::begin(patience));
            tokio::select! {
                () = sleep(outage.pause()) => {}
                name = self.stop.wait() => match needed {
                    true => tracing::warn!("{name} ignored: the workload needs the source"),
                    false => return Err(interrupted(self.session.state(), name)),
                },
            }
            // Also when attempts are successful, and each time the source breaks off at once.
            if !needed && outage.lasted() > RETURN_TIMEOUT {
                return Err(self.fail(Failure::Lost, "the source cannot be reached"));
            }
            if needed && self.copy_may_run && outage.exhausts_patience() {
                self.give_up(filling).await?;
                continue;
            }
            let reached = outage.attempt(&plan.connect, &self.threads, &welcome);
            if let Some(source) = reached.await {
                return Ok(source);
            }
        }
    }

    /// The operator's limit has passed. An error when the copy was killed for it.
    async fn give_up(&mut self, filling: &Filling) -> Result<(), SessionError> {
        if self.plan.lost.on_lost == OnLost::KeepPaused {
            eprintln!(
                "lazy-restorer: error: destination host {}, phase {}: the source did not come back in time; the workload \
                 runs here, but threads that touch a missing page wait",
                host::name(),
                self.state()
            );
            return Ok(());
        }
        while !filling.copy.kill_all(&filling.memory).await {
            tracing::error!("{}", SURVIVOR);
        }
        self.copy_may_run = false;
        if let Err(error) = self.note(|side| side.may_run = false) {
            tracing::warn!(%error, "a restart does not know that the copy is dead");
        }
        Err(self.fail(
            Failure::Lost,
            "the source did not come back in time; the copy was killed, as --on-lost says",
        ))
    }

    /// The source is there again: settles with it what has come.
    async fn settle(&mut self, filling: &mut Filling) -> Result<(), SessionError> {
        filling.unlink().await;
        self.tell_present(&filling.memory).await?;
        filling
            .reconnect(&mut self.source, &self.threads)
            .await
            .map_err(|error| self.fail(Failure::Connection, error))?;
        self.advance(Event::Settled)
    }

    /// The copy is dead, or whole, and the source may not know it.
    async fn tell(&mut self, limit: Option<Duration>, ending: Ending<'_>) -> Result<(), String> {
        let welcome = self.source.welcome.clone();
        let mut teller = Teller {
            connect: &self.plan.connect,
            threads: &self.threads,
            welcome: &welcome,
            stop: &mut self.stop,
        };
        let patience = self.plan.lost.give_up_after;
        let mut outage = Outage::begin(patience);
        teller.tell(&mut outage, limit, ending).await
    }

    /// No task runs here. A source that may have given the workload away would wait for us.
    pub(super) async fn take_back(&mut self, error: SessionError) -> SessionError {
        if error.state.source_may_thaw() || self.rolled_back {
            return error;
        }
        if say_dead(&mut self.source, error.state).await.is_ok() {
            self.kept.end();
            return error;
        }
        eprintln!("lazy-restorer: {error}; the copy is dead, trying to tell the source");
        let limit = match self.plan.lost.on_lost {
            // The operator wants the source to know it, and has nothing to lose here.
            OnLost::ThawSource => None,
            OnLost::KeepPaused | OnLost::Kill => Some(TELLING),
        };
        match self.tell(limit, Ending::Dead(error.state)).await {
            Ok(()) => {
                self.kept.end();
                error
            }
            Err(reason) => {
                let text = format!(
                    "{reason}; the source does not know yet that the copy is dead; `lazy-restorer resume` tells it"
                );
                self.fail(Failure::Lost, text)
            }
        }
    }

    /// Every page is here, and the source cannot be told. The workload needs nobody: what is left to do is to tell.
    pub(super) async fn end_whole(&mut self, filling: Filling) -> Result<(), SessionError> {
        let whole = filling.memory.whole();
        let noted = self.note(|side| side.whole = Some(whole.clone()));
        let held = match noted {
            Ok(()) => {
                release(filling.keeper);
                None
            }
            Err(error) => {
                tracing::warn!(%error, "the memory is held on: a restart would not know that it is whole");
                Some(filling)
            }
        };
        eprintln!(
            "lazy-restorer: every page is here and the workload needs the source no more, but the source does not know \
             that; trying to tell it"
        );
        // Without a limit of the operator's it ends nevertheless: a source that has heard it may be gone.
        let limit = self.plan.lost.give_up_after.is_none().then_some(TELLING);
        let told = self.tell(limit, Ending::Whole(&whole)).await;
        drop(held);
        told.map_err(|reason| {
            let text = format!(
                "{reason}; the workload is whole here, and the source does not know it: `lazy-restorer resume` tells it"
            );
            self.fail(Failure::Lost, text)
        })?;
        self.kept.end();
        Ok(())
    }

    /// There is no way on. Holds the workload's memory: threads that touch a missing page wait, and never read zeros. The
    /// operator's limit ends it as it ends a lost link.
    pub(super) async fn hold(&mut self, error: SessionError, filling: Filling) -> SessionError {
        eprintln!(
            "lazy-restorer: error: destination host {}, {error}; the workload runs here, but threads that touch a \
             missing page wait; kill the workload to give it up",
            host::name()
        );
        let abort = self.abort(&error);
        let _ = timeout(EXPLANATION, self.source.control.send(&abort)).await;
        let mut limit = self.plan.lost.give_up_after;
        loop {
            tokio::select! {
                _ = self.stop.wait() => tracing::warn!("still holding the memory of the workload"),
                () = over(limit) => {
                    limit = None;
                    if let Err(error) = self.give_up(&filling).await {
                        release(filling.keeper);
                        return self.take_back(error).await;
                    }
                }
            }
        }
    }

    pub(super) fn abort(&self, error: &SessionError) -> ToSource {
        ToSource::Abort(Abort {
            host: host::name(),
            state: error.state,
            text: error.text.clone(),
            copy_is_dead: !self.copy_may_run,
        })
    }
}
