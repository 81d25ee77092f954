//! Medians and spreads of a handful of runs.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Several measurements of the same thing.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The middle one.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Summary {
    /// Sums up `values`; `None` when there are none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        Some(Self { median, min, max })
    }

    /// A figure that was measured once.
    pub fn single(value: f64) -> Self {
        Self {
            median: value,
            min: value,
            max: value,
        }
    }

    /// The median over that of `other`, and the smallest and largest that their spreads allow.
    pub fn over(self, other: Self) -> Self {
        Self {
            median: self.median / other.median,
            min: self.min / other.max,
            max: self.max / other.min,
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = usize::from(self.max < 100.0);
        let Self { median, min, max } = self;
        write!(f, "{median:.digits$} ({min:.digits$} to {max:.digits$})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_is_between_the_middle_two() {
        assert_eq!(
            Summary::of(&[4.0, 1.0, 3.0, 2.0]),
            Some(Summary {
                median: 2.5,
                min: 1.0,
                max: 4.0
            })
        );
        assert_eq!(
            Summary::of(&[5.0, 1.0, 3.0]).map(|summary| summary.median),
            Some(3.0)
        );
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn a_ratio_is_as_uncertain_as_its_parts() {
        let of = |values: &[f64]| Summary::of(values).expect("values");
        let ratio = of(&[4.0, 6.0, 8.0]).over(of(&[1.0, 2.0, 4.0]));
        assert_eq!((ratio.median, ratio.min, ratio.max), (3.0, 1.0, 8.0));
    }
}
