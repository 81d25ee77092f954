//! CRIU's dump and restore are somebody else's: our pair stands between, in the place of CRIU's own daemons.

use std::process::ExitCode;
use std::sync::atomic::Ordering;

use anyhow::{Result, ensure};
use tests::criu_baseline::BaselineHome;
use tests::external::Orchestrator;
use tests::harness::{self, MIGRATION, Need, Test};
use tests::pair::PATIENCE;
use tests::random::seed_of_this_run;
use tests::rig::Rig;
use tests::torture::{Torture, TorturePlan};
use tests::warm::WarmCopies;

const CLONE: &[Need] = &[Need::Namespaces, Need::Criu, Need::Program("python3")];

fn main() -> ExitCode {
    harness::main([
        Test {
            name: "a_full_dump_is_served",
            needs: MIGRATION,
            body: a_full_dump_is_served,
        },
        Test {
            name: "a_foreign_lazy_dump_is_served",
            needs: MIGRATION,
            body: a_foreign_lazy_dump_is_served,
        },
        Test {
            name: "a_foreign_dump_is_rolled_back",
            needs: MIGRATION,
            body: a_foreign_dump_is_rolled_back,
        },
        Test {
            name: "a_failed_restore_gives_the_workload_back",
            needs: MIGRATION,
            body: a_failed_restore_gives_the_workload_back,
        },
        Test {
            name: "images_of_another_dump_are_refused",
            needs: MIGRATION,
            body: images_of_another_dump_are_refused,
        },
        Test {
            name: "one_frozen_process_becomes_three",
            needs: CLONE,
            body: one_frozen_process_becomes_three,
        },
        Test {
            name: "one_frozen_process_becomes_two_others",
            needs: CLONE,
            body: one_frozen_process_becomes_two_others,
        },
        Test {
            name: "one_dump_becomes_three_processes",
            needs: CLONE,
            body: one_dump_becomes_three_processes,
        },
    ])
}

fn start_torture(rig: &Rig) -> Result<Torture> {
    let plan = TorturePlan {
        mib: 48,
        threads: 2,
        children: 1,
        seed: seed_of_this_run(),
        ..TorturePlan::default()
    };
    Torture::start(rig, plan)
}

fn a_full_dump_is_served(rig: &Rig) -> Result<()> {
    let torture = start_torture(rig)?;
    let orchestrator = Orchestrator::new(rig)?;
    let home = BaselineHome::new(rig)?;
    orchestrator.dump(torture.pid())?;
    let mut server = orchestrator.start_server(&["serve"])?;
    orchestrator.copy_images()?;
    let mut daemon = orchestrator.start_lazy_pages()?;
    orchestrator.restore(&home, torture.pid())?;
    daemon.expect_success()?;
    server.expect_success()?;
    torture.wait_for_rounds(200)?;
    torture.finish()
}

fn a_foreign_lazy_dump_is_served(rig: &Rig) -> Result<()> {
    let mut torture = start_torture(rig)?;
    let orchestrator = Orchestrator::new(rig)?;
    let home = BaselineHome::new(rig)?;
    let mut dump = orchestrator.start_lazy_dump(torture.pid())?;
    let pid = torture.pid().to_string();
    let mut server = orchestrator.start_server(&["attach", "--pid", &pid])?;
    orchestrator.copy_images()?;
    let mut daemon = orchestrator.start_lazy_pages()?;
    orchestrator.restore(&home, torture.pid())?;
    daemon.expect_success()?;
    server.expect_success()?;
    let ended = dump.wait(PATIENCE)?;
    ensure!(ended.success(), "criu dump: {ended}: {}", dump.stderr());
    ensure!(!torture.process.is_running(), "the original still lives");
    torture.wait_for_rounds(200)?;
    torture.finish()
}

/// Nobody comes, and the operator stops `page-server`: the workload runs on, its connections unharmed.
fn a_foreign_dump_is_rolled_back(rig: &Rig) -> Result<()> {
    let torture = start_torture(rig)?;
    let orchestrator = Orchestrator::new(rig)?;
    let mut dump = orchestrator.start_lazy_dump(torture.pid())?;
    let pid = torture.pid().to_string();
    let mut server = orchestrator.start_server(&["attach", "--pid", &pid])?;
    let ended = server.terminate()?;
    ensure!(!ended.success(), "it was stopped");
    let ended = dump.wait(PATIENCE)?;
    ensure!(!ended.success(), "criu dump says that it worked");
    torture.wait_for_rounds(200)?;
    torture.finish()
}

