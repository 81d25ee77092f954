//! The processes to move, as this host sees them before the freeze.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::PathBuf;

use common::host;
use common::images::ImagePid;
use common::limits::MAX_PROGRAM_FILES;
use common::page::{PAGE_SIZE, bytes_to_pages};
use common::proc_text::{field, innermost_pid, lines};
use common::program_file::ProgramFile;
use common::proto::control::{MoreFacts, WorkloadFacts};
use common::proto::files::FilesFacts;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use procfs::process::Process;

use crate::mapped::{Mapping, mapping, maps};
use crate::open_files;

/// Kernel flag of a thread that belongs to the kernel (`PF_KTHREAD`, `include/linux/sched.h`).
const PF_KTHREAD: u32 = 0x0020_0000;

/// A process tree by its root.
#[derive(Clone, Debug)]
pub struct Workload {
    root: Pid,
}

/// Why a PID cannot be moved.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WorkloadError {
    /// Nobody has it.
    #[error("no process has PID {0}; give the PID of the workload's root process")]
    NoSuchProcess(Pid),
    /// It is a thread.
    #[error("{0} is a thread of process {1}; give the PID of the process")]
    Thread(Pid, i32),
    /// It belongs to the kernel.
    #[error("PID {0} is a kernel thread, which cannot move")]
    KernelThread(Pid),
    /// It is dead already.
    #[error("process {0} is a zombie: nothing of it is left to move")]
    Zombie(Pid),
    /// It is us, or we are in it.
    #[error(
        "PID {0} is page-server itself or one of its ancestors; page-server cannot freeze itself"
    )]
    Ourselves(Pid),
    /// It is being traced, by a debugger or another migration.
    #[error(
        "process {0} is traced by process {1} (a debugger or another migration); end that first"
    )]
    Traced(Pid, i32),
}

impl Workload {
    /// Checks that `root` names a process that could be moved.
    pub fn find(root: Pid) -> Result<Self, WorkloadError> {
        let process =
            Process::new(root.as_raw()).map_err(|_| WorkloadError::NoSuchProcess(root))?;
        let gone = || WorkloadError::NoSuchProcess(root);
        let status = fs::read(format!("/proc/{root}/status")).map_err(|_| gone())?;
        let number = |name| field(&status, name)?.parse::<i32>().ok();
        let process_id = number("Tgid").ok_or_else(gone)?;
        let tracer = number("TracerPid").ok_or_else(gone)?;
        let stat = process.stat().map_err(|_| gone())?;
        if process_id != root.as_raw() {
            return Err(WorkloadError::Thread(root, process_id));
        }
        if stat.flags & PF_KTHREAD != 0 {
            return Err(WorkloadError::KernelThread(root));
        }
        if stat.state == 'Z' || stat.state == 'X' {
            return Err(WorkloadError::Zombie(root));
        }
        if ancestors().contains(&root.as_raw()) {
            return Err(WorkloadError::Ourselves(root));
        }
        if tracer != 0 {
            return Err(WorkloadError::Traced(root, tracer));
        }
        Ok(Workload { root })
    }

    /// A workload that is frozen already.
    pub fn frozen(root: Pid) -> Self {
        Workload { root }
    }

    /// The root's PID on this host.
    pub fn root(&self) -> Pid {
        self.root
    }

    /// What the destination must know beforehand.
    pub fn facts(&self, criu: &str, tcp_established: bool, shell_job: bool) -> WorkloadFacts {
        let processes = self.processes();
        let resident = processes.iter().filter_map(|process| {
            let statm = process.statm().ok()?;
            Some(statm.resident)
        });
        WorkloadFacts {
            architecture: host::architecture(),
            kernel: host::kernel(),
            page_size: PAGE_SIZE as u64,
            criu: criu.to_owned(),
            cpu_features: host::cpu_features(),
            pids: processes.iter().flat_map(thread_ids).collect(),
            name: self.name(),
            resident_pages: resident.sum(),
            tcp_established,
            shell_job,
            more: self.more_facts(),
        }
    }

    /// The files that the destination must have too, be the tree running or frozen.
    pub fn more_facts(&self) -> MoreFacts {
        MoreFacts {
            container: None,
            programs: self.programs(),
            addresses: Vec::new(),
            open_files: open_files::of(&self.processes()),
            files: FilesFacts::default(),
        }
    }

