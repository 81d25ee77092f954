//! "This cannot work", said before anything is frozen.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use common::address::MovingAddress;
use common::container::ContainerFacts;
use common::criu;
use common::host::{self, CAP_SYS_ADMIN, OldKernel};
use common::open_file::OpenFile;
use common::page::{PAGE_SIZE, pages_to_bytes};
use common::program_file::{Difference, ProgramFile};
use common::proto::control::WorkloadFacts;
use common::proto::files::FilesFacts;
use userfaultfd::{FeatureFlags, UffdBuilder};

use crate::engine::Engine;
use crate::files::Files;

/// Memory beyond the workload's own that a restore needs.
const MEMORY_SLACK: u64 = 64 << 20;
/// PIDs named in a message; the rest is counted.
const NAMED_PIDS: usize = 8;

/// The first kernel with `pidfd_open(2)`; everything else we need is older, or asked for by name.
const OLDEST_KERNEL: (u32, u32) = (5, 3);

/// CPU flags that change which instructions a program may have chosen at start-up. Others (mitigations, virtualisation,
/// power) do not matter to a process.
const INSTRUCTION_FLAGS: &[&str] = &[
    "abm",
    "adx",
    "aes",
    "amx_bf16",
    "amx_int8",
    "amx_tile",
    "avx",
    "avx2",
    "avx_vnni",
    "bmi1",
    "bmi2",
    "clflushopt",
    "clwb",
    "cx16",
    "erms",
    "f16c",
    "fma",
    "fsgsbase",
    "fsrm",
    "gfni",
    "lahf_lm",
    "lzcnt",
    "movbe",
    "movdir64b",
    "movdiri",
    "pclmulqdq",
    "pku",
    "pni",
    "popcnt",
    "rdpid",
    "rdrand",
    "rdseed",
    "rtm",
    "sha_ni",
    "sse",
    "sse2",
    "sse4_1",
    "sse4_2",
    "sse4a",
    "ssse3",
    "vaes",
    "vpclmulqdq",
    "xsave",
    "xsavec",
    "xsaveopt",
    "xsaves",
];
/// Families of such flags, by prefix.
const INSTRUCTION_PREFIXES: &[&str] = &["avx512", "avx_", "amx_"];

/// Why the workload cannot run here.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Objection {
    /// Another machine.
    #[error(
        "the source is {source_machine}, this host is {here}: a process cannot change its architecture"
    )]
    Architecture {
        /// The source's.
        source_machine: String,
        /// Ours.
        here: String,
    },
    /// Another page size.
    #[error("the source has pages of {0} bytes, this host of {PAGE_SIZE}")]
    PageSize(u64),
    /// Missing instructions.
    #[error("this host's CPU lacks {}, which the workload may use; choose a host with them, or --ignore-cpu-features if you know that it does not", .0.join(" "))]
    CpuFeatures(Vec<String>),
    /// PIDs in use.
    #[error(
        "the workload needs its PIDs, but these are taken here: {0}; use --pidns to restore it into a PID namespace of its own"
    )]
    PidsTaken(String),
    /// Not enough memory.
    #[error("the workload has {needed} MiB resident, but only {available} MiB are available here")]
    Memory {
        /// MiB needed.
        needed: u64,
        /// MiB there are.
        available: u64,
    },
    /// A container comes.
    #[error("the source moves a container; name it and its bundle here with --runc and --bundle")]
    Container,
    /// No container comes.
    #[error(
        "the source moves a process tree and not a container; leave --runc and --bundle out here"
    )]
    NoContainer,
    /// The name cannot be used.
    #[error("{0}")]
    Name(String),
    /// The bundle that should have come.
    #[error("{0}; with --sync the bundle has the same path on both hosts")]
    NoBundle(String),
    /// Another kind of container.
    #[error(
        "the bundle is another container's: its {what} lack [{missing}] and have [{extra}] besides"
    )]
    Bundle {
        /// What differs.
        what: &'static str,
        /// Only the source has these.
        missing: String,
        /// Only the bundle has these.
        extra: String,
    },
    /// Other service addresses.
    #[error(
        "--move-address names other addresses on the source: only there [{missing}], only here [{extra}]; give both programs the same"
    )]
    Addresses {
        /// Only the source has these.
        missing: String,
        /// Only we have these.
        extra: String,
    },
    /// No service addresses.
    #[error(
        "the source moves no addresses, but --move-address names {0} here; give page-server serve the same, or leave it out here: attach and serve --images cannot move addresses"
    )]
    NoAddresses(String),
    /// Other directories.
    #[error(
        "--sync names other directories on the source: only there [{missing}], only here [{extra}]; give both programs the same (`attach` and `serve --images` send none)"
    )]
    Files {
        /// Only the source has these.
        missing: String,
        /// Only we have these.
        extra: String,
    },
    /// One end says that there is nothing to copy, the other what.
    #[error(
        "the {shared} was told --shared-fs, that both hosts have the same files, and the {sync} --sync; leave one of the two out"
    )]
    SharedFiles {
        /// Which end says so.
        shared: &'static str,
        /// Which end has directories to copy.
        sync: &'static str,
    },
    /// Other files.
    #[error(
        "a program or library of the workload differs: {0}; make the files the same, or --ignore-programs if you know that it does not matter"
    )]
    Programs(String),
    /// Files that CRIU would not open.
    #[error(
        "a file that the workload has open differs: {0}; make the files the same (--sync brings directories along), or --ignore-open-files if you know that it does not matter"
    )]
    OpenFiles(String),
    /// No permission.
    #[error(
        "userfaultfd is not permitted here ({0}); run as root with CAP_SYS_PTRACE, or set vm.unprivileged_userfaultfd=1"
    )]
    Userfaultfd(String),
    /// No permission.
    #[error("CAP_SYS_ADMIN missing: run lazy-restorer as root")]
    NotRoot,
    /// The kernel lacks what we need.
    #[error(transparent)]
    Kernel(#[from] OldKernel),
    /// Images that cannot be read.
    #[error(
        "the source's CRIU is {source_version}, this host's {here}: it may not understand the images; install the same version or a later one here"
    )]
    Criu {
        /// The source's.
        source_version: String,
        /// Ours.
        here: String,
    },
    /// No room for the skeleton.
    #[error("cannot use the work directory: {0}")]
    WorkDirectory(String),
}

