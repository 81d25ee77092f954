//! How much of the machine others use: a run beside a compiler measures the compiler.

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

/// Makes a run when the machine is quiet, again when others disturbed it, and returns the least disturbed.
pub fn measure<T>(mut run: impl FnMut() -> Result<T>, by_others: impl Fn(&T) -> f64) -> Result<T> {
    let mut best: Option<T> = None;
    for _ in 0..attempts() {
        if attempts() > 1 {
            wait();
        }
        let next = run()?;
        let share = by_others(&next);
        if best.as_ref().is_none_or(|best| share < by_others(best)) {
            best = Some(next);
        }
        if share <= SPOILT {
            break;
        }
        eprintln!("(others used {:.0} % of the CPUs)", share * 100.0);
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
    fn the_machine_has_cpus_and_has_been_busy() {
        let machine = Machine::now();
        assert!(machine.cpus >= 1.0 && machine.busy_s > 0.0);
    }
}
