//! A container of the real `runc` with a network namespace of its own moves, or comes back, or is refused.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use tests::container::{Container, NAME};
use tests::exit_code::{ABORTED_BY_PEER, BAD_INPUT, RESTORE};
use tests::failure::expect_failure;
use tests::harness::{self, Body, CONTAINER_MIGRATION, Test};
use tests::host::Host;
use tests::namespace;
use tests::newcomers::{self, Newcomers};
use tests::pair::PairPlan;
use tests::random::seed_of_this_run;
use tests::redis;
use tests::redis_client::{ClientPlan, RedisClient};
use tests::rig::Rig;
use tests::task;

fn main() -> ExitCode {
    let tests: [(&'static str, Body); 4] = [
        ("a_network_of_its_own_by_path", a_network_of_its_own_by_path),
        (
            "a_network_of_its_own_comes_back",
            a_network_of_its_own_comes_back,
        ),
        (
            "a_network_of_its_own_with_newcomers",
            a_network_of_its_own_with_newcomers,
        ),
        (
            "a_network_made_by_the_runtime_is_refused",
            a_network_made_by_the_runtime_is_refused,
        ),
    ];
    harness::main(tests.map(|(name, body)| Test {
        name,
        needs: CONTAINER_MIGRATION,
        body,
    }))
}

/// A container whose network namespace somebody else made and plugged in, as CNI does, on both hosts.
struct Plugged {
    container: Container,
    networks: [Host; 2],
    plan: PairPlan,
}

impl Plugged {
    /// With `words` running in it.
    fn start(rig: &Rig, words: &[&str]) -> Result<Self> {
        // The service address lies in the container's world, not on a host.
        rig.source.shell(&rig.service.on_frozen())?;
        let number = rig.service.0.octets()[3];
        let here = rig.plug_in("boxa", number)?;
        let there = rig.plug_in("boxb", number)?;
        rig.source.shell(&rig.set_port("boxb", "down"))?;
        let container = Container::prepare(rig, words)?;
        let networks = [here, there];
        for (place, network) in [&container.source, &container.destination]
            .into_iter()
            .zip(&networks)
        {
            place.isolate(Some(&namespace::path(network.namespace())))?;
        }
        container.run()?;
        let mut plan = container.plan(rig)?;
        let announce = format!(
            "{}; nsenter --net={} arping -q -U -c 1 -w 1 -I eth0 {} >/dev/null 2>&1 &",
            rig.set_port("boxb", "up"),
            namespace::path(networks[1].namespace()).display(),
            rig.service.0
        );
        plan.on_frozen = rig.set_port("boxa", "down");
        plan.on_thawed = rig.set_port("boxa", "up");
        plan.before_restore = String::new();
        plan.on_resumed = announce;
        plan.on_aborted = rig.set_port("boxb", "down");
        Ok(Self {
            container,
            networks,
            plan,
        })
    }

    /// With redis, and a client of it.
    fn with_redis(rig: &Rig) -> Result<(Self, RedisClient)> {
        let words = redis::arguments("/tmp".as_ref());
        let words: Vec<&str> = words.iter().skip(1).map(String::as_str).collect();
        let plugged = Self::start(rig, &words)?;
        let plan = ClientPlan {
            mib: 16,
            seed: seed_of_this_run(),
            rate: 1000,
        };
        let address = rig.service.port(redis::PORT);
        let client = RedisClient::start(rig.client.namespace(), address, plan)?;
        client.wait_for_replies(200)?;
        Ok((plugged, client))
    }

    fn assert_no_rules(&self) -> Result<()> {
        for network in &self.networks {
            let rules = network.filter_rules()?;
            ensure!(rules.is_empty(), "{network} still filters: {rules}");
        }
        Ok(())
    }
}

fn a_network_of_its_own_by_path(rig: &Rig) -> Result<()> {
    let (plugged, client) = Plugged::with_redis(rig)?;
    let pid = plugged.container.source.running()?;
    let migration = plugged.plan.migrate(rig, pid)?;
    client.wait_for_replies(500)?;
    ensure!(
        plugged.container.destination.running()? == migration.pid,
        "it runs elsewhere"
    );
    let (network, inhabitants) = (
        namespace::path(plugged.networks[1].namespace()),
        task::in_network_namespace,
    );
    ensure!(
        inhabitants(&network).contains(&migration.pid),
        "it is in another network"
    );
    plugged.assert_no_rules()?;
    client.end().context("the client noticed")?;
    Ok(())
}

fn a_network_of_its_own_comes_back(rig: &Rig) -> Result<()> {
    let (plugged, client) = Plugged::with_redis(rig)?;
    let pid = plugged.container.source.running()?;
    let mut plan = plugged.plan.clone();
    plan.before_restore = String::from("echo the hook says no >&2; exit 3");
    let mut server = plan.start_server(rig, pid)?;
    let mut restorer = plan.start_restorer(rig)?;
    expect_failure(&mut restorer, RESTORE, &["the hook says no"])?;
    expect_failure(&mut server, ABORTED_BY_PEER, &["the hook says no"])?;
    client.wait_for_replies(200)?;
    plugged.assert_no_rules()?;
    plugged.plan.migrate(rig, pid).context("the second try")?;
    client.wait_for_replies(200)?;
    client.end().context("the client noticed")?;
    Ok(())
}

/// Nobody comes in while the container is frozen, though its network is not the host's.
fn a_network_of_its_own_with_newcomers(rig: &Rig) -> Result<()> {
    let words = newcomers::server();
    let plugged = Plugged::start(rig, &words.each_ref().map(String::as_str))?;
    let newcomers = Newcomers::start(rig.client.namespace(), rig.service.0)?;
    let mut plan = plugged.plan.clone();
    plan.server.push("--verbose".into());
    let mut server = plan.start_server(rig, plugged.container.source.running()?)?;
    let mut restorer = plan.start_restorer(rig)?;
    restorer.expect_success()?;
    server.expect_success()?;
    let said = server.process.stderr();
    ensure!(
        said.contains("accepted who waited"),
        "nobody waited: {said}"
    );
    newcomers.wait_for_answers(20)?;
    newcomers.end()?;
    for network in &plugged.networks {
        let tables = network.shell("nft list tables")?;
        ensure!(!tables.contains("postcopy"), "{network}: {tables}");
    }
    plugged.assert_no_rules()
}

/// runc has CRIU restore a network namespace that it made itself as an empty one.
fn a_network_made_by_the_runtime_is_refused(rig: &Rig) -> Result<()> {
    let container = Container::prepare(rig, &["/usr/bin/sleep", "1000"])?;
    container.source.isolate(None)?;
    container.run()?;
    let pid = container.source.running()?;
    let mut server = container.plan(rig)?.spawn_server(rig, pid)?;
    expect_failure(&mut server, BAD_INPUT, &[NAME, "network namespace", "path"])
}
