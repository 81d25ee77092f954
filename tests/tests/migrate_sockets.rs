//! Sockets of every kind move with what is in their buffers.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use tests::harness::{self, Need, Test};
use tests::leftovers::assert_moved;
use tests::newcomers::{self, Newcomers};
use tests::pair::PairPlan;
use tests::process::Process;
use tests::rig::Rig;
use tests::sockets::Sockets;

const NEEDS: &[Need] = &[Need::Namespaces, Need::Criu, Need::Program("python3")];

fn main() -> ExitCode {
    harness::main([
        Test {
            name: "buffers_full_of_data",
            needs: NEEDS,
            body: buffers_full_of_data,
        },
        Test {
            name: "a_backlog_that_is_never_empty",
            needs: NEEDS,
            body: a_backlog_that_is_never_empty,
        },
        Test {
            name: "a_backlog_that_is_never_empty_behind_hooks",
            needs: NEEDS,
            body: a_backlog_that_is_never_empty_behind_hooks,
        },
    ])
}

fn buffers_full_of_data(rig: &Rig) -> Result<()> {
    let sockets = Sockets::start(rig)?;
    let plan = PairPlan::new(rig)?.move_address(rig);
    let migration = plan.migrate(rig, sockets.process.pid())?;
    sockets.finish()?;
    assert_moved(rig, migration.pid)
}

/// CRIU cannot dump who waits in a backlog: they are let in before the freeze, while others wait before the door.
fn a_backlog_that_is_never_empty(rig: &Rig) -> Result<()> {
    let plan = PairPlan::new(rig)?.move_address(rig);
    newcomers_are_all_served(rig, plan)
}

/// The same where the operator's commands move the address.
fn a_backlog_that_is_never_empty_behind_hooks(rig: &Rig) -> Result<()> {
    newcomers_are_all_served(rig, PairPlan::new(rig)?)
}

fn newcomers_are_all_served(rig: &Rig, mut plan: PairPlan) -> Result<()> {
    let mut command = rig.source.command("setsid");
    let server = Process::start_detached("server", command.args(newcomers::server()))?;
    let newcomers = Newcomers::start(rig.client.namespace(), rig.service.0)?;
    plan.server.push("--verbose".into());
    let mut page_server = plan.start_server(rig, server.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    restorer.expect_success()?;
    page_server.expect_success()?;
    // So somebody waited when the door was shut.
    let said = page_server.process.stderr();
    ensure!(
        said.contains("accepted who waited"),
        "nobody waited: {said}"
    );
    newcomers.wait_for_answers(20)?;
    newcomers.end()?;
    assert_moved(rig, restorer.restored_pid()?)
}
