//! What is offered to destinations when somebody else made the dump: its images, and the content of its lazy pages.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::host;
use common::images::{
    DumpedProcess, ImagePid, ImagesDigest, ReadImagesError, images_digest, parse_pstree,
    read_processes,
};
use common::page::PAGE_SIZE;
use common::proto::control::{MoreFacts, WorkloadFacts};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::book::Book;
use crate::frozen::{TakeError, located};
use crate::image_pages::ImagePages;
use crate::memory::{FrozenProcesses, PageSource};
use crate::thin::{skeleton_of_full_dump, skeleton_of_lazy_dump};
use crate::workload::Workload;

/// A dump that can be served, to any number of destinations.
#[derive(Debug)]
pub struct Offer {
    /// Where page content comes from.
    pub source: Arc<dyn PageSource>,
    /// Which dump it is.
    pub digest: ImagesDigest,
    /// What destinations must know beforehand.
    pub facts: WorkloadFacts,
    processes: Vec<DumpedProcess>,
    /// Holds `skeleton`, and `nothing`, an empty directory for destinations that have the images.
    directory: TempDir,
}

/// Why there is nothing to offer.
#[derive(Debug, thiserror::Error)]
pub enum OfferError {
    /// The images.
    #[error("{}: {error}", directory.display())]
    Images {
        /// Where.
        directory: PathBuf,
        /// Why.
        error: ReadImagesError,
    },
    /// The frozen processes.
    #[error(transparent)]
    Frozen(#[from] TakeError),
    /// A directory of our own.
    #[error("no place for the skeleton: {0}")]
    Staging(#[from] std::io::Error),
}

/// What the operator says of a dump.
#[derive(Clone, Copy, Debug, Default)]
pub struct Dumped {
    /// With established TCP connections.
    pub tcp_established: bool,
    /// Of a shell's session.
    pub shell_job: bool,
}

impl Offer {
    /// Offers the full dump in `images`.
    pub fn of_images(
        images: &Path,
        dumped: Dumped,
        work_dir: Option<&Path>,
    ) -> Result<Self, OfferError> {
        let failed = |error| OfferError::Images {
            directory: images.to_owned(),
            error,
        };
        let processes = read_processes(images).map_err(failed)?;
        let source = ImagePages::open(images, &processes).map_err(failed)?;
        let offer = Self::new(images, processes, Arc::new(source), dumped, work_dir)?;
        skeleton_of_full_dump(images, &offer.processes, &offer.skeleton()).map_err(failed)?;
        Ok(offer)
    }

    /// Offers the lazy dump in `images` of the tree of `root`, which stands frozen.
    pub fn of_frozen(
        images: &Path,
        root: Pid,
        dumped: Dumped,
        work_dir: Option<&Path>,
    ) -> Result<Self, OfferError> {
        let failed = |error| OfferError::Images {
            directory: images.to_owned(),
            error,
        };
        let processes = read_processes(images).map_err(failed)?;
        let workload = Workload::frozen(root);
        let pids: HashMap<ImagePid, Pid> = workload.by_image_pid();
        let located = located(&processes, &pids)?;
        let source = FrozenProcesses::open(located).map_err(TakeError::from)?;
        let mut offer = Self::new(images, processes, Arc::new(source), dumped, work_dir)?;
        offer.facts.more = workload.more_facts();
        skeleton_of_lazy_dump(images, &offer.skeleton()).map_err(failed)?;
        Ok(offer)
    }

    fn new(
        images: &Path,
        processes: Vec<DumpedProcess>,
        source: Arc<dyn PageSource>,
        dumped: Dumped,
        work_dir: Option<&Path>,
    ) -> Result<Self, OfferError> {
        let failed = |error| OfferError::Images {
            directory: images.to_owned(),
            error,
        };
        let directory = host::staging_directory(work_dir)?;
        for name in ["skeleton", "nothing"] {
            std::fs::create_dir(directory.path().join(name))?;
        }
        Ok(Offer {
            digest: images_digest(images, &processes).map_err(failed)?,
            facts: facts(images, &processes, dumped).map_err(failed)?,
            source,
            processes,
            directory,
        })
    }

    /// The directory with the skeleton.
    pub fn skeleton(&self) -> PathBuf {
        self.directory.path().join("skeleton")
    }

    /// The skeleton for whom has the images already: none.
    pub fn nothing(&self) -> PathBuf {
        self.directory.path().join("nothing")
    }

    /// A new book on what one destination is owed.
    pub fn book(&self) -> Book {
        Book::of(&self.processes)
    }

    /// The book on what a destination is owed that another program served before us.
    pub fn book_of_left(&self) -> Book {
        Book::of_left(&self.processes)
    }
}

/// What the images say of the workload; of its CPU they do not say, so it is taken for one like this host's.
fn facts(
    images: &Path,
    processes: &[DumpedProcess],
    dumped: Dumped,
) -> Result<WorkloadFacts, ReadImagesError> {
    let name = String::from("pstree.img");
    let tree = std::fs::read(images.join(&name)).map_err(|error| ReadImagesError::Read {
        name: name.clone(),
        error,
    })?;
    let tree = parse_pstree(&tree).map_err(|error| ReadImagesError::Image { name, error })?;
    let lazy = processes.iter().map(|process| process.lazy.slots() as u64);
    Ok(WorkloadFacts {
        architecture: host::architecture(),
        kernel: host::kernel(),
        page_size: PAGE_SIZE as u64,
        criu: String::from("of the images"),
        cpu_features: host::cpu_features(),
        pids: tree.into_iter().flat_map(|entry| entry.threads).collect(),
        name: images.display().to_string(),
        resident_pages: lazy.sum(),
        tcp_established: dumped.tcp_established,
        shell_job: dumped.shell_job,
        // Whoever made the dump looks after these, and CRIU compares the files it restores. Frozen tasks tell more.
        more: MoreFacts::default(),
    })
}
