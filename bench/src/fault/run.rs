//! One move of the toucher.

use std::fmt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tests::latency::Percentiles;
use tests::pair::{self, PairPlan};
use tests::path::{Lateness, Path, PathSpec};
use tests::record::Latency;
use tests::rig::Rig;
use tests::touch::{Pattern, TouchPlan, Touched, Toucher};

use super::{Case, FaultOptions, Setting};
use crate::memory;
use crate::peer::{Moved, Mover};
use crate::programs::{self, Side};
use crate::quiet::{self, Disturbance, Use};
use crate::runs::Recorded;
use crate::watch::{Cost, Watch};

/// A page of the workload.
const PAGE_BYTES: u64 = 4096;
/// A move without push never ends by itself; its touches take no longer than this.
const PATIENCE: Duration = Duration::from_secs(120);

/// What one run gave.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Run {
    /// Its kind.
    pub case: Case,
    /// What it has in common with others.
    #[serde(flatten)]
    pub setting: Setting,
    /// The seed that gives the same contents and order again.
    pub seed: u64,
    /// The longest time without an instruction of the workload.
    pub cutover_ms: f64,
    /// Waits for pages, as the workload felt them.
    pub waits: Percentiles,
    /// Waits by powers of two of nanoseconds.
    pub waits_log2: Vec<u64>,
    /// From reading a fault to its page being in place, as lazy-restorer counts it; what the workload waited beyond
    /// is the time until it got a CPU again.
    pub served: Option<Latency>,
    /// What the destination's kernel took each time to put pages in place, one for a fault and up to 16 of a push. Far more
    /// than a microsecond a page says that memory was cold.
    #[serde(default)]
    pub installs: Option<Latency>,
    /// Pages touched until the last wait.
    pub touches: u64,
    /// Of these, waited for.
    pub faults: u64,
    /// Pages per second at which the workload got on until its last wait.
    pub touches_per_s: f64,
    /// MiB/s of memory that arrived, without what faults asked for.
    pub bulk_mib_s: Option<f64>,
    /// What the path carried meanwhile, MiB/s, faults and all.
    pub wire_mib_s: Option<f64>,
    /// Microseconds of CPU of each program for a fault while nothing is pushed, source first: between the move and the
    /// last touch, so without what every move costs.
    pub cpu_us_per_fault: Option<[f64; 2]>,
    /// From the first command to the end of both programs.
    pub total_ms: Option<f64>,
    /// Bytes the source sent over bytes of memory.
    pub wire_over_memory: f64,
    /// The part of the machine's CPUs that others used meanwhile.
    pub used_by_others: f64,
    /// What the source spent.
    pub source: Cost,
    /// What the destination spent.
    pub destination: Cost,
    /// How punctual an emulated path was.
    pub lateness: Option<Lateness>,
}

impl Recorded for Run {
    const KIND: &'static str = "fault-run";
}

/// Moves a toucher as `case` tells, again if others disturb it.
pub fn measure(case: Case, spec: &PathSpec, options: &FaultOptions, seed: u64) -> Result<Run> {
    quiet::measure(|| make(case, spec, options, seed), Run::disturbance)
}

fn make(case: Case, spec: &PathSpec, options: &FaultOptions, seed: u64) -> Result<Run> {
    let rig = Rig::new()?;
    let path = Path::lay(&rig, *spec)?;
    let plan = TouchPlan {
        mib: options.memory,
        seed,
        pattern: case.pattern,
        rate: options.rate,
    };
    let toucher = Toucher::start(&rig, plan)?;
    memory::warm(options.memory + options.memory / 4)?;
    let mut mover = Mover::prepare(case.peer, &rig)?;
    mover.set_udp_payload(options.udp_payload);
    let before = Use::now(&rig);
    let watch = Watch::start(&rig)?;
    let went = if case.push {
        Went::pushed(&mover.go(&rig, toucher.pid())?)
    } else {
        stay_idle(&mover, &rig, &toucher, options)?
    };
    let watched = watch.end()?;
    let used_by_others = Use::now(&rig).by_others_since(before);
    let touched = toucher.report()?;
    let moved_at = toucher.board.moved_ns.load(Ordering::Relaxed);
    let memory = options.memory << 20;
    let rate = watched.rate(moved_at, memory, touched.faults * PAGE_BYTES);
    let rate = rate.filter(|_| case.push);
    let run = Run {
        bulk_mib_s: rate.map(|rate| mib(rate.memory)),
        wire_mib_s: rate.map(|rate| mib(rate.wire)),
        wire_over_memory: watched.bytes().sent as f64 / memory as f64,
        used_by_others,
        lateness: path.lateness(),
        source: watched.cost(Side::Source),
        destination: watched.cost(Side::Destination),
        ..Run::of(case, options.setting(spec), seed, &went, &touched)
    };
    // Whatever it has not touched yet must be right as well. Without a push it would wait for it forever.
    if case.push && options.rate == 0 {
        toucher.finish()?;
    }
    Ok(run)
}

