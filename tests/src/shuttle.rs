//! A workload that moves there and back, and what the two hosts look like after each move.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::sys::statvfs::statvfs;
use nix::unistd::Pid;

use crate::host::Host;
use crate::leftovers::assert_moved;
use crate::pair::PairPlan;
use crate::rig::Rig;
use crate::{namespace, shell, task};

/// Moves that a test makes when nobody asks for more.
const MOVES: usize = 4;
/// Moves after which what comes once, such as CRIU's knowledge of the kernel, has come.
const FIRST: usize = 2;
/// A workload's resident memory goes up and down with what it does, and the torture workload's grows by itself for a
/// minute or so: it is compared with what it was half-way, when there were so many moves.
const MOVES_FOR_MEMORY: usize = 20;
/// A leak goes up only.
const GROWTH: f64 = 1.25;

/// How many moves are wanted: `REPEAT`, else few. An even number ends where it began.
pub fn moves() -> Result<usize> {
    let Ok(text) = std::env::var("REPEAT") else {
        return Ok(MOVES);
    };
    let number: usize = text.parse().context("REPEAT is no number")?;
    ensure!(
        number > FIRST && number.is_multiple_of(2),
        "REPEAT must be even and more than {FIRST}"
    );
    Ok(number)
}

/// Everything a move could leave behind, counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footprint {
    processes: usize,
    descriptors: usize,
    namespaces: usize,
    mounts: usize,
    nft_tables: usize,
    filter_rules: usize,
    udp_sockets: usize,
    files: usize,
    tmpfs_kib: u64,
}

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} processes, {} descriptors, {} namespaces, {} mounts, {} nft tables, {} filter rules, {} UDP sockets, \
             {} files and {} KiB on tmpfs",
            self.processes,
            self.descriptors,
            self.namespaces,
            self.mounts,
            self.nft_tables,
            self.filter_rules,
            self.udp_sockets,
            self.files,
            self.tmpfs_kib
        )
    }
}

/// A workload on its way there and back.
#[derive(Debug)]
pub struct Shuttle {
    rig: Rig,
    plan: PairPlan,
    /// The root as its own PID namespace numbers it.
    inner: Pid,
    /// The root as this machine numbers it, once it was moved.
    root: Pid,
    /// What was seen after each move, and the resident memory of the root in KiB.
    seen: Vec<(Footprint, u64)>,
}

impl Shuttle {
    /// A workload whose root is `root`, on the source of `rig`.
    pub fn new(rig: Rig, root: Pid) -> Result<Self> {
        Ok(Self {
            plan: PairPlan::new(&rig)?,
            rig,
            inner: root,
            root,
            seen: Vec::new(),
        })
    }

    /// Moves it to the other host, waits for `sign` of its life, and looks at what is there then.
    pub fn go(&mut self, sign: impl Fn() -> Result<()>) -> Result<()> {
        let holder = self.plan.source_home.map(|home| hold(&self.rig, home));
        let holder = holder.transpose()?;
        let migration = self
            .plan
            .migrate(&self.rig, self.inner)
            .with_context(|| format!("move {}", self.seen.len() + 1))?;
        if let Some(holder) = holder {
            kill(holder, Signal::SIGKILL).context("the holder is gone")?;
        }
        sign()?;
        assert_moved(&self.rig, migration.pid)?;
        self.root = migration.pid;
        self.plan.source_home = task::parent(self.root);
        self.rig.turn_round();
        self.seen.push((self.look()?, resident_kib(self.root)?));
        Ok(())
    }

    /// What was seen after the last move.
    pub fn looks_like(&self) -> String {
        self.seen.last().map_or_else(String::new, |(seen, rss)| {
            format!("{seen}; the workload has {rss} KiB")
        })
    }

    /// After the last move everything is as it was after the first ones.
    pub fn assert_nothing_grew(&self) -> Result<()> {
        let (first, _) = self.seen.get(FIRST - 1).context("too few moves")?;
        let (last, last_kib) = self.seen.last().context("no move")?;
        ensure!(
            first == last,
            "after {FIRST} moves: {first}; after {}: {last}",
            self.seen.len()
        );
        let (_, half_kib) = &self.seen[self.seen.len() / 2];
        ensure!(
            self.seen.len() < MOVES_FOR_MEMORY || *last_kib as f64 <= *half_kib as f64 * GROWTH,
            "the workload has grown from {half_kib} to {last_kib} KiB since it was half-way"
        );
        Ok(())
    }

