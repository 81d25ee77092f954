//! CRIU's dump and restore are somebody else's: our pair stands between, in the place of CRIU's own daemons.

use std::process::ExitCode;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::binaries;
use tests::container::Container;
use tests::criu_baseline::BaselineHome;
use tests::exit_code::{ABORTED_BY_PEER, RESTORE};
use tests::external::Orchestrator;
use tests::failure::expect_failure;
use tests::foreign_runc::RuncWork;
use tests::harness::{self, CONTAINER_MIGRATION, MIGRATION, Need, Test};
use tests::host::INTERFACE;
use tests::leftovers::assert_moved;
use tests::pair::{PATIENCE, Side, resume_restorer, resume_server, session_of, sessions};
use tests::process::Process;
use tests::random::seed_of_this_run;
use tests::redis;
use tests::redis_client::{ClientPlan, RedisClient};
use tests::rig::Rig;
use tests::shell;
use tests::sleeper::Sleeper;
use tests::task;
use tests::torture::{LONG_REST, Torture, TorturePlan};
use tests::wait::wait_until;
use tests::warm::WarmCopies;

const CLONE: &[Need] = &[Need::Namespaces, Need::Criu, Need::Program("python3")];

fn main() -> ExitCode {
    harness::main([
        Test {
            name: "a_full_dump_is_served",
            needs: MIGRATION,
            body: a_full_dump_is_served,
        },
        Test {
            name: "a_foreign_lazy_dump_is_served",
            needs: MIGRATION,
            body: a_foreign_lazy_dump_is_served,
        },
        Test {
            name: "a_foreign_dump_is_rolled_back",
            needs: MIGRATION,
            body: a_foreign_dump_is_rolled_back,
        },
        Test {
            name: "a_failed_restore_gives_the_workload_back",
            needs: MIGRATION,
            body: a_failed_restore_gives_the_workload_back,
        },
        Test {
            name: "a_foreign_runc_checkpoint_is_served",
            needs: CONTAINER_MIGRATION,
            body: a_foreign_runc_checkpoint_is_served,
        },
        Test {
            name: "a_foreign_runc_checkpoint_is_rolled_back",
            needs: CONTAINER_MIGRATION,
            body: a_foreign_runc_checkpoint_is_rolled_back,
        },
        Test {
            name: "a_daemon_is_started_as_criu_s_is",
            needs: MIGRATION,
            body: a_daemon_is_started_as_criu_s_is,
        },
        Test {
            name: "images_of_another_dump_are_refused",
            needs: MIGRATION,
            body: images_of_another_dump_are_refused,
        },
        Test {
            name: "both_programs_of_a_foreign_dump_are_succeeded",
            needs: MIGRATION,
            body: both_programs_of_a_foreign_dump_are_succeeded,
        },
        Test {
            name: "a_foreign_dump_is_thawed_by_force",
            needs: MIGRATION,
            body: a_foreign_dump_is_thawed_by_force,
        },
        Test {
            name: "the_programs_of_clones_are_succeeded",
            needs: CLONE,
            body: the_programs_of_clones_are_succeeded,
        },
        Test {
            name: "an_older_source_is_refused",
            needs: MIGRATION,
            body: an_older_source_is_refused,
        },
        Test {
            name: "what_frozen_tasks_have_open_is_compared",
            needs: MIGRATION,
            body: what_frozen_tasks_have_open_is_compared,
        },
        Test {
            name: "addresses_do_not_move_with_images",
            needs: MIGRATION,
            body: addresses_do_not_move_with_images,
        },
        Test {
            name: "a_dump_brings_no_files",
            needs: MIGRATION,
            body: a_dump_brings_no_files,
        },
        Test {
            name: "one_frozen_process_becomes_three",
            needs: CLONE,
            body: one_frozen_process_becomes_three,
        },
        Test {
            name: "one_frozen_process_becomes_two_others",
            needs: CLONE,
            body: one_frozen_process_becomes_two_others,
        },
        Test {
            name: "one_dump_becomes_three_processes",
            needs: CLONE,
            body: one_dump_becomes_three_processes,
        },
    ])
}

