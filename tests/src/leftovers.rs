//! What a migration may leave behind: the workload on one host, and nothing else anywhere.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;

use crate::host::Host;
use crate::rig::Rig;
use crate::wait::wait_until;
use crate::{namespace, task};

/// The directory of session files below `/run`.
const SESSIONS: &str = "postcopy";

/// The kernel takes a moment to bury a killed process.
const BURIAL: Duration = Duration::from_secs(10);

/// The state of both hosts before something is done to them.
#[derive(Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Whose children come and go and are not looked at.
    forking: Option<Pid>,
    source: HostState,
    destination: HostState,
    mounts: Vec<String>,
    run: BTreeSet<String>,
    staging: BTreeSet<String>,
}

#[derive(Debug, PartialEq, Eq)]
struct HostState {
    processes: BTreeSet<i32>,
    filter_rules: String,
    addresses: String,
}

impl HostState {
    fn of(host: &Host, forking: Option<Pid>) -> Result<Self> {
        let all = processes(host);
        // Looked for afterwards: a child that has ended since is none of those that stay.
        let children = forking.map_or_else(Vec::new, task::descendants);
        Ok(Self {
            processes: all
                .into_iter()
                .filter(|pid| forking.is_none() || task::is_alive(*pid))
                .filter(|pid| !children.contains(pid))
                .map(Pid::as_raw)
                .collect(),
            filter_rules: host.filter_rules()?,
            addresses: host.shell("ip -o addr show scope global | awk '{print $2, $4}' | sort")?,
        })
    }
}

fn processes(host: &Host) -> Vec<Pid> {
    let all = task::in_network_namespace(&namespace::path(host.namespace()));
    all.into_iter().filter(|pid| task::is_alive(*pid)).collect()
}

fn files_below(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let below = |path: PathBuf| match path.is_dir() {
        true => files_below(&path),
        false => vec![path.display().to_string()],
    };
    entries.flat_map(|entry| below(entry.path())).collect()
}

impl Snapshot {
    /// Looks at both hosts.
    pub fn take(rig: &Rig) -> Result<Self> {
        Self::take_all(rig, None)
    }

    /// Looks at both hosts, but not at the processes that `workload` starts, since it does so all the time.
    pub fn take_beside(rig: &Rig, workload: Pid) -> Result<Self> {
        Self::take_all(rig, Some(workload))
    }

    fn take_all(rig: &Rig, forking: Option<Pid>) -> Result<Self> {
        let mounts = fs::read_to_string("/proc/thread-self/mounts").context("no list of mounts")?;
        let run = fs::read_dir("/run").context("cannot list /run")?;
        Ok(Self {
            forking,
            source: HostState::of(&rig.source, forking)?,
            destination: HostState::of(&rig.destination, forking)?,
            mounts: mounts.lines().map(str::to_owned).collect(),
            // CRIU's knowledge of the kernel is meant to stay, and so may the directory of session files, but none of them.
            run: run
                .flatten()
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .filter(|name| !["criu.kdat", "xtables.lock", SESSIONS].contains(&name.as_str()))
                .chain(files_below(&Path::new("/run").join(SESSIONS)))
                .collect(),
            staging: ["/dev/shm", "/tmp"]
                .into_iter()
                .flat_map(staging_directories)
                .collect(),
        })
    }

    /// After a migration that was given up: both hosts must be as they were, and nothing frozen.
    pub fn assert_restored(&self, rig: &Rig) -> Result<()> {
        let look = || Self::take_all(rig, self.forking);
        let unchanged = || look().is_ok_and(|now| now == *self);
        let waited = wait_until(BURIAL, "both hosts to be as before", unchanged);
        waited.with_context(|| format!("before: {self:#?}\nnow: {:#?}", look()))?;
        assert_nothing_frozen(rig)?;
        assert_no_files(rig)
    }
}

/// After a migration that succeeded: nothing on the source, and on the destination the workload under its init.
pub fn assert_moved(rig: &Rig, root: Pid) -> Result<()> {
    let gone = || processes(&rig.source).is_empty();
    wait_until(BURIAL, "the source to be empty", gone)
        .with_context(|| format!("on the source: {}", names(&processes(&rig.source))))?;
    ensure!(
        task::is_alive(root),
        "the workload's root (PID {root}) does not run on the destination"
    );
    let home = task::parent(root)
        .filter(|parent| processes(&rig.destination).contains(parent))
        .unwrap_or(root);
    let of_workload: BTreeSet<Pid> = task::descendants(home).into_iter().chain([home]).collect();
    let strangers = || -> Vec<Pid> {
        processes(&rig.destination)
            .into_iter()
            .filter(|pid| !of_workload.contains(pid) && !is_child_of(*pid, home))
            .collect()
    };
    wait_until(BURIAL, "the destination to hold the workload alone", || {
        strangers().is_empty()
    })
    .with_context(|| format!("on the destination: {}", names(&strangers())))?;
    for host in [&rig.source, &rig.destination] {
        let rules = host.filter_rules()?;
        ensure!(rules.is_empty(), "{host} still filters packets: {rules}");
    }
    assert_nothing_frozen(rig)?;
    assert_no_files(rig)
}

/// A workload that forks has new processes at any moment.
fn is_child_of(pid: Pid, home: Pid) -> bool {
    !task::is_alive(pid) || task::descendants(home).contains(&pid)
}

fn assert_nothing_frozen(rig: &Rig) -> Result<()> {
    for host in [&rig.source, &rig.destination] {
        let frozen: Vec<Pid> = processes(host)
            .into_iter()
            .filter(|pid| task::is_frozen(*pid))
            .collect();
        ensure!(frozen.is_empty(), "frozen on {host}: {}", names(&frozen));
    }
    Ok(())
}

/// What the programs may have made in a place that is not the rig's own.
fn staging_directories(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path().display().to_string())
        .filter(|path| path.contains("/postcopy-") && !path.contains("/postcopy-rig-"))
        .collect()
}

fn assert_no_files(rig: &Rig) -> Result<()> {
    for side in ["page-server-tmp", "lazy-restorer-tmp"] {
        let Ok(entries) = fs::read_dir(rig.folder().join(side)) else {
            continue;
        };
        let left: Vec<_> = entries
            .flatten()
            .map(|entry| entry.path().display().to_string())
            .collect();
        ensure!(
            left.is_empty(),
            "temporary files were left: {}",
            left.join(", ")
        );
    }
    Ok(())
}

fn names(pids: &[Pid]) -> String {
    pids.iter()
        .map(|pid| format!("{} ({pid})", task::name(*pid)))
        .collect::<Vec<_>>()
        .join(", ")
}
