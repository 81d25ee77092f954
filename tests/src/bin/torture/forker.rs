//! A thread that forks: each child must see its parent's memory as it was at that moment, whatever the parent does next.

use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use tests::board::{Board, Place};
use tests::random::Random;

use crate::arena::{Arena, Failure};

/// Pages parent and child share at the fork.
const PAGES: usize = 512;
/// Pages the parent changes while the child looks.
const CHANGES: usize = 32;
/// Copying page tables holds up every other thread, so not all the time is spent on it.
const PAUSE: Duration = Duration::from_millis(20);

/// Forks until the workload is stopped.
pub fn run(board: &Board, seed: u64) -> Result<(), Failure> {
    let mut random = Random::new(seed);
    let mut arena = Arena::new(PAGES, Place::Arena, &board.pages_checked)?;
    arena.write_all(&mut random);
    while !board.is_stopped() {
        one_child(&mut arena, &mut random, board)?;
        std::thread::sleep(PAUSE);
    }
    Ok(arena.check_all()?)
}

fn one_child(arena: &mut Arena<'_>, random: &mut Random, board: &Board) -> Result<(), Failure> {
    // SAFETY: the child only touches memory that is there already and exits; it takes no lock and allocates nothing.
    match unsafe { fork() }.map_err(io::Error::from)? {
        ForkResult::Child => {
            let verdict = inspect(arena, random, board);
            // SAFETY: ends the process without running anything that belongs to the parent.
            unsafe { libc::_exit(verdict) }
        }
        ForkResult::Parent { child } => {
            for _ in 0..CHANGES {
                arena.write(random.index(PAGES), random);
            }
            match waitpid(child, None).map_err(io::Error::from)? {
                WaitStatus::Exited(_, 0) => {}
                ended => {
                    return Err(
                        io::Error::other(format!("a forked child ended so: {ended:?}")).into(),
                    );
                }
            }
            board.forks.fetch_add(1, Ordering::Relaxed);
            arena.check(random.index(PAGES))?;
            Ok(())
        }
    }
}

/// What the child does: compare, change its own copy, compare again.
fn inspect(arena: &mut Arena<'_>, random: &mut Random, board: &Board) -> i32 {
    arena.as_child();
    let first = arena.check_all();
    for _ in 0..CHANGES {
        arena.write(random.index(PAGES), random);
    }
    match first.and_then(|()| arena.check_all()) {
        Ok(()) => 0,
        Err(mismatch) => {
            board.report(mismatch);
            1
        }
    }
}
