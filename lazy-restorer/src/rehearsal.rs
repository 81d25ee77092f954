//! What the operator wants with first touches: record them for the next time, or have them pushed in a recorded order.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::images::ImagePid;
use common::page::PageRange;
use common::proto::credit::WantedRun;
use common::proto::version;
use tokio::time::Instant;

use crate::touches::Touches;

/// The operator's wishes.
#[derive(Clone, Debug, Default)]
pub struct RehearsalPlan {
    /// Where to record first touches.
    pub record: Option<PathBuf>,
    /// How long to let nothing be pushed while they are recorded: a page that is there causes no fault.
    pub hold: Duration,
    /// The order to push in.
    pub replay: Option<Touches>,
}

/// One migration's part in it.
#[derive(Debug, Default)]
pub struct Rehearsal {
    record: Option<(PathBuf, Recorder)>,
    hold: Duration,
    push_at: Option<Instant>,
    wanted: Vec<WantedRun>,
}

/// Notes what is asked for.
#[derive(Clone, Debug)]
pub struct Recorder(Arc<Mutex<Touches>>);

/// What comes before the first credit.
#[derive(Debug)]
pub struct Prelude {
    /// No credit before.
    pub push_at: Instant,
    /// The order to push in.
    pub wanted: Vec<WantedRun>,
}

impl Rehearsal {
    /// For a tree whose processes have these PIDs in the images, parents first.
    pub fn new(plan: &RehearsalPlan, pids: &[ImagePid]) -> Self {
        let touches = || Recorder(Arc::new(Mutex::new(Touches::new(pids.to_vec()))));
        let wanted = plan.replay.as_ref().map(|touches| touches.runs_for(pids));
        if let Some(None) = wanted {
            eprintln!(
                "lazy-restorer: the record of touches is of a tree with other processes; it is not used"
            );
        }
        Rehearsal {
            record: plan.record.clone().map(|file| (file, touches())),
            hold: plan.hold,
            push_at: None,
            wanted: wanted.flatten().unwrap_or_default(),
        }
    }

    /// Who notes requests, if they are recorded.
    pub fn recorder(&self) -> Option<Recorder> {
        self.record.as_ref().map(|(_, recorder)| recorder.clone())
    }

    /// What comes before the credit of a new link. The wanted order is said once: a source that was told keeps it.
    pub fn prelude(&mut self, version: u16) -> Prelude {
        let hold = match self.record {
            Some(_) => self.hold,
            None => Duration::ZERO,
        };
        let wanted = std::mem::take(&mut self.wanted);
        let is_understood = version >= version::V2;
        if !wanted.is_empty() && !is_understood {
            tracing::warn!("this source does not take an order; it pushes in its own");
        }
        Prelude {
            push_at: *self.push_at.get_or_insert_with(|| Instant::now() + hold),
            wanted: if is_understood { wanted } else { Vec::new() },
        }
    }

    /// The workload is whole: keeps the record.
    pub fn finish(self) {
        let Some((file, recorder)) = self.record else {
            return;
        };
        if let Err(error) = recorder.lock().write(&file) {
            eprintln!(
                "lazy-restorer: cannot write the record of touches to {}: {error}",
                file.display()
            );
        }
    }
}

impl Recorder {
    /// Pages were asked for.
    pub fn note(&self, pid: ImagePid, pages: PageRange) {
        self.lock().note(pid, pages);
    }

    fn lock(&self) -> MutexGuard<'_, Touches> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
