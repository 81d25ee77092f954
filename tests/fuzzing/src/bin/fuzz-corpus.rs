//! Writes the corpus of every target: `fuzz-corpus DIRECTORY`.

use std::path::Path;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let directory = env::args()
        .nth(1)
        .unwrap_or_else(|| String::from("fuzz/corpus"));
    for target in fuzzing::TARGETS {
        let folder = Path::new(&directory).join(target.name);
        fs::create_dir_all(&folder)?;
        for (number, input) in fuzzing::corpus(target.name).iter().enumerate() {
            fs::write(folder.join(format!("seed-{number}")), input)?;
        }
    }
    Ok(())
}
