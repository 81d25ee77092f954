//! A workload that does to its memory all that a program can, and compares every byte: `torture --help`.
//!
//! Run it where CRIU can dump it: in a session of its own, with `/dev/null` for its standard streams.

mod arena;
mod forker;
mod fragments;
mod heap;
mod mapping;
mod options;
mod pattern;
mod stack;
mod worker;

use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use tests::board::{Board, MAX_WORKERS};
use tests::pulse::Ticker;
use tests::random::{Random, mix};
use tests::shared_file;

use arena::Failure;
use options::Options;
use worker::Estate;

/// How often the root's heart beats.
const PERIOD: Duration = Duration::from_millis(1);
/// Threads compare deep stacks, see `worker::MAX_DEPTH`.
const STACK_BYTES: usize = 4 << 20;
/// The main thread's stack grows by itself, so it goes deeper: about 3 MiB.
const MAIN_DEPTH: u64 = 1200;

fn main() -> ExitCode {
    match Options::from_arguments().and_then(|options| run(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("torture: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let board: &Board = shared_file::map(&options.board)?;
    ensure!(
        options.workers() <= MAX_WORKERS,
        "{} workers are more than {MAX_WORKERS}",
        options.workers()
    );
    if options.zombie {
        // Never waited for: a zombie to the end.
        fork_into(|| ExitCode::SUCCESS)?;
    }
    let mut children = Vec::new();
    for number in 1..=options.children {
        children.push(fork_into(|| process(options, board, number))?);
    }
    let own = process(options, board, 0);
    let failed: Vec<_> = children
        .into_iter()
        .filter_map(|child| failure_of(child).err())
        .collect();
    let verdict = verdict(board, own, &failed);
    write_verdict(options, &verdict)?;
    ensure!(verdict == "ok", "{verdict}");
    Ok(())
}

/// Forks before any thread is there, so the child may go on like its parent.
fn fork_into(child: impl FnOnce() -> ExitCode) -> Result<Pid> {
    // SAFETY: this process has one thread, so every lock is free in the child.
    match unsafe { fork() }.context("cannot fork")? {
        ForkResult::Child => std::process::exit(i32::from(child() != ExitCode::SUCCESS)),
        ForkResult::Parent { child } => Ok(child),
    }
}

fn failure_of(child: Pid) -> Result<()> {
    match waitpid(child, None).context("cannot wait for a child")? {
        WaitStatus::Exited(_, 0) => Ok(()),
        ended => bail!("a child ended so: {ended:?}"),
    }
}

fn verdict(board: &Board, own: ExitCode, failed: &[anyhow::Error]) -> String {
    if let Some(mismatch) = board.mismatch() {
        return format!("mismatch: {mismatch}");
    }
    match failed.first() {
        Some(error) => error.to_string(),
        None if own == ExitCode::SUCCESS => "ok".to_owned(),
        None => "a system call failed; standard error says which".to_owned(),
    }
}

fn write_verdict(options: &Options, verdict: &str) -> Result<()> {
    let new = options.verdict.with_extension("new");
    std::fs::write(&new, verdict).context("cannot write the verdict")?;
    std::fs::rename(&new, &options.verdict).context("cannot publish the verdict")
}

/// One process of the tree: its workers, its forker, and in the root the heartbeat.
fn process(options: &Options, board: &'static Board, number: usize) -> ExitCode {
    let seed = mix(options.seed ^ (number as u64) << 32);
    let first = number * options.threads;
    let mut threads = Vec::new();
    for worker in first..first + options.threads {
        let (size, rest) = (options.size_of_worker(), options.rest);
        let estate = move || Estate::new(size, mix(seed ^ worker as u64), &board.pages_checked);
        threads.push(spawn(board, move || work(estate()?, rest, board, worker)));
    }
    if options.forks {
        threads.push(spawn(board, move || forker::run(board, !seed)));
    }
    let main = beat(board, seed, number == 0);
    let main_is_well = settle(board, main);
    // All are joined before any is judged.
    let joined: Vec<bool> = threads
        .into_iter()
        .map(|thread| thread.join().unwrap_or(false))
        .collect();
    if main_is_well && joined.into_iter().all(|is_well| is_well) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn spawn(
    board: &'static Board,
    body: impl FnOnce() -> Result<(), Failure> + Send + 'static,
) -> thread::JoinHandle<bool> {
    let builder = thread::Builder::new().stack_size(STACK_BYTES);
    builder
        .spawn(move || settle(board, body()))
        .expect("a thread starts")
}

/// Makes a failure known to all and says whether there was none.
fn settle(board: &Board, result: Result<(), Failure>) -> bool {
    match result {
        Ok(()) => return true,
        Err(Failure::Mismatch(mismatch)) => board.report(mismatch),
        Err(Failure::System(error)) => {
            eprintln!("torture: {error}");
            board.pulse.stop.store(1, Ordering::Release);
        }
    }
    false
}

fn work(
    mut estate: Estate<'_>,
    rest: Duration,
    board: &Board,
    number: usize,
) -> Result<(), Failure> {
    board.ready.fetch_add(1, Ordering::Relaxed);
    while !board.is_stopped() {
        estate.step(&board.workers[number])?;
        if !rest.is_zero() {
            thread::sleep(rest);
        }
    }
    Ok(estate.check_all()?)
}

/// The main thread: heartbeat, and the stack and heap only a main thread has.
fn beat(board: &Board, seed: u64, is_root: bool) -> Result<(), Failure> {
    let mut ticker = Ticker::new(&board.pulse);
    let mut random = Random::new(seed);
    let mut heap = heap::Heap::default();
    let mut depth = 0;
    while !board.is_stopped() {
        if is_root {
            ticker.tick();
        }
        thread::sleep(PERIOD);
        heap.step(&mut random)?;
        if random.below(64) == 0 {
            depth = (depth + 10).min(MAIN_DEPTH);
            stack::descend(depth, random.next() | 1)?;
        }
    }
    Ok(heap.check_all()?)
}
