//! When the path is dark: stretches of darkness and light in turns, from the moment the relay is told.

use std::time::Duration;

/// The stretches, beginning with a dark one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outages {
    stretches: Vec<Duration>,
}

impl Outages {
    /// Stretches of so many milliseconds.
    pub fn new(stretches_ms: &[u64]) -> Self {
        Self {
            stretches: stretches_ms
                .iter()
                .map(|length| Duration::from_millis(*length))
                .collect(),
        }
    }

    /// Whether the path is dark `since` it was told to be.
    pub fn is_dark(&self, since: Duration) -> bool {
        let passed = self.passed(since);
        passed.is_multiple_of(2) && passed < self.stretches.len()
    }

    /// Outages that are over by then.
    pub fn over(&self, since: Duration) -> u64 {
        (self.passed(since) as u64).div_ceil(2)
    }

    /// Stretches that are over.
    fn passed(&self, since: Duration) -> usize {
        let ends = self.stretches.iter().scan(Duration::ZERO, |end, stretch| {
            *end += *stretch;
            Some(*end)
        });
        ends.take_while(|end| *end <= since).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn darkness_and_light_take_turns() {
        let outages = Outages::new(&[100, 50, 10]);
        let at = Duration::from_millis;
        let dark = [0, 99, 150, 159];
        assert!(dark.into_iter().all(|since| outages.is_dark(at(since))));
        let light = [100, 149, 160, 10_000];
        assert!(light.into_iter().all(|since| !outages.is_dark(at(since))));
        let over = [0, 100, 149, 150, 160].map(|since| outages.over(at(since)));
        assert_eq!(over, [0, 1, 1, 1, 2]);
    }

    #[test]
    fn no_stretches_are_no_outage() {
        assert!(!Outages::new(&[]).is_dark(Duration::ZERO));
        assert_eq!(Outages::new(&[]).over(Duration::MAX), 0);
    }
}
