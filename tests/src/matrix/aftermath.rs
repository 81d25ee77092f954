//! What comes after the harm: the migration goes on, the operator resumes what is orphaned, and one tree is left.

use anyhow::{Result, ensure};
use nix::unistd::Pid;

use super::scene::Scene;
use super::{Host, Moment, Verdict};
use crate::leftovers::assert_moved;
use crate::pair::{Side, sessions};
use crate::rig::Rig;
use crate::{namespace, task};

/// Rounds of every worker after which all of it has been looked at, more or less; the end looks at all of it.
const ROUNDS: u64 = 20;

/// Lets the migration end and looks at what is left.
pub fn watch(rig: &Rig, mut scene: Scene) -> Result<Verdict> {
    let mut successors = Vec::new();
    if scene.moment == Moment::Complete {
        // What is held is the end of the original, which a successor must bring about.
        successors = resume(rig, &scene)?;
        scene.let_go(rig)?;
    } else {
        scene.let_go(rig)?;
        successors.extend(resume(rig, &scene)?);
    }
    if scene.moment == Moment::Hello && scene.server.process.is_running() {
        // It goes on waiting for a destination, for as long as the operator likes.
        scene.restorer.end()?;
        scene.torture.wait_for_rounds(ROUNDS)?;
        scene.server.terminate()?;
    }
    scene.server.end()?;
    // A source that heard everything before its destination knew that has ended, and the destination goes on telling it.
    let mut is_told_to_end = false;
    for side in successors.iter_mut().chain([&mut scene.restorer]) {
        is_told_to_end |= side.end_telling(true)?;
    }
    let host = host_of(rig, scene.torture.pid())?;
    match host {
        Host::Source => {
            scene.torture.wait_for_original(ROUNDS)?;
            scene.before.assert_restored(rig)?;
        }
        Host::Destination => {
            scene.torture.wait_for_rounds(ROUNDS)?;
            assert_moved(rig, scene.restorer.restored_pid()?)?;
        }
    }
    let left = sessions(rig, "source")?;
    ensure!(left.is_empty(), "a session of the source is left: {left:?}");
    let left = sessions(rig, "destination")?;
    // The one that was told to end can be gone on with.
    ensure!(left.len() == usize::from(is_told_to_end), "{left:?}");
    scene.torture.finish()?;
    Ok(match successors.is_empty() {
        true => Verdict::Runs(host),
        false => Verdict::Resumed(host),
    })
}

/// Does what an operator does about a program that was killed, if there is anything to do.
fn resume(rig: &Rig, scene: &Scene) -> Result<Vec<Side>> {
    let mut successors = Vec::new();
    if is_orphaned(rig, "source")? {
        successors.push(scene.plan.resume_server(rig, &["-v"])?);
    }
    if is_orphaned(rig, "destination")? {
        successors.push(scene.plan.resume_restorer(rig, &["-v"])?);
    }
    Ok(successors)
}

fn is_orphaned(rig: &Rig, role: &str) -> Result<bool> {
    let listed = sessions(rig, role)?;
    Ok(listed
        .iter()
        .any(|session| session["standing"] == "orphaned"))
}

/// Exactly one host has the torture workload whose root was `root`, and there it runs.
pub fn host_of(rig: &Rig, root: Pid) -> Result<Host> {
    let on_source = task::is_alive(root);
    let copies = copies(rig);
    match (on_source, copies.is_empty()) {
        (true, true) => {
            ensure!(!task::is_frozen(root), "the original stands still");
            Ok(Host::Source)
        }
        (false, false) => Ok(Host::Destination),
        (true, false) => anyhow::bail!("both hosts have it: {root} and {copies:?}"),
        (false, true) => anyhow::bail!("no host has it any more"),
    }
}

fn copies(rig: &Rig) -> Vec<Pid> {
    let there = task::in_network_namespace(&namespace::path(rig.destination.namespace()));
    there
        .into_iter()
        .filter(|pid| task::name(*pid) == "torture" && task::is_alive(*pid))
        .collect()
}
