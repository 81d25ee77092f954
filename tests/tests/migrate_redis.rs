//! A redis moves and its clients notice nothing but a pause.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use tests::beating_redis::BeatingRedis;
use tests::harness::{self, REDIS_MIGRATION, Test};
use tests::leftovers::assert_moved;
use tests::pair::{Migration, PairPlan};
use tests::random::seed_of_this_run;
use tests::redis;
use tests::redis_client::{ClientPlan, RedisClient};
use tests::rig::Rig;

fn main() -> ExitCode {
    harness::main([
        Test {
            name: "a_client_stays_connected",
            needs: REDIS_MIGRATION,
            body: a_client_stays_connected,
        },
        Test {
            name: "a_client_at_full_speed",
            needs: REDIS_MIGRATION,
            body: a_client_at_full_speed,
        },
        Test {
            name: "a_tree_with_redis_below",
            needs: REDIS_MIGRATION,
            body: a_tree_with_redis_below,
        },
    ])
}

fn a_client_stays_connected(rig: &Rig) -> Result<()> {
    move_redis(
        rig,
        ClientPlan {
            mib: 128,
            seed: seed_of_this_run(),
            rate: 2000,
        },
    )
}

fn a_client_at_full_speed(rig: &Rig) -> Result<()> {
    move_redis(
        rig,
        ClientPlan {
            mib: 64,
            seed: seed_of_this_run(),
            rate: 0,
        },
    )
}

fn move_redis(rig: &Rig, plan: ClientPlan) -> Result<()> {
    let redis = redis::start(rig)?;
    let client = RedisClient::start(rig.client.namespace(), rig.service.port(redis::PORT), plan)?;
    client.wait_for_replies(500)?;
    let migration = PairPlan::new(rig)?.migrate(rig, redis.pid())?;
    client.wait_for_replies(500)?;
    let report = client.end()?;
    ensure!(
        report.sets > 0 && report.gets > 0,
        "the client did nothing: {report:?}"
    );
    assert_moved(rig, migration.pid)?;
    assert_records_agree(&migration)
}

fn a_tree_with_redis_below(rig: &Rig) -> Result<()> {
    let redis = BeatingRedis::start(
        rig,
        ClientPlan {
            mib: 32,
            seed: seed_of_this_run(),
            rate: 2000,
        },
    )?;
    let migration = PairPlan::new(rig)?.migrate(rig, redis.pid())?;
    redis.assert_alive()?;
    assert_moved(rig, migration.pid)?;
    redis.client.end()?;
    Ok(())
}

/// Both sides tell the same story, and every page is accounted for.
fn assert_records_agree(migration: &Migration) -> Result<()> {
    let (source, destination) = (&migration.source, &migration.destination);
    ensure!(
        source.role == "page-server" && destination.role == "lazy-restorer",
        "roles: {source:?} {destination:?}"
    );
    ensure!(
        source.outcome == "complete" && destination.outcome == "complete",
        "{source:?} {destination:?}"
    );
    ensure!(
        source.session == destination.session && !source.session.is_empty(),
        "{source:?} {destination:?}"
    );
    ensure!(
        source.error.is_none() && destination.error.is_none(),
        "{source:?} {destination:?}"
    );
    ensure!(
        source.pages.lazy == destination.pages.lazy && source.pages.lazy > 0,
        "{source:?} {destination:?}"
    );
    let installs = destination.install_us;
    ensure!(
        installs.p50 > 0 && installs.p50 <= installs.max,
        "{destination:?}"
    );
    ensure!(
        source.frozen_at_unix_us <= destination.resumed_at_unix_us,
        "{source:?} {destination:?}"
    );
    ensure!(
        source.wire_bytes.bulk_tx > 0 && source.wire_bytes.fault_tx > 0,
        "{source:?}"
    );
    Ok(())
}
