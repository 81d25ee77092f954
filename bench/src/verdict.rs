//! `bench targets`: measures what every target is about, and says in one table which are met.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;
use tests::path::PathSpec;

use crate::compare::{self, CompareOptions};
use crate::fault::{self, FaultOptions};
use crate::peer::Peer;
use crate::targets::Target;
use crate::workload::Kind;

/// What to measure.
#[derive(Debug, Args)]
pub struct VerdictOptions {
    /// Runs of each kind.
    #[arg(long, value_name = "N", default_value_t = 3)]
    repeat: usize,
    /// Memory of the workloads.
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    memory: u64,
    /// Memory of the workload that shows what does not grow with it.
    #[arg(long, value_name = "MIB", default_value_t = 10240)]
    largest: u64,
    /// Measures only parts whose name contains this.
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Writes the table to this file as well, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// One part: a measurement, and those of its targets that count here.
struct Part {
    name: &'static str,
    measure: Measure,
    counts: &'static [&'static str],
}

enum Measure {
    Fault(FaultOptions),
    Compare(Box<CompareOptions>),
}

/// A target, and where it was measured.
#[derive(Debug, Serialize)]
struct Judged {
    part: &'static str,
    path: String,
    target: Target,
}

#[derive(Debug, Serialize)]
struct Verdict {
    memory_mib: u64,
    repeat: usize,
    judged: Vec<Judged>,
    /// Parts that could not be measured, and why.
    failures: Vec<String>,
}

/// Measures, prints and writes. It fails when something could not be measured, never because of a time.
pub fn run(options: &VerdictOptions) -> Result<()> {
    let mut verdict = Verdict {
        memory_mib: options.memory,
        repeat: options.repeat,
        judged: Vec::new(),
        failures: Vec::new(),
    };
    for part in parts(options)? {
        if !part.name.contains(&options.only) {
            continue;
        }
        eprintln!("--- {} ---", part.name);
        let outcome = part.measure.carry_out().context(part.name)?;
        let failures = outcome.failures.into_iter();
        verdict
            .failures
            .extend(failures.map(|failure| format!("{}: {failure}", part.name)));
        let counts = |target: &Target| {
            part.counts
                .iter()
                .any(|what| target.what().starts_with(what))
        };
        let targets = outcome
            .targets
            .into_iter()
            .filter(|(_, target)| counts(target));
        verdict.judged.extend(targets.map(|(path, target)| Judged {
            part: part.name,
            path,
            target,
        }));
    }
    print!("{verdict}");
    options
        .json
        .as_ref()
        .map_or(Ok(()), |path| crate::write_json(path, &verdict))
}

/// What a part came to.
struct Outcome {
    /// Targets, and the paths they are about.
    targets: Vec<(String, Target)>,
    failures: Vec<String>,
}

impl Measure {
    fn carry_out(&self) -> Result<Outcome> {
        match self {
            Self::Fault(options) => {
                let report = fault::measure(options)?;
                print!("{report}");
                Ok(Outcome {
                    targets: report.targets(),
                    failures: report.failures().to_vec(),
                })
            }
            Self::Compare(options) => {
                let report = compare::measure(options)?;
                print!("{}", compare::markdown(&report));
                Ok(Outcome {
                    targets: report.targets(),
                    failures: report.failures().to_vec(),
                })
            }
        }
    }
}

