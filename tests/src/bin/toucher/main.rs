//! A workload whose memory is known: `toucher BOARD still|random|scan MIB RATE SEED` fills it, waits until it finds
//! itself on another host, then touches page after page and notes how long it waited. It compares the word it touched at
//! once, and all of every page it touched in the end: comparing them between would make it a slower workload than one that
//! only touches.
//!
//! A touch counts as a wait when the kernel counts a fault for it: a page that was there already causes none.

mod memory;

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::resource::{UsageWho, getrusage};
use tests::pulse::{Ticker, wall_ns};
use tests::shared_file;
use tests::touch::order::Order;
use tests::touch::{Stage, TouchBoard};

use memory::Memory;

/// What takes no longer was no fault that somebody else handled, and the kernel need not be asked: asking costs as much as a
/// page that is there, and the workload would seem slower than it is.
const AT_ONCE_NS: u64 = 5_000;

/// How often it looks whether it has been moved: short against any cutover.
const PERIOD: Duration = Duration::from_micros(200);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [board, pattern, mib, rate, seed] = &arguments[..] else {
        bail!("usage: toucher BOARD still|random|scan MIB RATE SEED");
    };
    let board: &TouchBoard = shared_file::map(Path::new(board))?;
    let (rate, seed): (u64, u64) = (rate.parse()?, seed.parse()?);
    let memory = Memory::filled(mib.parse()?, seed)?;
    board.enter(Stage::Waiting);
    wait_for_the_move(board)?;
    board.enter(Stage::Touching);
    let order = Order::new(memory.pages(), seed);
    match pattern.as_str() {
        "still" => {}
        "random" => touch_all(board, &memory, rate, |place| order.at(place))?,
        "scan" => touch_all(board, &memory, rate, |place| place)?,
        _ => bail!("{pattern} is no pattern"),
    }
    board.enter(Stage::Done);
    while !board.is_stopped() {
        std::thread::sleep(PERIOD * 10);
    }
    Ok(())
}

/// Beats its heart until the network namespace is another one: that is what hosts are in the rig.
fn wait_for_the_move(board: &TouchBoard) -> Result<()> {
    let home = host()?;
    let mut ticker = Ticker::new(&board.pulse);
    loop {
        let before = board.pulse.last_ns.load(Ordering::Relaxed);
        ticker.tick();
        if host()? != home {
            let now = wall_ns();
            board.cutover_ns.store(now - before, Ordering::Relaxed);
            board.moved_ns.store(now, Ordering::Relaxed);
            return Ok(());
        }
        std::thread::sleep(PERIOD);
    }
}

fn host() -> Result<std::path::PathBuf> {
    std::fs::read_link("/proc/self/ns/net").context("cannot tell which host this is")
}

fn touch_all(
    board: &TouchBoard,
    memory: &Memory,
    rate: u64,
    page_at: impl Fn(u64) -> u64,
) -> Result<()> {
    let pause = 1_000_000_000_u64.checked_div(rate).unwrap_or(0);
    let mut due = wall_ns();
    let mut faults = faults_so_far()?;
    let mut touched = 0;
    for place in 0..memory.pages() {
        let page = page_at(place);
        let began = wall_ns();
        let is_right = memory.touch(page);
        let took = wall_ns() - began;
        let before = faults;
        if took > AT_ONCE_NS {
            faults = faults_so_far()?;
        }
        let has_waited = faults > before;
        board.touches.fetch_add(1, Ordering::Relaxed);
        if has_waited {
            note_fault(board, began + took, took);
        }
        if !is_right {
            note_damage(board, memory, page);
        }
        touched = place + 1;
        if board.is_stopped() {
            break;
        }
        if pause > 0 {
            // What was missed while waiting is not made up for: that would touch in bursts.
            due = (due + pause).max(wall_ns());
            wait_until(due);
        }
    }
    for page in (0..touched).map(page_at) {
        if memory.touch(page) && !memory.is_intact(page) {
            note_damage(board, memory, page);
        }
    }
    Ok(())
}

fn note_damage(board: &TouchBoard, memory: &Memory, page: u64) {
    board.damaged.fetch_add(1, Ordering::Relaxed);
    let zeroed = u64::from(memory.is_zero(page));
    board.zeroed.fetch_add(zeroed, Ordering::Relaxed);
}

fn note_fault(board: &TouchBoard, now: u64, took: u64) {
    board.faults.fetch_add(1, Ordering::Relaxed);
    board.waits.note(took);
    board.last_fault_ns.store(now, Ordering::Relaxed);
    let touches = board.touches.load(Ordering::Relaxed);
    board
        .touches_at_last_fault
        .store(touches, Ordering::Relaxed);
}

fn faults_so_far() -> Result<i64> {
    let usage = getrusage(UsageWho::RUSAGE_THREAD).context("cannot count faults")?;
    Ok(usage.major_page_faults() + usage.minor_page_faults())
}

fn wait_until(due: u64) {
    let now = wall_ns();
    if due > now {
        std::thread::sleep(Duration::from_nanos(due - now));
    }
}
