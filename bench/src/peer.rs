//! Who moves the workload, all through the same door.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tests::criu_baseline::{self, BaselineHome};
use tests::identity::Identities;
use tests::pair::{Migration, PairPlan};
use tests::rig::Rig;
use tests::{binaries, stop_and_copy};

/// Those that can move a workload.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Peer {
    /// Full dump, copy, restore.
    StopAndCopy,
    /// CRIU's own lazy-pages over plain TCP.
    Criu,
    /// CRIU's own lazy-pages over TLS.
    CriuTls,
    /// `page-server` and `lazy-restorer`.
    Ours,
    /// The same, with `--compress never`.
    OursPlain,
}

impl Peer {
    /// What tables call it.
    pub fn title(self) -> &'static str {
        match self {
            Self::StopAndCopy => "stop and copy (TCP)",
            Self::Criu => "CRIU lazy-pages (TCP)",
            Self::CriuTls => "CRIU lazy-pages (TLS)",
            Self::Ours => "ours (QUIC, TLS 1.3)",
            Self::OursPlain => "ours, --compress never",
        }
    }

    /// Whether our programs move it.
    pub fn is_ours(self) -> bool {
        matches!(self, Self::Ours | Self::OursPlain)
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::StopAndCopy => "stop-and-copy",
            Self::Criu => "criu",
            Self::CriuTls => "criu-tls",
            Self::Ours => "ours",
            Self::OursPlain => "ours-plain",
        })
    }
}

/// A peer made ready; what can be done before a move is not part of it.
#[derive(Debug)]
pub enum Mover {
    /// CRIU, in one of its ways.
    Criu(Criu),
    /// Ours.
    Ours(Box<PairPlan>),
}

/// CRIU made ready.
#[derive(Debug)]
pub struct Criu {
    home: BaselineHome,
    program: PathBuf,
    stops: bool,
    tls: Option<Identities>,
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
        if peer.is_ours() {
            let mut plan = PairPlan::new(rig)?;
            if peer == Peer::OursPlain {
                plan.server.extend(["--compress".into(), "never".into()]);
            }
            return Ok(Self::Ours(Box::new(plan)));
        }
        let tls = match peer {
            Peer::CriuTls => Some(Identities::make(&rig.make_folder("identities")?)?),
            _ => None,
        };
        let program = binaries::criu()?;
        // What it finds out once is no part of a move.
        criu_baseline::network_lock(&program);
        Ok(Self::Criu(Criu {
            home: BaselineHome::new(rig)?,
            program,
            stops: peer == Peer::StopAndCopy,
            tls,
        }))
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
        // CRIU's dump is the same whoever asks for it.
        let _pipes = match self {
            Self::Criu(_) => None,
            Self::Ours(_) => Some(criu_baseline::large_pipes()?),
        };
        let started = Instant::now();
        let ours = match self {
            Self::Criu(criu) => {
                criu.go(rig, pid)?;
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

impl Criu {
    fn go(&self, rig: &Rig, pid: Pid) -> Result<()> {
        if self.stops {
            return stop_and_copy::migrate(rig, &self.home, &self.program, pid);
        }
        let tls = self.tls.as_ref();
        criu_baseline::migrate_with(rig, &self.home, &self.program, pid, tls).map(drop)
    }
}
