//! The command line of `resume`, and the plan that a session file makes of it.

use std::path::{Path, PathBuf};

use clap::Args;
use common::exit::{Failure, SessionError};
use common::identity::{Fingerprint, Identity};
use common::lost::Limit;
use common::quic::PathProfile;
use common::session::State;
use common::session_file::{Remembered, SessionFile, Standing, Store};

use super::{Lost, StateDirectory, trust};
use crate::advise::Leniency;
use crate::connect::ConnectPlan;
use crate::engine::Engine;
use crate::files::Files;
use crate::rehearsal::RehearsalPlan;
use crate::session::MigratePlan;

/// Options of `resume`.
#[derive(Debug, Args)]
pub struct Resume {
    #[command(flatten)]
    state: StateDirectory,
    /// The session, or how its name begins
    #[arg(long, value_name = "ID")]
    session: String,
    #[command(flatten)]
    lost: Lost,
    /// For tests: fetch nothing but what the workload touches
    #[arg(long, hide = true)]
    no_push: bool,
    /// Leave transparent huge pages as the small pages they arrive as
    #[arg(long)]
    small_pages: bool,
    /// Write a record of the rest of the migration to this file, as one JSON object
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

impl Resume {
    /// Finds the session and makes sure that it may be gone on with.
    pub fn plan(&self) -> Result<(MigratePlan, SessionFile), SessionError> {
        let store = self.state.store();
        let file = store.find(&self.session);
        let file = file.map_err(|error| paused(Failure::BadInput, &error))?;
        match file.standing() {
            Standing::Orphaned => {}
            standing => {
                let text = format!(
                    "session {} cannot be gone on with: it is {standing}",
                    file.id
                );
                return Err(paused(Failure::BadInput, &text));
            }
        }
        let plan = self.plan_of(&file, store)?;
        Ok((plan, file))
    }

    fn plan_of(&self, file: &SessionFile, store: Store) -> Result<MigratePlan, SessionError> {
        let side = file
            .destination()
            .ok_or_else(|| paused(Failure::BadInput, &"this is no session of a destination"))?;
        let identity = Identity::load(Path::new(&file.identity))
            .map_err(|error| paused(Failure::Identity, &error))?;
        let accept: Vec<Fingerprint> = file
            .accept
            .iter()
            .map(|text| text.parse())
            .collect::<Result<_, _>>()
            .map_err(|error| paused(Failure::Identity, &error))?;
        Ok(MigratePlan {
            connect: ConnectPlan {
                source: side.source,
                identity,
                trust: trust(&accept),
                path: PathProfile { mtu: file.mtu },
                versions: vec![side.version],
                token: None,
            },
            criu: None,
            criu_args: Vec::new(),
            engine: Engine::Criu,
            leniency: Leniency::default(),
            push: !self.no_push,
            huge_pages: !self.small_pages,
            work_dir: None,
            pidfile: side.pidfile.as_ref().map(PathBuf::from),
            before_restore: None,
            on_resumed: side.on_resumed.clone(),
            on_aborted: None,
            rehearsal: RehearsalPlan::default(),
            files: Files::default(),
            addresses: side.addresses.clone(),
            freeze_limit: Limit::default(),
            lost: self.lost.plan(),
            remembered: Remembered {
                store,
                identity: PathBuf::from(&file.identity),
                accept: file.accept.clone(),
            },
        })
    }
}

fn paused(failure: Failure, error: &dyn std::fmt::Display) -> SessionError {
    SessionError::new(failure, State::Paused, error)
}
