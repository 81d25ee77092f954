//! How much of the machine others use: a run beside a compiler measures the compiler.

use std::fmt;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use nix::unistd::Pid;
use tests::{namespace, rig::Rig, task};

/// The machine counts as quiet when this part of its CPUs is busy, or less.
const QUIET: f64 = 0.15;
/// Over how long that is looked at.
const LOOK: Duration = Duration::from_millis(300);
/// A run is spoilt when others used more than this part of the CPUs during it.
const SPOILT: f64 = 0.08;
/// ... or when an emulated path delivered more than this part of its packets late.
const LATE: f64 = 0.01;
/// Clock ticks per second in `/proc`.
const TICKS: f64 = 100.0;

/// A spoilt run is made again this often; then the least spoilt one counts.
const ATTEMPTS: usize = 3;
/// How long to wait for quiet before each.
const PATIENCE: Duration = Duration::from_secs(20);

static AS_IT_COMES: AtomicBool = AtomicBool::new(false);

/// From now on takes each run as it comes, however busy the machine is.
pub fn take_runs_as_they_come() {
    AS_IT_COMES.store(true, Ordering::Relaxed);
}

fn attempts() -> usize {
    match AS_IT_COMES.load(Ordering::Relaxed) {
        true => 1,
        false => ATTEMPTS,
    }
}

/// What kept a run from being what it was to be.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Disturbance {
    /// The part of the machine's CPUs that others used meanwhile.
    pub by_others: f64,
    /// The part of its packets that an emulated path delivered late: the machine was too busy to emulate it.
    pub late: f64,
}

impl Disturbance {
    /// What reports call spoilt.
    pub const MEANING: &str = "others used over 8 % of the CPUs, or an emulated path delivered over 1 % of its packets \
        more than a millisecond late";

    /// Whether the run is one of that.
    pub fn is_spoilt(self) -> bool {
        self.extent() > 1.0
    }

    /// As a part of what is borne.
    fn extent(self) -> f64 {
        (self.by_others / SPOILT).max(self.late / LATE)
    }
}

impl fmt::Display for Disturbance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |part: f64| part * 100.0;
        write!(
            f,
            "others used {:.0} % of the CPUs",
            percent(self.by_others)
        )?;
        if self.late > 0.0 {
            write!(f, ", {:.1} % of the packets were late", percent(self.late))?;
        }
        Ok(())
    }
}

/// One line for reports on how far the runs were disturbed.
pub fn statement(runs: impl Iterator<Item = Disturbance>) -> String {
    let runs: Vec<Disturbance> = runs.collect();
    let spoilt = runs.iter().filter(|run| run.is_spoilt()).count();
    let most = runs.iter().map(|run| run.by_others).fold(0.0, f64::max) * 100.0;
    let late = runs.iter().map(|run| run.late).fold(0.0, f64::max) * 100.0;
    format!(
        "{spoilt} of {} runs were disturbed ({}); at most: {most:.0} % of the CPUs, {late:.2} % of the packets",
        runs.len(),
        Disturbance::MEANING
    )
}

/// Makes a run when the machine is quiet, again when it was disturbed, and returns the least disturbed.
pub fn measure<T>(
    mut run: impl FnMut() -> Result<T>,
    disturbance: impl Fn(&T) -> Disturbance,
) -> Result<T> {
    let quietly = || {
        if attempts() > 1 {
            wait();
        }
        run()
    };
    least_disturbed(attempts(), quietly, disturbance)
}

fn least_disturbed<T>(
    attempts: usize,
    mut run: impl FnMut() -> Result<T>,
    disturbance: impl Fn(&T) -> Disturbance,
) -> Result<T> {
    let mut best: Option<T> = None;
    for _ in 0..attempts {
        let next = run()?;
        let its = disturbance(&next);
        let is_better = |best: &T| its.extent() < disturbance(best).extent();
        if best.as_ref().is_none_or(is_better) {
            best = Some(next);
        }
        if !its.is_spoilt() {
            break;
        }
        eprintln!("({its})");
    }
    best.context("no attempt was made")
}

/// Waits until the machine is quiet, but not forever.
fn wait() {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        let before = Machine::now();
        thread::sleep(LOOK);
        let used = Machine::now().busy_s - before.busy_s;
        if used / LOOK.as_secs_f64() / before.cpus <= QUIET {
            return;
        }
    }
}

