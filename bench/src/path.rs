//! `bench path`: lays paths and shows what the probes say of them. Nothing is measured over a path before that.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tests::path::probe::{self, Measured};
use tests::path::{Path, PathSpec};
use tests::rig::Rig;

use crate::runs::{Failure, Recorded, Runs};
use crate::table::Table;

/// A path and its probes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProbedPath {
    /// As it is written on the command line.
    pub path: String,
    /// What the probes found.
    pub measured: Measured,
    /// In which ways it is less than it claims.
    pub caveats: Vec<String>,
}

impl Recorded for ProbedPath {
    const KIND: &'static str = "path";
}

impl ProbedPath {
    /// Probes a path; an error when it is not what it claims, or better.
    pub fn probe(spec: &PathSpec) -> Result<Self> {
        let rig = Rig::new()?;
        let _path = Path::lay(&rig, *spec)?;
        let measured = probe::check(&rig, spec)?;
        let probed = Self {
            path: spec.to_string(),
            measured,
            caveats: measured.caveats(spec),
        };
        eprintln!("{}", probed.line());
        Ok(probed)
    }

    /// Probes a path and keeps what was found; whether the path is believed.
    pub fn keep(
        spec: &PathSpec,
        runs: &Runs,
        paths: &mut Vec<Self>,
        failures: &mut Vec<Failure>,
    ) -> Result<bool> {
        let probed = Self::probe(spec).with_context(|| format!("path {spec}"));
        let is_believed = probed.is_ok();
        runs.keep(probed, false, paths, failures)?;
        Ok(is_believed)
    }

    /// One line for reports.
    pub fn line(&self) -> String {
        let mut line = format!("path {}: {}", self.path, self.measured);
        for caveat in &self.caveats {
            line += &format!(" (NOT WHAT IT CLAIMS: {caveat})");
        }
        line
    }
}

/// Checks every path of `specs` and prints what was measured.
pub fn run(specs: &[PathSpec]) -> Result<()> {
    let mut table = Table::default();
    table.row([
        "path",
        "round trip p50",
        "p99",
        "loss",
        "UDP",
        "one TCP connection",
    ]);
    for spec in specs {
        let rig = Rig::new()?;
        let path = Path::lay(&rig, *spec)?;
        let measured = match probe::check(&rig, spec) {
            Ok(measured) => measured,
            Err(error) => {
                table.row([&spec.to_string(), &format!("NOT BELIEVED: {error:#}")]);
                continue;
            }
        };
        table.row([
            &path.spec.to_string(),
            &format!("{} us", measured.rtt_us),
            &format!("{} us", measured.rtt_p99_us),
            &format!("{:.3} %", measured.loss * 100.0),
            &measured
                .udp_mbit_s
                .map_or("-".to_owned(), |rate| format!("{rate:.0} Mbit/s")),
            &format!("{:.0} Mbit/s", measured.tcp_mbit_s),
        ]);
        for caveat in measured.caveats(spec) {
            eprintln!("{spec}: {caveat}");
        }
        report_lateness(&path);
    }
    print!("{}", table.render());
    Ok(())
}

fn report_lateness(path: &Path) {
    use std::sync::atomic::Ordering::Relaxed;
    let Some(counters) = path.emulated() else {
        return;
    };
    for (name, traffic) in [("forth", &counters.forth), ("back", &counters.back)] {
        eprintln!(
            "{}, {name}: {} packets, {} lost, {} overflowed, {} late, the latest by {} us",
            path.spec,
            traffic.packets.load(Relaxed),
            traffic.lost.load(Relaxed),
            traffic.overflowed.load(Relaxed),
            traffic.late.load(Relaxed),
            traffic.latest_ns.load(Relaxed) / 1000
        );
    }
}
