//! The workload while it stands still: held by CRIU, with a book on its memory.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::images::{DumpedProcess, ImagePid, ReadImagesError, read_processes};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::adopt::{Adopted, Left};
use crate::book::{Book, FirstPages, owed};
use crate::freeze::{FreezeError, FreezePlan, Frozen};
use crate::memory::{FrozenProcesses, MemoryError, PageSource};
use crate::pending::Pending;
use crate::workload::Workload;

/// A frozen workload that can be served.
#[derive(Debug)]
pub struct FrozenWorkload {
    /// CRIU's hold on it.
    pub hold: Hold,
    /// Where page content comes from.
    pub source: Arc<dyn PageSource>,
    /// What is owed.
    pub book: Arc<Book>,
    /// Where the images are.
    images: PathBuf,
}

/// Who has CRIU hold the workload.
#[derive(Debug)]
pub enum Hold {
    /// This program, in a directory that goes away with the migration.
    Ours(Box<Frozen>, TempDir),
    /// A `page-server` before us did; we have taken over from it.
    Adopted(Adopted),
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
        let plan = frozen.plan();
        match open(&plan.images(), &plan.workload) {
            Ok((source, pending, first)) => Ok(FrozenWorkload {
                images: plan.images(),
                hold: Hold::Ours(Box::new(frozen), directory),
                source: Arc::new(source),
                book: Arc::new(Book::new(pending, &first.eager, &first.hot)),
            }),
            Err(error) => {
                if let Err(error) = frozen.thaw().await {
                    tracing::error!(%error, "the workload may still be frozen");
                }
                Err(error)
            }
        }
    }

    /// Takes the workload over that a killed `page-server` left frozen; what it sent is not known.
    pub async fn adopt(left: Left) -> Result<Self, TakeError> {
        let images = left.images();
        let (source, mut pending, first) = open(&images, &Workload::frozen(left.root))?;
        pending.forget();
        Ok(FrozenWorkload {
            hold: Hold::Adopted(left.adopt().await?),
            source: Arc::new(source),
            book: Arc::new(Book::new(pending, &[], &first.hot)),
            images,
        })
    }

    /// CRIU's hold, when it is this program that has it.
    pub fn ours(&mut self) -> Option<&mut Frozen> {
        match &mut self.hold {
            Hold::Ours(frozen, _) => Some(frozen),
            Hold::Adopted(_) => None,
        }
    }

    /// Where the images are.
    pub fn images(&self) -> PathBuf {
        self.images.clone()
    }

    /// Lets the workload run on here.
    pub async fn thaw(self) -> Result<(), FreezeError> {
        match self.hold {
            Hold::Ours(frozen, _directory) => frozen.thaw().await,
            Hold::Adopted(adopted) => adopted.thaw().await,
        }
    }

    /// Kills the frozen original.
    pub async fn release(self) -> Result<(), FreezeError> {
        match self.hold {
            Hold::Ours(frozen, _directory) => frozen.release().await,
            Hold::Adopted(adopted) => adopted.release().await,
        }
    }
}

/// Opens the memory of a frozen workload; returns what is owed of it, and which pages come first.
fn open(
    images: &Path,
    workload: &Workload,
) -> Result<(FrozenProcesses, Pending, FirstPages), TakeError> {
    let dumped = read_processes(images)?;
    let pids = workload.by_image_pid();
    let source = FrozenProcesses::open(located(&dumped, &pids)?)?;
    let (pending, first) = owed(&dumped);
    Ok((source, pending, first))
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
