//! `bench crowd`: hundreds of clients keep their connections while the server moves; how long does any of them wait?

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tests::crowd::Crowd;
use tests::nginx::{self, HttpCrowd, Nginx};
use tests::path::{Path, PathSpec};
use tests::process::Process;
use tests::redis;
use tests::redis_client::{ClientPlan, RedisClient};
use tests::rig::Rig;
use tests::rounds::Felt;

use crate::compare::in_turn;
use crate::memory;
use crate::path::ProbedPath;
use crate::peer::{Mover, Peer};
use crate::quiet::{self, Disturbance, Use};
use crate::runs::{self, Failure, Recorded, Runs};
use crate::section::{Block, Plot, Section, cell};
use crate::stats::Summary;

/// Rounds of all connections before and after a move.
const ROUNDS: u64 = 30;

/// What to measure.
#[derive(Debug, Clone, Args)]
pub struct CrowdOptions {
    /// Connections that are open and busy while the server moves
    #[arg(long, value_name = "N", default_value_t = 300)]
    pub connections: usize,
    /// Moves of each kind
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub repeat: usize,
    /// Memory redis holds
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    pub memory: u64,
    /// The path between the hosts
    #[arg(long, value_name = "PATH", default_value = "veth")]
    pub path: PathSpec,
    /// Who moves it
    #[arg(long, value_name = "NAME", default_values = ["criu", "ours"], num_args = 1..)]
    pub peer: Vec<Peer>,
    /// What is moved
    #[arg(long, value_name = "NAME", default_values = ["redis", "nginx"], num_args = 1..)]
    pub server: Vec<Server>,
    /// Writes every run to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Directory for runs.jsonl, one record a line, written after each move
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// Servers with many clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Server {
    /// redis; every value is compared.
    Redis,
    /// nginx with two workers; every file is compared.
    Nginx,
}

/// How the service's address moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// Lines of shell.
    Hooks,
    /// `--move-address`, which CRIU does not have.
    MoveAddress,
}

/// One move.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Run {
    /// Who moved it.
    pub peer: Peer,
    /// What was moved.
    pub server: Server,
    /// How its address did.
    pub way: Way,
    /// The path between the hosts.
    pub path: String,
    /// Open connections.
    pub connections: usize,
    /// Answers, each compared.
    pub answers: u64,
    /// Connections that were reset or closed; a move with any counts as failed.
    pub resets: u64,
    /// The longest time without an answer to anybody.
    pub stall_ms: f64,
    /// The longest that any one client waited, with the time of a round in it.
    pub longest_wait_ms: f64,
    /// The longest wait in a usual round.
    pub usual_wait_ms: f64,
    /// The part of the machine's CPUs that others used meanwhile.
    pub used_by_others: f64,
}

impl Recorded for Run {
    const KIND: &'static str = "crowd";
}

/// What was measured.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// The path with its probes.
    pub paths: Vec<ProbedPath>,
    /// Moves that were made.
    pub runs: Vec<Run>,
    /// Those that were not, or that a client noticed.
    pub failures: Vec<Failure>,
}

/// Measures, prints and writes. It fails when a client noticed a move of ours, after all others were made.
pub fn run(options: &CrowdOptions) -> Result<()> {
    let report = measure(options, &Runs::open(options.out.as_deref())?)?;
    print!("{}", report.section());
    if let Some(path) = &options.json {
        crate::write_json(path, &report)?;
    }
    runs::judge(&report.failures)
}

/// Measures.
pub fn measure(options: &CrowdOptions, runs: &Runs) -> Result<Report> {
    let mut report = Report::default();
    let (paths, failures) = (&mut report.paths, &mut report.failures);
    if !ProbedPath::keep(&options.path, runs, paths, failures)? {
        return Ok(report);
    }
    for server in &options.server {
        for round in 0..options.repeat {
            for peer in in_turn(&options.peer, round) {
                for way in ways(peer) {
                    let order = Order {
                        peer,
                        server: *server,
                        way: *way,
                        options,
                        seed: round as u64,
                    };
                    let what = format!("{server:?}, {peer}, {way:?} over {}", options.path);
                    let run = order.carry_out().with_context(|| what.clone());
                    let run = run.inspect(|run| eprintln!("{what}: {}", run.line()));
                    runs.keep(run, !peer.is_ours(), &mut report.runs, &mut report.failures)?;
                }
            }
        }
    }
    Ok(report)
}

