//! The path is lost in the moment before, and after, each message of the session: then exactly one host runs the tree.
//!
//! A peer between the ends (`faulty-peer`) knows the messages; when the one comes, it is gone without a word, and another
//! one that lets everything pass takes its place.

use std::process::ExitCode;
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::signal::{Signal, kill};
use tests::faulty_peer::{FaultyPeer, Message, Scenario};
use tests::harness::{self, MIGRATION, Test, show_logs};
use tests::leftovers::assert_moved;
use tests::matrix::{Host, host_of, set_link};
use tests::pair::{PATIENCE, PairPlan, Side, sessions};
use tests::random::seed_of_this_run;
use tests::rig::Rig;
use tests::torture::{REST, Torture, TorturePlan};
use tests::wait::wait_until;

/// Most of the time they wait for a link to be given up.
const SIDE_BY_SIDE: usize = 6;

/// A destination that lost its question for the cutover asks for a minute whether it got it.
const SLOW: &str = "CutoverRequest";

fn main() -> ExitCode {
    harness::main([
        Test {
            name: "each_message_is_lost_once",
            needs: MIGRATION,
            body: |_| lose_all(&cases(|message| message.to_string() != SLOW)),
        },
        Test {
            name: "the_cutover_is_lost_and_so_is_its_recovery",
            needs: MIGRATION,
            body: |_| lose_all(&at_the_cutover()),
        },
        Test {
            name: "the_question_for_the_cutover_is_lost",
            needs: MIGRATION,
            body: |_| lose_all(&cases(|message| message.to_string() == SLOW)),
        },
    ])
}

/// A source that does not know whether it was heard says it again to a destination that comes and asks.
const LAST: &str = "Complete";

type Case = (Message, Scenario);

fn cases(wanted: fn(Message) -> bool) -> Vec<Case> {
    let messages = Message::all().filter(|message| wanted(*message));
    messages
        .flat_map(|message| {
            [
                Scenario::LosesBefore(message),
                Scenario::LosesAfter(message),
            ]
            .map(|scenario| (message, scenario))
        })
        .collect()
}

/// The grant is lost, and then the link again while it is settled what follows from that.
fn at_the_cutover() -> Vec<Case> {
    let messages = Message::OF_RECOVERY.into_iter();
    let messages = messages.filter(|message| message.to_string() != "Withheld");
    messages
        .map(|message| (Message::CUTOVER, Scenario::LosesAtCutover(message)))
        .collect()
}

