//! Who must not get a workload: refused and logged, while the workload runs on undisturbed.
//!
//! The words of every refusal are tested on real sockets in `common/src/quic/tests/trust.rs`; wrong tokens and versions
//! in `bad_input.rs`.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use tests::exit_code::{CONNECTION, REFUSED};
use tests::failure::{Bystander, expect_failure};
use tests::faulty_peer::{FaultyPeer, Scenario};
use tests::gate::Gate;
use tests::harness::{self, Body, MIGRATION, REDIS_MIGRATION, Test};
use tests::leftovers::assert_moved;
use tests::pair::{PATIENCE, PORT, PairPlan, Side};
use tests::process::Process;
use tests::random::seed_of_this_run;
use tests::rig::Rig;
use tests::torture::{LONG_REST, Torture, TorturePlan};
use tests::wait::wait_until;
use tests::{binaries, identity};

fn main() -> ExitCode {
    let with_redis: [(&'static str, Body); 4] = [
        ("papers_that_are_no_good", papers_that_are_no_good),
        ("a_destination_of_another_ca", a_destination_of_another_ca),
        ("a_token_of_an_earlier_run", a_token_of_an_earlier_run),
        ("a_second_destination", a_second_destination),
    ];
    let with_torture: [(&'static str, Body); 4] = [
        ("a_wrong_secret", a_wrong_secret),
        ("a_flood_of_strangers", a_flood_of_strangers),
        (
            "a_second_destination_after_the_cutover",
            a_second_destination_after_the_cutover,
        ),
        (
            "silent_strangers_keep_nobody_out",
            silent_strangers_keep_nobody_out,
        ),
    ];
    let test = |needs| move |(name, body)| Test { name, needs, body };
    let with_redis = with_redis.map(test(REDIS_MIGRATION));
    harness::main(
        with_redis
            .into_iter()
            .chain(with_torture.map(test(MIGRATION))),
    )
}

/// A destination with another name for its log and files.
fn stranger(rig: &Rig, identity: &std::path::Path, more: &[&str]) -> Result<Side> {
    let mut command = rig.destination.command(binaries::program("lazy-restorer")?);
    let source = format!("{}:{PORT}", rig.source.address());
    command.args(["restore", "--pidns", "--from", &source]);
    command.arg("--identity").arg(identity).args(more);
    command.arg("--criu").arg(binaries::criu()?);
    Side::start_program(rig, "stranger", &mut command)
}

fn a_destination_of_another_ca(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let plan = PairPlan::new(rig)?;
    let foreign = rig.folder().join("foreign");
    identity::init(&foreign, &[])?;
    let mut server = plan.start_server(rig, bystander.redis.pid())?;
    let mut stranger = stranger(rig, &foreign, &[])?;
    expect_failure(&mut stranger, REFUSED, &["lazy-restorer: error:", "CA"])?;
    bystander.redis.assert_alive()?;
    ensure!(server.process.is_running(), "the source ended");
    ensure!(
        server.process.stderr().contains("refused a peer"),
        "the source says nothing of it: {}",
        server.process.stderr()
    );
    server.terminate()?;
    bystander.assert_unharmed(rig)
}

/// Who shows no certificate, or one of the right authority that has expired, is refused, and the source says so. The
/// right destination is let in afterwards.
fn papers_that_are_no_good(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let plan = PairPlan::new(rig)?;
    let (authority, expired) = (&plan.identities.source, rig.folder().join("expired"));
    identity::issue(
        authority,
        &expired,
        &["--name", "late", "--valid-days", "-1"],
    )?;
    let mut server = plan.start_server(rig, bystander.redis.pid())?;
    for (identity, words) in [(None, "sent none"), (Some(&expired), "expired")] {
        let mut command = rig.client.command(binaries::program("wrong-papers")?);
        command.arg(format!("{}:{PORT}", rig.source.address()));
        command.arg(authority).args(identity);
        let logs = rig.make_folder("logs")?;
        let mut stranger = Process::start("wrong-papers", &logs, &mut command)?;
        ensure!(stranger.wait(PATIENCE)?.success(), "{}", stranger.stderr());
        let heard = stranger.stdout();
        ensure!(
            heard.contains("refused: ") && heard.contains(words),
            "{heard}"
        );
        wait_until(PATIENCE, "the source to log it", || {
            let said = server.process.stderr();
            let is_refusal = |line: &str| line.contains("refused a peer") && line.contains(words);
            said.lines().any(is_refusal)
        })?;
        bystander.redis.assert_alive()?;
    }
    plan.start_restorer(rig)?.expect_success()?;
    server.expect_success()?;
    bystander.redis.assert_alive()?;
    bystander.redis.client.end().map(drop)
}

/// Somebody with good papers who knows a session's name and not its secret is not taken for its destination.
fn a_wrong_secret(rig: &Rig) -> Result<()> {
    let torture = Torture::start(
        rig,
        TorturePlan {
            mib: 24,
            threads: 2,
            seed: seed_of_this_run(),
            rest: LONG_REST,
            ..TorturePlan::default()
        },
    )?;
    let mut plan = PairPlan::new(rig)?;
    let peer = FaultyPeer::start(rig, Scenario::ForgesTheSecret, &plan.identities)?;
    plan.source_seen_at = Some(peer.address());
    plan.restorer.push("--no-push".into());
    let mut server = plan.start_server(rig, torture.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    restorer.wait_for_copy()?;
    torture.wait_for_rounds(1)?;
    kill(restorer.process.pid(), Signal::SIGKILL)?;
    restorer.end()?;
    // Its first words are changed on the way. The pages it holds are safe, so it stays with them.
    let mut forger = plan.resume_restorer(rig, &[])?;
    wait_until(PATIENCE, "the source to refuse it", || {
        let logged = server.process.stderr();
        let heard = forger.process.stderr();
        logged.contains("refused a destination") && heard.contains("serves another session")
    })?;
    ensure!(peer.is_guilty(), "the peer did nothing wrong");
    ensure!(server.process.is_running(), "the source ended");
    kill(forger.process.pid(), Signal::SIGKILL)?;
    forger.end()?;
    let mut successor = plan.resume_restorer(rig, &[])?;
    successor.expect_success()?;
    server.expect_success()?;
    torture.wait_for_rounds(50)?;
    torture.finish()
}

/// A token is good for one run of `page-server`.
fn a_token_of_an_earlier_run(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let (first, second) = (rig.folder().join("first"), rig.folder().join("second"));
    let mut plan = PairPlan::new(rig)?;
    plan.server
        .extend(["--token-file".into(), first.clone().into()]);
    let mut earlier = plan.start_server(rig, bystander.redis.pid())?;
    earlier.terminate()?;
    ensure!(first.exists(), "no token was written");
    plan.server.pop();
    plan.server.push(second.into());
    let mut server = plan.start_server(rig, bystander.redis.pid())?;
    let replayed = first.to_string_lossy();
    let identity = &plan.identities.destination;
    let mut stranger = stranger(rig, identity, &["--token-file", &replayed])?;
    expect_failure(&mut stranger, REFUSED, &["lazy-restorer: error:", "token"])?;
    wait_until(PATIENCE, "the source to log it", || {
        server.process.stderr().contains("token")
    })?;
    server.terminate()?;
    bystander.assert_unharmed(rig)
}

/// Another destination with good papers comes while one is served: it is refused or not answered, and the migration of
/// the first one goes through.
fn a_second_destination(rig: &Rig) -> Result<()> {
    let torture = Torture::start(
        rig,
        TorturePlan {
            mib: 24,
            threads: 2,
            seed: seed_of_this_run(),
            ..TorturePlan::default()
        },
    )?;
    let mut plan = PairPlan::new(rig)?;
    let gate = Gate::new(rig, "served")?;
    plan.before_restore = gate.after(&plan.before_restore);
    let mut server = plan.start_server(rig, torture.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    gate.wait(PATIENCE)?;
    let mut stranger = stranger(rig, &plan.identities.destination, &[])?;
    gate.open()?;
    // Whether it is found waiting before the cutover or refused after it: it gets nothing.
    let status = stranger.end()?;
    ensure!(
        [Some(CONNECTION), Some(REFUSED)].contains(&status.code()),
        "{status}: {}",
        stranger.process.stderr()
    );
    restorer.expect_success()?;
    server.expect_success()?;
    torture.wait_for_rounds(100)?;
    assert_moved(rig, restorer.restored_pid()?)?;
    torture.finish()
}

/// Strangers knock all the time; a migration begun and finished meanwhile is right to the last byte.
fn a_flood_of_strangers(rig: &Rig) -> Result<()> {
    let torture = Torture::start(
        rig,
        TorturePlan {
            mib: 32,
            threads: 2,
            seed: seed_of_this_run(),
            ..TorturePlan::default()
        },
    )?;
    let plan = PairPlan::new(rig)?;
    let foreign = rig.folder().join("foreign");
    identity::init(&foreign, &[])?;
    let mut server = plan.start_server(rig, torture.pid())?;
    let mut command = rig.client.command(binaries::program("handshake-flood")?);
    command
        .arg(&foreign)
        .arg(format!("{}:{PORT}", rig.source.address()))
        .arg("8");
    let mut flood = Process::start("handshake-flood", &rig.make_folder("logs")?, &mut command)?;
    flood.wait_for_output(PATIENCE, "flooding")?;
    let mut restorer = plan.start_restorer(rig)?;
    restorer.expect_success()?;
    server.expect_success()?;
    ensure!(flood.is_running(), "the flood ended too early");
    flood.kill();
    torture.wait_for_rounds(200)?;
    assert_moved(rig, restorer.restored_pid()?).context("after the flood")?;
    torture.finish()
}

/// A migration whose tasks run on the destination while most of their memory is on the source.
fn half_way(rig: &Rig) -> Result<(Torture, PairPlan, Side, Side)> {
    let torture = Torture::start(
        rig,
        TorturePlan {
            mib: 32,
            threads: 2,
            seed: seed_of_this_run(),
            rest: LONG_REST,
            ..TorturePlan::default()
        },
    )?;
    let plan = PairPlan::new(rig)?;
    let mut slow = plan.clone();
    slow.restorer.push("--no-push".into());
    let server = slow.start_server(rig, torture.pid())?;
    let mut restorer = slow.start_restorer(rig)?;
    restorer.wait_for_copy()?;
    torture.wait_for_rounds(1)?;
    Ok((torture, plan, server, restorer))
}

/// It has good papers too. It is refused at once, and the copy goes on fetching what it touches.
fn a_second_destination_after_the_cutover(rig: &Rig) -> Result<()> {
    let (torture, plan, mut server, mut restorer) = half_way(rig)?;
    let mut stranger = stranger(rig, &plan.identities.destination, &[])?;
    expect_failure(&mut stranger, REFUSED, &["another destination"])?;
    let said = server.process.stderr();
    ensure!(said.contains("refused a destination"), "{said}");
    // It compares all of its memory, which it fetches for that, and ends.
    torture.wait_for_rounds(1)?;
    torture.finish()?;
    restorer.expect_success()?;
    server.expect_success()
}

/// The destination comes back, although more strangers than the source hears at once have nothing to say to it: were
/// they heard one after the other, it would wait for each of them.
fn silent_strangers_keep_nobody_out(rig: &Rig) -> Result<()> {
    const STRANGERS: &str = "24";
    let (torture, plan, mut server, mut restorer) = half_way(rig)?;
    kill(restorer.process.pid(), Signal::SIGKILL)?;
    restorer.end()?;
    wait_until(PATIENCE, "the source to notice", || {
        server.process.stderr().contains("link lost")
    })?;
    let mut command = rig.client.command(binaries::program("silent-strangers")?);
    command
        .arg(&plan.identities.destination)
        .arg(format!("{}:{PORT}", rig.source.address()))
        .arg(STRANGERS);
    let logs = rig.make_folder("logs")?;
    let mut strangers = Process::start("silent-strangers", &logs, &mut command)?;
    strangers.wait_for_output(PATIENCE, "knocking")?;
    let mut successor = plan.resume_restorer(rig, &[])?;
    successor.expect_success()?;
    server.expect_success()?;
    ensure!(strangers.is_running(), "the strangers ended too early");
    strangers.kill();
    torture.wait_for_rounds(50)?;
    torture.finish()
}
