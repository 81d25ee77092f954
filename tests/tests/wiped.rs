//! Everything of ours on one host is killed at once, and what an operator does about a frozen original afterwards.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::exit_code::{ABORTED_BY_PEER, INTERRUPTED, LOST};
use tests::failure::{Bystander, expect_failure};
use tests::gate::Gate;
use tests::harness::{self, Body, MIGRATION, REDIS_MIGRATION, Test};
use tests::host::Host;
use tests::matrix::{fast_link, slow_link};
use tests::pair::{PATIENCE, PairPlan, Side, session_of, sessions};
use tests::random::seed_of_this_run;
use tests::rig::Rig;
use tests::torture::{LONG_REST, Torture, TorturePlan};
use tests::wait::wait_until;
use tests::{binaries, namespace, shell, task};

fn main() -> ExitCode {
    let with_torture: [(&'static str, Body); 3] = [
        ("the_source_is_wiped", the_source_is_wiped),
        ("the_destination_is_wiped", the_destination_is_wiped),
        (
            "an_original_that_ran_is_not_served",
            an_original_that_ran_is_not_served,
        ),
    ];
    let test = |needs| move |(name, body)| Test { name, needs, body };
    let early: [(&'static str, Body); 1] =
        [("thawed_before_the_cutover", thawed_before_the_cutover)];
    let torture = with_torture.map(test(MIGRATION));
    harness::main(torture.into_iter().chain(early.map(test(REDIS_MIGRATION))))
}

/// A migration whose tasks run on the destination while most of their memory is on the source.
fn half_way(rig: &Rig) -> Result<(Torture, PairPlan, Side, Side)> {
    let torture = Torture::start(
        rig,
        TorturePlan {
            mib: 48,
            children: 1,
            seed: seed_of_this_run(),
            rest: LONG_REST,
            ..TorturePlan::default()
        },
    )?;
    let plan = PairPlan::new(rig)?;
    let mut slow = plan.clone();
    slow.restorer.push("--no-push".into());
    // Else the faults alone may have brought everything before a busy machine comes to what is to happen half way.
    slow.before_restore = format!("{} && {}", slow_link(rig), slow.before_restore);
    let server = slow.start_server(rig, torture.pid())?;
    let mut restorer = slow.start_restorer(rig)?;
    restorer.wait_for_copy()?;
    torture.wait_for_rounds(1)?;
    Ok((torture, plan, server, restorer))
}

/// Kills all processes of a host but `spared` in one moment: none sees another one's end.
fn wipe(host: &Host, spared: &[Pid]) -> Result<()> {
    let there = || {
        let all = task::in_network_namespace(&namespace::path(host.namespace()));
        let doomed = all.into_iter().filter(|pid| !spared.contains(pid));
        doomed
            .filter(|pid| task::is_alive(*pid))
            .collect::<Vec<_>>()
    };
    ensure!(!there().is_empty(), "there is nobody to kill");
    // Also a child that was not there yet a moment ago: it would see the keepers' end, and their memory go with them.
    wait_until(PATIENCE, "all to stand still", || {
        let moving: Vec<Pid> = there().into_iter().filter(|pid| moves(*pid)).collect();
        moving.iter().for_each(|pid| send(*pid, Signal::SIGSTOP));
        moving.is_empty()
    })?;
    there()
        .into_iter()
        .for_each(|pid| send(pid, Signal::SIGKILL));
    wait_until(PATIENCE, "all to be dead", || there().is_empty())
}

/// Whether it is not stopped, and none of its threads waits for a page within a system call.
fn moves(pid: Pid) -> bool {
    !matches!(task::state(pid), None | Some('T' | 't' | 'D' | 'Z' | 'X'))
}

/// With the first process of a PID namespace others have gone already.
fn send(pid: Pid, signal: Signal) {
    let _ = kill(pid, signal);
}

/// The processes of the original. Of a child that had ended when it was frozen there is nothing to hold.
fn original(torture: &Torture) -> Vec<Pid> {
    let mut all = task::descendants(torture.pid());
    all.push(torture.pid());
    all.retain(|pid| task::is_alive(*pid));
    all
}

fn wipe_source(rig: &Rig, torture: &Torture, server: &mut Side) -> Result<()> {
    let original = original(torture);
    wipe(&rig.source, &original)?;
    server.end()?;
    for pid in original {
        wait_until(PATIENCE, "the original to stand still by itself", || {
            task::state(pid) == Some('T')
        })?;
    }
    Ok(())
}

/// `page-server`, its guard, CRIU and CRIU's script: the stop that waited holds the original, and a successor serves it.
fn the_source_is_wiped(rig: &Rig) -> Result<()> {
    let (torture, plan, mut server, mut restorer) = half_way(rig)?;
    wipe_source(rig, &torture, &mut server)?;
    fast_link(rig)?;
    let mut successor = plan.resume_server(rig, &[])?;
    torture.wait_for_rounds(20)?;
    // It compares all of its memory, which it fetches for that, and ends.
    torture.finish()?;
    restorer.expect_success()?;
    successor.expect_success()?;
    ensure!(sessions(rig, "source")?.is_empty(), "a file is left");
    Ok(())
}

/// The same, and then somebody lets the original run for a moment.
fn an_original_that_ran_is_not_served(rig: &Rig) -> Result<()> {
    let (torture, plan, mut server, mut restorer) = half_way(rig)?;
    wipe_source(rig, &torture, &mut server)?;
    wipe(&rig.destination, &[])?;
    restorer.end()?;
    for signal in [Signal::SIGCONT, Signal::SIGSTOP] {
        for pid in original(&torture) {
            // A child of the moment may end by that.
            let sent = kill(pid, signal);
            ensure!(sent.is_ok() || pid != torture.pid(), "the original ended");
        }
    }
    wait_until(PATIENCE, "the original to stand still again", || {
        original(&torture)
            .into_iter()
            .all(|pid| task::state(pid) == Some('T'))
    })?;
    let mut successor = plan.resume_server(rig, &[])?;
    expect_failure(&mut successor, LOST, &["ran since", "page-server thaw"])?;
    thaw(rig, &["--i-know-the-copy-is-dead"])?;
    torture.wait_for_original(20)?;
    torture.finish()
}

/// `lazy-restorer`, its keepers, the copy and all that belongs to it.
fn the_destination_is_wiped(rig: &Rig) -> Result<()> {
    let (torture, _plan, mut server, mut restorer) = half_way(rig)?;
    wipe(&rig.destination, &[])?;
    restorer.end()?;
    torture.assert_unharmed()?;
    let states = task::state(torture.pid());
    ensure!(
        task::is_frozen(torture.pid()),
        "the original runs: {states:?}"
    );
    thaw(rig, &["--i-know-the-copy-is-dead"])?;
    server.end()?;
    torture.wait_for_original(20)?;
    ensure!(sessions(rig, "source")?.is_empty(), "a file is left");
    torture.finish()
}

fn thaw(rig: &Rig, force: &[&str]) -> Result<()> {
    let session = session_of(rig, "source")?;
    let mut command = rig.source.command(binaries::program("page-server")?);
    shell::run(command.args(["thaw", "--session", &session]).args(force))?;
    Ok(())
}

/// Before the point of no return nobody has to say that the copy is dead: there is none.
fn thawed_before_the_cutover(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let plan = PairPlan::new(rig)?;
    let gate = Gate::new(rig, "early")?;
    let mut held = plan.clone();
    held.before_restore = gate.after(&held.before_restore);
    let mut server = held.start_server(rig, bystander.redis.pid())?;
    let mut restorer = held.start_restorer(rig)?;
    gate.wait(PATIENCE)?;
    thaw(rig, &[])?;
    bystander.redis.assert_alive()?;
    gate.open()?;
    expect_failure(&mut server, INTERRUPTED, &["SIGTERM"])?;
    expect_failure(&mut restorer, ABORTED_BY_PEER, &["source", "SIGTERM"])?;
    bystander.assert_movable(rig, &plan)
}
