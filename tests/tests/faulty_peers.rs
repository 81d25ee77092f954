//! Peers that break the protocol: the real other end refuses with the right error, and nothing is left frozen or
//! orphaned on either host.

use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use tests::exit_code::{ABORTED_BY_PEER, CONNECTION, FREEZE, RESTORE};
use tests::failure::{Bystander, assert_never_frozen, expect_failure};
use tests::faulty_peer::{FaultyPeer, Scenario};
use tests::harness::{self, Body, MIGRATION, REDIS_MIGRATION, Test};
use tests::leftovers::assert_moved;
use tests::pair::{PATIENCE, PairPlan, Side, sessions};
use tests::random::seed_of_this_run;
use tests::rig::Rig;
use tests::task;
use tests::torture::{Torture, TorturePlan};
use tests::wait::wait_until;

/// Time for a workload to show damage. It may wait for a page all the while.
const A_WHILE: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let refused: [(&'static str, Body); 10] = [
        (
            "a_source_that_speaks_another_version",
            a_source_that_speaks_another_version,
        ),
        ("a_source_that_stalls", a_source_that_stalls),
        ("a_destination_that_stalls", a_destination_that_stalls),
        ("a_source_that_sends_unasked_pages", |rig| {
            source_is_refused(
                rig,
                Scenario::SendsUnaskedPages,
                ABORTED_BY_PEER,
                &["which the skeleton does not hold"],
            )
        }),
        ("a_source_that_sends_pages_outside", |rig| {
            source_is_refused(
                rig,
                Scenario::SendsPagesOutside,
                ABORTED_BY_PEER,
                &["did not leave"],
            )
        }),
        ("a_source_that_sends_wrong_lengths", |rig| {
            source_is_refused(
                rig,
                Scenario::SendsWrongLengths,
                ABORTED_BY_PEER,
                &["payload length"],
            )
        }),
        ("a_source_that_names_a_path", |rig| {
            source_is_refused(rig, Scenario::NamesAPath, RESTORE, &["../../core-1.img"])
        }),
        ("a_destination_that_asks_outside", |rig| {
            destination_is_refused(
                rig,
                Scenario::AsksOutside,
                FREEZE,
                &["outside the frozen memory"],
            )
        }),
        ("a_destination_that_speaks_out_of_turn", |rig| {
            destination_is_refused(
                rig,
                Scenario::SpeaksOutOfTurn,
                ABORTED_BY_PEER,
                &["unexpected Resumed"],
            )
        }),
        ("a_destination_that_vanishes", a_destination_that_vanishes),
    ];
    let survived: [(&'static str, Body); 11] = [
        ("a_source_that_keeps_pages", a_source_that_keeps_pages),
        ("a_source_that_replays", |rig| {
            is_survived(rig, Scenario::Replays)
        }),
        ("a_destination_that_floods", |rig| {
            is_survived(rig, Scenario::Floods)
        }),
        (
            "a_source_that_changes_content",
            a_source_that_changes_content,
        ),
        (
            "a_destination_that_counts_wrong",
            a_destination_that_counts_wrong,
        ),
        ("a_source_that_answers_twice", |rig| {
            is_survived(rig, Scenario::AnswersTwice)
        }),
        ("a_destination_that_counts_more", |rig| {
            ends_disagree(rig, Scenario::CountsMore).map(drop)
        }),
        ("a_source_that_refers_to_nothing", |rig| {
            lies_after_the_cutover(rig, Scenario::RefersToNothing, "impossible reference")
        }),
        ("a_source_that_compresses_nonsense", |rig| {
            lies_after_the_cutover(rig, Scenario::CompressesNonsense, "broke the protocol")
        }),
        ("a_source_that_sends_unasked_pages_late", |rig| {
            lies_after_the_cutover(
                rig,
                Scenario::SendsUnaskedPagesLate,
                "which the skeleton does not hold",
            )
        }),
        ("a_source_that_withholds", |rig| {
            lies_after_the_cutover(rig, Scenario::Withholds, "did not leave")
        }),
    ];
    let test = |needs| move |(name, body)| Test { name, needs, body };
    let refused = refused.map(test(REDIS_MIGRATION));
    harness::main(refused.into_iter().chain(survived.map(test(MIGRATION))))
}

/// What an end is told that is not to wait for long.
const FREEZE_LIMIT: [&str; 2] = ["--freeze-limit", "3s"];

/// Both real ends with a faulty peer between them.
struct Trio {
    bystander: Bystander,
    peer: FaultyPeer,
    server: Side,
    restorer: Side,
}

impl Trio {
    fn start(rig: &Rig, scenario: Scenario) -> Result<Self> {
        Self::with(rig, scenario, |_| {})
    }

    fn with(rig: &Rig, scenario: Scenario, change: impl FnOnce(&mut PairPlan)) -> Result<Self> {
        let bystander = Bystander::start(rig)?;
        let mut plan = PairPlan::new(rig)?;
        change(&mut plan);
        let peer = FaultyPeer::start(rig, scenario, &plan.identities)?;
        plan.source_seen_at = Some(peer.address());
        let server = plan.start_server(rig, bystander.redis.pid())?;
        let restorer = plan.start_restorer(rig)?;
        Ok(Self {
            bystander,
            peer,
            server,
            restorer,
        })
    }

    /// Everything is as before.
    fn assert_unharmed(self, rig: &Rig) -> Result<()> {
        ensure!(self.peer.is_guilty(), "the peer did nothing wrong");
        self.bystander.assert_unharmed(rig)
    }
}

/// The destination refuses what its source does, and says so to it.
fn source_is_refused(rig: &Rig, scenario: Scenario, code: i32, words: &[&str]) -> Result<()> {
    let mut trio = Trio::start(rig, scenario)?;
    expect_failure(&mut trio.restorer, code, words)?;
    expect_failure(&mut trio.server, ABORTED_BY_PEER, words)?;
    trio.assert_unharmed(rig)
}

/// The source refuses what its destination does, and says so to it.
fn destination_is_refused(rig: &Rig, scenario: Scenario, code: i32, words: &[&str]) -> Result<()> {
    let mut trio = Trio::start(rig, scenario)?;
    expect_failure(&mut trio.server, code, words)?;
    expect_failure(&mut trio.restorer, ABORTED_BY_PEER, words)?;
    trio.assert_unharmed(rig)
}

/// A destination speaks no version that it did not offer. The source, which knows nothing of it, goes on waiting.
fn a_source_that_speaks_another_version(rig: &Rig) -> Result<()> {
    let mut trio = Trio::start(rig, Scenario::SpeaksAnotherVersion)?;
    let words = ["phase hello", "version 0, which was not offered"];
    expect_failure(&mut trio.restorer, ABORTED_BY_PEER, &words)?;
    ensure!(trio.server.process.is_running(), "the source ended");
    trio.server.terminate()?;
    assert_never_frozen(&trio.server)?;
    trio.assert_unharmed(rig)
}

/// Nothing breaks, but the workload stands still: the limit for that rolls everything back, at whichever end it is shorter.
fn a_source_that_stalls(rig: &Rig) -> Result<()> {
    let mut trio = Trio::with(rig, Scenario::Stalls, |plan| {
        plan.restorer.extend(FREEZE_LIMIT.map(Into::into));
    })?;
    expect_failure(&mut trio.restorer, RESTORE, &["--freeze-limit"])?;
    expect_failure(&mut trio.server, ABORTED_BY_PEER, &["--freeze-limit"])?;
    trio.assert_unharmed(rig)
}

fn a_destination_that_stalls(rig: &Rig) -> Result<()> {
    let mut trio = Trio::with(rig, Scenario::Stalls, |plan| {
        plan.server.extend(FREEZE_LIMIT.map(Into::into));
    })?;
    expect_failure(&mut trio.server, FREEZE, &["--freeze-limit"])?;
    expect_failure(&mut trio.restorer, ABORTED_BY_PEER, &["--freeze-limit"])?;
    trio.assert_unharmed(rig)
}

fn a_destination_that_vanishes(rig: &Rig) -> Result<()> {
    let mut trio = Trio::start(rig, Scenario::Vanishes)?;
    expect_failure(&mut trio.server, CONNECTION, &["lost the destination"])?;
    trio.bystander.redis.assert_alive()?;
    // The destination cannot know whether its request arrived. In the end it kills its copy, which never ran, and tries to
    // tell the source so, which is gone.
    wait_until(PATIENCE, "the copy to be given up", || {
        trio.restorer
            .process
            .stderr()
            .contains("never ran and is dead")
    })?;
    kill(trio.restorer.process.pid(), Signal::SIGTERM)?;
    let status = trio.restorer.end()?;
    ensure!(!status.success(), "{status}");
    // `resume` could go on with telling; this operator knows better.
    let kept = sessions(rig, "destination")?;
    ensure!(
        kept.len() == 1 && kept[0]["standing"] == "orphaned",
        "{kept:?}"
    );
    std::fs::remove_dir_all("/run/postcopy").context("the destination's session files")?;
    trio.assert_unharmed(rig)
}

/// A torture workload on its way through a faulty peer.
fn torture_through(rig: &Rig, scenario: Scenario) -> Result<(Torture, FaultyPeer, Side, Side)> {
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
    let peer = FaultyPeer::start(rig, scenario, &plan.identities)?;
    plan.source_seen_at = Some(peer.address());
    let server = plan.start_server(rig, torture.pid())?;
    let restorer = plan.start_restorer(rig)?;
    Ok((torture, peer, server, restorer))
}

/// Not nice, but no harm is done: the migration succeeds and every byte is right.
fn is_survived(rig: &Rig, scenario: Scenario) -> Result<()> {
    let (torture, peer, mut server, mut restorer) = torture_through(rig, scenario)?;
    restorer.expect_success()?;
    server.expect_success()?;
    ensure!(peer.is_guilty(), "the peer did nothing wrong");
    torture.wait_for_rounds(200)?;
    assert_moved(rig, restorer.restored_pid()?)?;
    torture.finish()
}

/// The link is alive, and a thread waits: the destination does not wait for ever.
fn a_source_that_keeps_pages(rig: &Rig) -> Result<()> {
    let (torture, peer, mut server, mut restorer) = torture_through(rig, Scenario::KeepsPages)?;
    restorer.expect_success()?;
    server.expect_success()?;
    ensure!(peer.is_guilty(), "the peer did nothing wrong");
    let said = restorer.process.stderr();
    ensure!(said.contains("answers no requests"), "{said}");
    torture.wait_for_rounds(200)?;
    assert_moved(rig, restorer.restored_pid()?)?;
    torture.finish()
}

/// Nobody knows which end is right, so neither copy is touched: the original stays frozen until the operator decides.
fn a_destination_that_counts_wrong(rig: &Rig) -> Result<()> {
    let Disagreement {
        torture,
        ends: _ends,
    } = ends_disagree(rig, Scenario::CountsWrong)?;
    torture.wait_for_rounds(100)?;
    // The operator decides for the copy.
    kill(torture.pid(), Signal::SIGKILL).context("the original ended")?;
    torture.wait_for_rounds(100)?;
    torture.finish()
}

/// What an authenticated source sends is believed, and found out at the end: never is the right copy given up.
fn a_source_that_changes_content(rig: &Rig) -> Result<()> {
    ends_disagree(rig, Scenario::ChangesContent).map(drop)
}

/// A copy that runs, and both ends that disagree on it. Without the destination's the copy has no keeper left, and its leash kills it.
struct Disagreement {
    torture: Torture,
    ends: (FaultyPeer, Side, Side),
}

fn ends_disagree(rig: &Rig, scenario: Scenario) -> Result<Disagreement> {
    let (torture, peer, mut server, mut restorer) = torture_through(rig, scenario)?;
    wait_until(PATIENCE, "the source to disagree", || {
        server.process.stderr().contains("the ends disagree")
    })?;
    ensure!(peer.is_guilty(), "the peer did nothing wrong");
    ensure!(task::is_frozen(torture.pid()), "the original is not kept");
    ensure!(server.process.is_running(), "the source gave up");
    ensure!(restorer.process.is_running(), "the destination gave up");
    let ends = (peer, server, restorer);
    Ok(Disagreement { torture, ends })
}

/// The workload runs on the destination, which refuses what comes and says why: threads that miss pages wait, none reads
/// zeros or what was sent, and the original is kept for the operator.
fn lies_after_the_cutover(rig: &Rig, scenario: Scenario, words: &str) -> Result<()> {
    let (torture, peer, mut server, restorer) = torture_through(rig, scenario)?;
    wait_until(PATIENCE, words, || {
        restorer.process.stderr().contains(words)
    })?;
    ensure!(peer.is_guilty(), "the peer did nothing wrong");
    let copy = restorer.restored_pid()?;
    ensure!(task::is_alive(copy), "the copy was given up");
    ensure!(task::is_frozen(torture.pid()), "the original is not kept");
    ensure!(server.process.is_running(), "the source gave up");
    // Whoever works on compares every byte; a worker that waits for a page does not.
    let ticks = || torture.board.pulse.ticks.load(Ordering::Relaxed);
    let before = ticks();
    let _ = wait_until(A_WHILE, "the heart to beat", || ticks() > before + 20);
    torture.assert_unharmed()
}
