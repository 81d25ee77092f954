//! What `bench targets` measures, part by part.

use anyhow::Result;
use tests::path::PathSpec;

use super::{Measure, Part, VerdictOptions};
use crate::compare::CompareOptions;
use crate::fault::FaultOptions;
use crate::files::FilesOptions;
use crate::flood::FloodOptions;
use crate::peer::Peer;
use crate::replay::ReplayOptions;
use crate::workload::Kind;

/// All of them.
pub fn parts(options: &VerdictOptions) -> Result<Vec<Part>> {
    let near = &[
        "fault p50, loaded over idle",
        "fault p99, loaded over idle",
        "bulk with faults over bulk without",
    ];
    let bare = &[
        "fault p50, loaded over idle",
        "fault p99, loaded",
        "bulk with faults over bulk without",
        "fault p50, idle, over QUIC alone",
        "bulk over",
    ];
    let fault = |paths: &[&str], only, rate, memory| -> Result<FaultOptions> {
        Ok(FaultOptions {
            memory,
            repeat: options.repeat,
            rate,
            idle_touches: 2000,
            path: parse(paths)?,
            scan: false,
            only,
            udp_payload: None,
            json: None,
            out: None,
        })
    };
    let compare = |paths: &[&str], peers: &[Peer], kind, memory, repeat| -> Result<Measure> {
        Ok(Measure::Compare(Box::new(CompareOptions {
            memory,
            repeat,
            rate: 4000,
            path: parse(paths)?,
            peer: peers.to_vec(),
            workload: vec![kind],
            udp_payload: None,
            json: None,
            out: None,
        })))
    };
    let (memory, ours) = (options.memory, Some(Peer::Ours));
    let part = |name, measure, counts| Part {
        name,
        measure,
        counts,
    };
    Ok(vec![
        part(
            "faults beside bulk, bare",
            // While so much comes at these rates there are a thousand waits: a 99th percentile of fewer is two or three.
            Measure::Fault(fault(&["veth"], None, 1000, 2 * memory)?),
            bare,
        ),
        part(
            "faults beside bulk, large packets",
            Measure::Fault(FaultOptions {
                udp_payload: Some(LARGE_PAYLOAD),
                ..fault(&["veth,mtu=9000"], ours, 1000, 4 * memory)?
            }),
            near,
        ),
        part(
            "faults beside bulk, 1 Gbit/s",
            Measure::Fault(fault(&["1g"], ours, 1000, memory)?),
            near,
        ),
        part(
            "touches without a pause",
            Measure::Fault(fault(&["veth"], ours, 0, memory)?),
            &["network faults"],
        ),
        part(
            "faults all the time, 10 ms",
            // CRIU moves 3 MiB in a second there.
            Measure::Fault(fault(&["rtt=10ms,rate=1g"], None, 0, memory.min(64))?),
            &["bulk with faults over CRIU's"],
        ),
        part(
            "the rate at 30 ms",
            compare(
                &["rate=1g,emulated", "rtt=30ms,rate=1g"],
                &[Peer::Ours],
                Kind::Still,
                memory,
                options.repeat,
            )?,
            &["bulk, "],
        ),
        part(
            "redis, 1 Gbit/s",
            compare(
                &["1g"],
                &[Peer::Criu, Peer::Ours],
                Kind::Redis,
                2 * memory,
                options.repeat,
            )?,
            &["brownout", "wire bytes", "peak RSS"],
        ),
        part(
            "redis, bare",
            compare(
                &["veth"],
                &[Peer::CriuTls, Peer::Ours, Peer::OursPlain],
                Kind::Redis,
                memory,
                options.repeat,
            )?,
            &["CPU", "total, compression", "peak RSS"],
        ),
        part(
            "redis, 10 Gbit/s",
            compare(
                &["10g"],
                &[Peer::Ours, Peer::OursPlain],
                Kind::Redis,
                memory,
                options.repeat,
            )?,
            &["total, compression"],
        ),
        part(
            "a flood of strangers",
            Measure::Flood(FloodOptions {
                memory: memory.min(256),
                repeat: options.repeat,
                strangers: 8,
                json: None,
                out: None,
            }),
            &["total, flooded"],
        ),
        part(
            "the order is known, 1 Gbit/s",
            Measure::Replay(ReplayOptions {
                memory: memory.min(64),
                rate: 10_000,
                repeat: options.repeat,
                path: "1g".parse()?,
                out: None,
            }),
            &["network faults with --replay"],
        ),
        part(
            "files that do not change",
            Measure::Files(FilesOptions {
                repeat: options.repeat,
                content: vec![64, 1024],
                files: vec![100, 10_000],
                out: None,
            }),
            &["cutover, more"],
        ),
        part(
            "the largest",
            compare(&["veth"], &[Peer::Ours], Kind::Still, options.largest, 1)?,
            &["peak RSS"],
        ),
    ])
}

/// UDP payload for packets of 9000 bytes, the largest our programs send.
const LARGE_PAYLOAD: u16 = 6500;

fn parse(paths: &[&str]) -> Result<Vec<PathSpec>> {
    let specs = paths.iter().map(|path| path.parse::<PathSpec>());
    specs
        .map(|spec| spec.map_err(|error| anyhow::anyhow!("{error}")))
        .collect()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn every_part_can_be_measured_and_has_a_target() {
        let options = VerdictOptions {
            repeat: 1,
            memory: 64,
            largest: 64,
            only: String::new(),
            json: None,
            out: None,
        };
        let parts = parts(&options).expect("paths that exist");
        assert!(parts.iter().all(|part| !part.counts.is_empty()));
    }
}
