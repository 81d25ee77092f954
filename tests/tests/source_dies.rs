//! The source's programs die while they hold the workload: before the cutover it runs on, after it there is no second
//! copy.
//!
//! CRIU is killed only when its images are complete. Earlier it runs code of its own in the tasks, and a task whose CRIU
//! is killed at the wrong instruction dies of it; nobody but the kernel could prevent that.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::beating_redis::BeatingRedis;
use tests::exit_code::{ABORTED_BY_PEER, CONNECTION, FREEZE};
use tests::failure::{Bystander, expect_failure};
use tests::gate::Gate;
use tests::harness::{self, Body, REDIS_MIGRATION, Test};
use tests::pair::{PATIENCE, PairPlan, Side};
use tests::random::seed_of_this_run;
use tests::redis_client::ClientPlan;
use tests::rig::Rig;
use tests::task;
use tests::wait::wait_until;

fn main() -> ExitCode {
    let tests: [(&'static str, Body); 6] = [
        ("killed_while_frozen", killed_while_frozen),
        ("killed_during_the_restore", killed_during_the_restore),
        ("criu_is_killed_while_frozen", criu_is_killed_while_frozen),
        (
            "criu_and_its_server_are_killed",
            criu_and_its_server_are_killed,
        ),
        ("the_script_of_criu_is_killed", the_script_of_criu_is_killed),
        (
            "criu_is_killed_after_the_cutover",
            criu_is_killed_after_the_cutover,
        ),
    ];
    harness::main(tests.map(|(name, body)| Test {
        name,
        needs: REDIS_MIGRATION,
        body,
    }))
}

/// Runs a migration that is held while the workload is frozen, does `harm` to the source, and lets it go on.
struct Held {
    bystander: Bystander,
    plan: PairPlan,
    gate: Gate,
    server: Side,
    restorer: Side,
}

impl Held {
    /// At `--on-frozen`: the images are complete.
    fn while_frozen(rig: &Rig) -> Result<Self> {
        Self::start(rig, |held, gate| {
            held.on_frozen = gate.after(&held.on_frozen)
        })
    }

    /// At `--before-restore`: the destination has the skeleton.
    fn before_restore(rig: &Rig) -> Result<Self> {
        Self::start(rig, |held, gate| {
            held.before_restore = gate.after(&held.before_restore)
        })
    }

    fn start(rig: &Rig, hold: fn(&mut PairPlan, &Gate)) -> Result<Self> {
        let bystander = Bystander::start(rig)?;
        let plan = PairPlan::new(rig)?;
        let gate = Gate::new(rig, "held")?;
        let mut held = plan.clone();
        hold(&mut held, &gate);
        let server = held.start_server(rig, bystander.redis.pid())?;
        let restorer = held.start_restorer(rig)?;
        gate.wait(PATIENCE)?;
        Ok(Self {
            bystander,
            plan,
            gate,
            server,
            restorer,
        })
    }
}

/// The CRIU that holds the workload.
fn criu_of(server: &Side) -> Result<Pid> {
    let children = task::children(server.process.pid());
    let criu = children
        .into_iter()
        .find(|child| task::name(*child) == "criu");
    criu.context("page-server runs no CRIU")
}

fn killed_while_frozen(rig: &Rig) -> Result<()> {
    server_is_killed(rig, Held::while_frozen(rig)?)
}

fn killed_during_the_restore(rig: &Rig) -> Result<()> {
    server_is_killed(rig, Held::before_restore(rig)?)
}

fn server_is_killed(rig: &Rig, mut held: Held) -> Result<()> {
    kill(held.server.process.pid(), Signal::SIGKILL)?;
    held.server.end()?;
    held.gate.open()?;
    expect_failure(
        &mut held.restorer,
        CONNECTION,
        &["lazy-restorer: error:", "lost the source"],
    )?;
    held.bystander.assert_movable(rig, &held.plan)
}

fn criu_is_killed_while_frozen(rig: &Rig) -> Result<()> {
    let mut held = Held::before_restore(rig)?;
    kill(criu_of(&held.server)?, Signal::SIGKILL)?;
    held.gate.open()?;
    source_gives_up(&mut held.server, &mut held.restorer)?;
    held.bystander.assert_movable(rig, &held.plan)
}

fn source_gives_up(server: &mut Side, restorer: &mut Side) -> Result<()> {
    expect_failure(server, FREEZE, &["page-server: error:", "CRIU", "signal"])?;
    expect_failure(
        restorer,
        ABORTED_BY_PEER,
        &["lazy-restorer: error:", "source", "CRIU"],
    )
}

fn criu_and_its_server_are_killed(rig: &Rig) -> Result<()> {
    let mut held = Held::while_frozen(rig)?;
    let criu = criu_of(&held.server)?;
    // In this order nobody but the guard is left to do anything.
    let script = task::children(criu);
    kill(held.server.process.pid(), Signal::SIGSTOP)?;
    for pid in script.into_iter().chain([criu, held.server.process.pid()]) {
        kill(pid, Signal::SIGKILL)?;
    }
    held.server.end()?;
    held.gate.open()?;
    expect_failure(
        &mut held.restorer,
        CONNECTION,
        &["lazy-restorer: error:", "lost the source"],
    )?;
    // Nobody was left to run --on-thawed.
    rig.source.shell(&held.plan.on_thawed)?;
    held.bystander.assert_movable(rig, &held.plan)
}

fn the_script_of_criu_is_killed(rig: &Rig) -> Result<()> {
    let mut held = Held::before_restore(rig)?;
    let criu = criu_of(&held.server)?;
    for script in task::children(criu) {
        kill(script, Signal::SIGKILL)?;
    }
    held.gate.open()?;
    expect_failure(&mut held.server, FREEZE, &["page-server: error:", "CRIU"])?;
    expect_failure(
        &mut held.restorer,
        ABORTED_BY_PEER,
        &["lazy-restorer: error:", "source"],
    )?;
    held.bystander.assert_movable(rig, &held.plan)
}

/// The original stands still although nobody holds it any more: there is one workload.
fn criu_is_killed_after_the_cutover(rig: &Rig) -> Result<()> {
    let redis = BeatingRedis::start(
        rig,
        ClientPlan {
            mib: 32,
            seed: seed_of_this_run(),
            rate: 1000,
        },
    )?;
    let mut plan = PairPlan::new(rig)?;
    plan.restorer.push("--no-push".into());
    let server = plan.start_server(rig, redis.pid())?;
    let restorer = plan.start_restorer(rig)?;
    wait_until(PATIENCE, "the PID file", || restorer.restored_pid().is_ok())?;
    kill(criu_of(&server)?, Signal::SIGKILL)?;
    redis.assert_alive()?;
    wait_until(PATIENCE, "the original to stand still by itself", || {
        task::state(redis.pid()) == Some('T')
    })?;
    ensure!(task::is_alive(restorer.restored_pid()?), "the copy is gone");
    redis.assert_alive()?;
    redis.client.end()?;
    Ok(())
}
