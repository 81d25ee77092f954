//! What happens to one packet: a function of the seed and the packet's number, so that a run can be repeated.

use std::time::Duration;

use super::{CERTAIN, Faults};
use crate::random::{Random, mix};

/// Which way packets go: the relay's port (by index), and the direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Lane {
    /// Index of the port.
    pub port: usize,
    /// From the destination to the source.
    pub forth: bool,
}

/// The fate of one packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fate {
    /// How many of it arrive: 0 to 2.
    pub copies: u8,
    /// How late it is.
    pub delay: Duration,
    /// Whether it is held back longer than others.
    pub reordered: bool,
    /// Which bit of it is flipped, counted in bits and modulo its length.
    pub corrupt: Option<u64>,
}

impl Fate {
    /// The fate of packet `number` of a lane.
    pub fn draw(faults: &Faults, lane: Lane, number: u64) -> Self {
        let lane = (lane.port as u64) << 1 | u64::from(lane.forth);
        let mut random = Random::new(mix(faults.seed ^ mix(lane + 1)) ^ mix(number));
        let mut happens = |chance: u64| random.below(CERTAIN) < chance;
        let dropped = happens(faults.drop);
        let copies = if dropped {
            0
        } else {
            1 + u8::from(happens(faults.duplicate))
        };
        let reordered = happens(faults.reorder);
        let corrupt = happens(faults.corrupt).then(|| random.next());
        let late = if reordered && faults.reorder_us > 0 {
            random.below(faults.reorder_us) + 1
        } else {
            0
        };
        Self {
            copies,
            delay: Duration::from_micros(faults.delay_us + late),
            reordered,
            corrupt,
        }
    }
}

/// Flips the bit that `corrupt` names.
pub fn flip(packet: &mut [u8], corrupt: u64) {
    let bits = packet.len() as u64 * 8;
    if bits > 0 {
        let bit = corrupt % bits;
        packet[(bit / 8) as usize] ^= 1 << (bit % 8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LANE: Lane = Lane {
        port: 0,
        forth: true,
    };

    fn faults(seed: u64) -> Faults {
        Faults {
            seed,
            drop: 1000,
            duplicate: 500,
            corrupt: 100,
            reorder: 2000,
            reorder_us: 300,
            delay_us: 50,
            rebind_every: 0,
        }
    }

    fn fates(seed: u64, lane: Lane) -> Vec<Fate> {
        (0..10_000)
            .map(|number| Fate::draw(&faults(seed), lane, number))
            .collect()
    }

    #[test]
    fn the_same_seed_gives_the_same_fates() {
        assert_eq!(fates(1, LANE), fates(1, LANE));
        assert_ne!(fates(1, LANE), fates(2, LANE));
        let back = Lane {
            forth: false,
            ..LANE
        };
        assert_ne!(fates(1, LANE), fates(1, back));
    }

    #[test]
    fn chances_are_what_they_claim() {
        let fates = fates(3, LANE);
        let count = |which: fn(&Fate) -> bool| fates.iter().filter(|fate| which(fate)).count();
        assert!((900..1100).contains(&count(|fate| fate.copies == 0)));
        assert!((350..550).contains(&count(|fate| fate.copies == 2)));
        assert!((1800..2200).contains(&count(|fate| fate.reordered)));
        assert!((60..140).contains(&count(|fate| fate.corrupt.is_some())));
        let bounds = Duration::from_micros(50)..=Duration::from_micros(350);
        assert!(fates.iter().all(|fate| bounds.contains(&fate.delay)));
    }

    #[test]
    fn a_good_path_harms_nothing() {
        let fate = Fate::draw(&Faults::default(), LANE, 7);
        let unharmed = Fate {
            copies: 1,
            delay: Duration::ZERO,
            reordered: false,
            corrupt: None,
        };
        assert_eq!(fate, unharmed);
    }

    #[test]
    fn one_bit_is_flipped() {
        let mut packet = [0; 3];
        flip(&mut packet, 24 + 9);
        assert_eq!(packet, [0, 2, 0]);
        flip(&mut [], 5);
    }
}