    /// What the tree has mapped executable. What cannot be read (it was deleted, or is no file) is not compared.
    fn programs(&self) -> Vec<ProgramFile> {
        let processes = self.processes();
        let mappings = processes.iter().flat_map(executable_mappings);
        let mut by_path = BTreeMap::new();
        for (path, content) in mappings {
            if by_path.len() < MAX_PROGRAM_FILES {
                by_path.entry(path).or_insert(content);
            }
        }
        let programs = by_path.iter();
        programs
            .filter_map(|(path, content)| ProgramFile::of(path, content).ok())
            .collect()
    }

    fn name(&self) -> String {
        let name = fs::read(format!("/proc/{}/comm", self.root));
        name.map_or_else(
            |_| String::from("?"),
            |name| String::from_utf8_lossy(&name).trim().to_owned(),
        )
    }

    fn processes(&self) -> Vec<Process> {
        tree(self.root)
    }

    /// The tree's processes by the PID their images carry: the one of their own PID namespace.
    pub fn by_image_pid(&self) -> HashMap<ImagePid, Pid> {
        self.processes()
            .iter()
            .filter_map(|process| Some((image_pid(process)?, Pid::from_raw(process.pid))))
            .collect()
    }

    /// All processes of the tree, as this host numbers them.
    pub fn pids(&self) -> Vec<Pid> {
        let processes = self.processes();
        processes.iter().map(|p| Pid::from_raw(p.pid)).collect()
    }
}

/// A process and all its descendants at this moment. It is asked while they are frozen, so it looks at nobody else.
fn tree(root: Pid) -> Vec<Process> {
    let mut tree = vec![root.as_raw()];
    let mut next = 0;
    while let Some(pid) = tree.get(next).copied() {
        tree.extend(children(pid));
        next += 1;
    }
    tree.into_iter()
        .filter_map(|pid| Process::new(pid).ok())
        .collect()
}

/// Children of all threads of a process (`/proc/PID/task/TID/children`, which CRIU needs too).
fn children(pid: i32) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let lists = tasks
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| {
            let pids = list.split_whitespace().filter_map(|pid| pid.parse().ok());
            pids.collect::<Vec<i32>>()
        })
        .collect()
}

/// The PIDs of a process and all its descendants, as this host numbers them.
pub fn tree_pids(root: Pid) -> Vec<Pid> {
    let processes = tree(root);
    processes.iter().map(|p| Pid::from_raw(p.pid)).collect()
}

/// Sends a signal to processes; those that are gone do not matter.
pub fn signal_all(tasks: &[Pid], signal: Signal) {
    for task in tasks {
        if let Err(error) = kill(*task, signal) {
            tracing::debug!(%task, %signal, %error, "signal");
        }
    }
}

/// Files a process has mapped executable: where it sees each, and where we can read it.
fn executable_mappings(process: &Process) -> Vec<(String, PathBuf)> {
    let pid = process.pid;
    let file = |map: Mapping<'_>| {
        // What memory without a file is called is no path.
        let path = str::from_utf8(map.name)
            .ok()
            .filter(|name| name.starts_with('/'))?;
        let is_program = map.is_executable() && !path.ends_with("(deleted)");
        is_program.then(|| {
            let content = format!("/proc/{pid}/map_files/{}", map.link_name());
            (path.to_owned(), PathBuf::from(content))
        })
    };
    let maps = maps(pid);
    lines(&maps).filter_map(mapping).filter_map(file).collect()
}

fn image_pid(process: &Process) -> Option<ImagePid> {
    let status = fs::read(format!("/proc/{}/status", process.pid)).ok()?;
    innermost_pid(&status).map(ImagePid)
}

fn thread_ids(process: &Process) -> Vec<u32> {
    let innermost = |tid: i32| {
        let status = fs::read(format!("/proc/{}/task/{tid}/status", process.pid)).ok()?;
        innermost_pid(&status)
    };
    let tasks = process.tasks().into_iter().flatten().flatten();
    tasks.filter_map(|task| innermost(task.tid)).collect()
}

