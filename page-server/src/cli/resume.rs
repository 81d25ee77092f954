//! The command line of `resume`, and the plan that a session file makes of it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use common::criu::Criu;
use common::exit::{Failure, SessionError};
use common::identity::{Fingerprint, Identity};
use common::lost::Limit;
use common::proto::version::V3;
use common::quic::PathProfile;
use common::session::State;
use common::session_file::{
    FrozenTasks, Original, Remembered, SessionFile, SourceSide, Standing, Store,
};
use nix::unistd::Pid;

use super::{Lost, StateDirectory, trust};
use crate::compression::Mode;
use crate::engine::Engine;
use crate::external::ExternalPlan;
use crate::listen::ListenPlan;
use crate::offer::Dumped;
use crate::privileges::check_host;
use crate::session::ServePlan;
use crate::workload::Workload;

/// Options of `resume`.
#[derive(Debug, Args)]
pub struct Resume {
    /// Where sessions are.
    #[command(flatten)]
    state: StateDirectory,
    /// The session, or how its name begins
    #[arg(long, value_name = "ID")]
    session: String,
    #[command(flatten)]
    lost: Lost,
    /// Write a record of the rest of the migration to this file, as one JSON object
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

impl Resume {
    /// Finds the session and makes sure that it may be gone on with.
    pub fn plan(&self) -> Result<Resumption, SessionError> {
        let fail = |failure, error: &dyn std::fmt::Display| {
            SessionError::new(failure, State::Paused, error)
        };
        check_host()?;
        let store = self.state.store();
        let file = store.find(&self.session);
        let file = file.map_err(|error| fail(Failure::BadInput, &error))?;
        match file.standing() {
            Standing::Orphaned => {}
            standing => {
                let text = format!(
                    "session {} cannot be gone on with: it is {standing}",
                    file.id
                );
                return Err(fail(Failure::BadInput, &text));
            }
        }
        let source = file
            .source()
            .ok_or_else(|| fail(Failure::BadInput, &"this is no session of a source"))?;
        if source.version < V3 {
            let text = "the destination's release cannot tell a successor what it has; `thaw` can let the original run";
            return Err(fail(Failure::BadInput, &text));
        }
        match &source.original {
            Original::Frozen(frozen) => {
                let plan = self.plan_of(&file, source, frozen, store)?;
                Ok(Resumption::Ours(Box::new((plan, file))))
            }
            Original::Foreign(frozen, images) => {
                let root = Pid::from_raw(frozen.root.pid);
                let plan = self.external(&file, images, Some(root), vec![file.clone()], store)?;
                Ok(Resumption::External(Box::new(plan)))
            }
            Original::Images(images) => {
                let together = together(&file, &store);
                let plan = self.external(&file, images, None, together, store)?;
                Ok(Resumption::External(Box::new(plan)))
            }
        }
    }

    fn external(
        &self,
        file: &SessionFile,
        images: &str,
        attach_to: Option<Pid>,
        left: Vec<SessionFile>,
        store: Store,
    ) -> Result<ExternalPlan, SessionError> {
        Ok(ExternalPlan {
            images: PathBuf::from(images),
            attach_to,
            dumped: Dumped::default(),
            fan_out: left.len(),
            keep_original: left
                .iter()
                .filter_map(SessionFile::source)
                .any(|source| source.makes_clones),
            listen: listen_again(file)?,
            wait: None,
            token: None,
            work_dir: None,
            ready: |address| println!("listening on {address}"),
            lost: self.lost.plan(),
            remembered: remembered_by(file, store),
            left,
        })
    }

    fn plan_of(
        &self,
        file: &SessionFile,
        source: &SourceSide,
        frozen: &FrozenTasks,
        store: Store,
    ) -> Result<ServePlan, SessionError> {
        let fail = |failure, error: &dyn std::fmt::Display| {
            SessionError::new(failure, State::Paused, error)
        };
        let criu = Criu::find(Some(Path::new(&source.criu_program)))
            .map_err(|error| fail(Failure::BadInput, &error))?;
        Ok(ServePlan {
            // Whoever called CRIU, it is CRIU's script that we talk to now.
            engine: Engine::Criu,
            workload: Workload::frozen(Pid::from_raw(frozen.root.pid)),
            listen: listen_again(file)?,
            criu,
            criu_args: Vec::new(),
            tcp_established: false,
            shell_job: false,
            wait: None,
            token: None,
            compress: Mode::default(),
            files: Arc::default(),
            addresses: Vec::new(),
            work_dir: None,
            on_frozen: None,
            on_thawed: source.on_thawed.clone(),
            freeze_limit: Limit::default(),
            lost: self.lost.plan(),
            remembered: remembered_by(file, store),
        })
    }
}

/// What `resume` goes on with.
#[derive(Debug)]
pub enum Resumption {
    /// A workload that we froze.
    Ours(Box<(ServePlan, SessionFile)>),
    /// Somebody else's dump.
    External(Box<ExternalPlan>),
}

/// The session of `file`, and all others of its program: they have one port.
fn together(file: &SessionFile, store: &Store) -> Vec<SessionFile> {
    let entries = store.list().unwrap_or_default().into_iter();
    let files = entries.filter_map(|entry| entry.file.ok());
    let others = files
        .filter(|other| other.program == file.program && other.standing() == Standing::Orphaned);
    others.collect()
}

fn remembered_by(file: &SessionFile, store: Store) -> Remembered {
    Remembered {
        store,
        identity: PathBuf::from(&file.identity),
        accept: file.accept.clone(),
    }
}

/// The ports where the destination looks, and the identity it knows.
fn listen_again(file: &SessionFile) -> Result<ListenPlan, SessionError> {
    let fail =
        |failure, error: &dyn std::fmt::Display| SessionError::new(failure, State::Paused, error);
    let source = file
        .source()
        .ok_or_else(|| fail(Failure::BadInput, &"this is no session of a source"))?;
    let identity = Identity::load(Path::new(&file.identity))
        .map_err(|error| fail(Failure::Identity, &error))?;
    let accept = file.accept.iter().map(|text| text.parse());
    let accept = accept.collect::<Result<Vec<Fingerprint>, _>>();
    let accept = accept.map_err(|error| fail(Failure::Identity, &error))?;
    Ok(ListenPlan {
        fault: source.fault,
        bulk: source.bulk,
        identity,
        trust: trust(&accept),
        path: PathProfile { mtu: file.mtu },
    })
}
