//! Every state of a session, and in each of them one thing that goes wrong: afterwards the workload runs on exactly one
//! host with every byte right, or stands still on the source until the operator lets it go. One table is printed.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::gate::Gate;
use tests::harness::{self, MIGRATION, Test};
use tests::host::INTERFACE;
use tests::pair::{PATIENCE, PairPlan, Side, sessions};
use tests::random::seed_of_this_run;
use tests::rig::Rig;
use tests::task;
use tests::torture::{Torture, TorturePlan};
use tests::wait::wait_until;

fn main() -> ExitCode {
    harness::main([Test {
        name: "every_state_and_every_fault",
        needs: MIGRATION,
        body: every_state_and_every_fault,
    }])
}

/// Where a migration is held while something goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// `page-server` waits: nobody has connected.
    Hello,
    /// The images are complete, the skeleton is on its way.
    Skeleton,
    /// The destination is about to restore.
    Listen,
    /// The copy runs, most of its memory is on the source.
    Postcopy,
    /// The link is lost.
    Paused,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    LinkCut,
    RestorerKilled,
    ServerKilled,
    CriuKilled,
}

const MOMENTS: [Moment; 5] = [
    Moment::Hello,
    Moment::Skeleton,
    Moment::Listen,
    Moment::Postcopy,
    Moment::Paused,
];
const FAULTS: [Fault; 4] = [
    Fault::LinkCut,
    Fault::RestorerKilled,
    Fault::ServerKilled,
    Fault::CriuKilled,
];

/// Each cell has a rig of its own.
fn every_state_and_every_fault(_: &Rig) -> Result<()> {
    let mut table = Vec::new();
    for moment in MOMENTS {
        for fault in FAULTS {
            let outcome = Rig::new().and_then(|rig| one(&rig, moment, fault));
            let failed = outcome.is_err();
            let text = match outcome {
                Ok(text) => text.to_owned(),
                Err(error) => format!("FAILED: {error:#}"),
            };
            println!("{moment:?} x {fault:?}: {text}");
            table.push((moment, fault, text, failed));
        }
    }
    println!("\n{:<10} {:<16} outcome", "state", "fault");
    for (moment, fault, text, _) in &table {
        println!(
            "{:<10} {:<16} {text}",
            format!("{moment:?}"),
            format!("{fault:?}")
        );
    }
    let failed = table.iter().filter(|(.., failed)| *failed).count();
    ensure!(failed == 0, "{failed} of {} went wrong", table.len());
    Ok(())
}

/// The word of the table for one cell; every byte of the workload was checked.
fn one(rig: &Rig, moment: Moment, fault: Fault) -> Result<&'static str> {
    let torture = Torture::start(
        rig,
        TorturePlan {
            mib: 32,
            seed: seed_of_this_run(),
            pieces: 20,
            ..TorturePlan::default()
        },
    )?;
    let mut held = Held::at(rig, moment, fault, &torture)?;
    held.strike(rig, fault)?;
    let outcome = held.go_on(rig, moment, fault, &torture)?;
    torture.wait_for_rounds(5)?;
    torture.finish()?;
    Ok(outcome)
}

struct Held {
    plan: PairPlan,
    gate: Gate,
    server: Side,
    restorer: Option<Side>,
    criu: Option<Pid>,
}

impl Held {
    fn at(rig: &Rig, moment: Moment, fault: Fault, torture: &Torture) -> Result<Self> {
        let plan = PairPlan::new(rig)?;
        let gate = Gate::new(rig, &format!("{moment:?}-{fault:?}"))?;
        let mut held = plan.clone();
        match moment {
            Moment::Skeleton => held.on_frozen = gate.after(&held.on_frozen),
            Moment::Listen => held.before_restore = gate.after(&held.before_restore),
            Moment::Postcopy | Moment::Paused => held.restorer.push("--no-push".into()),
            Moment::Hello => {}
        }
        let server = held.start_server(rig, torture.pid())?;
        let mut this = Held {
            plan: held,
            gate,
            server,
            restorer: None,
            criu: None,
        };
        if moment == Moment::Hello {
            return Ok(this);
        }
        let mut restorer = this.plan.start_restorer(rig)?;
        match moment {
            Moment::Skeleton | Moment::Listen => this.gate.wait(PATIENCE)?,
            _ => {
                restorer.wait_for_copy()?;
            }
        }
        if moment == Moment::Paused {
            set_link(rig, "down")?;
            let said = |side: &Side, words: &str| side.process.stderr().contains(words);
            wait_until(PATIENCE, "both ends to miss the link", || {
                said(&this.server, "link lost") && said(&restorer, "trying to reconnect")
            })?;
        }
        this.criu = criu_of(&this.server);
        this.restorer = Some(restorer);
        Ok(this)
    }

