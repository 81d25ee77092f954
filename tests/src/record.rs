//! The records both programs write with `--json`, as far as tests and benchmarks read them.

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// One phase of a migration.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Phase {
    /// The phase's name.
    pub name: String,
    /// When it began, from the session's start.
    pub at_us: u64,
    /// How long it took.
    pub took_us: u64,
}

/// Pages by what became of them.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Pages {
    /// Pages left out of the skeleton.
    pub lazy: u64,
    /// Of these, sent in the background.
    pub pushed: u64,
    /// Of these, sent for a fault.
    pub demanded: u64,
    /// Of these, all zeros.
    pub zero: u64,
    /// Of these, given up by the workload before they arrived.
    pub removed: u64,
}

/// How pushed pages were carried, as the source counts it.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Pushed {
    /// Bytes of the pages.
    pub page_bytes: u64,
    /// Bytes of their frames.
    pub frame_bytes: u64,
    /// Frames.
    pub runs: u64,
    /// Of these, frames with compressed pages.
    pub compressed_runs: u64,
    /// Pages that equal one pushed before.
    pub referred: u64,
}

/// Huge pages, as the destination counts them.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct HugePages {
    /// Huge on the source.
    pub wanted: u64,
    /// Huge on the destination, too.
    pub made: u64,
}

/// Bytes on the wire, as the source counts them.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct WireBytes {
    /// Sent on the fault connection.
    pub fault_tx: u64,
    /// Received on the fault connection.
    pub fault_rx: u64,
    /// Sent on the bulk connection.
    pub bulk_tx: u64,
    /// Received on the bulk connection.
    pub bulk_rx: u64,
}

/// How long threads waited for pages, or what else took how long. In microseconds.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Latency {
    /// Half of them took no longer than this.
    pub p50: u64,
    /// Nine of ten.
    pub p90: u64,
    /// 99 of 100.
    pub p99: u64,
    /// 999 of 1000.
    pub p999: u64,
    /// The slowest.
    pub max: u64,
}

/// Faults the destination resolved.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Faults {
    /// Resolved with a page from the source.
    pub remote: u64,
    /// Resolved with zeros.
    pub zero: u64,
    /// From fault to installed page.
    pub latency_us: Latency,
}

/// What the last look at the files of `--sync` was at, as the source counts it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LastLook {
    /// Trees that were watched.
    pub watched_trees: u64,
    /// Paths that were looked at in these.
    pub paths: u64,
    /// Trees that were looked at as a whole.
    pub whole_trees: u64,
    /// Why those were.
    pub reasons: Vec<String>,
}

/// What a pass of files did.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct FilesPass {
    /// How long it took.
    pub took_us: u64,
    /// Directories compared as a whole.
    pub trees: u64,
    /// Paths compared besides.
    pub paths: u64,
    /// Bytes of rsync's protocol that came.
    pub bytes: u64,
}

/// Files that came along, as the destination counts them.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Files {
    /// While the workload ran.
    pub first: FilesPass,
    /// While it was frozen.
    pub last: FilesPass,
}

/// The record of one side. Both sides' records share this form; what a side does not know stays at its default.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// `page-server` or `lazy-restorer`.
    pub role: String,
    /// The same on both sides.
    pub session: String,
    /// `complete`, `aborted`, ...
    pub outcome: String,
    /// The error line, if there was one.
    pub error: Option<String>,
    /// Phases in order.
    pub phases: Vec<Phase>,
    /// When the workload stopped.
    pub frozen_at_unix_us: u64,
    /// When it ran again.
    pub resumed_at_unix_us: u64,
    /// The time between the two.
    pub cutover_us: u64,
    /// Pages by fate.
    pub pages: Pages,
    /// What the kernel took to put runs of pages in place.
    pub install_us: Latency,
    /// Bytes of the skeleton, with everything that is not lazy in it.
    pub skeleton_bytes: u64,
    /// Huge pages asked for again.
    pub huge_pages: HugePages,
    /// Files that came along.
    pub files: Files,
    /// What the source looked at while the tree stood still.
    pub last_look: LastLook,
    /// Bytes of shared memory in it.
    pub shared_bytes: u64,
    /// How pushed pages were carried.
    pub push: Pushed,
    /// Bytes on the wire.
    pub wire_bytes: WireBytes,
    /// Faults resolved.
    pub faults: Faults,
    /// From the first word to the end of the session.
    pub total_us: u64,
}

impl Record {
    /// Reads the record at `path`.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("no record at {}", path.display()))?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} is no record: {text}", path.display()))
    }
}
