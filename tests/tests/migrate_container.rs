//! A redis in a container of the real `runc` moves, or is refused, or comes back. One with a network of its own does in
//! `container_network.rs`.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tests::binaries;
use tests::container::{Container, NAME, Place};
use tests::crowd::Crowd;
use tests::exit_code::{ABORTED_BY_PEER, BAD_INPUT, CONNECTION, FREEZE, REFUSED, RESTORE};
use tests::failure::{assert_never_frozen, expect_failure, expect_refused_in_advise};
use tests::gate::Gate;
use tests::harness::{self, Body, CONTAINER_MIGRATION, Need, Test};
use tests::leftovers::{Snapshot, assert_moved};
use tests::matrix::set_link;
use tests::namespace;
use tests::pair::{PATIENCE, PairPlan, Side, session_of};
use tests::random::seed_of_this_run;
use tests::redis;
use tests::redis_client::{ClientPlan, RedisClient};
use tests::rig::Rig;
use tests::shell;
use tests::task;
use tests::wait::wait_until;

fn main() -> ExitCode {
    let tests: [(&'static str, Body); 17] = [
        ("a_container_moves", a_container_moves),
        ("hundreds_of_connections", hundreds_of_connections),
        ("a_container_comes_back", a_container_comes_back),
        (
            "the_server_dies_while_it_is_frozen",
            the_server_dies_while_it_is_frozen,
        ),
        ("criu_dies_while_it_is_frozen", criu_dies_while_it_is_frozen),
        (
            "the_restorer_dies_while_it_is_restored",
            the_restorer_dies_while_it_is_restored,
        ),
        (
            "both_programs_of_a_container_are_succeeded",
            both_programs_of_a_container_are_succeeded,
        ),
        (
            "a_container_is_thawed_by_force",
            a_container_is_thawed_by_force,
        ),
        ("what_does_not_run_is_refused", what_does_not_run_is_refused),
        (
            "an_older_destination_is_refused",
            an_older_destination_is_refused,
        ),
        ("a_taken_name_is_refused", a_taken_name_is_refused),
        ("another_bundle_is_refused", another_bundle_is_refused),
        ("a_missing_bundle_is_refused", a_missing_bundle_is_refused),
        (
            "what_a_container_has_open_must_be_there",
            what_a_container_has_open_must_be_there,
        ),
        (
            "what_ended_or_never_began_is_refused",
            what_ended_or_never_began_is_refused,
        ),
        (
            "a_container_that_was_replaced_is_refused",
            a_container_that_was_replaced_is_refused,
        ),
        (
            "the_copy_of_a_container_is_killed",
            the_copy_of_a_container_is_killed,
        ),
    ];
    let tests = tests.map(|(name, body)| Test {
        name,
        needs: CONTAINER_MIGRATION,
        body,
    });
    let crun = Test {
        name: "crun_is_refused",
        needs: &[
            Need::Namespaces,
            Need::Criu,
            Need::Program("runc"),
            Need::Program("crun"),
        ],
        body: crun_is_refused,
    };
    harness::main(tests.into_iter().chain([crun]))
}

/// A container with redis, its client, and how both hosts were before.
struct Boxed {
    container: Container,
    client: RedisClient,
    plan: PairPlan,
    before: Snapshot,
}

impl Boxed {
    fn start(rig: &Rig, mib: u64) -> Result<Self> {
        let words = redis::arguments("/tmp".as_ref());
        // The container has a session of its own already.
        let words: Vec<&str> = words.iter().skip(1).map(String::as_str).collect();
        let container = Container::start(rig, &words)?;
        let plan = ClientPlan {
            mib,
            seed: seed_of_this_run(),
            rate: 2000,
        };
        let address = rig.service.port(redis::PORT);
        let client = RedisClient::start(rig.client.namespace(), address, plan)?;
        client.wait_for_replies(200)?;
        Ok(Self {
            plan: container.plan(rig)?,
            container,
            client,
            before: Snapshot::take(rig)?,
        })
    }

    fn pid(&self) -> Result<Pid> {
        self.container.source.running()
    }

    /// It runs where it was, its client noticed nothing but a pause, and it can be moved still.
    fn assert_movable(self, rig: &Rig) -> Result<()> {
        self.client.wait_for_replies(200)?;
        self.before
            .assert_restored(rig)
            .context("something is left of the failed migration")?;
        self.pid().context("the source's runtime lost it")?;
        ensure!(
            self.container.destination.state().is_none(),
            "the destination's runtime still knows it"
        );
        let tried = self.plan.migrate(rig, self.pid()?);
        tried.context("the second try")?;
        self.client.wait_for_replies(200)?;
        self.client.end().context("the client noticed")?;
        Ok(())
    }
}

fn a_container_moves(rig: &Rig) -> Result<()> {
    let boxed = Boxed::start(rig, 48)?;
    let (mut plan, kept) = (boxed.plan.clone(), rig.make_folder("kept")?);
    let files = "/run/postcopy-*/frozen-cgroup /run/postcopy-*/work/dump.log";
    plan.on_frozen = format!("{} && cp {files} {}", plan.on_frozen, kept.display());
    let migration = plan.migrate(rig, boxed.pid()?)?;
    was_found_frozen(&kept)?;
    boxed.client.wait_for_replies(500)?;
    let there = boxed.container.destination.running()?;
    ensure!(
        there == migration.pid,
        "the runtime says {there}, the PID file {}",
        migration.pid
    );
    ensure!(
        boxed.container.source.state().is_none(),
        "the source's runtime still knows it"
    );
    assert_moved(rig, migration.pid)?;
    let report = boxed.client.end()?;
    ensure!(report.sets > 0 && report.gets > 0, "{report:?}");
    Ok(())
}

/// Our hook had frozen the cgroup when CRIU looked: it waits in steps of 100 ms for one that is not.
fn was_found_frozen(kept: &Path) -> Result<()> {
    let noted = fs::read_to_string(kept.join("frozen-cgroup")).context("nothing was noted")?;
    ensure!(noted.contains("postcopy-"), "another cgroup: {noted}");
    let log = fs::read_to_string(kept.join("dump.log"))?;
    ensure!(log.contains("freezing cgroup"), "CRIU froze it otherwise");
    ensure!(!log.contains("attempts done"), "CRIU had to freeze it");
    Ok(())
}

fn hundreds_of_connections(rig: &Rig) -> Result<()> {
    const CONNECTIONS: usize = 200;
    let boxed = Boxed::start(rig, 4)?;
    let (from, address) = (rig.client.namespace(), rig.service.port(redis::PORT));
    let crowd = Crowd::start(from, address, CONNECTIONS, seed_of_this_run())?;
    let migration = boxed.plan.migrate(rig, boxed.pid()?)?;
    crowd.wait_for_rounds(5)?;
    crowd.end()?;
    // In the end it counts keys, and these are not the only ones.
    boxed.client.wait_for_replies(100)?;
    assert_moved(rig, migration.pid)
}

fn a_container_comes_back(rig: &Rig) -> Result<()> {
    let boxed = Boxed::start(rig, 16)?;
    let mut plan = boxed.plan.clone();
    plan.before_restore = format!("{}; echo the hook says no >&2; exit 3", plan.before_restore);
    let (mut server, mut restorer) = start(rig, &plan, boxed.pid()?)?;
    expect_failure(&mut restorer, RESTORE, &["the hook says no"])?;
    expect_failure(&mut server, ABORTED_BY_PEER, &["the hook says no"])?;
    boxed.assert_movable(rig)
}

fn the_server_dies_while_it_is_frozen(rig: &Rig) -> Result<()> {
    let boxed = Boxed::start(rig, 16)?;
    let gate = Gate::new(rig, "frozen")?;
    let mut plan = boxed.plan.clone();
    plan.on_frozen = gate.after(&plan.on_frozen);
    let (mut server, mut restorer) = start(rig, &plan, boxed.pid()?)?;
    gate.wait(PATIENCE)?;
    kill(server.process.pid(), Signal::SIGKILL)?;
    server.end()?;
    gate.open()?;
    expect_failure(&mut restorer, CONNECTION, &["lost the source"])?;
    boxed.assert_movable(rig)
}

fn criu_dies_while_it_is_frozen(rig: &Rig) -> Result<()> {
    let boxed = Boxed::start(rig, 16)?;
    let (gate, plan) = held_before_restore(rig, &boxed)?;
    let (mut server, mut restorer) = start(rig, &plan, boxed.pid()?)?;
    gate.wait(PATIENCE)?;
    let below = task::descendants(server.process.pid());
    let criu = below.into_iter().find(|pid| task::name(*pid) == "criu");
    kill(criu.context("no CRIU below page-server")?, Signal::SIGKILL)?;
    gate.open()?;
    expect_failure(&mut server, FREEZE, &["CRIU"])?;
    expect_failure(&mut restorer, ABORTED_BY_PEER, &["source"])?;
    boxed.assert_movable(rig)
}

/// Killed while runc and CRIU rebuild the container: nothing of it may stay, in no list either. The source stands still
/// meanwhile, so there is no cutover.
fn the_restorer_dies_while_it_is_restored(rig: &Rig) -> Result<()> {
    let boxed = Boxed::start(rig, 16)?;
    let (gate, plan) = held_before_restore(rig, &boxed)?;
    let (mut server, mut restorer) = start(rig, &plan, boxed.pid()?)?;
    gate.wait(PATIENCE)?;
    kill(server.process.pid(), Signal::SIGSTOP)?;
    gate.open()?;
    let there = || task::in_network_namespace(&namespace::path(rig.destination.namespace()));
    wait_until(PATIENCE, "a rebuilt task", || {
        let there = there();
        there
            .into_iter()
            .any(|pid| task::name(pid) == "redis-server")
    })?;
    kill(restorer.process.pid(), Signal::SIGKILL)?;
    restorer.end()?;
    wait_until(PATIENCE, "the destination to be empty", || {
        there().is_empty()
    })?;
    kill(server.process.pid(), Signal::SIGCONT)?;
    expect_failure(&mut server, CONNECTION, &["destination"])?;
    boxed.assert_movable(rig)
}

fn held_before_restore(rig: &Rig, boxed: &Boxed) -> Result<(Gate, PairPlan)> {
    let gate = Gate::new(rig, "held")?;
    let mut plan = boxed.plan.clone();
    plan.before_restore = gate.after(&plan.before_restore);
    Ok((gate, plan))
}

fn start(rig: &Rig, plan: &PairPlan, pid: Pid) -> Result<(Side, Side)> {
    let server = plan.start_server(rig, pid)?;
    let restorer = plan.start_restorer(rig)?;
    Ok((server, restorer))
}

fn what_does_not_run_is_refused(rig: &Rig) -> Result<()> {
    let boxed = Boxed::start(rig, 1)?;
    let pid = boxed.pid()?;
    let plan = boxed.plan.clone();
    boxed.container.source.runc(&["pause"], false)?;
    let mut server = plan.spawn_server(rig, pid)?;
    expect_failure(&mut server, BAD_INPUT, &["page-server", NAME, "paused"])?;
    boxed.container.source.runc(&["resume"], false)?;
    let mut nobody = plan.clone();
    nobody.subject.as_mut().context("no subject")?[1] = "nobody".into();
    let mut server = nobody.spawn_server(rig, pid)?;
    expect_failure(&mut server, BAD_INPUT, &["page-server", "nobody", "list"])?;
    boxed.assert_movable(rig)
}

/// It would take the container for a process tree.
fn an_older_destination_is_refused(rig: &Rig) -> Result<()> {
    let boxed = Boxed::start(rig, 1)?;
    let mut plan = boxed.plan.clone();
    plan.restorer_env
        .push(("POSTCOPY_OFFER_VERSIONS".into(), "1,2".into()));
    let (mut server, mut restorer) = start(rig, &plan, boxed.pid()?)?;
    expect_failure(&mut server, REFUSED, &["advise", "no containers"])?;
    expect_failure(&mut restorer, ABORTED_BY_PEER, &["no containers"])?;
    boxed.assert_movable(rig)
}

fn a_taken_name_is_refused(rig: &Rig) -> Result<()> {
    let boxed = Boxed::start(rig, 1)?;
    let place = &boxed.container.destination;
    let mut other = place.config()?;
    let mine = other.clone();
    other["process"]["args"] = json!(["sleep", "1000"]);
    place.write_config(&other)?;
    place.runc(&["run", "--detach", "--bundle"], true)?;
    let squatter = place.running()?;
    place.write_config(&mine)?;
    let plan = boxed.plan.clone();
    let mut restorer = plan.start_restorer(rig)?;
    expect_failure(
        &mut restorer,
        BAD_INPUT,
        &["lazy-restorer", NAME, "already"],
    )?;
    ensure!(place.running()? == squatter, "it was harmed");
    place.runc(&["delete", "--force"], false)?;
    boxed.assert_movable(rig)
}

/// Refused in the phase `advise`, so nothing was frozen.
fn another_bundle_is_refused(rig: &Rig) -> Result<()> {
    let boxed = Boxed::start(rig, 1)?;
    let place = &boxed.container.destination;
    let mine = place.config()?;
    let mut other = mine.clone();
    let mounts = other["mounts"].as_array_mut().context("mounts")?;
    mounts.push(json!({"destination": "/srv", "type": "tmpfs", "source": "tmpfs"}));
    is_refused(rig, &boxed, &other, "/srv")?;
    // At the same place, but something else.
    let mut other = mine.clone();
    let mounts = other["mounts"].as_array_mut().context("mounts")?;
    let etc = mounts.iter_mut().find(|m| m["destination"] == "/etc");
    *etc.context("no /etc")? = json!({"destination": "/etc", "type": "tmpfs", "source": "tmpfs"});
    is_refused(
        rig,
        &boxed,
        &other,
        "lack [/etc:bind] and have [/etc:tmpfs]",
    )?;
    // The same mounts, with another build of the program below.
    let programs = rig.make_folder("other-usr")?;
    for folder in ["bin", "lib"] {
        fs::create_dir_all(programs.join(folder))?;
    }
    fs::write(programs.join("bin/redis-server"), "another redis")?;
    let mut other = mine.clone();
    let mounts = other["mounts"].as_array_mut().context("mounts")?;
    let usr = mounts.iter_mut().find(|m| m["destination"] == "/usr");
    usr.context("no /usr")?["source"] = json!(programs);
    is_refused(rig, &boxed, &other, "--ignore-programs")?;
    place.write_config(&mine)?;
    boxed.assert_movable(rig)
}

fn is_refused(rig: &Rig, boxed: &Boxed, config: &serde_json::Value, word: &str) -> Result<()> {
    boxed.container.destination.write_config(config)?;
    let plan = boxed.plan.clone();
    let (mut server, mut restorer) = start(rig, &plan, boxed.pid()?)?;
    expect_refused_in_advise(&mut server, &mut restorer, &[word])
}

/// A file of its root file system; what it has on a tmpfs of its own comes along.
fn what_a_container_has_open_must_be_there(rig: &Rig) -> Result<()> {
    let line = "exec /usr/bin/sleep 1000 3</root/data 4>/tmp/scratch";
    let container = Container::prepare(rig, &["/usr/bin/sh", "-c", line])?;
    let data = |place: &Place| place.bundle.join("rootfs/root/data");
    fs::write(data(&container.source), "12345")?;
    container.run()?;
    let (pid, plan) = (container.source.running()?, container.plan(rig)?);
    wait_until(PATIENCE, "it to sleep", || task::name(pid) == "sleep")?;
    for (content, words) in [
        (None, "rootfs/root/data is not here"),
        (Some("123456"), "data has 6 bytes here, not 5"),
    ] {
        if let Some(content) = content {
            fs::write(data(&container.destination), content)?;
        }
        let (mut server, mut restorer) = start(rig, &plan, pid)?;
        expect_refused_in_advise(&mut server, &mut restorer, &[words])?;
    }
    fs::write(data(&container.destination), "54321")?;
    let migration = plan.migrate(rig, pid)?;
    ensure!(container.destination.running()? == migration.pid, "another");
    Ok(())
}

/// runc restores nothing into a container that was created only, and there is nothing of one that has ended.
fn what_ended_or_never_began_is_refused(rig: &Rig) -> Result<()> {
    let container = Container::prepare(rig, &["/usr/bin/sleep", "1000"])?;
    let plan = container.plan(rig)?;
    let place = &container.source;
    place.runc(&["create", "--bundle"], true)?;
    let (status, created) = place.state().context("no container")?;
    ensure!(status == "created", "it is {status}");
    let refuse = |words: &[&str]| {
        let mut server = plan.spawn_server(rig, created)?;
        expect_failure(&mut server, BAD_INPUT, words)
    };
    refuse(&["page-server", NAME, "is created, not running"])?;
    place.runc(&["start"], false)?;
    kill(created, Signal::SIGKILL)?;
    wait_until(PATIENCE, "it to end", || {
        place.state().is_some_and(|(status, _)| status == "stopped")
    })?;
    refuse(&["page-server", NAME, "is stopped, not running"])?;
    place.runc(&["delete"], false)?;
    // A terminal is the shell's that started it; this bundle says that there is one.
    container.run()?;
    let mut config = place.config()?;
    config["process"]["terminal"] = json!(true);
    place.write_config(&config)?;
    refuse(&["page-server", NAME, "has a terminal"])?;
    ensure!(!task::is_frozen(place.running()?), "it stands still");
    Ok(())
}

/// While `page-server` waits for its destination, the container is removed and another one gets its name.
fn a_container_that_was_replaced_is_refused(rig: &Rig) -> Result<()> {
    let container = Container::start(rig, &["/usr/bin/sleep", "1000"])?;
    let (plan, place) = (container.plan(rig)?, &container.source);
    let mut server = plan.start_server(rig, place.running()?)?;
    place.runc(&["delete", "--force"], false)?;
    container.run()?;
    let another = place.running()?;
    let mut restorer = plan.start_restorer(rig)?;
    let words = [
        "phase advise",
        NAME,
        "is another one than page-server was started for",
    ];
    expect_failure(&mut server, FREEZE, &words)?;
    expect_failure(&mut restorer, ABORTED_BY_PEER, &words)?;
    assert_never_frozen(&server)?;
    ensure!(place.running()? == another, "it was harmed");
    ensure!(!task::is_frozen(another), "it stands still");
    Ok(())
}

fn a_missing_bundle_is_refused(rig: &Rig) -> Result<()> {
    let boxed = Boxed::start(rig, 1)?;
    let mut plan = boxed.plan.clone();
    plan.restorer.pop();
    plan.restorer.push("/nonexistent".into());
    let mut restorer = plan.start_restorer(rig)?;
    expect_failure(&mut restorer, BAD_INPUT, &["/nonexistent/config.json"])?;
    boxed.assert_movable(rig)
}

/// A container that runs on the destination while most of its memory is on the source.
fn half_way(rig: &Rig, boxed: &Boxed) -> Result<(Side, Side)> {
    let mut plan = boxed.plan.clone();
    plan.restorer.push("--no-push".into());
    let (server, mut restorer) = start(rig, &plan, boxed.pid()?)?;
    restorer.wait_for_copy()?;
    boxed.client.wait_for_replies(50)?;
    Ok((server, restorer))
}

fn both_programs_of_a_container_are_succeeded(rig: &Rig) -> Result<()> {
    let boxed = Boxed::start(rig, 48)?;
    let (mut server, mut restorer) = half_way(rig, &boxed)?;
    let copy = restorer.restored_pid()?;
    for options in [&["--no-push"][..], &[]] {
        for side in [&mut restorer, &mut server] {
            kill(side.process.pid(), Signal::SIGKILL)?;
            side.end()?;
        }
        server = boxed.plan.resume_server(rig, &[])?;
        restorer = boxed.plan.resume_restorer(rig, options)?;
        let said = |words: &str| restorer.process.stderr().contains(words);
        wait_until(PATIENCE, "the ends to meet", || said("reconnected"))?;
    }
    restorer.expect_success()?;
    server.expect_success()?;
    boxed.client.wait_for_replies(500)?;
    ensure!(
        boxed.container.destination.running()? == copy,
        "another one"
    );
    wait_until(PATIENCE, "the source's runtime to forget it", || {
        boxed.container.source.state().is_none()
    })?;
    assert_moved(rig, copy)?;
    // It reads every key back.
    boxed.client.end()?;
    Ok(())
}

fn a_container_is_thawed_by_force(rig: &Rig) -> Result<()> {
    let boxed = Boxed::start(rig, 16)?;
    let original = boxed.pid()?;
    let (mut server, mut restorer) = half_way(rig, &boxed)?;
    for side in [&mut restorer, &mut server] {
        kill(side.process.pid(), Signal::SIGKILL)?;
        side.end()?;
    }
    boxed
        .container
        .destination
        .runc(&["delete", "--force"], false)?;
    // Part of it is undone already.
    rig.destination
        .shell(&format!("({}) || true", boxed.plan.on_aborted))?;
    // Its connection belonged to the copy.
    drop(boxed.client);
    let mut command = rig.source.command(binaries::program("page-server")?);
    command.args(["thaw", "--session", &session_of(rig, "source")?]);
    shell::run(command.arg("--i-know-the-copy-is-dead"))?;
    serves_again(rig, &boxed.container, original)
}

/// `--on-lost thaw-source` without a PID namespace of ours: every task of the container is killed, and only then the
/// source's runs.
fn the_copy_of_a_container_is_killed(rig: &Rig) -> Result<()> {
    let boxed = Boxed::start(rig, 16)?;
    let (original, mut plan) = (boxed.pid()?, boxed.plan.clone());
    let words = [
        "--no-push",
        "--give-up-after",
        "1s",
        "--on-lost",
        "thaw-source",
    ];
    plan.restorer.extend(words.map(Into::into));
    let (mut server, mut restorer) = start(rig, &plan, original)?;
    let copy = restorer.wait_for_copy()?;
    let tasks = task::descendants(copy);
    boxed.client.wait_for_replies(50)?;
    set_link(rig, false)?;
    wait_until(PATIENCE, "the copy to end", || {
        tasks.iter().chain([&copy]).all(|pid| !task::is_alive(*pid))
    })?;
    ensure!(task::is_frozen(original), "both could run");
    drop(boxed.client);
    set_link(rig, true)?;
    let dead = ["the copy here is dead"];
    expect_failure(&mut restorer, ABORTED_BY_PEER, &dead)?;
    expect_failure(&mut server, ABORTED_BY_PEER, &["the copy is dead"])?;
    let there = boxed.container.destination.state();
    ensure!(there.is_none(), "the destination has {there:?}");
    serves_again(rig, &boxed.container, original)
}

/// The source's container runs, and takes commands.
fn serves_again(rig: &Rig, container: &Container, original: Pid) -> Result<()> {
    ensure!(container.source.running()? == original, "another one");
    wait_until(PATIENCE, "the original to run", || {
        !task::is_frozen(original)
    })?;
    // More than it holds already, so that there is something new to ask for.
    let plan = ClientPlan {
        mib: 40,
        seed: seed_of_this_run(),
        rate: 500,
    };
    let address = rig.service.port(redis::PORT);
    let client = RedisClient::start(rig.client.namespace(), address, plan)?;
    client.wait_for_replies(100)?;
    client.end()?;
    Ok(())
}

/// Debian's is built without CRIU; one with it has no lazy restore.
fn crun_is_refused(rig: &Rig) -> Result<()> {
    let container = Container::prepare(rig, &["/usr/bin/sleep", "1000"])?;
    container.run()?;
    let pid = container.source.running()?;
    let mut plan = container.plan(rig)?;
    plan.server.extend(["--runtime".into(), "crun".into()]);
    plan.restorer.extend(["--runtime".into(), "crun".into()]);
    let mut server = plan.spawn_server(rig, pid)?;
    expect_failure(
        &mut server,
        BAD_INPUT,
        &["crun", "--lazy-pages", "runc can"],
    )?;
    let mut restorer = plan.start_restorer(rig)?;
    expect_failure(
        &mut restorer,
        BAD_INPUT,
        &["crun", "--lazy-pages", "runc can"],
    )
}
