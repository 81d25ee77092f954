//! Going on with the session of a `page-server` that was killed after the point of no return.

use common::exit::{Failure, SessionError};
use common::record::Phases;
use common::session::{Session, State};
use common::session_file::{Kept, SessionFile, Task};
use common::stop::StopSignal;

use super::{Migration, ServePlan};
use crate::adopt::{Left, LeftError};
use crate::destination::Acquaintance;
use crate::frozen::FrozenWorkload;
use crate::listen::Listen;
use crate::report::Record;

/// Takes the frozen workload over, waits for the destination and serves it to the end.
pub async fn resume(
    plan: &ServePlan,
    file: SessionFile,
    record: &mut Record,
) -> Result<(), SessionError> {
    let fail =
        |failure, error: &dyn std::fmt::Display| SessionError::new(failure, State::Paused, error);
    if file.state == State::Complete {
        return release(plan, file, record).await;
    }
    let stop = StopSignal::install().map_err(|error| fail(Failure::Internal, &error))?;
    let version = file.source().map_or(0, |source| source.version);
    let left = Left::find_untouched(&file).map_err(|error| fail(Failure::Lost, &error))?;
    let mut listen = Listen::open(&plan.listen).map_err(|error| fail(Failure::BadInput, &error))?;
    let adopted = FrozenWorkload::adopt(left).await;
    let workload = adopted.map_err(|error| fail(Failure::Lost, &error))?;
    println!("listening on {}", listen.fault.address());
    record.session = file.id.to_string();
    let known = Acquaintance {
        secret: file.secret.clone(),
        host: file.peer_host.clone(),
        version,
    };
    let mut migration = Migration {
        plan,
        id: file.id,
        session: Session::orphaned(),
        phases: Phases::start(State::Paused),
        stop,
        record,
        kept: Kept::taken_over(plan.remembered.store.clone(), file),
        thaw_by: None,
        refusal: None,
        agreed: None,
        gauge: listen.gauge.clone(),
        complaint: None,
        doorway: None,
        doors: Vec::new(),
    };
    let result = migration.go_on(&mut listen, &known, workload).await;
    migration.conclude(result)
}

/// Both ends had agreed that every page is there: nobody comes for the original any more, and it is released.
async fn release(
    plan: &ServePlan,
    file: SessionFile,
    record: &mut Record,
) -> Result<(), SessionError> {
    let fail =
        |error: &dyn std::fmt::Display| SessionError::new(Failure::Lost, State::Complete, error);
    match Left::find_to_kill(&file).await {
        Ok(left) => {
            let adopted = left.adopt().await.map_err(|error| fail(&error))?;
            adopted.release().await.map_err(|error| fail(&error))?;
        }
        // CRIU has killed it in the meantime, or was killed while it did.
        Err(LeftError::Gone(_)) => Left::kill_rest(&file),
        Err(error) => return Err(fail(&error)),
    }
    eprintln!(
        "page-server: the workload is whole on the destination; the frozen original was released"
    );
    record.session = file.id.to_string();
    record.conclude(&Ok(()));
    Kept::taken_over(plan.remembered.store.clone(), file).end();
    Ok(())
}

impl Migration<'_> {
    async fn go_on(
        &mut self,
        listen: &mut Listen,
        known: &Acquaintance,
        workload: FrozenWorkload,
    ) -> Result<(), SessionError> {
        let ours = Task::ourselves();
        let written = self.kept.change(|file| {
            file.state = State::Paused;
            file.program = ours.unwrap_or(file.program);
        });
        written.map_err(|error| self.fail(Failure::Internal, error))?;
        let found = self.find_again(listen, known, &workload, None).await?;
        self.serve_found(listen, workload, found).await
    }
}
