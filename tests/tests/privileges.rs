//! What both programs may still do while they serve a workload, as the kernel says of each of their threads.

use std::collections::BTreeMap;
use std::fs;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;
use tests::harness::{self, MIGRATION, Test};
use tests::pair::PairPlan;
use tests::random::seed_of_this_run;
use tests::rig::Rig;
use tests::task;
use tests::torture::{LONG_REST, Torture, TorturePlan};

const DAC_OVERRIDE: u64 = 1 << 1;
const DAC_READ_SEARCH: u64 = 1 << 2;
const KILL: u64 = 1 << 5;
const NET_ADMIN: u64 = 1 << 12;
const NET_RAW: u64 = 1 << 13;
const SYS_PTRACE: u64 = 1 << 19;
const SYS_ADMIN: u64 = 1 << 21;
const SYS_NICE: u64 = 1 << 23;
const CHECKPOINT_RESTORE: u64 = 1 << 40;

/// Of the source's main thread, its guard and CRIU's script.
const SOURCE: u64 =
    SYS_PTRACE | DAC_READ_SEARCH | DAC_OVERRIDE | CHECKPOINT_RESTORE | KILL | NET_ADMIN | NET_RAW;
/// Of the destination's main thread and its keeper.
const DESTINATION: u64 =
    KILL | SYS_PTRACE | SYS_ADMIN | SYS_NICE | NET_ADMIN | NET_RAW | DAC_READ_SEARCH | DAC_OVERRIDE;
/// Of threads that handle bytes of the other host.
const SOURCE_DATA: u64 = SYS_PTRACE | DAC_READ_SEARCH;
const DESTINATION_DATA: u64 = 0;

fn main() -> ExitCode {
    harness::main([Test {
        name: "what_is_not_needed_is_given_up",
        needs: MIGRATION,
        body: what_is_not_needed_is_given_up,
    }])
}

/// What `/proc/PID/task/TID/status` says of a thread's rights.
#[derive(Debug, PartialEq, Eq)]
struct Rights {
    name: String,
    permitted: u64,
    effective: u64,
    inheritable: u64,
    bounding: u64,
    ambient: u64,
    no_new: bool,
}

impl Rights {
    fn of(pid: Pid, thread: Pid) -> Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/task/{thread}/status"))?;
        let fields: BTreeMap<&str, &str> = text
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name, value.trim()))
            .collect();
        let field = |name: &str| fields.get(name).copied().context("a field is missing");
        let set = |name: &str| Ok::<_, anyhow::Error>(u64::from_str_radix(field(name)?, 16)?);
        Ok(Self {
            name: field("Name")?.to_owned(),
            permitted: set("CapPrm")?,
            effective: set("CapEff")?,
            inheritable: set("CapInh")?,
            bounding: set("CapBnd")?,
            ambient: set("CapAmb")?,
            no_new: field("NoNewPrivs")? == "1",
        })
    }

    fn of_main(pid: Pid) -> Result<Self> {
        Self::of(pid, pid)
    }

    /// All threads but the first.
    fn of_others(pid: Pid) -> Result<Vec<Self>> {
        let threads = task::threads(pid).into_iter();
        threads
            .map(Pid::from_raw)
            .filter(|thread| *thread != pid)
            .map(|thread| Self::of(pid, thread))
            .collect()
    }

    fn assert_has(&self, wanted: u64, no_new: bool) -> Result<()> {
        let wanted = wanted & self.bounding;
        ensure!(
            self.permitted == wanted && self.effective == wanted && self.no_new == no_new,
            "{self:?}: {wanted:x} expected, no_new_privs {no_new}"
        );
        ensure!(self.inheritable == 0 && self.ambient == 0, "{self:?}");
        Ok(())
    }
}

/// Every thread of a program: the first, those of the connections, and whatever else there is.
fn assert_program(pid: Pid, main: u64, data: u64) -> Result<()> {
    Rights::of_main(pid)?.assert_has(main, false)?;
    let others = Rights::of_others(pid)?;
    for name in ["fault", "bulk"] {
        let thread = others.iter().find(|thread| thread.name == name);
        thread
            .with_context(|| format!("no thread {name}"))?
            .assert_has(data, true)?;
    }
    for thread in &others {
        let extra = thread.permitted & !main;
        ensure!(extra == 0, "{thread:?} has what its program gave up");
    }
    Ok(())
}

fn child(of: Pid, name: &str) -> Result<Pid> {
    let found = task::descendants(of)
        .into_iter()
        .find(|pid| task::name(*pid) == name);
    found.with_context(|| format!("no {name} below {of}"))
}

fn what_is_not_needed_is_given_up(rig: &Rig) -> Result<()> {
    let torture = Torture::start(
        rig,
        TorturePlan {
            mib: 32,
            children: 1,
            seed: seed_of_this_run(),
            rest: LONG_REST,
            ..TorturePlan::default()
        },
    )?;
    let before = Rights::of_main(torture.pid())?;
    let mut plan = PairPlan::new(rig)?;
    let mut server = plan.start_server(rig, torture.pid())?;
    // Before anybody has come.
    assert_program(server.process.pid(), SOURCE, SOURCE_DATA)?;
    plan.restorer.push("--no-push".into());
    let mut restorer = plan.start_restorer(rig)?;
    let copy = restorer.wait_for_copy()?;
    torture.wait_for_rounds(1)?;

    let (source, destination) = (server.process.pid(), restorer.process.pid());
    assert_program(source, SOURCE, SOURCE_DATA)?;
    assert_program(destination, DESTINATION, DESTINATION_DATA)?;
    Rights::of_main(child(destination, "keeper")?)?.assert_has(DESTINATION, false)?;
    Rights::of_main(child(source, "page-server")?)?.assert_has(SOURCE, false)?;
    // CRIU has everything there is, as if an operator had started it, and the copy what the original had.
    let criu = Rights::of_main(child(source, "criu")?)?;
    ensure!(criu.effective == criu.bounding && !criu.no_new, "{criu:?}");
    let after = Rights::of_main(copy)?;
    ensure!(after == before, "{before:?} became {after:?}");

    // It compares all of its memory, which it fetches for that, and ends.
    torture.finish()?;
    restorer.expect_success()?;
    server.expect_success()
}
