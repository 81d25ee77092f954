//! The destination as the source sees it: admitted, spoken to, served.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use common::control::{Control, ControlError};
use common::exit::{Failure, SessionError};
use common::host;
use common::images::ImagePid;
use common::limits::{HANDSHAKE_TIMEOUT, IDLE_TIMEOUT};
use common::proto::control::{
    Abort, Hello, Present, Resume, Secret, SessionId, ToDestination, ToSource, Welcome,
    WorkloadFacts,
};
use common::proto::version::{self, V3};
use common::session::State;
use quinn::{Connection, RecvStream, SendStream};
use tokio::time::timeout;

use crate::answers::Answers;
use crate::book::Book;
use crate::compression::Paying;
use crate::listen::{Call, Listen, accept_bulk};
use crate::memory::PageSource;
use crate::parting::Returns;
use crate::pending::Said;
use crate::serve::serve;
use crate::transfer::TransferError;

/// A destination that was welcomed.
#[derive(Debug)]
pub struct Destination {
    /// Its control stream.
    pub control: Control<ToSource>,
    /// Its host's name.
    pub host: String,
    /// Proves that a new connection is its.
    secret: Secret,
    /// The version it speaks with us.
    pub version: u16,
    /// Whether compressing pays on the way to it.
    pub paying: Paying,
    /// Its bulk connection.
    pub bulk: Connection,
    push: Option<SendStream>,
    credits: Option<RecvStream>,
}

/// Waits for a destination that speaks our protocol and knows the token; strangers are turned away and logged.
pub async fn admit(
    listen: &mut Listen,
    session: SessionId,
    token: Option<&Secret>,
) -> Result<Destination, SessionError> {
    loop {
        let gone = || SessionError::new(Failure::Internal, State::Hello, "the listener ended");
        let call = listen.fault.next().await.ok_or_else(gone)?;
        let peer = call.control.peer();
        match welcome(listen, call, session, token).await {
            Ok(destination) => return Ok(destination),
            Err(reason) => tracing::warn!(%peer, reason, "refused a destination"),
        }
    }
}

async fn welcome(
    listen: &mut Listen,
    call: Call,
    session: SessionId,
    token: Option<&Secret>,
) -> Result<Destination, String> {
    match call.message {
        ToSource::Hello(hello) => welcome_hello(listen, call.control, hello, session, token).await,
        // Its operator is to learn that the port is another's now.
        ToSource::Resume(_) => {
            let text = String::from(OTHER_SESSION);
            refuse(call.control, &text);
            Err(text)
        }
        _ => Err(String::from("it does not begin with a hello")),
    }
}

async fn welcome_hello(
    listen: &mut Listen,
    mut control: Control<ToSource>,
    hello: Hello,
    session: SessionId,
    token: Option<&Secret>,
) -> Result<Destination, String> {
    let version = match check(&hello, token) {
        Ok(version) => version,
        Err(text) => {
            refuse(control, &text);
            return Err(text);
        }
    };
    let secret = Secret::random().map_err(|error| error.to_string())?;
    let welcome = ToDestination::Welcome(Welcome {
        version,
        session,
        secret: secret.clone(),
        bulk_port: listen.bulk.address().port(),
        host: host::name(),
    });
    control
        .send(&welcome)
        .await
        .map_err(|error| error.to_string())?;
    let known = Known {
        host: hello.host,
        secret,
        version,
    };
    take_bulk(listen, control, session, known).await
}

/// What a destination is known by when it comes again.
#[derive(Clone, Debug)]
pub struct Acquaintance {
    /// Proves that it is the same.
    pub secret: Secret,
    /// Its host's name.
    pub host: String,
    /// The version of the protocol that was agreed on.
    pub version: u16,
}

/// The destination of a session that may come again; everybody else is turned away.
#[derive(Debug)]
pub struct ComingBack<'a> {
    /// Where it comes.
    pub listen: &'a mut Listen,
    /// Its session.
    pub session: SessionId,
    /// What it is known by.
    pub known: Acquaintance,
}

impl Returns for ComingBack<'_> {
    async fn next(&mut self) -> Option<Destination> {
        loop {
            let call = self.listen.fault.next().await?;
            let back = let_back(self.listen, call, self.session, &self.known).await;
            if back.is_some() {
                return back;
            }
        }
    }
}

