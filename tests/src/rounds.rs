//! How long the clients of a crowd wait: all of them ask, then all answers are read, round after round.

use std::time::{Duration, Instant};

/// What was seen so far.
#[derive(Debug, Default)]
pub struct Rounds {
    /// The longest wait of any client in each round.
    longest: Vec<Duration>,
    last_answer: Option<Instant>,
    longest_stall: Duration,
}

/// What the clients felt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Felt {
    /// The longest time without any answer to anybody.
    pub stall: Duration,
    /// The longest that any one client waited for its answer. In each round some are read last, so this has the time of
    /// a round in it.
    pub longest_wait: Duration,
    /// The same in a usual round, the median.
    pub usual_wait: Duration,
}

impl Rounds {
    /// Everybody is about to ask.
    pub fn begin(&mut self) {
        self.longest.push(Duration::ZERO);
    }

    /// A client that asked at `asked` was answered at `now`.
    pub fn answered(&mut self, asked: Instant, now: Instant) {
        // The time to connect is no stall.
        let before = self.last_answer.replace(now).unwrap_or(now);
        self.longest_stall = self.longest_stall.max(now - before);
        if let Some(longest) = self.longest.last_mut() {
            *longest = (*longest).max(now - asked);
        }
    }

    /// What came of it.
    pub fn felt(mut self) -> Felt {
        self.longest.sort_unstable();
        let at = |index: usize| self.longest.get(index).copied().unwrap_or_default();
        Felt {
            stall: self.longest_stall,
            longest_wait: at(self.longest.len().saturating_sub(1)),
            usual_wait: at(self.longest.len() / 2),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_wait_is_of_one_client_and_a_stall_of_all() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut rounds = Rounds::default();
        for (asked, answered) in [(0, [1, 2]), (2, [50, 93]), (93, [94, 96])] {
            rounds.begin();
            for answered in answered {
                rounds.answered(at(asked), at(answered));
            }
        }
        let felt = Felt {
            stall: Duration::from_millis(48),
            longest_wait: Duration::from_millis(91),
            usual_wait: Duration::from_millis(3),
        };
        assert_eq!(rounds.felt(), felt);
        assert_eq!(Rounds::default().felt(), Felt::default());
    }
}
