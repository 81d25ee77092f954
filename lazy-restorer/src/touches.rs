//! The order in which a workload touched its memory first: recorded in one migration, wished for in the next.
//!
//! A touch is known by its fault, so a recording is complete only while nothing is pushed. The file: the magic
//! `pcTOUCH` and the version in one byte; the number of processes, their PIDs as in the images, parents first; the
//! number of runs; for each run the index of its process, the way from the end of the run before to its start, and its
//! pages. All numbers are varints as in postcard, the way is zigzag-coded. At the end XXH3 of everything before.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;

use common::images::ImagePid;
use common::limits::{MAX_PROCESSES, MAX_WANTED_RUNS};
use common::page::{PageIndex, PageRange};
use common::proto::credit::WantedRun;
use xxhash_rust::xxh3::xxh3_64;

const MAGIC: &[u8; 8] = b"pcTOUCH\x01";
const CHECKSUM_BYTES: usize = size_of::<u64>();
/// Longest file: every number at its longest.
const MAX_FILE_BYTES: u64 = 32 * (MAX_WANTED_RUNS + MAX_PROCESSES) as u64;

/// Why a record of touches is of no use.
#[derive(Debug, thiserror::Error)]
pub enum TouchesError {
    /// The file.
    #[error("{0}")]
    File(#[from] io::Error),
    /// It is something else.
    #[error("it is no record of touches, or one of another version")]
    Foreign,
    /// It is damaged.
    #[error("it is damaged")]
    Damaged,
}

/// First touches in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touches {
    /// PIDs in the images, parents first.
    pids: Vec<ImagePid>,
    runs: Vec<WantedRun>,
}

impl Touches {
    /// Nothing was touched yet of the processes with these PIDs, parents first.
    pub fn new(pids: Vec<ImagePid>) -> Self {
        Touches {
            pids,
            runs: Vec::new(),
        }
    }

    /// Pages were asked for. What comes after the limit is not recorded.
    pub fn note(&mut self, pid: ImagePid, pages: PageRange) {
        let Ok(count) = u32::try_from(pages.count) else {
            return;
        };
        if let Some(last) = self.runs.last_mut()
            && last.pid == pid
            && last.pages().end() == pages.start
            && let Some(sum) = last.count.checked_add(count)
        {
            last.count = sum;
            return;
        }
        if self.runs.len() < MAX_WANTED_RUNS {
            self.runs.push(WantedRun {
                pid,
                start: pages.start,
                count,
            });
        }
    }

    /// The runs, for a tree whose processes have these PIDs, parents first. A tree of the same shape is taken for the
    /// same when its PIDs are others; `None` for a tree of another shape.
    pub fn runs_for(&self, pids: &[ImagePid]) -> Option<Vec<WantedRun>> {
        let mut renamed = self.runs.clone();
        if self.pids.iter().all(|pid| pids.contains(pid)) {
            return Some(renamed);
        }
        if self.pids.len() != pids.len() {
            return None;
        }
        let names: HashMap<_, _> = self.pids.iter().zip(pids).collect();
        for run in &mut renamed {
            run.pid = *names.get(&run.pid).copied()?;
        }
        Some(renamed)
    }

    /// Writes the file.
    pub fn write(&self, path: &Path) -> Result<(), TouchesError> {
        Ok(fs::write(path, self.encode())?)
    }

    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self, TouchesError> {
        if fs::metadata(path)?.len() > MAX_FILE_BYTES {
            return Err(TouchesError::Foreign);
        }
        Self::decode(&fs::read(path)?)
    }