fn start_torture(rig: &Rig) -> Result<Torture> {
    let plan = TorturePlan {
        mib: 48,
        threads: 2,
        children: 1,
        seed: seed_of_this_run(),
        rest: LONG_REST,
        ..TorturePlan::default()
    };
    Torture::start(rig, plan)
}

fn a_full_dump_is_served(rig: &Rig) -> Result<()> {
    let torture = start_torture(rig)?;
    let orchestrator = Orchestrator::new(rig)?;
    let home = BaselineHome::new(rig)?;
    orchestrator.dump(torture.pid())?;
    let mut server = orchestrator.start_server(&["serve"])?;
    orchestrator.copy_images()?;
    let mut daemon = orchestrator.start_lazy_pages()?;
    orchestrator.restore(&home, torture.pid())?;
    daemon.expect_success()?;
    server.expect_success()?;
    torture.wait_for_rounds(200)?;
    torture.finish()
}

fn a_foreign_lazy_dump_is_served(rig: &Rig) -> Result<()> {
    let mut torture = start_torture(rig)?;
    let orchestrator = Orchestrator::new(rig)?;
    let home = BaselineHome::new(rig)?;
    let mut dump = orchestrator.start_lazy_dump(torture.pid())?;
    let pid = torture.pid().to_string();
    let mut server = orchestrator.start_server(&["attach", "--pid", &pid])?;
    orchestrator.copy_images()?;
    let mut daemon = orchestrator.start_lazy_pages()?;
    orchestrator.restore(&home, torture.pid())?;
    daemon.expect_success()?;
    server.expect_success()?;
    let ended = dump.wait(PATIENCE)?;
    ensure!(ended.success(), "criu dump: {ended}: {}", dump.stderr());
    ensure!(!torture.process.is_running(), "the original still lives");
    torture.wait_for_rounds(200)?;
    torture.finish()
}

/// Nobody comes, and the operator stops `page-server`: the workload runs on, its connections unharmed.
fn a_foreign_dump_is_rolled_back(rig: &Rig) -> Result<()> {
    let torture = start_torture(rig)?;
    let orchestrator = Orchestrator::new(rig)?;
    let mut dump = orchestrator.start_lazy_dump(torture.pid())?;
    let pid = torture.pid().to_string();
    let mut server = orchestrator.start_server(&["attach", "--pid", &pid])?;
    let ended = server.terminate()?;
    ensure!(!ended.success(), "it was stopped");
    let ended = dump.wait(PATIENCE)?;
    ensure!(!ended.success(), "criu dump says that it worked");
    torture.wait_for_rounds(200)?;
    torture.finish()
}

/// CRIU cannot restore: the destination kills what there is of it, and the workload runs on the source.
fn a_failed_restore_gives_the_workload_back(rig: &Rig) -> Result<()> {
    let torture = start_torture(rig)?;
    let orchestrator = Orchestrator::new(rig)?;
    let home = BaselineHome::new(rig)?;
    let mut dump = orchestrator.start_lazy_dump(torture.pid())?;
    let pid = torture.pid().to_string();
    let mut server = orchestrator.start_server(&["attach", "--pid", &pid])?;
    orchestrator.copy_images()?;
    std::fs::remove_file(orchestrator.copied.join("reg-files.img")).ok();
    std::fs::remove_file(orchestrator.copied.join("files.img"))?;
    let mut daemon = orchestrator.start_lazy_pages()?;
    ensure!(
        orchestrator.restore(&home, torture.pid()).is_err(),
        "CRIU restored files it has no image of"
    );
    let failed = daemon.end()?;
    ensure!(failed.code() == Some(8), "lazy-restorer: {failed}");
    let failed = server.end()?;
    ensure!(!failed.success(), "page-server: {failed}");
    dump.wait(PATIENCE)?;
    let foreign = torture.board.pulse.foreign_ticks.load(Ordering::Relaxed);
    ensure!(foreign == 0, "the copy ran");
    torture.wait_for_rounds(200)?;
    torture.finish()
}

/// A container with redis and its client.
fn start_box(rig: &Rig) -> Result<(Container, RedisClient)> {
    let words = redis::arguments("/tmp".as_ref());
    // The container has a session of its own already.
    let words: Vec<&str> = words.iter().skip(1).map(String::as_str).collect();
    let container = Container::start(rig, &words)?;
    let plan = ClientPlan {
        mib: 24,
        seed: seed_of_this_run(),
        rate: 1000,
    };
    let address = rig.service.port(redis::PORT);
    let client = RedisClient::start(rig.client.namespace(), address, plan)?;
    client.wait_for_replies(200)?;
    Ok((container, client))
}

