//! The dumped processes of a skeleton directory, as both ends read them.

use std::fs;
use std::io;
use std::path::Path;

use super::{
    AddressSpaceLayout, ImageError, ImagePid, ThreadRegisters, parse_core, parse_mm, parse_pagemap,
    parse_pstree,
};
use crate::lazy_map::LazyMap;

/// A dumped process that has memory.
#[derive(Debug)]
pub struct DumpedProcess {
    /// Its PID in the images.
    pub pid: ImagePid,
    /// Its lazy pages.
    pub lazy: LazyMap,
    /// Its mappings.
    pub layout: AddressSpaceLayout,
    /// Where its threads stood.
    pub threads: Vec<ThreadRegisters>,
}

/// A skeleton that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadImagesError {
    /// The file.
    #[error("cannot read the image {name}: {error}")]
    Read {
        /// Which image.
        name: String,
        /// The system's word.
        error: io::Error,
    },
    /// Its content.
    #[error("cannot understand the image {name} of this CRIU: {error}")]
    Image {
        /// Which image.
        name: String,
        /// Why.
        error: ImageError,
    },
}

/// Reads what the images in `directory` say about each process that has memory, parents before children.
pub fn read_processes(directory: &Path) -> Result<Vec<DumpedProcess>, ReadImagesError> {
    let tree = parse(directory, "pstree.img", parse_pstree)?;
    let mut processes = Vec::new();
    for entry in tree {
        let pid = entry.pid;
        let mm = format!("mm-{}.img", pid.0);
        // Zombies and helpers have no memory image.
        if !directory.join(&mm).exists() {
            continue;
        }
        let registers = entry
            .threads
            .iter()
            .map(|tid| parse(directory, &format!("core-{tid}.img"), parse_core));
        let threads = registers.collect::<Result<Vec<_>, _>>()?;
        processes.push(DumpedProcess {
            pid,
            lazy: parse(directory, &format!("pagemap-{}.img", pid.0), parse_pagemap)?.lazy,
            layout: parse(directory, &mm, parse_mm)?,
            threads: threads.into_iter().flatten().collect(),
        });
    }
    Ok(processes)
}

fn parse<T>(
    directory: &Path,
    name: &str,
    parser: fn(&[u8]) -> Result<T, ImageError>,
) -> Result<T, ReadImagesError> {
    let file = fs::read(directory.join(name)).map_err(|error| ReadImagesError::Read {
        name: name.to_owned(),
        error,
    })?;
    parser(&file).map_err(|error| ReadImagesError::Image {
        name: name.to_owned(),
        error,
    })
}
