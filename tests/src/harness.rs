//! Runs end-to-end tests, each on a rig of its own.
//!
//! The standard harness knows no test that cannot run here: it would have to pass. This one lists such a test as
//! ignored and says why.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, anyhow};
use libtest_mimic::{Arguments, Failed, Trial};

use crate::rig::Rig;
use crate::{binaries, shell};

/// Lines of each log shown when a test fails.
const TAIL: usize = 40;

/// What a test needs of the machine.
#[derive(Debug, Clone, Copy)]
pub enum Need {
    /// Network namespaces and their tools, so root.
    Namespaces,
    /// A CRIU.
    Criu,
    /// PostgreSQL's server.
    Postgres,
    /// A program on `PATH`.
    Program(&'static str),
    /// Memory cgroups of version 1, which can refuse memory without killing anyone.
    MemoryCgroup,
    /// CPU cgroups of version 1 with quotas.
    CpuCgroup,
    /// Transparent huge pages, at least for who asks.
    HugePages,
}

/// What every migration of a workload needs.
pub const MIGRATION: &[Need] = &[Need::Namespaces, Need::Criu];
/// What a migration of redis needs.
pub const REDIS_MIGRATION: &[Need] = &[Need::Namespaces, Need::Criu, Need::Program("redis-server")];

/// What a migration of a container with redis needs.
pub const CONTAINER_MIGRATION: &[Need] = &[
    Need::Namespaces,
    Need::Criu,
    Need::Program("runc"),
    Need::Program("redis-server"),
];

impl Need {
    /// Why the machine does not meet the need.
    fn is_missing(self) -> Option<String> {
        match self {
            Self::Namespaces if !nix::unistd::geteuid().is_root() => Some("not root".to_owned()),
            Self::Namespaces => ["ip", "nsenter", "iptables", "nft", "arping", "setsid"]
                .into_iter()
                .find_map(missing_program),
            Self::Criu => binaries::criu().err().map(|error| error.to_string()),
            Self::Postgres if crate::postgres::programs().is_none() => {
                Some("PostgreSQL is not installed".to_owned())
            }
            Self::Postgres => missing_program("cc"),
            Self::Program(program) => missing_program(program),
            Self::MemoryCgroup => (!Path::new("/sys/fs/cgroup/memory/memory.oom_control").exists())
                .then(|| "no memory cgroup of version 1".to_owned()),
            Self::CpuCgroup => (!Path::new("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").exists())
                .then(|| "no CPU cgroup of version 1".to_owned()),
            Self::HugePages => {
                let enabled =
                    std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
                let none = !enabled.is_ok_and(|modes| !modes.contains("[never]"));
                none.then(|| "no transparent huge pages".to_owned())
            }
        }
    }
}

fn missing_program(program: &str) -> Option<String> {
    (!shell::is_installed(program)).then(|| format!("{program} is not installed"))
}

/// What a test does.
pub type Body = fn(&Rig) -> Result<()>;

/// One test.
#[derive(Debug)]
pub struct Test {
    /// Its name.
    pub name: &'static str,
    /// What it needs.
    pub needs: &'static [Need],
    /// What it does.
    pub body: Body,
}

/// The `main` of a test program.
pub fn main(tests: impl IntoIterator<Item = Test>) -> ExitCode {
    let arguments = Arguments::from_args();
    let trials = tests.into_iter().map(trial).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn trial(test: Test) -> Trial {
    let missing = test.needs.iter().find_map(|need| need.is_missing());
    if let Some(reason) = &missing {
        eprintln!("{}: skipped: {reason}", test.name);
    }
    Trial::test(test.name, move || run(&test)).with_ignored_flag(missing.is_some())
}

fn run(test: &Test) -> Result<(), Failed> {
    let rig = Rig::new().map_err(|error| Failed::from(format!("no rig: {error:#}")))?;
    let outcome = catch_unwind(AssertUnwindSafe(|| (test.body)(&rig)));
    let outcome = outcome.unwrap_or_else(|_| Err(anyhow!("panicked, see above")));
    outcome.map_err(|error| {
        show_logs(&rig.folder().join("logs"));
        Failed::from(format!("{error:#}"))
    })
}

/// Shows the ends of all logs in `folder`.
pub fn show_logs(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        if !lines.is_empty() {
            eprintln!("--- {} ---", path.file_name().unwrap_or_default().display());
            eprintln!("{}", lines[lines.len().saturating_sub(TAIL)..].join("\n"));
        }
    }
}
