//! Whatever fails before the cutover, the workload goes on at its source as if nothing had been.

use std::net::{SocketAddrV4, UdpSocket};
use std::process::ExitCode;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use tests::exit_code::{
    ABORTED_BY_PEER, BAD_INPUT, CONNECTION, FREEZE, INTERRUPTED, REFUSED, RESTORE,
};
use tests::failure::{Bystander, expect_failure};
use tests::gate::Gate;
use tests::harness::{self, Body, REDIS_MIGRATION, Test};
use tests::pair::{PORT, PairPlan};
use tests::rig::Rig;
use tests::{fake_criu, identity, namespace, small_disk};

/// Too small for any skeleton.
const FULL_DISK_KIB: u32 = 64;

fn main() -> ExitCode {
    let tests: [(&'static str, Body); 13] = [
        ("criu_hangs_in_the_dump", criu_hangs_in_the_dump),
        ("no_destination_comes", no_destination_comes),
        ("it_is_stopped_while_it_waits", it_is_stopped_while_it_waits),
        ("a_stranger_comes_first", a_stranger_comes_first),
        ("the_port_is_in_use", the_port_is_in_use),
        ("the_bulk_port_is_in_use", the_bulk_port_is_in_use),
        ("criu_fails_to_dump", criu_fails_to_dump),
        ("criu_fails_to_restore", criu_fails_to_restore),
        ("the_sources_disk_is_full", the_sources_disk_is_full),
        (
            "the_destinations_disk_is_full",
            the_destinations_disk_is_full,
        ),
        ("the_pid_is_taken", the_pid_is_taken),
        ("a_hook_fails_on_the_source", a_hook_fails_on_the_source),
        (
            "a_hook_fails_on_the_destination",
            a_hook_fails_on_the_destination,
        ),
    ];
    harness::main(tests.map(|(name, body)| Test {
        name,
        needs: REDIS_MIGRATION,
        body,
    }))
}

fn no_destination_comes(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let mut plan = PairPlan::new(rig)?;
    plan.server.extend(["--wait".into(), "1".into()]);
    let mut server = plan.start_server(rig, bystander.redis.pid())?;
    expect_failure(
        &mut server,
        CONNECTION,
        &["page-server: error:", "hello", "destination"],
    )?;
    bystander.assert_unharmed(rig)
}

/// CRIU holds the workload and goes no further.
fn criu_hangs_in_the_dump(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let gate = Gate::new(rig, "never")?;
    let mut plan = PairPlan::new(rig)?;
    plan.source_criu = fake_criu::held_at(rig, "dump", "post-dump", &gate)?;
    plan.server.extend(["--freeze-limit", "3s"].map(Into::into));
    let mut server = plan.start_server(rig, bystander.redis.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    expect_failure(&mut server, FREEZE, &["freeze", "--freeze-limit"])?;
    expect_failure(&mut restorer, ABORTED_BY_PEER, &["--freeze-limit"])?;
    bystander.assert_unharmed(rig)
}

/// Without a limit it waits until it is told to end, and the workload never notices.
fn it_is_stopped_while_it_waits(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let mut server = PairPlan::new(rig)?.start_server(rig, bystander.redis.pid())?;
    kill(server.process.pid(), Signal::SIGTERM)?;
    expect_failure(
        &mut server,
        INTERRUPTED,
        &["page-server: error:", "hello", "SIGTERM"],
    )?;
    bystander.assert_unharmed(rig)
}

/// A stranger is turned away, and the right destination still gets its turn.
fn a_stranger_comes_first(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let plan = PairPlan::new(rig)?;
    let mut strangers_plan = plan.clone();
    strangers_plan.identities.destination = rig.folder().join("stranger");
    identity::init(&strangers_plan.identities.destination, &[])?;
    let mut server = plan.start_server(rig, bystander.redis.pid())?;
    let mut stranger = strangers_plan.start_restorer(rig)?;
    expect_failure(
        &mut stranger,
        REFUSED,
        &["lazy-restorer: error:", "certificate"],
    )?;
    bystander.redis.assert_alive()?;
    let mut restorer = plan.start_restorer(rig)?;
    restorer.expect_success()?;
    server.expect_success()?;
    bystander.redis.assert_alive()?;
    bystander.redis.client.end()?;
    Ok(())
}

fn the_port_is_in_use(rig: &Rig) -> Result<()> {
    is_in_use(rig, PORT)
}

fn the_bulk_port_is_in_use(rig: &Rig) -> Result<()> {
    is_in_use(rig, PORT + 1)
}

fn is_in_use(rig: &Rig, port: u16) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let occupied = SocketAddrV4::new(rig.source.address(), port);
    let source = rig.source.namespace().to_owned();
    let socket = std::thread::spawn(move || {
        namespace::enter(&source)?;
        UdpSocket::bind(occupied).context("cannot occupy the port")
    });
    let _socket = socket.join().expect("no panic while binding")?;
    let mut server = PairPlan::new(rig)?.spawn_server(rig, bystander.redis.pid())?;
    let (address, port) = (occupied.ip().to_string(), port.to_string());
    expect_failure(
        &mut server,
        BAD_INPUT,
        &["page-server: error:", &address, &port, "in use"],
    )?;
    bystander.assert_unharmed(rig)
}

fn criu_fails_to_dump(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let plan = PairPlan::new(rig)?;
    let mut failing = plan.clone();
    failing.source_criu = fake_criu::failing_at(rig, "dump")?;
    fails(
        rig,
        &bystander,
        &failing,
        (FREEZE, &["freeze", "the test wants this to fail"]),
        ABORTED_BY_PEER,
    )?;
    bystander.assert_movable(rig, &plan)
}

fn criu_fails_to_restore(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let plan = PairPlan::new(rig)?;
    let mut failing = plan.clone();
    failing.destination_criu = fake_criu::failing_at(rig, "restore")?;
    let mut server = failing.start_server(rig, bystander.redis.pid())?;
    let mut restorer = failing.start_restorer(rig)?;
    expect_failure(
        &mut restorer,
        RESTORE,
        &[
            "lazy-restorer: error:",
            "listen",
            "the test wants this to fail",
        ],
    )?;
    expect_failure(
        &mut server,
        ABORTED_BY_PEER,
        &["page-server: error:", "destination"],
    )?;
    bystander.assert_movable(rig, &plan)
}

fn the_sources_disk_is_full(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let mut plan = PairPlan::new(rig)?;
    let disk = small_disk::mount(rig, "full", FULL_DISK_KIB)?;
    plan.server.extend(["--work-dir".into(), disk.into()]);
    // The snapshot was taken before the disk was mounted.
    let bystander = bystander.look_again(rig)?;
    fails(
        rig,
        &bystander,
        &plan,
        (FREEZE, &["freeze", "space"]),
        ABORTED_BY_PEER,
    )?;
    bystander.assert_unharmed(rig)
}

fn the_destinations_disk_is_full(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let mut plan = PairPlan::new(rig)?;
    let disk = small_disk::mount(rig, "full", FULL_DISK_KIB)?;
    plan.restorer.extend(["--work-dir".into(), disk.into()]);
    let bystander = bystander.look_again(rig)?;
    let mut server = plan.start_server(rig, bystander.redis.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    expect_failure(&mut restorer, RESTORE, &["lazy-restorer: error:", "space"])?;
    expect_failure(
        &mut server,
        ABORTED_BY_PEER,
        &["page-server: error:", "destination"],
    )?;
    bystander.assert_unharmed(rig)
}

/// Both hosts share this machine's PIDs, so without a PID namespace the workload's own are taken.
fn the_pid_is_taken(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let mut plan = PairPlan::new(rig)?;
    plan.restorer.clear();
    plan.restorer.push("--detach".into());
    let pid = bystander.redis.pid().to_string();
    let mut server = plan.start_server(rig, bystander.redis.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    expect_failure(
        &mut restorer,
        RESTORE,
        &["lazy-restorer: error:", "advise", &pid, "--pidns"],
    )?;
    expect_failure(
        &mut server,
        ABORTED_BY_PEER,
        &["page-server: error:", "destination"],
    )?;
    bystander.assert_unharmed(rig)
}

fn a_hook_fails_on_the_source(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let mut plan = PairPlan::new(rig)?;
    plan.on_frozen = "echo the hook says no >&2; exit 3".to_owned();
    fails(
        rig,
        &bystander,
        &plan,
        (FREEZE, &["on-frozen"]),
        ABORTED_BY_PEER,
    )?;
    bystander.assert_unharmed(rig)
}

fn a_hook_fails_on_the_destination(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let plan = PairPlan::new(rig)?;
    let mut failing = plan.clone();
    failing.before_restore = format!("{}; echo the hook says no >&2; exit 3", plan.before_restore);
    let mut server = failing.start_server(rig, bystander.redis.pid())?;
    let mut restorer = failing.start_restorer(rig)?;
    expect_failure(
        &mut restorer,
        RESTORE,
        &[
            "lazy-restorer: error:",
            "before-restore",
            "the hook says no",
        ],
    )?;
    expect_failure(
        &mut server,
        ABORTED_BY_PEER,
        &["page-server: error:", "destination", "the hook says no"],
    )?;
    bystander.assert_movable(rig, &plan)
}

/// Runs a migration the source gives up with the given exit code and words, and the destination with `destination`.
fn fails(
    rig: &Rig,
    of: &Bystander,
    plan: &PairPlan,
    source: (i32, &[&str]),
    destination: i32,
) -> Result<()> {
    let mut server = plan.start_server(rig, of.redis.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    let (code, words) = source;
    expect_failure(
        &mut server,
        code,
        &[&["page-server: error:"], words].concat(),
    )?;
    expect_failure(
        &mut restorer,
        destination,
        &["lazy-restorer: error:", "source"],
    )
}
