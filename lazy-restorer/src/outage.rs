//! A source that cannot be reached: how often it is tried, and what it is told that is reached again only to hear how it
//! ended here.
//!
//! Nothing that a connection attempt ends with is final past the point of no return. Another program may have the port for
//! a while, a certificate may be renewed, a `page-server` may be started again: only the operator's limit ends it.

use std::time::{Duration, Instant};

use common::exit::Failure;
use common::host;
use common::limits::{RECONNECT_PAUSE, UNANSWERED_TIMEOUT};
use common::proto::control::{Abort, ToDestination, ToSource, Welcome};
use common::proto::version::V3;
use common::session::State;
use common::session_file::Whole;
use common::stop::StopSignal;
use tokio::time::{sleep, timeout};

use crate::connect::{ConnectPlan, Source, Threads, reconnect};
use crate::memory::Memory;
use crate::session::parts;

/// Reasons that are told apart.
const REASONS: usize = 32;
/// Time the source has to let the original run, with the operator's command before that, and to say so.
const HEARING: Duration = Duration::from_secs(60);

/// A lost link, until another one has proved to be good.
#[derive(Debug)]
pub(crate) struct Outage {
    since: Instant,
    pause: Duration,
    said: Vec<String>,
    /// The operator's limit, until it has passed.
    patience: Option<Duration>,
}

impl Outage {
    /// It begins now, and the operator's patience is over after this long.
    pub(crate) fn begin(patience: Option<Duration>) -> Self {
        Outage {
            since: Instant::now(),
            pause: Duration::ZERO,
            said: Vec::new(),
            patience,
        }
    }

    /// How long it has lasted.
    pub(crate) fn lasted(&self) -> Duration {
        self.since.elapsed()
    }

    /// Tries to reach the source once.
    pub(crate) async fn attempt(
        &mut self,
        plan: &ConnectPlan,
        threads: &Threads,
        welcome: &Welcome,
    ) -> Option<Source> {
        match reconnect(plan, threads, welcome).await {
            Ok(source) => Some(source),
            Err(error) if error.failure == Failure::Connection => {
                tracing::info!(%error, "not yet");
                None
            }
            Err(error) => {
                self.say(&error.text);
                None
            }
        }
    }

    /// Tells the operator why it was not successful, each reason once.
    pub(crate) fn say(&mut self, reason: &str) {
        if self.said.len() < REASONS && !self.said.iter().any(|said| said == reason) {
            tracing::warn!("{reason}; trying again");
            self.said.push(reason.to_owned());
        }
    }

    /// Whether the operator's limit has passed; true once.
    pub(crate) fn exhausts_patience(&mut self) -> bool {
        let is_over = self.patience.is_some_and(|limit| self.lasted() > limit);
        if is_over {
            self.patience = None;
        }
        is_over
    }

    /// Time to wait before the next attempt: none before the first one.
    pub(crate) fn pause(&mut self) -> Duration {
        let pause = self.pause;
        self.pause = (pause * 2).clamp(RECONNECT_PAUSE.0, RECONNECT_PAUSE.1);
        pause
    }
}

/// What is said of a source that is there and sends nothing.
pub(crate) const UNANSWERED: &str =
    "the source answers no requests, although the link is alive; giving this link up";

/// A source that sends no page while a thread waits for one.
#[derive(Debug)]
pub(crate) struct Silence {
    since: Instant,
    owed: u64,
}

impl Silence {
    /// The link is new.
    pub(crate) fn begin(memory: &Memory) -> Self {
        Silence {
            since: Instant::now(),
            owed: memory.counts().owed,
        }
    }

    /// Whether it has lasted too long. To be asked every now and then.
    pub(crate) fn is_too_long(&mut self, memory: &Memory) -> bool {
        let owed = memory.counts().owed;
        let Some(waits_since) = memory.waits_since().filter(|_| owed == self.owed) else {
            *self = Silence::begin(memory);
            return false;
        };
        self.since.max(waits_since).elapsed() > UNANSWERED_TIMEOUT
    }
}

/// How it ended here.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ending<'a> {
    /// The copy is dead: the source lets the original run.
    Dead(State),
    /// The copy has every page: the source releases the original.
    Whole(&'a Whole),
}

