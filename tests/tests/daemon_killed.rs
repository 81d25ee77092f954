//! The same workload, moved by CRIU's daemon and by ours; both daemons are killed (SIGKILL) while pages are missing.
//!
//! When the last descriptor of a `userfaultfd` closes the kernel unregisters its memory, and missing pages read as
//! zeros. CRIU's daemon held the last one. Ours never does: there is the keeper.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use tests::board::Mismatch;
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
    let mut seen = criu_reads_zeros(rig, plan)?;
    for _ in 1..ATTEMPTS {
        if matches!(seen, Seen::Zeros(_)) {
            break;
        }
        println!("CRIU's lazy-pages killed: {seen:?}; once more");
        // Its workload is damaged and stays where it is: each one gets a rig of its own.
        seen = on_another_rig(move |rig| criu_reads_zeros(rig, plan)).context("CRIU's daemon")?;
    }
    match seen {
        Seen::Zeros(mismatch) => println!("CRIU's lazy-pages killed: {mismatch}"),
        Seen::Death => println!("CRIU's lazy-pages killed: the workload died each time"),
        Seen::Nothing => bail!("CRIU's lazy-pages killed {ATTEMPTS} times: no page was missing"),
    }
    on_another_rig(move |rig| ours_waits(rig, plan)).context("our daemon")
}

/// Moves by CRIU until the workload tells what it read: one that reads zeros where it keeps its own pointers dies.
const ATTEMPTS: usize = 6;

/// Time in which a worker touches each of its pages many times.
const LONG_ENOUGH: Duration = Duration::from_secs(15);

/// What became of a workload whose daemon was killed.
#[derive(Debug)]
enum Seen {
    /// It read zeros where something else had been, and ran on.
    Zeros(Mismatch),
    /// It died, or gave up for a system call that failed.
    Death,
    /// Nothing: its pages were all there.
    Nothing,
}

fn on_another_rig<T: Send + 'static>(
    body: impl FnOnce(&Rig) -> Result<T> + Send + 'static,
) -> Result<T> {
    std::thread::spawn(move || body(&Rig::new()?))
        .join()
        .unwrap_or_else(|_| anyhow::bail!("panicked"))
}

/// Silently: the workload runs on, and only because it compares does it notice that its pages are gone.
fn criu_reads_zeros(rig: &Rig, plan: TorturePlan) -> Result<Seen> {
    let torture = Torture::start(rig, plan)?;
    let home = BaselineHome::new(rig)?;
    // Most pages are missing when the daemon dies, but those that every step needs are there.
    rig.destination
        .shell(&tests::matrix::slow_link(rig))
        .context("the link")?;
    let mut works = Ok(());
    let abandoned = criu_baseline::lose_the_daemon(rig, &home, torture.pid(), || {
        works = torture.wait_for_rounds(5);
    })?;
    if works.is_err() {
        // By CRIU's daemon while it lived: that is not what is asked here.
        return Ok(Seen::Death);
    }
    let deadline = Instant::now() + LONG_ENOUGH;
    let mut seen = || match torture.board.mismatch() {
        Some(mismatch) => Some(Seen::Zeros(mismatch)),
        None if !task::is_alive(abandoned.pid) => Some(Seen::Death),
        None => (Instant::now() > deadline).then_some(Seen::Nothing),
    };
    let seen = wait_for(PATIENCE, "what becomes of the workload", &mut seen)?;
    if let Seen::Zeros(mismatch) = &seen {
        ensure!(mismatch.got == 0, "not zeros: {mismatch}");
        ensure!(mismatch.expected != 0, "nothing was there: {mismatch}");
    }
    Ok(seen)
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
