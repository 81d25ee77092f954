//! The link between the hosts is lost after the cutover: the workload waits for missing pages, and the pair goes on
//! where it was when the link is back. A killed `lazy-restorer` makes threads wait and never read zeros.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use common::limits::BULK_WINDOW_BYTES;
use common::page::PAGE_SIZE;
use nix::sys::signal::{Signal, kill};
use tests::exit_code::ABORTED_BY_PEER;
use tests::failure::expect_failure;
use tests::fake_criu;
use tests::gate::Gate;
use tests::harness::{self, MIGRATION, REDIS_MIGRATION, Test};
use tests::host::INTERFACE;
use tests::leftovers::assert_moved;
use tests::matrix::{fast_link, set_link, shaped_link};
use tests::pair::{PATIENCE, PairPlan, Side, sessions};
use tests::random::seed_of_this_run;
use tests::redis;
use tests::redis_client::{ClientPlan, RedisClient};
use tests::rig::Rig;
use tests::task;
use tests::torture::{REST, Torture, TorturePlan};
use tests::wait::wait_until;

fn main() -> ExitCode {
    harness::main([
        Test {
            name: "a_link_comes_back",
            needs: REDIS_MIGRATION,
            body: a_link_comes_back,
        },
        Test {
            name: "what_came_before_an_outage_is_not_sent_again",
            needs: MIGRATION,
            body: what_came_before_an_outage_is_not_sent_again,
        },
        Test {
            name: "a_killed_restorer_makes_threads_wait",
            needs: REDIS_MIGRATION,
            body: a_killed_restorer_makes_threads_wait,
        },
        Test {
            name: "a_grant_that_never_arrives_is_given_back",
            needs: MIGRATION,
            body: a_grant_that_never_arrives_is_given_back,
        },
    ])
}

fn client_plan() -> ClientPlan {
    ClientPlan {
        mib: 128,
        seed: seed_of_this_run(),
        rate: 1000,
    }
}