/// runc checkpoints and restores as it would with CRIU's own daemons; the orchestrator moves the address.
fn a_foreign_runc_checkpoint_is_served(rig: &Rig) -> Result<()> {
    let (container, client) = start_box(rig)?;
    let (orchestrator, work) = (Orchestrator::new(rig)?, RuncWork::new(rig)?);
    let init = container.source.running()?;
    let mut checkpoint = work.checkpoint(&orchestrator, &container)?;
    let pid = init.to_string();
    let mut server = orchestrator.start_server(&["attach", "--pid", &pid])?;
    rig.source.shell(&rig.service.on_frozen())?;
    orchestrator.copy_images()?;
    rig.destination.shell(&rig.service.before_restore())?;
    let work_dir = work.destination.display().to_string();
    let mut daemon = orchestrator.start_lazy_pages_with(&["--work-dir", &work_dir])?;
    work.restore(&orchestrator, &container)?;
    rig.destination.shell(&rig.service.on_resumed())?;
    daemon.expect_success()?;
    server.expect_success()?;
    let ended = checkpoint.wait(PATIENCE)?;
    let said = checkpoint.stderr();
    ensure!(ended.success(), "runc checkpoint: {ended}: {said}");
    let there = container.destination.running()?;
    ensure!(
        container.source.state().is_none(),
        "the source's runtime still knows it"
    );
    client.wait_for_replies(500)?;
    assert_moved(rig, there)?;
    client.end().context("the client noticed")?;
    Ok(())
}

fn a_foreign_runc_checkpoint_is_rolled_back(rig: &Rig) -> Result<()> {
    let (container, client) = start_box(rig)?;
    let (orchestrator, work) = (Orchestrator::new(rig)?, RuncWork::new(rig)?);
    let init = container.source.running()?;
    let mut checkpoint = work.checkpoint(&orchestrator, &container)?;
    let pid = init.to_string();
    let mut server = orchestrator.start_server(&["attach", "--pid", &pid])?;
    ensure!(task::is_frozen(init), "it runs while it is served");
    ensure!(!server.terminate()?.success(), "it was stopped");
    let ended = checkpoint.wait(PATIENCE)?;
    ensure!(!ended.success(), "runc checkpoint says that it worked");
    // runc calls a container whose cgroup is frozen `paused`.
    ensure!(container.source.running()? == init, "another one");
    client.wait_for_replies(500)?;
    client.end().context("the client noticed")?;
    let rules = rig.source.filter_rules()?;
    ensure!(rules.is_empty(), "a lock is left: {rules}");
    Ok(())
}

/// With the command line of `criu lazy-pages`, but for the program and the identity: files are relative to the work
/// directory, and one that is there is not overwritten.
fn a_daemon_is_started_as_criu_s_is(rig: &Rig) -> Result<()> {
    let torture = start_torture(rig)?;
    let orchestrator = Orchestrator::new(rig)?;
    let home = BaselineHome::new(rig)?;
    orchestrator.dump(torture.pid())?;
    let mut server = orchestrator.start_server(&["serve"])?;
    orchestrator.copy_images()?;
    let work = rig.make_folder("work")?;
    let pidfile = work.join("lazy.pid");
    std::fs::write(&pidfile, "1")?;
    let mut refused = orchestrator.start_daemon(&work)?;
    let status = refused.process.wait(PATIENCE)?;
    ensure!(status.code() == Some(2), "a PID file was there: {status}");
    ensure!(std::fs::read_to_string(&pidfile)? == "1", "overwritten");
    std::fs::remove_file(&pidfile)?;
    let mut parent = orchestrator.start_daemon(&work)?;
    parent.expect_success()?;
    let said = std::fs::read(work.join("status"))?;
    ensure!(said == [0], "on the status descriptor: {said:?}");
    let pid = std::fs::read_to_string(&pidfile)?;
    let daemon = Pid::from_raw(pid.parse().with_context(|| format!("{pid:?}"))?);
    ensure!(task::name(daemon) == "lazy-restorer", "not the daemon");
    orchestrator.restore_in(&home, torture.pid(), &work)?;
    server.expect_success()?;
    wait_until(PATIENCE, "the daemon to end", || !task::is_alive(daemon))?;
    let log = std::fs::read_to_string(work.join("lazy.log"))?;
    ensure!(log.contains("DEBUG"), "no such log: {log}");
    torture.wait_for_rounds(200)?;
    torture.finish()
}

