//! The one-time token of a migration, in a file that the operator carries from the source to the destination.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::proto::control::{NoRandomness, Secret};

/// Hexadecimal digits of a token.
const DIGITS: usize = 64;

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file.
    #[error("cannot use the token file {path}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// The system's word.
        error: io::Error,
    },
    /// What is in it.
    #[error("{0} does not hold a token of {DIGITS} hexadecimal digits")]
    Malformed(PathBuf),
    /// Randomness.
    #[error(transparent)]
    NoRandomness(#[from] NoRandomness),
}

/// Writes a new token to a new file that only its owner can read.
pub fn create(path: &Path) -> Result<Secret, TokenError> {
    let token = Secret::random()?;
    let digits: String = token.0.iter().map(|byte| format!("{byte:02x}")).collect();
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| writeln!(file, "{digits}"))
        .map_err(file_error(path))?;
    Ok(token)
}

/// Reads a token that [`create`] wrote.
pub fn read(path: &Path) -> Result<Secret, TokenError> {
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(2 * DIGITS as u64).read_to_string(&mut text))
        .map_err(file_error(path))?;
    parse(text.trim()).ok_or_else(|| TokenError::Malformed(path.to_owned()))
}

fn file_error(path: &Path) -> impl Fn(io::Error) -> TokenError {
    let path = path.to_owned();
    move |error| TokenError::File {
        path: path.clone(),
        error,
    }
}

/// The token that these digits stand for.
pub fn parse(digits: &str) -> Option<Secret> {
    // A sign is none, though it may begin a number.
    if digits.len() != DIGITS || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    let mut token = [0; DIGITS / 2];
    for (index, byte) in token.iter_mut().enumerate() {
        *byte = u8::from_str_radix(digits.get(2 * index..2 * index + 2)?, 16).ok()?;
    }
    Some(Secret(token))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_back_and_never_overwritten() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("token");
        let token = create(&path).expect("created");
        assert!(read(&path).expect("readable").matches(&token));
        assert!(create(&path).is_err());
    }

    #[test]
    fn anything_else_is_malformed() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("token");
        for text in [
            "",
            "zz",
            &"g".repeat(64),
            &"+1".repeat(32),
            &"ä".repeat(32),
            &"0".repeat(65),
        ] {
            std::fs::write(&path, text).expect("written");
            assert!(
                matches!(read(&path), Err(TokenError::Malformed(_))),
                "{text:?}"
            );
        }
    }
}
