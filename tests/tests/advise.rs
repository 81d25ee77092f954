//! What cannot work is said in the phase `advise`, by both ends, and nothing is frozen for it.
//!
//! Other bundles are refused in `migrate_container.rs`, addresses in `move_address.rs`, PIDs in `rollback.rs`.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Result, ensure};
use tests::binaries;
use tests::exit_code::{NOT_PERMITTED, RESTORE};
use tests::failure::{Bystander, expect_failure, expect_refused_in_advise};
use tests::faulty_peer::{Claim, FaultyPeer, Scenario};
use tests::harness::{self, Body, REDIS_MIGRATION, Test};
use tests::host::Host;
use tests::leftovers::assert_moved;
use tests::pair::{PORT, PairPlan, Side};
use tests::rig::Rig;
use tests::sleeper::Sleeper;
use tests::task;

fn main() -> ExitCode {
    let tests: [(&'static str, Body); 3] = [
        (
            "what_this_host_is_not_is_refused",
            what_this_host_is_not_is_refused,
        ),
        ("an_old_kernel_is_refused", an_old_kernel_is_refused),
        ("what_is_open_must_be_there", what_is_open_must_be_there),
    ];
    harness::main(tests.map(|(name, body)| Test {
        name,
        needs: REDIS_MIGRATION,
        body,
    }))
}

/// A source that says that its workload needs more than the destination has: each thing it can say is refused by name.
fn what_this_host_is_not_is_refused(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let plan = PairPlan::new(rig)?;
    for (claim, words) in [
        (Claim::Architecture, &["pdp11", "architecture"][..]),
        (Claim::PageSize, &["pages of 65536 bytes", "of 4096"]),
        (
            Claim::CpuFeature,
            &["CPU lacks avx512_unheard_of,", "--ignore-cpu-features"],
        ),
        (Claim::Criu, &["CRIU is 9.9.0", "later one here"]),
        (Claim::Memory, &["has 1073741888 MiB resident"]),
    ] {
        let peer = FaultyPeer::start(rig, Scenario::Claims(claim), &plan.identities)?;
        let mut plan = plan.clone();
        plan.source_seen_at = Some(peer.address());
        let mut server = plan.start_server(rig, bystander.redis.pid())?;
        let mut restorer = plan.start_restorer(rig)?;
        expect_refused_in_advise(&mut server, &mut restorer, words)?;
        ensure!(peer.is_guilty(), "nothing was claimed");
    }
    bystander.assert_movable(rig, &plan)
}

/// Either program looks at the kernel it runs on before it does anything else; this one says that it is 2.6.
fn an_old_kernel_is_refused(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let plan = PairPlan::new(rig)?;
    let pid = bystander.redis.pid().to_string();
    let (listen, from) = (rig.source.address(), rig.source.address());
    let mut server = on_an_old_kernel(&rig.source, "page-server")?;
    server.args([
        "serve",
        "--pid",
        &pid,
        "--listen",
        &format!("{listen}:{PORT}"),
    ]);
    server.arg("--identity").arg(&plan.identities.source);
    server.arg("--criu").arg(&plan.source_criu);
    let mut server = Side::start_program(rig, "page-server", &mut server)?;
    expect_failure(
        &mut server,
        NOT_PERMITTED,
        &["kernel is 2.6", "5.6 or later"],
    )?;
    let mut restorer = on_an_old_kernel(&rig.destination, "lazy-restorer")?;
    restorer.args(["restore", "--pidns", "--from", &format!("{from}:{PORT}")]);
    restorer.arg("--identity").arg(&plan.identities.destination);
    restorer.arg("--criu").arg(&plan.destination_criu);
    let mut restorer = Side::start_program(rig, "lazy-restorer", &mut restorer)?;
    expect_failure(
        &mut restorer,
        NOT_PERMITTED,
        &["kernel is 2.6", "5.3 or later"],
    )?;
    bystander.assert_unharmed(rig)
}

/// The kernel tells this program and those it starts an old release (`UNAME26`, personality(2)).
fn on_an_old_kernel(host: &Host, program: &str) -> Result<Command> {
    let mut command = host.command("setarch");
    command.arg("--uname-2.6").arg(binaries::program(program)?);
    Ok(command)
}

/// A file that is read, one that grows, and the directory of both: the destination's are others in every way that CRIU
/// would not restore, one after the other. What grows may be shorter there.
fn what_is_open_must_be_there(rig: &Rig) -> Result<()> {
    let (here, there) = (rig.make_folder("srv")?, rig.make_folder("srv-there")?);
    fs::write(here.join("data"), "12345")?;
    let folder = here.display();
    let redirections = format!("3<{folder}/data 4>>{folder}/log 5<{folder}");
    let sleeper = Sleeper::start(rig, &redirections)?;
    let mut plan = PairPlan::new(rig)?;
    plan.destination_mounts = vec![(there.clone(), here.clone())];
    let data = there.join("data");
    is_refused(rig, &plan, &sleeper, "srv/data is not here (and 1 more)")?;
    fs::write(there.join("log"), "longer already")?;
    is_refused(rig, &plan, &sleeper, "srv/data is not here;")?;
    fs::create_dir(&data)?;
    is_refused(rig, &plan, &sleeper, "srv/data is something else here")?;
    fs::remove_dir(&data)?;
    fs::write(&data, "123456")?;
    is_refused(rig, &plan, &sleeper, "srv/data has 6 bytes here, not 5")?;
    fs::write(&data, "54321")?;
    allow(&data, 0o600)?;
    is_refused(rig, &plan, &sleeper, "has permissions 600 here, not 644")?;
    allow(&data, 0o644)?;
    allow(&there, 0o700)?;
    is_refused(rig, &plan, &sleeper, "srv has permissions 700 here")?;
    let mut careless = plan.clone();
    careless.restorer.push("--ignore-open-files".into());
    let mut server = careless.start_server(rig, sleeper.pid())?;
    let mut restorer = careless.start_restorer(rig)?;
    expect_failure(&mut restorer, RESTORE, &["CRIU", "bad mode"])?;
    ensure!(!server.end()?.success(), "it was moved");
    allow(&there, 0o755)?;
    let migration = plan.migrate(rig, sleeper.pid())?;
    assert_moved(rig, migration.pid)
}

fn allow(path: &Path, mode: u32) -> Result<()> {
    Ok(fs::set_permissions(path, Permissions::from_mode(mode))?)
}

fn is_refused(rig: &Rig, plan: &PairPlan, sleeper: &Sleeper, words: &str) -> Result<()> {
    let mut server = plan.start_server(rig, sleeper.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    expect_refused_in_advise(&mut server, &mut restorer, &[words, "--ignore-open-files"])?;
    ensure!(!task::is_frozen(sleeper.pid()), "it stands still");
    Ok(())
}
