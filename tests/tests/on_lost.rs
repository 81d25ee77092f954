//! `--give-up-after` and `--on-lost`, at both ends: a link that stays lost after the cutover, and what the operator
//! wanted done about it.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::binaries;
use tests::exit_code::{ABORTED_BY_PEER, LOST};
use tests::failure::expect_failure;
use tests::faulty_peer::{FaultyPeer, Message, Scenario};
use tests::harness::{self, Body, MIGRATION, Test};
use tests::leftovers::assert_moved;
use tests::matrix::set_link;
use tests::pair::{PATIENCE, PairPlan, Side, session_of, sessions};
use tests::process::Process;
use tests::random::seed_of_this_run;
use tests::rig::Rig;
use tests::shell;
use tests::task;
use tests::torture::{LONG_REST, Torture, TorturePlan};
use tests::wait::wait_until;

fn main() -> ExitCode {
    let tests: [(&'static str, Body); 8] = [
        ("a_killed_original_is_told", a_killed_original_is_told),
        (
            "a_strangers_page_server_is_waited_out",
            a_strangers_page_server_is_waited_out,
        ),
        ("a_whole_copy_is_told_later", a_whole_copy_is_told_later),
        (
            "the_original_of_a_whole_copy_is_released_by_force",
            the_original_of_a_whole_copy_is_released_by_force,
        ),
        ("both_ends_keep_paused", both_ends_keep_paused),
        (
            "the_destination_kills_its_copy",
            the_destination_kills_its_copy,
        ),
        (
            "the_destination_thaws_the_source",
            the_destination_thaws_the_source,
        ),
        (
            "the_source_kills_the_original",
            the_source_kills_the_original,
        ),
    ];
    harness::main(tests.map(|(name, body)| Test {
        name,
        needs: MIGRATION,
        body,
    }))
}

/// A migration whose link was lost when its memory had only begun to move.
struct Lost {
    plan: PairPlan,
    torture: Torture,
    server: Side,
    restorer: Side,
    copy: Pid,
}

impl Lost {
    /// Each end does what its option says, or nothing, one second after the link was lost.
    fn start(rig: &Rig, at_source: Option<&str>, at_destination: Option<&str>) -> Result<Self> {
        let torture = torture(rig)?;
        let mut plan = PairPlan::new(rig)?;
        plan.restorer.push("--no-push".into());
        for (options, on_lost) in [
            (&mut plan.server, at_source),
            (&mut plan.restorer, at_destination),
        ] {
            if let Some(on_lost) = on_lost {
                let words = ["--give-up-after", "1s", "--on-lost", on_lost];
                options.extend(words.map(Into::into));
            }
        }
        let server = plan.start_server(rig, torture.pid())?;
        let mut restorer = plan.start_restorer(rig)?;
        let copy = restorer.wait_for_copy()?;
        torture.wait_for_rounds(1)?;
        set_link(rig, false)?;
        Ok(Self {
            plan,
            torture,
            server,
            restorer,
            copy,
        })
    }

    fn assert_original_stands(&self) -> Result<()> {
        let root = self.torture.pid();
        ensure!(task::is_alive(root), "the original is gone");
        ensure!(task::is_frozen(root), "the original runs");
        Ok(())
    }

    /// The source was told that the copy is dead.
    fn original_runs(mut self, rig: &Rig) -> Result<()> {
        expect_failure(
            &mut self.server,
            ABORTED_BY_PEER,
            &["page-server: error:", "the copy is dead"],
        )?;
        self.torture.wait_for_original(20)?;
        for role in ["source", "destination"] {
            let left = sessions(rig, role)?;
            ensure!(left.is_empty(), "a session of the {role} is left: {left:?}");
        }
        self.torture.finish()
    }

    fn wait_for_the_copys_end(&self) -> Result<()> {
        wait_until(PATIENCE, "the copy to end", || !task::is_alive(self.copy))
    }
}

fn says(side: &Side, words: &str) -> Result<()> {
    wait_until(PATIENCE, words, || side.process.stderr().contains(words))
}

/// They say so, change nothing, and go on when the link is back after all.
fn both_ends_keep_paused(rig: &Rig) -> Result<()> {
    let keep = Some("keep-paused");
    let mut lost = Lost::start(rig, keep, keep)?;
    says(&lost.restorer, "the source did not come back in time")?;
    says(&lost.server, "the destination did not come back in time")?;
    lost.assert_original_stands()?;
    ensure!(task::is_alive(lost.copy), "the copy was killed");
    set_link(rig, true)?;
    says(&lost.restorer, "reconnected")?;
    says(&lost.server, "the destination is back")?;
    // Pages come as they are touched; a successor has the rest pushed.
    kill(lost.restorer.process.pid(), Signal::SIGKILL)?;
    lost.restorer.end()?;
    let mut successor = lost.plan.resume_restorer(rig, &[])?;
    successor.expect_success()?;
    lost.server.expect_success()?;
    lost.torture.wait_for_rounds(20)?;
    assert_moved(rig, lost.copy)?;
    lost.torture.finish()
}

/// The copy dies, and the original is still there. The source does not know; a later `resume` tells it.
fn the_destination_kills_its_copy(rig: &Rig) -> Result<()> {
    let mut lost = Lost::start(rig, None, Some("kill"))?;
    expect_failure(
        &mut lost.restorer,
        LOST,
        &["lazy-restorer: error:", "the copy was killed", "--on-lost"],
    )?;
    lost.wait_for_the_copys_end()?;
    lost.assert_original_stands()?;
    set_link(rig, true)?;
    let mut teller = lost.plan.resume_restorer(rig, &[])?;
    expect_failure(&mut teller, ABORTED_BY_PEER, &["the copy here is dead"])?;
    lost.original_runs(rig)
}

/// The copy dies, and the source is told as soon as it can be reached: then the original runs.
fn the_destination_thaws_the_source(rig: &Rig) -> Result<()> {
    let mut lost = Lost::start(rig, None, Some("thaw-source"))?;
    lost.wait_for_the_copys_end()?;
    lost.assert_original_stands()?;
    set_link(rig, true)?;
    expect_failure(
        &mut lost.restorer,
        ABORTED_BY_PEER,
        &["lazy-restorer: error:", "the copy here is dead"],
    )?;
    lost.original_runs(rig)
}

/// The original dies. The copy, which nobody killed, waits for pages that will never come: it never reads zeros.
fn the_source_kills_the_original(rig: &Rig) -> Result<()> {
    let mut lost = Lost::start(rig, Some("kill"), None)?;
    expect_failure(
        &mut lost.server,
        LOST,
        &["page-server: error:", "the frozen original was killed"],
    )?;
    ensure!(!task::is_alive(lost.torture.pid()), "the original lives");
    ensure!(sessions(rig, "source")?.is_empty(), "a session is left");
    set_link(rig, true)?;
    wait_until(PATIENCE, "a thread to wait for a page", || {
        task::waits_for_page(lost.copy)
    })?;
    ensure!(lost.restorer.process.is_running(), "lazy-restorer ended");
    lost.torture.assert_unharmed()
}

/// Serving fails while the link is alive: both ends say why, threads wait and never read zeros, and the operator's limit
/// ends it.
fn a_killed_original_is_told(rig: &Rig) -> Result<()> {
    let torture = torture(rig)?;
    let mut plan = PairPlan::new(rig)?;
    plan.restorer.push("--no-push".into());
    plan.restorer
        .extend(["--give-up-after", "8s", "--on-lost", "kill"].map(Into::into));
    let server = plan.start_server(rig, torture.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    let copy = restorer.wait_for_copy()?;
    torture.wait_for_rounds(1)?;
    let original = task::descendants(torture.pid());
    for pid in original.into_iter().chain([torture.pid()]) {
        kill(pid, Signal::SIGKILL)?;
    }
    let reason = "was the frozen process killed?";
    says(&server, reason)?;
    says(&restorer, reason)?;
    wait_until(PATIENCE, "a thread to wait for a page", || {
        task::waits_for_page(copy)
    })?;
    torture.assert_unharmed()?;
    restorer.process.wait(PATIENCE)?;
    says(&restorer, "the copy was killed, as --on-lost says")?;
    wait_until(PATIENCE, "the copy to end", || !task::is_alive(copy))?;
    ensure!(torture.board.mismatch().is_none(), "memory was damaged");
    Ok(())
}

/// A refusal is no end: somebody else may have the port for a while.
fn a_strangers_page_server_is_waited_out(rig: &Rig) -> Result<()> {
    let torture = torture(rig)?;
    let mut plan = PairPlan::new(rig)?;
    plan.restorer.push("--no-push".into());
    let mut server = plan.start_server(rig, torture.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    let copy = restorer.wait_for_copy()?;
    torture.wait_for_rounds(1)?;
    kill(server.process.pid(), Signal::SIGKILL)?;
    server.end()?;
    let stranger = Process::start_detached("stranger", rig.source.command("sleep").arg("1000"))?;
    let mut other = plan.start_server(rig, stranger.pid())?;
    says(&restorer, "serves another")?;
    other.terminate()?;
    let mut server = plan.resume_server(rig, &[])?;
    says(&restorer, "reconnected")?;
    kill(restorer.process.pid(), Signal::SIGKILL)?;
    restorer.end()?;
    let mut restorer = plan.resume_restorer(rig, &[])?;
    restorer.expect_success()?;
    server.expect_success()?;
    torture.wait_for_rounds(20)?;
    drop(stranger);
    assert_moved(rig, copy)?;
    torture.finish()
}

/// A copy that has every page, and whose source does not know it because the path was lost in that moment.
struct Unheard {
    plan: PairPlan,
    torture: Torture,
    server: Side,
    copy: Pid,
}

impl Unheard {
    fn start(rig: &Rig) -> Result<Self> {
        let torture = torture(rig)?;
        let mut plan = PairPlan::new(rig)?;
        let drained = Message::named("Drained").context("there is such a message")?;
        let peer = FaultyPeer::start(rig, Scenario::Holds(drained), &plan.identities)?;
        plan.source_seen_at = Some(peer.address());
        plan.restorer
            .extend(["--give-up-after", "1s"].map(Into::into));
        let server = plan.start_server(rig, torture.pid())?;
        let mut restorer = plan.start_restorer(rig)?;
        let copy = restorer.wait_for_copy()?;
        wait_until(PATIENCE, "every page to be there", || peer.is_guilty())?;
        drop(peer);
        expect_failure(
            &mut restorer,
            LOST,
            &["the workload is whole here", "page-server release"],
        )?;
        // It needs nobody any more, not even the keeper.
        torture.wait_for_rounds(100)?;
        ensure!(task::is_frozen(torture.pid()), "the original is not kept");
        let listed = sessions(rig, "destination")?;
        ensure!(listed[0]["standing"] == "orphaned", "{listed:?}");
        Ok(Self {
            plan,
            torture,
            server,
            copy,
        })
    }
}

fn a_whole_copy_is_told_later(rig: &Rig) -> Result<()> {
    let mut unheard = Unheard::start(rig)?;
    // A source that was killed meanwhile knows nothing of what it has sent.
    kill(unheard.server.process.pid(), Signal::SIGKILL)?;
    unheard.server.end()?;
    let mut server = unheard.plan.resume_server(rig, &[])?;
    let peer = FaultyPeer::start(rig, Scenario::Passes, &unheard.plan.identities)?;
    let mut teller = unheard.plan.resume_restorer(rig, &[])?;
    teller.expect_success()?;
    server.expect_success()?;
    drop(peer);
    unheard.torture.wait_for_rounds(100)?;
    assert_moved(rig, unheard.copy)?;
    for role in ["source", "destination"] {
        ensure!(sessions(rig, role)?.is_empty(), "a session is left");
    }
    unheard.torture.finish()
}

fn the_original_of_a_whole_copy_is_released_by_force(rig: &Rig) -> Result<()> {
    let unheard = Unheard::start(rig)?;
    let session = session_of(rig, "source")?;
    let release = |force: &[&str]| {
        let mut command = rig.source.command(binaries::program("page-server")?);
        shell::run(command.args(["release", "--session", &session]).args(force))
    };
    let refused = release(&[]).expect_err("it may be needed").to_string();
    ensure!(refused.contains("--i-know-the-copy-is-whole"), "{refused}");
    ensure!(task::is_frozen(unheard.torture.pid()), "it was touched");
    release(&["--i-know-the-copy-is-whole"])?;
    wait_until(PATIENCE, "the original to end", || {
        !task::is_alive(unheard.torture.pid())
    })?;
    ensure!(sessions(rig, "source")?.is_empty(), "a session is left");
    unheard.torture.wait_for_rounds(100)?;
    unheard.torture.finish()
}

fn torture(rig: &Rig) -> Result<Torture> {
    Torture::start(
        rig,
        TorturePlan {
            mib: 48,
            children: 1,
            seed: seed_of_this_run(),
            rest: LONG_REST,
            ..TorturePlan::default()
        },
    )
}
