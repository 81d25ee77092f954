//! Those that outlive a killed `lazy-restorer` are killed themselves: they replace each other, and when nobody is left
//! the copy dies rather than read zeros.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::harness::{self, Body, MIGRATION, Test};
use tests::leftovers::assert_moved;
use tests::pair::{PATIENCE, PairPlan, Side, session_of, sessions};
use tests::random::seed_of_this_run;
use tests::rig::Rig;
use tests::torture::{LONG_REST, Torture, TorturePlan};
use tests::wait::wait_until;
use tests::{binaries, namespace, shell, task};

fn main() -> ExitCode {
    let tests: [(&'static str, Body); 3] = [
        ("killed_keepers_are_replaced", killed_keepers_are_replaced),
        (
            "keepers_are_replaced_when_they_are_alone",
            keepers_are_replaced_when_they_are_alone,
        ),
        (
            "a_copy_that_nobody_keeps_dies",
            a_copy_that_nobody_keeps_dies,
        ),
    ];
    harness::main(tests.map(|(name, body)| Test {
        name,
        needs: MIGRATION,
        body,
    }))
}

/// A migration whose tasks run on the destination while most of their memory is on the source.
struct HalfWay {
    torture: Torture,
    plan: PairPlan,
    server: Side,
    restorer: Side,
    copy: Pid,
}

impl HalfWay {
    fn reach(rig: &Rig) -> Result<Self> {
        let plan = TorturePlan {
            mib: 64,
            children: 1,
            seed: seed_of_this_run(),
            rest: LONG_REST,
            ..TorturePlan::default()
        };
        let torture = Torture::start(rig, plan)?;
        let plan = PairPlan::new(rig)?;
        let mut slow = plan.clone();
        slow.restorer.push("--no-push".into());
        let server = slow.start_server(rig, torture.pid())?;
        let mut restorer = slow.start_restorer(rig)?;
        let copy = restorer.wait_for_copy()?;
        torture.wait_for_rounds(1)?;
        Ok(Self {
            torture,
            plan,
            server,
            restorer,
            copy,
        })
    }

    fn kill_restorer(&mut self, rig: &Rig) -> Result<()> {
        kill(self.restorer.process.pid(), Signal::SIGKILL)?;
        self.restorer.end()?;
        wait_until(PATIENCE, "the keeper to say that it keeps", || {
            let listed = sessions(rig, "destination");
            listed.is_ok_and(|listed| listed[0]["standing"] == "orphaned")
        })
    }

    /// Another program goes on, and nothing was lost.
    fn resume(mut self, rig: &Rig) -> Result<()> {
        let mut successor = self.plan.resume_restorer(rig, &[])?;
        successor.expect_success()?;
        self.server.expect_success()?;
        self.torture.wait_for_rounds(20)?;
        assert_moved(rig, self.copy)?;
        ensure!(sessions(rig, "destination")?.is_empty(), "a file is left");
        self.torture.finish()
    }
}

fn named(rig: &Rig, name: &str) -> Vec<Pid> {
    let there = task::in_network_namespace(&namespace::path(rig.destination.namespace()));
    let mut found: Vec<Pid> = there
        .into_iter()
        .filter(|pid| task::name(*pid) == name && task::is_alive(*pid))
        .collect();
    found.sort();
    found
}

/// Kills one of the two keepers and waits until there are two again.
fn kill_one_keeper(rig: &Rig, keeper: Pid) -> Result<()> {
    kill(keeper, Signal::SIGKILL)?;
    wait_until(PATIENCE, "another keeper", || {
        let now = named(rig, "keeper");
        now.len() == 2 && !now.contains(&keeper)
    })
}

fn killed_keepers_are_replaced(rig: &Rig) -> Result<()> {
    let mut half = HalfWay::reach(rig)?;
    let keepers = named(rig, "keeper");
    ensure!(keepers.len() == 2, "the keepers are {keepers:?}");
    for keeper in keepers {
        kill_one_keeper(rig, keeper)?;
    }
    wait_until(PATIENCE, "the copy's leash", || {
        !named(rig, "leash").is_empty()
    })?;
    let leash = named(rig, "leash");
    kill(leash[0], Signal::SIGKILL)?;
    wait_until(PATIENCE, "another leash", || {
        let now = named(rig, "leash");
        now.len() == 1 && now != leash
    })?;
    let said = half.restorer.process.stderr();
    ensure!(said.contains("two keepers was killed"), "{said}");
    half.torture.wait_for_rounds(1)?;
    // Whoever they are by now, they hold all there is.
    half.kill_restorer(rig)?;
    half.resume(rig)
}

fn keepers_are_replaced_when_they_are_alone(rig: &Rig) -> Result<()> {
    let mut half = HalfWay::reach(rig)?;
    half.kill_restorer(rig)?;
    wait_until(PATIENCE, "a thread to wait for a page", || {
        task::waits_for_page(half.copy)
    })?;
    for keeper in named(rig, "keeper") {
        kill_one_keeper(rig, keeper)?;
    }
    half.torture.assert_unharmed()?;
    wait_until(PATIENCE, "the session to be theirs", || {
        let listed = sessions(rig, "destination");
        listed.is_ok_and(|listed| listed[0]["standing"] == "orphaned")
    })?;
    half.resume(rig)
}

/// `lazy-restorer` and both keepers are killed in the same moment.
fn a_copy_that_nobody_keeps_dies(rig: &Rig) -> Result<()> {
    let mut half = HalfWay::reach(rig)?;
    wait_until(PATIENCE, "the copy's leash", || {
        !named(rig, "leash").is_empty()
    })?;
    let mut all = named(rig, "keeper");
    all.push(half.restorer.process.pid());
    // None of them is to see another one's end.
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        for pid in &all {
            kill(*pid, signal).context("it has ended already")?;
        }
    }
    half.restorer.end()?;
    wait_until(PATIENCE, "nothing to be left there", || {
        let there = task::in_network_namespace(&namespace::path(rig.destination.namespace()));
        !there.into_iter().any(task::is_alive)
    })?;
    half.torture.assert_unharmed()?;
    ensure!(task::is_frozen(half.torture.pid()), "the original runs");
    let session = session_of(rig, "source")?;
    let mut command = rig.source.command(binaries::program("page-server")?);
    command.args(["thaw", "--session", &session, "--i-know-the-copy-is-dead"]);
    shell::run(&mut command)?;
    half.server.end()?;
    half.torture.wait_for_original(20)?;
    half.torture.finish()
}
