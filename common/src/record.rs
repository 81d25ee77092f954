//! What a program reports of its migration: when each phase began and how long it took.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::session::State;

/// One phase in the record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Phase {
    /// The state's name.
    pub name: &'static str,
    /// Microseconds from the program's first phase to this one.
    pub at_us: u64,
    /// Microseconds it took.
    pub took_us: u64,
}

/// A clock that is read at each change of state.
#[derive(Clone, Debug)]
pub struct Phases {
    started: Instant,
    current: (State, Instant),
    done: Vec<Phase>,
}

impl Phases {
    /// Starts the clock in `state`.
    pub fn start(state: State) -> Self {
        let now = Instant::now();
        Phases {
            started: now,
            current: (state, now),
            done: Vec::new(),
        }
    }

    /// Ends the current phase and begins `state`.
    pub fn enter(&mut self, state: State) {
        let now = Instant::now();
        let (name, since) = self.current;
        self.done.push(Phase {
            name: name.name(),
            at_us: micros(since - self.started),
            took_us: micros(now - since),
        });
        self.current = (state, now);
        tracing::info!(phase = %state, "entered");
    }

    /// The phases that ended.
    pub fn done(&self) -> &[Phase] {
        &self.done
    }

    /// Microseconds since the clock was started.
    pub fn total_us(&self) -> u64 {
        micros(self.started.elapsed())
    }
}

fn micros(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Microseconds since 1970, for moments that are compared between the two ends of a test on one machine.
pub fn unix_us(time: SystemTime) -> u64 {
    micros(time.duration_since(UNIX_EPOCH).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_follow_each_other_without_gap() {
        let mut phases = Phases::start(State::Hello);
        phases.enter(State::Advise);
        phases.enter(State::Freeze);
        let [hello, advise] = phases.done() else {
            panic!("two phases ended");
        };
        assert_eq!((hello.name, hello.at_us), ("hello", 0));
        assert!(advise.at_us >= hello.took_us);
        assert!(phases.total_us() >= advise.at_us + advise.took_us);
    }
}