/// Longer than the idle timeout, so that both ends give the link up.
fn a_link_comes_back(rig: &Rig) -> Result<()> {
    let redis = redis::start(rig)?;
    let address = rig.service.port(redis::PORT);
    let client = RedisClient::start(rig.client.namespace(), address, client_plan())?;
    client.wait_for_replies(500)?;
    let mut plan = PairPlan::new(rig)?;
    // First of all in the moment the workload is let run: the memory has only begun to move.
    let cut = format!(
        "nsenter --net=/run/netns/{} ip link set dev {INTERFACE} down",
        rig.source.namespace()
    );
    plan.on_resumed = format!("{cut}; {}", plan.on_resumed);
    let mut server = plan.start_server(rig, redis.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    wait_for_words(&server, "link lost")?;
    wait_for_words(&restorer, "trying to reconnect")?;
    ensure!(
        task::is_frozen(redis.pid()),
        "the source runs its copy although it was given away"
    );
    rig.source
        .shell(&format!("ip link set dev {INTERFACE} up"))?;
    wait_for_words(&restorer, "reconnected")?;
    restorer.expect_success()?;
    server.expect_success()?;
    client.wait_for_replies(500)?;
    let report = client.end()?;
    ensure!(report.sets > 0 && report.gets > 0, "{report:?}");
    assert_moved(rig, restorer.restored_pid()?)
}

/// The link is lost when half of the memory is there: what is sent again is what was on its way.
fn what_came_before_an_outage_is_not_sent_again(rig: &Rig) -> Result<()> {
    let torture = Torture::start(
        rig,
        TorturePlan {
            mib: 64,
            threads: 1,
            seed: seed_of_this_run(),
            rest: REST,
            ..TorturePlan::default()
        },
    )?;
    let mut plan = PairPlan::new(rig)?;
    // Slow enough to be cut in the middle.
    let bucket = "rate 100mbit burst 64kb latency 50ms";
    plan.on_resumed = format!("{}; {}", shaped_link(rig, bucket), plan.on_resumed);
    let mut server = plan.start_server(rig, torture.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    let copy = restorer.wait_for_copy()?;
    wait_until(PATIENCE, "half of the memory to come", || {
        task::resident_kib(copy) > 32 * 1024
    })?;
    set_link(rig, false)?;
    wait_for_words(&server, "link lost")?;
    wait_for_words(&restorer, "trying to reconnect")?;
    set_link(rig, true)?;
    fast_link(rig)?;
    restorer.expect_success()?;
    server.expect_success()?;
    let pages = server.record()?.pages;
    let sent = pages.pushed + pages.demanded + pages.removed;
    let again = sent - pages.lazy;
    println!("{again} of {} pages were sent again", pages.lazy);
    let on_the_way = 4 * BULK_WINDOW_BYTES / PAGE_SIZE as u64;
    ensure!(again <= on_the_way, "{again} pages: {pages:?}");
    torture.wait_for_rounds(100)?;
    assert_moved(rig, copy)?;
    torture.finish()
}

fn wait_for_words(side: &Side, words: &str) -> Result<()> {
    wait_until(PATIENCE, words, || side.process.stderr().contains(words))
}

fn a_killed_restorer_makes_threads_wait(rig: &Rig) -> Result<()> {
    let redis = redis::start(rig)?;
    let address = rig.service.port(redis::PORT);
    let client = RedisClient::start(rig.client.namespace(), address, client_plan())?;
    client.wait_for_replies(500)?;
    let mut plan = PairPlan::new(rig)?;
    plan.restorer.push("--no-push".into());
    let _server = plan.start_server(rig, redis.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    wait_until(PATIENCE, "the PID file", || restorer.restored_pid().is_ok())?;
    let copy = restorer.restored_pid()?;
    client.wait_for_replies(100)?;
    kill(restorer.process.pid(), Signal::SIGKILL)?;
    restorer.process.wait(PATIENCE)?;
    // The client compares what it reads: a page of zeros would end it with an error at once. Instead redis comes to
    // stand in a page fault, and the client gets no more replies.
    wait_until(PATIENCE, "redis to wait for a page", || {
        task::waits_for_page(copy) || client.replies() == 0
    })?;
    ensure!(task::waits_for_page(copy), "redis does not wait");
    kill(copy, Signal::SIGKILL)?;
    wait_until(PATIENCE, "the copy to end", || !task::is_alive(copy))?;
    let ended = client.end().expect_err("its redis was killed").to_string();
    ensure!(
        !ended.contains("differs"),
        "the client read something else than was written: {ended}"
    );
    Ok(())
}

/// The source gives the workload away, and nothing that it says arrives any more. The destination kills its copy, which
/// never ran, after a while, and says so as soon as it can: the source does not wait for an operator.
fn a_grant_that_never_arrives_is_given_back(rig: &Rig) -> Result<()> {
    let torture = Torture::start(
        rig,
        TorturePlan {
            mib: 16,
            seed: seed_of_this_run(),
            ..TorturePlan::default()
        },
    )?;
    let gate = Gate::new(rig, "before-the-grant")?;
    let mut plan = PairPlan::new(rig)?;
    // All is rebuilt, and nothing is left to be done but to ask: the link would be lost before that otherwise.
    plan.destination_criu = fake_criu::held_at(rig, "restore", "post-restore", &gate)?;
    let mut server = plan.start_server(rig, torture.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    gate.wait(PATIENCE)?;
    let rule = format!("OUTPUT -p udp -d {} -j DROP", rig.destination.address());
    rig.source.shell(&format!("iptables -w -A {rule}"))?;
    gate.open()?;
    wait_for_words(&server, "link lost")?;
    ensure!(task::is_frozen(torture.pid()), "it was given away and runs");
    wait_for_words(&restorer, "never ran and is dead")?;
    let listed = sessions(rig, "destination")?;
    ensure!(listed[0]["standing"] == "served", "{listed:?}");
    rig.source.shell(&format!("iptables -w -D {rule}"))?;
    expect_failure(&mut restorer, ABORTED_BY_PEER, &["the copy here is dead"])?;
    expect_failure(&mut server, ABORTED_BY_PEER, &["the copy is dead"])?;
    torture.wait_for_rounds(50)?;
    for role in ["source", "destination"] {
        ensure!(sessions(rig, role)?.is_empty(), "a session file is left");
    }
    torture.finish()
}