/// What is known of a move from who made it.
#[derive(Debug, Default)]
struct Went {
    total: Option<Duration>,
    served: Option<Latency>,
    installs: Option<Latency>,
    cpu_us_per_fault: Option<[f64; 2]>,
}

impl Went {
    fn pushed(moved: &Moved) -> Self {
        let ours = moved.ours.as_ref();
        Self {
            total: Some(moved.total),
            served: ours.map(|ours| ours.destination.faults.latency_us),
            installs: ours.map(|ours| ours.destination.install_us),
            cpu_us_per_fault: None,
        }
    }
}

/// Serves faults and nothing else until enough pages were touched.
fn stay_idle(mover: &Mover, rig: &Rig, toucher: &Toucher, options: &FaultOptions) -> Result<Went> {
    let Mover::Ours(plan) = mover else {
        anyhow::bail!("only ours can be kept from pushing");
    };
    let mut plan: PairPlan = (**plan).clone();
    plan.restorer.push("--no-push".into());
    let server = plan.start_server(rig, toucher.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    toucher.wait_until_moved(PATIENCE)?;
    let ends = [server.process.pid(), restorer.process.pid()];
    let spent = || ends.map(programs::cpu_ns);
    let faults = || toucher.board.faults.load(Ordering::Relaxed);
    let (faults_before, spent_before) = (faults(), spent());
    ensure!(
        toucher.wait_for_touches(options.idle_touches, PATIENCE),
        "the workload does not get on without a push"
    );
    let (more, spent) = (faults() - faults_before, spent());
    toucher.stop()?;
    // Nothing is left to be served once the workload has ended.
    let ended = restorer.process.wait(pair::PATIENCE)?;
    ensure!(
        ended.success(),
        "lazy-restorer, {ended}: {}",
        restorer.process.stderr()
    );
    let per_fault = |end: usize| (spent[end] - spent_before[end]) as f64 / 1e3 / more as f64;
    let record = restorer.record()?;
    Ok(Went {
        total: None,
        served: Some(record.faults.latency_us),
        installs: Some(record.install_us),
        cpu_us_per_fault: (more > 0).then(|| [per_fault(0), per_fault(1)]),
    })
}

impl Run {
    fn of(case: Case, setting: Setting, seed: u64, went: &Went, touched: &Touched) -> Self {
        let missing_for = touched.missing_for.as_secs_f64();
        Self {
            case,
            setting,
            seed,
            cutover_ms: touched.cutover.as_secs_f64() * 1e3,
            waits: touched.waits.percentiles(),
            waits_log2: touched.waits.by_power_of_two(),
            served: went.served,
            installs: went.installs,
            touches: touched.touches_while_missing,
            faults: touched.faults,
            touches_per_s: touched.touches_while_missing as f64 / missing_for.max(1e-9),
            bulk_mib_s: None,
            wire_mib_s: None,
            cpu_us_per_fault: went.cpu_us_per_fault,
            total_ms: went.total.map(|total| total.as_secs_f64() * 1e3),
            wire_over_memory: 0.0,
            used_by_others: 0.0,
            source: Cost::default(),
            destination: Cost::default(),
            lateness: None,
        }
    }

    /// What kept it from being what it was to be.
    pub fn disturbance(&self) -> Disturbance {
        Disturbance {
            by_others: self.used_by_others,
            late: self.lateness.map_or(0.0, Lateness::part),
        }
    }

    /// Percent of touched pages that were waited for, while pages were missing.
    pub fn network_faults(&self) -> Option<f64> {
        (self.touches > 0).then(|| self.faults as f64 * 100.0 / self.touches as f64)
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}: ", self.case.peer, self.case.title())?;
        write!(f, "cutover {:.0} ms", self.cutover_ms)?;
        if self.case.pattern != Pattern::Still {
            let waits = self.waits;
            write!(f, ", {} waits", waits.count)?;
            write!(
                f,
                ", p50 {:.0} us, p99 {:.0} us",
                waits.p50_us, waits.p99_us
            )?;
        }
        if let Some(rate) = self.bulk_mib_s {
            write!(f, ", {rate:.0} MiB/s")?;
        }
        self.total_ms
            .map_or(Ok(()), |total| write!(f, ", total {total:.0} ms"))
    }
}

fn mib(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}
