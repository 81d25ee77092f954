//! The targets a comparison is about: each only where it was set.

use std::time::Duration;

use tests::path::{Kind as PathKind, PathSpec};

use super::report::Comparison;
use crate::peer::Peer;
use crate::stats::Summary;
use crate::targets::{Bound, Target};
use crate::workload::Kind;

const GIGABIT: u64 = 1_000_000_000;
/// Compression does not pay above this, bit/s a core.
const PAYS_BELOW: u64 = 5 * GIGABIT;
/// From this round trip on CRIU's way to fetch one page range after the other is what bounds it.
const LONG: Duration = Duration::from_millis(10);
/// "No slower" is a ratio of 1; two medians of the same thing differ by as much as this on a machine where both hosts,
/// the workload and its client share the processors.
const NOISE: f64 = 0.05;

/// Those that apply here and were measured.
pub fn targets(table: &Comparison) -> Vec<Target> {
    let Ok(path) = table.point.path.parse::<PathSpec>() else {
        return Vec::new();
    };
    let mut targets = always(table);
    match table.point.workload {
        Kind::Redis | Kind::RedisZipf => targets.extend(of_redis(table, &path)),
        Kind::Touch => targets.extend(of_touches(table, &path)),
        Kind::Still => targets.extend(of_bulk(table, &path)),
        Kind::Scan => {}
    }
    targets.retain(Target::is_measured);
    targets
}

fn ours(table: &Comparison, key: &str) -> Option<Summary> {
    table.summary(key, Peer::Ours)
}

fn over(table: &Comparison, what: &str, key: &str, peer: Peer, bound: Bound) -> Target {
    Target::ratio(what, ours(table, key), table.summary(key, peer), bound)
}

fn always(table: &Comparison) -> Vec<Target> {
    let most = Bound::AtMost;
    let of = |what, key, peer, bound| over(table, what, key, peer, bound);
    vec![
        of("cutover over CRIU's", "cutover", Peer::Criu, most(1.0)),
        of("total over CRIU's", "total", Peer::Criu, most(1.0)),
        of(
            "CPU over that of CRIU with TLS",
            "cpu",
            Peer::CriuTls,
            most(1.0),
        ),
        Target::value(
            "peak RSS of page-server, MiB",
            ours(table, "source_rss"),
            most(64.0),
        ),
        Target::value(
            "peak RSS of lazy-restorer with its keeper, MiB",
            ours(table, "destination_rss"),
            most(64.0),
        ),
    ]
}

fn of_redis(table: &Comparison, path: &PathSpec) -> Vec<Target> {
    let most = Bound::AtMost;
    let mut targets = Vec::new();
    let is_near = path.rtt.is_zero() && path.loss == 0.0;
    if is_near && path.rate == Some(GIGABIT) {
        targets.push(over(
            table,
            "brownout over CRIU's",
            "brownout",
            Peer::Criu,
            most(1.0 / 3.0),
        ));
    }
    if path.rate.is_some_and(|rate| rate <= GIGABIT) {
        targets.push(Target::value(
            "wire bytes over resident bytes",
            ours(table, "wire"),
            most(0.5),
        ));
    }
    if path.rate.is_none_or(|rate| rate > PAYS_BELOW) {
        targets.push(over(
            table,
            "total, compression as it pays over none (1, 5 % noise)",
            "total",
            Peer::OursPlain,
            most(1.0 + NOISE),
        ));
    }
    targets
}

fn of_touches(table: &Comparison, path: &PathSpec) -> Vec<Target> {
    let mut targets = Vec::new();
    // At a fixed rate it says more about that rate.
    if table.point.rate == 0 {
        targets.push(Target::value(
            "touches that waited, percent",
            ours(table, "waits"),
            Bound::AtMost(21.0),
        ));
        if path.rtt >= LONG {
            targets.push(over(
                table,
                "touches per second over CRIU's",
                "touches",
                Peer::Criu,
                Bound::AtLeast(10.0),
            ));
        }
    }
    if path.kind() == PathKind::Bare {
        targets.push(over(
            table,
            "wait p99 over CRIU's",
            "p99",
            Peer::Criu,
            Bound::AtMost(0.2),
        ));
    }
    targets
}

fn of_bulk(table: &Comparison, path: &PathSpec) -> Vec<Target> {
    if path.kind() != PathKind::Bare {
        return Vec::new();
    }
    vec![over(
        table,
        "memory rate over CRIU's",
        "bulk",
        Peer::Criu,
        Bound::AtLeast(1.5),
    )]
}
