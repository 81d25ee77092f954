//! Trees and runtimes people have: each moves under its own clients.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use nix::unistd::Pid;
use tests::crowd::Crowd;
use tests::harness::{self, Need, Test};
use tests::leftovers::assert_moved;
use tests::pair::PairPlan;
use tests::postgres::{self, Client, Postgres};
use tests::random::seed_of_this_run;
use tests::redis;
use tests::rig::Rig;
use tests::runtimes::{Language, Server};
use tests::task;

/// Connections to each server.
const CONNECTIONS: usize = 24;
/// Processes of the server in Python.
const WORKERS: usize = 4;
/// Sessions of PostgreSQL: a process each.
const SESSIONS: usize = 4;
/// Rows of its table.
const ROWS: usize = 20_000;

fn main() -> ExitCode {
    let needs = |program: &'static [Need]| program;
    harness::main([
        Test {
            name: "python_with_forked_workers",
            needs: needs(&[Need::Namespaces, Need::Criu, Need::Program("python3")]),
            body: python_with_forked_workers,
        },
        Test {
            name: "node",
            needs: needs(&[Need::Namespaces, Need::Criu, Need::Program("node")]),
            body: |rig| moves(rig, Language::Node).map(drop),
        },
        Test {
            name: "a_java_virtual_machine",
            needs: needs(&[Need::Namespaces, Need::Criu, Need::Program("javac")]),
            body: |rig| moves(rig, Language::Java).map(drop),
        },
        Test {
            name: "postgres_with_its_children",
            needs: needs(&[Need::Namespaces, Need::Criu, Need::Postgres]),
            body: postgres_with_its_children,
        },
    ])
}

fn python_with_forked_workers(rig: &Rig) -> Result<()> {
    let root = moves(rig, Language::Python)?;
    let processes = 1 + task::descendants(root).len();
    ensure!(processes == WORKERS, "{processes} processes");
    Ok(())
}

/// Returns the root of the tree where it runs then.
fn moves(rig: &Rig, language: Language) -> Result<Pid> {
    let server = Server::start(rig, language)?;
    let address = rig.service.port(redis::PORT);
    let crowd = Crowd::start(
        rig.client.namespace(),
        address,
        CONNECTIONS,
        seed_of_this_run(),
    )?;
    let migration = PairPlan::new(rig)?.migrate(rig, server.pid())?;
    crowd.wait_for_rounds(20)?;
    if let Language::Python = language {
        several_serve(migration.pid)?;
    }
    let report = crowd.end()?;
    println!(
        "{language:?}: {} replies, longest stall {} ms, frozen for {} ms",
        report.replies,
        report.felt.stall.as_millis(),
        migration.source.cutover_us / 1000
    );
    assert_moved(rig, migration.pid)?;
    Ok(migration.pid)
}

/// While every connection is answered: more than one process of the tree has some besides what it listens on.
fn several_serve(root: Pid) -> Result<()> {
    let mut workers = task::descendants(root);
    workers.push(root);
    let sockets: Vec<usize> = workers.iter().map(|pid| task::sockets(*pid)).collect();
    let connections: usize = sockets.iter().map(|sockets| sockets - 1).sum();
    ensure!(connections == CONNECTIONS, "sockets: {sockets:?}");
    let serving = sockets.iter().filter(|sockets| **sockets > 1).count();
    ensure!(serving > 1, "one of {WORKERS} serves all: {sockets:?}");
    Ok(())
}

fn postgres_with_its_children(rig: &Rig) -> Result<()> {
    let postgres = Postgres::start(rig)?;
    let address = rig.service.port(postgres::PORT);
    let mut sessions = Vec::new();
    for _ in 0..SESSIONS {
        sessions.push(Client::connect(rig.client.namespace(), address)?);
    }
    let made =
        format!("create table t as select i, md5(i::text) as d from generate_series(1, {ROWS}) i");
    sessions[0].query(&made)?;
    let mut expected = Vec::new();
    for session in &mut sessions {
        // A transaction that is open while the tree moves, with a cursor halfway through its rows.
        session.query("begin")?;
        session.query("declare c cursor for select d from t order by i")?;
        expected = session.query(&format!("fetch {} from c", ROWS / 2))?;
        session.query("select pg_advisory_lock_shared(7)")?;
    }
    let processes = task::descendants(postgres.pid()).len();
    ensure!(processes > SESSIONS, "only {processes} children");
    let migration = PairPlan::new(rig)?.migrate(rig, postgres.pid())?;
    ensure!(expected.len() == ROWS / 2, "{} rows", expected.len());
    for session in &mut sessions {
        let rest = session.query("fetch all from c")?;
        ensure!(rest.len() == ROWS / 2, "{} rows after the move", rest.len());
        session.query("commit")?;
        let sum = "select md5(string_agg(d, '' order by i)) = \
                   (select md5(string_agg(md5(i::text), '' order by i)) from generate_series(1, 20000) i) from t";
        let is_right = session.query(sum)?;
        ensure!(is_right == ["t"], "the table is damaged: {is_right:?}");
        let locks = "select count(*) from pg_locks where locktype = 'advisory'";
        let locks = session.query(locks)?;
        ensure!(locks == [SESSIONS.to_string()], "locks: {locks:?}");
    }
    // The postmaster lives and makes new children.
    let mut late = Client::connect(rig.client.namespace(), address)?;
    let rows = late.query("select count(*) from t")?;
    ensure!(rows == [ROWS.to_string()], "{rows:?}");
    println!(
        "postgres: {processes} children, frozen for {} ms, {} bytes of skeleton, {} of them shared memory",
        migration.source.cutover_us / 1000,
        migration.source.skeleton_bytes,
        migration.source.shared_bytes
    );
    // Its buffers hold the table, and more.
    let (shared, skeleton) = (
        migration.source.shared_bytes,
        migration.source.skeleton_bytes,
    );
    ensure!(
        shared > 1 << 20 && shared < skeleton,
        "{shared} bytes of shared memory?"
    );
    assert_moved(rig, migration.pid)
}
