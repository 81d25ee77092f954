//! The demonstration: a running redis moves to another host and its client never disconnects.

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use tests::pair::{Migration, PairPlan};
use tests::record::Record;
use tests::redis;
use tests::redis_client::{ClientPlan, ClientReport, RedisClient};
use tests::rig::Rig;
use tests::task;

use crate::table::{Table, mib, ms};
use crate::{DemoOptions, memory, write_json};

/// Commands answered before the move begins.
const REPLIES_BEFORE: u64 = 2000;
/// Commands answered after it is over.
const REPLIES_AFTER: u64 = 4000;
/// Data and order of commands are the same in every demonstration.
const SEED: u64 = 1;

/// Everything the table shows.
#[derive(Debug, Serialize)]
struct DemoRecord<'a> {
    memory_mib: u64,
    total_us: u64,
    client: &'a ClientReport,
    source: &'a Record,
    destination: &'a Record,
}

/// Runs the demonstration; it fails when anything differs from what was written.
pub fn run(options: &DemoOptions) -> Result<()> {
    println!(
        "A redis with {} MiB moves from one host to another under a connected client.",
        options.memory
    );
    let rig = Rig::new()?;
    let plan = PairPlan::new(&rig)?.move_address(&rig);
    let redis = redis::start(&rig)?;
    let client_plan = ClientPlan {
        mib: options.memory,
        seed: SEED,
        rate: options.rate,
    };
    let client = RedisClient::start(
        rig.client.namespace(),
        rig.service.port(redis::PORT),
        client_plan,
    )?;
    client.wait_for_replies(REPLIES_BEFORE)?;
    memory::warm(options.memory + options.memory / 4)?;
    client.forget_times()?;
    println!(
        "Redis is filled, its client is at work; now page-server and lazy-restorer are started."
    );
    let migration = plan.migrate(&rig, redis.pid());
    // The client's error says more than that of a migration it spoilt.
    let migration = match migration {
        Ok(migration) => migration,
        Err(error) => return Err(error.context("the migration failed")),
    };
    // A client that ended early says why in its report.
    let answered = client.wait_for_replies(REPLIES_AFTER);
    let client = client.end().context("the client noticed")?;
    answered?;
    ensure!(
        !task::is_alive(redis.pid()),
        "redis still runs on the source"
    );
    ensure!(
        task::is_alive(migration.pid),
        "redis does not run on the destination"
    );
    print!("{}", render(&migration, &client));
    let record = DemoRecord {
        memory_mib: options.memory,
        total_us: migration.total.as_micros() as u64,
        client: &client,
        source: &migration.source,
        destination: &migration.destination,
    };
    options
        .json
        .as_ref()
        .map_or(Ok(()), |path| write_json(path, &record))
}

fn render(migration: &Migration, client: &ClientReport) -> String {
    let mut table = Table::default();
    phases(&mut table, migration);
    table.gap();
    outcome(&mut table, migration);
    table.gap();
    clients_view(&mut table, client);
    format!(
        "\n{}\nEvery key is as it was written, on the same TCP connection.\n",
        table.render()
    )
}

fn phases(table: &mut Table, migration: &Migration) {
    table.row(["phase", "source began", "took", "destination began", "took"]);
    for phase in &migration.source.phases {
        let other = migration
            .destination
            .phases
            .iter()
            .find(|other| other.name == phase.name);
        let (at, took) = other.map_or(("-".to_owned(), "-".to_owned()), |other| {
            (ms(other.at_us), ms(other.took_us))
        });
        table.row([
            &phase.name,
            &ms(phase.at_us),
            &ms(phase.took_us),
            &at,
            &took,
        ]);
    }
}

fn outcome(table: &mut Table, migration: &Migration) {
    let (source, destination) = (&migration.source, &migration.destination);
    let latency = destination.faults.latency_us;
    let bytes = source.wire_bytes;
    table.row([
        "cutover (freeze to first instruction)",
        &ms(source.cutover_us),
    ]);
    table.row(["total", &ms(migration.total.as_micros() as u64)]);
    table.row([
        "faults served from the source",
        &destination.faults.remote.to_string(),
    ]);
    table.row(["fault latency p50", &format!("{} us", latency.p50)]);
    table.row(["fault latency p99", &format!("{} us", latency.p99)]);
    table.row([
        "pages left behind at the freeze",
        &source.pages.lazy.to_string(),
    ]);
    table.row(["pages pushed", &source.pages.pushed.to_string()]);
    table.row(["pages sent for faults", &source.pages.demanded.to_string()]);
    table.row([
        "shared memory, moved while frozen",
        &mib(source.shared_bytes),
    ]);
    table.row(["zero pages, not sent", &source.pages.zero.to_string()]);
    table.row(["sent on the bulk connection", &mib(bytes.bulk_tx)]);
    table.row(["sent on the fault connection", &mib(bytes.fault_tx)]);
}

fn clients_view(table: &mut Table, client: &ClientReport) {
    table.row([
        "client's longest gap",
        &ms(client.times.longest_gap.as_micros() as u64),
    ]);
    table.row(["GETs answered and compared", &client.gets.to_string()]);
    table.row(["SETs answered", &client.sets.to_string()]);
    table.row(["keys compared in the end", &client.keys.to_string()]);
    table.row(["bytes compared in the end", &mib(client.value_bytes)]);
}
