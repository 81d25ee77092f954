//! A path of its own between source and destination, apart from the switch their clients use.
//!
//! The rig's hosts reach each other over a switch. [`Path::lay`] adds a second device to both and routes what they send
//! to each other over it, so a migration's traffic takes the path while clients keep the switch: shaped, long or lossy
//! paths delay the migration and not the clients, and the devices' counters count the migration and nothing else.

mod counters;
pub mod emulator;
mod link;
pub mod probe;
mod spec;
pub mod tun;

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::binaries;
use crate::host::Host;
use crate::process::Process;
use crate::rig::Rig;
use crate::shared_file;
use crate::shell::run_line;

pub use counters::{Bytes, DeviceCounters};
use emulator::PathCounters;
pub use spec::{Kind, PathSpec};

/// The device on both hosts.
pub const DEVICE: &str = "path0";
/// The emulator starts within this.
const PATIENCE: Duration = Duration::from_secs(10);
/// Packets the kernel keeps for the emulator: enough that none is ever dropped before the emulated queue.
const DEVICE_QUEUE: u32 = 50_000;
/// A token bucket holds this long at its rate: the longest the kernel takes to wake for more.
const BUCKET: Duration = Duration::from_micros(500);
/// One unit of segmentation offload must fit into the bucket.
const SMALLEST_BUCKET: u64 = 128 << 10;

/// A path that was laid; it ends with the rig, an emulated one when this is dropped.
#[derive(Debug)]
pub struct Path {
    /// What was asked for.
    pub spec: PathSpec,
    emulator: Option<Emulator>,
}

/// Packets of an emulated path.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lateness {
    /// All it took.
    pub packets: u64,
    /// Of these, delivered a millisecond late or more.
    pub late: u64,
}

impl Lateness {
    /// Late ones as a part of all.
    pub fn part(self) -> f64 {
        self.late as f64 / self.packets.max(1) as f64
    }
}

#[derive(Debug)]
struct Emulator {
    _process: Process,
    counters: &'static PathCounters,
}

impl Path {
    /// Lays the path between the two hosts of `rig`.
    pub fn lay(rig: &Rig, spec: PathSpec) -> Result<Self> {
        let emulator = match spec.kind() {
            Kind::Emulated => Some(Emulator::start(rig, &spec)?),
            Kind::Bare | Kind::Shaped => {
                plug_cable(&rig.source, &rig.destination)?;
                None
            }
        };
        for (host, other) in [
            (&rig.source, &rig.destination),
            (&rig.destination, &rig.source),
        ] {
            use_device(host, other, &spec)?;
        }
        Ok(Self { spec, emulator })
    }

    /// What the emulator did, if it is one.
    pub fn emulated(&self) -> Option<&'static PathCounters> {
        self.emulator.as_ref().map(|emulator| emulator.counters)
    }

    /// How punctual an emulated path was, both ways: with many late packets it was not what it claims.
    pub fn lateness(&self) -> Option<Lateness> {
        let counters = self.emulated()?;
        let sum = |of: fn(&emulator::Traffic) -> &AtomicU64| {
            [&counters.forth, &counters.back]
                .map(|traffic| of(traffic).load(Ordering::Relaxed))
                .iter()
                .sum()
        };
        Some(Lateness {
            packets: sum(|traffic| &traffic.packets),
            late: sum(|traffic| &traffic.late),
        })
    }
}

impl Emulator {
    fn start(rig: &Rig, spec: &PathSpec) -> Result<Self> {
        let folder = rig.make_folder("path")?;
        let file: PathBuf = folder.join("counters");
        let counters = shared_file::map(&file)?;
        let mut command = Command::new(binaries::program("path-emulator")?);
        command
            .args([rig.source.namespace(), rig.destination.namespace(), DEVICE])
            .arg(file)
            .arg(serde_json::to_string(spec)?);
        let mut process = Process::start("path-emulator", &folder, &mut command)?;
        process.wait_for_output(PATIENCE, "ready")?;
        Ok(Self {
            _process: process,
            counters,
        })
    }
}

fn plug_cable(source: &Host, destination: &Host) -> Result<()> {
    run_line(&format!(
        "ip -n {source} link add {DEVICE} type veth peer name {DEVICE} netns {destination}"
    ))
    .map(drop)
}

fn use_device(host: &Host, other: &Host, spec: &PathSpec) -> Result<()> {
    let mtu = spec.mtu;
    run_line(&format!(
        "ip -n {host} link set {DEVICE} mtu {mtu} txqueuelen {DEVICE_QUEUE} up"
    ))?;
    if let (Kind::Shaped, Some(rate)) = (spec.kind(), spec.rate) {
        shape(host, spec, rate)?;
    }
    let (here, there) = (host.address(), other.address());
    run_line(&format!(
        "ip -n {host} route add {there}/32 dev {DEVICE} src {here}"
    ))
    .context("cannot route over the path")?;
    Ok(())
}

/// Bytes that pass at once, after a rest.
fn bucket_bytes(rate: u64) -> u64 {
    ((rate as f64 / 8.0 * BUCKET.as_secs_f64()) as u64).max(SMALLEST_BUCKET)
}

fn shape(host: &Host, spec: &PathSpec, rate: u64) -> Result<()> {
    let bucket = bucket_bytes(rate);
    let queue = spec.queue_bytes();
    run_line(&format!(
        "tc -n {host} qdisc add dev {DEVICE} root tbf rate {rate}bit burst {bucket} limit {queue}"
    ))
    .map(drop)
}
