//! Prefetch against recorded orders of first touches (`bench record`, see `lazy-restorer/tests/traces/README.md`).

use std::collections::{HashMap, HashSet};
use std::path::Path;

use common::images::ImagePid;

use super::*;
use crate::touches::Touches;

/// What following a trace comes to, in pages.
#[derive(Debug, Default)]
struct Followed {
    touched: usize,
    /// Touched before they had been asked for.
    faults: usize,
    /// Asked for as neighbours.
    neighbours: usize,
    /// Of these, touched later.
    used: usize,
}

impl Followed {
    fn faults_percent(&self) -> usize {
        self.faults * 100 / self.touched
    }

    fn used_percent(&self) -> usize {
        self.used * 100 / self.neighbours.max(1)
    }
}

/// Touches all pages of a trace in its order, with nothing but faults and their neighbours to bring them, `reach` pages
/// with a fault that continues no stream.
fn follow(name: &str, reach: usize) -> Followed {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/traces")
        .join(name);
    let trace = Touches::read(&path).expect("a record of touches");
    let mut families: HashMap<ImagePid, (Prefetch, HashSet<u64>)> = HashMap::new();
    let mut followed = Followed::default();
    for run in trace.runs() {
        let (prefetch, asked) = families.entry(run.pid).or_default();
        for page in run.start.0..run.start.0 + u64::from(run.count) {
            followed.touched += 1;
            if asked.remove(&page) {
                followed.used += 1;
                continue;
            }
            followed.faults += 1;
            let slot = usize::try_from(page).expect("64 bits");
            let window = prefetch.window(slot, usize::MAX, reach);
            let others = window.filter(|other| *other != slot);
            let new = others.filter(|other| asked.insert(*other as u64)).count();
            followed.neighbours += new;
        }
    }
    eprintln!("{name}, blocks of {reach}: {followed:?}");
    followed
}

#[test]
fn a_scan_faults_once_for_each_frame() {
    let scan = follow("scan.touches", 1);
    assert!(scan.faults_percent() <= 8, "{scan:?}");
    assert!(scan.used_percent() >= 95, "{scan:?}");
}

#[test]
fn a_random_walk_is_left_alone() {
    let random = follow("touch.touches", 1);
    assert!(random.neighbours * 10 < random.touched, "{random:?}");
}

/// Nothing is pushed here, so it only waits: it has blocks.
#[test]
fn a_redis_gets_what_it_uses() {
    for name in ["redis.touches", "redis-zipf.touches"] {
        for reach in [8, 16, 32] {
            let redis = follow(name, reach);
            assert!(redis.faults_percent() <= 65, "{redis:?}");
            assert!(redis.used_percent() >= 20, "{redis:?}");
        }
    }
}

#[test]
fn a_redis_that_works_between_its_faults_gets_little_besides() {
    for name in ["redis.touches", "redis-zipf.touches"] {
        let redis = follow(name, 1);
        assert!(redis.neighbours < redis.touched, "{redis:?}");
    }
}

#[test]
fn blocks_make_faults_fewer_whatever_is_touched() {
    for name in ["redis.touches", "redis-zipf.touches", "touch.touches"] {
        let [alone, blocks] = [1, 32].map(|reach| follow(name, reach));
        assert!(
            blocks.faults * 10 < alone.faults * 9,
            "{name}: {blocks:?}, {alone:?}"
        );
    }
}