/// What can be checked before the source says anything.
pub fn check_host() -> Result<(), Objection> {
    if !host::has_capability(CAP_SYS_ADMIN) {
        return Err(Objection::NotRoot);
    }
    host::check_kernel(&host::kernel(), OLDEST_KERNEL, "")?;
    let events = FeatureFlags::EVENT_FORK
        | FeatureFlags::EVENT_REMAP
        | FeatureFlags::EVENT_REMOVE
        | FeatureFlags::EVENT_UNMAP;
    UffdBuilder::new()
        .require_features(events)
        .close_on_exec(true)
        .non_blocking(true)
        .create()
        .map(drop)
        .map_err(|error| Objection::Userfaultfd(error.to_string()))
}

/// Whether our CRIU, of version `here`, understands what the source's writes.
pub fn check_criu(source: &str, here: &str) -> Result<(), Objection> {
    if criu::is_newer(source, here) {
        return Err(Objection::Criu {
            source_version: source.to_owned(),
            here: here.to_owned(),
        });
    }
    Ok(())
}

/// An older kernel is no reason to refuse: most workloads use nothing that is new, and what theirs lacks only they know.
pub fn compare_kernels(source: &str, here: &str) {
    if host::kernel_numbers(here) < host::kernel_numbers(source) {
        tracing::warn!(
            source,
            here,
            "this host's kernel is older; what the workload uses of the newer one CRIU cannot restore"
        );
    }
}

/// What the operator does not want compared.
#[derive(Clone, Copy, Debug, Default)]
pub struct Leniency {
    /// CPU features.
    pub cpu_features: bool,
    /// Programs and libraries.
    pub programs: bool,
    /// Open files.
    pub open_files: bool,
}

/// Checks of a workload some of whose files may still have to come.
#[derive(Clone, Copy, Debug)]
pub struct Checks<'a> {
    /// What comes.
    pub files: &'a Files,
    /// What is not compared.
    pub leniency: Leniency,
}

