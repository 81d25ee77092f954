//! A program is killed after the cutover, and another one goes on with its session: nothing of the workload is lost.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use nix::sys::signal::{Signal, kill};
use tests::binaries;
use tests::harness::{self, Body, MIGRATION, Test};
use tests::leftovers::assert_moved;
use tests::pair::{PATIENCE, PairPlan, Side, session_of, sessions};
use tests::random::seed_of_this_run;
use tests::rig::Rig;
use tests::shell;
use tests::task;
use tests::torture::{Torture, TorturePlan};
use tests::wait::wait_until;

fn main() -> ExitCode {
    let tests: [(&'static str, Body); 4] = [
        (
            "a_killed_restorer_is_succeeded",
            a_killed_restorer_is_succeeded,
        ),
        ("successors_are_succeeded", successors_are_succeeded),
        (
            "a_killed_page_server_is_succeeded",
            a_killed_page_server_is_succeeded,
        ),
        (
            "the_original_is_thawed_by_force",
            the_original_is_thawed_by_force,
        ),
    ];
    harness::main(tests.map(|(name, body)| Test {
        name,
        needs: MIGRATION,
        body,
    }))
}

fn torture(rig: &Rig) -> Result<Torture> {
    Torture::start(
        rig,
        TorturePlan {
            mib: 96,
            children: 1,
            seed: seed_of_this_run(),
            ..TorturePlan::default()
        },
    )
}

/// A migration whose tasks run on the destination while most of their memory is on the source.
fn half_way(rig: &Rig, torture: &Torture) -> Result<(PairPlan, Side, Side)> {
    let plan = PairPlan::new(rig)?;
    let mut slow = plan.clone();
    slow.restorer.push("--no-push".into());
    let server = slow.start_server(rig, torture.pid())?;
    let mut restorer = slow.start_restorer(rig)?;
    restorer.wait_for_copy()?;
    torture.wait_for_rounds(1)?;
    Ok((plan, server, restorer))
}

fn a_killed_page_server_is_succeeded(rig: &Rig) -> Result<()> {
    let torture = torture(rig)?;
    let plan = PairPlan::new(rig)?;
    let mut server = plan.start_server(rig, torture.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    restorer.wait_for_copy()?;
    kill(server.process.pid(), Signal::SIGKILL)?;
    server.end()?;
    ensure!(task::is_frozen(torture.pid()), "the original runs");
    let listed = sessions(rig, "source")?;
    ensure!(listed[0]["standing"] == "orphaned", "{listed:?}");
    let mut successor = plan.resume_server(rig, &[])?;
    restorer.expect_success()?;
    successor.expect_success()?;
    torture.wait_for_rounds(20)?;
    assert_moved(rig, restorer.restored_pid()?)?;
    ensure!(
        sessions(rig, "source")?.is_empty(),
        "a session file is left"
    );
    torture.finish()
}

fn a_killed_restorer_is_succeeded(rig: &Rig) -> Result<()> {
    let torture = torture(rig)?;
    let (plan, mut server, mut restorer) = half_way(rig, &torture)?;
    let copy = restorer.restored_pid()?;
    kill(restorer.process.pid(), Signal::SIGKILL)?;
    restorer.end()?;
    wait_until(PATIENCE, "a thread to wait for a page", || {
        task::waits_for_page(copy)
    })?;
    let listed = sessions(rig, "destination")?;
    ensure!(listed[0]["standing"] == "orphaned", "{listed:?}");
    let mut successor = plan.resume_restorer(rig, &[])?;
    successor.expect_success()?;
    server.expect_success()?;
    torture.wait_for_rounds(20)?;
    assert_moved(rig, copy)?;
    ensure!(
        sessions(rig, "destination")?.is_empty(),
        "a session file is left"
    );
    torture.finish()
}

/// Both programs are killed, and their successors, and again.
fn successors_are_succeeded(rig: &Rig) -> Result<()> {
    let torture = torture(rig)?;
    let (plan, mut server, mut restorer) = half_way(rig, &torture)?;
    let copy = restorer.restored_pid()?;
    for options in [&["--no-push"][..], &["--no-push"], &[]] {
        for side in [&mut restorer, &mut server] {
            kill(side.process.pid(), Signal::SIGKILL)?;
            side.end()?;
        }
        server = plan.resume_server(rig, &[])?;
        restorer = plan.resume_restorer(rig, options)?;
        let said = |words: &str| restorer.process.stderr().contains(words);
        wait_until(PATIENCE, "the ends to meet", || said("reconnected"))?;
    }
    restorer.expect_success()?;
    server.expect_success()?;
    torture.wait_for_rounds(20)?;
    assert_moved(rig, copy)?;
    torture.finish()
}

fn the_original_is_thawed_by_force(rig: &Rig) -> Result<()> {
    let torture = torture(rig)?;
    let (plan, mut server, mut restorer) = half_way(rig, &torture)?;
    let session = session_of(rig, "source")?;
    let thaw = |force: &[&str]| -> Result<()> {
        let mut command = rig.source.command(binaries::program("page-server")?);
        shell::run(command.args(["thaw", "--session", &session]).args(force))?;
        Ok(())
    };
    let refused = thaw(&[]).expect_err("the copy may be running").to_string();
    ensure!(refused.contains("--i-know-the-copy-is-dead"), "{refused}");
    ensure!(task::is_frozen(torture.pid()), "the original runs");
    let copy = restorer.restored_pid()?;
    let home = task::parent(copy).unwrap_or(copy);
    // First of all: a copy that ends under a lazy-restorer has done its work.
    kill(restorer.process.pid(), Signal::SIGKILL)?;
    restorer.end()?;
    kill(home, Signal::SIGKILL)?;
    wait_until(PATIENCE, "the copy to end", || !task::is_alive(copy))?;
    thaw(&["--i-know-the-copy-is-dead"])?;
    server.end()?;
    wait_until(PATIENCE, "the original to run", || {
        !task::is_frozen(torture.pid())
    })?;
    torture.wait_for_original(20)?;
    ensure!(
        sessions(rig, "source")?.is_empty(),
        "a session file is left"
    );
    drop(plan);
    torture.finish()
}
