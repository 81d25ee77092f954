//! The faulty path: passes UDP packets on, and not always well. See [`tests::relay`].

use anyhow::Result;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    tests::relay::main(&arguments)
}
