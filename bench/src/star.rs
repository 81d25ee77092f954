//! `bench report`: everything side by side. Not every path with every workload and size, which would take days, but a
//! star: one point in the middle, from which one thing is changed at a time.

mod estimate;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Args;
use tests::path::PathSpec;

use crate::collected;
use crate::compare::{self, CompareOptions};
use crate::crowd::{self, CrowdOptions};
use crate::fault::{self, FaultOptions};
use crate::files::{self, FilesOptions};
use crate::flood::{self, FloodOptions};
use crate::peer::Peer;
use crate::replay::{self, ReplayOptions};
use crate::runs::{self, Failure, Runs};
use crate::workload::Kind;

/// Who moves.
const PEERS: [Peer; 4] = [Peer::StopAndCopy, Peer::Criu, Peer::CriuTls, Peer::Ours];
/// Over a long path CRIU moves a few MiB in a second at most, so there is less to move.
const FAR_MIB: u64 = 64;
/// Commands of redis' client per second.
const COMMANDS: u32 = 4000;

/// What to measure.
#[derive(Debug, Args)]
pub struct StarOptions {
    /// Moves of each kind
    #[arg(long, value_name = "N", default_value_t = 3)]
    repeat: usize,
    /// Memory of the workload in the middle
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    memory: u64,
    /// The largest memory
    #[arg(long, value_name = "MIB", default_value_t = 10240)]
    largest: u64,
    /// Measures only parts whose name contains this
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Says what would be measured, and how long it takes, and measures nothing
    #[arg(long)]
    list: bool,
    /// Directory for runs.jsonl (one record a line, written as each run ends), report.md and report.html; the reports are
    /// written again after each part
    #[arg(long, value_name = "DIR", default_value = "report")]
    out: PathBuf,
    /// Adds to the records in that directory
    #[arg(long)]
    add: bool,
}

/// A point of the star.
struct Part {
    name: String,
    measure: Measure,
}

enum Measure {
    Moves(Box<CompareOptions>),
    Waits(FaultOptions),
    Crowd(CrowdOptions),
    Replay(ReplayOptions),
    Flood(FloodOptions),
    Files(FilesOptions),
}

/// Measures and writes. It fails when something of ours could not be measured, after everything else was.
pub fn run(options: &StarOptions) -> Result<()> {
    let mut parts = parts(options)?;
    parts.retain(|part| part.name.contains(&options.only));
    let took: Vec<Duration> = parts.iter().map(|part| part.measure.estimate()).collect();
    for (part, took) in parts.iter().zip(&took) {
        eprintln!("{:<48} about {:>4} s", part.name, took.as_secs());
    }
    let all: Duration = took.iter().sum();
    eprintln!("in all about {} minutes", all.as_secs().div_ceil(60));
    if options.list {
        return Ok(());
    }
    let file = options.out.join(runs::FILE);
    ensure!(
        options.add || !file.exists(),
        "{} holds runs of another time: choose another --out, or --add to them",
        file.display()
    );
    let runs = Runs::open(Some(&options.out))?;
    let mut failures = Vec::new();
    for part in &parts {
        eprintln!("--- {} ---", part.name);
        let began = Instant::now();
        let runs = runs.of_part(&part.name);
        match part.measure.carry_out(&runs) {
            Ok(its) => failures.extend(its),
            // The other parts can be measured all the same.
            Err(error) => runs.fail(&error, false, &mut failures)?,
        }
        eprintln!("took {} s", began.elapsed().as_secs());
        collected::write_reports(&options.out)?;
    }
    eprintln!("{}", options.out.join("report.html").display());
    print!(
        "{}",
        std::fs::read_to_string(options.out.join("report.md"))?
    );
    runs::judge(&failures)
}

impl Measure {
    fn carry_out(&self, runs: &Runs) -> Result<Vec<Failure>> {
        Ok(match self {
            Self::Moves(options) => compare::measure(options, runs)?.failures,
            Self::Waits(options) => fault::measure(options, runs)?.failures,
            Self::Crowd(options) => crowd::measure(options, runs)?.failures,
            Self::Replay(options) => replay::measure(options, runs)?.failures,
            Self::Flood(options) => flood::measure(options, runs)?.failures,
            Self::Files(options) => files::measure(options, runs)?.failures,
        })
    }

    fn estimate(&self) -> Duration {
        match self {
            Self::Moves(options) => estimate::moves(options),
            Self::Waits(options) => estimate::waits(options),
            Self::Crowd(options) => estimate::crowd(options),
            Self::Replay(options) => estimate::replay(options),
            Self::Flood(options) => estimate::flood(options),
            Self::Files(options) => estimate::files(options),
        }
    }
}

