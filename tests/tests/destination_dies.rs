//! The destination dies at each phase before the cutover: the source thaws the workload, and a second try succeeds.

use std::process::ExitCode;

use anyhow::Result;
use nix::sys::signal::{Signal, kill};
use tests::exit_code::{CONNECTION, INTERRUPTED};
use tests::failure::{Bystander, expect_failure};
use tests::gate::Gate;
use tests::harness::{self, Body, REDIS_MIGRATION, Test};
use tests::pair::{PATIENCE, PairPlan, Side};
use tests::rig::Rig;
use tests::wait::wait_until;
use tests::{fake_criu, namespace, task};

fn main() -> ExitCode {
    let tests: [(&'static str, Body); 7] = [
        (
            "killed_while_the_source_freezes",
            killed_while_the_source_freezes,
        ),
        ("killed_before_restore", killed_before_restore),
        (
            "terminated_while_the_source_freezes",
            terminated_while_the_source_freezes,
        ),
        ("terminated_before_restore", terminated_before_restore),
        ("killed_when_criu_starts", killed_when_criu_starts),
        (
            "killed_while_tasks_are_rebuilt",
            killed_while_tasks_are_rebuilt,
        ),
        (
            "the_source_is_terminated_while_frozen",
            the_source_is_terminated_while_frozen,
        ),
    ];
    harness::main(tests.map(|(name, body)| Test {
        name,
        needs: REDIS_MIGRATION,
        body,
    }))
}

fn killed_while_the_source_freezes(rig: &Rig) -> Result<()> {
    dies_while_the_source_freezes(rig, Signal::SIGKILL)
}

fn terminated_while_the_source_freezes(rig: &Rig) -> Result<()> {
    dies_while_the_source_freezes(rig, Signal::SIGTERM)
}

fn killed_before_restore(rig: &Rig) -> Result<()> {
    dies_before_restore(rig, Signal::SIGKILL)
}

fn terminated_before_restore(rig: &Rig) -> Result<()> {
    dies_before_restore(rig, Signal::SIGTERM)
}

fn dies_while_the_source_freezes(rig: &Rig, signal: Signal) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let plan = PairPlan::new(rig)?;
    let gate = Gate::new(rig, "frozen")?;
    let held = PairPlan {
        on_frozen: gate.after(&plan.on_frozen),
        ..plan.clone()
    };
    let mut server = held.start_server(rig, bystander.redis.pid())?;
    let mut restorer = held.start_restorer(rig)?;
    gate.wait(PATIENCE)?;
    end(&mut restorer, signal)?;
    gate.open()?;
    expect_failure(
        &mut server,
        source_exit_code(signal),
        &["page-server: error:", "destination"],
    )?;
    bystander.assert_movable(rig, &plan)
}

/// CRIU is about to restore, in a PID namespace that nobody will tell any more that its work is in vain.
fn killed_when_criu_starts(rig: &Rig) -> Result<()> {
    dies_in_restore(rig, |_| Ok(()))
}

/// Tasks are rebuilt but do not run yet: some may stand in page faults that nobody will answer any more.
fn killed_while_tasks_are_rebuilt(rig: &Rig) -> Result<()> {
    dies_in_restore(rig, |rig| {
        let destination = namespace::path(rig.destination.namespace());
        wait_until(PATIENCE, "a rebuilt task", || {
            let there = task::in_network_namespace(&destination);
            there
                .into_iter()
                .any(|pid| task::name(pid) == "redis-server")
        })
    })
}

/// The source stands still meanwhile: it neither answers page faults nor lets the workload go.
fn dies_in_restore(rig: &Rig, until: fn(&Rig) -> Result<()>) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let plan = PairPlan::new(rig)?;
    let gate = Gate::new(rig, "restore")?;
    let mut held = plan.clone();
    held.destination_criu = fake_criu::waiting_at(rig, "restore", &gate)?;
    held.restorer.push("-v".into());
    let mut server = held.start_server(rig, bystander.redis.pid())?;
    let mut restorer = held.start_restorer(rig)?;
    gate.wait(PATIENCE)?;
    // CRIU starts before the source has said everything without which no task is made.
    wait_until(PATIENCE, "the last word of the source", || {
        restorer.process.stderr().contains("phase=listen")
    })?;
    kill(server.process.pid(), Signal::SIGSTOP)?;
    gate.open()?;
    until(rig)?;
    end(&mut restorer, Signal::SIGKILL)?;
    wait_until(PATIENCE, "the destination to be empty", || {
        task::in_network_namespace(&namespace::path(rig.destination.namespace())).is_empty()
    })?;
    kill(server.process.pid(), Signal::SIGCONT)?;
    expect_failure(
        &mut server,
        CONNECTION,
        &["page-server: error:", "destination"],
    )?;
    bystander.assert_movable(rig, &plan)
}

fn dies_before_restore(rig: &Rig, signal: Signal) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let plan = PairPlan::new(rig)?;
    let gate = Gate::new(rig, "before-restore")?;
    let held = PairPlan {
        before_restore: gate.after(&plan.before_restore),
        ..plan.clone()
    };
    let mut server = held.start_server(rig, bystander.redis.pid())?;
    let mut restorer = held.start_restorer(rig)?;
    gate.wait(PATIENCE)?;
    end(&mut restorer, signal)?;
    gate.open()?;
    expect_failure(
        &mut server,
        source_exit_code(signal),
        &["page-server: error:", "destination"],
    )?;
    bystander.assert_movable(rig, &plan)
}

/// A destination that is asked to end says goodbye; one that is killed cannot.
fn source_exit_code(signal: Signal) -> i32 {
    if signal == Signal::SIGKILL {
        CONNECTION
    } else {
        tests::exit_code::ABORTED_BY_PEER
    }
}

fn end(side: &mut Side, signal: Signal) -> Result<()> {
    kill(side.process.pid(), signal)?;
    side.end()?;
    Ok(())
}

fn the_source_is_terminated_while_frozen(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let plan = PairPlan::new(rig)?;
    let gate = Gate::new(rig, "frozen")?;
    let held = PairPlan {
        on_frozen: gate.after(&plan.on_frozen),
        ..plan.clone()
    };
    let mut server = held.start_server(rig, bystander.redis.pid())?;
    let mut restorer = held.start_restorer(rig)?;
    gate.wait(PATIENCE)?;
    kill(server.process.pid(), Signal::SIGTERM)?;
    expect_failure(
        &mut server,
        INTERRUPTED,
        &["page-server: error:", "SIGTERM"],
    )?;
    expect_failure(
        &mut restorer,
        tests::exit_code::ABORTED_BY_PEER,
        &["lazy-restorer: error:", "source"],
    )?;
    bystander.assert_movable(rig, &plan)
}
