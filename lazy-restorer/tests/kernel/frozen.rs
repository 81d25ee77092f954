//! What the frozen process looks like: both the workload and its source know it by heart.

use common::images::{DumpedVma, ImagePid};
use common::lazy_map::LazyMap;
use common::page::{PAGE_SIZE, PageIndex, PageRange};
use lazy_restorer::memory::ProcessImage;

pub const PID: ImagePid = ImagePid(1);
/// Far from anything the kernel chooses by itself.
const FIRST_PAGE: u64 = 0x2000_0000_0000 / PAGE_SIZE as u64;

pub type Page = [u64; PAGE_SIZE / 8];

/// What a page of the workload must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// What it held at the freeze, under this number.
    Frozen(PageIndex),
    /// What the workload wrote, under this number.
    Own(u64),
    Zero,
}

/// The frozen memory: one run of mappings.
#[derive(Clone, Copy, Debug)]
pub struct Frozen {
    pub seed: u64,
    pub pages: u64,
    /// Length of each mapping.
    pub vma_pages: u64,
}

impl Frozen {
    pub fn whole(&self) -> PageRange {
        PageRange::new(PageIndex(FIRST_PAGE), self.pages)
    }

    pub fn page(&self, index: u64) -> PageIndex {
        PageIndex(FIRST_PAGE + index)
    }

    /// Whether the source has the page; the others never had content.
    pub fn is_lazy(&self, page: PageIndex) -> bool {
        (page.0 - FIRST_PAGE) % 37 != 3
    }

    fn is_zero(&self, page: PageIndex) -> bool {
        !self.is_lazy(page) || mix(self.seed ^ page.0).is_multiple_of(8)
    }

    /// The bytes a page in this state holds.
    pub fn content(&self, state: State) -> Page {
        let seed = match state {
            State::Frozen(page) if !self.is_zero(page) => self.seed ^ mix(page.0),
            State::Frozen(_) | State::Zero => return [0; PAGE_SIZE / 8],
            State::Own(tag) => !self.seed ^ mix(tag),
        };
        std::array::from_fn(|index| mix(seed.wrapping_add(index as u64)) | 1)
    }

    /// The zero bitmap and the payload of a frame of these pages.
    pub fn frame(&self, pages: PageRange) -> (u64, Vec<u8>) {
        let mut zero = 0;
        let mut payload = Vec::new();
        for index in 0..pages.count {
            let page = pages.start.forward(index);
            if self.is_zero(page) {
                zero |= 1 << index;
            } else {
                let words = self.content(State::Frozen(page));
                payload.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
            }
        }
        (zero, payload)
    }

    pub fn image(&self) -> ProcessImage {
        let pages = (0..self.pages).map(|index| self.page(index));
        let lazy = pages.filter(|page| self.is_lazy(*page));
        let lazy = lazy.map(|page| PageRange::new(page, 1));
        let starts = (0..self.pages).step_by(self.vma_pages as usize);
        let vmas = starts.map(|start| DumpedVma {
            pages: PageRange::new(self.page(start), self.vma_pages.min(self.pages - start)),
            lazy: true,
            huge_pages: false,
        });
        ProcessImage {
            pid: PID,
            lazy: LazyMap::new(lazy).expect("the pages are in order"),
            vmas: vmas.collect(),
        }
    }
}

/// A well-mixed number (splitmix64).
pub fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Random numbers from a seed.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}
