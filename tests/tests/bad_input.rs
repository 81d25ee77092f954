//! Bad input: one line that says what is wrong, a documented exit code, and nothing left.

use std::ffi::OsString;
use std::fs;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;
use tests::exit_code::{ABORTED_BY_PEER, BAD_INPUT, IDENTITY, NOT_PERMITTED, REFUSED};
use tests::failure::{Bystander, expect_failure};
use tests::harness::{self, Body, MIGRATION, REDIS_MIGRATION, Test};
use tests::pair::{PORT, PairPlan, Side};
use tests::process::Process;
use tests::rig::Rig;
use tests::{binaries, identity, task};

/// Above any PID a kernel gives.
const NO_PID: i32 = 99_999_999;

fn main() -> ExitCode {
    let alone: [(&'static str, Body); 6] = [
        ("an_unknown_pid", an_unknown_pid),
        ("a_kernel_thread", a_kernel_thread),
        ("its_own_pid", its_own_pid),
        ("a_missing_identity", a_missing_identity),
        ("a_damaged_identity", a_damaged_identity),
        ("userfaultfd_is_not_permitted", userfaultfd_is_not_permitted),
    ];
    let with_redis: [(&'static str, Body); 6] = [
        ("not_root_on_the_source", not_root_on_the_source),
        ("not_root_on_the_destination", not_root_on_the_destination),
        ("an_expired_certificate", an_expired_certificate),
        ("a_version_from_the_future", a_version_from_the_future),
        ("a_wrong_token", a_wrong_token),
        (
            "what_an_older_release_does_not_know",
            what_an_older_release_does_not_know,
        ),
    ];
    let alone = alone.map(|(name, body)| Test {
        name,
        needs: MIGRATION,
        body,
    });
    let with_redis = with_redis.map(|(name, body)| Test {
        name,
        needs: REDIS_MIGRATION,
        body,
    });
    harness::main(alone.into_iter().chain(with_redis))
}

fn server_refuses(rig: &Rig, plan: &PairPlan, pid: Pid, code: i32, words: &[&str]) -> Result<()> {
    let mut server = plan.spawn_server(rig, pid)?;
    expect_failure(
        &mut server,
        code,
        &[&["page-server: error:"], words].concat(),
    )
}

fn an_unknown_pid(rig: &Rig) -> Result<()> {
    let plan = PairPlan::new(rig)?;
    server_refuses(
        rig,
        &plan,
        Pid::from_raw(NO_PID),
        BAD_INPUT,
        &[&NO_PID.to_string()],
    )?;
    server_refuses(rig, &plan, Pid::from_raw(0), BAD_INPUT, &["PID"])
}

fn a_kernel_thread(rig: &Rig) -> Result<()> {
    // In a PID namespace there may be none to see; then there is none to name either.
    let Some(thread) = task::all()
        .into_iter()
        .find(|pid| task::name(*pid) == "kthreadd")
    else {
        eprintln!("no kernel thread is visible on this machine, nothing to refuse");
        return Ok(());
    };
    server_refuses(
        rig,
        &PairPlan::new(rig)?,
        thread,
        BAD_INPUT,
        &[&thread.to_string(), "kernel thread"],
    )
}

fn its_own_pid(rig: &Rig) -> Result<()> {
    let plan = PairPlan::new(rig)?;
    let mut command = rig.source.command("sh");
    command
        .arg("-c")
        .arg(r#"exec "$0" serve --pid $$ --listen "$1" --identity "$2" --criu "$3""#);
    command
        .arg(binaries::program("page-server")?)
        .arg(format!("{}:{PORT}", rig.source.address()));
    command.arg(&plan.identities.source).arg(&plan.source_criu);
    let mut process = Process::start("own-pid", &rig.make_folder("logs")?, &mut command)?;
    let status = process.wait(tests::pair::PATIENCE)?;
    ensure!(
        status.code() == Some(BAD_INPUT),
        "ended with {status}: {}",
        process.stderr()
    );
    ensure!(
        process.stderr().contains("page-server: error:"),
        "no error line: {}",
        process.stderr()
    );
    Ok(())
}

/// A process that could be moved if all else were well.
fn sleeper(rig: &Rig) -> Result<Process> {
    let mut command = rig.source.command("sleep");
    Process::start("sleeper", &rig.make_folder("logs")?, command.arg("1000"))
}

fn a_missing_identity(rig: &Rig) -> Result<()> {
    let sleeper = sleeper(rig)?;
    let mut plan = PairPlan::new(rig)?;
    plan.identities.source = rig.folder().join("nowhere");
    server_refuses(
        rig,
        &plan,
        sleeper.pid(),
        IDENTITY,
        &["nowhere", "identity init"],
    )?;
    plan.identities.destination = rig.folder().join("nowhere");
    let mut restorer = plan.start_restorer(rig)?;
    expect_failure(
        &mut restorer,
        IDENTITY,
        &["lazy-restorer: error:", "nowhere"],
    )
}

fn a_damaged_identity(rig: &Rig) -> Result<()> {
    let sleeper = sleeper(rig)?;
    let plan = PairPlan::new(rig)?;
    for file in ["host.pem", "host.key", "ca.pem"] {
        let path = plan.identities.source.join(file);
        let before = fs::read(&path).with_context(|| format!("no {}", path.display()))?;
        fs::write(&path, "no certificate and no key")?;
        server_refuses(rig, &plan, sleeper.pid(), IDENTITY, &[file])?;
        fs::write(&path, before)?;
    }
    Ok(())
}

fn an_expired_certificate(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let mut plan = PairPlan::new(rig)?;
    plan.identities.source = rig.folder().join("expired");
    identity::init(&plan.identities.source, &["--valid-days", "-1"])?;
    server_refuses(rig, &plan, bystander.redis.pid(), IDENTITY, &["expired"])?;
    plan.identities.destination = plan.identities.source.clone();
    let mut restorer = plan.start_restorer(rig)?;
    expect_failure(
        &mut restorer,
        IDENTITY,
        &["lazy-restorer: error:", "expired"],
    )?;
    bystander.assert_unharmed(rig)
}

fn a_version_from_the_future(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let mut plan = PairPlan::new(rig)?;
    plan.restorer_env
        .push(("POSTCOPY_OFFER_VERSIONS".to_owned(), "99".to_owned()));
    let mut server = plan.start_server(rig, bystander.redis.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    expect_failure(
        &mut restorer,
        REFUSED,
        &["lazy-restorer: error:", "version"],
    )?;
    // The source goes on waiting for a destination it can talk to.
    ensure!(
        server.process.is_running(),
        "the source ended: {}",
        server.process.stderr()
    );
    server.terminate()?;
    bystander.assert_unharmed(rig)
}

/// Whoever agreed on version 2 is not sent what came later, and says so before anything is frozen.
fn what_an_older_release_does_not_know(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let mut plan = PairPlan::new(rig)?;
    plan.restorer_env
        .push(("POSTCOPY_OFFER_VERSIONS".to_owned(), "1,2".to_owned()));
    let tree = rig.make_folder("tree")?;
    plan.restorer.extend(["--sync".into(), tree.into()]);
    let mut server = plan.start_server(rig, bystander.redis.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    expect_failure(&mut restorer, REFUSED, &["advise", "sends no files"])?;
    expect_failure(&mut server, ABORTED_BY_PEER, &["advise", "sends no files"])?;
    plan.restorer.truncate(plan.restorer.len() - 2);
    // Everything else works as it did.
    bystander.assert_movable(rig, &plan)
}

/// The token protects the workload from every other destination with a good certificate, and lets the right one in.
fn a_wrong_token(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let (right, wrong) = (rig.folder().join("token"), rig.folder().join("wrong-token"));
    let mut plan = PairPlan::new(rig)?;
    plan.server
        .extend(["--token-file".into(), right.clone().into()]);
    let mut server = plan.start_server(rig, bystander.redis.pid())?;
    let token = fs::read_to_string(&right).context("page-server wrote no token")?;
    let last = if token.trim().ends_with('0') {
        '1'
    } else {
        '0'
    };
    let trimmed = &token.trim()[..token.trim().len() - 1];
    fs::write(&wrong, format!("{trimmed}{last}\n"))?;
    for offered in [None, Some(&wrong)] {
        let mut stranger = plan.clone();
        if let Some(file) = offered {
            stranger
                .restorer
                .extend(["--token-file".into(), file.into()]);
        }
        let mut restorer = stranger.start_restorer(rig)?;
        expect_failure(&mut restorer, REFUSED, &["lazy-restorer: error:", "token"])?;
    }
    bystander.redis.assert_alive()?;
    plan.restorer.extend(["--token-file".into(), right.into()]);
    plan.start_restorer(rig)?.expect_success()?;
    server.expect_success()?;
    bystander.redis.assert_alive()?;
    bystander.redis.client.end()?;
    Ok(())
}

/// Root without `CAP_SYS_PTRACE` may not use userfaultfd, unless the administrator lets everyone.
fn userfaultfd_is_not_permitted(rig: &Rig) -> Result<()> {
    let everyone = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    if everyone.is_ok_and(|everyone| everyone.trim() == "1") {
        eprintln!("nothing to refuse: vm.unprivileged_userfaultfd lets everyone use it");
        return Ok(());
    }
    let plan = PairPlan::new(rig)?;
    let mut command = rig.destination.command("setpriv");
    command
        .args(["--bounding-set", "-sys_ptrace", "--"])
        .arg(binaries::program("lazy-restorer")?)
        .args(["restore", "--pidns", "--from"])
        .arg(format!("{}:{PORT}", rig.source.address()))
        .arg("--identity")
        .arg(&plan.identities.destination)
        .arg("--criu")
        .arg(&plan.destination_criu);
    let mut side = Side::start_program(rig, "lazy-restorer", &mut command)?;
    expect_failure(
        &mut side,
        NOT_PERMITTED,
        &["lazy-restorer: error:", "userfaultfd", "CAP_SYS_PTRACE"],
    )
}

fn not_root_on_the_source(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let plan = PairPlan::new(rig)?;
    let pid = bystander.redis.pid().to_string();
    let arguments = [
        "serve",
        "--pid",
        &pid,
        "--listen",
        &format!("{}:{PORT}", rig.source.address()),
        "--identity",
    ];
    let mut side = as_nobody(
        rig,
        "page-server",
        &arguments.map(OsString::from),
        &plan.identities.source,
    )?;
    expect_failure(&mut side, NOT_PERMITTED, &["page-server: error:", "root"])?;
    bystander.assert_unharmed(rig)
}

fn not_root_on_the_destination(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let plan = PairPlan::new(rig)?;
    let from = format!("{}:{PORT}", rig.source.address());
    let arguments = ["restore", "--pidns", "--from", &from, "--identity"];
    let mut side = as_nobody(
        rig,
        "lazy-restorer",
        &arguments.map(OsString::from),
        &plan.identities.destination,
    )?;
    expect_failure(&mut side, NOT_PERMITTED, &["lazy-restorer: error:", "root"])?;
    bystander.assert_unharmed(rig)
}

fn as_nobody(
    rig: &Rig,
    program: &str,
    arguments: &[OsString],
    identity: &std::path::Path,
) -> Result<Side> {
    // The user must be able to reach the program, so it is copied to where everyone may read.
    let folder = rig.make_folder("nobody")?;
    let copy = folder.join(program);
    fs::copy(binaries::program(program)?, &copy)
        .with_context(|| format!("cannot copy {program}"))?;
    open_to_everyone(rig)?;
    let mut command = rig.source.command("setpriv");
    command
        .args([
            "--reuid",
            "65534",
            "--regid",
            "65534",
            "--clear-groups",
            "--",
        ])
        .arg(&copy)
        .args(arguments);
    Side::start_program(rig, program, command.arg(identity))
}

/// Lets everyone read the rig's directory.
fn open_to_everyone(rig: &Rig) -> Result<()> {
    tests::shell::run(
        std::process::Command::new("chmod")
            .args(["-R", "a+rX"])
            .arg(rig.folder()),
    )?;
    Ok(())
}
