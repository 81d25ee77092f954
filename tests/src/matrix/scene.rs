//! A migration that stands at one moment and waits there.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Moment;
use crate::fake_criu;
use crate::faulty_peer::{FaultyPeer, Message, Scenario};
use crate::gate::Gate;
use crate::host::INTERFACE;
use crate::leftovers::Snapshot;
use crate::pair::{PATIENCE, PairPlan, Side, sessions};
use crate::random::seed_of_this_run;
use crate::rig::Rig;
use crate::task;
use crate::torture::{REST, Torture, TorturePlan};
use crate::wait::wait_until;

/// The source's interface sends this slowly, so that pages are still on the way for as long as a test needs.
const SLOW: &str = "rate 8mbit burst 16kb latency 200ms";

/// What keeps a migration where it is.
#[derive(Debug)]
pub enum Hold {
    /// A script of the operator's, or of CRIU.
    Gate(Gate),
    /// A message on its way.
    Message,
    /// A slow link.
    SlowLink,
    /// The link is down.
    NoLink,
    /// A CRIU that stands still.
    Stopped(Pid),
}

/// A migration at its moment.
#[derive(Debug)]
pub struct Scene {
    pub moment: Moment,
    pub torture: Torture,
    pub plan: PairPlan,
    pub server: Side,
    pub restorer: Side,
    pub before: Snapshot,
    hold: Hold,
    peer: Option<FaultyPeer>,
}

impl Scene {
    /// Starts a migration of a small process tree and waits until it is at `moment`.
    pub fn reach(rig: &Rig, moment: Moment) -> Result<Self> {
        let torture = Torture::start(
            rig,
            TorturePlan {
                mib: 12,
                threads: 1,
                children: 1,
                pieces: 20,
                seed: seed_of_this_run(),
                rest: REST,
                ..TorturePlan::default()
            },
        )?;
        let mut plan = PairPlan::new(rig)?;
        plan.server.push("-v".into());
        plan.restorer.push("-v".into());
        let peer = match held_message(moment) {
            Some(message) => {
                let scenario = Scenario::Holds(message);
                let peer = FaultyPeer::start(rig, scenario, &plan.identities)?;
                plan.source_seen_at = Some(peer.address());
                Some(peer)
            }
            None => None,
        };
        let before = Snapshot::take_beside(rig, torture.pid())?;
        let hold = prepare(rig, &mut plan, moment)?;
        let server = plan.start_server(rig, torture.pid())?;
        let restorer = plan.start_restorer(rig)?;
        let mut scene = Self {
            moment,
            torture,
            plan,
            server,
            restorer,
            before,
            hold,
            peer,
        };
        scene
            .arrive(rig)
            .with_context(|| format!("never came to {moment}"))?;
        Ok(scene)
    }

    /// Waits for the moment.
    fn arrive(&mut self, rig: &Rig) -> Result<()> {
        match self.moment {
            Moment::Freeze | Moment::Skeleton | Moment::Listen => match &self.hold {
                Hold::Gate(gate) => gate.wait(PATIENCE),
                _ => Ok(()),
            },
            Moment::Hello | Moment::Advise | Moment::Cutover | Moment::Drained => {
                self.wait_for_message()
            }
            Moment::Unheard => {
                self.wait_for_message()?;
                let words = "is waited for";
                wait_until(PATIENCE, words, || {
                    self.server.process.stderr().contains(words)
                })
            }
            Moment::Postcopy => self.wait_until_it_runs(),
            Moment::Paused => self.lose_the_link(rig),
            Moment::Recover => {
                self.lose_the_link(rig)?;
                set_link(rig, true)?;
                self.hold = Hold::Message;
                self.wait_for_message()
            }
            Moment::Complete => self.stop_the_release(rig),
        }
    }

    fn wait_for_message(&self) -> Result<()> {
        let peer = self.peer.as_ref().context("nobody is between the ends")?;
        wait_until(PATIENCE, "the message that is held", || peer.is_guilty())
    }

    fn wait_until_it_runs(&mut self) -> Result<()> {
        self.restorer.wait_for_copy()?;
        self.torture.wait_for_rounds(1)
    }

    fn lose_the_link(&mut self, rig: &Rig) -> Result<()> {
        self.wait_until_it_runs()?;
        set_link(rig, false)?;
        for end in [&mut self.server, &mut self.restorer] {
            end.wait_for_loss(0)?;
            ensure!(
                end.process.is_running(),
                "it ended before the link was lost: {}",
                end.process.stderr()
            );
        }
        Ok(())
    }