    fn strike(&mut self, rig: &Rig, fault: Fault) -> Result<()> {
        match (fault, &mut self.restorer) {
            (Fault::LinkCut, _) => set_link(rig, "down"),
            (Fault::RestorerKilled, Some(restorer)) => end(restorer),
            (Fault::ServerKilled, _) => end(&mut self.server),
            // Before anyone connected there is no CRIU and no restorer: nothing can be killed, so nothing is harmed.
            (Fault::RestorerKilled, None) => Ok(()),
            (Fault::CriuKilled, _) => match self.criu {
                Some(criu) => kill(criu, Signal::SIGKILL).context("no CRIU"),
                None => Ok(()),
            },
        }
    }

    /// Lets the migration go on; afterwards the workload runs on exactly one host.
    fn go_on(
        &mut self,
        rig: &Rig,
        moment: Moment,
        fault: Fault,
        torture: &Torture,
    ) -> Result<&'static str> {
        match moment {
            Moment::Hello => {
                set_link(rig, "up")?;
                end(&mut self.server).ok();
                ensure!(!task::is_frozen(torture.pid()), "it stands still");
                Ok("runs on the source, nothing had begun")
            }
            Moment::Skeleton | Moment::Listen => {
                self.gate.open()?;
                self.end_both()?;
                set_link(rig, "up")?;
                let runs = || !task::is_frozen(torture.pid());
                wait_until(PATIENCE, "the workload to run on the source", runs)?;
                Ok("runs on the source, rolled back")
            }
            Moment::Postcopy | Moment::Paused => self.complete(rig, fault),
        }
    }

    /// Past the point of no return: killed programs are succeeded, and the migration ends well.
    fn complete(&mut self, rig: &Rig, fault: Fault) -> Result<&'static str> {
        if fault == Fault::LinkCut {
            let restorer = self.restorer.as_ref().context("it runs")?;
            wait_until(PATIENCE, "the link to be missed", || {
                restorer.process.stderr().contains("trying to reconnect")
            })?;
        }
        set_link(rig, "up")?;
        if fault == Fault::ServerKilled {
            self.server = self.plan.resume_server(rig, &[])?;
        }
        // What was started without push completes by a successor with it.
        if let Some(mut restorer) = self.restorer.take() {
            if fault != Fault::RestorerKilled {
                end(&mut restorer)?;
            }
            let mut successor = self.plan.resume_restorer(rig, &[])?;
            successor.expect_success()?;
        }
        self.server.expect_success()?;
        ensure!(sessions(rig, "source")?.is_empty(), "a session is left");
        ensure!(
            sessions(rig, "destination")?.is_empty(),
            "a session is left"
        );
        Ok(match fault {
            Fault::LinkCut => "runs on the destination, waited for the link",
            Fault::RestorerKilled | Fault::ServerKilled => "runs on the destination, succeeded",
            Fault::CriuKilled => "runs on the destination, the original stood still",
        })
    }

    fn end_both(&mut self) -> Result<()> {
        self.server.end()?;
        if let Some(restorer) = &mut self.restorer {
            restorer.end()?;
        }
        Ok(())
    }
}

fn set_link(rig: &Rig, state: &str) -> Result<()> {
    let line = format!("ip link set dev {INTERFACE} {state}");
    rig.source.shell(&line).map(drop)
}

fn end(side: &mut Side) -> Result<()> {
    kill(side.process.pid(), Signal::SIGKILL)?;
    side.end()?;
    Ok(())
}

/// The CRIU that holds the workload.
fn criu_of(server: &Side) -> Option<Pid> {
    let children = task::children(server.process.pid());
    children
        .into_iter()
        .find(|child| task::name(*child) == "criu")
}
