//! Several processes with several threads, a zombie, and many VMAs, as one tree.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use nix::unistd::Pid;
use tests::harness::{self, MIGRATION, Test};
use tests::leftovers::assert_moved;
use tests::pair::{PATIENCE, PairPlan};
use tests::random::seed_of_this_run;
use tests::rig::Rig;
use tests::task;
use tests::torture::{Torture, TorturePlan};
use tests::wait::wait_until;

/// VMAs the tree's root has at least: "a few hundred".
const MIN_VMAS: usize = 300;

fn main() -> ExitCode {
    harness::main([
        Test {
            name: "a_tree_with_a_zombie",
            needs: MIGRATION,
            body: a_tree_with_a_zombie,
        },
        Test {
            name: "a_thousand_vmas",
            needs: MIGRATION,
            body: a_thousand_vmas,
        },
    ])
}

fn a_tree_with_a_zombie(rig: &Rig) -> Result<()> {
    let plan = TorturePlan {
        mib: 64,
        threads: 2,
        children: 3,
        zombie: true,
        ..TorturePlan::default()
    };
    let torture = Torture::start(
        rig,
        TorturePlan {
            seed: seed_of_this_run(),
            ..plan
        },
    )?;
    wait_until(PATIENCE, "the zombie", || zombies(torture.pid()) == 1)?;
    let migration = PairPlan::new(rig)?.migrate(rig, torture.pid())?;
    torture.wait_for_rounds(200)?;
    ensure!(
        task::children(migration.pid).len() >= 4,
        "the tree is not complete on the destination"
    );
    ensure!(zombies(migration.pid) >= 1, "the zombie was lost");
    assert_moved(rig, migration.pid)?;
    torture.finish()
}

fn a_thousand_vmas(rig: &Rig) -> Result<()> {
    let plan = TorturePlan {
        mib: 16,
        threads: 2,
        pieces: 500,
        seed: seed_of_this_run(),
        ..TorturePlan::default()
    };
    let torture = Torture::start(rig, plan)?;
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", torture.pid()))?;
    ensure!(
        maps.lines().count() >= MIN_VMAS,
        "only {} VMAs",
        maps.lines().count()
    );
    PairPlan::new(rig)?.migrate(rig, torture.pid())?;
    torture.wait_for_rounds(200)?;
    torture.finish()
}

fn zombies(root: Pid) -> usize {
    task::children(root)
        .into_iter()
        .filter(|child| task::state(*child) == Some('Z'))
        .count()
}
