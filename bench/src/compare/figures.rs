//! The figures that are compared, each by its name, its unit and what it is read from.

use super::run::Run;

/// One figure of a run.
#[derive(Debug, Clone, Copy)]
pub struct Figure {
    /// The key in JSON.
    pub key: &'static str,
    /// The heading in tables.
    pub title: &'static str,
    /// The unit.
    pub unit: &'static str,
    /// How to read it.
    pub get: fn(&Run) -> Option<f64>,
}

const fn figure(
    key: &'static str,
    title: &'static str,
    unit: &'static str,
    get: fn(&Run) -> Option<f64>,
) -> Figure {
    Figure {
        key,
        title,
        unit,
        get,
    }
}

/// All of them, in the order of tables.
pub const FIGURES: [Figure; 18] = [
    figure("cutover", "cutover", "ms", |run| Some(run.cutover_ms)),
    figure("client_gap", "client's longest gap", "ms", |run| {
        run.client_gap_ms
    }),
    figure("brownout", "brownout", "ms", |run| run.brownout_ms),
    figure("total", "total time", "ms", |run| Some(run.total_ms)),
    figure("bulk", "memory, after the cutover", "MiB/s", |run| {
        run.bulk_mib_s
    }),
    figure("wire_rate", "on the wire meanwhile", "MiB/s", |run| {
        run.wire_mib_s
    }),
    figure("wire", "wire bytes / resident", "", |run| {
        Some(run.wire_over_resident)
    }),
    figure("p50", "wait p50", "us", |run| Some(run.waits?.p50_us)),
    figure("p90", "wait p90", "us", |run| Some(run.waits?.p90_us)),
    figure("p99", "wait p99", "us", |run| Some(run.waits?.p99_us)),
    figure("p999", "wait p99.9", "us", |run| Some(run.waits?.p999_us)),
    figure("waits", "touches that waited", "%", |run| {
        run.network_faults_percent
    }),
    figure("touches", "touches per second", "", |run| run.touches_per_s),
    figure("cpu", "CPU per GiB, both", "s", |run| {
        Some(run.per_gib(run.cpu_s))
    }),
    figure("source_cpu", "of it seen on the source", "s", |run| {
        Some(run.per_gib(run.source.cpu_s))
    }),
    figure(
        "destination_cpu",
        "of it seen on the destination",
        "s",
        |run| Some(run.per_gib(run.destination.cpu_s)),
    ),
    figure(
        "source_rss",
        "peak RSS, source, with helpers",
        "MiB",
        |run| Some(run.source.peak_rss_mib),
    ),
    figure(
        "destination_rss",
        "peak RSS, destination, with helpers",
        "MiB",
        |run| Some(run.destination.peak_rss_mib),
    ),
];