/// The CPU time in user space of everything, and of what belongs to this program.
#[derive(Debug, Clone, Copy)]
pub struct Use {
    machine: Machine,
    own_s: f64,
    at: Instant,
}

#[derive(Debug, Clone, Copy)]
struct Machine {
    busy_s: f64,
    cpus: f64,
}

impl Use {
    /// Up to now; what runs on the hosts of `rig` belongs to this program, whoever its parent is by now.
    pub fn now(rig: &Rig) -> Self {
        let own = [UsageWho::RUSAGE_SELF, UsageWho::RUSAGE_CHILDREN];
        Self {
            machine: Machine::now(),
            own_s: own.map(seconds).iter().sum::<f64>() + living(rig),
            at: Instant::now(),
        }
    }

    /// The part of the machine's CPUs others used since `before`.
    pub fn by_others_since(self, before: Self) -> f64 {
        let all = self.machine.busy_s - before.machine.busy_s;
        let own = self.own_s - before.own_s;
        let time = (self.at - before.at).as_secs_f64() * self.machine.cpus;
        ((all - own) / time).clamp(0.0, 1.0)
    }
}

impl Machine {
    fn now() -> Self {
        let text = fs::read_to_string("/proc/stat").unwrap_or_default();
        let cpus = text
            .lines()
            .filter(|line| line.starts_with("cpu") && !line.starts_with("cpu "));
        let fields: Vec<f64> = text
            .lines()
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .filter_map(|field| field.parse().ok())
            .collect();
        // user, nice and steal. What the kernel does for the packets and pages of a run it does in nobody's name, so
        // system time cannot be told apart; whoever compiles meanwhile is seen by the time in user space.
        let busy: f64 = fields.iter().take(2).chain(fields.get(7)).sum();
        Self {
            busy_s: busy / TICKS,
            cpus: cpus.count().max(1) as f64,
        }
    }
}

/// CPU seconds in user space of processes that live on the rig, or below this one and were not waited for.
fn living(rig: &Rig) -> f64 {
    let hosts = [&rig.source, &rig.destination, &rig.client];
    let mut pids: Vec<Pid> = hosts
        .iter()
        .flat_map(|host| task::in_network_namespace(&namespace::path(host.namespace())))
        .chain(task::descendants(Pid::this()))
        .filter(|pid| *pid != Pid::this())
        .collect();
    pids.sort_unstable();
    pids.dedup();
    pids.into_iter().filter_map(own_cpu).sum()
}

/// In user space, of a process and of the children it has waited for.
fn own_cpu(pid: Pid) -> Option<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields = text[text.rfind(')')? + 1..].split_whitespace().skip(11);
    // utime, stime, cutime, cstime.
    let ticks = fields
        .take(4)
        .step_by(2)
        .filter_map(|field| field.parse::<f64>().ok());
    Some(ticks.sum::<f64>() / TICKS)
}

fn seconds(who: UsageWho) -> f64 {
    let Ok(usage) = getrusage(who) else {
        return 0.0;
    };
    let seconds = |time: TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    seconds(usage.user_time())
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn what_others_use_is_what_is_left() {
        let at = |busy_s, own_s, ms| Use {
            machine: Machine { busy_s, cpus: 2.0 },
            own_s,
            at: *START + Duration::from_millis(ms),
        };
        static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
        let share = at(11.5, 1.0, 1000).by_others_since(at(10.0, 0.0, 0));
        assert!((share - 0.25).abs() < 1e-9, "{share}");
    }

    #[test]
    fn the_least_disturbed_attempt_counts() {
        let late = [0.5, 0.02, 0.3].map(|late| Disturbance {
            by_others: 0.0,
            late,
        });
        let mut attempts = late.into_iter();
        let next = || attempts.next().context("no more");
        let best = least_disturbed(3, next, |its: &Disturbance| *its).expect("attempts");
        assert_eq!(best, late[1]);
        assert!(best.is_spoilt());
    }

    #[test]
    fn the_machine_has_cpus_and_has_been_busy() {
        let machine = Machine::now();
        assert!(machine.cpus >= 1.0 && machine.busy_s > 0.0);
    }
}