/// Who called, if that is the destination of this session.
pub async fn let_back(
    listen: &mut Listen,
    call: Call,
    session: SessionId,
    old: &Acquaintance,
) -> Option<Destination> {
    let peer = call.control.peer();
    match readmit(listen, call, session, old).await {
        Ok(again) => Some(again),
        Err(reason) => {
            tracing::warn!(%peer, reason, "refused a destination");
            None
        }
    }
}

/// Takes a destination back that proves to be the one of this session.
async fn readmit(
    listen: &mut Listen,
    call: Call,
    session: SessionId,
    old: &Acquaintance,
) -> Result<Destination, String> {
    let Call { control, message } = call;
    let ToSource::Resume(resume) = message else {
        let text = String::from("this page-server serves another destination");
        refuse(control, &text);
        return Err(text);
    };
    let known = HashMap::from([(session, old.clone())]);
    let (_, destination) = take_back(listen, control, &resume, &known).await?;
    Ok(destination)
}

/// Who called.
#[derive(Debug)]
pub enum Caller {
    /// A destination that was given this session.
    New(SessionId, Destination),
    /// The destination of this session, again.
    Back(SessionId, Destination),
}

/// Lets a destination in that is new, as `session` if that is given, or known; turns everybody else away.
pub async fn receive(
    listen: &mut Listen,
    call: Call,
    session: Option<SessionId>,
    token: Option<&Secret>,
    known: &HashMap<SessionId, Acquaintance>,
) -> Result<Caller, String> {
    let control = call.control;
    match (call.message, session) {
        (ToSource::Resume(resume), _) => {
            let (session, destination) = take_back(listen, control, &resume, known).await?;
            Ok(Caller::Back(session, destination))
        }
        (ToSource::Hello(hello), Some(session)) => {
            let welcomed = welcome_hello(listen, control, hello, session, token).await?;
            Ok(Caller::New(session, welcomed))
        }
        (ToSource::Hello(_), None) => {
            let text =
                String::from("this page-server serves as many destinations as it was told to");
            refuse(control, &text);
            Err(text)
        }
        _ => Err(String::from("it does not begin with a hello")),
    }
}

async fn take_back(
    listen: &mut Listen,
    mut control: Control<ToSource>,
    resume: &Resume,
    known: &HashMap<SessionId, Acquaintance>,
) -> Result<(SessionId, Destination), String> {
    let old = match recognise(resume, known) {
        Ok(old) => old.clone(),
        Err(text) => {
            refuse(control, &text);
            return Err(text);
        }
    };
    let bulk_port = listen.bulk.address().port();
    let welcome = ToDestination::WelcomeBack { bulk_port };
    control
        .send(&welcome)
        .await
        .map_err(|error| error.to_string())?;
    let known = Known {
        host: old.host.clone(),
        secret: old.secret.clone(),
        version: resume.version,
    };
    let session = resume.session;
    let destination = take_bulk(listen, control, session, known).await?;
    Ok((session, destination))
}

/// The destination that comes again. Its version is the one that was agreed on: a session never changes it.
fn recognise<'a>(
    resume: &Resume,
    known: &'a HashMap<SessionId, Acquaintance>,
) -> Result<&'a Acquaintance, String> {
    let old = known.get(&resume.session);
    let old = old.filter(|old| resume.secret.matches(&old.secret));
    let old = old.ok_or(OTHER_SESSION)?;
    if resume.version != old.version {
        return Err(format!(
            "this session speaks version {}, and no other",
            old.version
        ));
    }
    Ok(old)
}

/// What is known of a destination before its bulk connection has come.
struct Known {
    host: String,
    secret: Secret,
    version: u16,
}

/// What a destination is told that comes again to the wrong program.
const OTHER_SESSION: &str = "this page-server serves another session";

/// Completes a destination by its bulk connection.
async fn take_bulk(
    listen: &mut Listen,
    control: Control<ToSource>,
    session: SessionId,
    known: Known,
) -> Result<Destination, String> {
    let bulk = timeout(
        HANDSHAKE_TIMEOUT,
        accept_bulk(&mut listen.bulk, session, &known.secret),
    );
    let Ok(Some((bulk, push, credits))) = bulk.await else {
        let text = String::from("its bulk connection did not come; is that UDP port open?");
        refuse(control, &text);
        return Err(text);
    };
    Ok(Destination {
        control,
        host: known.host,
        secret: known.secret,
        version: known.version,
        paying: Paying::default(),
        bulk,
        push: Some(push),
        credits: Some(credits),
    })
}

