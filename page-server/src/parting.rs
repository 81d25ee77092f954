//! The last word to a destination that has everything, said again when it may not have been heard.
//!
//! A destination that does not hear it comes again and asks: it cannot know whether the source does. By then the original is
//! released, and there is nothing left to serve but this word.

use std::time::Duration;

use common::limits::HANDSHAKE_TIMEOUT;
use common::proto::control::{Tally, ToDestination, ToSource};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use crate::destination::Destination;

/// Time within which the last word is heard when nothing is wrong.
const HEARD_WITHIN: Duration = Duration::from_secs(1);
/// How long a destination is waited for that may not have heard it. It asks for longer, but a host that is to be switched
/// off, and a command that is to end, are not to wait for one that is gone.
const LAST_CALL: Duration = Duration::from_secs(60);

/// Where a destination comes again.
pub trait Returns: Send {
    /// Waits until it does. `None` when nobody listens any more. May be cancelled: it comes once more.
    fn next(&mut self) -> impl Future<Output = Option<Destination>> + Send;
}

impl Returns for mpsc::Receiver<Destination> {
    fn next(&mut self) -> impl Future<Output = Option<Destination>> + Send {
        self.recv()
    }
}

/// Says nothing more to a destination that was told that it is whole, as `agreed`. If it may not have heard that, it is
/// waited for, for a while or until `stopped`, and told once more.
pub async fn part(
    mut destination: Destination,
    agreed: Tally,
    mut returns: impl Returns,
    stopped: impl Future<Output = &'static str>,
) {
    let control = &mut destination.control;
    if timeout(HEARD_WITHIN, control.is_understood()).await != Ok(true) {
        eprintln!(
            "page-server: the workload is whole on the destination, and the original was released; the destination may \
             not know that, and is waited for, up to {} s",
            LAST_CALL.as_secs()
        );
        tokio::select! {
            // It was only slow.
            true = control.is_understood() => {}
            () = tell_again(agreed, &mut returns) => eprintln!("page-server: the destination came again, and knows it now"),
            () = sleep(LAST_CALL) => tracing::warn!("the destination did not come again"),
            name = stopped => tracing::warn!("stopped by {name}; the destination did not come again"),
        }
    }
    destination.control.leave();
}

async fn tell_again(agreed: Tally, returns: &mut impl Returns) {
    loop {
        let Some(destination) = returns.next().await else {
            return std::future::pending().await;
        };
        match confirm(agreed, destination).await {
            Ok(()) => return,
            Err(reason) => tracing::warn!(reason, "the destination is lost again"),
        }
    }
}

/// Hears what the destination has to say, which is known, and agrees.
async fn confirm(agreed: Tally, mut destination: Destination) -> Result<(), String> {
    let control = &mut destination.control;
    loop {
        let message = timeout(HANDSHAKE_TIMEOUT, control.next()).await;
        match message.map_err(|_| String::from("it does not say what it has"))? {
            Ok(ToSource::Present(_) | ToSource::Withheld(_) | ToSource::PresentEnd) => {}
            Ok(ToSource::Drained(tally)) if tally == agreed => break,
            Ok(message) => return Err(format!("unexpected {message:?}")),
            Err(error) => return Err(error.to_string()),
        }
    }
    let told = control.send(&ToDestination::Complete).await;
    told.map_err(|error| error.to_string())?;
    let heard = timeout(HANDSHAKE_TIMEOUT, control.is_understood()).await;
    destination.control.leave();
    match heard {
        Ok(true) => Ok(()),
        _ => Err(String::from("it did not hear the last word")),
    }
}
