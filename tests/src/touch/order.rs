//! The order in which pages are touched: each once, and nothing to remember but a seed.

use crate::random::mix;

/// Rounds of the Feistel network; four make it random enough for any prefetcher.
const ROUNDS: u64 = 4;

/// A permutation of the numbers below a bound. It keeps no table, for a table would be memory that has to be moved.
#[derive(Debug, Clone, Copy)]
pub struct Order {
    bound: u64,
    half_bits: u32,
    seed: u64,
}

impl Order {
    /// The permutation of `0..bound` that belongs to `seed`.
    pub fn new(bound: u64, seed: u64) -> Self {
        let bits = u64::BITS - bound.max(2).leading_zeros();
        Self {
            bound,
            half_bits: bits.div_ceil(2),
            seed,
        }
    }

    /// The number at `place`, both below the bound.
    pub fn at(&self, place: u64) -> u64 {
        // The network permutes the next even power of two; walk until the result is in range.
        let mut number = self.network(place);
        while number >= self.bound {
            number = self.network(number);
        }
        number
    }

    fn network(&self, number: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (number >> self.half_bits, number & mask);
        for round in 0..ROUNDS {
            let mixed = mix(right ^ mix(self.seed.wrapping_add(round))) & mask;
            (left, right) = (right, left ^ mixed);
        }
        (left << self.half_bits) | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_comes_once() {
        for bound in [1, 2, 3, 100, 1024, 5000] {
            let order = Order::new(bound, 9);
            let mut seen: Vec<u64> = (0..bound).map(|place| order.at(place)).collect();
            seen.sort_unstable();
            assert!(seen.iter().copied().eq(0..bound), "{bound}");
        }
    }

    #[test]
    fn neighbours_are_torn_apart() {
        let order = Order::new(65536, 1);
        let near = (1..65536)
            .filter(|place| order.at(*place).abs_diff(order.at(place - 1)) <= 16)
            .count();
        assert!(near < 100, "{near}");
    }
}