impl Checks<'_> {
    /// Whether the workload can run here, as far as that does not depend on files that come.
    pub fn before_files(&self, facts: &WorkloadFacts, engine: &Engine) -> Result<(), Objection> {
        check_host_of(facts, engine, self.leniency)?;
        check_container(facts.more.container.as_deref(), engine)?;
        self.check_programs(facts, engine, false)?;
        match engine {
            // Without its bundle nobody knows where its files are.
            Engine::Runc(container) if container.bundle().is_none() => Ok(()),
            _ => self.check_open(facts, engine),
        }
    }

    /// Whether the files that came are those the workload needs.
    pub fn of_files(&self, facts: &WorkloadFacts, engine: &mut Engine) -> Result<(), Objection> {
        let mut is_new = false;
        if let Engine::Runc(container) = engine {
            is_new = container.bundle().is_none();
            let read = container.read_bundle();
            read.map_err(|error| Objection::NoBundle(error.to_string()))?;
        }
        check_container(facts.more.container.as_deref(), engine)?;
        self.check_programs(facts, engine, true)?;
        match is_new {
            true => self.check_open(facts, engine),
            false => Ok(()),
        }
    }

    /// Whether CRIU will be able to open what the workload has open and does not come.
    fn check_open(&self, facts: &WorkloadFacts, engine: &Engine) -> Result<(), Objection> {
        if self.leniency.open_files {
            return Ok(());
        }
        let locate = |path: &Path| match engine {
            Engine::Runc(container) => match container.bundle() {
                Some(bundle) => bundle.locate(path),
                None => path.to_owned(),
            },
            Engine::Criu | Engine::Nursery => path.to_owned(),
        };
        let comes = |path: &Path| self.files.bring(path);
        check_open_files(&facts.more.open_files, locate, comes)
    }

    /// Looks at the programs that come, or at all others.
    fn check_programs(
        &self,
        facts: &WorkloadFacts,
        engine: &Engine,
        coming: bool,
    ) -> Result<(), Objection> {
        if self.leniency.programs {
            return Ok(());
        }
        let programs = &facts.more.programs;
        match engine {
            Engine::Runc(container) => check_programs(programs, |path| {
                let path = container.bundle()?.locate(path);
                let comes = container.comes() || self.files.bring(&path);
                (comes == coming).then_some(path)
            }),
            Engine::Criu | Engine::Nursery => check_programs(programs, |path| {
                (self.files.bring(path) == coming).then(|| path.to_owned())
            }),
        }
    }
}

/// Whether the machine is one for the workload.
fn check_host_of(
    facts: &WorkloadFacts,
    engine: &Engine,
    leniency: Leniency,
) -> Result<(), Objection> {
    let here = host::architecture();
    if facts.architecture != here {
        let source_machine = facts.architecture.clone();
        return Err(Objection::Architecture {
            source_machine,
            here,
        });
    }
    if facts.page_size != PAGE_SIZE as u64 {
        return Err(Objection::PageSize(facts.page_size));
    }
    if !leniency.cpu_features {
        check_cpu(&facts.cpu_features, &host::cpu_features())?;
    }
    if engine.needs_pids_of_host() {
        check_pids(&facts.pids, |pid| {
            Path::new(&format!("/proc/{pid}")).exists()
        })?;
    }
    check_memory(facts.resident_pages, host::available_memory())
}

/// Whether what moves and what shall become of it are both a container of the same kind, or both none.
fn check_container(source: Option<&ContainerFacts>, engine: &Engine) -> Result<(), Objection> {
    match (source, engine) {
        (None, Engine::Runc(_)) => Err(Objection::NoContainer),
        (None, _) => Ok(()),
        (Some(_), Engine::Criu | Engine::Nursery) => Err(Objection::Container),
        (Some(source), Engine::Runc(container)) => {
            // Somebody may have taken the name since we started.
            container
                .check()
                .map_err(|error| Objection::Name(error.to_string()))?;
            let Some(bundle) = container.bundle() else {
                return Ok(());
            };
            let here = bundle.facts();
            check_same("namespaces", &source.namespaces, &here.namespaces)?;
            check_same("mounts", &source.mounts, &here.mounts)
        }
    }
}

fn check_same(what: &'static str, source: &[String], here: &[String]) -> Result<(), Objection> {
    if source == here {
        return Ok(());
    }
    Err(Objection::Bundle {
        what,
        missing: beyond(source, here),
        extra: beyond(here, source),
    })
}

/// What is only among the first, as a line.
fn beyond<T: PartialEq + ToString>(these: &[T], those: &[T]) -> String {
    let only = these.iter().filter(|one| !those.contains(one));
    only.map(T::to_string).collect::<Vec<_>>().join(" ")
}

/// Whether the addresses that the source takes off are those that we add: one that only it knows would be lost.
pub fn check_addresses(source: &[IpAddr], here: &[MovingAddress]) -> Result<(), Objection> {
    let here: Vec<IpAddr> = here.iter().map(|address| address.ip).collect();
    let (missing, extra) = (beyond(source, &here), beyond(&here, source));
    if source.is_empty() && !here.is_empty() {
        return Err(Objection::NoAddresses(extra));
    }
    match missing.is_empty() && extra.is_empty() {
        true => Ok(()),
        false => Err(Objection::Addresses { missing, extra }),
    }
}

