//! The pure resolver against a naive model of the kernel, the source and the wire.
//!
//! `PROPTEST_CASES` raises the number of runs. A failing run is kept in `proptest-regressions/` of this crate.

use model_kernel::{Change, Content};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

#[path = "model/assertions.rs"]
mod assertions;
#[path = "model/source.rs"]
mod source;
#[path = "model/sut.rs"]
mod sut;
#[path = "model/transition.rs"]
mod transition;

use crate::sut::Migration;
use crate::transition::{Scenario, Step, scenario};

const CASES: u32 = 40_000;

fn config() -> ProptestConfig {
    let file = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/proptest-regressions/model.txt"
    );
    let raised = std::env::var_os("PROPTEST_CASES").is_some();
    let default = ProptestConfig::default();
    ProptestConfig {
        cases: if raised { default.cases } else { CASES },
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(file))),
        max_shrink_iters: 50_000,
        ..default
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn no_page_is_lost_invented_or_resurrected(scenario in scenario()) {
        run(&scenario);
    }
}

fn run(scenario: &Scenario) {
    let mut migration = Migration::new(&scenario.dump);
    if scenario.waits_only {
        migration.wait_only();
    }
    for (index, step) in scenario.steps.iter().enumerate() {
        if index == scenario.attach_at {
            migration.attach();
        }
        apply(&mut migration, step);
        migration.check();
    }
    finish(&mut migration);
}

fn apply(migration: &mut Migration, step: &Step) {
    match *step {
        Step::Serve => {
            migration.source.serve();
        }
        Step::Push { at, count, again } => {
            migration.source.push(at, count, again);
        }
        Step::Deliver { which, disturb } => deliver(migration, which, disturb),
        Step::Touch { who, .. }
        | Step::StaleFault { who, .. }
        | Step::Write { who, .. }
        | Step::Change(Change { who, .. })
        | Step::Fork { who }
        | Step::Exit { who, .. }
        | Step::Release { who, .. }
        | Step::Drain { who } => {
            if let Some(process) = migration.pick(who) {
                apply_to(migration, process, step);
            }
        }
    }
}

fn deliver(migration: &mut Migration, which: usize, disturb: Option<(usize, Change)>) {
    if migration.source.wire.is_empty() {
        return;
    }
    let index = which % migration.source.wire.len();
    let message = migration.source.wire.remove(index);
    if let Some((after, change)) = disturb {
        migration.disturb(after, change);
    }
    migration.deliver(message);
    migration.undisturbed();
}

fn apply_to(migration: &mut Migration, process: usize, step: &Step) {
    let kernel = &mut migration.kernel;
    let target = &mut kernel.processes[process];
    match *step {
        Step::Touch { at, .. } => {
            if let Some(page) = target.pick(at, |_| true) {
                target.touch(page);
            }
        }
        Step::StaleFault { at, .. } => {
            let page = target.pick(at, |content| content != Content::Unwatched);
            target.faults.extend(page);
        }
        Step::Write { at, .. } => target.write(at),
        Step::Change(change) => kernel.change(process, &change),
        Step::Fork { .. } => kernel.fork(process),
        Step::Exit { noticed, .. } => {
            kernel.exit(process);
            if noticed {
                migration.notice_exit(process);
            }
        }
        Step::Release { which, .. } => target.release(which),
        Step::Drain { .. } => migration.drain(process),
        Step::Serve | Step::Push { .. } | Step::Deliver { .. } => {}
    }
}

/// The workload rests, and the source sends all it still owes.
fn finish(migration: &mut Migration) {
    if !migration.is_attached() {
        migration.attach();
    }
    loop {
        rest(migration);
        let asked = migration.source.serve();
        let pushed = migration.source.push(0, 16, false);
        let arrived = migration.source.wire.pop();
        if let Some(message) = arrived {
            migration.deliver(message);
        }
        migration.check();
        if !asked && !pushed && arrived.is_none() {
            break;
        }
    }
    rest(migration);
    migration.check_end();
}

/// Every call returns and every fault is read.
fn rest(migration: &mut Migration) {
    let mut process = 0;
    while process < migration.kernel.processes.len() {
        if !migration.kernel.processes[process].alive {
            migration.notice_exit(process);
        }
        migration.drain(process);
        while !migration.kernel.processes[process].is_quiet() {
            migration.kernel.processes[process].release(0);
            migration.drain(process);
        }
        process += 1;
    }
}
