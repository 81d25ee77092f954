//! Who moves the workload, all through the same door.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::unistd::Pid;
use serde::Serialize;
use tests::binaries;
use tests::criu_baseline::{self, BaselineHome};
use tests::pair::{Migration, PairPlan};
use tests::rig::Rig;

/// Those that can move a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Peer {
    /// CRIU's own lazy-pages over plain TCP.
    Criu,
    /// `page-server` and `lazy-restorer`.
    Ours,
}

impl Peer {
    /// What tables call it.
    pub fn title(self) -> &'static str {
        match self {
            Self::Criu => "CRIU lazy-pages (TCP)",
            Self::Ours => "ours (QUIC, TLS 1.3)",
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Criu => "criu",
            Self::Ours => "ours",
        })
    }
}

/// A peer made ready; what can be done before a move is not part of it.
#[derive(Debug)]
pub enum Mover {
    /// CRIU.
    Criu(BaselineHome, PathBuf),
    /// Ours.
    Ours(Box<PairPlan>),
}

/// A move that succeeded.
#[derive(Debug)]
pub struct Moved {
    /// From the first command until both ends are gone.
    pub total: Duration,
    /// Our own records, if we moved it.
    pub ours: Option<Migration>,
}

impl Mover {
    /// Makes `peer` ready for a move on `rig`.
    pub fn prepare(peer: Peer, rig: &Rig) -> Result<Self> {
        Ok(match peer {
            Peer::Criu => Self::Criu(BaselineHome::new(rig)?, binaries::criu()?),
            Peer::Ours => Self::Ours(Box::new(PairPlan::new(rig)?)),
        })
    }

    /// Tells our programs how large a packet the path carries.
    pub fn set_udp_payload(&mut self, bytes: Option<u16>) {
        if let (Self::Ours(plan), Some(bytes)) = (self, bytes) {
            for options in [&mut plan.server, &mut plan.restorer] {
                options.extend(["--mtu".into(), bytes.to_string().into()]);
            }
        }
    }

    /// Moves the tree under `pid`, from beginning to end.
    pub fn go(&self, rig: &Rig, pid: Pid) -> Result<Moved> {
        let started = Instant::now();
        let ours = match self {
            Self::Criu(home, criu) => {
                criu_baseline::migrate(rig, home, criu, pid)?;
                None
            }
            Self::Ours(plan) => Some(plan.migrate(rig, pid)?),
        };
        let total = ours
            .as_ref()
            .map_or_else(|| started.elapsed(), |ours| ours.total);
        Ok(Moved { total, ours })
    }
}