fn check(hello: &Hello, token: Option<&Secret>) -> Result<u16, String> {
    let version = version::select(&hello.versions).ok_or_else(|| {
        format!(
            "no common protocol version: the destination speaks {:?}, this source {:?}; run the same release on both hosts",
            hello.versions,
            version::SUPPORTED
        )
    })?;
    let known = match (token, &hello.token) {
        (None, _) => true,
        (Some(token), Some(offered)) => token.matches(offered),
        (Some(_), None) => false,
    };
    if !known {
        return Err(String::from(
            "the migration token is missing or wrong; give lazy-restorer the --token-file that page-server wrote",
        ));
    }
    Ok(version)
}

/// Says why, and waits for nobody to hear it.
fn refuse(control: Control<ToSource>, text: &str) {
    let abort = ToDestination::Abort(abort(State::Hello, text));
    tokio::spawn(async move { control.farewell(&abort).await });
}

impl Destination {
    /// Reads what the destination has received of processes with so many lazy pages, until it has told everything.
    pub async fn present(
        &mut self,
        slots: HashMap<ImagePid, usize>,
    ) -> Result<PresentMap, Unsettled> {
        let silent = || Unsettled::Lost(String::from("it does not say what it has"));
        let mut map = PresentMap::of(slots);
        loop {
            let message = timeout(HANDSHAKE_TIMEOUT, self.control.next()).await;
            match message.map_err(|_| silent())? {
                Ok(ToSource::Present(present)) => map.receive(present)?,
                Ok(ToSource::Withheld(withheld)) if self.version >= V3 => {
                    map.withhold(withheld)?;
                }
                Ok(ToSource::PresentEnd) => return Ok(map),
                Ok(ToSource::Abort(abort)) if abort.copy_is_dead => {
                    return Err(Unsettled::CopyDead(abort));
                }
                Ok(_) => return Err(silent()),
                Err(error) => return Err(Unsettled::Lost(error.to_string())),
            }
        }
    }
}

/// What a destination that came again has: words of bitmaps.
#[derive(Debug, Default)]
pub struct PresentMap {
    /// Lazy pages of each process there is.
    slots: HashMap<ImagePid, usize>,
    /// What it said.
    pub said: Said,
}

/// Why a destination that came again was not served again.
#[derive(Debug)]
pub enum Unsettled {
    /// It is lost again, or makes no sense.
    Lost(String),
    /// Its copy is dead.
    CopyDead(Abort),
}

impl PresentMap {
    /// Nothing yet, of processes with so many lazy pages.
    pub fn of(slots: HashMap<ImagePid, usize>) -> Self {
        PresentMap {
            slots,
            ..PresentMap::default()
        }
    }

    /// Takes a part of what came.
    pub fn receive(&mut self, part: Present) -> Result<(), Unsettled> {
        append(&self.slots, &mut self.said.received, part)
    }

    /// Takes a part of what never will.
    pub fn withhold(&mut self, part: Present) -> Result<(), Unsettled> {
        append(&self.slots, &mut self.said.withheld, part)
    }
}

/// Parts come in order, and no more of them than there are pages: a destination decides nothing about our memory.
fn append(
    slots: &HashMap<ImagePid, usize>,
    maps: &mut HashMap<ImagePid, Vec<u64>>,
    part: Present,
) -> Result<(), Unsettled> {
    let nonsense = || Unsettled::Lost(String::from("its present map makes no sense"));
    let room = slots.get(&part.pid).ok_or_else(nonsense)?;
    let room = room.div_ceil(u64::BITS as usize);
    let map = maps.entry(part.pid).or_default();
    if part.first_word != map.len() as u64 || map.len() + part.words.len() > room {
        return Err(nonsense());
    }
    map.extend(part.words);
    Ok(())
}

/// Time a destination whose stream broke has to say why; a lost link shows within it.
const LAST_WORD: Duration = IDLE_TIMEOUT.saturating_add(Duration::from_secs(1));

/// What the source says when it gives up.
pub fn abort(state: State, text: &str) -> Abort {
    Abort {
        host: host::name(),
        state,
        text: text.to_owned(),
        copy_is_dead: false,
    }
}

impl Destination {
    /// Says why it is not served on, as long as it may be heard.
    pub async fn tell_why(&mut self, state: State, reason: &str) {
        let abort = ToDestination::Abort(abort(state, reason));
        if timeout(LAST_WORD, self.control.send(&abort)).await.is_err() {
            tracing::debug!("the destination does not hear why");
        }
    }

    /// The same, and waits for nobody to hear it.
    pub fn dismiss(self, state: State, reason: &str) {
        let abort = ToDestination::Abort(abort(state, reason));
        tokio::spawn(async move { self.control.farewell(&abort).await });
    }