    fn look(&self) -> Result<Footprint> {
        let hosts = [&self.rig.source, &self.rig.destination];
        let mut processes: Vec<Pid> = hosts.into_iter().flat_map(processes).collect();
        // A workload that forks has other children at each look.
        let forked = task::descendants(self.root);
        processes.retain(|pid| !forked.contains(pid) && task::is_alive(*pid));
        let tables: usize = sum(hosts, |host| host.shell("nft list tables"))?;
        let rules: usize = sum(hosts, Host::filter_rules)?;
        let sockets = sum(hosts, |host| host.shell("tail -n +2 /proc/net/udp"))?;
        let folders = ["/run", "/dev/shm"];
        let of_rig =
            ["page-server-tmp", "lazy-restorer-tmp"].map(|name| self.rig.folder().join(name));
        let tmpfs = folders.iter().map(Path::new);
        let used: Result<Vec<u64>> = folders.iter().map(|path| used_kib(path)).collect();
        Ok(Footprint {
            descriptors: processes
                .iter()
                .map(|pid| entries(&format!("/proc/{pid}/fd")))
                .sum(),
            namespaces: namespaces(&processes),
            mounts: lines("/proc/thread-self/mounts")
                + lines(&format!("/proc/{}/mounts", self.root)),
            processes: processes.len(),
            nft_tables: tables,
            filter_rules: rules,
            udp_sockets: sockets,
            files: tmpfs
                .chain(of_rig.iter().map(std::path::PathBuf::as_path))
                .map(files_below)
                .sum(),
            tmpfs_kib: used?.iter().sum(),
        })
    }
}

/// A process that keeps the namespace of `home` when the tree has left it, so that `page-server`, which runs in there,
/// can come to its end. On a machine of its own a source has no such namespace.
fn hold(rig: &Rig, home: Pid) -> Result<Pid> {
    let mut command = rig.source.command("nsenter");
    command.args(["-t", &home.to_string(), "--pid", "--mount", "--"]);
    command.args(["sh", "-c", "sleep infinity >/dev/null 2>&1 & echo $!"]);
    let inner = shell::run(&mut command)?;
    let inner = inner.trim().parse().context("no PID of the holder")?;
    task::outer_pid(home, inner).context("the holder is not there")
}

fn processes(host: &Host) -> Vec<Pid> {
    task::in_network_namespace(&namespace::path(host.namespace()))
}

/// Lines of what `what` says of either host.
fn sum(hosts: [&Host; 2], what: impl Fn(&Host) -> Result<String>) -> Result<usize> {
    let said: Result<Vec<String>> = hosts.into_iter().map(what).collect();
    Ok(said?.iter().map(|text| text.lines().count()).sum())
}

fn entries(folder: &str) -> usize {
    fs::read_dir(folder).map_or(0, |entries| entries.count())
}

fn lines(file: &str) -> usize {
    fs::read_to_string(file).map_or(0, |text| text.lines().count())
}

/// Namespaces of any kind that these processes are in, besides the ones that are this thread's.
fn namespaces(processes: &[Pid]) -> usize {
    let kinds = ["pid", "mnt", "net", "ipc", "uts", "user", "cgroup"];
    let all = processes.iter().flat_map(|pid| {
        kinds.map(|kind| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap_or_default())
    });
    all.collect::<BTreeSet<_>>().len()
}

fn used_kib(path: &str) -> Result<u64> {
    let stat = statvfs(path).with_context(|| path.to_owned())?;
    Ok((stat.blocks() - stat.blocks_free()) * stat.fragment_size() / 1024)
}

fn files_below(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => 1 + files_below(&entry.path()),
            _ => 1,
        })
        .sum()
}

/// Resident memory of the tree.
fn resident_kib(root: Pid) -> Result<u64> {
    let text =
        shell::run(std::process::Command::new("ps").args(["-o", "rss=", "-p", &root.to_string()]))?;
    text.trim().parse().context("no number of KiB")
}
