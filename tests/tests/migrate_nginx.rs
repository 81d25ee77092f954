//! A real nginx moves under hundreds of open connections and a download.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use tests::harness::{self, Need, Test};
use tests::http::Connection;
use tests::leftovers::assert_moved;
use tests::namespace;
use tests::nginx::{LONG_FILE, LONG_FILE_BYTES, Nginx, PORT};
use tests::pair::PairPlan;
use tests::random::seed_of_this_run;
use tests::rig::Rig;

/// "Hundreds of open connections".
const CONNECTIONS: usize = 300;
/// Bytes of the download that are read before the move.
const READ_BEFORE: usize = 1 << 20;

fn main() -> ExitCode {
    harness::main([Test {
        name: "keep_alive_connections_and_a_download",
        needs: &[Need::Namespaces, Need::Criu, Need::Program("nginx")],
        body: keep_alive_connections_and_a_download,
    }])
}

fn keep_alive_connections_and_a_download(rig: &Rig) -> Result<()> {
    let nginx = Nginx::start(rig, seed_of_this_run())?;
    let (from, server) = (rig.client.namespace(), rig.service.port(PORT));
    let crowd = nginx.crowd(from, server, CONNECTIONS)?;
    let inside = from.to_owned();
    let opening = std::thread::spawn(move || {
        namespace::enter(&inside)?;
        Connection::open(server)
    });
    let mut download = opening.join().expect("no panic while connecting")?;
    download.ask(LONG_FILE)?;
    ensure!(download.head()? == LONG_FILE_BYTES, "not the long file");
    let mut got = download.body(READ_BEFORE)?;
    let plan = PairPlan::new(rig)?.move_address(rig);
    let migration = plan.migrate(rig, nginx.process.pid())?;
    crowd.wait_for_rounds(5)?;
    let report = crowd.end().context("a client noticed")?;
    got.extend(download.body(LONG_FILE_BYTES - READ_BEFORE)?);
    ensure!(got == nginx.long, "the download is damaged");
    // Nothing came twice: the next answer begins where it must.
    download.ask(LONG_FILE)?;
    ensure!(download.head()? == LONG_FILE_BYTES, "not the long file");
    println!(
        "nginx, {CONNECTIONS} connections: {} answers, longest stall of all together {} ms, frozen for {} ms",
        report.answers,
        report.felt.stall.as_millis(),
        migration.source.cutover_us / 1000
    );
    assert_moved(rig, migration.pid)
}