/// Tells the source how it ended here.
#[derive(Debug)]
pub(crate) struct Teller<'a> {
    /// How to reach it.
    pub(crate) connect: &'a ConnectPlan,
    /// Who drives the connections.
    pub(crate) threads: &'a Threads,
    /// What it is known by.
    pub(crate) welcome: &'a Welcome,
    /// Ends the telling.
    pub(crate) stop: &'a mut StopSignal,
}

impl Teller<'_> {
    /// Tries until the source has heard it; else the error says what came before that. `limit` is counted from the
    /// beginning of the outage.
    pub(crate) async fn tell(
        &mut self,
        outage: &mut Outage,
        limit: Option<Duration>,
        ending: Ending<'_>,
    ) -> Result<(), String> {
        loop {
            tokio::select! {
                () = sleep(outage.pause()) => {}
                name = self.stop.wait() => return Err(format!("stopped by {name}")),
            }
            let reached = outage.attempt(self.connect, self.threads, self.welcome);
            if let Some(mut source) = reached.await {
                let heard = match ending {
                    Ending::Dead(state) => say_dead(&mut source, state).await,
                    Ending::Whole(whole) => say_whole(&mut source, whole).await,
                };
                source.close(None).await;
                match heard {
                    Ok(()) => return Ok(()),
                    Err(reason) => outage.say(&reason),
                }
            }
            let too_long = limit.is_some_and(|limit| outage.lasted() > limit);
            if too_long || outage.exhausts_patience() {
                return Err(String::from("the source cannot be reached"));
            }
        }
    }
}

/// Says that the copy is dead, and waits until the source has heard it: it lets the original run, and ends.
pub(crate) async fn say_dead(source: &mut Source, state: State) -> Result<(), String> {
    let abort = ToSource::Abort(Abort {
        host: host::name(),
        state,
        text: String::from("the copy is dead"),
        copy_is_dead: true,
    });
    let sent = source.control.send(&abort).await;
    sent.map_err(|error| error.to_string())?;
    match timeout(HEARING, source.control.next()).await {
        Ok(Err(error)) if error.is_link_lost() => Err(error.to_string()),
        Ok(_) => Ok(()),
        Err(_) => Err(String::from("the source does not answer")),
    }
}

/// Says what has come, and that it is all; the source agrees.
async fn say_whole(source: &mut Source, whole: &Whole) -> Result<(), String> {
    let knows_promises = source.welcome.version >= V3;
    for process in &whole.processes {
        for part in parts(process.pid, &process.received.words()) {
            say(source, &ToSource::Present(part)).await?;
        }
        let promised = process.withheld.words();
        for part in parts(process.pid, &promised).filter(|_| knows_promises) {
            say(source, &ToSource::Withheld(part)).await?;
        }
    }
    say(source, &ToSource::PresentEnd).await?;
    say(source, &ToSource::Drained(whole.tally)).await?;
    loop {
        match timeout(HEARING, source.control.next()).await {
            Ok(Ok(ToDestination::Complete)) => return Ok(()),
            // Which pages were huge is of no interest any more.
            Ok(Ok(ToDestination::Huge(_))) => {}
            Ok(Ok(ToDestination::Abort(abort))) => {
                return Err(format!("source host {}: {}", abort.host, abort.text));
            }
            Ok(Ok(message)) => return Err(format!("unexpected {message:?}")),
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => return Err(String::from("the source does not answer")),
        }
    }
}

async fn say(source: &mut Source, message: &ToSource) -> Result<(), String> {
    let sent = source.control.send(message).await;
    sent.map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_their_bound_and_begin_with_none() {
        let mut outage = Outage::begin(None);
        let pauses: Vec<Duration> = (0..12).map(|_| outage.pause()).collect();
        assert_eq!(pauses[0], Duration::ZERO);
        assert_eq!(pauses[1], RECONNECT_PAUSE.0);
        assert!(pauses.is_sorted());
        assert_eq!(pauses[11], RECONNECT_PAUSE.1);
    }

    #[test]
    fn the_operators_limit_passes_once() {
        let mut outage = Outage::begin(Some(Duration::ZERO));
        while !outage.exhausts_patience() {}
        assert!(!outage.exhausts_patience());
        assert!(!Outage::begin(None).exhausts_patience());
    }

    #[test]
    fn reasons_that_repeat_are_said_once() {
        let mut outage = Outage::begin(None);
        for reason in ["expired", "other session", "expired"] {
            outage.say(reason);
        }
        assert_eq!(outage.said, ["expired", "other session"]);
    }
}
