//! What cannot work is said in the phase `advise`, by both ends, and nothing is frozen for it.
//!
//! Other bundles are refused in `migrate_container.rs`, addresses in `move_address.rs`, PIDs in `rollback.rs`.

use std::process::{Command, ExitCode};

use anyhow::{Result, ensure};
use tests::binaries;
use tests::exit_code::NOT_PERMITTED;
use tests::failure::{Bystander, expect_failure, expect_refused_in_advise};
use tests::faulty_peer::{Claim, FaultyPeer, Scenario};
use tests::harness::{self, Body, REDIS_MIGRATION, Test};
use tests::host::Host;
use tests::pair::{PORT, PairPlan, Side};
use tests::rig::Rig;

fn main() -> ExitCode {
    let tests: [(&'static str, Body); 2] = [
        (
            "what_this_host_is_not_is_refused",
            what_this_host_is_not_is_refused,
        ),
        ("an_old_kernel_is_refused", an_old_kernel_is_refused),
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
