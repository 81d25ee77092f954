//! A peer that does one thing wrong. See [`tests::faulty_peer`].

use anyhow::Result;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    tests::faulty_peer::main(&arguments)
}
