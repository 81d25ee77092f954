//! The operator's directories, in both passes.

use common::exit::{Failure, SessionError};
use tokio::time::timeout;

use super::{EXPLANATION, Migration, interrupted, until};
use crate::connect::Source;
use crate::files::{FilesError, Pass};

impl Migration<'_> {
    /// Makes the operator's directories equal to the source's. What the source says meanwhile waits.
    pub(super) async fn bring_files(
        &mut self,
        source: &mut Source,
        pass: Pass,
    ) -> Result<(), SessionError> {
        let plan = self.plan;
        let bulk = source.bulk.clone();
        let brought = self.while_files_come(plan.files.pass(&bulk, pass)).await?;
        match brought {
            Ok(brought) => {
                match pass {
                    Pass::First => self.record.files.first = brought.counts,
                    Pass::Last => self.record.files.last = brought.counts,
                }
                self.brought = brought;
                Ok(())
            }
            Err(error) => Err(self.files_failed(source, error).await),
        }
    }

    /// Waits until it is certain that all files of the last pass are as on the source.
    pub(super) async fn settle_files(&mut self, source: &mut Source) -> Result<(), SessionError> {
        let mut brought = std::mem::take(&mut self.brought);
        match self.while_files_come(brought.settle()).await? {
            Ok(()) => Ok(()),
            Err(error) => Err(self.files_failed(source, error).await),
        }
    }

    async fn while_files_come<T>(
        &mut self,
        coming: impl Future<Output = T>,
    ) -> Result<T, SessionError> {
        let (state, limit) = (self.state(), self.plan.freeze_limit);
        tokio::select! {
            come = coming => Ok(come),
            () = until(self.thaw_by) => Err(SessionError::new(Failure::Restore, state, limit.exceeded())),
            name = self.stop.wait() => Err(interrupted(state, name)),
        }
    }

    /// That they did not come is best explained by what the source says about it.
    async fn files_failed(&mut self, source: &mut Source, error: FilesError) -> SessionError {
        match timeout(EXPLANATION, self.next(source)).await {
            Ok(Err(reason)) if reason.failure == Failure::Peer => reason,
            _ => self.fail(Failure::Restore, error),
        }
    }

    /// What fails when files are missing fails because of that.
    pub(super) async fn explained_by_files(
        &mut self,
        source: &mut Source,
        error: SessionError,
    ) -> SessionError {
        match error.failure {
            Failure::Restore => self.settle_files(source).await.err().unwrap_or(error),
            _ => error,
        }
    }
}