fn ways(peer: Peer) -> &'static [Way] {
    match peer.is_ours() {
        true => &[Way::Hooks, Way::MoveAddress],
        false => &[Way::Hooks],
    }
}

struct Order<'a> {
    peer: Peer,
    server: Server,
    way: Way,
    options: &'a CrowdOptions,
    seed: u64,
}

/// A server and its clients.
enum Scene {
    Redis(Process, Crowd),
    Nginx(Box<Nginx>, HttpCrowd),
}

impl Order<'_> {
    fn carry_out(&self) -> Result<Run> {
        quiet::measure(|| self.make(), Run::disturbance)
    }

    fn make(&self) -> Result<Run> {
        let rig = Rig::new()?;
        let _path = Path::lay(&rig, self.options.path)?;
        let scene = self.start(&rig)?;
        memory::warm(2 * self.options.memory)?;
        let mover = match (Mover::prepare(self.peer, &rig)?, self.way) {
            (Mover::Ours(plan), Way::MoveAddress) => Mover::Ours(Box::new(plan.move_address(&rig))),
            (mover, _) => mover,
        };
        scene.wait_for_rounds(ROUNDS)?;
        let before = Use::now(&rig);
        mover.go(&rig, scene.pid())?;
        let used_by_others = Use::now(&rig).by_others_since(before);
        scene.wait_for_rounds(ROUNDS).context("after the move")?;
        let (answers, felt) = scene.end().context("a client noticed")?;
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        Ok(Run {
            peer: self.peer,
            server: self.server,
            way: self.way,
            path: self.options.path.to_string(),
            connections: self.options.connections,
            answers,
            resets: 0,
            stall_ms: ms(felt.stall),
            longest_wait_ms: ms(felt.longest_wait),
            usual_wait_ms: ms(felt.usual_wait),
            used_by_others,
        })
    }

    fn start(&self, rig: &Rig) -> Result<Scene> {
        let (from, connections) = (rig.client.namespace(), self.options.connections);
        match self.server {
            Server::Nginx => {
                let nginx = Nginx::start(rig, self.seed)?;
                let crowd = nginx.crowd(from, rig.service.port(nginx::PORT), connections)?;
                Ok(Scene::Nginx(Box::new(nginx), crowd))
            }
            Server::Redis => {
                let redis = redis::start(rig)?;
                let address = rig.service.port(redis::PORT);
                let fill = ClientPlan {
                    mib: self.options.memory,
                    seed: self.seed,
                    rate: 0,
                };
                RedisClient::start(from, address, fill)?.end()?;
                let crowd = Crowd::start(from, address, connections, self.seed)?;
                Ok(Scene::Redis(redis, crowd))
            }
        }
    }
}

impl Scene {
    fn pid(&self) -> Pid {
        match self {
            Self::Redis(redis, _) => redis.pid(),
            Self::Nginx(nginx, _) => nginx.process.pid(),
        }
    }

    fn wait_for_rounds(&self, more: u64) -> Result<()> {
        match self {
            Self::Redis(_, crowd) => crowd.wait_for_rounds(more),
            Self::Nginx(_, crowd) => crowd.wait_for_rounds(more),
        }
    }

    fn end(self) -> Result<(u64, Felt)> {
        Ok(match self {
            Self::Redis(_, crowd) => {
                let report = crowd.end()?;
                (report.replies, report.felt)
            }
            Self::Nginx(_, crowd) => {
                let report = crowd.end()?;
                (report.answers, report.felt)
            }
        })
    }
}

