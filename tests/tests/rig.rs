//! The rig itself, without the programs under test: CRIU's own post-copy moves each workload and nothing is damaged.
//!
//! When a migration by our programs fails and these tests pass, the workload and the machine are not to blame.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use nix::unistd::Pid;
use tests::beating_redis::BeatingRedis;
use tests::binaries;
use tests::criu_baseline::{self, BaselineHome};
use tests::harness::{self, MIGRATION, Need, REDIS_MIGRATION, Test};
use tests::python::Python;
use tests::random::seed_of_this_run;
use tests::redis_client::ClientPlan;
use tests::rig::Rig;
use tests::torture::{Torture, TorturePlan};
use tests::{namespace, task};

const PYTHON: &[Need] = &[Need::Namespaces, Need::Criu, Need::Program("python3")];

fn main() -> ExitCode {
    harness::main([
        Test {
            name: "hosts_reach_each_other",
            needs: &[Need::Namespaces],
            body: hosts_reach_each_other,
        },
        Test {
            name: "a_dropped_rig_leaves_nothing",
            needs: &[Need::Namespaces],
            body: a_dropped_rig_leaves_nothing,
        },
        Test {
            name: "criu_moves_redis",
            needs: REDIS_MIGRATION,
            body: criu_moves_redis,
        },
        Test {
            name: "criu_moves_python",
            needs: PYTHON,
            body: criu_moves_python,
        },
        Test {
            name: "torture_is_sound_at_home",
            needs: MIGRATION,
            body: torture_is_sound_at_home,
        },
    ])
}

fn hosts_reach_each_other(rig: &Rig) -> Result<()> {
    rig.client
        .shell(&format!("arping -q -f -w 5 -I eth0 {}", rig.service.0))?;
    rig.source.shell(&format!(
        "arping -q -f -w 5 -I eth0 {}",
        rig.destination.address()
    ))?;
    Ok(())
}

fn a_dropped_rig_leaves_nothing(_: &Rig) -> Result<()> {
    let rig = Rig::new()?;
    let folder = rig.folder().to_owned();
    let name = namespace::path(rig.source.namespace());
    rig.source
        .shell("setsid sleep 1000 </dev/null >/dev/null 2>&1 &")?;
    let started = task::in_network_namespace(&name);
    ensure!(!started.is_empty(), "the process was not started");
    drop(rig);
    ensure!(!name.exists(), "the namespace is still there");
    ensure!(!folder.exists(), "the directory is still there");
    ensure!(
        started.into_iter().all(|pid| !task::is_alive(pid)),
        "a process is still there"
    );
    Ok(())
}

fn criu_moves(rig: &Rig, pid: Pid) -> Result<()> {
    let home = BaselineHome::new(rig)?;
    let record = criu_baseline::migrate(rig, &home, &binaries::criu()?, pid)?;
    ensure!(
        task::is_alive(record.pid),
        "the root does not run on the destination"
    );
    ensure!(!task::is_alive(pid), "the root still runs on the source");
    // The namespace must outlive the workload.
    std::mem::forget(home);
    Ok(())
}

fn criu_moves_redis(rig: &Rig) -> Result<()> {
    let redis = BeatingRedis::start(
        rig,
        ClientPlan {
            mib: 32,
            seed: seed_of_this_run(),
            rate: 2000,
        },
    )?;
    criu_moves(rig, redis.pid())?;
    redis.assert_alive()?;
    let report = redis.client.end()?;
    ensure!(report.sets > 0 && report.gets > 0);
    Ok(())
}

fn criu_moves_python(rig: &Rig) -> Result<()> {
    let python = Python::start(rig, 5000)?;
    criu_moves(rig, python.pid())?;
    python.wait_for_rounds(5)?;
    python.finish()
}

/// Not moved: under this load CRIU's own daemon now and then never ends (one of six tries with four threads in each of
/// two processes).
fn torture_is_sound_at_home(rig: &Rig) -> Result<()> {
    let plan = TorturePlan {
        children: 2,
        zombie: true,
        seed: seed_of_this_run(),
        ..TorturePlan::default()
    };
    let torture = Torture::start(rig, plan)?;
    torture.wait_for_rounds(2000)?;
    torture.finish()
}
