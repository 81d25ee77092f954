//! Which key comes next: any, or some far more often than others.

use tests::random::Random;
use tests::touch::order::Order;

/// The exponent of Zipf's law that caches are usually measured with.
const THETA: f64 = 0.99;

/// Draws keys.
#[derive(Debug, Clone)]
pub struct Keys {
    random: Random,
    bound: usize,
    zipf: Option<Zipf>,
}

/// Rank n is drawn in proportion to n^-THETA; a rank's key is anywhere.
#[derive(Debug, Clone)]
struct Zipf {
    /// Sums of the weights of all ranks up to each.
    sums: Vec<f64>,
    order: Order,
}

impl Keys {
    /// Every one of `bound` keys equally often.
    pub fn uniform(bound: usize, seed: u64) -> Self {
        Self {
            random: Random::new(seed),
            bound,
            zipf: None,
        }
    }

    /// By Zipf's law.
    pub fn zipf(bound: usize, seed: u64) -> Self {
        let mut sum = 0.0;
        let sums = (1..=bound).map(|rank| {
            sum += (rank as f64).powf(-THETA);
            sum
        });
        Self {
            random: Random::new(seed),
            bound,
            zipf: Some(Zipf {
                sums: sums.collect(),
                order: Order::new(bound as u64, seed),
            }),
        }
    }

    /// The next key.
    pub fn next(&mut self) -> usize {
        let Some(zipf) = &self.zipf else {
            return self.random.index(self.bound);
        };
        let total = zipf.sums.last().copied().unwrap_or(0.0);
        let drawn = self.random.next() as f64 / u64::MAX as f64 * total;
        let rank = zipf.sums.partition_point(|sum| *sum < drawn);
        zipf.order.at(rank.min(self.bound - 1) as u64) as usize
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn most_frequent_of(mut keys: Keys) -> usize {
        let mut counts = vec![0; 1000];
        for _ in 0..20_000 {
            counts[keys.next()] += 1;
        }
        counts.sort_unstable_by(|one, other| other.cmp(one));
        counts[..10].iter().sum()
    }

    #[test]
    fn zipf_prefers_few_and_uniform_none() {
        let zipf = most_frequent_of(Keys::zipf(1000, 3));
        let uniform = most_frequent_of(Keys::uniform(1000, 3));
        // The ten first ranks have 0.39 of the weight.
        assert!((7000..9000).contains(&zipf), "{zipf}");
        assert!(uniform < 600, "{uniform}");
    }
}
