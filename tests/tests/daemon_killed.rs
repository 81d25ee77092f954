//! The same workload, moved by CRIU's daemon and by ours; both daemons are killed (SIGKILL) while pages are missing.
//!
//! When the last descriptor of a `userfaultfd` closes the kernel unregisters its memory, and missing pages read as
//! zeros. CRIU's daemon held the last one. Ours never does: there is the keeper.

use std::process::ExitCode;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use tests::criu_baseline::{self, BaselineHome};
use tests::harness::{self, MIGRATION, Test};
use tests::leftovers::assert_moved;
use tests::pair::{PATIENCE, PairPlan};
use tests::random::seed_of_this_run;
use tests::rig::Rig;
use tests::task;
use tests::touch::{Pattern, Stage, TouchPlan, Toucher};
use tests::wait::wait_until;

/// All memory takes about five seconds.
const LINK: &str = "rate 100mbit burst 64kb latency 200ms";

/// Touches after which what each of them needs is there: the code, the stack, the heap.
const FIRST: u64 = 50;

fn main() -> ExitCode {
    harness::main([Test {
        name: "criu_reads_zeros_where_ours_waits",
        needs: MIGRATION,
        body: criu_reads_zeros_where_ours_waits,
    }])
}

fn criu_reads_zeros_where_ours_waits(rig: &Rig) -> Result<()> {
    let plan = TouchPlan {
        mib: 64,
        seed: seed_of_this_run(),
        pattern: Pattern::Random,
        rate: 4000,
    };
    let zeros = criu_reads_zeros(rig, plan).context("CRIU's daemon")?;
    println!("CRIU's lazy-pages killed: {zeros} pages read as zeros");
    // CRIU's workload is damaged and stays where it is.
    on_another_rig(move |rig| ours_waits(rig, plan)).context("our daemon")
}

fn on_another_rig<T: Send + 'static>(
    body: impl FnOnce(&Rig) -> Result<T> + Send + 'static,
) -> Result<T> {
    std::thread::spawn(move || body(&Rig::new()?))
        .join()
        .unwrap_or_else(|_| bail!("panicked"))
}

/// Silently: the workload runs on, and only because it compares does it notice that its pages are gone. How many it read
/// as zeros, which must have been some: what it needs to compare is there before the daemon dies, and most of its memory
/// is not.
fn criu_reads_zeros(rig: &Rig, plan: TouchPlan) -> Result<u64> {
    let toucher = Toucher::start(rig, plan)?;
    let home = BaselineHome::new(rig)?;
    rig.destination
        .shell(&tests::matrix::shaped_link(rig, LINK))
        .context("the link")?;
    let mut works = false;
    let abandoned = criu_baseline::lose_the_daemon(rig, &home, toucher.pid(), || {
        works = toucher.wait_for_touches(FIRST, PATIENCE);
    })?;
    ensure!(works, "the workload does not run under CRIU");
    let board = toucher.board;
    wait_until(PATIENCE, "the workload to touch all its pages", || {
        // Zeros in the place of its own pointers end it early.
        board.stage() == Stage::Done || !task::is_alive(abandoned.pid)
    })?;
    let zeros = board.zeroed.load(Ordering::Relaxed);
    ensure!(zeros > 0, "no page was read as zeros");
    Ok(zeros)
}

/// Threads that touch a missing page wait until a successor brings it, and every byte is right in the end.
fn ours_waits(rig: &Rig, plan: TouchPlan) -> Result<()> {
    let toucher = Toucher::start(rig, plan)?;
    let pair = PairPlan::new(rig)?;
    let mut without_push = pair.clone();
    without_push.restorer.push("--no-push".into());
    let mut server = without_push.start_server(rig, toucher.pid())?;
    let mut restorer = without_push.start_restorer(rig)?;
    let copy = restorer.wait_for_copy()?;
    kill(restorer.process.pid(), Signal::SIGKILL)?;
    restorer.end()?;
    wait_until(PATIENCE, "a thread to wait for a page", || {
        task::waits_for_page(copy)
    })?;
    toucher.assert_unharmed()?;
    let mut successor = pair.resume_restorer(rig, &[])?;
    successor.expect_success()?;
    server.expect_success()?;
    assert_moved(rig, copy)?;
    toucher.finish()?;
    println!("lazy-restorer killed: its threads waited, and every byte was right after `resume`");
    Ok(())
}
