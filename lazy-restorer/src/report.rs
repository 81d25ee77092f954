//! The record of one migration as the destination saw it (`--json`).

use std::fs;
use std::io;
use std::path::Path;

use common::exit::SessionError;
use common::record::Phase;
use serde::Serialize;

use crate::blocktime::LatencySummary;
use crate::files::PassCounts;
use crate::huge::HugeCounts;
use crate::memory::{Memory, PageCounts};

/// One JSON object per migration.
#[derive(Debug, Serialize)]
pub struct Record {
    /// Always `lazy-restorer`.
    pub role: &'static str,
    /// The session's name.
    pub session: String,
    /// `complete`, or how the migration ended.
    pub outcome: String,
    /// What failed.
    pub error: Option<String>,
    /// Phases that ended, in order.
    pub phases: Vec<Phase>,
    /// When CRIU said that the tasks run.
    pub resumed_at_unix_us: u64,
    /// What faults cost.
    pub faults: Faults,
    /// What came.
    pub pages: PageCounts,
    /// What the kernel took each time to put a run of at most 16 pages in place. Much more than a microsecond a page says that
    /// the host is short of memory: a virtual one may have to ask its hypervisor for each page.
    pub install_us: LatencySummary,
    /// What was made huge again.
    pub huge_pages: HugeCounts,
    /// How files came.
    pub files: FilesCounts,
    /// Length of the migration.
    pub total_us: u64,
}

/// The two passes of files.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct FilesCounts {
    /// While the workload ran on the source.
    pub first: PassCounts,
    /// While it was frozen.
    pub last: PassCounts,
}

/// Page faults of the workload.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Faults {
    /// Answered by the source.
    pub remote: u64,
    /// On pages without content, answered here.
    pub zero: u64,
    /// From reading the fault to the page being in place.
    pub latency_us: LatencySummary,
}

impl Default for Record {
    fn default() -> Self {
        Record {
            role: "lazy-restorer",
            session: String::new(),
            outcome: String::new(),
            error: None,
            phases: Vec::new(),
            resumed_at_unix_us: 0,
            faults: Faults::default(),
            pages: PageCounts::default(),
            install_us: LatencySummary::default(),
            huge_pages: HugeCounts::default(),
            files: FilesCounts::default(),
            total_us: 0,
        }
    }
}

impl Record {
    /// Notes what the memory counted.
    pub fn count(&mut self, memory: &Memory) {
        let blocktime = memory.blocktime();
        self.pages = memory.counts();
        self.install_us = memory.installs().summary();
        self.faults = Faults {
            remote: blocktime.count(),
            zero: memory.zero_faults(),
            latency_us: blocktime.summary(),
        };
    }

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

    /// Writes the record as one line.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let mut line = serde_json::to_string(self)?;
        line.push('\n');
        fs::write(path, line)
    }
}
