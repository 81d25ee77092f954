//! One move, and everything that was measured of it.

use std::fmt;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tests::latency::Percentiles;
use tests::path::{Bytes, Lateness, Path, PathSpec};
use tests::pulse::wall_ns;
use tests::rig::Rig;

use crate::memory;
use crate::peer::{Mover, Peer};
use crate::programs::{self, Side};
use crate::quiet::{self, Disturbance, Use};
use crate::runs::Recorded;
use crate::watch::{Cost, Watch};
use crate::workload::{Felt, Kind, Plan, Workload};

const GIB: f64 = (1_u64 << 30) as f64;
const MIB: f64 = (1_u64 << 20) as f64;

/// A move to be made.
#[derive(Debug, Clone, Copy)]
pub struct Order {
    pub peer: Peer,
    pub kind: Kind,
    pub path: PathSpec,
    pub mib: u64,
    pub rate: u32,
    pub udp_payload: Option<u16>,
    pub seed: u64,
}

/// A move that was made. Times are in milliseconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Run {
    pub peer: Peer,
    pub workload: Kind,
    pub path: String,
    pub memory_mib: u64,
    /// Commands or touches per second; 0 for as many as possible.
    pub rate: u32,
    pub seed: u64,
    /// The longest time without an instruction of the workload, measured inside it. Where pages come slowly that may be
    /// a wait for one.
    pub cutover_ms: f64,
    /// The longest time the client waited for an answer.
    pub client_gap_ms: Option<f64>,
    /// From the first bad moment of a client until its throughput is back to 90 % of before; of a toucher, from the
    /// freeze until its last wait.
    pub brownout_ms: Option<f64>,
    /// From the first command until the last page has arrived and both ends are gone.
    pub total_ms: f64,
    /// Anonymous memory of the workload before the move.
    pub resident_mib: f64,
    /// What the path carried, as the source's device counts it.
    pub wire: Bytes,
    /// Bytes the source sent over resident bytes.
    pub wire_over_resident: f64,
    /// Memory that arrived after the workload ran again, MiB/s.
    pub bulk_mib_s: Option<f64>,
    /// What the path carried meanwhile, MiB/s: less where memory is compressed.
    pub wire_mib_s: Option<f64>,
    pub source: Cost,
    pub destination: Cost,
    /// Seconds of CPU of both sides, exact.
    pub cpu_s: f64,
    /// The part of the machine's CPUs that others used meanwhile.
    pub used_by_others: f64,
    /// Programs that ended unseen, so that some of their CPU time is missing.
    pub unseen_ends: usize,
    /// Waits for pages, felt by the workload.
    pub waits: Option<Percentiles>,
    /// Waits by powers of two of nanoseconds.
    pub waits_log2: Vec<u64>,
    pub touches_per_s: Option<f64>,
    pub network_faults_percent: Option<f64>,
    /// How punctual an emulated path was.
    pub lateness: Option<Lateness>,
    /// What our two programs say of the move.
    pub records: Option<[tests::record::Record; 2]>,
}

impl Order {
    /// Makes the move, again if others disturb it.
    pub fn carry_out(&self) -> Result<Run> {
        quiet::measure(|| self.make(), Run::disturbance)
    }

    /// Makes the move on a rig of its own.
    fn make(&self) -> Result<Run> {
        let rig = Rig::new()?;
        let path = Path::lay(&rig, self.path)?;
        let workload = Workload::start(&rig, self.plan())?;
        memory::warm(self.mib + self.mib / 4)?;
        let mut mover = Mover::prepare(self.peer, &rig)?;
        mover.set_udp_payload(self.udp_payload);
        workload.settle()?;
        let resident = programs::resident_bytes(workload.pid()) as f64;
        let before = Use::now(&rig);
        let began = wall_ns();
        let watch = Watch::start(&rig)?;
        let moved = mover.go(&rig, workload.pid())?;
        let watched = watch.end()?;
        let used_by_others = Use::now(&rig).by_others_since(before);
        let felt = workload.end(began)?;
        let bytes = watched.bytes();
        // Nothing is moved after the workload runs again when it was stopped for all of it.
        let lazily = self.peer != Peer::StopAndCopy;
        let rate = watched.rate(felt.moved_ns, resident as u64, 0);
        let rate = rate.filter(|_| lazily);
        Ok(Run {
            total_ms: moved.total.as_secs_f64() * 1e3,
            resident_mib: resident / MIB,
            wire: bytes,
            wire_over_resident: bytes.sent as f64 / resident,
            bulk_mib_s: rate.map(|rate| rate.memory / MIB),
            wire_mib_s: rate.map(|rate| rate.wire / MIB),
            source: watched.cost(Side::Source),
            destination: watched.cost(Side::Destination),
            cpu_s: watched.cpu_s,
            used_by_others,
            unseen_ends: watched.unseen_ends(),
            lateness: path.lateness(),
            records: moved.ours.map(|ours| [ours.source, ours.destination]),
            ..self.felt(&felt)
        })
    }

    fn plan(&self) -> Plan {
        Plan {
            kind: self.kind,
            mib: self.mib,
            seed: self.seed,
            rate: self.rate,
        }
    }

    fn felt(&self, felt: &Felt) -> Run {
        let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
        Run {
            peer: self.peer,
            workload: self.kind,
            path: self.path.to_string(),
            memory_mib: self.mib,
            rate: self.rate,
            seed: self.seed,
            cutover_ms: ms(felt.cutover),
            client_gap_ms: felt.client_gap.map(ms),
            brownout_ms: felt.brownout.map(ms),
            total_ms: 0.0,
            resident_mib: 0.0,
            wire: Bytes::default(),
            wire_over_resident: 0.0,
            bulk_mib_s: None,
            wire_mib_s: None,
            source: Cost::default(),
            destination: Cost::default(),
            cpu_s: 0.0,
            used_by_others: 0.0,
            unseen_ends: 0,
            waits: felt.waits,
            waits_log2: felt.waits_log2.clone(),
            touches_per_s: felt.touches_per_s,
            network_faults_percent: felt.network_faults,
            lateness: None,
            records: None,
        }
    }
}

impl Recorded for Run {
    const KIND: &'static str = "move";
}

impl Run {
    /// What kept it from being what it was to be.
    pub fn disturbance(&self) -> Disturbance {
        Disturbance {
            by_others: self.used_by_others,
            late: self.lateness.map_or(0.0, Lateness::part),
        }
    }

    /// Seconds of CPU for each GiB of memory, when it was `cpu_s` for all of it.
    pub fn per_gib(&self, cpu_s: f64) -> f64 {
        cpu_s * GIB / (self.resident_mib * MIB)
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cutover {:.0} ms", self.cutover_ms)?;
        if let Some(gap) = self.client_gap_ms {
            write!(f, ", client's gap {gap:.0} ms")?;
        }
        if let Some(brownout) = self.brownout_ms {
            write!(f, ", brownout {brownout:.0} ms")?;
        }
        if let Some(rate) = self.bulk_mib_s {
            write!(f, ", {rate:.0} MiB/s")?;
        }
        write!(f, ", total {:.0} ms", self.total_ms)
    }
}
