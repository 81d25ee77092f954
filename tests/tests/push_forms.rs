//! The forms in which pages are pushed: compressed, referred to, plain for an old destination. Every byte is compared.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use tests::harness::{self, MIGRATION, Need, REDIS_MIGRATION, Test};
use tests::huge::{Giant, huge_mib};
use tests::leftovers::assert_moved;
use tests::pair::{Migration, PairPlan};
use tests::random::seed_of_this_run;
use tests::record::Pushed;
use tests::redis;
use tests::redis_client::{ClientPlan, RedisClient};
use tests::rig::Rig;
use tests::siblings::{OWN_PAGES, Siblings};
use tests::torture::{Torture, TorturePlan};

fn main() -> ExitCode {
    harness::main([
        Test {
            name: "a_redis_is_compressed_to_less_than_half",
            needs: REDIS_MIGRATION,
            body: a_redis_is_compressed_to_less_than_half,
        },
        Test {
            name: "a_changing_tree_is_compressed",
            needs: MIGRATION,
            body: a_changing_tree_is_compressed,
        },
        Test {
            name: "forked_children_share_their_pages",
            needs: MIGRATION,
            body: forked_children_share_their_pages,
        },
        Test {
            name: "huge_pages_are_huge_again",
            needs: &[
                Need::Namespaces,
                Need::Criu,
                Need::Program("python3"),
                Need::HugePages,
            ],
            body: huge_pages_are_huge_again,
        },
        Test {
            name: "a_destination_of_version_1_gets_plain_pages",
            needs: MIGRATION,
            body: a_destination_of_version_1_gets_plain_pages,
        },
    ])
}

fn compressing(rig: &Rig, when: &str) -> Result<PairPlan> {
    let mut plan = PairPlan::new(rig)?;
    plan.server.extend(["--compress".into(), when.into()]);
    Ok(plan)
}

fn a_redis_is_compressed_to_less_than_half(rig: &Rig) -> Result<()> {
    let redis = redis::start(rig)?;
    let client = RedisClient::start(
        rig.client.namespace(),
        rig.service.port(redis::PORT),
        ClientPlan {
            mib: 64,
            seed: seed_of_this_run(),
            rate: 500,
        },
    )?;
    client.wait_for_replies(200)?;
    let migration = compressing(rig, "always")?.migrate(rig, redis.pid())?;
    client.wait_for_replies(200)?;
    // Reads every key back.
    client.end()?;
    assert_moved(rig, migration.pid)?;
    let push = migration.source.push;
    ensure!(
        push.compressed_runs > 0 && push.frame_bytes * 2 < push.page_bytes,
        "{push:?}"
    );
    Ok(())
}

fn huge_pages_are_huge_again(rig: &Rig) -> Result<()> {
    const MIB: u64 = 32;
    let giant = Giant::start(rig, MIB)?;
    let before = huge_mib(giant.pid())?;
    ensure!(before >= MIB / 2, "{before} MiB on huge pages");
    let migration = PairPlan::new(rig)?.migrate(rig, giant.pid())?;
    let made = migration.destination.huge_pages;
    // The kernel may have none left now and then.
    let after = huge_mib(migration.pid)?;
    ensure!(
        made.wanted == before / 2 && after * 2 > before,
        "{before} MiB on huge pages before, {after} MiB after; {made:?}"
    );
    giant.finish()?;
    assert_moved(rig, migration.pid)
}

fn a_changing_tree_is_compressed(rig: &Rig) -> Result<()> {
    let push = move_torture(rig, &compressing(rig, "always")?)?.source.push;
    ensure!(push.compressed_runs > 0, "{push:?}");
    Ok(())
}

fn forked_children_share_their_pages(rig: &Rig) -> Result<()> {
    const MIB: u64 = 24;
    const CHILDREN: usize = 3;
    let siblings = Siblings::start(rig, MIB, CHILDREN)?;
    let migration = compressing(rig, "never")?.migrate(rig, siblings.pid())?;
    siblings.check()?;
    assert_moved(rig, migration.pid)?;
    let push = migration.source.push;
    let shared = CHILDREN as u64 * ((MIB << 20) / 4096 - OWN_PAGES);
    ensure!(
        push.referred > shared * 9 / 10,
        "of {shared} shared pages only {} went once: {push:?}",
        push.referred
    );
    ensure!(push.compressed_runs == 0, "{push:?}");
    Ok(())
}

fn a_destination_of_version_1_gets_plain_pages(rig: &Rig) -> Result<()> {
    let mut plan = compressing(rig, "always")?;
    plan.restorer_env
        .push(("POSTCOPY_OFFER_VERSIONS".into(), "1".into()));
    let push: Pushed = move_torture(rig, &plan)?.source.push;
    ensure!(
        push.runs > 0 && push.compressed_runs == 0 && push.referred == 0,
        "{push:?}"
    );
    Ok(())
}

fn move_torture(rig: &Rig, plan: &PairPlan) -> Result<Migration> {
    let torture = Torture::start(
        rig,
        TorturePlan {
            mib: 64,
            threads: 2,
            children: 2,
            seed: seed_of_this_run(),
            ..TorturePlan::default()
        },
    )?;
    let migration = plan.migrate(rig, torture.pid())?;
    torture.wait_for_rounds(300)?;
    torture.finish()?;
    Ok(migration)
}
