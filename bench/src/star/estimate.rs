//! About how long a measurement takes: what was seen on two processors, to be told before it begins.

use std::time::Duration;

use tests::path::PathSpec;

use crate::compare::CompareOptions;
use crate::crowd::CrowdOptions;
use crate::fault::FaultOptions;
use crate::files::FilesOptions;
use crate::flood::FloodOptions;
use crate::peer::Peer;
use crate::replay::{self, ReplayOptions};
use crate::workload::Kind;

/// Making and removing hosts, starting programs, and looking on for a while after a move.
const EACH_S: f64 = 4.0;
/// Probing a path.
const PROBE_S: f64 = 4.0;
/// Seconds for each MiB of redis: filling it, and comparing every value in the end.
const REDIS_S: f64 = 0.02;
/// ... of a toucher.
const TOUCHER_S: f64 = 0.006;
/// Seconds for each MiB of files: making it, sending it, and removing both.
const CONTENT_S: f64 = 0.01;
/// ... for each of them, however short.
const FILE_S: f64 = 0.001;
/// MiB that CRIU fetches in a round trip while somebody waits for pages.
const CRIU_TRIP_MIB: f64 = 0.03;
/// Bytes of a TCP segment.
const SEGMENT: f64 = 1448.0;

/// Of `bench compare`.
pub fn moves(options: &CompareOptions) -> Duration {
    let mut seconds = 0.0;
    for path in &options.path {
        seconds += PROBE_S;
        for kind in &options.workload {
            for peer in &options.peer {
                let one = one(*peer, *kind, path, options.memory as f64);
                seconds += one * options.repeat as f64;
            }
        }
    }
    Duration::from_secs_f64(seconds)
}

/// Of `bench fault`: five kinds of runs, and QUIC alone.
pub fn waits(options: &FaultOptions) -> Duration {
    let mib = options.memory as f64;
    let one =
        |path| PROBE_S + 6.0 * options.repeat as f64 * one(Peer::Ours, Kind::Touch, path, mib);
    Duration::from_secs_f64(options.path.iter().map(one).sum())
}

/// Of `bench crowd`.
pub fn crowd(options: &CrowdOptions) -> Duration {
    let ways = |peer: &Peer| if peer.is_ours() { 2.0 } else { 1.0 };
    let moves: f64 = options.peer.iter().map(ways).sum();
    let one = EACH_S + 2.0 + options.memory as f64 * REDIS_S;
    let moves = moves * (options.server.len() * options.repeat) as f64;
    Duration::from_secs_f64(PROBE_S + moves * one)
}

/// Of `bench replay`: first the order is recorded while each touch waits, then two moves are made.
pub fn replay(options: &ReplayOptions) -> Duration {
    let mib = options.memory as f64;
    let moves = 3.0 * one(Peer::Ours, Kind::Touch, &options.path, mib);
    let touching = 2.0 * replay::touches(options.memory) as f64 / options.rate.max(1) as f64;
    let recording = replay::recording(options).as_secs_f64();
    let each = moves + touching + recording;
    Duration::from_secs_f64(PROBE_S + each * options.repeat as f64)
}

/// Of `bench flood`.
pub fn flood(options: &FloodOptions) -> Duration {
    let path = PathSpec::default();
    let one = one(Peer::Ours, Kind::Still, &path, options.memory as f64);
    Duration::from_secs_f64(2.0 * one * options.repeat as f64)
}

/// Of `bench files`: once without any, and with each tree.
pub fn files(options: &FilesOptions) -> Duration {
    let content: u64 = options.content.iter().sum();
    let number: u64 = options.files.iter().sum();
    let trees = content as f64 * CONTENT_S + number as f64 * FILE_S;
    let moves = (1 + options.content.len() + options.files.len()) as f64 * EACH_S;
    Duration::from_secs_f64((moves + trees) * options.repeat as f64)
}

/// Seconds of one move and what belongs to it.
fn one(peer: Peer, kind: Kind, path: &PathSpec, mib: f64) -> f64 {
    let prepared = match kind {
        Kind::Redis | Kind::RedisZipf => REDIS_S,
        Kind::Touch | Kind::Scan | Kind::Still => TOUCHER_S,
    };
    EACH_S + mib * prepared + mib / rate(peer, kind, path)
}

/// MiB per second.
fn rate(peer: Peer, kind: Kind, path: &PathSpec) -> f64 {
    let processors: f64 = match peer {
        Peer::CriuTls => 120.0,
        _ => 300.0,
    };
    let link = path.rate.map_or(f64::MAX, |rate| rate as f64 / 8.0 / 1.1e6);
    let rtt = path.rtt.as_secs_f64();
    let is_ours = peer.is_ours();
    let by_loss = match path.loss > 0.0 && !is_ours {
        true => 1.2 * SEGMENT / rtt.max(1e-3) / path.loss.sqrt() / f64::from(1 << 20),
        false => f64::MAX,
    };
    let fetches = matches!(peer, Peer::Criu | Peer::CriuTls) && kind != Kind::Still;
    let by_trips = match fetches && rtt > 0.0 {
        true => CRIU_TRIP_MIB / rtt,
        false => f64::MAX,
    };
    processors.min(link).min(by_loss).min(by_trips)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn distance_costs_criu_more_than_ours() {
        let path = |text: &str| text.parse::<PathSpec>().expect("a path");
        let (near, far) = (path("1g"), path("rtt=50ms,rate=1g"));
        let of = |peer, path| one(peer, Kind::Redis, path, 64.0);
        assert!(of(Peer::Criu, &far) > 5.0 * of(Peer::Criu, &near));
        assert!(of(Peer::Ours, &far) < 2.0 * of(Peer::Ours, &near));
    }
}