    /// The file's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        put(&mut bytes, self.pids.len() as u64);
        for pid in &self.pids {
            put(&mut bytes, u64::from(pid.0));
        }
        put(&mut bytes, self.runs.len() as u64);
        let index: HashMap<_, _> = self.pids.iter().zip(0_u64..).collect();
        let mut at = 0_u64;
        for run in &self.runs {
            // Runs of a process that is not in the table cannot be: requests are for processes of the skeleton.
            put(&mut bytes, index.get(&run.pid).copied().unwrap_or(0));
            put(
                &mut bytes,
                zigzag(run.start.0.wrapping_sub(at).cast_signed()),
            );
            put(&mut bytes, u64::from(run.count));
            at = run.pages().end().0;
        }
        let checksum = xxh3_64(&bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// What a file holds.
    pub fn decode(bytes: &[u8]) -> Result<Self, TouchesError> {
        let body = bytes.strip_prefix(MAGIC).ok_or(TouchesError::Foreign)?;
        let (body, checksum) = body
            .split_last_chunk::<CHECKSUM_BYTES>()
            .ok_or(TouchesError::Damaged)?;
        let covered = &bytes[..bytes.len() - CHECKSUM_BYTES];
        if xxh3_64(covered) != u64::from_le_bytes(*checksum) {
            return Err(TouchesError::Damaged);
        }
        let touches = Self::take(&mut { body });
        touches.ok_or(TouchesError::Damaged)
    }

    fn take(bytes: &mut &[u8]) -> Option<Self> {
        let mut pids = Vec::new();
        for _ in 0..at_most(take(bytes)?, MAX_PROCESSES)? {
            pids.push(ImagePid(u32::try_from(take(bytes)?).ok()?));
        }
        let mut runs = Vec::new();
        let mut at = 0_u64;
        for _ in 0..at_most(take(bytes)?, MAX_WANTED_RUNS)? {
            let pid = *pids.get(usize::try_from(take(bytes)?).ok()?)?;
            let start = at.wrapping_add_signed(unzigzag(take(bytes)?));
            let count = u32::try_from(take(bytes)?).ok()?;
            let run = WantedRun {
                pid,
                start: PageIndex(start),
                count,
            };
            if count == 0 || !run.pages().is_addressable() {
                return None;
            }
            at = run.pages().end().0;
            runs.push(run);
        }
        bytes.is_empty().then_some(Touches { pids, runs })
    }
}

fn at_most(number: u64, limit: usize) -> Option<u64> {
    (number <= limit as u64).then_some(number)
}

fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..u64::BITS).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let bits = u64::from(byte & 0x7f);
        if bits << shift >> shift != bits {
            return None;
        }
        number |= bits << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

fn zigzag(number: i64) -> u64 {
    ((number << 1) ^ (number >> 63)).cast_unsigned()
}

fn unzigzag(number: u64) -> i64 {
    (number >> 1).cast_signed() ^ -(number & 1).cast_signed()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn touches(runs: &[(u32, u64, u64)]) -> Touches {
        let mut touches = Touches::new(vec![ImagePid(70), ImagePid(71)]);
        for (pid, start, count) in runs {
            touches.note(ImagePid(*pid), PageRange::new(PageIndex(*start), *count));
        }
        touches
    }

    fn any_runs() -> impl Strategy<Value = Vec<(u32, u64, u64)>> {
        proptest::collection::vec((70_u32..72, 0..1_u64 << 52, 1..17_u64), 0..50)
    }

    /// Makes the checksum right, so that what is behind it is tested too.
    fn sealed(body: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(body);
        let checksum = xxh3_64(&bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes
    }

    proptest! {
        #[test]
        fn a_record_survives_the_file(runs in any_runs()) {
            let touches = touches(&runs);
            prop_assert_eq!(Touches::decode(&touches.encode()).ok(), Some(touches));
        }

        #[test]
        fn damage_is_noticed(runs in any_runs(), at: usize, bit in 0..8_u32) {
            let mut bytes = touches(&runs).encode();
            let at = at % bytes.len();
            prop_assert!(Touches::decode(&bytes[..at]).is_err());
            bytes[at] ^= 1 << bit;
            prop_assert!(Touches::decode(&bytes).is_err());
        }

        #[test]
        fn random_bytes_decode_to_what_encodes_back_or_fail(body in proptest::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(touches) = Touches::decode(&sealed(&body)) {
                let again = Touches::decode(&touches.encode()).ok();
                prop_assert_eq!(again, Some(touches));
            }
        }
    }

    #[test]
    fn forged_counts_allocate_nothing() {
        let mut body = Vec::new();
        put(&mut body, MAX_PROCESSES as u64 + 1);
        assert!(Touches::decode(&sealed(&body)).is_err());
        let mut body = vec![1, 70];
        put(&mut body, u64::MAX);
        assert!(Touches::decode(&sealed(&body)).is_err());
        assert!(Touches::decode(&sealed(&[0xff; 40])).is_err());
    }

    #[test]
    fn pages_in_a_row_are_one_run() {
        let touches = touches(&[(70, 10, 1), (70, 11, 4), (71, 15, 1), (70, 9, 1)]);
        let counts: Vec<u32> = touches.runs.iter().map(|run| run.count).collect();
        assert_eq!(counts, [5, 1, 1]);
    }

    #[test]
    fn a_tree_of_the_same_shape_is_the_same_tree() {
        let touches = touches(&[(70, 10, 1), (71, 20, 1)]);
        let pids = |pids: &[u32]| -> Vec<ImagePid> { pids.iter().copied().map(ImagePid).collect() };
        let names = |tree: &[u32]| -> Option<Vec<u32>> {
            let runs = touches.runs_for(&pids(tree))?;
            Some(runs.iter().map(|run| run.pid.0).collect())
        };
        assert_eq!(names(&[70, 71]), Some(vec![70, 71]));
        assert_eq!(names(&[70, 80, 71]), Some(vec![70, 71]));
        assert_eq!(names(&[500, 400]), Some(vec![500, 400]));
        assert_eq!(names(&[500]), None);
    }
}