/// Our own PID and those of our parents.
fn ancestors() -> Vec<i32> {
    let mut pids = vec![Pid::this().as_raw()];
    while let Some(pid) = pids.last().copied() {
        let parent = Process::new(pid).and_then(|process| process.stat());
        match parent {
            Ok(stat) if stat.ppid > 0 => pids.push(stat.ppid),
            _ => break,
        }
    }
    pids
}

/// Bytes a count of resident pages stands for, in MiB for people.
pub fn mebibytes(pages: u64) -> u64 {
    const PAGES_PER_MEBIBYTE: u64 = bytes_to_pages(1 << 20);
    pages / PAGES_PER_MEBIBYTE
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::io::Read;
    use std::os::unix::ffi::OsStrExt;
    use std::process::{Child, Command, Stdio};

    use super::*;

    struct Sleeper(Child);

    impl Sleeper {
        fn start() -> Self {
            Sleeper(Command::new("sleep").arg("60").spawn().expect("sleep runs"))
        }

        fn pid(&self) -> Pid {
            Pid::from_raw(self.0.id() as i32)
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            self.0.kill().expect("our child");
            self.0.wait().expect("our child");
        }
    }

    #[test]
    fn a_process_is_found_with_its_threads() {
        let sleeper = Sleeper::start();
        let workload = Workload::find(sleeper.pid()).expect("it runs");
        let facts = workload.facts("4.2", false, false);
        assert_eq!(facts.pids, [sleeper.0.id()]);
        assert_eq!(workload.by_image_pid().len(), 1);
    }

    /// Its name is cut in the middle of a letter, and so is that of a file it has mapped.
    #[test]
    fn names_need_not_be_utf8() {
        let directory = tempfile::tempdir().expect("a directory");
        let program = directory.path().join("fourteen-bytes\u{e4}");
        std::os::unix::fs::symlink("/usr/bin/python3", &program).expect("made");
        let mut odd = directory.path().as_os_str().to_owned();
        odd.push(OsStr::from_bytes(b"/\xff"));
        fs::write(&odd, [0; 4096]).expect("written");
        let mut python = Command::new(program)
            .args(["-I", "-c", MAPPER])
            .arg(odd)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 runs");
        let mut said = [0; 1];
        let stdout = python.stdout.as_mut().expect("a pipe");
        stdout
            .read_exact(&mut said)
            .expect("it has mapped the file");
        let pid = Pid::from_raw(python.id().cast_signed());
        let workload = Workload::find(pid);
        let found = workload.as_ref().map(|workload| {
            let facts = workload.facts("4.2", false, false);
            (facts, workload.by_image_pid().len())
        });
        drop(python.stdin.take());
        python.wait().expect("our child");
        let (facts, processes) = found.expect("it is one");
        assert_eq!(facts.pids, [python.id()]);
        assert_eq!(facts.name, "fourteen-bytes\u{fffd}");
        assert_eq!(processes, 1);
        if nix::unistd::geteuid().is_root() {
            assert!(!facts.more.programs.is_empty());
        }
    }

    const MAPPER: &str = "import mmap, os, sys; fd = os.open(os.fsencode(sys.argv[1]), os.O_RDWR); \
        m = mmap.mmap(fd, 4096); print('x', flush=True); sys.stdin.read()";

    #[test]
    fn what_cannot_move_is_refused() {
        let refuse = |pid| Workload::find(Pid::from_raw(pid)).expect_err("cannot move");
        assert!(matches!(refuse(i32::MAX), WorkloadError::NoSuchProcess(_)));
        assert!(matches!(
            refuse(std::process::id() as i32),
            WorkloadError::Ourselves(_)
        ));
        assert!(matches!(refuse(1), WorkloadError::Ourselves(_)));
        assert!(matches!(refuse(2), WorkloadError::KernelThread(_)));
    }

    #[test]
    fn a_zombie_is_refused() {
        let mut child = Command::new("true").spawn().expect("true runs");
        let pid = Pid::from_raw(child.id() as i32);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        let refused = loop {
            match Workload::find(pid) {
                Err(error) => break error,
                Ok(_) => assert!(std::time::Instant::now() < deadline, "true never ends"),
            }
        };
        assert_eq!(refused, WorkloadError::Zombie(pid));
        child.wait().expect("our child");
    }
}
