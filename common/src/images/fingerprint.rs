//! Which dump a directory of images holds: both ends compare it before one resolves faults with the other's pages.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::{DumpedProcess, ReadImagesError};

/// Hash of the images that say who was dumped, in which run of CRIU, and with which pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagesDigest(pub u64);

/// The digest of the dump in `directory`, whose processes are `processes`.
///
/// It guards against mistakes, not against people: whoever can ask for pages has been authenticated.
pub fn images_digest(
    directory: &Path,
    processes: &[DumpedProcess],
) -> Result<ImagesDigest, ReadImagesError> {
    let fixed = ["inventory.img", "pstree.img"].map(String::from);
    let pagemaps = processes
        .iter()
        .map(|process| format!("pagemap-{}.img", process.pid.0));
    let mut hash = Xxh3::new();
    for name in fixed.into_iter().chain(pagemaps) {
        let content = fs::read(directory.join(&name))
            .map_err(|error| ReadImagesError::Read { name, error })?;
        hash.update(&(content.len() as u64).to_le_bytes());
        hash.update(&content);
    }
    Ok(ImagesDigest(hash.digest()))
}
