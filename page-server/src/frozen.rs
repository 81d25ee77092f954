//! The workload while it stands still: held by CRIU, with a book on its memory.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use common::images::{DumpedProcess, ImagePid, ReadImagesError, read_processes};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::book::Book;
use crate::freeze::{FreezeError, FreezePlan, Frozen};
use crate::memory::{FrozenProcesses, MemoryError, PageSource};

/// A frozen workload that can be served.
#[derive(Debug)]
pub struct FrozenWorkload {
    /// CRIU's hold on it.
    pub frozen: Frozen,
    /// Where page content comes from.
    pub source: Arc<dyn PageSource>,
    /// What is owed.
    pub book: Arc<Book>,
    /// Holds the images; goes away with the migration.
    _directory: TempDir,
}

/// Why there is no frozen workload to serve. The workload runs on as before.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// It could not be frozen.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// Its images cannot be used.
    #[error(transparent)]
    Images(#[from] ReadImagesError),
    /// Its memory cannot be read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A dumped process is not where we look for it.
    #[error("{0} is in the images but not among the descendants of the root process")]
    Missing(ImagePid),
}

impl FrozenWorkload {
    /// Freezes the workload and opens the book on its memory.
    pub async fn take(plan: FreezePlan, directory: TempDir) -> Result<Self, TakeError> {
        let frozen = plan.freeze().await?;
        match open(&frozen) {
            Ok((source, book)) => Ok(FrozenWorkload {
                frozen,
                source: Arc::new(source),
                book: Arc::new(book),
                _directory: directory,
            }),
            Err(error) => {
                if let Err(error) = frozen.thaw().await {
                    tracing::error!(%error, "the workload may still be frozen");
                }
                Err(error)
            }
        }
    }

    /// Where the images are.
    pub fn images(&self) -> PathBuf {
        self.frozen.plan().images()
    }

    /// Lets the workload run on here.
    pub async fn thaw(self) -> Result<(), FreezeError> {
        self.frozen.thaw().await
    }

    /// Kills the frozen original.
    pub async fn release(self) -> Result<(), FreezeError> {
        self.frozen.release().await
    }
}

fn open(frozen: &Frozen) -> Result<(FrozenProcesses, Book), TakeError> {
    let plan = frozen.plan();
    let dumped = read_processes(&plan.images())?;
    let pids = plan.workload.by_image_pid();
    let source = FrozenProcesses::open(located(&dumped, &pids)?)?;
    Ok((source, Book::of(&dumped)))
}

pub(crate) fn located(
    dumped: &[DumpedProcess],
    pids: &HashMap<ImagePid, Pid>,
) -> Result<Vec<(ImagePid, Pid)>, TakeError> {
    dumped
        .iter()
        .map(|process| {
            let pid = pids
                .get(&process.pid)
                .ok_or(TakeError::Missing(process.pid))?;
            Ok((process.pid, *pid))
        })
        .collect()
}