fn images_of_another_dump_are_refused(rig: &Rig) -> Result<()> {
    let (first, second) = (start_torture(rig)?, Orchestrator::new(rig)?);
    second.dump(first.pid())?;
    second.copy_images()?;
    // As after a later dump of the same process, which the destination was not given.
    let inventory = second.copied.join("inventory.img");
    let mut changed = std::fs::read(&inventory)?;
    *changed.last_mut().expect("not empty") ^= 1;
    std::fs::write(&inventory, changed)?;
    let mut server = second.start_server(&["serve"])?;
    let mut daemon = second.spawn_lazy_pages(&second.copied, &[])?;
    let ended = daemon.end()?;
    ensure!(!ended.success(), "images of another dump were accepted");
    let line = daemon.error_line()?;
    ensure!(line.contains("another dump"), "{line}");
    ensure!(!server.end()?.success(), "page-server served them");
    Ok(())
}

/// The tasks are there to be asked, and a destination that lacks what they have open is told so before it restores.
fn what_frozen_tasks_have_open_is_compared(rig: &Rig) -> Result<()> {
    let data = rig.make_folder("srv")?.join("data");
    std::fs::write(&data, "12345")?;
    let workload = Sleeper::start(rig, &format!("3<{}", data.display()))?;
    let orchestrator = Orchestrator::new(rig)?;
    let mut dump = orchestrator.start_lazy_dump(workload.pid())?;
    let pid = workload.pid().to_string();
    let mut server = orchestrator.start_server(&["attach", "--pid", &pid])?;
    // As if it were another one on the destination.
    std::fs::write(&data, "123456")?;
    let mut restorer = orchestrator.start_restorer(1, &[])?;
    let words = ["phase advise", "srv/data has 6 bytes here, not 5"];
    expect_failure(&mut restorer, RESTORE, &words)?;
    expect_failure(&mut server, ABORTED_BY_PEER, &words)?;
    dump.wait(PATIENCE)?;
    wait_until(PATIENCE, "the workload to run on", || {
        !task::is_frozen(workload.pid())
    })
}

fn addresses_do_not_move_with_images(rig: &Rig) -> Result<()> {
    let workload = Sleeper::start(rig, "")?;
    let orchestrator = Orchestrator::new(rig)?;
    orchestrator.dump(workload.pid())?;
    let mut server = orchestrator.start_server(&["serve"])?;
    let options = ["--move-address", "10.77.0.99/32", "--dev", INTERFACE];
    let mut restorer = orchestrator.start_restorer(1, &options)?;
    let words = ["phase advise", "10.77.0.99", "serve --images cannot move"];
    expect_failure(&mut restorer, RESTORE, &words)?;
    expect_failure(&mut server, ABORTED_BY_PEER, &words)
}

fn one_dump_becomes_three_processes(rig: &Rig) -> Result<()> {
    const COPIES: usize = 3;
    let warm = WarmCopies::start(rig, 64)?;
    let orchestrator = Orchestrator::new(rig)?;
    orchestrator.dump(warm.pid())?;
    let mut server = orchestrator.start_server(&["serve", "--fan-out", &COPIES.to_string()])?;
    let restorers = (0..COPIES).map(|copy| orchestrator.start_restorer(copy, &[]));
    let mut restorers = restorers.collect::<Result<Vec<_>>>()?;
    for restorer in &mut restorers {
        restorer.expect_success()?;
    }
    server.expect_success()?;
    warm.finish(COPIES)
}

/// A restored workload most of whose memory is on the source.
struct HalfWay<'a> {
    torture: Torture,
    dump: Process,
    server: Side,
    daemon: Side,
    _orchestrator: Orchestrator<'a>,
    copy: Pid,
    _home: BaselineHome,
}

