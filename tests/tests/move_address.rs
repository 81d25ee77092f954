//! `--move-address` alone moves the service address, or puts it back.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::echo::{self, EchoClient, Habit};
use tests::exit_code::{ABORTED_BY_PEER, BAD_INPUT, CONNECTION, RESTORE};
use tests::failure::{Bystander, expect_failure};
use tests::gate::Gate;
use tests::harness::{self, Body, REDIS_MIGRATION, Test};
use tests::host::{Host, INTERFACE};
use tests::leftovers::assert_moved;
use tests::pair::{PATIENCE, PairPlan, Side};
use tests::random::seed_of_this_run;
use tests::redis;
use tests::redis_client::{ClientPlan, RedisClient};
use tests::rig::Rig;
use tests::wait::wait_until;
use tests::{fake_criu, task};

fn main() -> ExitCode {
    let tests: [(&'static str, Body); 10] = [
        ("a_redis_under_its_client", a_redis_under_its_client),
        ("both_families_and_newcomers", both_families_and_newcomers),
        ("the_restore_fails", the_restore_fails),
        ("the_server_is_killed", the_server_is_killed),
        ("only_the_guard_is_left", only_the_guard_is_left),
        ("the_restorer_is_killed", the_restorer_is_killed),
        (
            "the_restorer_is_killed_after_the_cutover",
            the_restorer_is_killed_after_the_cutover,
        ),
        ("what_cannot_move_is_refused", what_cannot_move_is_refused),
        (
            "what_only_one_end_moves_is_refused",
            what_only_one_end_moves_is_refused,
        ),
        ("who_asks_early_is_not_told", who_asks_early_is_not_told),
    ];
    harness::main(tests.map(|(name, body)| Test {
        name,
        needs: REDIS_MIGRATION,
        body,
    }))
}

fn plan(rig: &Rig) -> Result<PairPlan> {
    Ok(PairPlan::new(rig)?.move_address(rig))
}

/// Where the client's machine sends packets for the service address.
fn neighbour(rig: &Rig) -> Result<String> {
    let shown = rig
        .client
        .shell(&format!("ip neigh show {} dev {INTERFACE}", rig.service.0))?;
    let mut words = shown.split_whitespace();
    let mac = words.find(|word| *word == "lladdr").and(words.next());
    Ok(mac.unwrap_or_default().to_owned())
}

fn mac(host: &Host) -> Result<String> {
    let line = format!("ip -o link show {INTERFACE} | sed 's/.*ether \\([^ ]*\\).*/\\1/'");
    Ok(host.shell(&line)?.trim().to_owned())
}

fn a_redis_under_its_client(rig: &Rig) -> Result<()> {
    let redis = redis::start(rig)?;
    let client_plan = ClientPlan {
        mib: 64,
        seed: seed_of_this_run(),
        rate: 2000,
    };
    let service = rig.service.port(redis::PORT);
    let client = RedisClient::start(rig.client.namespace(), service, client_plan)?;
    client.wait_for_replies(500)?;
    let migration = plan(rig)?.migrate(rig, redis.pid())?;
    client.wait_for_replies(500)?;
    client.end()?;
    ensure!(neighbour(rig)? == mac(&rig.destination)?, "not announced");
    assert_moved(rig, migration.pid)
}

/// IPv4 and IPv6, established connections, and some that are made while the workload moves.
fn both_families_and_newcomers(rig: &Rig) -> Result<()> {
    for (host, number) in [(&rig.source, 1), (&rig.destination, 2), (&rig.client, 3)] {
        host.shell(&format!(
            "ip addr add fd77::{number}/64 dev {INTERFACE} nodad"
        ))?;
    }
    rig.source
        .shell(&format!("ip addr add fd77::100/128 dev {INTERFACE} nodad"))?;
    let server = echo::start(&rig.source)?;
    let (from, v6) = (rig.client.namespace(), "[fd77::100]:7007".parse()?);
    let v4 = rig.service.port(echo::PORT).into();
    let mut clients = Vec::new();
    for address in [v4, v6] {
        for habit in [Habit::Keeps, Habit::Reconnects, Habit::Reconnects] {
            let client = EchoClient::start(from, address, habit)?;
            clients.push((address, habit, client));
        }
    }
    let mut plan = plan(rig)?;
    let address = ["--move-address".into(), "fd77::100/128".into()];
    plan.server.extend(address.clone());
    plan.restorer.extend(address);
    let migration = plan.migrate(rig, server.pid())?;
    for (address, habit, client) in clients {
        client.wait_for_answers(20)?;
        let longest = client.end()?;
        println!(
            "{habit:?} at {address}: longest wait {} ms",
            longest.as_millis()
        );
    }
    let left = rig.source.shell("ip -o -6 addr show to fd77::100")?;
    ensure!(left.is_empty(), "still on the source: {left}");
    assert_moved(rig, migration.pid)
}

fn the_restore_fails(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let plan = plan(rig)?;
    let mut failing = plan.clone();
    failing.destination_criu = fake_criu::failing_at(rig, "restore")?;
    let mut server = failing.start_server(rig, bystander.redis.pid())?;
    let mut restorer = failing.start_restorer(rig)?;
    expect_failure(&mut restorer, RESTORE, &["the test wants this to fail"])?;
    server.end()?;
    bystander.redis.assert_alive()?;
    wait_until(PATIENCE, "the neighbours to be told", || {
        neighbour(rig).ok() == mac(&rig.source).ok()
    })?;
    bystander.assert_movable(rig, &plan)
}

/// A migration that is held by a hook.
struct Held {
    bystander: Bystander,
    plan: PairPlan,
    gate: Gate,
    server: Side,
    restorer: Side,
}

impl Held {
    fn start(rig: &Rig, hold: fn(&mut PairPlan, &Gate)) -> Result<Self> {
        let bystander = Bystander::start(rig)?;
        let plan = plan(rig)?;
        let gate = Gate::new(rig, "held")?;
        let mut held = plan.clone();
        hold(&mut held, &gate);
        let server = held.start_server(rig, bystander.redis.pid())?;
        let restorer = held.start_restorer(rig)?;
        gate.wait(PATIENCE)?;
        Ok(Self {
            bystander,
            plan,
            gate,
            server,
            restorer,
        })
    }
}

fn has_service(host: &Host, rig: &Rig) -> Result<bool> {
    let shown = host.shell(&format!("ip -o addr show to {}", rig.service.0))?;
    Ok(!shown.is_empty())
}

fn the_server_is_killed(rig: &Rig) -> Result<()> {
    let mut held = Held::start(rig, |plan, gate| plan.on_frozen = gate.after(":"))?;
    ensure!(!has_service(&rig.source, rig)?, "it was not taken");
    kill(held.server.process.pid(), Signal::SIGKILL)?;
    held.server.end()?;
    held.gate.open()?;
    expect_failure(&mut held.restorer, CONNECTION, &["lost the source"])?;
    held.bystander.assert_movable(rig, &held.plan)
}

fn only_the_guard_is_left(rig: &Rig) -> Result<()> {
    let mut held = Held::start(rig, |plan, gate| plan.on_frozen = gate.after(":"))?;
    let server = held.server.process.pid();
    let children = task::children(server);
    let criu: Option<Pid> = children
        .into_iter()
        .find(|child| task::name(*child) == "criu");
    let criu = criu.context("page-server runs no CRIU")?;
    let script = task::children(criu);
    kill(server, Signal::SIGSTOP)?;
    for pid in script.into_iter().chain([criu, server]) {
        kill(pid, Signal::SIGKILL)?;
    }
    held.server.end()?;
    held.gate.open()?;
    expect_failure(&mut held.restorer, CONNECTION, &["lost the source"])?;
    held.bystander.assert_movable(rig, &held.plan)
}

fn the_restorer_is_killed(rig: &Rig) -> Result<()> {
    let mut held = Held::start(rig, |plan, gate| plan.before_restore = gate.after(":"))?;
    ensure!(has_service(&rig.destination, rig)?, "it was not added");
    kill(held.restorer.process.pid(), Signal::SIGKILL)?;
    held.restorer.end()?;
    held.gate.open()?;
    expect_failure(&mut held.server, CONNECTION, &["destination"])?;
    held.bystander.assert_movable(rig, &held.plan)
}

/// The copy keeps its address and its clients, and the successor finishes.
fn the_restorer_is_killed_after_the_cutover(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let mut plan = plan(rig)?;
    plan.restorer.push("--no-push".into());
    let mut server = plan.start_server(rig, bystander.redis.pid())?;
    let mut restorer = plan.start_restorer(rig)?;
    let copy = restorer.wait_for_copy()?;
    kill(restorer.process.pid(), Signal::SIGKILL)?;
    restorer.end()?;
    ensure!(has_service(&rig.destination, rig)?, "the address is gone");
    let mut successor = plan.resume_restorer(rig, &[])?;
    successor.expect_success()?;
    server.expect_success()?;
    bystander.redis.assert_alive()?;
    bystander.redis.client.end()?;
    ensure!(neighbour(rig)? == mac(&rig.destination)?, "not announced");
    assert_moved(rig, copy)
}

fn what_cannot_move_is_refused(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let plan = PairPlan::new(rig)?;
    let with = |address: &str, device: &str| -> PairPlan {
        let mut plan = plan.clone();
        let options = ["--move-address", address, "--dev", device];
        plan.server.extend(options.map(Into::into));
        plan.restorer.extend(options.map(Into::into));
        plan
    };
    let service = format!("{}/32", rig.service.0);
    let on_source: [(&str, &str, &str); 4] = [
        ("10.77.0.101/32", INTERFACE, "not an address of eth0"),
        (&format!("{}/24", rig.service.0), INTERFACE, "this host has"),
        (&service, "eth9", "no network device eth9"),
        (&service, "lo", "not an address of lo"),
    ];
    for (address, device, word) in on_source {
        let mut server = with(address, device).spawn_server(rig, bystander.redis.pid())?;
        expect_failure(&mut server, BAD_INPUT, &[word])?;
    }
    rig.destination
        .shell("ip link add quiet type veth peer name other")?;
    let own = format!("{}/32", rig.destination.address());
    let on_destination = [
        (own.as_str(), INTERFACE, "already"),
        (&service, "eth9", "no network device eth9"),
        (&service, "quiet", "is down"),
    ];
    for (address, device, word) in on_destination {
        let mut restorer = with(address, device).start_restorer(rig)?;
        expect_failure(&mut restorer, BAD_INPUT, &[word])?;
    }
    rig.destination.shell("ip link del quiet")?;
    bystander.assert_unharmed(rig)
}

/// Else the address would be nobody's, or of two hosts.
fn what_only_one_end_moves_is_refused(rig: &Rig) -> Result<()> {
    let bystander = Bystander::start(rig)?;
    let neither = PairPlan::new(rig)?;
    let both = neither.clone().move_address(rig);
    let only_source = PairPlan {
        restorer: neither.restorer.clone(),
        ..both.clone()
    };
    let only_destination = PairPlan {
        server: neither.server.clone(),
        ..both
    };
    let ip = rig.service.0;
    for (plan, whose) in [
        (only_source, format!("only there [{ip}]")),
        (only_destination, format!("names {ip} here")),
    ] {
        let mut server = plan.start_server(rig, bystander.redis.pid())?;
        let mut restorer = plan.start_restorer(rig)?;
        expect_failure(&mut restorer, RESTORE, &["--move-address", &whose])?;
        expect_failure(&mut server, ABORTED_BY_PEER, &["--move-address"])?;
    }
    bystander.assert_unharmed(rig)
}

/// While the sockets are not there yet, the destination neither answers who asks for the address nor lets packets in:
/// a client that has forgotten where the address was would be reset otherwise.
fn who_asks_early_is_not_told(rig: &Rig) -> Result<()> {
    let mut held = Held::start(rig, |plan, gate| plan.before_restore = gate.after(":"))?;
    rig.client.shell("ip neigh flush all")?;
    let question = format!("arping -q -f -c 3 -w 1 -I {INTERFACE} {}", rig.service.0);
    let answered = rig.client.shell(&question).is_ok();
    ensure!(!answered, "the destination has told where the address is");
    // Even who knows it does not get in.
    let there = format!(
        "ip neigh replace {} lladdr {} nud permanent dev {INTERFACE}",
        rig.service.0,
        mac(&rig.destination)?
    );
    rig.client.shell(&there)?;
    let (address, port) = (rig.service.0, redis::PORT);
    let knock = format!(
        "status=0; timeout 1 bash -c 'exec 3<>/dev/tcp/{address}/{port}' 2>&1 || status=$?; echo $status"
    );
    let status = rig.client.shell(&knock)?;
    ensure!(status.trim() == "124", "a packet got in: {status}");
    rig.client
        .shell(&format!("ip neigh del {} dev {INTERFACE}", rig.service.0))?;
    answers_come_in(rig).context("sockets that are being restored ask where their peer is")?;
    held.gate.open()?;
    held.restorer.expect_success()?;
    held.server.expect_success()?;
    held.bystander.redis.assert_alive()?;
    held.bystander.redis.client.end()?;
    Ok(())
}

/// The destination may ask where the client is, in the name of the address that nobody may reach yet.
fn answers_come_in(rig: &Rig) -> Result<()> {
    let (service, client) = (rig.service.0, rig.client.address());
    let send = format!(
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('{service}', 0)); \
         s.sendto(b'x', ('{client}', 9))"
    );
    rig.destination.shell("ip neigh flush all")?;
    rig.destination
        .shell(&format!("python3 -I -c \"{send}\""))?;
    wait_until(PATIENCE, "an answer", || {
        let known = rig.destination.shell(&format!("ip neigh show {client}"));
        known.is_ok_and(|known| known.contains("lladdr"))
    })
}