    fn stop_the_release(&mut self, rig: &Rig) -> Result<()> {
        self.wait_until_it_runs()?;
        let criu = self.dump().context("no CRIU holds the original")?;
        kill(criu, Signal::SIGSTOP)?;
        self.hold = Hold::Stopped(criu);
        fast_link(rig)?;
        self.restorer.expect_success()?;
        let listed = sessions(rig, "source")?;
        let state = listed.first().map(|session| session["state"].clone());
        ensure!(
            state.as_ref().is_some_and(|state| state == "complete"),
            "the source is in {state:?}"
        );
        Ok(())
    }

    /// The source is told not to wait for a destination that does not know that all is well, which it does for a minute.
    pub fn end_the_wait(&mut self) -> Result<()> {
        let status = self.server.terminate()?;
        ensure!(status.success(), "page-server: {status}");
        Ok(())
    }

    /// The CRIU that holds the original.
    pub fn dump(&self) -> Option<Pid> {
        let children = task::children(self.server.process.pid());
        children.into_iter().find(|pid| task::name(*pid) == "criu")
    }

    /// Lets the migration go on.
    pub fn let_go(&mut self, rig: &Rig) -> Result<()> {
        match &self.hold {
            Hold::Gate(gate) => gate.open(),
            Hold::Message => self.peer.as_ref().map_or(Ok(()), FaultyPeer::let_go),
            Hold::SlowLink => Ok(()),
            Hold::NoLink => set_link(rig, true),
            // One that was killed needs no telling.
            Hold::Stopped(criu) => {
                let _ = kill(*criu, Signal::SIGCONT);
                Ok(())
            }
        }?;
        fast_link(rig)
    }
}

/// The message on whose way a migration is held.
fn held_message(moment: Moment) -> Option<Message> {
    Message::named(match moment {
        Moment::Hello => "Hello",
        Moment::Advise => "Advise",
        Moment::Cutover => "CutoverGranted",
        Moment::Recover => "PresentEnd",
        Moment::Drained => "Drained",
        Moment::Unheard => "Complete",
        _ => return None,
    })
}

/// Makes `plan` hold at `moment`.
fn prepare(rig: &Rig, plan: &mut PairPlan, moment: Moment) -> Result<Hold> {
    Ok(match moment {
        Moment::Freeze => {
            let gate = Gate::new(rig, "frozen")?;
            plan.source_criu = fake_criu::held_at(rig, "dump", "post-dump", &gate)?;
            Hold::Gate(gate)
        }
        Moment::Skeleton => {
            let gate = Gate::new(rig, "skeleton")?;
            plan.before_restore = gate.after(&plan.before_restore);
            Hold::Gate(gate)
        }
        Moment::Listen => {
            let gate = Gate::new(rig, "rebuilt")?;
            plan.destination_criu = fake_criu::held_at(rig, "restore", "post-restore", &gate)?;
            Hold::Gate(gate)
        }
        Moment::Postcopy | Moment::Paused | Moment::Recover | Moment::Complete => {
            plan.before_restore = format!("{} && {}", slow_link(rig), plan.before_restore);
            match moment {
                Moment::Paused => Hold::NoLink,
                _ => Hold::SlowLink,
            }
        }
        _ => Hold::Message,
    })
}

/// A line of shell that makes the source's link slow.
pub fn slow_link(rig: &Rig) -> String {
    shaped_link(rig, SLOW)
}

/// A line of shell that gives the source's link a token bucket (tc-tbf(8)).
pub fn shaped_link(rig: &Rig, bucket: &str) -> String {
    format!(
        "nsenter --net=/run/netns/{} tc qdisc replace dev {INTERFACE} root tbf {bucket}",
        rig.source.namespace()
    )
}

/// Makes the source's link fast again.
pub fn fast_link(rig: &Rig) -> Result<()> {
    rig.source.shell(&format!(
        "tc qdisc del dev {INTERFACE} root 2>/dev/null || true"
    ))?;
    Ok(())
}

/// Takes the source's link down, or up again.
pub fn set_link(rig: &Rig, up: bool) -> Result<()> {
    let state = if up { "up" } else { "down" };
    rig.source
        .shell(&format!("ip link set dev {INTERFACE} {state}"))?;
    Ok(())
}
