//! What an operator wants done about a link that stays lost after the point of no return.

use std::str::FromStr;
use std::time::Duration;

/// What is done when the operator's limit has passed (`--on-lost`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnLost {
    /// Nothing but saying so: both copies stay as they are.
    #[default]
    KeepPaused,
    /// This host's copy is killed.
    Kill,
    /// The destination's copy is killed, and the source told so as soon as it can be reached; then the original runs.
    ThawSource,
}

/// What is done about a link that stays lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LostPlan {
    /// The operator's limit.
    pub give_up_after: Option<Duration>,
    /// What is done then.
    pub on_lost: OnLost,
}

/// A value that `--on-lost` or `--give-up-after` does not know.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LostError {
    /// Of `--on-lost`.
    #[error("{0:?} is none of keep-paused, kill, thaw-source")]
    OnLost(String),
    /// Of `--give-up-after`.
    #[error("{0:?} is no time such as 90, 90s, 5m or 2h, and of a century at most")]
    Duration(String),
}

impl FromStr for OnLost {
    type Err = LostError;

    fn from_str(text: &str) -> Result<Self, LostError> {
        match text {
            "keep-paused" => Ok(OnLost::KeepPaused),
            "kill" => Ok(OnLost::Kill),
            "thaw-source" => Ok(OnLost::ThawSource),
            _ => Err(LostError::OnLost(text.to_owned())),
        }
    }
}

/// Seconds of the longest time that operators may name. Clocks end somewhere behind it.
pub const MAX_DURATION_SECONDS: u64 = 100 * 365 * 24 * 3600;

/// How long a workload may stand still before the point of no return, unless the operator says otherwise: longer than a
/// skeleton takes on a slow link, shorter than anyone waits.
pub const FREEZE_LIMIT: &str = "5m";

/// A limit as operators write it: a time, or 0 for none.
pub fn parse_limit(text: &str) -> Result<Limit, LostError> {
    let limit = parse_duration(text)?;
    Ok(Limit((!limit.is_zero()).then_some(limit)))
}

/// A limit of time, if there is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limit(pub Option<Duration>);

impl Limit {
    /// What exceeding it is called.
    pub fn exceeded(self) -> String {
        let seconds = self.0.unwrap_or_default().as_secs();
        format!(
            "the workload stood still for longer than --freeze-limit allows ({seconds} s); it runs on the source, and a larger \
             limit, or 0 for none, gives it more time"
        )
    }
}

/// A time as operators write it: a number of seconds, or with `s`, `m` or `h` behind it.
pub fn parse_duration(text: &str) -> Result<Duration, LostError> {
    let bad = || LostError::Duration(text.to_owned());
    let (number, unit) = match text.char_indices().next_back() {
        Some((end, 's')) => (&text[..end], 1),
        Some((end, 'm')) => (&text[..end], 60),
        Some((end, 'h')) => (&text[..end], 3600),
        _ => (text, 1),
    };
    let number: u64 = number.parse().map_err(|_| bad())?;
    let seconds = number.checked_mul(unit);
    let seconds = seconds.filter(|seconds| *seconds <= MAX_DURATION_SECONDS);
    seconds.map(Duration::from_secs).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        let seconds = |text| parse_duration(text).map(|time| time.as_secs());
        assert_eq!(seconds("90"), Ok(90));
        assert_eq!(seconds("5m"), Ok(300));
        assert_eq!(seconds("2h"), Ok(7200));
        for text in ["", "s", "-1", "5d", "99999999999999999999", "ä"] {
            assert!(seconds(text).is_err(), "{text}");
        }
        // What no clock can count.
        for text in [
            "18446744073709551615",
            "9223372036854775807s",
            "5124095576030431h",
        ] {
            assert!(seconds(text).is_err(), "{text}");
        }
        let longest = Duration::from_secs(seconds("876000h").expect("a century"));
        assert!(std::time::Instant::now().checked_add(longest).is_some());
    }

    #[test]
    fn no_time_is_no_limit() {
        assert_eq!(parse_limit("0"), Ok(Limit(None)));
        let default = parse_limit(FREEZE_LIMIT).expect("it is a time");
        assert_eq!(default, Limit(Some(Duration::from_secs(300))));
        assert!(default.exceeded().contains("300 s"));
    }

    #[test]
    fn the_ends_of_a_lost_session_have_names() {
        assert_eq!("kill".parse(), Ok(OnLost::Kill));
        assert!("thaw".parse::<OnLost>().is_err());
    }
}