fn half_way(rig: &Rig) -> Result<HalfWay<'_>> {
    let torture = start_torture(rig)?;
    let orchestrator = Orchestrator::new(rig)?;
    let home = BaselineHome::new(rig)?;
    let dump = orchestrator.start_lazy_dump(torture.pid())?;
    let pid = torture.pid().to_string();
    let server = orchestrator.start_server(&["attach", "--pid", &pid])?;
    orchestrator.copy_images()?;
    let daemon = orchestrator.start_lazy_pages_with(&["--no-push"])?;
    let copy = orchestrator.restore(&home, torture.pid())?;
    torture.wait_for_rounds(1)?;
    Ok(HalfWay {
        torture,
        dump,
        server,
        daemon,
        _orchestrator: orchestrator,
        copy,
        _home: home,
    })
}

fn kill_side(side: &mut Side) -> Result<()> {
    kill(side.process.pid(), Signal::SIGKILL)?;
    side.end().map(drop)
}

/// Both programs are killed, twice; CRIU's dump waits for the end.
fn both_programs_of_a_foreign_dump_are_succeeded(rig: &Rig) -> Result<()> {
    let mut half_way = half_way(rig)?;
    let (mut server, mut daemon) = (half_way.server, half_way.daemon);
    for options in [&["--no-push"][..], &[]] {
        kill_side(&mut daemon)?;
        kill_side(&mut server)?;
        ensure!(task::is_frozen(half_way.torture.pid()), "the original runs");
        for role in ["source", "destination"] {
            let listed = sessions(rig, role)?;
            ensure!(listed[0]["standing"] == "orphaned", "{listed:?}");
        }
        server = resume_server(rig, &session_of(rig, "source")?, &[])?;
        daemon = resume_restorer(rig, &session_of(rig, "destination")?, options)?;
        wait_until(PATIENCE, "the ends to meet", || {
            daemon.process.stderr().contains("reconnected")
        })?;
    }
    daemon.expect_success()?;
    server.expect_success()?;
    let ended = half_way.dump.wait(PATIENCE)?;
    ensure!(
        ended.success(),
        "criu dump: {ended}: {}",
        half_way.dump.stderr()
    );
    for role in ["source", "destination"] {
        ensure!(sessions(rig, role)?.is_empty(), "a session file is left");
    }
    half_way.torture.wait_for_rounds(100)?;
    half_way.torture.finish()
}

fn a_foreign_dump_is_thawed_by_force(rig: &Rig) -> Result<()> {
    let mut half_way = half_way(rig)?;
    let session = session_of(rig, "source")?;
    let thaw = |force: &[&str]| -> Result<()> {
        let mut command = rig.source.command(binaries::program("page-server")?);
        shell::run(command.args(["thaw", "--session", &session]).args(force))?;
        Ok(())
    };
    kill_side(&mut half_way.server)?;
    kill_side(&mut half_way.daemon)?;
    for task in [half_way.copy]
        .into_iter()
        .chain(task::descendants(half_way.copy))
    {
        kill(task, Signal::SIGKILL)?;
    }
    let copy = half_way.copy;
    wait_until(PATIENCE, "the copy to end", || !task::is_alive(copy))?;
    let refused = thaw(&[]).expect_err("the copy may be running").to_string();
    ensure!(refused.contains("--i-know-the-copy-is-dead"), "{refused}");
    thaw(&["--i-know-the-copy-is-dead"])?;
    let ended = half_way.dump.wait(PATIENCE)?;
    ensure!(!ended.success(), "criu dump says that it worked");
    half_way.torture.wait_for_original(100)?;
    ensure!(
        sessions(rig, "source")?.is_empty(),
        "a session file is left"
    );
    half_way.torture.finish()
}

