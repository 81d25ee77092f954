//! The record of one migration as the source saw it (`--json`).

use std::fs;
use std::io;
use std::path::Path;

use common::exit::SessionError;
use common::record::Phase;
use quinn::Connection;
use serde::Serialize;

use crate::book::{Saved, SentCounts};

/// One JSON object per migration.
#[derive(Debug, Serialize)]
pub struct Record {
    /// Always `page-server`.
    pub role: &'static str,
    /// The session's name.
    pub session: String,
    /// `complete`, or the state the migration ended in.
    pub outcome: String,
    /// What failed.
    pub error: Option<String>,
    /// Phases that ended, in order.
    pub phases: Vec<Phase>,
    /// When the first task stood still.
    pub frozen_at_unix_us: u64,
    /// When the destination said that the workload runs.
    pub resumed_at_unix_us: u64,
    /// From the first to the second, by this host's clock.
    pub cutover_us: u64,
    /// What was sent.
    pub pages: SentCounts,
    /// Bytes of the skeleton: CRIU's images, with all memory that cannot be lazy (shared, locked, changed file pages).
    pub skeleton_bytes: u64,
    /// Bytes of shared memory in it (anonymous shared, memfd, System V), which went while the tree stood still.
    pub shared_bytes: u64,
    /// What the last look at the files of `--sync` was at, while the tree stood still.
    pub last_look: LastLook,
    /// How pushed pages were carried.
    pub push: Saved,
    /// Bytes of UDP payload.
    pub wire_bytes: WireBytes,
    /// Length of the migration.
    pub total_us: u64,
}

/// What was looked at in all trees of `--sync` together.
#[derive(Clone, Debug, Default, Serialize)]
pub struct LastLook {
    /// Trees that were watched: of these only what may have changed.
    pub watched_trees: u64,
    /// That is so many paths.
    pub paths: u64,
    /// Trees that were looked at as a whole.
    pub whole_trees: u64,
    /// Why those were.
    pub reasons: Vec<String>,
}

/// Bytes on the wire by connection and direction.
#[derive(Clone, Copy, Debug, Default, Serialize)]
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

impl Default for Record {
    fn default() -> Self {
        Record {
            role: "page-server",
            session: String::new(),
            outcome: String::new(),
            error: None,
            phases: Vec::new(),
            frozen_at_unix_us: 0,
            resumed_at_unix_us: 0,
            cutover_us: 0,
            pages: SentCounts::default(),
            skeleton_bytes: 0,
            shared_bytes: 0,
            last_look: LastLook::default(),
            push: Saved::default(),
            wire_bytes: WireBytes::default(),
            total_us: 0,
        }
    }
}

impl Record {
    /// Notes how the migration ended.
    pub fn conclude(&mut self, result: &Result<(), SessionError>) {
        match result {
            Ok(()) => self.outcome = String::from("complete"),
            Err(error) => {
                self.outcome = String::from(match error.state.source_may_thaw() {
                    true => "aborted",
                    false => "lost",
                });
                self.error = Some(error.to_string());
            }
        }
    }

    /// Writes records, each as one line.
    pub fn write_all(records: &[Self], path: &Path) -> io::Result<()> {
        let mut lines = String::new();
        for record in records {
            lines.push_str(&serde_json::to_string(record)?);
            lines.push('\n');
        }
        fs::write(path, lines)
    }
}

impl WireBytes {
    /// What the two connections carried.
    pub fn of(fault: &Connection, bulk: &Connection) -> Self {
        let (fault, bulk) = (fault.stats(), bulk.stats());
        WireBytes {
            fault_tx: fault.udp_tx.bytes,
            fault_rx: fault.udp_rx.bytes,
            bulk_tx: bulk.udp_tx.bytes,
            bulk_rx: bulk.udp_rx.bytes,
        }
    }
}