fn parts(options: &StarOptions) -> Result<Vec<Part>> {
    let middle = CompareOptions {
        memory: options.memory,
        repeat: options.repeat,
        rate: COMMANDS,
        path: vec![PathSpec::default()],
        peer: PEERS.to_vec(),
        workload: vec![Kind::Redis],
        udp_payload: None,
        json: None,
        out: None,
    };
    let moves = |name: String, options: CompareOptions| Part {
        name,
        measure: Measure::Moves(Box::new(options)),
    };
    let mut parts = vec![moves("middle: redis, bare veth".to_owned(), middle.clone())];
    let far = options.memory.min(FAR_MIB);
    for (path, memory) in [
        ("1g", options.memory),
        ("10g", options.memory),
        ("rtt=1ms,rate=1g", options.memory),
        ("rtt=10ms,rate=1g", far),
        ("rtt=50ms,rate=1g", far),
        ("rtt=10ms,loss=0.1%,rate=1g", far),
        ("rtt=10ms,loss=1%,rate=1g", far),
    ] {
        let path = parse(path)?;
        parts.push(moves(
            format!("path: {path}"),
            CompareOptions {
                path: vec![path],
                memory,
                ..middle.clone()
            },
        ));
    }
    for (kind, rate) in [
        (Kind::RedisZipf, COMMANDS),
        (Kind::Scan, 0),
        (Kind::Touch, 0),
    ] {
        parts.push(moves(
            format!("workload: {kind}"),
            CompareOptions {
                workload: vec![kind],
                rate,
                ..middle.clone()
            },
        ));
    }
    for memory in [64, 4 * options.memory] {
        parts.push(moves(
            format!("size: {memory} MiB"),
            CompareOptions {
                memory,
                ..middle.clone()
            },
        ));
    }
    parts.push(moves(
        format!("size: {} MiB, nobody touches it", options.largest),
        CompareOptions {
            memory: options.largest,
            repeat: 1,
            workload: vec![Kind::Still],
            peer: vec![Peer::Criu, Peer::Ours],
            ..middle
        },
    ));
    parts.push(Part {
        name: "waiting for pages".to_owned(),
        measure: Measure::Waits(waits(options)?),
    });
    parts.push(Part {
        name: "many connections".to_owned(),
        measure: Measure::Crowd(crowd_of(options)),
    });
    parts.extend(questions(options)?);
    Ok(parts)
}

/// What is no point of the star, each with a target of its own.
fn questions(options: &StarOptions) -> Result<[Part; 3]> {
    let repeat = options.repeat;
    let part = |name: &str, measure| Part {
        name: name.to_owned(),
        measure,
    };
    Ok([
        part(
            "the order of touches is known",
            Measure::Replay(ReplayOptions {
                memory: options.memory.min(64),
                rate: 10_000,
                repeat,
                path: parse("1g")?,
                out: None,
            }),
        ),
        part(
            "a flood of strangers",
            Measure::Flood(FloodOptions {
                memory: options.memory.min(256),
                repeat,
                strangers: 8,
                json: None,
                out: None,
            }),
        ),
        part(
            "files that do not change",
            Measure::Files(FilesOptions {
                repeat,
                content: vec![64, 1024],
                files: vec![100, 10_000],
                out: None,
            }),
        ),
    ])
}

fn waits(options: &StarOptions) -> Result<FaultOptions> {
    Ok(FaultOptions {
        memory: options.memory,
        repeat: options.repeat,
        rate: 1000,
        idle_touches: 2000,
        path: vec![parse("veth")?, parse("1g")?],
        scan: false,
        only: None,
        udp_payload: None,
        json: None,
        out: None,
    })
}

fn crowd_of(options: &StarOptions) -> CrowdOptions {
    CrowdOptions {
        connections: 300,
        repeat: options.repeat,
        memory: options.memory.min(128),
        path: PathSpec::default(),
        peer: vec![Peer::Criu, Peer::Ours],
        server: vec![crowd::Server::Redis, crowd::Server::Nginx],
        json: None,
        out: None,
    }
}

fn parse(path: &str) -> Result<PathSpec> {
    path.parse()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn one_repeat_takes_less_than_half_an_hour() {
        let options = StarOptions {
            repeat: 1,
            memory: 512,
            largest: 10240,
            only: String::new(),
            list: false,
            out: PathBuf::new(),
            add: false,
        };
        let parts = parts(&options).expect("paths that exist");
        let took: Duration = parts.iter().map(|part| part.measure.estimate()).sum();
        assert!(took < Duration::from_secs(30 * 60), "{took:?}");
        let of = |what: &str| {
            parts
                .iter()
                .filter(|part| part.name.starts_with(what))
                .count()
        };
        assert_eq!((of("path: "), of("workload: "), of("size: ")), (7, 3, 3));
    }
}
