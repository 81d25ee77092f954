//! Waiting for a condition with a deadline, the only kind of waiting the rig does.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How often a condition is looked at: short against everything the rig waits for, long enough to leave the CPU alone.
const POLL: Duration = Duration::from_millis(2);

/// Waits until `condition` holds and fails with `what` in the message once `limit` has passed.
pub fn wait_until(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    wait_for(limit, what, || condition().then_some(()))
}

/// Waits until `probe` returns a value, and returns it.
pub fn wait_for<T>(limit: Duration, what: &str, mut probe: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = probe() {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("waited {limit:?} in vain for {what}");
        }
        thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_what_did_not_happen() {
        let error = wait_until(Duration::from_millis(5), "the moon to fall", || false)
            .expect_err("it stays up");
        assert!(error.to_string().contains("the moon to fall"));
    }

    #[test]
    fn returns_the_value_as_soon_as_it_is_there() {
        let mut calls = 0;
        let value = wait_for(Duration::from_secs(5), "the third call", || {
            calls += 1;
            (calls == 3).then_some(calls)
        });
        assert_eq!(value.expect("three calls fit in five seconds"), 3);
    }
}
