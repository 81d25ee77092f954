//! The tasks that move memory, each on its own thread, and what becomes of them.

use common::proto::ProtoError;
use quinn::{ReadError, ReadExactError, WriteError};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::memory::MemoryError;
use crate::pending::PendingError;
use crate::skeleton::SkeletonError;

/// Failures that wait to be looked at: one for each task.
const FAILURES: usize = 4;

/// Why memory stops moving.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The connection broke; the control stream says of what.
    #[error("the connection broke")]
    Link,
    /// The destination broke the protocol.
    #[error("the destination broke the protocol: {0}")]
    Proto(#[from] ProtoError),
    /// It asked for what it cannot have.
    #[error(transparent)]
    Pending(#[from] PendingError),
    /// Frozen memory is lost.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// No memory for a compressor.
    #[error("cannot compress: {0}")]
    Compressor(std::io::Error),
    /// The skeleton cannot be sent.
    #[error(transparent)]
    Skeleton(#[from] SkeletonError),
}

impl TransferError {
    /// Whether the link, or the peer at its other end, ended it.
    pub fn is_of_link(&self) -> bool {
        matches!(
            self,
            TransferError::Link | TransferError::Skeleton(SkeletonError::Send(_))
        )
    }
}

impl From<WriteError> for TransferError {
    fn from(_: WriteError) -> Self {
        TransferError::Link
    }
}

impl From<ReadError> for TransferError {
    fn from(_: ReadError) -> Self {
        TransferError::Link
    }
}

impl From<ReadExactError> for TransferError {
    fn from(_: ReadExactError) -> Self {
        TransferError::Link
    }
}

/// Running tasks; they end when this is dropped.
#[derive(Debug)]
pub struct Transfer {
    tasks: JoinSet<()>,
    report: mpsc::Sender<TransferError>,
    failures: mpsc::Receiver<TransferError>,
}

impl Default for Transfer {
    fn default() -> Self {
        let (report, failures) = mpsc::channel(FAILURES);
        Transfer {
            tasks: JoinSet::new(),
            report,
            failures,
        }
    }
}

impl Transfer {
    /// Runs `task` on the thread of `thread`.
    pub fn spawn(
        &mut self,
        thread: &Handle,
        task: impl Future<Output = Result<(), TransferError>> + Send + 'static,
    ) {
        let report = self.report.clone();
        let reported = async move {
            match task.await {
                // What the link died of is the control stream's to report.
                Ok(()) | Err(TransferError::Link) => {}
                Err(error) => {
                    // Nobody listens when the session has ended.
                    let _ = report.send(error).await;
                }
            }
        };
        self.tasks.spawn_on(reported, thread);
    }

    /// Ends all tasks, and returns when none of them runs any more.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }

    /// The first failure that is not the link's. May be cancelled.
    pub async fn failed(&mut self) -> TransferError {
        match self.failures.recv().await {
            Some(error) => error,
            None => std::future::pending().await,
        }
    }
}
