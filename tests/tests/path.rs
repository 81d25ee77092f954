//! Paths between the hosts: each is what it claims to be, and a migration over a bad one damages nothing.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use tests::harness::{self, MIGRATION, Need, Test};
use tests::pair::PairPlan;
use tests::path::{Path, probe};
use tests::rig::Rig;
use tests::touch::{Pattern, TouchPlan, Toucher};

const PATH: &[Need] = &[Need::Namespaces, Need::Program("tc")];

fn main() -> ExitCode {
    harness::main([
        Test {
            name: "a_long_lossy_path_is_one",
            needs: PATH,
            body: a_long_lossy_path_is_one,
        },
        Test {
            name: "a_shaped_path_is_one",
            needs: PATH,
            body: a_shaped_path_is_one,
        },
        Test {
            name: "a_cable_carries_the_hosts_traffic_and_not_the_clients",
            needs: PATH,
            body: a_cable_carries_the_hosts_traffic_and_not_the_clients,
        },
        Test {
            name: "a_migration_over_a_long_lossy_path_damages_nothing",
            needs: MIGRATION,
            body: a_migration_over_a_long_lossy_path_damages_nothing,
        },
    ])
}

fn a_long_lossy_path_is_one(rig: &Rig) -> Result<()> {
    let spec = "rtt=20ms,loss=2%,rate=100m".parse()?;
    let _path = Path::lay(rig, spec)?;
    let measured = probe::check(rig, &spec)?;
    ensure!(measured.tcp_mbit_s > 0.0, "TCP moves nothing: {measured}");
    Ok(())
}

fn a_shaped_path_is_one(rig: &Rig) -> Result<()> {
    let spec = "200m".parse()?;
    let _path = Path::lay(rig, spec)?;
    let measured = probe::check(rig, &spec)?;
    ensure!(measured.rate_was_reached(&spec), "too slow: {measured}");
    Ok(())
}

fn a_cable_carries_the_hosts_traffic_and_not_the_clients(rig: &Rig) -> Result<()> {
    let _path = Path::lay(rig, "veth".parse()?)?;
    let way = |host: &tests::host::Host, to| host.shell(&format!("ip route get {to}"));
    let there = way(&rig.source, rig.destination.address())?;
    ensure!(there.contains("dev path0"), "{there}");
    let back = way(&rig.destination, rig.source.address())?;
    ensure!(back.contains("dev path0"), "{back}");
    let client = way(&rig.source, rig.client.address())?;
    ensure!(client.contains("dev eth0"), "{client}");
    Ok(())
}

fn a_migration_over_a_long_lossy_path_damages_nothing(rig: &Rig) -> Result<()> {
    let spec = "rtt=10ms,loss=1%,rate=500m".parse()?;
    let _path = Path::lay(rig, spec)?;
    let plan = TouchPlan {
        mib: 24,
        seed: 1,
        pattern: Pattern::Random,
        rate: 0,
    };
    let toucher = Toucher::start(rig, plan)?;
    PairPlan::new(rig)?.migrate(rig, toucher.pid())?;
    toucher.wait_until_moved(Duration::from_secs(60))?;
    toucher.finish()?;
    ensure!(toucher.report()?.faults > 0, "it never waited for a page");
    Ok(())
}
