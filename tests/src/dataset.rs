//! The data a redis holds: records as an application would keep them, every byte a function of key and version.
//!
//! Text with repeated field names and words around identifiers and tokens that do not repeat: it compresses as real
//! data does, neither zeros nor noise.

use std::io::Write;

use crate::random::Random;

const FIRST_NAMES: [&str; 12] = [
    "Amara", "Bjorn", "Chidi", "Dolores", "Emil", "Farah", "Goran", "Hanako", "Ines", "Jun",
    "Katya", "Luis",
];
const LAST_NAMES: [&str; 12] = [
    "Abiodun",
    "Bergstrom",
    "Castillo",
    "Dvorak",
    "Eriksen",
    "Fujimoto",
    "Gonzalez",
    "Haddad",
    "Ivanova",
    "Jensen",
    "Kowalski",
    "Lindqvist",
];
const GOODS: [&str; 16] = [
    "hex bolt M8 galvanised",
    "walnut veneer sheet",
    "linen tablecloth",
    "espresso grinder burr",
    "cast iron skillet",
    "bicycle inner tube 28in",
    "graphite pencil set",
    "merino base layer",
    "solar garden lamp",
    "ceramic plant pot",
    "usb-c charging cable",
    "oak cutting board",
    "down sleeping bag",
    "rice cooker 1.8 l",
    "acoustic guitar strings",
    "telescopic ladder",
];
const WORDS: [&str; 24] = [
    "please",
    "deliver",
    "before",
    "noon",
    "behind",
    "the",
    "blue",
    "gate",
    "and",
    "call",
    "when",
    "nobody",
    "answers",
    "fragile",
    "second",
    "floor",
    "leave",
    "with",
    "neighbour",
    "invoice",
    "follows",
    "by",
    "mail",
    "thanks",
];

/// The records of one redis.
#[derive(Debug, Clone, Copy)]
pub struct Dataset {
    seed: u64,
}

impl Dataset {
    /// The records that belong to `seed`.
    pub const fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// The name of record `number`.
    pub fn key(&self, number: usize) -> String {
        format!("order:{number:08}")
    }

    /// Writes record `number` as it is after `version` changes to `out`, which is cleared first.
    pub fn value(&self, number: usize, version: u32, out: &mut Vec<u8>) {
        out.clear();
        let mut random = Random::new(self.seed ^ ((number as u64) << 32) ^ u64::from(version));
        random.next();
        write_head(&mut random, number, version, out);
        let items = 4 + random.below(20);
        for item in 0..items {
            if item > 0 {
                out.push(b',');
            }
            write_item(&mut random, out);
        }
        out.extend_from_slice(b"],\"note\":\"");
        for _ in 0..8 + random.below(40) {
            out.extend_from_slice(random.pick(&WORDS).as_bytes());
            out.push(b' ');
        }
        out.extend_from_slice(b"\",\"token\":\"");
        for _ in 0..4 + random.below(20) {
            push_hex(random.next(), out);
        }
        out.extend_from_slice(b"\"}");
    }
}

fn write_head(random: &mut Random, number: usize, version: u32, out: &mut Vec<u8>) {
    let first = random.pick(&FIRST_NAMES);
    let last = random.pick(&LAST_NAMES);
    let written = write!(
        out,
        "{{\"order\":{number},\"version\":{version},\"customer\":{{\"id\":{},\"name\":\"{first} {last}\",\
         \"email\":\"{}.{}@example.org\"}},\"items\":[",
        random.below(1_000_000),
        first.to_lowercase(),
        last.to_lowercase(),
    );
    written.expect("writing to a Vec does not fail");
}

fn write_item(random: &mut Random, out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"sku\":\"");
    push_hex(random.next(), out);
    out.extend_from_slice(b"\",\"title\":\"");
    out.extend_from_slice(random.pick(&GOODS).as_bytes());
    let written = write!(
        out,
        "\",\"quantity\":{},\"cents\":{}}}",
        1 + random.below(9),
        100 + random.below(100_000)
    );
    written.expect("writing to a Vec does not fail");
}

fn push_hex(value: u64, out: &mut Vec<u8>) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    out.extend(
        value
            .to_be_bytes()
            .iter()
            .flat_map(|byte| [byte >> 4, byte & 15])
            .map(|digit| DIGITS[digit as usize]),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_depends_on_key_version_and_seed_only() {
        let (mut one, mut other) = (Vec::new(), Vec::new());
        let dataset = Dataset::new(1);
        dataset.value(5, 2, &mut one);
        dataset.value(5, 2, &mut other);
        assert_eq!(one, other);
        for (number, version, seed) in [(6, 2, 1), (5, 3, 1), (5, 2, 2)] {
            Dataset::new(seed).value(number, version, &mut other);
            assert_ne!(one, other);
        }
    }

    #[test]
    fn a_value_is_json_of_a_useful_size() {
        let mut value = Vec::new();
        let mut total = 0;
        for number in 0..200 {
            Dataset::new(3).value(number, 1, &mut value);
            serde_json::from_slice::<serde_json::Value>(&value).expect("it parses");
            total += value.len();
        }
        assert!(
            (1000..3000).contains(&(total / 200)),
            "{} bytes on average",
            total / 200
        );
    }
}
