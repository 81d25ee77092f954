//! The real `Memory` against the real kernel: a workload in a process of its own changes its memory in every way the
//! kernel knows while a source in this process answers faults and pushes pages at random.
//!
//! `LAZY_RESTORER_SEED` repeats a run; every failure prints its seed.

use std::time::{Duration, Instant};

#[path = "kernel/frozen.rs"]
mod frozen;
#[path = "kernel/session.rs"]
mod session;
#[path = "kernel/source.rs"]
mod source;
#[path = "kernel/stress.rs"]
mod stress;
#[path = "kernel/sys.rs"]
mod sys;
#[path = "kernel/workload.rs"]
mod workload;

use lazy_restorer::copy::Copy;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::frozen::Frozen;
use crate::session::Session;
use crate::workload::{GO, READY};

const STRESS_BUDGET: Duration = Duration::from_secs(3);

/// No test: the process that the others start.
#[test]
fn workload_process() {
    workload::run_from_environment();
}

fn seed() -> u64 {
    let given = std::env::var("LAZY_RESTORER_SEED");
    given
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| {
            let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            clock.map_or(1, |time| time.subsec_nanos().into())
        })
}

/// `LAZY_RESTORER_ROUNDS` makes a soak of it.
fn multiplier() -> u64 {
    let given = std::env::var("LAZY_RESTORER_ROUNDS");
    given.ok().and_then(|times| times.parse().ok()).unwrap_or(1)
}

fn frozen(seed: u64, pages: u64) -> Frozen {
    Frozen {
        seed,
        pages,
        vma_pages: 64,
    }
}

/// Runs a random workload a number of times, with everything pushed while it runs.
fn rounds(name: &str, count: u64) {
    let first = seed();
    println!("{name}: seeds from {first}");
    for seed in first..first + count * multiplier() {
        if !round(name, seed) {
            return;
        }
    }
}

fn round(name: &str, seed: u64) -> bool {
    let mut session = Session::start(name, frozen(seed, 1536));
    session.push(usize::from(seed.is_multiple_of(3)) * 20);
    if !session.attach() {
        return false;
    }
    session.push_in_background(400);
    session.finish();
    true
}

#[test]
fn threads_read_and_write_while_pages_come() {
    rounds("plain", 3);
}

#[test]
fn removed_pages_are_never_resurrected() {
    rounds("remove", 8);
}

#[test]
fn moved_pages_follow() {
    rounds("move", 8);
}

#[test]
fn pages_arrive_wherever_their_place_is_moved_meanwhile() {
    rounds("restless", 8);
}

#[test]
fn unmapped_pages_make_room_for_others() {
    rounds("move unmap", 8);
}

#[test]
fn children_inherit_what_is_missing() {
    rounds("fork remove", 4);
}

/// Events of forks that cannot be read for want of a descriptor stay where they are.
#[test]
fn children_are_born_when_there_is_a_descriptor_for_them() {
    let seed = seed();
    println!("seed {seed}");
    let mut session = Session::start("fork remove", frozen(seed, 1536));
    if !session.attach() {
        return;
    }
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    let allow =
        |files| setrlimit(Resource::RLIMIT_NOFILE, files, hard).expect("not more than before");
    session.push_in_background(400);
    // What is open stays open.
    let deadline = Instant::now() + Duration::from_secs(10);
    while !session.is_short() && Instant::now() < deadline {
        allow(0);
        std::thread::sleep(Duration::from_millis(2));
        if !session.is_short() {
            allow(soft);
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    assert!(session.is_short(), "the workload forks no more");
    allow(soft);
    session.finish();
}

#[test]
fn mappings_that_were_split_are_filled_page_by_page() {
    rounds("protect", 4);
    let mut session = Session::start("split", frozen(seed(), 256));
    if session.attach() {
        session.finish();
    }
}

#[test]
fn pages_that_come_before_the_process_are_kept_for_it() {
    let mut session = Session::start("plain", frozen(seed(), 768));
    session.push(100);
    if session.attach_unrestored() {
        session.await_demanded(50);
        session.push(50);
        session.restored();
        session.finish();
    }
}

#[test]
fn a_thread_that_waits_for_a_page_sees_it_removed() {
    let mut session = Session::start("removed_while_waiting", frozen(seed(), 64));
    session.put_answers_off();
    if session.attach() {
        session.await_request();
        session.tell(GO);
        session.expect(READY);
        session.answer();
        session.settle();
        session.tell(workload::SETTLED);
    }
}

#[test]
fn a_page_that_is_gone_again_is_zero() {
    let mut session = Session::start("wiped_on_fork", frozen(seed(), 64));
    if session.attach() {
        session.finish();
    }
}

#[test]
fn a_move_that_shrinks_spares_its_neighbours() {
    let mut session = Session::start("shrunk_while_moved", frozen(seed(), 64));
    if session.attach() {
        session.finish();
    }
}

#[test]
fn pages_find_each_other_when_moves_are_reported_in_another_order() {
    let mut session = Session::start("moved_over_what_is_leaving", frozen(seed(), 64));
    session.read_events(false);
    if session.attach() {
        session.expect(READY);
        session.read_events(true);
        session.finish();
    }
}

#[test]
fn a_killed_process_needs_nothing_more() {
    let first = seed();
    for seed in first..first + 6 * multiplier() {
        let mut session = Session::start("all", frozen(seed, 1536));
        if !session.attach() {
            return;
        }
        session.push_in_background(100);
        session.await_demanded(seed % 8 * 40);
        session.kill();
        session.settle();
    }
}

#[test]
fn the_end_of_a_process_shows_without_a_report() {
    let mut session = Session::start("all", frozen(seed(), 64));
    if !session.attach() {
        return;
    }
    assert!(session.is_alive());
    session.kill();
    assert!(!session.is_alive());
    session.settle();
}

/// Nobody's descendant any more, but its descriptor says that it is there, and its session that it belongs to the copy.
#[test]
fn an_orphan_of_the_copy_is_found_and_killed() {
    let mut session = Session::start("orphan", frozen(seed(), 64));
    let mut copy = Copy::default();
    copy.add(session.task());
    if !session.attach() {
        return;
    }
    session.bury_parent();
    assert!(!session.is_gone(), "the child has the memory");
    assert_eq!(copy.kill().len(), 1);
    let deadline = Instant::now() + session::PATIENCE;
    while !session.is_gone() {
        assert!(Instant::now() < deadline, "the child lives on");
        std::thread::yield_now();
    }
    session.settle();
}

#[test]
fn stress() {
    let mut seed = seed();
    println!("stress: seeds from {seed}");
    let end = Instant::now() + STRESS_BUDGET;
    while Instant::now() < end && round("all", seed) {
        seed += 1;
    }
}