fn lose_all(cases: &[Case]) -> Result<()> {
    let waiting = Mutex::new(cases.iter().copied());
    let failed = Mutex::new(Vec::new());
    let next = || waiting.lock().ok()?.next();
    thread::scope(|scope| {
        for _ in 0..SIDE_BY_SIDE {
            scope.spawn(|| {
                while let Some((message, scenario)) = next() {
                    // A thread of its own, since a rig's mounts are its thread's.
                    let tested = thread::spawn(move || on_a_rig(message, scenario)).join();
                    match tested.unwrap_or_else(|_| Err(anyhow!("panicked"))) {
                        Ok(host) => println!("{}: {host:?}", scenario.name()),
                        Err(error) => {
                            let text = format!("{}: {error:#}", scenario.name());
                            failed.lock().map(|mut all| all.push(text)).unwrap_or(());
                        }
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap_or_default();
    ensure!(failed.is_empty(), "\n{}", failed.join("\n"));
    Ok(())
}

fn on_a_rig(message: Message, scenario: Scenario) -> Result<Host> {
    let rig = Rig::new()?;
    let lost = lose(&rig, message, scenario);
    if lost.is_err() {
        eprintln!("=== {} ===", scenario.name());
        show_logs(&rig.folder().join("logs"));
    }
    lost
}

fn lose(rig: &Rig, message: Message, scenario: Scenario) -> Result<Host> {
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
    let peer = FaultyPeer::start(rig, scenario, &plan.identities)?;
    plan.source_seen_at = Some(peer.address());
    let of_recovery = Message::OF_RECOVERY.contains(&message);
    if of_recovery {
        // Something must be owed when the link is lost the first time.
        plan.restorer.push("--no-push".into());
    }
    let mut server = plan.start_server(rig, torture.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    if of_recovery {
        restorer.wait_for_copy()?;
        lose_the_link(rig, &restorer)?;
        go_on_with_push(rig, &plan, &mut restorer)?;
    }
    wait_until(PATIENCE, "the message", || peer.is_guilty())?;
    let told_to_end = until_over(&mut server, &mut restorer)?;
    let is_last = message.to_string() == LAST;
    ensure!(
        !(is_last && told_to_end),
        "the destination never hears that both ends agree"
    );
    let host = host_of(rig, torture.pid())?;
    let before = !of_recovery && is_before_the_grant(message, scenario);
    let right = if before {
        Host::Source
    } else {
        Host::Destination
    };
    ensure!(host == right, "{host:?} has it; it must be {right:?}");
    match host {
        Host::Source => torture.wait_for_original(20)?,
        Host::Destination => {
            torture.wait_for_rounds(20)?;
            assert_moved(rig, restorer.restored_pid()?)?;
        }
    }
    let roles: &[&str] = match told_to_end {
        true => &["source"],
        false => &["source", "destination"],
    };
    for role in roles {
        let left = sessions(rig, role)?;
        ensure!(left.is_empty(), "a session of the {role} is left: {left:?}");
    }
    torture.finish()?;
    Ok(host)
}

fn lose_the_link(rig: &Rig, restorer: &Side) -> Result<()> {
    set_link(rig, false)?;
    let words = "trying to reconnect";
    wait_until(PATIENCE, words, || {
        restorer.process.stderr().contains(words)
    })?;
    Ok(())
}

/// A successor has the rest pushed; it is that one whose recovery is disturbed.
fn go_on_with_push(rig: &Rig, plan: &PairPlan, restorer: &mut Side) -> Result<()> {
    kill(restorer.process.pid(), Signal::SIGKILL)?;
    restorer.end()?;
    let files = restorer.files.clone();
    *restorer = plan.resume_restorer(rig, &[])?;
    restorer.files = files;
    set_link(rig, true)
}

/// Both programs end; a source that nobody reached yet goes on waiting until it is told to end. So does a destination whose
/// copy never ran, or is whole, and that cannot tell so to a source which has ended: true when it was told to end, and keeps its
/// session for `resume`.
fn until_over(server: &mut Side, restorer: &mut Side) -> Result<bool> {
    wait_until(
        PATIENCE,
        "lazy-restorer to end or to give its copy up",
        || {
            !restorer.process.is_running()
                || (restorer.is_telling() && !server.process.is_running())
        },
    )?;
    let told = restorer.process.is_running();
    if told {
        restorer.terminate()?;
    }
    restorer.end().context("lazy-restorer")?;
    if server.process.is_running() && !server.process.stderr().contains("link lost") {
        let ended = server.process.wait(std::time::Duration::from_secs(6));
        if ended.is_err() {
            server.terminate()?;
        }
    }
    server.end().context("page-server")?;
    Ok(told)
}

/// Whether the source cannot have given the tree away when the path is lost.
fn is_before_the_grant(message: Message, scenario: Scenario) -> bool {
    let order = [
        "Hello",
        "Welcome",
        "Advise",
        "AdviseMore",
        "Ready",
        "Freezing",
        "Frozen",
        "Staged",
        "CutoverRequest",
    ];
    let name = message.to_string();
    let asked = name == SLOW
        && matches!(
            scenario,
            Scenario::LosesAfter(_) | Scenario::LosesAtCutover(_)
        );
    order.contains(&name.as_str()) && !asked
}
