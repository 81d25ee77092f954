//! The socket that CRIU connects to for lazy pages.

use std::fs;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use tokio::io::unix::AsyncFd;

use crate::handover::{self, HandoverError, Handovers, SOCKET_NAME};

/// The socket while it waits for CRIU. Dropping it turns away whoever was not accepted, and removes it.
pub(super) struct Socket {
    listener: AsyncFd<UnixListener>,
    path: PathBuf,
}

impl Socket {
    /// Binds the socket in `work`; one that a dead daemon left behind is replaced.
    pub fn bind(work: &Path) -> Result<Self, HandoverError> {
        let path = work.join(SOCKET_NAME);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let listener = handover::bind(work)?;
        listener.set_nonblocking(true)?;
        // SAFETY: the listener is owned and goes into the `AsyncFd`.
        let listener = unsafe { AsyncFd::register(listener) }
            .map_err(|error| io::Error::other(error.to_string()))?;
        Ok(Socket { listener, path })
    }

    /// Waits until CRIU connects, and collects from then on. May be cancelled without loss.
    pub async fn accept(&self) -> Result<Handovers, HandoverError> {
        let stream = loop {
            let mut ready = self.listener.readable().await?;
            match ready.try_io(|listener| listener.get_ref().accept()) {
                Ok(accepted) => break accepted?.0,
                Err(_) => continue,
            }
        };
        stream.set_nonblocking(false)?;
        handover::collect(move || Ok(stream))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(%error, "the lazy-pages socket");
        }
    }
}
