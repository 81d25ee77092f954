//! Redis with a heartbeat beside it, and its client: both an inner and an outer view of a migration.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::process::Process;
use crate::pulse::{Pulse, wall_ns};
use crate::redis_client::{ClientPlan, RedisClient};
use crate::rig::Rig;
use crate::wait::wait_until;
use crate::{binaries, redis, shared_file};
use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;

/// How long the heartbeat may take to show a sign of life.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running tree: the heartbeat at its root, redis below.
#[derive(Debug)]
pub struct BeatingRedis {
    process: Process,
    pulse: &'static Pulse,
    /// The client of redis.
    pub client: RedisClient,
}

impl BeatingRedis {
    /// Starts the tree on the source and its client, and returns when redis is filled.
    pub fn start(rig: &Rig, plan: ClientPlan) -> Result<Self> {
        let file: PathBuf = rig.folder().join("pulse");
        let pulse = shared_file::map(&file)?;
        let mut command = rig.source.command("setsid");
        command.arg(binaries::program("pulse")?).arg(&file);
        // The root of the tree has made the session already.
        command.args(redis::arguments(&rig.make_folder("redis")?).iter().skip(1));
        let process = Process::start_detached("pulse", &mut command)?;
        let client =
            RedisClient::start(rig.client.namespace(), rig.service.port(redis::PORT), plan)?;
        Ok(Self {
            process,
            pulse,
            client,
        })
    }

    /// The root of the tree on the source.
    pub fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// Forgets gaps of the time before, such as those while redis was filled.
    pub fn forget_gaps(&self) -> Result<()> {
        self.pulse.forget.store(1, Ordering::Relaxed);
        wait_until(PATIENCE, "the heartbeat", || {
            self.pulse.forget.load(Ordering::Relaxed) == 0
        })
    }

    /// The workload runs, here or there: its heart beats, its client is answered, and there is one of it.
    pub fn assert_alive(&self) -> Result<()> {
        let ticks = || self.pulse.ticks.load(Ordering::Relaxed);
        let before = ticks();
        wait_until(PATIENCE, "the heart to beat", || ticks() > before + 10)?;
        self.client.wait_for_replies(100)?;
        self.assert_single()
    }

    fn assert_single(&self) -> Result<()> {
        let foreign = self.pulse.foreign_ticks.load(Ordering::Relaxed);
        ensure!(
            foreign == 0,
            "two copies of the workload ran at the same time ({foreign} ticks of the other)"
        );
        Ok(())
    }

    /// The longest time without an instruction of the workload, once it has resumed.
    pub fn longest_gap(&self) -> Result<Duration> {
        let now = wall_ns();
        let beats = || self.pulse.last_ns.load(Ordering::Relaxed) > now;
        wait_until(PATIENCE, "the heartbeat after the move", beats)
            .context("the workload does not run")?;
        self.assert_single()?;
        Ok(Duration::from_nanos(
            self.pulse.longest_gap_ns.load(Ordering::Relaxed),
        ))
    }
}
