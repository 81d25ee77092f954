//! A program is killed after the cutover, and another one goes on with its session: nothing of the workload is lost.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use common::proto::control::{Secret, SessionId};
use common::proto::version::V3;
use common::session::State;
use common::session_file::{
    DestinationSide, FrozenTasks, Original, SessionFile, Side as End, SourceSide, Store, Task,
    boot_id,
};
use nix::sys::signal::{Signal, kill};
use tests::binaries;
use tests::exit_code::BAD_INPUT;
use tests::failure::expect_failure;
use tests::harness::{self, Body, MIGRATION, Test};
use tests::leftovers::assert_moved;
use tests::pair::{PATIENCE, PairPlan, Side, session_of, sessions};
use tests::process::Process;
use tests::random::seed_of_this_run;
use tests::rig::Rig;
use tests::shell;
use tests::task;
use tests::torture::{LONG_REST, Torture, TorturePlan};
use tests::wait::{wait_for, wait_until};

fn main() -> ExitCode {
    let tests: [(&'static str, Body); 6] = [
        (
            "a_killed_restorer_is_succeeded",
            a_killed_restorer_is_succeeded,
        ),
        ("successors_are_succeeded", successors_are_succeeded),
        (
            "a_killed_page_server_is_succeeded",
            a_killed_page_server_is_succeeded,
        ),
        (
            "the_original_is_thawed_by_force",
            the_original_is_thawed_by_force,
        ),
        (
            "a_stale_session_is_never_acted_on",
            a_stale_session_is_never_acted_on,
        ),
        (
            "a_stale_copy_is_never_acted_on",
            a_stale_copy_is_never_acted_on,
        ),
    ];
    harness::main(tests.map(|(name, body)| Test {
        name,
        needs: MIGRATION,
        body,
    }))
}

fn torture(rig: &Rig) -> Result<Torture> {
    Torture::start(
        rig,
        TorturePlan {
            mib: 96,
            children: 1,
            seed: seed_of_this_run(),
            rest: LONG_REST,
            ..TorturePlan::default()
        },
    )
}

/// A migration whose tasks run on the destination while most of their memory is on the source.
fn half_way(rig: &Rig, torture: &Torture) -> Result<(PairPlan, Side, Side)> {
    let plan = PairPlan::new(rig)?;
    let mut slow = plan.clone();
    slow.restorer.push("--no-push".into());
    let server = slow.start_server(rig, torture.pid())?;
    let mut restorer = slow.start_restorer(rig)?;
    restorer.wait_for_copy()?;
    torture.wait_for_rounds(1)?;
    Ok((plan, server, restorer))
}

fn a_killed_page_server_is_succeeded(rig: &Rig) -> Result<()> {
    let torture = torture(rig)?;
    let plan = PairPlan::new(rig)?;
    let mut server = plan.start_server(rig, torture.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    restorer.wait_for_copy()?;
    kill(server.process.pid(), Signal::SIGKILL)?;
    server.end()?;
    ensure!(task::is_frozen(torture.pid()), "the original runs");
    let listed = sessions(rig, "source")?;
    ensure!(listed[0]["standing"] == "orphaned", "{listed:?}");
    let mut successor = plan.resume_server(rig, &[])?;
    restorer.expect_success()?;
    successor.expect_success()?;
    torture.wait_for_rounds(20)?;
    assert_moved(rig, restorer.restored_pid()?)?;
    ensure!(
        sessions(rig, "source")?.is_empty(),
        "a session file is left"
    );
    torture.finish()
}

fn a_killed_restorer_is_succeeded(rig: &Rig) -> Result<()> {
    let torture = torture(rig)?;
    let (plan, mut server, mut restorer) = half_way(rig, &torture)?;
    let copy = restorer.restored_pid()?;
    kill(restorer.process.pid(), Signal::SIGKILL)?;
    restorer.end()?;
    wait_until(PATIENCE, "a thread to wait for a page", || {
        task::waits_for_page(copy)
    })?;
    let listed = sessions(rig, "destination")?;
    ensure!(listed[0]["standing"] == "orphaned", "{listed:?}");
    let mut successor = plan.resume_restorer(rig, &[])?;
    successor.expect_success()?;
    server.expect_success()?;
    torture.wait_for_rounds(20)?;
    assert_moved(rig, copy)?;
    ensure!(
        sessions(rig, "destination")?.is_empty(),
        "a session file is left"
    );
    torture.finish()
}

/// Both programs are killed, and their successors, and again.
fn successors_are_succeeded(rig: &Rig) -> Result<()> {
    let torture = torture(rig)?;
    let (plan, mut server, mut restorer) = half_way(rig, &torture)?;
    let copy = restorer.restored_pid()?;
    for options in [&["--no-push"][..], &["--no-push"], &[]] {
        for side in [&mut restorer, &mut server] {
            kill(side.process.pid(), Signal::SIGKILL)?;
            side.end()?;
        }
        server = plan.resume_server(rig, &[])?;
        restorer = plan.resume_restorer(rig, options)?;
        let said = |words: &str| restorer.process.stderr().contains(words);
        wait_until(PATIENCE, "the ends to meet", || said("reconnected"))?;
    }
    restorer.expect_success()?;
    server.expect_success()?;
    torture.wait_for_rounds(20)?;
    assert_moved(rig, copy)?;
    torture.finish()
}

fn the_original_is_thawed_by_force(rig: &Rig) -> Result<()> {
    let torture = torture(rig)?;
    let (plan, mut server, mut restorer) = half_way(rig, &torture)?;
    let session = session_of(rig, "source")?;
    let thaw = |force: &[&str]| -> Result<()> {
        let mut command = rig.source.command(binaries::program("page-server")?);
        shell::run(command.args(["thaw", "--session", &session]).args(force))?;
        Ok(())
    };
    let refused = thaw(&[]).expect_err("the copy may be running").to_string();
    ensure!(refused.contains("--i-know-the-copy-is-dead"), "{refused}");
    ensure!(task::is_frozen(torture.pid()), "the original runs");
    let copy = restorer.restored_pid()?;
    // CRIU, which made it, leaves it to its init only when it ends.
    let home = wait_for(PATIENCE, "the copy to be its init's", || {
        task::parent(copy).filter(|parent| task::name(*parent) != "criu")
    })?;
    // First of all: a copy that ends under a lazy-restorer has done its work.
    kill(restorer.process.pid(), Signal::SIGKILL)?;
    restorer.end()?;
    kill(home, Signal::SIGKILL)?;
    wait_until(PATIENCE, "the copy to end", || !task::is_alive(copy))?;
    thaw(&["--i-know-the-copy-is-dead"])?;
    server.end()?;
    wait_until(PATIENCE, "the original to run", || {
        !task::is_frozen(torture.pid())
    })?;
    torture.wait_for_original(20)?;
    ensure!(
        sessions(rig, "source")?.is_empty(),
        "a session file is left"
    );
    drop(plan);
    torture.finish()
}

/// A session of another boot, and one whose PID is another process's by now: a stopped bystander stays as it is.
fn a_stale_session_is_never_acted_on(rig: &Rig) -> Result<()> {
    let plan = PairPlan::new(rig)?;
    let mut command = rig.source.command("sleep");
    let bystander = Process::start_detached("bystander", command.arg("1000"))?;
    kill(bystander.pid(), Signal::SIGSTOP)?;
    wait_until(PATIENCE, "it to stand still", || {
        task::is_frozen(bystander.pid())
    })?;
    let itself = Task::find(bystander.pid().as_raw()).context("it has ended")?;
    let another = Task {
        start: itself.start - 1,
        ..itself
    };
    let here = boot_id().context("no boot id")?;
    let folder = rig.folder().join("state");
    let store = Store::of_source(&folder);
    let cases = [(1, String::from("another"), itself), (2, here, another)];
    for (id, boot, root) in &cases {
        store.write(&session(&plan, *id, boot, *root))?;
    }
    for (id, _, _) in &cases {
        let id = SessionId([*id; 16]).to_string();
        for arguments in [
            &["resume", "--session", &id][..],
            &["thaw", "--session", &id, "--i-know-the-copy-is-dead"],
        ] {
            let mut command = rig.source.command(binaries::program("page-server")?);
            command.args(arguments).arg("--state-dir").arg(&folder);
            let mut side = Side::start_program(rig, "stale", &mut command)?;
            expect_failure(&mut side, BAD_INPUT, &["page-server: error:", "stale"])?;
        }
    }
    let state = task::state(bystander.pid());
    ensure!(state == Some('T'), "the bystander's state is {state:?}");
    ensure!(store.list()?.len() == 2, "a file is gone");
    Ok(())
}

/// The same on the other host: whose keeper is gone has lost its pages, and what was before another boot is gone.
fn a_stale_copy_is_never_acted_on(rig: &Rig) -> Result<()> {
    let plan = PairPlan::new(rig)?;
    let mut command = rig.destination.command("sleep");
    let bystander = Process::start_detached("bystander", command.arg("1000"))?;
    let itself = Task::find(bystander.pid().as_raw()).context("it has ended")?;
    let here = boot_id().context("no boot id")?;
    let gone = Task { pid: 1, start: 1 };
    let folder = rig.folder().join("state");
    let store = Store::of_destination(&folder);
    let cases = [
        (1, String::from("another"), itself, "booted since"),
        (2, here, gone, "its processes have ended"),
    ];
    for (id, boot, keeper, _) in &cases {
        let copy = DestinationSide {
            source: "127.0.0.1:1".parse().expect("an address"),
            bulk_port: 2,
            version: V3,
            keeper: *keeper,
            anchor: None,
            anchor_puts_away: false,
            may_run: true,
            root: Some(itself),
            tasks: vec![itself],
            addresses: Vec::new(),
            pidfile: None,
            on_resumed: None,
            container: None,
            whole: None,
        };
        store.write(&SessionFile {
            side: End::Destination(copy),
            ..session(&plan, *id, boot, itself)
        })?;
    }
    for (id, _, _, words) in &cases {
        let id = SessionId([*id; 16]).to_string();
        let mut command = rig.destination.command(binaries::program("lazy-restorer")?);
        command.args(["resume", "--session", &id]);
        command.arg("--state-dir").arg(&folder);
        let mut side = Side::start_program(rig, "stale", &mut command)?;
        let words = ["lazy-restorer: error:", "stale", words];
        expect_failure(&mut side, BAD_INPUT, &words)?;
    }
    ensure!(task::is_alive(bystander.pid()), "the bystander is gone");
    ensure!(store.list()?.len() == 2, "a file is gone");
    Ok(())
}

fn session(plan: &PairPlan, id: u8, boot: &str, root: Task) -> SessionFile {
    let nowhere = "127.0.0.1:1".parse().expect("an address");
    SessionFile {
        id: SessionId([id; 16]),
        state: State::Postcopy,
        boot: boot.to_owned(),
        program: Task { pid: 1, start: 1 },
        directory: String::from("/nonexistent"),
        identity: plan.identities.source.display().to_string(),
        accept: Vec::new(),
        mtu: None,
        secret: Secret([id; 32]),
        peer_host: String::from("b"),
        side: End::Source(SourceSide {
            original: Original::Frozen(FrozenTasks {
                root,
                tasks: vec![root],
                at_rest: Vec::new(),
                criu: Task { pid: 1, start: 1 },
                container: None,
            }),
            version: V3,
            criu_program: String::from("criu"),
            fault: nowhere,
            bulk: nowhere,
            on_thawed: None,
            makes_clones: false,
        }),
    }
}