fn parts(options: &VerdictOptions) -> Result<Vec<Part>> {
    let near = &[
        "fault p50, loaded over idle",
        "fault p99, loaded over idle",
        "bulk with faults over bulk without",
    ];
    let bare = &[
        "fault p50, loaded over idle",
        "fault p99, loaded",
        "bulk with faults over bulk without",
        "fault p50, idle, over QUIC alone",
        "bulk over",
    ];
    let fault = |paths: &[&str], only, rate, memory| -> Result<FaultOptions> {
        Ok(FaultOptions {
            memory,
            repeat: options.repeat,
            rate,
            idle_touches: 2000,
            path: parse(paths)?,
            scan: false,
            only,
            udp_payload: None,
            json: None,
        })
    };
    let compare = |paths: &[&str], peers: &[Peer], kind, memory, repeat| -> Result<Measure> {
        Ok(Measure::Compare(Box::new(CompareOptions {
            memory,
            repeat,
            rate: 4000,
            path: parse(paths)?,
            peer: peers.to_vec(),
            workload: vec![kind],
            udp_payload: None,
            json: None,
            out: None,
        })))
    };
    let (memory, ours) = (options.memory, Some(Peer::Ours));
    let part = |name, measure, counts| Part {
        name,
        measure,
        counts,
    };
    Ok(vec![
        part(
            "faults beside bulk, bare",
            Measure::Fault(fault(&["veth"], None, 1000, memory)?),
            bare,
        ),
        part(
            "faults beside bulk, large packets",
            Measure::Fault(FaultOptions {
                udp_payload: Some(LARGE_PAYLOAD),
                ..fault(&["veth,mtu=9000"], ours, 1000, memory)?
            }),
            near,
        ),
        part(
            "faults beside bulk, 1 Gbit/s",
            Measure::Fault(fault(&["1g"], ours, 1000, memory)?),
            near,
        ),
        part(
            "touches without a pause",
            Measure::Fault(fault(&["veth"], ours, 0, memory)?),
            &["network faults"],
        ),
        part(
            "faults all the time, 10 ms",
            // CRIU moves 3 MiB in a second there.
            Measure::Fault(fault(&["rtt=10ms,rate=1g"], None, 0, memory.min(64))?),
            &["bulk with faults over CRIU's"],
        ),
        part(
            "the rate at 30 ms",
            compare(
                &["rate=1g,emulated", "rtt=30ms,rate=1g"],
                &[Peer::Ours],
                Kind::Still,
                memory,
                options.repeat,
            )?,
            &["bulk, "],
        ),
        part(
            "redis, 1 Gbit/s",
            compare(
                &["1g"],
                &[Peer::Criu, Peer::Ours],
                Kind::Redis,
                2 * memory,
                options.repeat,
            )?,
            &["brownout", "wire bytes", "peak RSS"],
        ),
        part(
            "redis, bare",
            compare(
                &["veth"],
                &[Peer::CriuTls, Peer::Ours, Peer::OursPlain],
                Kind::Redis,
                memory,
                options.repeat,
            )?,
            &["CPU", "total, compression", "peak RSS"],
        ),
        part(
            "the largest",
            compare(&["veth"], &[Peer::Ours], Kind::Still, options.largest, 1)?,
            &["peak RSS"],
        ),
    ])
}

/// UDP payload for packets of 9000 bytes, the largest our programs send.
const LARGE_PAYLOAD: u16 = 6500;

fn parse(paths: &[&str]) -> Result<Vec<PathSpec>> {
    let specs = paths.iter().map(|path| path.parse::<PathSpec>());
    specs
        .map(|spec| spec.map_err(|error| anyhow::anyhow!("{error}")))
        .collect()
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n# Targets\n\n{} MiB (redis on 1 Gbit/s: {}), medians of {} runs, each ratio within one run of the bench; {}\n",
            self.memory_mib,
            2 * self.memory_mib,
            self.repeat,
            crate::memory::STATEMENT,
        )?;
        writeln!(f, "| part | path | figure | measured | target | |")?;
        writeln!(f, "| --- | --- | --- | ---: | --- | --- |")?;
        for judged in &self.judged {
            let row = judged.target.cells().join(" | ");
            writeln!(f, "| {} | {} | {row} |", judged.part, judged.path)?;
        }
        let not_met = self.judged.iter().filter(|judged| !judged.target.is_met());
        writeln!(f, "\n{} of {} not met", not_met.count(), self.judged.len())?;
        self.failures
            .iter()
            .try_for_each(|failure| writeln!(f, "failed: {failure}"))
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn every_part_can_be_measured_and_has_a_target() {
        let options = VerdictOptions {
            repeat: 1,
            memory: 64,
            largest: 64,
            only: String::new(),
            json: None,
        };
        let parts = parts(&options).expect("paths that exist");
        assert!(parts.iter().all(|part| !part.counts.is_empty()));
    }
}
