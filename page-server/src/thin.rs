//! The skeleton of a dump whose images someone else made: a directory with everything but the content of lazy pages.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::symlink;
use std::path::Path;

use common::images::{DumpedProcess, ImagePid, ReadImagesError, StoredPages, without_lazy_content};
use common::proto::skeleton_name::SkeletonName;

use crate::image_pages::stored_pages;

/// Fills the empty directory `skeleton` from the full dump in `images`, whose processes are `processes`.
///
/// What does not change is linked. Files that are no images (logs, sockets) are left out.
pub fn skeleton_of_full_dump(
    images: &Path,
    processes: &[DumpedProcess],
    skeleton: &Path,
) -> Result<(), ReadImagesError> {
    skeleton_of_lazy_dump(images, skeleton)?;
    for process in processes {
        let stored = stored_pages(images, process.pid)?;
        replace_pagemap(images, process.pid, skeleton)?;
        let name = format!("pages-{}.img", stored.file);
        eager_pages(&images.join(&name), &stored, &skeleton.join(&name))
            .map_err(|error| ReadImagesError::Read { name, error })?;
    }
    Ok(())
}

/// Fills the empty directory `skeleton` with links to the images of a lazy dump.
pub fn skeleton_of_lazy_dump(images: &Path, skeleton: &Path) -> Result<(), ReadImagesError> {
    let failed = |error| ReadImagesError::Read {
        name: images.display().to_string(),
        error,
    };
    let images = fs::canonicalize(images).map_err(failed)?;
    for entry in fs::read_dir(&images).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        if SkeletonName::parse(&name.to_string_lossy()).is_some() {
            symlink(entry.path(), skeleton.join(&name)).map_err(failed)?;
        }
    }
    Ok(())
}

fn replace_pagemap(images: &Path, pid: ImagePid, skeleton: &Path) -> Result<(), ReadImagesError> {
    let name = format!("pagemap-{}.img", pid.0);
    let failed = |error| ReadImagesError::Read {
        name: name.clone(),
        error,
    };
    let pagemap = fs::read(images.join(&name)).map_err(failed)?;
    let pagemap = without_lazy_content(&pagemap).map_err(|error| ReadImagesError::Image {
        name: name.clone(),
        error,
    })?;
    replace(&skeleton.join(&name), |file| file.write_all(&pagemap)).map_err(failed)
}

/// Writes the pages of `all` that are not lazy.
fn eager_pages(all: &Path, stored: &StoredPages, eager: &Path) -> io::Result<()> {
    let mut all = File::open(all)?;
    replace(eager, |file| {
        let mut offset = 0_u64;
        for run in &stored.runs {
            let length = run.pages.bytes();
            if !run.lazy {
                all.seek(SeekFrom::Start(offset))?;
                if io::copy(&mut Read::take(&all, length), file)? < length {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            offset += length;
        }
        Ok(())
    })
}

/// Puts a new file where there is a link.
fn replace(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    fs::remove_file(path)?;
    fill(&mut File::create_new(path)?)
}

#[cfg(test)]
mod tests {
    use common::images::StoredRun;
    use common::page::{PAGE_SIZE, PageIndex, PageRange};

    use super::*;

    #[test]
    fn only_eager_pages_are_written() {
        let dir = tempfile::tempdir().expect("a directory");
        let (all, eager) = (dir.path().join("all"), dir.path().join("eager"));
        let content: Vec<u8> = (0..4).flat_map(|fill| [fill; PAGE_SIZE]).collect();
        fs::write(&all, content).expect("written");
        symlink(&all, &eager).expect("linked");
        let run = |page, count, lazy| StoredRun {
            pages: PageRange::new(PageIndex(page), count),
            lazy,
        };
        let mut stored = StoredPages {
            file: 1,
            runs: vec![run(1, 1, false), run(2, 2, true), run(9, 1, false)],
        };
        eager_pages(&all, &stored, &eager).expect("written");
        let written = fs::read(&eager).expect("there");
        assert_eq!(written, [[0; PAGE_SIZE], [3; PAGE_SIZE]].concat());
        assert_eq!(
            fs::metadata(&all).expect("there").len(),
            4 * PAGE_SIZE as u64
        );
        stored.runs.push(run(20, 1, false));
        assert!(
            eager_pages(&all, &stored, &eager).is_err(),
            "the file is short"
        );
    }

    #[test]
    fn logs_and_sockets_stay() {
        let images = tempfile::tempdir().expect("a directory");
        let skeleton = tempfile::tempdir().expect("a directory");
        for name in ["files.img", "dump.log", "stats-dump"] {
            fs::write(images.path().join(name), name).expect("written");
        }
        skeleton_of_lazy_dump(images.path(), skeleton.path()).expect("made");
        let names: Vec<_> = fs::read_dir(skeleton.path())
            .expect("there")
            .map(|entry| entry.expect("there").file_name())
            .collect();
        assert_eq!(names, ["files.img"]);
    }
}