/// Whether the directories that the source sends are those that we bring: what is only there would be missed, and what is
/// only here never come.
pub fn check_files(source: &FilesFacts, here: &Files) -> Result<(), Objection> {
    let paths = here.paths().iter().map(|path| path.display().to_string());
    let paths: Vec<String> = paths.collect();
    let shared = |shared, sync| Err(Objection::SharedFiles { shared, sync });
    if source.shared && !paths.is_empty() {
        return shared("source", "destination");
    }
    if here.are_shared() && !source.sync.is_empty() {
        return shared("destination", "source");
    }
    let (missing, extra) = (beyond(&source.sync, &paths), beyond(&paths, &source.sync));
    match missing.is_empty() && extra.is_empty() {
        true => Ok(()),
        false => Err(Objection::Files { missing, extra }),
    }
}

/// Whether the programs of the workload are here, at the places `locate` names; it names none for those that are not
/// looked at.
fn check_programs(
    programs: &[ProgramFile],
    locate: impl Fn(&Path) -> Option<PathBuf>,
) -> Result<(), Objection> {
    let differs = |program: &ProgramFile| {
        let here = locate(Path::new(&program.path))?;
        let how = match program.difference(&here)? {
            Difference::Missing => "is not here",
            Difference::Content => "is another build here",
        };
        Some(format!("{} {how}", here.display()))
    };
    match summary(programs.iter().filter_map(differs)) {
        Some(differences) => Err(Objection::Programs(differences)),
        None => Ok(()),
    }
}

/// Whether the files that the workload has open are here, at the places `locate` names and as they are there. What is
/// `brought` along will be when it matters.
fn check_open_files(
    files: &[OpenFile],
    locate: impl Fn(&Path) -> PathBuf,
    brought: impl Fn(&Path) -> bool,
) -> Result<(), Objection> {
    let differs = |file: &OpenFile| {
        let here = locate(Path::new(&file.path));
        let how = (!brought(&here)).then(|| file.mismatch(&here))?;
        how.map(|how| format!("{} {how}", here.display()))
    };
    match summary(files.iter().filter_map(differs)) {
        Some(differences) => Err(Objection::OpenFiles(differences)),
        None => Ok(()),
    }
}

/// The first of them, and how many more there are.
fn summary(mut differences: impl Iterator<Item = String>) -> Option<String> {
    let first = differences.next()?;
    Some(match differences.count() {
        0 => first,
        count => format!("{first} (and {count} more)"),
    })
}

fn check_cpu(source: &[String], here: &[String]) -> Result<(), Objection> {
    let matters = |flag: &&String| {
        INSTRUCTION_FLAGS.contains(&flag.as_str())
            || INSTRUCTION_PREFIXES
                .iter()
                .any(|prefix| flag.starts_with(prefix))
    };
    let missing: Vec<String> = source
        .iter()
        .filter(matters)
        .filter(|flag| !here.contains(flag))
        .cloned()
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Objection::CpuFeatures(missing))
}

fn check_pids(needed: &[u32], is_taken: impl Fn(u32) -> bool) -> Result<(), Objection> {
    let taken: Vec<String> = needed
        .iter()
        .filter(|pid| is_taken(**pid))
        .map(u32::to_string)
        .collect();
    if taken.is_empty() {
        return Ok(());
    }
    let mut named = taken[..taken.len().min(NAMED_PIDS)].join(" ");
    if taken.len() > NAMED_PIDS {
        named += &format!(" and {} more", taken.len() - NAMED_PIDS);
    }
    Err(Objection::PidsTaken(named))
}

