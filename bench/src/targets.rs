//! Targets: a figure of this run, a bound, and whether it was met.

use std::fmt;

use serde::Serialize;

use crate::stats::Summary;

/// The verdict that is to be seen.
pub const NOT_MET: &str = "NOT MET";

/// What a figure must not pass.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// No more than this.
    AtMost(f64),
    /// No less than this.
    AtLeast(f64),
}

/// One target of one run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Target {
    what: String,
    /// The median counts.
    value: Option<Summary>,
    bound: Bound,
    met: Option<bool>,
}

impl Target {
    /// A figure by itself; nothing to be met when it was not measured.
    pub fn value(what: &str, value: Option<Summary>, bound: Bound) -> Self {
        let met = value.map(|value| match bound {
            Bound::AtMost(most) => value.median <= most,
            Bound::AtLeast(least) => value.median >= least,
        });
        Self {
            what: what.to_owned(),
            value,
            bound,
            met,
        }
    }

    /// What it is about.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// Whether it was measured and met.
    pub fn is_met(&self) -> bool {
        self.met == Some(true)
    }

    /// What it is about, the figure, its spread, the bound and the verdict.
    pub fn cells(&self) -> [String; 5] {
        let bound = match self.bound {
            Bound::AtMost(most) => format!("<= {}", short(most)),
            Bound::AtLeast(least) => format!(">= {}", short(least)),
        };
        let verdict = match self.met {
            Some(true) => "met",
            Some(false) => NOT_MET,
            None => "not measured",
        };
        let shown = |of: fn(Summary) -> String| self.value.map_or("-".to_owned(), of);
        let value = shown(|value| format!("{:.2}", value.median));
        let spread = shown(|value| format!("{:.2} to {:.2}", value.min, value.max));
        [self.what.clone(), value, spread, bound, verdict.to_owned()]
    }

    /// Whether there is a figure at all.
    pub fn is_measured(&self) -> bool {
        self.value.is_some()
    }

    /// One figure over another of the same run.
    pub fn ratio(what: &str, value: Option<Summary>, over: Option<Summary>, bound: Bound) -> Self {
        let ratio = value.zip(over).map(|(value, over)| value.over(over));
        Self::value(what, ratio, bound)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [what, value, spread, bound, verdict] = self.cells();
        write!(
            f,
            "  {what:<48} {value:>9}  {spread:>18}  {bound:<9} {verdict}"
        )
    }
}

/// At most two digits behind the point, and none that say nothing.
fn short(bound: f64) -> String {
    let text = format!("{bound:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_met_or_not_or_unknown() {
        let most = Bound::AtMost(2.0);
        let once = |value: Option<f64>| value.map(Summary::single);
        let met = |value, over| Target::ratio("x", once(value), once(over), most).met;
        assert_eq!(met(Some(4.0), Some(2.0)), Some(true));
        assert_eq!(met(Some(5.0), Some(2.0)), Some(false));
        assert_eq!(met(Some(5.0), None), None);
        let least = Target::value("x", once(Some(0.7)), Bound::AtLeast(0.8));
        assert_eq!(least.met, Some(false));
    }
}
