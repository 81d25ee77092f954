//! A program that stands still, a disk or a host that is full: waiting has an end or a reason, errors say what is wrong,
//! and the workload is on exactly one host.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use common::limits::IDLE_TIMEOUT;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::exit_code::{ABORTED_BY_PEER, CONNECTION, FREEZE, RESTORE};
use tests::failure::{Bystander, expect_failure};
use tests::gate::Gate;
use tests::harness::{self, Body, MIGRATION, Need, REDIS_MIGRATION, Test};
use tests::leftovers::assert_moved;
use tests::pair::{PATIENCE, PairPlan, Side};
use tests::random::seed_of_this_run;
use tests::rig::Rig;
use tests::small_disk;
use tests::task;
use tests::torture::{Torture, TorturePlan};
use tests::touch::{Pattern, TouchPlan, Toucher};
use tests::wait::wait_until;

/// Memory the copy may have at first: less than it needs.
const TOO_LITTLE: &str = "8M";

fn main() -> ExitCode {
    let with_redis: [(&'static str, Body); 4] = [
        (
            "the_source_stands_still_early",
            the_source_stands_still_early,
        ),
        (
            "the_destination_stands_still_early",
            the_destination_stands_still_early,
        ),
        ("the_sources_state_is_full", the_sources_state_is_full),
        (
            "the_destinations_state_is_full",
            the_destinations_state_is_full,
        ),
    ];
    let with_torture: [(&'static str, Body); 2] = [
        ("the_source_stands_still", |rig| {
            stands_still(rig, |server, _| server.process.pid())
        }),
        ("the_destination_stands_still", |rig| {
            stands_still(rig, |_, restorer| restorer.process.pid())
        }),
    ];
    let test = |needs| move |(name, body)| Test { name, needs, body };
    let memory = Test {
        name: "the_host_has_no_memory",
        needs: &[Need::Namespaces, Need::Criu, Need::MemoryCgroup],
        body: the_host_has_no_memory,
    };
    let little_cpu: [(&'static str, Body); 2] = [
        ("the_source_has_little_cpu", |rig| has_little_cpu(rig, true)),
        ("the_destination_has_little_cpu", |rig| {
            has_little_cpu(rig, false)
        }),
    ];
    let cpu = little_cpu.map(test(&[Need::Namespaces, Need::Criu, Need::CpuCgroup]));
    let redis = with_redis.map(test(REDIS_MIGRATION));
    let torture = with_torture.map(test(MIGRATION));
    harness::main(redis.into_iter().chain(torture).chain(cpu).chain([memory]))
}

/// A migration held before the destination makes its first task.
fn held_early(rig: &Rig) -> Result<(Bystander, PairPlan, Gate, Side, Side)> {
    let bystander = Bystander::start(rig)?;
    let plan = PairPlan::new(rig)?;
    let gate = Gate::new(rig, "early")?;
    let mut held = plan.clone();
    held.before_restore = gate.after(&held.before_restore);
    let server = held.start_server(rig, bystander.redis.pid())?;
    let restorer = held.start_restorer(rig)?;
    gate.wait(PATIENCE)?;
    Ok((bystander, plan, gate, server, restorer))
}

fn the_source_stands_still_early(rig: &Rig) -> Result<()> {
    let (bystander, plan, gate, mut server, mut restorer) = held_early(rig)?;
    kill(server.process.pid(), Signal::SIGSTOP)?;
    expect_failure(&mut restorer, CONNECTION, &["lost the source"])?;
    gate.open()?;
    kill(server.process.pid(), Signal::SIGCONT)?;
    expect_failure(&mut server, CONNECTION, &["lost the destination"])?;
    bystander.assert_movable(rig, &plan)
}

/// The workload runs again on the source while the destination still stands still.
fn the_destination_stands_still_early(rig: &Rig) -> Result<()> {
    let (bystander, plan, gate, mut server, mut restorer) = held_early(rig)?;
    kill(restorer.process.pid(), Signal::SIGSTOP)?;
    expect_failure(&mut server, CONNECTION, &["lost the destination"])?;
    bystander.redis.assert_alive()?;
    gate.open()?;
    kill(restorer.process.pid(), Signal::SIGCONT)?;
    expect_failure(&mut restorer, CONNECTION, &["lost the source"])?;
    bystander.assert_movable(rig, &plan)
}

/// After the cutover: it counts as a lost link, and is one that comes back.
fn stands_still(rig: &Rig, which: fn(&Side, &Side) -> Pid) -> Result<()> {
    let torture = torture(rig)?;
    let mut plan = PairPlan::new(rig)?;
    plan.before_restore = format!("{}; {}", tests::matrix::slow_link(rig), plan.before_restore);
    let mut server = plan.start_server(rig, torture.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    restorer.wait_for_copy()?;
    let stopped = which(&server, &restorer);
    kill(stopped, Signal::SIGSTOP)?;
    let lost = |side: &Side, words| side.process.stderr().contains(words);
    wait_until(PATIENCE, "the other end to notice", || {
        lost(&server, "link lost") || lost(&restorer, "trying to reconnect")
    })?;
    kill(stopped, Signal::SIGCONT)?;
    tests::matrix::fast_link(rig)?;
    restorer.expect_success()?;
    server.expect_success()?;
    torture.wait_for_rounds(20)?;
    assert_moved(rig, restorer.restored_pid()?)?;
    torture.finish()
}

fn torture(rig: &Rig) -> Result<Torture> {
    Torture::start(
        rig,
        TorturePlan {
            mib: 24,
            threads: 2,
            seed: seed_of_this_run(),
            ..TorturePlan::default()
        },
    )
}

/// A directory on a disk without room for a single page.
fn full_state(rig: &Rig) -> Result<PathBuf> {
    let disk = small_disk::mount(rig, "state", 4)?;
    fs::write(disk.join("ballast"), [0; 4096])?;
    let state = disk.join("state");
    fs::create_dir(&state).context("directories need no room")?;
    fs::set_permissions(&state, fs::Permissions::from_mode(0o700))?;
    Ok(state)
}

fn the_sources_state_is_full(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let mut plan = PairPlan::new(rig)?;
    let state = full_state(rig)?;
    let bystander = bystander.look_again(rig)?;
    plan.server.extend(["--state-dir".into(), state.into()]);
    let mut server = plan.start_server(rig, bystander.redis.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    expect_failure(
        &mut server,
        FREEZE,
        &["session file", "space", "--state-dir"],
    )?;
    expect_failure(&mut restorer, ABORTED_BY_PEER, &["source", "session file"])?;
    bystander.assert_unharmed(rig)
}

fn the_destinations_state_is_full(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let mut plan = PairPlan::new(rig)?;
    let state = full_state(rig)?;
    let bystander = bystander.look_again(rig)?;
    plan.restorer.extend(["--state-dir".into(), state.into()]);
    let mut server = plan.start_server(rig, bystander.redis.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    expect_failure(
        &mut restorer,
        RESTORE,
        &["session file", "space", "--state-dir"],
    )?;
    expect_failure(
        &mut server,
        ABORTED_BY_PEER,
        &["destination", "session file"],
    )?;
    bystander.assert_unharmed(rig)
}

/// A CPU cgroup of version 1, with a tenth of a CPU for all its processes together.
struct LittleCpu(PathBuf);

impl LittleCpu {
    fn make() -> Result<Self> {
        let path = format!("/sys/fs/cgroup/cpu/postcopy-{}", std::process::id());
        let cgroup = Self(PathBuf::from(path));
        fs::create_dir(&cgroup.0).context("no cgroup")?;
        fs::write(cgroup.0.join("cpu.cfs_quota_us"), "10000").context("no quota")?;
        Ok(cgroup)
    }

    /// What is started inside of `start` stays in the cgroup.
    fn around<T>(&self, start: impl FnOnce() -> Result<T>) -> Result<T> {
        let ourselves = std::process::id().to_string();
        fs::write(self.0.join("cgroup.procs"), &ourselves).context("cannot enter it")?;
        let started = start();
        fs::write("/sys/fs/cgroup/cpu/cgroup.procs", &ourselves).context("cannot leave it")?;
        started
    }
}

impl Drop for LittleCpu {
    fn drop(&mut self) {
        let processes = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        for pid in processes.lines() {
            // Whatever is left goes back to where everybody is.
            let _ = fs::write("/sys/fs/cgroup/cpu/cgroup.procs", pid);
        }
        let _ = fs::remove_dir(&self.0);
    }
}

/// One of the programs, with all it starts, has a tenth of a CPU: it takes longer, and all is well.
fn has_little_cpu(rig: &Rig, on_source: bool) -> Result<()> {
    let torture = torture(rig)?;
    let plan = PairPlan::new(rig)?;
    let cgroup = LittleCpu::make()?;
    let start_server = || plan.start_server(rig, torture.pid());
    let start_restorer = || plan.start_restorer(rig);
    let (mut server, mut restorer) = match on_source {
        true => (cgroup.around(start_server)?, start_restorer()?),
        false => (start_server()?, cgroup.around(start_restorer)?),
    };
    restorer.expect_success()?;
    server.expect_success()?;
    torture.wait_for_rounds(20)?;
    assert_moved(rig, restorer.restored_pid()?)?;
    torture.finish()
}

/// A memory cgroup of version 1 around the copy, whose processes are not killed when it is full.
struct Cgroup(PathBuf);

impl Cgroup {
    fn around(root: Pid, limit: &str) -> Result<Self> {
        let path = format!("/sys/fs/cgroup/memory/postcopy-{root}");
        let cgroup = Self(PathBuf::from(path));
        fs::create_dir(&cgroup.0).context("no cgroup")?;
        cgroup.write("memory.oom_control", "1")?;
        cgroup.write("memory.limit_in_bytes", limit)?;
        for pid in task::descendants(root).into_iter().chain([root]) {
            // A child of the moment may have ended already.
            if task::is_alive(pid) {
                cgroup.write("cgroup.procs", &pid.to_string())?;
            }
        }
        Ok(cgroup)
    }

    fn write(&self, file: &str, text: &str) -> Result<()> {
        fs::write(self.0.join(file), text).with_context(|| format!("{file}: {text}"))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let processes = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        for pid in processes.lines() {
            // Whatever is left goes back to where everybody is.
            let _ = fs::write("/sys/fs/cgroup/memory/cgroup.procs", pid);
        }
        let _ = fs::remove_dir(&self.0);
    }
}

/// Pages that find no memory are tried again, and said to be; the workload waits, and loses nothing.
fn the_host_has_no_memory(rig: &Rig) -> Result<()> {
    // It makes no system call that could fail for want of memory.
    let toucher = Toucher::start(
        rig,
        TouchPlan {
            mib: 64,
            seed: seed_of_this_run(),
            pattern: Pattern::Random,
            rate: 4000,
        },
    )?;
    let mut plan = PairPlan::new(rig)?;
    plan.before_restore = format!("{}; {}", tests::matrix::slow_link(rig), plan.before_restore);
    // Else too much would be there before the memory is taken away.
    plan.server.extend(["--compress", "never"].map(Into::into));
    let mut server = plan.start_server(rig, toucher.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    let copy = restorer.wait_for_copy()?;
    let cgroup = Cgroup::around(copy, TOO_LITTLE)?;
    tests::matrix::fast_link(rig)?;
    wait_until(PATIENCE, "lazy-restorer to say so", || {
        restorer.process.stderr().contains("no memory")
    })?;
    // Longer than a link lives that nobody drives.
    let until = Instant::now() + IDLE_TIMEOUT + IDLE_TIMEOUT / 2;
    wait_until(PATIENCE, "it to go on", || Instant::now() > until)?;
    ensure!(restorer.process.is_running(), "lazy-restorer ended");
    ensure!(server.process.is_running(), "page-server ended");
    let said = restorer.process.stderr();
    ensure!(!said.contains("reconnect"), "the link was lost: {said}");
    ensure!(said.matches("no memory").count() == 1, "{said}");
    cgroup.write("memory.limit_in_bytes", "-1")?;
    restorer.expect_success()?;
    let said = restorer.process.stderr();
    ensure!(said.contains("needs again"), "{said}");
    server.expect_success()?;
    assert_moved(rig, copy)?;
    toucher.finish()
}
