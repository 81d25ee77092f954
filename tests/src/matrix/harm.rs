//! What is done to a migration at its moment.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::scene::{Scene, set_link};
use super::{Harm, Moment};
use crate::pair::{PATIENCE, Side};
use crate::rig::Rig;
use crate::wait::{wait_for, wait_until};
use crate::{namespace, task};

/// Does it.
pub fn inflict(rig: &Rig, scene: &mut Scene, harm: Harm) -> Result<()> {
    match harm {
        Harm::LinkCut => cut(rig, scene),
        Harm::RestorerKilled => kill_program(&mut scene.restorer),
        Harm::ServerKilled => {
            kill_program(&mut scene.server)?;
            match scene.moment {
                // What is held must not go on before this was noticed: it would be another moment by then.
                Moment::Skeleton | Moment::Listen => scene.restorer.end().map(drop),
                _ => Ok(()),
            }
        }
        Harm::DumpKilled => end(scene.dump().context("no CRIU holds the original")?),
        Harm::RestoreKilled => {
            // It is started before the gate is reached, but need not be itself yet.
            end(wait_for(PATIENCE, "a CRIU that restores", || {
                restores(rig).first().copied()
            })?)
        }
    }
}

/// There is nothing that could be harmed so.
pub fn assert_absent(rig: &Rig, scene: &mut Scene, harm: Harm) -> Result<()> {
    match harm {
        Harm::LinkCut => anyhow::bail!("there is always a link"),
        Harm::RestorerKilled => assert_ended(&mut scene.restorer),
        Harm::ServerKilled => assert_ended(&mut scene.server),
        Harm::DumpKilled => ensure_none(&criu_on(rig.source.namespace())),
        Harm::RestoreKilled => ensure_none(&restores(rig)),
    }
}

fn assert_ended(side: &mut Side) -> Result<()> {
    ensure!(!side.process.is_running(), "it runs");
    Ok(())
}

fn ensure_none(found: &[Pid]) -> Result<()> {
    ensure!(found.is_empty(), "CRIU runs: {found:?}");
    Ok(())
}

/// The destination's CRIU, parents before children.
fn restores(rig: &Rig) -> Vec<Pid> {
    criu_on(rig.destination.namespace())
}

fn criu_on(namespace: &str) -> Vec<Pid> {
    let there = task::in_network_namespace(&namespace::path(namespace));
    let mut found: Vec<Pid> = there
        .into_iter()
        .filter(|pid| task::name(*pid) == "criu" && task::is_alive(*pid))
        .collect();
    let is_below =
        |pid: Pid, found: &[Pid]| task::parent(pid).is_some_and(|up| found.contains(&up));
    let all = found.clone();
    found.sort_by_key(|pid| is_below(*pid, &all));
    found
}

/// Takes the link away until it was noticed, and gives it back.
fn cut(rig: &Rig, scene: &mut Scene) -> Result<()> {
    match scene.moment {
        // It is cut already, and was noticed: it comes back until the ends have met, and is cut again.
        Moment::Paused => {
            set_link(rig, true)?;
            let restorer = &scene.restorer;
            wait_until(PATIENCE, "the ends to meet again", || {
                restorer.process.stderr().contains("reconnected")
            })?;
        }
        // Nobody needs it any more: it stays away until all is over.
        Moment::Complete => return set_link(rig, false),
        _ => {}
    }
    let attempts = scene.restorer.losses();
    let served = scene.server.losses();
    set_link(rig, false)?;
    scene.restorer.wait_for_loss(attempts)?;
    // What was held goes on over a link that is not there.
    scene.let_go(rig)?;
    if scene.moment != Moment::Hello {
        scene.server.wait_for_loss(served)?;
    }
    set_link(rig, true)
}

fn kill_program(side: &mut Side) -> Result<()> {
    kill(side.process.pid(), Signal::SIGKILL).context("it has ended already")?;
    side.end()?;
    Ok(())
}

fn end(pid: Pid) -> Result<()> {
    kill(pid, Signal::SIGKILL).context("it has ended already")?;
    wait_until(PATIENCE, "it to end", || !task::is_alive(pid))
}
