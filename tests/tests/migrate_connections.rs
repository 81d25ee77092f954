//! Connections move: hundreds at once, with full buffers and halves of requests on the way.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use tests::crowd::{Crowd, Halfway};
use tests::exit_code::{ABORTED_BY_PEER, FREEZE};
use tests::failure::expect_failure;
use tests::harness::{self, MIGRATION, REDIS_MIGRATION, Test};
use tests::leftovers::assert_moved;
use tests::namespace;
use tests::pair::{PATIENCE, PairPlan};
use tests::process::Process;
use tests::random::seed_of_this_run;
use tests::redis;
use tests::rig::Rig;
use tests::wait::wait_for;

/// "Hundreds of open connections".
const CONNECTIONS: usize = 300;

fn main() -> ExitCode {
    harness::main([
        Test {
            name: "hundreds_of_connections",
            needs: REDIS_MIGRATION,
            body: hundreds_of_connections,
        },
        Test {
            name: "a_connection_nobody_accepted",
            needs: MIGRATION,
            body: a_connection_nobody_accepted,
        },
    ])
}

/// A server that accepts nobody before it is told to; then it answers with what it was sent.
const LATE_SERVER: &str = r#"
import os, socket, sys, time
listener = socket.socket()
listener.bind(("0.0.0.0", 6379))
listener.listen(16)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
connection, _ = listener.accept()
connection.sendall(connection.recv(100))
time.sleep(1000)
"#;

/// CRIU cannot dump a connection that waits in a backlog. The migration is given up, and the connection lives.
fn a_connection_nobody_accepted(rig: &Rig) -> Result<()> {
    let go = rig.folder().join("go");
    let mut command = rig.source.command("setsid");
    command
        .args(["/usr/bin/python3", "-I", "-c", LATE_SERVER])
        .arg(&go);
    let server = Process::start_detached("late", &mut command)?;
    let (from, address) = (
        rig.client.namespace().to_owned(),
        rig.service.port(redis::PORT),
    );
    let connecting = std::thread::spawn(move || {
        namespace::enter(&from)?;
        wait_for(PATIENCE, "the server to listen", || {
            TcpStream::connect(address).ok()
        })
    });
    let mut client = connecting.join().expect("no panic while connecting")?;
    client.set_read_timeout(Some(PATIENCE))?;
    client.write_all(b"hello")?;
    let plan = PairPlan::new(rig)?;
    let mut page_server = plan.start_server(rig, server.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    expect_failure(&mut page_server, FREEZE, &["in-flight connection"])?;
    expect_failure(&mut restorer, ABORTED_BY_PEER, &["in-flight connection"])?;
    std::fs::write(&go, "")?;
    let mut answer = [0; 5];
    client
        .read_exact(&mut answer)
        .context("the connection died")?;
    ensure!(&answer == b"hello", "{answer:?}");
    // Accepted, it can move.
    plan.migrate(rig, server.pid()).context("the second try")?;
    Ok(())
}

fn hundreds_of_connections(rig: &Rig) -> Result<()> {
    let redis = redis::start(rig)?;
    let (from, server) = (rig.client.namespace(), rig.service.port(redis::PORT));
    let seed = seed_of_this_run();
    let crowd = Crowd::start(from, server, CONNECTIONS, seed)?;
    let halfway = Halfway::start(from, server, !seed)?;
    let migration = PairPlan::new(rig)?.migrate(rig, redis.pid())?;
    crowd.wait_for_rounds(5)?;
    halfway
        .finish()
        .context("a connection in the middle of something")?;
    let report = crowd.end()?;
    let replies = report.replies;
    ensure!(replies > 0, "nobody was answered");
    println!(
        "{CONNECTIONS} connections, {replies} replies, longest stall of all together {} ms",
        report.felt.stall.as_millis()
    );
    assert_moved(rig, migration.pid)
}
