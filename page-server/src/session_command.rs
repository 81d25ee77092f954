//! `page-server sessions`, `page-server thaw` and `page-server release`.

use std::path::Path;
use std::time::Duration;

use common::exit::{Failure, SessionError};
use common::operator::{self, Facts};
use common::session::State;
use common::session_file::{FrozenTasks, Listed, Original, SessionFile, Staleness, Standing, Task};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::{Instant, sleep};

use crate::adopt::{Left, LeftError};
use crate::attach::{AttachError, ForeignDump};
use crate::cli::{Release, Sessions, Thaw};

/// Time a `page-server` has to roll back and end.
const END_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause between looks at it.
const PAUSE: Duration = Duration::from_millis(20);

fn fail(failure: Failure, error: &dyn std::fmt::Display) -> SessionError {
    SessionError::new(failure, State::Paused, error)
}

/// Lists the sessions of this host.
pub fn list(command: &Sessions) -> Result<(), SessionError> {
    let entries = command.state.store().list();
    let entries = entries.map_err(|error| fail(Failure::BadInput, &error))?;
    let listed: Vec<Listed> = entries.iter().map(Listed::of).collect();
    if command.json {
        let text = serde_json::to_string(&listed);
        println!("{}", text.map_err(|error| fail(Failure::Internal, &error))?);
        return Ok(());
    }
    for session in listed {
        println!("{session}");
    }
    Ok(())
}

/// Lets the frozen original of a session run again.
pub async fn thaw(command: &Thaw) -> Result<(), SessionError> {
    let store = command.state.store();
    let file = store.find(&command.session);
    let file = file.map_err(|error| fail(Failure::BadInput, &error))?;
    let given_away = !file.state.source_may_thaw();
    match file.standing() {
        Standing::Stale(Staleness::OtherBoot | Staleness::TasksGone) => {
            let text = format!("session {} is {}", file.id, file.standing());
            return Err(fail(Failure::BadInput, &text));
        }
        Standing::Served if !given_away => return stop(&file).await,
        _ => {}
    }
    if given_away && !command.i_know_the_copy_is_dead {
        let text = format!(
            "session {} was given to {}, which may be running the workload; make sure that it does not and never will, \
             then say --i-know-the-copy-is-dead",
            file.id, file.peer_host
        );
        return Err(fail(Failure::BadInput, &text));
    }
    if file.standing() == Standing::Served {
        // It must not release what we thaw. Whatever it holds is held by CRIU and its script too.
        end(file.program, Signal::SIGKILL).await?;
    }
    run_again(&file).await?;
    store.remove(&file.id);
    Ok(())
}

/// Kills the frozen original of a session: the copy is whole, and nobody is left who could say so.
pub async fn release(command: &Release) -> Result<(), SessionError> {
    let store = command.state.store();
    let file = store.find(&command.session);
    let file = file.map_err(|error| fail(Failure::BadInput, &error))?;
    let standing = file.standing();
    if matches!(standing, Standing::Stale(_)) || file.state.source_may_thaw() {
        let text = format!(
            "session {} was not given away, or is over: it is {standing}; there is nothing to release",
            file.id
        );
        return Err(fail(Failure::BadInput, &text));
    }
    if !command.i_know_the_copy_is_whole {
        let text = format!(
            "only {} knows whether session {} has all of its memory there; make sure that lazy-restorer said so, then say \
             --i-know-the-copy-is-whole",
            file.peer_host, file.id
        );
        return Err(fail(Failure::BadInput, &text));
    }
    if standing == Standing::Served {
        // Whatever it holds is held by CRIU and its script too.
        end(file.program, Signal::SIGKILL).await?;
    }
    kill_original(&file).await?;
    store.remove(&file.id);
    Ok(())
}

async fn kill_original(file: &SessionFile) -> Result<(), SessionError> {
    let lost = |error: &dyn std::fmt::Display| fail(Failure::Lost, error);
    match file.source().map(|source| &source.original) {
        Some(Original::Images(_)) => Ok(()),
        Some(Original::Foreign(frozen, images)) => {
            let dump = ForeignDump::find_again(frozen, Path::new(images)).await;
            let dump = dump.map_err(|error| lost(&error))?;
            dump.release().await.map_err(|error| lost(&error))
        }
        Some(Original::Frozen(_)) | None => {
            let left = match Left::find_to_kill(file).await {
                Ok(left) => left,
                // Whoever is left without its root is not to stand still for ever.
                Err(LeftError::Gone(_)) => {
                    Left::kill_rest(file);
                    return Ok(());
                }
                Err(error) => return Err(lost(&error)),
            };
            let adopted = left.adopt().await.map_err(|error| lost(&error))?;
            adopted.release().await.map_err(|error| lost(&error))
        }
    }
}

/// Before the point of no return `page-server` rolls back when it is asked to end.
async fn stop(file: &SessionFile) -> Result<(), SessionError> {
    end(file.program, Signal::SIGTERM).await
}

async fn end(program: Task, signal: Signal) -> Result<(), SessionError> {
    // One that has ended in the meantime is what we want.
    let _ = kill(Pid::from_raw(program.pid), signal);
    let deadline = Instant::now() + END_TIMEOUT;
    while program.is_alive() {
        if Instant::now() > deadline {
            let text = format!("page-server (PID {}) does not end", program.pid);
            return Err(fail(Failure::Internal, &text));
        }
        sleep(PAUSE).await;
    }
    Ok(())
}

/// Somebody else's CRIU lets the tasks go and ends with an error; without it only our stop holds them.
async fn thaw_foreign(frozen: &FrozenTasks, images: &str) -> Result<(), AttachError> {
    let images = Path::new(images);
    match frozen.criu.is_alive() {
        true => ForeignDump::find_again(frozen, images).await?.thaw().await,
        false => ForeignDump::thaw_without_criu(frozen, images),
    }
}

async fn run_again(file: &SessionFile) -> Result<(), SessionError> {
    let original = file.source().map(|source| &source.original);
    let lost = |error: &dyn std::fmt::Display| fail(Failure::Lost, error);
    match original {
        Some(Original::Images(images)) => {
            let text =
                format!("nothing is frozen: this session is served from the images in {images}");
            return Err(fail(Failure::BadInput, &text));
        }
        Some(Original::Foreign(frozen, images)) => {
            return thaw_foreign(frozen, images)
                .await
                .map_err(|error| lost(&error));
        }
        Some(Original::Frozen(_)) | None => {}
    }
    let left = Left::find(file).map_err(|error| fail(Failure::Lost, &error))?;
    let facts = Facts {
        session: file.id,
        pid: left.root.as_raw().unsigned_abs(),
        peer: file.peer_host.clone(),
    };
    let on_thawed = file.source().and_then(|source| source.on_thawed.as_deref());
    let adopted = left.adopt().await;
    let adopted = adopted.map_err(|error| fail(Failure::Lost, &error))?;
    if let Err(error) = operator::run("--on-thawed", on_thawed, State::Aborted, &facts).await {
        tracing::error!(%error, "the workload is thawed nevertheless");
    }
    let thawed = adopted.thaw().await;
    thawed.map_err(|error| fail(Failure::Lost, &error))
}
