//! Every decoder over its corpus and seeded mutations of it: the short run, in every test run.
//!
//! `FUZZ_RUNS` sets how many mutations each decoder gets. They are others in every run; `FUZZ_SEED` repeats those of one. A
//! failure prints its input.

use std::fs;
use std::panic::catch_unwind;
use std::path::Path;

use fuzzing::{TARGETS, Target, corpus};
use tests::random::{Random, fresh_seed};

/// Mutations for each decoder: a second or two.
const RUNS: u64 = 20_000;
/// What goes through sockets gets so many times fewer.
const SLOWER: u64 = 20;
/// Longest input.
const MAX_BYTES: usize = 4096;
/// Changes of one input at most.
const MAX_CHANGES: u64 = 6;
/// Numbers at which arithmetic goes wrong.
const EDGES: [u64; 8] = [
    0,
    1,
    0x7f,
    0xffff,
    u32::MAX as u64,
    1 << 52,
    i64::MAX as u64,
    u64::MAX,
];

fn number(name: &str, default: u64) -> u64 {
    let given = std::env::var(name).ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn feed(target: Target, input: &[u8]) -> bool {
    let run = target.run;
    let fed = catch_unwind(|| run(input));
    fed.unwrap_or_else(|_| panic!("{} does not bear {input:02x?}", target.name))
}

#[test]
fn good_inputs_are_taken() {
    for target in TARGETS {
        let inputs = corpus(target.name);
        assert!(!inputs.is_empty(), "{} has no corpus", target.name);
        for input in inputs {
            assert!(
                feed(*target, &input),
                "{} refuses {input:02x?}",
                target.name
            );
        }
    }
}

#[test]
fn mutations_are_borne() {
    let (runs, seed) = (number("FUZZ_RUNS", RUNS), number("FUZZ_SEED", fresh_seed()));
    eprintln!("seed {seed} (run again with FUZZ_SEED={seed})");
    for target in TARGETS {
        let inputs = corpus(target.name);
        let runs = if target.is_slow { runs / SLOWER } else { runs };
        for run in 0..runs {
            let mut random = Random::new(seed.wrapping_add(run));
            let mut input = inputs[random.index(inputs.len())].clone();
            for _ in 0..1 + random.below(MAX_CHANGES) {
                mutate(&mut input, &inputs, &mut random);
            }
            feed(*target, &input);
        }
    }
}

/// `fuzz/` is no member of the workspace, and `make fuzz` alone compiles it: each decoder has its program there, which is
/// the one line that feeds it.
#[test]
fn each_decoder_has_a_program_for_libfuzzer() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    let manifest = fs::read_to_string(fuzz.join("Cargo.toml")).expect("it is there");
    for Target { name, .. } in TARGETS {
        let program = fs::read_to_string(fuzz.join(format!("fuzz_targets/{name}.rs")));
        let program = program.unwrap_or_else(|error| panic!("{name}: {error}"));
        let line = format!("fuzz_target!(|bytes: &[u8]| fuzzing::feed(\"{name}\", bytes));");
        assert!(program.contains(&line), "{name} feeds another decoder");
        let path = format!("path = \"fuzz_targets/{name}.rs\"");
        assert!(manifest.contains(&path), "{name} is not in the manifest");
    }
    let programs = fs::read_dir(fuzz.join("fuzz_targets")).expect("it is there");
    assert_eq!(programs.count(), TARGETS.len(), "programs without decoder");
}

fn mutate(input: &mut Vec<u8>, corpus: &[Vec<u8>], random: &mut Random) {
    let at = random.index(input.len() + 1);
    match random.below(8) {
        0 if at < input.len() => input[at] ^= 1 << random.below(8),
        1 if at < input.len() => input[at] = random.next() as u8,
        2 => input.truncate(at),
        3 => insert(input, at, &random.pick(&EDGES).to_le_bytes()),
        4 => overwrite(input, at, &random.pick(&EDGES).to_le_bytes()),
        5 => insert(input, at, &varint(random.pick(&EDGES))),
        6 => {
            let other = &corpus[random.index(corpus.len())];
            insert(input, at, &other[random.index(other.len())..]);
        }
        _ => overwrite(input, at, &varint(random.pick(&EDGES))),
    }
    input.truncate(MAX_BYTES);
}

fn insert(input: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    input.splice(at..at, bytes.iter().copied());
}

fn overwrite(input: &mut [u8], at: usize, bytes: &[u8]) {
    for (to, from) in input[at..].iter_mut().zip(bytes) {
        *to = *from;
    }
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}
