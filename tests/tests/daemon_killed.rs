//! The same workload, moved by CRIU's daemon and by ours; both daemons are killed (SIGKILL) while pages are missing.
//!
//! When the last descriptor of a `userfaultfd` closes the kernel unregisters its memory, and missing pages read as
//! zeros. CRIU's daemon held the last one. Ours never does: there is the keeper.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use tests::binaries;
use tests::criu_baseline::{self, BaselineHome};
use tests::harness::{self, MIGRATION, Test};
use tests::leftovers::assert_moved;
use tests::pair::{PATIENCE, PairPlan};
use tests::random::seed_of_this_run;
use tests::rig::Rig;
use tests::task;
use tests::torture::{Torture, TorturePlan};
use tests::wait::{wait_for, wait_until};

fn main() -> ExitCode {
    harness::main([Test {
        name: "criu_reads_zeros_where_ours_waits",
        needs: MIGRATION,
        body: criu_reads_zeros_where_ours_waits,
    }])
}

fn criu_reads_zeros_where_ours_waits(rig: &Rig) -> Result<()> {
    let plan = TorturePlan {
        mib: 64,
        threads: 2,
        seed: seed_of_this_run(),
        ..TorturePlan::default()
    };
    criu_reads_zeros(rig, plan).context("CRIU's daemon")?;
    // Its workload is damaged and stays where it is; ours gets another rig.
    std::thread::spawn(move || ours_waits(&Rig::new()?, plan))
        .join()
        .unwrap_or_else(|_| anyhow::bail!("panicked"))
        .context("our daemon")
}

/// Silently: the workload runs on, and only because it compares does it notice that its pages are gone.
fn criu_reads_zeros(rig: &Rig, plan: TorturePlan) -> Result<()> {
    let torture = Torture::start(rig, plan)?;
    let home = BaselineHome::new(rig)?;
    let _abandoned = criu_baseline::lose_the_daemon(rig, &home, &binaries::criu()?, torture.pid())?;
    let mismatch = wait_for(PATIENCE, "the workload to find a page damaged", || {
        torture.board.mismatch()
    })?;
    ensure!(mismatch.got == 0, "not zeros: {mismatch}");
    ensure!(mismatch.expected != 0, "nothing was there: {mismatch}");
    println!("CRIU's lazy-pages killed: {mismatch}");
    Ok(())
}

/// Threads that touch a missing page wait until a successor brings it, and every byte is right in the end.
fn ours_waits(rig: &Rig, plan: TorturePlan) -> Result<()> {
    let torture = Torture::start(rig, plan)?;
    let pair = PairPlan::new(rig)?;
    let mut without_push = pair.clone();
    without_push.restorer.push("--no-push".into());
    let mut server = without_push.start_server(rig, torture.pid())?;
    let mut restorer = without_push.start_restorer(rig)?;
    let copy = restorer.wait_for_copy()?;
    kill(restorer.process.pid(), Signal::SIGKILL)?;
    restorer.end()?;
    wait_until(PATIENCE, "a thread to wait for a page", || {
        task::waits_for_page(copy)
    })?;
    torture.assert_unharmed()?;
    let mut successor = pair.resume_restorer(rig, &[])?;
    successor.expect_success()?;
    server.expect_success()?;
    torture.wait_for_rounds(50)?;
    assert_moved(rig, copy)?;
    torture.finish()?;
    println!("lazy-restorer killed: its threads waited, and every byte was right after `resume`");
    Ok(())
}
