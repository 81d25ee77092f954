//! An interpreter with a garbage collector that walks over all of its memory.

use std::process::ExitCode;

use anyhow::Result;
use tests::harness::{self, Need, Test};
use tests::leftovers::assert_moved;
use tests::pair::PairPlan;
use tests::python::Python;
use tests::rig::Rig;

const PYTHON: &[Need] = &[Need::Namespaces, Need::Criu, Need::Program("python3")];

fn main() -> ExitCode {
    harness::main([Test {
        name: "nested_data_survives",
        needs: PYTHON,
        body: nested_data_survives,
    }])
}

fn nested_data_survives(rig: &Rig) -> Result<()> {
    let python = Python::start(rig, 20_000)?;
    let migration = PairPlan::new(rig)?.migrate(rig, python.pid())?;
    python.wait_for_rounds(20)?;
    assert_moved(rig, migration.pid)?;
    python.finish()
}