impl Run {
    fn line(&self) -> String {
        format!(
            "stall {:.0} ms, longest wait {:.0} ms (usually {:.0}), {} answers",
            self.stall_ms, self.longest_wait_ms, self.usual_wait_ms, self.answers
        )
    }

    fn disturbance(&self) -> Disturbance {
        Disturbance {
            by_others: self.used_by_others,
            late: 0.0,
        }
    }

    fn is_like(&self, other: &Self) -> bool {
        (self.peer, self.way) == (other.peer, other.way) && self.is_of(other)
    }

    /// Whether the same was moved.
    fn is_of(&self, other: &Self) -> bool {
        let key = |run: &Self| (run.server, run.connections);
        key(self) == key(other) && self.path == other.path
    }

    /// What was moved.
    fn subject(&self) -> String {
        let server = match self.server {
            Server::Redis => "redis",
            Server::Nginx => "nginx",
        };
        format!("{server}, {}, {}", self.connections, self.path)
    }

    /// By whom, and how.
    fn mover(&self) -> String {
        match self.way {
            Way::Hooks => format!("{}, hooks", self.peer),
            Way::MoveAddress => format!("{}, --move-address", self.peer),
        }
    }
}

impl Report {
    /// For all reports.
    pub fn section(&self) -> Section {
        let mut conditions = vec![
            "median (smallest to largest) of n moves each; the wait of a client has the time of a round in it".to_owned(),
            memory::STATEMENT.to_owned(),
            quiet::statement(self.runs.iter().map(Run::disturbance)),
        ];
        conditions.extend(self.paths.iter().map(ProbedPath::line));
        let subjects = self.first_of_each(Run::is_of);
        let plots = subjects.into_iter().map(|subject| self.plot(subject));
        Section {
            title: "Many connections",
            conditions,
            blocks: vec![Block {
                rows: self.cells(),
                plots: plots.collect(),
                ..Block::default()
            }],
            failures: self.failures.clone(),
        }
    }

    /// One row for each kind of move, the first row the heading.
    fn cells(&self) -> Vec<Vec<String>> {
        let heading = [
            "server, connections, path",
            "moved by",
            "n",
            "nobody answered for, ms",
            "longest wait of any client, ms",
            "in a usual round, ms",
            "resets",
        ];
        let mut rows = vec![heading.map(str::to_owned).to_vec()];
        for kind in self.first_of_each(Run::is_like) {
            let runs = || self.runs.iter().filter(|run| run.is_like(kind));
            let shown = |value| cell(self.summary(kind, value));
            rows.push(vec![
                kind.subject(),
                kind.mover(),
                runs().count().to_string(),
                shown(|run| run.stall_ms),
                shown(|run| run.longest_wait_ms),
                shown(|run| run.usual_wait_ms),
                runs().map(|run| run.resets).sum::<u64>().to_string(),
            ]);
        }
        rows
    }

    fn plot(&self, subject: &Run) -> Plot {
        let kinds = self.first_of_each(Run::is_like).into_iter();
        let bars = kinds.filter(|kind| kind.is_of(subject)).map(|kind| {
            let wait = self.summary(kind, |run| run.longest_wait_ms);
            (kind.mover(), wait, kind.peer.to_string())
        });
        Plot {
            title: format!("longest wait of any client, ms: {}", subject.subject()),
            bars: bars.collect(),
        }
    }

    fn summary(&self, kind: &Run, value: fn(&Run) -> f64) -> Option<Summary> {
        let runs = self.runs.iter().filter(|run| run.is_like(kind));
        Summary::of(&runs.map(value).collect::<Vec<_>>())
    }

    fn first_of_each(&self, is_same: fn(&Run, &Run) -> bool) -> Vec<&Run> {
        let mut firsts: Vec<&Run> = Vec::new();
        for run in &self.runs {
            if !firsts.iter().any(|first| is_same(first, run)) {
                firsts.push(run);
            }
        }
        firsts
    }
}
