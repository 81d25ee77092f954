//! What is fuzzed: one function for each decoder of what a peer, the kernel, CRIU, a container runtime, an operator or a file
//! brings.
//!
//! A function panics when a decoder does, or when what it accepted breaks a promise: that it encodes back to the same,
//! or is within the limits. `fuzz/` runs them under libFuzzer; `tests/fuzzing/tests` over the corpus and mutations of
//! it, in every test run.

mod corpus;
mod sockets;
mod targets;
mod texts;

pub use corpus::corpus;
pub use targets::{TARGETS, Target};

/// Feeds bytes to the target of that name, for libFuzzer's programs.
pub fn feed(target: &str, bytes: &[u8]) {
    let found = TARGETS.iter().find(|known| known.name == target);
    (found.expect("a target of that name").run)(bytes);
}
