//! What is moved: a redis under a client, or a toucher.

use std::fmt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tests::latency::Percentiles;
use tests::process::Process;
use tests::pulse::{Pulse, wall_ns};
use tests::rig::Rig;
use tests::touch::{Pattern, TouchPlan, Toucher};
use tests::wait::wait_until;
use tests::{binaries, redis, shared_file};

use crate::load::{Load, LoadPlan};

/// Commands answered before a move: half a second at the usual rate.
const REPLIES_BEFORE: u64 = 2000;
/// The client goes on for so long after a move, so that it is seen whether its throughput is back.
const AFTER: Duration = Duration::from_secs(2);
/// How long the heartbeat may take to show a sign of life.
const PATIENCE: Duration = Duration::from_secs(60);

/// The kinds of workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A redis whose client asks for every key equally often.
    Redis,
    /// A redis whose client asks for some keys far more often than for others.
    RedisZipf,
    /// A process that touches each page once, in an order nobody can guess.
    Touch,
    /// A process that touches each page once, from the first to the last.
    Scan,
    /// A process that touches nothing.
    Still,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Redis => "redis",
            Self::RedisZipf => "redis-zipf",
            Self::Touch => "touch",
            Self::Scan => "scan",
            Self::Still => "still",
        })
    }
}

/// A workload to start.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Its kind.
    pub kind: Kind,
    /// Its memory.
    pub mib: u64,
    /// The seed of its contents.
    pub seed: u64,
    /// Commands of redis' client per second, or touches; 0 for as many as possible.
    pub rate: u32,
}

/// A running workload.
#[derive(Debug)]
pub enum Workload {
    /// Redis, beside a heartbeat.
    Redis {
        /// The heartbeat at the root of the tree.
        process: Process,
        /// What it says.
        pulse: &'static Pulse,
        /// The client.
        load: Load,
    },
    /// A toucher.
    Touch(Toucher),
}

/// What the workload and its clients felt of a move.
#[derive(Debug, Clone, Default)]
pub struct Felt {
    /// The longest time without an instruction of the workload.
    pub cutover: Duration,
    /// The longest time the client waited for an answer.
    pub client_gap: Option<Duration>,
    /// From the first bad moment until the work gets on as before.
    pub brownout: Option<Duration>,
    /// When the workload ran again (`wall_ns`).
    pub moved_ns: u64,
    /// Waits for pages, where the workload can tell.
    pub waits: Option<Percentiles>,
    /// The same by powers of two of nanoseconds.
    pub waits_log2: Vec<u64>,
    /// Pages touched per second while pages were missing.
    pub touches_per_s: Option<f64>,
    /// Percent of touched pages that were waited for.
    pub network_faults: Option<f64>,
}

impl Workload {
    /// Starts it on the source of `rig` and returns when its memory is filled.
    pub fn start(rig: &Rig, plan: Plan) -> Result<Self> {
        let pattern = match plan.kind {
            Kind::Redis | Kind::RedisZipf => return Self::start_redis(rig, plan),
            Kind::Touch => Pattern::Random,
            Kind::Scan => Pattern::Scan,
            Kind::Still => Pattern::Still,
        };
        let plan = TouchPlan {
            mib: plan.mib,
            seed: plan.seed,
            pattern,
            rate: plan.rate.into(),
        };
        Toucher::start(rig, plan).map(Self::Touch)
    }

    fn start_redis(rig: &Rig, plan: Plan) -> Result<Self> {
        let file = rig.folder().join("pulse");
        let pulse = shared_file::map(&file)?;
        let mut command = rig.source.command("setsid");
        command.arg(binaries::program("pulse")?).arg(&file);
        // The root of the tree has made the session already.
        let words = redis::arguments(&rig.make_folder("redis")?);
        command.args(words.iter().skip(1));
        let process = Process::start_detached("pulse", &mut command)?;
        let load = LoadPlan {
            mib: plan.mib,
            seed: plan.seed,
            rate: plan.rate,
            zipf: plan.kind == Kind::RedisZipf,
        };
        let address = rig.service.port(redis::PORT);
        Ok(Self::Redis {
            process,
            pulse,
            load: Load::start(rig.client.namespace(), address, load)?,
        })
    }

    /// The root of its tree on the source.
    pub fn pid(&self) -> Pid {
        match self {
            Self::Redis { process, .. } => process.pid(),
            Self::Touch(toucher) => toucher.pid(),
        }
    }

    /// Lets it run as it usually does, and forgets gaps of the time before.
    pub fn settle(&self) -> Result<()> {
        let Self::Redis { pulse, load, .. } = self else {
            return Ok(());
        };
        load.wait_for_replies(REPLIES_BEFORE)?;
        pulse.forget.store(1, Ordering::Relaxed);
        let forgot = || pulse.forget.load(Ordering::Relaxed) == 0;
        wait_until(PATIENCE, "the heartbeat", forgot)
    }

    /// Sees it through after the move, which began at `began` (`wall_ns`); everything it held must be as it was.
    pub fn end(self, began: u64) -> Result<Felt> {
        match self {
            Self::Redis { pulse, load, .. } => redis_felt(pulse, load, began),
            Self::Touch(toucher) => toucher_felt(&toucher),
        }
    }
}

fn redis_felt(pulse: &Pulse, load: Load, began: u64) -> Result<Felt> {
    let now = wall_ns();
    let beats = || pulse.last_ns.load(Ordering::Relaxed) > now;
    wait_until(PATIENCE, "the heartbeat after the move", beats)?;
    let foreign = pulse.foreign_ticks.load(Ordering::Relaxed);
    ensure!(foreign == 0, "two copies of the workload ran");
    std::thread::sleep(AFTER);
    let cutover = pulse.longest_gap_ns.load(Ordering::Relaxed);
    let frozen = pulse.longest_gap_from_ns.load(Ordering::Relaxed);
    let timeline = load.end()?;
    Ok(Felt {
        cutover: Duration::from_nanos(cutover),
        client_gap: Some(timeline.longest()),
        brownout: timeline.brownout(began),
        moved_ns: frozen + cutover,
        ..Felt::default()
    })
}

fn toucher_felt(toucher: &Toucher) -> Result<Felt> {
    let moved_ns = toucher.board.moved_ns.load(Ordering::Relaxed);
    toucher.finish()?;
    let touched = toucher.report()?;
    let share = touched.faults as f64 * 100.0 / touched.touches_while_missing.max(1) as f64;
    let speed = touched.touches_while_missing as f64 / touched.missing_for.as_secs_f64();
    let touches = touched.faults > 0;
    Ok(Felt {
        cutover: touched.cutover,
        client_gap: None,
        brownout: touches.then_some(touched.cutover + touched.missing_for),
        moved_ns,
        waits: touches.then(|| touched.waits.percentiles()),
        waits_log2: touched.waits.by_power_of_two(),
        touches_per_s: touches.then_some(speed),
        network_faults: touches.then_some(share),
    })
}