fn check_memory(resident_pages: u64, available: Option<u64>) -> Result<(), Objection> {
    let needed = pages_to_bytes(resident_pages).saturating_add(MEMORY_SLACK);
    match available {
        Some(available) if available < needed => Err(Objection::Memory {
            needed: needed >> 20,
            available: available >> 20,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(names: &str) -> Vec<String> {
        names.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn only_missing_instructions_matter() {
        let here = flags("sse2 avx2 fpu");
        assert_eq!(check_cpu(&flags("sse2 avx2 svm ibrs"), &here), Ok(()));
        assert_eq!(
            check_cpu(&flags("sse2 avx512f vaes ibrs"), &here),
            Err(Objection::CpuFeatures(flags("avx512f vaes")))
        );
    }

    #[test]
    fn taken_pids_are_named_with_the_remedy() {
        let error = check_pids(&[5, 6, 7], |pid| pid == 6).expect_err("6 is taken");
        assert!(error.to_string().contains("taken here: 6;"));
        assert!(error.to_string().contains("--pidns"));
        let error = check_pids(&(1..=20).collect::<Vec<_>>(), |_| true).expect_err("all");
        assert!(error.to_string().contains("8 and 12 more"));
    }

    #[test]
    fn images_of_a_newer_criu_are_refused() {
        let error = check_criu("9.9.0", "4.2").expect_err("from the future");
        assert!(error.to_string().contains("9.9.0"), "{error}");
        assert_eq!(check_criu("4.2", "4.2.1"), Ok(()));
        assert_eq!(check_criu("of the images", "4.2"), Ok(()));
    }

    #[test]
    fn another_bundle_is_refused_with_the_difference() {
        let error = check_same("mounts", &flags("/proc /usr"), &flags("/proc /data"));
        let text = error.expect_err("they differ").to_string();
        assert!(text.contains("lack [/usr] and have [/data]"), "{text}");
        assert_eq!(check_same("mounts", &flags("/usr"), &flags("/usr")), Ok(()));
    }

    #[test]
    fn only_directories_both_ends_know_are_brought() {
        let source = |sync: &[&str], shared| FilesFacts {
            sync: sync.iter().map(ToString::to_string).collect(),
            shared,
        };
        let here = |sync: &[&str], shared| {
            let paths: Vec<PathBuf> = sync.iter().map(PathBuf::from).collect();
            Files::new(&paths, shared).expect("plain")
        };
        let check = |there: FilesFacts, here: Files| match check_files(&there, &here) {
            Ok(()) => String::new(),
            Err(objection) => objection.to_string(),
        };
        assert_eq!(
            check(source(&["/a", "/b"], false), here(&["/b/", "/a"], false)),
            ""
        );
        assert_eq!(check(source(&[], true), here(&[], false)), "");
        let text = check(source(&["/a", "/b"], false), here(&["/b", "/c"], false));
        assert!(text.contains("only there [/a], only here [/c]"), "{text}");
        let text = check(source(&[], true), here(&["/a"], false));
        assert!(text.contains("the source was told --shared-fs"), "{text}");
        let text = check(source(&["/a"], false), here(&[], true));
        assert!(
            text.contains("the destination was told --shared-fs"),
            "{text}"
        );
    }

    #[test]
    fn other_programs_are_refused_by_name() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("redis"), "v1").expect("written");
        let there = |name: &str| {
            ProgramFile::of(&format!("/usr/{name}"), &dir.path().join("redis")).expect("readable")
        };
        let locate = |path: &Path| Some(dir.path().join(path.file_name().unwrap_or_default()));
        assert_eq!(check_programs(&[there("redis")], locate), Ok(()));
        let error = check_programs(&[there("lib"), there("ld")], locate).expect_err("missing");
        assert!(error.to_string().contains("lib is not here (and 1 more)"));
        let before = there("redis");
        std::fs::write(dir.path().join("redis"), "v2").expect("written");
        let error = check_programs(&[before], locate).expect_err("changed");
        assert!(error.to_string().contains("redis is another build here"));
    }

    #[test]
    fn open_files_that_are_missing_are_refused_by_name() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("data"), "1234").expect("written");
        let metadata = dir.path().join("data").metadata().expect("there");
        let there =
            |name: &str| OpenFile::of(&format!("/srv/{name}"), &metadata, false).expect("a file");
        let locate = |path: &Path| dir.path().join(path.file_name().unwrap_or_default());
        let check = |names: &[&str], brought: bool| {
            let files: Vec<OpenFile> = names.iter().map(|name| there(name)).collect();
            check_open_files(&files, locate, |_| brought)
        };
        assert_eq!(check(&["data"], false), Ok(()));
        let error = check(&["data", "log", "lock"], false).expect_err("two are missing");
        let text = error.to_string();
        assert!(text.contains("log is not here (and 1 more)"), "{text}");
        assert_eq!(check(&["log"], true), Ok(()));
    }

    #[test]
    fn too_little_memory_is_said_in_mib() {
        let error = check_memory(262_144, Some(512 << 20)).expect_err("half of it");
        assert_eq!(
            error,
            Objection::Memory {
                needed: 1024 + 64,
                available: 512
            }
        );
        assert_eq!(check_memory(u64::MAX, None), Ok(()));
    }
}