    /// What it is known by when it comes again.
    pub fn acquaintance(&self) -> Acquaintance {
        Acquaintance {
            secret: self.secret.clone(),
            host: self.host.clone(),
            version: self.version,
        }
    }

    /// Our direction of the bulk stream, once.
    pub fn take_push(&mut self) -> Option<SendStream> {
        self.push.take()
    }

    /// Whether its streams have not been used yet.
    pub fn is_new(&self) -> bool {
        self.push.is_some()
    }

    /// The destination's direction of the bulk stream, which carries its credit; once.
    pub fn take_credits(&mut self) -> Option<RecvStream> {
        self.credits.take()
    }

    /// Waits for the next message; a destination that gives up, or is lost, is an error of this phase.
    pub async fn next(&mut self, state: State) -> Result<ToSource, SessionError> {
        match self.control.next().await {
            Ok(ToSource::Abort(abort)) => Err(self.gave_up(state, &abort)),
            Ok(message) if message.since() > self.version => Err(unexpected(state, &message)),
            Ok(message) => Ok(message),
            Err(error) => Err(lost(state, &error)),
        }
    }

    /// The error for a destination that gave up.
    pub fn gave_up(&self, state: State, abort: &Abort) -> SessionError {
        let text = format!(
            "destination host {} gave up in phase {}: {}",
            abort.host, abort.state, abort.text
        );
        SessionError::new(Failure::Peer, state, text)
    }

    /// A stream broke, which looks like `error`. A destination that gave up says why on the control stream.
    pub async fn explain(&mut self, state: State, error: SessionError) -> SessionError {
        match timeout(LAST_WORD, self.control.next()).await {
            Ok(Ok(ToSource::Abort(abort))) => self.gave_up(state, &abort),
            Ok(Err(ended)) => lost(state, &ended),
            _ => error,
        }
    }

    /// Sends a message.
    pub async fn send(
        &mut self,
        state: State,
        message: &ToDestination,
    ) -> Result<(), SessionError> {
        match self.control.send(message).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.explain(state, lost(state, &error)).await),
        }
    }

    /// Says what is going to move, as far as its version knows it.
    pub async fn advise(&mut self, state: State, facts: WorkloadFacts) -> Result<(), SessionError> {
        let more = facts.more.clone();
        self.send(state, &ToDestination::Advise(facts)).await?;
        if self.version < V3 {
            return Ok(());
        }
        self.send(state, &ToDestination::AdviseMore(more)).await
    }

    /// Serves the demand stream as soon as the destination opens it.
    pub fn serve(
        &self,
        source: Arc<dyn PageSource>,
        book: Arc<Book>,
    ) -> impl Future<Output = Result<(), TransferError>> + Send + 'static {
        let connection = self.control.connection().clone();
        let answers = Answers::new(self.version, self.paying.clone());
        async move {
            let answers = answers.map_err(TransferError::Compressor)?;
            let (replies, requests) = connection
                .accept_bi()
                .await
                .map_err(|_| TransferError::Link)?;
            serve(replies, requests, source, book, answers).await
        }
    }
}

/// The error for a destination that is gone.
pub fn lost(state: State, error: &ControlError) -> SessionError {
    let text = format!("lost the destination: {error}");
    SessionError::new(Failure::Connection, state, text)
}

/// The error for a message that does not belong into this phase.
pub fn unexpected(state: State, message: &ToSource) -> SessionError {
    let text = format!("the destination broke the protocol: unexpected {message:?}");
    SessionError::new(Failure::Peer, state, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_destination_in_the_same_version_comes_back() {
        let (session, secret) = (SessionId([1; 16]), Secret([2; 32]));
        let acquaintance = Acquaintance {
            secret: secret.clone(),
            host: String::from("b"),
            version: V3,
        };
        let known = HashMap::from([(session, acquaintance)]);
        let resume = Resume {
            version: V3,
            session,
            secret,
        };
        assert!(recognise(&resume, &known).is_ok());
        let mut older = resume.clone();
        older.version = version::V2;
        let refused = recognise(&older, &known).expect_err("a downgrade");
        assert!(refused.contains("version 3"), "{refused}");
        let mut other = resume.clone();
        other.secret = Secret([3; 32]);
        assert!(recognise(&other, &known).is_err());
        let mut other = resume;
        other.session = SessionId([4; 16]);
        assert!(recognise(&other, &known).is_err());
    }
}