/// Every program is killed; one new `page-server` serves both copies on.
fn the_programs_of_clones_are_succeeded(rig: &Rig) -> Result<()> {
    const COPIES: usize = 2;
    let warm = WarmCopies::start(rig, 32)?;
    let orchestrator = Orchestrator::new(rig)?;
    orchestrator.dump(warm.pid())?;
    let mut server = orchestrator.start_server(&["serve", "--fan-out", &COPIES.to_string()])?;
    let start = |copy| orchestrator.start_restorer(copy, &["--no-push"]);
    let mut restorers = (0..COPIES).map(start).collect::<Result<Vec<_>>>()?;
    // Not only granted: a copy whose destination had not noted so yet would be dead.
    warm.wait_for(COPIES)?;
    kill_side(&mut server)?;
    for restorer in &mut restorers {
        kill_side(restorer)?;
    }
    let left = sessions(rig, "source")?;
    let first = left[0]["session"].as_str().context("it has a name")?;
    let mut server = resume_server(rig, first, &[])?;
    let left = sessions(rig, "destination")?;
    ensure!(left.len() == COPIES, "{left:?}");
    for session in &left {
        let id = session["session"].as_str().context("it has a name")?;
        resume_restorer(rig, id, &[])?.expect_success()?;
    }
    server.expect_success()?;
    for role in ["source", "destination"] {
        ensure!(sessions(rig, role)?.is_empty(), "a session file is left");
    }
    warm.finish(COPIES)
}

/// One that sends its images always.
fn an_older_source_is_refused(rig: &Rig) -> Result<()> {
    let torture = start_torture(rig)?;
    let orchestrator = Orchestrator::new(rig)?;
    orchestrator.dump(torture.pid())?;
    let mut server = orchestrator.start_server(&["serve"])?;
    orchestrator.copy_images()?;
    let versions = [("POSTCOPY_OFFER_VERSIONS", "1,2")];
    let mut daemon = orchestrator.spawn_lazy_pages_in(&versions, &orchestrator.copied, &[])?;
    ensure!(!daemon.end()?.success(), "it went on");
    let line = daemon.error_line()?;
    ensure!(line.contains("sends its images always"), "{line}");
    ensure!(!server.end()?.success(), "page-server served it");
    Ok(())
}

/// Nobody would ever answer for the files.
fn a_dump_brings_no_files(rig: &Rig) -> Result<()> {
    let torture = start_torture(rig)?;
    let orchestrator = Orchestrator::new(rig)?;
    orchestrator.dump(torture.pid())?;
    let tree = rig.make_folder("tree")?;
    let only_here = tree.join("only here");
    std::fs::write(&only_here, "x")?;
    let tree = tree.to_str().context("UTF-8")?;
    let mut server = orchestrator.start_server(&["serve"])?;
    let mut restorer = orchestrator.start_restorer(0, &["--sync", tree])?;
    let whose = format!("only here [{tree}]");
    expect_failure(&mut restorer, RESTORE, &["--sync", "attach", &whose])?;
    expect_failure(&mut server, ABORTED_BY_PEER, &["--sync"])?;
    ensure!(only_here.exists(), "it is deleted");
    Ok(())
}

fn one_frozen_process_becomes_three(rig: &Rig) -> Result<()> {
    let (warm, dump_worked) = clone_frozen(rig, &["--keep-original"])?;
    ensure!(!dump_worked, "criu dump says that the original is gone");
    warm.finish(3)
}

fn one_frozen_process_becomes_two_others(rig: &Rig) -> Result<()> {
    let (mut warm, dump_worked) = clone_frozen(rig, &[])?;
    ensure!(dump_worked, "criu dump failed");
    ensure!(!warm.original_lives(), "the original still lives");
    warm.finish(2)
}

/// Makes two clones of a frozen process; says also whether its CRIU took that for a success.
fn clone_frozen(rig: &Rig, options: &[&str]) -> Result<(WarmCopies, bool)> {
    const COPIES: usize = 2;
    let warm = WarmCopies::start(rig, 64)?;
    let orchestrator = Orchestrator::new(rig)?;
    let mut dump = orchestrator.start_lazy_dump(warm.pid())?;
    let (pid, copies) = (warm.pid().to_string(), COPIES.to_string());
    let attach = ["attach", "--pid", &pid, "--fan-out", &copies];
    let mut server = orchestrator.start_server(&[&attach, options].concat())?;
    let restorers = (0..COPIES).map(|copy| orchestrator.start_restorer(copy, &[]));
    let mut restorers = restorers.collect::<Result<Vec<_>>>()?;
    for restorer in &mut restorers {
        restorer.expect_success()?;
    }
    server.expect_success()?;
    Ok((warm, dump.wait(PATIENCE)?.success()))
}