/// CRIU cannot restore: the destination kills what there is of it, and the workload runs on the source.
fn a_failed_restore_gives_the_workload_back(rig: &Rig) -> Result<()> {
    let torture = start_torture(rig)?;
    let orchestrator = Orchestrator::new(rig)?;
    let home = BaselineHome::new(rig)?;
    let mut dump = orchestrator.start_lazy_dump(torture.pid())?;
    let pid = torture.pid().to_string();
    let mut server = orchestrator.start_server(&["attach", "--pid", &pid])?;
    orchestrator.copy_images()?;
    std::fs::remove_file(orchestrator.copied.join("reg-files.img")).ok();
    std::fs::remove_file(orchestrator.copied.join("files.img"))?;
    let mut daemon = orchestrator.start_lazy_pages()?;
    ensure!(
        orchestrator.restore(&home, torture.pid()).is_err(),
        "CRIU restored files it has no image of"
    );
    let failed = daemon.end()?;
    ensure!(failed.code() == Some(8), "lazy-restorer: {failed}");
    let failed = server.end()?;
    ensure!(!failed.success(), "page-server: {failed}");
    dump.wait(PATIENCE)?;
    let foreign = torture.board.pulse.foreign_ticks.load(Ordering::Relaxed);
    ensure!(foreign == 0, "the copy ran");
    torture.wait_for_rounds(200)?;
    torture.finish()
}

fn images_of_another_dump_are_refused(rig: &Rig) -> Result<()> {
    let (first, second) = (start_torture(rig)?, Orchestrator::new(rig)?);
    second.dump(first.pid())?;
    second.copy_images()?;
    // As after a later dump of the same process, which the destination was not given.
    let inventory = second.copied.join("inventory.img");
    let mut changed = std::fs::read(&inventory)?;
    *changed.last_mut().expect("not empty") ^= 1;
    std::fs::write(&inventory, changed)?;
    let mut server = second.start_server(&["serve"])?;
    let mut daemon = second.spawn_lazy_pages(&second.copied)?;
    let ended = daemon.end()?;
    ensure!(!ended.success(), "images of another dump were accepted");
    let line = daemon.error_line()?;
    ensure!(line.contains("another dump"), "{line}");
    ensure!(!server.end()?.success(), "page-server served them");
    Ok(())
}

fn one_dump_becomes_three_processes(rig: &Rig) -> Result<()> {
    const COPIES: usize = 3;
    let warm = WarmCopies::start(rig, 64)?;
    let orchestrator = Orchestrator::new(rig)?;
    orchestrator.dump(warm.pid())?;
    let mut server = orchestrator.start_server(&["serve", "--fan-out", &COPIES.to_string()])?;
    let restorers = (0..COPIES).map(|copy| orchestrator.start_restorer(copy));
    let mut restorers = restorers.collect::<Result<Vec<_>>>()?;
    for restorer in &mut restorers {
        restorer.expect_success()?;
    }
    server.expect_success()?;
    warm.finish(COPIES)
}

fn one_frozen_process_becomes_three(rig: &Rig) -> Result<()> {
    let (warm, dump_worked) = clone_frozen(rig, &["--keep-original"])?;
    ensure!(!dump_worked, "criu dump says that the original is gone");
    warm.finish(3)
}

fn one_frozen_process_becomes_two_others(rig: &Rig) -> Result<()> {
    let (mut warm, dump_worked) = clone_frozen(rig, &[])?;
    ensure!(dump_worked, "criu dump failed");
    ensure!(!warm.original_lives(), "the original still lives");
    warm.finish(2)
}

/// Makes two clones of a frozen process; says also whether its CRIU took that for a success.
fn clone_frozen(rig: &Rig, options: &[&str]) -> Result<(WarmCopies, bool)> {
    const COPIES: usize = 2;
    let warm = WarmCopies::start(rig, 64)?;
    let orchestrator = Orchestrator::new(rig)?;
    let mut dump = orchestrator.start_lazy_dump(warm.pid())?;
    let (pid, copies) = (warm.pid().to_string(), COPIES.to_string());
    let attach = ["attach", "--pid", &pid, "--fan-out", &copies];
    let mut server = orchestrator.start_server(&[&attach, options].concat())?;
    let restorers = (0..COPIES).map(|copy| orchestrator.start_restorer(copy));
    let mut restorers = restorers.collect::<Result<Vec<_>>>()?;
    for restorer in &mut restorers {
        restorer.expect_success()?;
    }
    server.expect_success()?;
    Ok((warm, dump.wait(PATIENCE)?.success()))
}
