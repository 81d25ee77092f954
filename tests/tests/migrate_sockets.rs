//! Sockets of every kind move with what is in their buffers.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use tests::harness::{self, Need, Test};
use tests::leftovers::assert_moved;
use tests::namespace;
use tests::pair::{PATIENCE, PairPlan};
use tests::process::Process;
use tests::rig::Rig;
use tests::sockets::Sockets;
use tests::wait::wait_for;

const NEEDS: &[Need] = &[Need::Namespaces, Need::Criu, Need::Program("python3")];
/// The port of the server that accepts late.
const PORT: u16 = 7011;

fn main() -> ExitCode {
    harness::main([
        Test {
            name: "buffers_full_of_data",
            needs: NEEDS,
            body: buffers_full_of_data,
        },
        Test {
            name: "a_backlog_that_is_never_empty_for_long",
            needs: NEEDS,
            body: a_backlog_that_is_never_empty_for_long,
        },
    ])
}

fn buffers_full_of_data(rig: &Rig) -> Result<()> {
    let sockets = Sockets::start(rig)?;
    let plan = PairPlan::new(rig)?.move_address(rig);
    let migration = plan.migrate(rig, sockets.process.pid())?;
    sockets.finish()?;
    assert_moved(rig, migration.pid)
}

/// Looks only now and then whether somebody wants to come in, and answers each with what it was sent.
const LAZY_SERVER: &str = r#"
import socket, sys, time
listener = socket.create_server(("0.0.0.0", int(sys.argv[1])), backlog=64)
listener.setblocking(False)
while True:
    time.sleep(0.2)
    try:
        while True:
            connection, _ = listener.accept()
            connection.setblocking(True)
            connection.sendall(connection.recv(100))
            connection.close()
    except BlockingIOError:
        pass
"#;

/// CRIU cannot dump who waits in a backlog: they are let in before the freeze, while others wait before the door.
fn a_backlog_that_is_never_empty_for_long(rig: &Rig) -> Result<()> {
    let mut command = rig.source.command("setsid");
    command
        .args(["/usr/bin/python3", "-I", "-c", LAZY_SERVER])
        .arg(PORT.to_string());
    let server = Process::start_detached("lazy", &mut command)?;
    let address = rig.service.port(PORT);
    let stop = Arc::new(AtomicBool::new(false));
    let newcomers: Vec<_> = (0..8)
        .map(|_| {
            let (from, stop) = (rig.client.namespace().to_owned(), stop.clone());
            std::thread::spawn(move || -> Result<u32> {
                namespace::enter(&from)?;
                let connect = || TcpStream::connect(address).ok();
                drop(wait_for(PATIENCE, "the server to listen", connect)?);
                let mut answers = 0;
                while !stop.load(Ordering::Relaxed) {
                    let mut connection = TcpStream::connect(address).context("connecting")?;
                    connection.set_read_timeout(Some(PATIENCE))?;
                    connection.write_all(b"hello")?;
                    let mut answer = [0; 5];
                    connection.read_exact(&mut answer).context("the answer")?;
                    ensure!(&answer == b"hello", "{answer:?}");
                    answers += 1;
                }
                Ok(answers)
            })
        })
        .collect();
    let plan = PairPlan::new(rig)?.move_address(rig);
    let migration = plan.migrate(rig, server.pid());
    stop.store(true, Ordering::Relaxed);
    for newcomer in newcomers {
        let answers = newcomer.join().expect("no panic in a client");
        ensure!(
            answers.context("a client was turned away")? > 0,
            "nobody came"
        );
    }
    assert_moved(rig, migration?.pid)
}
