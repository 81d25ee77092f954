//! `--give-up-after` and `--on-lost`, at both ends: a link that stays lost after the cutover, and what the operator
//! wanted done about it.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::exit_code::{ABORTED_BY_PEER, LOST};
use tests::failure::expect_failure;
use tests::harness::{self, Body, MIGRATION, Test};
use tests::leftovers::assert_moved;
use tests::matrix::set_link;
use tests::pair::{PATIENCE, PairPlan, Side, sessions};
use tests::random::seed_of_this_run;
use tests::rig::Rig;
use tests::task;
use tests::torture::{Torture, TorturePlan};
use tests::wait::wait_until;

fn main() -> ExitCode {
    let tests: [(&'static str, Body); 4] = [
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
        let torture = Torture::start(
            rig,
            TorturePlan {
                mib: 48,
                children: 1,
                seed: seed_of_this_run(),
                ..TorturePlan::default()
            },
        )?;
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
